//! The binary from the outside: help, messages, exit codes, files.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a fault in them is a fault of the test"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use optape_replay::testing::{self, Call, schema, tensor};
use optape_trace::{Argument, ScopeId};
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

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A directory with `spiking.optape` in it.
fn workplace() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spiking.optape");
    std::fs::write(&path, testing::spiking_tape().bytes()).unwrap();
    (directory, path)
}

fn code(directory: &Path, arguments: &[&str]) -> i32 {
    optape(directory, arguments).status.code().unwrap()
}

#[test]
fn help_of_every_subcommand_is_what_it_was() {
    let directory = tempfile::tempdir().unwrap();
    // `record` is documented by its own tests.
    let pages = [
        "monitor",
        "daemon",
        "ctl",
        "replay",
        "diff",
        "roofline",
        "peak",
        "info",
        "dump",
        "verify",
        "recover",
        "rules",
        "presets",
        "config",
        "completions",
        "man",
    ];
    for page in pages {
        let output = optape(directory.path(), &[page, "--help"]);
        assert!(output.status.success());
        insta::assert_snapshot!(format!("help_{page}"), stdout(&output));
    }
}

#[test]
fn replay_answers_with_table_json_and_csv() {
    let (directory, _) = workplace();
    let table = optape(directory.path(), &["replay", "spiking.optape"]);
    assert!(table.status.success(), "{}", stderr(&table));
    for word in ["Coverage", "Counters", "Energy", "Firing rates", "Net.lif"] {
        assert!(stdout(&table).contains(word), "{word}");
    }
    let json = optape(
        directory.path(),
        &[
            "replay",
            "spiking.optape",
            "--range",
            "measure",
            "--rules",
            "spikingjelly-2.0.0",
            "--all",
            "--format",
            "json",
        ],
    );
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(
        report["counters"]["mac"]["scopes"]["Net.fc"]["aten.addmm.default"],
        48
    );
    assert_eq!(
        report["counters"]["mac"]["unsupported"]["mylib.unheard.default"],
        2
    );
    let csv = optape(
        directory.path(),
        &[
            "replay",
            "spiking.optape",
            "--by",
            "stage",
            "--counters",
            "flop",
            "--format",
            "csv",
        ],
    );
    assert_eq!(
        stdout(&csv),
        "stage,calls,flop [FLOP]\nforward,12,288\nbackward,2,96\noptimizer,2,0\nother,1,6\n"
    );
}

#[test]
fn info_says_what_counters_would_need() {
    let (directory, _) = workplace();
    let mut bare = testing::Tape::new();
    let product = Call::new(
        schema::MM,
        vec![Argument::Tensor(0), Argument::Tensor(1)],
        vec![tensor(&[2, 3]), tensor(&[3, 4])],
        vec![tensor(&[2, 4])],
    );
    bare.call(ScopeId::GLOBAL, &product);
    std::fs::write(directory.path().join("bare.optape"), bare.bytes()).unwrap();

    let table = optape(directory.path(), &["info", "--needs", "bare.optape"]);
    assert!(table.status.success(), "{}", stderr(&table));
    insta::assert_snapshot!("info_needs", stdout(&table));

    let json = optape(
        directory.path(),
        &[
            "info",
            "--needs",
            "--format",
            "json",
            "spiking.optape",
            "bare.optape",
        ],
    );
    let both: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let mac = |file: usize| {
        let estimators = both[file]["needs"]["rules"][0]["estimators"]
            .as_array()
            .unwrap();
        let mut found = estimators
            .iter()
            .filter(|e| e["estimator"] == "counters/mac");
        found.next().unwrap().clone()
    };
    assert_eq!(mac(0)["state"], "held");
    assert_eq!(mac(1)["state"], "lacks");
    let lacking = &mac(1)["lacking"][0];
    assert_eq!(lacking["level"], "T1");
    assert_eq!(lacking["calls"], 1);
    assert_eq!(lacking["flag"], "--stats rules");

    let replay = ["replay", "--counters", "mac", "bare.optape"];
    assert_eq!(code(directory.path(), &replay), 4);
    let plain = optape(
        directory.path(),
        &["info", "--format", "json", "bare.optape"],
    );
    let plain: serde_json::Value = serde_json::from_slice(&plain.stdout).unwrap();
    assert!(plain[0].get("needs").is_none());
}

