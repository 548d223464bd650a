//! `swiglu`: `out = silu(gate) * up` (arXiv 2002.05202), and its gradient.
//!
//! ```text
//! out       = rounded(gate * s) * up               s = 1 / (1 + exp(-gate)), fp32
//! grad_up   = grad * rounded(gate * s)
//! grad_gate = grad * up * s * (1 + gate * (1 - s))
//! ```
//!
//! `rounded` is to the dtype, as torch rounds silu's result; all else is fp32 until it is stored.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::simd::{Simd, at_level};
use crate::tensor::{Float, TensorMut, TensorRef, with_float};

const OP: &str = "swiglu";
const BACKWARD: &str = "swiglu_backward";

/// `[rows, columns]` whose rows may lie apart, as halves of wider rows do.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// from the first element to the last one
    pub span: TensorRef<'a>,
    /// elements from one row to the next
    pub stride: usize,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct Swiglu<'a> {
    /// f32, f16 or bf16
    pub gate: Rows<'a>,
    /// gate's dtype
    pub up: Rows<'a>,
    /// gate's dtype, contiguous `[rows, columns]`
    pub out: TensorMut<'a>,
    pub rows: usize,
    pub columns: usize,
}

impl<'a> Swiglu<'a> {
    pub fn new(gate: Rows<'a>, up: Rows<'a>, out: TensorMut<'a>, rows: usize, columns: usize) -> Result<Self> {
        check_inputs(OP, gate, up, out.as_ref(), "out", rows, columns)?;
        Ok(Self { gate, up, out, rows, columns })
    }
}

#[derive(Debug)]
#[non_exhaustive]
pub struct SwigluBackward<'a> {
    /// of `out`, contiguous `[rows, columns]`
    pub grad: TensorRef<'a>,
    pub gate: Rows<'a>,
    pub up: Rows<'a>,
    /// those of gate and up, `[rows, 2, columns]` if `halves`, else `[2, rows, columns]`
    pub grads: TensorMut<'a>,
    pub halves: bool,
    pub rows: usize,
    pub columns: usize,
}

impl<'a> SwigluBackward<'a> {
    pub fn new(
        grad: TensorRef<'a>,
        gate: Rows<'a>,
        up: Rows<'a>,
        grads: TensorMut<'a>,
        halves: bool,
        rows: usize,
        columns: usize,
    ) -> Result<Self> {
        check_inputs(BACKWARD, gate, up, grad, "grad", rows, columns)?;
        arg(BACKWARD, "grads", grads.as_ref())
            .dtype(gate.span.dtype())?
            .numel(2 * rows * columns, "those of gate and up")?
            .on(gate.span.device(), "gate")?;
        Ok(Self { grad, gate, up, grads, halves, rows, columns })
    }

    /// Elements from one row of a gradient to the next, and from gate's gradient to up's.
    pub fn grad_strides(&self) -> (usize, usize) {
        if self.halves { (2 * self.columns, self.columns) } else { (self.columns, self.rows * self.columns) }
    }
}

fn check_inputs(
    op: &'static str,
    gate: Rows<'_>,
    up: Rows<'_>,
    whole: TensorRef<'_>,
    name: &'static str,
    rows: usize,
    columns: usize,
) -> Result<()> {
    let (dtype, device) = (gate.span.dtype(), gate.span.device());
    arg(op, "gate", gate.span).float()?;
    for (name, half) in [("gate", gate), ("up", up)] {
        let extent = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * half.stride + columns };
        let span = arg(op, name, half.span).dtype(dtype)?.on(device, "gate")?;
        span.numel(extent, "from the first element to the last")?;
        if rows > 1 && half.stride < columns {
            let expected = "of rows that do not overlap";
            return Err(Error::Argument { op, name, expected, got: format!("stride {} of {columns}", half.stride) });
        }
    }
    arg(op, name, whole).dtype(dtype)?.numel(rows * columns, "as many as gate has")?.on(device, "gate")?;
    Ok(())
}

impl Swiglu<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.gate.span.dtype(), T => self.run::<T>(simd))
    }

    fn run<T: Float>(self, simd: Simd) {
        let columns = self.columns.max(1);
        let (gate, up): (&[T], &[T]) = (self.gate.span.as_slice(), self.up.span.as_slice());
        let rows = self.out.into_slice::<T>().chunks_mut(columns).enumerate();
        parallel::for_each(rows, self.rows, |(row, out)| {
            let (gate, up) = (&gate[row * self.gate.stride..], &up[row * self.up.stride..]);
            product(simd, gate, up, out);
        });
    }
}

