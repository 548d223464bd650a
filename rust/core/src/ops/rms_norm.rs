//! `rms_norm`: rows over their root mean square (arXiv 1910.07467), and its gradient.
//!
//! ```text
//! sum  = x + residual                      rounded to x's dtype; x itself without a residual
//! root = 1 / sqrt(mean(sum^2) + eps)       fp32, of a row
//! out  = rounded(sum * root) * weight      rounded to x's dtype, before the weight and after it
//!
//! h           = rounded(grad * weight)
//! grad_x      = rounded(h * root - sum * mean(h * sum) * root^3) + grad_sum
//! grad_weight = sum over rows of grad * rounded(sum * root)
//! ```
//!
//! All in fp32 between the roundings, which are torch's; `grad_sum` is the gradient that reaches the sum by the residual stream, and `grad_x` also that of the
//! residual. A backend adds a row's squares in an order of its own, which depends on nothing but the shape.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::simd::{Simd, at_level};
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "rms_norm";
const BACKWARD: &str = "rms_norm_backward";

#[derive(Debug)]
#[non_exhaustive]
pub struct RmsNorm<'a> {
    /// f32, f16 or bf16 `[rows, columns]`
    pub x: TensorRef<'a>,
    /// added to x, x's dtype and size, and where their sum goes
    pub residual: Option<(TensorRef<'a>, TensorMut<'a>)>,
    /// x's dtype or f32 `[columns]`
    pub weight: TensorRef<'a>,
    /// x's dtype and size
    pub out: TensorMut<'a>,
    pub eps: f32,
}

impl<'a> RmsNorm<'a> {
    pub fn new(
        x: TensorRef<'a>,
        residual: Option<(TensorRef<'a>, TensorMut<'a>)>,
        weight: TensorRef<'a>,
        out: TensorMut<'a>,
        eps: f32,
    ) -> Result<Self> {
        check_rows(OP, "x", x, weight)?;
        if let Some((residual, sum)) = &residual {
            like(OP, "residual", *residual, x)?;
            like(OP, "sum", sum.as_ref(), x)?;
        }
        like(OP, "out", out.as_ref(), x)?;
        Ok(Self { x, residual, weight, out, eps })
    }
}

#[derive(Debug)]
#[non_exhaustive]
pub struct RmsNormBackward<'a> {
    /// of `out`, f32, f16 or bf16 `[rows, columns]`
    pub grad: TensorRef<'a>,
    /// what was normed (the sum, if there was a residual), grad's dtype and size
    pub x: TensorRef<'a>,
    /// grad's dtype or f32 `[columns]`
    pub weight: TensorRef<'a>,
    /// of the sum, grad's dtype and size
    pub grad_sum: Option<TensorRef<'a>>,
    /// grad's dtype and size
    pub grad_x: TensorMut<'a>,
    /// absent for a frozen weight
    pub weight_gradient: Option<WeightGradient<'a>>,
    pub eps: f32,
}

#[derive(Debug)]
pub struct WeightGradient<'a> {
    /// weight's dtype and size
    pub grad_weight: TensorMut<'a>,
    /// f32 scratch, `[rows]`
    pub roots: TensorMut<'a>,
    /// f32 scratch, `[SLICES, columns]`
    pub partials: TensorMut<'a>,
}

/// Most runs of consecutive rows whose sums for the weight's gradient are added last, in ascending order.
pub const SLICES: usize = 64;

impl<'a> RmsNormBackward<'a> {
    pub fn new(
        grad: TensorRef<'a>,
        x: TensorRef<'a>,
        weight: TensorRef<'a>,
        grad_sum: Option<TensorRef<'a>>,
        grad_x: TensorMut<'a>,
        weight_gradient: Option<WeightGradient<'a>>,
        eps: f32,
    ) -> Result<Self> {
        check_rows(BACKWARD, "grad", grad, weight)?;
        like(BACKWARD, "x", x, grad)?;
        if let Some(grad_sum) = grad_sum {
            like(BACKWARD, "grad_sum", grad_sum, grad)?;
        }
        like(BACKWARD, "grad_x", grad_x.as_ref(), grad)?;
        if let Some(WeightGradient { grad_weight, roots, partials }) = &weight_gradient {
            let (columns, device) = (weight.numel(), grad.device());
            like(BACKWARD, "grad_weight", grad_weight.as_ref(), weight)?;
            let scratch = [("roots", roots, grad.numel() / columns), ("partials", partials, SLICES * columns)];
            for (name, tensor, numel) in scratch {
                let tensor = arg(BACKWARD, name, tensor.as_ref()).dtype(DType::F32)?;
                tensor.numel(numel, "scratch of the weight's gradient")?.on(device, "grad")?;
            }
        }
        Ok(Self { grad, x, weight, grad_sum, grad_x, weight_gradient, eps })
    }
}

