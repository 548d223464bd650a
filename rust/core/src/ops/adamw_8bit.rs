//! `adamw_8bit`: one step of AdamW whose moments are 8-bit codes, in blocks of 256 (Dettmers et al. 2022).
//!
//! For each element of a block, in fp32 (`c2 = sqrt(1 - beta2^t)`):
//!
//! ```text
//! g = grad * grad_scale
//! m = beta1 * (signed_map[state1] * absmax1) + (1 - beta1) * g
//! v = beta2 * (unsigned_map[state2] * absmax2) + (1 - beta2) * g * g
//! p = p * (1 - lr * weight_decay)                              decay first, as torch does
//! p = p - (lr * c2 / (1 - beta1^t)) * (m / (sqrt(v) + eps * c2))
//! ```
//!
//! Where g is NaN or infinite, m and v become 0 and p is left as it is, without decay. Then absmax1 = max |m| and
//! absmax2 = max v of the block, and the codes are the nearest rule on m * (1 / max(absmax1, 1e-38)), v likewise;
//! a negative m whose nearest entry is 0 takes the entry below (126), so that a code keeps the sign of m.

use crate::check::arg;
use crate::codebook::{DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, encode_nearest};
use crate::error::Result;
use crate::ops::adamw::{AdamwScalars, check_param, scale_on_cpu};
use crate::ops::quantize_4bit::{ABSMAX_MIN, absmax};
use crate::parallel;
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "adamw_8bit";

/// Elements that share one scale of each moment.
pub const STATE_BLOCKSIZE: usize = 256;

#[derive(Debug)]
#[non_exhaustive]
pub struct Adamw8bit<'a> {
    /// f32, f16 or bf16 `[n]`
    pub param: TensorMut<'a>,
    /// param's dtype `[n]`
    pub grad: TensorRef<'a>,
    /// u8 `[n]`, first moment, signed map
    pub state1: TensorMut<'a>,
    /// u8 `[n]`, second moment, unsigned map
    pub state2: TensorMut<'a>,
    /// f32 `[ceil(n / 256)]`
    pub absmax1: TensorMut<'a>,
    /// f32 `[ceil(n / 256)]`
    pub absmax2: TensorMut<'a>,
    pub scalars: AdamwScalars,
    /// f32 `[1]`, multiplies the gradient (clipping); absent means 1
    pub grad_scale: Option<TensorRef<'a>>,
}

impl<'a> Adamw8bit<'a> {
    pub fn new(
        param: TensorMut<'a>,
        grad: TensorRef<'a>,
        state1: TensorMut<'a>,
        state2: TensorMut<'a>,
        absmax1: TensorMut<'a>,
        absmax2: TensorMut<'a>,
        scalars: AdamwScalars,
        grad_scale: Option<TensorRef<'a>>,
    ) -> Result<Self> {
        scalars.check(OP)?;
        check_param(OP, &param, grad, grad_scale)?;
        let (n, device) = (param.numel(), param.device());
        for (name, state) in [("state1", &state1), ("state2", &state2)] {
            arg(OP, name, state.as_ref()).dtype(DType::U8)?.numel(n, "one an element of param")?.on(device, "param")?;
        }
        let blocks = n.div_ceil(STATE_BLOCKSIZE);
        for (name, absmax) in [("absmax1", &absmax1), ("absmax2", &absmax2)] {
            arg(OP, name, absmax.as_ref()).dtype(DType::F32)?.numel(blocks, "one a block")?.on(device, "param")?;
        }
        Ok(Self { param, grad, state1, state2, absmax1, absmax2, scalars, grad_scale })
    }
}

/// Blocks that a thread takes at a time.
const CHUNK_BLOCKS: usize = 32;
const CHUNK: usize = CHUNK_BLOCKS * STATE_BLOCKSIZE;

