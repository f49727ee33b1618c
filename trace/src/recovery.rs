//! Recovery: a finished copy of what can still be read of an unfinished or damaged trace.

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
    recover_source(Source::open(path)?, sink, losses)
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
    recover_source(Source::Bytes(bytes), sink, losses)
}

fn recover_source<W: Write>(
    source: Source,
    sink: W,
    losses: &[Loss],
) -> Result<(W, Recovery), TraceError> {
    let mut recovery = Recovery::default();
    let trace = Trace::salvage(source, |offset, what| {
        recovery.findings.push(Finding { offset, what })
    })?;
    let mut run: RunInfo = trace.run().clone();
    run.facts.insert("recovered".to_owned(), "true".to_owned());
    let mut writer = TraceWriter::create(sink, &run)?;
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
        copy.losses(losses)?;
        recovery.records += copy.records;
        recovery.lost += copy.lost;
        let lost = copy.lost;
        if let Some(end) = stream.end() {
            writer.end_stream(
                id,
                &StreamEnd {
                    dropped_records: end.dropped_records.saturating_add(lost),
                    ..end.clone()
                },
            )?;
        }
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
        if self.stream.dictionary().threads().len() == 0 && self.writer.records(self.id) == 0 {
            let unknown = ThreadDef {
                native_id: 0,
                name: "unknown".to_owned(),
            };
            self.writer
                .define(self.id, &Definition::Thread(ThreadId(0), unknown))?;
        }
        let event = Event::Drop {
            records,
            from_ns,
            until_ns: until_ns.max(from_ns),
            reason,
        };
        self.writer.moment(
            self.id,
            &Moment {
                time_ns: from_ns,
                thread: ThreadId(0),
                event,
            },
        )?;
        Ok(())
    }

    fn losses(&mut self, losses: &[Loss]) -> Result<(), TraceError> {
        let id = self.id;
        for loss in losses.iter().filter(|l| l.stream == id && l.records > 0) {
            self.lost += loss.records;
            self.drop(
                loss.records,
                loss.from_ns.max(self.last_ns),
                loss.until_ns,
                loss.reason,
            )?;
        }
        Ok(())
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
