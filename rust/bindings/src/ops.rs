//! The functions of `halfbyte._core`; shapes, dtypes and errors are described in `_core.pyi`.

use std::path::PathBuf;

use halfbyte_core::codebook as maps;
use halfbyte_core::file::ReadFile;
use halfbyte_core::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use halfbyte_core::ops::dequantize_4bit::Dequantize4bit;
use halfbyte_core::ops::dequantize_blockwise::DequantizeBlockwise;
use halfbyte_core::ops::double_quantize::DoubleQuantize;
use halfbyte_core::ops::draw::{Choice, Draw, Drawn};
use halfbyte_core::ops::gemv::Gemv;
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, Gemv4bitGroup, GemvShape};
use halfbyte_core::ops::gemv_4bit_fused::{Adapter, FusedProduct, Gemv4bitFused, Next, NextWeight, Norm, Residual};
use halfbyte_core::ops::lora_product::{LoraProduct, LoraShape, Narrow};
use halfbyte_core::ops::paged_attention::{
    AttentionInputs, AttentionOutputs, AttentionShape, BLOCK, CodeScales, PagedAttention,
};
use halfbyte_core::ops::quantize_4bit::Quantize4bit;
use halfbyte_core::ops::quantize_blockwise::QuantizeBlockwise;
use halfbyte_core::ops::rms_norm::{RmsNorm, RmsNormBackward, WeightGradient};
use halfbyte_core::ops::rope::{Angles, Heads, Rope, RopeShape};
use halfbyte_core::ops::swiglu::{Rows, Swiglu, SwigluBackward};
use halfbyte_core::{Absmax, QuantType, TensorRef, simd};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::call::{call, to_py_err};
use crate::tensor::{Layout, Tensor, check_overlap, read_matrix, read_shape};

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
    lanes: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "double_quantize";
    let absmax = Tensor::read(OP, "absmax", absmax)?;
    let codes = Tensor::read(OP, "codes", codes)?;
    let nested_absmax = Tensor::read(OP, "nested_absmax", nested_absmax)?;
    let offset = Tensor::read(OP, "offset", offset)?;
    let lanes = Tensor::read(OP, "lanes", lanes)?;
    check_overlap(OP, &[&absmax], &[&codes, &nested_absmax, &offset, &lanes])?;
    // SAFETY: the outputs were checked for overlap.
    let (codes, nested_absmax, offset) = unsafe { (codes.as_mut(), nested_absmax.as_mut(), offset.as_mut()) };
    // SAFETY: as above.
    let lanes = unsafe { lanes.as_mut() };
    let args = DoubleQuantize::new(absmax.as_ref(), codes, nested_absmax, offset, lanes).map_err(to_py_err)?;
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
pub fn gemv(py: Python<'_>, x: Object<'_, '_>, weight: Object<'_, '_>, out: Object<'_, '_>) -> PyResult<()> {
    const OP: &str = "gemv";
    let (m, k) = read_matrix(OP, "x", x)?;
    let (n, _) = read_matrix(OP, "weight", weight)?;
    let x = Tensor::read(OP, "x", x)?;
    let weight = Tensor::read(OP, "weight", weight)?;
    let out = Tensor::read(OP, "out", out)?;
    check_overlap(OP, &[&x, &weight], &[&out])?;
    // SAFETY: the output was checked for overlap.
    let target = unsafe { out.as_mut() };
    let args = Gemv::new(x.as_ref(), weight.as_ref(), target, GemvShape { m, n, k }).map_err(to_py_err)?;
    call(py, weight.device, |backend| backend.gemv(args))
}

/// What one weight W brings to a product x Wᵀ: codes, scales, and where the result goes.
struct Weight {
    packed: Tensor,
    scales: BlockScales,
    out: Tensor,
    n: usize,
}

impl Weight {
    fn read(
        op: &str,
        packed: Object<'_, '_>,
        absmax: Object<'_, '_>,
        nested_absmax: Option<Object<'_, '_>>,
        nested_map: Option<Object<'_, '_>>,
        offset: f32,
        out: Object<'_, '_>,
    ) -> PyResult<Self> {
        let (_, n) = read_matrix(op, "out", out)?;
        let packed = Tensor::read(op, "packed", packed)?;
        let scales = BlockScales::read(op, absmax, nested_absmax, nested_map, offset)?;
        Ok(Self { packed, scales, out: Tensor::read(op, "out", out)?, n })
    }

    fn inputs<'a>(&'a self, x: &'a Tensor) -> Vec<&'a Tensor> {
        self.scales.and(&[x, &self.packed])
    }
}

