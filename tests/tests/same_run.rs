//! The recorded run is the same run: the same bits, exit codes, output and signals as without the recorder.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::process::Command;
use std::sync::LazyLock;

use optape_tests::{Bench, Done, calls_of};
use optape_trace::{Event, Trace, TraceEnd};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;

/// A program's report without the recorder, and with it.
type Reports = (Value, Value);

/// Runs `PROGRAM ARGUMENTS` without the recorder, and with it.
fn both(program: &str, arguments: &[&str]) -> Option<Reports> {
    let bench = Bench::new()?;
    let words = bench.words(&Bench::program(program), arguments);
    let environment = [
        // Compilers would find in the second run what they kept in the first.
        ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1"),
        ("TORCHINDUCTOR_COMPILE_THREADS", "1"),
        // torch's profiler writes the time to stderr.
        ("KINETO_LOG_LEVEL", "99"),
    ];
    let plain = bench.run(bench.command(&words[0]).args(&words[1..]).envs(environment));
    let recorded = bench.run(bench.record("t.optape", &words).envs(environment));
    plain.expect_code(0);
    recorded.expect_code(0);
    assert_eq!(
        programs_own(&recorded.stderr),
        plain.stderr,
        "what the program says on stderr"
    );
    is_sound(&bench);
    Some((plain.report(), recorded.report()))
}

/// Without what the recorder says at the end of forked or killed processes.
fn programs_own(stderr: &str) -> String {
    stderr
        .split_inclusive('\n')
        .filter(|line| !line.starts_with("optape: "))
        .collect()
}

/// The trace ended well, and no recorder switched itself off.
fn is_sound(bench: &Bench) {
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    assert!(!trace.streams().is_empty());
    for stream in trace.streams() {
        assert_eq!(stream.dropped_records(), 0);
        for (_, moment) in trace.moments(stream.id()).unwrap() {
            assert!(
                !matches!(moment.event, Event::Disabled { .. }),
                "{moment:?}"
            );
        }
    }
    assert!(!calls_of(&trace, trace.streams()[0].id()).is_empty());
}

/// Both runs gave the same for `name`, and it holds what shows that the program did what it is for.
fn same(reports: Option<Reports>, name: &str, shows: &str) {
    let Some((plain, recorded)) = reports else {
        return;
    };
    assert!(
        plain[name].to_string().contains(shows),
        "{name}: no {shows} in {}",
        plain[name]
    );
    assert_eq!(recorded[name], plain[name], "{name}");
}

/// One process for all that does not need one of its own: torch takes seconds to import.
fn usual() -> Option<Reports> {
    static REPORTS: LazyLock<Option<Reports>> = LazyLock::new(|| {
        let names = [
            "snn_training",
            "inplace_relu",
            "checkpointing",
            "autocast",
            "inference_mode",
            "copies",
            "transforms",
            "modes",
        ];
        both("same_run.py", &names)
    });
    REPORTS.clone()
}

#[test]
fn training_a_spiking_network() {
    same(usual(), "snn_training", "digest");
}

#[test]
fn inplace_relu_after_a_module() {
    same(usual(), "inplace_relu", "modified by an inplace operation");
}

#[test]
fn checkpointing_of_both_kinds() {
    same(usual(), "checkpointing", "reentrant=True");
}

#[test]
fn autocast() {
    same(usual(), "autocast", "bfloat16");
}

#[test]
fn inference_mode() {
    same(usual(), "inference_mode", "true");
}

#[test]
fn copied_and_pickled_models() {
    same(usual(), "copies", "data.pkl");
}

#[test]
fn function_transforms_and_second_derivatives() {
    same(usual(), "transforms", "digest");
}

#[test]
fn what_the_programs_own_tools_see() {
    same(usual(), "modes", "aten.convolution.default");
}

#[test]
fn two_threads() {
    same(both("same_run.py", &["two_threads"]), "two_threads", "big");
}

#[test]
fn data_loader_with_forked_workers() {
    same(
        both("same_run.py", &["data_loader"]),
        "data_loader",
        "persistent=True",
    );
}

