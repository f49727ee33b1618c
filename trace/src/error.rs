//! What can go wrong with a trace.

use std::borrow::Cow;
use std::path::PathBuf;

use crate::ids::StreamId;

/// An error of this crate. Offsets are byte offsets in the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// A metadata record could not be encoded.
    #[error("cannot encode a metadata record: {0}")]
    Encode(String),
    /// Bytes are not a metadata record.
    #[error("cannot decode a metadata record: {0}")]
    Decode(String),
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The sink of a writer failed.
    #[error("cannot write the trace after {written} bytes: {source}")]
    Sink {
        /// Bytes that went out whole before.
        written: u64,
        /// The cause.
        source: std::io::Error,
    },
    /// The writer was used after its sink had failed.
    #[error("the trace cannot be continued: its sink failed earlier")]
    SinkFailed,
    /// The writer was given something that a trace cannot hold.
    #[error("stream {stream}: {what}")]
    Refused {
        /// The stream.
        stream: StreamId,
        /// What is wrong with it.
        what: String,
    },
    /// The file does not begin like a trace.
    #[error("not an optape trace: it begins with {found}, a trace begins with \"\\x89OPTAPE\\n\"")]
    NotATrace {
        /// The first bytes, printable.
        found: String,
    },
    /// The file ends before its run information does.
    #[error(
        "the trace is too short: {file_bytes} bytes, and the information about the run is not whole yet; nothing can be read from it"
    )]
    TooShort {
        /// Its length.
        file_bytes: u64,
    },
    /// A newer optape wrote it.
    #[error(
        "the trace has format version {found_major}.{found_minor}, this optape reads up to {supported_major}.x; use a newer optape"
    )]
    VersionTooNew {
        /// The file's major version.
        found_major: u16,
        /// The file's minor version.
        found_minor: u16,
        /// The newest major version that this crate reads.
        supported_major: u16,
    },
    /// An older optape wrote it than this crate can read.
    #[error(
        "the trace has format version {found_major}.{found_minor}, this optape reads from {oldest_major}.0 on; use an older optape"
    )]
    VersionTooOld {
        /// The file's major version.
        found_major: u16,
        /// The file's minor version.
        found_minor: u16,
        /// The oldest major version that this crate reads.
        oldest_major: u16,
    },
    /// Bytes are not what the format says.
    #[error("damaged at byte {offset}: {what}; `optape recover` saves what is whole")]
    Damaged {
        /// Where the damaged frame begins.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
    /// The file became shorter while it was read.
    #[error(
        "the file was cut while it was read: byte {offset} is gone, the file has {file_bytes} bytes now"
    )]
    Cut {
        /// First byte that was asked for.
        offset: u64,
        /// The file's length now.
        file_bytes: u64,
    },
    /// There is no such stream.
    #[error("the trace has no stream {0}")]
    NoSuchStream(StreamId),
    /// There is no such block.
    #[error("stream {stream} has no block {block}: it has {blocks}")]
    NoSuchBlock {
        /// The stream.
        stream: StreamId,
        /// The block asked for.
        block: usize,
        /// How many there are.
        blocks: usize,
    },
}

/// What is wrong with some bytes, before anybody knows where in the file they stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Corrupt(pub(crate) Cow<'static, str>);

impl Corrupt {
    pub(crate) fn at(self, offset: u64) -> TraceError {
        TraceError::Damaged {
            offset,
            what: self.0.into_owned(),
        }
    }
}

impl From<&'static str> for Corrupt {
    fn from(what: &'static str) -> Self {
        Self(Cow::Borrowed(what))
    }
}

impl From<String> for Corrupt {
    fn from(what: String) -> Self {
        Self(Cow::Owned(what))
    }
}

impl From<TraceError> for Corrupt {
    fn from(error: TraceError) -> Self {
        Self(Cow::Owned(error.to_string()))
    }
}
