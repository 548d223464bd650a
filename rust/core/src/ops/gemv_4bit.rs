//! `gemv_4bit`: y = x Wᵀ with W `[N, K]` in 4 bits, for a few rows x.
//!
//! ```text
//! out[m, n] = sum_k x[m, k] * table[code(n K + k)] * scale[(n K + k) / blocksize]
//! ```
//!
//! Products and sums are fp32, rounded once to out's dtype. The order of the sum is the backend's own, but fixed: a
//! row of out depends on its row of x only, never on M, on the other rows or on the number of threads.

use crate::check::{arg, blocksize_4bit};
use crate::error::{Error, Result};
use crate::ops::dequantize_4bit::dequantize_block;
use crate::parallel;
use crate::quant_state::{Absmax, QuantType, Scales};
use crate::simd::{Lanes, Simd};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Vector, avx2::Avx2, avx512::Avx512};
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

#[cfg(target_arch = "x86_64")]
mod units;

const OP: &str = "gemv_4bit";

/// M rows of x, N rows of W, K elements a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GemvShape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct Gemv4bit<'a> {
    /// f32, f16 or bf16 `[M, K]`
    pub x: TensorRef<'a>,
    /// u8 `[ceil(N K / 2)]`
    pub packed: TensorRef<'a>,
    /// one scale a block, `[ceil(N K / blocksize)]`
    pub absmax: Absmax<'a>,
    pub quant_type: QuantType,
    pub blocksize: usize,
    /// x's dtype `[M, N]`
    pub out: TensorMut<'a>,
    pub shape: GemvShape,
}

impl<'a> Gemv4bit<'a> {
    pub fn new(
        x: TensorRef<'a>,
        packed: TensorRef<'a>,
        absmax: Absmax<'a>,
        quant_type: QuantType,
        blocksize: usize,
        out: TensorMut<'a>,
        shape: GemvShape,
    ) -> Result<Self> {
        blocksize_4bit(OP, blocksize)?;
        let GemvShape { m, n, k } = shape;
        let device = packed.device();
        arg(OP, "x", x).float()?.numel(m * k, "M x K")?.on(device, "packed")?;
        arg(OP, "packed", packed).dtype(DType::U8)?.numel((n * k).div_ceil(2), "N x K, two codes a byte")?;
        absmax.check(OP, (n * k).div_ceil(blocksize), device)?;
        arg(OP, "out", out.as_ref()).dtype(x.dtype())?.numel(m * n, "M x N")?.on(device, "packed")?;
        Ok(Self { x, packed, absmax, quant_type, blocksize, out, shape })
    }
}

/// Most products that go as one.
pub const MAX_GROUP: usize = 4;

/// Products of one x with several W, which a backend may make in one pass.
#[derive(Debug)]
pub struct Gemv4bitGroup<'a>([Option<Gemv4bit<'a>>; MAX_GROUP]);

impl<'a> Gemv4bitGroup<'a> {
    pub fn new(products: Vec<Gemv4bit<'a>>) -> Result<Self> {
        let (op, name) = ("products of one x", "products");
        if products.len() > MAX_GROUP {
            return Err(Error::Argument { op, name, expected: "at most 4", got: products.len().to_string() });
        }
        let x_of = |product: &Gemv4bit<'_>| (product.x.ptr(), product.x.dtype(), product.shape.m, product.shape.k);
        if products.windows(2).any(|pair| x_of(&pair[0]) != x_of(&pair[1])) {
            return Err(Error::Argument { op, name, expected: "of one x", got: "several".into() });
        }
        let mut products = products.into_iter();
        Ok(Self(std::array::from_fn(|_| products.next())))
    }

    pub fn into_products(self) -> impl Iterator<Item = Gemv4bit<'a>> {
        self.0.into_iter().flatten()
    }
}

/// Weights of a chunk, 2 us of work; fewer than two chunks are not worth a second thread (1 us while it spins).
const CHUNK_WEIGHTS: usize = 1 << 15;

/// More than one, for a thread that is late or slow.
const CHUNKS_PER_THREAD: usize = 2;

impl Gemv4bit<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        Gemv4bitGroup([Some(self), None, None, None]).run_on_cpu(simd);
    }

    fn weight(&self) -> Weight<'_> {
        Weight {
            packed: self.packed.as_slice(),
            scales: self.absmax.scales(),
            table: self.quant_type.table(),
            blocksize: self.blocksize,
            n: self.shape.n,
            k: self.shape.k,
        }
    }
}