#[test]
fn files_of_two_machines_are_told_apart_from_files_of_one() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, boot: &str, unix_ns: u64, monotonic_ns: u64| {
        let started = testing::Started {
            host: format!("host-{boot}"),
            boot_id: Some(boot.to_owned()),
            unix_ns,
            monotonic_ns: Some(monotonic_ns),
            ..testing::Started::default()
        };
        let tape = testing::spiking_tape_on(&started);
        std::fs::write(directory.path().join(name), tape.bytes()).unwrap();
    };
    write("one.optape", "a", 1_000_000_000_000, 70);
    write("two.optape", "b", 1_000_000_000_000, 90);
    // The clock of this one was set back by a minute meanwhile.
    write("three.optape", "a", 940_000_000_000, 95);
    let table = |files: &[&str]| {
        let output = optape(
            directory.path(),
            &[&["replay", "--counters", "flop"], files].concat(),
        );
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let two = table(&["one.optape", "two.optape"]);
    assert!(
        two.contains("2 machines") && two.contains("host-a off by an unknown amount"),
        "{two}"
    );
    let one = table(&["one.optape", "three.optape"]);
    assert!(
        one.contains("wall clock of host-a moved by -60.000 s"),
        "{one}"
    );
    assert!(!one.contains("machines"), "{one}");
    assert!(!table(&["one.optape"]).contains("clock"));
}

#[test]
fn the_same_bytes_come_out_of_one_thread_and_of_many() {
    let (directory, _) = workplace();
    let run = |threads| {
        stdout(&optape(
            directory.path(),
            &[
                "replay",
                "spiking.optape",
                "--format",
                "json",
                "--from-events",
                "--threads",
                threads,
            ],
        ))
    };
    assert_eq!(run("1"), run("16"));
    assert_eq!(
        run("1"),
        stdout(&optape(
            directory.path(),
            &["replay", "spiking.optape", "--format", "json"]
        ))
    );
}

#[test]
fn exit_codes_say_what_is_wrong() {
    let (directory, _) = workplace();
    let at = directory.path();
    assert_eq!(code(at, &["replay", "spiking.optape"]), 0);
    assert_eq!(code(at, &["replay", "spiking.optape", "--strict"]), 3);
    assert_eq!(
        code(
            at,
            &["replay", "spiking.optape", "--strict", "--stage", "forward"]
        ),
        0
    );
    assert_eq!(code(at, &["replay", "missing.optape"]), 2);
    assert_eq!(
        code(at, &["replay", "spiking.optape", "--counters", "flops"]),
        2
    );
    assert_eq!(
        code(at, &["replay", "spiking.optape", "--rules", "spikingjelly"]),
        2
    );
    assert_eq!(
        code(at, &["replay", "spiking.optape", "--scope", "Nothing*"]),
        2
    );
    assert_eq!(code(at, &["replay", "spiking.optape", "--step", "5..2"]), 2);
    assert_eq!(
        code(
            at,
            &[
                "replay",
                "spiking.optape",
                "--rules",
                "spikingjelly-2.0.0",
                "--energy",
                "compute_fp32"
            ]
        ),
        2
    );
    std::fs::write(
        at.join("text.optape"),
        "no trace at all, but long enough to be looked at",
    )
    .unwrap();
    assert_eq!(code(at, &["replay", "text.optape"]), 5);
    assert_eq!(code(at, &["verify", "text.optape"]), 5);

    let mut tape = testing::Tape::new();
    let argument = |index| optape_trace::Argument::Tensor(index);
    tape.call(
        optape_trace::ScopeId::GLOBAL,
        &Call::new(
            schema::MM,
            vec![argument(0), argument(1)],
            vec![tensor(&[2, 3]), tensor(&[3, 4])],
            vec![tensor(&[2, 4])],
        ),
    );
    std::fs::write(at.join("bare.optape"), tape.bytes()).unwrap();
    let missing = optape(at, &["replay", "bare.optape", "--counters", "mac"]);
    assert_eq!(missing.status.code(), Some(4));
    assert_eq!(
        stderr(&missing),
        "optape: mac cannot be computed: the trace does not hold whether 'self' is binary of aten::mm (level T1); record with \
         `optape record --stats rules`\n"
    );
    assert_eq!(
        code(
            at,
            &["replay", "bare.optape", "--counters", "mac", "--lenient"]
        ),
        0
    );
    assert_eq!(code(at, &["replay", "bare.optape", "--all"]), 0);
    let strict = optape(
        at,
        &["replay", "spiking.optape", "--strict", "--counters", "flop"],
    );
    assert_eq!(
        stderr(&strict),
        "optape: incomplete coverage (--strict): optape has no rule for mylib.unheard.default\n"
    );
}

