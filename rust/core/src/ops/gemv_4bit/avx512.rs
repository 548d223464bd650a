//! Rows of whole blocks: weights are decoded once for up to eight rows of x.
//!
//! 16 packed bytes are 16 even and 16 odd elements, so x is split the same way before. A block's products are summed
//! unscaled and enter the row's sum by one multiplication with the block's scale.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Weight;

/// Rows of x that share one pass over the weights: two accumulators each, and registers for the decoding.
const GROUP: usize = 8;

/// Sixteen floats that never straddle a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; 16]);

/// x `[M, K]` with each 32 elements rearranged: 16 even ones, then 16 odd ones.
pub(super) struct SplitRows {
    lines: Vec<Line>,
    lines_per_row: usize,
}

impl SplitRows {
    /// `x.len()` is a multiple of `k`, and `k` of 32.
    pub(super) fn new(x: &[f32], k: usize) -> Self {
        let split = |part: &[f32], odd: usize| Line(std::array::from_fn(|i| part[2 * i + odd]));
        let lines = x.chunks_exact(32).flat_map(|part| [split(part, 0), split(part, 1)]).collect();
        Self { lines, lines_per_row: k / 16 }
    }
}

/// Floats of x that are kept in the first-level cache while a tile of rows of W passes by.
const X_TILE: usize = 6144;

/// Rows of W in a tile: their sums of eight rows of x take 8 KiB.
const W_TILE: usize = 16;

/// `sums` `[rows, M]` for the rows of W from `first` on.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn rows_of_blocks(weight: &Weight<'_>, x: &SplitRows, first: usize, sums: &mut [f32]) {
    let m = x.lines.len() / x.lines_per_row;
    for (tile, sums) in sums.chunks_mut(W_TILE * m).enumerate() {
        let first = first + tile * W_TILE;
        for (group, lines) in x.lines.chunks(GROUP * x.lines_per_row).enumerate() {
            let columns = Columns { sums, m, from: group * GROUP };
            match lines.len() / x.lines_per_row {
                1 => tile_of_rows::<1>(weight, lines, first, columns),
                2 => tile_of_rows::<2>(weight, lines, first, columns),
                3 => tile_of_rows::<3>(weight, lines, first, columns),
                4 => tile_of_rows::<4>(weight, lines, first, columns),
                5 => tile_of_rows::<5>(weight, lines, first, columns),
                6 => tile_of_rows::<6>(weight, lines, first, columns),
                7 => tile_of_rows::<7>(weight, lines, first, columns),
                _ => tile_of_rows::<GROUP>(weight, lines, first, columns),
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

/// A tile of rows of W with M rows of x, `lines` `[M, K / 16]`; K is walked in parts, blocks in ascending order.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn tile_of_rows<const M: usize>(weight: &Weight<'_>, lines: &[Line], first: usize, columns: Columns<'_>) {
    let blocks_per_row = weight.k / weight.blocksize;
    let blocks_per_part = (X_TILE / M / weight.blocksize).max(1);
    let rows = columns.sums.len() / columns.m;
    let mut totals = [[_mm512_setzero_ps(); M]; W_TILE];
    for block in (0..blocks_per_row).step_by(blocks_per_part) {
        let end = blocks_per_row.min(block + blocks_per_part);
        for (i, total) in totals[..rows].iter_mut().enumerate() {
            add_blocks(weight, lines, first + i, block..end, total);
        }
    }
    for (sums, total) in columns.sums.chunks_exact_mut(columns.m).zip(&totals) {
        for m in 0..M {
            sums[columns.from + m] = _mm512_reduce_add_ps(total[m]);
        }
    }
}

/// Adds some blocks of one row of W, times M rows of x, to the row's sums.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn add_blocks<const M: usize>(
    weight: &Weight<'_>,
    lines: &[Line],
    row: usize,
    blocks: Range<usize>,
    total: &mut [__m512; M],
) {
    let (k, blocksize) = (weight.k, weight.blocksize);
    let x: [&[Line]; M] = std::array::from_fn(|m| &lines[m * (k / 16)..(m + 1) * (k / 16)]);
    // SAFETY: the table has 16 entries.
    let table = unsafe { _mm512_loadu_ps(weight.table.as_ptr()) };
    for block in blocks {
        let start = row * k + block * blocksize;
        let packed = &weight.packed[start / 2..(start + blocksize) / 2];
        let mut partial = [_mm512_setzero_ps(); M];
        for (i, bytes) in packed.chunks_exact(16).enumerate() {
            // SAFETY: the chunk has 16 bytes.
            let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
            let odd = _mm512_permutexvar_ps(bytes, table);
            let even = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            let line = block * (blocksize / 16) + 2 * i;
            for m in 0..M {
                // SAFETY: a row of x has K / 16 lines, two for each 16 bytes of a row of W.
                let (x_even, x_odd) = unsafe { (x[m].get_unchecked(line), x[m].get_unchecked(line + 1)) };
                partial[m] = _mm512_fmadd_ps(even, load(x_even), partial[m]);
                partial[m] = _mm512_fmadd_ps(odd, load(x_odd), partial[m]);
            }
        }
        let scale = _mm512_set1_ps(weight.scales.get(start / blocksize));
        for m in 0..M {
            total[m] = _mm512_fmadd_ps(partial[m], scale, total[m]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load(line: &Line) -> __m512 {
    // SAFETY: a line is 16 floats, aligned to 64 bytes.
    unsafe { _mm512_load_ps(line.0.as_ptr()) }
}
