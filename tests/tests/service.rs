//! `optape daemon`, and what can go wrong with it: sockets, clients, runs side by side.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use optape_tests::{Bench, Done, Running, calls_of};
use optape_trace::{Trace, TraceEnd};
use rustix::process::{Signal, kill_process};

struct Service<'a> {
    bench: &'a Bench,
    running: Option<Running>,
}

/// A daemon with a socket in the bench's directory.
fn service(bench: &Bench) -> Service<'_> {
    let running = bench.start(&mut with_socket(bench, &["daemon"]));
    let service = Service {
        bench,
        running: Some(running),
    };
    wait_until("the daemon listens", || {
        UnixStream::connect(bench.path("d.sock")).is_ok()
    });
    service
}

fn with_socket(bench: &Bench, words: &[&str]) -> Command {
    let mut command = bench.optape(words);
    command.env("OPTAPE_SOCKET", bench.path("d.sock"));
    command
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Service<'_> {
    fn record(&self, file: &str, arguments: &[&str]) -> Command {
        let mut command = with_socket(self.bench, &["record", "--daemon", "-o", file, "--"]);
        command.args(self.bench.words(&Bench::program("steps.py"), arguments));
        command
    }

    fn stop(mut self) -> Done {
        self.bench
            .run(&mut with_socket(self.bench, &["ctl", "stop", "--daemon"]))
            .expect_code(0);
        self.running.take().unwrap().wait()
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            let _ = kill_process(running.pid(), Signal::KILL);
        }
    }
}

