//! `quantize_4bit`: floats to 4-bit codes with one fp32 scale a block.
//!
//! The flat array is cut into blocks of `blocksize` elements; the last one may be short. With x in fp32,
//!
//! ```text
//! absmax[b] = max |x| of block b          NaN if any element is NaN (the codes are then unspecified)
//! scaled    = x * (1 / max(absmax, 1e-38))   in a whole block
//!           = x / max(absmax, 1e-38)         in the short last block
//! code      = order[number of thresholds strictly below scaled]
//! ```
//!
//! Element 2j is the high nibble of byte j, element 2j + 1 the low one; the missing last element of an odd count
//! gets the code of zero. All steps are IEEE fp32, so every backend produces the same bytes.

use crate::check::{arg, blocksize_4bit};
use crate::error::Result;
use crate::parallel;
use crate::quant_state::QuantType;
use crate::simd::{Lanes, Simd};
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

#[cfg(target_arch = "x86_64")]
mod avx512;

const OP: &str = "quantize_4bit";

/// Lower bound of the divisor: an all-zero block scales to zeros.
pub const ABSMAX_MIN: f32 = 1e-38;

#[derive(Debug)]
#[non_exhaustive]
pub struct Quantize4bit<'a> {
    /// f32, f16 or bf16 `[n]`
    pub x: TensorRef<'a>,
    /// u8 `[ceil(n / 2)]`
    pub packed: TensorMut<'a>,
    /// f32 `[ceil(n / blocksize)]`
    pub absmax: TensorMut<'a>,
    pub quant_type: QuantType,
    pub blocksize: usize,
}

impl<'a> Quantize4bit<'a> {
    pub fn new(
        x: TensorRef<'a>,
        packed: TensorMut<'a>,
        absmax: TensorMut<'a>,
        quant_type: QuantType,
        blocksize: usize,
    ) -> Result<Self> {
        blocksize_4bit(OP, blocksize)?;
        let (n, device) = (x.numel(), x.device());
        arg(OP, "x", x).float()?;
        arg(OP, "packed", packed.as_ref())
            .dtype(DType::U8)?
            .numel(n.div_ceil(2), "two codes a byte")?
            .on(device, "x")?;
        arg(OP, "absmax", absmax.as_ref())
            .dtype(DType::F32)?
            .numel(n.div_ceil(blocksize), "one a block")?
            .on(device, "x")?;
        Ok(Self { x, packed, absmax, quant_type, blocksize })
    }
}

/// Elements that a thread takes at a time: a multiple of every block size.
const CHUNK: usize = 1 << 16;

impl Quantize4bit<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.x.dtype(), T => self.run::<T>(simd))
    }

    fn run<T: Lanes>(self, simd: Simd) {
        let (blocksize, quant_type) = (self.blocksize, self.quant_type);
        let x: &[T] = self.x.as_slice();
        let packed = self.packed.into_slice().chunks_mut(CHUNK / 2);
        let absmax = self.absmax.into_slice().chunks_mut(CHUNK / blocksize);
        let chunks = x.chunks(CHUNK).zip(packed).zip(absmax);
        parallel::for_each(chunks, x.len().div_ceil(CHUNK), |((x, packed), absmax)| {
            quantize_blocks(simd, x, packed, absmax, quant_type, blocksize);
        });
    }
}

fn quantize_blocks<T: Lanes>(
    simd: Simd,
    x: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
    quant_type: QuantType,
    blocksize: usize,
) {
    let blocks = x.chunks(blocksize).zip(packed.chunks_mut(blocksize / 2)).zip(absmax);
    for ((x, packed), absmax) in blocks {
        *absmax = match simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if x.len() == blocksize => {
                // SAFETY: the level was detected; a whole block is a multiple of 32 elements with half as many bytes.
                unsafe { avx512::quantize_block(x, packed, quant_type.ranks()) }
            }
            _ => quantize_block(x, packed, quant_type, x.len() == blocksize),
        };
    }
}

fn quantize_block<T: Float>(x: &[T], packed: &mut [u8], quant_type: QuantType, whole: bool) -> f32 {
    let absmax = absmax(x);
    let divisor = absmax.max(ABSMAX_MIN);
    let inverse = 1.0 / divisor;
    let encode = |x: T| {
        let scaled = if whole { x.to_f32() * inverse } else { x.to_f32() / divisor };
        quant_type.ranks().encode(scaled)
    };
    for (byte, pair) in packed.iter_mut().zip(x.chunks(2)) {
        let low = pair.get(1).map_or(quant_type.zero_code(), |&x| encode(x));
        *byte = encode(pair[0]) << 4 | low;
    }
    absmax
}

/// max |x|; as integers NaN is above infinity, so a NaN is never lost.
pub(crate) fn absmax<T: Float>(x: &[T]) -> f32 {
    let bits = x.iter().map(|x| x.to_f32().to_bits() & 0x7fff_ffff).max();
    f32::from_bits(bits.unwrap_or(0))
}
