//! `optape record -- CMD`.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};
use optape_recorder::capture::{Preset, Schedule, StepsBy};
use optape_recorder::daemon::{
    self, Detail, Outcome, ParentRequest, Ready, RecordError, Report, Request, SMALLEST_RING_BYTES,
    Selection, Settings, StreamReport,
};
use optape_recorder::ring::{DEFAULT_CAPACITY, OnFull};

use crate::exit::Failure;
use crate::monitor::MonitorOptions;
use crate::options::GlobalOptions;

/// Options of `optape record`.
#[derive(Debug, Args)]
#[command(
    after_help = "The exit code is the command's, 128+N after signal N; 125 where optape could not start it, \
    126 where it cannot be run, 127 where it is not found.\n\n\
    Processes that the command starts are recorded too; those that outlive it for one second."
)]
pub struct Options {
    /// Write the trace to FILE [default: optape-PROGRAM-PID.optape, with the PID of optape]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Overwrite the file if it exists
    #[arg(short, long)]
    pub force: bool,
    /// Which statistics of tensors to take
    #[arg(
        long,
        value_name = "WHICH",
        default_value = "rules",
        env = "OPTAPE_STATS"
    )]
    pub stats: Stats,
    /// How much to record beside ops, modules and stages; in the place of --stats
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<Level>,
    /// Follow state attributes: of a class or module (a name or a glob), as in 'LIF:mem,syn'. Known without it: those of SpikingJelly,
    /// snnTorch, sinabs and Norse, at level full
    #[arg(long, value_name = "MODULES:NAMES")]
    pub state: Vec<Selection>,
    /// Record statistics of a tensor of a class or module (a name or a glob), as in 'IFNode:output,v' or 'fc1:input,grad_output'. Known: input,
    /// output, grad_output, grad_input (through that call alone, from its autograd nodes), or an attribute after each call, ATTRIBUTE.before
    /// for before it
    #[arg(long, value_name = "MODULES:WHAT")]
    pub watch: Vec<Selection>,
    /// Keep the values of what is watched (--watch, and outputs of spiking neurons) themselves, not only their statistics
    #[arg(long, value_name = "WHAT")]
    pub keep: Option<Keep>,
    /// What the program does when a ring is full: wait for the recorder (at most 1 s, then drop), or drop records
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "wait",
        env = "OPTAPE_ON_FULL"
    )]
    pub on_full: WhenFull,
    /// Size of the ring of each recorded process, in memory: 64K, 4M, ... (a power of two)
    #[arg(long, value_name = "SIZE", default_value_t = RingSize(DEFAULT_CAPACITY), value_parser = ring_size, env = "OPTAPE_RING_BYTES")]
    pub ring_size: RingSize,
    /// Record calls of Python functions (linear, conv2d) as well as the ops that they run; compiled code shows none
    #[arg(long, env = "OPTAPE_FUNCTIONS", value_parser = clap::builder::FalseyValueParser::new())]
    pub functions: bool,
    /// Disable torch.compile in the program, so that every op is recorded and counted: what compiled code runs is not seen
    #[arg(long, env = "OPTAPE_EAGER", value_parser = clap::builder::FalseyValueParser::new())]
    pub eager: bool,
    /// Also record how long the work of each op takes on a GPU, by events around it (docs/cuda.md)
    #[arg(long, env = "OPTAPE_GPU_TIME", value_parser = clap::builder::FalseyValueParser::new())]
    pub gpu_time: bool,
    /// What to sample meanwhile.
    #[command(flatten)]
    pub monitors: MonitorOptions,
    /// Try a version of torch that is not supported
    #[arg(long, env = "OPTAPE_FORCE_TORCH", value_parser = clap::builder::FalseyValueParser::new())]
    pub force_torch: bool,
    /// The run that this is a part of: one name (or UUID) for all nodes of a distributed run, whose files `optape replay` then takes together
    #[arg(long, value_name = "NAME", env = "OPTAPE_RUN", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub run: Option<String>,
    /// Record the process that started this one, which is PID (`import optape` does this)
    #[arg(
        long,
        value_name = "PID",
        hide = true,
        conflicts_with = "command",
        requires = "output"
    )]
    pub parent: Option<u32>,
    /// Record only these steps: 100..200, 100.., ..200, counted from 0 in each process; the second number is not among them
    #[arg(long, value_name = "FIRST..END", value_parser = step_range, help_heading = "Which steps")]
    pub steps: Option<StepRange>,
    /// Record one step of every N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Which steps")]
    pub every: Option<u64>,
    /// What a step of --steps and --every is
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "auto",
        help_heading = "Which steps"
    )]
    pub step_by: StepBy,
    /// Begin paused, until the program calls optape.resume() or somebody `optape ctl resume`
    #[arg(long, help_heading = "Which steps")]
    pub paused: bool,
    /// Keep only the last so long of each process (30s, 5min, 2h), and write it at the end; of a process that crashes, its last
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Which steps")]
    pub ring: Option<Duration>,
    /// Have `optape daemon` record it, which listens at --socket
    #[arg(long)]
    pub daemon: bool,
    /// The daemon's socket [default: as `optape daemon` has it]
    #[arg(long, value_name = "PATH", env = "OPTAPE_SOCKET", value_hint = ValueHint::AnyPath)]
    pub socket: Option<PathBuf>,
    /// The command, and its arguments
    #[arg(trailing_var_arg = true, required_unless_present = "parent", value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

