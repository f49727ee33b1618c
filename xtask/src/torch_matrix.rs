//! `cargo xtask torch-matrix`: which versions of torch can be recorded.
//!
//! For each version an environment of its own under `target/torch-matrix`; in it a short training (the demo's network) runs
//! bare and recorded, as usual and with everything that can be recorded. A version passes where the hook compiles and attaches, all runs
//! print the same losses and end with the same weights, bit for bit, and the traces verify and replay with numbers where there should be some.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::Value;

use crate::build;
use crate::process;
use crate::progress::Progress;
use crate::python::{self, Python};
use crate::workspace::Workspace;

/// The oldest version that is tried: what spikingjelly 2.0.0 asks for. The hook attaches by the entry points that `import torch` loads since 2.5.
const OLDEST: [u64; 3] = [2, 6, 0];

/// What the training needs beside torch.
const PACKAGES: [&str; 2] = ["spikingjelly==2.0.0", "scikit-learn>=1.5"];

/// What is asked of the trace that has everything: what needs lifetimes, facts, module calls and states.
const COUNTERS: &str = "neuron_state,neuromorphic_memory_access";

/// The stages of a training step.
const STAGES: [&str; 4] = ["forward", "loss", "backward", "optimizer"];

/// Options of `cargo xtask torch-matrix`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Versions, separated by commas [default: the oldest that can attach, a middle one and the newest that the package index has]
    #[arg(long, value_name = "VERSIONS", value_delimiter = ',')]
    torch: Vec<String>,
    /// Keep the environments (about 5 GB each), so that the next time is quick
    #[arg(long)]
    keep: bool,
}

