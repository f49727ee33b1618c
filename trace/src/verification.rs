//! Verification: whether all of a trace is as FORMAT.md says.

use std::path::Path;

use crate::block::{Columns, time_span};
use crate::bytes::len64;
use crate::error::TraceError;
use crate::reader::{NOT_WHOLE, Stream, Trace, TraceEnd};
use crate::record::Event;
use crate::recovery::Finding;
use crate::source::Source;

/// What a check has found.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// How the trace ends.
    pub end: TraceEnd,
    /// Frames that were whole.
    pub frames: u64,
    /// Streams.
    pub streams: u64,
    /// Those among them that hold a recorded process.
    pub processes: u64,
    /// Blocks.
    pub blocks: u64,
    /// Records.
    pub records: u64,
    /// Records that the trace itself says were lost.
    pub dropped_records: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Everything that is wrong. Being unfinished is not among it.
    pub findings: Vec<Finding>,
}

/// Checks all of a trace: every frame's checksum, every column, every reference to the dictionary, every count, the summaries
/// against the records, the index against the frames.
///
/// # Errors
/// Where the file cannot be read, is not a trace, or its head is damaged.
pub fn verify(path: &Path) -> Result<Verification, TraceError> {
    verify_opened(Trace::open(path)?, Source::open(path)?)
}

/// As [`verify`], of a trace in memory.
///
/// # Errors
/// As [`verify`].
pub fn verify_bytes(bytes: Vec<u8>) -> Result<Verification, TraceError> {
    verify_opened(Trace::from_bytes(bytes.clone())?, Source::Bytes(bytes))
}

fn verify_opened(opened: Trace, source: Source) -> Result<Verification, TraceError> {
    let mut findings = Vec::new();
    let file_bytes = source.length()?;
    let unfinished = matches!(opened.end(), TraceEnd::Unfinished { .. });
    let trace = Trace::salvage(source, |offset, what| {
        if !(unfinished && what == NOT_WHOLE) {
            findings.push(Finding { offset, what });
        }
    })?;
    for stream in trace.streams() {
        verify_stream(&trace, stream, &mut findings)?;
    }
    if findings.is_empty() {
        compare(&opened, &trace, &mut findings);
    }
    findings.sort_by_key(|f| f.offset);
    let sum = |of: fn(&Stream) -> u64| trace.streams().iter().map(of).sum();
    Ok(Verification {
        end: opened.end().clone(),
        frames: trace.frames(),
        streams: len64(trace.streams().len()),
        processes: len64(trace.processes().count()),
        blocks: sum(|s| len64(s.blocks().len())),
        records: sum(Stream::records),
        dropped_records: sum(Stream::dropped_records),
        file_bytes,
        findings,
    })
}

/// The index must say what the frames say.
fn compare(opened: &Trace, scanned: &Trace, findings: &mut Vec<Finding>) {
    let at = |stream: &Stream| stream.blocks().first().map_or(0, |b| b.offset);
    if opened.streams().len() != scanned.streams().len() {
        findings.push(Finding {
            offset: 0,
            what: "the index has another number of streams than the file".to_owned(),
        });
    }
    for (a, b) in opened.streams().iter().zip(scanned.streams()) {
        let same = a.blocks() == b.blocks()
            && a.summaries() == b.summaries()
            && a.values() == b.values()
            && a.end() == b.end()
            && a.info() == b.info()
            && a.dictionary().counts() == b.dictionary().counts();
        if !same && matches!(opened.end(), TraceEnd::Clean(_)) {
            findings.push(Finding {
                offset: at(b),
                what: format!("the index and the frames of stream {} disagree", b.id()),
            });
        }
    }
}

