use halfbyte_core::Result;
use halfbyte_core::ops::quantize_4bit::Quantize4bit;

use crate::args::{aligned, aligned_mut, args, codebook_row, dtype_index, log2};
use crate::launch::{Family, Geometry, Launcher, extent, family};

const KERNELS: [&str; 3] = ["quantize_4bit_f32", "quantize_4bit_f16", "quantize_4bit_bf16"];
pub(crate) static FAMILY: Family = family!("quantize_4bit", &KERNELS);

pub(crate) const THREADS: u32 = 512;
/// Of a multiprocessor; they take the tiles in turn.
pub(crate) const CTAS: usize = 2;
const TILE: usize = 8 * THREADS as usize;

pub(crate) fn launch(launcher: &Launcher, args: Quantize4bit<'_>) -> Result<()> {
    let (x, n) = (args.x, args.x.numel());
    if n == 0 {
        return Ok(());
    }
    let vector = aligned(x, 16) && aligned_mut(&args.packed, 8);
    let ctas = n.div_ceil(TILE).min(CTAS * launcher.limits().multiprocessors);
    launcher.launch(
        &FAMILY,
        KERNELS[dtype_index(x.dtype())],
        Geometry { grid: (extent(ctas), 1, 1), block: (THREADS, 1, 1), shared: 0, overlaps: true },
        args![
            x.ptr(),
            args.packed.ptr(),
            args.absmax.ptr(),
            n as i64,
            log2(args.blocksize),
            codebook_row(args.quant_type),
            vector,
        ],
    )
}