/// What was seen of a version.
#[derive(Debug)]
struct Seen {
    version: String,
    /// Where the first thing went wrong, and what was said; nothing where all passed.
    failure: Option<(&'static str, String)>,
    op_calls: u64,
    signatures: u64,
    unattributed: u64,
    /// What replay counts in each stage of the training.
    counts: BTreeMap<&'static str, Value>,
}

/// Tries all, prints the table, and fails where one of them did not pass.
pub(crate) fn run(options: &Options, workspace: &Workspace) -> anyhow::Result<ExitCode> {
    build::check_compiler()?;
    let optape = build::release(workspace)?;
    let versions = if options.torch.is_empty() {
        chosen(&available(&python::base()?)?)?
    } else {
        options.torch.clone()
    };
    let place = workspace.output("torch-matrix")?;
    let mut all = Vec::new();
    for version in &versions {
        let environment = place.join(version);
        let seen = one(version, &environment, &optape, workspace);
        if !options.keep && environment.exists() {
            fs::remove_dir_all(&environment)
                .with_context(|| format!("cannot remove {}", environment.display()))?;
        }
        all.push(seen?);
    }
    print!("{}", table(&all));
    Ok(if all.iter().all(|seen| seen.failure.is_none()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The versions that the package index has for this interpreter.
fn available(python: &Path) -> anyhow::Result<Vec<String>> {
    let mut pip = Command::new(python);
    pip.args([
        "-m",
        "pip",
        "index",
        "versions",
        "--disable-pip-version-check",
        "torch",
    ]);
    let output = pip
        .output()
        .with_context(|| format!("cannot run {}", process::shown(&pip)))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}\n{}",
            process::shown(&pip),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    // What it says beside, that the command is experimental, is of no use to anybody.
    let text = String::from_utf8_lossy(&output.stdout);
    let list = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Available versions:"))
        .with_context(|| format!("pip names no versions of torch:\n{text}"))?;
    Ok(list.split(',').map(|word| word.trim().to_owned()).collect())
}

/// `2.13.0`; `None` of anything that is no plain release.
fn numbers(version: &str) -> Option<[u64; 3]> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let three = [numbers.next()??, numbers.next()??, numbers.next()??];
    numbers.next().is_none().then_some(three)
}

/// The oldest, a middle one and the newest, of those that can attach.
fn chosen(available: &[String]) -> anyhow::Result<Vec<String>> {
    let mut known: Vec<([u64; 3], &String)> = available
        .iter()
        .filter_map(|version| Some((numbers(version)?, version)))
        .filter(|(numbers, _)| *numbers >= OLDEST)
        .collect();
    known.sort();
    let (Some(first), Some(last)) = (known.first(), known.last()) else {
        bail!(
            "the package index has no torch that could be recorded for this Python; it has {}",
            available.join(", ")
        );
    };
    let mut three = vec![
        first.1.clone(),
        known[known.len() / 2].1.clone(),
        last.1.clone(),
    ];
    three.dedup();
    Ok(three)
}

fn one(
    version: &str,
    environment: &Path,
    optape: &Path,
    workspace: &Workspace,
) -> anyhow::Result<Seen> {
    let mut seen = Seen {
        version: version.to_owned(),
        failure: None,
        op_calls: 0,
        signatures: 0,
        unattributed: 0,
        counts: BTreeMap::new(),
    };
    let packages: Vec<String> = std::iter::once(format!("torch=={version}"))
        .chain(PACKAGES.map(str::to_owned))
        .collect();
    let progress = Progress::start(format!(
        "installing torch {version} (up to 5 GB, some minutes)"
    ));
    let python = match python::make(environment, &packages, &progress) {
        Ok(python) => python,
        Err(error) => {
            seen.failure = Some(("installing", format!("{error:#}")));
            return Ok(seen);
        }
    };
    progress.done();
    let progress = Progress::start(format!("recording a training with torch {version}"));
    if let Err((stage, why)) = tried(&mut seen, &python, environment, optape, workspace) {
        seen.failure = Some((stage, why));
    }
    progress.done();
    Ok(seen)
}

type Failed = (&'static str, String);

/// The training, bare and recorded, and the traces.
fn tried(
    seen: &mut Seen,
    python: &Python,
    environment: &Path,
    optape: &Path,
    workspace: &Workspace,
) -> Result<(), Failed> {
    let place = |which: &str, what: &str| environment.join(format!("{which}-{what}"));
    let train = |mut command: Command, which: &str| {
        command
            .args(["demo/train.py", "--epochs", "1", "--save"])
            .arg(place(which, "weights"));
        command
    };
    let bare = train(Command::new(&python.interpreter), "bare");
    let bare = output("the bare training", bare, workspace)?;
    let losses_of_bare = losses(&bare);
    if losses_of_bare.is_empty() {
        return Err(("the bare training", "it prints no losses".to_owned()));
    }

    let usual: &[&str] = &[];
    for (which, flags) in [
        ("usual", usual),
        ("full", &["--level", "full", "--functions"]),
    ] {
        let trace = place(which, "run.optape");
        let mut record = Command::new(optape);
        record
            .args(["record", "--force", "--force-torch", "--monitor", "none"])
            .args(flags)
            .arg("--output")
            .arg(&trace)
            .arg("--")
            .arg(&python.interpreter);
        let recorded = output("the recorded training", train(record, which), workspace)?;
        if !trace.is_file() {
            let said = String::from_utf8_lossy(&recorded.stderr);
            return Err(("attaching", said.trim().to_owned()));
        }
        let losses = losses(&recorded);
        if losses_of_bare != losses {
            let both = format!("{losses_of_bare} bare, {losses} recorded");
            return Err(("the same losses", both));
        }
        let same = same_files(&place("bare", "weights"), &place(which, "weights"))
            .map_err(|error| ("the same weights", format!("{error:#}")))?;
        if let Some(other) = same {
            return Err(("the same weights", format!("{other} differs")));
        }
        let mut verify = Command::new(optape);
        verify.arg("verify").arg(&trace);
        output("verifying", verify, workspace)?;
    }

    let trace = place("usual", "run.optape");
    let report = replayed(optape, &trace, &["--strict", "--by", "stage"], workspace)?;
    seen.op_calls = report["coverage"]["op_calls"].as_u64().unwrap_or(0);
    seen.unattributed = report["coverage"]["unattributed"].as_u64().unwrap_or(0);
    let mut info = Command::new(optape);
    info.arg("info").arg(&trace).args(["--format", "json"]);
    let info = output("reading", info, workspace)?;
    let info: Value =
        serde_json::from_slice(&info.stdout).map_err(|error| ("reading", error.to_string()))?;
    seen.signatures = info[0]["streams"][0]["signatures"].as_u64().unwrap_or(0);
    sane(&report).map_err(|why| ("replaying", why))?;
    seen.counts = STAGES
        .into_iter()
        .filter_map(|stage| Some((stage, group(&report, stage)?["counters"].clone())))
        .collect();

    // What is asked for by name must be held.
    let trace = place("full", "run.optape");
    let asked = ["--rules", "spikingjelly-2.0.0", "--counters", COUNTERS];
    replayed(optape, &trace, &asked, workspace)?;
    Ok(())
}

/// What replay says, as JSON.
fn replayed(
    optape: &Path,
    trace: &Path,
    flags: &[&str],
    workspace: &Workspace,
) -> Result<Value, Failed> {
    let mut replay = Command::new(optape);
    replay.arg("replay").arg(trace).args(flags);
    replay.args(["--format", "json"]);
    let replay = output("replaying", replay, workspace)?;
    serde_json::from_slice(&replay.stdout).map_err(|error| ("replaying", error.to_string()))
}

/// Numbers where a training of a spiking network has some.
fn sane(report: &Value) -> Result<(), String> {
    let counters = ["flop", "memory_access", "mac", "ac", "synop"];
    for counter in counters {
        if report["counters"][counter]["total"].as_u64().unwrap_or(0) == 0 {
            let why = &report["skipped"][format!("counters/{counter}")];
            return Err(format!("{counter} counts nothing ({why})"));
        }
    }
    for stage in STAGES {
        let calls = group(report, stage).and_then(|group| group["calls"].as_u64());
        if calls.unwrap_or(0) == 0 {
            return Err(format!("no op call stands in the stage {stage}"));
        }
    }
    let rates = report["firing_rates"].as_array().map_or(0, Vec::len);
    if rates != 3 {
        return Err(format!("{rates} layers have a firing rate, not 3"));
    }
    match report["coverage"]["dropped_records"].as_u64() {
        Some(0) => Ok(()),
        dropped => Err(format!("{dropped:?} records were dropped")),
    }
}

fn group<'a>(report: &'a Value, stage: &str) -> Option<&'a Value> {
    let groups = report["groups"].as_array()?;
    groups.iter().find(|group| group["key"] == stage)
}

/// Runs it; what it says where it fails is the failure of the stage.
fn output(
    stage: &'static str,
    mut command: Command,
    workspace: &Workspace,
) -> Result<Output, Failed> {
    let output = command
        .current_dir(&workspace.root)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            (
                stage,
                format!("cannot run {}: {error}", process::shown(&command)),
            )
        })?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err((stage, format!("{}: {}", output.status, said.trim())))
}

