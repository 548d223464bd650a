use halfbyte_core::Result;
use halfbyte_core::ops::adamw::{Adamw, AdamwScalars};

use crate::args::{KernelArg, args, dtype_index, optional};
use crate::launch::{Family, Launcher, family};

const KERNELS: [&str; 3] = ["adamw_f32", "adamw_f16", "adamw_bf16"];
pub(crate) static FAMILY: Family = family!("adamw", &KERNELS);

pub(crate) const THREADS: u32 = 256;
pub(crate) const PER_THREAD: usize = 4;

/// `struct Scalars` of adamw.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceScalars {
    decay: f32,
    step_size: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    bias_correction2_sqrt: f32,
    eps: f32,
}

impl KernelArg for DeviceScalars {}

impl From<&AdamwScalars> for DeviceScalars {
    fn from(s: &AdamwScalars) -> Self {
        Self {
            decay: s.decay(),
            step_size: (s.lr / s.bias_correction1()) as f32,
            one_minus_beta1: (1.0 - s.beta1) as f32,
            beta2: s.beta2 as f32,
            one_minus_beta2: (1.0 - s.beta2) as f32,
            bias_correction2_sqrt: s.bias_correction2_sqrt() as f32,
            eps: s.eps as f32,
        }
    }
}

pub(crate) fn launch(launcher: &Launcher, args: Adamw<'_>) -> Result<()> {
    let n = args.param.numel();
    if n == 0 {
        return Ok(());
    }
    launcher.launch_1d(
        &FAMILY,
        KERNELS[dtype_index(args.param.dtype())],
        n.div_ceil(THREADS as usize * PER_THREAD),
        THREADS,
        args![
            args.param.ptr(),
            args.grad.ptr(),
            args.exp_avg.ptr(),
            args.exp_avg_sq.ptr(),
            n as i64,
            DeviceScalars::from(&args.scalars),
            optional(args.grad_scale),
        ],
    )
}
