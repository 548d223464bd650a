use halfbyte_core::Result;
use halfbyte_core::ops::double_quantize::DoubleQuantize;

use crate::args::args;
use crate::launch::{Family, Launcher, family};

const SUMS: &str = "double_quantize_sums";
const OFFSET: &str = "double_quantize_offset";
const CODES: &str = "double_quantize_codes";
pub(crate) static FAMILY: Family = family!("double_quantize", &[SUMS, OFFSET, CODES]);

pub(crate) const THREADS: u32 = 256;
pub(crate) const CHUNK: usize = 65536;
/// Block scales that one CTA encodes, a warp for each nested scale.
const TILE: usize = 256 * (THREADS as usize / 32);

pub(crate) fn launch(launcher: &Launcher, args: DoubleQuantize<'_>) -> Result<()> {
    let (absmax, nested, offset) = (args.absmax.ptr(), args.nested_absmax.ptr(), args.offset.ptr());
    let blocks = args.absmax.numel();
    let whole_chunks = blocks / CHUNK;
    if whole_chunks > 0 {
        launcher.launch_1d(&FAMILY, SUMS, whole_chunks, THREADS, args![absmax, nested])?;
    }
    launcher.launch_1d(&FAMILY, OFFSET, 1, THREADS, args![absmax, nested, offset, blocks as i64])?;
    if blocks == 0 {
        return Ok(());
    }
    let ctas = blocks.div_ceil(TILE);
    launcher.launch_1d(&FAMILY, CODES, ctas, THREADS, args![absmax, offset, args.codes.ptr(), nested, blocks as i64])
}
