//! The OpenMP runtime that torch has brought into the process.
//!
//! torch's own operations run on its threads, which spin for milliseconds after each before they sleep. A second pool
//! beside them would wait for a core that a spinning thread holds: on two cores, 3 ms for an operation of 0.2 ms.

use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::os::unix::Library;

type Region = unsafe extern "C" fn(*mut c_void);

/// The entry points of libgomp, which the other OpenMP runtimes of Linux provide too.
pub(super) struct Runtime {
    /// `GOMP_parallel(region, argument, threads, flags)`: `region(argument)` on each thread of a team.
    parallel: unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint),
    max_threads: unsafe extern "C" fn() -> c_int,
    /// OpenMP's threads do not survive a fork, and its teams would wait for them for ever.
    process: u32,
}

/// None if the process has no OpenMP, or is a fork of one that had.
pub(super) fn runtime() -> Option<&'static Runtime> {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    RUNTIME.get_or_init(find).as_ref().filter(|runtime| runtime.process == std::process::id())
}

fn find() -> Option<Runtime> {
    let process = Library::this();
    // SAFETY: these are the signatures of libgomp's stable binary interface.
    unsafe {
        Some(Runtime {
            parallel: *process.get(b"GOMP_parallel").ok()?,
            max_threads: *process.get(b"omp_get_max_threads").ok()?,
            process: std::process::id(),
        })
    }
}

/// What the threads of a team share.
struct Team<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Runtime {
    pub(super) fn num_threads(&self) -> usize {
        // SAFETY: the call has no precondition.
        usize::try_from(unsafe { (self.max_threads)() }).unwrap_or(1).max(1)
    }

    pub(super) fn run(&self, limit: usize, work: &(dyn Fn() + Sync)) {
        let threads = limit.min(self.num_threads());
        if threads == 1 {
            return work();
        }
        let team = Team { work, panic: Mutex::new(None) };
        let argument: *const Team<'_> = &raw const team;
        // SAFETY: the call returns when all threads have left the region, so `team` outlives them.
        unsafe { (self.parallel)(region, argument.cast_mut().cast(), threads as c_uint, 0) };
        if let Some(panic) = team.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

/// A panic must not unwind through OpenMP's frames, so it is carried to the caller.
unsafe extern "C" fn region(argument: *mut c_void) {
    // SAFETY: `run` passes a team that it keeps alive, and its parts are shared between threads by design.
    let team = unsafe { &*argument.cast::<Team<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(team.work)) {
        *team.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}