/// Values of `--stats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stats {
    /// None: ops, shapes, modules, stages and times only
    None,
    /// What the counters need
    Rules,
    /// Of every tensor
    All,
    /// What the energy models need: the same as --level full
    #[value(hide = true)]
    Full,
    /// Record nothing: what the hook alone costs
    #[value(hide = true)]
    Hook,
}

/// Values of `--level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// What the energy models need: also what layers and neurons read and write, what of products and convolutions is not
    /// empty, and when storages come and go, the tensors of module calls, and
    /// the states of neurons
    Full,
}

/// Values of `--keep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Keep {
    /// Where all elements are 0 or 1: a bit each
    Spikes,
    /// All: a bit each where all are 0 or 1, else as they are
    Values,
}

/// Values of `--on-full`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhenFull {
    /// Wait for the recorder
    Wait,
    /// Drop records, and count them
    Drop,
}

/// Values of `--step-by`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StepBy {
    /// Steps that the program marks; else optimizer steps; else, where there is neither, inferences of the root module
    Auto,
    /// Steps of the optimizer
    Optimizer,
    /// Calls of the root module
    Call,
    /// Steps that the program marks
    Program,
}

/// Steps from the first up to the second, which is not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepRange {
    first: u64,
    end: Option<u64>,
}

fn step_range(text: &str) -> Result<StepRange, String> {
    let bad = || "two numbers with .. between; for example 100..200, 100.. or ..200".to_owned();
    let number = |text: &str| match text {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| bad()),
    };
    let (first, end) = text.split_once("..").ok_or_else(bad)?;
    let (first, end): (Option<u64>, Option<u64>) = (number(first)?, number(end)?);
    let first = first.unwrap_or(0);
    match end {
        Some(end) if end <= first => Err(format!(
            "there is no step in it: {end} is not behind {first}"
        )),
        end => Ok(StepRange { first, end }),
    }
}

/// `30s`, `5min`, `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let seconds: u64 = match text.get(digits.len()..).unwrap_or_default() {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "" => return Err("a unit is missing: s, min or h".to_owned()),
        unit => return Err(format!("{unit} is no unit; s, min and h are known")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(seconds))
        .filter(|seconds| (1..=7 * 24 * 3600).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| "a whole number, of 1 s to a week; for example 5min".to_owned())
}

/// A ring's size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(pub usize);

impl std::fmt::Display for RingSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            n if n % (1 << 20) == 0 => write!(f, "{}M", n >> 20),
            n if n % (1 << 10) == 0 => write!(f, "{}K", n >> 10),
            n => write!(f, "{n}"),
        }
    }
}

