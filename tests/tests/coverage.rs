//! The rules `optape` know every op that networks run: coverage is 100 % of op calls, in every counter.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;

use optape_tests::{Bench, workspace};
use serde_json::Value;

/// Records a command and counts under the rules `optape`.
fn replayed(bench: &Bench, words: &[String]) -> Value {
    bench
        .run(&mut bench.record("t.optape", words))
        .expect_code(0);
    bench.replay("t.optape", &["--rules", "optape"])
}

fn coverage(report: &Value) -> &serde_json::Map<String, Value> {
    let counters = report["coverage"]["counters"].as_object().unwrap();
    assert_eq!(
        counters.keys().collect::<Vec<_>>(),
        ["flop", "memory_access", "mac", "ac", "synop"]
    );
    counters
}

/// Nothing is without a rule or without statistics, and every zero is one by a rule that says why.
fn expect_all(what: &str, report: &Value) {
    let calls = report["coverage"]["op_calls"].as_u64().unwrap();
    assert!(calls > 20, "{what}: {calls} op calls");
    for (counter, coverage) in coverage(report) {
        let known = ["counted", "zero_by_rule"].map(|key| coverage[key].as_u64().unwrap());
        assert_eq!(
            known.iter().sum::<u64>(),
            calls,
            "{what}, {counter}: {coverage:#}"
        );
        assert_eq!(coverage["share"], 1.0, "{what}, {counter}");
    }
}

fn programs(names: &[&str]) {
    let Some(bench) = Bench::new() else { return };
    for name in names {
        let words = bench.words(&Bench::program("coverage.py"), &[name]);
        expect_all(name, &replayed(&bench, &words));
    }
}

#[test]
fn the_demo_network() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&workspace().join("demo/train.py"), &["--epochs", "1"]);
    expect_all("the demo", &replayed(&bench, &words));
}

#[test]
fn resnet_18() {
    programs(&["resnet18", "resnet18_inference"]);
}

#[test]
fn transformers() {
    programs(&[
        "transformer",
        "transformer_generation",
        "encoder_decoder",
        "attention",
    ]);
}

#[test]
fn spiking_networks() {
    programs(&[
        "spiking",
        "spiking_single_step",
        "other_spiking_libraries",
        "sew_resnet",
        "spiking_transformer",
        "online_learning",
    ]);
}

#[test]
fn layers() {
    programs(&[
        "convolutions",
        "norms_and_activations",
        "recurrent",
        "empty",
    ]);
}

#[test]
fn training() {
    programs(&["losses", "optimizers", "mixed_precision"]);
}

#[test]
fn what_stands_around_networks() {
    programs(&["data_and_metrics"]);
}

/// Every program of the file is in one of the tests.
#[test]
fn no_program_is_left_out() {
    let Some(bench) = Bench::new() else { return };
    let program = Bench::program("coverage.py");
    let listed = bench.run(&mut bench.python([program.as_os_str()]));
    let source = std::fs::read_to_string(file!())
        .or_else(|_| std::fs::read_to_string(workspace().join("tests/tests/coverage.rs")))
        .unwrap();
    let listed = listed.expect_code(0);
    assert!(listed.stdout.lines().count() > 15);
    for name in listed.stdout.lines() {
        assert!(source.contains(&format!("\"{name}\"")), "{name}");
    }
}

/// Of nested tensors the trace does not know the sizes: what they cost is said to be unknown, and nothing is made up.
#[test]
fn nested_tensors_are_unknown_and_say_why() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("coverage.py"), &["nested"]);
    let report = replayed(&bench, &words);
    for (counter, coverage) in coverage(&report) {
        let unknown: BTreeMap<String, u64> =
            serde_json::from_value(coverage["unknown_ops"].clone()).unwrap_or_default();
        let why = "a nested tensor, whose sizes the trace does not hold";
        for op in unknown.keys() {
            assert!(op.ends_with(why), "{counter}: {op}");
        }
        let fused = "aten._transformer_encoder_layer_fwd.default: ";
        let counts = unknown.keys().any(|op| op.starts_with(fused));
        assert_eq!(counts, counter != "synop", "{counter}: {unknown:?}");
    }
}
