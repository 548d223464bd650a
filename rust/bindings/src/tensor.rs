//! From torch tensors to borrowed memory, through the tensors' Python attributes.

use std::ffi::c_void;

use halfbyte_core::{DType, Device, TensorMut, TensorRef};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::recording;

/// What was read from one torch tensor; the tensor itself is kept alive by the caller's arguments.
#[derive(Debug, Clone)]
pub struct Tensor {
    name: &'static str,
    ptr: usize,
    numel: usize,
    dtype: DType,
    pub device: Device,
}

/// Sizes and strides of a tensor, in elements.
pub struct Layout {
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

impl Tensor {
    pub fn read(op: &str, name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (dtype, device) = read_kind(op, name, object)?;
        Self::read_contiguous(op, name, object, dtype, device)
    }

    /// As [`Tensor::read`], of what torch keeps where `other` is: a gradient beside its parameter.
    pub fn read_beside(op: &str, name: &'static str, object: &Bound<'_, PyAny>, other: &Tensor) -> PyResult<Self> {
        let dtype = read_dtype(op, name, &object.getattr(intern!(object.py(), "dtype"))?)?;
        Self::read_contiguous(op, name, object, dtype, other.device)
    }

    /// As [`Tensor::read`], of a tensor on `other`'s device, or in pinned memory, which has one address everywhere.
    pub fn read_pinned(op: &str, name: &'static str, object: &Bound<'_, PyAny>, other: &Tensor) -> PyResult<Self> {
        let tensor = Self::read(op, name, object)?;
        let pinned = tensor.device != other.device
            && tensor.device == Device::Cpu
            && object.call_method0(intern!(object.py(), "is_pinned"))?.is_truthy()?;
        Ok(if pinned { Self { device: other.device, ..tensor } } else { tensor })
    }

    /// Whether `object`, from which this was read, still has the memory and the layout that it had.
    pub fn is_still(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = object.py();
        let ptr: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        Ok(ptr == self.ptr && object.call_method0(intern!(py, "is_contiguous"))?.is_truthy()?)
    }

    fn read_contiguous(
        op: &str,
        name: &'static str,
        object: &Bound<'_, PyAny>,
        dtype: DType,
        device: Device,
    ) -> PyResult<Self> {
        let py = object.py();
        if !object.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            let strides = object.call_method0(intern!(py, "stride"))?;
            return Err(PyValueError::new_err(format!("{op}: {name} must be contiguous, got strides {strides}")));
        }
        let numel: usize = object.call_method0(intern!(py, "numel"))?.extract()?;
        let ptr = read_ptr(op, name, object, numel)?;
        Ok(Self { name, ptr, numel, dtype, device })
    }

    /// The memory from the first to the last element of a tensor whose last dimension alone must be contiguous.
    pub fn read_strided(
        op: &str,
        name: &'static str,
        object: &Bound<'_, PyAny>,
        dimensions: usize,
    ) -> PyResult<(Self, Layout)> {
        let py = object.py();
        let (dtype, device) = read_kind(op, name, object)?;
        let shape: Vec<usize> = object.getattr(intern!(py, "shape"))?.extract()?;
        let strides: Vec<usize> = object.call_method0(intern!(py, "stride"))?.extract()?;
        if shape.len() != dimensions || shape.last() != Some(&1) && strides.last() != Some(&1) {
            let expected = format!("{dimensions} dimensions, the last one contiguous");
            let got = format!("shape {shape:?} and strides {strides:?}");
            return Err(PyValueError::new_err(format!("{op}: {name} must have {expected}, got {got}")));
        }
        let last: usize = shape.iter().zip(&strides).map(|(size, stride)| size.saturating_sub(1) * stride).sum();
        let numel = if shape.contains(&0) { 0 } else { last + 1 };
        let ptr = read_ptr(op, name, object, numel)?;
        Ok((Self { name, ptr, numel, dtype, device }, Layout { shape, strides }))
    }

