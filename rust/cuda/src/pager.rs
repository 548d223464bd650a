//! Pages of a CUDA device: streams, events, pinned host memory that kernels reach across the bus.

use std::ffi::c_void;
use std::fmt;
use std::mem;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::{event, stream};
use cudarc::driver::{DriverError, result, sys};
use halfbyte_core::ops::adamw::{Address, Slab, Update};
use halfbyte_core::pager::{Extent, HostMemory, PageDevice, Stream};
use halfbyte_core::{Error, Result};

use crate::adamw::Table;
use crate::launch::{Launcher, describe};

/// What tells a cap on pinned memory from one request that is too large.
const PROBE_BYTES: usize = 1 << 20;

/// Versions that are pinned at once: pinning takes as long as a step.
const TABLES: usize = 16;

/// An event, destroyed with its last owner.
#[derive(Debug)]
struct Handle(sys::CUevent);

// SAFETY: an event belongs to a context, not to a thread.
unsafe impl Send for Handle {}
// SAFETY: the driver's calls on events may come from any thread.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it was created and no one else has it. At exit the driver may be gone, which is no one's concern.
        let _ = unsafe { event::destroy(self.0) };
    }
}

#[derive(Debug, Clone)]
pub struct Event(Arc<Handle>);

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// One device's streams for the pages of one slab.
pub struct CudaPages {
    launcher: Launcher,
    compute: sys::CUstream,
    update: sys::CUstream,
    out: sys::CUstream,
    into: sys::CUstream,
    /// device memory that holds the table in use
    table: Address,
    layout: Table,
    grad_scale: Address,
    /// pinned memory, of `TABLES` versions each
    tables: Vec<*mut c_void>,
    extents: Vec<Extent>,
    limit: Option<u64>,
}

// SAFETY: streams and pinned memory belong to a context, not to a thread, and are used through `&mut self` only.
unsafe impl Send for CudaPages {}

impl fmt::Debug for CudaPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaPages on {:?}", self.launcher)
    }
}

impl CudaPages {
    /// Bytes of device memory that the table takes.
    pub fn table_bytes(slab: &Slab) -> usize {
        Table::of(slab).bytes
    }

    /// `limit`: most bytes of host memory to reserve.
    ///
    /// # Safety
    /// `table` is memory of device `ordinal`, aligned to 8, that holds [`CudaPages::table_bytes`] as long as this lives.
    pub unsafe fn new(ordinal: u32, slab: &Slab, table: Address, limit: Option<u64>) -> Result<Self> {
        let opener = Launcher::new(ordinal, 0)?;
        let streams = {
            let _bound = opener.bind()?;
            let open = || {
                let (low, high) = stream::get_priority_range()?;
                let create = |priority| stream::create_with_priority(stream::StreamKind::NonBlocking, priority);
                Ok([create(low)?, create(low)?, create(high)?])
            };
            open().map_err(|error| opener.error("creating streams", error))?
        };
        let [update, out, into] = streams;
        Ok(Self {
            launcher: Launcher::new(ordinal, update as u64)?,
            compute: ptr::null_mut(),
            update,
            out,
            into,
            table,
            layout: Table::of(slab),
            grad_scale: 0,
            tables: Vec::new(),
            extents: Vec::new(),
            limit,
        })
    }

    /// The caller's stream, from now on.
    pub fn set_compute(&mut self, stream: u64) {
        self.compute = stream as usize as sys::CUstream;
    }

    /// The handle of the stream on which updates run.
    pub fn update_stream(&self) -> u64 {
        self.update as u64
    }

    /// Whether all host memory was taken from the NUMA node nearest to the device.
    pub fn is_near(&self) -> bool {
        !self.extents.is_empty() && self.extents.iter().all(Extent::is_near)
    }

    fn stream(&self, stream: Stream) -> sys::CUstream {
        match stream {
            Stream::Compute => self.compute,
            Stream::Update => self.update,
            Stream::Out => self.out,
            Stream::In => self.into,
        }
    }

    /// Runs driver calls with the device's context current.
    fn call<T>(&self, what: &str, work: impl FnOnce() -> std::result::Result<T, DriverError>) -> Result<T> {
        let _bound = self.launcher.bind()?;
        work().map_err(|error| self.launcher.error(what, error))
    }

