//! The daemon: drains the rings of one recording into its file.
//!
//! [`record`] is `optape record`: it starts a command so that it attaches itself, and is the daemon while the command runs.
//! [`Recording`] is the daemon alone; [`Recording::in_process`] runs it on threads of the recorded process.
//!
//! Four threads: one drains rings and compresses, one writes the file, one only says that the daemon lives, one samples the monitors. So neither a slow
//! disk nor a large block looks like death to the recorded processes. Whatever goes wrong after the start is told once,
//! stands in the [`Report`], and leaves the recorded program alone.

mod control;
mod cost;
mod detail;
mod error;
mod explain;
mod intake;
mod launch;
mod monitors;
mod order;
mod parent;
mod places;
mod process;
mod protocol;
mod provenance;
mod pulse;
mod report;
mod run_directory;
mod salvage;
mod service;
mod signals;
mod sink;
mod values;
mod window;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};
use optape_trace::{RunInfo, TraceWriter};
use serde::{Deserialize, Serialize};

pub use control::{FoundRun, find_runs};
pub use detail::{Detail, Keep, Level, Selection};
pub use error::RecordError;
pub use launch::Exit;
pub use order::StreamStatus;
pub use parent::{ParentRequest, Ready, record_parent};
pub use protocol::{DaemonStatus, MOST_MARK_BYTES, Reply, Request as ControlRequest, RunStatus};
pub use report::{Report, StreamReport};
pub use salvage::{RingState, Salvage, salvage};
pub use service::{ServiceError, ask_daemon, serve, socket_path};
pub use sink::TraceFile;

use crate::capture::{Preset, Schedule};
use crate::monitor::MonitorSettings;
use crate::ring::{DEFAULT_CAPACITY, OnFull};
use control::{Control, RunFacts};
use intake::{Finish, Intake};
use monitors::MonitorStream;
use order::Order;
use pulse::Pulse;
use run_directory::RunDirectory;
use sink::{BackgroundSink, Claim};
use window::Window;

/// Versions of torch that the hook is known to work with.
pub const SUPPORTED_TORCH: [&str; 1] = ["2.13.0"];
/// Processes that outlive the command are recorded for so long after its end.
pub const GRACE: Duration = Duration::from_secs(1);
/// The smallest ring.
pub const SMALLEST_RING_BYTES: usize = 1 << 16;
/// At most so many bytes of what a process says that could not attach.
const ATTACH_ERROR_BYTES: usize = 16 << 10;

/// How to record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Which statistics.
    pub statistics: Preset,
    /// Nothing is recorded: what the hook alone costs.
    pub hook_only: bool,
    /// What a recorded process does when its ring is full.
    pub on_full: OnFull,
    /// Size of a ring; a power of two, at least [`SMALLEST_RING_BYTES`].
    pub ring_bytes: usize,
    /// Try versions of torch that are not among [`SUPPORTED_TORCH`].
    pub force_torch: bool,
    /// What is recorded of modules beside their ops.
    pub detail: Detail,
    /// The run that this recording is a part of: a UUID, or any name that all parts (nodes) use. A run of its own where it is
    /// not given.
    pub run: Option<String>,
    /// What to sample beside the ops, if anything.
    pub monitors: Option<MonitorSettings>,
    /// Record calls of Python functions (`linear`, `conv2d`) as well as ops.
    pub functions: bool,
    /// Disable `torch.compile` in the command's processes.
    pub eager: bool,
    /// Record how long the work of ops takes on GPUs.
    pub gpu_time: bool,
    /// Which steps are recorded; `None`: all.
    pub schedule: Option<Schedule>,
    /// Begin paused, until somebody resumes: the program, or `optape ctl`.
    pub paused: bool,
    /// Keep only the last so long, and write it at the end.
    pub window: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            statistics: Preset::default(),
            hook_only: false,
            on_full: OnFull::Wait,
            ring_bytes: DEFAULT_CAPACITY,
            force_torch: false,
            detail: Detail::default(),
            run: None,
            monitors: None,
            functions: false,
            eager: false,
            gpu_time: false,
            schedule: None,
            paused: false,
            window: None,
        }
    }
}

