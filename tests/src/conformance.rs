//! A replay against the corpus of expected numbers, estimator by estimator: what `cargo xtask conformance` prints and the parity tests
//! hold. The comparison itself is the corpus's own program, `compare.py`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Flags of `optape record`: one preset for everything, watches for what SpikingJelly's monitors see, and the values of these, of which
/// sinabs' rates of single neurons are made.
pub const RECORD: [&str; 10] = [
    "--level",
    "full",
    "--keep",
    "values",
    "--watch",
    "*:input,output",
    "--watch",
    "*Node:v",
    "--watch",
    "*:grad_input,grad_output",
];

/// The rule sets that the corpus has numbers of.
pub const RULES: [&str; 2] = ["spikingjelly-2026-06", "spikingjelly-2.0.0"];

/// What a trace does not hold, and replay refuses therefore: the case, the rules, the estimator. Which results of the backward pass Python
/// still holds, and so the live tool follows, is not recorded.
pub const GAPS: [(&str, &str, &str); 1] = [(
    "p06_train_sgd_momentum",
    "spikingjelly-2.0.0",
    "counters/neuron_state",
)];

/// Flags of `optape replay`, for one of [`RULES`].
#[must_use]
pub fn replay_flags(rules: &str) -> [&str; 7] {
    [
        "--rules", rules, "--range", "measure", "--all", "--format", "json",
    ]
}

/// Parts of the corpus whose numbers depend on the rule set.
pub const OF_RULES: [&str; 2] = ["counters", "energy"];
/// Parts that do not.
pub const OF_ALL_RULES: [&str; 3] = ["monitors", "sinabs", "qualia"];

/// What became of an estimator in a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// So many numbers match, and there are no others.
    Matched(u64),
    /// It is refused, as the live tool refuses it.
    Refused,
    /// Some numbers do not match.
    Deviates {
        /// How many do.
        matched: u64,
        /// Those that do not, as `compare.py` says it.
        findings: Vec<String>,
    },
    /// The replay says why it has none.
    NotComputed(String),
    /// The replay knows nothing of such an estimator.
    Absent,
}

impl Verdict {
    /// As the live tool has it.
    #[must_use]
    pub const fn conforms(&self) -> bool {
        matches!(self, Self::Matched(_) | Self::Refused)
    }

    /// Numbers that match.
    #[must_use]
    pub const fn matched(&self) -> u64 {
        match self {
            Self::Matched(matched) | Self::Deviates { matched, .. } => *matched,
            Self::Refused | Self::NotComputed(_) | Self::Absent => 0,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Matched(matched) => write!(f, "{matched}"),
            Self::Refused => f.write_str("refused"),
            Self::Deviates { matched, findings } => {
                write!(
                    f,
                    "DEVIATES in {} of {}",
                    findings.len(),
                    findings.len() as u64 + matched
                )
            }
            Self::NotComputed(_) => f.write_str("not computed"),
            Self::Absent => f.write_str("absent"),
        }
    }
}