/// The rows x of a product, and how its weights are stored.
struct Rows4bit {
    x: Tensor,
    m: usize,
    k: usize,
    quant_type: QuantType,
    blocksize: usize,
}

impl Rows4bit {
    fn read(op: &'static str, x: Object<'_, '_>, quant_type: &str, blocksize: i64) -> PyResult<Self> {
        let (m, k) = read_matrix(op, "x", x)?;
        let x = Tensor::read(op, "x", x)?;
        let quant_type = QuantType::parse(op, quant_type).map_err(to_py_err)?;
        Ok(Self { x, m, k, quant_type, blocksize: not_negative(op, "blocksize", blocksize)? })
    }

    /// # Safety
    /// `check_overlap` has passed for the tensors of both.
    unsafe fn times(&self, weight: &Weight) -> PyResult<Gemv4bit<'static>> {
        let shape = GemvShape { m: self.m, n: weight.n, k: self.k };
        let (x, packed, absmax) = (self.x.as_ref(), weight.packed.as_ref(), weight.scales.as_absmax());
        // SAFETY: as the caller says.
        let out = unsafe { weight.out.as_mut() };
        Gemv4bit::new(x, packed, absmax, self.quant_type, self.blocksize, out, shape).map_err(to_py_err)
    }
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
    let rows = Rows4bit::read(OP, x, quant_type, blocksize)?;
    let weight = Weight::read(OP, packed, absmax, nested_absmax, nested_map, offset, out)?;
    check_overlap(OP, &weight.inputs(&rows.x), &[&weight.out])?;
    // SAFETY: the output was checked for overlap.
    let args = unsafe { rows.times(&weight) }?;
    call(py, weight.packed.device, |backend| backend.gemv_4bit(args))
}

type Product<'py> = (
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    f32,
    Bound<'py, PyAny>,
);

/// Products of one x.
struct Group {
    rows: Rows4bit,
    weights: Vec<Weight>,
}

impl Group {
    fn read(
        op: &'static str,
        x: Object<'_, '_>,
        products: &[Product<'_>],
        quant_type: &str,
        blocksize: i64,
    ) -> PyResult<Self> {
        let rows = Rows4bit::read(op, x, quant_type, blocksize)?;
        let read = |(packed, absmax, nested_absmax, nested_map, offset, out): &Product<'_>| {
            Weight::read(op, packed, absmax, nested_absmax.as_ref(), nested_map.as_ref(), *offset, out)
        };
        Ok(Self { rows, weights: products.iter().map(read).collect::<PyResult<Vec<_>>>()? })
    }

    /// Nothing that is written may overlap what is read.
    fn build(&self, op: &'static str) -> PyResult<Gemv4bitGroup<'static>> {
        let inputs: Vec<_> = self.weights.iter().flat_map(|weight| weight.inputs(&self.rows.x)).collect();
        let outputs: Vec<_> = self.weights.iter().map(|weight| &weight.out).collect();
        check_overlap(op, &inputs, &outputs)?;
        // SAFETY: the outputs were checked for overlap.
        let products = self.weights.iter().map(|weight| unsafe { self.rows.times(weight) });
        Gemv4bitGroup::new(products.collect::<PyResult<Vec<_>>>()?).map_err(to_py_err)
    }
}

#[pyfunction]
pub fn gemv_4bit_group(
    py: Python<'_>,
    x: Object<'_, '_>,
    products: Vec<Product<'_>>,
    quant_type: &str,
    blocksize: i64,
) -> PyResult<()> {
    const OP: &str = "gemv_4bit_group";
    let group = Group::read(OP, x, &products, quant_type, blocksize)?;
    let args = group.build(OP)?;
    call(py, group.rows.x.device, |backend| backend.gemv_4bit_group(args))
}

#[pyfunction]
pub fn gemm_4bit(
    py: Python<'_>,
    x: Object<'_, '_>,
    products: Vec<Product<'_>>,
    quant_type: &str,
    blocksize: i64,
) -> PyResult<()> {
    const OP: &str = "gemm_4bit";
    let group = Group::read(OP, x, &products, quant_type, blocksize)?;
    let args = group.build(OP)?;
    call(py, group.rows.x.device, |backend| backend.gemm_4bit(args))
}

#[derive(FromPyObject)]
struct PyAdapter<'py> {
    a: Bound<'py, PyAny>,
    b: Bound<'py, PyAny>,
    factors: Option<Bound<'py, PyAny>>,
    scaling: f32,
}

