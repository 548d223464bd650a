//! `dequantize_blockwise`: `out[i] = map[codes[i]] * absmax[i / blocksize]` in fp32, then one rounding to out's dtype.

use crate::check::{arg, blocksize_8bit};
use crate::codebook::dynamic_map;
use crate::error::Result;
use crate::parallel;
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "dequantize_blockwise";

#[derive(Debug)]
#[non_exhaustive]
pub struct DequantizeBlockwise<'a> {
    /// u8 `[n]`
    pub codes: TensorRef<'a>,
    /// f32 `[ceil(n / blocksize)]`
    pub absmax: TensorRef<'a>,
    /// the signed map, or the unsigned one
    pub signed: bool,
    pub blocksize: usize,
    /// f32, f16 or bf16 `[n]`
    pub out: TensorMut<'a>,
}

impl<'a> DequantizeBlockwise<'a> {
    pub fn new(
        codes: TensorRef<'a>,
        absmax: TensorRef<'a>,
        signed: bool,
        blocksize: usize,
        out: TensorMut<'a>,
    ) -> Result<Self> {
        blocksize_8bit(OP, blocksize)?;
        let (n, device) = (out.numel(), codes.device());
        arg(OP, "codes", codes).dtype(DType::U8)?.numel(n, "one an element")?;
        arg(OP, "absmax", absmax)
            .dtype(DType::F32)?
            .numel(n.div_ceil(blocksize), "one a block")?
            .on(device, "codes")?;
        arg(OP, "out", out.as_ref()).float()?.on(device, "codes")?;
        Ok(Self { codes, absmax, signed, blocksize, out })
    }
}

/// Elements that a thread takes at a time: a multiple of every block size.
const CHUNK: usize = 1 << 16;

impl DequantizeBlockwise<'_> {
    pub(crate) fn run_on_cpu(self) {
        with_float!(self.out.dtype(), T => self.run::<T>())
    }

    fn run<T: Float>(self) {
        let (blocksize, map) = (self.blocksize, dynamic_map(self.signed));
        let out: &mut [T] = self.out.into_slice();
        let count = out.len().div_ceil(CHUNK);
        let codes = self.codes.as_slice::<u8>().chunks(CHUNK);
        let absmax = self.absmax.as_slice::<f32>().chunks(CHUNK / blocksize);
        parallel::for_each(out.chunks_mut(CHUNK).zip(codes).zip(absmax), count, |((out, codes), absmax)| {
            for ((out, codes), absmax) in out.chunks_mut(blocksize).zip(codes.chunks(blocksize)).zip(absmax) {
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = T::from_f32(map[usize::from(code)] * absmax);
                }
            }
        });
    }
}
