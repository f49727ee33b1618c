//! The drain loop: finds rings, empties them into the trace, ends the streams of processes that died.
//!
//! Nothing here depends on owning the processes: `optape record` and in-process recording run the same loop. Trusts nothing that
//! it reads: a malformed ring ends the stream of its process and no other.

use std::collections::{HashSet, VecDeque};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use optape_trace::{
    Definition, DropReason, Event, Moment, OpCallRef, PatternId, RunEnd, SignatureId, StreamEnd,
    StreamId, StreamInfo, ThreadDef, ThreadId, TraceError, TraceWriter, call_flags, codec,
};

use super::cost::{peak_resident_bytes, process_cpu_ns, thread_cpu_ns};
use super::monitors::MonitorStream;
use super::order::{Flushing, Order, StreamStatus};
use super::places::Places;
use super::process::Process;
use super::pulse::Pulse;
use super::report::{Report, StreamReport};
use super::sink::{BackgroundSink, SinkState};
use super::values::Assembly;
use super::window::{Kept, Window};
use super::{Notice, Setting};
use crate::capture::{PAUSED_MARKER, STOPPED_MARKER};
use crate::clock::{monotonic_ns, unix_ns};
use crate::ring::{Consumer, Mark, Message, MessageKind, OpCallMessage, ValueMessage, command};

/// Between two looks at the rings, unless one of them fills up fast.
const INTERVAL: Duration = Duration::from_millis(10);
/// As long as nobody records. A ring begins with a heartbeat of its producer's, so there is time until the first of ours.
const IDLE_INTERVAL: Duration = Duration::from_millis(25);
/// After a look that found a ring more than a quarter full.
const BUSY_INTERVAL: Duration = Duration::from_millis(2);
/// What arrived is in the file after this long, and an interval.
const FLUSH_INTERVAL: Duration = Duration::from_millis(85);
/// Where a quarter of a ring waits for the next flush, it is due at once.
const FLUSHED_SHARE: u64 = 4;
/// No more than half of a ring is read before it is in the file, so that the other half is free for the program;
const HELD_SHARE: u64 = 2;
/// but of a ring smaller than this, everything: its blocks would be too small,
const SMALLEST_HELD_RING: u64 = 1 << 20;
/// and where the disk is slower than this: nobody who trains waits for a disk.
const SLOW_DISK: Duration = Duration::from_millis(50);
/// Resident ring memory above which rings are mapped afresh once they were drained, which gives their pages back.
const RESIDENT_RING_BYTES: usize = 24 << 20;

/// Every so many looks at a ring it is asked whether its program image still lives.
const LOOKS_PER_IMAGE_CHECK: u32 = 16;
/// So long a recording that is stopped waits for its processes to notice.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Most marks of a run: whoever sends them must not fill the disk.
const MOST_MARKS: u64 = 65_536;
/// In `StreamEnd::costs`: how often recording was paused, and for how long in all.
pub(super) const PAUSES_KEY: &str = "recording.pauses";
pub(super) const PAUSED_NS_KEY: &str = "recording.paused_ns";

/// How the recording is to end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Finish {
    pub(super) exit_code: Option<i32>,
    pub(super) signal: Option<i32>,
    /// How long to go on for processes that still run.
    pub(super) grace: Duration,
}

/// The state of the loop.
pub(super) struct Intake {
    directory: PathBuf,
    setting: Setting,
    notice: Notice,
    /// `None` once writing has failed: rings are then drained and their records counted and thrown away.
    writer: Option<TraceWriter<BackgroundSink>>,
    sink: SinkState,
    pulse: Pulse,
    monitors: Option<MonitorStream>,
    rings: Vec<Ring>,
    /// Files of rings that have ended: they go once what they held is in the file.
    ended: Vec<EndedRing>,
    /// Only the last minutes are kept: nothing reaches the writer before the end.
    window: Option<Window>,
    /// Ring files that are of no use: not looked at again.
    ignored: HashSet<PathBuf>,
    directory_lost: bool,
    /// Something was recorded, so the file is there.
    begun: bool,
    checkpoints: Checkpoints,
    flushed: Instant,
    unflushed: bool,
    /// When the first ring was found, and when the last one ended.
    active: Option<(Instant, Instant)>,
    busy: bool,
    report: Report,
    /// The last command for all processes, for those that come later.
    wanted: Option<u32>,
    commands: u32,
    marks: u64,
    looks: u32,
    /// Who asked for the end, to be told what came of it.
    stopper: Option<Sender<Vec<String>>>,
}

/// A ring and its stream.
struct Ring {
    consumer: Consumer,
    process: Process,
    stream: Stream,
    /// How far it was read when the file had so many bytes: it is freed up to there once they are written.
    flushed: VecDeque<(u64, Mark, Instant)>,
    /// Bytes read since the ring was mapped: about what of it is resident.
    resident_bytes: usize,
    /// CLOCK_MONOTONIC when it was found.
    found_ns: u64,
}

