//! The records of a stream.
//!
//! A stream is one totally ordered list of records; a record's [`Ordinal`](crate::Ordinal) is its place in that list. The kinds and
//! their tags are fixed here and in FORMAT.md, also those that only later versions write.

use bincode::{Decode, Encode};

use crate::ids::{
    CallId, ModuleId, Ordinal, PatternId, SignatureId, StorageId, TensorId, TextId, ThreadId,
};
use crate::statistics::{Operand, When};

/// One record.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Record {
    /// An op ran. Also carries watched values: calls of `optape::watch`.
    OpCall(OpCall),
    /// Any other kind.
    Other(Moment),
}

/// One execution of an op. Times are nanoseconds since the stream's start ([`crate::StreamInfo`]).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpCall {
    /// Its structure.
    pub signature: SignatureId,
    /// Which statistics it carries; `PatternId(0)` is the empty pattern.
    pub pattern: PatternId,
    /// The thread that ran it.
    pub thread: ThreadId,
    /// When the kernel was entered.
    pub start_ns: u64,
    /// Time in the kernel, nested ops included, capture's own time left out.
    pub duration_ns: u64,
    /// Forward: the autograd sequence number that the next node gets. Backward: the running node's own. -1: none.
    pub sequence_number: i64,
    /// What varies of the arguments (see [`crate::Argument`]).
    pub payload: Vec<u64>,
    /// One per tensor of the signature, or empty where identities are not recorded (T6).
    pub storages: Vec<StorageId>,
    /// One per tensor of the signature, or empty where identities are not recorded (T6).
    pub tensors: Vec<TensorId>,
    /// The pattern's numbers (see [`crate::Pattern`]).
    pub statistics: Vec<u64>,
}

/// A record that is not an op call: when and where, and what happened.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Moment {
    /// Nanoseconds since the stream's start.
    pub time_ns: u64,
    /// The thread.
    pub thread: ThreadId,
    /// What happened.
    pub event: Event,
}

/// What a [`Moment`] says. The order of the variants is the tag in the file: append only.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[non_exhaustive]
pub enum Event {
    /// Tag 0. A module's forward begins.
    ModuleEnter {
        /// This call.
        call: CallId,
        /// The module.
        module: ModuleId,
        /// Its tensor arguments, where recorded.
        arguments: Vec<TensorId>,
    },
    /// Tag 1. A module's forward has ended.
    ModuleExit {
        /// The call that ends.
        call: CallId,
        /// The module.
        module: ModuleId,
        /// Its tensor results, where recorded.
        results: Vec<TensorId>,
    },
    /// Tag 2. A neuron's state attribute got a tensor.
    StateAssign {
        /// The neuron.
        module: ModuleId,
        /// The attribute.
        attribute: TextId,
        /// What it got.
        tensor: TensorId,
    },
    /// Tag 3. A named range begins (`record_function`, `optape.range`).
    RangeEnter {
        /// Its name.
        name: TextId,
    },
    /// Tag 4. The innermost open range of that name on the thread ends.
    RangeExit {
        /// Its name.
        name: TextId,
    },
    /// Tag 5. The program named a stage, or took the name back.
    StageChange {
        /// The name; `None` ends it.
        name: Option<TextId>,
    },
    /// Tag 6. A step ends: everything since the last mark belongs to it.
    StepMark {
        /// Counted from 0.
        step: u64,
        /// What ended it.
        source: StepSource,
    },
    /// Tag 7. Statistics that arrive after their call.
    Statistics {
        /// The call.
        call: Ordinal,
        /// Each operand's numbers.
        values: Vec<LateStatistic>,
    },
    /// Tag 8. A storage came into being, or an op has it as an argument and it was not known before. Stands before that op's call.
    /// At `--level full`.
    StorageBorn {
        /// Its id.
        storage: StorageId,
        /// Its size.
        bytes: u64,
    },
    /// Tag 9. A storage was freed. Exact for memory of torch's CPU allocator; else known when another has taken its place.
    StorageDied {
        /// Its id.
        storage: StorageId,
    },
    /// Tag 10. A tensor object is gone although its storage is alive: another has its address, or it got another storage. With its
    /// storage every object is gone.
    TensorDied {
        /// Its id.
        tensor: TensorId,
    },
    /// Tag 11. Work that the dispatcher does not see: compiled code, a CUDA graph.
    Opaque {
        /// Its name.
        name: TextId,
        /// How long it ran.
        duration_ns: u64,
    },
    /// Tag 12. Records were lost.
    Drop {
        /// How many.
        records: u64,
        /// From when.
        from_ns: u64,
        /// Until when.
        until_ns: u64,
        /// Why.
        reason: DropReason,
    },
    /// Tag 13. A fact about a module, an optimizer or the program.
    Fact {
        /// About whom: a module, or the program itself.
        module: Option<ModuleId>,
        /// Key.
        key: TextId,
        /// Value, as JSON text.
        value: String,
    },
    /// Tag 14. A sample of a monitor.
    Sample {
        /// Which quantity, with its unit: `gpu0/power_mw`.
        series: TextId,
        /// Its value.
        value: f64,
    },
    /// Tag 15. The program counted samples (images) as processed: `step(samples=...)`.
    Samples {
        /// How many.
        count: u64,
    },
    /// Tag 16. The recorder switched itself off.
    Disabled {
        /// Why.
        reason: String,
    },
    /// Tag 17. From here on nothing is recorded, until [`Event::Resumed`] or the end of the stream.
    Paused {
        /// Why.
        reason: PauseReason,
    },
    /// Tag 18. Recording goes on.
    Resumed,
    /// Tag 19. Somebody outside of the program made a mark (`optape ctl mark`).
    Mark {
        /// What it says.
        text: String,
    },
}

/// Why nothing is recorded for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum PauseReason {
    /// The user or the program asked for it.
    Asked,
    /// The step is not among those to record (`--steps`, `--every`).
    Schedule,
    /// It was recorded, but is older than what was to be kept (`--ring`).
    Expired,
}

impl PauseReason {
    /// In words of a report.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Schedule => "schedule",
            Self::Expired => "expired",
        }
    }
}

/// What ended a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum StepSource {
    /// An optimizer step.
    Optimizer,
    /// A call of the root module.
    RootCall,
    /// The program said so.
    Program,
}

/// Why records were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum DropReason {
    /// The ring was full.
    RingFull,
    /// The daemon was gone or stopped.
    DaemonGone,
    /// The file could not be written.
    WriteFailed,
}

/// Statistics of one operand, arriving late.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct LateStatistic {
    /// Whose.
    pub operand: Operand,
    /// When they were taken.
    pub when: When,
    /// All elements 0 or 1; `None` where it was not asked or is lost.
    pub binary: Option<bool>,
    /// Bits of [`crate::fields`].
    pub fields: u32,
    /// The numbers, lowest field first. Empty `fields` with `lost` says that they will never come.
    pub values: Vec<u64>,
    /// They will never come.
    pub lost: bool,
}
