//! `adamw`: one step of AdamW (Loshchilov and Hutter 2019) over many parameters, whose moments lie in pages.
//!
//! Moments are fp32, in the order of torch.optim.AdamW ([`Moments::Fp32`]):
//!
//! ```text
//! g = grad * grad_scale
//! m = m + (1 - beta1) * (g - m)
//! v = v * beta2 + (1 - beta2) * g * g
//! p = p * (1 - lr * weight_decay) - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! or 8-bit codes in blocks of 256 (Dettmers et al. 2022, [`Moments::Block8`]), with `c2 = sqrt(1 - beta2^t)`:
//!
//! ```text
//! m = beta1 * (signed_map[code_m] * absmax_m) + (1 - beta1) * g
//! v = beta2 * (unsigned_map[code_v] * absmax_v) + (1 - beta2) * g * g
//! p = p * (1 - lr * weight_decay) - (lr * c2 / (1 - beta1^t)) * (m / (sqrt(v) + eps * c2))
//! ```
//!
//! where an element whose g is NaN or infinite gets m = v = 0 and keeps its p, without decay. Then absmax_m = max |m|
//! and absmax_v = max v of the block, and the codes are the nearest rule on m * (1 / max(absmax_m, 1e-38)), v
//! likewise; a negative m whose nearest entry is 0 takes the entry below (126), so that a code keeps the sign of m.
//!
//! Scalars are computed in fp64 and rounded to fp32, tensors in fp32; p is rounded once to its dtype. No value
//! depends on where a page lies or on who updates it.

mod block8;
mod fp32;
mod slab;

use std::ops::Range;

pub use slab::{BLOCK, BLOCKS_PER_PAGE, Moments, PAGE_ELEMENTS, Slab};

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "adamw";

/// Memory as the device that updates it sees it; 0 is none.
pub type Address = u64;

/// Hyper-parameters of one step; `step` counts from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwScalars {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub step: u64,
}

impl AdamwScalars {
    fn check(&self) -> Result<()> {
        let fail = |name, expected, got: String| Err(Error::Argument { op: OP, name, expected, got });
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        let fraction = |value: f64| (0.0..1.0).contains(&value);
        match *self {
            Self { lr, .. } if !not_negative(lr) => fail("lr", "finite and >= 0", lr.to_string()),
            Self { beta1, .. } if !fraction(beta1) => fail("beta1", "in [0, 1)", beta1.to_string()),
            Self { beta2, .. } if !fraction(beta2) => fail("beta2", "in [0, 1)", beta2.to_string()),
            Self { eps, .. } if !not_negative(eps) => fail("eps", "finite and >= 0", eps.to_string()),
            Self { weight_decay, .. } if !not_negative(weight_decay) => {
                fail("weight_decay", "finite and >= 0", weight_decay.to_string())
            }
            Self { step: 0, .. } => fail("step", ">= 1", "0".to_string()),
            _ => Ok(()),
        }
    }
}

/// The scalars of one step in fp32, as the loops and the kernels read them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// 1 - lr * weight_decay
    pub decay: f32,
    /// lr / (1 - beta1^t), for 8-bit moments times sqrt(1 - beta2^t)
    pub step_size: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    /// for 8-bit moments times sqrt(1 - beta2^t)
    pub eps: f32,
    /// sqrt(1 - beta2^t)
    pub bias_correction2_sqrt: f32,
}

impl Rule {
    fn new(s: &AdamwScalars, moments: Moments) -> Self {
        let c2 = (1.0 - s.beta2.powf(s.step as f64)).sqrt();
        let bias_correction1 = 1.0 - s.beta1.powf(s.step as f64);
        let (step_size, eps) = match moments {
            Moments::Fp32 => (s.lr / bias_correction1, s.eps),
            Moments::Block8 => (s.lr * c2 / bias_correction1, s.eps * c2),
        };
        Self {
            decay: (1.0 - s.lr * s.weight_decay) as f32,
            step_size: step_size as f32,
            beta1: s.beta1 as f32,
            one_minus_beta1: (1.0 - s.beta1) as f32,
            beta2: s.beta2 as f32,
            one_minus_beta2: (1.0 - s.beta2) as f32,
            eps: eps as f32,
            bias_correction2_sqrt: c2 as f32,
        }
    }
}

/// One parameter in one step; without a gradient nothing of it changes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub param: Address,
    pub grad: Address,
    pub numel: usize,
    pub dtype: DType,
    pub rule: Rule,
}

