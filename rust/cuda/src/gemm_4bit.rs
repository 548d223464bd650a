use std::ffi::c_void;

use cudarc::driver::sys::{CUtensorMap, CUtensorMapDataType};
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, Gemv4bitGroup, MAX_GROUP};
use halfbyte_core::ops::gemv_4bit_fused::Gemv4bitFused;
use halfbyte_core::{Absmax, DType, Result};

use crate::args::{DeviceAbsmax, KernelArg, args};
use crate::gemv_4bit;
use crate::gemv_4bit_bulk::{self, Codebook, codebook};
use crate::launch::{Family, Geometry, Launcher, Limits, Matrix, extent, family};
use crate::low_rank::{self, Beside, Hidden, Share};

/// Tiles in bf16, then those in fp16.
const KERNELS: [&str; 16] = [
    "gemm_4bit_32x2_bf16",
    "gemm_4bit_32x3_bf16",
    "gemm_4bit_32x4_bf16",
    "gemm_4bit_64x2_bf16",
    "gemm_4bit_64x3_bf16",
    "gemm_4bit_64x4_bf16",
    "gemm_4bit_128x2_bf16",
    "gemm_4bit_many_128_bf16",
    "gemm_4bit_many_256_bf16",
    "gemm_4bit_32x2_f16",
    "gemm_4bit_32x3_f16",
    "gemm_4bit_32x4_f16",
    "gemm_4bit_64x2_f16",
    "gemm_4bit_64x3_f16",
    "gemm_4bit_64x4_f16",
    "gemm_4bit_128x2_f16",
];
pub(crate) static FAMILY: Family = family!("gemm_4bit", &KERNELS);

/// A tile of out: rows of x by 64 rows of W for each warpgroup that multiplies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    pub tokens: usize,
    pub groups: usize,
    /// bytes, before the kernel aligns them
    pub shared: usize,
    /// us of a line of K, and of start and end; measured on an H200
    line: f64,
    ends: f64,
    /// Scales enter the sums; else they enter the weights, in bf16 alone: there no rounding but that of a weight counts.
    scales_sums: bool,
}

const fn few(tokens: usize, groups: usize, shared: usize, line: f64) -> Tile {
    Tile { tokens, groups, shared, line, ends: 4.4, scales_sums: true }
}

const fn many(tokens: usize, shared: usize, line: f64) -> Tile {
    Tile { tokens, groups: 2, shared, line, ends: 3.5, scales_sums: false }
}

/// Four groups do twice the work of two in 1.7 times their time, three one and a half times the work in 1.3 times.
pub(crate) const TILES: [Tile; 9] = [
    few(32, 2, 171008, 1.24 * 0.78),
    few(32, 3, 182272, 1.65 * 0.78),
    few(32, 4, 173056, 2.09 * 0.78),
    few(64, 2, 220160, 1.24),
    few(64, 3, 215040, 1.65),
    few(64, 4, 205824, 2.09),
    few(128, 2, 220160, 1.82),
    many(128, 220160, 1.85),
    many(256, 201728, 2.75),
];
pub(crate) const LINE: usize = 256;
pub(crate) const MAX_SPLITS: usize = 5;
pub(crate) const MAX_PARTS: usize = MAX_GROUP;
/// Most rows of x with which several weights go together.
const TOGETHER: usize = 64;
/// Swizzled memory begins at a multiple of this.
pub(crate) const ALIGNMENT: usize = 1024;

/// `struct Part` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Part {
    maps: [CUtensorMap; 2],
    absmax: [DeviceAbsmax; 2],
    bias: [*const c_void; 2],
    shares: [Share; 2],
    out: *mut c_void,
    n: i32,
    first_tile: i32,
}

const _: () = assert!(size_of::<Part>() == 384);

#[repr(C)]
#[derive(Clone, Copy)]
struct Parts {
    at: [Part; MAX_PARTS],
    hidden: Hidden,
}

impl KernelArg for CUtensorMap {}
impl KernelArg for Parts {}

/// Which tile, and into how many parts K is cut.
#[derive(Debug, Clone, Copy)]
struct Plan {
    tile: usize,
    splits: usize,
}

