//! The only unsafe launch: kernels by name, arguments by address, a borrowed stream.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, DriverError, result, sys};
use halfbyte_core::{Device, Error, Result};

use crate::args::Arg;

/// Grid or block dimensions.
pub(crate) type Dim = (u32, u32, u32);

/// A fatbin at an address that the driver may read as it is.
#[repr(C, align(16))]
pub(crate) struct Image<B: ?Sized>(pub B);

/// A row-major matrix in device memory, for the copy engine.
pub(crate) struct Matrix {
    pub at: *const c_void,
    pub dtype: sys::CUtensorMapDataType,
    /// bytes of an element
    pub size: usize,
    pub rows: usize,
    pub columns: usize,
    /// elements from one row to the next
    pub stride: usize,
}

/// How a kernel is spread over the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub grid: Dim,
    pub block: Dim,
    /// bytes of dynamic shared memory
    pub shared: usize,
    /// The kernel itself waits for the one before it in the stream, so it may start before that has ended.
    pub overlaps: bool,
}

/// One family's fatbin and the kernels that its launcher asks for.
pub(crate) struct Family {
    pub name: &'static str,
    pub image: &'static Image<[u8]>,
    pub kernels: &'static [&'static str],
}

macro_rules! family {
    ($name:literal, $kernels:expr) => {
        $crate::launch::Family {
            name: $name,
            image: {
                static IMAGE: &$crate::launch::Image<[u8]> =
                    &$crate::launch::Image(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")));
                IMAGE
            },
            kernels: $kernels,
        }
    };
}
pub(crate) use family;

/// Libcuda is opened once, at first need; every other call into it would panic where it is absent.
fn driver_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opening libcuda runs its initialisers, which every CUDA program does.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

pub(crate) fn driver_status() -> std::result::Result<(), String> {
    if !driver_present() {
        return Err("libcuda is not there: no NVIDIA driver is installed".to_string());
    }
    let reason = |error: DriverError| format!("the CUDA driver does not start: {}", describe(error));
    result::init().map_err(reason)?;
    match result::device::get_count().map_err(reason)? {
        0 => Err("the CUDA driver finds no device".to_string()),
        _ => Ok(()),
    }
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: a function handle belongs to a context, not to a thread.
unsafe impl Send for Function {}

/// What is kept for a device until the process ends: its primary context and the functions looked up in it.
struct DeviceState {
    ordinal: u32,
    context: Arc<CudaContext>,
    limits: Limits,
    functions: Mutex<HashMap<&'static str, Function>>,
}

/// What a launcher has to know of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// compute capability, major and minor
    pub capability: (i32, i32),
    pub multiprocessors: usize,
    /// most dynamic shared memory of a CTA, bytes
    pub shared: usize,
    /// the NUMA node of the host that is nearest, where the driver says
    pub numa_node: Option<u32>,
    /// Kernels were compiled for this generation, not only PTX for an older one.
    pub has_machine_code: bool,
}

impl Limits {
    fn of(context: &CudaContext) -> std::result::Result<Self, DriverError> {
        use sys::CUdevice_attribute::*;
        let read = |attribute| context.attribute(attribute);
        let capability =
            (read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?, read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
        Ok(Self {
            capability,
            has_machine_code: has_machine_code(env!("HALFBYTE_BUILT_FOR"), capability),
            multiprocessors: read(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            shared: read(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            // Drivers before CUDA 12.2 do not know the question, and -1 stands for none.
            numa_node: read(CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID).ok().and_then(|node| node.try_into().ok()),
        })
    }
}

/// `archs` as the build lists them: `90a` runs on 9.0 alone, `100` on 10.0 and what follows it within that generation.
fn has_machine_code(archs: &str, (major, minor): (i32, i32)) -> bool {
    archs.split(',').any(|arch| {
        let exact = arch.ends_with('a');
        let number = arch.trim_end_matches(['a', 'f']).parse::<i32>();
        number
            .is_ok_and(|number| number / 10 == major && if exact { number % 10 == minor } else { number % 10 <= minor })
    })
}

/// The state of a device; made at first use, never dropped.
fn device_state(ordinal: u32) -> Result<&'static DeviceState> {
    static DEVICES: LazyLock<Mutex<HashMap<u32, &'static DeviceState>>> = LazyLock::new(Mutex::default);
    let fail = |message| Error::Cuda { what: "opening the device".into(), device: Device::Cuda(ordinal), message };
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(state) = devices.get(&ordinal) {
        return Ok(state);
    }
    driver_status().map_err(fail)?;
    let restored = Bound::restoring().map_err(|error| fail(describe(error)))?;
    let context = CudaContext::new(ordinal as usize).map_err(|error| fail(describe(error)))?;
    let limits = Limits::of(&context).map_err(|error| fail(describe(error)))?;
    drop(restored);
    let state = Box::leak(Box::new(DeviceState { ordinal, context, limits, functions: Mutex::default() }));
    devices.insert(ordinal, state);
    Ok(state)
}

/// Gives the calling thread its current context back when dropped: torch reads the current device from it.
///
/// A thread without a context is on device 0 to torch, whose primary context the CUDA runtime would make current at
/// its next call. That one is left current, as torch's matrix products warn where a thread, autograd's for one, has
/// none.
pub(crate) struct Bound {
    /// Null if the thread had none; absent if there is nothing to undo.
    previous: Option<sys::CUcontext>,
}

impl Bound {
    fn to(context: &CudaContext) -> std::result::Result<Self, DriverError> {
        let previous = result::ctx::get_current()?;
        if previous == Some(context.cu_ctx()) {
            return Ok(Self { previous: None });
        }
        context.bind_to_thread()?;
        if previous.is_none() && context.ordinal() == 0 {
            return Ok(Self { previous: None });
        }
        Ok(Self { previous: Some(previous.unwrap_or(ptr::null_mut())) })
    }

    /// Binds nothing, restores what is current now.
    fn restoring() -> std::result::Result<Self, DriverError> {
        Ok(Self { previous: Some(result::ctx::get_current()?.unwrap_or(ptr::null_mut())) })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let Some(previous) = self.previous else { return };
        // SAFETY: it was current on this thread a moment ago, and null means none. A failure here has no one to be
        // told to; the next call on this thread reports it.
        let _ = unsafe { result::ctx::set_current(previous) };
    }
}

impl DeviceState {
    fn error(&self, what: String, error: DriverError) -> Error {
        Error::Cuda { what, device: Device::Cuda(self.ordinal), message: describe(error) }
    }

    /// The handle of a kernel; its family's module is loaded at first use, and the context is current.
    fn function(&self, family: &Family, kernel: &'static str) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(kernel) {
            return Ok(function.0);
        }
        let loaded = relaxed_capture(|| self.load(family))?;
        functions.extend(loaded);
        let missing = || Error::Cuda {
            what: format!("looking up {kernel}"),
            device: Device::Cuda(self.ordinal),
            message: format!("{} does not list it", family.name),
        };
        functions.get(kernel).map(|function| function.0).ok_or_else(missing)
    }

    fn load(&self, family: &Family) -> Result<Vec<(&'static str, Function)>> {
        let what = || format!("loading the kernels of {} (built for {})", family.name, env!("HALFBYTE_BUILT_FOR"));
        // SAFETY: the image is a whole fatbin, aligned, and lives as long as the process.
        let module = unsafe { result::module::load_data(family.image.0.as_ptr().cast()) };
        let module = module.map_err(|error| self.error(what(), error))?;
        let look_up = |&kernel: &&'static str| {
            let name = CString::new(kernel).unwrap_or_default();
            // SAFETY: the module was loaded above and is never unloaded.
            let function = unsafe { result::module::get_function(module, name) };
            let function = function.map_err(|error| self.error(format!("looking up {kernel}"), error))?;
            self.raise_limits(function).map_err(|error| self.error(format!("setting up {kernel}"), error))?;
            Ok((kernel, Function(function)))
        };
        family.kernels.iter().map(look_up).collect()
    }

    /// Without this a kernel gets 48 KiB of dynamic shared memory and clusters of 8, however much the device has.
    fn raise_limits(&self, function: sys::CUfunction) -> std::result::Result<(), DriverError> {
        use sys::CUfunction_attribute::*;
        // SAFETY: the function belongs to the current context.
        unsafe {
            let fixed = result::function::get_function_attribute(function, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
            let most = self.limits.shared as i32 - fixed;
            result::function::set_function_attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)?;
            if self.limits.capability >= (9, 0) {
                let large_clusters = CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
                result::function::set_function_attribute(function, large_clusters, 1)?;
            }
            Ok(())
        }
    }
}

/// Loading a module is legal while some stream of this thread is being captured, but has to say so.
fn relaxed_capture<T>(load: impl FnOnce() -> T) -> T {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the call exchanges `mode` with the thread's own; doing it twice restores that.
    let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    let loaded = load();
    // SAFETY: as above.
    let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    loaded
}

pub(crate) fn describe(error: DriverError) -> String {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{name}: {text}"),
        _ => format!("CUDA error {}", error.0 as u32),
    }
}