    /// For as long as the tensor lives: to the end of the call, or of the recording that keeps it.
    pub fn as_ref(&self) -> TensorRef<'static> {
        // SAFETY: torch vouches for a contiguous tensor's memory while the caller's arguments keep it alive.
        unsafe { TensorRef::new(self.ptr as *const c_void, self.numel, self.dtype, self.device) }
    }

    /// # Safety
    /// [`check_overlap`] has passed for this tensor and all others of the call.
    pub unsafe fn as_mut(&self) -> TensorMut<'static> {
        // SAFETY: as `as_ref`, and the caller has excluded aliasing.
        unsafe { TensorMut::new(self.ptr as *mut c_void, self.numel, self.dtype, self.device) }
    }

    fn overlaps(&self, other: &Tensor) -> bool {
        let end = |tensor: &Tensor| tensor.ptr + tensor.numel * tensor.dtype.size();
        self.device == other.device && self.ptr < end(other) && other.ptr < end(self)
    }
}

/// No tensor that is written may share memory with another argument.
pub fn check_overlap(op: &str, read: &[&Tensor], written: &[&Tensor]) -> PyResult<()> {
    for (i, output) in written.iter().enumerate() {
        let others = read.iter().chain(&written[..i]);
        if let Some(other) = others.into_iter().find(|other| output.overlaps(other)) {
            let (output, other) = (output.name, other.name);
            return Err(PyValueError::new_err(format!(
                "{op}: {output} must not share memory with {other}, got overlapping tensors"
            )));
        }
    }
    Ok(())
}

/// Rows and columns of a 2-D tensor.
pub fn read_matrix(op: &str, name: &str, object: &Bound<'_, PyAny>) -> PyResult<(usize, usize)> {
    read_shape(op, name, object).map(|[rows, columns]| (rows, columns))
}

/// The sizes of a tensor of `N` dimensions.
pub fn read_shape<const N: usize>(op: &str, name: &str, object: &Bound<'_, PyAny>) -> PyResult<[usize; N]> {
    let shape: Vec<usize> = object.getattr(intern!(object.py(), "shape"))?.extract()?;
    shape.try_into().map_err(|shape: Vec<usize>| {
        PyValueError::new_err(format!("{op}: {name} must have {N} dimensions, got shape {shape:?}"))
    })
}

fn read_kind(op: &str, name: &str, object: &Bound<'_, PyAny>) -> PyResult<(DType, Device)> {
    let Ok(dtype) = object.getattr(intern!(object.py(), "dtype")) else {
        let got = object.get_type().name()?;
        return Err(PyTypeError::new_err(format!("{op}: {name} must be a torch.Tensor, got {got}")));
    };
    Ok((read_dtype(op, name, &dtype)?, read_device(op, name, object)?))
}

fn read_ptr(op: &str, name: &str, object: &Bound<'_, PyAny>, numel: usize) -> PyResult<usize> {
    let ptr: usize = object.call_method0(intern!(object.py(), "data_ptr"))?.extract()?;
    if ptr == 0 && numel > 0 {
        return Err(PyValueError::new_err(format!("{op}: {name} must have memory, got a tensor without storage")));
    }
    recording::keep(object);
    Ok(ptr)
}

fn read_dtype(op: &str, name: &str, dtype: &Bound<'_, PyAny>) -> PyResult<DType> {
    const KNOWN: [(&str, DType); 5] = [
        ("float32", DType::F32),
        ("float16", DType::F16),
        ("bfloat16", DType::BF16),
        ("uint8", DType::U8),
        ("int32", DType::I32),
    ];
    static TORCH_DTYPES: PyOnceLock<Vec<(Py<PyAny>, DType)>> = PyOnceLock::new();
    let py = dtype.py();
    let torch_dtypes = TORCH_DTYPES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        KNOWN.into_iter().map(|(name, dtype)| Ok((torch.getattr(name)?.unbind(), dtype))).collect::<PyResult<_>>()
    })?;
    let found = torch_dtypes.iter().find(|(known, _)| dtype.is(known));
    found.map(|(_, dtype)| *dtype).ok_or_else(|| {
        PyValueError::new_err(format!(
            "{op}: {name} must have dtype float32, float16, bfloat16, uint8 or int32, got {dtype}"
        ))
    })
}

fn read_device(op: &str, name: &str, object: &Bound<'_, PyAny>) -> PyResult<Device> {
    let py = object.py();
    if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
        return Ok(Device::Cpu);
    }
    if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
        return Ok(Device::Cuda(object.call_method0(intern!(py, "get_device"))?.extract()?));
    }
    let device = object.getattr(intern!(py, "device"))?;
    Err(PyValueError::new_err(format!("{op}: {name} must be on cpu or cuda, got {device}")))
}
