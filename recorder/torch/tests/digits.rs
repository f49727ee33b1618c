//! The same network, the same weights, the same batch, once in Python and once in Rust: what the two traces say of every
//! layer has to be the same.
//!
//! Needs what `cargo xtask test` prepares: the release build, a Python with torch, and the exported digits.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn prepared(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(path) => PathBuf::from(path),
        None => panic!("{name} is not set: this test runs under `cargo xtask test`"),
    }
}

/// Cargo builds the examples of a package with its tests, into the directory beside theirs.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples")
        .join(name)
}

fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stderr}",
        output.status
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Mac, synop and spikes of every layer.
fn layers(trace: &Path) -> BTreeMap<String, [u64; 3]> {
    let arguments = [
        "--range",
        "batch",
        "--by",
        "module",
        "--counters",
        "mac,synop",
        "--format",
        "json",
    ];
    let printed = run(Command::new(prepared("OPTAPE_BIN"))
        .arg("replay")
        .arg(trace)
        .args(arguments));
    let report: Value = serde_json::from_str(&printed).unwrap();
    let mut layers = BTreeMap::<String, [u64; 3]>::new();
    for group in report["groups"].as_array().unwrap() {
        let total = |counter: &str| group["counters"][counter]["total"].as_u64().unwrap();
        let layer = layers
            .entry(group["key"].as_str().unwrap().to_owned())
            .or_default();
        (layer[0], layer[1]) = (total("mac"), total("synop"));
    }
    for rate in report["firing_rates"].as_array().unwrap() {
        layers
            .entry(rate["module"].as_str().unwrap().to_owned())
            .or_default()[2] = rate["spikes"].as_u64().unwrap();
    }
    layers.retain(|name, _| ["conv", "fc", "lif"].iter().any(|kind| name.contains(kind)));
    layers
}

#[test]
fn python_and_rust_leave_the_same_counts() {
    let directory = tempfile::tempdir().unwrap();
    let (python, rust) = (
        directory.path().join("python.optape"),
        directory.path().join("rust.optape"),
    );
    let digits = prepared("OPTAPE_DIGITS");
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/train.py");

    let mut record = Command::new(prepared("OPTAPE_BIN"));
    record
        .args(["record", "--output"])
        .arg(&python)
        .arg("--")
        .arg(prepared("OPTAPE_PYTHON"));
    let from_python = run(record.arg(program).arg("--one-batch").arg(&digits));
    let mut example = Command::new(example("digits"));
    let from_rust = run(example
        .arg("--one-batch")
        .arg("--data")
        .arg(&digits)
        .arg("--record")
        .arg(&rust));
    let [from_python, from_rust] =
        [from_python, from_rust].map(|line| serde_json::from_str::<Value>(&line).unwrap());
    assert_eq!(from_python, from_rust, "the two programs compute the same");

    let (python, rust) = (layers(&python), layers(&rust));
    assert_eq!(python.len(), 7, "{python:?}");
    for layer in ["conv1", "conv2", "fc2"] {
        assert!(
            python[&format!("SpikingDigits.{layer}")][1] > 0,
            "{layer} sees spikes: {python:?}"
        );
    }
    assert!(
        python["SpikingDigits.fc1"][0] > 0,
        "fc1 sees averages of spikes: {python:?}"
    );
    for neurons in ["lif1", "lif2", "lif3"] {
        assert!(
            python[&format!("SpikingDigits.{neurons}")][2] > 0,
            "{neurons} spike: {python:?}"
        );
    }
    assert_eq!(python, rust);
}
