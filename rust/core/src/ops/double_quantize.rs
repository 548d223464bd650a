//! `double_quantize`: block scales to 8-bit codes.
//!
//! ```text
//! offset           = mean(absmax)                           fp64 in a fixed order, rounded to fp32
//! d                = absmax - offset                        fp32
//! nested_absmax[g] = max |d| of 256 consecutive values      the last group may be short
//! code             = grid rule on d * (1 / nested_absmax)   code 0 in a group of zeros
//! ```
//!
//! Fixed order of the mean: chunks of 65,536 consecutive values; in a chunk, lane l of 256 adds the values at
//! l, l + 256, l + 512, ...; lanes are halved (lane[l] += lane[l + s] for s = 128, 64, .., 1); chunk sums are added
//! in ascending order and divided by the count. An empty tensor has offset 0.

use crate::check::arg;
use crate::codebook::encode_grid;
use crate::error::Result;
use crate::ops::quantize_4bit::absmax;
use crate::quant_state::NESTED_BLOCKSIZE;
use crate::tensor::{DType, TensorMut, TensorRef};

const OP: &str = "double_quantize";

#[derive(Debug)]
#[non_exhaustive]
pub struct DoubleQuantize<'a> {
    /// f32 `[nblocks]`
    pub absmax: TensorRef<'a>,
    /// u8 `[nblocks]`
    pub codes: TensorMut<'a>,
    /// f32 `[ceil(nblocks / 256)]`
    pub nested_absmax: TensorMut<'a>,
    /// f32 `[1]`
    pub offset: TensorMut<'a>,
    /// u8 `[2048 * ceil(nblocks / 65536)]`, room for the sums of all lanes
    pub lanes: TensorMut<'a>,
}

impl<'a> DoubleQuantize<'a> {
    pub fn new(
        absmax: TensorRef<'a>,
        codes: TensorMut<'a>,
        nested_absmax: TensorMut<'a>,
        offset: TensorMut<'a>,
        lanes: TensorMut<'a>,
    ) -> Result<Self> {
        let (nblocks, device) = (absmax.numel(), absmax.device());
        let groups = nblocks.div_ceil(NESTED_BLOCKSIZE);
        arg(OP, "absmax", absmax).dtype(DType::F32)?;
        arg(OP, "codes", codes.as_ref()).dtype(DType::U8)?.numel(nblocks, "one a block")?.on(device, "absmax")?;
        arg(OP, "nested_absmax", nested_absmax.as_ref())
            .dtype(DType::F32)?
            .numel(groups, "one for 256 blocks")?
            .on(device, "absmax")?;
        arg(OP, "offset", offset.as_ref()).dtype(DType::F32)?.numel(1, "a scalar")?.on(device, "absmax")?;
        let chunks = nblocks.div_ceil(MEAN_CHUNK);
        arg(OP, "lanes", lanes.as_ref())
            .dtype(DType::U8)?
            .numel(8 * MEAN_LANES * chunks, "2048 for 65536 blocks")?
            .on(device, "absmax")?
            .aligned_to(8)?;
        Ok(Self { absmax, codes, nested_absmax, offset, lanes })
    }
}

impl DoubleQuantize<'_> {
    pub(crate) fn run_on_cpu(self) {
        let scales: &[f32] = self.absmax.as_slice();
        let offset = mean(scales);
        self.offset.into_slice()[0] = offset;
        let codes = self.codes.into_slice().chunks_mut(NESTED_BLOCKSIZE);
        let groups = scales.chunks(NESTED_BLOCKSIZE).zip(codes).zip(self.nested_absmax.into_slice());
        for ((scales, codes), nested_absmax) in groups {
            *nested_absmax = quantize_group(scales, offset, codes);
        }
    }
}

fn quantize_group(scales: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let mut difference = [0.0; NESTED_BLOCKSIZE];
    for (difference, scale) in difference.iter_mut().zip(scales) {
        *difference = scale - offset;
    }
    let difference = &difference[..scales.len()];
    let absmax = absmax(difference);
    if absmax == 0.0 {
        codes.fill(0);
        return absmax;
    }
    let inverse = 1.0 / absmax;
    for (code, difference) in codes.iter_mut().zip(difference) {
        *code = encode_grid(difference * inverse);
    }
    absmax
}

/// Values whose sum is one term of the mean.
pub const MEAN_CHUNK: usize = 65536;
/// Running sums of a chunk.
pub const MEAN_LANES: usize = 256;

fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let sum: f64 = values.chunks(MEAN_CHUNK).map(lane_sum).fold(0.0, |sum, chunk| sum + chunk);
    (sum / values.len() as f64) as f32
}

fn lane_sum(chunk: &[f32]) -> f64 {
    let mut lanes = [0.0f64; MEAN_LANES];
    for row in chunk.chunks(MEAN_LANES) {
        for (lane, &value) in lanes.iter_mut().zip(row) {
            *lane += f64::from(value);
        }
    }
    let mut half = MEAN_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}
