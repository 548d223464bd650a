#![allow(clippy::unwrap_used)]

mod common;

use common::{backends, normal};
use halfbyte_core::ops::swiglu::{Rows, Swiglu, SwigluBackward};
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef};

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Halves of rows of ten.
fn halves(both: &[f32]) -> [Rows<'_>; 2] {
    [&both[..15], &both[5..20]].map(|half| Rows { span: TensorRef::from_slice(half), stride: 10 })
}

#[test]
fn product_and_gradients_of_halves() {
    backends().iter().for_each(check_halves);
}

fn check_halves(backend: &CpuBackend) {
    let (both, grad) = (normal(20, 1), normal(10, 2));
    let ([gate, up], mut out) = (halves(&both), vec![f32::NAN; 10]);
    let args = Swiglu::new(gate, up, TensorMut::from_slice(&mut out), 2, 5);
    backend.swiglu(args.unwrap()).unwrap();
    let mut grads = [vec![f32::NAN; 20], vec![f32::NAN; 20]];
    for (grads, interleaved) in grads.iter_mut().zip([false, true]) {
        let target = TensorMut::from_slice(grads);
        let args = SwigluBackward::new(TensorRef::from_slice(&grad), gate, up, target, interleaved, 2, 5);
        backend.swiglu_backward(args.unwrap()).unwrap();
    }
    let close = |got: f32, expected: f64| assert!((f64::from(got) - expected).abs() < 1e-6, "{got} {expected}");
    for (i, (out, grad)) in out.iter().zip(&grad).enumerate() {
        let (row, column) = (i / 5, i % 5);
        let (gate, up) = (f64::from(both[row * 10 + column]), f64::from(both[row * 10 + 5 + column]));
        close(*out, silu(gate) * up);
        let slope = (silu(gate + 1e-5) - silu(gate - 1e-5)) / 2e-5;
        close(grads[0][i], f64::from(*grad) * up * slope);
        close(grads[0][10 + i], f64::from(*grad) * silu(gate));
        assert_eq!(grads[1][row * 10 + column], grads[0][i]);
        assert_eq!(grads[1][row * 10 + 5 + column], grads[0][10 + i]);
    }
}

#[test]
fn rows_may_not_overlap() {
    let (both, mut out) = (normal(20, 1), vec![0.0f32; 10]);
    let overlapping = Rows { span: TensorRef::from_slice(&both[..8]), stride: 3 };
    let error = Swiglu::new(overlapping, overlapping, TensorMut::from_slice(&mut out), 2, 5).unwrap_err();
    assert!(error.to_string().contains("gate must be of rows that do not overlap"), "{error}");
}
