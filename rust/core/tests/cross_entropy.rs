#![allow(clippy::unwrap_used)]

mod common;

use common::normal;
use halfbyte_core::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef};

/// Four rows of seven columns, eight apart; the last two rows are masked.
const LABELS: [i32; 4] = [0, 6, -1, 7];

fn run(divisor: Option<f32>) -> (Vec<f32>, [f32; 4], [f32; 4]) {
    let (mut logits, mut losses, mut logsumexps) = (normal(32, 1), [f32::NAN; 4], [f32::NAN; 4]);
    let divisor = divisor.map(|divisor| [divisor]);
    let args = CrossEntropy::new(
        TensorMut::from_slice(&mut logits),
        TensorRef::from_slice(&LABELS),
        TensorMut::from_slice(&mut losses),
        TensorMut::from_slice(&mut logsumexps),
        divisor.as_ref().map(|divisor| TensorRef::from_slice(divisor)),
        7,
    );
    CpuBackend::new().cross_entropy(args.unwrap()).unwrap();
    (logits, losses, logsumexps)
}

#[test]
fn losses_and_the_gradient_of_their_sum() {
    let before = normal(32, 1);
    let (logits, losses, _) = run(None);
    assert_eq!(logits, before);
    let (gradient, again, _) = run(Some(2.0));
    assert_eq!(losses, again);
    assert_eq!(losses[2..], [0.0, 0.0]);
    for (row, label) in [(0, 0), (1, 6)] {
        let x = &before[8 * row..8 * row + 7];
        let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((f64::from(losses[row]) - (sum.ln() - f64::from(x[label]))).abs() < 1e-6);
        for (i, &x) in x.iter().enumerate() {
            let hit = if i == label { 1.0 } else { 0.0 };
            let expected = (f64::from(x).exp() / sum - hit) / 2.0;
            assert!((f64::from(gradient[8 * row + i]) - expected).abs() < 1e-6);
        }
    }
    for row in 2..4 {
        assert_eq!(gradient[8 * row..8 * row + 7], [0.0; 7]);
    }
    for row in 0..4 {
        assert_eq!(gradient[8 * row + 7], before[8 * row + 7], "what lies between rows stays");
    }
}

#[test]
fn a_vocabulary_must_fit_its_rows() {
    let (mut logits, mut losses, mut logsumexps) = (normal(32, 1), [0.0f32; 4], [0.0f32; 4]);
    let (logits, losses) = (TensorMut::from_slice(&mut logits), TensorMut::from_slice(&mut losses));
    let (labels, logsumexps) = (TensorRef::from_slice(&LABELS), TensorMut::from_slice(&mut logsumexps));
    let error = CrossEntropy::new(logits, labels, losses, logsumexps, None, 9).unwrap_err();
    assert!(error.to_string().contains("vocab must be as long as a row of logits"), "{error}");
}

#[test]
fn the_gradient_of_some_columns_is_that_of_all() {
    let (whole, _, logsumexps) = run(Some(2.0));
    let before = normal(32, 1);
    for (first, width) in [(0, 7), (0, 3), (3, 4), (6, 1)] {
        let mut logits: Vec<f32> =
            (0..4).flat_map(|row| before[8 * row + first..8 * row + first + width].to_vec()).collect();
        let masked = LABELS.map(|label| if label == 7 { -1 } else { label });
        let args = CrossEntropyBackward::new(
            TensorMut::from_slice(&mut logits),
            TensorRef::from_slice(&masked),
            TensorRef::from_slice(&logsumexps),
            TensorRef::from_slice(&[2.0f32]),
            first,
            width,
        );
        CpuBackend::new().cross_entropy_backward(args.unwrap()).unwrap();
        let expected: Vec<f32> =
            (0..4).flat_map(|row| whole[8 * row + first..8 * row + first + width].to_vec()).collect();
        assert_eq!(logits, expected);
    }
}