/// Holds a replay's JSON against what a case's live tools say; by `section/name`, of Qualia's `qualia/name/configuration`.
///
/// `python` is an interpreter without arguments. The values of all module scopes are compared in inference cases; in training, live tools
/// leave modules too late.
///
/// # Errors
/// Where `compare.py` cannot be run, or says something that is not understood.
pub fn compare(
    mut python: Command,
    corpus: &Path,
    expected_file: &Path,
    replayed_file: &Path,
    rules: &str,
) -> Result<BTreeMap<String, Verdict>, String> {
    let read = |path: &Path| -> Result<Value, String> {
        let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))
    };
    let (expected, replayed) = (read(expected_file)?, read(replayed_file)?);
    python.arg(corpus.join("compare.py"));
    python.args([expected_file, replayed_file]);
    python.args(["--rules", rules, "--merge-inplace", "--unsupported"]);
    python.arg("--verbose");
    if expected["kind"] == "inference" {
        python.arg("--scopes");
    }
    let output = python
        .output()
        .map_err(|e| format!("cannot run {python:?}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = text.lines().last().unwrap_or_default();
    if !said.ends_with(" missing") {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{python:?} says:\n{text}{error}"));
    }
    let findings = Findings::of(&text);
    let mut verdicts = BTreeMap::new();
    for label in wanted(&expected, rules) {
        let verdict = if in_replay(&replayed, &label) {
            findings.verdict(&label)
        } else {
            without(&replayed, &label)
        };
        verdicts.insert(label, verdict);
    }
    for (label, why) in refusals(&expected, rules) {
        let verdict = if in_replay(&replayed, &label) {
            Verdict::Deviates {
                matched: 0,
                findings: vec![format!("the live tool refuses: {why}")],
            }
        } else if replayed["skipped"][&label].is_string() {
            Verdict::Refused
        } else {
            Verdict::Absent
        };
        verdicts.insert(label, verdict);
    }
    Ok(verdicts)
}

/// The labels of all that a case has numbers of.
fn wanted(expected: &Value, rules: &str) -> Vec<String> {
    let names = |value: &Value| -> Vec<String> {
        let object = value.as_object();
        object
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect()
    };
    let mut labels = Vec::new();
    for section in OF_RULES {
        for name in names(&expected["rules"][rules][section]) {
            labels.push(format!("{section}/{name}"));
        }
    }
    for section in OF_ALL_RULES {
        for name in names(&expected[section]) {
            if section == "qualia" {
                for configuration in names(&expected[section][&name]) {
                    labels.push(format!("{section}/{name}/{configuration}"));
                }
            } else {
                labels.push(format!("{section}/{name}"));
            }
        }
    }
    labels
}

/// The labels of what the live tools refuse, and why.
fn refusals(expected: &Value, rules: &str) -> Vec<(String, String)> {
    let skipped = expected["skipped"].as_object();
    let of_rules = |label: &str| {
        let own = label
            .strip_prefix(rules)
            .and_then(|rest| rest.strip_prefix('/'));
        match own {
            Some(label) => Some(label.to_owned()),
            None if label.starts_with("spikingjelly-") => None,
            None => Some(label.to_owned()),
        }
    };
    skipped
        .into_iter()
        .flatten()
        .filter_map(|(label, why)| {
            let why = why.as_str().unwrap_or_default().to_owned();
            Some((of_rules(label)?, why))
        })
        .collect()
}

fn in_replay(replayed: &Value, label: &str) -> bool {
    let found = label.split('/').try_fold(replayed, |at, part| at.get(part));
    found.is_some_and(|value| !value.is_null())
}

/// Why a replay has nothing of a label.
fn without(replayed: &Value, label: &str) -> Verdict {
    let skipped = |label: &str| replayed["skipped"][label].as_str().map(str::to_owned);
    // Of an estimator with configurations all may be refused at once.
    let whole = label.rsplit_once('/').map(|(whole, _)| whole);
    match skipped(label).or_else(|| skipped(whole?)) {
        Some(why) => Verdict::NotComputed(why),
        None => Verdict::Absent,
    }
}

/// What `compare.py --verbose` says, line by line: kind, path, text.
struct Findings<'t> {
    matched: Vec<&'t str>,
    others: Vec<(&'t str, &'t str)>,
}

impl<'t> Findings<'t> {
    fn of(text: &'t str) -> Self {
        let mut findings = Self {
            matched: Vec::new(),
            others: Vec::new(),
        };
        for line in text.lines() {
            let Some((kind, rest)) = line.split_once(": ") else {
                continue;
            };
            let path = rest.split(": ").next().unwrap_or_default();
            match kind {
                "matched" => findings.matched.push(path),
                "mismatched" | "missing" => findings.others.push((path, line)),
                _ => {}
            }
        }
        findings
    }

