//! The runtime's table of contents: what a device must be able to do.

use crate::error::Result;
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

/// Each method takes arguments that were checked when they were built, and defines nothing itself: the maths is
/// in the module of the argument's type, whose plain loop is the oracle of every backend.
pub trait Backend {
    fn quantize_4bit(&self, args: Quantize4bit<'_>) -> Result<()>;
    fn dequantize_4bit(&self, args: Dequantize4bit<'_>) -> Result<()>;
    fn double_quantize(&self, args: DoubleQuantize<'_>) -> Result<()>;
    fn quantize_blockwise(&self, args: QuantizeBlockwise<'_>) -> Result<()>;
    fn dequantize_blockwise(&self, args: DequantizeBlockwise<'_>) -> Result<()>;
    fn gemv(&self, args: Gemv<'_>) -> Result<()>;
    /// `gemv_4bit_group` for tens to hundreds of rows, which a backend may have a kernel of its own for.
    fn gemm_4bit(&self, args: Gemv4bitGroup<'_>) -> Result<()>;
    fn gemv_4bit(&self, args: Gemv4bit<'_>) -> Result<()>;
    fn gemv_4bit_group(&self, args: Gemv4bitGroup<'_>) -> Result<()>;
    fn gemv_4bit_fused(&self, args: Gemv4bitFused<'_>) -> Result<()>;
    fn lora_product(&self, args: LoraProduct<'_>) -> Result<()>;
    fn paged_attention(&self, args: PagedAttention<'_>) -> Result<()>;
    fn draw(&self, args: Draw<'_>) -> Result<()>;
    fn cross_entropy(&self, args: CrossEntropy<'_>) -> Result<()>;
    fn cross_entropy_backward(&self, args: CrossEntropyBackward<'_>) -> Result<()>;
    fn rms_norm(&self, args: RmsNorm<'_>) -> Result<()>;
    fn rms_norm_backward(&self, args: RmsNormBackward<'_>) -> Result<()>;
    fn rope(&self, args: Rope<'_>) -> Result<()>;
    fn swiglu(&self, args: Swiglu<'_>) -> Result<()>;
    fn swiglu_backward(&self, args: SwigluBackward<'_>) -> Result<()>;
}