fn ring_size(text: &str) -> Result<RingSize, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text
        .get(digits.len()..)
        .unwrap_or_default()
        .to_ascii_uppercase()
        .as_str()
    {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        unit => return Err(format!("{unit} is no unit; K, M and G are known")),
    };
    let number: usize = digits
        .parse()
        .map_err(|_| "not a number of bytes; for example 1M".to_owned())?;
    let bytes = number
        .checked_shl(shift)
        .filter(|bytes| bytes >> shift == number && *bytes <= 1 << 40);
    match bytes.map(usize::next_power_of_two) {
        None => Err("too large; the largest is 1024G".to_owned()),
        Some(bytes) if bytes < SMALLEST_RING_BYTES => {
            Err("too small; the smallest is 64K".to_owned())
        }
        Some(bytes) => Ok(RingSize(bytes)),
    }
}

impl Options {
    fn schedule(&self) -> Option<Schedule> {
        if self.steps.is_none() && self.every.is_none() {
            return None;
        }
        let StepRange { first, end } = self.steps.unwrap_or(StepRange {
            first: 0,
            end: None,
        });
        Some(Schedule {
            first,
            end,
            every: self.every.unwrap_or(1),
            by: match self.step_by {
                StepBy::Auto => StepsBy::Auto,
                StepBy::Optimizer => StepsBy::Optimizer,
                StepBy::Call => StepsBy::Call,
                StepBy::Program => StepsBy::Program,
            },
        })
    }

    fn settings(&self) -> Settings {
        Settings {
            statistics: match self.stats {
                _ if self.level == Some(Level::Full) => Preset::Full,
                Stats::Full => Preset::Full,
                // The hook alone takes none.
                Stats::None | Stats::Hook => Preset::None,
                Stats::Rules => Preset::Rules,
                Stats::All => Preset::All,
            },
            hook_only: self.stats == Stats::Hook && self.level.is_none(),
            on_full: match self.on_full {
                WhenFull::Wait => OnFull::Wait,
                WhenFull::Drop => OnFull::Drop,
            },
            ring_bytes: self.ring_size.0,
            force_torch: self.force_torch,
            detail: Detail {
                level: if self.level.is_some() || self.stats == Stats::Full {
                    daemon::Level::Full
                } else {
                    daemon::Level::Usual
                },
                states: self.state.clone(),
                watches: self.watch.clone(),
                keep: match self.keep {
                    None => daemon::Keep::Nothing,
                    Some(Keep::Spikes) => daemon::Keep::Spikes,
                    Some(Keep::Values) => daemon::Keep::Values,
                },
            },
            run: self.run.clone(),
            monitors: self.monitors.settings(),
            functions: self.functions,
            eager: self.eager,
            gpu_time: self.gpu_time,
            schedule: self.schedule(),
            paused: self.paused,
            window: self.ring,
        }
    }
}

/// Whether a command line is one of `import optape`, which reads messages from stdout as JSON.
pub(crate) fn is_for_parent(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|word| word == "record")
        && arguments.get(2).is_some_and(|word| word == "--parent")
}

/// Why nothing is recorded, for the process that started us.
pub(crate) fn refuse_parent(why: &str) {
    tell_parent(&serde_json::json!({ "error": why }));
}

fn tell_parent(message: &serde_json::Value) {
    let mut stdout = std::io::stdout();
    // Who is gone needs no message.
    let _ = writeln!(stdout, "{message}").and_then(|()| stdout.flush());
}

