//! The optape trace: one compressed event for every op that PyTorch's dispatcher ran.
//!
//! This crate is the format and nothing else: the record model, what is interned, the writer, the reader,
//! recovery of unfinished and damaged files, and the table of needs that recorder and replay share. The bytes
//! are specified in `FORMAT.md` beside this crate; a second reader could be written from it.

pub mod codec;
mod dictionary;
mod error;
mod ids;
mod info;
pub mod needs;
mod record;
mod statistics;

pub use dictionary::{
    Argument, ArgumentDef, DType, Definition, Device, ModuleDef, OpDef, ReturnDef, ScopeDef, SignatureDef, Stage,
    TensorMeta, ThreadDef, WatchDef, call_flags, tensor_flags,
};
pub use error::TraceError;
pub use ids::{
    CallId, ModuleId, OpId, Ordinal, PatternId, ScopeId, SignatureId, StorageId, StreamId, TensorId, TextId, ThreadId,
    WatchId,
};
pub use info::{RunEnd, RunInfo, StreamEnd, StreamInfo};
pub use record::{DropReason, Event, LateStatistic, Moment, OpCall, Record, StepSource};
pub use statistics::{NotTaken, Operand, Pattern, PatternEntry, State, When, fields};