/// What the training prints while it learns.
fn losses(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| line.starts_with("epoch "));
    lines.collect::<Vec<_>>().join("; ")
}

/// The first file that is not the same in both, if there is one; none at all is an error.
fn same_files(one: &Path, other: &Path) -> anyhow::Result<Option<String>> {
    let read = |place: &Path| -> anyhow::Result<BTreeMap<PathBuf, Vec<u8>>> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(place).with_context(|| place.display().to_string())? {
            let entry = entry?;
            all.insert(entry.file_name().into(), fs::read(entry.path())?);
        }
        Ok(all)
    };
    let (one, other) = (read(one)?, read(other)?);
    if one.is_empty() {
        bail!("the training has saved nothing");
    }
    let names = one.keys().chain(other.keys());
    let differs = names
        .into_iter()
        .find(|name| one.get(*name) != other.get(*name));
    Ok(differs.map(|name| name.display().to_string()))
}

/// How the counts compare with those of the first version that passed.
fn counts(seen: &Seen, first: Option<&Seen>) -> String {
    let Some(first) = first.filter(|first| first.version != seen.version) else {
        return String::new();
    };
    let differ: Vec<&str> = STAGES
        .into_iter()
        .filter(|stage| seen.counts.get(stage) != first.counts.get(stage))
        .collect();
    if differ.is_empty() {
        format!("; counts as with {}", first.version)
    } else {
        let stages = differ.join(", ");
        format!("; other counts than with {} in {stages}", first.version)
    }
}

