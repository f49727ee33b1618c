//! The C side of capture: the table for the hook, and the functions that the attach glue calls.
//!
//! Every function here is a boundary: pointers are checked or argued, panics end here and switch the recorder off.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Once;
use std::sync::atomic::Ordering;

use optape_trace::{ArgumentDef, ModuleDef, ModuleId, OpDef, ReturnDef, TextId, WatchDef, WatchId};
use parking_lot::lock_api::RawMutex as _;
use serde::Deserialize;

use super::device;
use super::scopes::Entry;
use super::watching::Keep;
use super::{CAPTURE, Capture, CaptureError, Settings};
use crate::abi::{ABI_VERSION, Call, CaptureTable, Operator, OperatorArgument, Plan, Tensor};

static TABLE: CaptureTable = CaptureTable {
    abi_version: ABI_VERSION,
    reserved: 0,
    recording: CAPTURE.recording.as_ptr().cast_const(),
    define_op,
    text,
    begin,
    end,
    abort,
    storage_freed,
    module_enter,
    module_exit,
    state,
    identify,
    watch,
    failed,
    idle,
};

/// Capture as the hook sees it.
#[must_use]
pub fn table() -> &'static CaptureTable {
    &TABLE
}

/// Runs `work`; a panic in it switches the recorder off instead of reaching the program.
fn guarded<R: Default>(work: impl FnOnce() -> R) -> R {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(|t| (*t).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        // The lock is not poisoned by a panic; whatever state it guards is not used for recording any more.
        let mut guard = CAPTURE.state.lock();
        Capture::get().give_up(
            &mut guard,
            &format!("a fault in optape: {}", text.unwrap_or_default()),
        );
        R::default()
    })
}

/// # Safety
/// `text` is null or leads to a NUL-terminated string.
unsafe fn owned(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

unsafe extern "C" fn define_op(operator: *const Operator, out: *mut Plan) -> i32 {
    let defined = guarded(|| {
        // SAFETY: the ABI: both point to live structures for as long as the call lasts, and arrays have the lengths beside them.
        let (operator, out) = unsafe { (&*operator, &mut *out) };
        let list = |first: *const OperatorArgument, count: u32| {
            if count == 0 {
                &[][..]
            } else {
                // SAFETY: as above.
                unsafe { std::slice::from_raw_parts(first, count as usize) }
            }
        };
        // SAFETY: the ABI: all texts are NUL-terminated, or null where the header says so.
        let definition = unsafe {
            OpDef {
                name: owned(operator.name),
                overload: owned(operator.overload),
                arguments: list(operator.arguments, operator.argument_count)
                    .iter()
                    .map(|a| ArgumentDef {
                        name: owned(a.name),
                        type_name: owned(a.type_name),
                        keyword_only: a.keyword_only != 0,
                        default: (!a.default_value.is_null()).then(|| owned(a.default_value)),
                        written: a.written != 0,
                        alias: owned(a.alias),
                    })
                    .collect(),
                returns: list(operator.returns, operator.return_count)
                    .iter()
                    .map(|r| ReturnDef {
                        type_name: owned(r.type_name),
                        alias: owned(r.alias),
                        written: r.written != 0,
                    })
                    .collect(),
            }
        };
        Capture::get().define_op(definition, out)
    });
    i32::from(!defined)
}

unsafe extern "C" fn text(text: *const c_char, length: usize) -> u32 {
    guarded(|| {
        if length == 0 {
            return 0;
        }
        // SAFETY: the ABI: `length` readable bytes.
        let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
        let text = String::from_utf8_lossy(bytes);
        Capture::get().with(|state| state.text(&text).map(|id| id.0))
    })
}

unsafe extern "C" fn begin(call: *mut Call) {
    // SAFETY: the ABI: a live call that nobody else touches meanwhile.
    guarded(|| Capture::get().begin(unsafe { &mut *call }));
}

unsafe extern "C" fn end(call: *mut Call) {
    // SAFETY: as `begin`.
    guarded(|| Capture::get().end(unsafe { &mut *call }));
}

unsafe extern "C" fn watch(call: *mut Call) {
    guarded(|| {
        // SAFETY: as `begin`.
        Capture::get().watched(unsafe { &mut *call });
    });
}

unsafe extern "C" fn abort(call: *mut Call) {
    // SAFETY: as `begin`.
    guarded(|| Capture::get().abort(unsafe { &mut *call }));
}

unsafe extern "C" fn storage_freed(base: *const c_void) {
    guarded(|| Capture::get().storage_freed(base as usize));
}

/// # Safety
/// `first` leads to `count` tensors that live as long as the call that passed them.
unsafe fn tensors<'a>(first: *const Tensor, count: u32) -> &'a [Tensor] {
    if count == 0 || first.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(first, count as usize) }
}

