#![allow(clippy::unwrap_used)]

mod common;

use common::{cast, normal};
use half::{bf16, f16};
use halfbyte_core::ops::draw::{Choice, Draw, Drawn};
use halfbyte_core::tensor::Float;
use halfbyte_core::{Backend, CpuBackend, Result, TensorMut, TensorRef};

/// What becomes of rows of lengths 0, 1, 2, ..., every other one of which runs.
struct Outcome {
    lengths: Vec<i32>,
    tokens: Vec<i32>,
    reported: Vec<i32>,
}

fn draw_rows<T: Float>(scores: &[T], settings: [f32; 3], top_k: usize, rows: usize) -> Result<Outcome> {
    let settings = settings.repeat(rows);
    let top_k = vec![top_k as i32; rows];
    let keys = [9, -1].repeat(rows);
    let running: Vec<i32> = (0..rows as i32).map(|row| row % 2).collect();
    let mut lengths: Vec<i32> = (0..rows as i32).collect();
    let (mut tokens, mut reported) = (vec![-7; rows], vec![-7; rows]);
    let choice = Choice {
        settings: TensorRef::from_slice(&settings),
        top_k: TensorRef::from_slice(&top_k),
        keys: TensorRef::from_slice(&keys),
        running: TensorRef::from_slice(&running),
    };
    let drawn = Drawn {
        lengths: TensorMut::from_slice(&mut lengths),
        tokens: TensorMut::from_slice(&mut tokens),
        reported: TensorMut::from_slice(&mut reported),
    };
    CpuBackend::oracle().draw(Draw::new(TensorRef::from_slice(scores), choice, drawn)?)?;
    Ok(Outcome { lengths, tokens, reported })
}

/// Tokens of rows that differ in their lengths only.
fn draw(scores: &[f32], settings: [f32; 3], top_k: usize, rows: usize) -> Result<Vec<i32>> {
    let drawn = draw_rows(&scores.repeat(rows), settings, top_k, rows)?;
    assert_eq!(drawn.tokens, drawn.reported);
    Ok(drawn.tokens)
}

#[test]
fn follows_the_probabilities() {
    let scores = [0.5f32, 0.0, 0.2, 0.25, 0.05].map(f32::ln);
    let tokens = draw(&scores, [1.0, 1.0, 0.0], 5, 20_000).unwrap();
    for (token, p) in [(0, 0.5), (1, 0.0), (2, 0.2), (3, 0.25), (4, 0.05)] {
        let share = tokens.iter().filter(|&&drawn| drawn == token).count() as f64 / 20_000.0;
        assert!((share - p).abs() < 0.015, "{token}: {share}");
    }
}

#[test]
fn keeps_what_the_filters_keep() {
    let scores = normal(40, 3);
    let mut order: Vec<usize> = (0..40).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let weights: Vec<f64> = order.iter().map(|&i| f64::from(scores[i]).exp()).collect();
    let sum = |n: usize| weights[..n].iter().sum::<f64>();
    let nucleus = |top_k: usize| (1..=top_k).find(|&n| sum(n) >= 0.6 * sum(top_k)).unwrap();
    let likely = weights.iter().filter(|&&weight| weight >= 0.3 * weights[0]).count();
    for (settings, top_k, kept) in [
        ([1.0, 1.0, 0.0], 40, 40),
        ([1.0, 1.0, 0.0], 6, 6),
        ([1.0, 0.6, 0.0], 40, nucleus(40)),
        ([1.0, 1.0, 0.3], 40, likely),
        ([1.0, 0.6, 0.3], 6, nucleus(6).min(likely)),
    ] {
        let mut drawn = draw(&scores, settings, top_k, 20_000).unwrap();
        drawn.sort_unstable();
        drawn.dedup();
        let mut expected: Vec<i32> = order[..kept].iter().map(|&i| i as i32).collect();
        expected.sort_unstable();
        assert_eq!(drawn, expected, "{settings:?} {top_k}");
    }
}

#[test]
fn temperature_0_takes_the_first_of_the_largest() {
    for (scores, place) in [
        (vec![1.0f32, 3.0, 3.0, 2.0], 1),
        (vec![-0.0, 0.0, -1.0], 0),
        (vec![f32::NEG_INFINITY, -5.0, f32::NEG_INFINITY, -5.0], 1),
    ] {
        let expected = vec![place; 3];
        assert_eq!(draw(&scores, [0.0, 0.5, 0.5], 2, 3).unwrap(), expected);
        let half = cast::<f16>(&scores).repeat(3);
        assert_eq!(draw_rows(&half, [0.0, 1.0, 0.0], 9, 3).unwrap().tokens, expected);
        let half = cast::<bf16>(&scores).repeat(3);
        assert_eq!(draw_rows(&half, [0.0, 1.0, 0.0], 9, 3).unwrap().tokens, expected);
    }
}

#[test]
fn what_is_not_finite_is_reported() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for temperature in [0.0, 0.7] {
        let scores = [[1.0, nan, 0.0], [1.0, 2.0, inf], [-inf, -inf, -inf], [-inf, 0.5, -inf]].concat();
        let drawn = draw_rows(&scores, [temperature, 1.0, 0.0], 3, 4).unwrap();
        assert_eq!(drawn.reported, [-1, -1, -1, 1]);
        assert_eq!(drawn.tokens, [0, 0, 0, 1]);
        assert_eq!(drawn.lengths, [0, 2, 2, 4], "of those that run one more");
    }
}

#[test]
fn wrong_arguments_are_named() {
    let tokens = draw(&[], [1.0, 1.0, 0.0], 1, 3).unwrap_err().to_string();
    assert!(tokens.contains("scores") && tokens.contains("2^18"), "{tokens}");
}
