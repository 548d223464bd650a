//! The functions of `halfbyte._core`; shapes, dtypes and errors are described in `_core.pyi`.

use halfbyte_core::codebook as maps;
use halfbyte_core::ops::dequantize_4bit::Dequantize4bit;
use halfbyte_core::ops::dequantize_blockwise::DequantizeBlockwise;
use halfbyte_core::ops::double_quantize::DoubleQuantize;
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, GemvShape};
use halfbyte_core::ops::quantize_4bit::Quantize4bit;
use halfbyte_core::ops::quantize_blockwise::QuantizeBlockwise;
use halfbyte_core::{Absmax, QuantType, simd};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::call::{call, to_py_err};
use crate::tensor::{Tensor, check_overlap, read_matrix};

type Object<'a, 'py> = &'a Bound<'py, PyAny>;

#[pyfunction]
pub fn quantize_4bit(
    py: Python<'_>,
    x: Object<'_, '_>,
    packed: Object<'_, '_>,
    absmax: Object<'_, '_>,
    quant_type: &str,
    blocksize: i64,
) -> PyResult<()> {
    const OP: &str = "quantize_4bit";
    let x = Tensor::read(OP, "x", x)?;
    let packed = Tensor::read(OP, "packed", packed)?;
    let absmax = Tensor::read(OP, "absmax", absmax)?;
    check_overlap(OP, &[&x], &[&packed, &absmax])?;
    let quant_type = QuantType::parse(OP, quant_type).map_err(to_py_err)?;
    let blocksize = not_negative(OP, "blocksize", blocksize)?;
    // SAFETY: the outputs were checked for overlap.
    let (packed, absmax) = unsafe { (packed.as_mut(), absmax.as_mut()) };
    let args = Quantize4bit::new(x.as_ref(), packed, absmax, quant_type, blocksize).map_err(to_py_err)?;
    call(py, x.device, |backend| backend.quantize_4bit(args))
}

#[pyfunction]
pub fn dequantize_4bit(
    py: Python<'_>,
    packed: Object<'_, '_>,
    absmax: Object<'_, '_>,
    nested_absmax: Option<Object<'_, '_>>,
    nested_map: Option<Object<'_, '_>>,
    offset: f32,
    quant_type: &str,
    blocksize: i64,
    out: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "dequantize_4bit";
    let packed = Tensor::read(OP, "packed", packed)?;
    let scales = BlockScales::read(OP, absmax, nested_absmax, nested_map, offset)?;
    let out = Tensor::read(OP, "out", out)?;
    check_overlap(OP, &scales.and(&[&packed]), &[&out])?;
    let quant_type = QuantType::parse(OP, quant_type).map_err(to_py_err)?;
    let blocksize = not_negative(OP, "blocksize", blocksize)?;
    // SAFETY: the output was checked for overlap.
    let target = unsafe { out.as_mut() };
    let args =
        Dequantize4bit::new(packed.as_ref(), scales.as_absmax(), quant_type, blocksize, target).map_err(to_py_err)?;
    call(py, packed.device, |backend| backend.dequantize_4bit(args))
}

#[pyfunction]
pub fn double_quantize(
    py: Python<'_>,
    absmax: Object<'_, '_>,
    codes: Object<'_, '_>,
    nested_absmax: Object<'_, '_>,
    offset: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "double_quantize";
    let absmax = Tensor::read(OP, "absmax", absmax)?;
    let codes = Tensor::read(OP, "codes", codes)?;
    let nested_absmax = Tensor::read(OP, "nested_absmax", nested_absmax)?;
    let offset = Tensor::read(OP, "offset", offset)?;
    check_overlap(OP, &[&absmax], &[&codes, &nested_absmax, &offset])?;
    // SAFETY: the outputs were checked for overlap.
    let (codes, nested_absmax, offset) = unsafe { (codes.as_mut(), nested_absmax.as_mut(), offset.as_mut()) };
    let args = DoubleQuantize::new(absmax.as_ref(), codes, nested_absmax, offset).map_err(to_py_err)?;
    call(py, absmax.device, |backend| backend.double_quantize(args))
}

#[pyfunction]
pub fn quantize_blockwise(
    py: Python<'_>,
    x: Object<'_, '_>,
    codes: Object<'_, '_>,
    absmax: Object<'_, '_>,
    signed: bool,
    blocksize: i64,
) -> PyResult<()> {
    const OP: &str = "quantize_blockwise";
    let x = Tensor::read(OP, "x", x)?;
    let codes = Tensor::read(OP, "codes", codes)?;
    let absmax = Tensor::read(OP, "absmax", absmax)?;
    check_overlap(OP, &[&x], &[&codes, &absmax])?;
    let blocksize = not_negative(OP, "blocksize", blocksize)?;
    // SAFETY: the outputs were checked for overlap.
    let (codes, absmax) = unsafe { (codes.as_mut(), absmax.as_mut()) };
    let args = QuantizeBlockwise::new(x.as_ref(), codes, absmax, signed, blocksize).map_err(to_py_err)?;
    call(py, x.device, |backend| backend.quantize_blockwise(args))
}

