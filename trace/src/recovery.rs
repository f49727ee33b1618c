//! Recovery: a finished copy of what can still be read of an unfinished or damaged trace.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use crate::block::{Block, Columns};
use crate::dictionary::{Definition, ThreadDef};
use crate::error::TraceError;
use crate::ids::{Ordinal, StreamId, ThreadId};
use crate::info::{RunEnd, RunInfo, StreamEnd};
use crate::reader::{Stream, Trace, TraceEnd};
use crate::record::{DropReason, Event, Moment};
use crate::source::Source;
use crate::table::FIRST_LATE_PATTERN;
use crate::values::Value;
use crate::writer::TraceWriter;

/// A place where a trace is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Byte offset in the file.
    pub offset: u64,
    /// What is wrong there.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "byte {}: {}", self.offset, self.what)
    }
}

/// Records that somebody knows to be lost, though nothing in the file says so: what a ring still held when its daemon died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Whose.
    pub stream: StreamId,
    /// How many.
    pub records: u64,
    /// Since when; the end of what was saved, if that is later.
    pub from_ns: u64,
    /// Until when.
    pub until_ns: u64,
    /// Why.
    pub reason: DropReason,
}

/// What somebody adds to a recovered trace who knows more than the file says.
#[derive(Clone, Debug, Default)]
pub struct Continuation {
    /// How many records were appended.
    pub records: u64,
    /// What is lost beyond them.
    pub losses: Vec<Loss>,
    /// The ends of streams that have none in the file.
    pub ends: BTreeMap<StreamId, StreamEnd>,
}

/// What a recovery has saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Records in the copy, drops that the recovery added left out.
    pub records: u64,
    /// Records known to be lost through damage.
    pub lost: u64,
    /// The input was finished in order.
    pub finished: bool,
    /// Every damaged place.
    pub findings: Vec<Finding>,
}

/// Writes a finished copy of the trace at `path` to `sink`: every record of every whole block, a drop for every gap and every
/// known loss, new summaries, index and footer. `RunInfo::facts` gets `recovered = true`, and where the input
/// has no end of the run, the copy's end says nothing but that.
///
/// # Errors
/// Where the input is not a trace or its head is damaged (nothing can be saved then), or the sink fails.
pub fn recover<W: Write>(
    path: &Path,
    sink: W,
    losses: &[Loss],
) -> Result<(W, Recovery), TraceError> {
    recover_source(Source::open(path)?, sink, |_, _| Ok(only(losses)))
}

/// As [`recover`], and `more` may append to the copy, behind the records of the file and before the ends of streams: definitions, records,
/// whole streams. It sees what could be read of the file. What it says to be lost is written as drops.
///
/// # Errors
/// As [`recover`], and those of `more`.
pub fn recover_with<W: Write>(
    path: &Path,
    sink: W,
    more: impl FnOnce(&Trace, &mut TraceWriter<W>) -> Result<Continuation, TraceError>,
) -> Result<(W, Recovery), TraceError> {
    recover_source(Source::open(path)?, sink, more)
}

/// As [`recover`], of a trace in memory.
///
/// # Errors
/// As [`recover`].
pub fn recover_bytes<W: Write>(
    bytes: Vec<u8>,
    sink: W,
    losses: &[Loss],
) -> Result<(W, Recovery), TraceError> {
    recover_source(Source::Bytes(bytes), sink, |_, _| Ok(only(losses)))
}

fn only(losses: &[Loss]) -> Continuation {
    Continuation {
        losses: losses.to_vec(),
        ..Continuation::default()
    }
}

