//! `rope`: rotary position embeddings of queries and keys (arXiv 2104.09864, halves as in NeoX).
//!
//! ```text
//! out[i]        = rounded(x[i] * cos[i])        - rounded(x[i + half] * sin[i])
//! out[i + half] = rounded(x[i + half] * cos[i]) + rounded(x[i] * sin[i])      i < half = head_dim / 2
//! ```
//!
//! Every product and sum is rounded to the dtype, as torch does it: the results equal torch's to the bit. The inverse
//! rotates by the negative angles, which is the gradient.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::simd::{Simd, at_level};
use crate::tensor::{Float, TensorMut, TensorRef, with_float};

const OP: &str = "rope";

/// `[batch, tokens, heads, head_dim]` that need not be contiguous; a head's elements are neighbours.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// from the first element to the last one
    pub span: TensorRef<'a>,
    pub heads: usize,
    /// elements from one batch row, token and head to the next
    pub strides: [usize; 3],
}

/// cos and sin, `[batch or 1, tokens, head_dim]`: both halves of cos alike, the first half of sin negated.
#[derive(Debug, Clone, Copy)]
pub struct Angles<'a> {
    pub cos: TensorRef<'a>,
    pub sin: TensorRef<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RopeShape {
    pub batch: usize,
    pub tokens: usize,
    pub head_dim: usize,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct Rope<'a> {
    /// f32, f16 or bf16
    pub q: Heads<'a>,
    pub k: Heads<'a>,
    pub angles: Angles<'a>,
    /// q's dtype, contiguous `[batch, tokens, heads, head_dim]`
    pub q_out: TensorMut<'a>,
    pub k_out: TensorMut<'a>,
    pub shape: RopeShape,
    pub inverse: bool,
}

impl<'a> Rope<'a> {
    pub fn new(
        q: Heads<'a>,
        k: Heads<'a>,
        angles: Angles<'a>,
        q_out: TensorMut<'a>,
        k_out: TensorMut<'a>,
        shape: RopeShape,
        inverse: bool,
    ) -> Result<Self> {
        if !shape.head_dim.is_multiple_of(2) {
            let (expected, got) = ("even", shape.head_dim.to_string());
            return Err(Error::Argument { op: OP, name: "head_dim", expected, got });
        }
        let heads_in_all = shape.batch * shape.tokens * (q.heads + k.heads);
        if i32::try_from(heads_in_all).is_err() || i32::try_from(shape.head_dim).is_err() {
            let (expected, got) = ("at most 2^31 - 1 heads of all tokens", heads_in_all.to_string());
            return Err(Error::Argument { op: OP, name: "q and k", expected, got });
        }
        let (dtype, device) = (q.span.dtype(), q.span.device());
        arg(OP, "q", q.span).float()?;
        for (names, heads, out) in [(["q", "q_out"], &q, &q_out), (["k", "k_out"], &k, &k_out)] {
            let span = arg(OP, names[0], heads.span).dtype(dtype)?.on(device, "q")?;
            span.numel(heads.extent(shape), "from the first element to the last")?;
            let size = shape.batch * shape.tokens * heads.heads * shape.head_dim;
            arg(OP, names[1], out.as_ref()).dtype(dtype)?.numel(size, "as many as it rotates")?.on(device, "q")?;
        }
        let one = shape.tokens * shape.head_dim;
        let rows = if angles.cos.numel() == one { 1 } else { shape.batch };
        for (name, tensor) in [("cos", angles.cos), ("sin", angles.sin)] {
            let tensor = arg(OP, name, tensor).dtype(dtype)?.on(device, "q")?;
            tensor.numel(rows * one, "[batch or 1, tokens, head_dim]")?;
        }
        Ok(Self { q, k, angles, q_out, k_out, shape, inverse })
    }

    /// Elements between the angles of one batch row and the next; 0 where all rows share them.
    pub fn angle_stride(&self) -> usize {
        let one = self.shape.tokens * self.shape.head_dim;
        if self.angles.cos.numel() == one { 0 } else { one }
    }
}

impl Heads<'_> {
    /// Elements from the first to the last one.
    fn extent(&self, shape: RopeShape) -> usize {
        let sizes = [shape.batch, shape.tokens, self.heads];
        if sizes.contains(&0) || shape.head_dim == 0 {
            return 0;
        }
        let last: usize = sizes.iter().zip(self.strides).map(|(size, stride)| (size - 1) * stride).sum();
        last + shape.head_dim
    }
}

impl Rope<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.q.span.dtype(), T => self.run::<T>(simd))
    }

    fn run<T: Float>(self, simd: Simd) {
        let stride = self.angle_stride();
        let (cos, sin): (&[T], &[T]) = (self.angles.cos.as_slice(), self.angles.sin.as_slice());
        let (shape, inverse) = (self.shape, self.inverse);
        for (heads, out) in [(self.q, self.q_out), (self.k, self.k_out)] {
            let x: &[T] = heads.span.as_slice();
            let token_size = heads.heads * shape.head_dim;
            if token_size == 0 {
                continue;
            }
            let tokens = out.into_slice::<T>().chunks_mut(token_size).enumerate();
            parallel::for_each(tokens, shape.batch * shape.tokens, |(row, out)| {
                let (batch, token) = (row / shape.tokens, row % shape.tokens);
                let angle = batch * stride + token * shape.head_dim;
                let angles = angle + shape.head_dim / 2..angle + shape.head_dim;
                for (head, out) in out.chunks_mut(shape.head_dim).enumerate() {
                    let [by_batch, by_token, by_head] = heads.strides;
                    let first = batch * by_batch + token * by_token + head * by_head;
                    let x = &x[first..first + shape.head_dim];
                    rotate(simd, x, &cos[angles.clone()], &sin[angles.clone()], out, inverse);
                }
            });
        }
    }
}

at_level! {
    /// A head.
    fn rotate<T: Float>(x: &[T], cos: &[T], sin: &[T], out: &mut [T], inverse: bool) => {
        let half = x.len() / 2;
        let ((x, y), (first, second)) = (x.split_at(half), out.split_at_mut(half));
        let (y, cos, sin, second) = (&y[..half], &cos[..half], &sin[..half], &mut second[..half]);
        let product = |a: T, b: f32| T::from_f32(a.to_f32() * b).to_f32();
        for i in 0..half {
            let (cos, sin) = (cos[i].to_f32(), if inverse { -sin[i].to_f32() } else { sin[i].to_f32() });
            first[i] = T::from_f32(product(x[i], cos) - product(y[i], sin));
            second[i] = T::from_f32(product(y[i], cos) + product(x[i], sin));
        }
    }
}
