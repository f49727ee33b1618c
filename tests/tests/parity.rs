//! The parity corpus: small programs, and what the tools that watch them live count. A recording of the same program,
//! replayed, has to give the same numbers.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeSet;
use std::path::Path;

use optape_tests::conformance::{self, GAPS, RULES, Verdict};
use optape_tests::{Bench, parity_corpus, workspace};
use serde_json::Value;

const COUNTERS: [&str; 15] = [
    "flop",
    "memory_access",
    "mac",
    "ac",
    "synop",
    "neuron_state",
    "lemaire_addressing",
    "memory_residency",
    "memory_residency_small",
    "neuromc_add",
    "neuromc_mul",
    "neuromc_cmp",
    "neuromc_sqrt",
    "neuromc_mux",
    "neuromorphic_memory_access",
];
const MODELS: [&str; 15] = [
    "compute_fp32",
    "compute_fp16",
    "compute_int8",
    "simple_fp32",
    "simple_fp16",
    "simple_int8",
    "lemaire",
    "lemaire_no_sparse",
    "lemaire_nonstrict",
    "neuromc",
    "spikesim_dense",
    "spikesim_event",
    "spikesim_event_xbar4_sram",
    "spikesim_dense_nonstrict",
    "spikesim_event_nonstrict",
];
/// What a recording without any flag suffices for: the first of [`COUNTERS`] and of [`MODELS`].
const BY_DEFAULT: (usize, usize) = (5, 3);

/// For each case, how many values match under each of [`RULES`]: as many as the corpus has. They change only with it.
macro_rules! cases {
    ($($case:ident: $first:literal, $second:literal;)*) => {
        $(
            #[test]
            fn $case() {
                case(stringify!($case), [$first, $second]);
            }
        )*

        const CASES: &[&str] = &[$(stringify!($case)),*];
    };
}

cases! {
    p01_mlp_if: 399, 371;
    p02_conv_lif_single: 705, 584;
    p03_conv_lif_multi: 747, 634;
    p04_conv_geometry: 1149, 1051;
    p05_grouped_conv: 475, 342;
    p06_train_sgd_momentum: 438, 342;
    p07_train_conv_adam: 344, 435;
    p08_bn_train_eval: 742, 684;
    p09_sew_add: 999, 942;
    p10_bool_spikes: 445, 291;
    p11_attention_bmm: 601, 438;
    p12_ann: 689, 499;
    p13_nested_shared: 1050, 766;
    p14_sinabs_iaf: 632, 494;
    p15_cnn_if_lif: 788, 657;
    p16_logical_not: 146, 97;
}

