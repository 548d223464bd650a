//! `halfbyte._core.Pager`; its methods are described in `_core.pyi`.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use halfbyte_core::ops::adamw::{AdamwScalars, Address, Moments, Slab, Target};
use halfbyte_core::pager::{CpuPages, Frame, Moved, PageDevice, Pager as State, host_budget, schedule};
use halfbyte_core::{Device, Error, Result, TensorRef};
use halfbyte_cuda::CudaPages;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::call::{CudaError, current_stream, to_py_err};
use crate::tensor::Tensor;

type Object<'a, 'py> = &'a Bound<'py, PyAny>;
/// lr, beta1, beta2, eps, weight_decay, step
type Rule = (f64, f64, f64, f64, f64, u64);
/// first page, pages, bytes, address of the slot in host memory or 0, whether it is on the device
type FrameInfo = (usize, usize, usize, Address, bool);

enum AnyPager {
    Cpu(State<CpuPages>),
    Cuda(State<CudaPages>),
}

/// Runs `$body` with `$pager` bound to the state machine of either device.
macro_rules! with_pager {
    ($any:expr, $pager:ident => $body:expr) => {
        match $any {
            AnyPager::Cpu($pager) => $body,
            AnyPager::Cuda($pager) => $body,
        }
    };
}

#[pyclass(frozen)]
pub struct Pager {
    device: Device,
    numels: Vec<usize>,
    moments: Moments,
    state: Mutex<AnyPager>,
    /// The first failure of the driver: what is queued is unknown from then on.
    broken: OnceLock<String>,
    /// the parameters as they were read last
    params: Mutex<Vec<Option<Tensor>>>,
    /// tensors whose memory is lent, by frame
    lent: Mutex<Vec<Option<Py<PyAny>>>>,
    /// device memory of the table in use
    _table: Option<Py<PyAny>>,
}

#[pymethods]
impl Pager {
    #[new]
    fn new(
        py: Python<'_>,
        numels: Vec<usize>,
        moments: &str,
        reserve: bool,
        limit: Option<u64>,
        table: Option<Object<'_, '_>>,
    ) -> PyResult<Self> {
        const OP: &str = "Pager";
        let moments = Moments::parse(OP, moments).map_err(to_py_err)?;
        let slab = Slab::new(moments, &numels).map_err(to_py_err)?;
        let memory = table.map(|table| Tensor::read(OP, "table", table)).transpose()?;
        let device = memory.as_ref().map_or(Device::Cpu, |memory| memory.device);
        let opened = py.detach(|| open(slab, reserve, limit, memory.as_ref()));
        let state = opened.map_err(to_py_err)?;
        let frames = with_pager!(&state, pager => pager.frames().len());
        let lent = Mutex::new((0..frames).map(|_| None).collect());
        let params = Mutex::new(vec![None; numels.len()]);
        let _table = table.map(|table| table.clone().unbind());
        let broken = OnceLock::new();
        Ok(Self { device, numels, moments, state: Mutex::new(state), broken, params, lent, _table })
    }

    /// Bytes of device memory that the table of a CUDA pager takes.
    #[staticmethod]
    fn table_bytes(numels: Vec<usize>, moments: &str) -> PyResult<usize> {
        let moments = Moments::parse("Pager", moments).map_err(to_py_err)?;
        Ok(CudaPages::table_bytes(&Slab::new(moments, &numels).map_err(to_py_err)?))
    }

    #[staticmethod]
    fn host_budget() -> Option<u64> {
        host_budget()
    }

    fn reserve(&self, py: Python<'_>, bytes: usize) -> PyResult<Address> {
        let memory = self.run(py, |state| with_pager!(state, pager => pager.device().reserve(bytes)))?;
        Ok(memory.cpu)
    }

    fn is_near(&self) -> bool {
        match &mut *self.lock() {
            AnyPager::Cpu(_) => false,
            AnyPager::Cuda(pager) => pager.device().is_near(),
        }
    }

