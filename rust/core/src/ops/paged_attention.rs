//! `paged_attention`: one new token a row: rotates its query and key, appends key and value to the paged cache, and
//! attends over what the row has cached, the new token included.
//!
//! ```text
//! p        = lengths[b] - 1                                     position of the new token
//! slot(t)  = tables[b, t / BLOCK] * BLOCK + t % BLOCK
//! rot(x)_i = round(round(x_i cos_i) + round(x_(i + D/2 mod D) sin_i))
//! keys[slot(p)] = rot(k[b]), values[slot(p)] = v[b]
//! out[b, h] = sum_t softmax_t(rot(q[b, h]) keys[slot(t), h / group] / sqrt(D)) values[slot(t), h / group]
//! ```
//!
//! over t from 0, or from p + 1 - window where a window is given, to p. round: to the tensors' dtype; all else is fp32
//! and rounded once. The order of the sums is the backend's own, but fixed: it depends on the row's own length and
//! window only, never on the batch. A length past the table's end counts as the table's length, a block past the
//! cache's end as its last; rows that share a block they append to get one of the
//! values.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::simd::Simd;
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "paged_attention";

/// Tokens of a block of the cache.
pub const BLOCK: usize = 16;
/// Longest head.
pub const MAX_HEAD_DIM: usize = 256;
/// Most parts that a backend may cut a row's context into, each with partial results of its own.
pub const MAX_PARTS: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// blocks of the cache
    pub blocks: usize,
    /// blocks that a row's table lists
    pub table: usize,
}

impl AttentionShape {
    /// Query heads of one key head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of `partials`: for each part of a head, sums over values, their weight and the largest score.
    pub fn partials(&self) -> usize {
        self.batch * self.heads * MAX_PARTS * (self.head_dim + 2)
    }
}

/// What is read; all floats have one dtype.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInputs<'a> {
    /// `[B, heads, D]`
    pub q: TensorRef<'a>,
    /// `[B, kv_heads, D]`
    pub k: TensorRef<'a>,
    /// `[B, kv_heads, D]`
    pub v: TensorRef<'a>,
    /// `[B, D]`
    pub cos: TensorRef<'a>,
    /// `[B, D]`
    pub sin: TensorRef<'a>,
    /// i32 `[B, table]`
    pub tables: TensorRef<'a>,
    /// i32 `[B]`, tokens with the new one
    pub lengths: TensorRef<'a>,
}

/// What is written.
#[derive(Debug)]
pub struct AttentionOutputs<'a> {
    /// q's dtype `[blocks, BLOCK, kv_heads, D]`
    pub keys: TensorMut<'a>,
    /// q's dtype `[blocks, BLOCK, kv_heads, D]`
    pub values: TensorMut<'a>,
    /// f32 `[AttentionShape::partials]`; scratch
    pub partials: TensorMut<'a>,
    /// i32 `[B, heads]`; zeros, before and after
    pub arrived: TensorMut<'a>,
    /// q's dtype `[B, heads, D]`
    pub out: TensorMut<'a>,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct PagedAttention<'a> {
    pub inputs: AttentionInputs<'a>,
    pub outputs: AttentionOutputs<'a>,
    /// most tokens that are attended to; 0: all
    pub window: usize,
    pub shape: AttentionShape,
}

