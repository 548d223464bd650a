use halfbyte_core::Result;
use halfbyte_core::ops::paged_attention::{AttentionShape, MAX_PARTS, PagedAttention};

use crate::args::{KernelArg, aligned_mut, args, dtype_index};
use crate::launch::{Family, Geometry, Launcher, extent, family};

/// By lanes that share a token and heads of a CTA (any: rows on any boundary), then by dtype.
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
    "paged_attention_any_f32",
    "paged_attention_any_f16",
    "paged_attention_any_bf16",
];
pub(crate) static FAMILY: Family = family!("paged_attention", &KERNELS);

pub(crate) const WARPS: usize = 8;
/// Elements that a lane loads at a time.
pub(crate) const PER_LANE: usize = 8;

/// `struct Shape` of paged_attention.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceShape {
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    blocks: i32,
    table: i32,
    window: i32,
}

impl KernelArg for DeviceShape {}

/// Place among the kernels of a dtype, and heads of a CTA.
fn variant(shape: AttentionShape, vector: bool) -> (usize, usize) {
    if !vector {
        return (8, 1);
    }
    let tile = [1, 4, 8].into_iter().position(|heads| shape.group() <= heads).unwrap_or(2);
    match shape.head_dim.div_ceil(PER_LANE) {
        ..=8 => (tile, [1, 4, 8][tile]),
        9..=16 => (3 + tile, [1, 4, 8][tile]),
        _ => (6 + tile.min(1), [1, 4][tile.min(1)]),
    }
}

pub(crate) fn launch(launcher: &Launcher, args: PagedAttention<'_>) -> Result<()> {
    let (shape, inputs, outputs) = (args.shape, args.inputs, args.outputs);
    if shape.batch == 0 {
        return Ok(());
    }
    let vector = shape.head_dim % PER_LANE == 0 && aligned_mut(&outputs.keys, 16) && aligned_mut(&outputs.values, 16);
    let (index, heads) = variant(shape, vector);
    let tiles = shape.kv_heads * shape.group().div_ceil(heads);
    // Parts are taken in turns by so many CTAs as fill the device twice; which parts there are depends on the row.
    let ctas = (2 * launcher.limits().multiprocessors).div_ceil(tiles * shape.batch).clamp(1, MAX_PARTS);
    launcher.launch(
        &FAMILY,
        KERNELS[3 * index + dtype_index(inputs.q.dtype())],
        Geometry {
            grid: (extent(ctas), extent(tiles), extent(shape.batch)),
            block: (extent(32 * WARPS), 1, 1),
            shared: 0,
            overlaps: true,
            together: false,
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
            DeviceShape {
                heads: shape.heads as i32,
                kv_heads: shape.kv_heads as i32,
                head_dim: shape.head_dim as i32,
                blocks: shape.blocks as i32,
                table: shape.table as i32,
                window: i32::try_from(args.window).unwrap_or(0),
            },
        ],
    )
}
