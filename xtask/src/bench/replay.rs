//! How fast replay reads a long trace.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;

use crate::bench::overhead::Bench;
use crate::bench::repeat::{self, Repeated};
use crate::bench::table::quantile;
use crate::process;
use crate::progress::Progress;

/// Events per second and core, at least, where events are read.
const EVENTS_PER_SECOND: f64 = 50e6;

/// How often each command runs.
const RUNS: usize = 5;

/// What is asked of the trace: a name, the arguments, and whether every event is read.
const QUESTIONS: [(&str, &[&str], bool); 4] = [
    (
        "flop, memory_access, mac, ac, synop, from summaries",
        &["--format", "json"],
        false,
    ),
    (
        "the same, from events",
        &["--format", "json", "--from-events"],
        true,
    ),
    (
        "flop alone, from events",
        &["--counters", "flop", "--format", "json", "--from-events"],
        true,
    ),
    (
        "mac alone, from events",
        &["--counters", "mac", "--format", "json", "--from-events"],
        true,
    ),
];

/// The times of one question.
#[derive(Debug, Serialize)]
struct Answered {
    question: &'static str,
    reads_events: bool,
    /// Of the whole process: start, index, events, report.
    seconds: f64,
}

/// All of them.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    events: u64,
    bytes: u64,
    /// What `optape info` takes: to start, and to open the trace.
    open_seconds: f64,
    answered: Vec<Answered>,
}

/// Makes a trace of that many events out of a recorded one and asks.
pub(super) fn measure(bench: &Bench<'_>, source: &Path, events: u64) -> anyhow::Result<Measured> {
    let progress = Progress::start(format!("repeating the recorded steps to {events} events"));
    let long = bench.output.join("repeated.optape");
    let Repeated { op_calls, bytes } = repeat::repeat(source, &long, events)?;
    progress.done();

    let progress = Progress::start("replaying them on one core");
    let mut answered = Vec::new();
    for (question, arguments, reads_events) in QUESTIONS {
        progress.message(question);
        answered.push(Answered {
            question,
            reads_events,
            seconds: median_seconds(bench, "replay", &long, arguments)?,
        });
    }
    let open_seconds = median_seconds(bench, "info", &long, &[])?;
    progress.done();
    Ok(Measured {
        events: op_calls,
        bytes,
        open_seconds,
        answered,
    })
}

fn median_seconds(
    bench: &Bench<'_>,
    subcommand: &str,
    trace: &Path,
    arguments: &[&str],
) -> anyhow::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let mut command = bench.cores.on_training_core(bench.optape);
        command
            .arg(subcommand)
            .arg(trace)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let started = Instant::now();
        let output = command
            .output()
            .with_context(|| format!("cannot run {}", process::shown(&command)))?;
        times.push(started.elapsed().as_secs_f64());
        if !output.status.success() {
            bail!(
                "{} failed: {}\n{}",
                process::shown(&command),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
    quantile(times.into_iter(), 0.5).context("nothing was measured")
}

impl Measured {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 events")]
    fn rate(&self, answered: &Answered) -> f64 {
        // Nothing is taken off: whoever waits for the answer waits for all of it.
        self.events as f64 / answered.seconds.max(1e-9)
    }

    pub(super) fn within_limits(&self) -> bool {
        self.answered
            .iter()
            .filter(|answered| answered.reads_events)
            .all(|answered| self.rate(answered) >= EVENTS_PER_SECOND)
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "Replay on one core, the recorded step repeated to {} events ({:.0} MB), medians of {RUNS}, \
             whole processes; limit {:.0} M events/s where events are read. Starting and opening the trace (`optape info`) is {:.1} ms of each.\n\n\
             | | ms | events per second |\n|---|---:|---:|\n",
            self.events,
            self.bytes as f64 / 1e6,
            EVENTS_PER_SECOND / 1e6,
            1e3 * self.open_seconds,
        );
        for answered in &self.answered {
            let rate = if answered.reads_events {
                let rate = self.rate(answered);
                format!(
                    "{:.0} M {}",
                    rate / 1e6,
                    if rate >= EVENTS_PER_SECOND {
                        "(kept)"
                    } else {
                        "(TOO SLOW)"
                    }
                )
            } else {
                "reads no events".to_owned()
            };
            text += &format!(
                "| {} | {:.1} | {rate} |\n",
                answered.question,
                1e3 * answered.seconds
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(seconds: f64) -> Measured {
        let answered = Answered {
            question: "q",
            reads_events: true,
            seconds,
        };
        Measured {
            events: 10_000_000,
            bytes: 65_000_000,
            open_seconds: 0.004,
            answered: vec![answered],
        }
    }

    #[test]
    fn the_rate_is_that_of_the_whole_process() {
        let fast = measured(0.10);
        assert!((fast.rate(&fast.answered[0]) - 1e8).abs() < 1.0);
        assert!(fast.within_limits());
        assert!(fast.table().contains("100 M (kept)"), "{}", fast.table());
        let slow = measured(0.50);
        assert!(!slow.within_limits());
        assert!(slow.table().contains("(TOO SLOW)"));
    }
}
