//! 8-bit moments in blocks, as bitsandbytes' AdamW8bit.

use super::{BLOCK, Rule};
use crate::codebook::{DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, encode_first_moment, encode_nearest};
use crate::ops::quantize_4bit::{ABSMAX_MIN, absmax};
use crate::tensor::Float;

/// Whole blocks, of which the last may be short.
pub(super) fn update<T: Float>(
    rule: &Rule,
    grad_scale: f32,
    (param, grad): (&mut [T], &[T]),
    (codes_m, codes_v): (&mut [u8], &mut [u8]),
    (absmax_m, absmax_v): (&mut [f32], &mut [f32]),
) {
    let weights = param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
    let codes = codes_m.chunks_mut(BLOCK).zip(codes_v.chunks_mut(BLOCK));
    for ((weights, codes), absmax) in weights.zip(codes).zip(absmax_m.iter_mut().zip(absmax_v)) {
        update_block(rule, grad_scale, weights, codes, absmax);
    }
}

fn update_block<T: Float>(
    rule: &Rule,
    grad_scale: f32,
    (param, grad): (&mut [T], &[T]),
    (codes_m, codes_v): (&mut [u8], &mut [u8]),
    (absmax_m, absmax_v): (&mut f32, &mut f32),
) {
    let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
    for (i, (p, g)) in param.iter_mut().zip(grad).enumerate() {
        let g = g.to_f32() * grad_scale;
        if !g.is_finite() {
            continue;
        }
        let (old_m, old_v) = (DYNAMIC_SIGNED[usize::from(codes_m[i])], DYNAMIC_UNSIGNED[usize::from(codes_v[i])]);
        m[i] = rule.beta1 * (old_m * *absmax_m) + rule.one_minus_beta1 * g;
        v[i] = rule.beta2 * (old_v * *absmax_v) + rule.one_minus_beta2 * g * g;
        *p = T::from_f32(p.to_f32() * rule.decay - rule.step_size * (m[i] / (v[i].sqrt() + rule.eps)));
    }
    *absmax_m = requantize(&m[..param.len()], codes_m, encode_first_moment);
    *absmax_v = requantize(&v[..param.len()], codes_v, |v| encode_nearest(false, v));
}

fn requantize(values: &[f32], codes: &mut [u8], encode: impl Fn(f32) -> u8) -> f32 {
    let absmax = absmax(values);
    let inverse = 1.0 / absmax.max(ABSMAX_MIN);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = encode(value * inverse);
    }
    absmax
}
