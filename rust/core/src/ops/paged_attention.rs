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
//!
//! A cache of codes holds a byte for each element, and a scale for each token and head, of keys and of values:
//!
//! ```text
//! scale   = max_i |x_i| / 127
//! code_i  = 128 + clamp(round(x_i / scale), -127, 127)          round: half to even; NaN: 0
//! x_i    ~= (code_i - 128) scale
//! ```

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

/// Of a cache of codes: f32 `[blocks, kv_heads, BLOCK]` each.
#[derive(Debug)]
pub struct CodeScales<'a> {
    pub keys: TensorMut<'a>,
    pub values: TensorMut<'a>,
}

/// What is written.
#[derive(Debug)]
pub struct AttentionOutputs<'a> {
    /// q's dtype, or u8 of codes, `[blocks, BLOCK, kv_heads, D]`
    pub keys: TensorMut<'a>,
    /// as keys
    pub values: TensorMut<'a>,
    pub scales: Option<CodeScales<'a>>,
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
        let cached = |name, tensor, dtype| arg(OP, name, tensor).dtype(dtype)?.numel(cache, cache_why)?.on(device, "q");
        let cache_dtype = if outputs.scales.is_some() { DType::U8 } else { dtype };
        cached("keys", outputs.keys.as_ref(), cache_dtype)?;
        cached("values", outputs.values.as_ref(), cache_dtype)?;
        if let Some(CodeScales { keys, values }) = &outputs.scales {
            let scales = |name, tensor| {
                let scales = arg(OP, name, tensor).dtype(DType::F32)?;
                scales.numel(blocks * kv_heads * BLOCK, "blocks x kv_heads x 16")?.on(device, "q")
            };
            scales("key_scales", keys.as_ref())?;
            scales("value_scales", values.as_ref())?;
        }
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
        let (key_scales, value_scales) = self.outputs.scales.map(|scales| (scales.keys, scales.values)).unzip();
        let mut keys = Cached::<T>::new(self.outputs.keys, key_scales, shape);
        let mut values = Cached::<T>::new(self.outputs.values, value_scales, shape);
        let (d, kv_heads, group) = (shape.head_dim, shape.kv_heads, shape.group());
        let turn = |row: usize| Rotation { cos: &cos[row * d..][..d], sin: &sin[row * d..][..d] };
        let mut rotated = vec![T::from_f32(0.0); d];
        for row in (0..shape.batch).filter(|&row| rows.length(row) > 0) {
            let slot = rows.slot(row, rows.length(row) - 1);
            for head in 0..kv_heads {
                let from = (row * kv_heads + head) * d;
                turn(row).rotate(&k[from..][..d], &mut rotated);
                keys.put(slot, head, &rotated);
                values.put(slot, head, &v[from..][..d]);
            }
        }
        let out: &mut [T] = self.outputs.out.into_slice();
        let chunks = out.chunks_mut(group * d).enumerate();
        parallel::for_each(chunks, shape.batch * kv_heads, |(i, out)| {
            let (row, head) = (i / kv_heads, i % kv_heads);
            let mut rotated = vec![T::from_f32(0.0); group * d];
            for (q, rotated) in q[i * group * d..].chunks(d).zip(rotated.chunks_mut(d)) {
                turn(row).rotate(q, rotated);
            }
            let tokens = Tokens { keys: &keys, values: &values, rows: &rows, row, head };
            match simd {
                // SAFETY: the level was detected.
                #[cfg(target_arch = "x86_64")]
                Simd::Avx512 => unsafe { attend_avx512(&rotated, tokens, out) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Simd::Avx2 => unsafe { attend_avx2(&rotated, tokens, out) },
                _ => attend(&rotated, tokens, out),
            }
        });
    }
}

/// All keys or all values of the cache.
enum Cached<'a, T> {
    Plain { elements: &'a mut [T], shape: AttentionShape },
    Codes { codes: &'a mut [u8], scales: &'a mut [f32], shape: AttentionShape },
}

impl<'a, T: Float> Cached<'a, T> {
    fn new(elements: TensorMut<'a>, scales: Option<TensorMut<'a>>, shape: AttentionShape) -> Self {
        match scales {
            None => Self::Plain { elements: elements.into_slice(), shape },
            Some(scales) => Self::Codes { codes: elements.into_slice(), scales: scales.into_slice(), shape },
        }
    }

