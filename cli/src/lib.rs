//! The optape command line: one file per subcommand, each with its `Options` and a `run`.
//!
//! Data goes to stdout, messages to stderr. A `run` gives the process's exit code or an error; errors are
//! printed here, once. Which code an error means is said by [`exit::code_of`].

pub mod completions;
pub mod ctl;
pub mod daemon;
pub mod dump;
pub mod exit;
pub mod info;
pub mod man;
pub mod options;
pub mod output;
pub mod presets;
pub mod record;
pub mod recover;
pub mod replay;
pub mod rules;
pub mod verify;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

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
    let options = match Options::try_parse_from(arguments) {
        Ok(options) => options,
        Err(error) => {
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
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "optape: {}", exit::text(&error));
            ExitCode::from(exit::code_of(&error))
        }
    }
}

fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let global = &options.global;
    match &options.command {
        Command::Record(options) => record::run(options, global),
        Command::Daemon(options) => daemon::run(options, global),
        Command::Ctl(options) => ctl::run(options, global),
        Command::Replay(options) => replay::run(options, global),
        Command::Info(options) => info::run(options, global),
        Command::Dump(options) => dump::run(options, global),
        Command::Verify(options) => verify::run(options, global),
        Command::Recover(options) => recover::run(options, global),
        Command::Rules(options) => rules::run(options, global),
        Command::Presets(options) => presets::run(options, global),
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
