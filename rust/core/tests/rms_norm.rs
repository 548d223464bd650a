#![allow(clippy::unwrap_used)]

mod common;

use common::{Bits, assert_siblings_equal, bits, cast, normal};
use half::{bf16, f16};
use halfbyte_core::ops::rms_norm::{RmsNorm, RmsNormBackward, SLICES, WeightGradient};
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef};

const EPS: f32 = 1e-5;

#[test]
fn rows_are_normed_after_the_addition() {
    for columns in [1, 7, 1030, 40_000] {
        let (x, residual): (Vec<bf16>, Vec<bf16>) = (cast(&normal(3 * columns, 1)), cast(&normal(3 * columns, 2)));
        let weight = normal(columns, 3);
        let (mut sum, mut out) = (vec![bf16::NAN; x.len()], vec![bf16::NAN; x.len()]);
        let residual_and_sum = (TensorRef::from_slice(&residual), TensorMut::from_slice(&mut sum));
        let (x_ref, weight_ref) = (TensorRef::from_slice(&x), TensorRef::from_slice(&weight));
        let args = RmsNorm::new(x_ref, Some(residual_and_sum), weight_ref, TensorMut::from_slice(&mut out), EPS);
        CpuBackend::new().rms_norm(args.unwrap()).unwrap();
        for row in 0..3 {
            let row = row * columns..(row + 1) * columns;
            let exact: Vec<f64> = sum[row.clone()].iter().map(|x| x.to_f64()).collect();
            let mean = exact.iter().map(|x| x * x).sum::<f64>() / columns as f64;
            for (i, at) in row.enumerate() {
                assert_eq!(sum[at], bf16::from_f32(x[at].to_f32() + residual[at].to_f32()));
                let expected = exact[i] / (mean + f64::from(EPS)).sqrt() * f64::from(weight[i]);
                assert!((out[at].to_f64() - expected).abs() <= 0.009 * expected.abs() + 1e-9, "{columns} {at}");
            }
        }
    }
}

/// Of two columns everything can be written down: x = (3, 4), weight = (1, 2), grad = (1, 1).
#[test]
fn gradients_of_a_row() {
    let (grad, x, weight, stream) = ([1.0f32, 1.0], [3.0f32, 4.0], [1.0f32, 2.0], [0.5f32, -0.5]);
    let (mut grad_x, mut grad_weight, mut roots) = ([f32::NAN; 2], [f32::NAN; 2], [f32::NAN; 1]);
    let mut partials = vec![f32::NAN; 2 * SLICES];
    let gradient = WeightGradient {
        grad_weight: TensorMut::from_slice(&mut grad_weight),
        roots: TensorMut::from_slice(&mut roots),
        partials: TensorMut::from_slice(&mut partials),
    };
    let [grad, x, weight, stream] = [&grad, &x, &weight, &stream].map(|values| TensorRef::from_slice(values));
    let target = TensorMut::from_slice(&mut grad_x);
    let args = RmsNormBackward::new(grad, x, weight, Some(stream), target, Some(gradient), 0.0);
    CpuBackend::new().rms_norm_backward(args.unwrap()).unwrap();
    let root = 1.0 / 12.5f32.sqrt();
    let shrink = (3.0 + 8.0) / 2.0 * root.powi(3);
    let expected = [root - 3.0 * shrink + 0.5, 2.0 * root - 4.0 * shrink - 0.5];
    for (got, expected) in grad_x.iter().chain(&grad_weight).zip(expected.iter().chain(&[3.0 * root, 4.0 * root])) {
        assert!((got - expected).abs() < 1e-6, "{got} {expected}");
    }
}

fn siblings_agree<T: Bits>() {
    for columns in [1, 15, 48, 576, 1030] {
        let all = |seed| cast::<T>(&normal(3 * columns, seed));
        let (x, residual, grad, weight) = (all(1), all(2), all(3), cast::<T>(&normal(columns, 4)));
        let [x, residual, grad, weight] = [&x, &residual, &grad, &weight].map(|values| TensorRef::from_slice(values));
        assert_siblings_equal(&format!("{columns} columns"), |backend| {
            let [mut sum, mut out, mut grad_x] = [(); 3].map(|()| cast::<T>(&vec![f32::NAN; 3 * columns]));
            let residual_and_sum = (residual, TensorMut::from_slice(&mut sum));
            let args = RmsNorm::new(x, Some(residual_and_sum), weight, TensorMut::from_slice(&mut out), EPS);
            backend.rms_norm(args.unwrap()).unwrap();
            let target = TensorMut::from_slice(&mut grad_x);
            let args = RmsNormBackward::new(grad, x, weight, Some(residual), target, None, EPS);
            backend.rms_norm_backward(args.unwrap()).unwrap();
            [bits(&sum), bits(&out), bits(&grad_x)]
        });
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    siblings_agree::<f32>();
    siblings_agree::<f16>();
    siblings_agree::<bf16>();
}

#[test]
fn misfits_are_named() {
    let (x, weight, mut out) = ([0.0f32; 9], [1.0f32; 2], [0.0f32; 9]);
    let (x, weight) = (TensorRef::from_slice(&x), TensorRef::from_slice(&weight));
    let error = RmsNorm::new(x, None, weight, TensorMut::from_slice(&mut out), EPS).unwrap_err();
    assert!(error.to_string().contains("weight must be as long as a row of x"), "{error}");
}
