//! `--ring 5min`: of each stream the definitions and the last minutes, until the end.
//!
//! Messages are kept as they came, compressed, in pieces in a file without a name beside the trace; a piece that is too old gives its room
//! back to the disk. So memory stays what it is, and the disk holds the last minutes and no more. At the end what is left goes through
//! the writer as if it had just arrived. A stream that ended without a goodbye is kept as it was then: its last minutes are why
//! one records like this.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use optape_trace::{
    Definition, Event, ModuleId, Moment, OpCallRef, PatternId, PauseReason, SignatureId, StreamEnd,
    StreamId, StreamInfo, TextId, ThreadDef, ThreadId, TraceError, TraceWriter, codec,
};

use super::intake::Fault;
use super::places::Places;
use super::sink::BackgroundSink;
use super::values::Assembly;
use crate::clock::monotonic_ns;
use crate::ring::{MessageKind, OpCallMessage, ValueMessage};

/// Words of a piece before it is compressed.
const PIECE_WORDS: usize = 64 << 10;
/// In the kind of a message: a record of the daemon's own, which never was in the ring.
const OWN: u64 = 1 << 16;
/// No piece covers more than this share of the window.
const PIECES_PER_WINDOW: u64 = 32;

/// The last minutes of all streams.
pub(super) struct Window {
    length_ns: u64,
    spool: Spool,
    /// Streams that ended, and whether they did without a goodbye.
    ended: Vec<(Kept, bool)>,
    looked_ns: u64,
}

impl Window {
    pub(super) fn create(length: Duration, output: &Path) -> io::Result<Self> {
        Ok(Self {
            length_ns: u64::try_from(length.as_nanos()).unwrap_or(u64::MAX),
            spool: Spool::create(output)?,
            ended: Vec::new(),
            looked_ns: 0,
        })
    }

    /// How much is kept.
    pub(super) fn length(&self) -> Duration {
        Duration::from_nanos(self.length_ns)
    }

    /// Puts away what a stream has got, and throws away what is too old of it.
    pub(super) fn settle(&mut self, kept: &mut Kept) -> io::Result<()> {
        let now_ns = monotonic_ns();
        kept.settle(&mut self.spool, self.length_ns, now_ns)?;
        kept.expire(&self.spool, self.length_ns, now_ns);
        Ok(())
    }

    /// A stream has ended. `crashed` ones stay as they are.
    pub(super) fn ended(&mut self, kept: Kept, crashed: bool) {
        self.ended.push((kept, crashed));
    }

    /// Throws away what is too old of streams that ended.
    pub(super) fn look(&mut self) {
        let now_ns = monotonic_ns();
        // Pieces are no finer.
        if now_ns.saturating_sub(self.looked_ns) < self.length_ns / PIECES_PER_WINDOW {
            return;
        }
        self.looked_ns = now_ns;
        let (spool, length_ns) = (&mut self.spool, self.length_ns);
        for (kept, _) in self.ended.iter_mut().filter(|(_, crashed)| !crashed) {
            // What is not put away stays, which harms nobody.
            let _ = kept.settle(spool, length_ns, now_ns);
            kept.expire(spool, length_ns, now_ns);
        }
        self.ended.retain(|(kept, _)| !kept.is_empty());
    }

    /// Writes what is left.
    pub(super) fn pour(
        mut self,
        writer: &mut TraceWriter<BackgroundSink>,
    ) -> Result<(), TraceError> {
        for (kept, _) in std::mem::take(&mut self.ended) {
            kept.pour(&mut self.spool, writer)?;
        }
        Ok(())
    }
}

/// The file of the pieces.
struct Spool {
    file: File,
    end: u64,
}

