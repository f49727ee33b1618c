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

/// Op calls per second and core, at least, where events are read.
const EVENTS_PER_SECOND: f64 = 50e6;
/// And where a simulation follows them.
const SIMULATED_PER_SECOND: f64 = 10e6;

/// How often each command runs.
const RUNS: usize = 5;

/// Something that is asked of a trace.
#[derive(Clone, Copy)]
struct Question {
    name: &'static str,
    arguments: &'static [&'static str],
    /// Events per second that are wanted; `None`: it reads none, or is held against another.
    limit: Option<f64>,
}

const fn question(
    name: &'static str,
    arguments: &'static [&'static str],
    limit: Option<f64>,
) -> Question {
    Question {
        name,
        arguments,
        limit,
    }
}

/// Of the trace of `--stats rules`.
const QUESTIONS: [Question; 5] = [
    question(
        "flop, memory_access, mac, ac, synop, from summaries",
        &["--format", "json"],
        None,
    ),
    question(
        "compute energy under 1 000 costs, from summaries",
        &[
            "--energy",
            "compute_fp32",
            "--sweep",
            "e_mac_pj=0..5:lin:1000",
            "--format",
            "csv",
        ],
        None,
    ),
    question(
        "the counters, from events",
        &["--format", "json", "--from-events"],
        Some(EVENTS_PER_SECOND),
    ),
    question(
        "flop alone, from events",
        &["--counters", "flop", "--format", "json", "--from-events"],
        Some(EVENTS_PER_SECOND),
    ),
    question(
        "mac alone, from events",
        &["--counters", "mac", "--format", "json", "--from-events"],
        Some(EVENTS_PER_SECOND),
    ),
];

/// Of the trace of `--level full`.
const FULL_QUESTIONS: [Question; 4] = [
    question(
        "memory_residency",
        &[
            "--rules",
            "spikingjelly-2026-06",
            "--counters",
            "memory_residency",
            "--format",
            "json",
        ],
        Some(SIMULATED_PER_SECOND),
    ),
    question(
        "neuron_state of 2.0.0, forward",
        &[
            "--rules",
            "spikingjelly-2.0.0",
            "--counters",
            "neuron_state",
            "--stage",
            "forward",
            "--format",
            "json",
        ],
        Some(SIMULATED_PER_SECOND),
    ),
    question(
        "NeuroMC",
        &[
            "--rules",
            "spikingjelly-2.0.0",
            "--energy",
            "neuromc",
            "--sweep",
            "dram.read_pj=1300",
            "--format",
            "csv",
        ],
        None,
    ),
    question(
        "NeuroMC under 1 000 costs",
        &[
            "--rules",
            "spikingjelly-2.0.0",
            "--energy",
            "neuromc",
            "--sweep",
            "dram.read_pj=100..2000:log:1000",
            "--format",
            "csv",
        ],
        None,
    ),
];

/// The times of one question.
#[derive(Debug, Serialize)]
struct Answered {
    question: &'static str,
    /// Op calls of the trace.
    events: u64,
    /// Per second, at least.
    limit: Option<f64>,
    /// Of the whole process: start, index, events, report.
    seconds: f64,
}

/// All of them.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    events: u64,
    bytes: u64,
    /// Of the trace of `--level full`.
    full_bytes: u64,
    /// What `optape info` takes: to start, and to open the trace.
    open_seconds: f64,
    answered: Vec<Answered>,
}

/// Makes traces of that many events out of recorded ones and asks.
pub(super) fn measure(
    bench: &Bench<'_>,
    source: &Path,
    full: &Path,
    events: u64,
) -> anyhow::Result<Measured> {
    let mut answered = Vec::new();
    let mut of = |source: &Path, name: &str, questions: &[Question]| -> anyhow::Result<_> {
        let progress = Progress::start(format!("repeating the recorded steps to {events} events"));
        let long = bench.output.join(name);
        let repeated = repeat::repeat(source, &long, events)?;
        progress.done();
        let progress = Progress::start("replaying them on one core");
        for question in questions {
            progress.message(question.name);
            answered.push(Answered {
                question: question.name,
                events: repeated.op_calls,
                limit: question.limit,
                seconds: median_seconds(bench, "replay", &long, question.arguments)?,
            });
        }
        progress.done();
        Ok((repeated, long))
    };
    let (Repeated { op_calls, bytes }, long) = of(source, "repeated.optape", &QUESTIONS)?;
    let (full, _) = of(full, "repeated-full.optape", &FULL_QUESTIONS)?;
    let open_seconds = median_seconds(bench, "info", &long, &[])?;
    Ok(Measured {
        events: op_calls,
        bytes,
        full_bytes: full.bytes,
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

impl Answered {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 events")]
    fn rate(&self) -> f64 {
        // Nothing is taken off: whoever waits for the answer waits for all of it.
        self.events as f64 / self.seconds.max(1e-9)
    }
}

impl Measured {
    pub(super) fn within_limits(&self) -> bool {
        self.answered
            .iter()
            .all(|answered| answered.limit.is_none_or(|limit| answered.rate() >= limit))
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "Replay on one core, the recorded step repeated to {} op calls ({:.0} MB; with `--level full` {:.0} MB), medians of {RUNS}, \
             whole processes; limits: {:.0} M op calls/s where events are read, {:.0} M where a simulation follows them. Starting and opening \
             the trace (`optape info`) is {:.1} ms of each.\n\n\
             | | ms | op calls per second |\n|---|---:|---:|\n",
            self.events,
            self.bytes as f64 / 1e6,
            self.full_bytes as f64 / 1e6,
            EVENTS_PER_SECOND / 1e6,
            SIMULATED_PER_SECOND / 1e6,
            1e3 * self.open_seconds,
        );
        for answered in &self.answered {
            let rate = match answered.limit {
                Some(limit) => format!(
                    "{:.1} M {}",
                    answered.rate() / 1e6,
                    if answered.rate() >= limit {
                        "(kept)"
                    } else {
                        "(TOO SLOW)"
                    }
                ),
                None => "no limit".to_owned(),
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
            events: 10_000_000,
            limit: Some(EVENTS_PER_SECOND),
            seconds,
        };
        Measured {
            events: 10_000_000,
            bytes: 65_000_000,
            full_bytes: 100_000_000,
            open_seconds: 0.004,
            answered: vec![answered],
        }
    }

    #[test]
    fn the_rate_is_that_of_the_whole_process() {
        let fast = measured(0.10);
        assert!((fast.answered[0].rate() - 1e8).abs() < 1.0);
        assert!(fast.within_limits());
        assert!(fast.table().contains("100.0 M (kept)"), "{}", fast.table());
        let slow = measured(0.50);
        assert!(!slow.within_limits());
        assert!(slow.table().contains("(TOO SLOW)"));
    }
}