    fn pin(&self, extent: &Extent) -> Result<Address> {
        let memory = extent.address() as usize as *mut c_void;
        let _bound = self.launcher.bind()?;
        // SAFETY: the extent lives until it is unregistered, or for good.
        unsafe { register(memory, extent.bytes()) }.map_err(|error| self.cannot_pin(extent.bytes(), error))?;
        let mut device = 0;
        // SAFETY: the memory was registered just now.
        let found = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut device, memory, 0) }.result();
        found.map_err(|error| self.launcher.error("mapping host memory", error))?;
        Ok(device)
    }

    /// Whether nothing more can be pinned, or only not so much.
    fn cannot_pin(&self, bytes: usize, error: DriverError) -> Error {
        let held = self.extents.iter().map(Extent::bytes).sum::<usize>() as u64;
        let small = Extent::reserve(PROBE_BYTES, 0, None, None).is_ok_and(|probe| {
            let memory = probe.address() as usize as *mut c_void;
            // SAFETY: the probe outlives its registration.
            unsafe { register(memory, probe.bytes()).and_then(|()| sys::cuMemHostUnregister(memory).result()) }.is_ok()
        });
        let why = if small { "so much at once cannot be pinned" } else { "the system lets no more be pinned" };
        let reason = format!("{why} ({})", describe(error));
        Error::HostMemory { need: bytes as u64, held, available: if small { bytes as u64 - 1 } else { 0 }, reason }
    }

    fn release(&mut self) -> std::result::Result<(), DriverError> {
        // Not these streams alone: activations are copied to and from host memory on the caller's.
        result::ctx::synchronize()?;
        for stream in [self.update, self.out, self.into] {
            // SAFETY: they were created with this and nothing is queued any more.
            unsafe { stream::destroy(stream) }?;
        }
        for tables in self.tables.drain(..) {
            // SAFETY: allocated by malloc_host, and no copy from it is left.
            unsafe { result::free_host(tables) }?;
        }
        for extent in &self.extents {
            // SAFETY: registered by `reserve`, and nothing queued uses it any more.
            unsafe { sys::cuMemHostUnregister(extent.address() as usize as *mut c_void) }.result()?;
        }
        Ok(())
    }
}

/// # Safety
/// The memory stays until it is unregistered.
unsafe fn register(memory: *mut c_void, bytes: usize) -> std::result::Result<(), DriverError> {
    let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
    // SAFETY: the caller vouches for it.
    unsafe { sys::cuMemHostRegister_v2(memory, bytes, flags) }.result()
}

impl Drop for CudaPages {
    fn drop(&mut self) {
        let released = match self.launcher.bind() {
            Ok(_bound) => self.release().is_ok(),
            Err(_) => false,
        };
        if !released {
            // A context that failed may still write to this memory.
            mem::forget(mem::take(&mut self.extents));
        }
    }
}

impl PageDevice for CudaPages {
    type Event = Event;

    fn reserve(&mut self, bytes: usize) -> Result<HostMemory> {
        let held = self.extents.iter().map(Extent::bytes).sum();
        let extent = Extent::reserve(bytes, held, self.limit, self.launcher.limits().numa_node)?;
        let memory = HostMemory { cpu: extent.address(), device: self.pin(&extent)? };
        self.extents.push(extent);
        Ok(memory)
    }

    fn record(&mut self, stream: Stream) -> Result<Event> {
        self.call("recording an event", || {
            let handle = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            let event = Event(Arc::new(Handle(handle)));
            // SAFETY: both belong to this device's context.
            unsafe { event::record(handle, self.stream(stream)) }.map(|()| event)
        })
    }

    fn wait(&mut self, stream: Stream, event: &Event) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both belong to this device's context.
        self.call("waiting for an event", || unsafe { stream::wait_event(self.stream(stream), event.0.0, flags) })
    }

    fn is_done(&mut self, event: &Event) -> Result<bool> {
        // SAFETY: the event was recorded.
        self.call("asking for an event", || match unsafe { event::query(event.0.0) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            answer => answer.map(|()| true),
        })
    }

    fn synchronize(&mut self, event: &Event) -> Result<()> {
        // SAFETY: the event was recorded.
        self.call("waiting on the host", || unsafe { event::synchronize(event.0.0) })
    }

    fn copy(&mut self, stream: Stream, from: Address, to: Address, bytes: usize) -> Result<()> {
        // SAFETY: both are frames' memory, which the pager's caller or an extent holds; the pager's waits keep others away.
        self.call("copying a frame", || unsafe { sys::cuMemcpyAsync(to, from, bytes, self.stream(stream)).result() })
    }

    fn stage(&mut self, version: usize, update: &Update<'_>) -> Result<()> {
        let bytes = self.layout.bytes.next_multiple_of(mem::align_of::<Address>());
        while self.tables.len() * TABLES <= version {
            let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
            // SAFETY: freed when this is dropped.
            let tables = self.call("pinning tables", || unsafe { result::malloc_host(TABLES * bytes, flags) })?;
            self.tables.push(tables);
        }
        // SAFETY: there is memory for `TABLES` versions.
        let memory = unsafe { self.tables[version / TABLES].byte_add(version % TABLES * bytes) };
        // SAFETY: it was made with room for a table, and the pager gives out versions that no one reads.
        unsafe { self.layout.write(memory, update) };
        self.grad_scale = update.grad_scale;
        let copy = || {
            // SAFETY: the table's device memory is as large; earlier readers are ahead in the same stream.
            unsafe { sys::cuMemcpyHtoDAsync_v2(self.table, memory, self.layout.bytes, self.update) }.result()
        };
        self.call("copying a table", copy)
    }

    fn launch(&mut self, on_device: Range<usize>, on_host: Range<usize>) -> Result<()> {
        self.layout.launch(&self.launcher, self.table, self.grad_scale, on_device, on_host)
    }
}