impl Settings {
    /// What is asked of tensors, as flags and traces spell it.
    const fn statistics_name(&self) -> &'static str {
        if self.hook_only {
            "hook"
        } else {
            self.statistics.name()
        }
    }

    /// With a ring size that rings have.
    fn sound(&self) -> Self {
        let ring_bytes = self.ring_bytes.max(SMALLEST_RING_BYTES);
        Self {
            ring_bytes: ring_bytes
                .checked_next_power_of_two()
                .unwrap_or(1 << (usize::BITS - 1)),
            ..self.clone()
        }
    }
}

/// Whom to tell at once what goes wrong while the recording runs.
pub type Notice = Box<dyn Fn(&str) + Send>;

/// Tells it on stderr.
#[must_use]
pub fn notice_on_stderr() -> Notice {
    Box::new(|text| {
        let _ = writeln!(std::io::stderr(), "optape: {text}");
    })
}

/// How to record within this process.
pub struct InProcess {
    /// How to record.
    pub settings: Settings,
    /// Overwrite the file if it exists.
    pub force: bool,
    /// Whom to tell what goes wrong.
    pub notice: Notice,
}

impl Default for InProcess {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            force: false,
            notice: notice_on_stderr(),
        }
    }
}

/// What the drain loop has to know of the settings.
struct Setting {
    ring_bytes: usize,
    monitors: Option<MonitorSettings>,
    /// This process is the daemon and nothing else: all its cost is ours.
    own_process: bool,
    /// Keep only the last so long.
    window: Option<Window>,
}

/// The window of these settings, if they have one, with its file beside `output`.
fn window(settings: &Settings, output: &Path) -> Result<Option<Window>, RecordError> {
    settings
        .window
        .map(|length| Window::create(length, output))
        .transpose()
        .map_err(|source| RecordError::System {
            what: "make a file for the last minutes",
            source,
        })
}

/// A recording that runs. Ends, and completes its file, when it is finished or dropped.
pub struct Recording {
    directory: Option<RunDirectory>,
    orders: Option<Sender<Order>>,
    control: Option<Control>,
    thread: Option<JoinHandle<Report>>,
    claim: Option<Claim>,
    /// A fork is not the owner.
    process_id: u32,
}

impl Recording {
    /// Records this process, and those that it forks, into `path`: makes a run directory and drains the rings that appear in
    /// [`Recording::directory`]. The producers are to say goodbye before [`Recording::finish`].
    ///
    /// # Errors
    /// Where the file or the run directory cannot be made.
    pub fn in_process(path: &Path, options: InProcess) -> Result<Self, RecordError> {
        let settings = options.settings.sound();
        let directory = RunDirectory::create(&*options.notice)?;
        directory.try_ring(settings.ring_bytes)?;
        directory.prepare(&settings)?;
        let command: Vec<OsString> = std::env::args_os().collect();
        let run = provenance::run_info(&command, &settings);
        let file = TraceFile::create(path, options.force)?;
        Self::start(
            directory,
            file,
            &run,
            Setting {
                ring_bytes: settings.ring_bytes,
                window: window(&settings, path)?,
                monitors: settings.monitors,
                own_process: false,
            },
            options.notice,
            None,
        )
    }

    fn start(
        directory: RunDirectory,
        file: TraceFile,
        run: &RunInfo,
        setting: Setting,
        notice: Notice,
        control: Option<RunFacts>,
    ) -> Result<Self, RecordError> {
        let claim = file.claim();
        let mut recording = Self::start_with(directory, file, run, setting, notice)
            .inspect_err(|_| claim.give_up())?;
        recording.claim = Some(claim);
        if let (Some(facts), Some(orders)) = (control, &recording.orders) {
            match Control::start(recording.directory(), facts, orders.clone()) {
                Ok(control) => recording.control = Some(control),
                // A recording that cannot be asked is still a recording.
                Err(error) => tracing::warn!("`optape ctl` cannot reach this run: {error}"),
            }
        }
        Ok(recording)
    }

    /// Has the recorded processes end their streams, as `optape ctl stop` does.
    fn stop(&self) {
        if let Some(orders) = &self.orders {
            let (reply, _nobody) = bounded(1);
            let _ = orders.send(Order::Stop(reply));
        }
    }

