use halfbyte_core::Result;
use halfbyte_core::ops::cross_entropy::CrossEntropy;

use crate::args::{aligned_mut, args, dtype_index, optional};
use crate::launch::{Family, Geometry, Launcher, extent, family};

const KERNELS: [&str; 3] = ["cross_entropy_f32", "cross_entropy_f16", "cross_entropy_bf16"];
pub(crate) static FAMILY: Family = family!("cross_entropy", &KERNELS);

pub(crate) const THREADS: u32 = 1024;

pub(crate) fn launch(launcher: &Launcher, args: CrossEntropy<'_>) -> Result<()> {
    let (rows, stride, dtype) = (args.labels.numel(), args.stride(), args.logits.dtype());
    if rows == 0 {
        return Ok(());
    }
    let vector = aligned_mut(&args.logits, 16) && (stride * dtype.size()).is_multiple_of(16);
    launcher.launch(
        &FAMILY,
        KERNELS[dtype_index(dtype)],
        Geometry { grid: (extent(rows), 1, 1), block: (THREADS, 1, 1), shared: 0, overlaps: true },
        args![
            args.logits.ptr(),
            args.labels.ptr(),
            args.losses.ptr(),
            stride as i64,
            optional(args.divisor),
            args.vocab as i32,
            vector,
        ],
    )
}
