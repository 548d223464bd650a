use std::ffi::c_void;
use std::ptr;

use halfbyte_core::codebook::{FP4, INT4, NF4};
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, GemvShape, MAX_GROUP};
use halfbyte_core::ops::gemv_4bit_fused::{self, Adapter, CHUNK, Gemv4bitFused, Next, NextWeight, SQUARES};
use halfbyte_core::{Absmax, DType, Error, QuantType, Result, TensorMut};

use crate::args::{KernelArg, aligned, args, optional};
use crate::gemm_4bit;
use crate::launch::{Family, Geometry, Launcher, Limits, extent, family};

/// The products in each form, and the adapters' hidden values; by x's dtype.
const KERNELS: [&str; 18] = [
    "gemv_4bit_bulk_8_f16",
    "gemv_4bit_bulk_8_bf16",
    "gemv_4bit_bulk_16_f16",
    "gemv_4bit_bulk_16_bf16",
    "gemv_4bit_bulk_8_any_f16",
    "gemv_4bit_bulk_8_any_bf16",
    "gemv_4bit_bulk_16_any_f16",
    "gemv_4bit_bulk_16_any_bf16",
    "gemv_4bit_bulk_8_short_any_f16",
    "gemv_4bit_bulk_8_short_any_bf16",
    "gemv_4bit_bulk_16_short_any_f16",
    "gemv_4bit_bulk_16_short_any_bf16",
    "gemv_4bit_bulk_8_adapted_f16",
    "gemv_4bit_bulk_8_adapted_bf16",
    "gemv_4bit_bulk_8_adapted_any_f16",
    "gemv_4bit_bulk_8_adapted_any_bf16",
    "gemv_4bit_hidden_f16",
    "gemv_4bit_hidden_bf16",
];
pub(crate) static FAMILY: Family = family!("gemv_4bit_bulk", &KERNELS);

pub(crate) const MAX_PARTS: usize = MAX_GROUP;
pub(crate) const PANEL: usize = 16;
const _: () = assert!(PANEL == SQUARES);
const HALF: usize = PANEL / 2;
/// Blocks of a slice for each of the warps that multiply.
const QUAD: usize = 4;
/// One copies, one decodes scales, one adds up, one multiplies by adapters or adds up, too.
const OTHER_WARPS: usize = 4;
const HIDDEN_THREADS: usize = CHUNK / 16;
/// Of x: hidden values of more of them, and of normed ones, are made from a copy in shared memory.
pub(crate) const FEW_ROWS: usize = 4;
const BLOCKSIZE: usize = 64;
/// Scales are read four at a time.
const GRAIN: usize = BLOCKSIZE * QUAD;
/// What is moved to L2 for the next launch: memory's work while that one begins. Twice as much costs more than it saves
/// on an H200, as it competes with what this launch still reads.
const EARLY_BYTES: usize = 8 << 20;
/// Past this a block's index does not fit the kernels' 32 bits.
const MOST_WEIGHTS: usize = 1 << 38;
const MOST_ROWS: usize = 1 << 30;

/// How a tile of rows of x is multiplied.
#[derive(Debug, PartialEq)]
pub(crate) struct Form {
    pub tile: usize,
    /// panels that are taken side by side, so that all warps work where K is short
    pub side: usize,
    /// whether adapters stand beside the products
    pub adapts: bool,
    /// whether it reads any scales, not those of double quantization four of which lie together
    pub any: bool,
    /// panels of each multiprocessor, at least: of fewer, the last turn is too uneven
    pub panels: usize,
    /// that multiply
    pub warps: usize,
    /// bytes
    pub shared: usize,
}

