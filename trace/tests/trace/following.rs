//! Reading a file while it grows, and while somebody cuts it.

use std::fs::{File, OpenOptions};
use std::io::Write;

use optape_trace::{
    Columns, RunEnd, StreamEnd, StreamId, Trace, TraceEnd, TraceError, TraceWriter,
};

use crate::program::{Entry, Loop, run_info, write};

#[test]
fn a_growing_file_is_followed_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("growing");
    let mut program = Loop::new(31, 40);
    let mut writer = TraceWriter::create(File::create(&path).unwrap(), &run_info()).unwrap();
    let mut trace = Trace::open(&path).unwrap();
    assert!(!trace.refresh().unwrap());
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let mut written = 0;
    for _ in 0..10 {
        for entry in program.step() {
            match entry {
                Entry::Call(call) => writer.op_call(stream, call.view()).unwrap(),
                Entry::Moment(moment) => writer.moment(stream, &moment).unwrap(),
            };
            written += 1;
        }
        writer.flush().unwrap();
        assert!(trace.refresh().unwrap());
        assert!(!trace.refresh().unwrap());
        assert_eq!(trace.streams()[0].records(), written);
        assert!(
            matches!(trace.end(), TraceEnd::Unfinished { valid_bytes, file_bytes } if valid_bytes == file_bytes)
        );
        let summed: u64 = trace
            .summary(stream, 0..u64::MAX)
            .unwrap()
            .iter()
            .map(|r| r.calls)
            .sum();
        assert_eq!(summed, trace.streams()[0].op_calls());
    }
    writer
        .end_stream(
            stream,
            &StreamEnd {
                clean: true,
                ..StreamEnd::default()
            },
        )
        .unwrap();
    writer
        .finish(&RunEnd {
            exit_code: Some(3),
            ..RunEnd::default()
        })
        .unwrap();
    assert!(trace.refresh().unwrap());
    assert!(matches!(trace.end(), TraceEnd::Clean(end) if end.exit_code == Some(3)));
    assert!(!trace.refresh().unwrap());
    // One reader followed, the other opens by the index: they see the same.
    let opened = Trace::open(&path).unwrap();
    assert_eq!(opened.streams()[0].blocks(), trace.streams()[0].blocks());
    assert_eq!(
        opened.streams()[0].summaries(),
        trace.streams()[0].summaries()
    );
    assert_eq!(opened.streams()[0].end(), trace.streams()[0].end());
}

#[test]
fn bytes_that_arrive_one_by_one_are_followed_too() {
    let mut program = Loop::new(32, 5);
    let entries: Vec<Entry> = (0..3).flat_map(|_| program.step()).collect();
    let bytes = write(&entries, &program, 6);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dripping");
    let mut file = File::create(&path).unwrap();
    let mut trace: Option<Trace> = None;
    for byte in bytes {
        file.write_all(&[byte]).unwrap();
        match &mut trace {
            Some(trace) => {
                trace.refresh().unwrap();
                assert!(!matches!(trace.end(), TraceEnd::Damaged { .. }));
            }
            None => trace = Trace::open(&path).ok(),
        }
    }
    let trace = trace.unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    assert_eq!(trace.streams()[0].records(), entries.len() as u64);
}

#[test]
fn a_file_that_is_cut_while_it_is_read_is_an_error() {
    let mut program = Loop::new(33, 40);
    let entries: Vec<Entry> = (0..50).flat_map(|_| program.step()).collect();
    let bytes = write(&entries, &program, 500);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut");
    std::fs::write(&path, &bytes).unwrap();
    let trace = Trace::open(&path).unwrap();
    let last = trace.streams()[0].blocks().len() - 1;
    trace.block(StreamId(0), last, Columns::ALL).unwrap();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(bytes.len() as u64 / 2)
        .unwrap();
    trace.block(StreamId(0), 0, Columns::ALL).unwrap();
    let error = trace.block(StreamId(0), last, Columns::ALL).unwrap_err();
    assert!(matches!(error, TraceError::Cut { .. }), "{error}");
    assert!(
        error.to_string().contains("was cut while it was read"),
        "{error}"
    );
    // The same where it was still growing.
    std::fs::write(&path, &bytes[..bytes.len() - 40]).unwrap();
    let mut trace = Trace::open(&path).unwrap();
    File::create(&path).unwrap();
    assert!(matches!(trace.refresh(), Err(TraceError::Cut { .. })));
}
