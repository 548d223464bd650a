#![allow(clippy::unwrap_used)]

mod common;

use common::normal;
use halfbyte_core::ops::draw::Draw;
use halfbyte_core::{Backend, CpuBackend, Result, TensorMut, TensorRef};

/// Tokens of rows that differ in their positions only.
fn draw(scores: &[f32], settings: [f32; 3], top_k: usize, rows: usize) -> Result<Vec<i32>> {
    let scores = scores.repeat(rows);
    let settings = settings.repeat(rows);
    let top_k = vec![top_k as i32; rows];
    let keys = [9, -1].repeat(rows);
    let positions: Vec<i32> = (0..rows as i32).flat_map(|row| [row, 0]).collect();
    let mut tokens = vec![-1; rows];
    CpuBackend::oracle().draw(Draw::new(
        TensorRef::from_slice(&scores),
        TensorRef::from_slice(&settings),
        TensorRef::from_slice(&top_k),
        TensorRef::from_slice(&keys),
        TensorRef::from_slice(&positions),
        TensorMut::from_slice(&mut tokens),
    )?)?;
    Ok(tokens)
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
fn wrong_arguments_are_named() {
    let tokens = draw(&[], [1.0, 1.0, 0.0], 1, 3).unwrap_err().to_string();
    assert!(tokens.contains("scores") && tokens.contains("2^18"), "{tokens}");
}
