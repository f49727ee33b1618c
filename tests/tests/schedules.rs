//! Which part of a run is recorded: schedules, pauses, and what the file says of the rest.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use optape_tests::{Bench, Call, Done, Running, calls_of};
use optape_trace::{Elements, Event, Ordinal, PauseReason, Record, StepSource, Trace, TraceEnd};

/// A run of `steps.py` under `optape record` with flags.
fn recorded(bench: &Bench, flags: &[&str], arguments: &[&str]) -> Done {
    bench.run(&mut command(bench, flags, arguments))
}

fn command(bench: &Bench, flags: &[&str], arguments: &[&str]) -> std::process::Command {
    let mut command = bench.optape(["record", "-f", "-o", "t.optape"]);
    command
        .args(flags)
        .arg("--")
        .args(bench.words(&Bench::program("steps.py"), arguments));
    command
}

fn trace(bench: &Bench) -> Trace {
    Trace::open(&bench.path("t.optape")).unwrap()
}

fn events(trace: &Trace) -> Vec<Event> {
    let stream = trace.streams()[0].id();
    trace
        .moments(stream)
        .unwrap()
        .into_iter()
        .map(|(_, moment)| moment.event)
        .collect()
}

/// The optimizer steps whose end is in the file.
fn steps(trace: &Trace) -> Vec<u64> {
    events(trace)
        .into_iter()
        .filter_map(|event| match event {
            Event::StepMark {
                step,
                source: StepSource::Optimizer,
            } => Some(step),
            _ => None,
        })
        .collect()
}

/// What a step is made of, with its modules and stages.
fn shape(calls: &[Call]) -> Vec<(String, String, String)> {
    calls
        .iter()
        .map(|c| (c.op.clone(), c.scope.clone(), c.stage.clone()))
        .collect()
}

/// The calls of one step, from its `zero_grad` on. The first step differs from the others: it has no gradients to throw away.
fn calls_of_step(bench: &Bench, steps: &str) -> Vec<Call> {
    recorded(bench, &["-q", "--steps", steps], &["6", "busy"]).expect_code(0);
    let trace = trace(bench);
    calls_of(&trace, trace.streams()[0].id())
}

#[test]
fn some_steps_are_recorded_and_the_run_is_the_same() {
    let Some(bench) = Bench::new() else { return };
    let plain = bench.run(
        bench
            .python([Bench::program("steps.py").as_os_str()])
            .arg("12"),
    );
    let done = recorded(&bench, &["--steps", "3..6"], &["12"]);
    done.expect_code(0)
        .expect_message("it made 12 optimizer steps")
        .expect_message("paused 2 times");
    assert_eq!(done.stdout, plain.stdout, "the same losses");
    let trace = trace(&bench);
    assert_eq!(steps(&trace), [3, 4, 5]);
    let pauses: Vec<Event> = events(&trace)
        .into_iter()
        .filter(|e| matches!(e, Event::Paused { .. } | Event::Resumed))
        .collect();
    let reason = PauseReason::Schedule;
    assert_eq!(
        pauses,
        [
            Event::Paused { reason },
            Event::Resumed,
            Event::Paused { reason }
        ]
    );
    let stream = &trace.streams()[0];
    let calls = calls_of(&trace, stream.id());
    assert!(calls.iter().all(|call| !call.unattributed));
    assert_eq!(
        calls.iter().filter(|c| c.op == "aten::addmm").count(),
        3 * 2,
        "two linear layers in three steps"
    );
    assert_eq!(stream.end().unwrap().costs["recording.pauses"], 2);
    let replayed = bench.run(&mut bench.optape(["replay", "t.optape"]));
    replayed.expect_code(0);
    let said = format!("{}{}", replayed.stdout, replayed.stderr);
    assert!(said.contains("recording was paused 2 time(s)"), "{said}");
    let info = bench.run(&mut bench.optape(["info", "t.optape"]));
    assert!(
        info.stdout.contains("not those of the whole run"),
        "{}",
        info.stdout
    );
    bench
        .run(&mut bench.optape(["verify", "t.optape"]))
        .expect_code(0);
}

#[test]
fn a_step_in_the_middle_is_recorded_as_in_a_whole_run() {
    let Some(bench) = Bench::new() else { return };
    recorded(&bench, &["-q"], &["6", "busy"]).expect_code(0);
    let whole = trace(&bench);
    let stream = whole.streams()[0].id();
    let marks: Vec<u64> = whole
        .moments(stream)
        .unwrap()
        .iter()
        .filter_map(|(ordinal, moment)| match moment.event {
            Event::StepMark {
                source: StepSource::Optimizer,
                ..
            } => Some(ordinal.0),
            _ => None,
        })
        .collect();
    let all: Vec<Call> = calls_of(&whole, stream)
        .into_iter()
        .filter(|call| call.ordinal.0 > marks[2] && call.ordinal.0 < marks[3])
        .collect();
    let alone = calls_of_step(&bench, "3..4");
    assert!(!alone.is_empty());
    assert_eq!(shape(&alone), shape(&all));
    let statistics =
        |calls: &[Call]| -> Vec<_> { calls.iter().map(|c| c.statistics.clone()).collect() };
    assert_eq!(statistics(&alone), statistics(&all));
}

