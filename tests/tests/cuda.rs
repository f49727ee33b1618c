//! Operands on a GPU. What needs one says NOT RUN where there is none; the rest of the machinery is tested in the recorder's own tests.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;

use optape_tests::{Bench, Call, calls_of};
use optape_trace::{Event, Operand, State, Trace, When, fields};
use serde_json::json;

/// A bench, where torch sees a GPU.
fn bench_with_gpu() -> Option<Bench> {
    let bench = Bench::new()?;
    let asked =
        bench.run(&mut bench.python(["-c", "import torch; print(torch.cuda.is_available())"]));
    asked.expect_code(0);
    if asked.stdout.trim() == "True" {
        return Some(bench);
    }
    println!("NOT RUN: torch sees no GPU here");
    None
}

type Numbers = BTreeMap<(Operand, u8), (Option<bool>, BTreeMap<u32, u64>)>;

/// What a call says of its operands. A product that is not one of binary factors says nothing.
fn numbers(call: &Call) -> Numbers {
    let mut all = Numbers::new();
    for (entry, numbers) in &call.statistics {
        assert_eq!(entry.state, State::Present, "{} {entry:?}", call.op);
        if entry.operand != Operand::Product || !numbers.is_empty() {
            let when = u8::from(entry.when == When::After);
            all.insert((entry.operand, when), (entry.binary, numbers.clone()));
        }
    }
    all
}

/// Sums of floats may differ in the order of additions.
fn agree(field: u32, a: u64, b: u64) -> bool {
    if fields::is_integer(field) {
        return a == b;
    }
    let (a, b) = (f64::from_bits(a), f64::from_bits(b));
    let difference = (a - b).abs();
    a == b || (a.is_nan() && b.is_nan()) || difference <= 1e-9 * a.abs().max(b.abs()).max(1e3)
}

#[test]
fn a_gpu_finds_what_the_processor_finds() {
    let Some(bench) = bench_with_gpu() else {
        return;
    };
    let words = bench.words(&Bench::program("gpu.py"), &["twins"]);
    let mut record = bench.optape(["-q", "record", "-o", "t.optape", "--stats", "all", "--"]);
    bench.run(record.args(words)).expect_code(0);
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let mut calls = calls_of(&trace, trace.streams()[0].id());
    let looked_at = [
        "aten::clone",
        "aten::mm",
        "aten::bmm",
        "aten::addmm",
        "aten::convolution",
    ];
    calls.retain(|call| looked_at.contains(&call.op.as_str()));
    let last = calls.pop().unwrap();
    assert_eq!(last.op, "aten::clone");
    assert!(calls.len() > 1400, "{}", calls.len());
    for pair in calls.chunks(2) {
        let [host, gpu] = pair else { panic!("no twin") };
        let of = |call: &Call| call.signature.tensors.first().map(|t| t.device.kind);
        assert_eq!((of(host), of(gpu)), (Some(0), Some(1)));
        let what = format!("{} {:?}", host.op, host.signature.tensors);
        let (expected, found) = (numbers(host), numbers(gpu));
        // What an op computed on a GPU is not what it computed elsewhere, to the last bit; copies are.
        let before = |(_, when): &(Operand, u8)| host.op == "aten::clone" || *when == 0;
        let keys: Vec<_> = expected.keys().filter(|key| before(key)).collect();
        assert_eq!(
            keys,
            found.keys().filter(|key| before(key)).collect::<Vec<_>>(),
            "{what}"
        );
        for key in keys {
            let ((binary, numbers), (its_binary, its)) = (&expected[key], &found[key]);
            assert_eq!(binary, its_binary, "{key:?} {what}");
            assert!(numbers.keys().eq(its.keys()), "{key:?} {what}");
            for (field, number) in numbers {
                assert!(
                    agree(*field, *number, its[field]),
                    "{key:?} {field:#x} {number:#x} {:#x} {what}",
                    its[field]
                );
            }
        }
    }
}

#[test]
fn a_recorded_step_waits_for_nothing_more() {
    let Some(bench) = bench_with_gpu() else {
        return;
    };
    let words = bench.words(&Bench::program("gpu.py"), &["steps"]);
    let bare = bench.run(&mut bench.python(&words[1..]));
    bare.expect_code(0);
    for flags in [
        &["--stats", "none"][..],
        &["--stats", "rules"],
        &["--stats", "all"],
        &["--stats", "rules", "--gpu-time"],
    ] {
        let mut record = bench.optape(["-q", "record", "--force", "-o", "t.optape"]);
        let recorded = bench.run(record.args(flags).arg("--").args(&words));
        recorded.expect_code(0);
        let (bare, recorded) = (bare.report(), recorded.report());
        assert_eq!(recorded["waits"], bare["waits"], "{flags:?}");
        println!(
            "{flags:?}: launches {} instead of {}",
            recorded["launches"], bare["launches"]
        );
    }
}

