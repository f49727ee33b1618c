//! `optape record` over commands without libtorch: shells, and this binary as a process that records.
#![allow(clippy::unwrap_used, reason = "tests, their helpers too")]

#[path = "../../recorder/src/daemon/tests/fake.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "shared with the daemon's own tests"
)]
mod fake;

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use optape_recorder::ring;
use optape_trace::{Trace, TraceEnd};

use fake::Fake;
use ring::OnFull;

struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `optape record` with these words behind it, in the directory of the test.
    fn record<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        // Through env(1): a shell without job control starts what runs behind it with SIGINT and SIGQUIT ignored, and nohup does the same with SIGHUP.
        let mut command = Command::new("env");
        command
            .arg("--default-signal=HUP,INT,QUIT")
            .arg(env!("CARGO_BIN_EXE_optape"));
        // No process here loads capture: any file will do.
        command
            .current_dir(self.directory.path())
            .arg("record")
            .args(words)
            .env("OPTAPE_CAPTURE_LIB", std::env::current_exe().unwrap())
            // Monitors have tests of their own, which take this away.
            .env("OPTAPE_MONITOR", "none");
        command.env(
            "XDG_CONFIG_HOME",
            self.directory.path().join("no-configuration"),
        );
        for name in [
            "PYTHONPATH",
            "OPTAPE_CONFIG",
            "OPTAPE_STATS",
            "OPTAPE_ON_FULL",
            "OPTAPE_RING_BYTES",
            "OPTAPE_FORCE_TORCH",
        ] {
            command.env_remove(name);
        }
        command
    }

    fn shell(&self, script: &str) -> Output {
        self.record(["-o", "t.optape", "--", "sh", "-c", script])
            .output()
            .unwrap()
    }

    /// A shell word that runs this binary as a process that records.
    fn producer(&self, what: &str) -> String {
        let exe = std::env::current_exe().unwrap();
        format!(
            "OPTAPE_FAKE={what} '{}' --exact a_process_that_records --nocapture",
            exe.display()
        )
    }

    fn trace(&self) -> Trace {
        Trace::open(&self.path("t.optape")).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.directory.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Monitors that are asked for by name.
#[test]
fn monitors_are_recorded_beside_the_process() {
    let bench = Bench::new();
    let script = format!("{}; sleep 0.3", bench.producer("ends1000"));
    let output = bench
        .record([
            "-o",
            "t.optape",
            "--monitor",
            "gpu,rapl,host,process",
            "--monitor-interval",
            "0.02",
            "--",
            "sh",
            "-c",
            &script,
        ])
        .env("OPTAPE_SIMULATED_GPUS", "2")
        .env("OPTAPE_POWERCAP_DIRECTORY", bench.path("no-such-directory"))
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for (part, times) in [
        ("made up", 1),
        ("monitor rapl gives nothing: no RAPL counters", 1),
        ("samples of gpu, host, process; not there: rapl", 1),
        ("of 1 process in", 1),
    ] {
        assert_eq!(said.matches(part).count(), times, "{part} in:\n{said}");
    }
    let trace = bench.trace();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    let (processes, monitors) = (trace.processes().count(), trace.monitors().count());
    assert_eq!((processes, monitors, trace.streams().len()), (1, 1, 2));
    let stream = trace.monitors().next().unwrap();
    let counts = optape_replay::sample_counts(&trace, stream).unwrap();
    let of = |series: &str| {
        counts
            .iter()
            .find(|(name, _)| name == series)
            .map_or(0, |(_, n)| *n)
    };
    for series in ["gpu0/energy_j", "gpu1/power_mw", "host/memory_used_bytes"] {
        assert!(of(series) >= 5, "{series}: {counts:?}");
    }
    let facts = optape_replay::facts(&trace, stream).unwrap();
    assert_eq!(facts["monitor.rapl"]["state"], "absent");
    assert_eq!(facts["monitor.gpu"]["state"], "running");
    assert!(facts.contains_key("monitors.simulated"));
    assert!(stream.end().unwrap().costs["monitors.cpu_ns"] > 0);

    let optape = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_optape"))
            .current_dir(bench.path(""))
            .args(words)
            .output()
            .unwrap();
        assert!(output.status.success(), "{words:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(optape(&["verify", "t.optape"]).contains(" 1 processes,"));
    let info = optape(&["info", "t.optape"]);
    assert!(
        info.contains("gpu0/energy_j: ") && info.contains("monitor.rapl absent: no RAPL counters"),
        "{info}"
    );
    let info: serde_json::Value =
        serde_json::from_str(&optape(&["info", "--format", "json", "t.optape"])).unwrap();
    assert_eq!(info[0]["streams"].as_array().unwrap().len(), 1);
    assert_eq!(
        info[0]["monitors"][0]["series"]["gpu0/energy_j"],
        of("gpu0/energy_j")
    );
    let replay: serde_json::Value =
        serde_json::from_str(&optape(&["replay", "--format", "json", "t.optape"])).unwrap();
    assert_eq!(replay["streams"].as_array().unwrap().len(), 1);
    assert_eq!(
        replay["monitors"]["hardware"]["series"]["gpu1/power_mw"]["unit"],
        "mW"
    );
    assert!(optape(&["dump", "t.optape"]).contains(" sample \"gpu0/energy_j\"="));
    assert!(replay["monitors"]["hardware"]["facts"]["monitors.simulated"].is_string());
}

#[test]
fn monitors_can_be_left_away_and_leave_nothing_of_their_own() {
    let bench = Bench::new();
    let script = bench.producer("ends10");
    let output = bench.shell(&script);
    assert_eq!(bench.trace().streams().len(), 1, "{}", stderr(&output));
    // By default they run, and say nothing of what is not there.
    let output = bench
        .record(["-f", "-o", "t.optape", "--", "sh", "-c", &script])
        .env_remove("OPTAPE_MONITOR")
        .output()
        .unwrap();
    assert_eq!(bench.trace().monitors().count(), 1, "{}", stderr(&output));
    assert!(
        !stderr(&output).contains("gives nothing"),
        "{}",
        stderr(&output)
    );
    // Nothing was recorded: samples alone are no trace.
    let output = bench
        .record(["-o", "u.optape", "--", "sleep", "0.1"])
        .env_remove("OPTAPE_MONITOR")
        .output()
        .unwrap();
    assert_eq!(bench.files(), ["t.optape"], "{}", stderr(&output));
    let output = bench
        .record(["--monitor-interval", "0", "--", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

/// Not a test in the test run: what `Bench::producer` starts.
#[test]
fn a_process_that_records() {
    let (Ok(what), Some(run)) = (std::env::var("OPTAPE_FAKE"), std::env::var_os("OPTAPE_RUN"))
    else {
        return;
    };
    let ring_bytes = std::env::var("OPTAPE_RING_BYTES").unwrap().parse().unwrap();
    let mut fake = Fake::begin(Path::new(&run), ring_bytes, OnFull::Wait);
    let calls: u64 = what
        .trim_start_matches(|c: char| !c.is_ascii_digit())
        .parse()
        .unwrap();
    for _ in 0..calls {
        assert!(fake.call(0));
    }
    match what.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "ends" => fake.end(),
        "dies" => signal(&std::process::id().to_string(), "-KILL"),
        "lingers" => std::thread::sleep(Duration::from_secs(20)),
        other => panic!("{other}?"),
    }
}

#[test]
fn exit_codes_are_the_commands() {
    let bench = Bench::new();
    assert_eq!(bench.shell("exit 7").status.code(), Some(7));
    assert_eq!(bench.shell("exit 0").status.code(), Some(0));
    assert_eq!(bench.shell("kill -KILL $$").status.code(), Some(137));
    assert_eq!(bench.shell("kill -TERM $$").status.code(), Some(143));
    assert_eq!(
        bench.files(),
        [""; 0],
        "nothing was recorded, so nothing is left"
    );
}

#[test]
fn failures_before_the_start_have_codes_of_their_own() {
    let bench = Bench::new();
    std::fs::write(bench.path("plain"), "x").unwrap();
    std::fs::write(bench.path("there.optape"), "precious").unwrap();
    let touch = ["touch", "ran"];
    let cases: [(&[&str], i32, &str); 8] = [
        (
            &["--", "no-such-command"],
            127,
            "command not found: no-such-command",
        ),
        (&["--", "./plain"], 126, "cannot run ./plain"),
        (&["--", "."], 126, "cannot run ."),
        (
            &["-o", "there.optape", "--", touch[0], touch[1]],
            125,
            "--force",
        ),
        (
            &["-o", "no/such/t.optape", "--", touch[0], touch[1]],
            125,
            "there is no directory no/such",
        ),
        (
            &["-f", "-o", ".", "--", touch[0], touch[1]],
            125,
            "cannot create .",
        ),
        (
            &["--ring-size", "1024G", "--", touch[0], touch[1]],
            125,
            "--ring-size",
        ),
        (
            &["--ring-size", "1", "--", touch[0], touch[1]],
            2,
            "smallest",
        ),
    ];
    for (words, code, message) in cases {
        let output = bench.record(words).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{words:?}: {}",
            stderr(&output)
        );
        assert!(
            stderr(&output).contains(message),
            "{words:?}: {}",
            stderr(&output)
        );
        assert!(output.stdout.is_empty());
    }
    let missing = bench
        .record(["--", "true"])
        .env("OPTAPE_CAPTURE_LIB", "/no/such.so")
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(125));
    assert!(
        stderr(&missing).contains("liboptape_recorder.so"),
        "{}",
        stderr(&missing)
    );
    assert_eq!(
        bench.files(),
        ["plain", "there.optape"],
        "the command did not run, and nothing was made"
    );
    assert_eq!(
        std::fs::read(bench.path("there.optape")).unwrap(),
        b"precious"
    );
}

#[test]
fn a_directory_that_cannot_be_written_is_refused() {
    let bench = Bench::new();
    let locked = bench.path("locked");
    std::fs::create_dir(&locked).unwrap();
    std::fs::set_permissions(&locked, PermissionsExt::from_mode(0o555)).unwrap();
    // Permissions do not hold root back; /proc does.
    let root = std::fs::write(locked.join("x"), "").is_ok();
    let target = if root {
        "/proc/t.optape"
    } else {
        "locked/t.optape"
    };
    let output = bench
        .record(["-o", target, "--", "touch", "ran"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(
        stderr(&output).contains(&format!("cannot create {target}")),
        "{}",
        stderr(&output)
    );
    assert!(!bench.path("ran").exists());
}

#[test]
fn stdin_stdout_and_environment_are_the_commands() {
    let bench = Bench::new();
    let mut child = bench
        .record([
            "-q",
            "--",
            "sh",
            "-c",
            "cat; printf '%s' \"$MINE\"; printf err >&2",
        ])
        .env("MINE", "yes")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"in\0put").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"in\0putyes");
    assert!(stderr(&output).starts_with("err"), "{}", stderr(&output));
}

#[test]
fn the_environment_attaches() {
    let bench = Bench::new();
    let show = "echo $PYTHONPATH; echo $OPTAPE_STATS $OPTAPE_ON_FULL $OPTAPE_RING_BYTES $OPTAPE_FORCE_TORCH $OPTAPE_TORCH_VERSIONS; \
        ls $OPTAPE_RUN/attach/*/ $OPTAPE_HOOK_SOURCE; stat -c %a $OPTAPE_RUN; test -f $OPTAPE_CAPTURE_LIB && echo lib";
    let words = [
        "--stats",
        "all",
        "--on-full",
        "drop",
        "--ring-size",
        "128K",
        "--force-torch",
        "--",
        "sh",
        "-c",
        show,
    ];
    let output = bench
        .record(words)
        .env("PYTHONPATH", "/mine")
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = stdout.lines().collect();
    assert!(
        lines[0].ends_with("/attach:/mine") && lines[0].matches(':').count() == 1,
        "{stdout}"
    );
    assert_eq!(lines[1], "all drop 131072 1 2.6.0,2.13.0,2.15.0");
    for part in [
        "entry_points.txt",
        "METADATA",
        "optape_hook.cpp",
        "optape_hook.h",
        "\n700\n",
        "\nlib\n",
    ] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    let run = Path::new(lines[0].strip_suffix("/attach:/mine").unwrap());
    assert!(!run.exists(), "the run directory is gone");
    let site = bench
        .record(["--", "sh", "-c", "echo $PYTHONPATH"])
        .env("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        .output()
        .unwrap();
    let stdout = String::from_utf8(site.stdout).unwrap();
    assert!(
        stdout.trim().ends_with("/site") && stdout.contains("/attach:"),
        "{stdout}"
    );
}

/// What the command sees in its environment of these flags, above a configuration.
fn settings_with(configuration: &str, variables: &[(&str, &str)], flags: &[&str]) -> String {
    let bench = Bench::new();
    std::fs::write(bench.path("optape.toml"), configuration).unwrap();
    let show = ["--", "sh", "-c", "echo $OPTAPE_STATS $OPTAPE_FUNCTIONS"];
    let mut command = bench.record(flags.iter().chain(&show));
    command.env_remove("OPTAPE_FUNCTIONS");
    command.envs(variables.iter().copied());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_switch_is_switched_off_again_on_the_command_line() {
    let file = "[record]\nfunctions = true\n";
    assert_eq!(settings_with(file, &[], &[]), "rules 1");
    assert_eq!(settings_with(file, &[], &["--no-functions"]), "rules 0");
    let own = [("OPTAPE_FUNCTIONS", "1")];
    assert_eq!(settings_with("", &own, &[]), "rules 1");
    assert_eq!(settings_with("", &own, &["--no-functions"]), "rules 0");
    // As it stands in every recorded process.
    let own_off = [("OPTAPE_FUNCTIONS", "0")];
    assert_eq!(settings_with("", &own_off, &["--no-functions"]), "rules 0");
    assert_eq!(settings_with("", &own_off, &["--functions"]), "rules 1");
    let layered = [("OPTAPE_RECORD_FUNCTIONS", "yes")];
    assert_eq!(
        settings_with(file, &layered, &["--no-functions"]),
        "rules 0"
    );
    assert_eq!(
        settings_with(file, &own, &["--no-functions", "--functions"]),
        "rules 1"
    );
}

#[test]
fn stats_and_level_do_not_go_together() {
    let bench = Bench::new();
    let output = bench
        .record(["--stats", "all", "--level", "full", "--", "touch", "ran"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    for part in ["--stats <WHICH>", "cannot be used with", "--level <LEVEL>"] {
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
    }
    assert!(!bench.path("ran").exists());

    assert_eq!(settings_with("", &[], &["--level", "full"]), "full 0");
    // Of two layers the upper one counts, whichever of the two flags it sets.
    let (level, stats) = (
        "[record]\nlevel = \"full\"\n",
        "[record]\nstats = \"none\"\n",
    );
    assert_eq!(settings_with(level, &[], &["--stats", "all"]), "all 0");
    assert_eq!(settings_with(stats, &[], &["--level", "full"]), "full 0");
    let own = [("OPTAPE_STATS", "none")];
    assert_eq!(settings_with(level, &own, &[]), "none 0");
    let layered = [("OPTAPE_RECORD_LEVEL", "full")];
    assert_eq!(settings_with(stats, &layered, &[]), "full 0");
    // Inside a recorded process the outer recording's statistics stand in the environment.
    let outer = [("OPTAPE_STATS", "rules")];
    assert_eq!(settings_with("", &outer, &["--level", "full"]), "full 0");
}

#[test]
fn variables_that_mean_nothing_are_told_and_those_of_a_recording_are_not() {
    let bench = Bench::new();
    let words = ["-q", "--", env!("CARGO_BIN_EXE_optape"), "config", "record"];
    let output = bench.record(words).output().unwrap();
    assert!(output.status.success());
    assert!(
        !stderr(&output).contains("no effect"),
        "{}",
        stderr(&output)
    );
    let output = bench
        .record(["--", "true"])
        .env("OPTAPE_RECORD_LEVLE", "full")
        .output()
        .unwrap();
    assert!(
        stderr(&output).contains(
            "the variable OPTAPE_RECORD_LEVLE is unknown and has no effect; did you mean OPTAPE_RECORD_LEVEL?"
        ),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_process_is_recorded_and_summed_up() {
    let bench = Bench::new();
    let output = bench.shell(&format!("{}; exit 3", bench.producer("ends20000")));
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let told = stderr(&output);
    for part in [
        "recorded 20 000 op calls of 1 process",
        "bytes per op call",
        "own cost:",
        "nothing dropped",
        "t.optape",
        "next: optape replay t.optape",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let trace = bench.trace();
    let TraceEnd::Clean(end) = trace.end() else {
        panic!("{:?}", trace.end())
    };
    assert_eq!((end.exit_code, end.signal), (Some(3), None));
    assert!(
        end.daemon_cpu_ns > 0 && end.daemon_peak_bytes > 0 && end.daemon_peak_bytes < 64 << 20,
        "{end:?}"
    );
    assert_eq!(trace.run().command[0], "sh");
    assert_eq!(
        trace.run().working_directory,
        std::fs::canonicalize(bench.directory.path())
            .unwrap()
            .to_str()
            .unwrap()
    );
    assert_eq!(trace.streams()[0].records(), 20_000);

    let again = bench.shell(&bench.producer("ends1"));
    assert_eq!(again.status.code(), Some(125), "the file is there now");
    let quiet = bench
        .record([
            "-qf",
            "-o",
            "t.optape",
            "--",
            "sh",
            "-c",
            &bench.producer("ends1"),
        ])
        .output()
        .unwrap();
    assert_eq!(
        (quiet.status.code(), stderr(&quiet).as_str()),
        (Some(0), "")
    );
    assert_eq!(bench.trace().streams()[0].records(), 1, "overwritten");
}

#[test]
fn the_default_name_tells_the_program() {
    let bench = Bench::new();
    let child = bench
        .record(["--", "sh", "-c", &bench.producer("ends1")])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let name = format!("optape-sh-{}.optape", child.id());
    assert!(child.wait_with_output().unwrap().status.success());
    assert_eq!(bench.files(), [name]);
}

#[test]
fn the_dead_and_the_many_are_recorded() {
    let bench = Bench::new();
    let dies = bench.producer("dies30000");
    // More rings than may be resident at a time.
    let many = (0..20)
        .map(|_| format!("{} & ", bench.producer("ends60000")))
        .collect::<String>();
    let output = bench.shell(&format!("{many} {dies}; wait"));
    let trace = bench.trace();
    assert_eq!(trace.streams().len(), 21, "{}", stderr(&output));
    let mut ends: Vec<_> = trace
        .streams()
        .iter()
        .map(|s| (s.records(), s.end().unwrap().clean))
        .collect();
    ends.sort_unstable();
    assert_eq!(ends[0], (30_000, false));
    assert!(
        ends[1..].iter().all(|end| *end == (60_000, true)),
        "{ends:?}"
    );
    assert!(
        stderr(&output).contains("1 recorded process(es) ended without a goodbye"),
        "{}",
        stderr(&output)
    );
    let TraceEnd::Clean(end) = trace.end() else {
        panic!("{:?}", trace.end())
    };
    assert!(
        end.daemon_peak_bytes < 64 << 20,
        "{} bytes resident",
        end.daemon_peak_bytes
    );
}

#[test]
fn processes_that_outlive_the_command_get_a_second() {
    let bench = Bench::new();
    let began = Instant::now();
    let script = format!("{} >/dev/null 2>&1 & sleep 1", bench.producer("lingers500"));
    let output = bench.shell(&script);
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    assert!(
        stderr(&output).contains("1 recorded process(es) still run"),
        "{}",
        stderr(&output)
    );
    assert_eq!(bench.trace().streams()[0].records(), 500);
    let began = Instant::now();
    bench
        .record([
            "-qfo",
            "t.optape",
            "--",
            "sh",
            "-c",
            &bench.producer("ends500"),
        ])
        .output()
        .unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "nobody is waited for in vain: {:?}",
        began.elapsed()
    );
}

#[test]
fn a_full_disk_leaves_the_command_alone() {
    let bench = Bench::new();
    let output = bench
        .record([
            "-f",
            "-o",
            "/dev/full",
            "--",
            "sh",
            "-c",
            &format!("{}; exit 4", bench.producer("ends50000")),
        ])
        .output()
        .unwrap();
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{told}");
    assert_eq!(
        told.matches("cannot write the trace any more").count()
            + told.matches("cannot write the end of the trace").count(),
        1,
        "{told}"
    );
    assert!(
        told.contains("No space left on device") && told.contains("50 000 records are lost"),
        "{told}"
    );
    assert!(Path::new("/dev/full").exists());
}

#[test]
fn nothing_recorded_is_explained_and_harms_no_file() {
    let bench = Bench::new();
    std::fs::write(bench.path("t.optape"), "precious").unwrap();
    let output = bench
        .record(["-f", "-o", "t.optape", "--", "true"])
        .output()
        .unwrap();
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(0));
    for part in [
        "nothing was recorded",
        "optape-torch = \"0.1\"",
        "let _tape = optape_torch::attach()?;",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(std::fs::read(bench.path("t.optape")).unwrap(), b"precious");

    let failing = bench.shell("printf 'no C++ compiler found\\n' > $OPTAPE_RUN/attach-error-1.txt");
    assert_eq!(failing.status.code(), Some(125), "the file is there");
    std::fs::remove_file(bench.path("t.optape")).unwrap();
    let failing = bench.shell("printf 'no C++ compiler found\\n' > $OPTAPE_RUN/attach-error-1.txt");
    assert!(
        stderr(&failing).contains("could not be recorded: no C++ compiler found"),
        "{}",
        stderr(&failing)
    );
    assert_eq!(bench.files(), [""; 0]);

    let idle = bench.shell("touch $OPTAPE_RUN/attached-1 $OPTAPE_RUN/attached-2");
    assert!(
        stderr(&idle).contains("2 processes imported torch and were ready"),
        "{}",
        stderr(&idle)
    );

    // A Python that says that it has no torch.
    std::fs::write(
        bench.path("python3"),
        "#!/bin/sh\ntest \"$1\" = -c && echo absent\n",
    )
    .unwrap();
    std::fs::set_permissions(bench.path("python3"), PermissionsExt::from_mode(0o755)).unwrap();
    let told = stderr(&bench.record(["--", "./python3", "x.py"]).output().unwrap());
    assert!(told.contains("./python3 has no torch"), "{told}");
    let told = stderr(
        &bench
            .record(["--", "./python3", "-I", "x.py"])
            .output()
            .unwrap(),
    );
    assert!(told.contains("without -I"), "{told}");
}

#[test]
fn scripts_without_a_first_line_run() {
    let bench = Bench::new();
    std::fs::write(bench.path("script"), "echo $1; exit 5\n").unwrap();
    std::fs::set_permissions(bench.path("script"), PermissionsExt::from_mode(0o755)).unwrap();
    let output = bench.record(["-q", "./script", "word"]).output().unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(5), b"word\n".as_slice())
    );
}

/// Starts a shell script under `optape record` in a process group of its own and waits until it says that it is ready.
fn start(bench: &Bench, script: &str) -> (std::process::Child, std::process::ChildStdout) {
    let mut command = bench.record(["-o", "t.optape", "--", "sh", "-c", script]);
    let mut child = command
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");
    (child, stdout)
}

fn signal(target: &str, signal: &str) {
    assert!(
        Command::new("kill")
            .args([signal, "--", target])
            .status()
            .unwrap()
            .success()
    );
}

fn rest(
    mut child: std::process::Child,
    mut stdout: std::process::ChildStdout,
) -> (Option<i32>, String) {
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    (child.wait().unwrap().code(), text)
}

#[test]
fn terminal_signals_reach_the_command_once() {
    let bench = Bench::new();
    let script = "trap 'echo INT' INT; trap 'echo QUIT' QUIT; echo ready; for i in 1 2 3 4 5 6; do sleep 0.2; done; exit 6";
    let (child, stdout) = start(&bench, script);
    // As a terminal does it: to the group.
    signal(&format!("-{}", child.id()), "-INT");
    std::thread::sleep(Duration::from_millis(400));
    signal(&format!("-{}", child.id()), "-QUIT");
    assert_eq!(rest(child, stdout), (Some(6), "INT\nQUIT\n".to_owned()));

    let (child, stdout) = start(&bench, "echo ready; sleep 20");
    signal(&format!("-{}", child.id()), "-INT");
    assert_eq!(rest(child, stdout), (Some(130), String::new()));
}

#[test]
fn signals_for_us_alone_are_passed_on_once() {
    let bench = Bench::new();
    let script = "trap 'echo TERM' TERM; trap 'echo HUP' HUP; trap 'echo USR1' USR1; echo ready; for i in 1 2 3 4 5 6 7 8; do sleep 0.2; done; exit 9";
    let (child, stdout) = start(&bench, script);
    for name in ["-TERM", "-HUP", "-USR1"] {
        signal(&child.id().to_string(), name);
        std::thread::sleep(Duration::from_millis(350));
    }
    assert_eq!(
        rest(child, stdout),
        (Some(9), "TERM\nHUP\nUSR1\n".to_owned())
    );
    let (child, stdout) = start(&bench, "echo ready; exec sleep 20");
    signal(&child.id().to_string(), "-TERM");
    assert_eq!(rest(child, stdout), (Some(143), String::new()));
}

#[test]
fn a_killed_daemon_leaves_the_command_running_and_a_readable_file() {
    let bench = Bench::new();
    let script = format!(
        "{}; echo ready; sleep 1; echo done > done",
        bench
            .producer("ends1000")
            .replace("--nocapture", "--nocapture >/dev/null")
    );
    let (mut child, _stdout) = start(&bench, &script);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !Trace::open(&bench.path("t.optape"))
        .is_ok_and(|t| t.streams().first().is_some_and(|s| s.records() == 1000))
    {
        assert!(Instant::now() < deadline, "the records do not arrive");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(bench.trace().end(), TraceEnd::Unfinished { .. }));
    while !bench.path("done").exists() {
        assert!(Instant::now() < deadline, "the command did not go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    // What a killed daemon leaves behind, later ones remove; this test does not wait for a day.
    for entry in std::fs::read_dir("/dev/shm").unwrap().flatten() {
        let owner = std::fs::read_to_string(entry.path().join("daemon")).unwrap_or_default();
        if owner.trim() == child.id().to_string() {
            std::fs::remove_dir_all(entry.path()).unwrap();
        }
    }
}