#[derive(FromPyObject)]
pub struct PyFusedProduct<'py> {
    packed: Bound<'py, PyAny>,
    absmax: Bound<'py, PyAny>,
    nested_absmax: Option<Bound<'py, PyAny>>,
    nested_map: Option<Bound<'py, PyAny>>,
    offset: f32,
    bias: Option<Bound<'py, PyAny>>,
    adapter: Option<PyAdapter<'py>>,
    out: Bound<'py, PyAny>,
}

/// A tensor that is only read, kept in `read` for the check against what is written.
fn read_input(
    op: &str,
    name: &'static str,
    object: &Bound<'_, PyAny>,
    read: &mut Vec<Tensor>,
) -> PyResult<TensorRef<'static>> {
    let tensor = Tensor::read(op, name, object)?;
    let borrowed = tensor.as_ref();
    read.push(tensor);
    Ok(borrowed)
}

impl PyFusedProduct<'_> {
    /// The product and its output; what is read goes to `read`.
    fn build(
        &self,
        op: &'static str,
        rows: &Rows4bit,
        read: &mut Vec<Tensor>,
    ) -> PyResult<(FusedProduct<'static>, Tensor)> {
        let mut input = |name, object| read_input(op, name, object, read);
        let (absmax, map) = (self.nested_absmax.as_ref(), self.nested_map.as_ref());
        let weight = Weight::read(op, &self.packed, &self.absmax, absmax, map, self.offset, &self.out)?;
        // SAFETY: the caller checks the outputs for overlap before anything runs.
        let product = unsafe { rows.times(&weight) }?;
        let bias = self.bias.as_ref().map(|bias| input("bias", bias)).transpose()?;
        let adapter = match &self.adapter {
            Some(adapter) => {
                let (rank, _) = read_matrix(op, "lora_a", &adapter.a)?;
                let (a, b) = (input("lora_a", &adapter.a)?, input("lora_b", &adapter.b)?);
                let factors = adapter.factors.as_ref().map(|factors| input("factors", factors)).transpose()?;
                Some(Adapter::new(a, b, factors, adapter.scaling, rank))
            }
            None => None,
        };
        input("packed", &self.packed)?;
        Ok((FusedProduct::new(product, bias, adapter).map_err(to_py_err)?, weight.out))
    }
}

/// What x goes through before the products.
#[derive(FromPyObject)]
pub struct PyNorm<'py> {
    weight: Bound<'py, PyAny>,
    squares: Bound<'py, PyAny>,
    eps: f32,
}

impl PyNorm<'_> {
    fn build(&self, op: &'static str, read: &mut Vec<Tensor>) -> PyResult<Norm<'static>> {
        let mut input = |name, object| read_input(op, name, object, read);
        Ok(Norm::new(input("norm_weight", &self.weight)?, input("squares", &self.squares)?, self.eps))
    }
}

/// What the one product is added to.
#[derive(FromPyObject)]
pub struct PyResidual<'py> {
    values: Bound<'py, PyAny>,
    squares: Bound<'py, PyAny>,
}

impl PyResidual<'_> {
    fn build(
        &self,
        op: &'static str,
        read: &mut Vec<Tensor>,
        written: &mut Vec<Tensor>,
    ) -> PyResult<Residual<'static>> {
        let squares = Tensor::read(op, "squares", &self.squares)?;
        // SAFETY: the caller checks what is written for overlap before anything runs.
        let residual = Residual::new(read_input(op, "residual", &self.values, read)?, unsafe { squares.as_mut() });
        written.push(squares);
        Ok(residual)
    }
}

/// A weight [n, k] that the next launch reads.
#[derive(FromPyObject)]
pub struct PyNextWeight<'py> {
    packed: Bound<'py, PyAny>,
    absmax: Bound<'py, PyAny>,
    nested_absmax: Bound<'py, PyAny>,
    n: usize,
    k: usize,
}

/// All of them, in pairs where gated.
#[derive(FromPyObject)]
pub struct PyNext<'py> {
    weights: Vec<PyNextWeight<'py>>,
    gated: bool,
    norm: Option<Bound<'py, PyAny>>,
}

impl PyNext<'_> {
    fn build(&self, op: &'static str, read: &mut Vec<Tensor>) -> PyResult<Next<'static>> {
        let mut weights = Vec::new();
        for weight in &self.weights {
            let mut input = |object| read_input(op, "next", object, read);
            let (packed, absmax) = (input(&weight.packed)?, input(&weight.absmax)?);
            let nested_absmax = input(&weight.nested_absmax)?;
            weights.push(NextWeight { packed, absmax, nested_absmax, n: weight.n, k: weight.k });
        }
        let norm = self.norm.as_ref().map(|norm| read_input(op, "next", norm, read)).transpose()?;
        Next::new(weights, self.gated, norm).map_err(to_py_err)
    }
}

