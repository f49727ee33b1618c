//! What a killed daemon left in the rings: appended to a recovered copy of its file.
//!
//! The daemon frees a ring's room when what stood there is in the file, and the ring notes how many records that were. So the
//! records behind the ring's tail that the file lacks are known by their number: those that both have are skipped, those that
//! neither has are counted. The rings themselves are only read: a recovery can be repeated.
//!
//! Kept values are no records. Those of records that the file has may be missing there: a block is written before its values.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use optape_trace::{
    Continuation, DType, DropReason, Elements, Event, Loss, Ordinal, Recovery, StreamEnd, StreamId,
    Trace, TraceError, TraceWriter, Value, WatchId, codec, recover_with,
};

use super::intake::{Fault, State, Stream};
use super::places::Places;
use super::process::Process;
use super::run_directory;
use crate::ring::{Consumer, Message, MessageKind, ValueMessage};

/// What became of one ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingState {
    /// The process that filled it.
    pub process_id: u32,
    /// Records that the file did not have.
    pub appended: u64,
    /// Records that are lost: the process dropped them, or they were freed before they were in the file.
    pub lost: u64,
    /// The process still runs: what it records from now on is not in the copy.
    pub still_running: bool,
    /// Why not all of it could be read.
    pub fault: Option<String>,
}

/// What was found beside the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Salvage {
    /// The directory of the rings; none where the run left none behind, or its daemon still works on them.
    pub directory: Option<PathBuf>,
    /// The daemon that still works on them: its process id.
    pub daemon: Option<String>,
    /// Each ring.
    pub rings: Vec<RingState>,
}

/// Writes a finished copy of the trace at `path` to `sink`, with what its rings still hold: in `rings`, or where the run left them.
///
/// # Errors
/// As [`optape_trace::recover`]; where `rings` cannot be read, or is of another run.
pub fn salvage<W: Write>(
    path: &Path,
    sink: W,
    rings: Option<&Path>,
) -> Result<(W, Recovery, Salvage), TraceError> {
    let mut found = Salvage::default();
    let (sink, recovery) = recover_with(path, sink, |trace, writer| {
        let mut continuation = Continuation::default();
        // A finished file has everything, and no rings.
        if !matches!(trace.end(), optape_trace::TraceEnd::Clean(_)) || rings.is_some() {
            found.directory = rings
                .map(Path::to_owned)
                .or_else(|| run_directory::of_run(&trace.run().run_uuid));
        }
        let Some(directory) = found.directory.as_deref() else {
            return Ok(continuation);
        };
        found.daemon = run_directory::daemon_of(directory);
        if found.daemon.is_some() {
            found.directory = None;
            return Ok(continuation);
        }
        for ring in files(directory)? {
            if let Some(state) = append(&ring, trace, writer, &mut continuation)? {
                found.rings.push(state);
            }
        }
        Ok(continuation)
    })?;
    Ok((sink, recovery, found))
}

/// Of a ring whose stream is in the file: what the file has of the values at its beginning, which follow records that are not in the ring any
/// more, or that both have.
struct KeptBefore {
    /// How many of the ring's records were passed, those before its tail included.
    passed: u64,
    /// Ordinals in the file of the daemon's own records, rising: they are not among those of the ring.
    own: Vec<u64>,
    /// Records of the file's stream, and how many the copy has of it, with drops in the place of what is damaged.
    in_file: u64,
    in_copy: u64,
    /// Records whose values the file has.
    have: HashSet<u64>,
    /// The record of which a value's beginning was taken, and the one whose value was given up.
    begun: Option<u64>,
    given_up: Option<u64>,
}

impl KeptBefore {
    fn new<W: Write>(
        known: &optape_trace::Stream,
        own: Vec<u64>,
        freed: u64,
        trace: &Trace,
        writer: &TraceWriter<W>,
    ) -> Self {
        let values = trace.values(known.id()).map_while(Result::ok);
        let mut before = Self {
            passed: freed,
            own,
            in_file: known.records(),
            in_copy: writer.records(known.id()),
            have: HashSet::new(),
            begun: None,
            given_up: None,
        };
        let from = before.record().unwrap_or(0);
        before.have = values.map(|v| v.ordinal.0).filter(|o| *o >= from).collect();
        before
    }