    fn put(&mut self, slot: usize, head: usize, x: &[T]) {
        match self {
            Self::Plain { elements, shape } => {
                elements[first_element(shape, slot, head)..][..x.len()].copy_from_slice(x)
            }
            Self::Codes { codes, scales, shape } => {
                scales[scale_place(shape, slot, head)] = encode(x, &mut codes[first_element(shape, slot, head)..]);
            }
        }
    }

    #[inline(always)]
    fn read(&self, slot: usize, head: usize, out: &mut [f32]) {
        match self {
            Self::Plain { elements, shape } => {
                let x = &elements[first_element(shape, slot, head)..];
                x.iter().zip(out).for_each(|(x, out)| *out = x.to_f32());
            }
            Self::Codes { codes, scales, shape } => {
                let scale = scales[scale_place(shape, slot, head)];
                let codes = &codes[first_element(shape, slot, head)..];
                codes.iter().zip(out).for_each(|(&code, out)| *out = (f32::from(code) - 128.0) * scale);
            }
        }
    }
}

#[inline(always)]
fn first_element(shape: &AttentionShape, slot: usize, head: usize) -> usize {
    (slot * shape.kv_heads + head) * shape.head_dim
}

#[inline(always)]
fn scale_place(shape: &AttentionShape, slot: usize, head: usize) -> usize {
    (slot / BLOCK * shape.kv_heads + head) * BLOCK + slot % BLOCK
}

/// x as codes; their scale is returned, NaN or Inf where x has one.
fn encode<T: Float>(x: &[T], codes: &mut [u8]) -> f32 {
    let largest = x.iter().map(|x| x.to_f32().abs().to_bits()).max().map_or(0.0, f32::from_bits);
    let scale = largest / 127.0;
    for (x, code) in x.iter().zip(codes) {
        let rounded = (x.to_f32() / scale).round_ties_even() as i32;
        *code = (128 + rounded.clamp(-127, 127)) as u8;
    }
    scale
}

/// The tokens of one row as one key head sees them.
struct Tokens<'a, T> {
    keys: &'a Cached<'a, T>,
    values: &'a Cached<'a, T>,
    rows: &'a Rows<'a>,
    row: usize,
    head: usize,
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
unsafe fn attend_avx512<T: Float>(q: &[T], tokens: Tokens<'_, T>, out: &mut [T]) {
    attend(q, tokens, out);
}

/// [`attend`] in the compiler's vectors of 256 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn attend_avx2<T: Float>(q: &[T], tokens: Tokens<'_, T>, out: &mut [T]) {
    attend(q, tokens, out);
}

/// out `[group, D]` of the rotated queries `[group, D]` over the tokens of their row; zeros where there are none.
#[inline(always)]
fn attend<T: Float>(q: &[T], tokens: Tokens<'_, T>, out: &mut [T]) {
    let Tokens { keys, values, rows, row, head } = tokens;
    let (d, span) = (rows.shape.head_dim, rows.span(row));
    let group = q.len() / d;
    let scale = 1.0 / (d as f32).sqrt();
    let q: Vec<f32> = q.iter().map(|q| q.to_f32()).collect();
    let mut wide = vec![0.0; d];
    let mut scores = vec![0.0; group * span.len()];
    for (t, scores) in span.clone().zip(scores.chunks_mut(group)) {
        keys.read(rows.slot(row, t), head, &mut wide);
        for (q, score) in q.chunks(d).zip(scores) {
            *score = dot(q, &wide) * scale;
        }
    }
    let largest = |head: usize| scores.iter().skip(head).step_by(group).copied().fold(f32::NEG_INFINITY, f32::max);
    let largest: Vec<f32> = (0..group).map(largest).collect();
    let (mut sums, mut weights) = (vec![0.0; group * d], vec![0.0; group]);
    for (t, scores) in span.zip(scores.chunks(group)) {
        values.read(rows.slot(row, t), head, &mut wide);
        for query in 0..group {
            let weight = (scores[query] - largest[query]).exp();
            weights[query] += weight;
            sums[query * d..][..d].iter_mut().zip(&wide).for_each(|(sum, value)| *sum += weight * value);
        }
    }
    for (i, out) in out.iter_mut().enumerate() {
        let weight = weights[i / d];
        *out = T::from_f32(if weight > 0.0 || weight.is_nan() { sums[i] / weight } else { 0.0 });
    }
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
