//! `quantize_blockwise`: floats to 8-bit codes of a dynamic map, one fp32 scale a block.
//!
//! ```text
//! absmax[b] = max |x| of block b              NaN if any element is NaN; the last block may be short
//! code      = nearest rule on x * (1 / max(absmax, 1e-38))
//! ```
//!
//! The nearest rule takes the entry nearest by fp32 midpoints, and the even code on a tie.

use crate::check::{arg, blocksize_8bit};
use crate::codebook::encode_nearest;
use crate::error::Result;
use crate::ops::quantize_4bit::{ABSMAX_MIN, absmax};
use crate::parallel;
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "quantize_blockwise";

#[derive(Debug)]
#[non_exhaustive]
pub struct QuantizeBlockwise<'a> {
    /// f32, f16 or bf16 `[n]`
    pub x: TensorRef<'a>,
    /// u8 `[n]`
    pub codes: TensorMut<'a>,
    /// f32 `[ceil(n / blocksize)]`
    pub absmax: TensorMut<'a>,
    /// the signed map, or the unsigned one
    pub signed: bool,
    pub blocksize: usize,
}

impl<'a> QuantizeBlockwise<'a> {
    pub fn new(
        x: TensorRef<'a>,
        codes: TensorMut<'a>,
        absmax: TensorMut<'a>,
        signed: bool,
        blocksize: usize,
    ) -> Result<Self> {
        blocksize_8bit(OP, blocksize)?;
        let (n, device) = (x.numel(), x.device());
        arg(OP, "x", x).float()?;
        arg(OP, "codes", codes.as_ref()).dtype(DType::U8)?.numel(n, "one an element")?.on(device, "x")?;
        arg(OP, "absmax", absmax.as_ref())
            .dtype(DType::F32)?
            .numel(n.div_ceil(blocksize), "one a block")?
            .on(device, "x")?;
        Ok(Self { x, codes, absmax, signed, blocksize })
    }
}

/// Elements that a thread takes at a time: a multiple of every block size.
const CHUNK: usize = 1 << 14;

impl QuantizeBlockwise<'_> {
    pub(crate) fn run_on_cpu(self) {
        with_float!(self.x.dtype(), T => self.run::<T>())
    }

    fn run<T: Float>(self) {
        let (blocksize, signed) = (self.blocksize, self.signed);
        let x: &[T] = self.x.as_slice();
        let codes = self.codes.into_slice().chunks_mut(CHUNK);
        let absmax = self.absmax.into_slice().chunks_mut(CHUNK / blocksize);
        let chunks = x.chunks(CHUNK).zip(codes).zip(absmax);
        parallel::for_each(chunks, x.len().div_ceil(CHUNK), |((x, codes), absmax)| {
            let blocks = x.chunks(blocksize).zip(codes.chunks_mut(blocksize)).zip(absmax);
            for ((x, codes), absmax) in blocks {
                *absmax = quantize_block(x, codes, signed);
            }
        });
    }
}

fn quantize_block<T: Float>(x: &[T], codes: &mut [u8], signed: bool) -> f32 {
    let absmax = absmax(x);
    let inverse = 1.0 / absmax.max(ABSMAX_MIN);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = encode_nearest(signed, x.to_f32() * inverse);
    }
    absmax
}