/// Rows of as many elements as the weight has.
fn check_rows(op: &'static str, name: &'static str, x: TensorRef<'_>, weight: TensorRef<'_>) -> Result<()> {
    arg(op, name, x).float()?;
    let weight_arg = arg(op, "weight", weight).float()?.on(x.device(), name)?;
    if weight.dtype() != DType::F32 {
        weight_arg.dtype(x.dtype())?;
    }
    let (columns, most) = (weight.numel(), i32::MAX as usize);
    let rows = x.numel().checked_div(columns).unwrap_or(usize::MAX);
    if rows > most / 2 || columns > most || rows * columns != x.numel() {
        let expected = "as long as a row of x, of which there are at most 2^30";
        return Err(Error::Argument {
            op,
            name: "weight",
            expected,
            got: format!("{columns} for {} in all", x.numel()),
        });
    }
    Ok(())
}

fn like(op: &'static str, name: &'static str, tensor: TensorRef<'_>, reference: TensorRef<'_>) -> Result<()> {
    let tensor = arg(op, name, tensor).dtype(reference.dtype())?;
    tensor.numel(reference.numel(), "as many as it belongs to")?.on(reference.device(), "x")?;
    Ok(())
}

/// Elements that a thread takes at a time, in whole rows.
const CHUNK: usize = 1 << 14;

fn rows_of_chunk(columns: usize) -> usize {
    CHUNK.div_ceil(columns)
}

impl RmsNorm<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.x.dtype(), T => match self.weight.dtype() {
            DType::F32 => self.run::<T, f32>(simd),
            _ => self.run::<T, T>(simd),
        })
    }

    fn run<T: Float, W: Float>(self, simd: Simd) {
        let (x, weight, eps): (&[T], &[W], _) = (self.x.as_slice(), self.weight.as_slice(), self.eps);
        let step = rows_of_chunk(weight.len()) * weight.len();
        let count = x.len().div_ceil(step);
        let out = self.out.into_slice::<T>().chunks_mut(step);
        match self.residual {
            None => parallel::for_each(x.chunks(step).zip(out), count, |(x, out)| norm(simd, x, weight, out, eps)),
            Some((residual, sum)) => {
                let sums = residual.as_slice::<T>().chunks(step).zip(sum.into_slice::<T>().chunks_mut(step));
                parallel::for_each(x.chunks(step).zip(sums).zip(out), count, |((x, (residual, sum)), out)| {
                    add(simd, x, residual, sum);
                    norm(simd, sum, weight, out, eps);
                });
            }
        }
    }
}

at_level! {
    fn norm<T: Float, W: Float>(x: &[T], weight: &[W], out: &mut [T], eps: f32) => {
        for (x, out) in x.chunks(weight.len()).zip(out.chunks_mut(weight.len())) {
            let root = reciprocal_root(x, eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = T::from_f32(normed(*x, root) * weight.to_f32());
            }
        }
    }
}

at_level! {
    fn add<T: Float>(x: &[T], residual: &[T], sum: &mut [T]) => {
        for ((sum, x), residual) in sum.iter_mut().zip(x).zip(residual) {
            *sum = T::from_f32(x.to_f32() + residual.to_f32());
        }
    }
}

