//! Every way to start a program, and everything that can keep it from being recorded: then it runs all the same, and one
//! message says why.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use optape_tests::{Bench, Call, Done, calls_of, ops_of, stages_of};
use optape_trace::{Event, StepSource, Trace};

fn calls(bench: &Bench, trace: &str) -> Vec<Call> {
    let trace = Trace::open(&bench.path(trace)).unwrap();
    assert_eq!(trace.streams().len(), 1, "one process ran ops");
    calls_of(&trace, trace.streams()[0].id())
}

fn executable(bench: &Bench, name: &str, content: &str) {
    let path = bench.write(name, content);
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

#[test]
fn all_ways_to_start_a_program() {
    let Some(bench) = Bench::new() else { return };
    let program = std::fs::read_to_string(Bench::program("short.py")).unwrap();
    std::fs::create_dir(bench.path("package")).unwrap();
    bench.write("package/__init__.py", "");
    bench.write("package/__main__.py", &program);
    bench.write("script.py", &program);
    let python = bench
        .run(&mut bench.python(["-c", "import sys; print(sys.executable)"]))
        .stdout;
    executable(
        &bench,
        "console",
        &format!(
            "#!{}\nimport sys\nfrom script import main\nsys.exit(main())\n",
            python.trim()
        ),
    );
    executable(
        &bench,
        "run.sh",
        "#!/bin/sh\nset -e\ncd .\npython script.py \"$@\"\n",
    );
    let ways: [(&str, &[&str]); 6] = [
        ("script", &["python", "script.py", "3"]),
        ("-m", &["python", "-m", "package", "3"]),
        ("-c", &["python", "-c", "import script; script.main()", "3"]),
        ("console script", &["./console", "3"]),
        ("shell script", &["./run.sh", "3"]),
        (
            "-S and optimised",
            &["python", "-O", "-u", "script.py", "3"],
        ),
    ];
    let mut first: Option<BTreeMap<String, u64>> = None;
    for (way, command) in ways {
        let done = bench.run(
            bench
                .optape(["record", "-f", "-o", "t.optape", "--"])
                .args(command),
        );
        done.expect_code(0)
            .expect_message("next: optape replay t.optape");
        assert_eq!(done.stdout, "done\n", "{way}");
        let ops = ops_of(&calls(&bench, "t.optape"));
        assert!(ops["aten::addmm"] > 0, "{way}: {ops:?}");
        assert_eq!(&ops, first.get_or_insert_with(|| ops.clone()), "{way}");
    }
}

#[test]
fn children_have_streams_of_their_own() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(
        &Bench::program("children.py"),
        &["fork", "spawn", "forkserver"],
    );
    let done = bench.run(&mut bench.record("t.optape", &words));
    let ids = done.expect_code(0).report();
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let mut seen = BTreeMap::new();
    for stream in trace.streams() {
        let calls = ops_of(&calls_of(&trace, stream.id()));
        if let Some(count) = calls.get("aten::cosh") {
            assert_eq!(
                seen.insert(u64::from(stream.info().process_id), *count),
                None
            );
        }
    }
    let wanted = [("parent", 5), ("fork", 6), ("spawn", 7), ("forkserver", 8)];
    let wanted = wanted.map(|(name, count)| (ids[name].as_u64().unwrap(), count));
    assert_eq!(seen, BTreeMap::from(wanted));
}

