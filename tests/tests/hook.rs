//! The hook and the attach glue by themselves, against a capture library that only notes what it is told: the programs of
//! `tests/python`.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeSet;

use optape_tests::{Bench, workspace};

macro_rules! programs {
    ($($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                program(stringify!($name));
            }
        )*

        const PROGRAMS: &[&str] = &[$(stringify!($name)),*];
    };
}

programs!(attach_modules, attach_ways, hook_streams);

fn program(name: &str) {
    let Some(bench) = Bench::new() else { return };
    let path = workspace().join("tests/python").join(format!("{name}.py"));
    let done = bench.run(&mut bench.python([path]));
    done.expect_code(0);
}

#[test]
fn every_program_is_run() {
    let names = std::fs::read_dir(workspace().join("tests/python")).unwrap();
    let mut there: BTreeSet<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    there.retain(|name| name.ends_with(".py") && name != "harness.py");
    let known: BTreeSet<String> = PROGRAMS.iter().map(|name| format!("{name}.py")).collect();
    assert_eq!(there, known);
}
