//! Estimators of layers over real recordings: sinabs' numbers beside those that its tools give live, the layer graph, kept values.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;

use optape_tests::{Bench, Done, workspace};
use serde_json::Value;

/// Records a program; gives what it printed.
fn record(bench: &Bench, kind: &str, flags: &[&str]) -> Done {
    let mut record = bench.optape(["-q", "record", "-f", "-o", "t.optape"]);
    record.args(flags).arg("--");
    record.args(bench.words(&Bench::program("layers.py"), &[kind]));
    bench.run(&mut record)
}

const FULL: [&str; 8] = [
    "--level",
    "full",
    "--keep",
    "values",
    "--watch",
    "Conv2d:input",
    "--watch",
    "NeuromorphicReLU:output",
];

/// The differences between what is wanted and what was found, beyond a relative tolerance.
fn differences(path: &str, wanted: &Value, found: &Value, tolerance: f64, out: &mut Vec<String>) {
    match (wanted, found) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                differences(
                    &format!("{path}/{key}"),
                    a.get(key).unwrap_or(&Value::Null),
                    b.get(key).unwrap_or(&Value::Null),
                    tolerance,
                    out,
                );
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (at, (a, b)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}/{at}"), a, b, tolerance, out);
            }
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            if (a - b).abs() > tolerance * a.abs().max(1e-3) {
                out.push(format!("{path}: wanted {a}, found {b}"));
            }
        }
        (a, b) if a == b => {}
        (a, b) => out.push(format!("{path}: wanted {a}, found {b}")),
    }
}

/// dt is 2: as in the program.
const COSTS: [(&str, &str); 3] = [
    (
        "analyzer",
        "model = \"sinabs-analyzer\"\n[settings]\ndt_ms = 2.0\naverage = false\n",
    ),
    (
        "analyzer_average",
        "model = \"sinabs-analyzer\"\n[settings]\ndt_ms = 2.0\naverage = true\n",
    ),
    (
        "synops_hooks",
        "model = \"sinabs-synops-hooks\"\n[settings]\ndt_s = 2.0\n",
    ),
];

fn same_as_live(kind: &str, tolerance: f64) {
    let Some(bench) = Bench::new() else { return };
    let live = record(&bench, kind, &FULL).json();
    let mut faults = Vec::new();
    for name in [
        "analyzer",
        "analyzer_average",
        "synops_hooks",
        "synop_counter",
        "synop_counter_layers",
    ] {
        let mut flags = vec!["--range".to_owned(), "measure".to_owned()];
        match COSTS.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => {
                bench.write(&format!("{name}.toml"), text);
                flags.extend(["--costs".to_owned(), format!("{name}.toml")]);
            }
            None => flags.extend(["--sinabs".to_owned(), name.to_owned()]),
        }
        let mut replay = bench.optape(["replay", "t.optape", "--format", "json"]);
        let done = bench.run(replay.args(&flags));
        match live[name].get("refused") {
            Some(why) => {
                if done.code() != 4 {
                    faults.push(format!("{name}: refused live ({why}), found {}", done.stdout));
                }
            }
            None => {
                let report = done.expect_code(0).json();
                let found = &report["sinabs"][name];
                differences(name, &live[name], found, tolerance, &mut faults);
                let about = &report["sinabs"]["about"][name];
                assert_eq!(about["rules"], "sinabs-3.1.3");
                for field in ["unit", "boundary", "config", "model", "coverage"] {
                    assert!(!about[field].is_null(), "{name}: no {field}");
                }
            }
        }
    }
    assert!(faults.is_empty(), "{kind}:\n{}", faults.join("\n"));
}

#[test]
fn sinabs_of_flattened_batches() {
    same_as_live("squeezed", 1e-5);
}

#[test]
fn sinabs_over_several_calls() {
    same_as_live("unsqueezed", 1e-5);
}

#[test]
fn sinabs_of_a_padding_that_is_no_zeros() {
    same_as_live("circular", 1e-5);
}

#[test]
fn sinabs_of_relu_networks() {
    same_as_live("relu", 1e-5);
}

#[test]
fn sinabs_of_networks_without_its_layers() {
    same_as_live("plain", 1e-5);
}

#[test]
fn sinabs_where_its_tools_fail() {
    same_as_live("words", 1e-5);
}

#[test]
fn sinabs_of_silence() {
    same_as_live("silent", 1e-5);
}

