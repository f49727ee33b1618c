//! The ABI between hook and capture, as `hook/optape_hook.h` states it. Both carry the same version and refuse each other where
//! it differs.

use std::ffi::{c_char, c_void};

/// `OPTAPE_ABI_VERSION`.
pub const ABI_VERSION: u32 = 3;

/// Bits of [`Tensor::flags`] that are not structure.
pub mod tensor_state {
    /// The storage's memory is torch's own and its death will be reported.
    pub const OWNED: u32 = 1 << 16;
    /// Owned since this very call.
    pub const ADOPTED: u32 = 1 << 17;
    /// Owned, and nobody outside torch holds its memory.
    pub const CACHEABLE: u32 = 1 << 18;
}

/// Tags of structure words.
pub mod word {
    #![allow(missing_docs, reason = "one line each in hook/optape_hook.h")]
    pub const NONE: u8 = 1;
    pub const TENSOR: u8 = 2;
    pub const TENSOR_LIST: u8 = 3;
    pub const INT: u8 = 4;
    pub const INT_PAYLOAD: u8 = 5;
    pub const INT_LIST: u8 = 6;
    pub const FLOAT: u8 = 7;
    pub const FLOAT_PAYLOAD: u8 = 8;
    pub const FLOAT_LIST: u8 = 9;
    pub const COMPLEX_PAYLOAD: u8 = 10;
    pub const BOOL: u8 = 11;
    pub const BOOL_LIST: u8 = 12;
    pub const TEXT: u8 = 13;
    pub const TEXT_PAYLOAD: u8 = 14;
    pub const DTYPE: u8 = 15;
    pub const DEVICE: u8 = 16;
    pub const ENUMERATOR: u8 = 17;
    pub const OPAQUE: u8 = 18;
}

/// Bits of [`Plan::flags`].
pub mod plan {
    /// Call `begin`.
    pub const BEGIN: u32 = 1 << 0;
    /// Adopt the storages of all its tensors.
    pub const IDENTITIES: u32 = 1 << 1;
    /// Its texts vary.
    pub const TEXT_PAYLOAD: u32 = 1 << 2;
}

/// No autograd node is running.
pub const NO_NODE: u64 = u64::MAX;

/// `optape_tensor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// `TensorImpl*`.
    pub implementation: *const c_void,
    /// `StorageImpl*`, or null.
    pub storage: *const c_void,
    /// First byte of the storage, or null.
    pub storage_base: *const c_void,
    /// First element, or null where values cannot be read.
    pub data: *const u8,
    /// `dim` sizes.
    pub sizes: *const i64,
    /// `dim` strides in elements, or null.
    pub strides: *const i64,
    /// Size of the storage.
    pub storage_bytes: u64,
    /// Address of the first element in a CUDA device's memory, or 0.
    pub device_data: u64,
    /// Version counter, `u32::MAX` where there is none.
    pub version: u32,
    /// `tensor_flags` in the low 16 bits, [`tensor_state`] above.
    pub flags: u32,
    /// `c10::ScalarType`.
    pub dtype: i8,
    /// `c10::DeviceType`.
    pub device_kind: u8,
    /// Device index.
    pub device_index: i8,
    /// Dimensions.
    pub dim: u8,
    /// Index of the schema argument, or of the return value.
    pub argument: u32,
}

