//! 512-bit registers (AVX-512 F, BW, DQ, VL): loads, 4-bit tables, and their stores by float type.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::simd::{Lanes, Vector};

/// Sixteen fp32 lanes.
pub(crate) struct Avx512;

// SAFETY: the methods use nothing beyond the features that their callers guarantee.
unsafe impl Vector for Avx512 {
    type Register = __m512;
    type Table = __m512;
    const LANES: usize = 16;
    const GROUP: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for the features and for 16 aligned floats.
        unsafe { _mm512_load_ps(from) }
    }

    #[inline(always)]
    unsafe fn widen<T: Lanes>(from: *const T) -> __m512 {
        // SAFETY: the caller vouches for the features and for 16 elements.
        unsafe { T::load16(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(values: __m512) -> f32 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_reduce_add_ps(values) }
    }

    #[inline(always)]
    unsafe fn table(table: &[f32; 16]) -> __m512 {
        // SAFETY: the caller vouches for the features; the table has 16 entries.
        unsafe { _mm512_loadu_ps(table.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn decode(packed: *const u8, table: __m512) -> (__m512, __m512) {
        // SAFETY: the caller vouches for the features and for 16 bytes.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(packed.cast()));
            // A permutation reads the low 4 bits of each lane only.
            (_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table), _mm512_permutexvar_ps(bytes, table))
        }
    }
}

/// # Safety
/// All methods need AVX-512 F, BW, DQ and VL.
pub(crate) unsafe trait Lanes512: Sized {
    /// Sixteen results of a 4-bit code, rounded to this type.
    type Table: Copy;

    /// 16 elements widened to fp32.
    unsafe fn load16(from: *const Self) -> __m512;

    /// `table * scale`, rounded once.
    unsafe fn table(table: __m512, scale: f32) -> Self::Table;

    /// Looks up 16 packed bytes, one in each 32-bit lane, and stores their 32 elements.
    unsafe fn store32(to: *mut Self, bytes: __m512i, table: Self::Table);
}

// SAFETY: the methods use nothing beyond the features that their callers guarantee.
unsafe impl Lanes512 for f32 {
    type Table = __m512;

    #[inline(always)]
    unsafe fn load16(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for the features and for 16 readable elements.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn table(table: __m512, scale: f32) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_mul_ps(table, _mm512_set1_ps(scale)) }
    }

    #[inline(always)]
    unsafe fn store32(to: *mut f32, bytes: __m512i, table: __m512) {
        // SAFETY: the caller vouches for the features and for 32 writable elements.
        unsafe {
            // A permutation reads the low 4 bits of each lane only.
            let odd = _mm512_permutexvar_ps(bytes, table);
            let even = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, low, odd));
            _mm512_storeu_ps(to.add(16), _mm512_permutex2var_ps(even, high, odd));
        }
    }
}

/// The table of a 16-bit type twice: for even elements in the low half of a lane, for odd ones in the high half.
#[derive(Clone, Copy)]
pub(crate) struct HalfTable {
    even: __m512i,
    odd: __m512i,
}

impl HalfTable {
    #[inline(always)]
    unsafe fn new(bits: __m512i) -> Self {
        // SAFETY: the caller vouches for the features.
        unsafe { Self { even: bits, odd: _mm512_slli_epi32::<16>(bits) } }
    }

    #[inline(always)]
    unsafe fn store32<T>(self, to: *mut T, bytes: __m512i) {
        // SAFETY: the caller vouches for the features and for 32 writable elements of 16 bits.
        unsafe {
            let odd = _mm512_permutexvar_epi32(bytes, self.odd);
            let even = _mm512_permutexvar_epi32(_mm512_srli_epi32::<4>(bytes), self.even);
            _mm512_storeu_si512(to.cast(), _mm512_or_si512(even, odd));
        }
    }
}

// SAFETY: as for f32.
unsafe impl Lanes512 for f16 {
    type Table = HalfTable;

    #[inline(always)]
    unsafe fn load16(from: *const f16) -> __m512 {
        // SAFETY: the caller vouches for the features and for 16 readable elements.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn table(table: __m512, scale: f32) -> HalfTable {
        // SAFETY: the caller vouches for the features.
        unsafe {
            let scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale));
            let bits = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(scaled);
            HalfTable::new(_mm512_cvtepu16_epi32(bits))
        }
    }

    #[inline(always)]
    unsafe fn store32(to: *mut f16, bytes: __m512i, table: HalfTable) {
        // SAFETY: the caller vouches for the features and for 32 writable elements.
        unsafe { table.store32(to, bytes) }
    }
}

// SAFETY: as for f32.
unsafe impl Lanes512 for bf16 {
    type Table = HalfTable;

    #[inline(always)]
    unsafe fn load16(from: *const bf16) -> __m512 {
        // SAFETY: the caller vouches for the features and for 16 readable elements.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn table(table: __m512, scale: f32) -> HalfTable {
        // SAFETY: the caller vouches for the features.
        unsafe {
            let scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale));
            HalfTable::new(round_to_bf16(scaled))
        }
    }

    #[inline(always)]
    unsafe fn store32(to: *mut bf16, bytes: __m512i, table: HalfTable) {
        // SAFETY: the caller vouches for the features and for 32 writable elements.
        unsafe { table.store32(to, bytes) }
    }
}

/// Bits of the nearest bf16, ties to even, in the low half of each lane; a NaN stays a quiet NaN.
#[inline(always)]
unsafe fn round_to_bf16(values: __m512) -> __m512i {
    // SAFETY: the caller vouches for the features.
    unsafe {
        let bits = _mm512_castps_si512(values);
        let high = _mm512_srli_epi32::<16>(bits);
        let is_odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        let bias = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
        let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
        _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values), quiet)
    }
}
