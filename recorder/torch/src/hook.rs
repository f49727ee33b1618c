//! The hook library, linked into this program: all of this crate that crosses into C++.

use std::ffi::{CStr, c_char, c_void};

use optape_recorder::abi::{ABI_VERSION, CaptureTable};

unsafe extern "C" {
    fn optape_hook_abi_version() -> u32;
    fn optape_hook_install(
        capture: *const CaptureTable,
        error: *mut c_char,
        error_size: usize,
    ) -> i32;
    fn optape_hook_key() -> *const c_char;
    fn optape_hook_torch_version() -> *const c_char;
    fn optape_hook_thread(on: i32) -> i32;
    fn optape_hook_module_enter(module: u32, training: i32);
    fn optape_hook_module_exit(module: u32);
    fn optape_hook_watch(tensor: *const c_void, id: i64);
}

/// Registers the hook with libtorch.
pub(crate) fn install(table: &'static CaptureTable) -> Result<(), String> {
    // SAFETY: no preconditions.
    let version = unsafe { optape_hook_abi_version() };
    if version != ABI_VERSION {
        return Err(format!(
            "the hook speaks ABI version {version}, this crate {ABI_VERSION}: build both from one source"
        ));
    }
    let mut error: [c_char; 1024] = [0; 1024];
    // SAFETY: the table lives forever; `error` is writable for its length.
    if unsafe { optape_hook_install(table, error.as_mut_ptr(), error.len()) } == 0 {
        return Ok(());
    }
    error[error.len() - 1] = 0;
    // SAFETY: NUL-terminated by the line above at the latest.
    Err(unsafe { CStr::from_ptr(error.as_ptr()) }
        .to_string_lossy()
        .into_owned())
}

/// The dispatch key in use, and torch's version.
pub(crate) fn versions() -> (String, String) {
    // SAFETY: both give texts that live as long as the library.
    unsafe {
        (
            CStr::from_ptr(optape_hook_key())
                .to_string_lossy()
                .into_owned(),
            CStr::from_ptr(optape_hook_torch_version())
                .to_string_lossy()
                .into_owned(),
        )
    }
}

/// Switches the hook on or off on this thread; gives what it was.
pub(crate) fn thread(on: bool) -> bool {
    // SAFETY: no preconditions.
    unsafe { optape_hook_thread(i32::from(on)) != 0 }
}

/// A module's forward begins on this thread.
pub(crate) fn module_enter(module: u32, training: bool) {
    // SAFETY: no preconditions: an unknown module is an unnamed scope.
    unsafe { optape_hook_module_enter(module, i32::from(training)) }
}

/// A module's forward ends on this thread.
pub(crate) fn module_exit(module: u32) {
    // SAFETY: as `module_enter`.
    unsafe { optape_hook_module_exit(module) }
}

/// Looks at a tensor's values.
pub(crate) fn watch(tensor: &tch::Tensor, id: u32) {
    // SAFETY: tch's `C_tensor` is an `at::Tensor` on the heap, which holds one pointer, its TensorImpl; the tensor lives for as
    // long as the borrow, and the hook does not keep it.
    unsafe {
        let implementation = tensor.as_ptr().cast::<*const c_void>().read();
        optape_hook_watch(implementation, i64::from(id));
    }
}