/// The tools calculate in the model's own precision, replay does not.
#[test]
fn sinabs_of_half_precision() {
    same_as_live("half", 1e-2);
}

#[test]
fn levels_that_are_not_there_are_named() {
    let Some(bench) = Bench::new() else { return };
    let asked = |flags: &[&str], code: i32, says: &str| {
        let mut replay = bench.optape(["replay", "t.optape", "--range", "measure"]);
        bench
            .run(replay.args(flags))
            .expect_code(code)
            .expect_message(says);
    };
    record(&bench, "squeezed", &[]).expect_code(0);
    asked(&["--sinabs", "analyzer"], 4, "--level full");
    asked(&["--qualia", "mem8"], 4, "--level full");
    asked(&["--monitors", "input"], 4, "--watch '*:input'");
    asked(&["--monitors", "IAFS:output"], 4, "did you mean 'IAFSqueeze'");
    asked(&["--monitors", "IAFSqueeze:output"], 0, "");
    record(&bench, "squeezed", &["--level", "full"]).expect_code(0);
    asked(&["--sinabs", "analyzer"], 4, "--keep values");
    asked(&["--sinabs", "analyzer", "--lenient"], 0, "");
    asked(&["--sinabs", "synops_hooks"], 0, "");
    asked(&["--sinabs", "analyser"], 2, "did you mean 'analyzer'");
    asked(&["--sinabs", "analyzer", "--op", "aten::mm", "--lenient"], 2, "selects no op call");
    asked(&["--qualia", "mem8"], 4, "input_shape");
}

#[test]
fn the_graph_of_a_residual_network() {
    let Some(bench) = Bench::new() else { return };
    record(&bench, "plain", &["--level", "full"]).expect_code(0);
    let graph = |flags: &[&str]| {
        let mut graph = bench.optape(["graph", "t.optape", "--range", "measure"]);
        bench.run(graph.args(flags)).expect_code(0).stdout.clone()
    };
    insta::assert_snapshot!("graph_text", graph(&[]));
    insta::assert_snapshot!("graph_fused", graph(&["--fuse-batch-norm"]));
    insta::assert_snapshot!("graph_dot", graph(&["--format", "dot", "--fuse-batch-norm"]));
    let json: Value = serde_json::from_str(&graph(&["--format", "json", "--unrolled"])).unwrap();
    let nodes = json["nodes"].as_array().unwrap();
    let heads = nodes.iter().filter(|node| node["module"] == "head").count();
    assert_eq!(heads, 3, "each call is a node");
    let addition = nodes
        .iter()
        .find(|node| node["op"] == "aten::add.Tensor")
        .unwrap();
    assert_eq!(addition["inputs"], serde_json::json!(["branch_1", "act"]));
    let stem = nodes.iter().find(|node| node["name"] == "stem").unwrap();
    assert_eq!(stem["parameters"]["weight"], serde_json::json!([4, 2, 3, 3]));
    assert_eq!(stem["input_shapes"][0], serde_json::json!([2, 2, 6, 6]));

    let part = graph(&["--scope", "Towers.branch"]);
    assert!(part.contains("Layer graph of Towers.branch"), "{part}");
    let mut none = bench.optape(["graph", "t.optape", "--scope", "Towers.nothing"]);
    bench
        .run(&mut none)
        .expect_code(2)
        .expect_message("no scope 'Towers.nothing'");
}

