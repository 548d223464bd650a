//! The CPU backend: the plain loops, or their SIMD siblings where the processor has them.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use crate::ops::dequantize_4bit::Dequantize4bit;
use crate::ops::dequantize_blockwise::DequantizeBlockwise;
use crate::ops::double_quantize::DoubleQuantize;
use crate::ops::draw::Draw;
use crate::ops::gemv::Gemv;
use crate::ops::gemv_4bit::{Gemv4bit, Gemv4bitGroup};
use crate::ops::gemv_4bit_fused::Gemv4bitFused;
use crate::ops::lora_product::LoraProduct;
use crate::ops::paged_attention::PagedAttention;
use crate::ops::quantize_4bit::Quantize4bit;
use crate::ops::quantize_blockwise::QuantizeBlockwise;
use crate::ops::rms_norm::{RmsNorm, RmsNormBackward};
use crate::ops::rope::Rope;
use crate::ops::swiglu::{Swiglu, SwigluBackward};
use crate::simd::Simd;

#[derive(Debug, Clone, Copy)]
pub struct CpuBackend {
    simd: Simd,
}

impl CpuBackend {
    /// The fastest loops that this processor can run.
    pub fn new() -> Self {
        Self { simd: Simd::detect() }
    }

    /// The plain loops: what every other backend is compared with.
    pub fn oracle() -> Self {
        Self { simd: Simd::Scalar }
    }

    /// One backend for each instruction set of this processor, the oracle first.
    pub fn all() -> Vec<Self> {
        Simd::available().into_iter().map(|simd| Self { simd }).collect()
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl Backend for CpuBackend {
    fn quantize_4bit(&self, args: Quantize4bit<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn dequantize_4bit(&self, args: Dequantize4bit<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn double_quantize(&self, args: DoubleQuantize<'_>) -> Result<()> {
        args.run_on_cpu();
        Ok(())
    }

    fn quantize_blockwise(&self, args: QuantizeBlockwise<'_>) -> Result<()> {
        args.run_on_cpu();
        Ok(())
    }

    fn dequantize_blockwise(&self, args: DequantizeBlockwise<'_>) -> Result<()> {
        args.run_on_cpu();
        Ok(())
    }

    fn gemv(&self, args: Gemv<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn gemm_4bit(&self, args: Gemv4bitGroup<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn gemv_4bit(&self, args: Gemv4bit<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn gemv_4bit_group(&self, args: Gemv4bitGroup<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn gemv_4bit_fused(&self, args: Gemv4bitFused<'_>) -> Result<()> {
        let got = args.products().next().map_or(String::new(), |fused| fused.product.packed.device().to_string());
        Err(Error::Argument { op: "gemv_4bit_fused", name: "packed", expected: "on a GPU", got })
    }

    fn lora_product(&self, args: LoraProduct<'_>) -> Result<()> {
        let got = args.x.device().to_string();
        Err(Error::Argument { op: "lora_product", name: "x", expected: "on a GPU", got })
    }

    fn paged_attention(&self, args: PagedAttention<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn draw(&self, args: Draw<'_>) -> Result<()> {
        args.run_on_cpu();
        Ok(())
    }

    fn rms_norm(&self, args: RmsNorm<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn rope(&self, args: Rope<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn swiglu(&self, args: Swiglu<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn swiglu_backward(&self, args: SwigluBackward<'_>) -> Result<()> {
        args.run_on_cpu(self.simd);
        Ok(())
    }

    fn cross_entropy_backward(&self, args: CrossEntropyBackward<'_>) -> Result<()> {
        args.run_on_cpu();
        Ok(())
    }

    fn cross_entropy(&self, args: CrossEntropy<'_>) -> Result<()> {
        args.run_on_cpu();
        Ok(())
    }
}