#[inline(always)]
fn reciprocal_root<T: Float>(row: &[T], eps: f32) -> f32 {
    1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn normed<T: Float>(x: T, root: f32) -> f32 {
    rounded::<T>(x.to_f32() * root)
}

/// What is left of a value once it has been stored as T.
#[inline(always)]
fn rounded<T: Float>(value: f32) -> f32 {
    T::from_f32(value).to_f32()
}

const LANES: usize = 16;
const PIECE: usize = 1024;

/// The sum of products, in pieces of 1024, whose sums are added in ascending order: lane l of 16 adds the terms l,
/// l + 16, ...
#[inline(always)]
fn dot<A: Float, B: Float>(a: &[A], b: &[B]) -> f32 {
    let mut total = 0.0;
    for (a, b) in a.chunks(PIECE).zip(b.chunks(PIECE)) {
        let mut lanes = [0.0f32; LANES];
        let whole = a.len() / LANES * LANES;
        for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
            for ((sum, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *sum += a.to_f32() * b.to_f32();
            }
        }
        for ((sum, a), b) in lanes.iter_mut().zip(&a[whole..]).zip(&b[whole..]) {
            *sum += a.to_f32() * b.to_f32();
        }
        total += lanes.iter().sum::<f32>();
    }
    total
}

impl RmsNormBackward<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.grad.dtype(), T => match self.weight.dtype() {
            DType::F32 => self.run::<T, f32>(simd),
            _ => self.run::<T, T>(simd),
        })
    }

    fn run<T: Float, W: Float>(self, simd: Simd) {
        let (grad, x): (&[T], &[T]) = (self.grad.as_slice(), self.x.as_slice());
        let (weight, eps): (&[W], _) = (self.weight.as_slice(), self.eps);
        let columns = weight.len();
        if let Some(gradient) = self.weight_gradient {
            sum_over_rows(grad, x, gradient.grad_weight.into_slice::<W>(), eps);
        }
        let stream = self.grad_sum.map(|grad_sum| grad_sum.as_slice::<T>());
        let step = rows_of_chunk(columns) * columns;
        let chunks = grad.chunks(step).zip(x.chunks(step)).zip(self.grad_x.into_slice::<T>().chunks_mut(step));
        parallel::for_each(chunks.enumerate(), x.len().div_ceil(step), |(chunk, ((grad, x), grad_x))| {
            let mut scaled = vec![0.0; columns];
            let rows = grad.chunks(columns).zip(x.chunks(columns)).zip(grad_x.chunks_mut(columns));
            for (row, ((grad, x), grad_x)) in rows.enumerate() {
                let first = chunk * step + row * columns;
                let stream = stream.map(|stream| &stream[first..first + columns]);
                gradient(simd, grad, x, weight, stream, grad_x, &mut scaled, eps);
            }
        });
    }
}

at_level! {
    /// Of a row; `scaled`: scratch for it.
    fn gradient<T: Float, W: Float>(
        grad: &[T],
        x: &[T],
        weight: &[W],
        stream: Option<&[T]>,
        grad_x: &mut [T],
        scaled: &mut [f32],
        eps: f32,
    ) => {
        for ((scaled, grad), weight) in scaled.iter_mut().zip(grad).zip(weight) {
            *scaled = rounded::<T>(grad.to_f32() * weight.to_f32());
        }
        let root = reciprocal_root(x, eps);
        let shrink = dot(scaled, x) / x.len() as f32 * root * root * root;
        for ((out, scaled), x) in grad_x.iter_mut().zip(scaled.iter()).zip(x) {
            *out = T::from_f32(scaled * root - x.to_f32() * shrink);
        }
        for (out, stream) in grad_x.iter_mut().zip(stream.unwrap_or_default()) {
            *out = T::from_f32(out.to_f32() + stream.to_f32());
        }
    }
}

fn sum_over_rows<T: Float, W: Float>(grad: &[T], x: &[T], grad_weight: &mut [W], eps: f32) {
    let columns = grad_weight.len();
    let mut total = vec![0.0f32; columns];
    for (grad, x) in grad.chunks(columns).zip(x.chunks(columns)) {
        let root = reciprocal_root(x, eps);
        for ((total, grad), x) in total.iter_mut().zip(grad).zip(x) {
            *total += grad.to_f32() * normed(*x, root);
        }
    }
    for (grad_weight, total) in grad_weight.iter_mut().zip(total) {
        *grad_weight = W::from_f32(total);
    }
}