#[pyfunction]
#[pyo3(signature = (x, products, quant_type, gated, hidden=None, arrived=None, norm=None, residual=None, next=None))]
pub fn gemv_4bit_fused(
    py: Python<'_>,
    x: Object<'_, '_>,
    products: Vec<PyFusedProduct<'_>>,
    quant_type: &str,
    gated: bool,
    hidden: Option<Object<'_, '_>>,
    arrived: Option<Object<'_, '_>>,
    norm: Option<PyNorm<'_>>,
    residual: Option<PyResidual<'_>>,
    next: Option<PyNext<'_>>,
) -> PyResult<()> {
    const OP: &str = "gemv_4bit_fused";
    let rows = Rows4bit::read(OP, x, quant_type, 64)?;
    let (mut read, mut written) = (Vec::new(), Vec::new());
    let mut fused = Vec::new();
    for product in &products {
        let (args, out) = product.build(OP, &rows, &mut read)?;
        fused.push(args);
        // Gate and up share what the pair writes.
        if !gated || fused.len() % 2 == 1 {
            written.push(out);
        }
    }
    let hidden = hidden.map(|hidden| Tensor::read(OP, "hidden", hidden)).transpose()?;
    let arrived = arrived.map(|arrived| Tensor::read(OP, "arrived", arrived)).transpose()?;
    // SAFETY: the outputs are checked for overlap before anything runs.
    let [scratch, word] = [&hidden, &arrived].map(|own| own.as_ref().map(|own| unsafe { own.as_mut() }));
    written.extend(hidden.into_iter().chain(arrived));
    let norm = norm.map(|norm| norm.build(OP, &mut read)).transpose()?;
    let residual = residual.map(|residual| residual.build(OP, &mut read, &mut written)).transpose()?;
    read.push(Tensor::read(OP, "x", x)?);
    check_overlap(OP, &read.iter().collect::<Vec<_>>(), &written.iter().collect::<Vec<_>>())?;
    let next = next.map_or(Ok(Next::default()), |next| next.build(OP, &mut read))?;
    let fused = Gemv4bitFused::new(fused, gated, scratch, word, norm, residual, next).map_err(to_py_err)?;
    call(py, rows.x.device, |backend| backend.gemv_4bit_fused(fused))
}

#[pyfunction]
pub fn has_gemv_4bit_fused(device: u32) -> bool {
    halfbyte_cuda::has_gemv_4bit_fused(device)
}

#[pyfunction]
pub fn has_lora_product(device: u32) -> bool {
    halfbyte_cuda::has_lora_product(device)
}

#[pyfunction]
#[pyo3(signature = (x, w, hidden, b, transposed, out, a=None, scaling=1.0, progress=None))]
pub fn lora_product(
    py: Python<'_>,
    x: Object<'_, '_>,
    w: Object<'_, '_>,
    hidden: Object<'_, '_>,
    b: Object<'_, '_>,
    transposed: bool,
    out: Object<'_, '_>,
    a: Option<Object<'_, '_>>,
    scaling: f32,
    progress: Option<Object<'_, '_>>,
) -> PyResult<()> {
    const OP: &str = "lora_product";
    let rank = |name, own| read_matrix(OP, name, own).map(|own| if transposed { own } else { (own.1, own.0) });
    let (m, k) = read_matrix(OP, "x", x)?;
    let (_, n) = read_matrix(OP, "out", out)?;
    let (r, _) = rank("b", b)?;
    let s = a.map_or(Ok(0), |a| rank("a", a).map(|(_, s)| s))?;
    let x = Tensor::read(OP, "x", x)?;
    let w = Tensor::read(OP, "w", w)?;
    let (hidden, layout) = Tensor::read_strided(OP, "hidden", hidden, 2)?;
    let b = Tensor::read(OP, "b", b)?;
    let out = Tensor::read(OP, "out", out)?;
    let a = a.map(|a| Tensor::read(OP, "a", a)).transpose()?;
    let progress = progress.map(|progress| Tensor::read(OP, "progress", progress)).transpose()?;
    let read: Vec<&Tensor> = [&x, &w, &b].into_iter().chain(&a).collect();
    let written: Vec<&Tensor> = [&out, &hidden].into_iter().chain(&progress).collect();
    check_overlap(OP, &read, &written)?;
    // SAFETY: what is written was checked for overlap.
    let [target, values] = [&out, &hidden].map(|own| unsafe { own.as_mut() });
    let narrow = a.zip(progress).map(|(a, progress)| {
        // SAFETY: as above.
        let progress = unsafe { progress.as_mut() };
        Narrow { a: a.as_ref(), s, scaling, progress }
    });
    let shape = LoraShape { m, n, k, r, width: layout.shape[1], stride: layout.strides[0] };
    let args = LoraProduct::new(x.as_ref(), w.as_ref(), values, b.as_ref(), target, narrow, shape, transposed)
        .map_err(to_py_err)?;
    call(py, x.device, |backend| backend.lora_product(args))
}

