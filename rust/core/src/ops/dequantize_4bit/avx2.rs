//! A block is one scaled table in registers, 8 packed bytes at a time.

use super::scaled;
use crate::simd::avx2::Lanes256;
use crate::tensor::Float;

/// # Safety
/// AVX2, FMA, F16C; `out.len()` is a multiple of 32 and `packed` has at least half as many bytes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dequantize_block<T: Float + Lanes256>(
    packed: &[u8],
    out: &mut [T],
    table: &[f32; 16],
    scale: f32,
) {
    // SAFETY: as the caller vouches.
    unsafe { T::look_up(packed, out, &scaled(table, scale)) }
}
