//! The parity corpus: small programs, and what the tools that watch them live count. A recording of the same program,
//! replayed, has to give the same numbers.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeSet;
use std::path::Path;

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
/// What a trace does not hold: the case, the rules, the estimator. In the backward pass no preset counts the nonzeros of what
/// meets a neuron's state.
const GAPS: [(&str, &str, &str); 1] = [(
    "p06_train_sgd_momentum",
    "spikingjelly-2.0.0",
    "counters/neuron_state",
)];
const RULES: [&str; 2] = ["spikingjelly-2026-06", "spikingjelly-2.0.0"];
/// Sections that do not depend on the rules: everything that the corpus has of them.
const SECTIONS: [&str; 3] = ["monitors", "sinabs", "qualia"];
/// What is recorded beyond the ops: all that the energy models need, what SpikingJelly's monitors see, and the values of what is watched (sinabs'
/// firing rates of single neurons come from them).
const RECORDED: [&str; 10] = [
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

/// For each case, how many values match under each of [`RULES`], and how many of the [`SECTIONS`]: as many as the corpus has. They change only
/// with it.
macro_rules! cases {
    ($($case:ident: $first:literal, $second:literal, $sections:literal;)*) => {
        $(
            #[test]
            fn $case() {
                case(stringify!($case), [$first, $second], $sections);
            }
        )*

        const CASES: &[&str] = &[$(stringify!($case)),*];
    };
}

cases! {
    p01_mlp_if: 399, 371, 490;
    p02_conv_lif_single: 705, 584, 688;
    p03_conv_lif_multi: 747, 634, 227;
    p04_conv_geometry: 1149, 1051, 648;
    p05_grouped_conv: 475, 342, 235;
    p06_train_sgd_momentum: 438, 342, 719;
    p07_train_conv_adam: 344, 435, 236;
    p08_bn_train_eval: 742, 684, 316;
    p09_sew_add: 999, 942, 264;
    p10_bool_spikes: 445, 291, 482;
    p11_attention_bmm: 601, 438, 528;
    p12_ann: 689, 499, 244;
    p13_nested_shared: 1050, 766, 1248;
    p14_sinabs_iaf: 632, 494, 212;
    p15_cnn_if_lif: 788, 657, 3570;
    p16_logical_not: 146, 97, 0;
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

fn case(name: &str, wanted: [u64; 2], wanted_of_sections: u64) {
    let (Some(corpus), Some(bench)) = (parity_corpus(), Bench::new()) else {
        return;
    };
    let program = corpus.join("cases").join(format!("{name}.py"));
    let path = corpus.join("expected").join(format!("{name}.json"));
    let expected: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let record = |trace: &str, flags: &[&str]| {
        let mut record = bench.optape(["-q", "record", "-o", trace]);
        record.args(flags).arg("--");
        record.args(bench.words(&program, &[]));
        bench.run(&mut record).expect_code(0);
    };
    let mut faults = Vec::new();
    record("t.optape", &["--level", "full"]);
    for (rules, wanted) in RULES.into_iter().zip(wanted) {
        let replayed = replay(&bench, "t.optape", rules, &mut faults);
        let file = bench.write(&format!("{rules}.json"), replayed.to_string());
        let of = |section: &str, names: &'static [&'static str]| {
            let there = &expected["rules"][rules][section];
            names
                .iter()
                .copied()
                .filter(|name| !there[*name].is_null())
                .filter(|estimator| {
                    let label = format!("{section}/{estimator}");
                    !GAPS.contains(&(name, rules, label.as_str()))
                })
                .collect::<Vec<_>>()
        };
        for (_, _, label) in GAPS.iter().filter(|gap| gap.0 == name && gap.1 == rules) {
            if !replayed["skipped"][label].is_string() {
                faults.push(format!("{rules}: {label} is no gap any more"));
            }
        }
        let names = [of("counters", &COUNTERS), of("energy", &MODELS)].concat();
        match compare(&bench, &corpus, &path, &expected, rules, &names, &file) {
            Ok(matched) if matched == wanted => {}
            Ok(matched) => faults.push(format!(
                "{rules}: {matched} values match; the table says {wanted}"
            )),
            Err(text) => faults.push(format!("{rules}: {text}")),
        }
        refusals(&bench, &expected, rules, &replayed, &mut faults);
    }
    let sections = SECTIONS.iter().filter_map(|section| expected[*section].as_object());
    let names: Vec<&str> = sections.flat_map(|s| s.keys().map(String::as_str)).collect();
    if !names.is_empty() {
        record("watched.optape", &RECORDED);
        let rules = RULES[1];
        let replayed = replay(&bench, "watched.optape", rules, &mut faults);
        let file = bench.write("sections.json", replayed.to_string());
        match compare(&bench, &corpus, &path, &expected, rules, &names, &file) {
            Ok(matched) if matched == wanted_of_sections => {}
            Ok(matched) => faults.push(format!(
                "{matched} values of monitors, sinabs and Qualia match; the table says {wanted_of_sections}"
            )),
            Err(text) => faults.push(text),
        }
    }
    assert!(faults.is_empty(), "{name}:\n{}", faults.join("\n"));
}

/// Everything, which does not depend on threads, nor on whether events or summaries are read.
fn replay(bench: &Bench, trace: &str, rules: &str, faults: &mut Vec<String>) -> Value {
    let with = |flags: &[&str]| {
        bench.replay(
            trace,
            &[&["--rules", rules, "--range", "measure", "--all"], flags].concat(),
        )
    };
    let replayed = with(&[]);
    for flags in [
        &["--threads", "1", "--from-events"][..],
        &["--threads", "3"],
    ] {
        if with(flags) != replayed {
            faults.push(format!(
                "{rules}: replay of {trace} gives something else with {flags:?}"
            ));
        }
    }
    replayed
}

/// How many values match, or what does not.
fn compare(
    bench: &Bench,
    corpus: &Path,
    path: &Path,
    expected: &Value,
    rules: &str,
    names: &[&str],
    replayed: &Path,
) -> Result<u64, String> {
    let mut python = bench.python([&corpus.join("compare.py"), path, replayed]);
    python.args(["--rules", rules, "--names", &names.join(",")]);
    python.args(["--merge-inplace", "--unsupported"]);
    if expected["kind"] == "inference" {
        python.arg("--scopes");
    }
    let done = bench.run(&mut python);
    let last = done.stdout.lines().last().unwrap_or_default();
    let matched = last
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    match matched {
        Some(matched) if done.code() == 0 => Ok(matched),
        _ => Err(format!("{}{}", done.stdout, done.stderr)),
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
        let of_rules = label
            .strip_prefix(rules)
            .and_then(|rest| rest.strip_prefix('/'));
        // What depends on no rules is refused under all.
        let under_all = SECTIONS
            .iter()
            .any(|section| label.strip_prefix(section).is_some_and(|rest| rest.starts_with('/')));
        let Some(estimator) = of_rules.or(under_all.then_some(label.as_str())) else {
            continue;
        };
        let (section, name) = estimator.split_once('/').unwrap();
        if !under_all && !COUNTERS.contains(&name) && !MODELS.contains(&name) {
            continue;
        }
        if !replayed[section][name].is_null() || !replayed["skipped"][estimator].is_string() {
            faults.push(format!(
                "{rules}: {estimator} has to be refused, as the live tool does: {}",
                skipped[label]
            ));
        }
        let flag = format!("--{section}");
        let asked = bench.run(&mut bench.optape([
            "replay", "t.optape", "--rules", rules, "--range", "measure", &flag, name,
        ]));
        if asked.code() != 4 {
            faults.push(format!(
                "{rules}: asked for {name} by name, replay ends with {} and not 4",
                asked.code()
            ));
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
