//! SIGKILL loses nothing that was finished: a process notes each finished op in a page that it shares with the test, and
//! the file holds at least as many, in order.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use optape_tests::{Bench, Call, calls_of};
use optape_trace::{Trace, TraceEnd};
use rustix::process::{Pid, Signal, kill_process};

/// What a process noted.
#[derive(Debug)]
struct Noted {
    process_id: u32,
    finished: u64,
}

fn page(bench: &Bench, slots: usize) {
    bench.write("page", vec![0; 16 * slots]);
}

fn noted(bench: &Bench, slot: u64) -> Noted {
    let mut bytes = [0; 16];
    std::fs::File::open(bench.path("page"))
        .unwrap()
        .read_exact_at(&mut bytes, 16 * slot)
        .unwrap();
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    Noted {
        process_id: u32::try_from(word(0)).unwrap(),
        finished: word(8),
    }
}

/// Every finished op is there, in the order in which the program ran them.
fn holds(trace: &Trace, noted: &Noted) {
    let streams: Vec<_> = trace
        .streams()
        .iter()
        .filter(|s| s.info().process_id == noted.process_id)
        .collect();
    assert_eq!(streams.len(), 1, "one stream for {noted:?}");
    let calls = calls_of(trace, streams[0].id());
    assert!(
        calls
            .windows(2)
            .all(|pair| pair[0].ordinal < pair[1].ordinal)
    );
    let worked: Vec<&Call> = calls
        .iter()
        .filter(|call| call.op == "aten::add.Tensor" || call.op == "aten::mm")
        .collect();
    let there = worked.len() as u64;
    assert!(
        there >= noted.finished,
        "{there} ops in the file, {noted:?}"
    );
    // One op may have run and not been noted: the process was killed between the two.
    assert!(
        there <= noted.finished + 1,
        "{there} ops in the file, {noted:?}"
    );
    for (at, call) in worked.iter().enumerate() {
        if at % 2 == 0 {
            assert_eq!(call.op, "aten::add.Tensor", "op {at} of {noted:?}");
            assert_eq!(
                f64::from_bits(call.record.payload[0]),
                (at / 2) as f64,
                "op {at} of {noted:?}"
            );
        } else {
            assert_eq!(call.op, "aten::mm", "op {at} of {noted:?}");
            assert!(
                call.nonzeros(0).is_some() || call.binary(0).is_some(),
                "op {at} has its statistics"
            );
        }
    }
}

#[test]
fn fifty_processes_killed_at_random_moments() {
    const KILLS: usize = 50;
    let Some(bench) = Bench::new() else { return };
    page(&bench, KILLS);
    let words = bench.words(&Bench::program("killed.py"), &["page", &KILLS.to_string()]);
    bench
        .run(&mut bench.record("t.optape", &words))
        .expect_code(0);
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    assert_eq!(
        trace.streams().len(),
        KILLS + 1,
        "the children, and who forked them"
    );
    for slot in 0..KILLS {
        holds(&trace, &noted(&bench, slot as u64));
    }
    bench
        .run(&mut bench.optape(["verify", "t.optape"]))
        .expect_code(0);
}

#[test]
fn the_command_itself_is_killed() {
    let Some(bench) = Bench::new() else { return };
    for wait in [0, 37, 420] {
        page(&bench, 1);
        let words = bench.words(&Bench::program("killed.py"), &["page"]);
        let running = bench.start(
            bench
                .optape(["-q", "record", "-f", "-o", "t.optape", "--"])
                .args(&words),
        );
        let process = worker(&bench, 1);
        std::thread::sleep(Duration::from_millis(wait));
        kill_process(process, Signal::KILL).unwrap();
        running.wait().expect_code(137);
        let trace = Trace::open(&bench.path("t.optape")).unwrap();
        holds(&trace, &noted(&bench, 0));
        let TraceEnd::Clean(end) = trace.end() else {
            panic!("{:?}", trace.end())
        };
        assert_eq!(end.signal, Some(9));
    }
}

