//! The one door into the runtime: chooses the backend, borrows torch's stream, releases the GIL, maps errors.

use halfbyte_core::{Backend, CpuBackend, Device, Error, Result};
use halfbyte_cuda::CudaBackend;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::recording;

pyo3::create_exception!(
    halfbyte._core,
    CudaError,
    PyRuntimeError,
    "The CUDA driver is missing, or one of its calls or a kernel failed."
);

pyo3::create_exception!(
    halfbyte._core,
    HostMemoryError,
    PyMemoryError,
    "Host memory for optimizer state could not be reserved or pinned."
);

/// Runs `work` on the backend of `device`, without the GIL; records it where this thread records.
pub fn call<W>(py: Python<'_>, device: Device, work: W) -> PyResult<()>
where
    W: FnOnce(&dyn Backend) -> Result<()> + Send + 'static,
{
    let done = match device {
        Device::Cpu => {
            recording::add(&work);
            py.detach(|| work(&CpuBackend::new()))
        }
        Device::Cuda(ordinal) => {
            let stream = current_stream(py, ordinal)?;
            py.detach(|| work(&CudaBackend::new(ordinal, stream)?))
        }
    };
    done.map_err(to_py_err)
}

pub fn to_py_err(error: Error) -> PyErr {
    match error {
        Error::Cuda { .. } => CudaError::new_err(error.to_string()),
        Error::HostMemory { .. } => HostMemoryError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// The handle of torch's current stream; torch's private accessor is several microseconds faster where it exists.
pub fn current_stream(py: Python<'_>, ordinal: u32) -> PyResult<u64> {
    static RAW_STREAM: PyOnceLock<Option<Py<PyAny>>> = PyOnceLock::new();
    let raw_stream = RAW_STREAM.get_or_try_init(py, || {
        let accessor = py.import("torch")?.getattr("_C")?.getattr_opt("_cuda_getCurrentRawStream")?;
        PyResult::Ok(accessor.map(Bound::unbind))
    })?;
    match raw_stream {
        Some(raw_stream) => raw_stream.call1(py, (ordinal,))?.extract(py),
        None => {
            let stream = py.import("torch")?.getattr("cuda")?.call_method1("current_stream", (ordinal,))?;
            stream.getattr("cuda_stream")?.extract()
        }
    }
}
