//! Pages on the CPU: there is one memory, and everything is done when it is queued.

use std::ops::Range;

use crate::error::Result;
use crate::ops::adamw::{Address, Slab, Target, Update, run_on_cpu};
use crate::pager::{Extent, HostMemory, PageDevice, Stream};

#[derive(Debug, Default)]
pub struct CpuPages {
    extents: Vec<Extent>,
    /// most bytes of host memory, if the caller bounds them
    limit: Option<u64>,
    staged: Option<Staged>,
}

#[derive(Debug)]
struct Staged {
    slab: Slab,
    pages: Vec<Address>,
    work: Vec<u32>,
    targets: Vec<Target>,
    grad_scale: Address,
}

impl CpuPages {
    pub fn new(limit: Option<u64>) -> Self {
        Self { limit, ..Self::default() }
    }
}

impl PageDevice for CpuPages {
    type Event = ();

    fn reserve(&mut self, bytes: usize) -> Result<HostMemory> {
        let held: usize = self.extents.iter().map(Extent::bytes).sum();
        let extent = Extent::reserve(bytes, held, self.limit, None)?;
        let cpu = extent.address();
        self.extents.push(extent);
        Ok(HostMemory { cpu, device: cpu })
    }

    fn record(&mut self, _: Stream) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self, _: Stream, (): &()) -> Result<()> {
        Ok(())
    }

    fn is_done(&mut self, (): &()) -> Result<bool> {
        Ok(true)
    }

    fn synchronize(&mut self, (): &()) -> Result<()> {
        Ok(())
    }

    fn copy(&mut self, _: Stream, from: Address, to: Address, bytes: usize) -> Result<()> {
        let (from, to) = (std::ptr::with_exposed_provenance(from as usize), to as usize);
        // SAFETY: both are memory of a frame, which the pager's caller vouches for, and a slot is never lent memory.
        unsafe { std::ptr::copy_nonoverlapping::<u8>(from, std::ptr::with_exposed_provenance_mut(to), bytes) };
        Ok(())
    }

    fn stage(&mut self, _: usize, update: &Update<'_>) -> Result<()> {
        self.staged = Some(Staged {
            slab: update.slab.clone(),
            pages: update.pages.to_vec(),
            work: update.work.to_vec(),
            targets: update.targets.to_vec(),
            grad_scale: update.grad_scale,
        });
        Ok(())
    }

    fn launch(&mut self, on_device: Range<usize>, on_host: Range<usize>) -> Result<()> {
        let Some(staged) = &self.staged else { return Ok(()) };
        let Staged { slab, pages, work, targets, grad_scale } = staged;
        let update = Update { slab, pages, work, targets, grad_scale: *grad_scale };
        for part in [on_device, on_host] {
            // SAFETY: the pager's caller vouches for parameters, gradients and lent memory, the extents for the slots;
            // work numbers pages of the slab.
            unsafe { run_on_cpu(&update, part) };
        }
        Ok(())
    }
}
