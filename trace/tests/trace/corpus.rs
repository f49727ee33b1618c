//! The kept corpus: small traces that fuzzing bends, and the proof that files of released versions stay readable.
//!
//! `cargo test -p optape-trace make_the_corpus -- --ignored` writes those of the current version anew. Do that only before the
//! version is released; afterwards they stay as they are, and new ones get names with the new version.

use std::path::PathBuf;

use optape_trace::{
    Columns, DType, Definition, DropReason, Elements, Event, LateStatistic, Moment, Operand,
    Ordinal, RunEnd, StepSource, StorageId, StreamEnd, TensorId, TextId, ThreadId, Trace,
    TraceWriter, Value, WatchDef, WatchId, When, dump, fields, verify_bytes,
};

use crate::program::{Entry, Loop, run_info, write};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}

/// Every kind of record.
fn every_event() -> Vec<u8> {
    let mut program = Loop::new(71, 8);
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let late = |values: Vec<u64>, lost: bool| LateStatistic {
        operand: Operand::Tensor(0),
        when: When::Before,
        binary: Some(!lost),
        fields: if lost { 0 } else { fields::NONZEROS },
        values,
        lost,
    };
    let name = TextId(0);
    for round in 0..3 {
        for entry in program.step() {
            match entry {
                Entry::Call(mut call) => {
                    if call.signature % 4 == 1 {
                        call.pattern = 4;
                        call.statistics.clear();
                    }
                    writer.op_call(stream, call.view()).unwrap();
                }
                Entry::Moment(moment) => drop(writer.moment(stream, &moment).unwrap()),
            }
        }
        let events = [
            Event::StateAssign {
                module: optape_trace::ModuleId(0),
                attribute: TextId(1),
                tensor: TensorId(45),
            },
            Event::RangeEnter { name },
            Event::StageChange { name: Some(name) },
            Event::StageChange { name: None },
            Event::RangeExit { name },
            Event::StepMark {
                step: round,
                source: StepSource::Program,
            },
            Event::Statistics {
                call: Ordinal(2),
                values: vec![late(vec![31], false)],
            },
            Event::Statistics {
                call: Ordinal(5 + round),
                values: vec![late(vec![], true)],
            },
            Event::StorageBorn {
                storage: StorageId(46 + round),
                bytes: 4096,
            },
            Event::StorageDied {
                storage: StorageId(44 + round),
            },
            Event::TensorDied {
                tensor: TensorId(43),
            },
            Event::Opaque {
                name,
                duration_ns: 99,
            },
            Event::Drop {
                records: 3,
                from_ns: 10,
                until_ns: 90,
                reason: DropReason::RingFull,
            },
            Event::Fact {
                module: None,
                key: TextId(1),
                value: "{\"lr\": 0.1}".into(),
            },
            Event::Sample {
                series: TextId(1),
                value: 41.5,
            },
            Event::Samples { count: 8 },
            Event::Disabled {
                reason: "a test".into(),
            },
        ];
        for event in events {
            writer
                .moment(
                    stream,
                    &Moment {
                        time_ns: 9_000_000 + round,
                        thread: ThreadId(1),
                        event,
                    },
                )
                .unwrap();
        }
        writer.flush().unwrap();
    }
    let watch = WatchDef {
        module: Some(optape_trace::ModuleId(0)),
        what: "output".into(),
    };
    writer
        .define(stream, &Definition::Watch(WatchId(0), watch))
        .unwrap();
    for (ordinal, dtype, shape, elements) in [
        (0, DType::F32, vec![2, 3], Elements::Bits(vec![0b10_1101])),
        (
            3,
            DType::F32,
            vec![2],
            Elements::Raw(vec![0, 0, 0, 63, 0, 0, 128, 64]),
        ),
        (3, DType::BOOL, vec![], Elements::Bits(vec![1])),
        (9, DType::C64, vec![1], Elements::Raw(vec![1; 8])),
        (12, DType::F64, vec![5, 0], Elements::Raw(vec![])),
        (20, DType::F16, vec![7], Elements::Lost),
    ] {
        let value = Value {
            ordinal: Ordinal(ordinal),
            watch: WatchId(0),
            dtype,
            shape,
            elements,
        };
        writer.value(stream, &value).unwrap();
    }
    writer.end_stream(stream, &StreamEnd::default()).unwrap();
    writer.finish(&RunEnd::default()).unwrap()
}