impl Spool {
    /// Beside `output`, where the trace will want the room; else among temporary files.
    fn create(output: &Path) -> io::Result<Self> {
        let beside = output
            .parent()
            .filter(|d| !d.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let nameless = |directory: &Path| {
            use rustix::fs::{CWD, Mode, OFlags, openat};
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR)
        };
        let file = nameless(beside).or_else(|_| nameless(&std::env::temp_dir()))?;
        Ok(Self {
            file: file.into(),
            end: 0,
        })
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let offset = self.end;
        self.file.write_all_at(bytes, offset)?;
        self.end += bytes.len() as u64;
        Ok(offset)
    }

    fn get(&self, piece: &Piece) -> io::Result<Vec<u64>> {
        let mut stored = vec![0; piece.bytes];
        self.file.read_exact_at(&mut stored, piece.offset)?;
        let raw = zstd::bulk::decompress(&stored, piece.words * 8)?;
        Ok(raw
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .collect())
    }

    /// Where the file system cannot do it the room is given back at the end.
    fn forget(&self, piece: &Piece) {
        use rustix::fs::{FallocateFlags, fallocate};
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = fallocate(&self.file, flags, piece.offset, piece.bytes as u64);
    }
}

/// Compressed messages.
struct Piece {
    offset: u64,
    bytes: usize,
    words: usize,
    records: u64,
    /// Number of its first record in the ring.
    first: u64,
    /// Nanoseconds since the stream's start.
    last_ns: u64,
    /// The facts among them.
    facts: Vec<Moment>,
}

/// What is kept of a stream.
pub(super) struct Kept {
    /// CLOCK_MONOTONIC at the stream's time 0.
    epoch_ns: u64,
    begin: Option<StreamInfo>,
    definitions: Vec<u8>,
    has_threads: bool,
    open: Vec<u64>,
    open_records: u64,
    open_first: u64,
    open_first_ns: Option<u64>,
    open_last_ns: u64,
    open_facts: Vec<Moment>,
    /// Records that came from the ring.
    from_ring: u64,
    pieces: VecDeque<Piece>,
    /// What is true of modules and of the program does not grow old: the last facts of what was thrown away.
    old_facts: BTreeMap<(Option<ModuleId>, TextId), Moment>,
    /// Records that were too old, and the time of the newest of them.
    expired: u64,
    expired_until_ns: u64,
    end: Option<StreamEnd>,
}

impl Kept {
    pub(super) fn new(epoch_ns: u64) -> Self {
        Self {
            epoch_ns,
            begin: None,
            definitions: Vec::new(),
            has_threads: false,
            open: Vec::new(),
            open_records: 0,
            open_first: 0,
            open_first_ns: None,
            open_last_ns: 0,
            open_facts: Vec::new(),
            from_ring: 0,
            pieces: VecDeque::new(),
            old_facts: BTreeMap::new(),
            expired: 0,
            expired_until_ns: 0,
            end: None,
        }
    }

    pub(super) fn begin(&mut self, info: &StreamInfo) {
        self.begin = Some(info.clone());
    }

    pub(super) fn define(&mut self, bytes: &[u8], definition: &Definition) {
        self.has_threads |= matches!(definition, Definition::Thread(..));
        self.definitions.extend((bytes.len() as u64).to_le_bytes());
        self.definitions.extend_from_slice(bytes);
    }

    fn message(&mut self, kind: u64, words: &[u64]) {
        self.open.push((words.len() as u64) << 32 | kind);
        self.open.extend_from_slice(words);
    }

    /// A piece of a kept value, as it came.
    pub(super) fn piece_of_value(&mut self, words: &[u64]) {
        self.message(MessageKind::Value as u64, words);
    }

    /// The moment that was kept last.
    pub(super) fn fact(&mut self, moment: &Moment) {
        if matches!(moment.event, Event::Fact { .. }) {
            self.open_facts.push(moment.clone());
        }
    }

    /// A record, as it came.
    pub(super) fn record(&mut self, kind: MessageKind, words: &[u64], from_ns: u64, until_ns: u64) {
        self.add(kind as u64, words, from_ns, until_ns);
        self.from_ring += 1;
    }

