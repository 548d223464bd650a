//! halfbyte-core's codebooks as a device header, so that they are written in one place only.

use std::fmt::Write;

use halfbyte_core::codebook::{
    DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, FP4, FP4_RANKS, INT4, INT4_RANKS, NEAREST_SIGNED, NEAREST_UNSIGNED, NF4,
    NF4_RANKS, Ranks,
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
    table("float DYNAMIC_MAP[2][256]", &[&DYNAMIC_UNSIGNED, &DYNAMIC_SIGNED].map(|row| floats(row)));
    table("float NEAREST_THRESHOLDS[2][255]", &[&NEAREST_UNSIGNED, &NEAREST_SIGNED].map(|row| floats(row)));
    text
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
