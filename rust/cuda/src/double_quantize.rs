use halfbyte_core::Result;
use halfbyte_core::ops::double_quantize::{DoubleQuantize, MEAN_CHUNK, MEAN_LANES};

use crate::args::args;
use crate::launch::{Family, Geometry, Launcher, extent, family};

const LANES: &str = "double_quantize_lanes";
const CODES: &str = "double_quantize_codes";
pub(crate) static FAMILY: Family = family!("double_quantize", &[LANES, CODES]);

pub(crate) const THREADS: u32 = 512;
/// Running sums of a CTA.
pub(crate) const SHARE: usize = 16;
/// Of a multiprocessor, where scales are encoded.
pub(crate) const CTAS: usize = 2;
/// Block scales that one CTA encodes at a time, a warp for each nested scale.
const TILE: usize = 256 * (THREADS as usize / 32);

fn geometry(ctas: usize) -> Geometry {
    Geometry { grid: (extent(ctas), 1, 1), block: (THREADS, 1, 1), shared: 0, overlaps: true }
}

pub(crate) fn launch(launcher: &Launcher, args: DoubleQuantize<'_>) -> Result<()> {
    let (absmax, blocks, lanes) = (args.absmax.ptr(), args.absmax.numel(), args.lanes.ptr());
    if blocks > 0 {
        let ctas = blocks.div_ceil(MEAN_CHUNK) * (MEAN_LANES / SHARE);
        launcher.launch(&FAMILY, LANES, geometry(ctas), args![absmax, lanes, blocks as i64])?;
    }
    let (codes, nested, offset) = (args.codes.ptr(), args.nested_absmax.ptr(), args.offset.ptr());
    let ctas = blocks.div_ceil(TILE).clamp(1, CTAS * launcher.limits().multiprocessors);
    launcher.launch(&FAMILY, CODES, geometry(ctas), args![absmax, lanes, codes, nested, offset, blocks as i64])
}
