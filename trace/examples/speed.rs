//! How fast traces are written and read: a repeating training step with noisy times and statistics.
//!
//! `cargo run --release -p optape-trace --example speed -- [EVENTS] [RECORDS_PER_FLUSH]`

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    dead_code,
    reason = "an example that shares the tests' program"
)]

#[path = "../tests/trace/program.rs"]
mod program;

use optape_trace::{Columns, RunEnd, StreamEnd, StreamId, Trace, TraceWriter};
use program::{Entry, Loop, run_info};

/// Processor time of this thread, so that a busy machine does not matter much.
struct Instant(u64);

impl Instant {
    fn now() -> Self {
        let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Self(times.split(' ').next().unwrap().parse().unwrap())
    }

    fn elapsed(&self) -> std::time::Duration {
        std::time::Duration::from_nanos(Self::now().0 - self.0)
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let events: usize = arguments.next().map_or(2_000_000, |a| a.parse().unwrap());
    let flush_every: usize = arguments.next().map_or(9_400, |a| a.parse().unwrap());
    let mut program = Loop::new(1, 330);
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let (mut calls, mut records, mut nanoseconds) = (0usize, 0usize, 0u128);
    while calls < events {
        let step = program.step();
        let begin = Instant::now();
        for entry in &step {
            match entry {
                Entry::Call(call) => {
                    writer.op_call(stream, call.view()).unwrap();
                    calls += 1;
                }
                Entry::Moment(moment) => {
                    writer.moment(stream, moment).unwrap();
                }
            }
            records += 1;
            if records % flush_every == 0 {
                writer.flush().unwrap();
            }
        }
        nanoseconds += begin.elapsed().as_nanos();
    }
    writer.end_stream(stream, &StreamEnd::default()).unwrap();
    let bytes = writer.finish(&RunEnd::default()).unwrap();
    println!(
        "write: {:.0} ns per op call with {:.2} records each",
        nanoseconds as f64 / calls as f64,
        records as f64 / calls as f64
    );
    println!(
        "size: {:.3} bytes per op call",
        bytes.len() as f64 / calls as f64
    );

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("trace");
    std::fs::write(&path, bytes).unwrap();
    let begin = Instant::now();
    let trace = Trace::open(&path).unwrap();
    println!("open: {:.2} ms", begin.elapsed().as_secs_f64() * 1e3);
    let blocks = trace.streams()[0].blocks().len();
    let mut per_column: Vec<(&str, Columns)> = vec![
        ("slots", Columns::SLOTS),
        ("counters", Columns::COUNTERS),
        ("slots and statistics", Columns::SLOTS | Columns::STATISTICS),
        ("durations", Columns::DURATION),
        ("starts", Columns::START),
        ("sequence numbers", Columns::SEQUENCE_NUMBERS),
        ("payload", Columns::PAYLOAD),
        ("storages", Columns::STORAGES),
        ("tensors", Columns::TENSORS),
        ("moments", Columns::MOMENTS),
        ("all", Columns::ALL),
    ];
    for (name, columns) in per_column.drain(..) {
        let begin = Instant::now();
        let mut seen = 0;
        for index in 0..blocks {
            seen += std::hint::black_box(trace.block(StreamId(0), index, columns).unwrap()).op_calls
                as usize;
        }
        let seconds = begin.elapsed().as_secs_f64();
        println!(
            "read {name}: {:.1} million op calls per second",
            seen as f64 / seconds / 1e6
        );
    }
    let begin = Instant::now();
    let rows = trace.summary(StreamId(0), 0..u64::MAX).unwrap().len();
    println!(
        "summary of everything: {rows} rows in {:.2} ms",
        begin.elapsed().as_secs_f64() * 1e3
    );
    let begin = Instant::now();
    let rows = trace
        .summary(StreamId(0), 1..records as u64 - 1)
        .unwrap()
        .len();
    println!(
        "summary of all but two: {rows} rows in {:.2} ms",
        begin.elapsed().as_secs_f64() * 1e3
    );

    let mut columns = std::collections::BTreeMap::new();
    for (id, stored) in trace.column_bytes(StreamId(0)).unwrap() {
        *columns.entry(id).or_insert(0u64) += u64::from(stored);
    }
    for (id, stored) in columns {
        println!(
            "column {id}: {:.4} bytes per op call",
            stored as f64 / calls as f64
        );
    }
}
