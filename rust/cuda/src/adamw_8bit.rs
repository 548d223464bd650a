use std::ffi::c_void;

use halfbyte_core::Result;
use halfbyte_core::ops::adamw::AdamwScalars;
use halfbyte_core::ops::adamw_8bit::{Adamw8bit, STATE_BLOCKSIZE};

use crate::args::{KernelArg, args, dtype_index, optional};
use crate::launch::{Family, Launcher, family};

const KERNELS: [&str; 3] = ["adamw_8bit_f32", "adamw_8bit_f16", "adamw_8bit_bf16"];
pub(crate) static FAMILY: Family = family!("adamw_8bit", &KERNELS);

pub(crate) const THREADS: u32 = 256;
/// CTAs that fill any device; each fills its maps once and takes block after block.
const MOST_CTAS: usize = 1024;

/// `struct Tensors` of adamw_8bit.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceTensors {
    param: *mut c_void,
    grad: *const c_void,
    state1: *mut c_void,
    state2: *mut c_void,
    absmax1: *mut c_void,
    absmax2: *mut c_void,
    n: i64,
}

/// `struct Scalars` of adamw_8bit.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceScalars {
    decay: f32,
    step_size: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
}

impl KernelArg for DeviceTensors {}
impl KernelArg for DeviceScalars {}

impl From<&Adamw8bit<'_>> for DeviceTensors {
    fn from(args: &Adamw8bit<'_>) -> Self {
        Self {
            param: args.param.ptr(),
            grad: args.grad.ptr(),
            state1: args.state1.ptr(),
            state2: args.state2.ptr(),
            absmax1: args.absmax1.ptr(),
            absmax2: args.absmax2.ptr(),
            n: args.param.numel() as i64,
        }
    }
}

impl From<&AdamwScalars> for DeviceScalars {
    fn from(s: &AdamwScalars) -> Self {
        let correction = s.bias_correction2_sqrt();
        Self {
            decay: s.decay(),
            step_size: (s.lr * correction / s.bias_correction1()) as f32,
            beta1: s.beta1 as f32,
            one_minus_beta1: (1.0 - s.beta1) as f32,
            beta2: s.beta2 as f32,
            one_minus_beta2: (1.0 - s.beta2) as f32,
            eps: (s.eps * correction) as f32,
        }
    }
}

pub(crate) fn launch(launcher: &Launcher, args: Adamw8bit<'_>) -> Result<()> {
    let blocks = args.param.numel().div_ceil(STATE_BLOCKSIZE);
    if blocks == 0 {
        return Ok(());
    }
    launcher.launch_1d(
        &FAMILY,
        KERNELS[dtype_index(args.param.dtype())],
        blocks.div_ceil(THREADS as usize / 32).min(MOST_CTAS),
        THREADS,
        args![DeviceTensors::from(&args), DeviceScalars::from(&args.scalars), optional(args.grad_scale),],
    )
}