#[test]
fn one_of_every_few_steps() {
    let Some(bench) = Bench::new() else { return };
    recorded(&bench, &["-q", "--every", "5"], &["12"]).expect_code(0);
    assert_eq!(steps(&trace(&bench)), [0, 5, 10]);
    recorded(&bench, &["-q", "--steps", "1..9", "--every", "3"], &["12"]).expect_code(0);
    assert_eq!(steps(&trace(&bench)), [1, 4, 7]);
}

#[test]
fn inferences_count_where_nothing_is_trained() {
    let Some(bench) = Bench::new() else { return };
    recorded(&bench, &["-q", "--steps", "4..6"], &["0", "eval=10"]).expect_code(0);
    let inference = trace(&bench);
    let calls = calls_of(&inference, inference.streams()[0].id());
    assert_eq!(calls.iter().filter(|c| c.op == "aten::addmm").count(), 4);
    let flags = ["-q", "--steps", "4..6", "--step-by", "optimizer"];
    recorded(&bench, &flags, &["0", "eval=10"]).expect_code(0);
    let nothing = trace(&bench);
    assert_eq!(nothing.streams()[0].op_calls(), 0);
}

#[test]
fn a_schedule_that_never_starts_says_how_many_steps_there_were() {
    let Some(bench) = Bench::new() else { return };
    let done = recorded(&bench, &["--steps", "100..200"], &["7"]);
    done.expect_code(0)
        .expect_message("NOTHING was recorded")
        .expect_message("it made 7 optimizer steps");
    let trace = trace(&bench);
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    assert_eq!(trace.streams()[0].op_calls(), 0);
    let bad = recorded(&bench, &["--steps", "9..3"], &["1"]);
    bad.expect_code(2).expect_message("no step");
}

/// The facts of a trace that are about modules: module, key and value.
fn facts_of_modules(trace: &Trace) -> BTreeSet<(String, String, String)> {
    let dictionary = trace.streams()[0].dictionary();
    events(trace)
        .into_iter()
        .filter_map(|event| match event {
            Event::Fact {
                module: Some(module),
                key,
                value,
            } => Some((
                dictionary.module(module).unwrap().name.clone(),
                dictionary.text(key).unwrap().to_owned(),
                value,
            )),
            _ => None,
        })
        .collect()
}

#[test]
fn the_last_second_has_its_values_and_all_facts() {
    let Some(bench) = Bench::new() else { return };
    let watch = ["-q", "--watch", "Linear:output", "--keep", "values"];
    recorded(&bench, &watch, &["2"]).expect_code(0);
    let known = facts_of_modules(&trace(&bench));
    assert!(!known.is_empty());

    let flags = [&watch[..], &["--ring", "1s"]].concat();
    recorded(&bench, &flags, &["300", "slow"]).expect_code(0);
    let trace = trace(&bench);
    let stream = &trace.streams()[0];
    assert!(matches!(
        events(&trace)[..],
        [
            Event::Paused {
                reason: PauseReason::Expired
            },
            Event::Resumed,
            ..
        ]
    ));
    let last = steps(&trace);
    assert_eq!(last.last(), Some(&299));
    assert!(last[0] > 0, "the first step is too old");
    assert_eq!(facts_of_modules(&trace), known);

    let watched: Vec<Ordinal> = trace
        .records(stream.id())
        .map(Result::unwrap)
        .filter_map(|(ordinal, record)| match record {
            Record::OpCall(call) => {
                let signature = stream.dictionary().signature(call.signature)?;
                let op = stream.dictionary().op(signature.op)?;
                (op.name == "optape::watch").then_some(ordinal)
            }
            _ => None,
        })
        .collect();
    let kept: Vec<Ordinal> = trace
        .values(stream.id())
        .map(|value| value.unwrap())
        .inspect(|value| assert_ne!(value.elements, Elements::Lost))
        .map(|value| value.ordinal)
        .collect();
    assert!(!kept.is_empty());
    assert_eq!(kept, watched);
}

#[test]
fn ranges_across_pauses_stay_paired() {
    let Some(bench) = Bench::new() else { return };
    // Range oddN is open over steps N and N+1.
    recorded(&bench, &["-q", "--steps", "2..3"], &["6", "range"]).expect_code(0);
    let trace = trace(&bench);
    let dictionary = trace.streams()[0].dictionary();
    let mut open = BTreeSet::new();
    let mut seen = Vec::new();
    for event in events(&trace) {
        match event {
            Event::RangeEnter { name } => {
                let name = dictionary.text(name).unwrap().clone();
                seen.push(name.clone());
                open.insert(name);
            }
            Event::RangeExit { name } => {
                assert!(open.remove(dictionary.text(name).unwrap()));
            }
            _ => {}
        }
    }
    assert!(seen.contains(&"odd1".to_owned()), "{seen:?}");
    assert!(!seen.contains(&"odd3".to_owned()), "{seen:?}");
    assert!(open.is_empty(), "{open:?}");
}

