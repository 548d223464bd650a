//! `lora_product`: the product of a dequantized weight with what an adapter stands beside it, as one sum.
//!
//! ```text
//! out[m, n] = sum_k x[m, k] * w[n, k] + sum_i hidden[m, i] * b[n, i]
//! ```
//!
//! `transposed`, w is `[K, N]` and b `[R, N]`. Products and sums are fp32, rounded once. For GPUs alone.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::ops::swiglu::Rows;
use crate::tensor::{DType, TensorMut, TensorRef};

const OP: &str = "lora_product";
/// Bytes, of which every row begins at a multiple.
const ALIGNMENT: usize = 16;

#[derive(Debug, Clone, Copy)]
pub struct LoraShape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// of hidden
    pub r: usize,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct LoraProduct<'a> {
    /// f16 or bf16 `[M, K]`
    pub x: TensorRef<'a>,
    /// x's dtype `[N, K]`, or `[K, N]` if `transposed`
    pub w: TensorRef<'a>,
    /// x's dtype `[M, R]`
    pub hidden: Rows<'a>,
    /// x's dtype `[N, R]`, or `[R, N]` if `transposed`
    pub b: TensorRef<'a>,
    /// x's dtype `[M, N]`
    pub out: TensorMut<'a>,
    pub shape: LoraShape,
    pub transposed: bool,
}

impl<'a> LoraProduct<'a> {
    pub fn new(
        x: TensorRef<'a>,
        w: TensorRef<'a>,
        hidden: Rows<'a>,
        b: TensorRef<'a>,
        out: TensorMut<'a>,
        shape: LoraShape,
        transposed: bool,
    ) -> Result<Self> {
        let LoraShape { m, n, k, r } = shape;
        let dtype = if x.dtype() == DType::F16 { DType::F16 } else { DType::BF16 };
        let spanned = if m == 0 || r == 0 { 0 } else { (m - 1) * hidden.stride + r };
        let of_b = if transposed { n } else { r };
        for (name, tensor, numel, why, stride) in [
            ("x", x, m * k, "M x K", k),
            ("w", w, n * k, "N x K", if transposed { n } else { k }),
            ("hidden", hidden.span, spanned, "from the first element to the last", hidden.stride),
            ("b", b, n * r, "N x R", of_b),
            ("out", out.as_ref(), m * n, "M x N", n),
        ] {
            arg(OP, name, tensor).dtype(dtype)?.numel(numel, why)?.on(x.device(), "x")?.aligned_to(ALIGNMENT)?;
            if !(stride * dtype.size()).is_multiple_of(ALIGNMENT) {
                let expected = "of rows that begin at multiples of 16 bytes";
                return Err(Error::Argument { op: OP, name, expected, got: format!("{stride} elements a row") });
            }
        }
        if hidden.stride < r {
            let (expected, got) = ("of rows that do not overlap", format!("stride {} of {r}", hidden.stride));
            return Err(Error::Argument { op: OP, name: "hidden", expected, got });
        }
        Ok(Self { x, w, hidden, b, out, shape, transposed })
    }
}
