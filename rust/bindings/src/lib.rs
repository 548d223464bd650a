//! The Python module `halfbyte._core`: reads torch tensors, calls a backend, maps errors. It computes nothing.

mod call;
mod ops;
mod pager;
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
        codebook, cpu_features, cuda_build, cuda_status, dequantize_4bit, dequantize_blockwise, double_quantize,
        dynamic_map, gemv_4bit, quantize_4bit, quantize_blockwise,
    };
    #[pymodule_export]
    use super::pager::Pager;
}
