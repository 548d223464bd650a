//! A block is one scaled table in a register, 16 packed bytes at a time.

use std::arch::x86_64::*;

use crate::simd::avx512::Lanes512;

/// # Safety
/// AVX-512 F, BW, DQ, VL; `out.len()` is a multiple of 32 and `packed` has at least half as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn dequantize_block<T: Lanes512>(packed: &[u8], out: &mut [T], table: &[f32; 16], scale: f32) {
    // SAFETY: the steps stay inside packed and out, whose lengths the caller vouches for.
    unsafe {
        let table = T::table(_mm512_loadu_ps(table.as_ptr()), scale);
        for start in (0..out.len()).step_by(32) {
            let bytes = _mm_loadu_si128(packed.as_ptr().add(start / 2).cast());
            T::store32(out.as_mut_ptr().add(start), _mm512_cvtepu8_epi32(bytes), table);
        }
    }
}
