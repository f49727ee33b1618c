//! Watches of modules and kept values (T8).

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;

use optape_tests::{Bench, Done, parity_corpus, workspace};
use optape_trace::{Elements, Event, Record, Trace, Value, verify};
use serde_json::Value as Json;

fn record(bench: &Bench, flags: &[&str], words: &[String]) -> Done {
    let done = bench.run(
        bench
            .optape(["-q", "record", "-f", "-o", "t.optape"])
            .args(flags)
            .arg("--")
            .args(words)
            // For `import optape`, which the wheel installs.
            .env("PYTHONPATH", workspace().join("recorder/python")),
    );
    done.expect_code(0);
    assert_eq!(verify(&bench.path("t.optape")).unwrap().findings, []);
    done
}

fn watched(bench: &Bench, flags: &[&str], what: &str) -> Done {
    record(
        bench,
        flags,
        &bench.words(&Bench::program("watched.py"), &[what]),
    )
}

/// The kept values by module (without its root) and what was watched.
fn values(bench: &Bench) -> BTreeMap<(String, String), Vec<Value>> {
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = &trace.streams()[0];
    let mut found: BTreeMap<_, Vec<Value>> = BTreeMap::new();
    for value in trace.values(stream.id()) {
        let value = value.unwrap();
        let watch = stream.dictionary().watch(value.watch).unwrap();
        let module = &stream
            .dictionary()
            .module(watch.module.unwrap())
            .unwrap()
            .name;
        let below = module.split_once('.').map_or("", |(_, below)| below);
        found
            .entry((below.to_owned(), watch.what.clone()))
            .or_default()
            .push(value);
    }
    found
}

fn fact(trace: &Trace, wanted: &str) -> Option<String> {
    let stream = &trace.streams()[0];
    let moments = trace.moments(stream.id()).unwrap();
    moments
        .into_iter()
        .find_map(|(_, moment)| match moment.event {
            Event::Fact { key, value, .. } => {
                let key = stream.dictionary().text(key).unwrap();
                (key.starts_with("watch.") && key.ends_with(wanted)).then_some(value)
            }
            _ => None,
        })
}

fn cost(trace: &Trace, name: &str) -> u64 {
    trace.streams()[0].end().unwrap().costs[name]
}

/// The monitors of SpikingJelly, from kept values.
#[test]
fn monitors_of_the_parity_corpus() {
    let (Some(bench), Some(corpus)) = (Bench::new(), parity_corpus()) else {
        return;
    };
    for case in [
        "p03_conv_lif_multi",
        "p06_train_sgd_momentum",
        "p07_train_conv_adam",
        "p10_bool_spikes",
    ] {
        let expected =
            std::fs::read_to_string(corpus.join(format!("expected/{case}.json"))).unwrap();
        let expected: Json = serde_json::from_str(&expected).unwrap();
        let script = corpus
            .join(format!("cases/{case}.py"))
            .canonicalize()
            .unwrap();
        let words = ["python".to_owned(), script.display().to_string()];
        let flags = [
            "--keep",
            "values",
            "--watch",
            "*:input,output",
            "--watch",
            "BaseNode:v",
            "--watch",
            "*:grad_input,grad_output",
        ];
        let done = record(&bench, &flags, &words);
        let near = done.stderr.contains("'BaseNode' matches no module");
        assert_eq!(near, case.starts_with("p10"), "{}", done.stderr);
        let kept = values(&bench);
        let mut compared = 0;
        for (monitor, modules) in expected["monitors"].as_object().unwrap() {
            let what = monitor.trim_start_matches("attribute_");
            for (module, records) in modules.as_object().unwrap() {
                // One object that all neurons share: module_tracker knows it by the last of its names.
                if module.ends_with("surrogate_function") {
                    continue;
                }
                // Of several tensors a record is a list; the further ones have watches of their own.
                let mut wanted: BTreeMap<String, Vec<&Json>> = BTreeMap::new();
                for record in records.as_array().unwrap().iter().filter(|r| !r.is_null()) {
                    let several = record.as_array().cloned().map_or(1, |list| list.len());
                    for place in 0..several {
                        let label = match place {
                            0 => what.to_owned(),
                            n => format!("{what}.{n}"),
                        };
                        let one = record.get(place).unwrap_or(record);
                        wanted.entry(label).or_default().push(one);
                    }
                }
                for (label, records) in wanted {
                    let found = &kept[&(module.clone(), label.clone())];
                    let place = format!("{case} {label} {module}");
                    assert_eq!(found.len(), records.len(), "{place}");
                    for (value, record) in found.iter().zip(records) {
                        same(value, record, &place);
                        compared += 1;
                    }
                }
            }
        }
        assert!(compared > 10, "{case}: {compared} records");
    }
}

