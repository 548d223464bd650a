//! What a device must be able to do for its pages: queues, events, copies and the update.

use std::fmt::Debug;
use std::ops::Range;

use crate::error::Result;
use crate::ops::adamw::{Address, Update};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// the caller's
    Compute,
    /// of updates
    Update,
    /// of copies to host memory
    Out,
    /// of copies to the device
    In,
}

/// Host memory by both of its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// as the CPU sees it
    pub cpu: Address,
    /// as the device sees it
    pub device: Address,
}

impl HostMemory {
    pub fn offset(self, bytes: usize) -> Self {
        Self { cpu: self.cpu + bytes as Address, device: self.device + bytes as Address }
    }
}

/// Work is queued on a stream and done in order there; between streams only waits order anything.
pub trait PageDevice {
    /// A point in a stream; equal for the same point.
    type Event: Clone + PartialEq + Debug;

    /// Host memory that the device can reach, pinned for good; it is given back when the device is dropped.
    fn reserve(&mut self, bytes: usize) -> Result<HostMemory>;

    /// An event that is done when all that `stream` has been given is.
    fn record(&mut self, stream: Stream) -> Result<Self::Event>;
    /// Lets `stream` go on after `event` only.
    fn wait(&mut self, stream: Stream, event: &Self::Event) -> Result<()>;
    fn is_done(&mut self, event: &Self::Event) -> Result<bool>;
    /// Waits on the host.
    fn synchronize(&mut self, event: &Self::Event) -> Result<()>;

    fn copy(&mut self, stream: Stream, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Writes the table of an update at once into the buffer of `version`, made if need be, and queues on the update
    /// stream that the launches which follow read it.
    fn stage(&mut self, version: usize, update: &Update<'_>) -> Result<()>;
    /// Queues the update of pages on the device and in host memory: two ranges of the staged update's work.
    fn launch(&mut self, on_device: Range<usize>, on_host: Range<usize>) -> Result<()>;
}
