//! The pool for processes without OpenMP.

use std::sync::{Arc, PoisonError, RwLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

pub(super) struct Pool {
    threads: usize,
    /// The caller works too, so there is one worker less than threads; none are needed for one thread.
    workers: Option<ThreadPool>,
    /// Threads do not survive a fork: a pool made by another process is replaced.
    process: u32,
}

static POOL: RwLock<Option<Arc<Pool>>> = RwLock::new(None);

/// Sets the number of threads of the own pool; 0 means one a core. OpenMP's number is set through OpenMP.
pub fn set_num_threads(threads: usize) {
    install(threads);
}

pub(super) fn pool() -> Arc<Pool> {
    let current = POOL.read().unwrap_or_else(PoisonError::into_inner).clone();
    match current {
        Some(pool) if pool.process == std::process::id() => pool,
        Some(stale) => install(stale.threads),
        None => install(0),
    }
}

fn install(threads: usize) -> Arc<Pool> {
    let cores = || std::thread::available_parallelism().map_or(1, |count| count.get());
    let threads = if threads == 0 { cores() } else { threads };
    let builder = ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|i| format!("halfbyte-{i}"));
    // Without workers (thread limit reached) the caller does the work alone: slower, the same result.
    let workers = if threads > 1 { builder.build().ok() } else { None };
    let pool = Arc::new(Pool { threads, workers, process: std::process::id() });
    let mut slot = POOL.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(old) = slot.replace(pool.clone()).filter(|old| old.process != pool.process) {
        // The workers of a stale pool exist in the parent process only and cannot be told to stop.
        std::mem::forget(old);
    }
    pool
}

impl Pool {
    pub(super) fn num_threads(&self) -> usize {
        self.threads
    }

    pub(super) fn run(&self, limit: usize, work: &(dyn Fn() + Sync)) {
        let Some(workers) = &self.workers else {
            return work();
        };
        workers.in_place_scope(|scope| {
            for _ in 1..limit.min(self.threads) {
                scope.spawn(|_| work());
            }
            work();
        });
    }
}
