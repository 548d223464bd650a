use std::ptr;

use halfbyte_core::codebook::{FP4, INT4, NF4};
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, MAX_GROUP};
use halfbyte_core::{Absmax, DType, QuantType, Result};

use crate::args::{DeviceAbsmax, KernelArg, aligned, args};
use crate::launch::{Family, Geometry, Launcher, Limits, extent, family};

const KERNELS: [&str; 2] = ["gemv_4bit_bulk_f16", "gemv_4bit_bulk_bf16"];
pub(crate) static FAMILY: Family = family!("gemv_4bit_bulk", &KERNELS);

pub(crate) const MAX_PARTS: usize = MAX_GROUP;
pub(crate) const PANEL: usize = 16;
pub(crate) const TILE: usize = 8;
pub(crate) const SHARED_BYTES: usize = 169536;
/// Sixteen multiply, one copies, two decode scales, one adds up.
const ALL_WARPS: usize = 20;
const BLOCKSIZE: usize = 64;
/// Scales are read four blocks at a time.
const GRAIN: usize = 256;
/// Past this a block's index does not fit the kernels' 32 bits.
const MOST_WEIGHTS: usize = 1 << 38;
const MOST_ROWS: usize = 1 << 30;

/// `struct Part` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Part {
    packed: *const std::ffi::c_void,
    absmax: DeviceAbsmax,
    out: *mut std::ffi::c_void,
    n: i32,
    first_panel: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Parts([Part; MAX_PARTS]);

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Codebook([f32; 16]);

impl KernelArg for Parts {}
impl KernelArg for Codebook {}

/// What the kernels take as one launch: products of one x, of one codebook and one map of scales.
pub(crate) fn fits(limits: Limits, products: &[Gemv4bit<'_>]) -> bool {
    let Some(head) = products.first() else { return false };
    let same = |other: &Gemv4bit<'_>| {
        other.x.ptr() == head.x.ptr()
            && (other.shape.m, other.shape.k) == (head.shape.m, head.shape.k)
            && other.quant_type == head.quant_type
            && map_of(other) == map_of(head)
    };
    limits.capability >= (9, 0)
        && limits.has_machine_code
        && SHARED_BYTES <= limits.shared
        && products.iter().all(|product| fits_alone(product) && same(product))
}

fn map_of(product: &Gemv4bit<'_>) -> *const std::ffi::c_void {
    match product.absmax {
        Absmax::Nested { map, .. } => map.ptr(),
        Absmax::Plain { .. } => ptr::null(),
    }
}

/// What the kernels of sm_90 and later take of one product.
pub(crate) fn fits_alone(args: &Gemv4bit<'_>) -> bool {
    let (m, n, k) = (args.shape.m, args.shape.n, args.shape.k);
    let scales = matches!(args.absmax, Absmax::Nested { codes, .. } if aligned(codes, 4));
    let known = args.x.dtype() != DType::F32 && args.blocksize == BLOCKSIZE && k > 0 && k % GRAIN == 0;
    let small = n * k < MOST_WEIGHTS && n < MOST_ROWS && m.div_ceil(TILE) <= 65535;
    known && small && scales && aligned(args.x, 16) && aligned(args.packed, 16)
}

/// The codebook, and the factor that makes rounding it to 16 bits cost least: fp4's and int4's values are then whole
/// numbers, and nf4's rms error falls from 1.4e-3 to 0.9e-3.
pub(crate) fn codebook(quant_type: QuantType) -> (Codebook, f32) {
    match quant_type {
        QuantType::Nf4 => (Codebook(NF4), 1.43675),
        QuantType::Fp4 => (Codebook(FP4), 12.0),
        QuantType::Int4 => (Codebook(INT4), 7.0),
    }
}

/// `products` as `fits` has seen them.
pub(crate) fn launch(launcher: &Launcher, products: &[Gemv4bit<'_>]) -> Result<()> {
    let head = &products[0];
    let (m, k) = (head.shape.m, head.shape.k);
    let mut panels = 0;
    let parts = std::array::from_fn(|i| {
        let product = &products[i.min(products.len() - 1)];
        let part = Part {
            packed: product.packed.ptr(),
            absmax: DeviceAbsmax::from(product.absmax),
            out: product.out.ptr(),
            n: product.shape.n as i32,
            first_panel: panels as i32,
        };
        if i < products.len() {
            panels += product.shape.n.div_ceil(PANEL);
        }
        part
    });
    let geometry = Geometry {
        grid: (extent(panels.min(launcher.limits().multiprocessors)), extent(m.div_ceil(TILE)), 1),
        block: (extent(32 * ALL_WARPS), 1, 1),
        shared: SHARED_BYTES,
        overlaps: true,
    };
    let (codebook, gain) = codebook(head.quant_type);
    launcher.launch(
        &FAMILY,
        KERNELS[usize::from(head.x.dtype() == DType::BF16)],
        geometry,
        args![head.x.ptr(), Parts(parts), m as i32, panels as i32, k as i32, codebook, gain],
    )
}
