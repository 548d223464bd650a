//! Rows of whole units of 64 weights: a unit is decoded once for up to eight rows of x.
//!
//! 16 packed bytes are 16 even and 16 odd elements, so x is split the same way before. A unit lies in one block: its
//! products are summed unscaled and enter the row's sum by one multiplication with the block's scale. Bound by the
//! two vector ports: 3 instructions of decoding and 2 M multiplications for 32 weights.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Weight;
use crate::simd::avx512::Lanes512;

/// Weights that are decoded together; block sizes are multiples of it.
pub(super) const UNIT: usize = 64;

/// Rows of x that share one decoding: two accumulators each, and registers for the weights.
const GROUP: usize = 8;

/// Floats of x that stay in the first-level cache while a tile of rows of W passes by.
const X_TILE: usize = 6144;

/// Rows of W in a tile: their sums of eight rows of x take 8 KiB.
const W_TILE: usize = 16;

/// Sixteen floats that never straddle a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; 16]);

/// x `[M, K]` in fp32 with each 32 elements rearranged: 16 even ones, then 16 odd ones.
pub(super) struct SplitRows {
    lines: Vec<Line>,
    lines_per_row: usize,
}

impl SplitRows {
    /// # Safety
    /// AVX-512 F, BW, DQ, VL; `x.len()` is a multiple of `k`, and `k` of 32.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn new<T: Lanes512>(x: &[T], k: usize) -> Self {
        let mut lines = vec![Line([0.0; 16]); x.len() / 16];
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        for (part, lines) in x.chunks_exact(32).zip(lines.chunks_exact_mut(2)) {
            // SAFETY: a part has 32 elements, a line 16 aligned floats.
            unsafe {
                let (low, high) = (T::load16(part.as_ptr()), T::load16(part.as_ptr().add(16)));
                _mm512_store_ps(lines[0].0.as_mut_ptr(), _mm512_permutex2var_ps(low, even, high));
                _mm512_store_ps(lines[1].0.as_mut_ptr(), _mm512_permutex2var_ps(low, odd, high));
            }
        }
        Self { lines, lines_per_row: k / 16 }
    }
}

/// `sums` `[rows, M]` for the rows of W from `first` on; K is a multiple of the unit and of the block size.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn rows_of_units(weight: &Weight<'_>, x: &SplitRows, first: usize, sums: &mut [f32]) {
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

/// A tile of rows of W with M rows of x, `lines` `[M, K / 16]`; K is walked in parts, units in ascending order.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn tile_of_rows<const M: usize>(weight: &Weight<'_>, lines: &[Line], first: usize, columns: Columns<'_>) {
    let units_per_row = weight.k / UNIT;
    let units_per_part = X_TILE / UNIT / M;
    let rows = columns.sums.len() / columns.m;
    let mut totals = [[_mm512_setzero_ps(); M]; W_TILE];
    for unit in (0..units_per_row).step_by(units_per_part) {
        let units = unit..units_per_row.min(unit + units_per_part);
        for (i, total) in totals[..rows].iter_mut().enumerate() {
            *total = add_units(weight, lines, first + i, units.clone(), *total);
        }
    }
    for (sums, total) in columns.sums.chunks_exact_mut(columns.m).zip(&totals) {
        for m in 0..M {
            sums[columns.from + m] = _mm512_reduce_add_ps(total[m]);
        }
    }
}

/// Adds some units of one row of W, times M rows of x, to the row's sums.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn add_units<const M: usize>(
    weight: &Weight<'_>,
    lines: &[Line],
    row: usize,
    units: Range<usize>,
    mut total: [__m512; M],
) -> [__m512; M] {
    let lines_per_row = lines.len() / M;
    let x = &lines[units.start * (UNIT / 16)..];
    let first = row * (weight.k / UNIT) + units.start;
    let packed = &weight.packed[first * (UNIT / 2)..][..units.len() * (UNIT / 2)];
    let mut scales = [0.0; X_TILE / UNIT];
    let scales = &mut scales[..units.len()];
    weight.scales.fill(first, UNIT, weight.blocksize, scales);
    // SAFETY: the table has 16 entries.
    let table = unsafe { _mm512_loadu_ps(weight.table.as_ptr()) };
    for (unit, (bytes, &scale)) in packed.chunks_exact(UNIT / 2).zip(&*scales).enumerate() {
        // SAFETY: the chunk has 32 bytes.
        let [low, high] = unsafe { [decode(bytes.as_ptr(), table), decode(bytes.as_ptr().add(16), table)] };
        for m in 0..M {
            // SAFETY: row m of `lines` has four lines for each unit of the row, and `unit` is below units.len().
            let line = |i: usize| unsafe { load(x.as_ptr().add(m * lines_per_row + unit * (UNIT / 16) + i)) };
            let partial = _mm512_mul_ps(low.even, line(0));
            let partial = _mm512_fmadd_ps(low.odd, line(1), partial);
            let partial = _mm512_fmadd_ps(high.even, line(2), partial);
            let partial = _mm512_fmadd_ps(high.odd, line(3), partial);
            total[m] = _mm512_fmadd_ps(partial, _mm512_set1_ps(scale), total[m]);
        }
    }
    total
}

/// 32 unscaled weights.
struct Decoded {
    even: __m512,
    odd: __m512,
}

/// # Safety
/// 16 readable bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn decode(packed: *const u8, table: __m512) -> Decoded {
    // SAFETY: the caller vouches for the bytes.
    let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(packed.cast()) });
    // A permutation reads the low 4 bits of each lane only.
    let even = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
    Decoded { even, odd: _mm512_permutexvar_ps(bytes, table) }
}

/// # Safety
/// A readable line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load(line: *const Line) -> __m512 {
    // SAFETY: the caller vouches for the line, which is 16 floats aligned to 64 bytes.
    unsafe { _mm512_load_ps(line.cast()) }
}
