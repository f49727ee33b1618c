//! CUDA: the driver and NVRTC, both found at run time, so that nothing of them is needed to build, or on a machine without a GPU.
//!
//! The driver is `libcuda.so.1`, which is there wherever torch can use a GPU. NVRTC comes with torch's own packages. The stream that
//! torch gives work to is asked of the `libtorch_cuda.so` that is loaded.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};

use super::kernels::{self, AREA_BYTES, Found, THREADS};
use super::{Clock, Device, DeviceError, Job, LANES, Stream, Streams};

/// Not in `libloading`: only what is loaded already. The value of Linux.
const RTLD_NOLOAD: c_int = 4;

type Handle = *mut c_void;

/// Declares a table of functions that are looked up by name in one library.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($field:ident: $symbol:literal = fn($($argument:ty),*) $(,)?;)* }) => {
        $(#[$doc])*
        struct $table {
            $($field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl $table {
            fn find(library: &Library) -> Result<Self, DeviceError> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is the one that the library's header declares for this name.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($symbol.as_bytes())
                        };
                        *found.map_err(|_| DeviceError(format!("{} is missing: its library is too old", $symbol)))?
                    },)*
                })
            }
        }
    };
}

functions! {
    /// Of the driver (cuda.h).
    Driver {
        init: "cuInit" = fn(c_uint);
        error_name: "cuGetErrorName" = fn(c_int, *mut *const c_char);
        device_get: "cuDeviceGet" = fn(*mut c_int, c_int);
        device_name: "cuDeviceGetName" = fn(*mut c_char, c_int, c_int);
        device_attribute: "cuDeviceGetAttribute" = fn(*mut c_int, c_int, c_int);
        retain_context: "cuDevicePrimaryCtxRetain" = fn(*mut Handle, c_int);
        current_context: "cuCtxGetCurrent" = fn(*mut Handle);
        push_context: "cuCtxPushCurrent_v2" = fn(Handle);
        pop_context: "cuCtxPopCurrent_v2" = fn(*mut Handle);
        load_module: "cuModuleLoadData" = fn(*mut Handle, *const c_void);
        get_function: "cuModuleGetFunction" = fn(*mut Handle, Handle, *const c_char);
        allocate: "cuMemAlloc_v2" = fn(*mut u64, usize);
        allocate_host: "cuMemHostAlloc" = fn(*mut *mut c_void, usize, c_uint);
        host_on_device: "cuMemHostGetDevicePointer_v2" = fn(*mut u64, *mut c_void, c_uint);
        clear: "cuMemsetD8Async" = fn(u64, u8, usize, Handle);
        capturing: "cuStreamIsCapturing" = fn(Handle, *mut c_int);
        exchange_capture_mode: "cuThreadExchangeStreamCaptureMode" = fn(*mut c_int);
        launch: "cuLaunchKernel" = fn(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
        );
    }
}

