use halfbyte_core::Result;
use halfbyte_core::ops::dequantize_blockwise::DequantizeBlockwise;

use crate::args::{args, dtype_index, log2};
use crate::launch::{Family, Launcher, family};

const KERNELS: [&str; 3] = ["dequantize_blockwise_f32", "dequantize_blockwise_f16", "dequantize_blockwise_bf16"];
pub(crate) static FAMILY: Family = family!("dequantize_blockwise", &KERNELS);

pub(crate) const THREADS: u32 = 256;
pub(crate) const PER_THREAD: usize = 8;

pub(crate) fn launch(launcher: &Launcher, args: DequantizeBlockwise<'_>) -> Result<()> {
    let (n, dtype) = (args.out.numel(), args.out.dtype());
    if n == 0 {
        return Ok(());
    }
    launcher.launch_1d(
        &FAMILY,
        KERNELS[dtype_index(dtype)],
        n.div_ceil(THREADS as usize * PER_THREAD),
        THREADS,
        args![
            args.codes.ptr(),
            args.absmax.ptr(),
            args.out.ptr(),
            n as i64,
            log2(args.blocksize),
            i32::from(args.signed),
        ],
    )
}
