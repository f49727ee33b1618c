//! Many processes and threads make one run: a stream each, and nobody's ops in another's.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;

use optape_tests::{Bench, calls_of, ops_of};
use optape_trace::{Event, StepSource, Trace};
use serde_json::Value;

#[test]
fn ranks_of_data_parallel_training() {
    let Some(bench) = Bench::new() else { return };
    let program = Bench::program("distributed.py");
    let words = ["torchrun", "--standalone", "--nproc-per-node", "2"];
    let mut bare = bench.command(words[0]);
    let bare = bench.run(bare.args(&words[1..]).arg(&program));
    bare.expect_code(0);
    let mut record = bench.record("t.optape", words);
    let recorded = bench.run(record.arg(&program));
    recorded.expect_code(0);
    assert_eq!(
        bare.report(),
        recorded.report(),
        "the losses of both ranks, to the last bit"
    );

    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let mut ranks = BTreeMap::new();
    for stream in trace.streams() {
        let rank = stream.info().rank.unwrap();
        let mut steps = 0;
        for (_, moment) in trace.moments(stream.id()).unwrap() {
            if let Event::StepMark {
                source: StepSource::Optimizer,
                ..
            } = moment.event
            {
                steps += 1;
            }
        }
        assert_eq!(steps, 12, "rank {rank}");
        assert_eq!(stream.dropped_records(), 0);
        let calls = calls_of(&trace, stream.id());
        assert!(ranks.insert(rank, ops_of(&calls)).is_none());
    }
    assert_eq!(ranks.keys().copied().collect::<Vec<u32>>(), [0, 1]);
    for op in ["aten::addmm", "aten::mm", "aten::relu"] {
        assert_eq!(ranks[&0][op], ranks[&1][op], "{op}");
    }

    // Both ranks do the same work: one rank's is half of the run's.
    let flop = |arguments: &[&str]| {
        let mut replay = bench.optape(["replay", "t.optape", "--counters", "flop", "--stage"]);
        let done = bench.run(replay.args(["forward", "--format", "json"]).args(arguments));
        done.expect_code(0);
        done.json()["counters"]["flop"]["total"].as_u64().unwrap()
    };
    let both = flop(&[]);
    assert!(both > 0);
    assert_eq!(2 * flop(&["--rank", "1"]), both);
}

/// What each process says that it ran, against what its stream holds.
fn crowd(ways: &[&str], processes: usize) {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("crowd.py"), ways);
    let done = bench.run(&mut bench.record("t.optape", words));
    done.expect_code(0);
    let truth: BTreeMap<String, u64> = done
        .report()
        .as_object()
        .unwrap()
        .iter()
        .map(|(process, count)| (process.clone(), count.as_u64().unwrap()))
        .collect();
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let mut found = BTreeMap::new();
    for stream in trace.streams() {
        assert_eq!(stream.dropped_records(), 0);
        let ops = ops_of(&calls_of(&trace, stream.id()));
        let count = ops.get("aten::cosh").copied().unwrap_or(0);
        let process = stream.info().process_id.to_string();
        let name = if truth.contains_key(&process) {
            process
        } else {
            "parent".to_owned()
        };
        assert!(found.insert(name, count).is_none(), "{truth:?}");
    }
    assert_eq!(found, truth);
    assert_eq!(found.len(), processes);
    bench
        .run(&mut bench.optape(["verify", "t.optape"]))
        .expect_code(0);
}

#[test]
fn loader_workers_by_fork_and_by_spawn() {
    crowd(&["fork", "spawn"], 5);
}

#[test]
fn forks_beside_threads() {
    crowd(&["forks"], 21);
}

#[test]
fn files_of_one_run_are_taken_together() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("short.py"), &["3"]);
    let record = |file: &str, run: &[&str]| {
        let mut record = bench.optape(["-q", "record", "-o", file]);
        let done = bench.run(record.args(run).arg("--").args(&words));
        done.expect_code(0);
    };
    record("node0.optape", &["--run", "job 17"]);
    record("node1.optape", &["--run", "job 17"]);
    record("other.optape", &[]);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let zero = |file: &str| {
        let trace = Trace::open(&bench.path(file)).unwrap();
        assert_eq!(trace.run().facts[optape_trace::facts::BOOT_ID], boot.trim());
        let info = trace.streams()[0].info();
        assert!(info.epoch_unix_ns > 0);
        info.epoch_monotonic_ns.unwrap()
    };
    assert!(zero("node0.optape") < zero("node1.optape"));
    let flop = |files: &[&str]| -> Value {
        let mut replay = bench.optape(["replay", "--counters", "flop", "--format", "json"]);
        let done = bench.run(replay.args(files));
        done.expect_code(0);
        done.json()["counters"]["flop"]["total"].clone()
    };
    let one = flop(&["node0.optape"]).as_u64().unwrap();
    assert!(one > 0);
    assert_eq!(
        flop(&["node0.optape", "node1.optape"]).as_u64(),
        Some(2 * one)
    );

    let refused = |files: &[&str], why: &str| {
        let done = bench.run(bench.optape(["replay"]).args(files));
        done.expect_code(2).expect_message(why);
        assert_eq!(done.stdout, "");
    };
    refused(&["node0.optape", "other.optape"], "are of different runs");
    refused(&["node0.optape", "./node0.optape"], "are the same file");
}
