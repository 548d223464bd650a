use std::ffi::c_void;
use std::mem::{align_of, size_of};
use std::ops::Range;

use halfbyte_core::Result;
use halfbyte_core::ops::adamw::{Address, BLOCKS_PER_PAGE, Moments, Rule, Slab, Target, Update};

use crate::args::{KernelArg, args, dtype_index};
use crate::launch::{Family, Launcher, family};

const KERNELS: [&str; 2] = ["adamw_fp32", "adamw_8bit"];
pub(crate) static FAMILY: Family = family!("adamw", &KERNELS);

pub(crate) const THREADS: u32 = 256;
/// Blocks that a CTA takes at a time.
pub(crate) const SLICE: usize = 32;
pub(crate) const CTAS_PER_MULTIPROCESSOR: usize = 3;
/// These saturate the bus in both directions and leave the device to others. 8-bit moments take more work a byte.
const HOST_CTAS: [usize; 2] = [16, 64];

/// `struct Target` of adamw.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceTarget {
    param: Address,
    grad: Address,
    numel: i64,
    dtype: i32,
    vector: i32,
    rule: Rule,
}

impl From<&Target> for DeviceTarget {
    fn from(target: &Target) -> Self {
        let width = 4 * target.dtype.size() as Address;
        Self {
            param: target.param,
            grad: target.grad,
            numel: target.numel as i64,
            dtype: dtype_index(target.dtype) as i32,
            vector: (target.param.is_multiple_of(width) && target.grad.is_multiple_of(width)).into(),
            rule: target.rule,
        }
    }
}

/// `struct Update` of adamw.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceUpdate {
    pages: Address,
    starts: Address,
    targets: Address,
    on_device: Address,
    on_host: Address,
    device_pages: i32,
    host_pages: i32,
    host_ctas: i32,
    params: i32,
    grad_scale: Address,
}

impl KernelArg for DeviceUpdate {}

/// Where the parts of a staged update lie, and what a launch of it needs besides.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    starts: usize,
    targets: usize,
    work: usize,
    pub bytes: usize,
    params: usize,
    moments: Moments,
}

impl Table {
    /// `pages u64 [pages] | targets [params] | starts u32 [params + 1] | work u32 [pages]`
    pub fn of(slab: &Slab) -> Self {
        let (pages, params) = (slab.pages(), slab.params());
        let targets = pages * size_of::<Address>();
        let starts = targets + params * size_of::<DeviceTarget>();
        let work = starts + (params + 1) * size_of::<u32>();
        Self { starts, targets, work, bytes: work + pages * size_of::<u32>(), params, moments: slab.moments() }
    }

    /// # Safety
    /// `memory` has room for `self.bytes`, aligned to 8, and no one reads it.
    pub unsafe fn write(&self, memory: *mut c_void, update: &Update<'_>) {
        let targets: Vec<DeviceTarget> = update.targets.iter().map(DeviceTarget::from).collect();
        // SAFETY: the parts lie one behind the other inside `self.bytes`.
        unsafe {
            write(memory, 0, update.pages);
            write(memory, self.targets, &targets);
            write(memory, self.starts, update.slab.starts());
            write(memory, self.work, update.work);
        }
    }

    /// Launches the update of two parts of the work, from a table at `memory`.
    pub fn launch(
        &self,
        launcher: &Launcher,
        memory: Address,
        grad_scale: Address,
        on_device: Range<usize>,
        on_host: Range<usize>,
    ) -> Result<()> {
        let work = |first: usize| memory + (self.work + first * size_of::<u32>()) as Address;
        let slices = |pages: &Range<usize>| pages.len() * BLOCKS_PER_PAGE / SLICE;
        let kernel = match self.moments {
            Moments::Fp32 => 0,
            Moments::Block8 => 1,
        };
        let host_ctas = slices(&on_host).min(HOST_CTAS[kernel]);
        let limits = launcher.limits();
        // 64 KiB of shared memory, which is all that capability 7.5 has, are enough for two with tables.
        let side_by_side = if limits.capability < (8, 0) { 2 } else { CTAS_PER_MULTIPROCESSOR };
        let most = side_by_side * limits.multiprocessors;
        let ctas = host_ctas + slices(&on_device).min(most - host_ctas);
        if ctas == 0 {
            return Ok(());
        }
        let update = DeviceUpdate {
            pages: memory,
            starts: memory + self.starts as Address,
            targets: memory + self.targets as Address,
            on_device: work(on_device.start),
            on_host: work(on_host.start),
            device_pages: on_device.len() as i32,
            host_pages: on_host.len() as i32,
            host_ctas: host_ctas as i32,
            params: self.params as i32,
            grad_scale,
        };
        launcher.launch_1d(&FAMILY, KERNELS[kernel], ctas, THREADS, args![update])
    }
}

/// # Safety
/// `values` fit into `memory` from `offset` on, which is a multiple of their alignment.
unsafe fn write<T: Copy>(memory: *mut c_void, offset: usize, values: &[T]) {
    debug_assert_eq!(offset % align_of::<T>(), 0);
    // SAFETY: the caller vouches for the room.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), memory.byte_add(offset).cast(), values.len()) };
}