/// Records the process that started this one. Two lines of JSON on stdout: what it needs to attach, and what came of it; or one
/// with an `error`.
fn run_for_parent(options: &Options, process_id: u32) -> ExitCode {
    let request = ParentRequest {
        process_id,
        output: options.output.clone().unwrap_or_default(),
        force: options.force,
        settings: options.settings(),
        notice: say,
    };
    let ready = |ready: &Ready| {
        tell_parent(&serde_json::json!({
            "optape": env!("CARGO_PKG_VERSION"),
            "run": ready.run_directory.to_string_lossy(),
            "variables": ready.variables,
        }));
        Ok(())
    };
    match daemon::record_parent(request, ready) {
        Ok(report) => {
            tell_parent(&summary_of(&report));
            ExitCode::SUCCESS
        }
        Err(error) => {
            refuse_parent(&in_words_of_python(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

fn summary_of(report: &Report) -> serde_json::Value {
    let sum = |count: fn(&StreamReport) -> u64| report.streams.iter().map(count).sum::<u64>();
    serde_json::json!({
        "path": report.path.as_ref().map(|path| path.to_string_lossy()),
        "bytes": report.bytes,
        "op_calls": report.op_calls(),
        "records": sum(|stream| stream.records),
        "dropped_records": report.dropped_records() + report.unwritten_records,
        "unattributed_op_calls": sum(|stream| stream.unattributed),
        "processes": report.streams.len(),
        "seconds": report.duration.as_secs_f64(),
        "lines": report.summary(),
        "complaints": report.complaints(),
    })
}

/// Ways out as arguments of `optape.start` instead of options of `optape record`.
fn in_words_of_python(error: &RecordError) -> String {
    match error {
        RecordError::OutputExists { path } => format!(
            "{} exists; choose another path, or overwrite it with force=True",
            path.display()
        ),
        other => other
            .to_string()
            .replace(" with --output", "")
            .replace("--ring-size 1M", "ring_size=\"1M\""),
    }
}

/// Runs the command and records it; gives the command's exit code.
///
/// # Errors
/// Where the command could not be started.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    if let Some(process_id) = options.parent {
        return Ok(run_for_parent(options, process_id));
    }
    let request = Request {
        command: options.command.clone(),
        output: options.output.clone(),
        force: options.force,
        settings: options.settings(),
        verbose: global.verbose > 0,
        notice: say,
        daemon: options
            .daemon
            .then(|| options.socket.clone().unwrap_or_else(daemon::socket_path)),
    };
    let outcome = daemon::record(request).map_err(|error| Failure {
        code: error.exit_code(),
        message: error.to_string(),
    })?;
    tell(&outcome, global.quiet);
    Ok(ExitCode::from(outcome.exit.code()))
}

/// Losses are errors, which `--quiet` does not silence.
fn tell(outcome: &Outcome, quiet: bool) {
    let lines = if quiet {
        outcome.report.complaints()
    } else {
        outcome.report.summary()
    };
    for line in lines.iter().chain(&outcome.explanation) {
        say(line);
    }
}

fn say(text: &str) {
    // The command may have closed what we would write to.
    let _ = writeln!(std::io::stderr(), "optape: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_ranges() {
        let range = |first, end| Ok(StepRange { first, end });
        assert_eq!(step_range("100..200"), range(100, Some(200)));
        assert_eq!(step_range("100.."), range(100, None));
        assert_eq!(step_range("..7"), range(0, Some(7)));
        assert!(step_range("7..7").unwrap_err().contains("no step"));
        for bad in ["7", "a..b", "1...2", "-1..2"] {
            assert!(step_range(bad).unwrap_err().contains("100..200"), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("5min"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["5", "0s", "x", "9999h", "5 min"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ring_sizes() {
        let size = |text: &str| ring_size(text).map(|size| size.0);
        assert_eq!(size("64K"), Ok(1 << 16));
        assert_eq!(size("65536"), Ok(1 << 16));
        assert_eq!(size("3m"), Ok(4 << 20));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert!(size("63").unwrap_err().contains("smallest is 64K"));
        assert!(size("99999999999G").unwrap_err().contains("largest"));
        assert!(size("4X").unwrap_err().contains("unit"));
        assert!(size("M").unwrap_err().contains("number"));
        assert_eq!(RingSize(DEFAULT_CAPACITY).to_string(), "4M");
    }
}
