//! `import optape`: programs, notebooks and tests that record themselves, and programs with marks in them, recorded and not.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;
use std::path::Path;

use optape_tests::{Bench, Call, calls_of, ops_of, workspace};
use optape_trace::{Dictionary, Event, Record, StepSource, Trace};
use serde_json::Value;

/// The calls of each process, most first.
fn streams(path: &Path) -> Vec<Vec<Call>> {
    let trace = Trace::open(path).unwrap();
    let mut all: Vec<Vec<Call>> = trace
        .streams()
        .iter()
        .map(|stream| calls_of(&trace, stream.id()))
        .collect();
    all.sort_by_key(|calls| std::cmp::Reverse(calls.len()));
    all
}

fn events(path: &Path) -> Vec<Event> {
    let trace = Trace::open(path).unwrap();
    let stream = trace.streams()[0].id();
    let records = trace.records(stream).map(|record| record.unwrap().1);
    records
        .filter_map(|record| match record {
            Record::Other(moment) => Some(moment.event),
            _ => None,
        })
        .collect()
}

fn text(dictionary: &Dictionary, id: optape_trace::TextId) -> String {
    dictionary.text(id).unwrap().to_owned()
}

fn count(calls: &[Call], op: &str) -> u64 {
    ops_of(calls).get(op).copied().unwrap_or(0)
}

#[test]
fn a_program_records_itself() {
    let Some(bench) = Bench::new() else { return };
    let directory = bench.path("traces");
    std::fs::create_dir(&directory).unwrap();
    let done = bench.run(&mut bench.importing([
        Bench::program("imported.py").as_os_str(),
        directory.as_os_str(),
    ]));
    done.expect_code(0).expect_no_panic();
    assert_eq!(done.stderr, "", "nothing went wrong");
    let report = done.report();

    let refusals = &report["refusals"];
    for (what, parts) in [
        ("stop", &["nothing is being recorded"][..]),
        ("exists", &["exists.optape exists", "force=True"]),
        ("directory", &["there is no directory", "nowhere"]),
        ("stats", &["many", "rules"]),
        ("binary", &["OPTAPE_BIN is /no/such/optape"]),
        ("other binary", &["/bin/false does not fit this package"]),
        (
            "torch",
            &[
                "torch 1.0.0 is not among the supported versions",
                "force_torch=True",
            ],
        ),
        ("twice", &["recorded already", "twice.optape"]),
    ] {
        let said = refusals[what].as_str().unwrap();
        for part in parts {
            assert!(said.contains(part), "{what}: {said}");
        }
    }

    let first = directory.join("first.optape");
    let processes = streams(&first);
    assert_eq!(processes.len(), 2, "the program, and what it forked");
    let calls = &processes[0];
    let ops = ops_of(calls);
    assert_eq!(ops["aten::convolution"], 3, "{ops:?}");
    assert_eq!((ops["aten::sinh"], ops["aten::atan"]), (1, 1), "{ops:?}");
    assert_eq!(ops.get("aten::cosh"), None, "it was paused");
    assert_eq!(count(&processes[1], "aten::erf"), 1);
    let lost: Vec<&Call> = calls.iter().filter(|call| call.unattributed).collect();
    assert!(lost.is_empty(), "of unknown module: {lost:?}");
    let scope = |op: &str| &calls.iter().find(|call| call.op == op).unwrap().scope;
    assert_eq!(scope("aten::convolution"), "Net.conv");
    assert_eq!(scope("aten::convolution_backward"), "Net.conv");
    let watched = calls.iter().find(|call| {
        call.op == "optape::watch"
            && call.nonzeros(0).is_some_and(|n| n > 0)
            && call.scope == "Global"
    });
    assert_eq!(watched.unwrap().binary(0), Some(true));

    let trace = Trace::open(&first).unwrap();
    let dictionary = trace.streams()[0].dictionary();
    let mut stages: BTreeMap<Option<String>, u64> = BTreeMap::new();
    for call in calls.iter().filter(|call| call.op == "aten::convolution") {
        let name = call.signature.stage_name.map(|id| text(dictionary, id));
        *stages.entry(name).or_default() += 1;
    }
    assert_eq!(
        stages,
        BTreeMap::from([(Some("warmup".to_owned()), 1), (None, 2)])
    );
    let events = events(&first);
    let program_steps = events
        .iter()
        .filter(|event| {
            matches!(
                event,
                Event::StepMark {
                    source: StepSource::Program,
                    ..
                }
            )
        })
        .count();
    let samples: u64 = events
        .iter()
        .filter_map(|event| match event {
            Event::Samples { count } => Some(*count),
            _ => None,
        })
        .sum();
    assert_eq!((program_steps, samples), (2, 16));
    let ranges: Vec<String> = events
        .iter()
        .filter_map(|event| match event {
            Event::RangeEnter { name } => Some(text(dictionary, *name)),
            _ => None,
        })
        .collect();
    assert!(ranges.contains(&"epoch".to_owned()), "{ranges:?}");
    let per_sample = bench.run(&mut bench.optape([
        "replay",
        "traces/first.optape",
        "--per",
        "sample",
        "--format",
        "json",
    ]));
    per_sample.expect_code(0);

    let second = streams(&directory.join("second.optape"));
    assert_eq!(second.len(), 1);
    assert_eq!(
        ops_of(&second[0]),
        BTreeMap::from([("aten::tan".to_owned(), 1)])
    );
    let tan = &second[0][0];
    assert!(
        tan.statistics.len() > 1,
        "the statistics of --stats all: {tan:?}"
    );
    assert!(!directory.join("nothing.optape").exists());
    assert_eq!(report["nothing"]["path"], Value::Null);
    assert_eq!(report["first"]["dropped"], 0);
    let told = report["second"]["repr"].as_str().unwrap();
    assert!(
        told.contains("1 op calls") && told.contains("optape replay"),
        "{told}"
    );

    let last = streams(&directory.join("last.optape"));
    assert_eq!(count(&last[0], "aten::convolution"), 1);
    let trace = Trace::open(&directory.join("last.optape")).unwrap();
    assert!(trace.streams()[0].end().is_some_and(|end| end.clean));
}

