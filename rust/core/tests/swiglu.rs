#![allow(clippy::unwrap_used)]

mod common;

use common::{Bits, backends, cast, normal};
use half::bf16;
use halfbyte_core::ops::swiglu::{Rows, Swiglu, SwigluBackward};
use halfbyte_core::tensor::Float;
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef};

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

const COLUMNS: usize = 37;

/// Halves of two rows.
fn halves<T: Float>(both: &[T]) -> [Rows<'_>; 2] {
    let halves = [&both[..3 * COLUMNS], &both[COLUMNS..]];
    halves.map(|half| Rows { span: TensorRef::from_slice(half), stride: 2 * COLUMNS })
}

#[test]
fn product_and_gradients_of_halves() {
    for backend in backends() {
        check_halves::<f32>(&backend, 2e-6);
        check_halves::<bf16>(&backend, 0.02);
    }
}

fn check_halves<T: Bits>(backend: &CpuBackend, tolerance: f64) {
    let all = |count, seed| cast::<T>(&normal(count, seed));
    let (both, grad) = (all(4 * COLUMNS, 1), all(2 * COLUMNS, 2));
    let ([gate, up], mut out) = (halves(&both), cast::<T>(&vec![f32::NAN; 2 * COLUMNS]));
    let args = Swiglu::new(gate, up, TensorMut::from_slice(&mut out), 2, COLUMNS);
    backend.swiglu(args.unwrap()).unwrap();
    let mut grads = [(); 2].map(|()| cast::<T>(&vec![f32::NAN; 4 * COLUMNS]));
    for (grads, interleaved) in grads.iter_mut().zip([false, true]) {
        let target = TensorMut::from_slice(grads);
        let args = SwigluBackward::new(TensorRef::from_slice(&grad), gate, up, target, interleaved, 2, COLUMNS);
        backend.swiglu_backward(args.unwrap()).unwrap();
    }
    let wide = |x: T| f64::from(x.to_f32());
    let close = |got: T, expected: f64| {
        assert!((wide(got) - expected).abs() <= tolerance * (1.0 + expected.abs()), "{} {expected}", wide(got));
    };
    for (i, (out, grad)) in out.iter().zip(&grad).enumerate() {
        let at = i / COLUMNS * 2 * COLUMNS + i % COLUMNS;
        let (gate, up, grad) = (wide(both[at]), wide(both[at + COLUMNS]), wide(*grad));
        close(*out, silu(gate) * up);
        let slope = (silu(gate + 1e-5) - silu(gate - 1e-5)) / 2e-5;
        close(grads[0][i], grad * up * slope);
        close(grads[0][2 * COLUMNS + i], grad * silu(gate));
        assert_eq!(grads[1][at].bits(), grads[0][i].bits());
        assert_eq!(grads[1][at + COLUMNS].bits(), grads[0][2 * COLUMNS + i].bits());
    }
}

/// Whose stride may be anything.
#[test]
fn a_single_row_is_taken_whole() {
    let (row, grad) = (normal(8, 1), normal(8, 2));
    let [one, eight] = [1, 8].map(|stride| {
        let rows = Rows { span: TensorRef::from_slice(&row), stride };
        let mut grads = vec![f32::NAN; 16];
        let target = TensorMut::from_slice(&mut grads);
        let args = SwigluBackward::new(TensorRef::from_slice(&grad), rows, rows, target, false, 1, 8);
        CpuBackend::new().swiglu_backward(args.unwrap()).unwrap();
        grads
    });
    assert_eq!(one, eight);
}

#[test]
fn rows_may_not_overlap() {
    let (both, mut out) = (normal(20, 1), vec![0.0f32; 10]);
    let overlapping = Rows { span: TensorRef::from_slice(&both[..8]), stride: 3 };
    let error = Swiglu::new(overlapping, overlapping, TensorMut::from_slice(&mut out), 2, 5).unwrap_err();
    assert!(error.to_string().contains("gate must be of rows that do not overlap"), "{error}");
}
