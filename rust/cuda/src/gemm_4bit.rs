use cudarc::driver::sys::{CUtensorMap, CUtensorMapDataType};
use halfbyte_core::ops::gemm_4bit::Gemm4bit;
use halfbyte_core::{DType, Result};

use crate::args::{DeviceAbsmax, KernelArg, aligned_mut, args};
use crate::gemv_4bit;
use crate::gemv_4bit_bulk::{Codebook, codebook, fits_alone};
use crate::launch::{Family, Geometry, Launcher, Limits, Matrix, extent, family};

/// Tiles, first in fp16, then in bf16.
const KERNELS: [&str; 15] = [
    "gemm_4bit_16x2_f16",
    "gemm_4bit_16x4_f16",
    "gemm_4bit_32x2_f16",
    "gemm_4bit_32x4_f16",
    "gemm_4bit_64x2_f16",
    "gemm_4bit_64x4_f16",
    "gemm_4bit_128x2_f16",
    "gemm_4bit_16x2_bf16",
    "gemm_4bit_16x4_bf16",
    "gemm_4bit_32x2_bf16",
    "gemm_4bit_32x4_bf16",
    "gemm_4bit_64x2_bf16",
    "gemm_4bit_64x4_bf16",
    "gemm_4bit_128x2_bf16",
    "gemm_4bit_permute",
];
pub(crate) static FAMILY: Family = family!("gemm_4bit", &KERNELS);

/// A tile of out: rows of x by 64 rows of W for each warpgroup that multiplies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    pub tokens: usize,
    pub groups: usize,
    /// bytes, before the kernel aligns them
    pub shared: usize,
    /// time of a slice of K, that of 64 rows of x and two groups being 2; measured on an H200
    cost: f64,
}

const fn tile(tokens: usize, groups: usize, shared: usize, cost: f64) -> Tile {
    Tile { tokens, groups, shared, cost }
}

/// Four groups do the work of two in 1.7 times their time.
pub(crate) const TILES: [Tile; 7] = [
    tile(16, 2, 146432, 2.0 * 0.68),
    tile(16, 4, 156672, 3.4 * 0.68),
    tile(32, 2, 171008, 2.0 * 0.78),
    tile(32, 4, 173056, 3.4 * 0.78),
    tile(64, 2, 220160, 2.0),
    tile(64, 4, 205824, 3.4),
    tile(128, 2, 220160, 2.0 * 1.58),
];
pub(crate) const LINE: usize = 256;
pub(crate) const MAX_SPLITS: usize = 4;
/// Swizzled memory begins at a multiple of this.
const ALIGNMENT: usize = 1024;
const PERMUTE_THREADS: usize = 256;

impl KernelArg for CUtensorMap {}

/// Which tile, and into how many parts K is cut.
#[derive(Debug, Clone, Copy)]
struct Plan {
    tile: usize,
    splits: usize,
}

/// The plan of least time, by waves of CTAs over the device.
fn plan(m: usize, n: usize, k: usize, multiprocessors: usize) -> Plan {
    let ctas = |tile: &Tile, splits: usize| n.div_ceil(64 * tile.groups) * m.div_ceil(tile.tokens) * splits;
    let time =
        |tile: &Tile, splits: usize| ctas(tile, splits).div_ceil(multiprocessors) as f64 * tile.cost / splits as f64;
    // Large clusters find room for themselves only where half of the device is free.
    let has_room = |tile: &Tile, splits: usize| splits < 4 || ctas(tile, splits) <= multiprocessors / 2;
    // Of x no more than a tile that fits, or two of half its size; W would be read again for more of them.
    let suits = |tile: &Tile| if m > 64 { tile.tokens >= 64 } else { tile.tokens == m.next_power_of_two().max(16) };
    let mut best = (f64::INFINITY, Plan { tile: 0, splits: 1 });
    for splits in [1, 2, MAX_SPLITS].into_iter().filter(|&splits| splits <= k / LINE) {
        for (index, tile) in TILES.iter().enumerate().filter(|(_, tile)| suits(tile) && has_room(tile, splits)) {
            if time(tile, splits) < best.0 {
                best = (time(tile, splits), Plan { tile: index, splits });
            }
        }
    }
    best.1
}

fn fits(limits: Limits, args: &Gemm4bit<'_>) -> bool {
    // The kernels exist for compute capability 9.0 alone.
    limits.capability == (9, 0)
        && limits.has_machine_code
        && fits_alone(&args.product)
        && aligned_mut(&args.workspace, 16)
}

