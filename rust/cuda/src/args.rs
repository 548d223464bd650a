//! What a kernel takes: every type that may be an argument, laid out as the device declares it.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;

use halfbyte_core::{Absmax, DType, QuantType, TensorMut, TensorRef};

/// A type whose bytes a kernel parameter reads as they are.
pub(crate) trait KernelArg: Copy {}

impl KernelArg for *const c_void {}
impl KernelArg for *mut c_void {}
impl KernelArg for i64 {}
impl KernelArg for i32 {}
impl KernelArg for f32 {}
impl KernelArg for bool {}
impl KernelArg for DeviceAbsmax {}

/// The address of one argument, which the driver reads during the launch.
#[repr(transparent)]
pub(crate) struct Arg<'a> {
    address: *const c_void,
    borrow: PhantomData<&'a ()>,
}

impl<'a> Arg<'a> {
    pub fn new<T: KernelArg>(value: &'a T) -> Self {
        Self { address: ptr::from_ref(value).cast(), borrow: PhantomData }
    }
}

/// The arguments of one launch, in the order of the kernel's parameters.
macro_rules! args {
    ($($value:expr),+ $(,)?) => { &mut [$($crate::args::Arg::new(&$value)),+] };
}
pub(crate) use args;

/// `struct Absmax` of absmax.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceAbsmax {
    codes: *const c_void,
    absmax: *const c_void,
    map: *const c_void,
    offset: f32,
}

impl From<Absmax<'_>> for DeviceAbsmax {
    fn from(absmax: Absmax<'_>) -> Self {
        match absmax {
            Absmax::Plain { absmax } => {
                Self { codes: ptr::null(), absmax: absmax.ptr(), map: ptr::null(), offset: 0.0 }
            }
            Absmax::Nested { codes, absmax, map, offset } => {
                Self { codes: codes.ptr(), absmax: absmax.ptr(), map: map.ptr(), offset }
            }
        }
    }
}

/// Pointer to an optional tensor; null stands for an absent one.
pub(crate) fn optional(tensor: Option<TensorRef<'_>>) -> *const c_void {
    tensor.map_or(ptr::null(), |tensor| tensor.ptr())
}

/// Row of the codebook tables that build.rs prints.
pub(crate) fn codebook_row(quant_type: QuantType) -> i32 {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 1,
        QuantType::Int4 => 2,
    }
}

/// Kernels of a float dtype stand in the order f32, f16, bf16.
pub(crate) fn dtype_index(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::U8 | DType::I32 => unreachable!("float dtypes are checked when the arguments are built"),
    }
}

/// Block sizes are powers of two.
pub(crate) fn log2(blocksize: usize) -> i32 {
    blocksize.trailing_zeros() as i32
}

pub(crate) fn aligned(tensor: TensorRef<'_>, bytes: usize) -> bool {
    tensor.ptr().addr() % bytes == 0
}

pub(crate) fn aligned_mut(tensor: &TensorMut<'_>, bytes: usize) -> bool {
    tensor.ptr().addr() % bytes == 0
}
