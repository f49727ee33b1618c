//! The optape trace: one compressed event for every op that PyTorch's dispatcher ran.
//!
//! This crate is the format and nothing else: the record model, what is interned, the writer, the reader,
//! recovery of unfinished and damaged files, and what recorder and replay share as data: the table of needs, and the names of
//! monitors' series. The bytes
//! are specified in `FORMAT.md` beside this crate; a second reader could be written from it.
//!
//! A [`TraceWriter`] appends to any sink. It fills blocks of columns, sums them up, and can be asked at any time to write what it
//! has. A [`Trace`] reads files that are finished, growing, truncated or damaged, as far as they are whole, and says which of these
//! they are. It decodes only the columns that are asked for, and answers sums over any range of records from stored
//! [summaries](SummaryRow).
//!
//! ```
//! use optape_trace::{
//!     Columns, Definition, OpCallRef, OpDef, OpId, PatternId, RunEnd, RunInfo, ScopeId, SignatureDef, SignatureId, Stage, StreamEnd,
//!     StreamInfo, ThreadDef, ThreadId, Trace, TraceWriter,
//! };
//!
//! # fn main() -> Result<(), optape_trace::TraceError> {
//! let mut writer = TraceWriter::create(Vec::new(), &RunInfo::default())?;
//! let stream = writer.begin_stream(&StreamInfo::default())?;
//! writer.define(stream, &Definition::Thread(ThreadId(0), ThreadDef::default()))?;
//! writer.define(stream, &Definition::Op(OpId(0), OpDef { name: "aten::mm".into(), ..OpDef::default() }))?;
//! let structure = SignatureDef {
//!     op: OpId(0),
//!     arguments: vec![],
//!     outputs: vec![],
//!     tensors: vec![],
//!     inputs: 0,
//!     flags: 0,
//!     scope: ScopeId::GLOBAL,
//!     stage: Stage::Forward,
//!     stage_name: None,
//! };
//! writer.define(stream, &Definition::Signature(SignatureId(0), structure))?;
//! for step in 0..1000 {
//!     writer.op_call(stream, OpCallRef {
//!         signature: SignatureId(0),
//!         pattern: PatternId(0),
//!         thread: ThreadId(0),
//!         start_ns: 5000 * step,
//!         duration_ns: 4210,
//!         sequence_number: -1,
//!         payload: &[],
//!         storages: &[],
//!         tensors: &[],
//!         statistics: &[],
//!     })?;
//! }
//! writer.end_stream(stream, &StreamEnd { clean: true, ..StreamEnd::default() })?;
//! let bytes = writer.finish(&RunEnd::default())?;
//!
//! let trace = Trace::from_bytes(bytes)?;
//! let rows = trace.summary(stream, 0..1000)?;
//! assert_eq!((rows[0].calls, rows[0].duration_ns), (1000, 4_210_000));
//! let block = trace.block(stream, 0, Columns::START)?;
//! assert_eq!(block.start_ns[999], 5000 * 999);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
// Files are read that nobody vouches for.
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::cast_possible_truncation)
)]

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
pub mod series;
mod source;
mod statistics;
mod summary;
mod table;
mod values;
mod verification;
mod writer;

pub use block::{Block, Columns, OpCallRef, Slot};

pub use dictionary::{
    Argument, ArgumentDef, DType, Definition, Device, FUNCTION_NAMESPACE, ModuleDef, OpDef,
    ReturnDef, ScopeDef, SignatureDef, Stage, TensorMeta, ThreadDef, WatchDef, call_flags,
    tensor_flags,
};
pub use error::TraceError;
pub use ids::{
    CallId, ModuleId, OpId, Ordinal, PatternId, ScopeId, SignatureId, StorageId, StreamId,
    TensorId, TextId, ThreadId, WatchId,
};
pub use index::{BlockIndex, SummaryIndex};
pub use info::{Role, RunEnd, RunInfo, StreamEnd, StreamInfo, facts};
pub use reader::{Stream, Trace, TraceEnd};
pub use record::{
    DropReason, Event, LateStatistic, Moment, OpCall, PauseReason, Record, StepSource,
};
pub use recovery::{Continuation, Finding, Loss, Recovery, recover, recover_bytes, recover_with};
pub use statistics::{
    CHANNELS_PER_BLOCK, CROSSBARS, NotTaken, Operand, Pattern, PatternEntry, State, When, fields,
};
pub use summary::SummaryRow;
pub use table::Dictionary;
pub use values::{Elements, VALUE_LIMIT, Value, ValuesIndex, pack_bits};
pub use verification::{Verification, verify, verify_bytes};
pub use writer::TraceWriter;
