//! What the writer does not take, what the reader does not open, and what they say.

use std::io::{self, Write};

use optape_trace::{
    Definition, Event, ModuleId, Moment, Pattern, PatternId, RunEnd, StepSource, StreamEnd,
    StreamId, TextId, ThreadId, Trace, TraceError, TraceWriter,
};

use crate::program::{Call, Entry, Loop, run_info, write};

fn writer() -> (TraceWriter<Vec<u8>>, StreamId, Call) {
    let mut program = Loop::new(51, 10);
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let call = program
        .step()
        .into_iter()
        .find_map(|e| {
            if let Entry::Call(c) = e {
                Some(c)
            } else {
                None
            }
        })
        .unwrap();
    (writer, stream, call)
}

#[test]
fn calls_that_do_not_fit_their_signature_are_refused() {
    let (mut writer, stream, call) = writer();
    type Bend = fn(&mut Call);
    let bent: [(&str, Bend); 8] = [
        ("payload words", |c| c.payload.push(1)),
        ("storages", |c| c.storages.clear()),
        ("tensors", |c| c.tensors.push(7)),
        ("statistics", |c| c.statistics.push(7)),
        ("signature 999", |c| c.signature = 999),
        ("pattern 99", |c| c.pattern = 99),
        ("thread 9", |c| c.thread = 9),
        ("sequence number -2", |c| c.sequence_number = -2),
    ];
    for (what, bend) in bent {
        let mut call = call.clone();
        bend(&mut call);
        let error = writer.op_call(stream, call.view()).unwrap_err();
        assert!(
            matches!(error, TraceError::Refused { .. }) && error.to_string().contains(what),
            "{what}: {error}"
        );
    }
    // None of them has left anything behind.
    assert_eq!(writer.op_call(stream, call.view()).unwrap().0, 0);
    let trace = Trace::from_bytes(writer.finish(&RunEnd::default()).unwrap()).unwrap();
    assert_eq!(trace.streams()[0].records(), 1);
}

#[test]
fn definitions_must_come_in_order_and_before_their_use() {
    let (mut writer, stream, _) = writer();
    let refused = [
        Definition::Text(TextId(0), "again".into()),
        Definition::Text(TextId(7), "a gap".into()),
        Definition::Pattern(
            PatternId(0),
            Pattern {
                entries: vec![optape_trace::PatternEntry {
                    operand: optape_trace::Operand::Product,
                    when: optape_trace::When::Before,
                    state: optape_trace::State::Lost,
                    binary: None,
                    fields: 0,
                }],
            },
        ),
        Definition::Pattern(PatternId(0x8000_0000), Pattern::default()),
    ];
    for definition in refused {
        assert!(
            matches!(
                writer.define(stream, &definition),
                Err(TraceError::Refused { .. })
            ),
            "{definition:?}"
        );
    }
    writer
        .define(
            stream,
            &Definition::Pattern(PatternId(0), Pattern::default()),
        )
        .unwrap();
    let moments = [
        Event::RangeEnter { name: TextId(99) },
        Event::ModuleExit {
            call: optape_trace::CallId(0),
            module: ModuleId(99),
            results: vec![],
        },
        Event::Statistics {
            call: optape_trace::Ordinal(0),
            values: vec![],
        },
    ];
    for event in moments {
        let moment = Moment {
            time_ns: 0,
            thread: ThreadId(0),
            event,
        };
        assert!(
            matches!(
                writer.moment(stream, &moment),
                Err(TraceError::Refused { .. })
            ),
            "{moment:?}"
        );
    }
}

#[test]
fn a_stream_that_has_ended_takes_nothing() {
    let (mut writer, stream, call) = writer();
    writer.end_stream(stream, &StreamEnd::default()).unwrap();
    assert!(matches!(
        writer.op_call(stream, call.view()),
        Err(TraceError::Refused { .. })
    ));
    assert!(matches!(
        writer.end_stream(stream, &StreamEnd::default()),
        Err(TraceError::Refused { .. })
    ));
    assert!(matches!(
        writer.op_call(StreamId(9), call.view()),
        Err(TraceError::NoSuchStream(_))
    ));
}

/// A disk that is full after so many bytes.
struct FullDisk(Vec<u8>, usize);

impl Write for FullDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.1 - self.0.len();
        if room == 0 && !bytes.is_empty() {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let taken = bytes.len().min(room);
        self.0.extend(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_told_once_and_for_all() {
    let mut program = Loop::new(52, 10);
    let mut writer = TraceWriter::create(FullDisk(Vec::new(), 3000), &run_info()).unwrap();
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let error = loop {
        for entry in program.step() {
            if let Entry::Call(call) = entry {
                writer.op_call(stream, call.view()).unwrap();
            }
        }
        if let Err(error) = writer.flush() {
            break error;
        }
    };
    assert!(
        matches!(&error, TraceError::Sink { source, .. } if source.kind() == io::ErrorKind::StorageFull),
        "{error}"
    );
    let written = writer.bytes_written();
    assert!(written <= 3000);
    assert!(matches!(writer.flush(), Err(TraceError::SinkFailed)));
    let moment = Moment {
        time_ns: 0,
        thread: ThreadId(0),
        event: Event::StepMark {
            step: 0,
            source: StepSource::Program,
        },
    };
    assert!(matches!(
        writer.moment(stream, &moment),
        Err(TraceError::SinkFailed)
    ));
    assert_eq!(writer.bytes_written(), written);
}

#[test]
fn what_is_no_trace_is_told_apart() {
    let mut program = Loop::new(53, 5);
    let entries = program.step();
    let bytes = write(&entries, &program, 100);
    let refused = |bytes: Vec<u8>| Trace::from_bytes(bytes).unwrap_err();
    assert!(matches!(
        refused(b"PK\x03\x04 something else".to_vec()),
        TraceError::NotATrace { .. }
    ));
    assert!(matches!(refused(vec![]), TraceError::TooShort { .. }));
    assert!(matches!(
        refused(vec![0; 4096]),
        TraceError::NotATrace { .. }
    ));
    let mut newer = bytes.clone();
    newer[8] = 9;
    let error = refused(newer);
    assert!(matches!(
        error,
        TraceError::VersionTooNew { found_major: 9, .. }
    ));
    assert!(
        error.to_string().contains("version 9.0") && error.to_string().contains("newer optape"),
        "{error}"
    );
    let mut older = bytes.clone();
    older[8] = 0;
    assert!(matches!(
        refused(older),
        TraceError::VersionTooOld { found_major: 0, .. }
    ));
    let mut bent = bytes;
    bent[17] = 1;
    assert!(matches!(
        refused(bent),
        TraceError::Damaged { offset: 0, .. }
    ));
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(
        Trace::open(directory.path()),
        Err(TraceError::Io { .. })
    ));
    let missing = Trace::open(&directory.path().join("missing")).unwrap_err();
    assert!(missing.to_string().contains("missing"), "{missing}");
}