    /// A record is passed over: what follows may be its value.
    fn next_record(&mut self, stream: &mut Stream) {
        self.passed += 1;
        if let Some(call) = self.place() {
            stream.values.follow(call);
        }
    }

    /// Ordinal in the file of the record that was passed last; `None` before the first.
    fn record(&self) -> Option<u64> {
        let last = self.passed.checked_sub(1)?;
        Some(
            self.own
                .iter()
                .fold(last, |ordinal, own| ordinal + u64::from(*own <= ordinal)),
        )
    }

    /// Where the record stands in the copy.
    fn place(&self) -> Option<Ordinal> {
        let record = self.record().filter(|record| *record < self.in_file)?;
        Some(Ordinal((record + self.in_copy).checked_sub(self.in_file)?))
    }

    /// Whether a piece of a value is to be taken. One whose beginning was freed before the file had all of it is told to be lost.
    fn is_wanted<W: Write>(
        &mut self,
        message: &Message<'_>,
        id: Option<StreamId>,
        writer: &mut TraceWriter<W>,
    ) -> Result<bool, Fault> {
        let (Some(record), Some(call), Some(id)) = (self.record(), self.place(), id) else {
            return Ok(false);
        };
        if self.have.contains(&record) || self.given_up == Some(record) {
            return Ok(false);
        }
        let Some(piece) = ValueMessage::parse(message.words) else {
            return Ok(true); // Whoever takes it says what is wrong.
        };
        if piece.offset == 0 || self.begun == Some(record) {
            self.begun = Some(record);
            return Ok(true);
        }
        self.given_up = Some(record);
        let lost = Value {
            ordinal: call,
            watch: WatchId(piece.watch),
            dtype: DType(piece.dtype),
            shape: piece.shape.to_vec(),
            elements: Elements::Lost,
        };
        writer.value(id, &lost)?;
        Ok(false)
    }
}

fn known_id(stream: &Stream) -> Option<StreamId> {
    match stream.state {
        State::Open(id) => Some(id),
        _ => None,
    }
}

/// The rings of a directory, in the order in which their streams began, those that have none yet last.
fn files(directory: &Path) -> Result<Vec<PathBuf>, TraceError> {
    let unreadable = |source| TraceError::Io {
        path: directory.to_owned(),
        source,
    };
    let mut rings = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("ring-") {
            let stream = Consumer::open(&path).ok().and_then(|ring| ring.stream());
            rings.push((stream.unwrap_or(u32::MAX), path));
        }
    }
    rings.sort();
    Ok(rings.into_iter().map(|(_, path)| path).collect())
}

/// Ordinals of a stream's records that never were in its ring: the daemon's own.
fn own_records(trace: &Trace, stream: &optape_trace::Stream) -> Result<Vec<u64>, TraceError> {
    let moments = trace.moments(stream.id())?.into_iter();
    let marks = moments.filter(|(_, moment)| matches!(moment.event, Event::Mark { .. }));
    Ok(marks.map(|(ordinal, _)| ordinal.0).collect())
}

