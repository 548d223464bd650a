//! `draw`: a token for each row of scores, by temperature, top-k, top-p and min-p; only the row decides.
//!
//! ```text
//! x_i     = (max_j s_j - s_i) min(1 / temperature, f32::MAX)     fp32: the likelihood is exp(-x), up to a constant
//! limit_k = the top_k-th smallest x                              inf where there are fewer tokens
//! q_i     = round(2^27 exp(-x_i))
//! limit_p = the smallest x so that sum of q_i, x_i <= x, reaches ceil(top_p sum of q_i, x_i <= limit_k)
//! limit   = min(limit_k, limit_p, -ln(min_p))                    tokens as likely as the last one stay, too
//! w_i     = round(2^40 exp(-x_i)) where x_i <= limit, else 0
//! token   = the first one whose sum of w_j, j <= i, exceeds floor(u sum of w)
//! u       = splitmix64(key + position 0x9e3779b97f4a7c15) >> 16, of 2^48
//! ```
//!
//! Whole numbers make the sums exact, so that their order does not matter. Where scores are not finite some token of
//! the row is drawn.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::tensor::{DType, TensorMut, TensorRef};

const OP: &str = "draw";

/// Longest row, so that its sums fit.
pub const MAX_VOCAB: usize = 1 << 18;
/// Fractional bits of what top-p adds.
pub const SHARE_BITS: u32 = 27;
/// Fractional bits of what is drawn by.
pub const WEIGHT_BITS: u32 = 40;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Debug)]
#[non_exhaustive]
pub struct Draw<'a> {
    /// f32 `[rows, vocab]`
    pub scores: TensorRef<'a>,
    /// f32 `[rows, 3]`: temperature, top_p, min_p
    pub settings: TensorRef<'a>,
    /// i32 `[rows]`; off from vocab on
    pub top_k: TensorRef<'a>,
    /// i32 `[rows, 2]`: 64 bits, the low ones first
    pub keys: TensorRef<'a>,
    /// as keys
    pub positions: TensorRef<'a>,
    /// i32 `[rows]`
    pub tokens: TensorMut<'a>,
}

impl<'a> Draw<'a> {
    pub fn new(
        scores: TensorRef<'a>,
        settings: TensorRef<'a>,
        top_k: TensorRef<'a>,
        keys: TensorRef<'a>,
        positions: TensorRef<'a>,
        tokens: TensorMut<'a>,
    ) -> Result<Self> {
        let rows = tokens.numel();
        arg(OP, "scores", scores).dtype(DType::F32)?;
        let vocab = scores.numel().checked_div(rows).unwrap_or(1);
        if rows * vocab != scores.numel() || !(1..=MAX_VOCAB).contains(&vocab) {
            let got = format!("{} scores for {rows} tokens", scores.numel());
            return Err(Error::Argument { op: OP, name: "scores", expected: "rows of 1 to 2^18", got });
        }
        let device = scores.device();
        arg(OP, "settings", settings).dtype(DType::F32)?.numel(3 * rows, "three a row")?.on(device, "scores")?;
        let int =
            |name, tensor, numel, why| arg(OP, name, tensor).dtype(DType::I32)?.numel(numel, why)?.on(device, "scores");
        int("top_k", top_k, rows, "one a row")?;
        int("keys", keys, 2 * rows, "two a row")?;
        int("positions", positions, 2 * rows, "two a row")?;
        int("tokens", tokens.as_ref(), rows, "one a row")?;
        Ok(Self { scores, settings, top_k, keys, positions, tokens })
    }

    pub fn vocab(&self) -> usize {
        self.scores.numel().checked_div(self.tokens.numel()).unwrap_or(1)
    }

    pub(crate) fn run_on_cpu(self) {
        let vocab = self.vocab();
        let (scores, settings): (&[f32], &[f32]) = (self.scores.as_slice(), self.settings.as_slice());
        let top_k: &[i32] = self.top_k.as_slice();
        let (keys, positions): (&[i32], &[i32]) = (self.keys.as_slice(), self.positions.as_slice());
        let tokens: &mut [i32] = self.tokens.into_slice();
        let rows = tokens.len();
        parallel::for_each(tokens.iter_mut().enumerate(), rows, |(row, token)| {
            let &[temperature, top_p, min_p] = &settings[3 * row..][..3] else { unreachable!("three a row") };
            let filters = Filters { temperature, top_k: top_k[row].max(1) as usize, top_p, min_p };
            let uniform = uniform(long(&keys[2 * row..]), long(&positions[2 * row..]));
            *token = draw(&scores[row * vocab..][..vocab], filters, uniform) as i32;
        });
    }
}

struct Filters {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
}

fn long(words: &[i32]) -> u64 {
    u64::from(words[0] as u32) | (u64::from(words[1] as u32) << 32)
}

/// 48 bits that depend on nothing but key and position: splitmix64 (Steele, Lea, Flood 2014).
fn uniform(key: u64, position: u64) -> u64 {
    let x = key.wrapping_add(position.wrapping_mul(GOLDEN));
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) >> 16
}

/// exp(-x) in units of 2^-bits; x as its bits, whose order is that of numbers.
fn weight(x: u32, bits: u32) -> u64 {
    (f64::from((-f32::from_bits(x)).exp()) * f64::from(bits).exp2()).round_ties_even() as u64
}

fn draw(scores: &[f32], filters: Filters, uniform: u64) -> usize {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let inverse = (1.0 / filters.temperature).min(f32::MAX);
    let x: Vec<u32> = scores.iter().map(|score| ((largest - score) * inverse).abs().to_bits()).collect();
    let limit = limit(&x, &filters);
    let weights = || x.iter().map(|&x| if x <= limit { weight(x, WEIGHT_BITS) } else { 0 });
    let total: u64 = weights().sum();
    let target = ((u128::from(uniform) * u128::from(total)) >> 48) as u64;
    let reached = weights().scan(0, |sum, weight| {
        *sum += weight;
        Some(*sum)
    });
    reached.into_iter().position(|sum| sum > target).unwrap_or(0)
}

/// The largest x that is kept.
fn limit(x: &[u32], filters: &Filters) -> u32 {
    let mut kept = x.to_vec();
    if filters.top_k < x.len() {
        let (_, &mut last, _) = kept.select_nth_unstable(filters.top_k - 1);
        kept.retain(|&x| x <= last);
    }
    let least_likely = (-filters.min_p.ln()).abs().to_bits();
    if filters.top_p < 1.0 {
        kept.sort_unstable();
        let total: u64 = kept.iter().map(|&x| weight(x, SHARE_BITS)).sum();
        let goal = (f64::from(filters.top_p) * total as f64).ceil() as u64;
        let mut sum = 0;
        let reaches = |&x: &u32| {
            sum += weight(x, SHARE_BITS);
            sum >= goal.max(1)
        };
        if let Some(limit) = kept.iter().copied().find(reaches) {
            return limit.min(least_likely);
        }
    }
    kept.into_iter().max().map_or(least_likely, |limit| limit.min(least_likely))
}
