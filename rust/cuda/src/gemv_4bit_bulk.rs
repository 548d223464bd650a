use std::ffi::c_void;
use std::ptr;

use halfbyte_core::codebook::{FP4, INT4, NF4};
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, MAX_GROUP};
use halfbyte_core::ops::gemv_4bit_fused::{CHUNK, FusedProduct, Gemv4bitFused, Next};
use halfbyte_core::{Absmax, DType, Error, QuantType, Result};

use crate::args::{DeviceAbsmax, KernelArg, aligned, args, optional};
use crate::launch::{Family, Geometry, Launcher, Limits, extent, family};

/// The products, and the adapters' hidden values; by x's dtype.
const KERNELS: [&str; 4] =
    ["gemv_4bit_bulk_f16", "gemv_4bit_bulk_bf16", "gemv_4bit_hidden_f16", "gemv_4bit_hidden_bf16"];
pub(crate) static FAMILY: Family = family!("gemv_4bit_bulk", &KERNELS);

pub(crate) const MAX_PARTS: usize = MAX_GROUP;
pub(crate) const PANEL: usize = 16;
pub(crate) const TILE: usize = 8;
pub(crate) const SHARED_BYTES: usize = 179136;
const HALF: usize = PANEL / 2;
/// Blocks of a slice: four for each of the warps that multiply.
const SLICE: usize = 64;
const QUAD: usize = 4;
/// Sixteen multiply, one copies, one decodes scales, one adds up, one multiplies by adapters.
const ALL_WARPS: usize = 20;
const HIDDEN_THREADS: usize = CHUNK / 16;
const BLOCKSIZE: usize = 64;
/// Scales are read four blocks at a time.
const GRAIN: usize = 256;
/// What is moved to L2 for the next launch: memory's work while that one begins. Twice as much costs more than it saves
/// on an H200, as it competes with what this launch still reads.
const EARLY_BYTES: usize = 8 << 20;
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

/// `struct Products` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Products {
    parts: [Part; MAX_PARTS],
    x: *const c_void,
    hidden: *mut c_void,
    k: i32,
    slice: i32,
    share: i32,
    rest: i32,
    rows_x: i32,
    ranks: i32,
    early: i32,
    gated: bool,
    adapters_fp32: bool,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Codebook([f32; 16]);

impl KernelArg for Products {}
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
    fn none() -> Self {
        // SAFETY: numbers and pointers, of which zeros are values.
        unsafe { std::mem::zeroed() }
    }

    fn plain(product: &Gemv4bit<'_>) -> Self {
        Self { packed: product.packed.ptr(), absmax: DeviceAbsmax::from(product.absmax), ..Self::none() }
    }

    fn fused(fused: &FusedProduct<'_>, column: &mut usize) -> Self {
        let mut weight = Self { bias: optional(fused.bias), ..Self::plain(&fused.product) };
        if let Some(adapter) = &fused.adapter {
            (weight.lora_a, weight.lora_b) = (adapter.a.ptr(), adapter.b.ptr());
            (weight.factors, weight.scaling) = (optional(adapter.factors), adapter.scaling);
            (weight.rank, weight.column) = (adapter.rank as i32, *column as i32);
            *column += adapter.rank;
        }
        weight
    }
}

impl Part {
    fn new(halves: [Weight; 2], product: &Gemv4bit<'_>) -> Self {
        Self { halves, out: product.out.ptr(), n: product.shape.n as i32, first_panel: 0 }
    }
}

impl Products {
    /// Of parts that do not know yet where they begin, in panels; and the CTAs for them.
    fn new(given: &[Part], k: usize, gated: bool, multiprocessors: usize) -> (Self, usize) {
        let rows = if gated { HALF } else { PANEL };
        let mut panels = 0;
        let parts = std::array::from_fn(|i| {
            let part = Part { first_panel: panels as i32, ..given[i.min(given.len() - 1)] };
            if i < given.len() {
                panels += (part.n as usize).div_ceil(rows);
            }
            part
        });
        let ctas = panels.min(multiprocessors).max(1);
        let blocks = k / BLOCKSIZE;
        let products = Self {
            parts,
            x: ptr::null(),
            hidden: ptr::null_mut(),
            k: k as i32,
            slice: blocks.div_ceil(blocks.div_ceil(SLICE)).next_multiple_of(QUAD) as i32,
            share: (panels / ctas) as i32,
            rest: (panels % ctas) as i32,
            rows_x: 0,
            ranks: 0,
            early: 0,
            gated,
            adapters_fp32: false,
        };
        (products, ctas)
    }

