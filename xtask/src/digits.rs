//! Digits, weights after one epoch and one encoded batch, as files that the Rust example reads.

use std::path::PathBuf;

use anyhow::Context;

use crate::process;
use crate::progress::Progress;
use crate::python::Python;
use crate::workspace::Workspace;

/// Writes them to `target/digits`, where they are not there yet or the program that writes them is newer.
pub(crate) fn export(workspace: &Workspace, python: &Python) -> anyhow::Result<PathBuf> {
    let directory = workspace.root.join("target/digits");
    let program = workspace.root.join("demo/train.py");
    let index = directory.join("index.json");
    let modified =
        |path: &PathBuf| std::fs::metadata(path).and_then(|metadata| metadata.modified());
    if let (Ok(index), Ok(program)) = (modified(&index), modified(&program))
        && index > program
    {
        return Ok(directory);
    }
    let progress = Progress::start("exporting the digits");
    let mut command = python.command();
    command
        .arg(&program)
        .args(["--epochs", "1", "--save"])
        .arg(&directory);
    process::run_behind(&mut command, &progress)
        .context("cannot export the digits for the Rust example")?;
    progress.done();
    Ok(directory)
}