fn same(value: &Value, record: &Json, place: &str) {
    assert_eq!(serde_json::json!(value.shape), record["shape"], "{place}");
    assert_eq!(value.dtype.name(), record["dtype"], "{place}");
    let elements = value.to_f64().unwrap();
    let sum: f64 = elements.iter().sum();
    let wanted = record["sum"].as_f64().unwrap();
    assert!(
        (sum - wanted).abs() <= 1e-6 * wanted.abs().max(1.0),
        "{place}: {sum} {wanted}"
    );
    let nonzeros = elements.iter().filter(|e| **e != 0.0).count();
    assert_eq!(serde_json::json!(nonzeros), record["nnz"], "{place}");
    let binary = matches!(value.elements, Elements::Bits(_));
    assert_eq!(binary, !record["firing_rate"].is_null(), "{place}");
}

#[test]
fn spikes_take_little_room() {
    let Some(bench) = Bench::new() else { return };
    for what in ["noise", "small"] {
        let done = watched(
            &bench,
            &["--keep", "spikes", "--watch", "Noise:output"],
            what,
        );
        let report = done.json();
        let kept = values(&bench)
            .remove(&(String::new(), "output".to_owned()))
            .unwrap();
        let spikes: f64 = kept
            .iter()
            .map(|v| v.to_f64().unwrap().iter().sum::<f64>())
            .sum();
        assert_eq!(spikes, report["spikes"].as_f64().unwrap(), "{what}");
        let elements = report["elements"].as_u64().unwrap();
        assert_eq!(kept.iter().map(Value::len).sum::<u64>(), elements);
        let trace = Trace::open(&bench.path("t.optape")).unwrap();
        let frames = trace.streams()[0].values();
        let stored: u64 = frames
            .iter()
            .map(|f| trace.frame_bytes(f.offset).unwrap())
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "a rate is a float")]
        let bits = stored as f64 * 8.0 / elements as f64;
        assert!(bits <= 0.6, "{what}: {bits} bits for each element");
    }
}

#[test]
fn gradients_of_one_call_alone() {
    let Some(bench) = Bench::new() else { return };
    let flags = [
        "--keep",
        "values",
        "--watch",
        "inner:grad_output,grad_input",
        "--watch",
        "Twice:grad_input",
    ];
    let report = watched(&bench, &flags, "gradients").json();
    let kept = values(&bench);
    assert_eq!(kept.len(), 3);
    for ((module, what), found) in kept {
        let wanted: Vec<f64> =
            serde_json::from_value(report[format!("{module}.{what}")].clone()).unwrap();
        assert_eq!(found.len(), 2, "{module} {what}: one for each pass");
        for value in found {
            for (a, b) in value.to_f64().unwrap().iter().zip(&wanted) {
                assert!((a - b).abs() < 1e-6, "{module} {what}: {a} {b}");
            }
        }
    }
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert_eq!(
        trace.run().facts["capture.grad_input"],
        "from the autograd nodes of each call"
    );
}