/// A ring that nobody fills any more.
struct EndedRing {
    path: PathBuf,
    /// The file's length with all of it; not known before the next flush.
    bytes: Option<u64>,
}

#[derive(Default)]
pub(super) struct Stream {
    pub(super) state: State,
    pub(super) report: StreamReport,
    /// By signature: its calls are unattributed.
    unattributed: Vec<bool>,
    first_ns: Option<u64>,
    last_ns: u64,
    scratch: Vec<u8>,
    has_threads: bool,
    pub(super) values: Assembly,
    pub(super) places: Places,
    /// When the pause that is open began.
    paused_since_ns: Option<u64>,
    /// Its last minutes, where only they are kept.
    kept: Option<Kept>,
}

#[derive(Clone, Copy, Default, PartialEq)]
pub(super) enum State {
    /// Nothing arrived yet.
    #[default]
    Waiting,
    /// In the trace.
    Open(StreamId),
    /// Its end is in the trace, or its beginning never was: what follows is thrown away.
    Ended,
}

/// Why a message was not taken.
pub(super) enum Fault {
    /// The process sent nonsense: its stream ends.
    Stream(String),
    /// The file cannot be written: everything ends.
    Sink(TraceError),
}

impl From<TraceError> for Fault {
    fn from(error: TraceError) -> Self {
        match error {
            TraceError::Sink { .. } | TraceError::SinkFailed | TraceError::Io { .. } => {
                Self::Sink(error)
            }
            TraceError::Refused { what, .. } => Self::Stream(what),
            other => Self::Stream(other.to_string()),
        }
    }
}

/// How many records were handed to the writing thread up to which byte, to tell what of them arrived.
#[derive(Default)]
struct Checkpoints {
    taken: u64,
    written: std::collections::VecDeque<(u64, u64)>,
    safe: u64,
}

impl Checkpoints {
    fn flushed(&mut self, bytes: u64, arrived: u64) {
        self.written.push_back((bytes, self.taken));
        self.arrived(arrived);
    }

    fn arrived(&mut self, bytes: u64) {
        while self.written.front().is_some_and(|(end, _)| *end <= bytes) {
            self.safe = self
                .written
                .pop_front()
                .map_or(self.safe, |(_, records)| records);
        }
    }
}

impl Intake {
    pub(super) fn new(
        directory: &Path,
        writer: TraceWriter<BackgroundSink>,
        sink: SinkState,
        pulse: Pulse,
        monitors: Option<MonitorStream>,
        mut setting: Setting,
        notice: Notice,
    ) -> Self {
        Self {
            directory: directory.to_owned(),
            window: setting.window.take(),
            setting,
            notice,
            writer: Some(writer),
            sink,
            pulse,
            monitors,
            rings: Vec::new(),
            ended: Vec::new(),
            ignored: HashSet::new(),
            directory_lost: false,
            begun: false,
            checkpoints: Checkpoints::default(),
            flushed: Instant::now(),
            unflushed: false,
            active: None,
            busy: false,
            report: Report::default(),
            wanted: None,
            commands: 0,
            marks: 0,
            looks: 0,
            stopper: None,
        }
    }