#[pyfunction]
pub fn paged_attention(
    py: Python<'_>,
    q: Object<'_, '_>,
    k: Object<'_, '_>,
    v: Object<'_, '_>,
    cos: Object<'_, '_>,
    sin: Object<'_, '_>,
    keys: Object<'_, '_>,
    values: Object<'_, '_>,
    key_scales: Option<Object<'_, '_>>,
    value_scales: Option<Object<'_, '_>>,
    tables: Object<'_, '_>,
    lengths: Object<'_, '_>,
    window: i64,
    partials: Object<'_, '_>,
    arrived: Object<'_, '_>,
    out: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "paged_attention";
    let [batch, heads, head_dim] = read_shape(OP, "q", q)?;
    let [blocks, block, kv_heads, _] = read_shape(OP, "keys", keys)?;
    let [_, table] = read_shape(OP, "tables", tables)?;
    if block != BLOCK {
        return Err(PyValueError::new_err(format!("{OP}: keys must have blocks of {BLOCK} tokens, got {block}")));
    }
    let shape = AttentionShape { batch, heads, kv_heads, head_dim, blocks, table };
    let read = |name, object| Tensor::read(OP, name, object);
    let (q, k, v) = (read("q", q)?, read("k", k)?, read("v", v)?);
    let (cos, sin) = (read("cos", cos)?, read("sin", sin)?);
    let (tables, lengths) = (read("tables", tables)?, read("lengths", lengths)?);
    let (keys, values) = (read("keys", keys)?, read("values", values)?);
    let (partials, arrived, out) = (read("partials", partials)?, read("arrived", arrived)?, read("out", out)?);
    let scales = match (key_scales, value_scales) {
        (None, None) => None,
        (Some(keys), Some(values)) => Some((read("key_scales", keys)?, read("value_scales", values)?)),
        _ => return Err(PyValueError::new_err(format!("{OP}: expected key_scales and value_scales, or neither"))),
    };
    let mut written = vec![&keys, &values, &partials, &arrived, &out];
    written.extend(scales.iter().flat_map(|(keys, values)| [keys, values]));
    check_overlap(OP, &[&q, &k, &v, &cos, &sin, &tables, &lengths], &written)?;
    let window = not_negative(OP, "window", window)?;
    let inputs = AttentionInputs {
        q: q.as_ref(),
        k: k.as_ref(),
        v: v.as_ref(),
        cos: cos.as_ref(),
        sin: sin.as_ref(),
        tables: tables.as_ref(),
        lengths: lengths.as_ref(),
    };
    // SAFETY: the outputs were checked for overlap.
    let outputs = unsafe {
        AttentionOutputs {
            keys: keys.as_mut(),
            values: values.as_mut(),
            scales: scales.as_ref().map(|(keys, values)| CodeScales { keys: keys.as_mut(), values: values.as_mut() }),
            partials: partials.as_mut(),
            arrived: arrived.as_mut(),
            out: out.as_mut(),
        }
    };
    let args = PagedAttention::new(inputs, outputs, window, shape).map_err(to_py_err)?;
    call(py, q.device, |backend| backend.paged_attention(args))
}

