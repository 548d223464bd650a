//! The one pool of threads, shared by all operations.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

struct Pool {
    threads: usize,
    /// The caller works too, so there is one worker less than threads; none are needed for one thread.
    workers: Option<ThreadPool>,
    /// Threads do not survive a fork: a pool made by another process is replaced.
    process: u32,
}

static POOL: RwLock<Option<Arc<Pool>>> = RwLock::new(None);

/// Sets the number of threads of every later call; 0 means one a core.
pub fn set_num_threads(threads: usize) {
    install(threads);
}

/// The number of threads that work on one operation, the caller included.
pub fn num_threads() -> usize {
    pool().threads
}

fn pool() -> Arc<Pool> {
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

/// Calls `work` once for each of `count` chunks, on as many threads as there are chunks and workers.
///
/// A chunk is taken by whoever is free, so its result must depend on the chunk alone.
pub(crate) fn for_each<I>(chunks: I, count: usize, work: impl Fn(I::Item) + Sync)
where
    I: Iterator + Send,
{
    let pool = if count > 1 { Some(pool()) } else { None };
    let Some(workers) = pool.as_ref().and_then(|pool| pool.workers.as_ref()) else {
        return chunks.for_each(work);
    };
    let queue = Mutex::new(chunks);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let drain = || {
        while let Some(chunk) = next() {
            work(chunk);
        }
    };
    workers.in_place_scope(|scope| {
        for _ in 1..count.min(workers.current_num_threads() + 1) {
            scope.spawn(|_| drain());
        }
        drain();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_visited_once_for_any_number_of_threads() {
        for threads in [1, 2, 5] {
            set_num_threads(threads);
            let mut seen = vec![0u8; 1000];
            for_each(seen.chunks_mut(7), 143, |chunk| chunk.iter_mut().for_each(|count| *count += 1));
            assert!(seen.iter().all(|&count| count == 1));
        }
        set_num_threads(0);
    }
}
