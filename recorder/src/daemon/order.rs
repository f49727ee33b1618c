//! What the drain loop is told while it runs.

use crossbeam::channel::Sender;
use serde::{Deserialize, Serialize};

use super::intake::Finish;
use super::sink::SinkState;

/// An order, and where the answer goes.
pub(super) enum Order {
    /// End, when the recorded processes have ended or the grace is over.
    Finish(Finish),
    /// Pause or resume all processes, or one; answers how many were told.
    Pause {
        on: bool,
        process: Option<u32>,
        reply: Sender<Result<usize, String>>,
    },
    /// Put a mark into every open stream; answers how many got it.
    Mark {
        text: String,
        reply: Sender<Result<usize, String>>,
    },
    /// Write what there is.
    Flush(Sender<Result<Flushing, String>>),
    /// End now, though the processes go on; answers what was recorded.
    Stop(Sender<Vec<String>>),
    /// How the streams stand.
    Status(Sender<Vec<StreamStatus>>),
}

/// A flush that is under way: done when the sink has taken so many bytes.
pub(super) struct Flushing {
    pub(super) bytes: u64,
    pub(super) sink: SinkState,
}

/// A recorded process, as it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamStatus {
    /// Its id.
    pub process_id: u32,
    /// Its command line.
    pub command: Vec<String>,
    /// Op calls that arrived.
    pub op_calls: u64,
    /// Records that were lost.
    pub dropped_records: u64,
    /// Why nothing is recorded now: bits [`crate::ring::PAUSED_BY_COMMAND`] and [`crate::ring::PAUSED_BY_SCHEDULE`].
    pub paused: u64,
    /// Steps that ended: of the optimizer, root-module calls, those that the program marked, root-module calls that did not train.
    pub steps: [u64; 4],
    /// It has followed the last command.
    pub obeys: bool,
    /// Its stream has ended.
    pub ended: bool,
}
