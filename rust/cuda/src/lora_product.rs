use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::CUtensorMap;
use halfbyte_core::ops::lora_product::{self, LoraProduct, LoraShape, Narrow};
use halfbyte_core::{DType, Error, Result};

use crate::args::{KernelArg, args};
use crate::gemm_4bit::{ALIGNMENT, BF16, F16};
use crate::launch::{Family, Geometry, Launcher, Limits, Matrix, extent, family};

/// In bf16, then in fp16.
const KERNELS: [&str; 4] =
    ["lora_product_bf16", "lora_product_transposed_bf16", "lora_product_f16", "lora_product_transposed_f16"];
pub(crate) static FAMILY: Family = family!("lora_product", &KERNELS);

/// A tile of out; those of hidden are half as wide.
pub(crate) const ROWS: usize = lora_product::ROWS;
pub(crate) const COLUMNS: usize = 256;
pub(crate) const THREADS: usize = 384;
/// Elements of the contraction that are copied at once.
pub(crate) const STEP: usize = 64;
/// Rows of tiles that go through all of w before the next ones.
pub(crate) const BAND: usize = 16;
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
    a: CUtensorMap,
    made: CUtensorMap,
    tile_rows: i32,
    tile_columns: i32,
    hidden_columns: i32,
    whole: i32,
    units: i32,
    steps_x: i32,
    steps: i32,
    scaling: f32,
    progress: *mut c_void,
}

const _: () = assert!(size_of::<Product>() == 1024);

impl KernelArg for Product {}

/// Kernels are compiled for this compute capability alone.
pub(crate) fn runs_on(limits: Limits) -> bool {
    limits.capability == (9, 0) && limits.has_machine_code && SHARED + ALIGNMENT <= limits.shared
}

/// How many of the last tiles of out are cut in two: those that are left once every multiprocessor has taken as many
/// whole ones as fit the time. That is counted in halves, as a tile of hidden takes as long as one.
fn cut(rows: usize, columns: usize, hidden_columns: usize, multiprocessors: usize) -> usize {
    let (tiles, hidden) = (rows * columns, rows * hidden_columns);
    let (all, some) = (hidden / multiprocessors, hidden % multiprocessors);
    let time = (hidden + 2 * tiles).div_ceil(multiprocessors) - all;
    let whole = (multiprocessors - some) * (time / 2) + some * ((time - 1) / 2);
    // Tiles of hidden, which are never cut, lie in front of the last band's.
    let last_band = rows - (rows - 1) / BAND * BAND;
    let most = if hidden == 0 { tiles } else { last_band * columns };
    tiles.saturating_sub(whole).min(most)
}

pub(crate) fn launch(launcher: &Launcher, args: LoraProduct<'_>) -> Result<()> {
    let LoraShape { m, n, k, r, stride, .. } = args.shape;
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
    let of_weight = |at, columns, depth| {
        if args.transposed {
            map(at, [depth, columns], columns, STEP)
        } else {
            map(at, [columns, depth], depth, COLUMNS / 2)
        }
    };
    let hidden = args.hidden.as_ref().ptr();
    let w = of_weight(args.w.ptr(), n, k)?;
    let out = map(args.out.ptr().cast_const(), [m, n], n, ROWS / 2)?;
    let (s, a, made, scaling, progress) = match &args.narrow {
        Some(Narrow { a, s, scaling, progress }) => {
            let made = map(hidden, [m, *s], stride, ROWS / 2)?;
            (*s, of_weight(a.ptr(), *s, k)?, made, *scaling, progress.ptr())
        }
        // Maps that nobody reads.
        None => (0, w, out, 1.0, ptr::null_mut()),
    };
    let [tile_rows, tile_columns, hidden_columns] = [m.div_ceil(ROWS), n.div_ceil(COLUMNS), (2 * s).div_ceil(COLUMNS)];
    let tiles = tile_rows * (tile_columns + hidden_columns);
    let cut = cut(tile_rows, tile_columns, hidden_columns, launcher.limits().multiprocessors);
    let units = tiles + cut;
    let product = Product {
        x: map(args.x.ptr(), [m, k], k, ROWS)?,
        w,
        hidden: map(hidden, [m, r], stride, ROWS)?,
        b: of_weight(args.b.ptr(), n, r)?,
        out,
        a,
        made,
        tile_rows: tile_rows as i32,
        tile_columns: tile_columns as i32,
        hidden_columns: hidden_columns as i32,
        whole: (tiles - cut) as i32,
        units: units as i32,
        steps_x: k.div_ceil(STEP) as i32,
        steps: (k.div_ceil(STEP) + r.div_ceil(STEP)) as i32,
        scaling,
        progress,
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
        let cut = |tiles| super::cut(1, tiles, 0, 132);
        assert_eq!([448, 66, 67, 264].map(cut), [52, 66, 0, 0]);
        assert_eq!(super::cut(17, 3, 0, 132), 51);
    }

    #[test]
    fn multiprocessors_that_make_hidden_take_halves_at_the_end() {
        assert_eq!(cut(8, 16, 1, 132), 4);
        assert_eq!(cut(128, 16, 1, 132), 64);
        assert_eq!(cut(8, 56, 1, 132), 52);
        assert_eq!(cut(17, 16, 1, 132), 8);
        assert_eq!(cut(17, 3, 1, 132), 3);
    }

    #[test]
    fn the_kernel_has_the_memory_that_it_is_compiled_for() {
        assert!(include_str!("lora_product.cu").contains(&format!("sizeof(Shared) == {SHARED}")));
    }
}