    /// Drains until told to finish, or until whoever would tell is gone.
    pub(super) fn run(mut self, orders: &Receiver<Order>) -> Report {
        // How it is to end, and when at the latest.
        let mut ending: Option<(Finish, Instant)> = None;
        let finish = loop {
            self.look();
            let interval = match (self.busy || ending.is_some(), self.rings.is_empty()) {
                (true, _) => BUSY_INTERVAL,
                (_, true) => IDLE_INTERVAL,
                _ => INTERVAL,
            };
            if let Some((finish, deadline)) = ending
                && (self.rings.is_empty() || Instant::now() >= deadline)
            {
                break finish;
            }
            match orders.recv_timeout(interval) {
                Ok(Order::Finish(finish)) => ending = Some((finish, Instant::now() + finish.grace)),
                Ok(Order::Stop(reply)) => {
                    self.stop();
                    self.stopper = Some(reply);
                    let finish = ending.map_or_else(Finish::default, |(finish, _)| finish);
                    ending = Some((finish, Instant::now() + STOP_GRACE));
                }
                Ok(order) => self.follow(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => match ending {
                    Some(_) => std::thread::sleep(interval),
                    None => break Finish::default(),
                },
            }
        };
        let stopper = self.stopper.take();
        let report = self.finish(finish);
        if let Some(stopper) = stopper {
            let first = match report.streams.is_empty() {
                true => "nothing was recorded, and no file is left".to_owned(),
                false => format!("recorded {} op calls", report.op_calls()),
            };
            let lines = std::iter::once(first).chain(report.summary());
            let _ = stopper.send(lines.collect());
        }
        report
    }

    fn follow(&mut self, order: Order) {
        // Who asked may have gone meanwhile.
        match order {
            Order::Pause { on, process, reply } => {
                let _ = reply.send(self.pause(on, process));
            }
            Order::Mark { text, reply } => {
                let _ = reply.send(self.mark(&text));
            }
            Order::Flush(reply) => {
                let _ = reply.send(self.flush());
            }
            Order::Status(reply) => {
                let _ = reply.send(self.status());
            }
            Order::Finish(_) | Order::Stop(_) => {}
        }
    }

    /// A command that rings have not seen.
    fn command(&mut self, bits: u32) -> u32 {
        self.commands = self.commands.wrapping_add(command::NEXT);
        self.commands | bits
    }

    /// Pauses or resumes all processes, or one. Gives how many are told so now.
    fn pause(&mut self, on: bool, process: Option<u32>) -> Result<usize, String> {
        let command = self.command(if on { command::PAUSE } else { 0 });
        if let Some(process) = process {
            let mut told = 0;
            for ring in self
                .rings
                .iter()
                .filter(|r| r.consumer.process_id() == process)
            {
                ring.consumer.send_command(command);
                told += 1;
            }
            return match told {
                0 => Err(format!("process {process} is not being recorded here")),
                _ => Ok(told),
            };
        }
        let marker = self.directory.join(PAUSED_MARKER);
        let marked = match on {
            true => std::fs::write(&marker, ""),
            false => std::fs::remove_file(&marker),
        };
        match marked {
            Err(error) if on || error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!(
                    "cannot note it for processes to come in {}: {error}",
                    marker.display()
                ));
            }
            _ => {}
        }
        self.wanted = Some(command);
        for ring in &self.rings {
            ring.consumer.send_command(command);
        }
        Ok(self.rings.len())
    }

    fn stop(&mut self) {
        // Where this fails the directory is gone, and no process can begin either.
        let _ = std::fs::write(self.directory.join(STOPPED_MARKER), "");
        let command = self.command(command::STOP);
        self.wanted = Some(command);
        for ring in &self.rings {
            ring.consumer.send_command(command);
        }
    }

    /// Writes a mark into every open stream.
    fn mark(&mut self, text: &str) -> Result<usize, String> {
        if self.marks >= MOST_MARKS {
            return Err(format!(
                "this run has {MOST_MARKS} marks, which is the most"
            ));
        }
        self.look();
        let windowed = self.window.is_some();
        let Some(writer) = self.writer.as_mut() else {
            return Err("the file cannot be written any more".to_owned());
        };
        let mut marked = 0;
        let mut failed = None;
        for ring in &mut self.rings {
            let State::Open(id) = ring.stream.state else {
                continue;
            };
            let time_ns = monotonic_ns().saturating_sub(ring.consumer.epoch_ns());
            let event = Event::Mark {
                text: text.to_owned(),
            };
            let live = (!windowed).then_some(&mut *writer);
            match ring.stream.note(id, time_ns, event, live) {
                Ok(()) => marked += 1,
                Err(Fault::Stream(why)) => return Err(why),
                Err(Fault::Sink(error)) => failed = Some(error.to_string()),
            }
        }
        if let Some(why) = failed {
            self.writing_failed(&why);
            return Err(why);
        }
        if marked == 0 {
            return Err("no process is being recorded now".to_owned());
        }
        self.marks += 1;
        self.unflushed = true;
        Ok(marked)
    }

    /// Hands what there is to the writing thread.
    fn flush(&mut self) -> Result<Flushing, String> {
        if self.window.is_some() {
            return Err("with --ring, the file is written at the end".to_owned());
        }
        self.look();
        self.flush_now();
        match (&self.writer, &self.report.failure) {
            (Some(writer), None) => Ok(Flushing {
                bytes: writer.bytes_written(),
                sink: self.sink.clone(),
            }),
            (_, why) => Err(why.clone().unwrap_or_default()),
        }
    }

    fn status(&self) -> Vec<StreamStatus> {
        let mut all: Vec<StreamStatus> = self
            .rings
            .iter()
            .filter(|ring| ring.stream.state != State::Waiting)
            .map(|ring| StreamStatus {
                process_id: ring.consumer.process_id(),
                command: ring.stream.report.command.clone(),
                op_calls: ring.stream.report.op_calls,
                dropped_records: ring.stream.report.dropped_records,
                paused: ring.consumer.paused(),
                steps: ring.consumer.steps(),
                obeys: ring.consumer.commanded() == ring.consumer.obeyed(),
                ended: false,
            })
            .collect();
        all.extend(self.report.streams.iter().map(|stream| StreamStatus {
            process_id: stream.process_id,
            command: stream.command.clone(),
            op_calls: stream.op_calls,
            dropped_records: stream.dropped_records,
            paused: 0,
            steps: stream.steps,
            obeys: true,
            ended: true,
        }));
        all
    }

    /// One round: new rings, their records, deaths, a flush where it is due.
    fn look(&mut self) {
        self.find_rings();
        self.free_what_is_written();
        self.busy = false;
        self.looks = self.looks.wrapping_add(1);
        let check_images = self.looks.is_multiple_of(LOOKS_PER_IMAGE_CHECK);
        let mut index = 0;
        while let Some(ring) = self.rings.get(index) {
            // The order matters: what a process committed before it was found dead is drained afterwards.
            // A process that became another program lives on, but its ring has no owner any more.
            let gone = ring.process.is_gone() || (check_images && ring.consumer.is_abandoned());
            let sound = self.drain(index, gone);
            let ended = self
                .rings
                .get(index)
                .is_none_or(|ring| ring.stream.state == State::Ended);
            if gone || !sound || ended {
                self.end_ring(index);
            } else {
                index += 1;
            }
        }
        self.look_at_monitors();
        // The last minutes are those before the end of what was recorded, however long a program takes to end.
        if let Some(window) = &mut self.window
            && !self.rings.is_empty()
        {
            window.look();
        }
        self.give_back_memory();
        self.flush_if_due();
        self.free_what_is_written();
    }

    /// Takes what the monitors have sampled. It is written beside a process's stream, never alone.
    fn look_at_monitors(&mut self) {
        let begun = self.began_a_stream();
        let Some(monitors) = &mut self.monitors else {
            return;
        };
        // Where only the last minutes are kept, theirs wait with the others.
        let windowed = self.window.is_some();
        let writer = self.writer.as_mut().filter(|_| begun && !windowed);
        match monitors.look(writer, &*self.notice) {
            Ok(records) => {
                self.checkpoints.taken += records;
                self.unflushed |= records > 0;
            }
            Err(error) => self.writing_failed(&error.to_string()),
        }
    }

    fn began_a_stream(&self) -> bool {
        !self.report.streams.is_empty()
            || self
                .rings
                .iter()
                .any(|ring| ring.stream.state != State::Waiting)
    }

    fn find_rings(&mut self) {
        let entries = match std::fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) => {
                if !std::mem::replace(&mut self.directory_lost, true) {
                    (self.notice)(&format!(
                        "the run directory {} is gone ({error}); processes that start from now on are not recorded",
                        self.directory.display()
                    ));
                }
                return;
            }
        };
        for entry in entries.flatten() {
            let is_ring = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with("ring-"));
            if !is_ring
                || self
                    .rings
                    .iter()
                    .any(|ring| ring.consumer.path().file_name() == Some(&entry.file_name()))
            {
                continue;
            }
            let path = entry.path();
            if self.ignored.contains(&path) {
                continue;
            }
            if let Err(error) = self.add_ring(&path) {
                let why = format!(
                    "{} cannot be read: {error}; its process is not recorded",
                    path.display()
                );
                (self.notice)(&why);
                self.report.bad_rings.push(why);
                self.ignored.insert(path);
            }
        }
    }

    fn add_ring(&mut self, path: &Path) -> std::io::Result<()> {
        let consumer = Consumer::open(path)?;
        self.pulse.add(path)?;
        let process_id = consumer.process_id();
        tracing::debug!("process {process_id} began to record: {}", path.display());
        if let Some(monitors) = &self.monitors {
            monitors.process_began(process_id);
        }
        if let Some(command) = self.wanted {
            consumer.send_command(command);
        }
        let process = Process::of_ring(process_id, consumer.process_start_ticks());
        let stream = Stream {
            report: StreamReport {
                process_id,
                ..Default::default()
            },
            kept: self
                .window
                .is_some()
                .then(|| Kept::new(consumer.epoch_ns())),
            ..Default::default()
        };
        self.active
            .get_or_insert_with(|| (Instant::now(), Instant::now()));
        self.rings.push(Ring {
            consumer,
            process,
            stream,
            flushed: VecDeque::new(),
            resident_bytes: 0,
            found_ns: monotonic_ns(),
        });
        Ok(())
    }

    /// Empties a ring. False: its content is no sequence of messages, or its process sent nonsense.
    fn drain(&mut self, index: usize, to_its_end: bool) -> bool {
        let Some(Ring {
            consumer,
            stream,
            resident_bytes,
            ..
        }) = self.rings.get_mut(index)
        else {
            return false;
        };
        let (writer, taken) = (&mut self.writer, &mut self.checkpoints.taken);
        let windowed = self.window.is_some();
        let mut fault = None;
        let mut bytes = 0;
        let capacity = consumer.capacity();
        let limited = !to_its_end && !windowed && capacity >= SMALLEST_HELD_RING;
        let most_held = if limited {
            capacity / HELD_SHARE
        } else {
            u64::MAX
        };
        let drained = consumer.drain(most_held, |message| {
            bytes += (message.words.len() + 1) * 8;
            if fault.is_some() || stream.state == State::Ended {
                return;
            }
            let records = stream.report.records;
            let live = if windowed { None } else { writer.as_mut() };
            if let Err(error) = stream.take(&message, live) {
                fault = Some(error);
            }
            *taken += stream.report.records - records;
        });
        if let (State::Open(id), None, false) = (stream.state, consumer.stream(), windowed) {
            consumer.set_stream(id.0);
        }
        // What is only kept for a while is in the file at the end: no ring is that large.
        if windowed || !limited && consumer.held_bytes() > capacity / HELD_SHARE {
            consumer.free(consumer.mark());
        }
        *resident_bytes += bytes;
        self.unflushed |= bytes > 0;
        self.busy |= bytes > self.setting.ring_bytes / 4 || !consumer.is_empty();
        if let (Some(window), Some(kept), None) = (&mut self.window, &mut stream.kept, &fault)
            && let Err(source) = window.settle(kept)
        {
            fault = Some(Fault::Sink(TraceError::Sink { written: 0, source }));
        }
        let fault = match (drained, fault) {
            (_, Some(fault)) => fault,
            (Err(error), None) => Fault::Stream(error.to_string()),
            (Ok(_), None) => return true,
        };
        match fault {
            Fault::Sink(error) => {
                self.writing_failed(&error.to_string());
                true
            }
            Fault::Stream(why) => {
                self.disable(
                    index,
                    &format!("the recorded process sent something malformed: {why}"),
                );
                false
            }
        }
    }

    /// Ends a stream whose process cannot be understood any more.
    fn disable(&mut self, index: usize, why: &str) {
        let Some(Ring { stream, .. }) = self.rings.get_mut(index) else {
            return;
        };
        (self.notice)(&format!(
            "recording of process {} ends: {why}",
            stream.report.process_id
        ));
        stream.report.disabled = Some(why.to_owned());
        let live = match self.window {
            None => self.writer.as_mut(),
            Some(_) => None,
        };
        if let State::Open(id) = stream.state {
            // A sink that fails here is noticed at the next flush.
            let _ = stream.note(
                id,
                stream.last_ns,
                Event::Disabled {
                    reason: why.to_owned(),
                },
                live,
            );
        }
    }

    /// Closes a stream whose process is dead, has said goodbye, or is left to itself, and forgets its ring.
    fn end_ring(&mut self, index: usize) {
        let mut ring = self.rings.swap_remove(index);
        if let Some((_, ended)) = &mut self.active {
            *ended = Instant::now();
        }
        self.pulse.remove(ring.consumer.path());
        if let Some(monitors) = &self.monitors {
            monitors.process_ended();
        }
        let untold = ring.consumer.untold_drops();
        let silent = self.pulse.was_silent_since(ring.found_ns);
        if let State::Open(id) = ring.stream.state {
            let now_ns = monotonic_ns().saturating_sub(ring.consumer.epoch_ns());
            let live = match self.window {
                None => self.writer.as_mut(),
                Some(_) => None,
            };
            let result = ring.stream.end_unclean(id, untold, silent, now_ns, live);
            if let Err(Fault::Sink(error)) = result {
                self.writing_failed(&error.to_string());
            }
        } else if let Some((records, _, _)) = untold {
            ring.stream.report.dropped_records += records;
        }
        ring.stream.report.steps = ring.consumer.steps();
        let path = ring.consumer.path().to_owned();
        if let (Some(window), Some(kept)) = (&mut self.window, ring.stream.kept.take()) {
            ring.stream.report.expired_records = kept.expired();
            window.ended(kept, !ring.stream.report.clean);
            let _ = std::fs::remove_file(&path);
        } else {
            self.ignored.insert(path.clone());
            self.ended.push(EndedRing { path, bytes: None });
            self.unflushed = true;
        }
        let mut report = ring.stream.report;
        report.active = Duration::from_nanos(
            ring.stream
                .last_ns
                .saturating_sub(ring.stream.first_ns.unwrap_or(0)),
        );
        tracing::debug!(
            "process {} ended its recording: {} records",
            report.process_id,
            report.records
        );
        if report.records > 0
            || report.clean
            || report.disabled.is_some()
            || ring.stream.state != State::Waiting
        {
            self.report.streams.push(report);
        }
    }

    /// Keeps the daemon small however many processes record: a fresh mapping has no resident pages.
    fn give_back_memory(&mut self) {
        let resident = |rings: &[Ring]| {
            rings
                .iter()
                .map(|r| r.resident_bytes.min(self.setting.ring_bytes))
                .sum::<usize>()
        };
        if resident(&self.rings) <= RESIDENT_RING_BYTES {
            return;
        }
        for ring in &mut self.rings {
            // `tail` stands in the file: the new mapping goes on where the old one ended.
            if ring.resident_bytes > 0 && ring.consumer.map_again().is_ok() {
                ring.resident_bytes = 0;
            }
        }
    }

    /// Gives the recorded processes the room of what has reached the file, or never will.
    fn free_what_is_written(&mut self) {
        let written = match self.writer {
            Some(_) => self.sink.written(),
            None => u64::MAX,
        };
        for ring in &mut self.rings {
            if self.writer.is_none() {
                ring.consumer.free(ring.consumer.mark());
            }
            let full = ring.consumer.held_bytes() > ring.consumer.capacity() / FLUSHED_SHARE;
            while let Some((bytes, mark, flushed)) = ring.flushed.front()
                && (*bytes <= written || full && flushed.elapsed() > SLOW_DISK)
            {
                ring.consumer.free(*mark);
                ring.flushed.pop_front();
            }
        }
        let ignored = &mut self.ignored;
        let lost = self.writer.is_none();
        self.ended.retain(|ring| {
            let waits = !lost && ring.bytes.is_none_or(|bytes| bytes > written);
            if !waits {
                let _ = std::fs::remove_file(&ring.path);
                ignored.remove(&ring.path);
            }
            waits
        });
    }

    fn flush_if_due(&mut self) {
        if let Some(error) = self.sink.failure() {
            let why = error.to_string();
            self.writing_failed(&why);
        }
        let held = |ring: &Ring| {
            let capacity = ring.consumer.capacity();
            let waiting = match ring.flushed.back() {
                Some((_, mark, _)) => ring.consumer.bytes_since(*mark),
                None => ring.consumer.held_bytes(),
            };
            capacity >= SMALLEST_HELD_RING && waiting > capacity / FLUSHED_SHARE
        };
        // Without its head a file says nothing of the run, and could not be recovered.
        let begins = self.began_a_stream() && !self.begun;
        let due = begins || self.flushed.elapsed() >= FLUSH_INTERVAL || self.rings.iter().any(held);
        if self.unflushed && due {
            self.flush_now();
        }
    }

    fn flush_now(&mut self) {
        if self.window.is_some() {
            self.unflushed = false;
            return;
        }
        if self.began_a_stream() {
            self.begun = true;
            self.sink.release();
        }
        if let Some(writer) = &mut self.writer {
            match writer.flush() {
                Ok(()) => {
                    let bytes = writer.bytes_written();
                    self.checkpoints.flushed(bytes, self.sink.written());
                    for ring in &mut self.rings {
                        let mark = ring.consumer.mark();
                        ring.flushed.push_back((bytes, mark, Instant::now()));
                    }
                    for ring in &mut self.ended {
                        ring.bytes.get_or_insert(bytes);
                    }
                }
                Err(error) => self.writing_failed(&error.to_string()),
            }
        }
        self.unflushed = false;
        self.flushed = Instant::now();
    }

    /// The file cannot be continued. Training goes on, and so does this loop, without a writer.
    fn writing_failed(&mut self, why: &str) {
        if self.writer.take().is_none() {
            return;
        }
        let why = self
            .sink
            .failure()
            .map_or_else(|| why.to_owned(), ToString::to_string);
        (self.notice)(&format!(
            "cannot write the trace any more: {why}; the program goes on, but from here on it is not recorded"
        ));
        self.report.failure = Some(why);
    }

    fn finish(mut self, finish: Finish) -> Report {
        self.report.still_running = self
            .rings
            .iter()
            .filter(|ring| !ring.process.is_gone())
            .count();
        while !self.rings.is_empty() {
            self.drain(0, true);
            self.end_ring(0);
        }
        if let Some(window) = self.window.take() {
            self.sink.release();
            let poured = self.writer.as_mut().map_or(Ok(()), |w| window.pour(w));
            if let Err(error) = poured {
                self.writing_failed(&error.to_string());
            }
        }
        let began_a_stream = !self.report.streams.is_empty();
        let mut monitors_ns = 0;
        if let Some(mut monitors) = self.monitors.take() {
            let writer = self.writer.as_mut().filter(|_| began_a_stream);
            match monitors.finish(writer, &*self.notice) {
                Ok(records) => self.checkpoints.taken += records,
                Err(error) => self.writing_failed(&error.to_string()),
            }
            monitors_ns = monitors.cpu_ns;
            self.report.samples = monitors.samples;
            self.report.monitors = monitors.states;
        }
        let cpu_ns = |pulse_ns: u64, sink: &SinkState| {
            if self.setting.own_process {
                process_cpu_ns()
            } else {
                thread_cpu_ns() + pulse_ns + sink.cpu_ns() + monitors_ns
            }
        };
        let pulse_ns = self.pulse.stop();
        self.report.daemon_peak_bytes = if self.setting.own_process {
            peak_resident_bytes()
        } else {
            0
        };
        if began_a_stream {
            self.sink.release();
            if let Some(writer) = self.writer.take() {
                let end = RunEnd {
                    ended_unix_ns: unix_ns(),
                    exit_code: finish.exit_code,
                    signal: finish.signal,
                    daemon_cpu_ns: cpu_ns(pulse_ns, &self.sink),
                    daemon_peak_bytes: self.report.daemon_peak_bytes,
                };
                let failed = match writer.finish(&end) {
                    Ok(sink) => {
                        sink.close();
                        self.sink.failure().map(ToString::to_string)
                    }
                    Err(error) => Some(
                        self.sink
                            .failure()
                            .map_or_else(|| error.to_string(), ToString::to_string),
                    ),
                };
                if let Some(why) = failed {
                    (self.notice)(&format!("cannot write the end of the trace: {why}"));
                    self.report.failure = Some(why);
                }
            }
        }
        if self.report.failure.is_some() {
            self.checkpoints.arrived(self.sink.written());
            self.report.unwritten_records = self.checkpoints.taken - self.checkpoints.safe;
        }
        self.report.bytes = self.sink.written();
        self.report.duration = self
            .active
            .map_or(Duration::ZERO, |(began, ended)| ended - began);
        self.report.daemon_cpu_ns = cpu_ns(pulse_ns, &self.sink);
        self.report.streams.sort_by_key(|stream| stream.process_id);
        self.report
    }
}

