//! What modules and optimizers are (T7), module calls with their tensors, and the states of neurons of real libraries.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;
use std::io::Write;

use optape_tests::Bench;
use optape_trace::{Dictionary, Event, ModuleId, Moment, OpCall, Ordinal, Record, Trace};
use serde_json::{Value, json};

struct Recorded {
    trace: Trace,
}

impl Recorded {
    fn open(bench: &Bench) -> Self {
        let trace = Trace::open(&bench.path("t.optape")).unwrap();
        assert_eq!(trace.streams().len(), 1, "one process ran ops");
        Self { trace }
    }

    fn dictionary(&self) -> &Dictionary {
        self.trace.streams()[0].dictionary()
    }

    fn moments(&self) -> Vec<(Ordinal, Moment)> {
        self.trace.moments(self.trace.streams()[0].id()).unwrap()
    }

    fn name(&self, module: ModuleId) -> &str {
        &self.dictionary().module(module).unwrap().name
    }

    /// All values of a fact, in order. `module`: "" for the program.
    fn facts(&self, module: &str, key: &str) -> Vec<Value> {
        let moments = self.moments();
        let told = moments
            .iter()
            .filter_map(|(_, moment)| match &moment.event {
                Event::Fact {
                    module: m,
                    key: k,
                    value,
                } => {
                    let about = m.map_or("", |m| self.name(m));
                    let same =
                        about == module && self.dictionary().text(*k).is_some_and(|k| k == key);
                    same.then(|| serde_json::from_str(value).unwrap())
                }
                _ => None,
            });
        told.collect()
    }

    fn op_calls(&self, op: &str) -> Vec<(Ordinal, OpCall)> {
        let records = self.trace.records(self.trace.streams()[0].id());
        let calls = records.filter_map(|record| match record.unwrap() {
            (ordinal, Record::OpCall(call)) => {
                let signature = self.dictionary().signature(call.signature).unwrap();
                let name = &self.dictionary().op(signature.op).unwrap().name;
                (name == op).then_some((ordinal, call))
            }
            _ => None,
        });
        calls.collect()
    }
}

fn record(bench: &Bench, flags: &[&str], program: &str, arguments: &[&str]) -> Value {
    let words = bench.words(&Bench::program(program), arguments);
    let done = bench.run(
        bench
            .optape(["-q", "record", "-f", "-o", "t.optape"])
            .args(flags)
            .arg("--")
            .args(words),
    );
    done.expect_code(0);
    serde_json::from_str(done.stdout.trim()).unwrap_or(Value::Null)
}

#[test]
fn facts_of_modules_and_optimizers() {
    let Some(bench) = Bench::new() else { return };
    record(&bench, &[], "facts.py", &[]);
    let trace = Recorded::open(&bench);
    let conv = &trace.facts("Net.conv", "attributes");
    assert_eq!(conv.len(), 1, "told once");
    assert_eq!(conv[0]["kernel_size"], json!([3, 3]));
    assert_eq!(
        (&conv[0]["groups"], &conv[0]["step_mode"]),
        (&json!(1), &json!("s"))
    );
    let weight = &trace.facts("Net.conv", "parameters")[0][0];
    assert_eq!(
        (
            &weight["name"],
            &weight["shape"],
            &weight["dtype"],
            &weight["requires_grad"]
        ),
        (
            &json!("weight"),
            &json!([2, 1, 3, 3]),
            &json!("float32"),
            &json!(true)
        )
    );
    // The ids are those of the ops.
    let (_, convolution) = &trace.op_calls("aten::convolution")[0];
    assert_eq!(weight["storage"], json!(convolution.storages[1].0));
    assert_eq!(weight["tensor"], json!(convolution.tensors[1].0));
    let buffers = &trace.facts("Net.norm", "buffers")[0];
    assert_eq!(buffers[0]["name"], json!("running_mean"));
    assert_eq!(buffers[0]["persistent"], json!(true));

    let lif: Vec<Value> = trace.facts("Net.spikes", "attributes");
    let thresholds: Vec<&Value> = lif.iter().map(|a| &a["v_threshold"]).collect();
    assert_eq!(
        thresholds,
        [&json!(0.75), &json!(0.5)],
        "told again when it changed"
    );
    assert_eq!(
        (&lif[0]["tau"], &lif[0]["v_reset"]),
        (&json!(4.0), &json!(0.0))
    );
    assert_eq!(
        trace.facts("Net.spikes", "states"),
        [json!([{"name": "v", "reset": 0.0}])]
    );
    let own = trace.facts("Net.own", "attributes");
    assert_eq!(own[0]["spread"], json!("inf"));
    assert_eq!(own[0]["sizes"], json!([1, [2, 3]]));
    assert_eq!(
        own.iter().map(|a| a["scale"].clone()).collect::<Vec<_>>(),
        [json!(0.5), json!(0.25)]
    );
    assert!(
        trace.facts("Net.own", "objects")[0]["function"]
            .as_str()
            .unwrap()
            .ends_with("relu")
    );
    assert_eq!(trace.facts("Net.own", "tensors")[0][0]["shape"], json!([2]));
    assert_eq!(
        trace.facts("Net.never", "attributes")[0]["p"],
        json!(0.25),
        "never called"
    );
    assert_eq!(
        trace.facts("Net.conv", "training"),
        [json!(true), json!(false)]
    );

    let children: Vec<(String, i64)> =
        serde_json::from_value(trace.facts("Net", "children")[0].clone()).unwrap();
    assert_eq!(children.len(), 6);
    for (name, id) in &children {
        let id = ModuleId(u32::try_from(*id).unwrap());
        assert_eq!(trace.name(id), format!("Net.{name}"));
    }

    assert_eq!(
        trace.facts("", "optimizer.0")[0]["classes"][0],
        json!("torch.optim.sgd.SGD")
    );
    let rates: Vec<Value> = trace
        .facts("", "optimizer.0.group.0")
        .iter()
        .map(|g| g["lr"].clone())
        .collect();
    assert_eq!(rates, [json!(0.5), json!(0.25)]);
    let parameters = &trace.facts("", "optimizer.0.group.0.parameters")[0];
    assert_eq!(
        parameters["name"],
        json!(["weight", "weight", "bias", "weight", "bias"])
    );
    assert_eq!(parameters["tensor"][0], weight["tensor"]);
    let momentum = &trace.facts("", "optimizer.0.state")[0]["momentum_buffer"];
    assert!(
        !momentum["parameter"].as_array().unwrap().is_empty(),
        "{momentum}"
    );
}

