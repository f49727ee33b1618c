//! Whatever dies, fills up, vanishes or stops: the program that was not the victim runs on, the file is readable, and what is missing is
//! counted, to the record.
//!
//! `OPTAPE_CRASH_ROUNDS` says how often things are killed at random moments; `cargo xtask soak` sets it to hundreds.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use optape_tests::{Bench, Call, Running, calls_of};
use optape_trace::{DropReason, Event, Trace, TraceEnd};
use rustix::process::{Pid, Signal, kill_process};

fn rounds() -> u64 {
    std::env::var("OPTAPE_CRASH_ROUNDS").map_or(12, |text| text.parse().unwrap())
}

/// A number below `most`, another one every time.
fn random(most: u64) -> u64 {
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
        % most
}

/// `killed.py` under `optape record`, and the page on which it notes what it has finished.
struct Work<'a> {
    bench: &'a Bench,
    running: Running,
}

impl<'a> Work<'a> {
    fn start(bench: &'a Bench, flags: &[&str]) -> Self {
        bench.write("page", vec![0; 16]);
        let words = bench.words(&Bench::program("killed.py"), &["page"]);
        let mut command = bench.optape(["-q", "record", "-f", "-o", "t.optape"]);
        command.args(flags).arg("--").args(&words);
        Self::of(bench, &mut command)
    }

    fn of(bench: &'a Bench, command: &mut Command) -> Self {
        let running = bench.start(command);
        Self { bench, running }
    }

    /// The worker's process id, and how many ops it has finished.
    fn noted(&self) -> (u32, u64) {
        let mut bytes = [0; 16];
        std::fs::File::open(self.bench.path("page"))
            .unwrap()
            .read_exact_at(&mut bytes, 0)
            .unwrap();
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        (u32::try_from(word(0)).unwrap(), word(8))
    }

