//! 32-bit moments, as torch's AdamW.

use super::Rule;
use crate::tensor::Float;

pub(super) fn update<T: Float>(
    rule: &Rule,
    grad_scale: f32,
    (param, grad): (&mut [T], &[T]),
    (m, v): (&mut [f32], &mut [f32]),
) {
    for ((p, g), (m, v)) in param.iter_mut().zip(grad).zip(m.iter_mut().zip(v)) {
        let g = g.to_f32() * grad_scale;
        *m += rule.one_minus_beta1 * (g - *m);
        *v = *v * rule.beta2 + rule.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / rule.bias_correction2_sqrt + rule.eps;
        *p = T::from_f32(p.to_f32() * rule.decay - rule.step_size * *m / denominator);
    }
}
