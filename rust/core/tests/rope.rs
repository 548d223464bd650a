#![allow(clippy::unwrap_used)]

mod common;

use common::{Bits, assert_siblings_equal, bits, cast, normal};
use half::{bf16, f16};
use halfbyte_core::ops::rope::{Angles, Heads, Rope, RopeShape};
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef};

const SHAPE: RopeShape = RopeShape { batch: 2, tokens: 3, head_dim: 4 };

fn rotated(q: &[f32], k: &[f32], angles: &[f32], inverse: bool) -> (Vec<f32>, Vec<f32>) {
    let cos: Vec<f32> = angles.iter().flat_map(|a| [a.cos(), (2.0 * a).cos(), a.cos(), (2.0 * a).cos()]).collect();
    let sin: Vec<f32> = angles.iter().flat_map(|a| [-a.sin(), -(2.0 * a).sin(), a.sin(), (2.0 * a).sin()]).collect();
    let angles = Angles { cos: TensorRef::from_slice(&cos), sin: TensorRef::from_slice(&sin) };
    let heads = |x, heads: usize| Heads { span: TensorRef::from_slice(x), heads, strides: [12 * heads, 4 * heads, 4] };
    let (mut q_out, mut k_out) = (vec![f32::NAN; q.len()], vec![f32::NAN; k.len()]);
    let targets = (TensorMut::from_slice(&mut q_out), TensorMut::from_slice(&mut k_out));
    let args = Rope::new(heads(q, 2), heads(k, 1), angles, targets.0, targets.1, SHAPE, inverse);
    CpuBackend::new().rope(args.unwrap()).unwrap();
    (q_out, k_out)
}

#[test]
fn halves_turn_by_their_tokens_angle_and_back() {
    let (q, k) = (normal(48, 1), normal(24, 2));
    let (q_out, k_out) = rotated(&q, &k, &[0.0, 0.5, -2.0], false);
    assert_eq!((&q_out[..8], &k_out[..4]), (&q[..8], &k[..4]), "the first token does not turn");
    let (x, a) = (&k[4..8], 0.5f32);
    let expected = [x[0] * a.cos() - x[2] * a.sin(), x[1] * (2.0 * a).cos() - x[3] * (2.0 * a).sin()];
    assert_eq!(&k_out[4..6], &expected);
    let back = rotated(&q_out, &k_out, &[0.0, 0.5, -2.0], true);
    for (back, original) in back.0.iter().chain(&back.1).zip(q.iter().chain(&k)) {
        assert!((back - original).abs() < 1e-6);
    }
}

fn siblings_agree<T: Bits>(head_dim: usize) {
    let shape = RopeShape { batch: 2, tokens: 3, head_dim };
    let all = |count, seed| cast::<T>(&normal(count * head_dim, seed));
    let (q, k, cos, sin) = (all(12, 1), all(6, 2), all(3, 3), all(3, 4));
    let angles = Angles { cos: TensorRef::from_slice(&cos), sin: TensorRef::from_slice(&sin) };
    for inverse in [false, true] {
        assert_siblings_equal(&format!("{head_dim}"), |backend| {
            let heads = |x, heads| {
                let strides = [3 * heads * head_dim, heads * head_dim, head_dim];
                Heads { span: TensorRef::from_slice(x), heads, strides }
            };
            let [mut q_out, mut k_out] = [q.len(), k.len()].map(|count| cast::<T>(&vec![f32::NAN; count]));
            let targets = (TensorMut::from_slice(&mut q_out), TensorMut::from_slice(&mut k_out));
            let args = Rope::new(heads(&q, 2), heads(&k, 1), angles, targets.0, targets.1, shape, inverse);
            backend.rope(args.unwrap()).unwrap();
            [bits(&q_out), bits(&k_out)]
        });
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for head_dim in [2, 80, 96, 128] {
        siblings_agree::<f32>(head_dim);
        siblings_agree::<f16>(head_dim);
        siblings_agree::<bf16>(head_dim);
    }
}

#[test]
fn a_span_must_hold_its_heads() {
    let (x, angles) = (normal(48, 1), normal(12, 2));
    let mut outs = [vec![0.0f32; 48], vec![0.0f32; 48]];
    let heads = Heads { span: TensorRef::from_slice(&x), heads: 2, strides: [24, 8, 5] };
    let angles = Angles { cos: TensorRef::from_slice(&angles), sin: TensorRef::from_slice(&angles) };
    let [q_out, k_out] = outs.each_mut().map(|out| TensorMut::from_slice(out));
    let error = Rope::new(heads, heads, angles, q_out, k_out, SHAPE, false).unwrap_err();
    assert!(error.to_string().contains("q must have 49 elements"), "{error}");
}