    fn frames(&self) -> Vec<FrameInfo> {
        fn info<D: PageDevice>(pager: &State<D>) -> Vec<FrameInfo> {
            let host = |frame: &Frame<D::Event>| frame.host().map_or(0, |host| host.cpu);
            let of = |(i, frame): (usize, &Frame<D::Event>)| {
                (frame.pages().start, frame.pages().len(), pager.frame_bytes(i), host(frame), frame.on_device())
            };
            pager.frames().iter().enumerate().map(of).collect()
        }
        with_pager!(&*self.lock(), pager => info(pager))
    }

    /// First block of each parameter, then the number of all blocks.
    fn starts(&self) -> Vec<u32> {
        with_pager!(&*self.lock(), pager => pager.slab().starts().to_vec())
    }

    /// Byte offsets in a page of m, v, absmax_m and absmax_v, and the bytes of a page.
    fn page_layout(&self) -> ([usize; 4], usize) {
        (self.moments.offsets(), self.moments.page_bytes())
    }

    fn memory(&self, py: Python<'_>, frame: usize) -> PyResult<Option<Py<PyAny>>> {
        let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let found = lent.get(frame).ok_or_else(|| no_frame("memory", frame))?;
        Ok(found.as_ref().map(|tensor| tensor.clone_ref(py)))
    }

    fn step(
        &self,
        py: Python<'_>,
        params: Vec<Bound<'_, PyAny>>,
        grads: Vec<Option<Bound<'_, PyAny>>>,
        rules: Vec<Rule>,
        rule_of: Vec<usize>,
        grad_scale: Option<Object<'_, '_>>,
        overlapped: bool,
    ) -> PyResult<()> {
        const OP: &str = "adamw";
        let n = self.numels.len();
        if [params.len(), grads.len(), rule_of.len()] != [n; 3] {
            let message =
                format!("{OP}: params, grads and rule_of must have {n} entries, one a parameter of the pager");
            return Err(PyValueError::new_err(message));
        }
        let mut targets = Vec::with_capacity(n);
        for (i, (param, grad)) in params.iter().zip(&grads).enumerate() {
            let rule = rules.get(rule_of[i]).ok_or_else(|| PyValueError::new_err("adamw: rule_of names no rule"))?;
            targets.push(self.target(OP, i, param, grad.as_ref(), rule)?);
        }
        let scale = grad_scale.map(|scale| Tensor::read(OP, "grad_scale", scale)).transpose()?;
        let scale = scale.map(|scale| self.scale(OP, &scale)).transpose()?.unwrap_or(0);
        let run = |state: &mut AnyPager| {
            // SAFETY: torch keeps the memory until compute is past the update; see the method's description.
            with_pager!(state, pager => unsafe { pager.step(&targets, scale, overlapped) })
        };
        self.run(py, run)
    }

    fn wait_for(&self, py: Python<'_>, params: Vec<usize>) -> PyResult<()> {
        if let Some(param) = params.iter().find(|&&param| param >= self.numels.len()) {
            let message = format!("wait_for: params must be numbers of the pager's, got {param}");
            return Err(PyValueError::new_err(message));
        }
        self.run(py, |state| {
            let mut params = params.iter();
            with_pager!(state, pager => params.try_for_each(|&param| pager.wait_for(param)))
        })
    }

