use halfbyte_core::Result;
use halfbyte_core::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};

use crate::args::{aligned_mut, args, dtype_index, optional};
use crate::launch::{Family, Geometry, Launcher, extent, family};

const FORWARD: [&str; 3] = ["cross_entropy_f32", "cross_entropy_f16", "cross_entropy_bf16"];
const BACKWARD: [&str; 3] = ["cross_entropy_backward_f32", "cross_entropy_backward_f16", "cross_entropy_backward_bf16"];
const KERNELS: [&str; 6] = [FORWARD[0], FORWARD[1], FORWARD[2], BACKWARD[0], BACKWARD[1], BACKWARD[2]];
pub(crate) static FAMILY: Family = family!("cross_entropy", &KERNELS);

pub(crate) const THREADS: u32 = 1024;
/// of a CTA that takes some columns of one row, eight each
pub(crate) const FEW: u32 = 256;

pub(crate) fn launch(launcher: &Launcher, args: CrossEntropy<'_>) -> Result<()> {
    let (rows, stride, dtype) = (args.labels.numel(), args.stride(), args.logits.dtype());
    if rows == 0 {
        return Ok(());
    }
    let vector = aligned_mut(&args.logits, 16) && (stride * dtype.size()).is_multiple_of(16);
    launcher.launch(
        &FAMILY,
        FORWARD[dtype_index(dtype)],
        Geometry { grid: (extent(rows), 1, 1), block: (THREADS, 1, 1), shared: 0, overlaps: true },
        args![
            args.logits.ptr(),
            args.labels.ptr(),
            args.losses.ptr(),
            args.logsumexps.ptr(),
            stride as i64,
            optional(args.divisor),
            args.vocab as i32,
            vector,
        ],
    )
}

pub(crate) fn launch_backward(launcher: &Launcher, args: CrossEntropyBackward<'_>) -> Result<()> {
    let (rows, stride, dtype) = (args.labels.numel(), args.stride(), args.logits.dtype());
    if rows == 0 {
        return Ok(());
    }
    let vector = aligned_mut(&args.logits, 16) && (stride * dtype.size()).is_multiple_of(16);
    let columns = extent(args.width.div_ceil(8 * FEW as usize));
    launcher.launch(
        &FAMILY,
        BACKWARD[dtype_index(dtype)],
        Geometry { grid: (extent(rows), columns, 1), block: (FEW, 1, 1), shared: 0, overlaps: true },
        args![
            args.logits.ptr(),
            args.labels.ptr(),
            args.logsumexps.ptr(),
            stride as i64,
            args.divisor.ptr(),
            args.first as i32,
            args.width as i32,
            vector,
        ],
    )
}