#[pyfunction]
pub fn draw(
    py: Python<'_>,
    scores: Object<'_, '_>,
    settings: Object<'_, '_>,
    top_k: Object<'_, '_>,
    keys: Object<'_, '_>,
    running: Object<'_, '_>,
    lengths: Object<'_, '_>,
    tokens: Object<'_, '_>,
    reported: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "draw";
    let read = |name, object| Tensor::read(OP, name, object);
    let (scores, settings, top_k) = (read("scores", scores)?, read("settings", settings)?, read("top_k", top_k)?);
    let (keys, running) = (read("keys", keys)?, read("running", running)?);
    let (lengths, tokens) = (read("lengths", lengths)?, read("tokens", tokens)?);
    let reported = Tensor::read_pinned(OP, "reported", reported, &scores)?;
    check_overlap(OP, &[&scores, &settings, &top_k, &keys, &running], &[&lengths, &tokens, &reported])?;
    let (settings, top_k) = (settings.as_ref(), top_k.as_ref());
    let choice = Choice { settings, top_k, keys: keys.as_ref(), running: running.as_ref() };
    // SAFETY: the outputs were checked for overlap.
    let drawn = unsafe { Drawn { lengths: lengths.as_mut(), tokens: tokens.as_mut(), reported: reported.as_mut() } };
    let args = Draw::new(scores.as_ref(), choice, drawn).map_err(to_py_err)?;
    call(py, scores.device, |backend| backend.draw(args))
}

#[pyfunction]
#[pyo3(signature = (logits, labels, losses, logsumexps, vocab, divisor=None))]
pub fn cross_entropy(
    py: Python<'_>,
    logits: Object<'_, '_>,
    labels: Object<'_, '_>,
    losses: Object<'_, '_>,
    logsumexps: Object<'_, '_>,
    vocab: i64,
    divisor: Option<Object<'_, '_>>,
) -> PyResult<()> {
    const OP: &str = "cross_entropy";
    let logits = Tensor::read(OP, "logits", logits)?;
    let labels = Tensor::read(OP, "labels", labels)?;
    let (losses, logsumexps) = (Tensor::read(OP, "losses", losses)?, Tensor::read(OP, "logsumexps", logsumexps)?);
    let divisor = divisor.map(|divisor| Tensor::read(OP, "divisor", divisor)).transpose()?;
    let read: Vec<&Tensor> = [&labels].into_iter().chain(&divisor).collect();
    check_overlap(OP, &read, &[&logits, &losses, &logsumexps])?;
    let vocab = not_negative(OP, "vocab", vocab)?;
    let divided = divisor.as_ref().map(Tensor::as_ref);
    // SAFETY: the outputs were checked for overlap.
    let (target, of_rows, totals) = unsafe { (logits.as_mut(), losses.as_mut(), logsumexps.as_mut()) };
    let args = CrossEntropy::new(target, labels.as_ref(), of_rows, totals, divided, vocab).map_err(to_py_err)?;
    call(py, logits.device, |backend| backend.cross_entropy(args))
}

#[pyfunction]
pub fn cross_entropy_backward(
    py: Python<'_>,
    logits: Object<'_, '_>,
    labels: Object<'_, '_>,
    logsumexps: Object<'_, '_>,
    divisor: Object<'_, '_>,
    first: i64,
    width: i64,
) -> PyResult<()> {
    const OP: &str = "cross_entropy_backward";
    let logits = Tensor::read(OP, "logits", logits)?;
    let labels = Tensor::read(OP, "labels", labels)?;
    let logsumexps = Tensor::read(OP, "logsumexps", logsumexps)?;
    let divisor = Tensor::read(OP, "divisor", divisor)?;
    check_overlap(OP, &[&labels, &logsumexps, &divisor], &[&logits])?;
    let (first, width) = (not_negative(OP, "first", first)?, not_negative(OP, "width", width)?);
    // SAFETY: the output was checked for overlap.
    let target = unsafe { logits.as_mut() };
    let (labels, totals, divided) = (labels.as_ref(), logsumexps.as_ref(), divisor.as_ref());
    let args = CrossEntropyBackward::new(target, labels, totals, divided, first, width).map_err(to_py_err)?;
    call(py, logits.device, |backend| backend.cross_entropy_backward(args))
}

