//! halfbyte-core's codebooks as a device header, so that they are written in one place only.

use std::fmt::Write;

use halfbyte_core::codebook::{
    DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, FP4, FP4_RANKS, INT4, INT4_RANKS, NEAREST_SIGNED, NEAREST_UNSIGNED, NF4,
    NF4_RANKS, Ranks, encode_first_moment, encode_grid, encode_nearest,
};
use halfbyte_core::ops::quantize_4bit::ABSMAX_MIN;

/// Rows follow the order of `QuantType`, and of unsigned, signed.
pub fn header() -> String {
    let ranks: [&Ranks; 3] = [&NF4_RANKS, &FP4_RANKS, &INT4_RANKS];
    let mut text = String::from("#pragma once\n#include <stdint.h>\n\n");
    let _ = writeln!(text, "constexpr float ABSMAX_MIN = {};", float(ABSMAX_MIN));
    let mut table = |declaration: &str, rows: &[String]| text.push_str(&definition(declaration, rows));
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
    text
}

/// Tables of entries.cuh, which only those who read them take into their image.
pub fn entry_tables() -> String {
    let mut text = String::from("#pragma once\n#include <stdint.h>\n\n");
    let mut table = |name, entries: Vec<u32>| {
        let row = format!("    {{{entries:?}}}").replace(['[', ']'], "");
        text.push_str(&definition(&format!("uint32_t __align__(16) {name}[1][{}]", entries.len()), &[row]));
    };
    table("FIRST_MOMENT_ENTRIES", signed_entries(encode_first_moment));
    table("SECOND_MOMENT_ENTRIES", unsigned_entries(|x| encode_nearest(false, x)));
    table("GRID_ENTRIES", signed_entries(encode_grid));
    let _ = writeln!(text, "constexpr int SIGNED_SHIFT = {SIGNED_SHIFT}, SIGNED_ENTRIES = {SIGNED_ENTRIES};");
    let _ = writeln!(text, "constexpr int UNSIGNED_SHIFT = {UNSIGNED_SHIFT}, UNSIGNED_ENTRIES = {UNSIGNED_ENTRIES};");
    text
}

fn definition(declaration: &str, rows: &[String]) -> String {
    format!("static __device__ const {declaration} = {{\n{}\n}};\n", rows.join(",\n"))
}

const SIGNED_SHIFT: u32 = 17;
/// By the 12 bits from `SIGNED_SHIFT` on, which of positive values are the exponent's lowest five and six of the
/// mantissa behind a zero; all bits of negative values are flipped.
const SIGNED_ENTRIES: u32 = 1 << 12;
const UNSIGNED_SHIFT: u32 = 16;
/// Up to one, and a multiple of four.
const UNSIGNED_ENTRIES: u32 = (24 << (23 - UNSIGNED_SHIFT)) + 4;

fn signed_entries(code: fn(f32) -> u8) -> Vec<u32> {
    let of_bits = |bits: u32| {
        let negative = bits >> (SIGNED_SHIFT + 11) != 0;
        // What became zero from below is negative still.
        code(if negative { -scaled(!(bits | 0xf << 28)).max(2f32.powi(-24)) } else { scaled(bits) })
    };
    entries(SIGNED_ENTRIES, SIGNED_SHIFT, of_bits)
}

fn unsigned_entries(code: fn(f32) -> u8) -> Vec<u32> {
    entries(UNSIGNED_ENTRIES, UNSIGNED_SHIFT, |bits| code(scaled(bits)))
}

/// Before the device multiplied it.
fn scaled(bits: u32) -> f32 {
    f32::from_bits(bits) * 2f32.powi(103)
}

/// Entries for values that agree in all but their lowest `shift` bits, among which one threshold may lie. Those bits,
/// the highest of them moved to the 24th, are added and carry into the top byte, the code.
fn entries(count: u32, shift: u32, code: impl Fn(u32) -> u8) -> Vec<u32> {
    let entry = |i: u32| {
        let (first, values) = (i << shift, 1 << shift);
        let low = code(first);
        let (mut above, mut end) = (1, values); // the first value of the next code
        while above < end {
            let middle = (above + end) / 2;
            if code(first + middle) == low { above = middle + 1 } else { end = middle }
        }
        assert_eq!(code(first + values - 1), low + u8::from(above < values), "more than one threshold at {i}");
        (u32::from(low) << 24).wrapping_add((values - above) << (24 - shift)).wrapping_sub(i << 24)
    };
    (0..count).map(entry).collect()
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