#[test]
fn module_calls_with_their_tensors_and_states_in_order() {
    let Some(bench) = Bench::new() else { return };
    record(&bench, &["--level", "full"], "facts.py", &[]);
    let trace = Recorded::open(&bench);
    let moments = trace.moments();
    let mut entered = BTreeMap::new();
    let (mut own, mut calls) = (Vec::new(), Vec::new());
    for (ordinal, moment) in &moments {
        match &moment.event {
            Event::ModuleEnter {
                call,
                module,
                arguments,
            } => {
                entered.insert(*call, arguments.clone());
                if trace.name(*module) == "Net" {
                    assert_eq!(
                        arguments.len(),
                        2,
                        "also in lists and dictionaries of keyword arguments"
                    );
                }
            }
            Event::ModuleExit {
                call,
                module,
                results,
            } => {
                assert_eq!(results.len(), 1);
                calls.push((
                    trace.name(*module).to_owned(),
                    entered[call].clone(),
                    results.clone(),
                ));
            }
            Event::StateAssign { module, tensor, .. } if trace.name(*module) == "Net.own" => {
                own.push((*ordinal, *tensor));
            }
            _ => {}
        }
    }
    // The input of the convolution op is that of the module, and what the module returns is the op's output.
    let (_, convolution) = &trace.op_calls("aten::convolution")[0];
    let (_, arguments, results) = calls.iter().find(|c| c.0 == "Net.conv").unwrap();
    assert_eq!(
        (arguments[0], results[0]),
        (convolution.tensors[0], *convolution.tensors.last().unwrap())
    );
    // Own.single_step_forward assigns its state twice in a step, the second time after the comparison that makes the spikes.
    let comparisons = trace.op_calls("aten::ge");
    let of_first_step: Vec<_> = own.iter().take(2).collect();
    let (at, call) = comparisons
        .iter()
        .find(|(ordinal, _)| *ordinal > of_first_step[0].0)
        .unwrap();
    assert!(of_first_step[1].0 > *at, "in the order of the ops");
    assert_eq!(
        call.tensors[0], of_first_step[0].1,
        "the state that is compared"
    );
    // Five steps in three runs: each run begins with a reset, which is no tensor.
    assert_eq!(own.iter().filter(|(_, tensor)| tensor.0 == 0).count(), 2);
    assert_eq!(own.iter().filter(|(_, tensor)| tensor.0 != 0).count(), 10);
}

fn states(library: &str, flags: &[&str]) {
    let Some(bench) = Bench::new() else { return };
    let report = record(&bench, flags, "states.py", &[library]);
    if let Some(missing) = report.get("missing") {
        // Not through `eprintln!`, which the test harness swallows.
        let _ = writeln!(
            std::io::stderr(),
            "\nNOT RUN: states of {library}: {missing}\n"
        );
        return;
    }
    let trace = Recorded::open(&bench);
    let mut last = BTreeMap::new();
    for (_, moment) in trace.moments() {
        if let Event::StateAssign {
            module,
            attribute,
            tensor,
        } = moment.event
        {
            assert_eq!(trace.name(module), report["module"].as_str().unwrap());
            let name = trace.dictionary().text(attribute).unwrap().to_owned();
            last.insert(name, tensor);
        }
    }
    let known = trace.op_calls("aten::cosh");
    let names = report["states"].as_array().unwrap();
    assert_eq!(names.len(), known.len());
    assert_eq!(last.len(), names.len(), "{last:?}");
    for (name, (_, call)) in names.iter().zip(known) {
        assert_eq!(last[name.as_str().unwrap()], call.tensors[0], "{name}");
    }
}

#[test]
fn states_of_spikingjelly() {
    states("spikingjelly", &["--level", "full"]);
}

#[test]
fn states_of_sinabs() {
    states("sinabs", &["--level", "full"]);
}

#[test]
fn states_of_snntorch() {
    states("snntorch", &["--level", "full"]);
}

#[test]
fn states_of_norse() {
    states("norse", &["--level", "full"]);
}

#[test]
fn states_that_the_user_names() {
    states("named", &["--state", "Cust*:current"]);
}
