#![allow(clippy::unwrap_used)]

mod common;

use common::{cast, normal};
use half::{bf16, f16};
use halfbyte_core::ops::paged_attention::{
    AttentionInputs, AttentionOutputs, AttentionShape, BLOCK, CodeScales, PagedAttention,
};
use halfbyte_core::tensor::Float;
use halfbyte_core::{Backend, CpuBackend, Result, TensorMut, TensorRef, parallel};

/// Rows whose blocks lie in turns, with their tensors.
struct Case<T> {
    shape: AttentionShape,
    window: usize,
    lengths: Vec<i32>,
    tables: Vec<i32>,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    cos: Vec<T>,
    sin: Vec<T>,
    keys: Vec<T>,
    values: Vec<T>,
}

impl<T: Float> Case<T> {
    fn new(lengths: &[i32], heads: usize, kv_heads: usize, head_dim: usize, window: usize) -> Self {
        let batch = lengths.len();
        let table = (*lengths.iter().max().unwrap() as usize).div_ceil(BLOCK);
        let blocks = 1 + batch * table;
        let shape = AttentionShape { batch, heads, kv_heads, head_dim, blocks, table };
        let tables = (0..batch * table).map(|i| (1 + i / table + batch * (i % table)) as i32).collect();
        let cache = blocks * BLOCK * kv_heads * head_dim;
        let floats = |n, seed| cast(&normal(n, seed));
        Self {
            shape,
            window,
            lengths: lengths.to_vec(),
            tables,
            q: floats(batch * heads * head_dim, 1),
            k: floats(batch * kv_heads * head_dim, 2),
            v: floats(batch * kv_heads * head_dim, 3),
            cos: floats(batch * head_dim, 4),
            sin: floats(batch * head_dim, 5),
            keys: floats(cache, 6),
            values: floats(cache, 7),
        }
    }

    fn run(&mut self) -> Result<Vec<T>> {
        self.run_over(None)
    }

    /// Over the case's own cache, or over codes and scales of keys and of values.
    fn run_over(&mut self, codes: Option<&mut [(Vec<u8>, Vec<f32>); 2]>) -> Result<Vec<T>> {
        let AttentionShape { batch, heads, head_dim, .. } = self.shape;
        let mut out = vec![T::from_f32(f32::NAN); batch * heads * head_dim];
        let mut partials = vec![0.0f32; self.shape.partials()];
        let mut arrived = vec![0i32; batch * heads];
        let inputs = AttentionInputs {
            q: TensorRef::from_slice(&self.q),
            k: TensorRef::from_slice(&self.k),
            v: TensorRef::from_slice(&self.v),
            cos: TensorRef::from_slice(&self.cos),
            sin: TensorRef::from_slice(&self.sin),
            tables: TensorRef::from_slice(&self.tables),
            lengths: TensorRef::from_slice(&self.lengths),
        };
        let (keys, values, scales) = match codes {
            None => (TensorMut::from_slice(&mut self.keys), TensorMut::from_slice(&mut self.values), None),
            Some([(keys, key_scales), (values, value_scales)]) => {
                let (of_keys, of_values) = (TensorMut::from_slice(key_scales), TensorMut::from_slice(value_scales));
                let scales = CodeScales { keys: of_keys, values: of_values };
                (TensorMut::from_slice(keys), TensorMut::from_slice(values), Some(scales))
            }
        };
        let outputs = AttentionOutputs {
            keys,
            values,
            scales,
            partials: TensorMut::from_slice(&mut partials),
            arrived: TensorMut::from_slice(&mut arrived),
            out: TensorMut::from_slice(&mut out),
        };
        CpuBackend::oracle().paged_attention(PagedAttention::new(inputs, outputs, self.window, self.shape)?)?;
        Ok(out)
    }

    fn rotated(&self, x: &[T], row: usize) -> Vec<T> {
        let d = self.shape.head_dim;
        let round = |value: f32| T::from_f32(value).to_f32();
        (0..d)
            .map(|i| {
                let (cos, sin) = (self.cos[row * d + i].to_f32(), self.sin[row * d + i].to_f32());
                T::from_f32(round(x[i].to_f32() * cos) + round(x[(i + d / 2) % d].to_f32() * sin))
            })
            .collect()
    }

    /// Where token t of a row lies in keys and values, for a key head.
    fn at(&self, row: usize, t: usize, head: usize) -> usize {
        let AttentionShape { kv_heads, head_dim, table, .. } = self.shape;
        let slot = self.tables[row * table + t / BLOCK] as usize * BLOCK + t % BLOCK;
        (slot * kv_heads + head) * head_dim
    }