pub(crate) const FORMS: [Form; 8] = [
    Form { tile: 8, side: 1, adapts: false, any: false, panels: 0, warps: 16, shared: 170768 },
    Form { tile: 16, side: 1, adapts: false, any: false, panels: 0, warps: 8, shared: 180560 },
    Form { tile: 8, side: 1, adapts: false, any: true, panels: 0, warps: 16, shared: 170768 },
    Form { tile: 16, side: 1, adapts: false, any: true, panels: 0, warps: 8, shared: 180560 },
    Form { tile: 8, side: 4, adapts: false, any: true, panels: 4, warps: 16, shared: 170768 },
    Form { tile: 16, side: 2, adapts: false, any: true, panels: 8, warps: 8, shared: 180560 },
    Form { tile: 8, side: 1, adapts: true, any: false, panels: 0, warps: 16, shared: 179168 },
    Form { tile: 8, side: 1, adapts: true, any: true, panels: 0, warps: 16, shared: 179168 },
];

impl Form {
    /// The one that takes all rows of x at once, or the widest; `n` rows of all weights, with plain scales or nested.
    fn of(GemvShape { m, n, k }: GemvShape, adapted: bool, plain: bool, multiprocessors: usize) -> usize {
        let tile = if m <= FORMS[0].tile { FORMS[0].tile } else { FORMS[1].tile };
        let short = |form: &Form| k <= form.slice() / form.side * BLOCKSIZE;
        let suits = |form: &Form| n >= form.panels * multiprocessors * PANEL && (form.side == 1 || short(form));
        let any = plain || !k.is_multiple_of(GRAIN);
        let takes = |form: &Form| form.any == any || form.side > 1;
        let fits = |form: &Form| form.adapts == adapted && form.tile == tile && takes(form) && suits(form);
        FORMS.iter().rposition(fits).unwrap_or(0)
    }

    /// Bytes, with a norm's weight [K] behind the rest.
    pub(crate) fn shared_with_norm(&self, k: usize) -> usize {
        self.shared + k.next_multiple_of(GRAIN) * size_of::<u16>()
    }

    /// Blocks of a slice.
    fn slice(&self) -> usize {
        self.warps * QUAD
    }
}

/// Of each part, of both halves of its panels.
type OfParts<V> = [[V; 2]; MAX_PARTS];

/// `struct Weights` of the kernels.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Weights {
    k: i32,
    slice: i32,
    share: i32,
    rest: i32,
    early: i32,
    gated: bool,
    plain: bool,
    n: [i32; MAX_PARTS],
    first_panel: [i32; MAX_PARTS],
    packed: OfParts<*const c_void>,
    codes: OfParts<*const c_void>,
    nested: OfParts<*const c_void>,
    norm: *const c_void,
}

/// `struct Adapter` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct LowRank {
    a: *const c_void,
    b: *const c_void,
    factors: *const c_void,
    scaling: f32,
    rank: i32,
    column: i32,
}

/// `struct Norm` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Norm {
    weight: *const c_void,
    squares: *const c_void,
    eps: f32,
}

/// `struct Residual` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Residual {
    values: *const c_void,
    squares: *mut c_void,
}

/// `struct Products` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Products {
    weights: Weights,
    offset: OfParts<f32>,
    map: *const c_void,
    x: *const c_void,
    hidden: *mut c_void,
    arrived: *mut c_void,
    rows_x: i32,
    ranks: i32,
    adapters_fp32: bool,
    norm: Norm,
    residual: Residual,
    out: [*mut c_void; MAX_PARTS],
    bias: OfParts<*const c_void>,
    adapters: OfParts<LowRank>,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Codebook([f32; 16]);

impl KernelArg for Products {}
impl KernelArg for Weights {}
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
    limits.capability >= (9, 0) && limits.has_machine_code && FORMS.iter().all(|form| form.shared <= limits.shared)
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
    let scales = match args.absmax {
        Absmax::Nested { codes, .. } => aligned(codes, 4),
        Absmax::Plain { absmax } => aligned(absmax, 16),
    };
    let known = args.x.dtype() != DType::F32 && args.blocksize == BLOCKSIZE && k > 0 && k.is_multiple_of(BLOCKSIZE);
    let small =
        (n * k).is_multiple_of(GRAIN) && n * k < MOST_WEIGHTS && n < MOST_ROWS && m.div_ceil(FORMS[0].tile) <= 65535;
    known && small && scales && aligned(args.x, 16) && aligned(args.packed, 16)
}