impl<'a> PagedAttention<'a> {
    pub fn new(
        inputs: AttentionInputs<'a>,
        outputs: AttentionOutputs<'a>,
        window: usize,
        shape: AttentionShape,
    ) -> Result<Self> {
        check_shape(shape)?;
        let AttentionShape { batch, heads, kv_heads, head_dim, blocks, table } = shape;
        let (dtype, device) = (inputs.q.dtype(), inputs.q.device());
        arg(OP, "q", inputs.q).float()?.numel(batch * heads * head_dim, "batch x heads x head_dim")?;
        let float = |name, tensor, numel, why| arg(OP, name, tensor).dtype(dtype)?.numel(numel, why)?.on(device, "q");
        let kv_why = "batch x kv_heads x head_dim";
        float("k", inputs.k, batch * kv_heads * head_dim, kv_why)?;
        float("v", inputs.v, batch * kv_heads * head_dim, kv_why)?;
        float("cos", inputs.cos, batch * head_dim, "batch x head_dim")?;
        float("sin", inputs.sin, batch * head_dim, "batch x head_dim")?;
        let int =
            |name, tensor, numel, why| arg(OP, name, tensor).dtype(DType::I32)?.numel(numel, why)?.on(device, "q");
        int("tables", inputs.tables, batch * table, "batch x blocks of a row")?;
        int("lengths", inputs.lengths, batch, "one a row")?;
        let cache = blocks * BLOCK * kv_heads * head_dim;
        let cache_why = "blocks x 16 x kv_heads x head_dim";
        float("keys", outputs.keys.as_ref(), cache, cache_why)?;
        float("values", outputs.values.as_ref(), cache, cache_why)?;
        float("out", outputs.out.as_ref(), batch * heads * head_dim, "that of q")?;
        int("arrived", outputs.arrived.as_ref(), batch * heads, "batch x heads")?;
        let partials = arg(OP, "partials", outputs.partials.as_ref()).dtype(DType::F32)?;
        partials.numel(shape.partials(), "batch x heads x 32 x (head_dim + 2)")?.on(device, "q")?;
        Ok(Self { inputs, outputs, window, shape })
    }
}

fn check_shape(shape: AttentionShape) -> Result<()> {
    let fail = |name, expected, got: usize| Err(Error::Argument { op: OP, name, expected, got: got.to_string() });
    if shape.kv_heads == 0 || shape.heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return fail("heads", "a multiple of kv_heads, both >= 1", shape.heads);
    }
    if shape.head_dim == 0 || !shape.head_dim.is_multiple_of(2) || shape.head_dim > MAX_HEAD_DIM {
        return fail("head_dim", "even and in 2..=256", shape.head_dim);
    }
    if shape.blocks == 0 || shape.table == 0 {
        return fail("blocks", "at least one in the cache and in a row's table", shape.blocks.min(shape.table));
    }
    Ok(())
}

impl PagedAttention<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.inputs.q.dtype(), T => self.run::<T>(simd))
    }

    fn run<T: Float>(self, simd: Simd) {
        let (shape, AttentionInputs { q, k, v, cos, sin, tables, lengths }) = (self.shape, self.inputs);
        let (q, k, v): (&[T], &[T], &[T]) = (q.as_slice(), k.as_slice(), v.as_slice());
        let (cos, sin): (&[T], &[T]) = (cos.as_slice(), sin.as_slice());
        let rows = Rows { tables: tables.as_slice(), lengths: lengths.as_slice(), shape, window: self.window };
        let keys: &mut [T] = self.outputs.keys.into_slice();
        let values: &mut [T] = self.outputs.values.into_slice();
        let (d, kv_heads, group) = (shape.head_dim, shape.kv_heads, shape.group());
        let turn = |row: usize| Rotation { cos: &cos[row * d..][..d], sin: &sin[row * d..][..d] };
        for row in (0..shape.batch).filter(|&row| rows.length(row) > 0) {
            let slot = rows.slot(row, rows.length(row) - 1);
            for head in 0..kv_heads {
                let (from, to) = ((row * kv_heads + head) * d, (slot * kv_heads + head) * d);
                turn(row).rotate(&k[from..][..d], &mut keys[to..][..d]);
                values[to..][..d].copy_from_slice(&v[from..][..d]);
            }
        }
        let (keys, values): (&[T], &[T]) = (keys, values);
        let out: &mut [T] = self.outputs.out.into_slice();
        let chunks = out.chunks_mut(group * d).enumerate();
        parallel::for_each(chunks, shape.batch * kv_heads, |(i, out)| {
            let (row, head) = (i / kv_heads, i % kv_heads);
            let mut rotated = vec![T::from_f32(0.0); group * d];
            for (q, rotated) in q[i * group * d..].chunks(d).zip(rotated.chunks_mut(d)) {
                turn(row).rotate(q, rotated);
            }
            let at = |t: usize| (rows.slot(row, t) * kv_heads + head) * d;
            let (key, value) = (|t| &keys[at(t)..][..d], |t| &values[at(t)..][..d]);
            match simd {
                // SAFETY: the level was detected.
                #[cfg(target_arch = "x86_64")]
                Simd::Avx512 => unsafe { attend_avx512(&rotated, rows.span(row), key, value, out) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Simd::Avx2 => unsafe { attend_avx2(&rotated, rows.span(row), key, value, out) },
                _ => attend(&rotated, rows.span(row), key, value, out),
            }
        });
    }
}

