//! Which vector instructions this processor has, and how its registers meet the float types.

use half::{bf16, f16};

use crate::tensor::Float;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

/// A float type that every SIMD level can load and store.
#[cfg(target_arch = "x86_64")]
pub(crate) trait Lanes: Float + avx512::Lanes512 {}
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Lanes: Float {}

impl Lanes for f32 {}
impl Lanes for f16 {}
impl Lanes for bf16 {}

/// The instruction set that an operation runs on; every level gives the same codes and the same dequantized bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Simd {
    /// The plain loops.
    Scalar,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
}

impl Simd {
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            return Simd::Avx512;
        }
        Simd::Scalar
    }
}

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
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let detected: [(&'static str, bool); 0] = [];
    detected.into_iter().filter_map(|(name, present)| present.then_some(name)).collect()
}
