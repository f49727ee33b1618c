//! `cargo xtask`: everything that is done to this repository rather than by it.
//!
//! Each task sets up what it needs (a Python environment, the release build) and does nothing twice. Messages and
//! progress go to stderr, tables to stdout.

mod bench;
mod build;
mod conformance;
mod demo;
mod digits;
mod process;
mod progress;
mod python;
mod soak;
mod test;
mod wheel;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use workspace::Workspace;

/// Development tasks of optape.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Options {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Train a spiking network under the recorder and replay the trace under three cost configurations
    Demo(demo::Options),
    /// Run every test
    Test(test::Options),
    /// Measure what recording costs beside other tools, bytes per op, and the speed of replay
    Bench(bench::Options),
    /// Hold recordings of the corpus of expected numbers against what live tools say of its programs
    Conformance(conformance::Options),
    /// Record for half an hour at full rate, and kill hundreds of times: what must not grow, and what must not be lost
    Soak(soak::Options),
    /// Make the Python environment that the other tasks run in, and print its interpreter
    Python,
    /// Build the Python wheel into target/wheels: program, library, glue and the hook's source
    Wheel(wheel::Options),
    /// Write digits and weights for the Rust example, and print the directory
    Digits,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::locate()?;
    match &options.task {
        Task::Demo(options) => demo::run(options, &workspace),
        Task::Test(options) => test::run(options, &workspace),
        Task::Bench(options) => bench::run(options, &workspace),
        Task::Wheel(options) => wheel::run(options, &workspace),
        Task::Conformance(options) => conformance::run(options, &workspace),
        Task::Soak(options) => soak::run(options, &workspace),
        Task::Python => {
            println!("{}", python::prepare(&workspace)?.interpreter.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Digits => {
            println!(
                "{}",
                digits::export(&workspace, &python::prepare(&workspace)?)?.display()
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}