/// Where the rows' tokens lie.
struct Rows<'a> {
    tables: &'a [i32],
    lengths: &'a [i32],
    shape: AttentionShape,
    window: usize,
}

impl Rows<'_> {
    fn length(&self, row: usize) -> usize {
        (self.lengths[row].max(0) as usize).min(self.shape.table * BLOCK)
    }

    fn span(&self, row: usize) -> std::ops::Range<usize> {
        let length = self.length(row);
        let first = if self.window == 0 { 0 } else { length.saturating_sub(self.window) };
        first..length
    }

    fn slot(&self, row: usize, t: usize) -> usize {
        let block = self.tables[row * self.shape.table + t / BLOCK].max(0) as usize;
        block.min(self.shape.blocks - 1) * BLOCK + t % BLOCK
    }
}

struct Rotation<'a, T> {
    cos: &'a [T],
    sin: &'a [T],
}

impl<T: Float> Rotation<'_, T> {
    fn rotate(&self, x: &[T], out: &mut [T]) {
        let half = x.len() / 2;
        let round = |value: f32| T::from_f32(value).to_f32();
        for (i, out) in out.iter_mut().enumerate() {
            let partner = x[if i < half { i + half } else { i - half }];
            let (a, b) = (x[i].to_f32() * self.cos[i].to_f32(), partner.to_f32() * self.sin[i].to_f32());
            *out = T::from_f32(round(a) + round(b));
        }
    }
}

/// [`attend`] in the compiler's vectors of 512 bits; the same operations in the same order, hence the same bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn attend_avx512<'a, T: Float>(
    q: &[T],
    span: std::ops::Range<usize>,
    key: impl Fn(usize) -> &'a [T],
    value: impl Fn(usize) -> &'a [T],
    out: &mut [T],
) {
    attend(q, span, key, value, out);
}

/// [`attend`] in the compiler's vectors of 256 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn attend_avx2<'a, T: Float>(
    q: &[T],
    span: std::ops::Range<usize>,
    key: impl Fn(usize) -> &'a [T],
    value: impl Fn(usize) -> &'a [T],
    out: &mut [T],
) {
    attend(q, span, key, value, out);
}

/// out `[group, D]` of the rotated queries `[group, D]` over the tokens of `span`; zeros where there are none.
#[inline(always)]
fn attend<'a, T: Float>(
    q: &[T],
    span: std::ops::Range<usize>,
    key: impl Fn(usize) -> &'a [T],
    value: impl Fn(usize) -> &'a [T],
    out: &mut [T],
) {
    let d = key(span.start).len();
    let group = q.len() / d;
    let scale = 1.0 / (d as f32).sqrt();
    let q: Vec<f32> = q.iter().map(|q| q.to_f32()).collect();
    let mut wide = vec![0.0; d];
    let mut scores = vec![0.0; group * span.len()];
    for (t, scores) in span.clone().zip(scores.chunks_mut(group)) {
        widen(key(t), &mut wide);
        for (q, score) in q.chunks(d).zip(scores) {
            *score = dot(q, &wide) * scale;
        }
    }
    let largest = |head: usize| scores.iter().skip(head).step_by(group).copied().fold(f32::NEG_INFINITY, f32::max);
    let largest: Vec<f32> = (0..group).map(largest).collect();
    let (mut sums, mut weights) = (vec![0.0; group * d], vec![0.0; group]);
    for (t, scores) in span.zip(scores.chunks(group)) {
        widen(value(t), &mut wide);
        for head in 0..group {
            let weight = (scores[head] - largest[head]).exp();
            weights[head] += weight;
            sums[head * d..][..d].iter_mut().zip(&wide).for_each(|(sum, value)| *sum += weight * value);
        }
    }
    for (i, out) in out.iter_mut().enumerate() {
        let weight = weights[i / d];
        *out = T::from_f32(if weight > 0.0 || weight.is_nan() { sums[i] / weight } else { 0.0 });
    }
}

#[inline(always)]
fn widen<T: Float>(from: &[T], to: &mut [f32]) {
    from.iter().zip(to).for_each(|(from, to)| *to = from.to_f32());
}

/// Sixteen partial sums, so that the compiler can use vector registers of any width.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..16 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest
}