    fn wait_for_all(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, |state| with_pager!(state, pager => pager.wait_for_all()))
    }

    fn demote(&self, py: Python<'_>, frame: usize) -> PyResult<()> {
        self.check_frame("demote", frame)?;
        self.run(py, |state| with_pager!(state, pager => pager.demote(frame)))
    }

    fn take_back(&self, py: Python<'_>, wait: bool) -> PyResult<Vec<usize>> {
        let back = self.run(py, |state| with_pager!(state, pager => pager.take_back(wait)))?;
        // Dropped outside the lock: torch's allocator has its own.
        let tensors: Vec<_> = {
            let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
            back.iter().map(|&frame| lent[frame].take()).collect()
        };
        drop(tensors);
        Ok(back)
    }

    fn promote(&self, py: Python<'_>, frame: usize, memory: Object<'_, '_>) -> PyResult<()> {
        let address = self.memory_for("promote", frame, memory)?;
        // SAFETY: the tensor is kept in `lent`, and large enough.
        self.run(py, |state| with_pager!(state, pager => unsafe { pager.promote(frame, address) }))?;
        self.keep(frame, memory);
        Ok(())
    }

    fn lend(&self, py: Python<'_>, frame: usize, memory: Object<'_, '_>) -> PyResult<()> {
        let address = self.memory_for("lend", frame, memory)?;
        // SAFETY: the tensor is kept in `lent`, and large enough.
        self.run(py, |state| with_pager!(state, pager => unsafe { pager.lend(frame, address) }))?;
        self.keep(frame, memory);
        Ok(())
    }

    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, |state| with_pager!(state, pager => pager.settle()))
    }

    fn rewritten(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, |state| with_pager!(state, pager => pager.rewritten()))
    }

    /// Frames to demote so that `bytes` become free, and frames to promote into `bytes`.
    fn victims(&self, bytes: usize) -> Vec<usize> {
        schedule::victims(&self.sizes(true), bytes)
    }

    fn returners(&self, bytes: usize) -> Vec<usize> {
        schedule::returners(&self.sizes(false), bytes)
    }

    /// Bytes demoted, promoted, moved across the bus by updates in place, and steps.
    fn moved(&self) -> (u64, u64, u64, u64) {
        let Moved { demoted, promoted, zero_copy, steps } = with_pager!(&*self.lock(), pager => pager.moved());
        (demoted, promoted, zero_copy, steps)
    }

    /// The handle of the stream on which updates run, 0 on a CPU.
    fn update_stream(&self) -> u64 {
        match &mut *self.lock() {
            AnyPager::Cpu(_) => 0,
            AnyPager::Cuda(pager) => pager.device().update_stream(),
        }
    }
}

fn open(slab: Slab, reserve: bool, limit: Option<u64>, table: Option<&Tensor>) -> Result<AnyPager> {
    let Some(table) = table else {
        return State::new(CpuPages::new(limit), slab, reserve).map(AnyPager::Cpu);
    };
    let table = table.as_ref();
    let Device::Cuda(ordinal) = table.device() else {
        return State::new(CpuPages::new(limit), slab, reserve).map(AnyPager::Cpu);
    };
    let (expected, got) = (CudaPages::table_bytes(&slab), table.numel() * table.dtype().size());
    if got != expected {
        return Err(Error::Numel { op: "Pager", name: "table", expected, why: "bytes of `table_bytes`", got });
    }
    // SAFETY: the tensor is as large as it must be, aligned as torch aligns, and kept by the `Pager`.
    let device = unsafe { CudaPages::new(ordinal, &slab, table.ptr().addr() as Address, limit) }?;
    State::new(device, slab, reserve).map(AnyPager::Cuda)
}

fn no_frame(op: &str, frame: usize) -> PyErr {
    PyValueError::new_err(format!("{op}: frame must be one of the pager's, got {frame}"))
}

