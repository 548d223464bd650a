//! `gemm_4bit`: y = x Wᵀ as [`gemv_4bit`](super::gemv_4bit), for tens to hundreds of rows x and one W or several.
//!
//! The same products; a backend may have a kernel of its own for so many rows, which needs room to rearrange x.

use crate::check::arg;
use crate::error::Result;
use crate::ops::gemv_4bit::Gemv4bitGroup;
use crate::simd::Simd;
use crate::tensor::TensorMut;

const OP: &str = "gemm_4bit";

#[derive(Debug)]
#[non_exhaustive]
pub struct Gemm4bit<'a> {
    pub group: Gemv4bitGroup<'a>,
    /// x's dtype `[M, K]`, scratch
    pub workspace: TensorMut<'a>,
}

impl<'a> Gemm4bit<'a> {
    pub fn new(group: Gemv4bitGroup<'a>, workspace: TensorMut<'a>) -> Result<Self> {
        if let Some(product) = group.first() {
            let (m, k) = (product.shape.m, product.shape.k);
            let scratch = arg(OP, "workspace", workspace.as_ref()).dtype(product.x.dtype())?;
            scratch.numel(m * k, "M x K")?.on(product.packed.device(), "packed")?;
        }
        Ok(Self { group, workspace })
    }

    pub(crate) fn run_on_cpu(self, simd: Simd) {
        self.group.run_on_cpu(simd);
    }
}
