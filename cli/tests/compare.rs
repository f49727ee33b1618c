//! `optape diff`, `optape roofline` and `optape peak` from the outside.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a fault in them is a fault of the test"
)]

use std::path::Path;
use std::process::{Command, Output};

use optape_replay::roofline::Peaks;
use optape_replay::testing;
use serde_json::Value;
use tempfile::TempDir;

fn optape(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_optape"))
        .args(arguments)
        .current_dir(directory)
        .env_remove("OPTAPE_RULES")
        .env_remove("OPTAPE_LOG")
        .env_remove("OPTAPE_CONFIG")
        .env("XDG_CONFIG_HOME", directory.join("user"))
        .output()
        .unwrap()
}

/// Fails the test where the exit code is another one; the output.
#[track_caller]
fn expect(output: &Output, code: i32) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{stdout}\n{stderr}");
    (stdout, stderr)
}

/// A directory with `a.optape` in it.
fn workplace() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.optape");
    std::fs::write(path, testing::spiking_tape().bytes()).unwrap();
    directory
}

#[test]
fn diff_compares_stages_of_one_run_and_fails_past_a_limit() {
    let place = workplace();
    let at = place.path();
    let stages = [
        "diff",
        "a.optape",
        "--stage",
        "forward",
        "--b-stage",
        "backward",
    ];
    let (table, _) = expect(&optape(at, &stages), 0);
    for words in [
        "other selections: --stage forward in A, --stage backward in B",
        "both are of the same run",
        "counters/flop",
        "Counters of what only A has, by scope",
        "energies are modelled, not measured",
    ] {
        assert!(table.contains(words), "{words}: {table}");
    }
    let limited = [&stages[..], &["--fail-over", "flop=+1%"]].concat();
    expect(&optape(at, &limited), 0);
    let limited = [&stages[..], &["--fail-over", "flop=10", "--format", "csv"]].concat();
    let (csv, stderr) = expect(&optape(at, &limited), 1);
    assert!(csv.starts_with("section,name_a,name_b,metric,unit,a,b,difference,relative\n"));
    assert!(
        stderr.contains("optape: counters/flop is past flop=10: 288 -> 96 (-66.7 %)"),
        "{stderr}"
    );
    // What it says is written even where it fails.
    let to_file = [&limited[..], &["-o", "diff.csv"]].concat();
    let (stdout, _) = expect(&optape(at, &to_file), 1);
    assert_eq!(stdout, "");
    assert_eq!(std::fs::read_to_string(at.join("diff.csv")).unwrap(), csv);
}

#[test]
fn diff_compares_rule_sets_and_runs() {
    let place = workplace();
    let at = place.path();
    let rules = [
        "diff",
        "a.optape",
        "--rules",
        "spikingjelly-2.0.0",
        "--b-rules",
        "optape",
        "--by",
        "op",
        "--format",
        "json",
    ];
    let (json, _) = expect(&optape(at, &rules), 0);
    let diff: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(diff["a"]["rules"]["name"], "spikingjelly-2.0.0");
    assert_eq!(diff["b"]["rules"]["name"], "optape");
    assert_eq!(diff["by"], "op");
    let mac = diff["totals"]
        .as_array()
        .unwrap()
        .iter()
        .find(|total| total["metric"] == "counters/mac")
        .unwrap();
    assert_eq!((&mac["a"], &mac["b"]), (&48.into(), &48.into()));
    // The totals of each side are those of a replay.
    let replay = [
        "replay", "a.optape", "--rules", "optape", "--format", "json",
    ];
    let (replayed, _) = expect(&optape(at, &replay), 0);
    let replayed: Value = serde_json::from_str(&replayed).unwrap();
    for total in diff["totals"].as_array().unwrap() {
        let metric = total["metric"].as_str().unwrap();
        if let Some(name) = metric.strip_prefix("counters/") {
            assert_eq!(total["b"], replayed["counters"][name]["total"], "{name}");
        }
    }
    let same = [
        "diff",
        "a.optape",
        "a.optape",
        "--fail-over",
        "0",
        "--fail-rows",
    ];
    let (table, _) = expect(&optape(at, &same), 0);
    assert!(!table.contains("counters/flop by scope"), "{table}");
}

#[test]
fn diff_says_what_is_wrong_with_the_command_line() {
    let place = workplace();
    let at = place.path();
    for (arguments, code, words) in [
        (&["diff", "a.optape"][..], 2, "there is nothing to compare"),
        (&["diff", "a.optape", "b.optape"], 2, "b.optape"),
        (
            &["diff", "a.optape", "a.optape", "--fail-over", "5 percent"],
            2,
            "is no limit",
        ),
        (
            &["diff", "a.optape", "a.optape", "--fail-over", "flopp=5%"],
            2,
            "there is no counter or model 'flopp'",
        ),
        (
            &["diff", "a.optape", "a.optape", "--map", "Net.fc"],
            2,
            "two modules with = between",
        ),
        (
            &["diff", "a.optape", "a.optape", "--map", "Net.fcc=Net.fc"],
            2,
            "did you mean 'Net.fc'?",
        ),
        (
            &["diff", "a.optape", "--b-stage", "nowhere"],
            2,
            "there is no stage 'nowhere'",
        ),
        (
            &[
                "diff",
                "a.optape",
                "a.optape",
                "--counters",
                "neuron_state",
                "--rules",
                "spikingjelly-2.0.0",
            ],
            4,
            "--level full",
        ),
        (
            &["diff", "a.optape", "a.optape", "--fail-rows"],
            2,
            "--fail-over",
        ),
    ] {
        let (stdout, stderr) = expect(&optape(at, arguments), code);
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
        assert_eq!(stdout, "", "{arguments:?}");
    }
    std::fs::write(at.join("not.optape"), "no trace").unwrap();
    expect(&optape(at, &["diff", "a.optape", "not.optape"]), 5);
}

