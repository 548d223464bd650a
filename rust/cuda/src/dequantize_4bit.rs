use halfbyte_core::Result;
use halfbyte_core::ops::dequantize_4bit::Dequantize4bit;

use crate::args::{DeviceAbsmax, aligned, aligned_mut, args, codebook_row, dtype_index, log2};
use crate::launch::{Family, Geometry, Launcher, extent, family};

const KERNELS: [&str; 3] = ["dequantize_4bit_f32", "dequantize_4bit_f16", "dequantize_4bit_bf16"];
pub(crate) static FAMILY: Family = family!("dequantize_4bit", &KERNELS);

pub(crate) const THREADS: u32 = 512;
/// 16-byte stores a thread.
pub(crate) const GROUPS: usize = 2;

pub(crate) fn launch(launcher: &Launcher, args: Dequantize4bit<'_>) -> Result<()> {
    let (n, dtype) = (args.out.numel(), args.out.dtype());
    if n == 0 {
        return Ok(());
    }
    let tile = THREADS as usize * GROUPS * 16 / dtype.size();
    let vector = aligned(args.packed, 4) && aligned_mut(&args.out, 16);
    let grid = (extent(n.div_ceil(tile)), 1, 1);
    launcher.launch(
        &FAMILY,
        KERNELS[dtype_index(dtype)],
        Geometry { grid, block: (THREADS, 1, 1), shared: 0, overlaps: true },
        args![
            args.packed.ptr(),
            DeviceAbsmax::from(args.absmax),
            args.out.ptr(),
            n as i64,
            log2(args.blocksize),
            codebook_row(args.quant_type),
            vector,
        ],
    )
}
