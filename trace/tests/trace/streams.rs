//! Several processes in one file.

use optape_trace::{RunEnd, StreamEnd, StreamInfo, Trace, TraceWriter, verify_bytes};

use crate::program::{Entry, Loop, record, run_info};

#[test]
fn streams_are_kept_apart() {
    let mut programs: Vec<Loop> = (0..4)
        .map(|i| Loop::new(40 + i, 10 + 5 * i as usize))
        .collect();
    programs[2].identities = false;
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let mut expected: Vec<Vec<Entry>> = vec![Vec::new(); programs.len()];
    for (program, rank) in programs.iter().zip(0..) {
        let info = StreamInfo {
            rank: Some(rank),
            process_id: 100 + rank,
            ..program.stream_info()
        };
        let stream = writer.begin_stream(&info).unwrap();
        assert_eq!(stream.0, rank);
        for definition in program.definitions() {
            writer.define(stream, &definition).unwrap();
        }
    }
    for round in 0..30u32 {
        for (program, stream) in programs.iter_mut().zip(0u32..) {
            // The third process ends early.
            if stream == 3 && round > 10 {
                continue;
            }
            for entry in program.step() {
                let ordinal = match &entry {
                    Entry::Call(call) => writer
                        .op_call(optape_trace::StreamId(stream), call.view())
                        .unwrap(),
                    Entry::Moment(moment) => writer
                        .moment(optape_trace::StreamId(stream), moment)
                        .unwrap(),
                };
                assert_eq!(ordinal.0, expected[stream as usize].len() as u64);
                expected[stream as usize].push(entry);
            }
            if stream == 3 && round == 10 {
                let end = StreamEnd {
                    clean: true,
                    dropped_records: 5,
                    ..StreamEnd::default()
                };
                writer.end_stream(optape_trace::StreamId(3), &end).unwrap();
            }
        }
        if round % 7 == 0 {
            writer.flush().unwrap();
        }
    }
    let bytes = writer.finish(&RunEnd::default()).unwrap();
    assert_eq!(verify_bytes(bytes.clone()).unwrap().findings, []);
    let trace = Trace::from_bytes(bytes).unwrap();
    assert_eq!(trace.streams().len(), 4);
    for (stream, expected) in trace.streams().iter().zip(&expected) {
        assert_eq!(stream.info().rank, Some(stream.id().0));
        let read: Vec<_> = trace.records(stream.id()).map(|r| r.unwrap().1).collect();
        assert_eq!(read, expected.iter().map(record).collect::<Vec<_>>());
    }
    assert_eq!(trace.streams()[3].dropped_records(), 5);
    assert!(trace.streams()[3].end().unwrap().clean);
    assert!(trace.streams()[0].end().is_none());
}
