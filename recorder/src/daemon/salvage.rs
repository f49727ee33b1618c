//! What a killed daemon left in the rings: appended to a recovered copy of its file.
//!
//! The daemon frees a ring's room when what stood there is in the file, and the ring notes how many records that were. So the
//! records behind the ring's tail that the file lacks are known by their number: those that both have are skipped, those that
//! neither has are counted. The rings themselves are only read: a recovery can be repeated.

use std::io::Write;
use std::path::{Path, PathBuf};

use optape_trace::{
    Continuation, DropReason, Event, Loss, Recovery, StreamEnd, StreamId, Trace, TraceError,
    TraceWriter, codec, recover_with,
};

use super::intake::{Fault, State, Stream};
use super::process::Process;
use super::run_directory;
use crate::ring::{Consumer, MessageKind};

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

/// Records of a stream that never were in its ring: the daemon's own.
fn marks(trace: &Trace, stream: &optape_trace::Stream) -> Result<u64, TraceError> {
    trace.count_moments(stream.id(), |event| matches!(event, Event::Mark { .. }))
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
    if let Some(known) = in_file {
        stream.state = State::Open(known.id());
        let freed = ring.mark().records;
        let in_file = known.records().saturating_sub(marks(trace, known)?);
        skip = in_file.saturating_sub(freed);
        freed_unwritten = freed.saturating_sub(in_file);
    }
    let mut fault = None;
    let mut end = None;
    let drained = ring.peek(|message| {
        if fault.is_some() || end.is_some() {
            return;
        }
        if message.kind.is_record() && skip > 0 {
            skip -= 1;
            return;
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