#[test]
fn every_op_on_a_gpu_has_its_time() {
    let Some(bench) = bench_with_gpu() else {
        return;
    };
    let words = bench.words(&Bench::program("gpu.py"), &["steps"]);
    let mut record = bench.optape(["-q", "record", "-o", "t.optape", "--gpu-time", "--"]);
    bench.run(record.args(&words)).expect_code(0);
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = &trace.streams()[0];
    let calls = calls_of(&trace, stream.id());
    let (mut timed, mut convolutions) = (0, 0);
    for call in &calls {
        let Some((entry, numbers)) = call
            .statistics
            .iter()
            .find(|(entry, _)| entry.operand == Operand::Call)
        else {
            continue;
        };
        assert_eq!(entry.state, State::Present, "{}", call.op);
        let ns = numbers[&fields::DEVICE_TIME];
        assert!(ns < 10_000_000_000, "{} took {ns} ns", call.op);
        timed += 1;
        convolutions += u64::from(call.op == "aten::convolution" && ns > 0);
    }
    assert!(timed > 100 && convolutions >= 10, "{timed} {convolutions}");
    let costs = &stream.end().unwrap().costs;
    assert_eq!(costs["gpu_time.read"], timed);
    let replayed = bench.replay("t.optape", &["--by", "module"]);
    assert_eq!(replayed["gpu_time"]["calls"], timed);
}

#[test]
fn gpu_time_without_a_gpu_is_a_state_with_a_hint() {
    let Some(bench) = Bench::new() else { return };
    let program = bench.write(
        "host.py",
        "import torch\nprint((torch.ones(3) + 1).sum().item())\n",
    );
    let mut record = bench.optape(["record", "-o", "t.optape", "--gpu-time", "--"]);
    let done = bench.run(record.args(bench.words(&program, &[])));
    done.expect_code(0);
    assert_eq!(done.stdout, "6.0\n");
    assert!(
        done.stderr.contains("--gpu-time: no op had work for a GPU"),
        "{}",
        done.stderr
    );
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = &trace.streams()[0];
    assert_eq!(trace.run().facts["capture.gpu_time"], "true");
    assert_eq!(stream.end().unwrap().costs["gpu_time.calls"], 0);
    for call in calls_of(&trace, stream.id()) {
        assert!(
            call.statistics
                .iter()
                .all(|(e, _)| e.operand != Operand::Call)
        );
    }
    let info = bench.run(&mut bench.optape(["info", "t.optape"]));
    assert!(
        info.stdout
            .contains("GPU time   none: no op had work for a GPU"),
        "{}",
        info.stdout
    );
    assert!(bench.replay("t.optape", &[])["gpu_time"].is_null());
}

#[test]
fn eager_disables_compilation() {
    let Some(bench) = Bench::new() else { return };
    let program = bench.write(
        "compiled.py",
        "import json, torch\n\
         from torch._dynamo.utils import counters\n\
         f = torch.compile(lambda x: x.sin() + 1, backend='eager')\n\
         f(torch.ones(3))\n\
         print(json.dumps({'graphs': counters['stats'].get('unique_graphs', 0)}))\n",
    );
    for (flags, graphs) in [(&[][..], 1), (&["--eager"][..], 0)] {
        let mut record = bench.optape(["-q", "record", "--force", "-o", "t.optape"]);
        let done = bench.run(
            record
                .args(flags)
                .arg("--")
                .args(bench.words(&program, &[])),
        );
        done.expect_code(0);
        assert_eq!(done.report(), json!({ "graphs": graphs }), "{flags:?}");
        let trace = Trace::open(&bench.path("t.optape")).unwrap();
        let eager = trace.run().facts.get("capture.eager").map(String::as_str);
        assert_eq!(eager, (graphs == 0).then_some("true"));
    }
}

#[test]
fn replays_of_graphs_are_opaque_regions_with_names() {
    let Some(bench) = Bench::new() else { return };
    // The class of torch wants a GPU; what is done to it is done to this one.
    let program = bench.write(
        "graphs.py",
        "import sys, types, torch\n\
         class Graph:\n\
         \x20   def replay(self):\n\
         \x20       return torch.ones(2).sum().item()\n\
         attach = sys.modules['_optape_attach']\n\
         stand_in = types.SimpleNamespace(cuda=types.SimpleNamespace(CUDAGraph=Graph))\n\
         attach.name_graphs(stand_in, attach.recorder.capture)\n\
         torch.zeros(1)\n\
         first, second = Graph(), Graph()\n\
         assert [g.replay() for g in (first, second, first)] == [2.0] * 3\n",
    );
    let done = bench.run(&mut bench.record("t.optape", bench.words(&program, &[])));
    done.expect_code(0);
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = &trace.streams()[0];
    let mut names = Vec::new();
    for (_, moment) in trace.moments(stream.id()).unwrap() {
        if let Event::Opaque { name, duration_ns } = moment.event {
            assert!(duration_ns > 0);
            names.push(stream.dictionary().text(name).unwrap().to_owned());
        }
    }
    assert_eq!(names, ["CUDA graph 0", "CUDA graph 1", "CUDA graph 0"]);
}