impl Target {
    /// param: f32, f16 or bf16 `[n]`; grad: the same.
    pub fn new(
        param: TensorMut<'_>,
        grad: Option<TensorRef<'_>>,
        scalars: &AdamwScalars,
        moments: Moments,
    ) -> Result<Self> {
        scalars.check()?;
        let (numel, dtype, device) = (param.numel(), param.dtype(), param.device());
        arg(OP, "param", param.as_ref()).float()?;
        if let Some(grad) = grad {
            arg(OP, "grad", grad).dtype(dtype)?.numel(numel, "one an element of param")?.on(device, "param")?;
        }
        let grad = grad.map_or(0, |grad| grad.ptr().addr() as Address);
        Ok(Self { param: param.ptr().addr() as Address, grad, numel, dtype, rule: Rule::new(scalars, moments) })
    }
}

/// One step of every parameter of a slab.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    pub slab: &'a Slab,
    /// where each page lies
    pub pages: &'a [Address],
    /// the pages to update
    pub work: &'a [u32],
    /// one a parameter of the slab
    pub targets: &'a [Target],
    /// of an f32 that multiplies every gradient (clipping); none means 1
    pub grad_scale: Address,
}

/// Blocks that a thread takes at a time, all of one page.
const SLICE: usize = 32;

/// The oracle: updates the pages `update.work[part]`.
///
/// # Safety
/// The addresses of `update` are of CPU memory: every page holds `slab.moments().page_bytes()`, parameters and
/// gradients hold their `numel`, and no one else touches the memory meanwhile. Every number of `work` is a page.
pub unsafe fn run_on_cpu(update: &Update<'_>, part: Range<usize>) {
    let grad_scale = match update.grad_scale {
        0 => 1.0,
        // SAFETY: the caller vouches for it.
        address => unsafe { *pointer::<f32>(address) },
    };
    let work = &update.work[part];
    let slices = work.iter().flat_map(|&page| (0..BLOCKS_PER_PAGE).step_by(SLICE).map(move |at| (page as usize, at)));
    parallel::for_each(slices, work.len() * BLOCKS_PER_PAGE / SLICE, |(page, at)| {
        let first = page * BLOCKS_PER_PAGE + at;
        for (param, blocks) in update.slab.params_in(first..first + SLICE) {
            let target = &update.targets[param];
            if target.grad != 0 {
                // SAFETY: the caller vouches for the memory, and no other slice has these blocks.
                with_float!(target.dtype, T => unsafe { run_blocks::<T>(update, page, param, blocks, grad_scale) });
            }
        }
    });
}

/// Updates blocks of one parameter that lie in one page.
///
/// # Safety
/// As [`run_on_cpu`], and no one else has these blocks.
unsafe fn run_blocks<T: Float>(update: &Update<'_>, page: usize, param: usize, blocks: Range<usize>, grad_scale: f32) {
    let (slab, target, address) = (update.slab, &update.targets[param], update.pages[page]);
    let start = (blocks.start - slab.first_block(param)) * BLOCK;
    let n = (blocks.len() * BLOCK).min(target.numel - start);
    let in_page = blocks.start - page * BLOCKS_PER_PAGE;
    // SAFETY: the caller vouches for param and grad, whose elements from `start` are these blocks'.
    let weights = unsafe {
        let param = std::slice::from_raw_parts_mut(pointer::<T>(target.param).add(start), n);
        (param, std::slice::from_raw_parts(pointer::<T>(target.grad).cast_const().add(start), n))
    };
    let part = |offset: usize, size: usize| address + (offset + in_page * size) as Address;
    let [m, v, absmax_m, absmax_v] = slab.moments().offsets();
    match slab.moments() {
        Moments::Fp32 => {
            // SAFETY: a page holds the moments of all its blocks.
            let moments = unsafe { (floats(part(m, 4 * BLOCK), n), floats(part(v, 4 * BLOCK), n)) };
            fp32::update(&target.rule, grad_scale, weights, moments);
        }
        Moments::Block8 => {
            let codes = |address| {
                // SAFETY: as above.
                unsafe { std::slice::from_raw_parts_mut(pointer::<u8>(address), n) }
            };
            let codes = (codes(part(m, BLOCK)), codes(part(v, BLOCK)));
            // SAFETY: as above.
            let absmax = unsafe { (floats(part(absmax_m, 4), blocks.len()), floats(part(absmax_v, 4), blocks.len())) };
            block8::update(&target.rule, grad_scale, weights, codes, absmax);
        }
    }
}

/// # Safety
/// `n` floats lie at `address`, and are borrowed by no one else during `'a`.
unsafe fn floats<'a>(address: Address, n: usize) -> &'a mut [f32] {
    // SAFETY: the caller vouches for it.
    unsafe { std::slice::from_raw_parts_mut(pointer(address), n) }
}

fn pointer<T>(address: Address) -> *mut T {
    std::ptr::with_exposed_provenance_mut(address as usize)
}