impl Gemv4bitGroup<'_> {
    /// All products in one region of threads: to begin and end it takes as long as a small product.
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        let Some(&Gemv4bit { x, shape: GemvShape { m, k, .. }, .. }) = self.0[0].as_ref() else { return };
        let rows: usize = self.0.iter().flatten().map(|product| product.shape.n).sum();
        // Rows of W are the outer index, so that a thread's results are contiguous.
        let mut sums = vec![0.0; rows * m];
        if k > 0 && !sums.is_empty() {
            with_float!(x.dtype(), T => self.accumulate::<T>(x.as_slice(), &mut sums, simd));
        }
        let mut sums = sums.as_slice();
        for Gemv4bit { shape, out, .. } in self.into_products().filter(|product| product.out.numel() > 0) {
            let (own, others) = sums.split_at(shape.n * m);
            with_float!(out.dtype(), T => store_transposed::<T>(own, out.into_slice(), shape));
            sums = others;
        }
    }

    fn accumulate<T: Lanes>(&self, x: &[T], sums: &mut [f32], simd: Simd) {
        let weights: Vec<_> = self.0.iter().flatten().map(Gemv4bit::weight).collect();
        #[cfg(target_arch = "x86_64")]
        if weights.iter().all(|weight| weight.k.is_multiple_of(weight.blocksize) && weight.blocksize >= units::UNIT) {
            let k = weights[0].k;
            match simd {
                Simd::Avx512 => {
                    let x = units::SplitRows::new(x, k, Avx512::LANES);
                    // SAFETY: the level was detected.
                    return for_each_chunk(&weights, sums, |weight, first, sums| unsafe {
                        avx512(weight, &x, first, sums);
                    });
                }
                Simd::Avx2 => {
                    let x = units::SplitRows::new(x, k, Avx2::LANES);
                    // SAFETY: the level was detected.
                    return for_each_chunk(&weights, sums, |weight, first, sums| unsafe {
                        avx2(weight, &x, first, sums);
                    });
                }
                Simd::Scalar => {}
            }
        }
        let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        for_each_chunk(&weights, sums, |weight, first, sums| weight.any_rows(simd, &x, first, sums));
    }
}

/// Splits the rows of all W: `work(weight, first, sums)` fills `sums` `[rows, M]` for rows of one W from `first` on.
fn for_each_chunk(weights: &[Weight<'_>], sums: &mut [f32], work: impl Fn(&Weight<'_>, usize, &mut [f32]) + Sync) {
    let n: usize = weights.iter().map(|weight| weight.n).sum();
    let (m, k) = (sums.len() / n, weights[0].k);
    // An equal number for each thread, and few, because taking one costs a cache line from another core.
    let threads = parallel::num_threads();
    let chunks = (n * k / CHUNK_WEIGHTS).clamp(1, CHUNKS_PER_THREAD * threads);
    let rows = if chunks == 1 { n } else { n.div_ceil(chunks.next_multiple_of(threads)) };
    parallel::for_each(sums.chunks_mut(rows * m).enumerate(), n.div_ceil(rows), |(chunk, sums)| {
        let (mut first, mut sums) = (chunk * rows, sums);
        for weight in weights {
            let count = weight.n.saturating_sub(first).min(sums.len() / m);
            let (own, others) = sums.split_at_mut(count * m);
            if count > 0 {
                work(weight, first, own);
            }
            (first, sums) = (first.saturating_sub(weight.n), others);
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn avx512(weight: &Weight<'_>, x: &units::SplitRows, first: usize, sums: &mut [f32]) {
    // SAFETY: the features are those of this function.
    unsafe { units::accumulate::<Avx512>(weight, x, first, sums) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(weight: &Weight<'_>, x: &units::SplitRows, first: usize, sums: &mut [f32]) {
    // SAFETY: the features are those of this function.
    unsafe { units::accumulate::<Avx2>(weight, x, first, sums) }
}

/// W as the CPU loops read it.
struct Weight<'a> {
    packed: &'a [u8],
    scales: Scales<'a>,
    table: &'static [f32; 16],
    blocksize: usize,
    n: usize,
    k: usize,
}

impl Weight<'_> {
    /// Rows of any length: the blocks that cover them are decoded, then each row is a dot product.
    fn any_rows(&self, simd: Simd, x: &[f32], first: usize, sums: &mut [f32]) {
        let (k, m) = (self.k, x.len() / self.k);
        let rows = sums.len() / m;
        let (begin, end) = (first * k, (first + rows) * k);
        let first_block = begin / self.blocksize;
        let decoded = self.decode(simd, first_block, end);
        let start = begin - first_block * self.blocksize;
        for (w, sums) in decoded[start..].chunks(k).zip(sums.chunks_mut(m)) {
            for (x, sum) in x.chunks(k).zip(sums) {
                *sum = dot(x, w);
            }
        }
    }

    /// The flat elements from the start of `first_block` to `end`.
    fn decode(&self, simd: Simd, first_block: usize, end: usize) -> Vec<f32> {
        let begin = first_block * self.blocksize;
        let mut decoded = vec![0.0; end - begin];
        let packed = self.packed[begin / 2..].chunks(self.blocksize / 2);
        for (i, (out, packed)) in decoded.chunks_mut(self.blocksize).zip(packed).enumerate() {
            dequantize_block(simd, packed, out, self.table, self.scales.get(first_block + i));
        }
        decoded
    }
}

/// Sixteen partial sums, so that the compiler can use vector registers of any width.
pub(crate) fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    let (x_chunks, w_chunks) = (x.chunks_exact(16), w.chunks_exact(16));
    let rest = x_chunks.remainder().iter().zip(w_chunks.remainder());
    let tail: f32 = rest.map(|(x, w)| x * w).sum();
    for (x, w) in x_chunks.zip(w_chunks) {
        for lane in 0..16 {
            lanes[lane] += x[lane] * w[lane];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `sums` `[N, M]` to `out` `[M, N]`, rounded.
pub(crate) fn store_transposed<T: Float>(sums: &[f32], out: &mut [T], shape: GemvShape) {
    for (row, out) in out.chunks_mut(shape.n).enumerate() {
        for (out, sums) in out.iter_mut().zip(sums.chunks(shape.m)) {
            *out = T::from_f32(sums[row]);
        }
    }
}