    /// Output of one head in fp64, from a cache that holds the new token already.
    fn exact(&self, row: usize, head: usize) -> Vec<f64> {
        let AttentionShape { heads, head_dim: d, .. } = self.shape;
        let length = self.lengths[row] as usize;
        let first = if self.window == 0 { 0 } else { length.saturating_sub(self.window) };
        let q = self.rotated(&self.q[(row * heads + head) * d..][..d], row);
        let kv_head = head / self.shape.group();
        let dot = |at: usize| (0..d).map(|i| f64::from(q[i].to_f32()) * f64::from(self.keys[at + i].to_f32())).sum();
        let scores: Vec<f64> = (first..length).map(|t| dot(self.at(row, t, kv_head))).collect();
        let weights: Vec<f64> = scores.iter().map(|score: &f64| (score / (d as f64).sqrt()).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |t: usize, i: usize| f64::from(self.values[self.at(row, t, kv_head) + i].to_f32());
        (0..d).map(|i| (first..length).zip(&weights).map(|(t, w)| w * value(t, i)).sum::<f64>() / total).collect()
    }
}

fn assert_close<T: Float>(heads: usize, kv_heads: usize, head_dim: usize, window: usize, bound: f64) {
    let mut case = Case::<T>::new(&[1, 15, 16, 17, 40], heads, kv_heads, head_dim, window);
    let out = case.run().unwrap();
    for (i, out) in out.chunks(head_dim).enumerate() {
        for (got, exact) in out.iter().zip(case.exact(i / heads, i % heads)) {
            assert!((f64::from(got.to_f32()) - exact).abs() <= bound, "{head_dim} {window}: {} {exact}", got.to_f32());
        }
    }
}

#[test]
fn equals_fp64() {
    for (heads, kv_heads, head_dim) in [(1, 1, 2), (4, 2, 8), (6, 2, 20), (4, 1, 64), (3, 3, 80), (2, 1, 256)] {
        for window in [0, 1, 16, 17, 100] {
            assert_close::<f32>(heads, kv_heads, head_dim, window, 5e-6);
            assert_close::<f16>(heads, kv_heads, head_dim, window, 4e-3);
            assert_close::<bf16>(heads, kv_heads, head_dim, window, 3e-2);
        }
    }
}

#[test]
fn appends_the_new_token_and_nothing_else() {
    let mut case = Case::<bf16>::new(&[1, 17, 32], 4, 2, 16, 0);
    let (mut keys, mut values) = (case.keys.clone(), case.values.clone());
    for row in 0..3 {
        for head in 0..2 {
            let (to, from) = (case.at(row, case.lengths[row] as usize - 1, head), (row * 2 + head) * 16);
            keys[to..][..16].copy_from_slice(&case.rotated(&case.k[from..][..16], row));
            values[to..][..16].copy_from_slice(&case.v[from..][..16]);
        }
    }
    case.run().unwrap();
    assert!(case.keys == keys && case.values == values);
}

/// A cache of codes of what another one holds gives nearly the same.
#[test]
fn codes_stand_for_numbers() {
    let mut case = Case::<f32>::new(&[1, 17, 40], 4, 2, 16, 0);
    let AttentionShape { blocks, kv_heads, head_dim, .. } = case.shape;
    let mut caches = [case.keys.clone(), case.values.clone()].map(|cache| {
        let mut codes = vec![0u8; cache.len()];
        let mut scales = vec![0f32; blocks * kv_heads * BLOCK];
        for (i, x) in cache.chunks(head_dim).enumerate() {
            let (slot, head) = (i / kv_heads, i % kv_heads);
            let scale = x.iter().fold(0.0, |most: f32, x| most.max(x.abs())) / 127.0;
            scales[(slot / BLOCK * kv_heads + head) * BLOCK + slot % BLOCK] = scale;
            for (x, code) in x.iter().zip(&mut codes[i * head_dim..]) {
                *code = (128.0 + (x / scale).round()) as u8;
            }
        }
        (codes, scales)
    });
    let exact = case.run().unwrap();
    let coded = case.run_over(Some(&mut caches)).unwrap();
    for (coded, exact) in coded.iter().zip(&exact) {
        assert!((coded - exact).abs() < 0.05, "{coded} {exact}");
    }
    // The new token of the last row, as the other cache holds it.
    let at = case.at(2, 39, 1);
    for (codes, plain) in caches.iter().map(|(codes, _)| codes).zip([&case.keys, &case.values]) {
        let most = plain[at..][..head_dim].iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for (&code, x) in codes[at..][..head_dim].iter().zip(&plain[at..]) {
            assert!((f32::from(code) - 128.0 - x * 127.0 / most).abs() < 0.501);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let run = |threads| {
        parallel::set_num_threads(threads);
        Case::<f32>::new(&[100, 3, 77], 8, 2, 64, 0).run().unwrap()
    };
    let (one, many) = (run(1), run(5));
    parallel::set_num_threads(0);
    assert_eq!(one, many);
}

#[test]
fn rows_without_tokens_are_zeros() {
    let mut case = Case::<f32>::new(&[20, 5], 4, 2, 8, 0);
    case.lengths[1] = 0;
    let before = case.keys.clone();
    let out = case.run().unwrap();
    assert!(out[4 * 8..].iter().all(|&x| x == 0.0) && out[..4 * 8].iter().all(|x| x.is_finite()));
    let changed = case.keys.iter().zip(&before).filter(|(a, b)| a != b).count();
    assert!(changed > 0 && changed <= 2 * 8, "one token of the other row");
}

#[test]
fn wrong_arguments_are_named() {
    let message = |change: fn(&mut Case<f32>)| {
        let mut case = Case::new(&[20, 5], 4, 2, 8, 0);
        change(&mut case);
        case.run().unwrap_err().to_string()
    };
    assert!(message(|case| case.shape.kv_heads = 3).contains("heads must be a multiple of kv_heads"));
    assert!(message(|case| case.shape.head_dim = 7).contains("head_dim must be even and in 2..=256, got 7"));
    assert!(message(|case| case.shape.table = 0).contains("blocks must be at least one"));
    assert!(message(|case| case.k.truncate(31)).contains("k must have 32 elements"));
    assert!(message(|case| case.tables.truncate(3)).contains("tables must have 4 elements"));
    assert!(message(|case| case.values.truncate(9)).contains("values must have"));
}