#[test]
fn wrong_cost_files_are_told_by_line_and_column() {
    let (directory, _) = workplace();
    let at = directory.path();
    std::fs::write(
        at.join("my.toml"),
        "[costs]\ne_mac_pj = 4.6\ne_ac_jp = 0.9\n",
    )
    .unwrap();
    let output = optape(at, &["replay", "spiking.optape", "--costs", "my.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        stderr(&output),
        "optape: my.toml:3:1: there is no key 'e_ac_jp'; did you mean 'e_ac_pj'?\n"
    );
    std::fs::write(at.join("my.toml"), "[costs]\ne_mac_pj = 2\ne_ac_pj = 0.5\n").unwrap();
    let output = optape(
        at,
        &[
            "replay",
            "spiking.optape",
            "--range",
            "measure",
            "--costs",
            "my.toml",
            "--format",
            "csv",
        ],
    );
    let csv = stdout(&output);
    let expected = "section,name,scope,op,value,unit\nenergy,my,,,131,pJ\n\
        firing_rates,rate,Net.lif,,0.3125,spikes per neuron and time step\n";
    assert!(csv.starts_with(expected), "{csv}");
}

#[test]
fn files_are_not_overwritten_without_force() {
    let (directory, _) = workplace();
    let at = directory.path();
    let arguments = [
        "replay",
        "spiking.optape",
        "--format",
        "json",
        "-o",
        "report.json",
    ];
    assert_eq!(code(at, &arguments), 0);
    let first = std::fs::read(at.join("report.json")).unwrap();
    let refused = optape(at, &[&arguments[..], &["--counters", "flop"]].concat());
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains(
        "report.json exists; choose another name with --output, or overwrite it with --force"
    ));
    assert_eq!(std::fs::read(at.join("report.json")).unwrap(), first);
    assert_eq!(
        code(
            at,
            &[&arguments[..], &["--force", "--counters", "flop"]].concat()
        ),
        0
    );
    assert_ne!(std::fs::read(at.join("report.json")).unwrap(), first);
    // A replay that fails leaves nothing behind.
    assert_eq!(
        code(
            at,
            &[
                "replay",
                "spiking.optape",
                "--counters",
                "nope",
                "-o",
                "other.json"
            ]
        ),
        2
    );
    assert!(!at.join("other.json").exists());
}