    fn verdict(&self, label: &str) -> Verdict {
        let inside = |path: &str| {
            let rest = path.strip_prefix(label);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let matched = self.matched.iter().filter(|path| inside(path)).count() as u64;
        let findings: Vec<String> = self
            .others
            .iter()
            .filter(|(path, _)| inside(path))
            .map(|(_, line)| (*line).to_owned())
            .collect();
        if findings.is_empty() {
            Verdict::Matched(matched)
        } else {
            Verdict::Deviates { matched, findings }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// An interpreter that says what `compare.py` would.
    fn says(text: &str) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("printf '%s\\n' '{text}'"), "sh"]);
        shell
    }

    fn verdicts(said: &str, expected: &Value, replayed: &Value) -> BTreeMap<String, Verdict> {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, value: &Value| {
            let path = directory.path().join(name);
            std::fs::write(&path, value.to_string()).unwrap();
            path
        };
        let (expected, replayed) = (file("e.json", expected), file("r.json", replayed));
        compare(says(said), directory.path(), &expected, &replayed, RULES[0]).unwrap()
    }

    #[test]
    fn every_estimator_gets_its_verdict() {
        let expected = json!({
            "kind": "training",
            "rules": {(RULES[0]): {"counters": {"flop": 1, "flop_more": 1, "state": 1}, "energy": {"simple": 1}}},
            "sinabs": {"analyzer": 1},
            "qualia": {"energy": {"mem8": 1, "mem16": 1}},
            "skipped": {
                "spikingjelly-2026-06/energy/lemaire": "no",
                "spikingjelly-2.0.0/energy/other": "no",
                "spikingjelly-2026-06/energy/neuromc": "no",
                "sinabs/hooks": "no",
            },
        });
        let replayed = json!({
            "counters": {"flop": {}, "flop_more": {}},
            "energy": {"neuromc": {}},
            "qualia": {"energy": {"mem8": []}},
            "skipped": {"counters/state": "level T7 is missing", "energy/lemaire": "no", "qualia/energy": "no spikes"},
        });
        let said = "matched: counters/flop/total: expected 1, got 1\n\
                    matched: counters/flop/scopes/Global/aten.mm.default: expected 1, got 1\n\
                    mismatched: counters/flop_more/total: expected 1, got 2\n\
                    missing: counters/state/total: expected 1\n\
                    matched: qualia/energy/mem8/0: expected 1, got 1\n\
                    3 matched, 1 mismatched, 1 missing";
        let found = verdicts(said, &expected, &replayed);
        let verdict = |label: &str| found[label].clone();
        assert_eq!(verdict("counters/flop"), Verdict::Matched(2));
        assert_eq!(
            verdict("counters/flop_more"),
            Verdict::Deviates {
                matched: 0,
                findings: vec![
                    "mismatched: counters/flop_more/total: expected 1, got 2".to_owned()
                ]
            }
        );
        assert_eq!(
            verdict("counters/state"),
            Verdict::NotComputed("level T7 is missing".to_owned())
        );
        assert_eq!(verdict("energy/simple"), Verdict::Absent);
        assert_eq!(verdict("energy/lemaire"), Verdict::Refused);
        assert!(!verdict("energy/neuromc").conforms(), "it is to be refused");
        assert_eq!(verdict("sinabs/analyzer"), Verdict::Absent);
        assert_eq!(verdict("sinabs/hooks"), Verdict::Absent);
        assert_eq!(verdict("qualia/energy/mem8"), Verdict::Matched(1));
        assert_eq!(
            verdict("qualia/energy/mem16"),
            Verdict::NotComputed("no spikes".to_owned())
        );
        assert!(!found.contains_key("energy/other"), "of other rules");
    }

    #[test]
    fn a_comparison_that_breaks_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        std::fs::write(&path, "{}").unwrap();
        let error = compare(says("Traceback"), directory.path(), &path, &path, RULES[0]);
        assert!(error.unwrap_err().contains("Traceback"));
    }
}