impl Pager {
    fn lock(&self) -> MutexGuard<'_, AnyPager> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on torch's current stream, without the GIL.
    fn run<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut AnyPager) -> Result<T> + Send) -> PyResult<T> {
        if let Some(first) = self.broken.get() {
            let hint = "hint: resume from the last checkpoint in a new process";
            return Err(CudaError::new_err(format!("the pager stopped after an earlier failure ({first}). {hint}")));
        }
        let stream = match self.device {
            Device::Cpu => 0,
            Device::Cuda(ordinal) => current_stream(py, ordinal)?,
        };
        let done = py.detach(|| {
            let mut state = self.lock();
            if let AnyPager::Cuda(pager) = &mut *state {
                pager.device().set_compute(stream);
            }
            work(&mut state)
        });
        if let Err(error @ Error::Cuda { .. }) = &done {
            let _ = self.broken.set(error.to_string());
        }
        done.map_err(to_py_err)
    }

    fn target(
        &self,
        op: &str,
        i: usize,
        param: Object<'_, '_>,
        grad: Option<Object<'_, '_>>,
        rule: &Rule,
    ) -> PyResult<Target> {
        let param = self.param(op, i, param)?;
        let grad = grad.map(|grad| Tensor::read_beside(op, "grad", grad, &param)).transpose()?;
        let &(lr, beta1, beta2, eps, weight_decay, step) = rule;
        let scalars = AdamwScalars { lr, beta1, beta2, eps, weight_decay, step };
        // SAFETY: only the address is taken; gradients and state are never a parameter's own memory.
        let target = unsafe { Target::new(param.as_mut(), grad.as_ref().map(Tensor::as_ref), &scalars, self.moments) };
        target.map_err(to_py_err)
    }

    /// Reading a tensor takes a call of Python's for each of its properties, and a step has hundreds of them: of a
    /// parameter that is where it was only the layout is read again.
    fn param(&self, op: &str, i: usize, param: Object<'_, '_>) -> PyResult<Tensor> {
        // Python is never called with the lock held: it may let another thread run.
        let params = || self.params.lock().unwrap_or_else(PoisonError::into_inner);
        let known = params()[i].clone();
        if let Some(known) = known
            && known.is_still(param)?
        {
            return Ok(known);
        }
        let param = Tensor::read(op, "param", param)?;
        let (numel, device) = (param.as_ref().numel(), param.device);
        if numel != self.numels[i] || device != self.device {
            let (expected, on) = (self.numels[i], self.device);
            let message = format!("{op}: param {i} must have {expected} elements on {on}, got {numel} on {device}");
            return Err(PyValueError::new_err(message));
        }
        params()[i] = Some(param.clone());
        Ok(param)
    }

    fn scale(&self, op: &str, scale: &Tensor) -> PyResult<Address> {
        let scale: TensorRef<'_> = scale.as_ref();
        if scale.dtype() != halfbyte_core::DType::F32 || scale.numel() != 1 || scale.device() != self.device {
            let (got, n, on) = (scale.dtype(), scale.numel(), scale.device());
            let message = format!("{op}: grad_scale must be one float32 on {}, got {n} {got} on {on}", self.device);
            return Err(PyValueError::new_err(message));
        }
        Ok(scale.ptr().expose_provenance() as Address)
    }

    fn sizes(&self, on_device: bool) -> Vec<(usize, usize)> {
        fn sizes<D: PageDevice>(pager: &State<D>, on_device: bool) -> Vec<(usize, usize)> {
            let frames = pager.frames().iter().enumerate();
            let movable = frames
                .filter(|(_, frame)| frame.on_device() == on_device && frame.host().is_some() && !frame.is_leaving());
            movable.map(|(i, _)| (i, pager.frame_bytes(i))).collect()
        }
        with_pager!(&*self.lock(), pager => sizes(pager, on_device))
    }

    fn check_frame(&self, op: &str, frame: usize) -> PyResult<usize> {
        let bytes = with_pager!(&*self.lock(), pager => {
            (frame < pager.frames().len()).then(|| pager.frame_bytes(frame))
        });
        bytes.ok_or_else(|| no_frame(op, frame))
    }

    fn memory_for(&self, op: &str, frame: usize, memory: Object<'_, '_>) -> PyResult<Address> {
        let needed = self.check_frame(op, frame)?;
        let tensor = Tensor::read(op, "memory", memory)?;
        let view = tensor.as_ref();
        let (bytes, device, address) =
            (view.numel() * view.dtype().size(), view.device(), view.ptr().expose_provenance());
        if bytes != needed || device != self.device || address % 64 != 0 {
            let message = format!(
                "{op}: memory must be {needed} bytes on {}, aligned to 64, got {bytes} on {device} at {address:#x}",
                self.device
            );
            return Err(PyValueError::new_err(message));
        }
        Ok(address as Address)
    }

    fn keep(&self, frame: usize, memory: Object<'_, '_>) {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        lent[frame] = Some(memory.clone().unbind());
    }
}
