use cudarc::driver::sys::CUtensorMap;
use halfbyte_core::ops::lora_product::{LoraProduct, LoraShape};
use halfbyte_core::{DType, Error, Result};

use crate::args::{KernelArg, args};
use crate::gemm_4bit::{ALIGNMENT, BF16, F16};
use crate::launch::{Family, Geometry, Launcher, Limits, Matrix, extent, family};

/// In bf16, then in fp16.
const KERNELS: [&str; 4] =
    ["lora_product_bf16", "lora_product_transposed_bf16", "lora_product_f16", "lora_product_transposed_f16"];
pub(crate) static FAMILY: Family = family!("lora_product", &KERNELS);

/// A tile of out.
pub(crate) const ROWS: usize = 128;
pub(crate) const COLUMNS: usize = 256;
pub(crate) const THREADS: usize = 384;
/// Elements of the contraction that are copied at once.
pub(crate) const STEP: usize = 64;
/// Bytes, before the kernel aligns them.
pub(crate) const SHARED: usize = 230400;

/// `struct Product` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Product {
    x: CUtensorMap,
    w: CUtensorMap,
    hidden: CUtensorMap,
    b: CUtensorMap,
    out: CUtensorMap,
    tile_rows: i32,
    tile_columns: i32,
    whole: i32,
    units: i32,
    steps_x: i32,
    steps: i32,
}

const _: () = assert!(size_of::<Product>() == 768);

impl KernelArg for Product {}

/// Kernels are compiled for this compute capability alone.
pub(crate) fn runs_on(limits: Limits) -> bool {
    limits.capability == (9, 0) && limits.has_machine_code && SHARED + ALIGNMENT <= limits.shared
}

/// Tiles that are not cut in two, and how many they are with the halves of the others: of the last wave, if its halves
/// still have a multiprocessor each.
fn units(tiles: usize, multiprocessors: usize) -> (usize, usize) {
    let last = tiles % multiprocessors;
    let cut = if 2 * last <= multiprocessors { last } else { 0 };
    (tiles - cut, tiles + cut)
}

pub(crate) fn launch(launcher: &Launcher, args: LoraProduct<'_>) -> Result<()> {
    let LoraShape { m, n, k, r } = args.shape;
    if !runs_on(launcher.limits()) {
        let (expected, got) = ("on a GPU of compute capability 9.0", args.x.device().to_string());
        return Err(Error::Argument { op: "lora_product", name: "x", expected, got });
    }
    if m * n == 0 {
        return Ok(());
    }
    let bf16 = args.x.dtype() == DType::BF16;
    let map = |at, [rows, columns]: [usize; 2], stride, rows_of_box| {
        let dtype = if bf16 { BF16 } else { F16 };
        launcher.map_boxes(Matrix { at, dtype, size: 2, rows, columns, stride }, rows_of_box)
    };
    let of_weight = |at, depth| {
        if args.transposed { map(at, [depth, n], n, STEP) } else { map(at, [n, depth], depth, COLUMNS / 2) }
    };
    let tiles = [m.div_ceil(ROWS), n.div_ceil(COLUMNS)];
    let (whole, units) = units(tiles[0] * tiles[1], launcher.limits().multiprocessors);
    let product = Product {
        x: map(args.x.ptr(), [m, k], k, ROWS)?,
        w: of_weight(args.w.ptr(), k)?,
        hidden: map(args.hidden.span.ptr(), [m, r], args.hidden.stride, ROWS)?,
        b: of_weight(args.b.ptr(), r)?,
        out: map(args.out.ptr().cast_const(), [m, n], n, ROWS / 2)?,
        tile_rows: tiles[0] as i32,
        tile_columns: tiles[1] as i32,
        whole: whole as i32,
        units: units as i32,
        steps_x: k.div_ceil(STEP) as i32,
        steps: (k.div_ceil(STEP) + r.div_ceil(STEP)) as i32,
    };
    let geometry = Geometry {
        grid: (extent(units.min(launcher.limits().multiprocessors)), 1, 1),
        block: (THREADS as u32, 1, 1),
        shared: SHARED + ALIGNMENT,
        overlaps: true,
    };
    let kernel = KERNELS[usize::from(args.transposed) + if bf16 { 0 } else { 2 }];
    launcher.launch(&FAMILY, kernel, geometry, args![product])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_last_wave_of_few_tiles_is_cut() {
        assert_eq!(units(448, 132), (396, 500));
        assert_eq!(units(66, 132), (0, 132));
        assert_eq!(units(67, 132), (67, 67));
        assert_eq!(units(264, 132), (264, 264));
    }

    #[test]
    fn the_kernel_has_the_memory_that_it_is_compiled_for() {
        assert!(include_str!("lora_product.cu").contains(&format!("sizeof(Shared) == {SHARED}")));
    }
}
