//! Running other programs.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;

use anyhow::{Context, bail};

use crate::progress::Progress;

/// The command as one would type it, for messages.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| {
            let word = word.to_string_lossy();
            if word.contains(char::is_whitespace) {
                format!("'{word}'")
            } else {
                word.into_owned()
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs it with our own stdin, stdout and stderr.
pub(crate) fn status(command: &mut Command) -> anyhow::Result<ExitStatus> {
    command
        .status()
        .with_context(|| format!("cannot run {}", shown(command)))
}

/// Runs it with our own stdin, stdout and stderr; anything but success is an error.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Whether it can be run and succeeds, seen or heard by nobody.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// What it prints to stdout; stderr is ours.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", shown(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} printed something that is not UTF-8", shown(command)))
}

/// Runs it behind a progress line that shows what it prints last; where it fails, the end of what it printed is the error.
pub(crate) fn run_behind(command: &mut Command, progress: &Progress) -> anyhow::Result<()> {
    const KEPT: usize = 30;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    let (sender, lines) = mpsc::channel();
    let mut readers = Vec::new();
    if let Some(out) = child.stdout.take() {
        readers.push(forward(out, sender.clone()));
    }
    if let Some(err) = child.stderr.take() {
        readers.push(forward(err, sender.clone()));
    }
    drop(sender);
    let mut last = Vec::new();
    for line in lines {
        progress.message(&line);
        if last.len() == KEPT {
            last.remove(0);
        }
        last.push(line);
    }
    let status = child.wait()?;
    for reader in readers {
        // A reader that panicked has printed why; what it read until then was shown.
        let _ = reader.join();
    }
    if !status.success() {
        bail!("{} failed: {status}\n{}", shown(command), last.join("\n"));
    }
    Ok(())
}

fn forward(
    from: impl std::io::Read + Send + 'static,
    to: mpsc::Sender<String>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if to.send(line).is_err() {
                return;
            }
        }
    })
}
