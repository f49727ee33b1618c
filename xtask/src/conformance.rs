//! `cargo xtask conformance`: records every case of the corpus of expected numbers, replays it under each rule set, and prints estimator
//! by case how many numbers are those of the live tools.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::Args;
use optape_tests::conformance::{self, GAPS, OF_ALL_RULES, OF_RULES, RECORD, RULES, Verdict};

use crate::progress::Progress;
use crate::python::Python;
use crate::workspace::Workspace;
use crate::{build, process, python};

/// Options of `cargo xtask conformance`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Write the table to docs/conformance.md
    #[arg(long, conflicts_with = "check")]
    publish: bool,
    /// Fail where docs/conformance.md says anything else
    #[arg(long)]
    check: bool,
    /// Only these cases: p01_mlp_if
    cases: Vec<String>,
}

/// The page that is published.
const PAGE: &str = "docs/conformance.md";

/// By rule set, estimator and case.
type Verdicts = BTreeMap<&'static str, BTreeMap<String, BTreeMap<String, Verdict>>>;

/// Records, replays, compares; fails where anything deviates or is absent.
pub(crate) fn run(options: &Options, workspace: &Workspace) -> anyhow::Result<ExitCode> {
    let Some(corpus) = workspace.parity() else {
        bail!("there is no corpus at ../shared/parity; name it by OPTAPE_PARITY");
    };
    build::check_compiler()?;
    let python = python::prepare(workspace)?;
    let optape = build::release(workspace)?;
    let known = cases(&corpus)?;
    let chosen = choose(&options.cases, &known)?;
    let bench = Bench {
        corpus,
        python,
        optape,
        directory: workspace.output("conformance")?,
    };
    let mut verdicts = Verdicts::new();
    let progress = Progress::start("recording and replaying the corpus");
    for case in &chosen {
        progress.message(case);
        bench.record(case)?;
        for rules in RULES {
            for (label, verdict) in bench.compare(case, rules)? {
                verdicts
                    .entry(rules)
                    .or_default()
                    .entry(label)
                    .or_default()
                    .insert(case.clone(), verdict);
            }
        }
    }
    progress.done();
    let table = table(&chosen, &verdicts);
    println!("{table}");
    let whole = chosen == known;
    let page = workspace.root.join(PAGE);
    if options.publish || options.check {
        if !whole {
            bail!("{PAGE} is about all cases: leave the names away");
        }
        let wanted = page_of(&table);
        if options.publish {
            std::fs::write(&page, &wanted)
                .with_context(|| format!("cannot write {}", page.display()))?;
            eprintln!("xtask: wrote {PAGE}");
        } else if std::fs::read_to_string(&page).ok().as_deref() != Some(&wanted) {
            bail!("{PAGE} says something else; `cargo xtask conformance --publish` writes it");
        }
    }
    Ok(if is_complete(&verdicts) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Everything conforms, but for what is known not to be in a trace; that has to be refused with a reason.
fn is_complete(verdicts: &Verdicts) -> bool {
    let conforms = |rules: &str, label: &str, case: &str, verdict: &Verdict| {
        let refused = matches!(verdict, Verdict::NotComputed(_));
        verdict.conforms() || refused && GAPS.contains(&(case, rules, label))
    };
    verdicts.iter().all(|(rules, estimators)| {
        estimators.iter().all(|(label, by_case)| {
            by_case
                .iter()
                .all(|(case, verdict)| conforms(rules, label, case, verdict))
        })
    })
}

/// The corpus's cases, in order.
fn cases(corpus: &Path) -> anyhow::Result<Vec<String>> {
    let directory = corpus.join("cases");
    let entries = std::fs::read_dir(&directory)
        .with_context(|| format!("cannot read {}", directory.display()))?;
    let mut names: Vec<String> = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "py") {
            names.extend(path.file_stem().map(|s| s.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn choose(asked: &[String], known: &[String]) -> anyhow::Result<Vec<String>> {
    if let Some(unknown) = asked.iter().find(|name| !known.contains(name)) {
        bail!("there is no case {unknown}; known: {}", known.join(", "));
    }
    let is_asked = |name: &&String| asked.is_empty() || asked.contains(name);
    Ok(known.iter().filter(is_asked).cloned().collect())
}

struct Bench {
    corpus: PathBuf,
    python: Python,
    optape: PathBuf,
    directory: PathBuf,
}

impl Bench {
    fn trace(&self, case: &str) -> PathBuf {
        self.directory.join(format!("{case}.optape"))
    }

    fn record(&self, case: &str) -> anyhow::Result<()> {
        let mut record = Command::new(&self.optape);
        record
            .args(["--quiet", "record", "--force", "--monitor", "none", "-o"])
            .arg(self.trace(case))
            .args(RECORD)
            .arg("--")
            .arg(&self.python.interpreter)
            .arg(self.corpus.join("cases").join(format!("{case}.py")))
            // What the programs print, and that a watch finds nothing in some of them.
            .stdout(std::process::Stdio::null());
        self.python.activate(&mut record)?;
        let output = record
            .output()
            .with_context(|| format!("cannot run {}", process::shown(&record)))?;
        if !output.status.success() {
            bail!(
                "{} failed: {}\n{}",
                process::shown(&record),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    fn compare(&self, case: &str, rules: &str) -> anyhow::Result<BTreeMap<String, Verdict>> {
        let mut replay = Command::new(&self.optape);
        replay
            .args(["--quiet", "replay"])
            .arg(self.trace(case))
            .args(conformance::replay_flags(rules));
        let file = self.directory.join(format!("{case}.{rules}.json"));
        std::fs::write(&file, process::output(&mut replay)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        let expected = self.corpus.join("expected").join(format!("{case}.json"));
        conformance::compare(self.python.command(), &self.corpus, &expected, &file, rules)
            .map_err(anyhow::Error::msg)
    }
}

/// The tables: one for each rule set, one for what no rule set changes, and what does not conform.
fn table(cases: &[String], verdicts: &Verdicts) -> String {
    let mut text = String::new();
    for rules in RULES {
        let estimators = verdicts.get(rules).into_iter().flatten();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "## {rules}\n");
        text.push_str(&rows(
            cases,
            estimators.filter(|(label, _)| is_of(label, &OF_RULES)),
        ));
    }
    let estimators = verdicts.get(LAST_RULES).into_iter().flatten();
    let _ = writeln!(text, "## Monitors, sinabs, Qualia\n");
    text.push_str(&rows(
        cases,
        estimators.filter(|(label, _)| is_of(label, &OF_ALL_RULES)),
    ));
    text.push_str(&deviations(verdicts));
    text
}

/// Under which everything is said that no rule set changes.
const LAST_RULES: &str = RULES[RULES.len() - 1];

fn is_of(label: &str, sections: &[&str]) -> bool {
    let section = label.split('/').next();
    sections.iter().any(|of| Some(*of) == section)
}

/// `p01` of `p01_mlp_if`.
fn short(case: &str) -> &str {
    case.split('_').next().unwrap_or(case)
}

fn rows<'v>(
    cases: &[String],
    estimators: impl Iterator<Item = (&'v String, &'v BTreeMap<String, Verdict>)>,
) -> String {
    let heads: Vec<&str> = cases.iter().map(|case| short(case)).collect();
    let mut text = format!(
        "| estimator | {} |\n| --- |{}\n",
        heads.join(" | "),
        " ---: |".repeat(cases.len())
    );
    for (label, by_case) in estimators {
        let cells: Vec<String> = cases
            .iter()
            .map(|case| {
                by_case
                    .get(case)
                    .map_or_else(String::new, Verdict::to_string)
            })
            .collect();
        let _ = writeln!(text, "| {label} | {} |", cells.join(" | "));
    }
    text.push('\n');
    text
}

fn deviations(verdicts: &Verdicts) -> String {
    /// So many numbers of each are shown.
    const SHOWN: usize = 3;
    let (mut numbers, mut refused, mut others) = (0, 0, 0);
    // Of an estimator, why, and the cases.
    let mut lines: BTreeMap<(String, String), Vec<&str>> = BTreeMap::new();
    for (rules, estimators) in verdicts {
        for (label, by_case) in estimators {
            // What no rule set changes is said once.
            let of_all = is_of(label, &OF_ALL_RULES);
            if of_all && *rules != LAST_RULES {
                continue;
            }
            let label = if of_all {
                label.clone()
            } else {
                format!("{rules}, {label}")
            };
            for (case, verdict) in by_case {
                numbers += verdict.matched();
                let why = match verdict {
                    Verdict::Matched(_) => continue,
                    Verdict::Refused => {
                        refused += 1;
                        continue;
                    }
                    Verdict::Absent => "absent, replay has no such estimator".to_owned(),
                    Verdict::NotComputed(why) => format!("not computed, {why}"),
                    Verdict::Deviates { findings, .. } => {
                        let mut shown: Vec<String> = findings.iter().take(SHOWN).cloned().collect();
                        if findings.len() > SHOWN {
                            shown.push(format!("and {} more", findings.len() - SHOWN));
                        }
                        shown.join("; ")
                    }
                };
                others += 1;
                let key = (label.clone(), why.replace('\n', " "));
                lines.entry(key).or_default().push(short(case));
            }
        }
    }
    let mut text = String::from("## What does not conform\n\n");
    if lines.is_empty() {
        text.push_str("Nothing.\n");
    }
    for ((label, why), cases) in &lines {
        let _ = writeln!(text, "* {label} ({}): {why}", cases.join(", "));
    }
    let _ = writeln!(
        text,
        "\n{numbers} numbers match; {refused} refusals of live tools are refusals here, too; {others} cells do not conform."
    );
    text
}

fn page_of(table: &str) -> String {
    format!(
        "\
# Conformance

What SpikingJelly (its rules of June 2026, commit db3b6df0, and of the release 2.0.0), its monitors, sinabs 3.1.3 and Qualia 2.6.0 compute when they \
watch a program live, against what `optape replay` computes from a recording of it. The programs and their numbers are the parity corpus: 16 \
small programs of inference and training. Written by `cargo xtask conformance --publish`, which records each with `optape record {}`, replays it with \
`--range measure --all` under each rule set, and holds the numbers against the corpus with its own `compare.py` (integers exactly, floats within \
a relative 1e-9 or what the corpus allows; all module scopes of inference cases; counts of ops without a rule).

A cell has the number of values that match. `refused`: the live tool refuses the program, and so does replay. `absent`: replay has no such estimator. \
An empty cell: the corpus has no numbers for it.

{table}",
        RECORD.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(label: &str, case: &str, verdict: Verdict) -> Verdicts {
        let mut verdicts = Verdicts::new();
        for rules in RULES {
            verdicts
                .entry(rules)
                .or_default()
                .entry(label.to_owned())
                .or_default()
                .insert(case.to_owned(), verdict.clone());
        }
        verdicts
    }

    #[test]
    fn what_no_rule_set_changes_is_counted_once() {
        let cases = ["p01_mlp".to_owned()];
        let text = table(
            &cases,
            &cell("counters/flop", "p01_mlp", Verdict::Matched(4)),
        );
        assert!(text.contains("| estimator | p01 |\n| --- | ---: |\n| counters/flop | 4 |"));
        assert!(text.contains("\n8 numbers match; 0 refusals"), "{text}");
        let text = table(&cases, &cell("sinabs/analyzer", "p01_mlp", Verdict::Absent));
        assert!(text.contains("* sinabs/analyzer (p01): absent"), "{text}");
        assert!(text.contains("1 cells do not conform"), "{text}");
    }

    #[test]
    fn known_gaps_have_to_be_refused() {
        let (case, rules, label) = GAPS[0];
        let with = |verdict: Verdict| {
            let by_case = BTreeMap::from([(case.to_owned(), verdict)]);
            let estimators = BTreeMap::from([(label.to_owned(), by_case)]);
            let rules = RULES.into_iter().find(|known| *known == rules).unwrap();
            is_complete(&Verdicts::from([(rules, estimators)]))
        };
        assert!(with(Verdict::NotComputed("not recorded".to_owned())));
        assert!(with(Verdict::Matched(1)));
        assert!(!with(Verdict::Absent));
        assert!(!with(Verdict::Deviates {
            matched: 1,
            findings: Vec::new()
        }));
    }

    #[test]
    fn a_case_that_does_not_exist_is_an_error() {
        let known = ["a".to_owned(), "b".to_owned()];
        assert_eq!(choose(&[], &known).unwrap(), known);
        assert_eq!(choose(&known[1..], &known).unwrap(), known[1..]);
        assert!(choose(&["c".to_owned()], &known).is_err());
    }
}
