#![allow(clippy::unwrap_used)]

mod common;

use common::{cast, normal};
use half::bf16;
use halfbyte_core::codebook::dynamic_map;
use halfbyte_core::ops::adamw::{Adamw, AdamwScalars};
use halfbyte_core::ops::adamw_8bit::Adamw8bit;
use halfbyte_core::tensor::Float;
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef, parallel};

const SCALARS: AdamwScalars =
    AdamwScalars { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2, step: 1 };

struct State<T> {
    param: Vec<T>,
    m: Vec<f32>,
    v: Vec<f32>,
}

fn adamw<T: Float>(state: &mut State<T>, grad: &[T], step: u64, grad_scale: Option<f32>) {
    let scale = grad_scale.map(|scale| [scale]);
    let args = Adamw::new(
        TensorMut::from_slice(&mut state.param),
        TensorRef::from_slice(grad),
        TensorMut::from_slice(&mut state.m),
        TensorMut::from_slice(&mut state.v),
        AdamwScalars { step, ..SCALARS },
        scale.as_ref().map(|scale| TensorRef::from_slice(scale)),
    );
    CpuBackend::new().adamw(args.unwrap()).unwrap();
}

/// AdamW in fp64, straight from the paper.
fn reference(param: &[f32], grads: &[Vec<f32>]) -> Vec<f64> {
    let AdamwScalars { lr, beta1, beta2, eps, weight_decay, .. } = SCALARS;
    let one = |i: usize| {
        let (mut p, mut m, mut v) = (f64::from(param[i]), 0.0, 0.0);
        for (t, grad) in grads.iter().enumerate() {
            let (g, t) = (f64::from(grad[i]), t as i32 + 1);
            m = beta1 * m + (1.0 - beta1) * g;
            v = beta2 * v + (1.0 - beta2) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
            p -= lr * weight_decay * p;
            p -= lr * m_hat / (v_hat.sqrt() + eps);
        }
        p
    };
    (0..param.len()).map(one).collect()
}

#[test]
fn ten_steps_agree_with_fp64() {
    let param = normal(20_001, 1);
    let grads: Vec<Vec<f32>> = (0..10).map(|t| normal(param.len(), 10 + t)).collect();
    let mut state = State { param: param.clone(), m: vec![0.0; param.len()], v: vec![0.0; param.len()] };
    for (t, grad) in grads.iter().enumerate() {
        adamw(&mut state, grad, t as u64 + 1, None);
    }
    for (value, expected) in state.param.iter().zip(reference(&param, &grads)) {
        assert!((f64::from(*value) - expected).abs() <= 1e-6 * expected.abs().max(1.0));
    }
}

#[test]
fn the_scale_multiplies_the_gradient() {
    let fresh = || State { param: normal(1000, 1), m: vec![0.0; 1000], v: vec![0.0; 1000] };
    let (mut scaled, mut halved) = (fresh(), fresh());
    let grad = normal(1000, 2);
    adamw(&mut scaled, &grad, 1, Some(0.5));
    adamw(&mut halved, &grad.iter().map(|g| g * 0.5).collect::<Vec<_>>(), 1, None);
    assert_eq!((scaled.param, scaled.m, scaled.v), (halved.param, halved.m, halved.v));
}

#[test]
fn a_16_bit_parameter_is_rounded_once() {
    let mut wide = State {
        param: cast(&cast::<bf16>(&normal(1000, 1)).iter().map(|p| p.to_f32()).collect::<Vec<_>>()),
        m: vec![0.0; 1000],
        v: vec![0.0; 1000],
    };
    let mut narrow = State { param: cast::<bf16>(&wide.param), m: vec![0.0; 1000], v: vec![0.0; 1000] };
    let grad: Vec<bf16> = cast(&normal(1000, 2));
    adamw(&mut wide, &grad.iter().map(|g| g.to_f32()).collect::<Vec<_>>(), 1, None);
    adamw(&mut narrow, &grad, 1, None);
    assert_eq!(narrow.param, cast::<bf16>(&wide.param));
    assert_eq!((narrow.m, narrow.v), (wide.m, wide.v));
}

