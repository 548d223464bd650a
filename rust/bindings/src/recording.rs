//! Recordings: calls on CPU tensors, made again without Python's share, as a CUDA graph launches kernels again.

use std::cell::RefCell;
use std::mem::needs_drop;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use halfbyte_core::{Backend, CpuBackend, Result};
use pyo3::prelude::*;

use crate::call::to_py_err;

type Call = Box<dyn Fn(&dyn Backend) -> Result<()> + Send>;

#[derive(Default)]
struct Calls {
    calls: Vec<Call>,
    /// What the calls point into.
    tensors: Vec<Py<PyAny>>,
}

thread_local! {
    /// The calls of this thread while it records.
    static RECORDED: RefCell<Option<Calls>> = const { RefCell::new(None) };
}

/// Lets a recording own a tensor that a call is about to use.
pub fn keep(tensor: &Bound<'_, PyAny>) {
    RECORDED.with_borrow_mut(|recorded| {
        if let Some(recorded) = recorded {
            recorded.tensors.push(tensor.clone().unbind());
        }
    });
}

/// Adds a call to the recording of this thread, if it records.
pub fn add<W: FnOnce(&dyn Backend) -> Result<()> + Send + 'static>(work: &W) {
    const { assert!(!needs_drop::<W>(), "a call consists of pointers and numbers") };
    RECORDED.with_borrow_mut(|recorded| {
        if let Some(recorded) = recorded {
            // SAFETY: pointers and numbers without a destructor, so a copy of the bytes is a call of its own; the
            // tensors that they point into are kept, and only one of the copies runs at a time.
            let kept = unsafe { ptr::read(work) };
            // SAFETY: as above.
            recorded.calls.push(Box::new(move |backend| unsafe { ptr::read(&raw const kept) }(backend)));
        }
    });
}

#[pyclass(frozen, module = "halfbyte._core")]
pub struct Recording(Mutex<Calls>);

#[pymethods]
impl Recording {
    fn replay(&self, py: Python<'_>) -> PyResult<()> {
        let backend = CpuBackend::new();
        let done = py.detach(|| {
            let recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            recorded.calls.iter().try_for_each(|call| call(&backend))
        });
        done.map_err(to_py_err)
    }

    fn __len__(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).calls.len()
    }
}

#[pyfunction]
pub fn record(on: bool) -> Recording {
    let next = on.then(Calls::default);
    Recording(Mutex::new(RECORDED.replace(next).unwrap_or_default()))
}