#[test]
fn every_case_of_the_corpus_is_in_the_table() {
    let Some(corpus) = parity_corpus() else {
        return;
    };
    let names = std::fs::read_dir(corpus.join("cases"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let stem = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    let there: BTreeSet<String> = names
        .filter(|path| path.extension().is_some_and(|e| e == "py"))
        .map(|path| stem(&path))
        .collect();
    let known: BTreeSet<String> = CASES.iter().map(|&name| name.to_owned()).collect();
    assert_eq!(there, known);
}

fn case(name: &str, wanted: [u64; 2]) {
    let (Some(corpus), Some(bench)) = (parity_corpus(), Bench::new()) else {
        return;
    };
    let program = corpus.join("cases").join(format!("{name}.py"));
    for (file, level) in [
        ("t.optape", &["--level", "full"][..]),
        ("default.optape", &[]),
    ] {
        let mut record = bench.optape(["-q", "record", "-o", file]);
        record
            .args(level)
            .arg("--")
            .args(bench.words(&program, &[]));
        bench.run(&mut record).expect_code(0);
    }

    let path = corpus.join("expected").join(format!("{name}.json"));
    let expected: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut faults = Vec::new();
    for (rules, wanted) in RULES.into_iter().zip(wanted) {
        let replayed = bench.replay(
            "t.optape",
            &["--rules", rules, "--range", "measure", "--all"],
        );
        let file = bench.write(&format!("{rules}.json"), replayed.to_string());
        for (_, _, label) in GAPS.iter().filter(|gap| gap.0 == name && gap.1 == rules) {
            if !replayed["skipped"][label].is_string() {
                faults.push(format!("{rules}: {label} is no gap any more"));
            }
        }
        match compare(&bench, &corpus, &path, &expected, rules, &file) {
            Ok(matched) if matched == wanted => {}
            Ok(matched) => faults.push(format!(
                "{rules}: {matched} values match; the table says {wanted}"
            )),
            Err(text) => faults.push(format!("{rules}: {text}")),
        }
        refusals(&bench, &expected, rules, &replayed, &mut faults);
        same_however_it_is_read(&bench, rules, &replayed, &mut faults);
        same_without_flags(&bench, rules, &replayed, &mut faults);
    }
    assert!(faults.is_empty(), "{name}:\n{}", faults.join("\n"));
}

/// How many values match, or what does not.
fn compare(
    bench: &Bench,
    corpus: &Path,
    path: &Path,
    expected: &Value,
    rules: &str,
    replayed: &Path,
) -> Result<u64, String> {
    let python = bench.python::<&str>([]);
    let verdicts = conformance::compare(python, corpus, path, replayed, rules)?;
    let case = expected["case"].as_str().unwrap();
    let known = |label: &str| match label.split_once('/') {
        Some(("counters", name)) => COUNTERS.contains(&name),
        Some(("energy", name)) => MODELS.contains(&name),
        _ => false,
    };
    let (mut matched, mut faults) = (0, Vec::new());
    for (label, verdict) in verdicts.iter().filter(|(label, _)| known(label)) {
        let is_gap = GAPS.contains(&(case, rules, label.as_str()));
        matched += if is_gap { 0 } else { verdict.matched() };
        match verdict {
            _ if is_gap || verdict.conforms() => {}
            Verdict::Deviates { findings, .. } => faults.push(findings.join("\n")),
            other => faults.push(format!("{label}: {other:?}")),
        }
    }
    if faults.is_empty() {
        Ok(matched)
    } else {
        Err(faults.join("\n"))
    }
}

/// What the live tools refuse is refused, and says so.
fn refusals(
    bench: &Bench,
    expected: &Value,
    rules: &str,
    replayed: &Value,
    faults: &mut Vec<String>,
) {
    let Some(skipped) = expected["skipped"].as_object() else {
        return;
    };
    for label in skipped.keys() {
        let Some(estimator) = label
            .strip_prefix(rules)
            .and_then(|rest| rest.strip_prefix('/'))
        else {
            continue;
        };
        let (section, name) = estimator.split_once('/').unwrap();
        if !COUNTERS.contains(&name) && !MODELS.contains(&name) {
            continue;
        }
        if !replayed[section][name].is_null() || !replayed["skipped"][estimator].is_string() {
            faults.push(format!(
                "{rules}: {estimator} has to be refused, as the live tool does: {}",
                skipped[label]
            ));
        }
        let flag = if section == "counters" {
            "--counters"
        } else {
            "--energy"
        };
        let asked = bench.run(&mut bench.optape([
            "replay", "t.optape", "--rules", rules, "--range", "measure", flag, name,
        ]));
        if asked.code() != 4 {
            faults.push(format!(
                "{rules}: asked for {name} by name, replay ends with {} and not 4",
                asked.code()
            ));
        }
    }
}

/// The report does not depend on threads, nor on whether events or summaries are read.
fn same_however_it_is_read(bench: &Bench, rules: &str, replayed: &Value, faults: &mut Vec<String>) {
    for flags in [
        &["--threads", "1", "--from-events"][..],
        &["--threads", "3"],
    ] {
        let again = bench.replay(
            "t.optape",
            &[&["--rules", rules, "--range", "measure", "--all"], flags].concat(),
        );
        if again != *replayed {
            faults.push(format!(
                "{rules}: replay gives something else with {flags:?}"
            ));
        }
    }
}

/// What needs no level is the same of a recording without any flag.
fn same_without_flags(bench: &Bench, rules: &str, replayed: &Value, faults: &mut Vec<String>) {
    let lesser = bench.replay(
        "default.optape",
        &["--rules", rules, "--range", "measure", "--all"],
    );
    let sections = [
        ("counters", &COUNTERS[..BY_DEFAULT.0]),
        ("energy", &MODELS[..BY_DEFAULT.1]),
    ];
    for (section, names) in sections {
        for name in names {
            if lesser[section][name] != replayed[section][name] {
                faults.push(format!(
                    "{rules}: {name} differs in a recording without flags: {} and {}",
                    lesser[section][name], replayed[section][name]
                ));
            }
        }
    }
}

/// The corpus is for these very versions; others count differently.
#[test]
fn the_packages_are_those_of_the_corpus() {
    let (Some(_), Some(bench)) = (parity_corpus(), Bench::new()) else {
        return;
    };
    let code = "import importlib.metadata as m; print(*(m.version(n).split('+')[0] for n in ('torch', 'spikingjelly', 'sinabs')))";
    let done = bench.run(&mut bench.python(["-c", code]));
    assert_eq!(done.expect_code(0).stdout.trim(), "2.13.0 2.0.0 3.1.3");
    assert!(workspace().join("requirements.txt").is_file());
}