impl Stream {
    /// Takes one message. Without a writer it is counted only.
    pub(super) fn take<W: Write>(
        &mut self,
        message: &Message<'_>,
        mut writer: Option<&mut TraceWriter<W>>,
    ) -> Result<(), Fault> {
        let malformed = |what: &str| Fault::Stream(what.to_owned());
        if message.kind == MessageKind::StreamBegin {
            let info: StreamInfo = codec::decode(encoded(message, &mut self.scratch)?)?.0;
            if self.state != State::Waiting {
                return Err(malformed("a second beginning"));
            }
            self.report.command.clone_from(&info.command);
            if let Some(kept) = &mut self.kept {
                kept.begin(&info);
            }
            // The number is only used with a writer.
            self.state = State::Open(
                writer.map_or(Ok(StreamId(u32::MAX)), |writer| writer.begin_stream(&info))?,
            );
            return Ok(());
        }
        let State::Open(id) = self.state else {
            return Err(malformed("a record before the beginning"));
        };
        if message.kind != MessageKind::Value {
            self.values.give_up(id, &mut writer)?;
        }
        match message.kind {
            MessageKind::StreamBegin => {}
            MessageKind::Definition => {
                let bytes = encoded(message, &mut self.scratch)?;
                let definition: Definition = codec::decode(bytes)?.0;
                if let Some(kept) = &mut self.kept {
                    kept.define(bytes, &definition);
                }
                if let Some(writer) = &mut writer {
                    writer.define(id, &definition)?;
                }
                match &definition {
                    Definition::Signature(id, def) => {
                        self.note_signature(id.index(), def.flags & call_flags::UNATTRIBUTED != 0)
                    }
                    Definition::Thread(..) => self.has_threads = true,
                    _ => {}
                }
            }
            MessageKind::OpCall => {
                let call = OpCallMessage::parse(message.words)
                    .ok_or_else(|| malformed("an op call that is too short"))?;
                if let Some(writer) = &mut writer {
                    let call = OpCallRef {
                        signature: SignatureId(call.signature),
                        pattern: PatternId(call.pattern),
                        thread: ThreadId(call.thread),
                        start_ns: call.start_ns,
                        duration_ns: call.duration_ns,
                        sequence_number: call.sequence_number,
                        payload: call.payload,
                        storages: call.storages,
                        tensors: call.tensors,
                        statistics: call.statistics,
                    };
                    let ordinal = writer.op_call(id, call)?;
                    self.places.written(ordinal);
                    self.values.follow(ordinal);
                }
                if let Some(kept) = &mut self.kept {
                    let end_ns = call.start_ns.saturating_add(call.duration_ns);
                    kept.record(message.kind, message.words, call.start_ns, end_ns);
                }
                self.report.records += 1;
                self.report.op_calls += 1;
                self.report.unattributed +=
                    u64::from(self.unattributed.get(call.signature as usize) == Some(&true));
                self.saw(
                    call.start_ns,
                    call.start_ns.saturating_add(call.duration_ns),
                );
            }
            MessageKind::Moment => {
                let mut moment: Moment = codec::decode(encoded(message, &mut self.scratch)?)?.0;
                if let Some(writer) = &mut writer {
                    if !self.places.settle(&mut moment) {
                        return Err(malformed("late statistics of a call that never came"));
                    }
                    self.places.written(writer.moment(id, &moment)?);
                }
                if let Some(kept) = &mut self.kept {
                    kept.record(message.kind, message.words, moment.time_ns, moment.time_ns);
                    kept.fact(&moment);
                }
                self.report.records += 1;
                self.saw(moment.time_ns, moment.time_ns);
                match moment.event {
                    Event::Paused { .. } => {
                        self.report.pauses += 1;
                        self.paused_since_ns = Some(moment.time_ns);
                    }
                    Event::Resumed => self.pause_ended(moment.time_ns),
                    Event::Drop { records, .. } => self.report.dropped_records += records,
                    Event::Disabled { reason } => self.report.disabled = Some(reason),
                    _ => {}
                }
            }
            MessageKind::Value => {
                let piece = ValueMessage::parse(message.words)
                    .ok_or_else(|| malformed("a value whose lengths are wrong"))?;
                self.values.take(id, &piece, &mut writer)?;
                if let Some(kept) = &mut self.kept {
                    kept.piece_of_value(message.words);
                }
            }
            MessageKind::StreamEnd => {
                let mut end: StreamEnd = codec::decode(encoded(message, &mut self.scratch)?)?.0;
                self.pause_ended(end.ended_ns);
                end.costs.extend(self.pauses());
                if let Some(writer) = &mut writer {
                    writer.end_stream(id, &end)?;
                }
                if let Some(kept) = &mut self.kept {
                    kept.end(end.clone());
                }
                self.report.clean = end.clean;
                self.report.dropped_records = self.report.dropped_records.max(end.dropped_records);
                self.report.costs = end.costs;
                self.saw(end.ended_ns, end.ended_ns);
                self.state = State::Ended;
            }
        }
        Ok(())
    }