#[test]
fn several_runs_at_once_each_with_its_file() {
    let Some(bench) = Bench::new() else { return };
    let service = service(&bench);
    let mode = std::fs::metadata(bench.path("d.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let runs: Vec<Running> = (1..4)
        .map(|n| bench.start(&mut service.record(&format!("{n}.optape"), &[&(10 * n).to_string()])))
        .collect();
    for run in runs {
        let done = run.wait();
        done.expect_code(0).expect_message("recorded");
        assert!(done.stdout.contains("done"));
    }
    for n in 1..4 {
        let trace = Trace::open(&bench.path(format!("{n}.optape"))).unwrap();
        let TraceEnd::Clean(end) = trace.end() else {
            panic!("{:?}", trace.end())
        };
        assert_eq!(end.exit_code, Some(0));
        let [stream] = trace.streams() else {
            panic!("{} streams in {n}", trace.streams().len())
        };
        let calls = calls_of(&trace, stream.id());
        let products = calls.iter().filter(|c| c.op == "aten::addmm").count();
        assert_eq!(products, 2 * 10 * n, "of run {n} alone");
        assert!(stream.end().unwrap().clean);
        assert!(trace.run().command[0].ends_with("python"));
    }
    // The client's exit code is the command's, and a command that cannot be started leaves nothing.
    let missing = bench.run(&mut with_socket(
        &bench,
        &[
            "record",
            "--daemon",
            "-o",
            "no.optape",
            "--",
            "no-such-command",
        ],
    ));
    missing.expect_code(127);
    let failed = bench.run(&mut with_socket(
        &bench,
        &[
            "record",
            "--daemon",
            "-o",
            "no.optape",
            "--",
            "sh",
            "-c",
            "exit 7",
        ],
    ));
    failed.expect_code(7);
    assert!(!bench.path("no.optape").exists());
    let there = bench.run(&mut service.record("1.optape", &["1"]));
    there.expect_code(125).expect_message("--force");
    let done = service.stop();
    done.expect_code(0).expect_no_panic();
    assert!(!bench.path("d.sock").exists());
}

#[test]
fn a_run_without_a_daemon_says_how_to_start_one() {
    let Some(bench) = Bench::new() else { return };
    let done = bench.run(&mut with_socket(
        &bench,
        &["record", "--daemon", "-o", "t.optape", "--", "touch", "ran"],
    ));
    done.expect_code(125).expect_message("optape daemon");
    assert!(!bench.path("ran").exists() && !bench.path("t.optape").exists());
    let stop = bench.run(&mut with_socket(&bench, &["ctl", "stop", "--daemon"]));
    stop.expect_code(2).expect_message("no daemon answers");
}

#[test]
fn a_socket_that_exists() {
    let Some(bench) = Bench::new() else { return };
    let first = service(&bench);
    let second = bench.run(&mut with_socket(&bench, &["daemon"]));
    second.expect_code(125).expect_message("listens at");
    kill_process(first.running.as_ref().unwrap().pid(), Signal::KILL).unwrap();
    drop(first);
    // What a killed daemon leaves is taken over.
    wait_until("the killed daemon is gone", || {
        UnixStream::connect(bench.path("d.sock")).is_err()
    });
    assert!(
        std::fs::symlink_metadata(bench.path("d.sock"))
            .unwrap()
            .file_type()
            .is_socket()
    );
    let third = service(&bench);
    third.stop().expect_code(0);
    // Somebody else's socket, and what is no socket, are left alone.
    let other = UnixListener::bind(bench.path("d.sock")).unwrap();
    let refused = bench.run(&mut with_socket(&bench, &["daemon"]));
    refused.expect_code(125).expect_message("listens at");
    drop(other);
    std::fs::remove_file(bench.path("d.sock")).unwrap();
    bench.write("d.sock", "precious");
    let refused = bench.run(&mut with_socket(&bench, &["daemon"]));
    refused.expect_code(125).expect_message("no socket");
    assert_eq!(std::fs::read(bench.path("d.sock")).unwrap(), b"precious");
}

/// What a client sends that means no good, and what it gets.
fn send(path: &PathBuf, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn hostile_clients_harm_nobody() {
    let Some(bench) = Bench::new() else { return };
    let service = service(&bench);
    let run = bench.start(&mut service.record("t.optape", &["0", "forever", "slow"]));
    run.wait_for_output("ready");
    let status = || {
        let done = bench.run(&mut with_socket(
            &bench,
            &["ctl", "status", "t.optape", "--format", "json"],
        ));
        done.expect_code(0).json()
    };
    wait_until("it records", || {
        status()["runs"][0]["streams"][0]["op_calls"].as_u64() > Some(0)
    });
    let daemon = bench.path("d.sock");
    // The run's own socket, as its environment tells.
    let uuid = status()["runs"][0]["run_uuid"].as_str().unwrap().to_owned();
    let own: PathBuf = std::fs::read_dir("/dev/shm")
        .unwrap()
        .flatten()
        .map(|entry| entry.path().join("control"))
        .find(|path| {
            UnixStream::connect(path).is_ok()
                && send(path, b"{\"optape\":1,\"do\":\"status\"}\n").contains(&uuid)
        })
        .expect("the run has a socket");
    let long = vec![b'{'; 3 << 20];
    let deep = [vec![b'['; 500_000], b"\n".to_vec()].concat();
    let begin_elsewhere = br#"{"optape":1,"do":"begin","optape_":0}
"#;
    let mark = format!(
        "{{\"optape\":1,\"do\":\"mark\",\"text\":\"{}\"}}\n",
        "x".repeat(2000)
    );
    for path in [&daemon, &own] {
        let garbage: [&[u8]; 9] = [
            b"",
            b"\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"{\"optape\":1,\"do\":\"status\"",
            b"{\"optape\":7,\"do\":\"status\"}\n",
            b"\0\0\0\0\0\0\0\0\n",
            begin_elsewhere,
            &long,
            &deep,
        ];
        for bytes in garbage {
            let answer = send(path, bytes);
            assert!(
                answer.is_empty() || answer.contains("failed"),
                "{answer:.200}"
            );
        }
        assert!(send(path, mark.as_bytes()).contains("failed"));
    }
    // Many who say nothing.
    let silent: Vec<UnixStream> = (0..300)
        .filter_map(|_| UnixStream::connect(&daemon).ok())
        .collect();
    assert!(!silent.is_empty());
    // A run ends by its own client's word alone: this ends a connection that began none.
    assert!(
        send(
            &daemon,
            b"{\"optape\":1,\"do\":\"end\",\"exit_code\":0,\"signal\":null}\n"
        )
        .contains("failed")
    );
    drop(silent);
    let before = status()["runs"][0]["streams"][0]["op_calls"]
        .as_u64()
        .unwrap();
    wait_until("the run goes on", || {
        status()["runs"][0]["streams"][0]["op_calls"].as_u64() > Some(before)
    });
    bench.write("stop", "");
    run.wait().expect_code(0).expect_message("nothing dropped");
    service.stop().expect_code(0).expect_no_panic();
    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
}

#[test]
fn a_client_that_is_killed_leaves_its_program_recorded() {
    let Some(bench) = Bench::new() else { return };
    let service = service(&bench);
    let run = bench.start(&mut service.record("t.optape", &["0", "forever", "slow"]));
    run.wait_for_output("ready");
    let path = bench.path("t.optape");
    let records = || {
        Trace::open(&path).map_or(0, |trace| {
            trace.streams().first().map_or(0, |s| s.records())
        })
    };
    wait_until("it records", || records() > 0);
    kill_process(run.pid(), Signal::KILL).unwrap();
    run.wait().expect_code(137);
    let then = records();
    wait_until("the daemon goes on", || records() > then + 1000);
    bench.write("stop", "");
    wait_until("the program ended", || {
        Trace::open(&path).is_ok_and(|t| matches!(t.end(), TraceEnd::Clean(_)))
    });
    let trace = Trace::open(&path).unwrap();
    assert!(trace.streams()[0].end().unwrap().clean, "it said goodbye");
    service
        .stop()
        .expect_code(0)
        .expect_message("its client is gone");
}

#[test]
fn a_daemon_that_is_killed_leaves_programs_alone() {
    let Some(bench) = Bench::new() else { return };
    let service = service(&bench);
    let plain = bench.run(
        bench
            .python([Bench::program("steps.py").as_os_str()])
            .arg("400"),
    );
    let run = bench.start(&mut service.record("t.optape", &["400", "slow"]));
    let path = bench.path("t.optape");
    wait_until("it records", || {
        Trace::open(&path).is_ok_and(|t| t.streams().first().is_some_and(|s| s.records() > 0))
    });
    kill_process(service.running.as_ref().unwrap().pid(), Signal::KILL).unwrap();
    let done = run.wait();
    done.expect_code(0)
        .expect_message("the daemon ended before the program did");
    assert_eq!(done.stdout, plain.stdout, "the same losses");
    let trace = Trace::open(&path).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Unfinished { .. }));
    bench
        .run(&mut bench.optape(["recover", "t.optape", "-o", "whole.optape"]))
        .expect_code(0);
    bench
        .run(&mut bench.optape(["verify", "whole.optape"]))
        .expect_code(0);
}

#[test]
fn a_daemon_that_is_told_to_end_completes_its_files() {
    let Some(bench) = Bench::new() else { return };
    let mut service = service(&bench);
    let run = bench.start(&mut service.record("t.optape", &["0", "forever", "slow"]));
    run.wait_for_output("ready");
    let path = bench.path("t.optape");
    wait_until("it records", || {
        Trace::open(&path).is_ok_and(|t| t.streams().first().is_some_and(|s| s.records() > 0))
    });
    let daemon = service.running.take().unwrap();
    kill_process(daemon.pid(), Signal::TERM).unwrap();
    daemon.wait().expect_code(0).expect_no_panic();
    assert!(!bench.path("d.sock").exists());
    let trace = Trace::open(&path).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    assert!(trace.streams()[0].end().unwrap().clean);
    bench.write("stop", "");
    let done = run.wait();
    done.expect_code(0).expect_message("recorded");
    assert!(done.stdout.contains("done"), "the program went on");
    assert!(
        !done.stderr.contains("recording stopped"),
        "nothing went wrong: {}",
        done.stderr
    );
}