#[test]
fn a_closed_pipe_is_no_error() {
    let (directory, _) = workplace();
    for arguments in [
        &["replay", "spiking.optape", "--format", "csv"][..],
        &["dump", "spiking.optape"],
        &["completions", "bash"],
        &["--help"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_optape"))
            .args(arguments)
            .current_dir(directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Closed before anything is read.
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (output.status.code(), stderr(&output)),
            (Some(0), String::new()),
            "{arguments:?}"
        );
    }
}

#[test]
fn dump_info_verify_and_recover_agree_on_the_trace() {
    let (directory, path) = workplace();
    let at = directory.path();
    let dump = stdout(&optape(at, &["dump", "spiking.optape"]));
    assert_eq!(
        dump.lines().filter(|line| line.contains(" call ")).count(),
        21
    );
    assert_eq!(
        stdout(&optape(
            at,
            &["dump", "spiking.optape", "--records", "3..5"]
        ))
        .lines()
        .count(),
        2
    );
    assert_eq!(code(at, &["dump", "spiking.optape", "--stream", "7"]), 2);
    let info: serde_json::Value =
        serde_json::from_slice(&optape(at, &["info", "spiking.optape", "--format", "json"]).stdout)
            .unwrap();
    assert_eq!(info[0]["op_calls"], 21);
    assert_eq!(info[0]["end"]["state"], "clean");
    assert!(stdout(&optape(at, &["info", "spiking.optape"])).contains("python train.py"));
    let verified = optape(at, &["verify", "spiking.optape"]);
    assert!(
        verified.status.success() && stdout(&verified).contains("nothing wrong"),
        "{}",
        stdout(&verified)
    );

    // Cut in the middle: still answered, and said so; recovery makes it whole.
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(at.join("cut.optape"), &bytes[..bytes.len() / 2]).unwrap();
    let cut = optape(at, &["info", "cut.optape"]);
    assert!(stdout(&cut).contains("unfinished"), "{}", stdout(&cut));
    let recovered = optape(at, &["recover", "cut.optape"]);
    assert!(recovered.status.success(), "{}", stderr(&recovered));
    assert!(stdout(&optape(at, &["verify", "cut.recovered.optape"])).contains("nothing wrong"));
    assert_eq!(
        code(at, &["recover", "cut.optape"]),
        2,
        "the copy is there already"
    );
    assert_eq!(code(at, &["recover", "cut.optape", "-f"]), 0);
    assert_eq!(
        code(at, &["recover", "cut.optape", "-f", "-o", "cut.optape"]),
        2
    );

    // A flipped byte is found.
    let mut flipped = bytes;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x40;
    std::fs::write(at.join("flipped.optape"), flipped).unwrap();
    let damaged = optape(at, &["verify", "flipped.optape"]);
    assert_eq!(damaged.status.code(), Some(5), "{}", stdout(&damaged));
}

#[test]
fn explain_rules_and_presets_show_formulas_and_costs() {
    let (directory, _) = workplace();
    let at = directory.path();
    let explained = stdout(&optape(
        at,
        &[
            "replay",
            "spiking.optape",
            "--explain",
            "aten::mm",
            "--rules",
            "spikingjelly-2026-06",
        ],
    ));
    assert!(explained.contains("product_sum = 10"), "{explained}");
    assert_eq!(
        code(
            at,
            &["replay", "spiking.optape", "--explain", "aten::conv9d"]
        ),
        2
    );
    assert!(
        stdout(&optape(at, &["rules", "aten::view"]))
            .contains("flop           0: a view or metadata")
    );
    assert_eq!(code(at, &["rules", "aten::vieww"]), 2);
    let preset = optape(at, &["presets", "compute_int8"]);
    assert!(stdout(&preset).contains("e_mac_pj = 0.23"));
    assert_eq!(code(at, &["presets", "compute_int9"]), 2);
}

#[test]
fn manual_pages_and_completions_are_made_for_every_subcommand() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    assert_eq!(code(at, &["man", "pages"]), 0);
    for page in [
        "optape.1",
        "optape-replay.1",
        "optape-record.1",
        "optape-recover.1",
    ] {
        assert!(at.join("pages").join(page).exists(), "{page}");
    }
    assert_eq!(code(at, &["man", "pages"]), 2, "pages are not overwritten");
    for shell in ["bash", "zsh", "fish"] {
        let script = optape(at, &["completions", shell]);
        assert!(
            script.status.success() && stdout(&script).contains("from-events"),
            "{shell}"
        );
    }
}