#[pyfunction]
#[pyo3(signature = (x, weight, eps, out, residual=None, sum=None))]
pub fn rms_norm(
    py: Python<'_>,
    x: Object<'_, '_>,
    weight: Object<'_, '_>,
    eps: f32,
    out: Object<'_, '_>,
    residual: Option<Object<'_, '_>>,
    sum: Option<Object<'_, '_>>,
) -> PyResult<()> {
    const OP: &str = "rms_norm";
    let x = Tensor::read(OP, "x", x)?;
    let weight = Tensor::read(OP, "weight", weight)?;
    let out = Tensor::read(OP, "out", out)?;
    let added = match (residual, sum) {
        (Some(residual), Some(sum)) => Some((Tensor::read(OP, "residual", residual)?, Tensor::read(OP, "sum", sum)?)),
        (None, None) => None,
        _ => return Err(PyValueError::new_err("rms_norm: residual and sum must be given together, got one of them")),
    };
    let (residual, sum) = (added.iter().map(|(residual, _)| residual), added.iter().map(|(_, sum)| sum));
    let read: Vec<&Tensor> = [&x, &weight].into_iter().chain(residual).collect();
    check_overlap(OP, &read, &[&out].into_iter().chain(sum).collect::<Vec<_>>())?;
    // SAFETY: the outputs were checked for overlap.
    let added = added.as_ref().map(|(residual, sum)| (residual.as_ref(), unsafe { sum.as_mut() }));
    // SAFETY: as above.
    let target = unsafe { out.as_mut() };
    let args = RmsNorm::new(x.as_ref(), added, weight.as_ref(), target, eps).map_err(to_py_err)?;
    call(py, x.device, |backend| backend.rms_norm(args))
}

#[pyfunction]
#[pyo3(signature = (grad, x, weight, eps, grad_x, grad_sum=None, grad_weight=None, roots=None, partials=None))]
pub fn rms_norm_backward(
    py: Python<'_>,
    grad: Object<'_, '_>,
    x: Object<'_, '_>,
    weight: Object<'_, '_>,
    eps: f32,
    grad_x: Object<'_, '_>,
    grad_sum: Option<Object<'_, '_>>,
    grad_weight: Option<Object<'_, '_>>,
    roots: Option<Object<'_, '_>>,
    partials: Option<Object<'_, '_>>,
) -> PyResult<()> {
    const OP: &str = "rms_norm_backward";
    let grad = Tensor::read(OP, "grad", grad)?;
    let x = Tensor::read(OP, "x", x)?;
    let weight = Tensor::read(OP, "weight", weight)?;
    let grad_x = Tensor::read(OP, "grad_x", grad_x)?;
    let grad_sum = grad_sum.map(|tensor| Tensor::read(OP, "grad_sum", tensor)).transpose()?;
    let gradient = match (grad_weight, roots, partials) {
        (Some(grad_weight), Some(roots), Some(partials)) => vec![
            Tensor::read(OP, "grad_weight", grad_weight)?,
            Tensor::read(OP, "roots", roots)?,
            Tensor::read(OP, "partials", partials)?,
        ],
        (None, None, None) => Vec::new(),
        _ => {
            let message = "rms_norm_backward: grad_weight, roots and partials must be given together, got some of them";
            return Err(PyValueError::new_err(message));
        }
    };
    let read: Vec<&Tensor> = [&grad, &x, &weight].into_iter().chain(&grad_sum).collect();
    check_overlap(OP, &read, &[&grad_x].into_iter().chain(&gradient).collect::<Vec<_>>())?;
    let weight_gradient = match &gradient[..] {
        // SAFETY: the outputs were checked for overlap.
        [grad_weight, roots, partials] => Some(unsafe {
            WeightGradient { grad_weight: grad_weight.as_mut(), roots: roots.as_mut(), partials: partials.as_mut() }
        }),
        _ => None,
    };
    let stream = grad_sum.as_ref().map(Tensor::as_ref);
    // SAFETY: as above.
    let target = unsafe { grad_x.as_mut() };
    let args = RmsNormBackward::new(grad.as_ref(), x.as_ref(), weight.as_ref(), stream, target, weight_gradient, eps);
    let args = args.map_err(to_py_err)?;
    call(py, grad.device, |backend| backend.rms_norm_backward(args))
}

#[pyfunction]
pub fn rope(
    py: Python<'_>,
    q: Object<'_, '_>,
    k: Object<'_, '_>,
    cos: Object<'_, '_>,
    sin: Object<'_, '_>,
    inverse: bool,
    q_out: Object<'_, '_>,
    k_out: Object<'_, '_>,
) -> PyResult<()> {
    const OP: &str = "rope";
    let (q, q_layout) = Tensor::read_strided(OP, "q", q, 4)?;
    let (k, k_layout) = Tensor::read_strided(OP, "k", k, 4)?;
    let cos = Tensor::read(OP, "cos", cos)?;
    let sin = Tensor::read(OP, "sin", sin)?;
    let q_out = Tensor::read(OP, "q_out", q_out)?;
    let k_out = Tensor::read(OP, "k_out", k_out)?;
    check_overlap(OP, &[&q, &k, &cos, &sin], &[&q_out, &k_out])?;
    let (shape, of_k) = (rope_shape(&q_layout), rope_shape(&k_layout));
    if shape != of_k {
        let (expected, got) = (&q_layout.shape, &k_layout.shape);
        let message = format!("rope: k must have the batch, tokens and head_dim of q, {expected:?}, got {got:?}");
        return Err(PyValueError::new_err(message));
    }
    let angles = Angles { cos: cos.as_ref(), sin: sin.as_ref() };
    let (q_heads, k_heads) = (heads(&q, &q_layout), heads(&k, &k_layout));
    // SAFETY: the outputs were checked for overlap.
    let (q_target, k_target) = unsafe { (q_out.as_mut(), k_out.as_mut()) };
    let args = Rope::new(q_heads, k_heads, angles, q_target, k_target, shape, inverse).map_err(to_py_err)?;
    call(py, q.device, |backend| backend.rope(args))
}

