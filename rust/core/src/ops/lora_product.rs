//! `lora_product`: the product of a dequantized weight with what an adapter stands beside it, as one sum.
//!
//! ```text
//! hidden[m, i] = scaling * sum_k x[m, k] * a[i, k]                       before, where there is an a
//! out[m, n]    = sum_k x[m, k] * w[n, k] + sum_i hidden[m, i] * b[n, i]
//! ```
//!
//! `transposed`, w is `[K, N]`, b `[R, N]` and a `[K, S]`. Products and sums are fp32, rounded once. For GPUs alone.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorMut, TensorRef};

const OP: &str = "lora_product";
/// Bytes, of which every row begins at a multiple.
const ALIGNMENT: usize = 16;
/// Rows of hidden whose progress one word tells.
pub const ROWS: usize = 128;

#[derive(Debug, Clone, Copy)]
pub struct LoraShape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// columns of hidden that are read
    pub r: usize,
    /// columns of hidden
    pub width: usize,
    /// elements from one row of hidden to the next
    pub stride: usize,
}

/// The narrow product that makes hidden's first columns.
#[derive(Debug)]
pub struct Narrow<'a> {
    /// x's dtype `[S, K]`, or `[K, S]` if `transposed`
    pub a: TensorRef<'a>,
    pub s: usize,
    pub scaling: f32,
    /// i32 `[1 + ceil(M / 128)]`, zeros before
    pub progress: TensorMut<'a>,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct LoraProduct<'a> {
    /// f16 or bf16 `[M, K]`
    pub x: TensorRef<'a>,
    /// x's dtype `[N, K]`, or `[K, N]` if `transposed`
    pub w: TensorRef<'a>,
    /// x's dtype, from the first element of `[M, width]` to the last one
    pub hidden: TensorMut<'a>,
    /// x's dtype `[N, R]`, or `[R, N]` if `transposed`
    pub b: TensorRef<'a>,
    /// x's dtype `[M, N]`
    pub out: TensorMut<'a>,
    pub narrow: Option<Narrow<'a>>,
    pub shape: LoraShape,
    pub transposed: bool,
}

impl<'a> LoraProduct<'a> {
    pub fn new(
        x: TensorRef<'a>,
        w: TensorRef<'a>,
        hidden: TensorMut<'a>,
        b: TensorRef<'a>,
        out: TensorMut<'a>,
        narrow: Option<Narrow<'a>>,
        shape: LoraShape,
        transposed: bool,
    ) -> Result<Self> {
        let LoraShape { m, n, k, r, width, stride } = shape;
        let dtype = if x.dtype() == DType::F16 { DType::F16 } else { DType::BF16 };
        let spanned = if m == 0 || width == 0 { 0 } else { (m - 1) * stride + width };
        let row = |columns, depth| if transposed { columns } else { depth };
        let of_a = narrow.as_ref().map(|own| ("a", own.a, own.s * k, "S x K", row(own.s, k)));
        let others = [
            ("x", x, m * k, "M x K", k),
            ("w", w, n * k, "N x K", row(n, k)),
            ("hidden", hidden.as_ref(), spanned, "from the first element to the last", stride),
            ("b", b, n * r, "N x R", row(n, r)),
            ("out", out.as_ref(), m * n, "M x N", n),
        ];
        for (name, tensor, numel, why, stride) in others.into_iter().chain(of_a) {
            arg(OP, name, tensor).dtype(dtype)?.numel(numel, why)?.on(x.device(), "x")?.aligned_to(ALIGNMENT)?;
            if !(stride * dtype.size()).is_multiple_of(ALIGNMENT) {
                let expected = "of rows that begin at multiples of 16 bytes";
                return Err(Error::Argument { op: OP, name, expected, got: format!("{stride} elements a row") });
            }
        }
        if let Some(Narrow { progress, .. }) = &narrow {
            let progress = arg(OP, "progress", progress.as_ref()).dtype(DType::I32)?.on(x.device(), "x")?;
            progress.numel(1 + m.div_ceil(ROWS), "1 + M / 128")?;
        }
        if stride < width {
            let (expected, got) = ("of rows that do not overlap", format!("stride {stride} of {width}"));
            return Err(Error::Argument { op: OP, name: "hidden", expected, got });
        }
        let used = narrow.as_ref().map_or(r, |own| own.s.max(r));
        if width < used {
            let (expected, got) = ("as wide as a and b ask", format!("{width} columns of {used}"));
            return Err(Error::Argument { op: OP, name: "hidden", expected, got });
        }
        Ok(Self { x, w, hidden, b, out, narrow, shape, transposed })
    }
}
