//! The pager: optimizer state in pages that lie on the device or in host memory, and are updated where they lie.
//!
//! Words. Page: the moments of 131072 elements (`ops::adamw`). Frame: up to 32 MiB of neighbouring pages, the unit
//! that moves; its device memory is lent by the caller, its slot in host memory is reserved for good when the pager
//! is made, so that making room allocates nothing. Update: the one launch of a step, over a table of page addresses.
//! Version: one staged table, which must not change while it is read.
//!
//! What may overlap is said by events alone; each rule names the wait that enforces it:
//!
//! - R2: a frame is copied out after the last write to its device memory, and copied in after the last write to its
//!   slot.
//! - R3: a frame's device memory goes back to the caller once the host has seen the copy out of it complete.
//! - R4: a frame is copied in after everything that the compute stream had queued when its memory was lent: that
//!   work may still use it.
//! - R5: an update touches a frame after the copy that moved it.
//! - R6: an update runs after the work that made the gradients and read the parameters; compute goes on, and
//!   gradients may go, after the update.
//! - R7: a version is written again after its last reader is done.
//! - R10: the CPU touches a slot after all queued writes to it, and copies from it.
//!
//! The streams live as long as the pager (R1), no step waits on the host (R8), every wait is on an event and the
//! default stream is not used unless it is the caller's (R11).
//!
//! A fault in the middle of an update can leave a page half written. No one gets to see it: a driver that had a fault
//! fails every later call, and [`Pager::settle`], which comes before any reading, is one of them.

mod budget;
mod cpu;
mod device;
mod numa;
pub mod schedule;
pub mod simulated;

use std::ops::Range;

pub use budget::{Extent, host_budget};
pub use cpu::CpuPages;
pub use device::{HostMemory, PageDevice, Stream};

use crate::error::{Error, Result};
use crate::ops::adamw::{Address, Slab, Target, Update};

/// Most bytes of a frame: large enough for full bus speed and to be a segment of its own in torch's allocator.
pub const FRAME_BYTES: usize = 32 << 20;
/// Most bytes of host memory that are reserved in one piece.
pub const EXTENT_BYTES: usize = 256 << 20;

/// Neighbouring pages, and where they are.
#[derive(Debug)]
pub struct Frame<E> {
    pages: Range<usize>,
    host: Option<HostMemory>,
    /// memory lent by the caller; the pages are there if there is any
    device: Option<Address>,
    /// what wrote the pages last
    written: Option<(Stream, E)>,
    /// compute has yet to wait for `written`
    awaited: bool,
    /// the copy that empties memory which the caller will get back
    leaving: Option<E>,
}

impl<E> Frame<E> {
    pub fn pages(&self) -> Range<usize> {
        self.pages.clone()
    }

    pub fn host(&self) -> Option<HostMemory> {
        self.host
    }

    pub fn on_device(&self) -> bool {
        self.device.is_some()
    }

    /// Whether the caller's memory is still being read.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    fn address(&self) -> Address {
        let host = || self.host.map_or(0, |host| host.device);
        self.device.unwrap_or_else(host)
    }
}

/// What has been moved since the pager was made, in bytes unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    pub demoted: u64,
    pub promoted: u64,
    /// read and written across the bus by updates of pages in host memory
    pub zero_copy: u64,
    /// updates
    pub steps: u64,
}

/// The state of one slab and the rules of moving it.
#[derive(Debug)]
pub struct Pager<D: PageDevice> {
    device: D,
    slab: Slab,
    frames: Vec<Frame<D::Event>>,
    /// of each version, what is done when no one reads it any more
    versions: Vec<Option<D::Event>>,
    moved: Moved,
}

impl<D: PageDevice> Pager<D> {
    /// A pager whose frames are in host memory, where `reserve` is set, or nowhere until memory is lent to each.
    pub fn new(mut device: D, slab: Slab, reserve: bool) -> Result<Self> {
        let pages_per_frame = FRAME_BYTES / slab.moments().page_bytes();
        Self::with_frames(&mut device, &slab, reserve, pages_per_frame).map(|frames| Self {
            device,
            slab,
            frames,
            versions: Vec::new(),
            moved: Moved::default(),
        })
    }

    /// As [`Pager::new`], with small frames.
    pub fn with_pages_per_frame(mut device: D, slab: Slab, reserve: bool, pages_per_frame: usize) -> Result<Self> {
        Self::with_frames(&mut device, &slab, reserve, pages_per_frame).map(|frames| Self {
            device,
            slab,
            frames,
            versions: Vec::new(),
            moved: Moved::default(),
        })
    }

    fn with_frames(device: &mut D, slab: &Slab, reserve: bool, pages_per_frame: usize) -> Result<Vec<Frame<D::Event>>> {
        let firsts = (0..slab.pages()).step_by(pages_per_frame);
        let ranges: Vec<_> = firsts.map(|first| first..(first + pages_per_frame).min(slab.pages())).collect();
        let page_bytes = slab.moments().page_bytes();
        let mut frames = Vec::new();
        for group in ranges.chunks(EXTENT_BYTES / FRAME_BYTES) {
            let bytes = group.iter().map(|pages| pages.len() * page_bytes).sum();
            let mut slot = if reserve { Some(device.reserve(bytes)?) } else { None };
            for pages in group {
                let host = slot;
                slot = slot.map(|slot| slot.offset(pages.len() * page_bytes));
                let pages = pages.clone();
                frames.push(Frame { pages, host, device: None, written: None, awaited: true, leaving: None });
            }
        }
        Ok(frames)
    }