/// The corpus: name and content.
fn traces() -> Vec<(&'static str, Vec<u8>)> {
    let steps = |seed: u64, ops: usize, count: usize, flush_every: usize, identities: bool| {
        let mut program = Loop::new(seed, ops);
        program.identities = identities;
        let entries: Vec<Entry> = (0..count).flat_map(|_| program.step()).collect();
        write(&entries, &program, flush_every)
    };
    let whole = steps(72, 12, 6, 25, true);
    vec![
        ("1.0-values.trace", every_event()),
        ("1.0-steps.trace", whole),
        (
            "1.0-without-identities.trace",
            steps(73, 12, 4, usize::MAX, false),
        ),
    ]
}

#[test]
#[ignore = "writes the corpus of an unreleased version anew"]
fn make_the_corpus() {
    std::fs::create_dir_all(directory()).unwrap();
    for (name, bytes) in traces() {
        let text = text_of(&Trace::from_bytes(bytes.clone()).unwrap());
        std::fs::write(directory().join(name), bytes).unwrap();
        std::fs::write(directory().join(name).with_extension("txt"), text).unwrap();
    }
}

fn text_of(trace: &Trace) -> String {
    let mut text = String::new();
    for stream in trace.streams() {
        for definition in stream.dictionary().definitions() {
            text += &(dump::definition_line(stream.id(), &definition) + "\n");
        }
        for line in dump::record_lines(trace, stream.id(), 0..u64::MAX) {
            text += &(line.unwrap() + "\n");
        }
        for value in trace.values(stream.id()) {
            text += &(dump::value_line(stream, &value.unwrap()) + "\n");
        }
    }
    text
}

/// Files of every version say today what they said when they were written.
#[test]
fn kept_traces_say_what_they_said() {
    let mut seen = 0;
    for entry in std::fs::read_dir(directory()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "trace") {
            continue;
        }
        let trace = Trace::open(&path).unwrap();
        let expected = std::fs::read_to_string(path.with_extension("txt")).unwrap();
        assert_eq!(text_of(&trace), expected, "{}", path.display());
        assert_eq!(
            verify_bytes(std::fs::read(&path).unwrap())
                .unwrap()
                .findings,
            []
        );
        seen += 1;
    }
    assert!(seen >= 4);
}

#[test]
fn every_event_has_a_line() {
    let trace = Trace::from_bytes(every_event()).unwrap();
    let block = trace
        .block(optape_trace::StreamId(0), 0, Columns::ALL)
        .unwrap();
    let text = text_of(&trace);
    for word in [
        "call aten::op",
        "module_enter Net",
        "module_exit Net",
        "state_assign Net \"note\"=#45",
        "range_enter \"Optimizer",
        "range_exit ",
        "stage_change \"Optimizer",
        "stage_change none",
        "step_mark 0 source=program",
        "statistics call=2 0:binary,nonzeros=31",
        "storage_born s46 bytes=4096",
        "storage_died s44",
        "tensor_died #43",
        "opaque ",
        "drop records=3 from=10ns until=90ns reason=ring_full",
        "fact program \"note\"={\\\"lr\\\": 0.1}",
        "sample \"note\"=41.5",
        "samples 8",
        "disabled \"a test\"",
        "stats=0:lost",
        "value 0 Net \"output\" float32[2,3] bits 1 0 1 1 0 1",
        "value 3 Net \"output\" float32[2] raw 0.5 4",
        "value 9 Net \"output\" complex64[1] raw 8 bytes",
        "value 20 Net \"output\" float16[7] lost",
    ] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
    assert_eq!(
        text.lines()
            .filter(|l| l.contains(" t0 ") || l.contains(" t1 "))
            .count() as u64,
        trace.streams()[0].records()
    );
    assert!(block.records > 0);
}
