use halfbyte_core::ops::gemv_4bit::Gemv4bit;
use halfbyte_core::{Absmax, DType, Result};

use crate::args::{DeviceAbsmax, aligned, args, codebook_row};
use crate::launch::{Family, Geometry, Launcher, Limits, extent, family};

const KERNELS: [&str; 2] = ["gemv_4bit_mma_f16", "gemv_4bit_mma_bf16"];
pub(crate) static FAMILY: Family = family!("gemv_4bit_mma", &KERNELS);

pub(crate) const MAX_WARPS: usize = 16;
pub(crate) const MAX_CHUNK: usize = 4;
pub(crate) const PANEL: usize = 16;
pub(crate) const TILE: usize = 8;
pub(crate) const LINE: usize = 256;
pub(crate) const TABLE: usize = 65536;
const BLOCKSIZE: usize = 64;
/// Past this a line's index does not fit the kernels' 32 bits, nor a size their ints.
const MOST_WEIGHTS: usize = 1 << 40;
const MOST_ROWS: usize = 1 << 31;

/// Bytes of dynamic shared memory.
fn shared(warps: usize) -> usize {
    TABLE + 2 * MAX_CHUNK * warps * PANEL * TILE * size_of::<f32>()
}

/// The warps of a CTA, or none if these kernels do not know this device or these arguments.
///
/// Fewer warps than there may be, if all of them then have an equal number of lines of a row.
pub(crate) fn warps(limits: Limits, args: &Gemv4bit<'_>) -> Option<usize> {
    let (m, n, k) = (args.shape.m, args.shape.n, args.shape.k);
    let scales = matches!(args.absmax, Absmax::Nested { codes, .. } if aligned(codes, 4));
    let known = args.x.dtype() != DType::F32 && args.blocksize == BLOCKSIZE && k > 0 && k % LINE == 0;
    let fits = n * k < MOST_WEIGHTS && n < MOST_ROWS && m < MOST_ROWS && m.div_ceil(TILE) <= 65535;
    if !(known && fits && scales && aligned(args.x, 16) && aligned(args.packed, 16)) {
        return None;
    }
    let most = [MAX_WARPS, MAX_WARPS / 2].into_iter().find(|&warps| shared(warps) <= limits.shared)?;
    let lines = k / LINE;
    (limits.capability >= (8, 0)).then(|| lines.div_ceil(lines.div_ceil(most)))
}

/// `warps` as `warps()` found them.
pub(crate) fn launch(launcher: &Launcher, args: Gemv4bit<'_>, warps: usize) -> Result<()> {
    let (m, n, k) = (args.shape.m, args.shape.n, args.shape.k);
    let geometry = Geometry {
        grid: (extent(n.div_ceil(PANEL).min(launcher.limits().multiprocessors)), extent(m.div_ceil(TILE)), 1),
        block: (extent(32 * warps), 1, 1),
        shared: shared(warps),
        overlaps: true,
    };
    launcher.launch(
        &FAMILY,
        KERNELS[usize::from(args.x.dtype() == DType::BF16)],
        geometry,
        args![
            args.x.ptr(),
            args.packed.ptr(),
            DeviceAbsmax::from(args.absmax),
            args.out.ptr(),
            m as i32,
            n as i32,
            k as i32,
            codebook_row(args.quant_type),
        ],
    )
}
