//! What torch.compile runs outside of the dispatcher: opaque regions with names, and the exact count with `--eager`.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;

use optape_tests::{Bench, calls_of};
use optape_trace::{Event, Trace};
use serde_json::{Value, json};

/// Records `regions.py WHAT` with more flags of `optape record`; gives its report.
fn record(bench: &Bench, trace: &str, flags: &[&str], what: &[&str]) -> Value {
    let mut record = bench.optape(["-q", "record", "-o", trace]);
    record
        .args(flags)
        .arg("--")
        .args(bench.words(&Bench::program("regions.py"), what))
        // Nothing is left for another test, and nothing taken from one.
        .env("TORCHINDUCTOR_CACHE_DIR", bench.path("inductor"))
        .env("TORCHINDUCTOR_COMPILE_THREADS", "1");
    let done = bench.run(&mut record);
    done.expect_code(0);
    assert_eq!(done.stderr, "");
    done.report()
}

/// Names of the regions of a trace, in order.
fn regions(trace: &Trace) -> Vec<String> {
    let stream = &trace.streams()[0];
    let mut names = Vec::new();
    for (_, moment) in trace.moments(stream.id()).unwrap() {
        if let Event::Opaque { name, duration_ns } = moment.event {
            assert!(duration_ns > 0);
            names.push(stream.dictionary().text(name).unwrap().clone());
        }
    }
    names
}

/// What is said of compiled graphs, by name.
fn facts(trace: &Trace) -> BTreeMap<String, Value> {
    let stream = &trace.streams()[0];
    let mut facts = BTreeMap::new();
    for (_, moment) in trace.moments(stream.id()).unwrap() {
        if let Event::Fact { key, value, .. } = moment.event
            && stream
                .dictionary()
                .text(key)
                .unwrap()
                .starts_with("compiled.")
        {
            let fact: Value = serde_json::from_str(&value).unwrap();
            facts.insert(fact["name"].as_str().unwrap().to_owned(), fact);
        }
    }
    facts
}

#[test]
fn compiled_graphs_are_opaque_regions_with_names() {
    let Some(bench) = Bench::new() else { return };
    let compiled = record(&bench, "c.optape", &[], &["train"]);
    let trace = Trace::open(&bench.path("c.optape")).unwrap();
    let (forward, backward) = (
        "compiled Net.forward [0/0]",
        "compiled Net.forward [0/0] backward",
    );
    assert_eq!(regions(&trace), [forward, backward].repeat(3));
    let facts = facts(&trace);
    for name in [forward, backward] {
        let fact = &facts[name];
        assert_eq!(fact["devices"], json!(["cpu"]));
        let kernels = fact["kernels"].as_array().unwrap();
        assert!(!kernels.is_empty());
        assert!(
            kernels
                .iter()
                .all(|kernel| kernel.as_str().unwrap().starts_with("cpp_fused")),
            "{kernels:?}"
        );
    }
    // The products of the network are ops, also in compiled code.
    let calls = calls_of(&trace, trace.streams()[0].id());
    assert!(calls.iter().any(|call| call.op.contains("mm")));
    assert!(!calls.iter().any(|call| call.op == "aten::sigmoid"));

    let replayed = bench.replay("c.optape", &[]);
    let coverage = &replayed["coverage"];
    assert_eq!(coverage["opaque_regions"], 6);
    assert_eq!(coverage["opaque_names"], json!({ forward: 3, backward: 3 }));
    let first = bench.replay("c.optape", &["--step", "1"]);
    assert_eq!(first["coverage"]["opaque_regions"], 2);
    let table = bench.run(&mut bench.optape(["replay", "c.optape"]));
    table.expect_code(0);
    let expected = format!("opaque: {forward} (3), {backward} (3)");
    assert!(
        table.stdout.contains("opaque: 6 regions") && table.stdout.contains(&expected),
        "{}",
        table.stdout
    );
    let info = bench.run(&mut bench.optape(["info", "c.optape"]));
    let expected = format!("6 regions outside of the dispatcher: {forward} (3), {backward} (3)");
    assert!(info.stdout.contains(&expected), "{}", info.stdout);
    let dump = bench.run(&mut bench.optape(["dump", "c.optape"]));
    assert_eq!(
        dump.stdout
            .matches(&format!(" opaque {forward} duration="))
            .count(),
        3
    );

    // The exact count: that of the program that compiles nothing.
    let eager = record(&bench, "e.optape", &["--eager"], &["train"]);
    assert_eq!(
        regions(&Trace::open(&bench.path("e.optape")).unwrap()),
        [""; 0]
    );
    let exact = bench.replay("e.optape", &[]);
    assert_eq!(exact["coverage"]["opaque_regions"], 0);
    let flop = |report: &Value| report["counters"]["flop"]["total"].as_i64().unwrap();
    assert!(flop(&exact) > flop(&replayed), "sigmoid and its gradient");
    let losses = |report: &Value| -> Vec<f64> {
        let losses = report["train"].as_array().unwrap();
        losses.iter().map(|loss| loss.as_f64().unwrap()).collect()
    };
    for (a, b) in losses(&compiled).iter().zip(losses(&eager)) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn code_without_kernels_of_its_own_is_no_region() {
    let Some(bench) = Bench::new() else { return };
    let report = record(&bench, "t.optape", &[], &["products"]);
    assert_eq!(report["products"], 27.0);
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert_eq!(regions(&trace), [""; 0]);
    let calls = calls_of(&trace, trace.streams()[0].id());
    assert!(calls.iter().any(|call| call.op.starts_with("aten::mm")));
}

/// What was found of values inside of a region is not believed any more within it.
#[test]
fn what_compiled_code_wrote_is_looked_at_again() {
    let Some(bench) = Bench::new() else { return };
    let report = record(&bench, "t.optape", &[], &["writes"]);
    assert_eq!(report["writes"], json!([512.0, 0.0]));
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert_eq!(regions(&trace).len(), 1);
    let calls = calls_of(&trace, trace.streams()[0].id());
    let products: Vec<_> = calls
        .iter()
        .filter(|call| call.op.starts_with("aten::mm"))
        .collect();
    let nonzeros: Vec<Option<u64>> = products.iter().map(|call| call.nonzeros(0)).collect();
    assert_eq!(nonzeros, [Some(8), Some(64), Some(0)]);
    // The second and the third read the same memory; else this test would show nothing.
    let storage = |at: usize| {
        let tensor = products[at].tensor(0).unwrap();
        products[at].record.storages[usize::from(tensor)]
    };
    assert_eq!(storage(1), storage(2));
}

#[test]
fn every_compilation_has_its_name() {
    let Some(bench) = Bench::new() else { return };
    record(&bench, "t.optape", &[], &["named"]);
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let names = ["[0/0]", "[0/1]", "[0/0]"].map(|id| format!("compiled named.<locals>.own {id}"));
    assert_eq!(regions(&trace), names);
    // From the compiler's cache, in another process.
    record(&bench, "again.optape", &[], &["named"]);
    let again = Trace::open(&bench.path("again.optape")).unwrap();
    assert_eq!(regions(&again), names);
    let kernels = |trace: &Trace| -> Vec<Value> {
        let facts = facts(trace);
        facts.values().map(|fact| fact["kernels"].clone()).collect()
    };
    assert_eq!(kernels(&again), kernels(&trace));
}