/// `optape_call`.
#[repr(C)]
#[derive(Debug)]
pub struct Call {
    /// Index from `define_op`.
    pub op: u32,
    /// `call_flags`.
    pub flags: u32,
    /// Structure words.
    pub words: *const u64,
    /// Their number.
    pub word_count: u32,
    /// How many belong to the arguments.
    pub argument_words: u32,
    /// Payload words.
    pub payload: *const u64,
    /// Their number.
    pub payload_count: u32,
    /// Number of tensors.
    pub tensor_count: u32,
    /// The tensors: of the arguments, then of the outputs.
    pub tensors: *const Tensor,
    /// How many belong to the arguments.
    pub input_count: u32,
    /// 1 inside an autograd graph task.
    pub graph_task: u32,
    /// Next sequence number of this thread.
    pub peek: u64,
    /// The running node's sequence number, or [`NO_NODE`].
    pub node: u64,
    /// The thread that made that node.
    pub node_thread: u64,
    /// `TensorImpl*` of the variable, where the node is AccumulateGrad.
    pub accumulate: *const c_void,
    /// torch's id of this thread.
    pub thread: u64,
    /// CLOCK_MONOTONIC before the kernel.
    pub start_ns: u64,
    /// CLOCK_MONOTONIC behind it.
    pub end_ns: u64,
    /// Capture's own, from begin to end.
    pub capture: [u64; 48],
}

/// `optape_argument`.
#[repr(C)]
#[derive(Debug)]
pub struct OperatorArgument {
    /// Name.
    pub name: *const c_char,
    /// Type as the schema prints it.
    pub type_name: *const c_char,
    /// Default as the schema prints it, or null.
    pub default_value: *const c_char,
    /// Alias set letters.
    pub alias: *const c_char,
    /// Behind the `*`.
    pub keyword_only: u8,
    /// Written by the op.
    pub written: u8,
    /// Zero.
    pub reserved: [u8; 6],
}

/// `optape_operator`.
#[repr(C)]
#[derive(Debug)]
pub struct Operator {
    /// `aten::add`.
    pub name: *const c_char,
    /// `Tensor`.
    pub overload: *const c_char,
    /// Arguments.
    pub arguments: *const OperatorArgument,
    /// Their number.
    pub argument_count: u32,
    /// Number of returns.
    pub return_count: u32,
    /// Returns.
    pub returns: *const OperatorArgument,
}

/// `optape_plan`.
#[repr(C)]
#[derive(Debug)]
pub struct Plan {
    /// Index of the operator.
    pub op: u32,
    /// Bits of [`plan`].
    pub flags: u32,
    /// One per argument: 1 where an int is payload.
    pub wild: *const u8,
}

/// `optape_capture`.
#[repr(C)]
#[derive(Debug)]
pub struct CaptureTable {
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// Zero.
    pub reserved: u32,
    /// Bits 0 and 1: ops are recorded; bit 2: paused (see [`CaptureTable::idle`]); 0: they pass through untouched.
    pub recording: *const u32,
    /// Tells an operator.
    pub define_op: unsafe extern "C" fn(*const Operator, *mut Plan) -> i32,
    /// Interns a text.
    pub text: unsafe extern "C" fn(*const c_char, usize) -> u32,
    /// Before the kernel.
    pub begin: unsafe extern "C" fn(*mut Call),
    /// After the kernel.
    pub end: unsafe extern "C" fn(*mut Call),
    /// The kernel threw.
    pub abort: unsafe extern "C" fn(*mut Call),
    /// A storage dies.
    pub storage_freed: unsafe extern "C" fn(*const c_void),
    /// A module's forward begins.
    pub module_enter: unsafe extern "C" fn(u64, u32, u32, u32, u32, *const Tensor, u32),
    /// A module's forward ends.
    pub module_exit: unsafe extern "C" fn(u64, u32, *const Tensor, u32),
    /// A state attribute holds a tensor, or none.
    pub state: unsafe extern "C" fn(u64, u32, u32, *const Tensor),
    /// The ids of a tensor's storage and of the tensor.
    pub identify: unsafe extern "C" fn(*const Tensor, *mut u64),
    /// A watched value.
    pub watch: unsafe extern "C" fn(*mut Call),
    /// The hook gives up.
    pub failed: unsafe extern "C" fn(*const c_char),
    /// While paused: an op passes on this thread (torch's id).
    pub idle: unsafe extern "C" fn(u64),
}

// SAFETY: the table is immutable; its pointers lead to functions and to a process-lifetime atomic.
unsafe impl Sync for CaptureTable {}
// SAFETY: as above.
unsafe impl Send for CaptureTable {}
