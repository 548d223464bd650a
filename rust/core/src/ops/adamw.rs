//! `adamw`: one step of AdamW (Loshchilov and Hutter 2019) with fp32 state, in the order of torch.optim.AdamW.
//!
//! ```text
//! g = grad * grad_scale
//! p = p * (1 - lr * weight_decay)
//! m = m + (1 - beta1) * (g - m)
//! v = v * beta2 + (1 - beta2) * g * g
//! p = p - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! Scalars are computed in fp64 and rounded to fp32, tensors in fp32; p is rounded once to its dtype.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::tensor::{DType, Device, Float, TensorMut, TensorRef, with_float};

const OP: &str = "adamw";

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
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let fail = |name, expected, got: String| Err(Error::Argument { op, name, expected, got });
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

    /// 1 - lr * weight_decay
    pub fn decay(&self) -> f32 {
        (1.0 - self.lr * self.weight_decay) as f32
    }

    /// 1 - beta1^step
    pub fn bias_correction1(&self) -> f64 {
        1.0 - self.beta1.powf(self.step as f64)
    }

    /// sqrt(1 - beta2^step)
    pub fn bias_correction2_sqrt(&self) -> f64 {
        (1.0 - self.beta2.powf(self.step as f64)).sqrt()
    }
}

#[derive(Debug)]
#[non_exhaustive]
pub struct Adamw<'a> {
    /// f32, f16 or bf16 `[n]`
    pub param: TensorMut<'a>,
    /// param's dtype `[n]`
    pub grad: TensorRef<'a>,
    /// f32 `[n]`
    pub exp_avg: TensorMut<'a>,
    /// f32 `[n]`
    pub exp_avg_sq: TensorMut<'a>,
    pub scalars: AdamwScalars,
    /// f32 `[1]`, multiplies the gradient (clipping); absent means 1
    pub grad_scale: Option<TensorRef<'a>>,
}

impl<'a> Adamw<'a> {
    pub fn new(
        param: TensorMut<'a>,
        grad: TensorRef<'a>,
        exp_avg: TensorMut<'a>,
        exp_avg_sq: TensorMut<'a>,
        scalars: AdamwScalars,
        grad_scale: Option<TensorRef<'a>>,
    ) -> Result<Self> {
        scalars.check(OP)?;
        check_param(OP, &param, grad, grad_scale)?;
        let (n, device) = (param.numel(), param.device());
        for (name, state) in [("exp_avg", &exp_avg), ("exp_avg_sq", &exp_avg_sq)] {
            arg(OP, name, state.as_ref())
                .dtype(DType::F32)?
                .numel(n, "one an element of param")?
                .on(device, "param")?;
        }
        Ok(Self { param, grad, exp_avg, exp_avg_sq, scalars, grad_scale })
    }
}

/// What both optimizers ask of the parameter, its gradient and the gradient's scale.
pub(crate) fn check_param(
    op: &'static str,
    param: &TensorMut<'_>,
    grad: TensorRef<'_>,
    grad_scale: Option<TensorRef<'_>>,
) -> Result<()> {
    let (n, device): (usize, Device) = (param.numel(), param.device());
    arg(op, "param", param.as_ref()).float()?;
    arg(op, "grad", grad).dtype(param.dtype())?.numel(n, "one an element of param")?.on(device, "param")?;
    if let Some(scale) = grad_scale {
        arg(op, "grad_scale", scale).dtype(DType::F32)?.numel(1, "a scalar")?.on(device, "param")?;
    }
    Ok(())
}

/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 14;

impl Adamw<'_> {
    pub(crate) fn run_on_cpu(self) {
        with_float!(self.param.dtype(), T => self.run::<T>())
    }

    fn run<T: Float>(self) {
        let rule = Rule::new(&self.scalars, scale_on_cpu(self.grad_scale));
        let param: &mut [T] = self.param.into_slice();
        let count = param.len().div_ceil(CHUNK);
        let grad = self.grad.as_slice::<T>().chunks(CHUNK);
        let exp_avg = self.exp_avg.into_slice::<f32>().chunks_mut(CHUNK);
        let exp_avg_sq = self.exp_avg_sq.into_slice::<f32>().chunks_mut(CHUNK);
        let chunks = param.chunks_mut(CHUNK).zip(grad).zip(exp_avg.zip(exp_avg_sq));
        parallel::for_each(chunks, count, |((param, grad), (exp_avg, exp_avg_sq))| {
            for ((p, g), (m, v)) in param.iter_mut().zip(grad).zip(exp_avg.iter_mut().zip(exp_avg_sq)) {
                *p = T::from_f32(rule.update(p.to_f32(), g.to_f32(), m, v));
            }
        });
    }
}

/// The factor on the gradient, 1 if there is none.
pub(crate) fn scale_on_cpu(grad_scale: Option<TensorRef<'_>>) -> f32 {
    grad_scale.map_or(1.0, |scale| scale.as_slice()[0])
}

/// The scalars of one step in fp32.
struct Rule {
    grad_scale: f32,
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    bias_correction2_sqrt: f32,
    eps: f32,
}

impl Rule {
    fn new(scalars: &AdamwScalars, grad_scale: f32) -> Self {
        Self {
            grad_scale,
            decay: scalars.decay(),
            one_minus_beta1: (1.0 - scalars.beta1) as f32,
            beta2: scalars.beta2 as f32,
            one_minus_beta2: (1.0 - scalars.beta2) as f32,
            step_size: (scalars.lr / scalars.bias_correction1()) as f32,
            bias_correction2_sqrt: scalars.bias_correction2_sqrt() as f32,
            eps: scalars.eps as f32,
        }
    }

    #[inline(always)]
    fn update(&self, p: f32, grad: f32, m: &mut f32, v: &mut f32) -> f32 {
        let g = grad * self.grad_scale;
        *m += self.one_minus_beta1 * (g - *m);
        *v = *v * self.beta2 + self.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / self.bias_correction2_sqrt + self.eps;
        p * self.decay - self.step_size * *m / denominator
    }
}
