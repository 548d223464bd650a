//! Which vector instructions this processor has, and how its registers meet the float types.

use half::{bf16, f16};

use crate::tensor::Float;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

/// A float type that every SIMD level can load and store.
#[cfg(target_arch = "x86_64")]
pub(crate) trait Lanes: Float + avx2::Lanes256 + avx512::Lanes512 {}
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Lanes: Float {}

impl Lanes for f32 {}
impl Lanes for f16 {}
impl Lanes for bf16 {}

/// Registers of fp32 lanes, as the matrix loops use them.
///
/// # Safety
/// All methods need the processor features of the implementing level.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe trait Vector {
    type Register: Copy;
    /// Sixteen fp32 values, indexed by a 4-bit code.
    type Table: Copy;
    const LANES: usize;
    /// Rows of x whose sums fit the registers beside the weights, at most 8.
    const GROUP: usize;

    unsafe fn splat(value: f32) -> Self::Register;

    /// `LANES` floats, aligned to the size of a register.
    unsafe fn load(from: *const f32) -> Self::Register;

    /// `LANES` elements, not aligned, in fp32.
    unsafe fn widen<T: Lanes>(from: *const T) -> Self::Register;

    /// Has the cache line at `from`, which need not exist, on its way.
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint that never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    /// a * b + c, rounded once.
    unsafe fn multiply_add(a: Self::Register, b: Self::Register, c: Self::Register) -> Self::Register;

    /// The sum of the lanes, in a fixed order.
    unsafe fn sum(values: Self::Register) -> f32;

    unsafe fn table(table: &[f32; 16]) -> Self::Table;

    /// The even and the odd elements of `LANES` packed bytes.
    unsafe fn decode(packed: *const u8, table: Self::Table) -> (Self::Register, Self::Register);
}

/// The instruction set that an operation runs on; every level gives the same codes and the same dequantized bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Simd {
    /// The plain loops.
    Scalar,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
}

impl Simd {
    /// The levels of this processor, ascending.
    pub fn available() -> Vec<Self> {
        [Simd::Scalar, Simd::Avx2, Simd::Avx512].into_iter().filter(|level| level.is_available()).collect()
    }

    /// The highest level of this processor.
    pub fn detect() -> Self {
        [Simd::Avx512, Simd::Avx2].into_iter().find(|level| level.is_available()).unwrap_or(Simd::Scalar)
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        match self {
            Simd::Scalar => true,
            Simd::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Simd::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Simd::Scalar
    }
}

/// A function of plain loops that the compiler turns into the vectors of a level, which becomes its first argument. What it
/// calls must be inlined always. `scalar` and `vector`: its body where levels need one of their own.
macro_rules! at_level {
    (
        $(#[$attribute:meta])*
        fn $name:ident<$($generic:ident: $bound:ident),*>($($arg:ident: $type:ty),* $(,)?) => $body:block
    ) => {
        $crate::simd::at_level! {
            $(#[$attribute])*
            fn $name<$($generic: $bound),*>($($arg: $type),*) { scalar: $body, vector: $body }
        }
    };
    (
        $(#[$attribute:meta])*
        fn $name:ident<$($generic:ident: $bound:ident),*>($($arg:ident: $type:ty),* $(,)?) {
            scalar: $scalar:expr,
            vector: $vector:expr $(,)?
        }
    ) => {
        $(#[$attribute])*
        fn $name<$($generic: $bound),*>(simd: $crate::simd::Simd, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            unsafe fn avx512<$($generic: $bound),*>($($arg: $type),*) {
                $vector
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2<$($generic: $bound),*>($($arg: $type),*) {
                $vector
            }

            match simd {
                // SAFETY: the level was detected.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Simd::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Simd::Avx2 => unsafe { avx2($($arg),*) },
                _ => $scalar,
            }
        }
    };
}
pub(crate) use at_level;

/// The features of this processor that matter here, by the names of the instruction sets.
pub fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let detected = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512dq", is_x86_feature_detected!("avx512dq")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let detected: [(&'static str, bool); 0] = [];
    detected.into_iter().filter_map(|(name, present)| present.then_some(name)).collect()
}