unsafe extern "C" fn module_enter(
    thread: u64,
    module: u32,
    graph_task: u32,
    training: u32,
    grad_mode: u32,
    first: *const Tensor,
    count: u32,
) {
    guarded(|| {
        // SAFETY: the ABI: `count` live tensors.
        let arguments = unsafe { tensors(first, count) };
        Capture::get().module_enter(
            thread,
            Entry {
                module,
                graph_task: graph_task != 0,
                training: training != 0,
                grad_mode: grad_mode != 0,
            },
            arguments,
        );
    });
}

unsafe extern "C" fn module_exit(thread: u64, module: u32, first: *const Tensor, count: u32) {
    guarded(|| {
        // SAFETY: the ABI: `count` live tensors.
        let results = unsafe { tensors(first, count) };
        Capture::get().module_exit(thread, module, results);
    });
}

unsafe extern "C" fn state(thread: u64, module: u32, attribute: u32, tensor: *const Tensor) {
    guarded(|| {
        // SAFETY: the ABI: null or a live tensor.
        let tensor = unsafe { tensor.as_ref() };
        Capture::get().state_assigned(thread, ModuleId(module), TextId(attribute), tensor);
    });
}

unsafe extern "C" fn identify(tensor: *const Tensor, ids: *mut u64) {
    guarded(|| {
        // SAFETY: the ABI: a live tensor, and two words to write.
        let (tensor, ids) = unsafe { (&*tensor, std::slice::from_raw_parts_mut(ids, 2)) };
        ids.copy_from_slice(&Capture::get().identities(tensor));
    });
}

unsafe extern "C" fn idle(thread: u64) {
    guarded(|| Capture::get().idle(thread));
}

unsafe extern "C" fn failed(why: *const c_char) {
    guarded(|| {
        // SAFETY: the ABI: a NUL-terminated text.
        let why = unsafe { owned(why) };
        let mut guard = CAPTURE.state.lock();
        Capture::get().give_up(&mut guard, &why);
    });
}

/// A fork must not happen while another thread holds the lock: the child would inherit it locked, by nobody.
pub(super) fn install_fork_handlers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        unsafe extern "C" fn prepare() {
            // SAFETY: `state` is a static; the matching unlock stands in `parent` and `child`, on this same thread of control.
            unsafe { CAPTURE.state.raw() }.lock();
            device::before_fork();
        }
        unsafe extern "C" fn parent() {
            device::after_fork();
            // SAFETY: locked by `prepare`, and no guard exists.
            unsafe { CAPTURE.state.force_unlock() };
        }
        unsafe extern "C" fn child() {
            device::after_fork();
            device::forked();
            // SAFETY: as `parent`; the child's only thread is the one that ran `prepare`.
            unsafe { CAPTURE.state.force_unlock() };
            guarded(|| {
                if let Some(state) = CAPTURE.state.lock().as_mut() {
                    state.forked();
                }
            });
        }
        // SAFETY: three functions with the signature that pthread_atfork wants; they live forever, since the library is never unloaded.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
}

// ---- what the attach glue calls -------------------------------------------------------------------------------------

/// What the glue passes to [`optape_capture_start`], as JSON.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StartRequest {
    run: PathBuf,
    #[serde(default)]
    hook_key: String,
    #[serde(default)]
    versions: BTreeMap<String, String>,
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    rank: Option<u32>,
    /// In the place of the environment.
    #[serde(default)]
    variables: Option<BTreeMap<String, String>>,
}