at_level! {
    fn product<T: Float>(gate: &[T], up: &[T], out: &mut [T]) {
        scalar: product_of_row(gate, up, out, f32::exp),
        vector: product_of_row(gate, up, out, exp),
    }
}

#[inline(always)]
fn product_of_row<T: Float>(gate: &[T], up: &[T], out: &mut [T], exp: impl Fn(f32) -> f32) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        let gate = gate.to_f32();
        let silu = gate * sigmoid(gate, &exp);
        *out = T::from_f32(T::from_f32(silu).to_f32() * up.to_f32());
    }
}

#[inline(always)]
fn sigmoid(x: f32, exp: impl Fn(f32) -> f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// e^x within two roundings, in operations that vectors have: 2^n e^r, with the polynomial of Cephes' expf for e^r.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LARGEST: f32 = 88.722_84; // whose power is finite
    const SMALLEST: f32 = -87.336_55; // whose power is normal
    const TO_INTEGER: f32 = 12_582_912.0; // 1.5 * 2^23: the sum's last bits are the nearest integer
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const FACTORS: [f32; 5] = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let clamped = x.clamp(SMALLEST, LARGEST);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    let r = n.mul_add(-LN_2[1], n.mul_add(-LN_2[0], clamped));
    let polynomial = FACTORS.iter().fold(1.987_569_1e-4, |sum: f32, factor| sum.mul_add(r, *factor));
    let power = polynomial.mul_add(r * r, r) + 1.0;
    // n = 128 at the upper end: half of the exponent at a time.
    let half = (n * 0.5).floor();
    let scale = |n: f32| f32::from_bits((((n + TO_INTEGER).to_bits() & 0x1ff).wrapping_add(127) & 0xff) << 23);
    let finite = power * scale(half) * scale(n - half);
    if x > LARGEST {
        f32::INFINITY
    } else if x.is_nan() {
        x
    } else {
        finite
    }
}

impl SwigluBackward<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.gate.span.dtype(), T => self.run::<T>(simd))
    }

    fn run<T: Float>(self, simd: Simd) {
        let (rows, columns) = (self.rows, self.columns.max(1));
        let (gate, up): (&[T], &[T]) = (self.gate.span.as_slice(), self.up.span.as_slice());
        // The stride of a single row may be anything.
        let (gate, up) = (gate.chunks(self.gate.stride.max(columns)), up.chunks(self.up.stride.max(columns)));
        let inputs = self.grad.as_slice::<T>().chunks(columns).zip(gate).zip(up);
        let grads: &mut [T] = self.grads.into_slice();
        let work = |(((grad, gate), up), (of_gate, of_up))| gradients(simd, grad, gate, up, of_gate, of_up);
        if self.halves {
            let grads = grads.chunks_mut(2 * columns).map(|both| both.split_at_mut(columns));
            parallel::for_each(inputs.zip(grads), rows, work);
        } else {
            let (of_gate, of_up) = grads.split_at_mut(rows * self.columns);
            parallel::for_each(inputs.zip(of_gate.chunks_mut(columns).zip(of_up.chunks_mut(columns))), rows, work);
        }
    }
}

at_level! {
    fn gradients<T: Float>(grad: &[T], gate: &[T], up: &[T], of_gate: &mut [T], of_up: &mut [T]) {
        scalar: gradients_of_row(grad, gate, up, of_gate, of_up, f32::exp),
        vector: gradients_of_row(grad, gate, up, of_gate, of_up, exp),
    }
}

#[inline(always)]
fn gradients_of_row<T: Float>(
    grad: &[T],
    gate: &[T],
    up: &[T],
    of_gate: &mut [T],
    of_up: &mut [T],
    exp: impl Fn(f32) -> f32,
) {
    let inputs = grad.iter().zip(gate).zip(up);
    for (((grad, gate), up), (of_gate, of_up)) in inputs.zip(of_gate.iter_mut().zip(of_up)) {
        let (grad, gate, up) = (grad.to_f32(), gate.to_f32(), up.to_f32());
        let s = sigmoid(gate, &exp);
        *of_gate = T::from_f32(grad * up * s * (1.0 + gate * (1.0 - s)));
        *of_up = T::from_f32(grad * T::from_f32(gate * s).to_f32());
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::exp;

    #[test]
    fn the_exponential_is_two_roundings_off_at_most() {
        for step in -870_000..=887_000 {
            let x = step as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let off = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(off <= 2.0 * f64::from(f32::EPSILON), "{x} {off:e}");
        }
        assert_eq!([exp(f32::INFINITY), exp(89.0), exp(0.0)], [f32::INFINITY, f32::INFINITY, 1.0]);
        assert!(exp(f32::NAN).is_nan() && exp(f32::NEG_INFINITY) < 2e-38);
    }
}
