//! Rows of whole units of 64 weights: a unit is decoded once for several rows of x.
//!
//! Packed bytes are even and odd elements, so x is split the same way before. A unit lies in one block: its products
//! are summed unscaled and enter the row's sum by one multiplication with the block's scale. Bound by the two vector
//! ports of the processor: 4 instructions of decoding and 2 M multiplications for two registers of weights.

use std::array;
use std::ops::Range;

use super::Weight;
use crate::simd::Vector;
use crate::tensor::Float;

/// Weights that are decoded together; block sizes are multiples of it.
pub(super) const UNIT: usize = 64;

/// Floats of x that stay in the first-level cache while a tile of rows of W passes by.
const X_TILE: usize = 6144;

/// Bytes of packed weights between the one that is decoded and the one that is fetched from memory.
const AHEAD: usize = 2048;

/// Rows of W in a tile: their sums of eight rows of x take 8 KiB.
const W_TILE: usize = 16;

/// The scales of a tile's part of K.
type TileScales = [f32; W_TILE * X_TILE / UNIT];

/// Sixteen floats that never straddle a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; 16]);

/// x `[M, K]` in fp32, rearranged in pieces of two registers: the even elements, then the odd ones.
pub(super) struct SplitRows {
    lines: Vec<Line>,
    lines_per_row: usize,
}

impl SplitRows {
    /// `x.len()` is a multiple of `k`, and `k` of the unit; a register has `lanes` floats.
    pub(super) fn new<T: Float>(x: &[T], k: usize, lanes: usize) -> Self {
        let mut lines = vec![Line([0.0; 16]); x.len() / 16];
        let registers = lines.iter_mut().flat_map(|line| line.0.chunks_exact_mut(lanes));
        for (register, to) in registers.enumerate() {
            let (piece, odd) = (register / 2, register % 2);
            let from = &x[piece * 2 * lanes..][..2 * lanes];
            for (to, pair) in to.iter_mut().zip(from.chunks_exact(2)) {
                *to = pair[odd].to_f32();
            }
        }
        Self { lines, lines_per_row: k / 16 }
    }

    fn rows(&self) -> usize {
        self.lines.len() / self.lines_per_row
    }
}

/// `sums` `[rows, M]` for the rows of W from `first` on; K is a multiple of the unit and of the block size.
///
/// # Safety
/// The processor has V's features.
#[inline(always)]
pub(super) unsafe fn accumulate<V: Vector>(weight: &Weight<'_>, x: &SplitRows, first: usize, sums: &mut [f32]) {
    let m = x.rows();
    // SAFETY: as the caller vouches.
    let table = unsafe { V::table(weight.table) };
    let mut scales = [0.0; W_TILE * X_TILE / UNIT];
    for (tile, sums) in sums.chunks_mut(W_TILE * m).enumerate() {
        let first = first + tile * W_TILE;
        for (group, lines) in x.lines.chunks(V::GROUP * x.lines_per_row).enumerate() {
            let columns = Columns { sums, m, from: group * V::GROUP };
            // SAFETY: as the caller vouches.
            unsafe {
                match lines.len() / x.lines_per_row {
                    1 => tile_of_rows::<V, 1, 4>(weight, table, lines, first, columns, &mut scales),
                    2 => tile_of_rows::<V, 2, 2>(weight, table, lines, first, columns, &mut scales),
                    3 => tile_of_rows::<V, 3, 1>(weight, table, lines, first, columns, &mut scales),
                    4 => tile_of_rows::<V, 4, 1>(weight, table, lines, first, columns, &mut scales),
                    5 => tile_of_rows::<V, 5, 1>(weight, table, lines, first, columns, &mut scales),
                    6 => tile_of_rows::<V, 6, 1>(weight, table, lines, first, columns, &mut scales),
                    7 => tile_of_rows::<V, 7, 1>(weight, table, lines, first, columns, &mut scales),
                    _ => tile_of_rows::<V, 8, 1>(weight, table, lines, first, columns, &mut scales),
                }
            }
        }
    }
}

/// The columns of `sums` `[rows, M]` that a group of rows of x fills.
struct Columns<'a> {
    sums: &'a mut [f32],
    m: usize,
    from: usize,
}