fn recover_source<W: Write>(
    source: Source,
    sink: W,
    more: impl FnOnce(&Trace, &mut TraceWriter<W>) -> Result<Continuation, TraceError>,
) -> Result<(W, Recovery), TraceError> {
    let mut recovery = Recovery::default();
    let trace = Trace::salvage(source, |offset, what| {
        recovery.findings.push(Finding { offset, what })
    })?;
    let mut run: RunInfo = trace.run().clone();
    run.facts.insert("recovered".to_owned(), "true".to_owned());
    let mut writer = TraceWriter::create(sink, &run)?;
    // Per stream: how much is lost, and until when it is known.
    let mut copied = Vec::new();
    for stream in trace.streams() {
        let id = writer.begin_stream(stream.info())?;
        for definition in stream.dictionary().definitions() {
            if !matches!(&definition, Definition::Pattern(id, _) if id.0 >= FIRST_LATE_PATTERN) {
                writer.define(id, &definition)?;
            }
        }
        let mut copy = StreamCopy {
            writer: &mut writer,
            stream,
            id,
            moved: Vec::new(),
            last_ns: 0,
            lost: 0,
            records: 0,
        };
        copy.blocks(&trace, &mut recovery.findings)?;
        copy.values(&trace, &mut recovery.findings)?;
        recovery.records += copy.records;
        copied.push((copy.lost, copy.last_ns));
    }
    let mut continuation = more(&trace, &mut writer)?;
    recovery.records += continuation.records;
    for loss in continuation.losses.iter().filter(|loss| loss.records > 0) {
        let known = copied.get_mut(loss.stream.index());
        let last_ns = known.map_or(0, |(lost, last_ns)| {
            *lost += loss.records;
            *last_ns
        });
        if trace.streams().get(loss.stream.index()).is_none() {
            recovery.lost += loss.records;
        }
        write_drop(
            &mut writer,
            loss.stream,
            loss.records,
            loss.from_ns.max(last_ns),
            loss.until_ns,
            loss.reason,
        )?;
    }
    for (stream, (lost, _)) in trace.streams().iter().zip(copied) {
        recovery.lost += lost;
        let end = continuation.ends.remove(&stream.id());
        if let Some(end) = stream.end().cloned().or(end) {
            writer.end_stream(
                stream.id(),
                &StreamEnd {
                    dropped_records: end.dropped_records.saturating_add(lost),
                    ..end
                },
            )?;
        }
    }
    for (id, end) in continuation.ends {
        writer.end_stream(id, &end)?;
    }
    let end = match trace.end() {
        TraceEnd::Clean(end) => {
            recovery.finished = true;
            end.clone()
        }
        _ => RunEnd::default(),
    };
    Ok((writer.finish(&end)?, recovery))
}

fn write_drop<W: Write>(
    writer: &mut TraceWriter<W>,
    stream: StreamId,
    records: u64,
    from_ns: u64,
    until_ns: u64,
    reason: DropReason,
) -> Result<(), TraceError> {
    let unknown = ThreadDef {
        native_id: 0,
        name: "unknown".to_owned(),
    };
    let thread = Definition::Thread(ThreadId(0), unknown);
    if !writer.has(stream, &thread) {
        writer.define(stream, &thread)?;
    }
    let event = Event::Drop {
        records,
        from_ns,
        until_ns: until_ns.max(from_ns),
        reason,
    };
    let moment = Moment {
        time_ns: from_ns,
        thread: ThreadId(0),
        event,
    };
    writer.moment(stream, &moment).map(|_| ())
}

/// Copies one stream.
struct StreamCopy<'a, W: Write> {
    writer: &'a mut TraceWriter<W>,
    stream: &'a Stream,
    id: StreamId,
    /// Runs of records that were copied: their ordinals in the input, and the first one's in the copy.
    moved: Vec<(Range<u64>, u64)>,
    last_ns: u64,
    lost: u64,
    records: u64,
}

