//! Statistics are those of the values that an op saw, whatever changed the memory since they were last taken.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::process::Command;

use optape_tests::{Bench, Call, calls_of};
use optape_trace::{Operand, Trace, When, fields};
use serde_json::Value;

/// What the program says, and the calls that it speaks of, one by one.
fn recorded(
    bench: &Bench,
    record: &mut Command,
    wanted: impl Fn(&Call) -> bool,
) -> (Vec<Value>, Vec<Call>) {
    let done = bench.run(record);
    done.expect_code(0);
    let truth = done.report().as_array().unwrap().clone();
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let mut calls = calls_of(&trace, trace.streams()[0].id());
    calls.retain(wanted);
    assert_eq!(calls.len(), truth.len());
    (truth, calls)
}

/// The program computes its own truth; the trace has to agree with every product of it.
fn agrees(statistics: &str, ways: &[&str], at_least: usize) {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("writes.py"), ways);
    let mut record = bench.optape([
        "-q", "record", "-o", "t.optape", "--stats", statistics, "--",
    ]);
    let (truth, calls) = recorded(&bench, record.args(&words), |call| call.op == "aten::mm");
    assert!(truth.len() >= at_least, "{} products", truth.len());
    let mut lies = Vec::new();
    for (at, (call, truth)) in calls.iter().zip(&truth).enumerate() {
        let factor = Operand::Tensor(call.tensor(0).unwrap());
        let found = call
            .statistics
            .iter()
            .find(|(entry, _)| entry.operand == factor && entry.when == When::Before);
        let Some((entry, numbers)) = found else {
            panic!("{truth}: no statistics")
        };
        let (binary, nonzeros, sum) = (
            entry.binary,
            numbers.get(&fields::NONZEROS).copied(),
            numbers.get(&fields::SUM).map(|&s| f64::from_bits(s)),
        );
        let (is_binary, true_nonzeros, true_sum) = (
            truth["binary"].as_bool().unwrap(),
            truth["nonzeros"].as_u64().unwrap(),
            truth["sum"].as_f64(),
        );
        // A look that stops at the first element that is neither 0 nor 1 has no count, and needs none.
        let counted = nonzeros.is_some() || !is_binary;
        let right = binary == Some(is_binary)
            && counted
            && nonzeros.is_none_or(|n| n == true_nonzeros)
            && sum.is_none_or(|s| match true_sum {
                Some(true_sum) => (s - true_sum).abs() <= 1e-4 * (1.0 + true_sum.abs()),
                None => !s.is_finite(),
            });
        if statistics == "all" {
            assert!(
                nonzeros.is_some() && sum.is_some(),
                "{truth}: --stats all has everything"
            );
        }
        if !right {
            let time = if at % 2 == 0 { "first" } else { "second" };
            lies.push(format!("{time} product {truth}\n    recorded as binary={binary:?} nonzeros={nonzeros:?} sum={sum:?}"));
        }
    }
    assert!(
        lies.is_empty(),
        "--stats {statistics}: {} of {} products are wrong:\n{}",
        lies.len(),
        calls.len(),
        lies.join("\n")
    );
}

#[test]
fn whatever_writes_is_seen() {
    agrees("rules", &[], 400);
}

#[test]
fn whatever_writes_is_seen_with_all_statistics() {
    agrees("all", &[], 400);
}

#[test]
fn compiled_kernels_write_unseen() {
    agrees("rules", &["compiled"], 4);
}

#[test]
fn one_input_of_many_convolutions() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("writes.py"), &["convolutions"]);
    let is_one = |call: &Call| {
        call.op == "aten::convolution" && call.signature.tensors[0].dtype.name() == "float32"
    };
    let (truth, calls) = recorded(&bench, &mut bench.record("t.optape", &words), is_one);
    assert_eq!(truth.len(), 28);
    for (call, truth) in calls.iter().zip(&truth) {
        let input = Operand::Tensor(call.tensor(0).unwrap());
        let (_, numbers) = call
            .statistics
            .iter()
            .find(|(entry, _)| entry.operand == input)
            .unwrap();
        assert_eq!(
            numbers.get(&fields::FAN_OUT_NONZEROS).copied(),
            truth["fan_out"].as_u64(),
            "{truth}"
        );
    }
}
