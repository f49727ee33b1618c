//! `cargo xtask test`: every test, from a fresh clone, in one go.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Args;

use crate::python::{self, Python};
use crate::workspace::Workspace;
use crate::{build, digits, process};

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Leave out what links libtorch (optape-torch)
    #[arg(long)]
    no_torch: bool,
    /// Stop at the first step that fails
    #[arg(long)]
    fail_fast: bool,
    /// Passed to the tests: `cargo xtask test -- parity`
    #[arg(last = true)]
    tests: Vec<String>,
}

/// Runs the steps one after another, each with its own output, and ends with a line for each.
pub(crate) fn run(options: &Options, workspace: &Workspace) -> anyhow::Result<ExitCode> {
    build::check_compiler()?;
    let python = python::prepare(workspace)?;
    let binary = build::release(workspace)?;
    let digits = digits::export(workspace, &python)?;
    let parity = workspace.parity();

    // `tests` of the environment: what integration tests need to know, and cannot find out by themselves.
    let prepared = |arguments: &[&str]| -> anyhow::Result<Command> {
        let mut cargo = workspace.cargo();
        cargo.args(arguments);
        python.activate(&mut cargo)?;
        cargo
            .env("OPTAPE_BIN", &binary)
            .env("OPTAPE_PYTHON", &python.interpreter)
            .env("OPTAPE_DIGITS", &digits);
        if let Some(parity) = &parity {
            cargo.env("OPTAPE_PARITY", parity);
        }
        Ok(cargo)
    };

    let mut steps = Steps {
        done: Vec::new(),
        fail_fast: options.fail_fast,
    };
    if process::succeeds(workspace.cargo().args(["fmt", "--version"])) {
        steps.run("formatting", &mut prepared(&["fmt", "--all", "--check"])?);
    } else {
        steps.skip("formatting", "rustfmt is not installed");
    }
    let clippy = process::succeeds(workspace.cargo().args(["clippy", "--version"]));
    if clippy {
        let arguments = ["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"];
        steps.run("lints", &mut prepared(&arguments)?);
    } else {
        steps.skip("lints", "clippy is not installed");
    }
    steps.run(
        "documentation",
        prepared(&["doc", "--quiet", "--no-deps"])?.env("RUSTDOCFLAGS", "-D warnings"),
    );
    // All of them, also behind one that fails: a run in CI should say everything at once.
    steps.run(
        "tests",
        prepared(&["test", "--no-fail-fast"])?
            .arg("--")
            .args(&options.tests),
    );
    if options.no_torch {
        steps.skip("tests with libtorch", "left out by --no-torch");
    } else {
        let package = ["--package", "optape-torch"];
        if clippy {
            let arguments = [
                &["clippy", "--quiet", "--all-targets"],
                &package[..],
                &["--", "-D", "warnings"],
            ]
            .concat();
            steps.run("lints with libtorch", &mut prepared(&arguments)?);
        }
        let arguments = [&["test", "--no-fail-fast"], &package[..]].concat();
        steps.run(
            "tests with libtorch",
            prepared(&arguments)?.arg("--").args(&options.tests),
        );
    }
    if parity.is_none() {
        let asked =
            std::env::var("OPTAPE_PARITY").unwrap_or_else(|_| "../shared/parity".to_owned());
        steps.skip(
            "parity",
            &format!("NOT RUN: no corpus at {asked}; name it by OPTAPE_PARITY"),
        );
    }
    Ok(steps.report(&python))
}

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

struct Steps {
    done: Vec<(String, Outcome, Duration)>,
    fail_fast: bool,
}

impl Steps {
    fn run(&mut self, name: &str, command: &mut Command) {
        if self.fail_fast && self.failed() > 0 {
            return self.skip(name, "a step before it failed");
        }
        eprintln!("xtask: {name}: {}", process::shown(command));
        let started = Instant::now();
        let outcome = match process::status(command) {
            Ok(status) if status.success() => Outcome::Passed,
            Ok(status) => Outcome::Failed(status.to_string()),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        self.done
            .push((name.to_owned(), outcome, started.elapsed()));
    }

    fn skip(&mut self, name: &str, why: &str) {
        self.done.push((
            name.to_owned(),
            Outcome::Skipped(why.to_owned()),
            Duration::ZERO,
        ));
    }

    fn failed(&self) -> usize {
        self.done
            .iter()
            .filter(|(_, outcome, _)| matches!(outcome, Outcome::Failed(_)))
            .count()
    }

    fn report(&self, python: &Python) -> ExitCode {
        println!("\nPython: {}", python.interpreter.display());
        for (name, outcome, time) in &self.done {
            let seconds = time.as_secs_f64();
            match outcome {
                Outcome::Passed => println!("{name:<22} passed   {seconds:7.1} s"),
                Outcome::Failed(why) => println!("{name:<22} FAILED   {seconds:7.1} s  {why}"),
                Outcome::Skipped(why) => println!("{name:<22} skipped             {why}"),
            }
        }
        let total: f64 = self
            .done
            .iter()
            .map(|(_, _, time)| time.as_secs_f64())
            .sum();
        match self.failed() {
            0 => {
                println!("all passed in {total:.0} s");
                ExitCode::SUCCESS
            }
            failed => {
                println!("{failed} of {} steps failed", self.done.len());
                ExitCode::FAILURE
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_fails_is_counted_and_later_ones_still_run() {
        let mut steps = Steps {
            done: Vec::new(),
            fail_fast: false,
        };
        steps.run("bad", &mut Command::new("false"));
        steps.run("missing", &mut Command::new("/no/such/program"));
        steps.run("good", &mut Command::new("true"));
        assert_eq!(steps.failed(), 2);
        assert!(matches!(steps.done[2].1, Outcome::Passed));
    }

    #[test]
    fn fail_fast_skips_what_comes_after() {
        let mut steps = Steps {
            done: Vec::new(),
            fail_fast: true,
        };
        steps.run("bad", &mut Command::new("false"));
        steps.run("good", &mut Command::new("true"));
        assert!(matches!(steps.done[1].1, Outcome::Skipped(_)));
    }
}