impl Adamw8bit<'_> {
    pub(crate) fn run_on_cpu(self) {
        with_float!(self.param.dtype(), T => self.run::<T>())
    }

    fn run<T: Float>(self) {
        let rule = Rule::new(&self.scalars, scale_on_cpu(self.grad_scale));
        let param: &mut [T] = self.param.into_slice();
        let count = param.len().div_ceil(CHUNK);
        let weights = param.chunks_mut(CHUNK).zip(self.grad.as_slice::<T>().chunks(CHUNK));
        let codes = self.state1.into_slice::<u8>().chunks_mut(CHUNK).zip(self.state2.into_slice().chunks_mut(CHUNK));
        let absmax1 = self.absmax1.into_slice::<f32>().chunks_mut(CHUNK_BLOCKS);
        let scales = absmax1.zip(self.absmax2.into_slice().chunks_mut(CHUNK_BLOCKS));
        let chunks = weights.zip(codes).zip(scales);
        parallel::for_each(chunks, count, |(((param, grad), (state1, state2)), (absmax1, absmax2))| {
            let weights = param.chunks_mut(STATE_BLOCKSIZE).zip(grad.chunks(STATE_BLOCKSIZE));
            let codes = state1.chunks_mut(STATE_BLOCKSIZE).zip(state2.chunks_mut(STATE_BLOCKSIZE));
            for (((param, grad), codes), scales) in weights.zip(codes).zip(absmax1.iter_mut().zip(absmax2)) {
                rule.update_block(param, grad, codes, scales);
            }
        });
    }
}

/// The scalars of one step in fp32.
struct Rule {
    grad_scale: f32,
    decay: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    eps: f32,
}

impl Rule {
    fn new(scalars: &AdamwScalars, grad_scale: f32) -> Self {
        let c2 = scalars.bias_correction2_sqrt();
        Self {
            grad_scale,
            decay: scalars.decay(),
            beta1: scalars.beta1 as f32,
            one_minus_beta1: (1.0 - scalars.beta1) as f32,
            beta2: scalars.beta2 as f32,
            one_minus_beta2: (1.0 - scalars.beta2) as f32,
            step_size: (scalars.lr * c2 / scalars.bias_correction1()) as f32,
            eps: (scalars.eps * c2) as f32,
        }
    }

    fn update_block<T: Float>(
        &self,
        param: &mut [T],
        grad: &[T],
        (state1, state2): (&mut [u8], &mut [u8]),
        (absmax1, absmax2): (&mut f32, &mut f32),
    ) {
        let (mut m, mut v) = ([0.0; STATE_BLOCKSIZE], [0.0; STATE_BLOCKSIZE]);
        for (i, (p, g)) in param.iter_mut().zip(grad).enumerate() {
            let g = g.to_f32() * self.grad_scale;
            if !g.is_finite() {
                continue;
            }
            let (old_m, old_v) = (DYNAMIC_SIGNED[usize::from(state1[i])], DYNAMIC_UNSIGNED[usize::from(state2[i])]);
            m[i] = self.beta1 * (old_m * *absmax1) + self.one_minus_beta1 * g;
            v[i] = self.beta2 * (old_v * *absmax2) + self.one_minus_beta2 * g * g;
            *p = T::from_f32(p.to_f32() * self.decay - self.step_size * (m[i] / (v[i].sqrt() + self.eps)));
        }
        *absmax1 = requantize(&m[..param.len()], state1, encode_first_moment);
        *absmax2 = requantize(&v[..param.len()], state2, |v| encode_nearest(false, v));
    }
}

fn requantize(values: &[f32], codes: &mut [u8], encode: impl Fn(f32) -> u8) -> f32 {
    let absmax = absmax(values);
    let inverse = 1.0 / absmax.max(ABSMAX_MIN);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = encode(value * inverse);
    }
    absmax
}

/// Nearest, except that a negative value is never stored as zero.
fn encode_first_moment(m: f32) -> u8 {
    let code = encode_nearest(true, m);
    if m < 0.0 && DYNAMIC_SIGNED[usize::from(code)] == 0.0 { code - 1 } else { code }
}
