use halfbyte_core::ops::swiglu::{Rows, Swiglu, SwigluBackward};
use halfbyte_core::{DType, Result};

use crate::args::{aligned, aligned_mut, args, dtype_index};
use crate::launch::{Family, Geometry, Launcher, extent, family};

const FORWARD: [&str; 3] = ["swiglu_f32", "swiglu_f16", "swiglu_bf16"];
const BACKWARD: [&str; 3] = ["swiglu_backward_f32", "swiglu_backward_f16", "swiglu_backward_bf16"];
pub(crate) static FAMILY: Family =
    family!("swiglu", &[FORWARD[0], FORWARD[1], FORWARD[2], BACKWARD[0], BACKWARD[1], BACKWARD[2]]);

pub(crate) const THREADS: u32 = 256;
/// Elements a thread.
pub(crate) const WIDTH: usize = 8;

fn geometry(rows: usize, columns: usize) -> Geometry {
    let units = rows * columns.div_ceil(WIDTH);
    let grid = (extent(units.div_ceil(THREADS as usize)), 1, 1);
    Geometry { grid, block: (THREADS, 1, 1), shared: 0, overlaps: true }
}

/// Contiguous rows are one long row, whose length decides nothing about alignment.
fn joined(rows: usize, columns: usize, strides: &[usize]) -> (usize, usize) {
    if strides.iter().all(|&stride| stride == columns) { (1, rows * columns) } else { (rows, columns) }
}

/// Whether every row starts at a multiple of 16 bytes.
fn vector(dtype: DType, rows: usize, inputs: [Rows<'_>; 2], other_strides: &[usize]) -> bool {
    let keeps_alignment = |stride: usize| rows == 1 || (stride * dtype.size()).is_multiple_of(16);
    inputs.iter().all(|input| aligned(input.span, 16) && keeps_alignment(input.stride))
        && other_strides.iter().all(|&stride| keeps_alignment(stride))
}

pub(crate) fn launch(launcher: &Launcher, args: Swiglu<'_>) -> Result<()> {
    let (gate, up, dtype) = (args.gate, args.up, args.out.dtype());
    let (rows, columns) = joined(args.rows, args.columns, &[gate.stride, up.stride]);
    if rows * columns == 0 {
        return Ok(());
    }
    let vector = vector(dtype, rows, [gate, up], &[columns]) && aligned_mut(&args.out, 16);
    launcher.launch(
        &FAMILY,
        FORWARD[dtype_index(dtype)],
        geometry(rows, columns),
        args![
            gate.span.ptr(),
            up.span.ptr(),
            args.out.ptr(),
            gate.stride as i64,
            up.stride as i64,
            rows as i64,
            columns as i64,
            vector,
        ],
    )
}

pub(crate) fn launch_backward(launcher: &Launcher, args: SwigluBackward<'_>) -> Result<()> {
    let (gate, up, dtype) = (args.gate, args.up, args.grads.dtype());
    let (grad_stride, to_up) = args.grad_strides();
    let (rows, columns) = joined(args.rows, args.columns, &[gate.stride, up.stride, grad_stride]);
    if rows * columns == 0 {
        return Ok(());
    }
    let up_aligned = (to_up * dtype.size()).is_multiple_of(16);
    let vector = vector(dtype, rows, [gate, up], &[columns, grad_stride])
        && aligned(args.grad, 16)
        && aligned_mut(&args.grads, 16)
        && up_aligned;
    let grad_gate = args.grads.ptr();
    let grad_up = grad_gate.wrapping_byte_add(to_up * dtype.size());
    launcher.launch(
        &FAMILY,
        BACKWARD[dtype_index(dtype)],
        geometry(rows, columns),
        args![
            args.grad.ptr(),
            gate.span.ptr(),
            up.span.ptr(),
            grad_gate,
            grad_up,
            gate.stride as i64,
            up.stride as i64,
            grad_stride as i64,
            rows as i64,
            columns as i64,
            vector,
        ],
    )
}