/// The codebook, and the factor that makes rounding it to `dtype` cost least: fp4's and int4's values are then whole
/// numbers, and nf4's rms error falls from 1.4e-3 to 0.8e-3 in bf16, from 1.8e-4 to 0.8e-4 in fp16.
pub(crate) fn codebook(quant_type: QuantType, dtype: DType) -> (Codebook, f32) {
    match quant_type {
        QuantType::Nf4 => (Codebook(NF4), if dtype == DType::BF16 { 1.43675 } else { 1.3662 }),
        QuantType::Fp4 => (Codebook(FP4), 12.0),
        QuantType::Int4 => (Codebook(INT4), 7.0),
    }
}

/// One weight as both readers of `Weights` know it.
#[derive(Clone, Copy)]
struct Weight {
    packed: *const c_void,
    codes: *const c_void,
    nested: *const c_void,
    n: usize,
}

impl Weight {
    fn new(product: &Gemv4bit<'_>) -> Self {
        let (codes, nested) = match product.absmax {
            Absmax::Nested { codes, absmax, .. } => (codes.ptr(), absmax.ptr()),
            Absmax::Plain { absmax } => (absmax.ptr(), ptr::null()),
        };
        Self { packed: product.packed.ptr(), codes, nested, n: product.shape.n }
    }
}

impl From<&NextWeight<'_>> for Weight {
    fn from(next: &NextWeight<'_>) -> Self {
        Self { packed: next.packed.ptr(), codes: next.absmax.ptr(), nested: next.nested_absmax.ptr(), n: next.n }
    }
}

impl Weights {
    fn none() -> Self {
        // SAFETY: numbers and pointers, of which zeros are values; of no early items and no norm nothing else is read.
        unsafe { std::mem::zeroed() }
    }

    /// One to four weights, or pairs of them where gated; and the CTAs for them.
    fn new(given: &[Weight], k: usize, gated: bool, form: &Form, multiprocessors: usize) -> (Self, usize) {
        let (rows, parts) = (form.side * if gated { HALF } else { PANEL }, parts(given, gated));
        let (mut weights, blocks, mut panels) = (Self::none(), k / BLOCKSIZE, 0);
        (weights.k, weights.gated, weights.plain) = (k as i32, gated, given[0].nested.is_null());
        weights.slice = blocks.div_ceil(blocks.div_ceil(form.slice())).next_multiple_of(QUAD) as i32;
        for i in 0..MAX_PARTS {
            let halves = parts[i.min(parts.len() - 1)];
            weights.n[i] = halves[0].n as i32;
            weights.first_panel[i] = panels as i32;
            weights.packed[i] = halves.map(|weight| weight.packed);
            weights.codes[i] = halves.map(|weight| weight.codes);
            weights.nested[i] = halves.map(|weight| weight.nested);
            if i < parts.len() {
                panels += halves[0].n.div_ceil(rows);
            }
        }
        let ctas = panels.min(multiprocessors).max(1);
        (weights.share, weights.rest) = ((panels / ctas) as i32, (panels % ctas) as i32);
        (weights, ctas)
    }

    fn next(next: &Next<'_>, form: &Form, multiprocessors: usize) -> Self {
        let given: Vec<_> = next.weights().map(Weight::from).collect();
        let Some(first) = next.weights().next() else { return Self::none() };
        let (mut weights, ctas) = Self::new(&given, first.k, next.gated, &FORMS[0], multiprocessors);
        let item = PANEL * weights.slice as usize * BLOCKSIZE / 2;
        weights.norm = optional(next.norm);
        // A wide tile is computed till its end: what is moved meanwhile costs as much as it saves.
        if form.tile == FORMS[0].tile {
            weights.early = (EARLY_BYTES / (ctas * item)) as i32;
        }
        weights
    }
}

/// What belongs to each weight, for both halves of each part's panels: those of a pair, or one for both.
fn parts<V: Copy>(given: &[V], gated: bool) -> Vec<[V; 2]> {
    given.chunks(if gated { 2 } else { 1 }).map(|part| [part[0], part[part.len() - 1]]).collect()
}