#[test]
fn marks_act_on_what_optape_record_records() {
    let Some(bench) = Bench::new() else { return };
    let program = Bench::program("marked.py");
    let words = bench.words(&program, &[]);
    let python_path = workspace().join("recorder/python");
    let done = bench.run(
        bench
            .record("t.optape", &words)
            .env("PYTHONPATH", &python_path),
    );
    done.expect_code(0);
    assert!(done.stdout.ends_with("done\n"), "{}", done.stdout);
    assert!(
        done.stdout.contains("the file of `optape record`"),
        "{}",
        done.stdout
    );
    assert!(!bench.path("ignored.optape").exists());
    let calls = streams(&bench.path("t.optape")).remove(0);
    assert_eq!(count(&calls, "aten::erf"), 1, "it goes on after stop");
    assert_eq!(count(&calls, "optape::watch"), 3);
    let samples: Vec<u64> = events(&bench.path("t.optape"))
        .into_iter()
        .filter_map(|event| match event {
            Event::Samples { count } => Some(count),
            _ => None,
        })
        .collect();
    assert_eq!(samples, [32, 32, 32]);
    let measured = bench.replay("t.optape", &["--range", "measure"]);
    assert_eq!(
        measured["coverage"]["op_calls"], 6,
        "three calls of t and addmm"
    );
    let flop = &bench.replay("t.optape", &["--per", "sample"])["counters"]["flop"]["total"];
    assert!(flop.is_number(), "{flop}");
}

#[test]
fn marks_leave_compiled_code_whole() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("marked.py"), &["compiled"]);
    let python_path = workspace().join("recorder/python");
    let recorded = bench.run(
        bench
            .record("t.optape", &words)
            .env("PYTHONPATH", &python_path),
    );
    recorded.expect_code(0);
    assert!(recorded.stdout.ends_with("done\n"));
    // Unrecorded: a recording of its own in the place of the one outside.
    let plain = bench.run(&mut bench.importing(words.iter().skip(1)));
    plain.expect_code(0);
    assert!(bench.path("ignored.optape").exists() || plain.stdout.contains("nothing was recorded"));
}

