//! `optape completions SHELL`.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape completions`.
#[derive(Debug, Args)]
pub struct Options {
    /// The shell
    pub shell: Shell,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Prints the script.
///
/// # Errors
/// Where it cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(
        options.shell,
        &mut crate::options::Options::command(),
        "optape",
        &mut script,
    );
    options.output.write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