    /// Records into any sink.
    fn start_with(
        directory: RunDirectory,
        sink: impl Write + Send + 'static,
        run: &RunInfo,
        mut setting: Setting,
        notice: Notice,
    ) -> Result<Self, RecordError> {
        let thread = |source| RecordError::System {
            what: "start a thread",
            source,
        };
        directory.name_run(&run.run_uuid)?;
        let sink = BackgroundSink::start(sink).map_err(thread)?;
        let state = sink.state();
        let writer = TraceWriter::create(sink, run)?;
        let pulse = Pulse::start().map_err(thread)?;
        let window = setting.window.as_ref().map(Window::length);
        let monitors = setting.monitors.take();
        let monitors = monitors.map(|settings| MonitorStream::start(settings, window));
        let monitors = monitors.transpose().map_err(thread)?;
        let intake = Intake::new(
            directory.path(),
            writer,
            state,
            pulse,
            monitors,
            setting,
            notice,
        );
        let (orders, ordered) = bounded(8);
        let thread = std::thread::Builder::new()
            .name("optape-drain".into())
            .spawn(move || intake.run(&ordered))
            .map_err(thread)?;
        Ok(Self {
            directory: Some(directory),
            orders: Some(orders),
            control: None,
            thread: Some(thread),
            claim: None,
            process_id: std::process::id(),
        })
    }

    /// Where rings are to be made: what `OPTAPE_RUN` names.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory
            .as_ref()
            .map_or(Path::new(""), RunDirectory::path)
    }

    /// Ends the recording: drains what is left and completes the file. Where no stream began, no file is left behind.
    #[must_use]
    pub fn finish(self) -> Report {
        self.finish_with(Finish::default())
    }

    fn finish_with(mut self, finish: Finish) -> Report {
        self.end(finish)
    }

    fn end(&mut self, finish: Finish) -> Report {
        if let Some(orders) = self.orders.take() {
            // It has ended already where it was stopped.
            let _ = orders.send(Order::Finish(finish));
        }
        let result = self.thread.take().map(JoinHandle::join);
        let mut report = match result {
            Some(Ok(report)) => report,
            Some(Err(_)) => Report {
                failure: Some("optape itself failed (see above); please report it".into()),
                ..Report::default()
            },
            None => return Report::default(),
        };
        // Before its socket's directory goes.
        self.control = None;
        if let Some(directory) = self.directory.take() {
            (report.attached, report.attach_errors) = notes(directory.path());
        }
        if let Some(claim) = self.claim.take() {
            if report.streams.is_empty() && report.failure.is_none() {
                claim.give_up();
            } else {
                report.path = Some(claim.path);
            }
        }
        report
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.process_id == std::process::id() {
            let _ = self.end(Finish::default());
        } else {
            // Ours is a copy in a forked process: the threads are not here, and the directory is the parent's.
            std::mem::forget((
                self.directory.take(),
                self.orders.take(),
                self.control.take(),
                self.thread.take(),
            ));
        }
    }
}

/// The glue's notes in the run directory: how many processes attached (`attached-PID`), and what those say that could not
/// (`attach-error-PID.txt`), each text once, with their number.
fn notes(directory: &Path) -> (usize, BTreeMap<String, usize>) {
    let mut attached = 0;
    let mut errors = BTreeMap::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        attached += usize::from(name.starts_with("attached-"));
        if let (true, Ok(bytes)) = (
            name.starts_with("attach-error-"),
            std::fs::read(entry.path()),
        ) {
            let text = String::from_utf8_lossy(bytes.get(..ATTACH_ERROR_BYTES).unwrap_or(&bytes))
                .trim()
                .to_owned();
            *errors.entry(text).or_default() += 1;
        }
    }
    (attached, errors)
}

/// What `optape record` is asked to do.
pub struct Request {
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// The file; `optape-PROGRAM-PID.optape` where it is not given.
    pub output: Option<PathBuf>,
    /// Overwrite the file if it exists.
    pub force: bool,
    /// How to record.
    pub settings: Settings,
    /// Have the recorded processes say what they do to attach.
    pub verbose: bool,
    /// Whom to tell what goes wrong.
    pub notice: fn(&str),
    /// Have the daemon that listens here record it.
    pub daemon: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// How the command ended.
    pub exit: Exit,
    /// What was recorded.
    pub report: Report,
    /// Where nothing was recorded: why, and what helps.
    pub explanation: Vec<String>,
}

