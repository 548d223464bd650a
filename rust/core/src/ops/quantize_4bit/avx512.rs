//! Sixteen elements at a time: the rank is found by a binary search whose table look-ups are permutations.

use std::arch::x86_64::*;

use super::ABSMAX_MIN;
use crate::codebook::Ranks;
use crate::simd::avx512::Lanes512;

/// One whole block; returns its absmax.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL; `x.len()` is a multiple of 32 and `packed` has half as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn quantize_block<T: Lanes512>(x: &[T], packed: &mut [u8], ranks: &Ranks) -> f32 {
    // SAFETY: the steps stay inside x and packed, whose lengths the caller vouches for.
    unsafe {
        let absmax = absmax(x);
        let inverse = _mm512_set1_ps(1.0 / absmax.max(ABSMAX_MIN));
        let search = Search::new(ranks);
        for start in (0..x.len()).step_by(32) {
            let first = search.encode(_mm512_mul_ps(T::load16(x.as_ptr().add(start)), inverse));
            let second = search.encode(_mm512_mul_ps(T::load16(x.as_ptr().add(start + 16)), inverse));
            let to = packed.as_mut_ptr().add(start / 2);
            _mm_storeu_si128(to.cast(), _mm_unpacklo_epi64(pack(first), pack(second)));
        }
        absmax
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn absmax<T: Lanes512>(x: &[T]) -> f32 {
    let sign_off = _mm512_set1_epi32(0x7fff_ffff);
    let mut most = _mm512_setzero_si512();
    for start in (0..x.len()).step_by(16) {
        // SAFETY: x is a multiple of 16 elements.
        let bits = _mm512_castps_si512(unsafe { T::load16(x.as_ptr().add(start)) });
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, sign_off));
    }
    f32::from_bits(_mm512_reduce_max_epu32(most))
}

/// Codes of 16 elements, one in each 32-bit lane, to 8 bytes: the even element is the high nibble.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pack(codes: __m512i) -> __m128i {
    let pairs = _mm512_or_si512(_mm512_slli_epi64::<4>(codes), _mm512_srli_epi64::<32>(codes));
    _mm512_cvtepi64_epi8(pairs)
}

/// The thresholds, rotated so that the rank itself is the index at every step of the search.
struct Search {
    middle: __m512,
    by_3: __m512,
    by_1: __m512,
    by_0: __m512,
    order: __m512i,
}

impl Search {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(ranks: &Ranks) -> Self {
        let mut padded = [f32::INFINITY; 32];
        padded[..15].copy_from_slice(&ranks.thresholds);
        // SAFETY: each load ends inside the 32 padded thresholds or the 16 codes.
        let (from, order) = unsafe {
            let from = |i: usize| _mm512_loadu_ps(padded.as_ptr().add(i));
            ([from(0), from(1), from(3)], _mm_loadu_si128(ranks.order.as_ptr().cast()))
        };
        Self {
            middle: _mm512_set1_ps(ranks.thresholds[7]),
            by_3: from[2],
            by_1: from[1],
            by_0: from[0],
            order: _mm512_cvtepu8_epi32(order),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn encode(&self, scaled: __m512) -> __m512i {
        let above = |thresholds: __m512| _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scaled, thresholds);
        let step = |rank: __m512i, mask: __mmask16, size: i32| {
            _mm512_mask_add_epi32(rank, mask, rank, _mm512_set1_epi32(size))
        };
        let rank = _mm512_maskz_set1_epi32(above(self.middle), 8);
        let rank = step(rank, above(_mm512_permutexvar_ps(rank, self.by_3)), 4);
        let rank = step(rank, above(_mm512_permutexvar_ps(rank, self.by_1)), 2);
        let rank = step(rank, above(_mm512_permutexvar_ps(rank, self.by_0)), 1);
        _mm512_permutexvar_epi32(rank, self.order)
    }
}