    pub fn slab(&self) -> &Slab {
        &self.slab
    }

    pub fn frames(&self) -> &[Frame<D::Event>] {
        &self.frames
    }

    pub fn frame_bytes(&self, frame: usize) -> usize {
        self.frames[frame].pages.len() * self.slab.moments().page_bytes()
    }

    pub fn moved(&self) -> Moved {
        self.moved
    }

    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Queues one step; `targets` has one entry a parameter of the slab.
    ///
    /// Compute waits for all of it at once, or, `overlapped`, for each frame when [`Pager::wait_for`] is called: pages
    /// in host memory are then updated in the order of the slab, one launch a frame, while compute goes on.
    ///
    /// # Safety
    /// Parameters, gradients and `grad_scale` stay as they are until compute has waited for the update, frames until
    /// they are taken back; every parameter's `numel` is the slab's.
    pub unsafe fn step(&mut self, targets: &[Target], grad_scale: Address, overlapped: bool) -> Result<()> {
        let expected = self.slab.params();
        if targets.len() != expected {
            let got = targets.len();
            return Err(Error::Numel { op: "step", name: "targets", expected, why: "one a parameter", got });
        }
        let ready = self.device.record(Stream::Compute)?;
        self.device.wait(Stream::Update, &ready)?; // R6
        for frame in &self.frames {
            if let Some((stream, copied)) = &frame.written
                && *stream != Stream::Update
            {
                self.device.wait(Stream::Update, copied)?; // R5
            }
        }
        let version = self.stage(targets, grad_scale)?;
        self.launch(overlapped)?;
        self.versions[version] = self.frames.last().and_then(|frame| frame.written.clone()).map(|(_, done)| done);
        self.moved.steps += 1;
        if !overlapped {
            self.wait_for_all()?;
        }
        Ok(())
    }

    /// Writes the table of this step where no earlier update reads it any more.
    fn stage(&mut self, targets: &[Target], grad_scale: Address) -> Result<usize> {
        let version = self.free_version()?; // R7
        let page_bytes = self.slab.moments().page_bytes() as Address;
        let address =
            |frame: &Frame<_>, page: usize| frame.address() + (page - frame.pages.start) as Address * page_bytes;
        let of_frame = |frame| Frame::pages(frame).map(move |page| address(frame, page));
        let pages: Vec<Address> = self.frames.iter().flat_map(of_frame).collect();
        let (here, there): (Vec<_>, Vec<_>) = self.frames.iter().partition(|frame| frame.on_device());
        let work: Vec<u32> = here.into_iter().chain(there).flat_map(Frame::pages).map(|page| page as u32).collect();
        let update = Update { slab: &self.slab, pages: &pages, work: &work, targets, grad_scale };
        self.device.stage(version, &update)?;
        Ok(version)
    }

    fn free_version(&mut self) -> Result<usize> {
        for version in 0..self.versions.len() {
            let Some(read) = &self.versions[version] else { return Ok(version) };
            if self.device.is_done(read)? {
                return Ok(version);
            }
        }
        self.versions.push(None);
        Ok(self.versions.len() - 1)
    }

    /// One launch, or one of the frames on the device and one more of each frame in host memory.
    fn launch(&mut self, overlapped: bool) -> Result<()> {
        let (here, there): (Vec<_>, Vec<_>) = (0..self.frames.len()).partition(|&frame| self.frames[frame].on_device());
        let pages = |frames: &[usize]| frames.iter().map(|&frame| self.frames[frame].pages.len()).sum::<usize>();
        let (on_device, on_host) = (pages(&here), pages(&there));
        self.moved.zero_copy += 2 * (on_host * self.slab.moments().page_bytes()) as u64;
        if !overlapped {
            self.device.launch(0..on_device, on_device..on_device + on_host)?;
            return self.written(&[here, there].concat());
        }
        if on_device > 0 {
            self.device.launch(0..on_device, on_device..on_device)?;
            self.written(&here)?;
        }
        let mut first = on_device;
        for frame in there {
            let end = first + self.frames[frame].pages.len();
            self.device.launch(first..first, first..end)?;
            self.written(&[frame])?;
            first = end;
        }
        Ok(())
    }

    /// Notes that these frames were written by what the update stream has been given last.
    fn written(&mut self, frames: &[usize]) -> Result<()> {
        let done = self.device.record(Stream::Update)?;
        for &frame in frames {
            self.frames[frame].written = Some((Stream::Update, done.clone()));
            self.frames[frame].awaited = false;
        }
        Ok(())
    }

