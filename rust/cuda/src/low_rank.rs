//! What stands beside the products of `gemv_4bit_fused`, and the launch that makes the adapters' hidden values.

use std::ffi::c_void;
use std::ptr;

use halfbyte_core::ops::gemv_4bit::MAX_GROUP;
use halfbyte_core::ops::gemv_4bit_fused::{FusedProduct, Gemv4bitFused};
use halfbyte_core::{DType, Result, TensorMut};

use crate::args::{KernelArg, args, optional};
use crate::launch::{Family, Geometry, Launcher, extent, family};

const KERNELS: [&str; 2] = ["low_rank_f16", "low_rank_bf16"];
pub(crate) static FAMILY: Family = family!("low_rank", &KERNELS);

pub(crate) const MAX_ADAPTERS: usize = MAX_GROUP;
/// CTAs of a cluster, each of one warp; and rows of x.
pub(crate) const CTAS: usize = 16;
pub(crate) const THREADS: usize = 32;
/// Ranks of a cluster.
pub(crate) const TILE: usize = 8;

/// `struct Share` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Share {
    b: *const c_void,
    rank: i32,
    column: i32,
}

/// `struct Hidden` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Hidden {
    values: *const c_void,
    arrived: *mut c_void,
    ranks: i32,
    adapters_fp32: bool,
}

/// `struct Adapter` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Adapter {
    a: *const c_void,
    factors: *const c_void,
    scaling: f32,
    rank: i32,
    column: i32,
}

/// `struct Job` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Job {
    x: *const c_void,
    hidden: *mut c_void,
    arrived: *mut c_void,
    k: i32,
    rows_x: i32,
    ranks: i32,
    adapters_fp32: bool,
    adapters: [Adapter; MAX_ADAPTERS],
}

impl KernelArg for Job {}

/// Of one product.
#[derive(Clone, Copy)]
pub(crate) struct Beside {
    pub bias: *const c_void,
    pub share: Share,
}

impl Beside {
    pub fn none() -> Self {
        Self { bias: ptr::null(), share: Share { b: ptr::null(), rank: 0, column: 0 } }
    }

    /// Of each product; an adapter's hidden values follow those of the one before.
    pub fn all(fused: &Gemv4bitFused<'_>) -> Vec<Self> {
        let of = |(product, column): (&FusedProduct<'_>, usize)| Self {
            bias: optional(product.bias),
            share: product.adapter.as_ref().map_or(Self::none().share, |adapter| Share {
                b: adapter.b.ptr(),
                rank: adapter.rank as i32,
                column: column as i32,
            }),
        };
        fused.products().zip(fused.columns()).map(of).collect()
    }
}

impl Hidden {
    pub fn none() -> Self {
        Self { values: ptr::null(), arrived: ptr::null_mut(), ranks: 0, adapters_fp32: false }
    }

    pub fn of(fused: &Gemv4bitFused<'_>) -> Self {
        Self {
            values: scratch(fused.hidden.as_ref()).cast_const(),
            arrived: scratch(fused.arrived.as_ref()),
            ranks: fused.columns_of_all() as i32,
            adapters_fp32: fused.adapters().any(|adapter| adapter.a.dtype() == DType::F32),
        }
    }
}

fn scratch(own: Option<&TensorMut<'_>>) -> *mut c_void {
    own.map_or(ptr::null_mut(), |own| own.ptr())
}

/// The hidden values of all adapters, of which there are some.
pub(crate) fn launch(launcher: &Launcher, fused: &Gemv4bitFused<'_>, hidden: Hidden) -> Result<()> {
    let Some(FusedProduct { product: head, .. }) = fused.products().next() else { return Ok(()) };
    let mut adapters =
        [Adapter { a: ptr::null(), factors: ptr::null(), scaling: 0.0, rank: 0, column: 0 }; MAX_ADAPTERS];
    let (mut count, mut highest) = (0, 0);
    for (product, column) in fused.products().zip(fused.columns()) {
        let Some(adapter) = &product.adapter else { continue };
        adapters[count] = Adapter {
            a: adapter.a.ptr(),
            factors: optional(adapter.factors),
            scaling: adapter.scaling,
            rank: adapter.rank as i32,
            column: column as i32,
        };
        (count, highest) = (count + 1, highest.max(adapter.padded_rank()));
    }
    let job = Job {
        x: head.x.ptr(),
        hidden: scratch(fused.hidden.as_ref()),
        arrived: hidden.arrived,
        k: head.shape.k as i32,
        rows_x: head.shape.m as i32,
        ranks: hidden.ranks,
        adapters_fp32: hidden.adapters_fp32,
        adapters,
    };
    let grid = (extent(highest / TILE * CTAS), extent(head.shape.m.div_ceil(CTAS)), extent(count));
    let geometry = Geometry { grid, block: (extent(THREADS), 1, 1), shared: 0, overlaps: true };
    let kernel = KERNELS[usize::from(head.x.dtype() == DType::BF16)];
    launcher.launch_clustered(&FAMILY, kernel, geometry, CTAS, args![job])
}