fn parse_request(json: &str) -> Result<Settings, CaptureError> {
    let bad = |e: String| CaptureError::Settings(e);
    let request: StartRequest = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
    let mut settings = match &request.variables {
        Some(variables) => {
            Settings::from_variables(request.run, |name| variables.get(name).cloned())?
        }
        None => Settings::from_environment(request.run)?,
    };
    let mut versions = request.versions;
    if !request.hook_key.is_empty() {
        versions.insert("dispatch key".to_owned(), request.hook_key);
    }
    settings.versions = versions;
    settings.command = request.command;
    settings.rank = request.rank;
    Ok(settings)
}

/// The table for `optape_hook_install`.
#[unsafe(no_mangle)]
pub extern "C" fn optape_capture_table() -> *const CaptureTable {
    table()
}

/// Prepares recording. 0 on success; else a text of at most `error_size` bytes stands in `error`.
///
/// # Safety
/// `json` is a NUL-terminated text; `error` is null or leads to `error_size` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_capture_start(
    json: *const c_char,
    error: *mut c_char,
    error_size: usize,
) -> i32 {
    let result = guarded(|| {
        // SAFETY: the caller's promise.
        let json = unsafe { owned(json) };
        Some(parse_request(&json).and_then(|settings| Capture::get().start(settings)))
    });
    let message = match result {
        Some(Ok(())) => return 0,
        Some(Err(e)) => e.to_string(),
        None => "a fault in optape".to_owned(),
    };
    if !error.is_null() && error_size > 0 {
        let length = message.len().min(error_size - 1);
        // SAFETY: the caller's promise: `error_size` writable bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(message.as_ptr(), error.cast::<u8>(), length);
            error.add(length).write(0);
        }
    }
    1
}

/// Tells a module. `classes`: qualified names, one per line, its own first.
///
/// # Safety
/// Both texts are NUL-terminated; `parameters` leads to `count` addresses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_define_module(
    name: *const c_char,
    classes: *const c_char,
    spiking: i32,
    parameters: *const usize,
    count: usize,
) -> u32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        let (name, classes, parameters) =
            unsafe { (owned(name), owned(classes), addresses(parameters, count)) };
        let classes = classes.lines().map(str::to_owned).collect();
        Capture::get()
            .define_module(
                ModuleDef {
                    name,
                    classes,
                    spiking: spiking != 0,
                },
                parameters,
            )
            .0
    })
}

/// Tells a module's own parameters again, after they changed.
///
/// # Safety
/// `parameters` leads to `count` addresses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_module_parameters(
    module: u32,
    parameters: *const usize,
    count: usize,
) {
    guarded(|| {
        // SAFETY: the caller's promise.
        let parameters = unsafe { addresses(parameters, count) };
        Capture::get().module_parameters(ModuleId(module), parameters);
    });
}

/// # Safety
/// `first` leads to `count` addresses.
unsafe fn addresses<'a>(first: *const usize, count: usize) -> &'a [usize] {
    if count == 0 || first.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(first, count) }
}

/// Tells a watch. `module`: -1 where it belongs to none.
///
/// # Safety
/// `what` is a NUL-terminated text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_define_watch(module: i64, what: *const c_char) -> u32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        let what = unsafe { owned(what) };
        Capture::get()
            .define_watch(WatchDef {
                module: u32::try_from(module).ok().map(ModuleId),
                what,
            })
            .0
    })
}

/// Says what a watch keeps beside statistics: 0 nothing, 1 values whose elements are all 0 or 1, 2 all values.
#[unsafe(no_mangle)]
pub extern "C" fn optape_watch_keep(watch: u32, keep: u32) {
    guarded(|| Capture::get().keep(WatchId(watch), Keep::from_number(keep)));
}

/// Switches a watch (-1: all that there are) on or off, at any time, from any thread.
#[unsafe(no_mangle)]
pub extern "C" fn optape_watch_switch(watch: i64, on: i32) {
    guarded(|| {
        Capture::get().switch_watch(u32::try_from(watch).ok().map(WatchId), on != 0);
    });
}