struct State8 {
    param: Vec<f32>,
    state1: Vec<u8>,
    state2: Vec<u8>,
    absmax1: Vec<f32>,
    absmax2: Vec<f32>,
}

impl State8 {
    fn new(param: Vec<f32>) -> Self {
        let (n, blocks) = (param.len(), param.len().div_ceil(256));
        let (state1, state2) = (vec![127; n], vec![0; n]);
        Self { param, state1, state2, absmax1: vec![0.0; blocks], absmax2: vec![0.0; blocks] }
    }

    fn step(&mut self, grad: &[f32], step: u64) {
        let args = Adamw8bit::new(
            TensorMut::from_slice(&mut self.param),
            TensorRef::from_slice(grad),
            TensorMut::from_slice(&mut self.state1),
            TensorMut::from_slice(&mut self.state2),
            TensorMut::from_slice(&mut self.absmax1),
            TensorMut::from_slice(&mut self.absmax2),
            AdamwScalars { step, ..SCALARS },
            None,
        );
        CpuBackend::new().adamw_8bit(args.unwrap()).unwrap();
    }

    fn m(&self, i: usize) -> f32 {
        dynamic_map(true)[usize::from(self.state1[i])] * self.absmax1[i / 256]
    }
}

#[test]
fn the_published_weights_of_three_8_bit_steps() {
    let mut state = State8::new((0..8192).map(|i| (-1.0 + 2.0 * i as f64 / 8191.0) as f32).collect());
    let grad: Vec<f32> = (0..8192).map(|i| 0.01 * (i as f32).sin()).collect();
    for step in 1..=3 {
        state.step(&grad, step);
    }
    let expected = [-0.999_969_96f32, -1.002_721_5, -1.002_48];
    assert!(state.param.iter().zip(expected).all(|(value, expected)| (value - expected).abs() < 2.5e-7));
}

#[test]
fn a_gradient_that_is_not_finite_clears_its_state_and_leaves_its_weight() {
    let mut state = State8::new(normal(300, 1));
    state.step(&normal(300, 2), 1);
    let (before, mut grad) = (state.param.clone(), normal(300, 3));
    (grad[5], grad[280]) = (f32::NAN, f32::NEG_INFINITY);
    state.step(&grad, 2);
    for i in [5, 280] {
        assert_eq!((state.param[i], state.state1[i], state.state2[i]), (before[i], 127, 0));
    }
    assert!(state.param.iter().zip(&before).filter(|(now, before)| now == before).count() == 2);
    assert!(state.absmax1.iter().chain(&state.absmax2).all(|value| value.is_finite()));
}

#[test]
fn a_code_keeps_the_sign_of_the_moment() {
    let mut grad = vec![1e-9f32; 256];
    (grad[0], grad[1], grad[2]) = (1.0, -1e-9, 0.0);
    let mut state = State8::new(vec![0.0; 256]);
    state.step(&grad, 1);
    assert_eq!(state.state1[..4], [255, 126, 127, 127]);
    assert!(state.m(1) < 0.0 && state.m(2) == 0.0);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let results = [1, 2, 3].map(|threads| {
        parallel::set_num_threads(threads);
        let mut state = State8::new(normal(100_001, 1));
        state.step(&normal(100_001, 2), 1);
        (state.param, state.state1, state.state2)
    });
    parallel::set_num_threads(0);
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn impossible_scalars_are_named() {
    let check = |scalars: AdamwScalars| {
        let (mut p, g, mut m, mut v) = ([0f32], [0f32], [0f32], [0f32]);
        let (p, m, v) = (TensorMut::from_slice(&mut p), TensorMut::from_slice(&mut m), TensorMut::from_slice(&mut v));
        Adamw::new(p, TensorRef::from_slice(&g), m, v, scalars, None).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(check(AdamwScalars { step: 0, ..SCALARS }), "adamw: step must be >= 1, got 0");
    assert_eq!(check(AdamwScalars { beta2: 1.0, ..SCALARS }), "adamw: beta2 must be in [0, 1), got 1");
    assert_eq!(check(AdamwScalars { lr: f64::NAN, ..SCALARS }), "adamw: lr must be finite and >= 0, got NaN");
}