#[test]
fn attributes_and_several_tensors() {
    let Some(bench) = Bench::new() else { return };
    let flags = [
        "--keep",
        "values",
        "--watch",
        "C?ll:output,input,level,level.before",
    ];
    watched(&bench, &flags, "cell");
    let numbers = |what: &str| -> Vec<f64> {
        let kept = values(&bench)
            .remove(&(String::new(), what.to_owned()))
            .unwrap();
        kept.iter().map(|v| v.to_f64().unwrap()[0]).collect()
    };
    assert_eq!(numbers("input"), [0.0, 1.0, 2.0]);
    assert_eq!(numbers("output"), [1.0, 2.0, 3.0]);
    assert_eq!(numbers("output.1"), [2.0, 3.0, 4.0]);
    assert_eq!(numbers("level"), [0.0, 2.0, 4.0]);
    assert_eq!(
        numbers("level.before"),
        [0.0, 2.0],
        "it is no tensor before the first call"
    );
}

#[test]
fn a_watch_is_switched_off_and_on() {
    let Some(bench) = Bench::new() else { return };
    let done = watched(
        &bench,
        &["--keep", "values", "--watch", "Cell:input,level"],
        "switched",
    );
    assert_eq!(done.json()["refused"], 4);
    let mut kept = values(&bench);
    let mut firsts = |what: &str| -> Vec<f64> {
        let kept = kept.remove(&(String::new(), what.to_owned())).unwrap();
        kept.iter().map(|v| v.to_f64().unwrap()[0]).collect()
    };
    assert_eq!(firsts("input"), [0.0, 1.0, 4.0, 6.0]);
    assert_eq!(firsts("level"), [0.0, 2.0, 8.0, 10.0, 12.0]);
}

#[test]
fn without_keep_there_are_statistics_only() {
    let Some(bench) = Bench::new() else { return };
    watched(&bench, &["--watch", "Cell:input"], "cell");
    assert!(values(&bench).is_empty());
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = &trace.streams()[0];
    let watches = trace
        .records(stream.id())
        .filter(|record| match record.as_ref().unwrap() {
            (_, Record::OpCall(call)) => {
                let signature = stream.dictionary().signature(call.signature).unwrap();
                stream.dictionary().op(signature.op).unwrap().name == "optape::watch"
            }
            _ => false,
        });
    assert_eq!(watches.count(), 3);
}

#[test]
fn wrong_watches_are_told_and_harm_nothing() {
    let Some(bench) = Bench::new() else { return };
    let done = watched(&bench, &["--watch", "Cel:input"], "cell");
    done.expect_message("'Cel' matches no module; near: Cell");
    let done = watched(&bench, &["--watch", "Cell:label,lvel"], "cell");
    done.expect_message("label of Cell (Cell) is no tensor but str");
    done.expect_message("Cell (Cell) has no attribute lvel; near: level");
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert!(fact(&trace, ".problem").is_some());
    let refused = bench.run(&mut bench.optape(["record", "--watch", "Cell", "--", "true"]));
    refused
        .expect_code(2)
        .expect_message("no colon between modules and names");
}

#[test]
fn values_larger_than_the_ring() {
    let Some(bench) = Bench::new() else { return };
    let done = watched(
        &bench,
        &[
            "--ring-size",
            "64K",
            "--keep",
            "spikes",
            "--watch",
            "Noise:output",
        ],
        "noise",
    );
    let kept = values(&bench)
        .remove(&(String::new(), "output".to_owned()))
        .unwrap();
    let spikes: f64 = kept
        .iter()
        .map(|v| v.to_f64().unwrap().iter().sum::<f64>())
        .sum();
    assert_eq!(
        spikes,
        done.json()["spikes"].as_f64().unwrap(),
        "waited for"
    );
    // Where nobody waits, what does not fit is lost, and counted.
    let done = watched(
        &bench,
        &[
            "--ring-size",
            "64K",
            "--on-full",
            "drop",
            "--keep",
            "values",
            "--watch",
            "Noise:output",
        ],
        "noise",
    );
    done.expect_message("values that --keep asked for are lost");
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let kept: Vec<Value> = trace
        .values(trace.streams()[0].id())
        .map(Result::unwrap)
        .collect();
    let whole = kept.iter().filter(|v| v.elements != Elements::Lost).count() as u64;
    let (sent, dropped) = (
        cost(&trace, "capture.kept_values"),
        cost(&trace, "capture.dropped_values"),
    );
    assert_eq!((sent, sent + dropped), (whole, 4));
}
