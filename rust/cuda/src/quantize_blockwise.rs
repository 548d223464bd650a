use halfbyte_core::Result;
use halfbyte_core::ops::quantize_blockwise::QuantizeBlockwise;

use crate::args::{aligned, aligned_mut, args, dtype_index, log2};
use crate::launch::{Family, Launcher, family};

const KERNELS: [&str; 3] = ["quantize_blockwise_f32", "quantize_blockwise_f16", "quantize_blockwise_bf16"];
pub(crate) static FAMILY: Family = family!("quantize_blockwise", &KERNELS);

pub(crate) const THREADS: u32 = 512;
const TILE: usize = 8 * THREADS as usize;

pub(crate) fn launch(launcher: &Launcher, args: QuantizeBlockwise<'_>) -> Result<()> {
    let (x, n) = (args.x, args.x.numel());
    if n == 0 {
        return Ok(());
    }
    let vector = aligned(x, 16) && aligned_mut(&args.codes, 8);
    launcher.launch_1d(
        &FAMILY,
        KERNELS[dtype_index(x.dtype())],
        n.div_ceil(TILE),
        THREADS,
        args![
            x.ptr(),
            args.codes.ptr(),
            args.absmax.ptr(),
            n as i64,
            log2(args.blocksize),
            i32::from(args.signed),
            vector,
        ],
    )
}
