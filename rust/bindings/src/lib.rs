//! The Python module `halfbyte._core`: reads torch tensors, calls a backend, maps errors. It computes nothing.

mod call;
mod ops;
mod pager;
mod recording;
mod tensor;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    use super::call::{CudaError, HostMemoryError};
    #[pymodule_export]
    use super::ops::{
        codebook, cpu_features, cross_entropy, cross_entropy_backward, cuda_build, cuda_status, dequantize_4bit,
        dequantize_blockwise, double_quantize, draw, dynamic_map, gemm_4bit, gemv, gemv_4bit, gemv_4bit_fused,
        gemv_4bit_group, has_gemv_4bit_fused, has_lora_product, lora_product, paged_attention, quantize_4bit,
        quantize_blockwise, read_file, rms_norm, rms_norm_backward, rope, swiglu, swiglu_backward,
    };
    #[pymodule_export]
    use super::pager::Pager;
    #[pymodule_export]
    use super::recording::{Recording, record};
}
