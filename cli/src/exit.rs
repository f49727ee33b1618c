//! Exit codes, and which error means which.

use std::fmt;
use std::io;

use optape_replay::ReplayError;
use optape_trace::TraceError;

/// A budget or a comparison was violated.
pub const VIOLATED: u8 = 1;
/// The command line asks for something that does not exist or cannot be.
pub const USAGE: u8 = 2;
/// Ops without a rule under `--strict`.
pub const INCOMPLETE: u8 = 3;
/// The trace does not hold a level that was asked for.
pub const MISSING_LEVEL: u8 = 4;
/// The file is no trace, damaged, or of a version that is not read.
pub const CORRUPT: u8 = 5;

/// A message with an exit code of its own.
#[derive(Debug)]
pub struct Failure {
    /// The process's exit code.
    pub code: u8,
    /// What to tell the user.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// The user's mistake: exit code 2.
    #[must_use]
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            code: USAGE,
            message: message.into(),
        }
    }
}

/// The error with its causes, each said once: libraries put the cause into their own text, too.
#[must_use]
pub fn text(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut text, cause| {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        text
    })
}

/// The exit code of an error: that of the first in its chain that has one, else 2.
#[must_use]
pub fn code_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return failure.code;
        }
        if let Some(error) = cause.downcast_ref::<ReplayError>() {
            return match error {
                ReplayError::MissingLevel { .. } | ReplayError::Refused { .. } => MISSING_LEVEL,
                ReplayError::Trace { source, .. } => code_of_trace(source),
                _ => USAGE,
            };
        }
        if let Some(error) = cause.downcast_ref::<TraceError>() {
            return code_of_trace(error);
        }
    }
    USAGE
}

/// A file that is not there, or may not be read, is the command line's fault and not the file's.
const fn code_of_trace(error: &TraceError) -> u8 {
    match error {
        TraceError::Io { .. } | TraceError::Sink { .. } | TraceError::SinkFailed => USAGE,
        _ => CORRUPT,
    }
}

/// Whether the reader of our output went away, which is no error of ours.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}