#[test]
fn scopes_and_stages_of_a_class_hierarchy() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("hierarchy.py"), &[]);
    bench
        .run(&mut bench.record("t.optape", &words))
        .expect_code(0);
    let calls = calls(&bench, "t.optape");
    let stages = stages_of(&calls);
    for stage in ["forward", "loss", "backward", "optimizer"] {
        assert!(
            stages.get(stage).is_some_and(|&n| n > 0),
            "{stage}: {stages:?}"
        );
    }
    let lost: Vec<&Call> = calls.iter().filter(|call| call.unattributed).collect();
    assert!(
        lost.is_empty(),
        "{} calls of unknown module, the first: {:?}",
        lost.len(),
        lost[0]
    );

    let with = |op: &str, stage: &str| -> BTreeMap<String, u64> {
        let there = calls
            .iter()
            .filter(|call| call.op == op && call.stage == stage);
        there.fold(BTreeMap::new(), |mut scopes, call| {
            *scopes.entry(call.scope.clone()).or_default() += 1;
            scopes
        })
    };
    let counts = |pairs: &[(&str, u64)]| -> BTreeMap<String, u64> {
        pairs.iter().map(|&(s, n)| (s.to_owned(), n)).collect()
    };
    // Three steps of two time steps, and a test of one.
    let (forward, backward) = (7, 6);
    assert_eq!(
        with("aten::convolution", "forward"),
        counts(&[
            ("Classifier.features.0.conv", forward),
            ("Classifier.features.1.conv", forward)
        ])
    );
    assert_eq!(
        with("aten::convolution_backward", "backward"),
        counts(&[
            ("Classifier.features.0.conv", backward),
            ("Classifier.features.1.conv", backward)
        ])
    );
    assert_eq!(
        with("aten::addmm", "forward"),
        counts(&[
            ("Classifier.head", forward),
            ("Classifier.twice", 2 * forward)
        ])
    );
    // Backward of a linear layer: one product for the weight, one for what goes further back.
    assert_eq!(
        with("aten::mm", "backward"),
        counts(&[
            ("Classifier.head", 2 * backward),
            ("Classifier.twice", 4 * backward)
        ])
    );
    assert_eq!(with("aten::mse_loss", "loss"), counts(&[("Global", 3)]));
    assert_eq!(
        with("aten::native_batch_norm_backward", "backward").len(),
        2
    );
    assert!(
        calls
            .iter()
            .any(|call| call.scope == "Classifier.leak" && call.stage == "forward")
    );

    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = &trace.streams()[0];
    let spiking: Vec<&str> = stream
        .dictionary()
        .modules()
        .filter(|(_, m)| m.spiking)
        .map(|(_, m)| m.name.as_str())
        .collect();
    assert_eq!(
        spiking,
        [
            "Classifier.features.0.spikes",
            "Classifier.features.1.spikes"
        ]
    );
    let moments = trace.moments(stream.id()).unwrap();
    let steps = moments.iter().filter(|(_, m)| {
        matches!(
            m.event,
            Event::StepMark {
                source: StepSource::Optimizer,
                ..
            }
        )
    });
    assert_eq!(steps.count(), 3);
    let ranges = moments.iter().filter_map(|(_, m)| match &m.event {
        Event::RangeEnter { name } => stream.dictionary().text(*name),
        _ => None,
    });
    assert_eq!(ranges.filter(|&name| name == "test").count(), 1);
}

/// The program ran as if nobody had asked, and there is no file.
fn unrecorded(bench: &Bench, done: &Done, message: &str) {
    done.expect_code(0)
        .expect_no_panic()
        .expect_message(message)
        .expect_message("nothing was recorded");
    assert_eq!(done.stdout, "done\n");
    assert!(!bench.path("t.optape").exists(), "no file is left");
}

#[test]
fn nothing_to_record() {
    let Some(bench) = Bench::new() else { return };
    let record = |command: &[&str]| {
        bench.run(
            bench
                .optape(["record", "-o", "t.optape", "--"])
                .args(command),
        )
    };
    unrecorded(
        &bench,
        &record(&["sh", "-c", "echo done"]),
        "no Python that imports torch ran",
    );
    unrecorded(
        &bench,
        &record(&["python", "-c", "print('done')"]),
        "did not import torch",
    );
    unrecorded(
        &bench,
        &record(&["python", "-I", "-c", "print('done')"]),
        "run the program without -I",
    );
    bench
        .run(&mut bench.python(["-m", "venv", "--without-pip", "bare"]))
        .expect_code(0);
    let bare = record(&[
        "bare/bin/python",
        "-c",
        "import importlib.util as u; assert not u.find_spec('torch'); print('done')",
    ]);
    unrecorded(&bench, &bare, "has no torch");
}

#[test]
fn a_torch_that_is_not_supported() {
    let Some(bench) = Bench::new() else { return };
    let short = Bench::program("short.py");
    // As if this torch were not on the list that `record` hands over.
    executable(
        &bench,
        "other.sh",
        &format!(
            "#!/bin/sh\nOPTAPE_TORCH_VERSIONS=1.13.1 exec python '{}'\n",
            short.display()
        ),
    );
    let done = bench.run(&mut bench.optape(["record", "-o", "t.optape", "--", "./other.sh"]));
    unrecorded(&bench, &done, "--force-torch");
    let done = bench.run(&mut bench.optape([
        "record",
        "--force-torch",
        "-o",
        "t.optape",
        "--",
        "./other.sh",
    ]));
    done.expect_code(0);
    assert!(!calls(&bench, "t.optape").is_empty());
}

