//! `optape ctl`: what is being recorded, and telling it what to do.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use optape_recorder::daemon::{self, ControlRequest, FoundRun, Reply, RunStatus, StreamStatus};
use optape_recorder::ring::{PAUSED_BY_COMMAND, PAUSED_BY_SCHEDULE};
use optape_replay::report::grouped;
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::options::GlobalOptions;

/// Options of `optape ctl`.
#[derive(Debug, Args)]
#[command(
    after_help = "RUN is the process id of `optape record` or of a recorded process, the beginning of the run's uuid, or its file. It can be \
    left out where only one run is recorded. Runs of `optape record` and of `optape daemon` are found alike; only your own are.\n\n\
    The exit code is 1 where the run refuses, 2 where there is no such run."
)]
pub struct Options {
    /// What to do
    #[command(subcommand)]
    pub action: Action,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Show the runs that are being recorded, and their processes
    Status {
        /// Which run [default: all]
        run: Option<String>,
        /// How to write it
        #[arg(long, value_name = "FORMAT", default_value = "table")]
        format: StatusFormat,
    },
    /// Record a process that has optape loaded and waits, paused: one of `optape record --paused`
    ///
    /// A program that was started without optape cannot be recorded from outside.
    Attach {
        /// Its process id
        process: u32,
    },
    /// Record nothing until `resume`
    Pause(Target),
    /// Go on recording
    Resume(Target),
    /// Put a mark into the trace
    Mark {
        /// What it says, at most 1024 bytes
        text: String,
        /// Which run
        #[arg(long, value_name = "RUN")]
        run: Option<String>,
    },
    /// Have the file hold everything up to now
    Flush {
        /// Which run
        run: Option<String>,
    },
    /// End the recording and complete the file; the program goes on
    Stop {
        /// Which run
        #[arg(conflicts_with = "daemon")]
        run: Option<String>,
        /// End `optape daemon`, with all its runs
        #[arg(long)]
        daemon: bool,
        /// The daemon's socket
        #[arg(long, value_name = "PATH", env = "OPTAPE_SOCKET", value_hint = ValueHint::AnyPath)]
        socket: Option<PathBuf>,
    },
}

/// Which run, and which process of it.
#[derive(Debug, Args)]
pub struct Target {
    /// Which run
    pub run: Option<String>,
    /// Only this process
    #[arg(long, value_name = "PID")]
    pub process: Option<u32>,
}

/// Values of `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StatusFormat {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Does it.
///
/// # Errors
/// Where there is no such run, or it refuses.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let (request, run) = match &options.action {
        Action::Status { run, format } => return status(run.as_deref(), *format),
        Action::Stop {
            daemon: true,
            socket,
            ..
        } => {
            let path = socket.clone().unwrap_or_else(daemon::socket_path);
            let reply = daemon::ask_daemon(&path, &ControlRequest::Stop)
                .map_err(|error| no_daemon(&path, &error))?;
            return tell(reply, global);
        }
        Action::Attach { process } => return attach(*process, global),
        Action::Pause(target) => (
            ControlRequest::Pause {
                process: target.process,
            },
            &target.run,
        ),
        Action::Resume(target) => (
            ControlRequest::Resume {
                process: target.process,
            },
            &target.run,
        ),
        Action::Mark { text, run } => (ControlRequest::Mark { text: text.clone() }, run),
        Action::Flush { run } => (ControlRequest::Flush, run),
        Action::Stop { run, .. } => (ControlRequest::Stop, run),
    };
    let runs = daemon::find_runs();
    let chosen = choose(&runs, run.as_deref())?;
    ask(chosen, &request, global)
}

fn ask(
    run: &FoundRun,
    request: &ControlRequest,
    global: &GlobalOptions,
) -> anyhow::Result<ExitCode> {
    let reply = run
        .ask(request)
        .with_context(|| format!("{} does not answer", run.status.file.display()))?;
    tell(reply, global)
}

fn tell(reply: Reply, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    match reply {
        Reply::Done { lines } => {
            if !global.quiet {
                let mut err = std::io::stderr().lock();
                for line in lines {
                    writeln!(err, "optape: {line}")?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Reply::Failed { why } => Err(Failure {
            code: crate::exit::VIOLATED,
            message: why,
        }
        .into()),
        _ => Err(Failure {
            code: crate::exit::VIOLATED,
            message: "an answer that was not asked for".to_owned(),
        }
        .into()),
    }
}

fn no_daemon(path: &Path, error: &std::io::Error) -> Failure {
    Failure::usage(format!("no daemon answers at {}: {error}", path.display()))
}

/// The run that the user means.
fn choose<'a>(runs: &'a [FoundRun], asked: Option<&str>) -> Result<&'a FoundRun, Failure> {
    let found: Vec<&FoundRun> = match asked {
        None => runs.iter().collect(),
        Some(asked) => {
            let file = std::path::absolute(asked).ok();
            runs.iter()
                .filter(|run| {
                    Some(&run.status.file) == file.as_ref()
                        || asked.parse().is_ok_and(|pid| run.has_process(pid))
                        || (asked.len() >= 4
                            && run
                                .status
                                .run_uuid
                                .starts_with(&asked.to_lowercase().replace('-', "")))
                })
                .collect()
        }
    };
    match (found.as_slice(), asked) {
        ([run], _) => Ok(run),
        ([], None) => Err(Failure::usage("nothing is being recorded")),
        ([], Some(asked)) => Err(Failure::usage(format!(
            "no run {asked} is being recorded{}",
            list(runs.iter())
        ))),
        (_, None) => Err(Failure::usage(format!(
            "several runs are being recorded; name one{}",
            list(found.into_iter())
        ))),
        (_, Some(asked)) => Err(Failure::usage(format!(
            "{asked} means several runs{}",
            list(found.into_iter())
        ))),
    }
}

fn list<'a>(runs: impl Iterator<Item = &'a FoundRun>) -> String {
    runs.map(|run| {
        let status = &run.status;
        format!(
            "\n  {:.8}  {}  {}",
            status.run_uuid,
            status.file.display(),
            status.command.join(" ")
        )
    })
    .collect()
}

