//! The CUDA backend: one kernel file and one launcher an operation, on a borrowed stream.
//!
//! Nothing here touches CUDA before the first call. A launch allocates nothing and waits for nothing, so every
//! operation can be captured in a CUDA graph.

mod adamw;
mod args;
mod cross_entropy;
mod dequantize_4bit;
mod dequantize_blockwise;
mod double_quantize;
mod draw;
mod gemm_4bit;
mod gemv_4bit;
mod gemv_4bit_bulk;
mod gemv_4bit_mma;
mod gemv_4bit_shifted;
mod launch;
mod lora_product;
mod low_rank;
mod paged_attention;
mod paged_attention_bulk;
mod paged_attention_mma;
mod pager;
mod quantize_4bit;
mod quantize_blockwise;
mod rms_norm;
mod rope;
mod swiglu;

#[cfg(test)]
mod tests;

use halfbyte_core::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use halfbyte_core::ops::dequantize_4bit::Dequantize4bit;
use halfbyte_core::ops::dequantize_blockwise::DequantizeBlockwise;
use halfbyte_core::ops::double_quantize::DoubleQuantize;
use halfbyte_core::ops::draw::Draw;
use halfbyte_core::ops::gemv::Gemv;
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, Gemv4bitGroup};
use halfbyte_core::ops::gemv_4bit_fused::Gemv4bitFused;
use halfbyte_core::ops::lora_product::LoraProduct;
use halfbyte_core::ops::paged_attention::PagedAttention;
use halfbyte_core::ops::quantize_4bit::Quantize4bit;
use halfbyte_core::ops::quantize_blockwise::QuantizeBlockwise;
use halfbyte_core::ops::rms_norm::{RmsNorm, RmsNormBackward};
use halfbyte_core::ops::rope::Rope;
use halfbyte_core::ops::swiglu::{Swiglu, SwigluBackward};
use halfbyte_core::{Backend, Error, Result};

use launch::Launcher;
pub use pager::CudaPages;

/// What the embedded kernels were built by and for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildInfo {
    /// nvcc's version, `V13.0.88`
    pub nvcc: String,
    /// `90a` for machine code, `compute_80` for PTX
    pub archs: Vec<String>,
}

const HAS_KERNELS: bool = !env!("HALFBYTE_BUILT_BY").is_empty();

/// `None` if this is a build without kernels.
pub fn build_info() -> Option<BuildInfo> {
    let (nvcc, archs) = (env!("HALFBYTE_BUILT_BY"), env!("HALFBYTE_BUILT_FOR"));
    HAS_KERNELS.then(|| BuildInfo { nvcc: nvcc.to_string(), archs: archs.split(',').map(String::from).collect() })
}

/// Whether kernels can run here, or why not. Starts the CUDA driver, but makes no context.
pub fn status() -> std::result::Result<(), String> {
    if !HAS_KERNELS {
        return Err("this build has no CUDA kernels (there was no nvcc when it was built)".to_string());
    }
    launch::driver_status()
}

/// Whether `gemv_4bit_fused` has kernels for a device; false where there is none.
pub fn has_gemv_4bit_fused(ordinal: u32) -> bool {
    Launcher::new(ordinal, 0).is_ok_and(|launcher| gemv_4bit_bulk::runs_on(launcher.limits()))
}

/// Whether `lora_product` has kernels for a device; false where there is none.
pub fn has_lora_product(ordinal: u32) -> bool {
    Launcher::new(ordinal, 0).is_ok_and(|launcher| lora_product::runs_on(launcher.limits()))
}

/// The operations on one device, ordered on one stream.
#[derive(Debug)]
pub struct CudaBackend {
    launcher: Launcher,
}

impl CudaBackend {
    /// `stream` is a raw `CUstream` of the primary context of device `ordinal`, as torch hands it out; 0 is the
    /// default stream. It is borrowed: work is queued on it, nothing waits for it.
    pub fn new(ordinal: u32, stream: u64) -> Result<Self> {
        Ok(Self { launcher: Launcher::new(ordinal, stream)? })
    }
}

impl Backend for CudaBackend {
    fn quantize_4bit(&self, args: Quantize4bit<'_>) -> Result<()> {
        quantize_4bit::launch(&self.launcher, args)
    }

    fn dequantize_4bit(&self, args: Dequantize4bit<'_>) -> Result<()> {
        dequantize_4bit::launch(&self.launcher, args)
    }

    fn double_quantize(&self, args: DoubleQuantize<'_>) -> Result<()> {
        double_quantize::launch(&self.launcher, args)
    }

    fn quantize_blockwise(&self, args: QuantizeBlockwise<'_>) -> Result<()> {
        quantize_blockwise::launch(&self.launcher, args)
    }

    fn dequantize_blockwise(&self, args: DequantizeBlockwise<'_>) -> Result<()> {
        dequantize_blockwise::launch(&self.launcher, args)
    }

    fn gemm_4bit(&self, args: Gemv4bitGroup<'_>) -> Result<()> {
        gemm_4bit::launch(&self.launcher, args)
    }

    fn gemv_4bit(&self, args: Gemv4bit<'_>) -> Result<()> {
        gemv_4bit::launch(&self.launcher, args)
    }

    fn gemv_4bit_group(&self, args: Gemv4bitGroup<'_>) -> Result<()> {
        gemv_4bit::launch_group(&self.launcher, args)
    }

    fn gemv_4bit_fused(&self, args: Gemv4bitFused<'_>) -> Result<()> {
        gemv_4bit_bulk::launch_fused(&self.launcher, &args)
    }

    fn gemv(&self, args: Gemv<'_>) -> Result<()> {
        let got = args.weight.device().to_string();
        Err(Error::Argument { op: "gemv", name: "weight", expected: "on cpu; torch multiplies it on a GPU", got })
    }

    fn lora_product(&self, args: LoraProduct<'_>) -> Result<()> {
        lora_product::launch(&self.launcher, args)
    }

    fn paged_attention(&self, args: PagedAttention<'_>) -> Result<()> {
        paged_attention::launch(&self.launcher, args)
    }

    fn draw(&self, args: Draw<'_>) -> Result<()> {
        draw::launch(&self.launcher, args)
    }

    fn rms_norm(&self, args: RmsNorm<'_>) -> Result<()> {
        rms_norm::launch(&self.launcher, args)
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_>) -> Result<()> {
        rms_norm::launch_backward(&self.launcher, args)
    }

    fn rope(&self, args: Rope<'_>) -> Result<()> {
        rope::launch(&self.launcher, args)
    }

    fn swiglu(&self, args: Swiglu<'_>) -> Result<()> {
        swiglu::launch(&self.launcher, args)
    }

    fn swiglu_backward(&self, args: SwigluBackward<'_>) -> Result<()> {
        swiglu::launch_backward(&self.launcher, args)
    }

    fn cross_entropy_backward(&self, args: CrossEntropyBackward<'_>) -> Result<()> {
        cross_entropy::launch_backward(&self.launcher, args)
    }

    fn cross_entropy(&self, args: CrossEntropy<'_>) -> Result<()> {
        cross_entropy::launch(&self.launcher, args)
    }
}
