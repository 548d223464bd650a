use halfbyte_core::ops::rms_norm::{RmsNorm, RmsNormBackward, SLICES};
use halfbyte_core::{DType, Result, TensorRef};

use crate::args::{aligned, args, dtype_index, optional};
use crate::launch::{Family, Geometry, Launcher, extent, family};

/// By the dtype of x and that of the weight.
const ROWS: [[&str; 2]; 5] = [
    ["rms_norm_f32_f32", "rms_norm_backward_f32_f32"],
    ["rms_norm_f16_f32", "rms_norm_backward_f16_f32"],
    ["rms_norm_f16_f16", "rms_norm_backward_f16_f16"],
    ["rms_norm_bf16_f32", "rms_norm_backward_bf16_f32"],
    ["rms_norm_bf16_bf16", "rms_norm_backward_bf16_bf16"],
];
const PARTIALS: [&str; 3] = ["rms_norm_partials_f32", "rms_norm_partials_f16", "rms_norm_partials_bf16"];
const GRAD_WEIGHT: [&str; 3] = ["rms_norm_grad_weight_f32", "rms_norm_grad_weight_f16", "rms_norm_grad_weight_bf16"];
const KERNELS: [&str; 16] = {
    let mut names = [""; 16];
    let mut i = 0;
    while i < 16 {
        names[i] = match i {
            0..10 => ROWS[i / 2][i % 2],
            10..13 => PARTIALS[i - 10],
            _ => GRAD_WEIGHT[i - 13],
        };
        i += 1;
    }
    names
};
pub(crate) static FAMILY: Family = family!("rms_norm", &KERNELS);

/// Of a CTA.
pub(crate) const MAX_THREADS: usize = 512;
/// Of a row, kept by a thread.
pub(crate) const HELD_BYTES: usize = 64;
/// Columns of a CTA, and its threads, where it sums over rows.
pub(crate) const STRIP: usize = 256;
/// CTAs that sum over rows: as many as an H100 holds at once.
const WAVE: usize = 528;
/// Threads of a CTA whose rows are shared by at most a warp.
const SMALL: usize = 256;

fn kernels(x: DType, weight: DType) -> [&'static str; 2] {
    ROWS[match (x, weight) {
        (DType::F32, _) => 0,
        (DType::F16, DType::F32) => 1,
        (DType::F16, _) => 2,
        (_, DType::F32) => 3,
        _ => 4,
    }]
}

/// Threads that share a row, which depends on nothing but its length: so do the sums. And the grid.
fn geometry(rows: usize, columns: usize, dtype: DType) -> (i32, Geometry) {
    let (groups, held) = (columns.div_ceil(8), HELD_BYTES / dtype.size() / 8);
    let lanes = match groups {
        0..=32 => groups.next_power_of_two(),
        _ => groups.div_ceil(held).next_multiple_of(32).min(MAX_THREADS),
    };
    let threads = if lanes <= 32 { (rows * lanes).next_multiple_of(32).min(SMALL) } else { lanes };
    let grid = (extent(rows.div_ceil(threads / lanes)), 1, 1);
    (lanes as i32, Geometry { grid, block: (threads as u32, 1, 1), shared: 0, overlaps: true })
}

/// Whether every row is whole groups of eight at a multiple of 16 bytes.
fn vector(columns: usize, weight: TensorRef<'_>, others: &[Option<TensorRef<'_>>]) -> bool {
    columns.is_multiple_of(8) && aligned(weight, 16) && others.iter().flatten().all(|&tensor| aligned(tensor, 16))
}

pub(crate) fn launch(launcher: &Launcher, args: RmsNorm<'_>) -> Result<()> {
    let (x, columns) = (args.x, args.weight.numel());
    let rows = x.numel() / columns;
    if rows == 0 {
        return Ok(());
    }
    let residual = args.residual.as_ref().map(|(residual, _)| *residual);
    let sum = args.residual.as_ref().map(|(_, sum)| sum.as_ref());
    let vector = vector(columns, args.weight, &[Some(x), residual, sum, Some(args.out.as_ref())]);
    let (lanes, geometry) = geometry(rows, columns, x.dtype());
    launcher.launch(
        &FAMILY,
        kernels(x.dtype(), args.weight.dtype())[0],
        geometry,
        args![
            x.ptr(),
            optional(residual),
            args.weight.ptr(),
            optional(sum),
            args.out.ptr(),
            args.eps,
            rows as i32,
            columns as i32,
            lanes,
            vector,
        ],
    )
}

pub(crate) fn launch_backward(launcher: &Launcher, args: RmsNormBackward<'_>) -> Result<()> {
    let (grad, x, columns) = (args.grad, args.x, args.weight.numel());
    let rows = x.numel() / columns;
    let vector = vector(columns, args.weight, &[Some(grad), Some(x), args.grad_sum, Some(args.grad_x.as_ref())]);
    let roots = args.weight_gradient.as_ref().map(|gradient| gradient.roots.as_ref());
    if rows > 0 {
        let (lanes, geometry) = geometry(rows, columns, x.dtype());
        launcher.launch(
            &FAMILY,
            kernels(x.dtype(), args.weight.dtype())[1],
            geometry,
            args![
                grad.ptr(),
                x.ptr(),
                args.weight.ptr(),
                optional(args.grad_sum),
                args.grad_x.ptr(),
                optional(roots),
                args.eps,
                rows as i32,
                columns as i32,
                lanes,
                vector,
            ],
        )?;
    }
    let Some(gradient) = args.weight_gradient else { return Ok(()) };
    let (strips, dtype) = (columns.div_ceil(STRIP), args.weight.dtype());
    let slices = (WAVE / strips).clamp(1, SLICES);
    let shape = |grid| Geometry { grid, block: (STRIP as u32, 1, 1), shared: 0, overlaps: true };
    launcher.launch(
        &FAMILY,
        PARTIALS[dtype_index(x.dtype())],
        shape((extent(strips), extent(slices), 1)),
        args![
            grad.ptr(),
            x.ptr(),
            gradient.roots.ptr(),
            gradient.partials.ptr(),
            rows as i64,
            columns as i64,
            rows.div_ceil(slices) as i64,
            vector,
        ],
    )?;
    launcher.launch(
        &FAMILY,
        GRAD_WEIGHT[dtype_index(dtype)],
        shape((extent(strips), 1, 1)),
        args![gradient.partials.ptr(), gradient.grad_weight.ptr(), columns as i64, slices as i32],
    )
}
