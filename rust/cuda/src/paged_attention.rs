use halfbyte_core::Result;
use halfbyte_core::ops::paged_attention::{MAX_PARTS, PagedAttention};

use crate::args::{aligned, aligned_mut, args, dtype_index};
use crate::launch::{Family, Geometry, Launcher, extent, family};

/// By lanes that share a token (8, 16, 32), then heads of a CTA (1, 4, 8), then dtype.
const KERNELS: [&str; 27] = [
    "paged_attention_8_1_f32",
    "paged_attention_8_1_f16",
    "paged_attention_8_1_bf16",
    "paged_attention_8_4_f32",
    "paged_attention_8_4_f16",
    "paged_attention_8_4_bf16",
    "paged_attention_8_8_f32",
    "paged_attention_8_8_f16",
    "paged_attention_8_8_bf16",
    "paged_attention_16_1_f32",
    "paged_attention_16_1_f16",
    "paged_attention_16_1_bf16",
    "paged_attention_16_4_f32",
    "paged_attention_16_4_f16",
    "paged_attention_16_4_bf16",
    "paged_attention_16_8_f32",
    "paged_attention_16_8_f16",
    "paged_attention_16_8_bf16",
    "paged_attention_32_1_f32",
    "paged_attention_32_1_f16",
    "paged_attention_32_1_bf16",
    "paged_attention_32_4_f32",
    "paged_attention_32_4_f16",
    "paged_attention_32_4_bf16",
    "paged_attention_32_8_f32",
    "paged_attention_32_8_f16",
    "paged_attention_32_8_bf16",
];
pub(crate) static FAMILY: Family = family!("paged_attention", &KERNELS);

pub(crate) const WARPS: usize = 4;
/// Elements that a lane loads at a time.
const PER_LANE: usize = 8;

pub(crate) fn launch(launcher: &Launcher, args: PagedAttention<'_>) -> Result<()> {
    let (shape, inputs, outputs) = (args.shape, args.inputs, args.outputs);
    if shape.batch == 0 {
        return Ok(());
    }
    let lanes = shape.head_dim.div_ceil(PER_LANE);
    let lanes = [8, 16, 32].into_iter().position(|most| lanes <= most).unwrap_or(2);
    let (tile, heads) = [(0, 1), (1, 4), (2, 8)].into_iter().find(|(_, most)| shape.group() <= *most).unwrap_or((2, 8));
    let tiles = shape.kv_heads * shape.group().div_ceil(heads);
    // Parts are taken in turns by so many CTAs as fill the device twice; which parts there are depends on the row.
    let ctas = (2 * launcher.limits().multiprocessors).div_ceil(tiles * shape.batch).clamp(1, MAX_PARTS);
    let vector = shape.head_dim % PER_LANE == 0
        && aligned_mut(&outputs.keys, 16)
        && aligned_mut(&outputs.values, 16)
        && aligned(inputs.q, 16);
    launcher.launch(
        &FAMILY,
        KERNELS[9 * lanes + 3 * tile + dtype_index(inputs.q.dtype())],
        Geometry {
            grid: (extent(ctas), extent(tiles), extent(shape.batch)),
            block: (extent(32 * WARPS), 1, 1),
            shared: 0,
            overlaps: true,
        },
        args![
            inputs.q.ptr(),
            inputs.k.ptr(),
            inputs.v.ptr(),
            inputs.cos.ptr(),
            inputs.sin.ptr(),
            inputs.tables.ptr(),
            inputs.lengths.ptr(),
            outputs.keys.ptr(),
            outputs.values.ptr(),
            outputs.partials.ptr(),
            outputs.arrived.ptr(),
            outputs.out.ptr(),
            shape.heads as i32,
            shape.kv_heads as i32,
            shape.head_dim as i32,
            shape.blocks as i32,
            shape.table as i32,
            i32::try_from(args.window).unwrap_or(0),
            vector,
        ],
    )
}
