//! `cargo xtask bench`: what recording costs, beside the other tools; what a trace weighs; how fast replay reads it.
//!
//! How it is measured, and why so, stands in `docs/overhead.md`.

mod overhead;
mod repeat;
mod replay;
mod table;
mod worker;

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Args;
use optape_trace::Trace;
use serde::{Deserialize, Serialize};

use crate::progress::Progress;
use crate::python::{self, Python};
use crate::workspace::Workspace;
use crate::{build, process};
use overhead::{Bench, Cores, Setting};

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Twenty turns in one generation of processes: minutes instead of a quarter of an hour
    #[arg(long)]
    quick: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Write the tables into README.md, in place of those that are there
    #[arg(long)]
    readme: bool,
    /// End with an error where a limit is exceeded
    #[arg(long)]
    check: bool,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// What recording costs
    Overhead,
    /// Bytes per op on disk
    Size,
    /// Events per second in replay
    Replay,
}

/// Bytes per op of a trace may be at most this, at `--stats rules`.
const BYTES_PER_OP: f64 = 6.5;

/// So many that starting does not count, and no stream is read but for what is asked.
const REPLAYED_EVENTS: u64 = 10_000_000;

/// Measures, prints, and keeps the raw numbers under `target/bench`.
pub(crate) fn run(options: &Options, workspace: &Workspace) -> anyhow::Result<ExitCode> {
    build::check_compiler()?;
    let python = python::prepare(workspace)?;
    let optape = build::release(workspace)?;
    let output = workspace.output("bench")?;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let cores = Cores::find();
    let bench = Bench {
        workspace,
        python: &python,
        optape: &optape,
        output: &output,
        cores,
    };

    let mut text = machine(&python, &bench.cores)?;
    let mut kept = true;
    let mut settings_here = settings(options.quick);
    if has_gpu(&python)? {
        settings_here.extend(gpu_settings(options.quick));
    } else {
        text.push_str("\nRows on a GPU: NOT RUN, torch sees none here.\n");
    }
    for setting in settings_here {
        // The other parts read a trace of the first setting.
        let needed = setting.batch == 8
            && setting.suffix().is_empty()
            && !(bench.rules_trace(setting).is_file() && bench.full_trace(setting).is_file());
        if !wanted(Part::Overhead) && !needed {
            continue;
        }
        let measured = bench.overhead(setting)?;
        let cores = setting.suffix();
        save(
            &output.join(format!("overhead-batch{}{cores}.json", setting.batch)),
            &measured,
        )?;
        kept &= table::within_limits(&measured);
        write!(text, "\n{}", table::overhead(&measured))?;
    }
    let trace = bench.rules_trace(settings(options.quick)[0]);
    if wanted(Part::Size) {
        let sizes = sizes(&bench, &trace)?;
        save(&output.join("sizes.json"), &sizes)?;
        kept &= sizes.optape_bytes_per_op <= BYTES_PER_OP;
        write!(text, "\n{}", sizes.table())?;
    }
    if wanted(Part::Replay) {
        let full = bench.full_trace(settings(options.quick)[0]);
        let measured = replay::measure(&bench, &trace, &full, REPLAYED_EVENTS)?;
        save(&output.join("replay.json"), &measured)?;
        kept &= measured.within_limits();
        write!(text, "\n{}", measured.table())?;
    }
    print!("{text}");
    fs::write(output.join("bench.md"), &text)?;
    if options.readme {
        put_into_readme(&workspace.root.join("README.md"), &text)?;
    }
    Ok(if options.check && !kept {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Whether torch sees a GPU.
fn has_gpu(python: &Python) -> anyhow::Result<bool> {
    let output = Command::new(&python.interpreter)
        .args(["-c", "import torch; print(torch.cuda.is_available())"])
        .output()
        .context("cannot ask torch for a GPU")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim() == "True")
}

/// One step that is bound by launches, and one that fills the device.
fn gpu_settings(quick: bool) -> [Setting; 2] {
    let generations = if quick { 1 } else { 3 };
    [8, 8192].map(|batch| Setting {
        batch,
        all_cores: true,
        gpu: true,
        steps: 24,
        repetitions: 20,
        generations,
    })
}

fn settings(quick: bool) -> Vec<Setting> {
    let (repetitions, generations) = if quick { (20, 1) } else { (20, 3) };
    let setting = |batch, all_cores, steps| Setting {
        batch,
        all_cores,
        gpu: false,
        steps,
        repetitions,
        generations,
    };
    vec![
        setting(8, false, 24),
        setting(128, false, 6),
        setting(8, true, 24),
        setting(128, true, 6),
    ]
}

fn save(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    fs::write(path, serde_json::to_string_pretty(value)?)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// What it was measured on.
fn machine(python: &Python, cores: &Cores) -> anyhow::Result<String> {
    let processor = fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            Some(
                text.lines()
                    .find(|line| line.starts_with("model name"))?
                    .split_once(": ")?
                    .1
                    .to_owned(),
            )
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let versions = "import platform, torch; from importlib.metadata import version as v; \
         print(f'Python {platform.python_version()}, torch {torch.__version__}, SpikingJelly {v(\"spikingjelly\")}')";
    let versions = process::output(python.command().args(["-c", versions]))?;
    Ok(format!(
        "Measured on {processor}, {} cores, {}, with `cargo xtask bench`.\n",
        cores.count,
        versions.trim()
    ))
}

/// Bytes per op of what the recorders write.
#[derive(Debug, Serialize)]
struct Sizes {
    optape_ops: u64,
    optape_bytes: u64,
    optape_bytes_per_op: f64,
    others: Others,
}

/// What `bench/sizes.py` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Others {
    calls: u64,
    kineto: Size,
    execution_trace: Size,
}

#[derive(Debug, Serialize, Deserialize)]
struct Size {
    bytes_per_op: f64,
    gzip_bytes_per_op: f64,
}

fn sizes(bench: &Bench<'_>, trace: &Path) -> anyhow::Result<Sizes> {
    let opened = Trace::open(trace).with_context(|| format!("cannot open {}", trace.display()))?;
    let optape_ops: u64 = opened
        .streams()
        .iter()
        .map(optape_trace::Stream::op_calls)
        .sum();
    let optape_bytes = fs::metadata(trace)?.len();
    let progress = Progress::start("bytes per op of the other recorders");
    let mut command = bench.python.command();
    command
        .arg(bench.workspace.root.join("bench/sizes.py"))
        .stderr(std::process::Stdio::null());
    let printed = command
        .output()
        .with_context(|| format!("cannot run {}", process::shown(&command)))?;
    let printed = String::from_utf8_lossy(&printed.stdout);
    let last = printed.lines().last().unwrap_or_default();
    let others =
        serde_json::from_str(last).with_context(|| format!("bench/sizes.py prints {last:?}"))?;
    progress.done();
    #[expect(clippy::cast_precision_loss, reason = "both are far below 2^53")]
    let optape_bytes_per_op = optape_bytes as f64 / optape_ops.max(1) as f64;
    Ok(Sizes {
        optape_ops,
        optape_bytes,
        optape_bytes_per_op,
        others,
    })
}

impl Sizes {
    fn table(&self) -> String {
        let verdict = if self.optape_bytes_per_op <= BYTES_PER_OP {
            "kept"
        } else {
            "EXCEEDED"
        };
        let other = |name: &str, size: &Size| {
            format!(
                "| {name} | {:.0} | {:.0} |\n",
                size.bytes_per_op, size.gzip_bytes_per_op
            )
        };
        format!(
            "Bytes per op on disk, batch 8 (the whole file, {} ops; limit {BYTES_PER_OP}: {verdict}).\n\n| | as written | gzipped |\n|---|---:|---:|\n\
             | optape, `--stats rules`, times in ns | {:.2} | (is compressed) |\n{}{}",
            self.optape_ops,
            self.optape_bytes_per_op,
            other("torch.profiler (Kineto), shapes", &self.others.kineto),
            other("ExecutionTraceObserver", &self.others.execution_trace),
        )
    }
}

const BEGIN: &str = "<!-- begin: cargo xtask bench --readme -->\n";
const END: &str = "<!-- end: cargo xtask bench --readme -->";

fn put_into_readme(path: &Path, tables: &str) -> anyhow::Result<()> {
    let readme =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let replaced = replace_marked(&readme, tables)
        .with_context(|| format!("{} has no marked place for the tables", path.display()))?;
    fs::write(path, replaced).with_context(|| format!("cannot write {}", path.display()))
}

fn replace_marked(text: &str, tables: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!(
        "{before}{BEGIN}\n{}\n\n{END}{after}",
        tables.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_replace_only_what_is_marked() {
        let text = format!("head\n{BEGIN}old\n{END}\ntail\n");
        let replaced = replace_marked(&text, "new\n").unwrap();
        assert_eq!(replaced, format!("head\n{BEGIN}\nnew\n\n{END}\ntail\n"));
        assert_eq!(
            replace_marked(&replaced, "new").as_deref(),
            Some(replaced.as_str())
        );
        assert_eq!(replace_marked("no marks", "new"), None);
    }

    #[test]
    fn the_readme_has_the_place() {
        let readme = include_str!("../../../README.md");
        assert!(replace_marked(readme, "new").is_some());
    }

    #[test]
    fn every_row_gets_at_least_twenty_turns() {
        for setting in settings(true).into_iter().chain(settings(false)) {
            assert!(setting.repetitions * setting.generations >= 20);
        }
    }
}