/// A device and a stream to launch on.
pub(crate) struct Launcher {
    state: &'static DeviceState,
    stream: u64,
}

impl fmt::Debug for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} stream {:#x}", self.state.ordinal, self.stream)
    }
}

impl Launcher {
    pub fn new(ordinal: u32, stream: u64) -> Result<Self> {
        if !crate::HAS_KERNELS {
            let message = "this build has no CUDA kernels; rebuild with nvcc".to_string();
            return Err(Error::Cuda { what: "opening the device".into(), device: Device::Cuda(ordinal), message });
        }
        Ok(Self { state: device_state(ordinal)?, stream })
    }

    pub fn limits(&self) -> Limits {
        self.state.limits
    }

    /// Makes the device's context current on this thread, until dropped.
    pub fn bind(&self) -> Result<Bound> {
        Bound::to(&self.state.context).map_err(|error| self.error("binding the device", error))
    }

    pub fn error(&self, what: &str, error: DriverError) -> Error {
        self.state.error(what.to_string(), error)
    }

    /// Queues one kernel. `args` are addresses of values that match the kernel's parameters one by one (`args!`),
    /// and every pointer among them comes from an argument struct of core, which has checked its extent.
    pub fn launch(
        &self,
        family: &Family,
        kernel: &'static str,
        geometry: Geometry,
        args: &mut [Arg<'_>],
    ) -> Result<()> {
        self.launch_clustered(family, kernel, geometry, 1, args)
    }

    /// `launch` with `cluster` neighbouring CTAs of the grid's first dimension side by side (sm_90 and later).
    pub fn launch_clustered(
        &self,
        family: &Family,
        kernel: &'static str,
        geometry: Geometry,
        cluster: usize,
        args: &mut [Arg<'_>],
    ) -> Result<()> {
        let fail = |error| self.state.error(format!("{kernel} with {geometry:?}"), error);
        let _bound = Bound::to(&self.state.context).map_err(fail)?;
        let function = self.state.function(family, kernel)?;
        let overlaps = geometry.overlaps && self.state.limits.capability >= (9, 0);
        let clustered = (cluster > 1).then(|| clusters_of(cluster));
        let mut attributes: Vec<_> = clustered.into_iter().chain(overlaps.then(overlap)).collect();
        let config = sys::CUlaunchConfig {
            gridDimX: geometry.grid.0,
            gridDimY: geometry.grid.1,
            gridDimZ: geometry.grid.2,
            blockDimX: geometry.block.0,
            blockDimY: geometry.block.1,
            blockDimZ: geometry.block.2,
            sharedMemBytes: geometry.shared as u32,
            hStream: self.stream as usize as sys::CUstream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // An `Arg` is one address, and the driver only reads what they point to.
        let args: *mut *mut c_void = args.as_mut_ptr().cast();
        // SAFETY: the function belongs to the current context, the stream to the same device by `CudaBackend::new`'s
        // contract, and the parameters are copied before the call returns.
        unsafe { sys::cuLaunchKernelEx(&config, function, args, ptr::null_mut()) }.result().map_err(fail)
    }

    /// The map by which the copy engine takes boxes of 128 bytes by `rows` of a matrix, in swizzled order.
    pub fn map_boxes(&self, matrix: Matrix, rows: usize) -> Result<sys::CUtensorMap> {
        let fail = |error| self.state.error("mapping a matrix".to_string(), error);
        // SAFETY: all zeros is a valid value of a plain struct.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        let sizes = [matrix.columns as u64, matrix.rows as u64];
        let pitch = (matrix.stride * matrix.size) as u64;
        let extents = [(128 / matrix.size) as u32, rows as u32];
        // SAFETY: the arrays have as many entries as the matrix has dimensions, and nothing is dereferenced on the
        // device before a kernel does.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                matrix.dtype,
                2,
                matrix.at.cast_mut(),
                sizes.as_ptr(),
                &pitch,
                extents.as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().map_err(fail)?;
        Ok(map)
    }

    /// Queues one kernel of one-dimensional grid and block. More CTAs than a grid can have is the driver's error.
    pub fn launch_1d(
        &self,
        family: &Family,
        kernel: &'static str,
        ctas: usize,
        threads: u32,
        args: &mut [Arg<'_>],
    ) -> Result<()> {
        let geometry = Geometry { grid: (extent(ctas), 1, 1), block: (threads, 1, 1), shared: 0, overlaps: false };
        self.launch(family, kernel, geometry, args)
    }
}

fn clusters_of(ctas: usize) -> sys::CUlaunchAttribute {
    // SAFETY: all zeros is a valid attribute.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    // SAFETY: the fields are plain numbers, and this is the member that the id names.
    let dimension = unsafe { &mut attribute.value.clusterDim };
    (dimension.x, dimension.y, dimension.z) = (extent(ctas), 1, 1);
    attribute
}

/// Programmatic dependent launch.
fn overlap() -> sys::CUlaunchAttribute {
    // SAFETY: all zeros is a valid attribute.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

/// A count as a grid extent; one that no grid can have stays too large.
pub(crate) fn extent(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
