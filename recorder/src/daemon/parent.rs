//! Recording the process that started this one: what `import optape` starts in notebooks and scripts.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};

use super::control::RunFacts;
use super::error::RecordError;
use super::report::Report;
use super::run_directory::RunDirectory;
use super::sink::TraceFile;
use super::{Finish, GRACE, Recording, Setting, Settings, launch, provenance, window};

/// Where there is no descriptor of the process to wait for, it is looked at this often.
const LOOK_AGAIN: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// What is asked for.
pub struct ParentRequest {
    /// The process that started us, and that is to be recorded.
    pub process_id: u32,
    /// The file.
    pub output: PathBuf,
    /// Overwrite the file if it exists.
    pub force: bool,
    /// How to record.
    pub settings: Settings,
    /// Whom to tell what goes wrong.
    pub notice: fn(&str),
}

/// What the process needs to attach.
pub struct Ready {
    /// Where it makes its ring: `OPTAPE_RUN`.
    pub run_directory: PathBuf,
    /// What it would find in its environment under `optape record`.
    pub variables: BTreeMap<String, String>,
}

/// Records the process that started this one, and those that it forks, until it says so on stdin, closes it, or dies.
///
/// `ready` is called once the process may attach.
///
/// # Errors
/// Where the recording could not begin; nothing is left behind then.
pub fn record_parent(
    request: ParentRequest,
    ready: impl FnOnce(&Ready) -> io::Result<()>,
) -> Result<Report, RecordError> {
    let ParentRequest {
        process_id,
        output,
        force,
        settings,
        notice,
    } = request;
    let settings = settings.sound();
    let library = launch::capture_library()?;
    let directory = RunDirectory::create(&notice)?;
    directory.write_attach_files()?;
    directory.try_ring(settings.ring_bytes)?;
    directory.prepare(&settings)?;
    let run = provenance::run_info(&command_of(process_id), &settings);
    let variables = launch::environment(directory.path(), &library, &settings);
    let variables = variables
        .into_iter()
        .filter(|(name, _)| name.starts_with("OPTAPE_"))
        .map(|(name, value)| (name.to_owned(), value.to_string_lossy().into_owned()))
        .collect();
    let told = Ready {
        run_directory: directory.path().to_owned(),
        variables,
    };
    let facts = RunFacts::new(&run, &output, false);
    let file = TraceFile::create(&output, force)?;
    let recording = Recording::start(
        directory,
        file,
        &run,
        Setting {
            ring_bytes: settings.ring_bytes,
            window: window(&settings, &output)?,
            monitors: settings.monitors,
            own_process: true,
        },
        Box::new(notice),
        Some(facts),
    )?;
    ready(&told).map_err(|source| RecordError::System {
        what: "tell the program that it may attach",
        source,
    })?;
    let alive = wait(process_id);
    Ok(recording.finish_with(Finish {
        exit_code: None,
        signal: None,
        // Who asks us to stop waits for it; who is dead may have left forked processes behind.
        grace: if alive {
            std::time::Duration::ZERO
        } else {
            GRACE
        },
    }))
}

/// The command line of a running process.
fn command_of(process_id: u32) -> Vec<OsString> {
    let words = std::fs::read(format!("/proc/{process_id}/cmdline")).unwrap_or_default();
    words
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect()
}

/// Waits until the process says that we may end. False: it died. Its end of our stdin may be held open by its children, so its
/// death is waited for, too.
fn wait(process_id: u32) -> bool {
    let Some(parent) = i32::try_from(process_id).ok().and_then(Pid::from_raw) else {
        return false;
    };
    let descriptor = pidfd_open(parent, PidfdFlags::empty()).ok();
    let stdin = io::stdin();
    while getppid() == Some(parent) {
        let mut waited = vec![PollFd::new(&stdin, PollFlags::IN)];
        waited.extend(descriptor.as_ref().map(|d| PollFd::new(d, PollFlags::IN)));
        if poll(&mut waited, Some(&LOOK_AGAIN)).is_err() {
            continue;
        }
        let answered = |i: usize| waited.get(i).is_some_and(|p| !p.revents().is_empty());
        if answered(1) {
            return false;
        }
        if answered(0) {
            return true;
        }
    }
    false
}