#[test]
fn compiled_graphs_and_recompilations() {
    let reports = both("compiled.py", &["graphs", "aot_eager", "inductor"]);
    for backend in ["graphs", "aot_eager", "inductor"] {
        same(reports.clone(), backend, "unique_graphs");
    }
}

#[test]
fn exit_codes_output_and_tracebacks() {
    let Some(bench) = Bench::new() else { return };
    for (how, code) in [
        ("code", 3),
        ("text", 1),
        ("hard", 4),
        ("error", 1),
        ("module", 1),
        ("backward", 1),
    ] {
        let (plain, recorded) = ends(&bench, how);
        assert_eq!(plain.code(), code, "{how}: {}", plain.stderr);
        recorded.expect_code(code);
        assert_eq!(recorded.stdout, plain.stdout, "{how}");
        assert_eq!(programs_own(&recorded.stderr), plain.stderr, "{how}");
    }
}

#[test]
fn death_by_a_signal() {
    let Some(bench) = Bench::new() else { return };
    for (how, code) in [("SIGTERM", 143), ("SIGKILL", 137)] {
        let (plain, recorded) = ends(&bench, how);
        assert_eq!(plain.code(), code, "{how}: {}", plain.stderr);
        recorded.expect_code(code);
        assert_eq!(recorded.stdout, plain.stdout, "{how}");
        let trace = Trace::open(&bench.path("t.optape")).unwrap();
        let TraceEnd::Clean(end) = trace.end() else {
            panic!("{how}: {:?}", trace.end())
        };
        assert_eq!(
            (end.exit_code, end.signal),
            (None, Some(code - 128)),
            "{how}"
        );
        assert!(
            trace.streams()[0].op_calls() > 50,
            "{how}: what ran before is in the file"
        );
    }
}

#[test]
fn signals_from_outside_arrive_once() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("ends.py"), &["waits"]);
    // As a terminal does it, to the whole group; and as a supervisor does it, to the process that it started.
    type Send = fn(Pid, Signal) -> rustix::io::Result<()>;
    let ways: [(&str, Signal, Send, i32); 6] = [
        ("group", Signal::INT, kill_process_group, 130),
        ("group", Signal::QUIT, kill_process_group, 131),
        ("group", Signal::TERM, kill_process_group, 143),
        ("alone", Signal::INT, kill_process, 130),
        ("alone", Signal::QUIT, kill_process, 131),
        ("alone", Signal::TERM, kill_process, 143),
    ];
    for (way, signal, send, code) in ways {
        let way = &format!("{way}-{}", signal.as_raw());
        let plain = interrupted(&bench, &mut bench.python(&words[1..]), |pid| {
            send(pid, signal).unwrap()
        });
        let mut record = bench.record(&format!("{way}.optape"), &words);
        let recorded = interrupted(&bench, &mut record, |pid| send(pid, signal).unwrap());
        assert_eq!(plain.code(), code, "{way}");
        recorded.expect_code(code);
        assert_eq!(recorded.stdout, plain.stdout, "{way}");
        assert_eq!(programs_own(&recorded.stderr), plain.stderr, "{way}");
        let times = usize::from(signal == Signal::INT);
        assert_eq!(
            recorded.stderr.matches("KeyboardInterrupt").count(),
            times,
            "{way}"
        );
    }
}

fn interrupted(bench: &Bench, command: &mut Command, send: impl Fn(Pid)) -> Done {
    let running = bench.start(command);
    running.wait_for_output("worked");
    send(running.pid());
    running.wait()
}

/// `ends.py HOW` without the recorder, and with it.
fn ends(bench: &Bench, how: &str) -> (Done, Done) {
    let words = bench.words(&Bench::program("ends.py"), &[how]);
    let _ = std::fs::remove_file(bench.path("t.optape"));
    (
        bench.run(&mut bench.python(&words[1..])),
        bench.run(&mut bench.record("t.optape", &words)),
    )
}
