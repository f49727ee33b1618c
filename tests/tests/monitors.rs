//! Monitors beside real training: samples and ops on one clock.

use optape_tests::Bench;
use serde_json::Value;

#[test]
fn joules_are_split_by_step_and_stage_of_a_real_run() {
    let Some(bench) = Bench::new() else { return };
    let program = bench.write(
        "train.py",
        "import time, torch\n\
         net = torch.nn.Linear(64, 64)\n\
         optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n\
         for step in range(4):\n\
        \x20   optimizer.zero_grad()\n\
        \x20   loss = net(torch.ones(8, 64)).sum()\n\
        \x20   time.sleep(0.15)\n\
        \x20   loss.backward()\n\
        \x20   optimizer.step()\n",
    );
    let mut record = bench.optape([
        "record",
        "-o",
        "t.optape",
        "--monitor",
        "gpu,host,process",
        "--monitor-interval",
        "0.02",
        "--",
        "python",
    ]);
    record
        .arg(program)
        .env_remove("OPTAPE_MONITOR")
        .env("OPTAPE_SIMULATED_GPUS", "2");
    let output = record.output().expect("optape runs");
    assert!(output.status.success(), "{output:?}");

    let replay = |by: &str| -> Value {
        let mut replay = bench.optape(["replay", "t.optape", "--format", "json", "--by", by]);
        let output = replay.output().expect("optape runs");
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    for by in ["step", "stage"] {
        let report = replay(by);
        assert_eq!(report["streams"].as_array().map(Vec::len), Some(1));
        let total = &report["monitors"]["hardware"]["measured"];
        let seconds = total["seconds"].as_f64().expect("seconds");
        assert!((0.6..60.0).contains(&seconds), "{total}");
        assert_eq!(
            total["uncovered_seconds"], 0.0,
            "samples reach around the ops"
        );
        let joules = |measured: &Value| measured["energy_j"]["gpu1"].as_f64().expect("joules");
        // Simulated GPUs use between 50 and 250 W.
        assert!(
            joules(total) > 49.0 * seconds && joules(total) < 251.0 * seconds,
            "{total}"
        );
        let groups = report["groups"].as_array().expect("groups");
        let sum: f64 = groups.iter().map(|group| joules(&group["measured"])).sum();
        assert!(
            sum > 0.95 * joules(total) && sum < 1.000_001 * joules(total),
            "{by}: {sum} of {total}"
        );
        if by == "stage" {
            let loss = groups
                .iter()
                .find(|group| group["key"] == "loss")
                .expect("the loss's stage");
            let seconds = loss["measured"]["seconds"].as_f64().expect("seconds");
            assert!(seconds > 0.55, "the pauses follow the loss's ops: {loss}");
        }
    }
    let series = &replay("step")["monitors"]["hardware"]["series"];
    let rss = series
        .as_object()
        .expect("series")
        .iter()
        .find(|(name, _)| name.starts_with("process/") && name.ends_with("/rss_bytes"))
        .expect("the process's memory");
    assert!(rss.1["maximum"].as_f64() > Some(5e7), "{rss:?}");
}

#[test]
fn python_begins_and_ends_monitors() {
    let Some(bench) = Bench::new() else { return };
    let program = Bench::program("monitored.py");
    let done = bench.run(&mut bench.importing([
        program.as_os_str(),
        "ways".as_ref(),
        bench.path("").as_os_str(),
    ]));
    done.expect_code(0).expect_no_panic();
    let process = &done.report()["process"];
    let (samples, rest): (Vec<&str>, Vec<&str>) = done
        .stdout
        .lines()
        .partition(|line| line.contains("/rss_bytes,"));
    assert_eq!(samples.len(), 2, "{}", done.stdout);
    assert!(samples[0].contains(&format!(",process/{process}/rss_bytes,")));
    assert!(rest.contains(&"time_unix_ns,series,value"));
    let report = done.report();
    assert_eq!(report["running"], true);
    assert_eq!(report["running afterwards"], false);
    assert_eq!(report["event files"], 1);
    assert_eq!(report["printed"], 0);
    let wrong = report["wrong"].as_str().expect("a refusal");
    assert!(wrong.contains("ended with 2"), "{wrong}");
    done.expect_message("nonsense");
    assert_eq!(report["raised"], "'mine'");
    assert_eq!(report["forked"], 7);
}

#[test]
fn a_monitor_ends_with_the_python_program_that_began_it() {
    let Some(bench) = Bench::new() else { return };
    let logs = bench.path("logs");
    let program = Bench::program("monitored.py");
    let words = [program.as_os_str(), "leave".as_ref(), logs.as_os_str()];
    let done = bench.run(&mut bench.importing(words));
    let monitor: u32 = done.stdout.trim().parse().expect("its number");
    let state = std::path::PathBuf::from(format!("/proc/{monitor}/stat"));
    // Whoever takes orphans in may leave it a zombie.
    let runs = || {
        std::fs::read_to_string(&state)
            .is_ok_and(|text| !text.contains(") Z ") && text.contains("(optape)"))
    };
    let since = std::time::Instant::now();
    while runs() {
        assert!(
            since.elapsed() < std::time::Duration::from_secs(60),
            "the monitor outlives its parent"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
