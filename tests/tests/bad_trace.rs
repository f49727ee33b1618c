//! What bad traces, names and cost files get: a message that says what and where, the right exit code, and as much of the
//! answer as there is.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::PathBuf;
use std::sync::LazyLock;

use optape_tests::{Bench, Done};
use optape_trace::{Trace, TraceEnd};

/// A short training run, recorded once.
static TRACE: LazyLock<Option<Vec<u8>>> = LazyLock::new(|| {
    let bench = Bench::new()?;
    let words = bench.words(&Bench::program("short.py"), &[]);
    bench
        .run(&mut bench.record("t.optape", &words))
        .expect_code(0);
    Some(std::fs::read(bench.path("t.optape")).unwrap())
});

/// A bench with the trace as `t.optape`.
fn bench() -> Option<(Bench, &'static [u8])> {
    let bytes = TRACE.as_deref()?;
    let bench = Bench::new()?;
    bench.write("t.optape", bytes);
    Some((bench, bytes))
}

const READERS: [&[&str]; 4] = [&["replay"], &["info"], &["dump"], &["verify"]];

fn read(bench: &Bench, reader: &[&str], file: &str) -> Done {
    let done = bench.run(bench.optape(reader).arg(file));
    done.expect_no_panic();
    done
}

#[test]
fn no_trace_at_all() {
    let Some((bench, _)) = bench() else { return };
    bench.write("empty", "");
    bench.write("text", "epoch,loss\n1,0.5\n".repeat(100));
    bench.write("zeros", vec![0; 4096]);
    for reader in READERS {
        for file in ["empty", "text", "zeros"] {
            let done = read(&bench, reader, file);
            done.expect_code(5).expect_message(file);
            assert_eq!(done.stdout, "", "{reader:?} {file}: no half-written report");
        }
        read(&bench, reader, "missing")
            .expect_code(2)
            .expect_message("missing");
        let done = read(&bench, reader, ".");
        assert_ne!(done.code(), 0, "{reader:?} of a directory");
    }
}

#[test]
fn truncated() {
    let Some((bench, bytes)) = bench() else {
        return;
    };
    let whole = calls(&bench, "t.optape").unwrap();
    let mut before = 0;
    let mut answered = 0;
    for part in [1, 5, 20, 40, 60, 80, 95, 99] {
        let name = format!("{part}.optape");
        let path = bench.write(&name, &bytes[..bytes.len() * part / 100]);
        let readable = match Trace::open(&path) {
            Ok(trace) => {
                assert!(
                    matches!(trace.end(), TraceEnd::Unfinished { .. }),
                    "{part} %: {:?}",
                    trace.end()
                );
                true
            }
            Err(_) => false,
        };
        for reader in READERS {
            let done = read(&bench, reader, &name);
            if !readable {
                done.expect_code(5);
                continue;
            }
            // What is whole is answered, where there is anything; `dump` has nothing to say beside the records.
            let empty = reader == ["replay"] && calls(&bench, &name) == Some(0);
            done.expect_code(if empty { 2 } else { 0 });
            if reader != ["dump"] {
                let said = format!("{}{}", done.stdout, done.stderr);
                assert!(
                    said.contains("unfinished"),
                    "{part} %, {reader:?} has to say so:\n{said}"
                );
            }
        }
        if readable {
            answered += 1;
            let there = calls(&bench, &name).unwrap();
            assert!(
                before <= there && there <= whole,
                "{part} %: {there} of {whole} op calls, {before} before"
            );
            before = there;
        }
    }
    assert!(
        answered >= 4 && before > 0,
        "{answered} of the pieces could be read, with {before} op calls"
    );
}

/// Op calls that `info` counts.
fn calls(bench: &Bench, file: &str) -> Option<u64> {
    let done = bench.run(&mut bench.optape(["info", "--format", "json", file]));
    done.json()[0]["op_calls"].as_u64()
}