fn control(bench: &Bench, arguments: &[&str]) -> Done {
    bench.run(bench.optape(["ctl"]).args(arguments))
}

/// Waits until `optape ctl status` says it of the run of this bench.
fn wait_for(bench: &Bench, what: &str, wanted: impl Fn(&serde_json::Value) -> bool) {
    let started = Instant::now();
    loop {
        let done = control(bench, &["status", "t.optape", "--format", "json"]);
        if done.code() == 0 && wanted(&done.json()["runs"][0]) {
            return;
        }
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "never: {what}; {}{}",
            done.stdout,
            done.stderr
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is(run: &serde_json::Value, state: &str) -> bool {
    run["streams"][0]["state"] == state
}

fn running(bench: &Bench, flags: &[&str]) -> Running {
    let running = bench.start(&mut command(bench, flags, &["0", "forever", "slow"]));
    running.wait_for_output("ready");
    running
}

#[test]
fn paused_resumed_marked_flushed_and_stopped_from_outside() {
    let Some(bench) = Bench::new() else { return };
    let program = running(&bench, &["--paused"]);
    wait_for(&bench, "it waits", |run| {
        is(run, "paused") && run["streams"][0]["steps"]["optimizer"].as_u64() > Some(3)
    });
    control(&bench, &["resume", "t.optape"])
        .expect_code(0)
        .expect_message("resumed 1 process");
    wait_for(&bench, "it records", |run| {
        is(run, "records") && run["streams"][0]["op_calls"].as_u64() > Some(0)
    });
    control(&bench, &["mark", "here", "--run", "t.optape"]).expect_code(0);
    control(&bench, &["flush", "t.optape"]).expect_code(0);
    let live = trace(&bench);
    assert!(matches!(live.end(), TraceEnd::Unfinished { .. }));
    assert!(events(&live).contains(&Event::Mark {
        text: "here".to_owned()
    }));
    control(&bench, &["pause", "t.optape"]).expect_code(0);
    wait_for(&bench, "it is paused", |run| is(run, "paused"));
    // By the process that is recorded, not by its file.
    let status = control(&bench, &["status", "t.optape", "--format", "json"]).json();
    let process = status["runs"][0]["streams"][0]["process_id"].to_string();
    control(&bench, &["attach", &process]).expect_code(0);
    wait_for(&bench, "it records again", |run| is(run, "records"));
    control(&bench, &["attach", &process])
        .expect_code(1)
        .expect_message("already");
    control(&bench, &["stop", &process])
        .expect_code(0)
        .expect_message("t.optape is complete");
    let stopped = trace(&bench);
    assert!(matches!(stopped.end(), TraceEnd::Clean(_)));
    assert!(stopped.streams()[0].end().unwrap().clean);
    bench.write("stop", "");
    let done = program.wait();
    done.expect_code(0);
    assert!(done.stdout.contains("done"), "the program went on");
    let pauses = events(&stopped)
        .iter()
        .filter(|e| {
            matches!(
                e,
                Event::Paused {
                    reason: PauseReason::Asked
                }
            )
        })
        .count();
    assert_eq!(pauses, 2);
    let calls = calls_of(&stopped, stopped.streams()[0].id());
    // A pause may fall into the middle of a step; what is of that step is either right or said to be unknown.
    assert!(
        calls
            .iter()
            .filter(|c| c.op == "aten::addmm")
            .all(|c| c.scope.starts_with("Net.fc"))
    );
    let gone = control(&bench, &["pause", "t.optape"]);
    gone.expect_code(2).expect_message("no run t.optape");
    let nobody = control(&bench, &["attach", "1"]);
    nobody.expect_code(2).expect_message("--paused");
}

#[test]
fn a_process_that_becomes_another_program_has_two_streams() {
    let Some(bench) = Bench::new() else { return };
    recorded(&bench, &[], &["3", "exec"]).expect_code(0);
    let trace = trace(&bench);
    let ends: Vec<(u32, bool)> = trace
        .streams()
        .iter()
        .map(|s| (s.info().process_id, s.end().unwrap().clean))
        .collect();
    let [(first, false), (second, true)] = ends[..] else {
        panic!("{ends:?}")
    };
    assert_eq!(first, second, "one process");
    for stream in trace.streams() {
        let calls = calls_of(&trace, stream.id());
        assert_eq!(calls.iter().filter(|c| c.op == "aten::addmm").count(), 6);
    }
    bench
        .run(&mut bench.optape(["verify", "t.optape"]))
        .expect_code(0);
}