impl Plan {
    fn of(launcher: &Launcher, products: &[&Gemv4bit<'_>], adapted: bool) -> Self {
        let ns: Vec<_> = products.iter().map(|product| product.shape.n).collect();
        let head = products[0];
        plan(head.shape.m, &ns, head.shape.k, head.x.dtype(), adapted, launcher.limits().multiprocessors)
    }
}

/// The plan of least time, by waves of CTAs over the device; `ns`: of all weights that go together; `adapted`: whether
/// adapters stand beside them, whose hidden values are made on multiprocessors that are left over.
fn plan(m: usize, ns: &[usize], k: usize, dtype: DType, adapted: bool, multiprocessors: usize) -> Plan {
    let ctas = |tile: &Tile, splits: usize| tiles(ns, tile) * m.div_ceil(tile.tokens) * splits;
    let time = |tile: &Tile, splits: usize| {
        let lines = (k / LINE).div_ceil(splits) as f64;
        let ends = tile.ends + if splits == MAX_SPLITS { 1.0 } else { 0.0 };
        ctas(tile, splits).div_ceil(multiprocessors) as f64 * tile.line * lines + ends
    };
    // Some multiprocessors find no three beside them for a cluster of four, more of them no four for one of five. Beyond
    // 64 rows of x, neither many of those nor tiles of three groups have been measured.
    let has_room = |tile: &Tile, splits: usize| match splits {
        MAX_SPLITS => m <= 64 && !adapted && ctas(tile, splits) <= multiprocessors * 5 / 6,
        4 => ctas(tile, splits) <= if m > 64 { multiprocessors / 2 } else { multiprocessors * 8 / 9 },
        // Of many rows of x a second wave of clusters is slower than one more of whole tiles.
        2 => tile.scales_sums || ctas(tile, splits) <= multiprocessors,
        _ => true,
    };
    // Of x no more than a tile that fits, or some of half its size and less; W would be read again for more of them.
    let suits = |tile: &Tile| {
        let fits =
            if m > 64 { tile.tokens >= 64 && tile.groups != 3 } else { tile.tokens == m.next_power_of_two().max(32) };
        fits && (tile.scales_sums || dtype == DType::BF16)
    };
    let mut best = (f64::INFINITY, Plan { tile: 0, splits: 1 });
    for splits in [1, 2, 4, MAX_SPLITS].into_iter().filter(|&splits| splits <= k / LINE) {
        for (index, tile) in TILES.iter().enumerate().filter(|(_, tile)| suits(tile) && has_room(tile, splits)) {
            if time(tile, splits) < best.0 {
                best = (time(tile, splits), Plan { tile: index, splits });
            }
        }
    }
    best.1
}

/// Of the rows of all weights.
fn tiles(ns: &[usize], tile: &Tile) -> usize {
    ns.iter().map(|n| n.div_ceil(64 * tile.groups)).sum()
}

pub(crate) fn launch(launcher: &Launcher, group: Gemv4bitGroup<'_>) -> Result<()> {
    let limits = launcher.limits();
    let products: Vec<_> = group.into_products().filter(|product| product.shape.m * product.shape.n > 0).collect();
    let takes = |products: &[Gemv4bit<'_>]| {
        gemv_4bit_bulk::fits(limits, products) && products.iter().all(fits_alone) && runs_on(limits)
    };
    let together = takes(&products) && products[0].shape.m <= TOGETHER;
    let launches = if together { vec![products] } else { products.into_iter().map(|product| vec![product]).collect() };
    for products in launches {
        if !takes(&products) {
            products.into_iter().try_for_each(|product| gemv_4bit::launch(launcher, product))?;
            continue;
        }
        let products: Vec<_> = products.iter().collect();
        let plan = Plan::of(launcher, &products, false);
        let beside = vec![Beside::none(); products.len()];
        multiply(launcher, &products, &beside, Hidden::none(), false, plan)?;
    }
    Ok(())
}

/// Kernels are compiled for this compute capability alone.
fn runs_on(limits: Limits) -> bool {
    limits.capability == (9, 0)
}

/// Of what gemv_4bit_bulk takes.
fn fits_alone(product: &Gemv4bit<'_>) -> bool {
    matches!(product.absmax, Absmax::Nested { .. }) && product.shape.k.is_multiple_of(LINE)
}

/// Products with what stands beside them, of few enough rows to go together; whether there is a kernel.
pub(crate) fn launch_fused(launcher: &Launcher, fused: &Gemv4bitFused<'_>) -> Result<bool> {
    let products: Vec<_> = fused.products().map(|product| &product.product).collect();
    let fits = products[0].shape.m <= TOGETHER && products.iter().all(|product| fits_alone(product));
    if !fused.is_tiled() || !runs_on(launcher.limits()) || !fits {
        return Ok(false);
    }
    let hidden = if fused.ranks() > 0 { Hidden::of(fused) } else { Hidden::none() };
    if fused.ranks() > 0 {
        low_rank::launch(launcher, fused, hidden)?;
    }
    let plan = Plan::of(launcher, &products, fused.ranks() > 0);
    multiply(launcher, &products, &Beside::all(fused), hidden, fused.gated, plan)?;
    Ok(true)
}

/// gated: SwiGLU of pairs of a gate and an up projection, of few rows of x.
fn multiply(
    launcher: &Launcher,
    products: &[&Gemv4bit<'_>],
    beside: &[Beside],
    hidden: Hidden,
    gated: bool,
    Plan { tile: index, splits }: Plan,
) -> Result<()> {
    let head = products[0];
    let (m, k, bf16) = (head.shape.m, head.shape.k, head.x.dtype() == DType::BF16);
    let tile = TILES[index];
    let rows = 64 * tile.groups;
    let map = |product: &Gemv4bit<'_>| {
        let (at, columns) = (product.packed.ptr(), k / 2);
        let packed = Matrix { at, dtype: U8, size: 1, rows: product.shape.n, columns, stride: columns };
        launcher.map_boxes(packed, if tile.scales_sums { rows / 2 } else { rows })
    };
    let mut parts = Vec::with_capacity(MAX_PARTS);
    let mut first_tile = 0;
    let of_part = if gated { 2 } else { 1 };
    for (halves, beside) in products.chunks(of_part).zip(beside.chunks(of_part)) {
        let (first, second) = (halves[0], halves[halves.len() - 1]);
        let beside = [beside[0], beside[beside.len() - 1]];
        let map_of_first = map(first)?;
        parts.push(Part {
            maps: [map_of_first, if gated { map(second)? } else { map_of_first }],
            absmax: [DeviceAbsmax::from(first.absmax), DeviceAbsmax::from(second.absmax)],
            bias: beside.map(|beside| beside.bias),
            shares: beside.map(|beside| beside.share),
            out: first.out.ptr(),
            n: first.shape.n as i32,
            first_tile: first_tile as i32,
        });
        first_tile += (first.shape.n * halves.len()).div_ceil(rows);
    }
    let unused = Part { first_tile: i32::MAX, ..parts[0] };
    let parts = Parts { at: std::array::from_fn(|i| parts.get(i).copied().unwrap_or(unused)), hidden };
    let x = Matrix { at: head.x.ptr(), dtype: if bf16 { BF16 } else { F16 }, size: 2, rows: m, columns: k, stride: k };
    let x_map = launcher.map_boxes(x, tile.tokens)?;
    let geometry = Geometry {
        grid: (extent(first_tile * splits), extent(m.div_ceil(tile.tokens)), 1),
        block: (extent(128 * (tile.groups + 1)), 1, 1),
        shared: tile.shared + ALIGNMENT,
        overlaps: true,
    };
    let of_table = if tile.scales_sums { head.x.dtype() } else { DType::F16 };
    let (codebook, gain): (Codebook, f32) = codebook(head.quant_type, of_table);
    launcher.launch_clustered(
        &FAMILY,
        KERNELS[index + if bf16 { 0 } else { TILES.len() }],
        geometry,
        splits,
        args![parts, x_map, m as i32, k as i32, splits as i32, gated, codebook, gain],
    )
}

const U8: CUtensorMapDataType = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8;
pub(crate) const F16: CUtensorMapDataType = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
pub(crate) const BF16: CUtensorMapDataType = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

/// Of a CTA of that kernel.
#[cfg(test)]
pub(crate) fn threads_of(kernel: &str) -> usize {
    let tile = KERNELS.iter().position(|name| *name == kernel).map(|i| TILES[i % TILES.len()]);
    tile.map_or(0, |tile| 128 * (tile.groups + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_is_compiled_with_the_memory_that_the_launcher_asks_for() {
        let source = include_str!("gemm_4bit.cu");
        for (i, Tile { tokens, groups, shared, scales_sums, .. }) in TILES.into_iter().enumerate() {
            let (compiled, name) = if scales_sums {
                (format!("FEW(T, dtype, {tokens}, {groups}, {shared})"), format!("{tokens}x{groups}"))
            } else {
                (format!("MANY({tokens}, {shared})"), format!("many_{tokens}"))
            };
            assert!(source.contains(&format!("GEMM_4BIT_{compiled}")), "{compiled}");
            assert_eq!(KERNELS[i], format!("gemm_4bit_{name}_bf16"));
            if scales_sums {
                assert_eq!(KERNELS[TILES.len() + i], format!("gemm_4bit_{name}_f16"));
            }
        }
    }

    /// The fastest of all tiles and splits, as measured or as two measured ones let expect.
    #[test]
    fn plans_are_those_that_were_fastest() {
        let of_group = |m, ns: &[usize], k| {
            let Plan { tile, splits } = plan(m, ns, k, DType::BF16, false, 132);
            (KERNELS[tile].trim_start_matches("gemm_4bit_").trim_end_matches("_bf16"), splits)
        };
        let chosen = |m, n, k| of_group(m, &[n], k);
        assert_eq!(chosen(64, 8192, 8192), ("64x2", 2));
        assert_eq!(chosen(64, 28672, 8192), ("64x4", 1));
        assert_eq!(chosen(64, 14336, 4096), ("64x4", 2));
        for (m, three) in [(32, "32x3"), (64, "64x3")] {
            assert_eq!(chosen(m, 4096, 4096), (three, 4));
            assert_eq!([11008, 14336].map(|k| chosen(m, 4096, k)), [(three, 5); 2]);
            assert_eq!(plan(m, &[4096], 11008, DType::BF16, true, 132).splits, 4);
            assert_eq!(chosen(m, 5120, 13824), (three, 4));
            assert_eq!(of_group(m, &[4096; 3], 4096), (three, 2));
            assert_eq!(of_group(m, &[11008; 2], 4096), (three, 1));
            assert_eq!(of_group(m, &[40, 1000, 1, 3585], 1024), (three, 4));
        }
        assert_eq!(chosen(32, 28672, 8192), ("32x4", 1));
        assert_eq!(chosen(128, 28672, 8192), ("128x2", 1));
        assert_eq!(chosen(128, 4096, 4096), ("64x2", 2));
        assert_eq!(chosen(128, 8192, 8192), ("many_128", 2));
        assert_eq!(chosen(128, 14336, 4096), ("many_128", 1));
        assert_eq!(chosen(128, 4096, 14336), ("64x2", 2));
        for (n, k, splits) in [(28672, 8192, 1), (8192, 8192, 2), (14336, 4096, 1), (11008, 4096, 1)] {
            assert_eq!(chosen(256, n, k), ("many_256", splits));
        }
        assert_eq!(chosen(256, 4096, 4096), ("many_128", 2));
        assert_eq!(chosen(256, 4096, 14336), ("many_128", 2));
        for (m, n, k) in [(512, 28672, 8192), (1024, 4096, 4096), (1024, 8192, 8192), (1024, 4096, 14336)] {
            assert_eq!(chosen(m, n, k), ("many_256", 1));
        }
    }

    /// A weight that is rounded twice would be less exact than a dequantized one, which bf16 does not show.
    #[test]
    fn scales_enter_the_sums_of_fp16() {
        for m in [9, 64, 65, 128, 256, 777] {
            for (n, k) in [(40, 256), (4096, 4096), (28672, 8192)] {
                assert!(TILES[plan(m, &[n], k, DType::F16, false, 132).tile].scales_sums);
            }
        }
    }

    #[test]
    fn splits_have_lines() {
        for k in [256, 512, 768, 1024] {
            assert!((9..300).all(|m| plan(m, &[128, 40], k, DType::BF16, false, 132).splits <= k / LINE));
        }
    }
}