#[test]
fn no_compiler_and_no_built_hook() {
    let Some(bench) = Bench::new() else { return };
    let python = bench
        .run(&mut bench.python(["-c", "import sys; print(sys.executable)"]))
        .stdout
        .trim()
        .to_owned();
    let short = Bench::program("short.py").display().to_string();
    let record = |variables: &[(&str, &str)]| {
        let mut command = bench.optape(["record", "-o", "t.optape", "--", &python, &short]);
        command
            .env("XDG_CACHE_HOME", bench.path("cache"))
            .envs(variables.iter().copied());
        bench.run(&mut command)
    };
    let done = record(&[("CXX", "/no/such/compiler")]);
    unrecorded(&bench, &done, "/no/such/compiler");
    let done = record(&[("PATH", "/no/such/directory")]);
    unrecorded(&bench, &done, "no C++ compiler");
    let done = record(&[("CXX", "false")]);
    unrecorded(&bench, &done, "does not compile");
    bench.write("file", "");
    let done = record(&[("XDG_CACHE_HOME", bench.path("file").to_str().unwrap())]);
    unrecorded(&bench, &done, "XDG_CACHE_HOME");
}

#[test]
fn what_keeps_a_command_from_starting() {
    let Some(bench) = Bench::new() else { return };
    bench.write("file", "");
    bench.write("there.optape", "precious");
    let cases: [(&[&str], i32, &str); 8] = [
        (
            &["-o", "there.optape", "--", "touch", "ran"],
            125,
            "--force",
        ),
        (
            &["-o", "file/t.optape", "--", "touch", "ran"],
            125,
            "file/t.optape",
        ),
        (
            &["-o", "no/t.optape", "--", "touch", "ran"],
            125,
            "no/t.optape",
        ),
        (
            &["--ring-size", "1024G", "--", "touch", "ran"],
            125,
            "--ring-size",
        ),
        (&["--", "no-such-command"], 127, "no-such-command"),
        (&["--", "./file"], 126, "./file"),
        (&["--stats", "some", "--", "touch", "ran"], 2, "rules"),
        (&["-o", "t.optape"], 2, "CMD"),
    ];
    for (words, code, message) in cases {
        let done = bench.run(bench.optape(["record"]).args(words));
        done.expect_no_panic()
            .expect_code(code)
            .expect_message(message);
        assert!(!bench.path("ran").exists(), "{words:?}: the command ran");
    }
    assert_eq!(
        std::fs::read(bench.path("there.optape")).unwrap(),
        b"precious"
    );
}

/// On a file system of 64 KiB in a name space of its own, where the system lets us have one.
#[test]
fn a_disk_that_fills_while_recording() {
    let Some(bench) = Bench::new() else { return };
    std::fs::create_dir(bench.path("small")).unwrap();
    let probe = bench.run(bench.command("unshare").args([
        "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "small",
    ]));
    if probe.code() != 0 {
        use std::io::Write;
        let _ = writeln!(
            std::io::stderr(),
            "\nNOT RUN: a_disk_that_fills_while_recording: no name spaces here: {}\n",
            probe.stderr
        );
        return;
    }
    let script = "mount -t tmpfs -o size=64k none small || exit 99\n\
        \"$0\" record -o small/t.optape -- python \"$1\" 400\n\
        code=$?\n\
        cp small/t.optape t.optape\n\
        exit $code\n";
    let optape = bench.optape([""; 0]).get_program().to_owned();
    let mut command = bench.command("unshare");
    command
        .args(["-rm", "sh", "-c", script])
        .arg(optape)
        .arg(Bench::program("short.py"));
    let done = bench.run(&mut command);
    done.expect_code(0)
        .expect_no_panic()
        .expect_message("writing ended early")
        .expect_message("No space left");
    assert_eq!(done.stdout, "done\n");
    assert!(
        !calls(&bench, "t.optape").is_empty(),
        "what was written before is whole"
    );
    bench
        .run(&mut bench.optape(["replay", "t.optape", "--format", "json"]))
        .expect_code(0);
}

/// Nothing at all can be written, which shows only at the first flush.
#[test]
fn a_device_that_is_always_full() {
    let Some(bench) = Bench::new() else { return };
    if !Path::new("/dev/full").exists() {
        return;
    }
    let short = Bench::program("short.py").display().to_string();
    let done =
        bench.run(&mut bench.optape(["record", "-f", "-o", "/dev/full", "--", "python", &short]));
    done.expect_no_panic()
        .expect_code(0)
        .expect_message("No space left");
    assert_eq!(done.stdout, "done\n");
    assert!(Path::new("/dev/full").exists());
}
