//! What recording costs in memory stays bounded: 64 MiB in the daemon, rings included, and 32 MiB in the recorded process.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::time::Duration;

use optape_tests::Bench;
use optape_trace::Trace;
use rustix::process::Pid;

const STEPS: &str = "400";
const ROUNDS: &str = "300000";
/// In the daemon, with all its rings.
const DAEMON_BYTES: u64 = 64 << 20;
/// In the recorded process, beyond what it takes by itself.
const ADDED_BYTES: u64 = 32 << 20;

/// The most that a process ever had resident; 0 once it is gone.
fn peak_bytes(process: Pid) -> u64 {
    let path = format!("/proc/{}/status", process.as_raw_nonzero());
    let status = std::fs::read_to_string(path).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[test]
fn recording_stays_within_its_memory() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("memory.py"), &[STEPS, ROUNDS]);
    let bare = bench.run(&mut bench.python(&words[1..]));
    bare.expect_code(0);
    let bare = bare.report()["peak_bytes"].as_u64().unwrap();

    for statistics in ["rules", "all"] {
        let trace = format!("{statistics}.optape");
        let arguments = ["-q", "record", "--stats", statistics, "-o", &trace, "--"];
        let running = bench.start(bench.optape(arguments).args(&words));
        let daemon = running.pid();
        let mut peak = 0;
        let done = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| running.wait());
            while !waiting.is_finished() {
                peak = peak.max(peak_bytes(daemon));
                std::thread::sleep(Duration::from_millis(10));
            }
            waiting.join().unwrap()
        });
        done.expect_code(0);
        let report = done.report();
        assert!(
            report["codes"]
                .as_array()
                .unwrap()
                .iter()
                .all(|code| code == 0),
            "{report}"
        );
        let records: u64 = Trace::open(&bench.path(&trace))
            .unwrap()
            .streams()
            .iter()
            .map(|stream| stream.records() + stream.dropped_records())
            .sum();
        assert!(records > 600_000, "{records} records are no full rate");
        assert!(
            peak > 1 << 20 && peak <= DAEMON_BYTES,
            "{statistics}: {} MiB in the daemon",
            peak >> 20
        );
        let recorded = report["peak_bytes"].as_u64().unwrap();
        let added = recorded.saturating_sub(bare);
        assert!(
            added <= ADDED_BYTES,
            "{statistics}: {} MiB added to {} MiB",
            added >> 20,
            bare >> 20
        );
        println!(
            "{statistics}: daemon {:.1} MiB, added {:.1} MiB",
            peak as f64 / 1048576.0,
            added as f64 / 1048576.0
        );
    }
}
