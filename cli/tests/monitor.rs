//! `optape monitor` as a process: what it prints and writes, and when it ends.
#![allow(clippy::unwrap_used, reason = "tests, their helpers too")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn monitor(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optape"));
    command.arg("monitor").args(words);
    for name in ["OPTAPE_SIMULATED_GPUS", "OPTAPE_POWERCAP_DIRECTORY"] {
        command.env_remove(name);
    }
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn good(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(process_id: &str, signal: &str) {
    let status = Command::new("kill")
        .args([signal, process_id])
        .status()
        .unwrap();
    assert!(status.success());
}

fn lines(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(|line| line.unwrap())
}

#[test]
fn eight_simulated_gpus_are_printed_and_called_simulated() {
    let few = [
        "--simulated-gpus",
        "8",
        "--samples",
        "3",
        "--interval",
        "0.01",
    ];
    let json = monitor(&few).args(["--format", "json"]).output().unwrap();
    assert!(
        text(&json.stderr).contains("8 SIMULATED GPUs"),
        "{}",
        text(&json.stderr)
    );
    let rounds: Vec<serde_json::Value> = good(&json)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rounds.len(), 3);
    assert_eq!(rounds[0]["values"].as_object().unwrap().len(), 64);
    let energy = |round: &serde_json::Value| round["values"]["gpu7/energy_j"].as_f64().unwrap();
    let time = |round: &serde_json::Value| round["time_unix_ns"].as_u64().unwrap();
    let (seconds, joules) = (
        (time(&rounds[2]) - time(&rounds[0])) as f64 / 1e9,
        energy(&rounds[2]) - energy(&rounds[0]),
    );
    // Between 50 and 250 W, a little more where the clocks are read apart.
    assert!(
        joules > 0.0 && joules < 400.0 * seconds + 1.0,
        "{joules} J in {seconds} s"
    );

    let table = good(&monitor(&few).args(["--gpu", "1,3"]).output().unwrap());
    assert_eq!(table.lines().count(), 6, "{table}");
    assert!(
        table
            .lines()
            .all(|line| line.contains("gpu1 ") || line.contains("gpu3 ")),
        "{table}"
    );
    assert!(
        table.contains("memory used 4.8 GB") && table.contains("power "),
        "{table}"
    );
    let csv = good(
        &monitor(&few)
            .args(["--format", "csv", "--gpu", "0"])
            .output()
            .unwrap(),
    );
    assert_eq!(csv.lines().count(), 1 + 3 * 8, "{csv}");
    assert!(csv.starts_with("time_unix_ns,series,value\n"));
}

#[test]
fn what_is_not_there_is_a_hint_and_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let output = monitor(&["--source", "rapl", "--powercap-directory"])
        .arg(directory.path())
        .output()
        .unwrap();
    assert_eq!(good(&output), "");
    assert_eq!(
        text(&output.stderr)
            .matches("monitor rapl gives nothing")
            .count(),
        1,
        "{}",
        text(&output.stderr)
    );
    // On machines without an NVIDIA driver the same holds for GPUs.
    if !Path::new("/dev/nvidiactl").exists() {
        let output = monitor(&["--samples", "1"]).output().unwrap();
        assert_eq!(good(&output), "");
        let said = text(&output.stderr);
        assert_eq!(
            said.matches("monitor gpu gives nothing").count(),
            1,
            "{said}"
        );
        assert!(said.contains("driver"), "{said}");
    }
    assert_eq!(
        monitor(&["--source", "none"])
            .output()
            .unwrap()
            .status
            .code(),
        Some(2)
    );
    assert_eq!(
        monitor(&["--interval", "0"])
            .output()
            .unwrap()
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn rapl_counters_are_read_and_wrap_around() {
    let directory = tempfile::tempdir().unwrap();
    let zone = directory.path().join("intel-rapl:0");
    std::fs::create_dir(&zone).unwrap();
    let put = |file: &str, value: &str| std::fs::write(zone.join(file), value).unwrap();
    put("name", "package-0\n");
    put("max_energy_range_uj", "1000000\n");
    put("energy_uj", "900000\n");
    let mut child = monitor(&[
        "--source",
        "rapl",
        "--interval",
        "0.02",
        "--format",
        "json",
        "--powercap-directory",
    ])
    .arg(directory.path())
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    let mut joules = lines(&mut child).map(|line| {
        let round: serde_json::Value = serde_json::from_str(&line).unwrap();
        round["values"]["rapl/package-0/energy_j"].as_f64()
    });
    assert_eq!(joules.next().unwrap(), Some(0.0));
    // The file that is open is written, not replaced; in between it may be empty, which is no sample.
    put("energy_uj", "400000\n");
    assert!(
        joules.take(500).any(|j| j == Some(0.5)),
        "0.9 J to the range of 1 J, and 0.4 J more"
    );
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn it_ends_with_its_parent() {
    let script = format!(
        "'{}' monitor --simulated-gpus 1 --interval 0.05 --format csv & echo $!; wait",
        env!("CARGO_BIN_EXE_optape")
    );
    let mut shell = Command::new("sh")
        .args(["-c", &script])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = lines(&mut shell);
    // Its number stands somewhere among its first lines.
    let monitor = lines.find(|line| line.parse::<u32>().is_ok()).unwrap();
    assert!(lines.any(|line| line.contains("gpu0/")), "it runs");
    kill(&shell.id().to_string(), "-KILL");
    shell.wait().unwrap();
    // Its stdout is closed when it ends: so this loop does.
    wait_until("the monitor ends", || lines.next().is_none());
    wait_until("the monitor is gone", || !running(&monitor));
}

/// Neither gone nor a zombie.
fn running(process_id: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{process_id}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

#[test]
fn signals_end_it_cleanly_and_event_files_are_whole() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        let directory = tempfile::tempdir().unwrap();
        let logs = directory.path().join("a/b");
        // Through env(1): a shell without job control starts what runs behind it with SIGINT ignored.
        let mut child = Command::new("env")
            .args([
                "--default-signal=INT",
                env!("CARGO_BIN_EXE_optape"),
                "monitor",
                "--simulated-gpus",
                "2",
                "--interval",
                "0.01",
                "--log-dir",
            ])
            .arg(&logs)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("there are some rounds", || {
            event_file(&logs).is_some_and(|file| std::fs::metadata(file).unwrap().len() > 3000)
        });
        kill(&child.id().to_string(), signal);
        assert_eq!(child.wait().unwrap().code(), Some(0), "{signal}");
        let bytes = std::fs::read(event_file(&logs).unwrap()).unwrap();
        let mut rest = bytes.as_slice();
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            records.push(&rest[12..12 + length]);
            rest = &rest[16 + length..];
        }
        assert!(records.len() > 3 && records[0].ends_with(b"brain.Event:2"));
        for tag in ["utilization_0", "memory_used_1", "gpu1/energy_j"] {
            assert!(
                records[1]
                    .windows(tag.len())
                    .any(|part| part == tag.as_bytes()),
                "{tag}"
            );
        }
    }
}

fn event_file(directory: &Path) -> Option<PathBuf> {
    let mut files = std::fs::read_dir(directory)
        .ok()?
        .map(|entry| entry.unwrap().path());
    files.find(|path| {
        path.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("events.out.tfevents.")
    })
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let output = monitor(&["--simulated-gpus", "1", "--samples", "1", "--log-dir"])
        .arg(file.path().join("x"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("cannot write event files"),
        "{}",
        text(&output.stderr)
    );
}
