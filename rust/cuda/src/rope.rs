use std::ffi::c_void;

use halfbyte_core::ops::rope::{Heads, Rope};
use halfbyte_core::{Result, TensorMut};

use crate::args::{KernelArg, aligned, aligned_mut, args, dtype_index};
use crate::launch::{Family, Geometry, Launcher, extent, family};

const KERNELS: [&str; 3] = ["rope_f32", "rope_f16", "rope_bf16"];
pub(crate) static FAMILY: Family = family!("rope", &KERNELS);

pub(crate) const THREADS: u32 = 256;
/// Pairs that a thread rotates at once.
pub(crate) const WIDTH: usize = 8;

/// `struct Heads` of rope.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceHeads {
    x: *const c_void,
    out: *mut c_void,
    strides: [i64; 3],
    heads: i32,
}

impl KernelArg for DeviceHeads {}

impl DeviceHeads {
    fn new(heads: Heads<'_>, out: &TensorMut<'_>) -> Self {
        let strides = heads.strides.map(|stride| stride as i64);
        Self { x: heads.span.ptr(), out: out.ptr(), strides, heads: heads.heads as i32 }
    }
}

/// `struct Angles` of rope.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceAngles {
    cos: *const c_void,
    sin: *const c_void,
    batch_stride: i64,
}

impl KernelArg for DeviceAngles {}

pub(crate) fn launch(launcher: &Launcher, args: Rope<'_>) -> Result<()> {
    let (shape, dtype) = (args.shape, args.q.span.dtype());
    let half = shape.head_dim / 2;
    let rows = shape.batch * shape.tokens * (args.q.heads + args.k.heads);
    if rows * half == 0 {
        return Ok(());
    }
    let lanes = half.div_ceil(WIDTH).next_power_of_two().min(THREADS as usize);
    let ctas = rows.div_ceil(THREADS as usize / lanes);
    let keeps_alignment = |elements: usize| (elements * dtype.size()).is_multiple_of(16);
    let vector = keeps_alignment(half)
        && [args.q, args.k].iter().all(|x| aligned(x.span, 16) && x.strides.iter().all(|&s| keeps_alignment(s)))
        && [args.angles.cos, args.angles.sin].iter().all(|&angles| aligned(angles, 16))
        && [&args.q_out, &args.k_out].iter().all(|out| aligned_mut(out, 16));
    let angles = DeviceAngles {
        cos: args.angles.cos.ptr(),
        sin: args.angles.sin.ptr(),
        batch_stride: args.angle_stride() as i64,
    };
    launcher.launch(
        &FAMILY,
        KERNELS[dtype_index(dtype)],
        Geometry { grid: (extent(ctas), 1, 1), block: (THREADS, 1, 1), shared: 0, overlaps: true },
        args![
            DeviceHeads::new(args.q, &args.q_out),
            DeviceHeads::new(args.k, &args.k_out),
            angles,
            shape.tokens as i32,
            rows as i32,
            half as i32,
            lanes as i32,
            args.inverse,
            vector,
        ],
    )
}