    fn add(&mut self, kind: u64, words: &[u64], from_ns: u64, until_ns: u64) {
        self.message(kind, words);
        self.open_records += 1;
        self.open_first_ns.get_or_insert(from_ns);
        self.open_last_ns = self.open_last_ns.max(until_ns);
    }

    /// A record of the daemon's own.
    pub(super) fn note(&mut self, moment: &Moment) -> Result<(), TraceError> {
        if !self.has_threads {
            let thread = Definition::Thread(ThreadId(0), ThreadDef::default());
            let bytes = codec::encode(&thread)?;
            self.define(&bytes, &thread);
        }
        let bytes = codec::encode(moment)?;
        let words: Vec<u64> = std::iter::once(bytes.len() as u64)
            .chain(bytes.chunks(8).map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_le_bytes(word)
            }))
            .collect();
        let kind = MessageKind::Moment as u64 | OWN;
        self.add(kind, &words, moment.time_ns, moment.time_ns);
        Ok(())
    }

    pub(super) fn end(&mut self, end: StreamEnd) {
        self.end = Some(end);
    }

    pub(super) fn expired(&self) -> u64 {
        self.expired
    }

    /// Puts away what is large or old enough.
    fn settle(&mut self, spool: &mut Spool, length_ns: u64, now_ns: u64) -> io::Result<()> {
        let age = self.open_first_ns.map_or(0, |first| {
            now_ns.saturating_sub(self.epoch_ns.saturating_add(first))
        });
        if self.open.len() >= PIECE_WORDS || age > length_ns / PIECES_PER_WINDOW {
            self.put_away(spool)?;
        }
        Ok(())
    }

    fn put_away(&mut self, spool: &mut Spool) -> io::Result<()> {
        if self.open.is_empty() {
            return Ok(());
        }
        let raw: Vec<u8> = self.open.iter().flat_map(|w| w.to_le_bytes()).collect();
        let stored = zstd::bulk::compress(&raw, 1)?;
        let offset = spool.put(&stored)?;
        self.pieces.push_back(Piece {
            offset,
            bytes: stored.len(),
            words: self.open.len(),
            records: self.open_records,
            first: self.open_first,
            last_ns: self.open_last_ns,
            facts: std::mem::take(&mut self.open_facts),
        });
        self.open.clear();
        self.open_records = 0;
        self.open_first = self.from_ring;
        self.open_first_ns = None;
        Ok(())
    }

    /// Throws away what is older than the window.
    fn expire(&mut self, spool: &Spool, length_ns: u64, now_ns: u64) {
        while let Some(piece) = self.pieces.front()
            && self
                .epoch_ns
                .saturating_add(piece.last_ns)
                .saturating_add(length_ns)
                < now_ns
        {
            spool.forget(piece);
            self.expired += piece.records;
            self.expired_until_ns = self.expired_until_ns.max(piece.last_ns);
            for fact in self.pieces.pop_front().into_iter().flat_map(|p| p.facts) {
                if let Event::Fact { module, key, .. } = fact.event {
                    self.old_facts.insert((module, key), fact);
                }
            }
        }
    }

    /// Nothing of it is left.
    fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.open.is_empty()
    }

    /// Writes it all.
    fn pour(
        mut self,
        spool: &mut Spool,
        writer: &mut TraceWriter<BackgroundSink>,
    ) -> Result<(), TraceError> {
        let Some(info) = self.begin.take() else {
            return Ok(());
        };
        let system = |source| TraceError::Sink { written: 0, source };
        self.put_away(spool).map_err(system)?;
        let id = writer.begin_stream(&info)?;
        self.pour_definitions(id, writer)?;
        if self.expired > 0 {
            if !self.has_threads {
                let thread = ThreadDef {
                    native_id: u64::from(info.process_id),
                    name: String::new(),
                };
                writer.define(id, &Definition::Thread(ThreadId(0), thread))?;
            }
            let reason = PauseReason::Expired;
            for (time_ns, event) in [
                (0, Event::Paused { reason }),
                (self.expired_until_ns, Event::Resumed),
            ] {
                writer.moment(
                    id,
                    &Moment {
                        time_ns,
                        thread: ThreadId(0),
                        event,
                    },
                )?;
            }
            for fact in self.old_facts.into_values() {
                writer.moment(id, &fact)?;
            }
        }
        let mut values = Assembly::default();
        let mut places = Places::from(self.pieces.front().map_or(0, |piece| piece.first));
        for piece in &self.pieces {
            let words = spool.get(piece).map_err(system)?;
            pour_messages(id, &words, &mut values, &mut places, writer)?;
            writer.flush()?;
        }
        understood(values.give_up(id, &mut Some(&mut *writer)))?;
        if let Some(mut end) = self.end {
            if self.expired > 0 {
                *end.costs
                    .entry(super::intake::PAUSES_KEY.to_owned())
                    .or_default() += 1;
                *end.costs
                    .entry(super::intake::PAUSED_NS_KEY.to_owned())
                    .or_default() += self.expired_until_ns;
            }
            writer.end_stream(id, &end)?;
        }
        Ok(())
    }

    fn pour_definitions(
        &self,
        id: StreamId,
        writer: &mut TraceWriter<BackgroundSink>,
    ) -> Result<(), TraceError> {
        let mut rest = self.definitions.as_slice();
        while let Some((length, behind)) = rest.split_first_chunk::<8>() {
            let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
            let Some((bytes, behind)) = behind.split_at_checked(length) else {
                break;
            };
            let definition: Definition = codec::decode(bytes)?.0;
            writer.define(id, &definition)?;
            rest = behind;
        }
        Ok(())
    }
}