    /// Lets compute wait for the last update of the frames that hold a parameter's state, and so of the parameter.
    pub fn wait_for(&mut self, param: usize) -> Result<()> {
        let pages = self.slab.pages_of(param);
        let holds = |frame: &Frame<_>| frame.pages.start < pages.end && pages.start < frame.pages.end;
        self.wait_where(holds)
    }

    /// Lets compute wait for every update so far.
    pub fn wait_for_all(&mut self) -> Result<()> {
        self.wait_where(|_| true)
    }

    fn wait_where(&mut self, wanted: impl Fn(&Frame<D::Event>) -> bool) -> Result<()> {
        // One event may stand for many frames; what is queued later is done later.
        let mut last: Option<D::Event> = None;
        for frame in self.frames.iter_mut().filter(|frame| !frame.awaited && wanted(frame)) {
            frame.awaited = true;
            if let Some((Stream::Update, done)) = &frame.written
                && last.as_ref() != Some(done)
            {
                self.device.wait(Stream::Compute, done)?; // R6
                last = Some(done.clone());
            }
        }
        Ok(())
    }

    /// Queues the move of a frame to its slot; its memory goes back by [`Pager::take_back`].
    pub fn demote(&mut self, frame: usize) -> Result<()> {
        let bytes = self.frame_bytes(frame);
        let Frame { device: Some(from), host: Some(host), leaving: None, .. } = self.frames[frame] else {
            return Err(misplaced("demote", "a frame on the device that has a slot in host memory", frame));
        };
        self.settle_compute(frame)?;
        let moving = &mut self.frames[frame];
        if let Some((_, written)) = &moving.written {
            self.device.wait(Stream::Out, written)?; // R2
        }
        self.device.copy(Stream::Out, from, host.device, bytes)?;
        let copied = self.device.record(Stream::Out)?;
        moving.device = None;
        moving.leaving = Some(copied.clone());
        moving.written = Some((Stream::Out, copied));
        self.moved.demoted += bytes as u64;
        Ok(())
    }

    /// Before another stream's event replaces `written`, compute waits for the update that it stands for.
    fn settle_compute(&mut self, frame: usize) -> Result<()> {
        let frame = &mut self.frames[frame];
        if let (false, Some((Stream::Update, done))) = (frame.awaited, &frame.written) {
            self.device.wait(Stream::Compute, done)?; // R6
        }
        frame.awaited = true;
        Ok(())
    }

    /// The frames whose memory the caller may have back: all that were demoted if `wait`, else those already copied.
    pub fn take_back(&mut self, wait: bool) -> Result<Vec<usize>> {
        let mut back = Vec::new();
        for (index, frame) in self.frames.iter_mut().enumerate() {
            let Some(copied) = &frame.leaving else { continue };
            if wait {
                self.device.synchronize(copied)?; // R3
            }
            if self.device.is_done(copied)? {
                frame.leaving = None; // R3
                back.push(index);
            }
        }
        Ok(back)
    }

    /// Queues the move of a frame from its slot to memory that the caller lends.
    ///
    /// # Safety
    /// `to` holds the frame's bytes, on the device, until the frame is taken back.
    pub unsafe fn promote(&mut self, frame: usize, to: Address) -> Result<()> {
        let bytes = self.frame_bytes(frame);
        let Frame { device: None, host: Some(host), leaving: None, .. } = self.frames[frame] else {
            return Err(misplaced("promote", "a frame in host memory that is not on its way", frame));
        };
        self.settle_compute(frame)?;
        let moving = &mut self.frames[frame];
        // Compute is past the last write to the slot by now, or the host is.
        let lent = self.device.record(Stream::Compute)?;
        self.device.wait(Stream::In, &lent)?; // R2, R4
        self.device.copy(Stream::In, host.device, to, bytes)?;
        let copied = self.device.record(Stream::In)?;
        moving.device = Some(to);
        moving.written = Some((Stream::In, copied));
        self.moved.promoted += bytes as u64;
        Ok(())
    }

    /// Takes memory for a frame that has none, whose contents the caller has written or queued on compute.
    ///
    /// # Safety
    /// As [`Pager::promote`].
    pub unsafe fn lend(&mut self, frame: usize, memory: Address) -> Result<()> {
        let Frame { device: None, host: None, .. } = self.frames[frame] else {
            return Err(misplaced("lend", "a frame without memory", frame));
        };
        self.frames[frame].device = Some(memory);
        Ok(())
    }

    /// Waits until the CPU may read and write the slots of host memory, and compute the frames on the device.
    pub fn settle(&mut self) -> Result<()> {
        self.wait_for_all()?;
        for frame in &self.frames {
            if let Some((_, written)) = &frame.written {
                self.device.synchronize(written)?; // R10
            }
        }
        Ok(())
    }

    /// After [`Pager::settle`] the caller has written frames: slots by the CPU, lent memory by compute.
    pub fn rewritten(&mut self) -> Result<()> {
        let written = self.device.record(Stream::Compute)?;
        for frame in &mut self.frames {
            frame.written = Some((Stream::Compute, written.clone()));
        }
        Ok(())
    }
}

fn misplaced(op: &'static str, expected: &'static str, frame: usize) -> Error {
    Error::Argument { op, name: "frame", expected, got: format!("frame {frame}") }
}
