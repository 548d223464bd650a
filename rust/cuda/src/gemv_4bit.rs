use halfbyte_core::Result;
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, Gemv4bitGroup};

use crate::args::{DeviceAbsmax, aligned, args, codebook_row, dtype_index, log2};
use crate::gemv_4bit_bulk;
use crate::gemv_4bit_mma;
use crate::gemv_4bit_shifted;
use crate::launch::{Dim, Family, Geometry, Launcher, extent, family};

/// By variant (1, 2, 4, 8 rows of x at a time; of any layout 1 or 8), then by dtype.
const KERNELS: [&str; 18] = [
    "gemv_4bit_m1_f32",
    "gemv_4bit_m1_f16",
    "gemv_4bit_m1_bf16",
    "gemv_4bit_m2_f32",
    "gemv_4bit_m2_f16",
    "gemv_4bit_m2_bf16",
    "gemv_4bit_m4_f32",
    "gemv_4bit_m4_f16",
    "gemv_4bit_m4_bf16",
    "gemv_4bit_m8_f32",
    "gemv_4bit_m8_f16",
    "gemv_4bit_m8_bf16",
    "gemv_4bit_any_m1_f32",
    "gemv_4bit_any_m1_f16",
    "gemv_4bit_any_m1_bf16",
    "gemv_4bit_any_m8_f32",
    "gemv_4bit_any_m8_f16",
    "gemv_4bit_any_m8_bf16",
];
pub(crate) static FAMILY: Family = family!("gemv_4bit", &KERNELS);

pub(crate) const MAX_WARPS: usize = 4;
pub(crate) const UNIT: usize = 32;
pub(crate) const ANY_WARPS: usize = 8;
/// Rows of W of a CTA that takes any layout.
pub(crate) const ANY_ROWS: usize = 32;
/// Past this a unit's index does not fit the fast kernels' 32 bits.
const MOST_WEIGHTS: usize = 1 << 36;

struct Variant {
    index: usize,
    /// rows of x and rows of W of one CTA
    tile: (usize, usize),
    warps: usize,
}

/// Which of the two sums a row gets, and in what order, depends on K and on alignment, never on M.
fn variant(m: usize, k: usize, vector: bool) -> Variant {
    if !vector {
        let (index, tile) = if m == 1 { (4, 1) } else { (5, 8) };
        return Variant { index, tile: (tile, ANY_ROWS), warps: ANY_WARPS };
    }
    let warps = k.div_ceil(UNIT * 32).clamp(1, MAX_WARPS);
    let (index, tile) = match m {
        1 => (0, (1, 4)),
        2 => (1, (2, 2)),
        3..=4 => (2, (4, 2)),
        _ => (3, (8, 2)),
    };
    Variant { index, tile, warps }
}

/// Tiles of x lie along y, and along z where y has no more room.
fn grid(tiles_x: usize, tiles_w: usize) -> Dim {
    const MOST: usize = 65535;
    (extent(tiles_w), extent(tiles_x.min(MOST)), extent(tiles_x.div_ceil(MOST)))
}

/// In one launch where a kernel takes them so, else one after the other.
pub(crate) fn launch_group(launcher: &Launcher, args: Gemv4bitGroup<'_>) -> Result<()> {
    let products: Vec<_> = args.into_products().filter(|product| product.shape.m * product.shape.n > 0).collect();
    if gemv_4bit_bulk::fits(launcher.limits(), &products) {
        return gemv_4bit_bulk::launch(launcher, &products);
    }
    products.into_iter().try_for_each(|product| launch(launcher, product))
}

pub(crate) fn launch(launcher: &Launcher, args: Gemv4bit<'_>) -> Result<()> {
    let (m, n, k) = (args.shape.m, args.shape.n, args.shape.k);
    if m * n == 0 {
        return Ok(());
    }
    if gemv_4bit_bulk::fits(launcher.limits(), std::slice::from_ref(&args)) {
        return gemv_4bit_bulk::launch(launcher, std::slice::from_ref(&args));
    }
    if let Some(warps) = gemv_4bit_mma::warps(launcher.limits(), &args) {
        return gemv_4bit_mma::launch(launcher, args, warps);
    }
    if let Some(plan) = gemv_4bit_shifted::plan(launcher.limits(), &args) {
        return gemv_4bit_shifted::launch(launcher, args, &plan);
    }
    let vector = k > 0 && k % UNIT == 0 && n * k < MOST_WEIGHTS && aligned(args.x, 16) && aligned(args.packed, 16);
    let Variant { index, tile, warps } = variant(m, k, vector);
    launcher.launch(
        &FAMILY,
        KERNELS[3 * index + dtype_index(args.x.dtype())],
        Geometry {
            grid: grid(m.div_ceil(tile.0), n.div_ceil(tile.1)),
            block: (extent(32 * warps), 1, 1),
            shared: 0,
            overlaps: false,
        },
        args![
            args.x.ptr(),
            args.packed.ptr(),
            DeviceAbsmax::from(args.absmax),
            args.out.ptr(),
            m as i64,
            n as i64,
            k as i64,
            log2(args.blocksize),
            codebook_row(args.quant_type),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_x_and_w_is_covered() {
        for m in [1, 2, 3, 4, 5, 8, 9, 17] {
            for vector in [false, true] {
                let Variant { tile, .. } = variant(m, 4096, vector);
                let (w, y, z) = grid(m.div_ceil(tile.0), 1001usize.div_ceil(tile.1));
                assert!(w as usize * tile.1 >= 1001 && (y * z) as usize * tile.0 >= m);
            }
        }
        let (_, y, z) = grid(70_000, 1);
        assert!(y <= 65535 && y as usize * z as usize >= 70_000);
    }

    #[test]
    fn the_split_of_k_does_not_depend_on_m() {
        for k in [32, 64, 1024, 1056, 4096, 28672] {
            assert!((1..=64).all(|m| variant(m, k, true).warps == variant(1, k, true).warps));
        }
    }
}