/// The recorder is killed: the program goes on, and what was written is readable.
#[test]
fn the_recorder_is_killed() {
    let Some(bench) = Bench::new() else { return };
    page(&bench, 1);
    let words = bench.words(&Bench::program("killed.py"), &["page"]);
    let running = bench.start(&mut bench.record("t.optape", &words));
    // Enough for a flush.
    let process = worker(&bench, 20_000);
    kill_process(running.pid(), Signal::KILL).unwrap();
    assert_eq!(running.wait().code(), 137);
    // A ring's worth of ops and more: with nobody to empty it, the program must not wait for ever.
    let goal = noted(&bench, 0).finished + 100_000;
    worker(&bench, goal);
    kill_process(process, Signal::KILL).unwrap();
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Unfinished { .. }));
    assert!(!calls_of(&trace, trace.streams()[0].id()).is_empty());
    bench
        .run(&mut bench.optape(["replay", "t.optape", "--format", "json"]))
        .expect_code(0);
    bench
        .run(&mut bench.optape(["recover", "t.optape", "-o", "whole.optape"]))
        .expect_code(0);
    bench
        .run(&mut bench.optape(["verify", "whole.optape"]))
        .expect_code(0);
}

/// The recorder is killed in the middle of a training that then ends by itself. The recovered file has every op that found room, in
/// order, and counts every other one.
#[test]
fn what_a_killed_recorder_left_is_recovered_or_counted() {
    const ROUNDS: u64 = 40_000;
    let Some(bench) = Bench::new() else { return };
    for wait in [0, 60, 333] {
        page(&bench, 1);
        for name in ["t.optape", "whole.optape"] {
            let _ = std::fs::remove_file(bench.path(name));
        }
        // Nobody else sees the exit code once the recorder is dead.
        let program = Bench::program("killed.py");
        let script = format!(
            "python {} page until {ROUNDS}; echo $? > ended.new; mv ended.new ended",
            program.display()
        );
        let words = ["sh".to_owned(), "-c".to_owned(), script];
        // A ring that cannot hold what comes after the recorder's death.
        let mut record =
            bench.optape(["-q", "record", "--ring-size", "1M", "-o", "t.optape", "--"]);
        let running = bench.start(record.args(&words));
        worker(&bench, 2_000);
        // What the run is must be in the file: the rings do not hold that.
        while std::fs::metadata(bench.path("t.optape")).map_or(0, |file| file.len()) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(wait));
        kill_process(running.pid(), Signal::KILL).unwrap();
        assert_eq!(running.wait().code(), 137);
        let started = Instant::now();
        while !bench.path("ended").exists() {
            assert!(started.elapsed() < Duration::from_secs(200));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(
            std::fs::read_to_string(bench.path("ended")).unwrap().trim(),
            "7"
        );
        std::fs::remove_file(bench.path("ended")).unwrap();

        let done = bench.run(&mut bench.optape(["recover", "t.optape", "-o", "whole.optape"]));
        done.expect_code(0).expect_message("records more");
        bench
            .run(&mut bench.optape(["verify", "whole.optape"]))
            .expect_code(0);
        let before = Trace::open(&bench.path("t.optape")).unwrap();
        let trace = Trace::open(&bench.path("whole.optape")).unwrap();
        let stream = &trace.streams()[0];
        let worked: Vec<Call> = calls_of(&trace, stream.id())
            .into_iter()
            .filter(|call| call.op == "aten::add.Tensor" || call.op == "aten::mm")
            .collect();
        for (at, call) in worked.iter().enumerate() {
            if at % 2 == 0 {
                assert_eq!(call.op, "aten::add.Tensor", "op {at}");
                assert_eq!(f64::from_bits(call.record.payload[0]), (at / 2) as f64);
            } else {
                assert_eq!(call.op, "aten::mm", "op {at}");
            }
        }
        assert!(stream.records() > before.streams()[0].records());
        assert_eq!(
            worked.len() as u64 + stream.dropped_records(),
            2 * ROUNDS,
            "{}",
            done.stderr
        );
        assert!(
            stream.dropped_records() > 0,
            "the ring is smaller than that"
        );
        // The rings are kept for a day; nobody wants these.
        let rings = done.stderr.lines().find_map(|line| {
            let place = line.trim().strip_prefix("rings in ")?;
            place.strip_suffix(':').map(str::to_owned)
        });
        std::fs::remove_dir_all(rings.unwrap()).unwrap();
    }
}

/// Waits until the process of slot 0 has finished some ops.
fn worker(bench: &Bench, finished: u64) -> Pid {
    let started = Instant::now();
    loop {
        let noted = noted(bench, 0);
        if noted.finished >= finished {
            return Pid::from_raw(i32::try_from(noted.process_id).unwrap()).unwrap();
        }
        assert!(
            started.elapsed() < Duration::from_secs(200),
            "the program does not get on: {noted:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
