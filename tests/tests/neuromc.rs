//! NeuroMC's stages of the program's own: what replay makes of them is what SpikingJelly's profiler says live.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use optape_tests::Bench;
use serde_json::Value;

const STAGES: &str = r#"
[stages.t0]
phase = "forward"
[stages.t1]
phase = "forward"
reuse_weights = true
[stages.learn_backward]
phase = "backward"
batch_norm_backward = false
[stages.learn_update]
phase = "optimizer"
"#;

/// Every difference between two values, but for the last bits of floats.
fn differences(path: &str, wanted: &Value, found: &Value, all: &mut Vec<String>) {
    match (wanted, found) {
        (Value::Object(wanted), Value::Object(found)) => {
            for (name, value) in wanted {
                let other = found.get(name).unwrap_or(&Value::Null);
                differences(&format!("{path}.{name}"), value, other, all);
            }
            for name in found.keys().filter(|name| !wanted.contains_key(*name)) {
                all.push(format!("{path}.{name}: it has none"));
            }
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            if (a - b).abs() > 1e-9 * a.abs().max(b.abs()) {
                all.push(format!("{path}: {a} live, {b} replayed"));
            }
        }
        // Live reports leave counts out that are zero, or have them.
        (Value::Null, Value::Number(n)) | (Value::Number(n), Value::Null)
            if n.as_f64() == Some(0.0) => {}
        (a, b) if a == b => {}
        (a, b) => all.push(format!("{path}: {a} live, {b} replayed")),
    }
}

fn compare(what: &str) {
    let Some(bench) = Bench::new() else { return };
    let program = Bench::program("neuromc_stages.py");
    let live = bench.run(&mut bench.python([
        program.as_os_str(),
        "live".as_ref(),
        what.as_ref(),
    ]));
    let live = live.expect_code(0).report();

    let words = bench.words(&program, &["recorded", what]);
    let mut record = bench.optape(["-q", "record", "-o", "t.optape", "--level", "full", "--"]);
    bench.run(record.args(words)).expect_code(0);
    let preset = bench.run(&mut bench.optape([
        "presets",
        "neuromc",
        "--rules",
        "spikingjelly-2.0.0",
    ]));
    let costs = format!("{}{STAGES}", preset.expect_code(0).stdout);
    bench.write("staged.toml", costs);
    let replay = bench.run(&mut bench.optape([
        "replay",
        "t.optape",
        "--rules",
        "spikingjelly-2.0.0",
        "--range",
        "measure",
        "--costs",
        "staged.toml",
        "--format",
        "json",
    ]));
    let replayed = replay.expect_code(0).json();
    let replayed = &replayed["energy"]["neuromc"];
    let mut all = Vec::new();
    for (name, value) in live.as_object().unwrap() {
        if !["warnings", "mapping_summary", "model_info", "memory_config"].contains(&name.as_str()) {
            differences(name, value, &replayed[name], &mut all);
        }
    }
    assert!(all.is_empty(), "{what}:\n{}", all.join("\n"));
    assert!(replayed["energy_total_pj"].as_f64().unwrap() > 0.0);
}

#[test]
fn stages_of_inference_with_weights_that_stay() {
    compare("inference");
}

#[test]
fn stages_of_training_without_the_backward_of_batch_norms() {
    compare("training");
}
