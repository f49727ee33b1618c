//! `cargo xtask demo`: the main job, once through. A spiking network learns handwritten digits under the recorder; the
//! trace that is left answers what it cost, under three assumptions about the hardware.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use serde::Deserialize;

use crate::process;
use crate::workspace::Workspace;
use crate::{build, python};

/// Options of `cargo xtask demo`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Epochs of training
    #[arg(long, default_value_t = 4)]
    epochs: u32,
}

/// The cost configurations under which the trace is replayed, side by side.
const COSTS: &str = "compute_fp32,compute_fp16,compute_int8";

/// Test accuracy that the network has to reach.
const ACCURACY: f64 = 0.80;

/// The last line that the program prints.
#[derive(Debug, Deserialize)]
struct Trained {
    accuracy: f64,
    train_images: u64,
    test_images: u64,
}

/// Records, checks, replays.
pub(crate) fn run(options: &Options, workspace: &Workspace) -> anyhow::Result<ExitCode> {
    build::check_compiler()?;
    let python = python::prepare(workspace)?;
    let optape = build::release(workspace)?;
    let trace = workspace.output("demo")?.join("digits.optape");

    let started = Instant::now();
    let mut record = Command::new(&optape);
    record
        .current_dir(&workspace.root)
        .args(["record", "--force", "--output"])
        .arg(&trace)
        .arg("--");
    record
        .arg(&python.interpreter)
        .arg("demo/train.py")
        .args(["--epochs", &options.epochs.to_string()]);
    let trained = train(python.activate(&mut record)?)?;
    if trained.accuracy < ACCURACY {
        bail!(
            "the network reached {:.1} % on the test images, expected are at least {:.0} %",
            100.0 * trained.accuracy,
            100.0 * ACCURACY
        );
    }
    println!(
        "\n{:.1} % of {} test images are right, after {} training images (at least {:.0} % expected)",
        100.0 * trained.accuracy,
        trained.test_images,
        trained.train_images,
        100.0 * ACCURACY
    );

    replay(
        &optape,
        "What the trace holds, and what the run computed",
        &trace,
        &[],
    )?;
    let energy = ["--energy", COSTS];
    let test = ["--range", "test"];
    let images = trained.test_images.to_string();
    let per_image = ["--per", "sample", "--samples", &images];
    let by = |what| ["--by", what];
    replay(
        &optape,
        "The whole run, per module",
        &trace,
        &[&energy[..], &by("module")].concat(),
    )?;
    replay(
        &optape,
        "The whole run, per stage",
        &trace,
        &[&energy[..], &by("stage")].concat(),
    )?;
    replay(
        &optape,
        "One image of the test set, per module",
        &trace,
        &[&energy[..], &test, &per_image, &by("module")].concat(),
    )?;
    println!(
        "\nAll of this came from {} in {:.0} s, training included. Ask it something else:\n  {} replay --help",
        trace.display(),
        started.elapsed().as_secs_f64(),
        optape.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Runs the program under the recorder, lets its output pass, and takes what it says last.
fn train(record: &mut Command) -> anyhow::Result<Trained> {
    use std::io::{BufRead, BufReader};

    println!("$ {}", process::shown(record));
    let mut child = record
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", process::shown(record)))?;
    let mut last = String::new();
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines() {
            last = line.context("cannot read what the program prints")?;
            println!("{last}");
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{} failed: {status}", process::shown(record));
    }
    serde_json::from_str(&last)
        .with_context(|| format!("the program ends with {last:?}, not with its result"))
}

fn replay(optape: &Path, title: &str, trace: &Path, arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new(optape);
    command.arg("replay").arg(trace).args(arguments);
    println!("\n{title}\n$ {}", process::shown(&command));
    process::run(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(script: &str) -> anyhow::Result<Trained> {
        train(Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn the_result_is_the_last_line() {
        let trained = says(r#"echo epoch 1; echo '{"accuracy": 0.9, "train_images": 12, "test_images": 3, "other": 1}'"#).unwrap();
        assert_eq!(
            (trained.accuracy, trained.train_images, trained.test_images),
            (0.9, 12, 3)
        );
    }

    #[test]
    fn a_program_that_fails_or_says_nothing_is_an_error() {
        assert!(
            says(r#"echo '{"accuracy": 0.9, "train_images": 1, "test_images": 1}'; exit 3"#)
                .is_err()
        );
        assert!(says("echo done").unwrap_err().to_string().contains("done"));
    }
}