#[test]
fn kept_values_for_numpy_and_safetensors() {
    let Some(bench) = Bench::new() else { return };
    let flags = ["--keep", "values", "--watch", "Linear:input,output"];
    record(&bench, "unsqueezed", &flags).expect_code(0);
    let values = |flags: &[&str]| {
        let mut values = bench.optape(["-q", "values", "t.optape", "--range", "measure"]);
        bench.run(values.args(flags))
    };
    let listed: Value = values(&["--format", "json"]).expect_code(0).json();
    let names: Vec<&str> = listed["values"]
        .as_array()
        .unwrap()
        .iter()
        .map(|group| group["name"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"0/input") && names.contains(&"1/output"), "{names:?}");

    values(&["-o", "all.npz"]).expect_code(0);
    values(&["--stack", "-o", "stacked.npz"]).expect_code(0);
    values(&["-o", "all.safetensors"]).expect_code(0);
    values(&["--watch", "IAF:output", "-o", "spikes.npz"]).expect_code(0);
    let refused = values(&["-o", "all.npz"]);
    refused.expect_code(2).expect_message("--force");
    values(&["-f", "-o", "all.npz"]).expect_code(0);
    values(&["-o", "all.txt"]).expect_code(2).expect_message(".safetensors");
    values(&["--watch", "Conv2d:output"])
        .expect_code(2)
        .expect_message("holds no kept value");

    let code = r#"
import json, numpy, struct
def tensors(path):
    data = open(path, "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8:8 + size])
    kinds = {"F32": "<f4", "BOOL": "|b1"}
    for name, about in head.items():
        if name != "__metadata__":
            a, b = about["data_offsets"]
            yield name, numpy.frombuffer(data[8 + size:][a:b], kinds[about["dtype"]]).reshape(about["shape"])
every, stacked, spikes = (dict(numpy.load(f"{name}.npz")) for name in ("all", "stacked", "spikes"))
same = dict(tensors("all.safetensors"))
assert same.keys() == every.keys() and all((same[name] == every[name]).all() for name in same)
assert all(numpy.array_equal(stacked["0/input"][i], every[f"0/input/{i}"]) for i in range(3))
assert {name.rsplit("/", 1)[0] for name in spikes} == {"1/output", "6/output"}
x = every["0/input/0"]
print(json.dumps({"shape": x.shape, "dtype": str(x.dtype), "rate": float(x.mean()), "calls": len(stacked["1/output"])}))
"#;
    let told = bench.run(&mut bench.python(["-c", code])).json();
    assert_eq!(told["shape"], serde_json::json!([2, 7, 5]));
    assert_eq!(told["dtype"], "float32");
    assert_eq!(told["calls"], 3);
    let rate = told["rate"].as_f64().unwrap();
    let monitors = bench.replay("t.optape", &["--range", "measure", "--monitors", "0:input"]);
    let first = monitors["monitors"]["input"]["0"][0]["mean"].as_f64().unwrap();
    assert!((rate - first).abs() < 1e-9, "{rate} {first}");
    assert!(!fs::exists(bench.path("all.txt")).unwrap());
}

/// Numbers of Qualia's own packages for networks that the parity corpus does not have: `tests/fixtures/qualia` says how they were made.
fn same_as_qualia(kind: &str) {
    let Some(bench) = Bench::new() else { return };
    let mut record = bench.optape(["-q", "record", "-o", "t.optape", "--level", "full"]);
    record.args(["--watch", "*:input,output", "--"]);
    record.args(bench.words(&Bench::program("qualia.py"), &[kind]));
    bench.run(&mut record).expect_code(0);
    let path = workspace().join(format!("tests/fixtures/qualia/{kind}.json"));
    let wanted: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let mut faults = Vec::new();
    for (name, rows) in wanted.as_object().unwrap() {
        let flags = if kind == "fused" {
            let preset = bench.run(&mut bench.optape(["presets", name]));
            let preset = preset.expect_code(0).stdout.clone();
            assert!(preset.contains("fuse_batch_norm = false"));
            bench.write(
                &format!("{name}.toml"),
                preset.replace("fuse_batch_norm = false", "fuse_batch_norm = true"),
            );
            vec!["--costs".to_owned(), format!("{name}.toml")]
        } else {
            vec!["--qualia".to_owned(), name.clone()]
        };
        let mut replay = bench.optape(["replay", "t.optape", "--format", "json"]);
        replay.args(["--range", "measure"]).args(&flags);
        let report = bench.run(&mut replay).expect_code(0).json();
        let qualia = &report["qualia"];
        let (found, label) = if name == "operations" {
            (&qualia["operations"]["default"], "operations/default".to_owned())
        } else {
            (&qualia["energy"][name], format!("energy/{name}"))
        };
        differences(name, rows, found, 1e-6, &mut faults);
        let about = &qualia["about"][label.as_str()];
        assert_eq!(about["rules"], "qualia-2.6.0", "{label}");
        for field in ["unit", "boundary", "config", "model", "coverage"] {
            assert!(!about[field].is_null(), "{label}: no {field}");
        }
    }
    assert!(faults.is_empty(), "{kind}:\n{}", faults.join("\n"));
}

#[test]
fn qualia_of_a_network_without_spikes() {
    same_as_qualia("formal");
}

#[test]
fn qualia_of_all_time_steps_at_once() {
    same_as_qualia("multi");
}

#[test]
fn qualia_with_fused_batch_norms() {
    same_as_qualia("fused");
}

#[test]
fn qualia_of_spikes_that_are_added() {
    same_as_qualia("residual");
}