    fn pause_ended(&mut self, time_ns: u64) {
        if let Some(since) = self.paused_since_ns.take() {
            self.report.paused_ns += time_ns.saturating_sub(since);
        }
    }

    /// For the stream's end, so that nobody has to go through its records to know that it is not the whole run.
    fn pauses(&self) -> std::collections::BTreeMap<String, u64> {
        match self.report.pauses {
            0 => std::collections::BTreeMap::new(),
            pauses => std::collections::BTreeMap::from([
                (PAUSES_KEY.to_owned(), pauses),
                (PAUSED_NS_KEY.to_owned(), self.report.paused_ns),
            ]),
        }
    }

    fn note_signature(&mut self, index: usize, unattributed: bool) {
        // Definitions come densely from 0, which the writer checks; without a writer nothing is worth the memory.
        if index <= self.unattributed.len() {
            self.unattributed.truncate(index);
            self.unattributed.push(unattributed);
        }
    }

    /// Writes a record of the daemon's own, on the process's first thread.
    fn note(
        &mut self,
        id: StreamId,
        time_ns: u64,
        event: Event,
        writer: Option<&mut TraceWriter<BackgroundSink>>,
    ) -> Result<(), Fault> {
        let moment = Moment {
            time_ns,
            thread: ThreadId(0),
            event,
        };
        if let Some(kept) = &mut self.kept {
            self.report.records += 1;
            return Ok(kept.note(&moment)?);
        }
        let Some(writer) = writer else { return Ok(()) };
        if !self.has_threads {
            let thread = ThreadDef {
                native_id: u64::from(self.report.process_id),
                name: String::new(),
            };
            writer.define(id, &Definition::Thread(ThreadId(0), thread))?;
            self.has_threads = true;
        }
        writer.moment(id, &moment)?;
        self.report.records += 1;
        Ok(())
    }

