//! Inputs and short calls that the tests of several families share.
#![allow(dead_code)]

use half::{bf16, f16};
use halfbyte_core::ops::dequantize_4bit::Dequantize4bit;
use halfbyte_core::ops::quantize_4bit::Quantize4bit;
use halfbyte_core::tensor::Float;
use halfbyte_core::{Absmax, Backend, CpuBackend, QuantType, TensorMut, TensorRef};

pub const QUANT_TYPES: [QuantType; 3] = [QuantType::Nf4, QuantType::Fp4, QuantType::Int4];

/// The plain loops and their siblings of every instruction set of this machine.
pub fn backends() -> Vec<CpuBackend> {
    CpuBackend::all()
}

/// What every backend makes of `work`; all results but the first are compared with the first.
pub fn assert_siblings_equal<R: PartialEq + std::fmt::Debug>(context: &str, work: impl Fn(&CpuBackend) -> R) {
    let expected = work(&CpuBackend::oracle());
    for backend in backends() {
        assert_eq!(work(&backend), expected, "{context} {backend:?}");
    }
}

/// Roughly normal values, the same on every run (splitmix64).
pub fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

pub fn cast<T: Float>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f32(value)).collect()
}

/// The bits of a float type, for exact comparison.
pub trait Bits: Float {
    fn bits(self) -> u32;
}

impl Bits for f32 {
    fn bits(self) -> u32 {
        self.to_bits()
    }
}
impl Bits for f16 {
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}
impl Bits for bf16 {
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

pub fn bits<T: Bits>(values: &[T]) -> Vec<u32> {
    values.iter().map(|&value| value.bits()).collect()
}

pub fn quantize<T: Float>(
    backend: &CpuBackend,
    x: &[T],
    quant_type: QuantType,
    blocksize: usize,
) -> (Vec<u8>, Vec<f32>) {
    let mut packed = vec![0xAA; x.len().div_ceil(2)];
    let mut absmax = vec![-1.0; x.len().div_ceil(blocksize)];
    let args = Quantize4bit::new(
        TensorRef::from_slice(x),
        TensorMut::from_slice(&mut packed),
        TensorMut::from_slice(&mut absmax),
        quant_type,
        blocksize,
    );
    backend.quantize_4bit(args.unwrap()).unwrap();
    (packed, absmax)
}

pub fn dequantize<T: Float>(
    backend: &CpuBackend,
    packed: &[u8],
    absmax: Absmax<'_>,
    quant_type: QuantType,
    blocksize: usize,
    n: usize,
) -> Vec<T> {
    let mut out = vec![T::from_f32(f32::NAN); n];
    let target = TensorMut::from_slice(&mut out);
    let args = Dequantize4bit::new(TensorRef::from_slice(packed), absmax, quant_type, blocksize, target);
    backend.dequantize_4bit(args.unwrap()).unwrap();
    out
}

pub fn plain(absmax: &[f32]) -> Absmax<'_> {
    Absmax::Plain { absmax: TensorRef::from_slice(absmax) }
}