/// A tile of rows of W with M rows of x, `lines` `[M, K / 16]`; K is walked in parts, units in ascending order.
///
/// N rows of W go side by side, so that fewer sums wait for the one before; each row's sum is the same for every N.
#[inline(always)]
unsafe fn tile_of_rows<V: Vector, const M: usize, const N: usize>(
    weight: &Weight<'_>,
    table: V::Table,
    lines: &[Line],
    first: usize,
    columns: Columns<'_>,
    scales: &mut TileScales,
) {
    let units_per_row = weight.k / UNIT;
    let units_per_part = X_TILE / UNIT / M;
    let rows = columns.sums.len() / columns.m;
    // SAFETY: the caller vouches for V's features, and the parts end at the row's end.
    unsafe {
        let mut totals = [[V::splat(0.0); M]; W_TILE];
        for unit in (0..units_per_row).step_by(units_per_part) {
            let units = unit..units_per_row.min(unit + units_per_part);
            let scales = &mut scales[..rows * units.len()];
            fill_scales(weight, first, units.clone(), scales);
            let (groups, rest) = totals[..rows].as_chunks_mut::<N>();
            let (of_groups, of_rest) = scales.split_at(groups.len() * N * units.len());
            for (i, (totals, scales)) in groups.iter_mut().zip(of_groups.chunks_exact(N * units.len())).enumerate() {
                add_units::<V, M, N>(weight, table, lines, first + i * N, units.clone(), scales, totals);
            }
            for (i, (total, scales)) in rest.iter_mut().zip(of_rest.chunks_exact(units.len())).enumerate() {
                let row = first + groups.len() * N + i;
                add_units::<V, M, 1>(weight, table, lines, row, units.clone(), scales, array::from_mut(total));
            }
        }
        for (sums, total) in columns.sums.chunks_exact_mut(columns.m).zip(&totals) {
            for m in 0..M {
                sums[columns.from + m] = V::sum(total[m]);
            }
        }
    }
}

/// `scales` `[rows, units]`, those of some units of the rows from `first` on.
#[inline(always)]
fn fill_scales(weight: &Weight<'_>, first: usize, units: Range<usize>, scales: &mut [f32]) {
    let units_per_row = weight.k / UNIT;
    let units_of_block = weight.blocksize / UNIT;
    // Those of whole rows follow each other.
    let run = if units.len() == units_per_row { scales.len() } else { units.len() };
    for (i, scales) in scales.chunks_mut(run).enumerate() {
        let first = (first + i) * units_per_row + units.start;
        if units_of_block == 1 {
            weight.scales.fill(first, scales);
        } else {
            let blocks = (first..).map(|unit| unit / units_of_block);
            scales.iter_mut().zip(blocks).for_each(|(scale, block)| *scale = weight.scales.get(block));
        }
    }
}

/// Adds some units of N rows of W, times M rows of x, to the rows' sums.
#[inline(always)]
unsafe fn add_units<V: Vector, const M: usize, const N: usize>(
    weight: &Weight<'_>,
    table: V::Table,
    lines: &[Line],
    first: usize,
    units: Range<usize>,
    scales: &[f32],
    totals: &mut [[V::Register; M]; N],
) {
    let stride = lines.len() / M * 16;
    let mut x: *const f32 = lines[units.start * (UNIT / 16)..].as_ptr().cast();
    let row_bytes = weight.k / 2;
    let mut packed = weight.packed[first * row_bytes..][..N * row_bytes][units.start * (UNIT / 2)..].as_ptr();
    let mut scale = scales[..N * units.len()].as_ptr();
    // SAFETY: the caller vouches for V's features; x walks through M rows of K floats, 64 a unit, in aligned lines,
    // packed through N rows of K / 2 bytes, and scale through N rows of one a unit.
    unsafe {
        let mut sums = *totals;
        for _ in 0..units.len() {
            for (row, sums) in sums.iter_mut().enumerate() {
                let bytes = packed.add(row * row_bytes);
                V::prefetch(bytes.wrapping_add(AHEAD));
                let mut partial = [V::splat(0.0); M];
                for step in 0..UNIT / 2 / V::LANES {
                    let (even, odd) = V::decode(bytes.add(step * V::LANES), table);
                    for (m, partial) in partial.iter_mut().enumerate() {
                        let x = x.add(m * stride + step * 2 * V::LANES);
                        *partial = V::multiply_add(even, V::load(x), *partial);
                        *partial = V::multiply_add(odd, V::load(x.add(V::LANES)), *partial);
                    }
                }
                let scale = V::splat(*scale.add(row * units.len()));
                for (sum, partial) in sums.iter_mut().zip(partial) {
                    *sum = V::multiply_add(partial, scale, *sum);
                }
            }
            x = x.add(UNIT);
            packed = packed.add(UNIT / 2);
            scale = scale.add(1);
        }
        *totals = sums;
    }
}
