//! What can go wrong with a trace.

use std::path::PathBuf;

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
}