    /// Waits until the worker has finished so many ops.
    fn reaches(&self, finished: u64) -> Pid {
        let started = Instant::now();
        loop {
            let (process, noted) = self.noted();
            if noted >= finished {
                return Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
            }
            assert!(
                started.elapsed() < Duration::from_secs(200),
                "the program does not get on: {noted} of {finished}"
            );
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn worker(&self) -> Pid {
        self.reaches(1)
    }

    /// Kills a process, and what is left of the recording some time later.
    fn kill(&self, process: Pid) {
        kill_process(process, Signal::KILL).unwrap();
    }
}

fn trace(bench: &Bench) -> Trace {
    Trace::open(&bench.path("t.optape")).unwrap()
}

/// The ops that the worker notes.
fn worked(trace: &Trace) -> Vec<Call> {
    let Some(stream) = trace.streams().first() else {
        return Vec::new();
    };
    calls_of(trace, stream.id())
        .into_iter()
        .filter(|call| call.op == "aten::add.Tensor" || call.op == "aten::mm")
        .collect()
}

/// The number that the worker put into the op.
fn number(call: &Call) -> Option<u64> {
    (call.op == "aten::add.Tensor").then(|| f64::from_bits(call.record.payload[0]) as u64)
}

/// From the first op on, none missing, in order.
fn is_prefix(worked: &[Call]) {
    for (at, call) in worked.iter().enumerate() {
        match at % 2 {
            0 => assert_eq!(number(call), Some(at as u64 / 2), "op {at}"),
            _ => assert_eq!(call.op, "aten::mm", "op {at}"),
        }
    }
}

fn drops(trace: &Trace) -> Vec<(u64, DropReason)> {
    let stream = trace.streams()[0].id();
    let moments = trace.moments(stream).unwrap();
    moments
        .into_iter()
        .filter_map(|(_, moment)| match moment.event {
            Event::Drop {
                records, reason, ..
            } => Some((records, reason)),
            _ => None,
        })
        .collect()
}

/// Every op of the worker is in the file or counted as lost; it may have been killed between an op and its note.
fn accounts(trace: &Trace, finished: u64) {
    let there = worked(trace);
    let numbers: Vec<u64> = there.iter().filter_map(number).collect();
    assert!(
        numbers.windows(2).all(|pair| pair[0] < pair[1]),
        "in order, none twice"
    );
    let lost: u64 = drops(trace).iter().map(|(records, _)| records).sum();
    let all = there.len() as u64 + lost;
    assert!(
        all == finished || all == finished + 1,
        "{} in the file, {lost} lost, {finished} finished",
        there.len()
    );
    assert_eq!(trace.streams()[0].dropped_records(), lost);
}

fn verified(bench: &Bench) {
    bench
        .run(&mut bench.optape(["verify", "t.optape"]))
        .expect_code(0);
}

/// Of a file whose writer died: its copy verifies, and replay answers.
fn recovered(bench: &Bench) {
    bench
        .run(&mut bench.optape(["recover", "-f", "t.optape", "-o", "whole.optape"]))
        .expect_code(0);
    bench
        .run(&mut bench.optape(["verify", "whole.optape"]))
        .expect_code(0);
}

#[test]
fn the_process_is_killed_at_random_moments() {
    let Some(bench) = Bench::new() else { return };
    for _ in 0..rounds() {
        let work = Work::start(&bench, &[]);
        let worker = work.worker();
        std::thread::sleep(Duration::from_micros(random(300_000)));
        work.kill(worker);
        let (_, finished) = work.noted();
        let done = work.running.wait();
        done.expect_code(137);
        let trace = trace(&bench);
        assert!(matches!(trace.end(), TraceEnd::Clean(_)));
        is_prefix(&worked(&trace));
        accounts(&trace, finished);
        assert_eq!(drops(&trace), []);
        verified(&bench);
    }
}

#[test]
fn the_recorder_is_killed_at_random_moments() {
    let Some(bench) = Bench::new() else { return };
    for _ in 0..rounds() {
        let work = Work::start(&bench, &["--ring-size", "64K"]);
        let worker = work.worker();
        std::thread::sleep(Duration::from_micros(random(300_000)));
        let recorder = work.running.pid();
        work.kill(recorder);
        // With nobody to empty it, the ring is full after a thousand ops or so.
        let (_, then) = work.noted();
        work.reaches(then + 5_000);
        work.kill(worker);
        work.running.wait().expect_code(137);
        // Where it died before its first flush there is an empty file.
        let Ok(trace) = Trace::open(&bench.path("t.optape")) else {
            assert_eq!(std::fs::metadata(bench.path("t.optape")).unwrap().len(), 0);
            continue;
        };
        assert!(matches!(trace.end(), TraceEnd::Unfinished { .. }));
        is_prefix(&worked(&trace));
        recovered(&bench);
    }
}

#[test]
fn both_are_killed_at_random_moments() {
    let Some(bench) = Bench::new() else { return };
    for _ in 0..rounds() {
        let work = Work::start(&bench, &[]);
        let worker = work.worker();
        std::thread::sleep(Duration::from_micros(random(300_000)));
        let mut victims = [work.running.pid(), worker];
        if random(2) == 1 {
            victims.reverse();
        }
        work.kill(victims[0]);
        std::thread::sleep(Duration::from_micros(random(30_000)));
        // The second may have ended because of the first.
        let _ = kill_process(victims[1], Signal::KILL);
        work.running.wait().expect_code(137);
        let Ok(trace) = Trace::open(&bench.path("t.optape")) else {
            assert_eq!(std::fs::metadata(bench.path("t.optape")).unwrap().len(), 0);
            continue;
        };
        is_prefix(&worked(&trace));
        recovered(&bench);
    }
}

#[test]
fn a_stopped_recorder_holds_up_nobody_and_its_losses_are_counted() {
    let Some(bench) = Bench::new() else { return };
    for policy in ["wait", "drop"] {
        let work = Work::start(&bench, &["--ring-size", "64K", "--on-full", policy]);
        let worker = work.reaches(1000);
        kill_process(work.running.pid(), Signal::STOP).unwrap();
        let (_, then) = work.noted();
        // Many rings full. A program that waited a second for each record would need hours.
        work.reaches(then + 20_000);
        kill_process(work.running.pid(), Signal::CONT).unwrap();
        let (_, then) = work.noted();
        work.reaches(then + 2_000);
        work.kill(worker);
        let (_, finished) = work.noted();
        work.running.wait().expect_code(137);
        let trace = trace(&bench);
        accounts(&trace, finished);
        let drops = drops(&trace);
        let lost: u64 = drops.iter().map(|(records, _)| records).sum();
        assert!(lost > 10_000, "{policy}: {drops:?}");
        assert!(
            drops
                .iter()
                .any(|(_, reason)| matches!(reason, DropReason::DaemonGone | DropReason::RingFull)),
            "{policy}: {drops:?}"
        );
        assert!(matches!(trace.end(), TraceEnd::Clean(_)));
        verified(&bench);
    }
}

#[test]
fn a_small_ring_under_both_policies() {
    let Some(bench) = Bench::new() else { return };
    for policy in ["wait", "drop"] {
        let work = Work::start(&bench, &["--ring-size", "64K", "--on-full", policy]);
        let worker = work.reaches(50_000);
        work.kill(worker);
        let (_, finished) = work.noted();
        work.running.wait().expect_code(137);
        let trace = trace(&bench);
        accounts(&trace, finished);
        if policy == "wait" {
            is_prefix(&worked(&trace));
        }
        verified(&bench);
    }
}

/// A file that may not grow beyond a limit is the disk that is full: `write` fails in the middle.
#[test]
fn a_full_disk_is_told_and_the_program_runs_on() {
    let Some(bench) = Bench::new() else { return };
    let program = Bench::program("steps.py");
    let plain = bench.run(bench.python([program.as_os_str()]).arg("4000"));
    // The hook is built before: the compiler writes files, too.
    bench
        .run(&mut bench.record("warm.optape", bench.words(&program, &["1"])))
        .expect_code(0);
    // In blocks of 512 bytes, for whatever the shell starts; a ring of 64K and what the program writes are smaller.
    let script = "ulimit -f 400; exec \"$@\"";
    let mut command = bench.command("sh");
    let optape = bench.optape(["record"]);
    command
        .args(["-c", script, "sh"])
        .arg(optape.get_program())
        .args(["record", "--ring-size", "64K", "-o", "t.optape", "--"])
        .args(bench.words(&program, &["4000"]));
    let done = bench.run(&mut command);
    done.expect_code(0)
        .expect_message("cannot write the trace any more")
        .expect_message("the program goes on")
        .expect_message("records are lost");
    assert_eq!(done.stdout, plain.stdout, "the same losses");
    let length = std::fs::metadata(bench.path("t.optape")).unwrap().len();
    assert_eq!(length, 400 * 512, "as much as there was room for");
    let trace = trace(&bench);
    assert!(matches!(trace.end(), TraceEnd::Unfinished { .. }));
    // `writing ended early: ...; N records are lost` and `recorded N op calls of 1 process`.
    let before = |marker: &str| -> u64 {
        let text = &done.stderr[..done.stderr.find(marker).unwrap()];
        let digits: String = text
            .chars()
            .rev()
            .take_while(|c| c.is_ascii_digit() || *c == ' ')
            .collect();
        digits
            .chars()
            .rev()
            .filter(char::is_ascii_digit)
            .collect::<String>()
            .parse()
            .unwrap()
    };
    let (lost, arrived) = (
        before(" records are lost"),
        before(" op calls of 1 process"),
    );
    let stream = &trace.streams()[0];
    assert!(stream.op_calls() > 0 && lost > 0);
    assert!(
        stream.op_calls() + lost >= arrived,
        "{} in the file, {lost} told as lost, {arrived} arrived",
        stream.op_calls()
    );
    recovered(&bench);
}

#[test]
fn a_directory_that_is_removed_is_told_and_the_program_runs_on() {
    let Some(bench) = Bench::new() else { return };
    std::fs::create_dir(bench.path("out")).unwrap();
    let program = Bench::program("steps.py");
    let plain = bench.run(bench.python([program.as_os_str()]).arg("300"));
    let mut command = bench.optape(["record", "-o", "out/t.optape", "--"]);
    let running = bench.start(command.args(bench.words(&program, &["300", "slow"])));
    running.wait_for_output("ready");
    let path = bench.path("out/t.optape");
    let started = Instant::now();
    while std::fs::metadata(&path).map_or(0, |m| m.len()) == 0 {
        assert!(started.elapsed() < Duration::from_secs(100), "no file");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::remove_dir_all(bench.path("out")).unwrap();
    let done = running.wait();
    done.expect_code(0)
        .expect_message("removed while it was written");
    assert_eq!(done.stdout, plain.stdout, "the same losses");
}

/// The directory of the rings: what is mapped stays; processes to come are not recorded, and say so.
#[test]
fn a_run_directory_that_is_removed_is_told_and_the_program_runs_on() {
    let Some(bench) = Bench::new() else { return };
    let program = Bench::program("steps.py");
    let script = "python \"$0\" 5; rm -r \"$OPTAPE_RUN\"; python \"$0\" 5";
    let mut command = bench.optape(["record", "-o", "t.optape", "--", "sh", "-c", script]);
    let done = bench.run(command.arg(&program));
    done.expect_code(0).expect_message("is gone");
    let (first, second) = done.stdout.split_at(done.stdout.len() / 2);
    assert_eq!(first, second, "both ran, the same");
    let trace = trace(&bench);
    assert_eq!(trace.streams().len(), 1);
    verified(&bench);
}