fn rope_shape(layout: &Layout) -> RopeShape {
    RopeShape { batch: layout.shape[0], tokens: layout.shape[1], head_dim: layout.shape[3] }
}

fn heads(tensor: &Tensor, layout: &Layout) -> Heads<'static> {
    let strides = [layout.strides[0], layout.strides[1], layout.strides[2]];
    Heads { span: tensor.as_ref(), heads: layout.shape[2], strides }
}

#[pyfunction]
pub fn swiglu(py: Python<'_>, gate: Object<'_, '_>, up: Object<'_, '_>, out: Object<'_, '_>) -> PyResult<()> {
    const OP: &str = "swiglu";
    let (gate, layout) = Tensor::read_strided(OP, "gate", gate, 2)?;
    let (up, up_layout) = read_like(OP, "up", up, &layout)?;
    let out = Tensor::read(OP, "out", out)?;
    check_overlap(OP, &[&gate, &up], &[&out])?;
    // SAFETY: the output was checked for overlap.
    let target = unsafe { out.as_mut() };
    let (gate_rows, up_rows) = (rows(&gate, &layout), rows(&up, &up_layout));
    let args = Swiglu::new(gate_rows, up_rows, target, layout.shape[0], layout.shape[1]).map_err(to_py_err)?;
    call(py, gate.device, |backend| backend.swiglu(args))
}

#[pyfunction]
pub fn swiglu_backward(
    py: Python<'_>,
    grad: Object<'_, '_>,
    gate: Object<'_, '_>,
    up: Object<'_, '_>,
    grads: Object<'_, '_>,
    halves: bool,
) -> PyResult<()> {
    const OP: &str = "swiglu_backward";
    let grad = Tensor::read(OP, "grad", grad)?;
    let (gate, layout) = Tensor::read_strided(OP, "gate", gate, 2)?;
    let (up, up_layout) = read_like(OP, "up", up, &layout)?;
    let grads = Tensor::read(OP, "grads", grads)?;
    check_overlap(OP, &[&grad, &gate, &up], &[&grads])?;
    // SAFETY: the output was checked for overlap.
    let target = unsafe { grads.as_mut() };
    let (gate_rows, up_rows, [m, n]) =
        (rows(&gate, &layout), rows(&up, &up_layout), [layout.shape[0], layout.shape[1]]);
    let args = SwigluBackward::new(grad.as_ref(), gate_rows, up_rows, target, halves, m, n).map_err(to_py_err)?;
    call(py, gate.device, |backend| backend.swiglu_backward(args))
}

/// A matrix of the same sizes as another, each with strides of its own.
fn read_like(op: &str, name: &'static str, object: Object<'_, '_>, expected: &Layout) -> PyResult<(Tensor, Layout)> {
    let (tensor, layout) = Tensor::read_strided(op, name, object, 2)?;
    if layout.shape != expected.shape {
        let (expected, got) = (&expected.shape, &layout.shape);
        return Err(PyValueError::new_err(format!("{op}: {name} must have shape {expected:?}, got {got:?}")));
    }
    Ok((tensor, layout))
}

fn rows(tensor: &Tensor, layout: &Layout) -> Rows<'static> {
    Rows { span: tensor.as_ref(), stride: layout.strides[0] }
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
pub fn read_file(py: Python<'_>, path: PathBuf, offset: u64, out: Object<'_, '_>) -> PyResult<usize> {
    let out = Tensor::read("read_file", "out", out)?;
    // SAFETY: there is no other tensor.
    let reading = ReadFile::new(unsafe { out.as_mut() }).map_err(to_py_err)?;
    Ok(py.detach(|| reading.run(&path, offset))?)
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

    fn as_absmax(&self) -> Absmax<'static> {
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