#[test]
fn a_notebook_records_its_cells() {
    let Some(bench) = Bench::new() else { return };
    let trace = bench.path("cells.optape");
    let done = bench.run(
        bench
            .importing([Bench::program("notebook.py").as_os_str(), trace.as_os_str()])
            .env("IPYTHONDIR", bench.path("ipython")),
    );
    done.expect_code(0);
    let report = done.report();
    let error = |cell: usize| {
        report[cell]["error"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    assert!(
        report[1]["result"]
            .as_str()
            .unwrap()
            .contains("recording into"),
        "{report}"
    );
    assert!(
        error(3).contains("RecordingError") && error(3).contains("recorded already"),
        "{report}"
    );
    assert!(error(4).starts_with("ZeroDivisionError"), "{report}");
    assert!(
        report[5]["result"]
            .as_str()
            .unwrap()
            .contains("nothing dropped"),
        "{report}"
    );
    assert!(error(6).contains("nothing is being recorded"), "{report}");
    let calls = streams(&trace).remove(0);
    assert_eq!(count(&calls, "aten::addmm"), 4);
}

#[test]
fn a_pytest_fixture_records_a_test() {
    let Some(bench) = Bench::new() else { return };
    bench.write("conftest.py", "pytest_plugins = ['optape.pytest_plugin']\n");
    bench.write(
        "test_layer.py",
        "import torch\n\n\
         def test_layer(optape_recording):\n    \
             torch.nn.Linear(6, 4)(torch.rand(2, 6))\n    \
             assert optape_recording.stop().op_calls > 0\n\n\
         def test_goes_on(optape_recording):\n    \
             torch.nn.Linear(6, 4)(torch.rand(2, 6))\n",
    );
    let done = bench.run(&mut bench.importing([
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        "base",
        "test_layer.py",
    ]));
    done.expect_code(0);
    assert!(done.stdout.contains("2 passed"), "{}", done.stdout);
    for test in ["test_layer0", "test_goes_on0"] {
        let calls = streams(&bench.path("base").join(test).join("test.optape")).remove(0);
        assert_eq!(count(&calls, "aten::addmm"), 1, "{test}");
    }
}

#[test]
fn a_killed_recorder_is_an_exception_and_not_the_programs_end() {
    let Some(bench) = Bench::new() else { return };
    let program = bench.write(
        "killed.py",
        "import os, signal, torch, optape\n\
         recording = optape.start('t.optape')\n\
         torch.rand(3).cosh()\n\
         import time; time.sleep(0.5)\n\
         os.kill(recording._process.pid, signal.SIGKILL)\n\
         for _ in range(1000): torch.rand(3).sinh()\n\
         try:\n    optape.stop()\nexcept optape.RecordingError as error:\n    print(error)\n\
         with optape.record('u.optape'):\n    torch.rand(3).tan()\n",
    );
    let done = bench.run(&mut bench.importing([program]));
    done.expect_code(0);
    assert!(
        done.stdout.contains("was killed by signal 9"),
        "{}",
        done.stdout
    );
    let calls = streams(&bench.path("t.optape")).remove(0);
    assert_eq!(count(&calls, "aten::cosh"), 1);
    assert_eq!(count(&streams(&bench.path("u.optape"))[0], "aten::tan"), 1);
}

#[test]
fn a_killed_program_leaves_its_trace() {
    let Some(bench) = Bench::new() else { return };
    let program = bench.write(
        "killed.py",
        "import os, signal, torch, optape\n\
         recording = optape.start('t.optape')\n\
         torch.rand(3).cosh()\n\
         print(recording._process.pid, flush=True)\n\
         os.kill(os.getpid(), signal.SIGKILL)\n",
    );
    let done = bench.run(&mut bench.importing([program]));
    done.expect_code(137);
    // The recorder ends by itself.
    let recorder = format!("/proc/{}", done.stdout.trim());
    let since = std::time::Instant::now();
    while Path::new(&recorder).exists() {
        assert!(since.elapsed().as_secs() < 60, "the recorder goes on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let calls = streams(&bench.path("t.optape")).remove(0);
    assert_eq!(count(&calls, "aten::cosh"), 1);
}

#[test]
fn every_recording_is_told_what_modules_and_optimizers_are() {
    let Some(bench) = Bench::new() else { return };
    let directory = bench.path("traces");
    std::fs::create_dir(&directory).unwrap();
    let done = bench.run(&mut bench.importing([
        Bench::program("told_again.py").as_os_str(),
        directory.as_os_str(),
    ]));
    done.expect_code(0).expect_no_panic();
    assert_eq!(done.stderr, "", "nothing went wrong");
    for number in 0..3 {
        let path = directory.join(format!("{number}.optape"));
        let trace = Trace::open(&path).unwrap();
        let stream = &trace.streams()[0];
        let dictionary = stream.dictionary();
        let mut facts: BTreeMap<(String, String), Vec<Value>> = BTreeMap::new();
        for event in events(&path) {
            if let Event::Fact { module, key, value } = event {
                let about = module.map(|m| dictionary.module(m).unwrap().name.clone());
                let value = serde_json::from_str(&value).unwrap();
                let subject = (about.unwrap_or_default(), text(dictionary, key));
                facts.entry(subject).or_default().push(value);
            }
        }
        let of = |module: &str, key: &str| {
            let all = facts.get(&(module.to_owned(), key.to_owned()));
            all.cloned().unwrap_or_default()
        };
        assert_eq!(
            of("Net", "attributes").last().unwrap()["factor"],
            number + 1,
            "as it is now"
        );
        assert_eq!(of("", "optimizer.0").len(), 1);
        assert_eq!(of("", "optimizer.0.group.0")[0]["lr"], 0.1);
        let weight = &of("Net.fc", "parameters")[0][0];
        assert_eq!(weight["name"], "weight");
        let storage = weight["storage"].as_u64().unwrap();
        let calls = calls_of(&trace, stream.id());
        let watched = count(&calls, "optape::watch");
        let kept: Vec<_> = trace.values(stream.id()).map(Result::unwrap).collect();
        let kept_facts = facts
            .keys()
            .filter(|(_, key)| key.starts_with("watch."))
            .count();
        let born: Vec<u64> = events(&path)
            .into_iter()
            .filter_map(|event| match event {
                Event::StorageBorn { storage, .. } => Some(storage.0),
                _ => None,
            })
            .collect();
        let used = trace.records(stream.id()).any(|record| {
            matches!(record.unwrap().1, Record::OpCall(call) if call.storages.iter().any(|s| s.0 == storage))
        });
        assert!(used, "facts name what the ops name");
        if number == 1 {
            assert_eq!((watched, kept.len(), kept_facts), (1, 1, 1));
            assert_eq!(kept[0].shape, [2, 4]);
            assert_eq!(
                born.iter().filter(|b| **b == storage).count(),
                1,
                "a parameter is born in the stream like any storage, once"
            );
        } else {
            assert_eq!((watched, kept.len(), kept_facts, born.len()), (0, 0, 0, 0));
        }
    }
}
