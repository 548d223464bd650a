//! `draw`: the next token of each row of scores, by temperature, top-k, top-p and min-p; only the row decides.
//!
//! ```text
//! x_i     = (max_j s_j - s_i) min(1 / temperature, f32::MAX)     fp32: the likelihood is exp(-x), up to a constant
//! limit_k = the top_k-th smallest x                              inf where there are fewer tokens
//! q_i     = round(2^27 exp(-x_i))
//! limit_p = the smallest x so that sum of q_i, x_i <= x, reaches ceil(top_p sum of q_i, x_i <= limit_k)
//! limit   = min(limit_k, limit_p, -ln(min_p))                    tokens as likely as the last one stay, too
//! w_i     = round(2^40 exp(-x_i)) where x_i <= limit, else 0
//! token   = the first one whose sum of w_j, j <= i, exceeds floor(u sum of w)
//! u       = splitmix64(key + length 0x9e3779b97f4a7c15) >> 16, of 2^48
//! ```
//!
//! Whole numbers make the sums exact, so that their order does not matter. Temperature 0 takes the first of the largest
//! scores. A row whose largest score is not finite, or that holds NaN, gives -1, and 0 to go on with.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "draw";

/// Longest row, so that its sums fit.
pub const MAX_VOCAB: usize = 1 << 18;
/// Fractional bits of what top-p adds.
pub const SHARE_BITS: u32 = 27;
/// Fractional bits of what is drawn by.
pub const WEIGHT_BITS: u32 = 40;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What decides beside the scores.
#[derive(Debug, Clone, Copy)]
pub struct Choice<'a> {
    /// f32 `[rows, 3]`: temperature, top_p, min_p
    pub settings: TensorRef<'a>,
    /// i32 `[rows]`; off from vocab on
    pub top_k: TensorRef<'a>,
    /// i32 `[rows, 2]`: 64 bits, the low ones first
    pub keys: TensorRef<'a>,
    /// i32 `[rows]`: added to the row's length
    pub running: TensorRef<'a>,
}

/// What is written.
#[derive(Debug)]
pub struct Drawn<'a> {
    /// i32 `[rows]`: tokens before the drawn one, before; those and `running`, afterwards
    pub lengths: TensorMut<'a>,
    /// i32 `[rows]`: to go on with
    pub tokens: TensorMut<'a>,
    /// i32 `[rows]`: the same, or -1
    pub reported: TensorMut<'a>,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct Draw<'a> {
    /// floats `[rows, vocab]`
    pub scores: TensorRef<'a>,
    pub choice: Choice<'a>,
    pub drawn: Drawn<'a>,
}

impl<'a> Draw<'a> {
    pub fn new(scores: TensorRef<'a>, choice: Choice<'a>, drawn: Drawn<'a>) -> Result<Self> {
        let rows = drawn.tokens.numel();
        arg(OP, "scores", scores).float()?;
        let vocab = scores.numel().checked_div(rows).unwrap_or(1);
        if rows * vocab != scores.numel() || !(1..=MAX_VOCAB).contains(&vocab) {
            let got = format!("{} scores for {rows} tokens", scores.numel());
            return Err(Error::Argument { op: OP, name: "scores", expected: "rows of 1 to 2^18", got });
        }
        let device = scores.device();
        let settings = arg(OP, "settings", choice.settings).dtype(DType::F32)?;
        settings.numel(3 * rows, "three a row")?.on(device, "scores")?;
        let int =
            |name, tensor, numel, why| arg(OP, name, tensor).dtype(DType::I32)?.numel(numel, why)?.on(device, "scores");
        int("top_k", choice.top_k, rows, "one a row")?;
        int("keys", choice.keys, 2 * rows, "two a row")?;
        int("running", choice.running, rows, "one a row")?;
        int("lengths", drawn.lengths.as_ref(), rows, "one a row")?;
        int("tokens", drawn.tokens.as_ref(), rows, "one a row")?;
        int("reported", drawn.reported.as_ref(), rows, "one a row")?;
        Ok(Self { scores, choice, drawn })
    }

    pub fn vocab(&self) -> usize {
        self.scores.numel().checked_div(self.drawn.tokens.numel()).unwrap_or(1)
    }

    pub(crate) fn run_on_cpu(self) {
        with_float!(self.scores.dtype(), T => self.run::<T>())
    }

    fn run<T: Float>(self) {
        let vocab = self.vocab();
        let Choice { settings, top_k, keys, running } = self.choice;
        let (scores, settings): (&[T], &[f32]) = (self.scores.as_slice(), settings.as_slice());
        let (top_k, keys, running): (&[i32], &[i32], &[i32]) = (top_k.as_slice(), keys.as_slice(), running.as_slice());
        let lengths: &mut [i32] = self.drawn.lengths.into_slice();
        let tokens: &mut [i32] = self.drawn.tokens.into_slice();
        let reported: &mut [i32] = self.drawn.reported.into_slice();
        let rows = tokens.len();
        let written = lengths.iter_mut().zip(tokens).zip(reported).enumerate();
        parallel::for_each(written, rows, |(row, ((length, token), reported))| {
            let &[temperature, top_p, min_p] = &settings[3 * row..][..3] else { unreachable!("three a row") };
            let filters = Filters { temperature, top_k: top_k[row].max(1) as usize, top_p, min_p };
            let uniform = uniform(long(&keys[2 * row..]), u64::from(*length as u32));
            let scores: Vec<f32> = scores[row * vocab..][..vocab].iter().map(|score| score.to_f32()).collect();
            let place = draw(&scores, filters, uniform);
            *reported = place.map_or(-1, |place| place as i32);
            *token = place.unwrap_or(0) as i32;
            *length += running[row];
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

/// 48 bits that depend on nothing but key and length: splitmix64 (Steele, Lea, Flood 2014).
fn uniform(key: u64, length: u64) -> u64 {
    let x = key.wrapping_add(length.wrapping_mul(GOLDEN));
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) >> 16
}

/// exp(-x) in units of 2^-bits; x as its bits, whose order is that of numbers.
fn weight(x: u32, bits: u32) -> u64 {
    (f64::from((-f32::from_bits(x)).exp()) * f64::from(bits).exp2()).round_ties_even() as u64
}

/// The largest score; None where it is not finite or one is NaN. In lanes, so that the compiler can use vectors.
fn largest(scores: &[f32]) -> Option<f32> {
    let (mut largest, mut finite) = ([f32::NEG_INFINITY; 16], [true; 16]);
    for chunk in scores.chunks(16) {
        for ((&score, largest), finite) in chunk.iter().zip(&mut largest).zip(&mut finite) {
            *largest = if score > *largest { score } else { *largest };
            *finite &= score < f32::INFINITY;
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (finite == [true; 16] && largest > f32::NEG_INFINITY).then_some(largest)
}

fn draw(scores: &[f32], filters: Filters, uniform: u64) -> Option<usize> {
    let largest = largest(scores)?;
    if filters.temperature == 0.0 {
        return scores.iter().position(|&score| score == largest);
    }
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
    Some(reached.into_iter().position(|sum| sum > target).unwrap_or(0))
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
