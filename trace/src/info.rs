//! Where a trace comes from: the run, its streams, how they ended.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};

/// The run: written once at the head of the file.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct RunInfo {
    /// All files of one run share it.
    pub run_uuid: [u8; 16],
    /// Version of optape that recorded.
    pub optape_version: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Working directory.
    pub working_directory: String,
    /// Host name.
    pub host: String,
    /// Start of the recording, nanoseconds since the Unix epoch.
    pub started_unix_ns: u64,
    /// `none`, `rules` or `all`.
    pub statistics: String,
    /// Version of the needs table that capture used.
    pub needs_version: u32,
    /// Anything else: capture settings, git commit, environment variables that matter. Keys are `dotted.names`.
    pub facts: BTreeMap<String, String>,
}

/// One recorded process.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct StreamInfo {
    /// Process id.
    pub process_id: u32,
    /// Its parent.
    pub parent_process_id: u32,
    /// `python train.py`.
    pub command: Vec<String>,
    /// `torch 2.13.0+cu130`, `python 3.11.7`: name and version.
    pub versions: BTreeMap<String, String>,
    /// Zero of the stream's clock, nanoseconds since the Unix epoch.
    pub epoch_unix_ns: u64,
    /// The stream holds identities (T6).
    pub identities: bool,
    /// Rank, where there is one.
    pub rank: Option<u32>,
}

/// How a stream ended.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct StreamEnd {
    /// Records written, lost ones left out.
    pub records: u64,
    /// Records lost, all reasons.
    pub dropped_records: u64,
    /// When, nanoseconds since the stream's start.
    pub ended_ns: u64,
    /// The process said goodbye; else it was killed or forked away.
    pub clean: bool,
    /// Own cost: see `docs/overhead.md`. Keys like `capture.time_ns`.
    pub costs: BTreeMap<String, u64>,
}

/// How the run ended: written last.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct RunEnd {
    /// End of the recording, nanoseconds since the Unix epoch.
    pub ended_unix_ns: u64,
    /// The command's exit code, where it exited.
    pub exit_code: Option<i32>,
    /// The signal that ended it, where one did.
    pub signal: Option<i32>,
    /// The daemon's own processor time.
    pub daemon_cpu_ns: u64,
    /// The daemon's peak resident memory.
    pub daemon_peak_bytes: u64,
}