    fn none() -> Self {
        // SAFETY: numbers and pointers, of which zeros are values; without early items nobody looks at the rest.
        unsafe { std::mem::zeroed() }
    }

    fn next(next: &Next<'_>, multiprocessors: usize) -> Self {
        let weights: Vec<_> = next.weights().collect();
        let Some(first) = weights.first() else { return Self::none() };
        let parts: Vec<_> = weights
            .chunks(if next.gated { 2 } else { 1 })
            .map(|pair| {
                let halves = [pair[0], pair[pair.len() - 1]];
                let halves = halves.map(|weight| Weight {
                    packed: weight.packed.ptr(),
                    absmax: DeviceAbsmax::of_codes(weight.absmax),
                    ..Weight::none()
                });
                Part { halves, out: ptr::null_mut(), n: pair[0].n as i32, first_panel: 0 }
            })
            .collect();
        let (mut products, ctas) = Self::new(&parts, first.k, next.gated, multiprocessors);
        let item = PANEL * products.slice as usize * BLOCKSIZE / 2;
        products.early = (EARLY_BYTES / (ctas * item)) as i32;
        products
    }
}

/// `products` as `fits` has seen them.
pub(crate) fn launch(launcher: &Launcher, products: &[Gemv4bit<'_>]) -> Result<()> {
    let parts: Vec<_> = products.iter().map(|product| Part::new([Weight::plain(product); 2], product)).collect();
    launch_parts(launcher, &products[0], &parts, false, |_| (), &Next::default())
}

pub(crate) fn launch_fused(launcher: &Launcher, fused: &Gemv4bitFused<'_>) -> Result<()> {
    let given: Vec<_> = fused.products().collect();
    let head = &given[0].product;
    let misfits = |other: &Gemv4bit<'_>| !fits_alone(other) || map_of(other) != map_of(head);
    if let Some(other) = given.iter().find(|other| misfits(&other.product) || !runs_on(launcher.limits())) {
        let expected = "double quantization with one map, blocks of 64, K a multiple of 256, aligned to 16 bytes, and \
                        a GPU of compute capability 9.0 or later";
        let got = format!("{:?}", other.product.shape);
        return Err(Error::Argument { op: "gemv_4bit_fused", name: "packed", expected, got });
    }
    if head.shape.m * head.shape.n == 0 {
        return Ok(());
    }
    let mut column = 0;
    let mut parts = Vec::new();
    for pair in given.chunks(if fused.gated { 2 } else { 1 }) {
        let first = Weight::fused(pair[0], &mut column);
        let second = pair.get(1).map_or(first, |second| Weight::fused(second, &mut column));
        parts.push(Part::new([first, second], &pair[0].product));
    }
    let adapt = |products: &mut Products| {
        products.hidden = fused.hidden.as_ref().map_or(ptr::null_mut(), |hidden| hidden.ptr());
        products.ranks = column as i32;
        products.adapters_fp32 = fused.adapters().any(|adapter| adapter.a.dtype() == DType::F32);
    };
    launch_parts(launcher, head, &parts, fused.gated, adapt, &fused.next)
}

fn launch_parts(
    launcher: &Launcher,
    head: &Gemv4bit<'_>,
    parts: &[Part],
    gated: bool,
    adapt: impl FnOnce(&mut Products),
    next: &Next<'_>,
) -> Result<()> {
    let multiprocessors = launcher.limits().multiprocessors;
    let (mut products, ctas) = Products::new(parts, head.shape.k, gated, multiprocessors);
    (products.x, products.rows_x) = (head.x.ptr(), head.shape.m as i32);
    adapt(&mut products);
    let half = usize::from(head.x.dtype() == DType::BF16);
    if products.ranks > 0 {
        let grid = (extent(products.ranks as usize), extent(head.shape.k.div_ceil(CHUNK)), 1);
        let geometry = Geometry { grid, block: (extent(HIDDEN_THREADS), 1, 1), shared: 0, overlaps: true };
        launcher.launch(&FAMILY, KERNELS[2 + half], geometry, args![products])?;
    }
    let ahead = Products::next(next, multiprocessors);
    let (codebook, gain) = codebook(head.quant_type);
    launcher.launch(&FAMILY, KERNELS[half], geometry(ctas, head.shape.m), args![products, ahead, codebook, gain])
}

fn geometry(ctas: usize, m: usize) -> Geometry {
    Geometry {
        grid: (extent(ctas), extent(m.div_ceil(TILE)), 1),
        block: (extent(32 * ALL_WARPS), 1, 1),
        shared: SHARED_BYTES,
        overlaps: true,
    }
}