#[pyfunction]
pub fn dequantize_blockwise(
    py: Python<'_>,
    codes: Object<'_, '_>,
    absmax: Object<'_, '_>,
    signed: bool,
    blocksize: i64,
    out: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "dequantize_blockwise";
    let codes = Tensor::read(OP, "codes", codes)?;
    let absmax = Tensor::read(OP, "absmax", absmax)?;
    let out = Tensor::read(OP, "out", out)?;
    check_overlap(OP, &[&codes, &absmax], &[&out])?;
    let blocksize = not_negative(OP, "blocksize", blocksize)?;
    // SAFETY: the output was checked for overlap.
    let target = unsafe { out.as_mut() };
    let args =
        DequantizeBlockwise::new(codes.as_ref(), absmax.as_ref(), signed, blocksize, target).map_err(to_py_err)?;
    call(py, codes.device, |backend| backend.dequantize_blockwise(args))
}

#[pyfunction]
pub fn gemv_4bit(
    py: Python<'_>,
    x: Object<'_, '_>,
    packed: Object<'_, '_>,
    absmax: Object<'_, '_>,
    nested_absmax: Option<Object<'_, '_>>,
    nested_map: Option<Object<'_, '_>>,
    offset: f32,
    quant_type: &str,
    blocksize: i64,
    out: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "gemv_4bit";
    let (m, k) = read_matrix(OP, "x", x)?;
    let (_, n) = read_matrix(OP, "out", out)?;
    let x = Tensor::read(OP, "x", x)?;
    let packed = Tensor::read(OP, "packed", packed)?;
    let scales = BlockScales::read(OP, absmax, nested_absmax, nested_map, offset)?;
    let out = Tensor::read(OP, "out", out)?;
    check_overlap(OP, &scales.and(&[&x, &packed]), &[&out])?;
    let quant_type = QuantType::parse(OP, quant_type).map_err(to_py_err)?;
    let blocksize = not_negative(OP, "blocksize", blocksize)?;
    let (absmax, shape) = (scales.as_absmax(), GemvShape { m, n, k });
    // SAFETY: the output was checked for overlap.
    let target = unsafe { out.as_mut() };
    let args = Gemv4bit::new(x.as_ref(), packed.as_ref(), absmax, quant_type, blocksize, target, shape);
    let args = args.map_err(to_py_err)?;
    call(py, packed.device, |backend| backend.gemv_4bit(args))
}

#[pyfunction]
pub fn codebook(quant_type: &str) -> PyResult<Vec<f32>> {
    Ok(QuantType::parse("codebook", quant_type).map_err(to_py_err)?.stored_map().to_vec())
}

#[pyfunction]
pub fn dynamic_map(signed: bool) -> Vec<f32> {
    maps::dynamic_map(signed).to_vec()
}

#[pyfunction]
pub fn cuda_build(py: Python<'_>) -> PyResult<Option<Bound<'_, PyDict>>> {
    let Some(info) = halfbyte_cuda::build_info() else {
        return Ok(None);
    };
    let build = PyDict::new(py);
    build.set_item("nvcc", info.nvcc)?;
    build.set_item("archs", info.archs)?;
    Ok(Some(build))
}

#[pyfunction]
pub fn cuda_status() -> String {
    halfbyte_cuda::status().err().unwrap_or_else(|| "ok".to_string())
}

#[pyfunction]
pub fn cpu_features() -> Vec<&'static str> {
    simd::cpu_features()
}

fn not_negative(op: &str, name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| PyValueError::new_err(format!("{op}: {name} must be >= 0, got {value}")))
}

/// The four arguments that describe the block scales: plain, or nested when `nested_absmax` is given.
struct BlockScales {
    absmax: Tensor,
    nested: Option<(Tensor, Tensor)>,
    offset: f32,
}

impl BlockScales {
    fn read(
        op: &str,
        absmax: Object<'_, '_>,
        nested_absmax: Option<Object<'_, '_>>,
        nested_map: Option<Object<'_, '_>>,
        offset: f32,
    ) -> PyResult<Self> {
        let absmax = Tensor::read(op, "absmax", absmax)?;
        let nested = match (nested_absmax, nested_map) {
            (Some(nested), Some(map)) => {
                Some((Tensor::read(op, "nested_absmax", nested)?, Tensor::read(op, "nested_map", map)?))
            }
            (None, None) => None,
            _ => {
                let message = format!("{op}: nested_absmax and nested_map must be given together, got one of them");
                return Err(PyValueError::new_err(message));
            }
        };
        Ok(Self { absmax, nested, offset })
    }

    fn as_absmax(&self) -> Absmax<'_> {
        let absmax = self.absmax.as_ref();
        match &self.nested {
            None => Absmax::Plain { absmax },
            Some((nested, map)) => {
                Absmax::Nested { codes: absmax, absmax: nested.as_ref(), map: map.as_ref(), offset: self.offset }
            }
        }
    }

    /// These tensors and `others`.
    fn and<'a>(&'a self, others: &[&'a Tensor]) -> Vec<&'a Tensor> {
        let nested = self.nested.iter().flat_map(|(absmax, map)| [absmax, map]);
        others.iter().copied().chain([&self.absmax]).chain(nested).collect()
    }
}