pub(crate) fn launch(launcher: &Launcher, args: Gemm4bit<'_>) -> Result<()> {
    let shape = args.product.shape;
    if shape.m * shape.n == 0 || !fits(launcher.limits(), &args) {
        return gemv_4bit::launch(launcher, args.product);
    }
    permute(launcher, &args)?;
    multiply(launcher, &args)
}

fn permute(launcher: &Launcher, args: &Gemm4bit<'_>) -> Result<()> {
    let chunks = args.product.shape.m * args.product.shape.k / 8;
    let geometry = Geometry {
        grid: (extent(chunks.div_ceil(PERMUTE_THREADS)), 1, 1),
        block: (extent(PERMUTE_THREADS), 1, 1),
        shared: 0,
        overlaps: true,
        together: false,
    };
    launcher.launch(
        &FAMILY,
        "gemm_4bit_permute",
        geometry,
        args![args.product.x.ptr(), args.workspace.ptr(), chunks as i64],
    )
}

fn multiply(launcher: &Launcher, args: &Gemm4bit<'_>) -> Result<()> {
    let (m, n, k) = (args.product.shape.m, args.product.shape.n, args.product.shape.k);
    let bf16 = args.product.x.dtype() == DType::BF16;
    let Plan { tile: index, splits } = plan(m, n, k, launcher.limits().multiprocessors);
    let tile = TILES[index];
    let weight = Matrix { at: args.product.packed.ptr(), dtype: U8, size: 1, rows: n, columns: k / 2 };
    let x = Matrix { at: args.workspace.ptr(), dtype: if bf16 { BF16 } else { F16 }, size: 2, rows: m, columns: k };
    let weight_map = launcher.map_boxes(weight, 64 * tile.groups)?;
    let x_map = launcher.map_boxes(x, tile.tokens)?;
    let geometry = Geometry {
        grid: (extent(n.div_ceil(64 * tile.groups) * splits), extent(m.div_ceil(tile.tokens)), 1),
        block: (extent(128 * (tile.groups + 1)), 1, 1),
        shared: tile.shared + ALIGNMENT,
        overlaps: true,
        together: false,
    };
    let (codebook, gain): (Codebook, f32) = codebook(args.product.quant_type);
    launcher.launch_clustered(
        &FAMILY,
        KERNELS[index + if bf16 { TILES.len() } else { 0 }],
        geometry,
        splits,
        args![
            weight_map,
            x_map,
            DeviceAbsmax::from(args.product.absmax),
            args.product.out.ptr(),
            m as i32,
            n as i32,
            k as i32,
            splits as i32,
            codebook,
            gain,
        ],
    )
}

const U8: CUtensorMapDataType = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8;
const F16: CUtensorMapDataType = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
const BF16: CUtensorMapDataType = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_is_compiled_with_the_memory_that_the_launcher_asks_for() {
        let source = include_str!("gemm_4bit.cu");
        for (i, Tile { tokens, groups, shared, .. }) in TILES.into_iter().enumerate() {
            assert!(
                source.contains(&format!("GEMM_4BIT(T, dtype, {tokens}, {groups}, {shared})")),
                "{tokens}x{groups}"
            );
            assert_eq!(KERNELS[i], format!("gemm_4bit_{tokens}x{groups}_f16"));
            assert_eq!(KERNELS[TILES.len() + i], format!("gemm_4bit_{tokens}x{groups}_bf16"));
        }
    }

    /// The fastest of all tiles and splits, as measured.
    #[test]
    fn plans_are_those_that_were_fastest() {
        let chosen = |m, n, k| {
            let Plan { tile, splits } = plan(m, n, k, 132);
            (TILES[tile].tokens, TILES[tile].groups, splits)
        };
        assert_eq!(chosen(64, 8192, 8192), (64, 2, 2));
        assert_eq!(chosen(64, 28672, 8192), (64, 4, 1));
        assert_eq!(chosen(64, 14336, 4096), (64, 4, 2));
        assert_eq!(chosen(64, 4096, 14336), (64, 4, 4));
        assert_eq!(chosen(16, 28672, 8192), (16, 4, 1));
        assert_eq!(chosen(128, 28672, 8192), (128, 2, 1));
        assert_eq!(chosen(128, 4096, 4096), (64, 2, 2));
    }

    #[test]
    fn splits_have_lines() {
        for k in [256, 512, 768, 1024] {
            assert!((9..300).all(|m| plan(m, 128, k, 132).splits <= k / LINE));
        }
    }
}