#[test]
fn bits_that_flipped() {
    let Some((bench, bytes)) = bench() else {
        return;
    };
    let sound = read(&bench, &["replay", "--format", "json"], "t.optape").stdout;
    for part in [0, 3, 10, 30, 50, 70, 90] {
        let mut bent = bytes.to_vec();
        // Not in the first bytes: those make another kind of file of it.
        let at = 64 + (bent.len() - 128) * part / 100;
        bent[at] ^= 0x10;
        bench.write("bent.optape", &bent);
        read(&bench, &["verify"], "bent.optape")
            .expect_code(5)
            .expect_message("damaged");
        let replayed = read(&bench, &["replay", "--format", "json"], "bent.optape");
        match replayed.code() {
            // Nothing that was counted stood there.
            0 => {
                let same = without_notes(&replayed.stdout) == without_notes(&sound);
                let said = format!("{}{}", replayed.stdout, replayed.stderr);
                assert!(
                    same || said.contains("damaged") || said.contains("unfinished"),
                    "byte {at}: silently other numbers"
                );
            }
            5 => assert_eq!(replayed.stdout, "", "byte {at}: no half-written report"),
            // What stood there was needed for all that follows.
            2 if calls(&bench, "bent.optape") == Some(0) => {
                replayed.expect_message("damaged");
            }
            code => panic!("byte {at}: exit code {code}:\n{}", replayed.stderr),
        }
    }
}

/// The numbers of a report.
fn without_notes(json: &str) -> (serde_json::Value, serde_json::Value) {
    let report: serde_json::Value = serde_json::from_str(json).unwrap();
    (report["counters"].clone(), report["energy"].clone())
}

#[test]
fn of_a_later_version() {
    let Some((bench, bytes)) = bench() else {
        return;
    };
    let mut later = bytes.to_vec();
    // FORMAT.md: 8 bytes of magic, the major version as u16, the minor one, the length, and a checksum at the end.
    assert_eq!(u16::from_le_bytes([later[8], later[9]]), 1);
    assert_eq!(crc32c(&later[..20]).to_le_bytes(), later[20..24]);
    later[8] = 9;
    let length = usize::try_from(u32::from_le_bytes(later[12..16].try_into().unwrap())).unwrap();
    let checksum = crc32c(&later[..length - 4]);
    later[length - 4..length].copy_from_slice(&checksum.to_le_bytes());
    bench.write("later.optape", &later);
    for reader in READERS {
        read(&bench, reader, "later.optape")
            .expect_code(5)
            .expect_message("9.");
    }
}

/// As FORMAT.md has it, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

#[test]
fn unknown_names_get_the_nearest_one() {
    let Some((bench, _)) = bench() else { return };
    for (flags, wrong, near) in [
        (&["--counters", "synops"][..], "synops", "synop"),
        (
            &["--counters", "flop,memory-access"],
            "memory-access",
            "memory_access",
        ),
        (
            &["--rules", "spikingjelly-2.0"],
            "spikingjelly-2.0",
            "spikingjelly-2.0.0",
        ),
        (
            &["--energy", "compute_fp23"],
            "compute_fp23",
            "compute_fp32",
        ),
        (&["--scope", "Nett.fc1"], "Nett.fc1", "Net.fc1"),
        (&["--op", "aten::admm"], "aten::admm", "aten::addmm"),
        (
            &["--explain", "aten::admm"],
            "aten::admm",
            "aten.addmm.default",
        ),
        (&["--range", "mesure"], "mesure", "measure"),
        (&["--stage", "forwards"], "forwards", "forward"),
    ] {
        let done = bench.run(bench.optape(["replay", "t.optape"]).args(flags));
        done.expect_no_panic()
            .expect_code(2)
            .expect_message(wrong)
            .expect_message(near);
        assert_eq!(done.stdout, "", "{flags:?}: no half-written report");
    }
    for flags in [
        &["--rulez", "x"][..],
        &["--format", "xml"],
        &["--step", "x"],
        &["--by", "colour"],
        &["--all", "--counters", "mac"],
    ] {
        bench
            .run(bench.optape(["replay", "t.optape"]).args(flags))
            .expect_no_panic()
            .expect_code(2);
    }
}

