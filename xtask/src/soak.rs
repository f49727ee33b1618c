//! `cargo xtask soak`: a long recording at full rate, held against what must not grow; and hundreds of kills at random moments.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use optape_trace::{Stream, Trace, TraceEnd};
use serde::Deserialize;

use crate::progress::Progress;
use crate::workspace::Workspace;
use crate::{build, process, python};

/// Options of `cargo xtask soak`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long to record
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// How often the crash tests kill at random moments; 0 leaves them out
    #[arg(long, default_value_t = 300)]
    kills: u64,
}

/// Resident memory of the recorder, rings included.
const RECORDER_BYTES: u64 = 64 << 20;
/// By so much the program may grow from the first quarter to the end: what the allocator scatters, not what grows with the run.
const GROWTH_BYTES: u64 = 8 << 20;
/// Signatures of the end over those of the first quarter: the rest of the batch sizes may still come.
const MORE_SIGNATURES: f64 = 1.25;
/// How often it is looked.
const INTERVAL: Duration = Duration::from_secs(2);

/// What the program says of itself.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Told {
    seconds: f64,
    steps: u64,
    resident_bytes: u64,
}

/// Records, checks and prints a table; then the crash tests.
pub(crate) fn run(options: &Options, workspace: &Workspace) -> anyhow::Result<ExitCode> {
    if options.minutes <= 0.0 {
        bail!("--minutes is to be more than 0");
    }
    build::check_compiler()?;
    let python = python::prepare(workspace)?;
    let optape = build::release(workspace)?;
    let output = workspace.output("soak")?;
    let trace = output.join("soak.optape");
    let report = output.join("soak.jsonl");
    let _ = fs::remove_file(&report);

    let seconds = options.minutes * 60.0;
    let mut command = Command::new(&optape);
    python.activate(&mut command)?;
    command
        .args(["record", "--force", "--output"])
        .arg(&trace)
        .arg("--")
        .arg(&python.interpreter)
        .arg(workspace.root.join("bench/soak.py"))
        .arg(seconds.to_string())
        .arg(&report);
    let watched = watch(&mut command, &trace, seconds)?;
    let told = read_report(&report)?;
    let checks = checks(&trace, &told, &watched)?;
    let verified = process::succeeds(Command::new(&optape).arg("verify").arg(&trace));
    let text = table(&checks, &told, verified);
    print!("{text}");
    fs::write(output.join("soak.md"), &text)?;
    let mut good = verified && checks.iter().all(|check| check.kept);

    if options.kills > 0 {
        let mut cargo = workspace.cargo();
        python.activate(&mut cargo)?;
        cargo
            .args(["test", "--package", "optape-tests", "--test", "crash"])
            .env("OPTAPE_BIN", &optape)
            .env("OPTAPE_PYTHON", &python.interpreter)
            .env("OPTAPE_CRASH_ROUNDS", options.kills.to_string());
        let passed = process::status(&mut cargo)?.success();
        println!(
            "{} kills at random moments of the process, of the recorder, and of both: {}",
            3 * options.kills,
            if passed { "passed" } else { "FAILED" }
        );
        good &= passed;
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The signatures of the first quarter, and the recorder's resident memory at all times.
struct Watched {
    early_signatures: usize,
    recorder_bytes: Vec<u64>,
}

fn watch(command: &mut Command, trace: &Path, seconds: f64) -> anyhow::Result<Watched> {
    let progress = Progress::start(format!("recording for {seconds:.0} s"));
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", process::shown(command)))?;
    let started = Instant::now();
    let mut watched = Watched {
        early_signatures: 0,
        recorder_bytes: Vec::new(),
    };
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(INTERVAL);
        let file_bytes = fs::metadata(trace).map_or(0, |m| m.len());
        if let Some(recorder_bytes) = resident_bytes(child.id()) {
            watched.recorder_bytes.push(recorder_bytes);
        }
        if watched.early_signatures == 0 && started.elapsed().as_secs_f64() > seconds / 4.0 {
            watched.early_signatures = Trace::open(trace).map_or(0, |trace| signatures(&trace));
        }
        progress.message(&format!(
            "{:.0} of {seconds:.0} s, {} MB",
            started.elapsed().as_secs_f64(),
            file_bytes / 1_000_000
        ));
    };
    progress.done();
    if !status.success() {
        bail!("the recorded program failed: {status}");
    }
    Ok(watched)
}

fn signatures(trace: &Trace) -> usize {
    trace
        .streams()
        .iter()
        .map(|s| s.dictionary().signatures().len())
        .sum()
}

fn resident_bytes(process_id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process_id}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn read_report(path: &Path) -> anyhow::Result<Vec<Told>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let told: Vec<Told> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .with_context(|| path.display().to_string())?;
    if told.len() < 4 {
        bail!(
            "too short to say anything: the program reported {} times",
            told.len()
        );
    }
    Ok(told)
}

