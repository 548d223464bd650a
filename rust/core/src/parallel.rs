//! The threads of all operations: those of the process's OpenMP runtime, else a pool of our own.

use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(target_os = "linux")]
mod openmp;
mod pool;

pub use pool::set_num_threads;

/// The number of threads that work on one operation, the caller included.
pub fn num_threads() -> usize {
    #[cfg(target_os = "linux")]
    if let Some(runtime) = openmp::runtime() {
        return runtime.num_threads();
    }
    pool::pool().num_threads()
}

/// Calls `work` once for each of `count` chunks, on as many threads as there are chunks and workers.
///
/// A chunk is taken by whoever is free, so its result must depend on the chunk alone.
pub(crate) fn for_each<I>(chunks: I, count: usize, work: impl Fn(I::Item) + Sync)
where
    I: Iterator + Send,
{
    if count <= 1 {
        return chunks.for_each(work);
    }
    let queue = Mutex::new(chunks);
    let next = || take(&queue).next();
    on_threads(count, &|| {
        while let Some(chunk) = next() {
            work(chunk);
        }
    });
}

/// Spins before it sleeps: the lock is held for nanoseconds, and waking up takes longer than a small operation.
fn take<T>(queue: &Mutex<T>) -> MutexGuard<'_, T> {
    for _ in 0..1000 {
        if let Ok(guard) = queue.try_lock() {
            return guard;
        }
        std::hint::spin_loop();
    }
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` on this and other threads, at most `limit` of them.
fn on_threads(limit: usize, work: &(dyn Fn() + Sync)) {
    #[cfg(target_os = "linux")]
    if let Some(runtime) = openmp::runtime() {
        return runtime.run(limit, work);
    }
    pool::pool().run(limit, work);
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
