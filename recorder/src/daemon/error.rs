//! What keeps a recording from starting.

use std::io;
use std::path::PathBuf;

use optape_trace::TraceError;

/// Why a recording did not start. Once it has started, nothing of ours ends it: see [`super::Report::failure`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The output file is there already.
    #[error("{} exists; choose another name with --output, or overwrite it with --force", path.display())]
    OutputExists {
        /// The file.
        path: PathBuf,
    },
    /// The output file cannot be made.
    #[error("cannot create {}: {source}{}", path.display(), hint_for_output(path, source))]
    Output {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is no place for the rings.
    #[error(
        "no directory for the rings: {}; one of them must be writable",
        list(tried)
    )]
    NoRunDirectory {
        /// Where it was tried, and why it failed.
        tried: Vec<(PathBuf, io::Error)>,
    },
    /// A file of the run directory cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    RunDirectory {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The memory file system has no room for a ring.
    #[error(
        "cannot reserve a ring of {ring_bytes} bytes in {}: {source}; {free_bytes} bytes are free there, and each recorded process \
         takes one ring. Make it smaller (--ring-size 1M; the least is 64K), or the file system larger (docker run --shm-size=1g)",
        directory.display()
    )]
    MemoryTooSmall {
        /// The file system's directory.
        directory: PathBuf,
        /// What a ring takes.
        ring_bytes: u64,
        /// What there is.
        free_bytes: u64,
        /// The cause.
        source: io::Error,
    },
    /// The library that the recorded process loads is not where it should be.
    #[error(
        "cannot find liboptape_recorder.so, which the recorded process loads; looked at {}. It is installed with optape: \
         put it beside the executable or into ../lib/optape/, or name it in OPTAPE_CAPTURE_LIB",
        looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    CaptureLibraryMissing {
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// There is no such command.
    #[error("command not found: {command}")]
    CommandNotFound {
        /// Its name.
        command: String,
    },
    /// The command is there, but cannot be run.
    #[error("cannot run {command}: {source}")]
    CommandNotExecutable {
        /// Its name.
        command: String,
        /// The cause.
        source: io::Error,
    },
    /// A signal arrived before the command was started.
    #[error("interrupted before the start (signal {signal})")]
    Interrupted {
        /// Its number.
        signal: i32,
    },
    /// The daemon that was asked for is not there.
    #[error(
        "no daemon answers at {}: {source}; start one with `optape daemon`, or name its socket in OPTAPE_SOCKET", path.display()
    )]
    NoDaemon {
        /// Its socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The daemon does not record this.
    #[error("the daemon says: {why}")]
    DaemonRefused {
        /// In its words.
        why: String,
    },
    /// The system refused something else.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The head of the trace could not be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

impl RecordError {
    /// The exit code that `optape record` gives for it: as `env` and `timeout` do.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::CommandNotFound { .. } => 127,
            Self::CommandNotExecutable { .. } => 126,
            Self::Interrupted { signal } => {
                128u8.saturating_add(u8::try_from(*signal).unwrap_or(0))
            }
            _ => 125,
        }
    }
}

fn list(tried: &[(PathBuf, io::Error)]) -> String {
    tried
        .iter()
        .map(|(path, error)| format!("{}: {error}", path.display()))
        .collect::<Vec<_>>()
        .join("; ")
}

fn hint_for_output(path: &std::path::Path, source: &io::Error) -> String {
    let directory = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(std::path::Path::new("."));
    match source.kind() {
        io::ErrorKind::NotFound if !directory.exists() => {
            format!("; there is no directory {}", directory.display())
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a directory that you may write with --output".to_owned()
        }
        _ => String::new(),
    }
}
