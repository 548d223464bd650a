use halfbyte_core::ops::gemv_4bit::{Gemv4bit, GemvShape};
use halfbyte_core::{DType, Result};

use crate::args::{DeviceAbsmax, aligned, args, codebook_row, log2};
use crate::gemv_4bit_mma::{LINE, PANEL, TABLE, TILE};
use crate::launch::{Family, Geometry, Launcher, Limits, extent, family};

const KERNELS: [&str; 2] = ["gemv_4bit_shifted_f16", "gemv_4bit_shifted_bf16"];
pub(crate) static FAMILY: Family = family!("gemv_4bit_shifted", &KERNELS);

/// Of a CTA that has a multiprocessor to itself.
pub(crate) const MAX_WARPS: usize = 16;
/// Of each of two that share one.
const WARPS: usize = MAX_WARPS / 2;
pub(crate) const BLOCK: usize = 64;
/// Bytes of shared memory that a CTA has beside its own.
const RESERVED: usize = 1024;
/// Past this a block's index does not fit the kernels' 32 bits, nor a size their ints.
const MOST_WEIGHTS: usize = 1 << 38;
const MOST_ROWS: usize = 1 << 31;

/// How a product is dealt out.
#[derive(Debug, PartialEq)]
pub(crate) struct Plan {
    /// rows of W that are so far apart begin alike
    period: usize,
    ctas: usize,
    /// of a CTA, and those of them that share a panel
    warps: usize,
    panel_warps: usize,
    /// rows of x of a CTA
    tile: usize,
    /// elements of such a row in shared memory: whole lines, and what moves the next row to other banks
    pitch: usize,
}

impl Plan {
    /// Bytes of dynamic shared memory, all but x.
    fn fixed(&self) -> usize {
        TABLE + 2 * self.warps * PANEL * TILE * size_of::<f32>()
    }

    fn shared(&self) -> usize {
        self.fixed() + self.tile * self.pitch * size_of::<u16>()
    }
}

/// None if these kernels do not know this device or these arguments.
pub(crate) fn plan(limits: Limits, args: &Gemv4bit<'_>) -> Option<Plan> {
    let GemvShape { m, n, k } = args.shape;
    let known = args.x.dtype() != DType::F32 && args.blocksize >= BLOCK && k > 0 && aligned(args.packed, 16);
    let small = n * k < MOST_WEIGHTS && n.max(k).max(m) < MOST_ROWS;
    let plan = deal_out(limits, args.shape).filter(|plan| m.div_ceil(plan.tile) <= 65535);
    plan.filter(|_| limits.capability >= (8, 0) && known && small)
}

/// Two CTAs share a multiprocessor, so that one multiplies while the other begins or ends; where rows of x leave no room
/// for that, one has it.
fn deal_out(limits: Limits, GemvShape { m, n, k }: GemvShape) -> Option<Plan> {
    let alike = 1 << k.trailing_zeros().min(BLOCK.ilog2());
    let period = BLOCK / alike;
    let lines = (k + BLOCK - alike).div_ceil(LINE);
    let places = period.min(n);
    let panels = n.div_ceil(places).div_ceil(PANEL);
    let splits = |ctas: usize| (ctas * limits.multiprocessors / places).clamp(1, panels);
    // The same for every M: the order of a row's sums follows from it.
    let turns = |warps: usize| panels.div_ceil(splits(2)).div_ceil(WARPS / warps) * lines.div_ceil(warps);
    let panel_warps = (1..=WARPS.min(lines)).rev().min_by_key(|&warps| turns(warps))?;
    let pair = Plan {
        period,
        ctas: splits(2) * places,
        warps: WARPS,
        panel_warps,
        tile: m.min(TILE),
        pitch: lines * LINE + 8,
    };
    if 2 * (pair.shared() + RESERVED) <= limits.shared + RESERVED {
        return Some(pair);
    }
    let alone = Plan { ctas: splits(1) * places, warps: MAX_WARPS, ..pair };
    let most = limits.shared.checked_sub(alone.fixed())? / (alone.pitch * size_of::<u16>());
    let tiles = m.div_ceil(most.clamp(1, TILE));
    (most > 0).then(|| Plan { tile: m.div_ceil(tiles), ..alone })
}

/// `plan` as `plan()` made it.
pub(crate) fn launch(launcher: &Launcher, args: Gemv4bit<'_>, plan: &Plan) -> Result<()> {
    let GemvShape { m, n, k } = args.shape;
    let geometry = Geometry {
        grid: (extent(plan.ctas), extent(m.div_ceil(plan.tile)), 1),
        block: (extent(32 * plan.warps), 1, 1),
        shared: plan.shared(),
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
            log2(args.blocksize),
            codebook_row(args.quant_type),
            plan.period as i32,
            plan.panel_warps as i32,
            plan.tile as i32,
            plan.pitch as i32,
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Limits =
        Limits { capability: (9, 0), multiprocessors: 132, shared: 227 << 10, numa_node: None, has_machine_code: true };

    fn of(m: usize, n: usize, k: usize) -> Plan {
        deal_out(H200, GemvShape { m, n, k }).expect("an H200 has room for these rows")
    }

    #[test]
    fn rows_that_begin_alike_keep_a_gpu_busy() {
        for (k, period) in [(4095, 64), (4094, 32), (1000, 8), (96, 2), (4096, 1)] {
            let plan = of(1, 8191, k);
            assert_eq!((plan.period, plan.ctas), (period, 264 / period * period));
            assert_eq!(plan.period * k % BLOCK, 0);
        }
        let few = of(1, 5, 33);
        assert_eq!((few.ctas, few.panel_warps), (5, 1));
    }

    #[test]
    fn the_order_of_a_sum_does_not_depend_on_rows_of_x() {
        for k in [1, 333, 4095, 11007] {
            let warps = |m| of(m, 8191, k).panel_warps;
            assert!((1..=40).all(|m| warps(m) == warps(1)));
        }
    }

    #[test]
    fn x_fits_shared_memory() {
        for shared in [99 << 10, 163 << 10, 227 << 10] {
            for k in [1, 4095, 11007, 20001, 50001] {
                for m in [1, 4, 8, 20] {
                    if let Some(plan) = deal_out(Limits { shared, ..H200 }, GemvShape { m, n: 100, k }) {
                        assert!(plan.tile >= 1 && plan.shared() * MAX_WARPS / plan.warps <= shared);
                    }
                }
            }
        }
        let plan = |m| of(m, 8191, 4095);
        assert_eq!((plan(1).warps, plan(8).warps, plan(8).tile), (WARPS, MAX_WARPS, 8));
        assert!(deal_out(Limits { shared: 64 << 10, ..H200 }, GemvShape { m: 1, n: 100, k: 4095 }).is_none());
    }
}
