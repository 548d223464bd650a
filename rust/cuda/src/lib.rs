//! The CUDA backend: one kernel file and one launcher an operation, on a borrowed stream.
//!
//! Nothing here touches CUDA before the first call. A launch allocates nothing and waits for nothing, so every
//! operation can be captured in a CUDA graph.

mod adamw;
mod args;
mod dequantize_4bit;
mod dequantize_blockwise;
mod double_quantize;
mod gemv_4bit;
mod gemv_4bit_mma;
mod launch;
mod pager;
mod quantize_4bit;
mod quantize_blockwise;

#[cfg(test)]
mod tests;

use halfbyte_core::ops::dequantize_4bit::Dequantize4bit;
use halfbyte_core::ops::dequantize_blockwise::DequantizeBlockwise;
use halfbyte_core::ops::double_quantize::DoubleQuantize;
use halfbyte_core::ops::gemv_4bit::Gemv4bit;
use halfbyte_core::ops::quantize_4bit::Quantize4bit;
use halfbyte_core::ops::quantize_blockwise::QuantizeBlockwise;
use halfbyte_core::{Backend, Result};

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

    fn gemv_4bit(&self, args: Gemv4bit<'_>) -> Result<()> {
        gemv_4bit::launch(&self.launcher, args)
    }
}
