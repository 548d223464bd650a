//! `gemm_4bit`: y = x Wᵀ as [`gemv_4bit`](super::gemv_4bit), for tens to hundreds of rows x.
//!
//! The same product; a backend may have a kernel of its own for so many rows, which needs room to rearrange x.

use crate::check::arg;
use crate::error::Result;
use crate::ops::gemv_4bit::Gemv4bit;
use crate::simd::Simd;
use crate::tensor::TensorMut;

const OP: &str = "gemm_4bit";

#[derive(Debug)]
#[non_exhaustive]
pub struct Gemm4bit<'a> {
    pub product: Gemv4bit<'a>,
    /// x's dtype `[M, K]`, scratch
    pub workspace: TensorMut<'a>,
}

impl<'a> Gemm4bit<'a> {
    pub fn new(product: Gemv4bit<'a>, workspace: TensorMut<'a>) -> Result<Self> {
        let (m, k) = (product.shape.m, product.shape.k);
        let scratch = arg(OP, "workspace", workspace.as_ref()).dtype(product.x.dtype())?;
        scratch.numel(m * k, "M x K")?.on(product.packed.device(), "packed")?;
        Ok(Self { product, workspace })
    }

    pub(crate) fn run_on_cpu(self, simd: Simd) {
        self.product.run_on_cpu(simd);
    }
}