#[test]
fn faulty_cost_files() {
    let Some((bench, _)) = bench() else { return };
    let done = bench.run(&mut bench.optape(["presets", "compute_fp32"]));
    let preset = done.expect_code(0).stdout.clone();
    bench.write("own.toml", &preset);
    let replay = |file: &str| {
        bench.run(
            bench
                .optape(["replay", "t.optape", "--format", "json", "--costs"])
                .arg(file),
        )
    };
    let plain = replay("own.toml");
    assert_eq!(
        plain.expect_code(0).json()["energy"]
            .as_object()
            .unwrap()
            .len(),
        1
    );

    // The last line that gives a number: its place is known.
    let (row, line) = preset
        .lines()
        .enumerate()
        .filter(|(_, line)| costs(line))
        .last()
        .unwrap();
    let (key, value) = line.split_once('=').unwrap();
    let replaced = |with: String| {
        let mut lines: Vec<String> = preset.lines().map(str::to_owned).collect();
        lines[row] = with;
        lines.join("\n")
    };
    let column = key.len() + 1 + value.len() - value.trim_start().len() + 1;
    for (name, content, place, says) in [
        (
            "negative.toml",
            replaced(format!("{key}= -1.5")),
            format!("{}:{}", row + 1, key.len() + 3),
            "negative",
        ),
        (
            "wrong-key.toml",
            replaced(format!("{}x ={value}", key.trim_end())),
            format!("{}:1", row + 1),
            key.trim_end(),
        ),
        (
            "text.toml",
            replaced(format!(
                "{key}={}\"much\"",
                &value[..value.len() - value.trim_start().len()]
            )),
            format!("{}:{column}", row + 1),
            "number",
        ),
        (
            "broken.toml",
            replaced(format!("{key}= = 3")),
            format!("{}:", row + 1),
            "",
        ),
    ] {
        bench.write(name, content);
        let done = replay(name);
        done.expect_no_panic()
            .expect_code(2)
            .expect_message(name)
            .expect_message(says);
        let (line, column) = place.split_once(':').unwrap();
        let spelt = done.stderr.contains(&place)
            || done
                .stderr
                .contains(&format!("line {line}, column {column}"));
        assert!(spelt, "{name}: no place ({place}) in:\n{}", done.stderr);
        assert_eq!(done.stdout, "");
    }
    replay("missing.toml")
        .expect_code(2)
        .expect_message("missing.toml");
}

fn costs(line: &str) -> bool {
    let number = line.split_once('=').map(|(_, value)| {
        value
            .split('#')
            .next()
            .unwrap_or_default()
            .trim()
            .parse::<f64>()
    });
    !line.trim_start().starts_with('#') && matches!(number, Some(Ok(_)))
}

#[test]
fn output_is_never_overwritten_unasked() {
    let Some((bench, _)) = bench() else { return };
    let report: PathBuf = bench.write("report.json", "precious");
    let done = bench.run(&mut bench.optape([
        "replay",
        "t.optape",
        "--format",
        "json",
        "-o",
        "report.json",
    ]));
    done.expect_no_panic()
        .expect_code(2)
        .expect_message("--force");
    assert_eq!(std::fs::read_to_string(&report).unwrap(), "precious");
    bench
        .run(&mut bench.optape([
            "replay",
            "t.optape",
            "--format",
            "json",
            "-f",
            "-o",
            "report.json",
        ]))
        .expect_code(0);
    assert!(std::fs::read_to_string(&report).unwrap().starts_with('{'));
    bench
        .run(&mut bench.optape(["replay", "t.optape", "-o", "no/such/report"]))
        .expect_no_panic()
        .expect_code(2);
    if std::path::Path::new("/dev/full").exists() {
        let done = bench.run(&mut bench.optape(["replay", "t.optape", "-f", "-o", "/dev/full"]));
        assert_ne!(
            done.expect_no_panic().code(),
            0,
            "a full disk is no success"
        );
    }
}
