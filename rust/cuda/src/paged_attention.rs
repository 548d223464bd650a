use std::ffi::c_void;
use std::ptr;

use halfbyte_core::ops::paged_attention::{AttentionShape, MAX_PARTS, PagedAttention};
use halfbyte_core::{DType, Result};

use crate::args::{KernelArg, aligned_mut, args, dtype_index};
use crate::launch::{Family, Geometry, Launcher, Limits, extent, family};
use crate::{paged_attention_bulk, paged_attention_mma};

/// By lanes that share a token and heads of a CTA (any: rows on any boundary; codes: those of 8 bits), then by dtype.
const KERNELS: [&str; 30] = [
    "paged_attention_8_1_f32",
    "paged_attention_8_1_f16",
    "paged_attention_8_1_bf16",
    "paged_attention_8_4_f32",
    "paged_attention_8_4_f16",
    "paged_attention_8_4_bf16",
    "paged_attention_8_8_f32",
    "paged_attention_8_8_f16",
    "paged_attention_8_8_bf16",
    "paged_attention_16_1_f32",
    "paged_attention_16_1_f16",
    "paged_attention_16_1_bf16",
    "paged_attention_16_4_f32",
    "paged_attention_16_4_f16",
    "paged_attention_16_4_bf16",
    "paged_attention_16_8_f32",
    "paged_attention_16_8_f16",
    "paged_attention_16_8_bf16",
    "paged_attention_32_1_f32",
    "paged_attention_32_1_f16",
    "paged_attention_32_1_bf16",
    "paged_attention_32_4_f32",
    "paged_attention_32_4_f16",
    "paged_attention_32_4_bf16",
    "paged_attention_any_f32",
    "paged_attention_any_f16",
    "paged_attention_any_bf16",
    "paged_attention_codes_f32",
    "paged_attention_codes_f16",
    "paged_attention_codes_bf16",
];
pub(crate) static FAMILY: Family = family!("paged_attention", &KERNELS);

pub(crate) const WARPS: usize = 8;
/// Elements that a lane loads at a time.
pub(crate) const PER_LANE: usize = 8;

/// `struct Tensors` of paged_attention.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceTensors {
    q: *const c_void,
    k: *const c_void,
    v: *const c_void,
    cos: *const c_void,
    sin: *const c_void,
    tables: *const c_void,
    lengths: *const c_void,
    keys: *mut c_void,
    values: *mut c_void,
    key_scales: *mut c_void,
    value_scales: *mut c_void,
    partials: *mut c_void,
    arrived: *mut c_void,
    out: *mut c_void,
}

impl KernelArg for DeviceTensors {}

impl DeviceTensors {
    pub fn new(PagedAttention { inputs, outputs, .. }: &PagedAttention<'_>) -> Self {
        let scales = outputs.scales.as_ref();
        Self {
            q: inputs.q.ptr(),
            k: inputs.k.ptr(),
            v: inputs.v.ptr(),
            cos: inputs.cos.ptr(),
            sin: inputs.sin.ptr(),
            tables: inputs.tables.ptr(),
            lengths: inputs.lengths.ptr(),
            keys: outputs.keys.ptr(),
            values: outputs.values.ptr(),
            key_scales: scales.map_or(ptr::null_mut(), |scales| scales.keys.ptr()),
            value_scales: scales.map_or(ptr::null_mut(), |scales| scales.values.ptr()),
            partials: outputs.partials.ptr(),
            arrived: outputs.arrived.ptr(),
            out: outputs.out.ptr(),
        }
    }
}

/// `struct Shape` of paged_attention.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceShape {
    heads: i32,
    kv_heads: i32,
    group: i32,
    tiles: i32,
    head_dim: i32,
    blocks: i32,
    table: i32,
    window: i32,
}

impl KernelArg for DeviceShape {}

impl DeviceShape {
    /// `heads`: of a tile.
    pub fn new(args: &PagedAttention<'_>, heads: usize) -> Self {
        let shape = args.shape;
        Self {
            heads: shape.heads as i32,
            kv_heads: shape.kv_heads as i32,
            group: shape.group() as i32,
            tiles: shape.group().div_ceil(heads) as i32,
            head_dim: shape.head_dim as i32,
            blocks: shape.blocks as i32,
            table: shape.table as i32,
            window: i32::try_from(args.window).unwrap_or(0),
        }
    }
}

/// Place among the kernels of a dtype, and heads of a CTA.
fn variant(shape: AttentionShape, codes: bool, vector: bool) -> (usize, usize) {
    if codes || !vector {
        return (8 + usize::from(codes), 1);
    }
    let tile = [1, 4, 8].into_iter().position(|heads| shape.group() <= heads).unwrap_or(2);
    match shape.head_dim.div_ceil(PER_LANE) {
        ..=8 => (tile, [1, 4, 8][tile]),
        9..=16 => (3 + tile, [1, 4, 8][tile]),
        _ => (6 + tile.min(1), [1, 4][tile.min(1)]),
    }
}

/// The kernel for these arguments, and heads of a CTA.
fn kernel(limits: Limits, args: &PagedAttention<'_>) -> (&'static Family, &'static str, usize) {
    let (keys, values, codes) = (&args.outputs.keys, &args.outputs.values, args.outputs.scales.is_some());
    let (dtype, head_dim) = (args.inputs.q.dtype(), args.shape.head_dim);
    let vector = head_dim % PER_LANE == 0 && aligned_mut(keys, 16) && aligned_mut(values, 16);
    let half = [DType::F16, DType::BF16].into_iter().position(|half| half == dtype);
    let size = [64, 128].into_iter().position(|size| size == head_dim);
    if let (true, Some(half), Some(size)) = (vector && limits.capability >= (8, 0), half, size) {
        let kernel = paged_attention_mma::KERNELS[4 * usize::from(codes) + 2 * size + half];
        return (&paged_attention_mma::FAMILY, kernel, paged_attention_mma::HEADS);
    }
    let (index, heads) = variant(args.shape, codes, vector);
    (&FAMILY, KERNELS[3 * index + dtype_index(dtype)], heads)
}

pub(crate) fn launch(launcher: &Launcher, args: PagedAttention<'_>) -> Result<()> {
    let shape = args.shape;
    if shape.batch == 0 {
        return Ok(());
    }
    if let Some(place) = paged_attention_bulk::place(launcher.limits(), &args) {
        return paged_attention_bulk::launch(launcher, &args, place);
    }
    let (family, kernel, heads) = kernel(launcher.limits(), &args);
    let tiles = shape.kv_heads * shape.group().div_ceil(heads);
    // Parts are taken in turns by so many CTAs as the device holds at once; which parts there are depends on the row.
    let ctas = (2 * launcher.limits().multiprocessors / (tiles * shape.batch)).clamp(1, MAX_PARTS);
    launcher.launch(
        family,
        kernel,
        Geometry {
            grid: (extent(ctas), extent(tiles), extent(shape.batch)),
            block: (extent(32 * WARPS), 1, 1),
            shared: 0,
            overlaps: true,
        },
        args![DeviceTensors::new(&args), DeviceShape::new(&args, heads)],
    )
}