/// Runs a command and records what it and its descendants do with torch.
///
/// Installs signal handlers: once per process.
///
/// # Errors
/// Only where the command could not be started; nothing is left behind then.
pub fn record(request: Request) -> Result<Outcome, RecordError> {
    let Request {
        command,
        output,
        force,
        settings,
        verbose,
        notice,
        daemon,
    } = request;
    let settings = settings.sound();
    let _witness = signals::install().map_err(|source| RecordError::System {
        what: "handle signals",
        source,
    })?;
    let program = command.first().cloned().unwrap_or_default();
    let found = launch::find(&program, std::env::var_os("PATH").as_deref())?;
    let library = launch::capture_library()?;
    let path = output.unwrap_or_else(|| provenance::default_file_name(&program).into());
    let mut run = provenance::run_info(&command, &settings);
    run.facts
        .insert("command.path".into(), found.to_string_lossy().into_owned());
    if let Some(socket) = daemon {
        let launch = Launch {
            command: &command,
            found: &found,
            library: &library,
            settings: &settings,
            verbose,
        };
        return record_by_daemon(&launch, &socket, path, force, run);
    }
    let directory = RunDirectory::create(&notice)?;
    directory.write_attach_files()?;
    directory.try_ring(settings.ring_bytes)?;
    directory.prepare(&settings)?;
    let mut variables = launch::environment(directory.path(), &library, &settings);
    if verbose {
        variables.insert("OPTAPE_VERBOSE", "1".into());
    }
    let facts = RunFacts::new(&run, &path, false);
    let file = TraceFile::create(&path, force)?;
    tracing::info!(
        "recording into {}; rings in {}",
        path.display(),
        directory.path().display()
    );
    let recording = Recording::start(
        directory,
        file,
        &run,
        Setting {
            ring_bytes: settings.ring_bytes,
            window: window(&settings, &path)?,
            monitors: settings.monitors,
            own_process: true,
        },
        Box::new(notice),
        Some(facts),
    )?;
    // From here on, leaving drops the recording, which removes the empty file.
    if let Some(signal) = signals::early() {
        return Err(RecordError::Interrupted { signal });
    }
    let child = launch::start(&command, &found, &variables)?;
    tracing::info!(
        "started {} as process {}",
        program.to_string_lossy(),
        child.id()
    );
    let exit = launch::wait(child)?;
    tracing::info!("the command ended: {exit:?}");
    let (exit_code, signal) = exit.parts();
    let report = recording.finish_with(Finish {
        exit_code,
        signal,
        grace: GRACE,
    });
    let explanation = if report.path.is_none() {
        explain::explain(&command, &report)
    } else {
        Vec::new()
    };
    Ok(Outcome {
        exit,
        report,
        explanation,
    })
}

/// A command that is ready to be started.
struct Launch<'a> {
    command: &'a [OsString],
    found: &'a Path,
    library: &'a Path,
    settings: &'a Settings,
    verbose: bool,
}

/// Runs a command that the daemon at `socket` records.
fn record_by_daemon(
    launch: &Launch<'_>,
    socket: &Path,
    path: PathBuf,
    force: bool,
    run: RunInfo,
) -> Result<Outcome, RecordError> {
    let output = std::path::absolute(&path).map_err(|source| RecordError::Output {
        path: path.clone(),
        source,
    })?;
    let client = service::Client::begin(
        socket,
        protocol::Begin {
            client_version: env!("CARGO_PKG_VERSION").to_owned(),
            output,
            force,
            settings: launch.settings.clone(),
            run: run.into(),
        },
    )?;
    let mut variables = launch::environment(&client.directory, launch.library, launch.settings);
    if launch.verbose {
        variables.insert("OPTAPE_VERBOSE", "1".into());
    }
    // Leaving without a word has the daemon see that nothing was recorded, and remove the empty file.
    if let Some(signal) = signals::early() {
        return Err(RecordError::Interrupted { signal });
    }
    let child = launch::start(launch.command, launch.found, &variables)?;
    let exit = launch::wait(child)?;
    let (exit_code, signal) = exit.parts();
    let (report, explanation) = match client.end(exit_code, signal) {
        Ok(mut report) => {
            let explanation = match report.path {
                None => explain::explain(launch.command, &report),
                Some(_) => Vec::new(),
            };
            // As the user named it.
            report.path = report.path.map(|_| path);
            (report, explanation)
        }
        Err(error) => {
            let lost = format!(
                "the daemon ended before the program did ({error}); what it had written stands in {}, `optape recover` completes it",
                path.display()
            );
            (Report::default(), vec![lost])
        }
    };
    Ok(Outcome {
        exit,
        report,
        explanation,
    })
}
