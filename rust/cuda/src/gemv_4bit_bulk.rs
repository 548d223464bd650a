use std::ffi::c_void;
use std::ptr;

use halfbyte_core::codebook::{FP4, INT4, NF4};
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, MAX_GROUP};
use halfbyte_core::ops::gemv_4bit_chain::{ChainPhase, ChainedProduct, Gemv4bitChain, MAX_PHASES};
use halfbyte_core::{Absmax, DType, Error, QuantType, Result};

use crate::args::{DeviceAbsmax, KernelArg, aligned, args, optional};
use crate::launch::{Family, Geometry, Launcher, Limits, extent, family};

/// By x's dtype; chains also by that of adapters.
const KERNELS: [&str; 6] = [
    "gemv_4bit_bulk_f16",
    "gemv_4bit_bulk_bf16",
    "gemv_4bit_chain_f16_f16",
    "gemv_4bit_chain_bf16_bf16",
    "gemv_4bit_chain_f16_f32",
    "gemv_4bit_chain_bf16_f32",
];
pub(crate) static FAMILY: Family = family!("gemv_4bit_bulk", &KERNELS);

pub(crate) const MAX_PARTS: usize = MAX_GROUP;
pub(crate) const PANEL: usize = 16;
pub(crate) const TILE: usize = 8;
pub(crate) const SHARED_BYTES: usize = 177504;
const HALF: usize = PANEL / 2;
/// Blocks of a slice: four for each of the warps that multiply.
const SLICE: usize = 64;
const QUAD: usize = 4;
/// Sixteen multiply, one copies, one decodes scales, one adds up, one multiplies by adapters.
const ALL_WARPS: usize = 20;
const BLOCKSIZE: usize = 64;
/// Scales are read four blocks at a time.
const GRAIN: usize = 256;
/// Past this a block's index does not fit the kernels' 32 bits.
const MOST_WEIGHTS: usize = 1 << 38;
const MOST_ROWS: usize = 1 << 30;

/// `struct Weight` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Weight {
    packed: *const c_void,
    absmax: DeviceAbsmax,
    bias: *const c_void,
    lora_a: *const c_void,
    lora_b: *const c_void,
    factors: *const c_void,
    scaling: f32,
    rank: i32,
    column: i32,
}

/// `struct Part` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Part {
    halves: [Weight; 2],
    out: *mut c_void,
    n: i32,
    first_panel: i32,
}

/// `struct Phase` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Phase {
    parts: [Part; MAX_PARTS],
    x: *const c_void,
    norm: *const c_void,
    residual: *const c_void,
    hidden: *mut c_void,
    k: i32,
    slice: i32,
    share: i32,
    rest: i32,
    ranks: i32,
    eps: f32,
    gated: bool,
}

/// `struct Chain` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Chain<const PHASES: usize> {
    phases: [Phase; PHASES],
    count: i32,
    rows_x: i32,
    arrived: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Codebook([f32; 16]);

impl<const PHASES: usize> KernelArg for Chain<PHASES> {}
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
    runs_on(limits) && products.iter().all(|product| fits_alone(product) && same(product))
}

/// Chains are compiled for one generation.
pub(crate) fn has_chains(limits: Limits) -> bool {
    limits.capability == (9, 0) && runs_on(limits)
}

pub(crate) fn runs_on(limits: Limits) -> bool {
    limits.capability >= (9, 0) && limits.has_machine_code && SHARED_BYTES <= limits.shared
}