    /// The time of the first record taken.
    pub(super) fn first_ns(&self) -> Option<u64> {
        self.first_ns
    }

    /// Until when the records taken last.
    pub(super) fn last_ns(&self) -> u64 {
        self.last_ns
    }

    fn saw(&mut self, from_ns: u64, until_ns: u64) {
        self.first_ns.get_or_insert(from_ns);
        self.last_ns = self.last_ns.max(until_ns);
    }

    /// Ends the stream in the process's place.
    fn end_unclean(
        &mut self,
        id: StreamId,
        untold: Option<(u64, u64, u64)>,
        silent: bool,
        ended_ns: u64,
        mut writer: Option<&mut TraceWriter<BackgroundSink>>,
    ) -> Result<(), Fault> {
        self.state = State::Ended;
        let drop = untold.map(|(records, from_ns, until_ns)| {
            self.report.dropped_records += records;
            self.last_ns = self.last_ns.max(until_ns);
            let reason = if silent {
                DropReason::DaemonGone
            } else {
                DropReason::RingFull
            };
            (
                until_ns,
                Event::Drop {
                    records,
                    from_ns,
                    until_ns,
                    reason,
                },
            )
        });
        self.pause_ended(ended_ns.max(self.last_ns));
        self.values.give_up(id, &mut writer)?;
        if let Some((time_ns, event)) = drop {
            self.note(id, time_ns, event, writer.as_deref_mut())?;
        }
        let end = StreamEnd {
            records: self.report.records,
            dropped_records: self.report.dropped_records,
            ended_ns: self.last_ns,
            clean: false,
            costs: self.pauses(),
        };
        if let Some(kept) = &mut self.kept {
            kept.end(end);
        } else if let Some(writer) = writer {
            writer.end_stream(id, &end)?;
        }
        Ok(())
    }
}

/// The bytes of an encoded message.
fn encoded<'a>(message: &Message<'_>, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], Fault> {
    let wrong = || Fault::Stream("a message that is shorter than it says".to_owned());
    let (&length, words) = message.words.split_first().ok_or_else(wrong)?;
    scratch.clear();
    for word in words {
        scratch.extend_from_slice(&word.to_le_bytes());
    }
    usize::try_from(length)
        .ok()
        .and_then(|length| scratch.get(..length))
        .ok_or_else(wrong)
}