impl<W: Write> StreamCopy<'_, W> {
    fn blocks(&mut self, trace: &Trace, findings: &mut Vec<Finding>) -> Result<(), TraceError> {
        let mut next = 0;
        for entry in self.stream.blocks() {
            let block = match trace.raw_block(self.stream, entry, Columns::ALL) {
                Ok(block) => block,
                Err(TraceError::Damaged { offset, what }) => {
                    findings.push(Finding { offset, what });
                    continue;
                }
                Err(other) => return Err(other),
            };
            self.gap(block.first_ordinal.saturating_sub(next), entry.first_ns)?;
            next = entry.ordinals().end;
            self.block(&block)?;
            self.last_ns = self.last_ns.max(entry.last_ns);
        }
        let expected = self.stream.end().map_or(self.stream.records(), |e| {
            e.records.max(self.stream.records())
        });
        self.gap(
            expected.saturating_sub(next),
            self.stream.end().map_or(self.last_ns, |e| e.ended_ns),
        )
    }

    /// Writes a drop for records that are missing.
    fn gap(&mut self, records: u64, until_ns: u64) -> Result<(), TraceError> {
        if records == 0 {
            return Ok(());
        }
        self.lost += records;
        self.drop(records, self.last_ns, until_ns, DropReason::WriteFailed)
    }

    fn drop(
        &mut self,
        records: u64,
        from_ns: u64,
        until_ns: u64,
        reason: DropReason,
    ) -> Result<(), TraceError> {
        write_drop(self.writer, self.id, records, from_ns, until_ns, reason)
    }

    fn block(&mut self, block: &Block) -> Result<(), TraceError> {
        let first = self.writer.records(self.id);
        let mut calls = block.op_calls();
        let mut moments = block.moments.iter();
        let kinds = block.kinds.iter().copied().chain(std::iter::repeat(0));
        let run = block.first_ordinal..block.first_ordinal + u64::from(block.records);
        self.moved.push((run.clone(), first));
        for (ordinal, kind) in run.clone().zip(kinds) {
            let written = match kind {
                0 => calls
                    .next()
                    .map(|(_, call)| self.writer.op_call(self.id, call)),
                1 => moments.next().map(|moment| self.moment(moment)),
                _ => None,
            };
            match written {
                Some(Ok(_)) => self.records += 1,
                // What is whole but makes no sense (a thread that was never defined), or is of a later version: as if lost.
                None | Some(Err(TraceError::Refused { .. })) => {
                    self.gap(1, self.last_ns)?;
                    self.moved
                        .push((ordinal + 1..run.end, self.writer.records(self.id)));
                }
                Some(Err(other)) => return Err(other),
            }
        }
        Ok(())
    }

    /// Values follow their call, too; those of a lost one are lost with it.
    fn values(&mut self, trace: &Trace, findings: &mut Vec<Finding>) -> Result<(), TraceError> {
        for entry in self.stream.values() {
            let values = match trace.values_of(self.stream.id(), entry) {
                Ok(values) => values,
                Err(TraceError::Damaged { offset, what }) => {
                    findings.push(Finding { offset, what });
                    continue;
                }
                Err(other) => return Err(other),
            };
            for value in values {
                let Some(ordinal) = self.place_of(value.ordinal) else {
                    continue;
                };
                match self.writer.value(self.id, &Value { ordinal, ..value }) {
                    Ok(()) | Err(TraceError::Refused { .. }) => {}
                    Err(other) => return Err(other),
                }
            }
        }
        Ok(())
    }

    /// The ordinal in the copy of a record that was copied.
    fn place_of(&self, ordinal: Ordinal) -> Option<Ordinal> {
        let run = self
            .moved
            .partition_point(|(run, _)| run.start <= ordinal.0)
            .checked_sub(1)
            .and_then(|i| self.moved.get(i));
        let (run, first) = run.filter(|(run, _)| run.contains(&ordinal.0))?;
        Some(Ordinal(first + (ordinal.0 - run.start)))
    }

    /// Writes a moment; late statistics follow their call.
    fn moment(&mut self, moment: &Moment) -> Result<Ordinal, TraceError> {
        let Event::Statistics { call, values } = &moment.event else {
            return self.writer.moment(self.id, moment);
        };
        match self.place_of(*call) {
            Some(call) => {
                let event = Event::Statistics {
                    call,
                    values: values.clone(),
                };
                self.writer.moment(
                    self.id,
                    &Moment {
                        event,
                        ..moment.clone()
                    },
                )
            }
            // Its call was lost.
            None => Err(TraceError::Refused {
                stream: self.id,
                what: "late statistics for a lost record".to_owned(),
            }),
        }
    }
}
