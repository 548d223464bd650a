//! paged_attention where every query head has a key head of its own: kernels of compute capability 9.0.

use cudarc::driver::sys::{CUtensorMap, CUtensorMapDataType};
use halfbyte_core::ops::paged_attention::{AttentionShape, BLOCK, PagedAttention};
use halfbyte_core::{DType, Result, TensorMut};

use crate::args::{aligned, aligned_mut, args};
use crate::launch::{Family, Geometry, Launcher, Limits, Matrix, extent, family};
use crate::paged_attention::{DeviceShape, DeviceTensors};

/// By elements of a head, then by dtype.
const KERNELS: [&str; 4] = [
    "paged_attention_bulk_64_f16",
    "paged_attention_bulk_64_bf16",
    "paged_attention_bulk_128_f16",
    "paged_attention_bulk_128_bf16",
];
pub(crate) static FAMILY: Family = family!("paged_attention_bulk", &KERNELS);

/// Tokens that a CTA works on at a time.
pub(crate) const CHUNK: usize = 64;
/// Most parts of a row, and CTAs of a cluster.
pub(crate) const PARTS: usize = 16;
pub(crate) const THREADS: usize = 32 * CHUNK / BLOCK;
/// What a CTA has in shared memory, without its parts; by elements of a head.
const SHARED_BYTES: [usize; 2] = [17200, 33968];

/// The place of these arguments' head size among those of the kernels; `None` if they are not for these kernels.
pub(crate) fn place(limits: Limits, args: &PagedAttention<'_>) -> Option<usize> {
    let (shape, inputs, outputs) = (args.shape, &args.inputs, &args.outputs);
    let size = [64, 128].into_iter().position(|size| size == shape.head_dim)?;
    let mut words = [inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin].into_iter();
    let fit = words.all(|x| aligned(x, 4)) && aligned_mut(&outputs.keys, 16) && aligned_mut(&outputs.values, 16);
    // As gemm_4bit's, the kernels exist for compute capability 9.0 alone.
    let exist = limits.capability == (9, 0) && limits.has_machine_code;
    (exist && fit && shape.group() == 1 && outputs.keys.dtype().size() == 2).then_some(size)
}

/// CTAs that share a head of a row, a power of two: `heads` of all rows fill an H200 with five CTAs a multiprocessor.
/// More than eight begin too late to help in a short context; `tokens`: most of a row.
fn split(heads: usize, tokens: usize, multiprocessors: usize) -> usize {
    let most = if tokens > 12 * CHUNK { PARTS } else { PARTS / 2 };
    1 << (5 * multiprocessors / heads).clamp(1, most).ilog2()
}

/// `args` as `place` has seen them.
pub(crate) fn launch(launcher: &Launcher, args: &PagedAttention<'_>, place: usize) -> Result<()> {
    let (shape, tokens) = (args.shape, args.shape.table * BLOCK);
    let split = split(shape.batch * shape.heads, tokens, launcher.limits().multiprocessors);
    let of_part = size_of::<[f32; 2]>() + shape.head_dim / split * size_of::<f32>();
    let geometry = Geometry {
        grid: (extent(split), extent(shape.heads), extent(shape.batch)),
        block: (extent(THREADS), 1, 1),
        shared: SHARED_BYTES[place] + tokens.div_ceil(CHUNK).min(PARTS) * of_part,
        overlaps: true,
    };
    launcher.launch_clustered(
        &FAMILY,
        KERNELS[2 * place + usize::from(args.inputs.q.dtype() == DType::BF16)],
        geometry,
        split,
        args![
            DeviceTensors::new(args),
            DeviceShape::new(args, 1),
            map(launcher, shape, &args.outputs.keys)?,
            map(launcher, shape, &args.outputs.values)?,
        ],
    )
}

/// Of keys or values: a block by 64 elements of a head.
fn map(launcher: &Launcher, shape: AttentionShape, cache: &TensorMut<'_>) -> Result<CUtensorMap> {
    let matrix = Matrix {
        at: cache.ptr().cast_const(),
        dtype: CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        size: 2,
        rows: shape.blocks * BLOCK,
        columns: shape.kv_heads * shape.head_dim,
        stride: shape.kv_heads * shape.head_dim,
    };
    launcher.map_boxes(matrix, BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_compiled_with_the_memory_that_the_launcher_asks_for() {
        let source = include_str!("paged_attention_bulk.cu");
        for (i, kernel) in KERNELS.into_iter().enumerate() {
            let name = kernel.trim_start_matches("paged_attention_bulk_").replace('_', ", ");
            let compiled = format!("PAGED_ATTENTION_BULK({name}, {})", SHARED_BYTES[i / 2]);
            assert!(source.contains(&compiled), "{compiled}");
        }
    }

    /// The fastest, or a few tenths of a microsecond from it.
    #[test]
    fn splits_are_those_that_were_measured() {
        let of = |heads: usize, tokens| split(heads, tokens, 132);
        assert_eq!([256, 512, 1024, 16384].map(|tokens| of(32, tokens)), [8, 8, 16, 16]);
        assert_eq!([256, 1024].map(|tokens| of(40, tokens)), [8, 16]);
        assert_eq!([64, 128, 256, 320, 512, 1024].map(|heads| of(heads, 1024)), [8, 4, 2, 2, 1, 1]);
    }
}
