//! The optape trace: one compressed event for every op that PyTorch's dispatcher ran.
//!
//! This crate is the format and nothing else: the record model, what is interned, the writer, the reader,
//! recovery of unfinished and damaged files, and the table of needs that recorder and replay share. The bytes
//! are specified in `FORMAT.md` beside this crate; a second reader could be written from it.

#![forbid(unsafe_code)]
// Files are read that nobody vouches for.
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::cast_possible_truncation))]

mod block;
mod bytes;
pub mod codec;
mod column;
mod dictionary;
pub mod dump;
mod error;
mod frame;
#[cfg(test)]
mod fuzzing;
mod ids;
mod index;
mod info;
mod moments;
pub mod needs;
mod reader;
mod record;
mod recovery;
mod source;
mod statistics;
mod summary;
mod table;
mod verification;
mod writer;

pub use block::{Block, Columns, OpCallRef, Slot};

pub use dictionary::{
    Argument, ArgumentDef, DType, Definition, Device, ModuleDef, OpDef, ReturnDef, ScopeDef, SignatureDef, Stage,
    TensorMeta, ThreadDef, WatchDef, call_flags, tensor_flags,
};
pub use error::TraceError;
pub use ids::{
    CallId, ModuleId, OpId, Ordinal, PatternId, ScopeId, SignatureId, StorageId, StreamId, TensorId, TextId, ThreadId,
    WatchId,
};
pub use index::{BlockIndex, SummaryIndex};
pub use info::{RunEnd, RunInfo, StreamEnd, StreamInfo};
pub use reader::{Stream, Trace, TraceEnd};
pub use record::{DropReason, Event, LateStatistic, Moment, OpCall, Record, StepSource};
pub use recovery::{Finding, Loss, Recovery, recover, recover_bytes};
pub use statistics::{NotTaken, Operand, Pattern, PatternEntry, State, When, fields};
pub use summary::SummaryRow;
pub use table::Dictionary;
pub use verification::{Verification, verify, verify_bytes};
pub use writer::TraceWriter;