functions! {
    /// Of NVRTC (nvrtc.h).
    Compiler {
        architectures: "nvrtcGetSupportedArchs" = fn(*mut c_int);
        architecture_count: "nvrtcGetNumSupportedArchs" = fn(*mut c_int);
        create: "nvrtcCreateProgram" = fn(
            *mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        );
        compile: "nvrtcCompileProgram" = fn(Handle, c_int, *const *const c_char);
        destroy: "nvrtcDestroyProgram" = fn(*mut Handle);
        log_size: "nvrtcGetProgramLogSize" = fn(Handle, *mut usize);
        log: "nvrtcGetProgramLog" = fn(Handle, *mut c_char);
        cubin_size: "nvrtcGetCUBINSize" = fn(Handle, *mut usize);
        cubin: "nvrtcGetCUBIN" = fn(Handle, *mut c_char);
        ptx_size: "nvrtcGetPTXSize" = fn(Handle, *mut usize);
        ptx: "nvrtcGetPTX" = fn(Handle, *mut c_char);
    }
}

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY: [c_int; 2] = [75, 76];
/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`.
const PINNED_AND_MAPPED: c_uint = 1 | 2;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: c_int = 2;
/// `CUDA_ERROR_NOT_READY`: the device has not come so far.
const NOT_READY: c_int = 600;

type StreamId = unsafe extern "C" fn(Handle, *mut u64) -> c_int;
type TorchStream = unsafe extern "C" fn(i32, *mut Handle) -> i32;
type Elapsed = unsafe extern "C" fn(*mut f32, Handle, Handle) -> c_int;

functions! {
    /// Of the driver (cuda.h), for times.
    Events {
        create: "cuEventCreate" = fn(*mut Handle, c_uint);
        record: "cuEventRecord" = fn(Handle, Handle);
        query: "cuEventQuery" = fn(Handle);
    }
}

/// A GPU of torch's, and the streams that torch gives its work to.
struct Access {
    driver: Driver,
    stream_id: Option<StreamId>,
    torch_stream: TorchStream,
    index: i32,
    name: String,
    /// 90: 9.0.
    capability: u32,
    context: Handle,
}

/// A GPU, with the kernel that looks at operands.
pub struct Gpu {
    access: Access,
    function: Handle,
    /// [`LANES`] areas of [`AREA_BYTES`].
    areas: u64,
    /// Answers, as the host and as the device address them.
    answers: *mut Found,
    answers_on_device: u64,
    places: usize,
}

// SAFETY: handles of the driver may be used from any thread; `answers` is memory that lives as long as the process, and is read only through
// `poll`, which takes the device exclusively.
unsafe impl Send for Gpu {}

/// The clock of a GPU: pairs of its events.
pub struct EventPairs {
    access: Access,
    events: Events,
    elapsed: Elapsed,
    pairs: Vec<[Handle; 2]>,
}

// SAFETY: as for `Gpu`: handles may be used from any thread.
unsafe impl Send for EventPairs {}

impl Driver {
    fn check(&self, code: c_int, what: &str) -> Result<(), DeviceError> {
        if code == 0 {
            return Ok(());
        }
        let mut name = ptr::null();
        // SAFETY: writes one pointer, to a text that lives as long as the driver.
        let known = unsafe { (self.error_name)(code, &raw mut name) } == 0 && !name.is_null();
        let name = if known {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(name) }
                .to_string_lossy()
                .into_owned()
        } else {
            format!("error {code}")
        };
        Err(DeviceError(format!("{what}: {name}")))
    }
}

/// Opens a library that must stay loaded.
fn load(name: impl AsRef<std::ffi::OsStr>, flags: c_int) -> Result<&'static Library, DeviceError> {
    let name = name.as_ref();
    // SAFETY: libraries of the driver and of torch, whose initializers may run at any time.
    match unsafe { Library::open(Some(name), flags) } {
        // Never unloaded: pointers into it are kept.
        Ok(library) => Ok(Box::leak(Box::new(library))),
        Err(error) => Err(DeviceError(format!("{}: {error}", name.to_string_lossy()))),
    }
}

impl Access {
    /// The GPU that torch calls `cuda:index`.
    fn open(index: i32) -> Result<Self, DeviceError> {
        let torch = load("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY | RTLD_LOCAL)
            .map_err(|_| DeviceError("this torch has no CUDA".to_owned()))?;
        // SAFETY: torch's C interface (shim.h): int32_t (int32_t, void**).
        let torch_stream =
            *unsafe { torch.get::<TorchStream>(b"aoti_torch_get_current_cuda_stream") }.map_err(
                |_| DeviceError("this torch does not tell its current stream".to_owned()),
            )?;
        let library = load("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)?;
        let driver = Driver::find(library)?;
        // SAFETY: cuda.h: CUresult (CUstream, unsigned long long*); not in drivers before 12.0.
        let stream_id = unsafe { library.get::<StreamId>(b"cuStreamGetId") }
            .ok()
            .map(|found| *found);
        // SAFETY: no arguments that could be wrong; torch has done it before.
        driver.check(unsafe { (driver.init)(0) }, "cuInit")?;
        let (mut device, mut context) = (0, ptr::null_mut());
        driver.check(
            // SAFETY: writes one int.
            unsafe { (driver.device_get)(&raw mut device, index) },
            "cuDeviceGet",
        )?;
        driver.check(
            // SAFETY: writes one handle. The context is torch's, kept for ever.
            unsafe { (driver.retain_context)(&raw mut context, device) },
            "cuDevicePrimaryCtxRetain",
        )?;
        let mut text = [0; 256];
        let mut capability = [0; 2];
        driver.check(
            // SAFETY: writes at most as many characters as it is told, with their end.
            unsafe { (driver.device_name)(text.as_mut_ptr(), text.len() as c_int, device) },
            "cuDeviceGetName",
        )?;
        for (value, attribute) in capability.iter_mut().zip(CAPABILITY) {
            driver.check(
                // SAFETY: writes one int.
                unsafe { (driver.device_attribute)(value, attribute, device) },
                "cuDeviceGetAttribute",
            )?;
        }
        // SAFETY: ended by the driver, or by the last element, which it leaves 0.
        let name = unsafe { CStr::from_ptr(text.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            driver,
            stream_id,
            torch_stream,
            index,
            name: format!("{name} (sm_{}{})", capability[0], capability[1]),
            capability: (capability[0] * 10 + capability[1]).cast_unsigned(),
            context,
        })
    }

    /// Runs `work` with this GPU's context on the calling thread.
    fn within<R>(
        &self,
        work: impl FnOnce(&Driver) -> Result<R, DeviceError>,
    ) -> Result<R, DeviceError> {
        let mut current = ptr::null_mut();
        self.driver.check(
            // SAFETY: writes one handle.
            unsafe { (self.driver.current_context)(&raw mut current) },
            "cuCtxGetCurrent",
        )?;
        if current == self.context {
            return work(&self.driver);
        }
        self.driver.check(
            // SAFETY: a context that was retained.
            unsafe { (self.driver.push_context)(self.context) },
            "cuCtxPushCurrent",
        )?;
        let result = work(&self.driver);
        let mut popped = ptr::null_mut();
        // SAFETY: pops what was pushed above.
        let ended = unsafe { (self.driver.pop_context)(&raw mut popped) };
        self.driver.check(ended, "cuCtxPopCurrent")?;
        result
    }

    /// The same, with work that makes memory or asks for events, which must not break a graph that another thread captures.
    fn relaxed<R>(
        &self,
        work: impl FnOnce(&Driver) -> Result<R, DeviceError>,
    ) -> Result<R, DeviceError> {
        self.within(|driver| {
            let mut mode = RELAXED;
            // SAFETY: exchanges one int.
            let begun = unsafe { (driver.exchange_capture_mode)(&raw mut mode) };
            driver.check(begun, "cuThreadExchangeStreamCaptureMode")?;
            let result = work(driver);
            // SAFETY: as above; `mode` is what it was.
            let ended = unsafe { (driver.exchange_capture_mode)(&raw mut mode) };
            driver.check(ended, "cuThreadExchangeStreamCaptureMode")?;
            result
        })
    }

    fn current_stream(&self) -> Option<Stream> {
        let mut handle = ptr::null_mut();
        // SAFETY: torch's C interface: writes one handle, and turns exceptions into codes.
        if unsafe { (self.torch_stream)(self.index, &raw mut handle) } != 0 {
            return None;
        }
        let mut id = handle as u64;
        if let Some(stream_id) = self.stream_id.filter(|_| !handle.is_null()) {
            // SAFETY: a stream of torch's; writes one number, or nothing. Of older drivers' streams the handle has to do.
            unsafe { stream_id(handle, &raw mut id) };
        }
        Some(Stream {
            handle: handle as u64,
            id,
        })
    }

    fn is_capturing(&self, stream: Stream) -> bool {
        let asked = self.within(|driver| {
            let mut status = 0;
            // SAFETY: a stream of torch's, or the default stream of the context that is current now; writes one int.
            let code = unsafe { (driver.capturing)(stream.handle as Handle, &raw mut status) };
            driver.check(code, "cuStreamIsCapturing")?;
            Ok(status != 0)
        });
        // An error says that a graph is captured which work of the default stream would break; asking breaks none.
        asked.unwrap_or(true)
    }
}

/// The device that the calling thread's context belongs to, as the driver numbers those that torch sees.
pub fn current_device() -> Option<i32> {
    type CurrentDevice = unsafe extern "C" fn(*mut c_int) -> c_int;
    static FUNCTION: OnceLock<Option<CurrentDevice>> = OnceLock::new();
    let function = (*FUNCTION.get_or_init(|| {
        let library = load("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY | RTLD_LOCAL).ok()?;
        // SAFETY: cuda.h: CUresult (CUdevice*).
        unsafe { library.get::<CurrentDevice>(b"cuCtxGetDevice") }
            .ok()
            .map(|found| *found)
    }))?;
    let mut device = -1;
    // SAFETY: writes one int, or gives an error where the thread has no context.
    (unsafe { function(&raw mut device) } == 0).then_some(device)
}

impl Gpu {
    /// The GPU that torch calls `cuda:index`, with `places` places for answers. Compiles the kernel, which takes about two seconds.
    ///
    /// # Errors
    /// Where there is none, or something of it is missing.
    pub fn open(index: i32, places: usize) -> Result<Self, DeviceError> {
        let mut gpu = Self {
            access: Access::open(index)?,
            function: ptr::null_mut(),
            areas: 0,
            answers: ptr::null_mut(),
            answers_on_device: 0,
            places,
        };
        let code = Nvrtc::find()?.compile(gpu.access.capability)?;
        gpu.set_up(&code)?;
        Ok(gpu)
    }

    /// Loads the kernel and makes all memory that will ever be used.
    fn set_up(&mut self, code: &[u8]) -> Result<(), DeviceError> {
        let bytes = self.places * size_of::<Found>();
        let (mut areas, mut answers, mut answers_on_device) = (0, ptr::null_mut(), 0);
        let mut function = ptr::null_mut();
        self.access.relaxed(|driver| {
            let mut module = ptr::null_mut();
            driver.check(
                // SAFETY: `code` is a cubin, or PTX with its final 0, as NVRTC made it; it is only read.
                unsafe { (driver.load_module)(&raw mut module, code.as_ptr().cast()) },
                "cuModuleLoadData",
            )?;
            let entry = CString::new(kernels::ENTRY).unwrap_or_default();
            driver.check(
                // SAFETY: writes one handle; the name ends.
                unsafe { (driver.get_function)(&raw mut function, module, entry.as_ptr()) },
                "cuModuleGetFunction",
            )?;
            driver.check(
                // SAFETY: writes one address.
                unsafe { (driver.allocate)(&raw mut areas, AREA_BYTES * LANES) },
                "cuMemAlloc",
            )?;
            driver.check(
                // SAFETY: writes one address.
                unsafe { (driver.allocate_host)(&raw mut answers, bytes, PINNED_AND_MAPPED) },
                "cuMemHostAlloc",
            )?;
            // SAFETY: so many bytes that were just made, and that nobody else knows yet. All zeros are valid answers without a ticket.
            unsafe { ptr::write_bytes(answers.cast::<u8>(), 0, bytes) };
            driver.check(
                // SAFETY: writes one address; the memory was made to be mapped.
                unsafe { (driver.host_on_device)(&raw mut answers_on_device, answers, 0) },
                "cuMemHostGetDevicePointer",
            )
        })?;
        self.function = function;
        self.areas = areas;
        self.answers = answers.cast();
        self.answers_on_device = answers_on_device;
        Ok(())
    }

    fn area(&self, lane: usize) -> u64 {
        self.areas + (lane * AREA_BYTES) as u64
    }
}

/// Both look at the same GPU.
macro_rules! streams_of_access {
    ($($kind:ty),*) => {
        $(impl Streams for $kind {
            fn name(&self) -> String {
                self.access.name.clone()
            }

            fn current_stream(&self) -> Option<Stream> {
                self.access.current_stream()
            }

            fn is_capturing(&mut self, stream: Stream) -> bool {
                self.access.is_capturing(stream)
            }
        })*
    };
}

streams_of_access!(Gpu, EventPairs);

impl EventPairs {
    /// The clock of the GPU that torch calls `cuda:index`, with so many pairs of events, all of which are made now.
    ///
    /// # Errors
    /// Where there is none, or something of it is missing.
    pub fn open(index: i32, pairs: usize) -> Result<Self, DeviceError> {
        let access = Access::open(index)?;
        let library = load("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)?;
        let events = Events::find(library)?;
        // Under its newer name since 12.8, with the same arguments.
        let names: [&[u8]; 2] = [b"cuEventElapsedTime_v2", b"cuEventElapsedTime"];
        let elapsed = names
            .iter()
            .find_map(|name| {
                // SAFETY: cuda.h: CUresult (float*, CUevent, CUevent).
                let found = unsafe { library.get::<Elapsed>(name) };
                found.ok().map(|found| *found)
            })
            .ok_or_else(|| {
                DeviceError("cuEventElapsedTime is missing: the driver is too old".to_owned())
            })?;
        let mut made = vec![[ptr::null_mut(); 2]; pairs];
        access.relaxed(|driver| {
            for event in made.iter_mut().flatten() {
                // SAFETY: writes one handle. CU_EVENT_DEFAULT: with times.
                let code = unsafe { (events.create)(&raw mut *event, 0) };
                driver.check(code, "cuEventCreate")?;
            }
            Ok(())
        })?;
        Ok(Self {
            access,
            events,
            elapsed,
            pairs: made,
        })
    }

    fn record(&self, pair: usize, which: usize, stream: Stream) -> Result<(), DeviceError> {
        let event = self.event(pair, which)?;
        self.access.within(|driver| {
            // SAFETY: an event of this GPU that was made at the start, and a stream of torch's that captures no graph. What the event held is
            // forgotten.
            let code = unsafe { (self.events.record)(event, stream.handle as Handle) };
            driver.check(code, "cuEventRecord")
        })
    }

    fn event(&self, pair: usize, which: usize) -> Result<Handle, DeviceError> {
        let events = self.pairs.get(pair).and_then(|pair| pair.get(which));
        events
            .copied()
            .ok_or_else(|| DeviceError("there is no such event".to_owned()))
    }
}

impl Clock for EventPairs {
    fn begin(&mut self, pair: usize, stream: Stream) -> Result<(), DeviceError> {
        self.record(pair, 0, stream)
    }

    fn end(&mut self, pair: usize, stream: Stream) -> Result<(), DeviceError> {
        self.record(pair, 1, stream)
    }

    fn elapsed(&mut self, pair: usize) -> Result<Option<u64>, DeviceError> {
        let (begun, ended) = (self.event(pair, 0)?, self.event(pair, 1)?);
        self.access.relaxed(|driver| {
            // SAFETY: an event that was recorded outside of graphs.
            match unsafe { (self.events.query)(ended) } {
                NOT_READY => return Ok(None),
                code => driver.check(code, "cuEventQuery")?,
            }
            let mut milliseconds = 0.0;
            // SAFETY: writes one float; both events were recorded, on one stream.
            match unsafe { (self.elapsed)(&raw mut milliseconds, begun, ended) } {
                NOT_READY => Ok(None),
                code => {
                    driver.check(code, "cuEventElapsedTime")?;
                    // Never negative on one stream; a float of milliseconds has 24 bits.
                    Ok(Some((f64::from(milliseconds) * 1e6) as u64))
                }
            }
        })
    }
}

impl Device for Gpu {
    fn bind(&mut self, lane: usize, stream: Stream) -> Result<(), DeviceError> {
        let area = self.area(lane);
        self.access.within(|driver| {
            // SAFETY: an area of this device that no launch uses; cleared in the order of the stream that will use it.
            let code = unsafe { (driver.clear)(area, 0, AREA_BYTES, stream.handle as Handle) };
            driver.check(code, "cuMemsetD8Async")
        })
    }

    fn launch(
        &mut self,
        lane: usize,
        stream: Stream,
        place: usize,
        ticket: u32,
        job: &Job,
    ) -> Result<(), DeviceError> {
        let mut job = *job;
        job.area = self.area(lane);
        job.answer = self.answers_on_device + (place * size_of::<Found>()) as u64;
        job.ticket = ticket;
        let function = self.function;
        self.access.within(|driver| {
            let mut parameters = [(&raw mut job).cast::<c_void>()];
            // SAFETY: the kernel has one parameter, a `Job`, which the driver copies before it returns. What the job names is memory of
            // operands that are alive on this stream now (torch gives memory of a stream to nobody else before the stream has passed), an
            // area of this lane, and a place that no other launch writes to.
            let code = unsafe {
                (driver.launch)(
                    function,
                    job.blocks,
                    1,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    stream.handle as Handle,
                    parameters.as_mut_ptr(),
                    ptr::null_mut(),
                )
            };
            driver.check(code, "cuLaunchKernel")
        })
    }

    fn poll(&mut self, place: usize, ticket: u32) -> Option<Found> {
        if place >= self.places {
            return None;
        }
        // SAFETY: one of the places of `answers`, which the device writes: read as a volatile word first, and the rest only behind it, when the
        // device is done with the place.
        unsafe {
            let answer = self.answers.add(place);
            if (&raw const (*answer).done).read_volatile() != ticket {
                return None;
            }
            fence(Ordering::Acquire);
            Some(answer.read_volatile())
        }
    }
}

/// The compiler.
pub(super) struct Nvrtc(Compiler);

impl Nvrtc {
    /// Finds it: beside the libraries of torch, loaded already, or among those of the system.
    pub(super) fn find() -> Result<Self, DeviceError> {
        const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];
        for directory in directories() {
            if let Some(found) = Self::in_directory(&directory)? {
                return Ok(found);
            }
        }
        for flags in [RTLD_NOLOAD, 0] {
            for name in NAMES {
                if let Ok(library) = load(name, flags | RTLD_LAZY | RTLD_LOCAL) {
                    return Ok(Self(Compiler::find(library)?));
                }
            }
        }
        Err(DeviceError(
            "NVRTC is missing (libnvrtc.so), which comes with torch's CUDA packages".to_owned(),
        ))
    }

    /// What a directory has, if it has any.
    pub(super) fn in_directory(directory: &Path) -> Result<Option<Self>, DeviceError> {
        let Ok(entries) = std::fs::read_dir(directory) else {
            return Ok(None);
        };
        let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        names.sort();
        let find = |prefix: &str| {
            names.iter().find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
            })
        };
        let Some(library) = find("libnvrtc.so") else {
            return Ok(None);
        };
        // The compiler asks for it by name alone, and looks in no directory.
        if let Some(builtins) = find("libnvrtc-builtins.so") {
            load(builtins, RTLD_LAZY | RTLD_LOCAL)?;
        }
        let library = load(library, RTLD_LAZY | RTLD_LOCAL)?;
        Ok(Some(Self(Compiler::find(library)?)))
    }

    /// The kernel for a compute capability (90: 9.0): a cubin, or, for one that the compiler does not know yet, PTX, which the driver compiles.
    pub(super) fn compile(&self, capability: u32) -> Result<Vec<u8>, DeviceError> {
        let known = self.architectures()?;
        let newest = known
            .iter()
            .copied()
            .filter(|known| *known <= capability)
            .max()
            .ok_or_else(|| {
                DeviceError(format!(
                    "NVRTC does not know sm_{capability}: it is too new for this GPU"
                ))
            })?;
        let native = newest == capability;
        let architecture = if native {
            format!("--gpu-architecture=sm_{capability}")
        } else {
            format!("--gpu-architecture=compute_{newest}")
        };
        self.build(&architecture, native)
    }

    fn architectures(&self) -> Result<Vec<u32>, DeviceError> {
        let mut count = 0;
        // SAFETY: writes one int.
        check_compiler(unsafe { (self.0.architecture_count)(&raw mut count) }, "")?;
        let mut list = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: writes `count` ints.
        check_compiler(unsafe { (self.0.architectures)(list.as_mut_ptr()) }, "")?;
        Ok(list.into_iter().map(i32::cast_unsigned).collect())
    }

    fn build(&self, architecture: &str, native: bool) -> Result<Vec<u8>, DeviceError> {
        let text = |text: &str| CString::new(text).unwrap_or_default();
        let source = text(kernels::SOURCE);
        let name = text("kernels.cu");
        let options = [text(architecture), text("--std=c++17")];
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = ptr::null_mut();
        check_compiler(
            // SAFETY: texts that end and live until the call is over; no headers.
            unsafe {
                (self.0.create)(
                    &raw mut program,
                    source.as_ptr(),
                    name.as_ptr(),
                    0,
                    ptr::null(),
                    ptr::null(),
                )
            },
            "",
        )?;
        // SAFETY: a program that was just made, and options that live until the call is over.
        let compiled =
            unsafe { (self.0.compile)(program, options.len() as c_int, options.as_ptr()) };
        let result = check_compiler(compiled, &self.log(program)).and_then(|()| {
            if native {
                self.output(program, self.0.cubin_size, self.0.cubin)
            } else {
                self.output(program, self.0.ptx_size, self.0.ptx)
            }
        });
        // SAFETY: the program is used no more.
        unsafe { (self.0.destroy)(&raw mut program) };
        result
    }

    fn output(
        &self,
        program: Handle,
        size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = 0;
        // SAFETY: writes one number.
        check_compiler(unsafe { size(program, &raw mut bytes) }, "")?;
        let mut output = vec![0u8; bytes];
        // SAFETY: writes as many bytes as it has said.
        check_compiler(unsafe { get(program, output.as_mut_ptr().cast()) }, "")?;
        Ok(output)
    }

    fn log(&self, program: Handle) -> String {
        self.output(program, self.0.log_size, self.0.log)
            .map(|bytes| {
                String::from_utf8_lossy(&bytes)
                    .trim_end_matches('\0')
                    .to_owned()
            })
            .unwrap_or_default()
    }
}

fn check_compiler(code: c_int, log: &str) -> Result<(), DeviceError> {
    if code == 0 {
        Ok(())
    } else {
        Err(DeviceError(format!("NVRTC: error {code} {log}")))
    }
}

/// Directories beside the CUDA libraries that are loaded.
fn directories() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut found: Vec<PathBuf> = Vec::new();
    for line in maps.lines() {
        let Some(path) = line.find('/').and_then(|at| line.get(at..)).map(Path::new) else {
            continue;
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(directory) = path.parent() else {
            continue;
        };
        if !name.starts_with("libcudart.so") && !name.starts_with("libtorch_cuda.so") {
            continue;
        }
        // nvidia/cuda_runtime/lib and nvidia/cuda_nvrtc/lib (CUDA 12); one directory for all (13).
        let sibling = directory
            .parent()
            .and_then(Path::parent)
            .map(|packages| packages.join("cuda_nvrtc/lib"));
        for directory in std::iter::once(directory.to_owned()).chain(sibling) {
            if !found.contains(&directory) {
                found.push(directory);
            }
        }
    }
    found
}