impl LowRank {
    fn none() -> Self {
        let none = ptr::null();
        Self { a: none, b: none, factors: none, scaling: 0.0, rank: 0, column: 0 }
    }

    fn new(adapter: &Adapter<'_>, column: usize) -> Self {
        Self {
            a: adapter.a.ptr(),
            b: adapter.b.ptr(),
            factors: optional(adapter.factors),
            scaling: adapter.scaling,
            rank: adapter.rank as i32,
            column: column as i32,
        }
    }
}

impl Products {
    /// Of one x, without what may stand beside them; and the CTAs for them.
    fn new(given: &[&Gemv4bit<'_>], gated: bool, form: &Form, multiprocessors: usize) -> (Self, usize) {
        let head = given[0];
        let each: Vec<_> = given.iter().map(|product| Weight::new(product)).collect();
        let (weights, ctas) = Weights::new(&each, head.shape.k, gated, form, multiprocessors);
        let offsets: Vec<_> = given.iter().map(|product| offset_of(product)).collect();
        let outs: Vec<_> = given.iter().map(|product| product.out.ptr()).collect();
        let products = Self {
            weights,
            offset: of_parts(&offsets, gated, 0.0),
            map: map_of(head),
            x: head.x.ptr(),
            hidden: ptr::null_mut(),
            arrived: ptr::null_mut(),
            rows_x: head.shape.m as i32,
            ranks: 0,
            adapters_fp32: false,
            norm: Norm { weight: ptr::null(), squares: ptr::null(), eps: 0.0 },
            residual: Residual { values: ptr::null(), squares: ptr::null_mut() },
            out: of_parts(&outs, gated, ptr::null_mut()).map(|halves| halves[0]),
            bias: [[ptr::null(); 2]; MAX_PARTS],
            adapters: [[LowRank::none(); 2]; MAX_PARTS],
        };
        (products, ctas)
    }

    /// With biases, adapters, a norm and a residual.
    fn fused(mut self, fused: &Gemv4bitFused<'_>) -> Self {
        let biases: Vec<_> = fused.products().map(|product| optional(product.bias)).collect();
        let mut column = 0;
        let adapters: Vec<_> = fused
            .products()
            .map(|product| {
                product.adapter.as_ref().map_or(LowRank::none(), |adapter| {
                    column += adapter.rank;
                    LowRank::new(adapter, column - adapter.rank)
                })
            })
            .collect();
        self.bias = of_parts(&biases, fused.gated, ptr::null());
        self.adapters = of_parts(&adapters, fused.gated, LowRank::none());
        self.ranks = column as i32;
        self.adapters_fp32 = fused.adapters().any(|adapter| adapter.a.dtype() == DType::F32);
        if let Some(gemv_4bit_fused::Norm { weight, squares, eps, .. }) = fused.norm {
            self.norm = Norm { weight: weight.ptr(), squares: squares.ptr(), eps };
        }
        if let Some(residual) = &fused.residual {
            self.residual = Residual { values: residual.values.ptr(), squares: residual.squares.ptr() };
        }
        if column > 0 {
            let scratch = |own: &Option<TensorMut<'_>>| own.as_ref().map_or(ptr::null_mut(), |own| own.ptr());
            (self.hidden, self.arrived) = (scratch(&fused.hidden), scratch(&fused.arrived));
        }
        self
    }
}

/// As the kernels take it; `none` where there is no part.
fn of_parts<V: Copy>(given: &[V], gated: bool, none: V) -> OfParts<V> {
    let parts = parts(given, gated);
    std::array::from_fn(|i| parts.get(i).copied().unwrap_or([none; 2]))
}

fn offset_of(product: &Gemv4bit<'_>) -> f32 {
    match product.absmax {
        Absmax::Nested { offset, .. } => offset,
        Absmax::Plain { .. } => 0.0,
    }
}

/// Of all products together.
fn shape_of(given: &[&Gemv4bit<'_>]) -> GemvShape {
    GemvShape { n: given.iter().map(|product| product.shape.n).sum(), ..given[0].shape }
}

/// `products` as `fits` has seen them.
pub(crate) fn launch(launcher: &Launcher, products: &[Gemv4bit<'_>]) -> Result<()> {
    let (limits, head) = (launcher.limits(), &products[0]);
    let given: Vec<_> = products.iter().collect();
    let form = Form::of(shape_of(&given), false, map_of(head).is_null(), limits.multiprocessors);
    let (products, ctas) = Products::new(&given, false, &FORMS[form], limits.multiprocessors);
    launch_products(launcher, head, form, products, ctas, Weights::none())
}

pub(crate) fn launch_fused(launcher: &Launcher, fused: &Gemv4bitFused<'_>) -> Result<()> {
    let given: Vec<_> = fused.products().map(|product| &product.product).collect();
    let head = given[0];
    let misfits = |other: &Gemv4bit<'_>| !fits_alone(other) || map_of(other) != map_of(head);
    if let Some(other) = given.iter().find(|other| misfits(other) || !runs_on(launcher.limits())) {
        let expected = "blocks of 64, K a multiple of 64, N * K one of 256, scales of one map or none, aligned to 16 \
                        bytes, and a GPU of compute capability 9.0 or later";
        let got = format!("{:?}", other.shape);
        return Err(Error::Argument { op: "gemv_4bit_fused", name: "packed", expected, got });
    }
    if head.shape.m * head.shape.n == 0 {
        return Ok(());
    }
    if gemm_4bit::launch_fused(launcher, fused)? {
        return Ok(());
    }
    let (limits, ranks) = (launcher.limits(), fused.ranks());
    if ranks > 0 && fused.is_tiled() {
        let expected =
            "8 rows beside adapters of rank 256; more on capability 9.0, with double quantization and K % 256 == 0";
        let got = head.shape.m.to_string();
        return Err(Error::Argument { op: "gemv_4bit_fused", name: "x", expected, got });
    }
    let form = Form::of(shape_of(&given), ranks > 0, map_of(head).is_null(), limits.multiprocessors);
    let (products, ctas) = Products::new(&given, fused.gated, &FORMS[form], limits.multiprocessors);
    let products = products.fused(fused);
    if ranks > 0 {
        let grid = (extent(ranks), extent(head.shape.k.div_ceil(CHUNK)), 1);
        // A; the norm's weight and x.
        let copied = if head.shape.m > FEW_ROWS || fused.norm.is_some() { 1 + head.shape.m } else { 0 };
        let shared = (1 + copied) * CHUNK * size_of::<u16>();
        let geometry = Geometry { grid, block: (extent(HIDDEN_THREADS), 1, 1), shared, overlaps: true };
        launcher.launch(&FAMILY, KERNELS[2 * FORMS.len() + dtype(head)], geometry, args![products])?;
    }
    let next = Weights::next(&fused.next, &FORMS[form], limits.multiprocessors);
    launch_products(launcher, head, form, products, ctas, next)
}

fn launch_products(
    launcher: &Launcher,
    head: &Gemv4bit<'_>,
    form: usize,
    products: Products,
    ctas: usize,
    ahead: Weights,
) -> Result<()> {
    let (codebook, gain) = codebook(head.quant_type, head.x.dtype());
    let normed = if products.norm.weight.is_null() { 0 } else { head.shape.k };
    let geometry = geometry(ctas, head.shape.m, &FORMS[form], normed);
    launcher.launch(&FAMILY, KERNELS[2 * form + dtype(head)], geometry, args![products, ahead, codebook, gain])
}

/// Of x, among the kernels of a form.
fn dtype(product: &Gemv4bit<'_>) -> usize {
    usize::from(product.x.dtype() == DType::BF16)
}

/// `normed`: K of a norm's weight, or 0.
fn geometry(ctas: usize, m: usize, form: &Form, normed: usize) -> Geometry {
    Geometry {
        grid: (extent(ctas), extent(m.div_ceil(form.tile)), 1),
        block: (extent(32 * (form.warps + OTHER_WARPS)), 1, 1),
        shared: form.shared_with_norm(normed),
        overlaps: true,
    }
}

/// Of a CTA of that kernel.
#[cfg(test)]
pub(crate) fn threads_of(kernel: &str) -> usize {
    let form = FORMS.iter().enumerate().find(|(i, _)| KERNELS[2 * i..2 * i + 2].contains(&kernel));
    form.map_or(HIDDEN_THREADS, |(_, form)| 32 * (form.warps + OTHER_WARPS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_compiled_with_what_the_launcher_asks_for() {
        let source = include_str!("gemv_4bit_bulk.cu");
        for (i, Form { tile, side, adapts, any, warps, shared, .. }) in FORMS.iter().enumerate() {
            let kinds = [("_short", *side > 1), ("_adapted", *adapts), ("_any", *any)];
            let kind: String = kinds.iter().filter(|(_, is)| *is).map(|(kind, _)| *kind).collect();
            let kernels = ["f16", "bf16"].map(|dtype| format!("gemv_4bit_bulk_{tile}{kind}_{dtype}"));
            assert_eq!(KERNELS[2 * i..2 * i + 2], kernels);
            let compiled = format!("GEMV_4BIT_BULK({tile}{kind}, {tile}, {side}, {adapts}, {any}, {warps}, {shared})");
            assert!(source.contains(&compiled), "{compiled}");
        }
    }

    #[test]
    fn panels_go_side_by_side_where_rows_are_short_and_many() {
        let side = |m, n, k| FORMS[Form::of(GemvShape { m, n, k }, false, false, 132)].side;
        assert_eq!([1, 8, 9, 16, 40].map(|m| side(m, 151_936, 896)), [4, 4, 2, 2, 2]);
        assert_eq!([64, 1024, 1088, 8192].map(|k| side(1, 151_936, k)), [4, 4, 1, 1]);
        assert_eq!([64, 1024, 1088, 8192].map(|k| side(9, 151_936, k)), [2, 2, 1, 1]);
        assert_eq!([4864, 8447, 8448].map(|n| side(1, n, 896)), [1, 1, 4]);
        assert_eq!([8448, 16_895, 16_896].map(|n| side(9, n, 896)), [1, 1, 2]);
        let wide = GemvShape { m: 1, n: 151_936, k: 896 };
        assert_eq!(FORMS[Form::of(wide, true, false, 132)], FORMS[7]);
    }

    #[test]
    fn scales_of_their_own_kind_have_forms_of_their_own() {
        let form = |k, adapted, plain| Form::of(GemvShape { m: 1, n: 4096, k }, adapted, plain, 132);
        assert_eq!([4096, 4160].map(|k| [false, true].map(|plain| form(k, false, plain))), [[0, 2], [2, 2]]);
        assert_eq!([4096, 4160].map(|k| [false, true].map(|plain| form(k, true, plain))), [[6, 7], [7, 7]]);
    }

    #[test]
    fn panels_side_by_side_count_as_one() {
        let none = ptr::null();
        let weight = |n| Weight { packed: none, codes: none, nested: none, n };
        let shares = |given: &[Weight], gated, form| {
            let (weights, ctas) = Weights::new(given, 896, gated, &FORMS[form], 132);
            (ctas, weights.share, weights.rest, weights.first_panel[1], weights.slice)
        };
        assert_eq!(shares(&[weight(151_936)], false, 0), (132, 71, 124, 9496, 16));
        assert_eq!(shares(&[weight(151_936)], false, 4), (132, 17, 130, 2374, 16));
        assert_eq!(shares(&[weight(151_936)], false, 5), (132, 35, 128, 4748, 16));
        assert_eq!(shares(&[weight(8452), weight(65)], false, 4), (132, 1, 3, 133, 16));
        assert_eq!(shares(&[weight(4868), weight(4868)], true, 4), (132, 1, 21, 153, 16));
    }
}
