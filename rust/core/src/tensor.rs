//! Borrowed memory: a pointer, a number of elements, a dtype and a device.
//!
//! Whoever builds a view from a raw pointer vouches for the memory; everything after that is checked and safe.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use half::{bf16, f16};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    F32,
    F16,
    BF16,
    U8,
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 => 1,
        }
    }

    pub const fn is_float(self) -> bool {
        !matches!(self, DType::U8 | DType::I32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::U8 => "uint8",
            DType::I32 => "int32",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A type that may lie in a tensor.
pub trait Element: Copy + Send + Sync + 'static {
    const DTYPE: DType;
}

/// A floating type; arithmetic is done in fp32, `from_f32` rounds to nearest even.
pub trait Float: Element {
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
}

impl Element for u8 {
    const DTYPE: DType = DType::U8;
}

impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}

/// Without branches, unlike the conversions of bf16 itself, so that the compiler can use vectors.
impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet = bits >> 16 | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

/// Contiguous memory that is only read.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    ptr: *const c_void,
    numel: usize,
    dtype: DType,
    device: Device,
    borrow: PhantomData<&'a [u8]>,
}

/// Contiguous memory that is written, and not aliased by any other argument of the same call.
#[derive(Debug)]
pub struct TensorMut<'a> {
    ptr: *mut c_void,
    numel: usize,
    dtype: DType,
    device: Device,
    borrow: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view is a shared borrow of plain numbers, like `&[T]`.
unsafe impl Send for TensorRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorRef<'_> {}
// SAFETY: a view is a unique borrow of plain numbers, like `&mut [T]`.
unsafe impl Send for TensorMut<'_> {}

impl<'a> TensorRef<'a> {
    /// # Safety
    /// `ptr` is readable on `device` for `numel` elements of `dtype` during `'a`; it may be null if `numel` is 0.
    pub unsafe fn new(ptr: *const c_void, numel: usize, dtype: DType, device: Device) -> Self {
        Self { ptr, numel, dtype, device, borrow: PhantomData }
    }

    pub fn from_slice<T: Element>(slice: &'a [T]) -> Self {
        // SAFETY: the slice lives for 'a and holds exactly these elements.
        unsafe { Self::new(slice.as_ptr().cast(), slice.len(), T::DTYPE, Device::Cpu) }
    }

    pub fn ptr(&self) -> *const c_void {
        self.ptr
    }
    pub fn numel(&self) -> usize {
        self.numel
    }
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    pub fn device(&self) -> Device {
        self.device
    }

    /// The elements of a CPU tensor; dtype and alignment were checked when the argument struct was built.
    pub(crate) fn as_slice<T: Element>(&self) -> &'a [T] {
        assert_eq!((self.dtype, self.device), (T::DTYPE, Device::Cpu));
        if self.numel == 0 {
            return &[];
        }
        // SAFETY: `new` vouches for the memory, the assertion for the type, `check::tensor` for the alignment.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.numel) }
    }
}

impl<'a> TensorMut<'a> {
    /// # Safety
    /// As [`TensorRef::new`], writable, and no other live view overlaps it.
    pub unsafe fn new(ptr: *mut c_void, numel: usize, dtype: DType, device: Device) -> Self {
        Self { ptr, numel, dtype, device, borrow: PhantomData }
    }

    pub fn from_slice<T: Element>(slice: &'a mut [T]) -> Self {
        // SAFETY: the slice is borrowed uniquely for 'a and holds exactly these elements.
        unsafe { Self::new(slice.as_mut_ptr().cast(), slice.len(), T::DTYPE, Device::Cpu) }
    }

    pub fn ptr(&self) -> *mut c_void {
        self.ptr
    }
    pub fn numel(&self) -> usize {
        self.numel
    }
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    pub fn device(&self) -> Device {
        self.device
    }

    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { ptr: self.ptr, numel: self.numel, dtype: self.dtype, device: self.device, borrow: PhantomData }
    }

    /// The elements of a CPU tensor; see [`TensorRef::as_slice`].
    pub(crate) fn into_slice<T: Element>(self) -> &'a mut [T] {
        assert_eq!((self.dtype, self.device), (T::DTYPE, Device::Cpu));
        if self.numel == 0 {
            return &mut [];
        }
        // SAFETY: `new` vouches for the memory, the assertion for the type, `check::tensor` for the alignment.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.numel) }
    }
}

/// Runs `$body` with `$T` bound to the Rust type of a float dtype that a check has already let through.
macro_rules! with_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::tensor::DType::F16 => {
                type $T = ::half::f16;
                $body
            }
            $crate::tensor::DType::BF16 => {
                type $T = ::half::bf16;
                $body
            }
            $crate::tensor::DType::U8 | $crate::tensor::DType::I32 => {
                unreachable!("float dtypes are checked at construction")
            }
        }
    };
}
pub(crate) use with_float;