/// An optimizer step begins on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn optape_optimizer_enter() {
    guarded(|| Capture::get().optimizer(true));
}

/// An optimizer step has ended on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn optape_optimizer_exit() {
    guarded(|| Capture::get().optimizer(false));
}

/// Names the stage on this thread; null takes the name back.
///
/// # Safety
/// `name` is null or a NUL-terminated text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_stage(name: *const c_char) {
    guarded(|| {
        // SAFETY: the caller's promise.
        let text = unsafe { owned(name) };
        Capture::get().stage((!name.is_null()).then_some(text.as_str()));
    });
}

/// Marks a step that processed `samples` samples (0: not said).
#[unsafe(no_mangle)]
pub extern "C" fn optape_step(samples: u64) {
    guarded(|| Capture::get().step(samples));
}

/// Begins a range on this thread.
///
/// # Safety
/// `name` is a NUL-terminated text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_range_enter(name: *const c_char) {
    guarded(|| {
        // SAFETY: the caller's promise.
        let name = unsafe { owned(name) };
        Capture::get().range_enter(&name);
    });
}

/// Ends the innermost range of this thread.
#[unsafe(no_mangle)]
pub extern "C" fn optape_range_exit() {
    guarded(|| Capture::get().range_exit());
}

/// A region begins in which work may run that the dispatcher does not see.
#[unsafe(no_mangle)]
pub extern "C" fn optape_opaque_enter() {
    guarded(|| Capture::get().opaque_enter());
}

/// It has ended, and ran between two times of CLOCK_MONOTONIC.
///
/// # Safety
/// `name` is a NUL-terminated text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_opaque_exit(name: *const c_char, began_ns: u64, ended_ns: u64) {
    guarded(|| {
        // SAFETY: the caller's promise.
        let name = unsafe { owned(name) };
        Capture::get().opaque_exit(&name, began_ns, ended_ns);
    });
}

/// Work that the dispatcher did not see ran between two times of CLOCK_MONOTONIC.
///
/// # Safety
/// `name` is a NUL-terminated text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_opaque(name: *const c_char, began_ns: u64, ended_ns: u64) {
    guarded(|| {
        // SAFETY: the caller's promise.
        let name = unsafe { owned(name) };
        Capture::get().opaque(&name, began_ns, ended_ns);
    });
}

/// The number of a text, for `optape_hook_function_begin`.
///
/// # Safety
/// `text` is a NUL-terminated text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_text(text: *const c_char) -> u32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        let text = unsafe { owned(text) };
        Capture::get().text(&text).0
    })
}

/// What the hook has to know of an op under the settings of now, for `optape_hook_replan`.
#[unsafe(no_mangle)]
pub extern "C" fn optape_plan_flags(op: u32) -> u32 {
    guarded(|| Capture::get().plan_flags(op))
}

/// Pauses recording.
#[unsafe(no_mangle)]
pub extern "C" fn optape_pause() {
    guarded(|| Capture::get().set_recording(false));
}

/// Resumes recording.
#[unsafe(no_mangle)]
pub extern "C" fn optape_resume() {
    guarded(|| Capture::get().set_recording(true));
}

/// Says goodbye: the stream ends cleanly.
#[unsafe(no_mangle)]
pub extern "C" fn optape_stop() {
    guarded(|| Capture::get().stop());
}

/// States a fact. `module`: -1 for the program itself. `value` is JSON text.
///
/// # Safety
/// Both texts are NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn optape_fact(module: i64, key: *const c_char, value: *const c_char) {
    guarded(|| {
        // SAFETY: the caller's promise.
        let (key, value) = unsafe { (owned(key), owned(value)) };
        Capture::get().fact(u32::try_from(module).ok().map(ModuleId), &key, &value);
    });
}

/// Whether recording goes on. For tests and the glue's own decisions.
#[unsafe(no_mangle)]
pub extern "C" fn optape_recording() -> i32 {
    i32::from(
        CAPTURE.recording.load(Ordering::Relaxed) & (super::RECORDING | super::HOOK_ONLY) != 0,
    )
}
