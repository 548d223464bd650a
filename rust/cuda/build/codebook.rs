//! halfbyte-core's codebooks as a device header, so that they are written in one place only.

use std::fmt::Write;

use halfbyte_core::codebook::{
    BUCKET_SHIFT, BUCKETS, BUCKETS_SIGNED, BUCKETS_UNSIGNED, DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, FP4, FP4_RANKS, INT4,
    INT4_RANKS, MAGNITUDE_MIN, NEAREST_SIGNED, NEAREST_UNSIGNED, NF4, NF4_RANKS, Ranks, encode_grid,
};
use halfbyte_core::ops::quantize_4bit::ABSMAX_MIN;

/// Rows follow the order of `QuantType`, and of unsigned, signed.
pub fn header() -> String {
    let ranks: [&Ranks; 3] = [&NF4_RANKS, &FP4_RANKS, &INT4_RANKS];
    let mut text = String::from("#pragma once\n#include <stdint.h>\n\n");
    let _ = writeln!(text, "constexpr float ABSMAX_MIN = {};", float(ABSMAX_MIN));
    let mut table = |declaration: &str, rows: &[String]| {
        let _ = writeln!(text, "static __device__ const {declaration} = {{\n{}\n}};", rows.join(",\n"));
    };
    table("float CODEBOOK_4BIT[3][16]", &[NF4, FP4, INT4].map(|row| floats(&row)));
    table("float THRESHOLDS_4BIT[3][16]", &ranks.map(|row| floats(&padded(&row.thresholds))));
    table("uint32_t ORDER_4BIT[3][16]", &ranks.map(|row| format!("    {{{:?}}}", row.order).replace(['[', ']'], "")));
    let bins = ranks.map(bins);
    table("float BIN_THRESHOLDS_4BIT[3][32]", &bins.map(|row| floats(&row.map(|bin| bin.threshold))));
    table(
        "uint32_t BIN_CODES_4BIT[3][32]",
        &bins.map(|row| format!("    {{{:?}}}", row.map(|bin| bin.codes)).replace(['[', ']'], "")),
    );
    table("float DYNAMIC_MAP[2][256]", &[&DYNAMIC_UNSIGNED, &DYNAMIC_SIGNED].map(|row| floats(row)));
    table("float NEAREST_THRESHOLDS[2][255]", &[&NEAREST_UNSIGNED, &NEAREST_SIGNED].map(|row| floats(row)));
    table("float GRID_THRESHOLDS[1][255]", &[floats(&std::array::from_fn::<f32, 255, _>(grid_threshold))]);
    // Positive values by the unsigned map, then positive and negative ones by the signed map.
    let ranks = [&BUCKETS_UNSIGNED.ranks[0], &BUCKETS_SIGNED.ranks[0], &BUCKETS_SIGNED.ranks[1]];
    table(
        &format!("uint8_t NEAREST_RANKS[3][{BUCKETS}]"),
        &ranks.map(|row| format!("    {{{row:?}}}").replace(['[', ']'], "")),
    );
    let _ = writeln!(text, "constexpr int BUCKETS = {BUCKETS}, BUCKET_SHIFT = {BUCKET_SHIFT};");
    let _ = writeln!(text, "constexpr uint32_t MAGNITUDE_MIN = {MAGNITUDE_MIN};");
    text
}

/// One of 30 equal parts of [-1, 1]; two more for the remaining lanes.
#[derive(Clone, Copy)]
struct Bin {
    threshold: f32,
    /// the code up to the threshold, and four bits higher the one above it
    codes: u32,
}

/// Useless where a part holds several thresholds, as fp4's do about zero: those are searched.
fn bins(ranks: &Ranks) -> [Bin; 32] {
    std::array::from_fn(|i| {
        let edge = |i: usize| i as f32 / 15.0 - 1.0;
        let rank = ranks.thresholds.iter().filter(|&&threshold| threshold < edge(i)).count();
        let inside = ranks.thresholds.get(rank).copied().filter(|&threshold| threshold < edge(i + 1));
        let above = rank + usize::from(inside.is_some());
        let codes = u32::from(ranks.order[rank]) | u32::from(ranks.order[above]) << 4;
        Bin { threshold: inside.unwrap_or(f32::INFINITY), codes }
    })
}

/// The largest value that the grid rule encodes to `code` or less: every step of the rule is monotonic, so 255 of these
/// are the whole rule.
fn grid_threshold(code: usize) -> f32 {
    let (mut low, mut high) = (-1.0f32, 1.0f32);
    while low.next_up() < high {
        let between = low + 0.5 * (high - low);
        let middle = if low < between && between < high { between } else { low.next_up() };
        if usize::from(encode_grid(middle)) <= code { low = middle } else { high = middle }
    }
    low
}

/// A lane for every threshold; the sixteenth is never read.
fn padded(thresholds: &[f32; 15]) -> [f32; 16] {
    std::array::from_fn(|i| thresholds.get(i).copied().unwrap_or(0.0))
}

fn floats(row: &[f32]) -> String {
    format!("    {{{}}}", row.iter().copied().map(float).collect::<Vec<_>>().join(", "))
}

/// Shortest decimal that reads back as the same fp32.
fn float(value: f32) -> String {
    if value == f32::INFINITY { "__builtin_huge_valf()".to_string() } else { format!("{value:e}f") }
}