/// Appends what a ring has beyond the file. Nothing where it never held a record.
fn append<W: Write>(
    path: &Path,
    trace: &Trace,
    writer: &mut TraceWriter<W>,
    continuation: &mut Continuation,
) -> Result<Option<RingState>, TraceError> {
    let mut ring = match Consumer::open(path) {
        Ok(ring) => ring,
        Err(error) => {
            return Ok(Some(RingState {
                process_id: 0,
                appended: 0,
                lost: 0,
                still_running: false,
                fault: Some(format!("{}: {error}", path.display())),
            }));
        }
    };
    // Asked first: what it commits until it is found dead is read afterwards.
    let process = Process::of_ring(ring.process_id(), ring.process_start_ticks());
    let gone = process.is_gone() || ring.is_abandoned();
    let mut state = RingState {
        process_id: ring.process_id(),
        appended: 0,
        lost: 0,
        still_running: !gone,
        fault: None,
    };
    let in_file = ring
        .stream()
        .and_then(|number| trace.stream(StreamId(number)).ok());
    if in_file.is_some_and(|stream| stream.end().is_some()) {
        return Ok(None);
    }
    let mut stream = Stream::default();
    stream.report.process_id = ring.process_id();
    let mut skip = 0;
    let mut freed_unwritten = 0;
    let mut kept = None;
    if let Some(known) = in_file {
        stream.state = State::Open(known.id());
        let freed = ring.mark().records;
        let own = own_records(trace, known)?;
        let in_file = known.records().saturating_sub(own.len() as u64);
        skip = in_file.saturating_sub(freed);
        freed_unwritten = freed.saturating_sub(in_file);
        let before = KeptBefore::new(known, own, freed, trace, writer);
        let more = before.in_copy.cast_signed() - before.in_file.cast_signed();
        stream.places = Places::in_file(freed, &before.own, more);
        if let Some(call) = before.place() {
            stream.values.follow(call);
        }
        kept = Some(before);
    }
    let mut fault = None;
    let mut end = None;
    let drained = ring.peek(|message| {
        if fault.is_some() || end.is_some() {
            return;
        }
        if message.kind.is_record() && skip > 0 {
            skip -= 1;
            stream.places.passed();
            if let Some(kept) = &mut kept {
                kept.next_record(&mut stream);
            }
            return;
        }
        if message.kind.is_record() {
            kept = None;
        }
        if message.kind == MessageKind::Value
            && let Some(kept) = &mut kept
        {
            match kept.is_wanted(&message, known_id(&stream), writer) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    fault = Some(error);
                    return;
                }
            }
        }
        let known = matches!(stream.state, State::Open(_));
        match message.kind {
            MessageKind::StreamBegin if known => return,
            MessageKind::Definition => {
                let bytes = message.bytes().unwrap_or_default();
                if let (State::Open(id), Ok((definition, _))) =
                    (stream.state, codec::decode(&bytes))
                    && writer.has(id, &definition)
                {
                    return;
                }
            }
            // The recovery writes it, behind the drops.
            MessageKind::StreamEnd => {
                let bytes = message.bytes().unwrap_or_default();
                match codec::decode::<StreamEnd>(&bytes) {
                    Ok((found, _)) => end = Some(found),
                    Err(error) => fault = Some(Fault::from(error)),
                }
                return;
            }
            _ => {}
        }
        if let Err(error) = stream.take(&message, Some(&mut *writer)) {
            fault = Some(error);
        }
    });
    match (fault, drained) {
        (Some(Fault::Sink(error)), _) => return Err(error),
        (Some(Fault::Stream(why)), _) => state.fault = Some(why),
        (None, Err(error)) => state.fault = Some(error.to_string()),
        (None, Ok(())) => {}
    }
    let State::Open(id) = stream.state else {
        return Ok((state.fault.is_some()).then_some(state));
    };
    if let Err(Fault::Sink(error)) = stream.values.give_up(id, &mut Some(&mut *writer)) {
        return Err(error);
    }
    state.appended = stream.report.records;
    continuation.records += state.appended;
    let untold = ring.untold_drops();
    let mut lose = |records: u64, from_ns: u64, until_ns: u64, reason| {
        state.lost += records;
        continuation.losses.push(Loss {
            stream: id,
            records,
            from_ns,
            until_ns,
            reason,
        });
    };
    if freed_unwritten > 0 {
        let began = stream.first_ns().unwrap_or_else(|| stream.last_ns());
        lose(freed_unwritten, 0, began, DropReason::WriteFailed);
    }
    if let Some((records, from_ns, until_ns)) = untold {
        lose(records, from_ns, until_ns, DropReason::DaemonGone);
    }
    if gone || end.is_some() {
        let records = in_file.map_or(0, optape_trace::Stream::records) + state.appended;
        let mut end = end.unwrap_or_else(|| StreamEnd {
            records,
            dropped_records: 0,
            ended_ns: stream
                .last_ns()
                .max(untold.map_or(0, |(_, _, until)| until)),
            clean: false,
            costs: std::collections::BTreeMap::new(),
        });
        if in_file.is_none() {
            end.dropped_records += state.lost;
        }
        continuation.ends.insert(id, end);
    }
    Ok(Some(state))
}
