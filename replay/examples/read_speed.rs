//! How fast replay reads events: `cargo run --release -p optape-replay --example read_speed -- TRACE [CALLS]`.
//!
//! The first stream's records are repeated until there are CALLS op calls (10 million), with their real spread of times and
//! statistics, and replayed from events on one thread and from summaries. Rules are applied in both.

use std::time::{Duration, Instant};

use optape_replay::rules::RuleSet;
use optape_replay::{Request, Traces, evaluate};
use optape_trace::{OpCallRef, Record, RunEnd, StreamEnd, Trace, TraceWriter};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("which trace?")?;
    let wanted: u64 = arguments.next().map_or(Ok(10_000_000), |n| n.parse())?;
    let bytes = repeated(&Trace::open(path.as_ref())?, wanted)?;
    println!("{} bytes", bytes.len());
    let traces = Traces::of(&path, Trace::from_bytes(bytes)?);
    let rules = RuleSet::named("optape")?;
    let calls: u64 = traces.streams().map(|at| at.stream.op_calls()).sum();
    let time = |from_events| -> Result<Duration, Box<dyn std::error::Error>> {
        let mut times = Vec::new();
        for _ in 0..5 {
            let request = Request {
                from_events,
                threads: 1,
                ..Request::default()
            };
            let started = Instant::now();
            evaluate(&traces, &rules, &request)?;
            times.push(started.elapsed());
        }
        times.sort();
        Ok(times[times.len() / 2])
    };
    let (events, summaries) = (time(true)?, time(false)?);
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = calls as f64 / events.as_secs_f64() / 1e6;
    println!(
        "{calls} op calls: {events:?} from events ({rate:.1} M/s on one core), {summaries:?} from summaries"
    );
    Ok(())
}

/// The trace's first stream, its records again and again.
fn repeated(trace: &Trace, calls: u64) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let stream = trace.streams().first().ok_or("the trace has no stream")?;
    let records: Vec<Record> = trace
        .records(stream.id())
        .map(|r| r.map(|(_, record)| record))
        .collect::<Result<_, _>>()?;
    let mut writer = TraceWriter::create(Vec::new(), trace.run())?;
    let id = writer.begin_stream(stream.info())?;
    for definition in stream.dictionary().definitions() {
        writer.define(id, &definition)?;
    }
    let mut written = 0;
    let mut offset_ns = 0;
    while written < calls {
        let mut last_ns = offset_ns;
        for record in &records {
            match record {
                Record::OpCall(call) => {
                    let ids = |all: &[optape_trace::StorageId]| {
                        all.iter().map(|i| i.0).collect::<Vec<u64>>()
                    };
                    let storages = ids(&call.storages);
                    let tensors: Vec<u64> = call.tensors.iter().map(|i| i.0).collect();
                    last_ns = offset_ns + call.start_ns;
                    writer.op_call(
                        id,
                        OpCallRef {
                            signature: call.signature,
                            pattern: call.pattern,
                            thread: call.thread,
                            start_ns: last_ns,
                            duration_ns: call.duration_ns,
                            sequence_number: call.sequence_number,
                            payload: &call.payload,
                            storages: &storages,
                            tensors: &tensors,
                            statistics: &call.statistics,
                        },
                    )?;
                    written += 1;
                }
                Record::Other(moment) => {
                    let mut moment = moment.clone();
                    moment.time_ns += offset_ns;
                    writer.moment(id, &moment)?;
                }
                _ => {}
            }
        }
        offset_ns = last_ns + 1;
    }
    writer.end_stream(
        id,
        &StreamEnd {
            clean: true,
            ..StreamEnd::default()
        },
    )?;
    Ok(writer.finish(&RunEnd::default())?)
}
