//! The processes that run the workload, one per row of the table.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::process;

/// A process of `bench/worker.py`, ready to run steps.
pub(super) struct Worker {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Worker {
    /// Starts it; [`Worker::ready`] waits until it is warm. What it says on stderr goes to `log`.
    pub(super) fn start(command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let stderr =
            File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot run {}", process::shown(command)))?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("the worker has no stdout")?);
        Ok(Self {
            child,
            requests,
            answers,
            log: log.to_owned(),
        })
    }

    /// Waits until it is warm, and returns what it says of itself.
    pub(super) fn ready(&mut self) -> anyhow::Result<Value> {
        self.answer()
    }

    /// Runs that many steps, and returns the seconds per step.
    pub(super) fn run(&mut self, steps: u32) -> anyhow::Result<f64> {
        let answer = self.ask(&format!("run {steps}"))?;
        let seconds = answer["seconds"]
            .as_f64()
            .with_context(|| format!("the worker says {answer}"))?;
        Ok(seconds / f64::from(steps))
    }

    /// How many op calls a step makes.
    pub(super) fn count(&mut self) -> anyhow::Result<u64> {
        let answer = self.ask("count")?;
        answer["ops"]
            .as_u64()
            .with_context(|| format!("the worker says {answer}"))
    }

    /// Lets it end, and waits for it.
    pub(super) fn quit(mut self) -> anyhow::Result<()> {
        drop(self.requests.take());
        let status = self.child.wait()?;
        if !status.success() {
            bail!("a worker ended with {status}; {}", self.last_words());
        }
        Ok(())
    }

    fn ask(&mut self, request: &str) -> anyhow::Result<Value> {
        if let Some(requests) = &mut self.requests {
            writeln!(requests, "{request}").with_context(|| self.last_words())?;
        }
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.answers.read_line(&mut line)? == 0 {
                bail!("the worker ended early; {}", self.last_words());
            }
            if let Some(answer) = line.strip_prefix("bench ") {
                return serde_json::from_str(answer)
                    .with_context(|| format!("the worker says {answer:?}"));
            }
        }
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = text
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("nothing");
        format!("its last words in {}: {last}", self.log.display())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.requests.take());
        // One that was not let end (an error elsewhere) must not outlive us. Where it has ended, neither does anything.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (tempfile::TempDir, anyhow::Result<Worker>) {
        let directory = tempfile::tempdir().unwrap();
        let worker = Worker::start(
            Command::new("sh").args(["-c", script]),
            &directory.path().join("log"),
        );
        (directory, worker)
    }

    #[test]
    fn answers_are_found_among_other_output() {
        let (_directory, worker) = shell(
            r#"echo noise; echo 'bench {"ready": true}'; read line; echo noise; echo 'bench {"seconds": 1.5}'; read line"#,
        );
        let mut worker = worker.unwrap();
        assert_eq!(worker.ready().unwrap()["ready"], true);
        assert_eq!(worker.run(3).unwrap(), 0.5);
        assert!(worker.quit().is_err(), "`read` fails at the end of stdin");
    }

    #[test]
    fn one_that_dies_is_an_error_with_its_last_words() {
        let (_directory, worker) = shell("echo no torch here >&2; exit 1");
        let error = worker.unwrap().ready().unwrap_err().to_string();
        assert!(error.contains("no torch here"), "{error}");
    }
}
