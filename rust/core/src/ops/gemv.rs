//! `gemv`: y = x Wᵀ with W `[N, K]` in floats, for a few rows x: the head of a model that decodes.
//!
//! ```text
//! out[m, n] = sum_k x[m, k] * weight[n, k]
//! ```
//!
//! Products and sums are fp32, rounded once to out's dtype. The order of the sum is that of the instruction set, but
//! fixed: a row of out depends on its row of x only, never on M or on the number of threads. Bound by the memory that
//! holds W. For the CPU alone: on a GPU torch's own product is.

use crate::check::arg;
use crate::error::Result;
use crate::ops::gemv_4bit::{GemvShape, dot, store_transposed};
use crate::parallel;
use crate::simd::{Lanes, Simd};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Vector, avx2::Avx2, avx512::Avx512};
use crate::tensor::{TensorMut, TensorRef, with_float};

const OP: &str = "gemv";

#[derive(Debug)]
#[non_exhaustive]
pub struct Gemv<'a> {
    /// f32, f16 or bf16 `[M, K]`
    pub x: TensorRef<'a>,
    /// x's dtype `[N, K]`
    pub weight: TensorRef<'a>,
    /// x's dtype `[M, N]`
    pub out: TensorMut<'a>,
    pub shape: GemvShape,
}

impl<'a> Gemv<'a> {
    pub fn new(x: TensorRef<'a>, weight: TensorRef<'a>, out: TensorMut<'a>, shape: GemvShape) -> Result<Self> {
        let GemvShape { m, n, k } = shape;
        let device = weight.device();
        arg(OP, "weight", weight).float()?.numel(n * k, "N x K")?;
        arg(OP, "x", x).dtype(weight.dtype())?.numel(m * k, "M x K")?.on(device, "weight")?;
        arg(OP, "out", out.as_ref()).dtype(weight.dtype())?.numel(m * n, "M x N")?.on(device, "weight")?;
        Ok(Self { x, weight, out, shape })
    }
}

/// Weights of a chunk: some 30 us of work.
const CHUNK_WEIGHTS: usize = 1 << 18;

impl Gemv<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        let GemvShape { m, n, k } = self.shape;
        if m == 0 || n == 0 {
            return;
        }
        let mut sums = vec![0.0; n * m];
        if k > 0 {
            with_float!(self.x.dtype(), T => self.accumulate::<T>(&mut sums, simd));
        }
        with_float!(self.out.dtype(), T => store_transposed::<T>(&sums, self.out.into_slice(), self.shape));
    }

    /// `sums` `[N, M]`, so that a thread's results are contiguous.
    fn accumulate<T: Lanes>(&self, sums: &mut [f32], simd: Simd) {
        let GemvShape { m, n, k } = self.shape;
        let x: Vec<f32> = self.x.as_slice::<T>().iter().map(|x| x.to_f32()).collect();
        let rows = (CHUNK_WEIGHTS / k).max(1);
        let chunks = self.weight.as_slice::<T>().chunks(rows * k).zip(sums.chunks_mut(rows * m));
        parallel::for_each(chunks, n.div_ceil(rows), |(weight, sums)| match simd {
            // SAFETY: the level was detected.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { avx512(&x, weight, k, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { avx2(&x, weight, k, sums) },
            _ => plain(&x, weight, k, sums),
        });
    }
}

fn plain<T: Lanes>(x: &[f32], weight: &[T], k: usize, sums: &mut [f32]) {
    let mut wide = vec![0.0; k];
    for (row, sums) in weight.chunks(k).zip(sums.chunks_mut(x.len() / k)) {
        wide.iter_mut().zip(row).for_each(|(wide, weight)| *wide = weight.to_f32());
        for (x, sum) in x.chunks(k).zip(sums) {
            *sum = dot(x, &wide);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn avx512<T: Lanes>(x: &[f32], weight: &[T], k: usize, sums: &mut [f32]) {
    // SAFETY: the features are those of this function.
    unsafe { vectors::<Avx512, T>(x, weight, k, sums) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<T: Lanes>(x: &[f32], weight: &[T], k: usize, sums: &mut [f32]) {
    // SAFETY: the features are those of this function.
    unsafe { vectors::<Avx2, T>(x, weight, k, sums) }
}

/// Bytes between those that are multiplied and those that are fetched from memory: past the end of the page, where the
/// processor's own prefetching stops.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8192;

/// Rows of x that share the widened weights.
#[cfg(target_arch = "x86_64")]
const GROUP: usize = 4;

/// # Safety
/// The processor has V's features.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn vectors<V: Vector, T: Lanes>(x: &[f32], weight: &[T], k: usize, sums: &mut [f32]) {
    for (row, sums) in weight.chunks_exact(k).zip(sums.chunks_exact_mut(x.len() / k)) {
        for (x, sums) in x.chunks(GROUP * k).zip(sums.chunks_mut(GROUP)) {
            // SAFETY: as the caller vouches.
            unsafe {
                match sums.len() {
                    1 => dots::<V, T, 1>(x, row, sums),
                    2 => dots::<V, T, 2>(x, row, sums),
                    3 => dots::<V, T, 3>(x, row, sums),
                    _ => dots::<V, T, GROUP>(x, row, sums),
                }
            }
        }
    }
}

/// A row of W with M rows of x; a row's two registers of sums are the same for every M.
///
/// # Safety
/// The processor has V's features; x holds M rows as long as w.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn dots<V: Vector, T: Lanes, const M: usize>(x: &[f32], w: &[T], out: &mut [f32]) {
    let k = w.len();
    let step = 2 * V::LANES;
    let whole = k / step * step;
    // SAFETY: the caller vouches for the features; `whole` elements are there in w and in each row of x.
    unsafe {
        let mut sums = [[V::splat(0.0); 2]; M];
        for start in (0..whole).step_by(step) {
            for half in 0..2 {
                let at = start + half * V::LANES;
                V::prefetch(w.as_ptr().add(at).cast::<u8>().wrapping_add(AHEAD));
                let w = V::widen(w.as_ptr().add(at));
                for (row, sums) in sums.iter_mut().enumerate() {
                    sums[half] = V::multiply_add(V::widen(x.as_ptr().add(row * k + at)), w, sums[half]);
                }
            }
        }
        for ((row, out), [even, odd]) in out.iter_mut().enumerate().zip(sums) {
            let tail: f32 =
                x[row * k + whole..][..k - whole].iter().zip(&w[whole..]).map(|(x, w)| x * w.to_f32()).sum();
            *out = V::sum(even) + V::sum(odd) + tail;
        }
    }
}
