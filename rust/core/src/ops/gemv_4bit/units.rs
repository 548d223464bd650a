//! Rows of whole units of 64 weights: a unit is decoded once for several rows of x.
//!
//! Packed bytes are even and odd elements, so x is split the same way before. A unit lies in one block: its products
//! are summed unscaled and enter the row's sum by one multiplication with the block's scale. Bound by the two vector
//! ports of the processor: 3 instructions of decoding and 2 M multiplications for two registers of weights.

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
    for (tile, sums) in sums.chunks_mut(W_TILE * m).enumerate() {
        let first = first + tile * W_TILE;
        for (group, lines) in x.lines.chunks(V::GROUP * x.lines_per_row).enumerate() {
            let columns = Columns { sums, m, from: group * V::GROUP };
            // SAFETY: as the caller vouches.
            unsafe {
                match lines.len() / x.lines_per_row {
                    1 => tile_of_rows::<V, 1>(weight, table, lines, first, columns),
                    2 => tile_of_rows::<V, 2>(weight, table, lines, first, columns),
                    3 => tile_of_rows::<V, 3>(weight, table, lines, first, columns),
                    4 => tile_of_rows::<V, 4>(weight, table, lines, first, columns),
                    5 => tile_of_rows::<V, 5>(weight, table, lines, first, columns),
                    6 => tile_of_rows::<V, 6>(weight, table, lines, first, columns),
                    7 => tile_of_rows::<V, 7>(weight, table, lines, first, columns),
                    _ => tile_of_rows::<V, 8>(weight, table, lines, first, columns),
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
#[inline(always)]
unsafe fn tile_of_rows<V: Vector, const M: usize>(
    weight: &Weight<'_>,
    table: V::Table,
    lines: &[Line],
    first: usize,
    columns: Columns<'_>,
) {
    let units_per_row = weight.k / UNIT;
    let units_per_part = X_TILE / UNIT / M;
    let rows = columns.sums.len() / columns.m;
    // SAFETY: the caller vouches for V's features, and the parts end at the row's end.
    unsafe {
        let mut totals = [[V::splat(0.0); M]; W_TILE];
        for unit in (0..units_per_row).step_by(units_per_part) {
            let units = unit..units_per_row.min(unit + units_per_part);
            for (i, total) in totals[..rows].iter_mut().enumerate() {
                add_units::<V, M>(weight, table, lines, first + i, units.clone(), total);
            }
        }
        for (sums, total) in columns.sums.chunks_exact_mut(columns.m).zip(&totals) {
            for m in 0..M {
                sums[columns.from + m] = V::sum(total[m]);
            }
        }
    }
}

/// Adds some units of one row of W, times M rows of x, to the row's sums.
#[inline(always)]
unsafe fn add_units<V: Vector, const M: usize>(
    weight: &Weight<'_>,
    table: V::Table,
    lines: &[Line],
    row: usize,
    units: Range<usize>,
    total: &mut [V::Register; M],
) {
    let stride = lines.len() / M * 16;
    let mut x: *const f32 = lines[units.start * (UNIT / 16)..].as_ptr().cast();
    let first = row * (weight.k / UNIT) + units.start;
    let packed = &weight.packed[first * (UNIT / 2)..][..units.len() * (UNIT / 2)];
    let units_of_block = weight.blocksize / UNIT;
    let mut scales = [0.0; X_TILE / UNIT];
    let scales = &mut scales[..units.len()];
    if units_of_block == 1 {
        weight.scales.fill(first, scales);
    } else {
        scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = weight.scales.get((first + i) / units_of_block));
    }
    // SAFETY: the caller vouches for V's features; x walks through M rows of K floats, 64 a unit, in aligned lines.
    unsafe {
        let mut sums = *total;
        for (bytes, &scale) in packed.chunks_exact(UNIT / 2).zip(&*scales) {
            V::prefetch(bytes.as_ptr().wrapping_add(AHEAD));
            let mut partial = [V::splat(0.0); M];
            for step in 0..UNIT / 2 / V::LANES {
                let (even, odd) = V::decode(bytes.as_ptr().add(step * V::LANES), table);
                for (m, partial) in partial.iter_mut().enumerate() {
                    let x = x.add(m * stride + step * 2 * V::LANES);
                    *partial = V::multiply_add(even, V::load(x), *partial);
                    *partial = V::multiply_add(odd, V::load(x.add(V::LANES)), *partial);
                }
            }
            let scale = V::splat(scale);
            for (sum, partial) in sums.iter_mut().zip(partial) {
                *sum = V::multiply_add(partial, scale, *sum);
            }
            x = x.add(UNIT);
        }
        *total = sums;
    }
}