/// Something that must hold.
#[derive(Debug)]
struct Check {
    what: &'static str,
    value: String,
    limit: String,
    kept: bool,
}

fn checks(path: &Path, told: &[Told], watched: &Watched) -> anyhow::Result<Vec<Check>> {
    let trace = Trace::open(path).with_context(|| path.display().to_string())?;
    let clean = matches!(trace.end(), TraceEnd::Clean(_));
    let dropped: u64 = trace.streams().iter().map(Stream::dropped_records).sum();
    let peak = watched.recorder_bytes.iter().copied().max().unwrap_or(0);
    // The median of a quarter: single peaks are the allocator's.
    let quarter = |of: &[Told]| {
        let mut bytes: Vec<u64> = of.iter().map(|t| t.resident_bytes).collect();
        bytes.sort_unstable();
        bytes.get(bytes.len() / 2).copied().unwrap_or(0)
    };
    let size = told.len() / 4;
    let (early, late) = (
        quarter(told.get(size..2 * size).unwrap_or(told)),
        quarter(told.get(told.len() - size..).unwrap_or(told)),
    );
    let growth = late.saturating_sub(early);
    let (then, now) = (watched.early_signatures, signatures(&trace));
    #[expect(clippy::cast_precision_loss, reason = "a few thousand at most")]
    let more = now as f64 / then.max(1) as f64;
    let lost_structures: u64 = trace
        .streams()
        .iter()
        .filter_map(|s| s.end()?.costs.get("capture.lost_structures").copied())
        .sum();
    let steps = told.last().map_or(0, |t| t.steps);
    let megabytes = |bytes: u64| format!("{:.1} MB", bytes_to_megabytes(bytes));
    Ok(vec![
        Check {
            what: "recorder, resident at most",
            value: megabytes(peak),
            limit: megabytes(RECORDER_BYTES),
            kept: peak > 0 && peak <= RECORDER_BYTES,
        },
        Check {
            what: "program, grown from the second quarter to the last",
            value: megabytes(growth),
            limit: megabytes(GROWTH_BYTES),
            kept: growth <= GROWTH_BYTES,
        },
        Check {
            what: "signatures in all, over those of the first quarter",
            value: format!("{now} / {then}"),
            limit: format!("{MORE_SIGNATURES}"),
            kept: then > 0 && more <= MORE_SIGNATURES,
        },
        Check {
            what: "calls whose structure found no room",
            value: lost_structures.to_string(),
            limit: "0".to_owned(),
            kept: lost_structures == 0,
        },
        Check {
            what: "records dropped",
            value: dropped.to_string(),
            limit: "0".to_owned(),
            kept: dropped == 0,
        },
        Check {
            what: "steps whose end is in the file, of those that ran",
            value: format!("{} / {steps}", optimizer_steps(&trace)?),
            limit: "all".to_owned(),
            kept: clean && optimizer_steps(&trace)? == steps,
        },
    ])
}

fn optimizer_steps(trace: &Trace) -> anyhow::Result<u64> {
    use optape_trace::{Event, StepSource};

    let mut steps = 0;
    for stream in trace.streams() {
        steps += trace
            .moments(stream.id())?
            .iter()
            .filter(|(_, moment)| {
                matches!(
                    moment.event,
                    Event::StepMark {
                        source: StepSource::Optimizer,
                        ..
                    }
                )
            })
            .count() as u64;
    }
    Ok(steps)
}

#[expect(clippy::cast_precision_loss, reason = "rounded for people")]
fn bytes_to_megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn table(checks: &[Check], told: &[Told], verified: bool) -> String {
    let (seconds, steps) = told.last().map_or((0.0, 0), |t| (t.seconds, t.steps));
    let mut text = format!(
        "Recorded for {seconds:.0} s, {steps} steps of Adam with a learning-rate schedule and ten batch sizes.\n\n| | | limit | |\n|---|---:|---:|---|\n"
    );
    for check in checks {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            check.what,
            check.value,
            check.limit,
            if check.kept { "kept" } else { "EXCEEDED" }
        );
    }
    let _ = writeln!(
        text,
        "| the file verifies | {} | yes | {} |",
        if verified { "yes" } else { "no" },
        if verified { "kept" } else { "EXCEEDED" }
    );
    text
}
