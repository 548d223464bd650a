//! `dequantize_4bit`: `out[i] = table[code(i)] * scale[i / blocksize]` in fp32, then one rounding to out's dtype.
//!
//! A block has one scale, hence 16 different results: they are rounded once, and the block is a table look-up.

use crate::check::{arg, blocksize_4bit};
use crate::error::Result;
use crate::parallel;
use crate::quant_state::{Absmax, QuantType};
use crate::simd::{Lanes, Simd};
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

const OP: &str = "dequantize_4bit";

#[derive(Debug)]
#[non_exhaustive]
pub struct Dequantize4bit<'a> {
    /// u8 `[ceil(n / 2)]`
    pub packed: TensorRef<'a>,
    /// one scale a block, `[ceil(n / blocksize)]`
    pub absmax: Absmax<'a>,
    pub quant_type: QuantType,
    pub blocksize: usize,
    /// f32, f16 or bf16 `[n]`
    pub out: TensorMut<'a>,
}

impl<'a> Dequantize4bit<'a> {
    pub fn new(
        packed: TensorRef<'a>,
        absmax: Absmax<'a>,
        quant_type: QuantType,
        blocksize: usize,
        out: TensorMut<'a>,
    ) -> Result<Self> {
        blocksize_4bit(OP, blocksize)?;
        let (n, device) = (out.numel(), packed.device());
        arg(OP, "packed", packed).dtype(DType::U8)?.numel(n.div_ceil(2), "two codes a byte")?;
        absmax.check(OP, n.div_ceil(blocksize), device)?;
        arg(OP, "out", out.as_ref()).float()?.on(device, "packed")?;
        Ok(Self { packed, absmax, quant_type, blocksize, out })
    }
}

/// Elements that a thread takes at a time: a multiple of every block size.
const CHUNK: usize = 1 << 16;

impl Dequantize4bit<'_> {
    pub(crate) fn run_on_cpu(self, simd: Simd) {
        with_float!(self.out.dtype(), T => self.run::<T>(simd))
    }

    fn run<T: Lanes>(self, simd: Simd) {
        let (blocksize, table, scales) = (self.blocksize, self.quant_type.table(), self.absmax.scales());
        let packed: &[u8] = self.packed.as_slice();
        let out: &mut [T] = self.out.into_slice();
        let count = out.len().div_ceil(CHUNK);
        let chunks = packed.chunks(CHUNK / 2).zip(out.chunks_mut(CHUNK)).enumerate();
        parallel::for_each(chunks, count, |(chunk, (packed, out))| {
            let blocks = packed.chunks(blocksize / 2).zip(out.chunks_mut(blocksize));
            for (block, (packed, out)) in blocks.enumerate() {
                let scale = scales.get(chunk * (CHUNK / blocksize) + block);
                dequantize_block(simd, packed, out, table, scale);
            }
        });
    }
}

/// One block, whole or short.
#[inline(always)]
pub(crate) fn dequantize_block<T: Lanes>(simd: Simd, packed: &[u8], out: &mut [T], table: &[f32; 16], scale: f32) {
    match simd {
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 if out.len().is_multiple_of(32) => {
            // SAFETY: the level was detected; out is a multiple of 32 elements and packed has half as many bytes.
            unsafe { avx512::dequantize_block(packed, out, table, scale) }
        }
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 if out.len().is_multiple_of(32) => {
            // SAFETY: as above.
            unsafe { avx2::dequantize_block(packed, out, table, scale) }
        }
        _ => look_up(packed, out, &scaled(table, scale)),
    }
}

#[inline(always)]
fn scaled<T: Float>(table: &[f32; 16], scale: f32) -> [T; 16] {
    table.map(|value| T::from_f32(value * scale))
}

fn look_up<T: Float>(packed: &[u8], out: &mut [T], table: &[T; 16]) {
    for (pair, &byte) in out.chunks_mut(2).zip(packed) {
        pair[0] = table[usize::from(byte >> 4)];
        if let Some(odd) = pair.get_mut(1) {
            *odd = table[usize::from(byte & 15)];
        }
    }
}