/// Of a message that was understood when it came only the writing can fail.
fn understood(result: Result<(), Fault>) -> Result<(), TraceError> {
    match result {
        Err(Fault::Sink(error)) => Err(error),
        Ok(()) | Err(Fault::Stream(_)) => Ok(()),
    }
}

/// The messages of a piece.
fn pour_messages(
    id: StreamId,
    words: &[u64],
    values: &mut Assembly,
    places: &mut Places,
    writer: &mut TraceWriter<BackgroundSink>,
) -> Result<(), TraceError> {
    let mut rest = words;
    while let Some((head, behind)) = rest.split_first() {
        let Some((message, behind)) = behind.split_at_checked((head >> 32) as usize) else {
            break;
        };
        rest = behind;
        let kind = head & 0xffff_ffff;
        if kind == MessageKind::Value as u64 {
            // The call of the first ones may be too old.
            if let Some(piece) = ValueMessage::parse(message).filter(|_| values.has_call()) {
                understood(values.take(id, &piece, &mut Some(&mut *writer)))?;
            }
            continue;
        }
        understood(values.give_up(id, &mut Some(&mut *writer)))?;
        if kind == MessageKind::OpCall as u64 {
            let Some(call) = OpCallMessage::parse(message) else {
                continue;
            };
            let call = writer.op_call(
                id,
                OpCallRef {
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
                },
            )?;
            places.written(call);
            values.follow(call);
            continue;
        }
        let Some((length, encoded)) = message.split_first() else {
            continue;
        };
        let bytes: Vec<u8> = encoded.iter().flat_map(|w| w.to_le_bytes()).collect();
        let length = usize::try_from(*length)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let mut moment: Moment = codec::decode(bytes.get(..length).unwrap_or_default())?.0;
        if kind & OWN != 0 {
            writer.moment(id, &moment)?;
        } else if places.settle(&mut moment) {
            places.written(writer.moment(id, &moment)?);
        } else {
            // Statistics of a call that was too old.
            places.passed();
        }
    }
    Ok(())
}
