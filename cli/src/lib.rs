//! The optape command line: one file per subcommand, each with its `Options` and a `run`.
//!
//! Data goes to stdout, messages to stderr. A `run` gives the process's exit code or an error; errors are
//! printed here, once. Which code an error means is said by [`exit::code_of`].

pub mod completions;
pub mod config;
pub mod ctl;
pub mod daemon;
pub mod diff;
pub mod dump;
pub mod exit;
pub mod info;
pub mod layers;
pub mod man;
pub mod monitor;
pub mod options;
pub mod output;
pub mod peak;
pub mod presets;
pub mod record;
pub mod recover;
pub mod replay;
pub mod roofline;
pub mod rules;
pub mod selection;
pub mod verify;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches};

use layers::Layers;
use options::{Command, Options};

/// Parses the process's arguments and runs what they say.
#[must_use]
pub fn main() -> ExitCode {
    main_with(std::env::args_os())
}

/// Runs a command line; the first argument is the program's name.
pub fn main_with<I>(arguments: I) -> ExitCode
where
    I: IntoIterator<Item = OsString>,
{
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let for_parent = record::is_for_parent(&arguments);
    let options = match parse(arguments) {
        Ok(options) => options,
        Err(Refused::Configuration(error)) if for_parent => {
            record::refuse_parent(&exit::text(&error));
            return ExitCode::from(exit::code_of(&error));
        }
        Err(Refused::CommandLine(error)) if for_parent && error.use_stderr() => {
            let text = error.to_string();
            let text = text.split("\n\n").next().unwrap_or_default();
            record::refuse_parent(text.trim_start_matches("error: ").trim());
            return ExitCode::from(exit::USAGE);
        }
        Err(Refused::Configuration(error)) => return failed(&error),
        Err(Refused::CommandLine(error)) => {
            // Help and version are errors for clap, but they are data and go to stdout. A closed pipe is no fault.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(exit::USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    log_to_stderr(&options);
    match run(&options) {
        Ok(code) => code,
        Err(error) if exit::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "optape: {}", exit::text(error));
    ExitCode::from(exit::code_of(error))
}

/// Why nothing is run.
enum Refused {
    CommandLine(clap::Error),
    Configuration(anyhow::Error),
}

impl From<clap::Error> for Refused {
    fn from(error: clap::Error) -> Self {
        Self::CommandLine(error)
    }
}

/// The command line alone says which subcommand is meant and which flags are given; then the layers below it fill in the rest.
fn parse(arguments: Vec<OsString>) -> Result<Options, Refused> {
    let given = Options::command().try_get_matches_from(&arguments)?;
    let file = given.get_one::<PathBuf>("config");
    let layers = Layers::read(&Options::command(), file.map(PathBuf::as_path))
        .map_err(Refused::Configuration)?;
    let mut command = layers.apply(Options::command(), &given);
    let matches: ArgMatches = command.try_get_matches_from_mut(arguments)?;
    Options::from_arg_matches(&matches).map_err(|error| error.format(&mut command).into())
}

fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let global = &options.global;
    match &options.command {
        Command::Record(options) => record::run(options, global),
        Command::Monitor(options) => monitor::run(options, global),
        Command::Daemon(options) => daemon::run(options, global),
        Command::Ctl(options) => ctl::run(options, global),
        Command::Replay(options) => replay::run(options, global),
        Command::Diff(options) => diff::run(options, global),
        Command::Roofline(options) => roofline::run(options, global),
        Command::Peak(options) => peak::run(options, global),
        Command::Info(options) => info::run(options, global),
        Command::Dump(options) => dump::run(options, global),
        Command::Verify(options) => verify::run(options, global),
        Command::Recover(options) => recover::run(options, global),
        Command::Rules(options) => rules::run(options, global),
        Command::Presets(options) => presets::run(options, global),
        Command::Config(options) => config::run(options, global),
        Command::Completions(options) => completions::run(options, global),
        Command::Man(options) => man::run(options, global),
    }
}

/// `-v` shows more, `-q` less; `OPTAPE_LOG` says it in the words of `tracing_subscriber`.
fn log_to_stderr(options: &Options) {
    use tracing_subscriber::EnvFilter;

    let level = match (options.global.quiet, options.global.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        (_, 2) => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("OPTAPE_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // A second call in one process (tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(options.global.color.on(&std::io::stderr()))
        .without_time()
        .with_target(false)
        .try_init();
}