fn map_of(product: &Gemv4bit<'_>) -> *const c_void {
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

impl Weight {
    fn plain(product: &Gemv4bit<'_>) -> Self {
        let none = ptr::null();
        let (packed, absmax) = (product.packed.ptr(), DeviceAbsmax::from(product.absmax));
        Self { packed, absmax, bias: none, lora_a: none, lora_b: none, factors: none, scaling: 0.0, rank: 0, column: 0 }
    }

    fn chained(chained: &ChainedProduct<'_>, column: &mut usize) -> Self {
        let mut weight = Self { bias: optional(chained.bias), ..Self::plain(&chained.product) };
        if let Some(adapter) = &chained.adapter {
            (weight.lora_a, weight.lora_b) = (adapter.a.ptr(), adapter.b.ptr());
            (weight.factors, weight.scaling) = (optional(adapter.factors), adapter.scaling);
            (weight.rank, weight.column) = (adapter.rank as i32, *column as i32);
            *column += adapter.rank;
        }
        weight
    }
}

impl Phase {
    /// Of (the two halves of a panel's rows, the product that says where the result goes).
    fn new(weights: &[([Weight; 2], &Gemv4bit<'_>)], gated: bool, ctas: usize) -> Self {
        let rows = if gated { HALF } else { PANEL };
        let head = weights[0].1;
        let mut panels = 0;
        let parts = std::array::from_fn(|i| {
            let (halves, product) = weights[i.min(weights.len() - 1)];
            let (n, first_panel) = (product.shape.n as i32, panels as i32);
            if i < weights.len() {
                panels += product.shape.n.div_ceil(rows);
            }
            Part { halves, out: product.out.ptr(), n, first_panel }
        });
        let blocks = head.shape.k / BLOCKSIZE;
        Self {
            parts,
            x: head.x.ptr(),
            norm: ptr::null(),
            residual: ptr::null(),
            hidden: ptr::null_mut(),
            k: head.shape.k as i32,
            slice: blocks.div_ceil(blocks.div_ceil(SLICE)).next_multiple_of(QUAD) as i32,
            share: (panels / ctas) as i32,
            rest: (panels % ctas) as i32,
            ranks: 0,
            eps: 0.0,
            gated,
        }
    }

    fn chained(phase: &ChainPhase<'_>, ctas: usize) -> Self {
        let mut column = 0;
        let products: Vec<_> = phase.products().collect();
        let weights: Vec<_> = products
            .chunks(if phase.gated { 2 } else { 1 })
            .map(|pair| {
                let first = Weight::chained(pair[0], &mut column);
                let second = pair.get(1).map_or(first, |second| Weight::chained(second, &mut column));
                ([first, second], &pair[0].product)
            })
            .collect();
        Self {
            norm: optional(phase.norm.map(|(weight, _)| weight)),
            eps: phase.norm.map_or(0.0, |(_, eps)| eps),
            residual: optional(phase.residual),
            hidden: phase.hidden.as_ref().map_or(ptr::null_mut(), |hidden| hidden.ptr()),
            ranks: phase.ranks() as i32,
            ..Self::new(&weights, phase.gated, ctas)
        }
    }
}

/// `products` as `fits` has seen them.
pub(crate) fn launch(launcher: &Launcher, products: &[Gemv4bit<'_>]) -> Result<()> {
    let head = &products[0];
    let panels: usize = products.iter().map(|product| product.shape.n.div_ceil(PANEL)).sum();
    let ctas = panels.min(launcher.limits().multiprocessors);
    let weights: Vec<_> = products.iter().map(|product| ([Weight::plain(product); 2], product)).collect();
    let chain = Chain {
        phases: [Phase::new(&weights, false, ctas)],
        count: 1,
        rows_x: head.shape.m as i32,
        arrived: ptr::null_mut(),
    };
    let (codebook, gain) = codebook(head.quant_type);
    launcher.launch(
        &FAMILY,
        KERNELS[usize::from(head.x.dtype() == DType::BF16)],
        geometry(ctas, head.shape.m),
        args![chain, codebook, gain],
    )
}

pub(crate) fn launch_chain(launcher: &Launcher, args: &Gemv4bitChain<'_>) -> Result<()> {
    let all = || args.phases().flat_map(|phase| phase.products());
    let phases: Vec<_> = args.phases().collect();
    let Some(head) = all().next().map(|first| &first.product) else { return Ok(()) };
    let misfits = |other: &ChainedProduct<'_>| !fits_alone(&other.product) || map_of(&other.product) != map_of(head);
    if let Some(other) = all().find(|&other| misfits(other) || !has_chains(launcher.limits())) {
        let expected = "double quantization with one map, blocks of 64, K a multiple of 256, aligned to 16 bytes, and \
                        a GPU with kernels for chains";
        let got = format!("{:?}", other.product.shape);
        return Err(Error::Argument { op: "gemv_4bit_chain", name: "packed", expected, got });
    }
    let ctas = launcher.limits().multiprocessors;
    let count = phases.len() as i32;
    let phases = std::array::from_fn(|i| Phase::chained(phases[i.min(phases.len() - 1)], ctas));
    let chain = Chain::<MAX_PHASES> { phases, count, rows_x: head.shape.m as i32, arrived: args.arrived.ptr() };
    let of_adapters = all().find_map(|product| product.adapter.as_ref()).map(|adapter| adapter.a.dtype());
    let kernel = 2 + 2 * usize::from(of_adapters == Some(DType::F32)) + usize::from(head.x.dtype() == DType::BF16);
    let (codebook, gain) = codebook(head.quant_type);
    launcher.launch_together(&FAMILY, KERNELS[kernel], geometry(ctas, head.shape.m), args![chain, codebook, gain])
}

fn geometry(ctas: usize, m: usize) -> Geometry {
    Geometry {
        grid: (extent(ctas), extent(m.div_ceil(TILE)), 1),
        block: (extent(32 * ALL_WARPS), 1, 1),
        shared: SHARED_BYTES,
        overlaps: true,
    }
}