#[test]
fn each_layer_of_configuration_overrides_those_below() {
    let (directory, _) = workplace();
    let place = directory.path();
    let inner = place.join("project/src/deep");
    std::fs::create_dir_all(&inner).unwrap();
    std::fs::create_dir_all(place.join("project/.git")).unwrap();
    std::fs::create_dir_all(inner.join("user/optape")).unwrap();
    let rules_with = |arguments: &[&str], variables: &[(&str, &str)]| {
        let output = Command::new(env!("CARGO_BIN_EXE_optape"))
            .args(["replay", "../../../spiking.optape", "--format", "json"])
            .args(arguments)
            .current_dir(&inner)
            .env_remove("OPTAPE_CONFIG")
            .env_remove("OPTAPE_RULES")
            .env("XDG_CONFIG_HOME", inner.join("user"))
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        report["rules"]["name"].as_str().unwrap().to_owned()
    };
    let (old, new) = ("spikingjelly-2026-06", "spikingjelly-2.0.0");
    let file = |rules: &str| format!("[replay]\nrules = \"{rules}\"\n");
    assert_eq!(rules_with(&[], &[]), "optape");
    // Outside of the repository: not the project's.
    std::fs::write(place.join("optape.toml"), file("nonsense")).unwrap();
    assert_eq!(rules_with(&[], &[]), "optape");
    std::fs::write(inner.join("user/optape/config.toml"), file(old)).unwrap();
    assert_eq!(rules_with(&[], &[]), old);
    std::fs::write(place.join("project/optape.toml"), file(new)).unwrap();
    assert_eq!(rules_with(&[], &[]), new);
    std::fs::write(inner.join("mine.toml"), file(old)).unwrap();
    assert_eq!(rules_with(&["--config", "mine.toml"], &[]), old);
    assert_eq!(rules_with(&[], &[("OPTAPE_CONFIG", "mine.toml")]), old);
    let variable = [("OPTAPE_REPLAY_RULES", new)];
    assert_eq!(rules_with(&["--config", "mine.toml"], &variable), new);
    assert_eq!(rules_with(&["--rules", "optape"], &variable), "optape");
    assert_eq!(
        rules_with(&[], &[("OPTAPE_RULES", old), variable[0]]),
        old,
        "the flag's own variable"
    );
}

#[test]
fn a_flag_that_is_given_takes_out_what_it_conflicts_with() {
    let (directory, _) = workplace();
    std::fs::write(
        directory.path().join("optape.toml"),
        "quiet = true\n[replay]\ncounters = [\"flop\"]\nformat = \"json\"\n",
    )
    .unwrap();
    let counters = |arguments: &[&str]| {
        let output = optape(directory.path(), arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        report["counters"].as_object().unwrap().len()
    };
    assert_eq!(counters(&["replay", "spiking.optape"]), 1);
    assert_eq!(
        counters(&["-v", "replay", "spiking.optape", "--counters", "mac,ac"]),
        2
    );
    assert!(counters(&["replay", "spiking.optape", "--all"]) > 2);
}

#[test]
fn a_mistake_in_the_configuration_is_shown_where_it_is() {
    let (directory, _) = workplace();
    std::fs::write(
        directory.path().join("optape.toml"),
        "[replay]\nrulse = \"optape\"\n",
    )
    .unwrap();
    let output = optape(directory.path(), &["replay", "spiking.optape"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    let expected = "optape.toml:2:1: there is no key 'rulse' in [replay]; did you mean 'rules'?";
    assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    let output = optape(
        directory.path(),
        &["replay", "spiking.optape", "--config", "nowhere.toml"],
    );
    assert_eq!(output.status.code(), Some(2));
    // Help needs no configuration.
    assert_eq!(code(directory.path(), &["replay", "--help"]), 0);
}

#[test]
fn config_shows_what_is_in_force_and_where_from() {
    let (directory, _) = workplace();
    std::fs::write(
        directory.path().join("optape.toml"),
        "color = \"never\"\n[replay]\nrules = \"spikingjelly-2.0.0\"\nstrict = true\n",
    )
    .unwrap();
    let shown = |arguments: &[&str]| {
        let output = optape(directory.path(), arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
            .replace(
                directory.path().canonicalize().unwrap().to_str().unwrap(),
                "/HERE",
            )
            .replace(directory.path().to_str().unwrap(), "/HERE")
    };
    insta::assert_snapshot!("config_changed", shown(&["config", "--changed"]));
    insta::assert_snapshot!("config_replay", shown(&["config", "replay"]));
    // It is a configuration itself.
    std::fs::write(directory.path().join("all.toml"), shown(&["config"])).unwrap();
    let again = shown(&["config", "--changed", "--config", "all.toml"]);
    assert!(again.contains("strict = true  # all.toml:"), "{again}");
    assert_eq!(code(directory.path(), &["config", "replya"]), 2);
}
