//! One module an operation: the maths in words, checked arguments, the plain loop, SIMD siblings.

pub mod adamw;
pub mod cross_entropy;
pub mod dequantize_4bit;
pub mod dequantize_blockwise;
pub mod double_quantize;
pub mod draw;
pub mod gemv;
pub mod gemv_4bit;
pub mod gemv_4bit_fused;
pub mod lora_product;
pub mod paged_attention;
pub mod quantize_4bit;
pub mod quantize_blockwise;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
