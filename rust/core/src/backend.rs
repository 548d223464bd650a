//! The runtime's table of contents: what a device must be able to do.

use crate::error::Result;
use crate::ops::dequantize_4bit::Dequantize4bit;
use crate::ops::dequantize_blockwise::DequantizeBlockwise;
use crate::ops::double_quantize::DoubleQuantize;
use crate::ops::gemv_4bit::Gemv4bit;
use crate::ops::quantize_4bit::Quantize4bit;
use crate::ops::quantize_blockwise::QuantizeBlockwise;

/// Each method takes arguments that were checked when they were built, and defines nothing itself: the maths is
/// in the module of the argument's type, whose plain loop is the oracle of every backend.
pub trait Backend {
    fn quantize_4bit(&self, args: Quantize4bit<'_>) -> Result<()>;
    fn dequantize_4bit(&self, args: Dequantize4bit<'_>) -> Result<()>;
    fn double_quantize(&self, args: DoubleQuantize<'_>) -> Result<()>;
    fn quantize_blockwise(&self, args: QuantizeBlockwise<'_>) -> Result<()>;
    fn dequantize_blockwise(&self, args: DequantizeBlockwise<'_>) -> Result<()>;
    fn gemv_4bit(&self, args: Gemv4bit<'_>) -> Result<()>;
}
