//! 256-bit registers (AVX2, FMA, F16C): 4-bit tables of two halves, and their stores by float type.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::simd::{Lanes, Vector};

/// Eight fp32 lanes.
pub(crate) struct Avx2;

/// Sixteen 32-bit entries: the lower eight, the upper eight.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    low: __m256i,
    high: __m256i,
}

impl Table {
    #[inline(always)]
    unsafe fn new(table: &[f32; 16]) -> Self {
        // SAFETY: the caller vouches for the features; the table has two halves of eight.
        unsafe {
            let half = table.as_ptr().cast::<__m256i>();
            Self { low: _mm256_loadu_si256(half), high: _mm256_loadu_si256(half.add(1)) }
        }
    }

    /// The entries at the low 4 bits of each lane.
    #[inline(always)]
    unsafe fn look_up(self, index: __m256i) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe {
            let low = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(self.low, index));
            let high = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(self.high, index));
            // A blend reads the sign bit of each lane, where bit 3 of the index is moved.
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
        }
    }
}

// SAFETY: the methods use nothing beyond the features that their callers guarantee.
unsafe impl Vector for Avx2 {
    type Register = __m256;
    type Table = Table;
    const LANES: usize = 8;
    const GROUP: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller vouches for the features and for 8 aligned floats.
        unsafe { _mm256_load_ps(from) }
    }

    #[inline(always)]
    unsafe fn widen<T: Lanes>(from: *const T) -> __m256 {
        // SAFETY: the caller vouches for the features and for 8 elements.
        unsafe { T::load8(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(values: __m256) -> f32 {
        // SAFETY: the caller vouches for the features.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps::<1>(values));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn table(table: &[f32; 16]) -> Table {
        // SAFETY: the caller vouches for the features.
        unsafe { Table::new(table) }
    }

    #[inline(always)]
    unsafe fn decode(packed: *const u8, table: Table) -> (__m256, __m256) {
        // SAFETY: the caller vouches for the features and for 8 bytes.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(packed.cast()));
            (table.look_up(_mm256_srli_epi32::<4>(bytes)), table.look_up(bytes))
        }
    }
}

/// # Safety
/// The methods need AVX2, FMA and F16C.
pub(crate) unsafe trait Lanes256: Sized {
    /// 8 elements widened to fp32.
    unsafe fn load8(from: *const Self) -> __m256;

    /// Stores the elements of `packed` as entries of `table`, which holds 16 results in this type.
    ///
    /// # Safety
    /// `packed` and `to` are multiples of 8 bytes and 16 elements, `to` not longer than two elements a byte.
    unsafe fn look_up(packed: &[u8], to: &mut [Self], table: &[Self; 16]);
}

// SAFETY: the methods use nothing beyond the features that their callers guarantee.
unsafe impl Lanes256 for f32 {
    #[inline(always)]
    unsafe fn load8(from: *const f32) -> __m256 {
        // SAFETY: the caller vouches for the features and for 8 readable elements.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn look_up(packed: &[u8], to: &mut [f32], table: &[f32; 16]) {
        // SAFETY: 8 bytes and 16 elements a step, inside the slices as the caller vouches.
        unsafe {
            let table = Table::new(table);
            for start in (0..to.len()).step_by(16) {
                let (even, odd) = Avx2::decode(packed.as_ptr().add(start / 2), table);
                let (low, high) = (_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
                let to = to.as_mut_ptr().add(start);
                _mm256_storeu_ps(to, _mm256_permute2f128_ps::<0x20>(low, high));
                _mm256_storeu_ps(to.add(8), _mm256_permute2f128_ps::<0x31>(low, high));
            }
        }
    }
}

macro_rules! half_lanes {
    ($type:ty, $widen:expr) => {
        // SAFETY: as for f32.
        unsafe impl Lanes256 for $type {
            #[inline(always)]
            unsafe fn load8(from: *const $type) -> __m256 {
                // SAFETY: the caller vouches for the features and for 8 readable elements.
                unsafe { $widen(_mm_loadu_si128(from.cast())) }
            }

            #[inline(always)]
            unsafe fn look_up(packed: &[u8], to: &mut [$type], table: &[$type; 16]) {
                // An even element is the low half of a lane, an odd one the high half.
                let even = table.map(|value| f32::from_bits(value.to_bits().into()));
                let odd = table.map(|value| f32::from_bits(u32::from(value.to_bits()) << 16));
                // SAFETY: 8 bytes and 16 elements a step, inside the slices as the caller vouches.
                unsafe {
                    let (even, odd) = (Table::new(&even), Table::new(&odd));
                    for start in (0..to.len()).step_by(16) {
                        let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(packed.as_ptr().add(start / 2).cast()));
                        let pair = _mm256_or_ps(even.look_up(_mm256_srli_epi32::<4>(bytes)), odd.look_up(bytes));
                        _mm256_storeu_ps(to.as_mut_ptr().add(start).cast(), pair);
                    }
                }
            }
        }
    };
}

/// bf16 is the upper half of an fp32.
#[inline(always)]
unsafe fn widen_bf16(bits: __m128i) -> __m256 {
    // SAFETY: the caller vouches for the features.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))) }
}

half_lanes!(f16, _mm256_cvtph_ps);
half_lanes!(bf16, widen_bf16);