fn verify_stream(
    trace: &Trace,
    stream: &Stream,
    findings: &mut Vec<Finding>,
) -> Result<(), TraceError> {
    let counts = stream.dictionary().counts();
    let mut next = 0;
    for (index, entry) in stream.blocks().iter().enumerate() {
        let mut find = |what: String| {
            findings.push(Finding {
                offset: entry.offset,
                what,
            })
        };
        if entry.first_ordinal != next {
            find(format!(
                "records {next} to {} of stream {} are missing",
                entry.first_ordinal,
                stream.id()
            ));
        }
        next = entry.ordinals().end;
        let block = match trace.raw_block(stream, entry, Columns::ALL) {
            Ok(block) => block,
            Err(TraceError::Damaged { what, .. }) => {
                find(what);
                continue;
            }
            Err(other) => return Err(other),
        };
        if let Some(thread) = block.threads.iter().find(|t| **t >= counts.threads) {
            find(format!(
                "an op call uses thread {thread}, which is not defined"
            ));
        }
        for moment in &block.moments {
            if let Err(corrupt) = counts.check_moment(moment) {
                find(corrupt.0.into_owned());
            }
        }
        let is_pending = |p| {
            stream
                .dictionary()
                .pattern(p)
                .is_some_and(crate::Pattern::is_pending)
        };
        let pending = block
            .op_calls()
            .filter(|(_, call)| is_pending(call.pattern))
            .count();
        if len64(pending) != u64::from(entry.pending) {
            find(format!(
                "a block says that {} calls are pending, {pending} are",
                entry.pending
            ));
        }
        let drops = block.moments.iter().map(|m| {
            if let Event::Drop { records, .. } = m.event {
                records
            } else {
                0
            }
        });
        let dropped = drops.fold(0u64, u64::saturating_add);
        if dropped != entry.dropped {
            find(format!(
                "a block says that {} records were dropped, its records say {dropped}",
                entry.dropped
            ));
        }
        let late = block.moments.iter().filter_map(|m| {
            if let Event::Statistics { call, .. } = m.event {
                Some(call.0)
            } else {
                None
            }
        });
        let late = late.fold(None, |range: Option<(u64, u64)>, o| {
            Some(range.map_or((o, o), |(a, b)| (a.min(o), b.max(o))))
        });
        if late != entry.late {
            find("a block's head and its late statistics disagree".to_owned());
        }
        let (first, last) = time_span(&block.start_ns, &block.duration_ns, &block.moments);
        // Records of later versions have times too.
        if entry.first_ns > first || entry.last_ns < last {
            find("a block's head and its times disagree".to_owned());
        }
        if let Err(TraceError::Damaged { what, .. }) = trace.block(stream.id(), index, Columns::ALL)
        {
            find(what);
        }
    }
    for entry in stream.values() {
        let wrong = match trace.values_of(stream.id(), entry) {
            Ok(values) => values
                .iter()
                .find(|v| v.ordinal.0 >= stream.records() || v.watch.0 >= counts.watches)
                .map(|v| {
                    format!(
                        "a value names record {} and watch {}, of which one is not there",
                        v.ordinal, v.watch
                    )
                }),
            Err(TraceError::Damaged { what, .. }) => Some(what),
            Err(other) => return Err(other),
        };
        findings.extend(wrong.map(|what| Finding {
            offset: entry.offset,
            what,
        }));
    }
    if let Some(end) = stream.end()
        && end.records != stream.records()
    {
        let what = format!(
            "stream {} ended with {} records, {} can be read",
            stream.id(),
            end.records,
            stream.records()
        );
        findings.push(Finding { offset: 0, what });
    }
    verify_summaries(trace, stream, findings)
}

/// Summaries of the lowest level must say what their blocks say, the others what those say.
fn verify_summaries(
    trace: &Trace,
    stream: &Stream,
    findings: &mut Vec<Finding>,
) -> Result<(), TraceError> {
    for summary in stream.summaries() {
        let checked = trace.read_summary(stream, summary).and_then(|stored| {
            let counted = trace.sum_below(stream, summary)?;
            Ok(stored.len() == counted.len()
                && stored.iter().zip(&counted).all(|(a, b)| a.agrees(b)))
        });
        match checked {
            Ok(true) => {}
            Ok(false) => {
                let range = summary.ordinals();
                let what = format!(
                    "the summary of records {} to {} is not the sum of its records",
                    range.start, range.end
                );
                findings.push(Finding {
                    offset: summary.offset,
                    what,
                });
            }
            Err(TraceError::Damaged { offset, what }) => findings.push(Finding { offset, what }),
            Err(other) => return Err(other),
        }
    }
    Ok(())
}