/// Resumes one process that waits.
fn attach(process: u32, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let runs = daemon::find_runs();
    for run in &runs {
        let Some(stream) = run
            .status
            .streams
            .iter()
            .find(|s| s.process_id == process && !s.ended)
        else {
            continue;
        };
        if stream.paused & PAUSED_BY_COMMAND == 0 {
            return Err(Failure {
                code: crate::exit::VIOLATED,
                message: format!(
                    "process {process} is being recorded already, into {}",
                    run.status.file.display()
                ),
            }
            .into());
        }
        let request = ControlRequest::Resume {
            process: Some(process),
        };
        return ask(run, &request, global);
    }
    let why = match Path::new("/proc").join(process.to_string()).exists() {
        false => format!("there is no process {process}"),
        true => format!(
            "process {process} has not loaded optape, or has run no op yet; a program that is to be recorded later is started with \
             `optape record --paused -- ...`, and no other can be recorded from outside"
        ),
    };
    Err(Failure::usage(why).into())
}

fn status(asked: Option<&str>, format: StatusFormat) -> anyhow::Result<ExitCode> {
    let runs = daemon::find_runs();
    let shown: Vec<&FoundRun> = match asked {
        None => runs.iter().collect(),
        asked => vec![choose(&runs, asked)?],
    };
    let socket = daemon::socket_path();
    let service = match daemon::ask_daemon(&socket, &ControlRequest::Status) {
        Ok(Reply::Daemon(status)) => Some(status),
        _ => None,
    };
    let mut out = Vec::new();
    match format {
        StatusFormat::Json => {
            let runs: Vec<Value> = shown.iter().map(|run| object(&run.status)).collect();
            let service = service.map(|s| json!({"process_id": s.process_id, "runs": s.runs, "socket": socket.display().to_string()}));
            serde_json::to_writer_pretty(&mut out, &json!({"daemon": service, "runs": runs}))?;
            out.push(b'\n');
        }
        StatusFormat::Table => {
            if let Some(service) = service {
                writeln!(
                    out,
                    "daemon {} at {}: {} runs",
                    service.process_id,
                    socket.display(),
                    service.runs
                )?;
            }
            if shown.is_empty() {
                writeln!(out, "nothing is being recorded")?;
            }
            for run in shown {
                table(&run.status, &mut out)?;
            }
        }
    }
    std::io::stdout().lock().write_all(&out)?;
    Ok(ExitCode::SUCCESS)
}

fn state(stream: &StreamStatus) -> &'static str {
    match stream {
        s if s.ended => "ended",
        s if s.paused & PAUSED_BY_COMMAND != 0 => "paused",
        s if s.paused & PAUSED_BY_SCHEDULE != 0 => "waits for its step",
        _ => "records",
    }
}

/// Of the kind that counts first: marked by the program, of the optimizer, calls of the root module.
fn steps(stream: &StreamStatus) -> u64 {
    let [optimizer, root_calls, program, _] = stream.steps;
    [program, optimizer, root_calls]
        .into_iter()
        .find(|steps| *steps > 0)
        .unwrap_or(0)
}

fn table(run: &RunStatus, out: &mut Vec<u8>) -> std::io::Result<()> {
    let by = if run.by_daemon {
        "optape daemon"
    } else {
        "optape record"
    };
    writeln!(out, "{:.8}  {}", run.run_uuid, run.file.display())?;
    writeln!(
        out,
        "  {}  ({by}, process {}{})",
        run.command.join(" "),
        run.recorder_process_id,
        if run.ended { ", stopped" } else { "" }
    )?;
    for stream in &run.streams {
        let lost = match stream.dropped_records {
            0 => String::new(),
            n => format!(", {} records lost", grouped(i128::from(n))),
        };
        writeln!(
            out,
            "  process {}: {}; {} op calls, {} steps{lost}",
            stream.process_id,
            state(stream),
            grouped(i128::from(stream.op_calls)),
            grouped(i128::from(steps(stream))),
        )?;
    }
    Ok(())
}

fn object(run: &RunStatus) -> Value {
    let streams: Vec<Value> = run
        .streams
        .iter()
        .map(|stream| {
            let [optimizer, root_calls, program, inferences] = stream.steps;
            json!({
                "process_id": stream.process_id,
                "command": stream.command,
                "state": state(stream),
                "op_calls": stream.op_calls,
                "dropped_records": stream.dropped_records,
                "steps": {"optimizer": optimizer, "root_calls": root_calls, "program": program, "inferences": inferences},
            })
        })
        .collect();
    json!({
        "run_uuid": run.run_uuid,
        "recorder_process_id": run.recorder_process_id,
        "by_daemon": run.by_daemon,
        "command": run.command,
        "file": run.file.display().to_string(),
        "started_unix_ns": run.started_unix_ns,
        "ended": run.ended,
        "streams": streams,
    })
}
