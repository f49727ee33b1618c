//! The wheel, installed into a fresh environment: there `optape record` and `import optape` work without anything else.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::{Path, PathBuf};
use std::process::Command;

use optape_tests::Bench;

fn wheel(bench: &Bench, directory: &str) -> PathBuf {
    let mut build = bench.command(env!("CARGO_BIN_EXE_xtask"));
    build
        .args(["wheel", "--binary"])
        .arg(&bench.setup().optape)
        .arg("--output")
        .arg(bench.path(directory));
    let done = bench.run(&mut build);
    PathBuf::from(done.expect_code(0).stdout.trim())
}

/// A command in the environment, as if it were activated.
fn inside(bench: &Bench, environment: &Path, program: &str) -> Command {
    let programs = environment.join("bin");
    let mut command = bench.command(programs.join(program));
    let mut path = vec![programs];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    command.env("PATH", std::env::join_paths(path).unwrap());
    command
}

#[test]
fn a_fresh_environment_takes_it() {
    let Some(bench) = Bench::new() else { return };
    let path = wheel(&bench, "one");
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(
        name.starts_with("optape-") && name.contains("-py3-none-"),
        "{name}"
    );
    let again = wheel(&bench, "two");
    assert_eq!(again.file_name(), path.file_name());
    assert!(
        std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap(),
        "the same files give the same wheel"
    );

    let environment = bench.path("environment");
    let made = bench.run(
        bench
            .python(["-m", "venv", "--without-pip"])
            .arg(&environment),
    );
    made.expect_code(0);
    let python = environment.join("bin/python");
    let mut install = bench.python(["-m", "pip", "--python"]);
    install.arg(&python);
    install.args([
        "install",
        "--no-index",
        "--no-deps",
        "--disable-pip-version-check",
    ]);
    bench.run(install.arg(&path)).expect_code(0);
    // Torch is there already, in the environment of the tests.
    let find = "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))";
    let packages = bench.run(&mut bench.python(["-c", find])).stdout;
    let site = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let mut asked = inside(&bench, &environment, "python");
    let site = bench.run(asked.args(["-c", site])).stdout;
    std::fs::write(Path::new(site.trim()).join("torch.pth"), packages).unwrap();

    let program = bench.write(
        "train.py",
        "import sys\nimport torch, optape\n\
         layer = torch.nn.Linear(6, 4)\n\
         def train():\n    \
             layer(torch.rand(8, 6)).sum().backward()\n    \
             optape.step(samples=8)\n\
         if len(sys.argv) > 1:\n    \
             with optape.record(sys.argv[1]) as recording:\n        \
                 train()\n    \
             print(recording.summary.op_calls > 0)\n\
         else:\n    \
             train()\n",
    );
    let mut record = inside(&bench, &environment, "optape");
    record.args(["record", "-o", "outside.optape", "--", "python"]);
    let done = bench.run(record.arg(&program));
    done.expect_code(0)
        .expect_message("next: optape replay outside.optape");
    let mut run = inside(&bench, &environment, "python");
    let done = bench.run(run.arg(&program).arg("inside.optape"));
    assert_eq!(done.expect_code(0).stdout, "True\n", "{}", done.stderr);
    for trace in ["outside.optape", "inside.optape"] {
        let mut replay = inside(&bench, &environment, "optape");
        bench
            .run(replay.args(["replay", trace, "--per", "sample"]))
            .expect_code(0);
    }
}