/// Markdown, as README has it.
fn table(all: &[Seen]) -> String {
    let mut text = "| torch | passed | op calls | signatures | unattributed | |\n|---|---|---:|---:|---:|---|\n".to_owned();
    let first = all.iter().find(|seen| seen.failure.is_none());
    for seen in all {
        let (passed, why) = match &seen.failure {
            None => (
                "yes",
                format!("same losses and weights{}", counts(seen, first)),
            ),
            Some((stage, why)) => {
                let last = why
                    .lines()
                    .rfind(|line| !line.trim().is_empty())
                    .unwrap_or_default();
                ("no", format!("{stage}: {}", last.trim()))
            }
        };
        text.push_str(&format!(
            "| {} | {passed} | {} | {} | {} | {} |\n",
            seen.version,
            seen.op_calls,
            seen.signatures,
            seen.unattributed,
            why.replace('|', "/")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_oldest_a_middle_one_and_the_newest() {
        let all = versions("2.15.0 2.14.1 2.9.0 2.10.0 2.13.0 2.6.0 2.5.1 1.13.1 2.16.0rc1");
        assert_eq!(chosen(&all).unwrap(), ["2.6.0", "2.13.0", "2.15.0"]);
        assert_eq!(chosen(&versions("2.13.0")).unwrap(), ["2.13.0"]);
        let error = chosen(&versions("2.5.1 1.13.1")).unwrap_err().to_string();
        assert!(error.contains("2.5.1, 1.13.1"), "{error}");
    }

    #[test]
    fn only_the_same_files_are_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name);
        for name in ["a", "b"] {
            fs::create_dir(place(name)).unwrap();
        }
        assert!(same_files(&place("a"), &place("b")).is_err());
        fs::write(place("a").join("w"), [1, 2]).unwrap();
        assert_eq!(
            same_files(&place("a"), &place("b")).unwrap().as_deref(),
            Some("w")
        );
        fs::write(place("b").join("w"), [1, 3]).unwrap();
        assert_eq!(
            same_files(&place("a"), &place("b")).unwrap().as_deref(),
            Some("w")
        );
        fs::write(place("b").join("w"), [1, 2]).unwrap();
        assert_eq!(same_files(&place("a"), &place("b")).unwrap(), None);
        assert!(same_files(&place("a"), &place("c")).is_err());
    }

    #[test]
    fn a_report_without_numbers_is_not_sane() {
        let counters: Value = ["flop", "memory_access", "mac", "ac", "synop"]
            .into_iter()
            .map(|name| (name.to_owned(), serde_json::json!({"total": 1})))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let groups: Value = ["forward", "loss", "backward", "optimizer"]
            .map(|key| serde_json::json!({"key": key, "calls": 1}))
            .into_iter()
            .collect();
        let whole = serde_json::json!({
            "counters": counters, "groups": groups, "firing_rates": [1, 2, 3], "coverage": {"dropped_records": 0}
        });
        assert_eq!(sane(&whole), Ok(()));
        for (key, part) in [
            ("counters", serde_json::json!({})),
            ("groups", serde_json::json!([])),
            ("firing_rates", serde_json::json!([1])),
            ("coverage", serde_json::json!({"dropped_records": 2})),
        ] {
            let mut lacking = whole.clone();
            lacking[key] = part;
            assert!(sane(&lacking).is_err(), "{key}");
        }
    }

    #[test]
    fn the_table_says_where_it_failed() {
        let seen = |version: &str, flops: u64, failure| Seen {
            version: version.to_owned(),
            failure,
            op_calls: 3,
            signatures: 2,
            unattributed: 1,
            counts: [("backward", serde_json::json!({"flop": {"total": flops}}))].into(),
        };
        let failure = ("attaching", "much\nthe reason | this\n\n".to_owned());
        let text = table(&[
            seen("2.6.0", 1, Some(failure)),
            seen("2.7.0", 1, None),
            seen("2.8.0", 1, None),
            seen("2.9.0", 2, None),
        ]);
        let lines: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| 2.6.0 | no | 3 | 2 | 1 | attaching: the reason / this |",
                "| 2.7.0 | yes | 3 | 2 | 1 | same losses and weights |",
                "| 2.8.0 | yes | 3 | 2 | 1 | same losses and weights; counts as with 2.7.0 |",
                "| 2.9.0 | yes | 3 | 2 | 1 | same losses and weights; other counts than with 2.7.0 in backward |",
            ]
        );
    }
}