#[test]
fn roofline_takes_what_peak_writes() {
    let place = workplace();
    let at = place.path();
    let quick = [
        "peak",
        "--seconds",
        "0.01",
        "--array",
        "1",
        "-o",
        "peaks.toml",
    ];
    expect(&optape(at, &quick), 0);
    let text = std::fs::read_to_string(at.join("peaks.toml")).unwrap();
    let peaks = Peaks::parse(&text, "peaks.toml").unwrap();
    let names: Vec<&str> = peaks.roofs.iter().map(|roof| roof.name.as_str()).collect();
    for wanted in ["1 core, float32", "1 core, float64"] {
        assert!(names.contains(&wanted), "{names:?}");
    }
    expect(&optape(at, &quick), 2);
    let (table, _) = expect(
        &optape(at, &["roofline", "a.optape", "--peaks", "peaks.toml"]),
        0,
    );
    assert!(
        table.contains("Net.fc") && table.contains("ridge at"),
        "{table}"
    );
    let one = [
        "roofline",
        "a.optape",
        "--peaks",
        "peaks.toml",
        "--roof",
        "1 core, float64",
        "--format",
        "json",
    ];
    let (json, _) = expect(&optape(at, &one), 0);
    let found: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(found["roof"]["name"], "1 core, float64");
    assert_eq!(found["total"]["flop"], 390);
    let picture = [
        "roofline",
        "a.optape",
        "--format",
        "svg",
        "--peaks",
        "peaks.toml",
        "-o",
        "r.svg",
    ];
    expect(&optape(at, &picture), 0);
    assert!(
        std::fs::read_to_string(at.join("r.svg"))
            .unwrap()
            .ends_with("</svg>\n")
    );
}

#[test]
fn roofline_takes_peaks_from_a_data_sheet() {
    let place = workplace();
    let at = place.path();
    let given = ["--peak-flops", "67T", "--peak-bandwidth", "4.8T"];
    let (csv, _) = expect(
        &optape(
            at,
            &[&["roofline", "a.optape", "--format", "csv"], &given[..]].concat(),
        ),
        0,
    );
    let roof = csv.lines().last().unwrap();
    assert!(roof.starts_with("roof,given,,,,13.95"), "{roof}");
    assert!(roof.ends_with(",67000000000000,4800000000000,,,"), "{roof}");
    for (arguments, words) in [
        (&["--peak-flops", "67T"][..], "--peak-bandwidth"),
        (
            &["--peak-flops", "fast", "--peak-bandwidth", "1G"],
            "a number above 0",
        ),
        (&["--peaks", "nowhere.toml"], "nowhere.toml"),
        (&["--roof", "x"], "--peaks"),
    ] {
        let arguments = [&["roofline", "a.optape"], arguments].concat();
        let (_, stderr) = expect(&optape(at, &arguments), 2);
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
    }
    std::fs::write(at.join("bad.toml"), "machine = \"x\"\nroofs = []\n").unwrap();
    let (_, stderr) = expect(
        &optape(at, &["roofline", "a.optape", "--peaks", "bad.toml"]),
        2,
    );
    assert!(
        stderr.contains("bad.toml:2:1: unknown field `roofs`"),
        "{stderr}"
    );
}

#[test]
fn peak_refuses_what_it_cannot_measure() {
    let place = tempfile::tempdir().unwrap();
    for (arguments, words) in [
        (&["peak", "--seconds", "0"][..], "from 0.01 to 60 seconds"),
        (&["peak", "--array", "0"], "0 is not in 1..=65536"),
    ] {
        let (_, stderr) = expect(&optape(place.path(), arguments), 2);
        assert!(stderr.contains(words), "{stderr}");
    }
}

#[test]
fn replay_writes_latex_and_energy_per_image() {
    let place = workplace();
    let at = place.path();
    let (latex, _) = expect(&optape(at, &["replay", "a.optape", "--format", "latex"]), 0);
    for words in [
        "\\begin{tabular}{lrrrrr}",
        "memory\\_access",
        "\\caption{What the figures are}",
        "fp32 arithmetic at 45 nm",
        "\\bottomrule",
    ] {
        assert!(latex.contains(words), "{words}: {latex}");
    }
    // The program said that there were four samples; the user knows better.
    let (table, _) = expect(&optape(at, &["replay", "a.optape"]), 0);
    assert!(
        table.contains("samples    4\n") && table.contains("per sample"),
        "{table}"
    );
    let (table, _) = expect(&optape(at, &["replay", "a.optape", "--samples", "8"]), 0);
    assert!(table.contains("samples    8\n"), "{table}");
    let by_image = ["replay", "a.optape", "--per", "image", "--format", "json"];
    let (json, _) = expect(&optape(at, &by_image), 0);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["per"]["unit"], "sample");
    assert_eq!(
        report["basis"]["extent"],
        "forward, backward, optimizer, other"
    );
    assert!(report["per_sample"].is_null(), "said once");
}
