//! Where a trace comes from: the run, its streams, how they ended.

use std::collections::BTreeMap;

use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
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

/// Whose records a stream holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// A recorded process's: its op calls, and what happened between them.
    #[default]
    Process,
    /// The recorder's own, about the machine: samples of its monitors ([`crate::Event::Sample`]) and facts about their sources.
    Monitor,
    /// One that a later version has added. It holds no recorded process.
    Other(u32),
}

impl Role {
    const fn number(self) -> u32 {
        match self {
            Self::Process => 0,
            Self::Monitor => 1,
            Self::Other(number) => number,
        }
    }

    const fn of(number: u32) -> Self {
        match number {
            0 => Self::Process,
            1 => Self::Monitor,
            number => Self::Other(number),
        }
    }
}

/// A stream: a recorded process, or the recorder's monitors.
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// Whose records these are.
    pub role: Role,
    /// Zero of the stream's clock, nanoseconds of the machine's monotonic clock: what streams of one boot are aligned by,
    /// since nobody sets it. Files from before it was added have none.
    pub epoch_monotonic_ns: Option<u64>,
}

/// Keys of [`RunInfo::facts`] that readers rely on.
pub mod facts {
    /// Names the boot of the machine, whose monotonic clock all streams of the file count by.
    pub const BOOT_ID: &str = "host.boot_id";
    /// How far the wall clock may have been from true time when the recording began, in nanoseconds, as the system that
    /// keeps it right said; absent where nothing does.
    pub const CLOCK_ERROR: &str = "clock.max_error_ns";
}

// By hand, since what stands at the end may be missing: the first files of the format have neither a role nor a monotonic zero, and are read
// all the same.
impl Encode for StreamInfo {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.process_id.encode(encoder)?;
        self.parent_process_id.encode(encoder)?;
        self.command.encode(encoder)?;
        self.versions.encode(encoder)?;
        self.epoch_unix_ns.encode(encoder)?;
        self.identities.encode(encoder)?;
        self.rank.encode(encoder)?;
        match (self.role, self.epoch_monotonic_ns) {
            (Role::Process, None) => Ok(()),
            (role, None) => role.number().encode(encoder),
            (role, Some(epoch)) => {
                role.number().encode(encoder)?;
                epoch.encode(encoder)
            }
        }
    }
}

impl<C> Decode<C> for StreamInfo {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Ok(Self {
            process_id: Decode::decode(decoder)?,
            parent_process_id: Decode::decode(decoder)?,
            command: Decode::decode(decoder)?,
            versions: Decode::decode(decoder)?,
            epoch_unix_ns: Decode::decode(decoder)?,
            identities: Decode::decode(decoder)?,
            rank: Decode::decode(decoder)?,
            role: at_the_end(decoder)?.map_or(Role::Process, Role::of),
            epoch_monotonic_ns: at_the_end(decoder)?,
        })
    }
}

/// A field that may be missing, with all behind it.
fn at_the_end<C, D: Decoder<Context = C>, T: Decode<C>>(
    decoder: &mut D,
) -> Result<Option<T>, DecodeError> {
    match T::decode(decoder) {
        Ok(value) => Ok(Some(value)),
        Err(DecodeError::UnexpectedEnd { .. }) => Ok(None),
        Err(error) => Err(error),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    #[test]
    fn what_stands_at_the_end_of_a_stream_may_be_missing() {
        let process = StreamInfo {
            process_id: 7,
            rank: Some(3),
            ..StreamInfo::default()
        };
        let bytes = codec::encode(&process).unwrap();
        assert_eq!(
            codec::decode(&bytes).unwrap(),
            (process.clone(), bytes.len())
        );
        let with_clock = StreamInfo {
            epoch_monotonic_ns: Some(0),
            ..process.clone()
        };
        let longer = codec::encode(&with_clock).unwrap();
        assert_eq!(longer, [bytes.as_slice(), &[0, 0]].concat());
        assert_eq!(codec::decode::<StreamInfo>(&longer).unwrap().0, with_clock);
        for (number, role) in [(1, Role::Monitor), (9, Role::Other(9))] {
            let other = StreamInfo {
                role,
                ..process.clone()
            };
            let with_role = codec::encode(&other).unwrap();
            assert_eq!(with_role, [bytes.as_slice(), &[number]].concat());
            assert_eq!(codec::decode::<StreamInfo>(&with_role).unwrap().0, other);
            let with_clock = StreamInfo {
                epoch_monotonic_ns: Some(200),
                ..other
            };
            let longer = codec::encode(&with_clock).unwrap();
            assert_eq!(longer, [with_role.as_slice(), &[200]].concat());
            assert_eq!(codec::decode::<StreamInfo>(&longer).unwrap().0, with_clock);
        }
    }
}
