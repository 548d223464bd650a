use halfbyte_core::Result;
use halfbyte_core::ops::double_quantize::{DoubleQuantize, MEAN_CHUNK};

use crate::args::args;
use crate::launch::{Family, Geometry, Launcher, extent, family};

const SUMS: &str = "double_quantize_sums";
const CODES: &str = "double_quantize_codes";
pub(crate) static FAMILY: Family = family!("double_quantize", &[SUMS, CODES]);

pub(crate) const THREADS: u32 = 256;
/// Block scales that one CTA encodes, a warp for each nested scale.
const TILE: usize = 256 * (THREADS as usize / 32);

fn geometry(ctas: usize) -> Geometry {
    Geometry { grid: (extent(ctas), 1, 1), block: (THREADS, 1, 1), shared: 0, overlaps: true }
}

pub(crate) fn launch(launcher: &Launcher, args: DoubleQuantize<'_>) -> Result<()> {
    let (absmax, blocks, sums) = (args.absmax.ptr(), args.absmax.numel(), args.sums.ptr());
    if blocks > 0 {
        let chunks = blocks.div_ceil(MEAN_CHUNK);
        launcher.launch(&FAMILY, SUMS, geometry(chunks), args![absmax, sums, blocks as i64])?;
    }
    let (codes, nested, offset) = (args.codes.ptr(), args.nested_absmax.ptr(), args.offset.ptr());
    launcher.launch(
        &FAMILY,
        CODES,
        geometry(blocks.div_ceil(TILE).max(1)),
        args![absmax, sums, codes, nested, offset, blocks as i64],
    )
}
