//! The writer: fills blocks, sums them up, and keeps the index. It appends to its sink and never goes back.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::Write;
use std::sync::Arc;

use crate::block::{self, BlockBuilder, Compressor, OpCallRef, Slot, WORDS_LIMIT};
use crate::bytes::{len32, len64, put_varint};
use crate::codec;
use crate::dictionary::Definition;
use crate::error::{Corrupt, TraceError};
use crate::frame::{FrameHead, PAYLOAD_LIMIT, RAW_LIMIT, encode_header, kind};
use crate::ids::{Ordinal, PatternId, SignatureId, StreamId};
use crate::index::{BlockIndex, ENTRIES_PER_FRAME, Footer, FooterStream, IndexChunk, SummaryIndex};
use crate::info::{RunEnd, RunInfo, StreamEnd, StreamInfo};
use crate::record::{Event, LateStatistic, Moment};
use crate::statistics::{Pattern, State};
use crate::summary::{self, FACTOR, PIECE_RECORDS, Patterns, Rows, SummaryHead, SummaryRow, WHOLE};
use crate::table::{Counts, FIRST_LATE_PATTERN, WordKind, give_up, resolve, word_kinds};
use crate::values::{FRAME_BYTES, Value, ValuesBuilder, ValuesIndex};

/// Definitions are written when they have grown to this, also without a flush.
const DEFINITION_BYTES: usize = 1 << 20;
/// So many calls may wait for late statistics. Beyond, the writer itself declares those of the oldest lost, so that a source
/// that never answers cannot use up the memory.
const PENDING_LIMIT: usize = 1 << 18;

/// Writes a trace.
///
/// Records appear in the sink when a block is full, at [`flush`](Self::flush), [`end_stream`](Self::end_stream) and
/// [`finish`](Self::finish). After an error of the sink the writer refuses everything but [`bytes_written`](Self::bytes_written).
pub struct TraceWriter<W: Write> {
    output: Output<W>,
    zstd: Compressor,
    streams: Vec<StreamState>,
}

impl<W: Write> std::fmt::Debug for TraceWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TraceWriter")
            .field("bytes_written", &self.output.written)
            .field("streams", &self.streams.len())
            .finish()
    }
}

/// The sink, and where it stands.
struct Output<W> {
    sink: W,
    written: u64,
    failed: bool,
    buffer: Vec<u8>,
}

impl<W: Write> Output<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), TraceError> {
        if self.failed {
            return Err(TraceError::SinkFailed);
        }
        match self.sink.write_all(bytes) {
            Ok(()) => {
                self.written += len64(bytes.len());
                Ok(())
            }
            Err(source) => Err(self.fail(source)),
        }
    }

    fn fail(&mut self, source: std::io::Error) -> TraceError {
        self.failed = true;
        TraceError::Sink {
            written: self.written,
            source,
        }
    }

    /// Writes a frame in one go; gives its offset and length.
    fn frame(
        &mut self,
        kind: u8,
        flags: u8,
        stream: u32,
        payload: &[u8],
    ) -> Result<(u64, u32), TraceError> {
        if payload.len() > PAYLOAD_LIMIT as usize {
            return Err(TraceError::Encode(format!(
                "a {} frame of {} bytes is too long",
                kind::name(kind),
                payload.len()
            )));
        }
        let head = FrameHead {
            kind,
            flags,
            stream,
            length: len32(payload.len()),
            payload_checksum: crc32c::crc32c(payload),
        };
        let offset = self.written;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.extend(head.encode());
        buffer.extend(payload);
        let written = self.write(&buffer);
        self.buffer = buffer;
        written?;
        Ok((
            offset,
            len32(payload.len()) + len32(crate::frame::FRAME_HEAD),
        ))
    }
}

/// What the hot path needs of a signature.
#[derive(Clone, Debug, Default)]
struct SignatureState {
    payload: u32,
    tensors: u32,
    /// Number of the block that the slots below belong to.
    block: u64,
    /// Pattern and slot of the last call.
    last: (u32, u32),
    /// The same for all patterns that the block has seen with this signature.
    slots: Vec<(u32, u32)>,
}

/// A pattern that can be used.
#[derive(Clone, Debug)]
struct PatternState {
    pattern: Pattern,
    kinds: Arc<[WordKind]>,
    pending: bool,
}

impl PatternState {
    fn new(pattern: Pattern) -> Self {
        Self {
            kinds: word_kinds(&pattern).into(),
            pending: pattern.is_pending(),
            pattern,
        }
    }
}

/// The patterns of a stream.
#[derive(Debug)]
struct PatternTable {
    defined: Vec<PatternState>,
    late: Vec<PatternState>,
    /// By content; of equal ones the first, as readers choose.
    ids: HashMap<Pattern, PatternId>,
}

impl PatternTable {
    fn new() -> Self {
        Self {
            defined: vec![PatternState::new(Pattern::default())],
            late: Vec::new(),
            ids: HashMap::from([(Pattern::default(), PatternId(0))]),
        }
    }

    #[inline]
    fn get(&self, id: PatternId) -> Option<&PatternState> {
        match id.0.checked_sub(FIRST_LATE_PATTERN) {
            None => self.defined.get(id.index()),
            Some(late) => self.late.get(late as usize),
        }
    }

    fn add(&mut self, id: PatternId, pattern: &Pattern) {
        self.ids.entry(pattern.clone()).or_insert(id);
        let table = if id.0 < FIRST_LATE_PATTERN {
            &mut self.defined
        } else {
            &mut self.late
        };
        table.push(PatternState::new(pattern.clone()));
    }
}

impl Patterns for PatternTable {
    fn kinds(&self, pattern: PatternId) -> Option<&Arc<[WordKind]>> {
        self.get(pattern).map(|p| &p.kinds)
    }
}

/// A call whose statistics have not all arrived.
#[derive(Debug)]
struct PendingCall {
    signature: SignatureId,
    pattern: PatternId,
    duration_ns: u64,
    words: Vec<u64>,
}

/// A run of whole blocks that becomes one summary.
#[derive(Debug, Default)]
struct Piece {
    first_ordinal: u64,
    records: u64,
    rows: Rows,
    /// Calls whose statistics are not complete.
    pending: usize,
}

/// Summaries of one level that are not yet enough for one of the next.
#[derive(Debug, Default)]
struct Level {
    count: usize,
    first_ordinal: u64,
    records: u64,
    rows: Rows,
}

struct StreamState {
    id: StreamId,
    identities: bool,
    counts: Counts,
    signatures: Vec<SignatureState>,
    patterns: PatternTable,
    /// Encoded definitions that are not written yet.
    definitions: Vec<u8>,
    builder: BlockBuilder,
    /// Number of the block being filled, from 1.
    block: u64,
    /// Ordinal of the block's first record.
    block_first: u64,
    next_ordinal: u64,
    pending: BTreeMap<u64, PendingCall>,
    /// Never empty: the last is being filled.
    pieces: VecDeque<Piece>,
    pieces_written: u64,
    levels: Vec<Level>,
    whole: Rows,
    values: ValuesBuilder,
    index: IndexChunk,
    footer: FooterStream,
    ended: bool,
}

impl StreamState {
    fn new(id: StreamId, info: &StreamInfo, begin: u64) -> Self {
        Self {
            id,
            identities: info.identities,
            counts: Counts::new(),
            signatures: Vec::new(),
            patterns: PatternTable::new(),
            definitions: Vec::new(),
            builder: BlockBuilder::default(),
            block: 1,
            block_first: 0,
            next_ordinal: 0,
            pending: BTreeMap::new(),
            pieces: VecDeque::from([Piece::default()]),
            pieces_written: 0,
            levels: Vec::new(),
            whole: Rows::default(),
            values: ValuesBuilder::default(),
            index: IndexChunk::default(),
            footer: FooterStream {
                begin,
                ..FooterStream::default()
            },
            ended: false,
        }
    }

    fn refuse(&self, what: impl Into<String>) -> TraceError {
        TraceError::Refused {
            stream: self.id,
            what: what.into(),
        }
    }

    fn open(&self) -> Result<(), TraceError> {
        if self.ended {
            Err(self.refuse("it has ended"))
        } else {
            Ok(())
        }
    }

    fn define(&mut self, definition: &Definition) -> Result<(), TraceError> {
        let mut counts = self.counts;
        let new = counts.admit(definition).map_err(|e| self.refuse(e.0))?;
        if !new {
            return Ok(());
        }
        let encoded = codec::encode(definition)?;
        if encoded.len() > RAW_LIMIT / 8 {
            return Err(self.refuse("a definition is longer than 8 MiB"));
        }
        put_varint(&mut self.definitions, len64(encoded.len()));
        self.definitions.extend(encoded);
        self.counts = counts;
        match definition {
            Definition::Signature(_, def) => {
                let (payload, tensors) = (def.payload_words(), def.tensors.len());
                self.signatures.push(SignatureState {
                    // Calls that are too long are refused one by one.
                    payload: u32::try_from(payload).unwrap_or(u32::MAX),
                    tensors: if self.identities { len32(tensors) } else { 0 },
                    ..SignatureState::default()
                });
            }
            Definition::Pattern(id, def) => self.patterns.add(*id, def),
            _ => {}
        }
        Ok(())
    }

    /// The slot of a pair of signature and pattern in the block being filled.
    #[inline]
    fn slot(&mut self, call: &OpCallRef<'_>) -> Result<u32, TraceError> {
        let (block, pattern) = (self.block, call.pattern.0);
        if let Some(state) = self.signatures.get(call.signature.index())
            && state.block == block
            && state.last.0 == pattern
        {
            return Ok(state.last.1);
        }
        self.find_slot(call)
    }

    fn find_slot(&mut self, call: &OpCallRef<'_>) -> Result<u32, TraceError> {
        let pattern = call.pattern;
        let Some(statistics) = self.patterns.get(pattern).map(|p| len32(p.kinds.len())) else {
            return Err(self.refuse(format!(
                "an op call uses pattern {pattern}, which is not defined"
            )));
        };
        let Some(state) = self.signatures.get_mut(call.signature.index()) else {
            return Err(self.refuse(format!(
                "an op call uses signature {}, which is not defined",
                call.signature
            )));
        };
        if state.block != self.block {
            state.block = self.block;
            state.slots.clear();
        }
        let found = state.slots.iter().find(|s| s.0 == pattern.0);
        let slot = match found {
            Some(slot) => slot.1,
            None => {
                let slot = len32(self.builder.slot_table.len());
                state.slots.push((pattern.0, slot));
                self.builder.slot_table.push(Slot {
                    signature: call.signature,
                    pattern,
                    payload: state.payload,
                    tensors: state.tensors,
                    statistics,
                });
                slot
            }
        };
        state.last = (pattern.0, slot);
        Ok(slot)
    }

    fn op_call(&mut self, call: &OpCallRef<'_>) -> Result<Ordinal, TraceError> {
        self.check_call(call)?;
        let slot = self.slot(call)?;
        if self.patterns.get(call.pattern).is_some_and(|p| p.pending) {
            self.await_statistics(call);
        }
        let builder = &mut self.builder;
        builder.kinds.push(false);
        builder.slots.push(slot);
        builder.threads.push(call.thread.0);
        builder.start_ns.push(call.start_ns);
        builder.duration_ns.push(call.duration_ns);
        builder.sequence_numbers.push(call.sequence_number);
        builder.payload.extend_from_slice(call.payload);
        builder.storages.extend_from_slice(call.storages);
        builder.tensors.extend_from_slice(call.tensors);
        builder.statistics.extend_from_slice(call.statistics);
        Ok(self.advance())
    }

    fn advance(&mut self) -> Ordinal {
        let ordinal = Ordinal(self.next_ordinal);
        self.next_ordinal += 1;
        ordinal
    }

    /// Everything is checked before anything is stored: a refused call leaves no trace.
    #[inline]
    fn check_call(&self, call: &OpCallRef<'_>) -> Result<(), TraceError> {
        let signature = self.signatures.get(call.signature.index());
        let pattern = self.patterns.get(call.pattern);
        if let (Some(signature), Some(pattern)) = (signature, pattern)
            && call.payload.len() == signature.payload as usize
            && call.storages.len() == signature.tensors as usize
            && call.tensors.len() == signature.tensors as usize
            && call.statistics.len() == pattern.kinds.len()
            && call.payload.len().max(call.statistics.len()) <= WORDS_LIMIT / 2
            && call.thread.0 < self.counts.threads
            && call.sequence_number >= -1
        {
            return Ok(());
        }
        Err(self.why_refused(call))
    }

    #[cold]
    fn why_refused(&self, call: &OpCallRef<'_>) -> TraceError {
        let Some(signature) = self.signatures.get(call.signature.index()) else {
            return self.refuse(format!(
                "an op call uses signature {}, which is not defined",
                call.signature
            ));
        };
        let Some(pattern) = self.patterns.get(call.pattern) else {
            return self.refuse(format!(
                "an op call uses pattern {}, which is not defined",
                call.pattern
            ));
        };
        let lengths = [
            (
                "payload words",
                call.payload.len(),
                signature.payload as usize,
            ),
            ("storages", call.storages.len(), signature.tensors as usize),
            ("tensors", call.tensors.len(), signature.tensors as usize),
            ("statistics", call.statistics.len(), pattern.kinds.len()),
        ];
        for (what, found, wanted) in lengths {
            if found != wanted {
                return self.refuse(format!(
                    "an op call has {found} {what} where signature {} and pattern {} have {wanted}",
                    call.signature, call.pattern
                ));
            }
        }
        if call.thread.0 >= self.counts.threads {
            return self.refuse(format!(
                "an op call uses thread {}, which is not defined",
                call.thread
            ));
        }
        if call.sequence_number < -1 {
            return self.refuse(format!(
                "an op call has the sequence number {}",
                call.sequence_number
            ));
        }
        self.refuse("an op call has too many words")
    }

    fn await_statistics(&mut self, call: &OpCallRef<'_>) {
        self.builder.pending += 1;
        if let Some(piece) = self.pieces.back_mut() {
            piece.pending += 1;
        }
        let pending = PendingCall {
            signature: call.signature,
            pattern: call.pattern,
            duration_ns: call.duration_ns,
            words: call.statistics.to_vec(),
        };
        self.pending.insert(self.next_ordinal, pending);
    }

    /// The `Statistics` record that gives up the oldest call, if too many wait.
    fn overdue(&self) -> Option<Moment> {
        if self.pending.len() <= PENDING_LIMIT {
            return None;
        }
        let (&ordinal, call) = self.pending.first_key_value()?;
        let pattern = &self.patterns.get(call.pattern)?.pattern;
        let waiting = pattern.entries.iter().filter(|e| e.state == State::Pending);
        let values = waiting.map(|e| LateStatistic {
            operand: e.operand,
            when: e.when,
            binary: None,
            fields: 0,
            values: Vec::new(),
            lost: true,
        });
        let event = Event::Statistics {
            call: Ordinal(ordinal),
            values: values.collect(),
        };
        let last = self.builder.threads.last().copied().unwrap_or(0);
        let time_ns = self.builder.start_ns.last().copied().unwrap_or(0);
        Some(Moment {
            time_ns,
            thread: crate::ids::ThreadId(last),
            event,
        })
    }

    fn moment(&mut self, moment: &Moment) -> Result<Ordinal, TraceError> {
        self.counts
            .check_moment(moment)
            .map_err(|e| self.refuse(e.0))?;
        if !block::moment_fits(moment) {
            return Err(self.refuse("a record is longer than 16 MiB"));
        }
        if let Event::Statistics { call, values } = &moment.event {
            if call.0 >= self.next_ordinal {
                return Err(self.refuse(format!(
                    "late statistics are for record {call}, which is not written yet"
                )));
            }
            self.resolve(call.0, values)?;
        }
        self.builder.push_moment(moment);
        Ok(self.advance())
    }

    /// Puts late statistics into their call. Those for a call that waits for nothing change nothing, here and in readers.
    fn resolve(&mut self, ordinal: u64, values: &[LateStatistic]) -> Result<(), TraceError> {
        let Some(call) = self.pending.get(&ordinal) else {
            return Ok(());
        };
        let Some(before) = self.patterns.get(call.pattern) else {
            return Ok(());
        };
        let (pattern, words) = resolve(&before.pattern, &call.words, values);
        let id = self.intern(&pattern)?;
        if pattern.is_pending() {
            if let Some(call) = self.pending.get_mut(&ordinal) {
                call.pattern = id;
                call.words = words;
            }
        } else if let Some(call) = self.pending.remove(&ordinal) {
            self.settle(
                ordinal,
                &PendingCall {
                    pattern: id,
                    words,
                    ..call
                },
            );
        }
        Ok(())
    }

    /// The id of a pattern; defines it where it is new.
    fn intern(&mut self, pattern: &Pattern) -> Result<PatternId, TraceError> {
        if let Some(&id) = self.patterns.ids.get(pattern) {
            return Ok(id);
        }
        let id = PatternId(FIRST_LATE_PATTERN + self.counts.late_patterns);
        self.define(&Definition::Pattern(id, pattern.clone()))?;
        Ok(id)
    }

    /// Adds a call whose statistics are complete now to the piece that it belongs to.
    fn settle(&mut self, ordinal: u64, call: &PendingCall) {
        if let Some(piece) = self
            .pieces
            .iter_mut()
            .rev()
            .find(|p| p.first_ordinal <= ordinal)
        {
            piece.pending -= 1;
            piece.rows.add_call(
                call.signature,
                call.pattern,
                call.duration_ns,
                &call.words,
                &self.patterns,
            );
        }
    }

    /// Nothing more arrives: what is pending is lost.
    fn give_up(&mut self) -> Result<(), TraceError> {
        while let Some((ordinal, call)) = self.pending.pop_first() {
            let Some(before) = self.patterns.get(call.pattern) else {
                continue;
            };
            let pattern = give_up(&before.pattern);
            let id = self.intern(&pattern)?;
            self.settle(
                ordinal,
                &PendingCall {
                    pattern: id,
                    ..call
                },
            );
        }
        Ok(())
    }

    /// Sums up the block that was just written and closes the piece that it fills.
    fn sum_up_block(&mut self) {
        let builder = &self.builder;
        let records = len64(builder.kinds.len());
        if let Some(piece) = self.pieces.back_mut() {
            piece.records += records;
            let pending = |pattern| self.patterns.get(pattern).is_some_and(|p| p.pending);
            let slots = builder.slot_table.iter().map(|s| (s.signature, s.pattern));
            let mut words = builder.statistics.as_slice();
            let calls = builder.slots.iter().zip(&builder.duration_ns).filter_map(
                |(&slot, &duration_ns)| {
                    let entry = builder.slot_table.get(slot as usize)?;
                    let (mine, others) = words.split_at_checked(entry.statistics as usize)?;
                    words = others;
                    // Calls that wait are added when they are settled.
                    (!pending(entry.pattern)).then_some((slot, duration_ns, mine))
                },
            );
            piece.rows.add_calls(slots, calls, &self.patterns);
        }
        if self
            .pieces
            .back()
            .is_some_and(|p| p.records >= PIECE_RECORDS)
        {
            self.pieces.push_back(Piece {
                first_ordinal: self.next_ordinal,
                ..Piece::default()
            });
        }
    }
}

impl<W: Write> TraceWriter<W> {
    /// Begins a trace: writes the header and the information about the run.
    ///
    /// # Errors
    /// Where the sink fails.
    pub fn create(sink: W, run: &RunInfo) -> Result<Self, TraceError> {
        let mut output = Output {
            sink,
            written: 0,
            failed: false,
            buffer: Vec::new(),
        };
        output.write(&encode_header())?;
        output.frame(kind::RUN, 0, 0, &codec::encode(run)?)?;
        Ok(Self {
            output,
            zstd: Compressor::new()?,
            streams: Vec::new(),
        })
    }

    /// Begins the stream of one process.
    ///
    /// # Errors
    /// Where the sink fails.
    pub fn begin_stream(&mut self, info: &StreamInfo) -> Result<StreamId, TraceError> {
        let id = StreamId(len32(self.streams.len()));
        let (offset, _) = self
            .output
            .frame(kind::STREAM, 0, id.0, &codec::encode(info)?)?;
        self.streams.push(StreamState::new(id, info, offset));
        Ok(id)
    }

    /// Names something. It must be defined before the first record that uses it, and its id must be the next of its kind.
    ///
    /// # Errors
    /// [`TraceError::Refused`] where the id is not the next or the definition names what is not defined. Where the sink fails.
    pub fn define(&mut self, stream: StreamId, definition: &Definition) -> Result<(), TraceError> {
        let state = Self::stream(&self.output, &mut self.streams, stream)?;
        if matches!(definition, Definition::Pattern(id, _) if id.0 >= FIRST_LATE_PATTERN) {
            return Err(state.refuse("patterns from 2^31 on are the writer's own"));
        }
        state.define(definition)?;
        if state.definitions.len() >= DEFINITION_BYTES {
            self.write_definitions(stream)
        } else {
            Ok(())
        }
    }

    /// Whether a definition of this kind and number stands in the stream.
    #[must_use]
    pub fn has(&self, stream: StreamId, definition: &Definition) -> bool {
        let state = self.streams.get(stream.index());
        state.is_some_and(|state| state.counts.has(definition))
    }

    /// Appends an op call.
    ///
    /// # Errors
    /// [`TraceError::Refused`] where it uses what is not defined, or its lists have not the lengths that its signature, its pattern and
    /// the stream's identities ask for; nothing is written then. Where the sink fails.
    pub fn op_call(
        &mut self,
        stream: StreamId,
        call: OpCallRef<'_>,
    ) -> Result<Ordinal, TraceError> {
        let state = Self::stream(&self.output, &mut self.streams, stream)?;
        let ordinal = state.op_call(&call)?;
        let overdue = state.overdue();
        if state.builder.is_full() {
            self.write_block(stream)?;
        }
        if let Some(lost) = overdue {
            self.moment(stream, &lost)?;
        }
        Ok(ordinal)
    }

    /// Appends a record that is not an op call.
    ///
    /// # Errors
    /// [`TraceError::Refused`] where it uses what is not defined. Where the sink fails.
    pub fn moment(&mut self, stream: StreamId, moment: &Moment) -> Result<Ordinal, TraceError> {
        let state = Self::stream(&self.output, &mut self.streams, stream)?;
        let ordinal = state.moment(moment)?;
        if state.builder.is_full() {
            self.write_block(stream)?;
        }
        Ok(ordinal)
    }

    /// Keeps the value of a call of `optape::watch`.
    ///
    /// # Errors
    /// [`TraceError::Refused`] where the call is not written yet, the watch is not defined, or the elements are more or fewer than dtype and
    /// shape ask for. Where the sink fails.
    pub fn value(&mut self, stream: StreamId, value: &Value) -> Result<(), TraceError> {
        let state = Self::stream(&self.output, &mut self.streams, stream)?;
        if value.ordinal.0 >= state.next_ordinal {
            return Err(state.refuse(format!(
                "a value is of record {}, which is not written yet",
                value.ordinal
            )));
        }
        if value.watch.0 >= state.counts.watches {
            return Err(state.refuse(format!(
                "a value is of watch {}, which is not defined",
                value.watch
            )));
        }
        value.check().map_err(|e| state.refuse(e.0))?;
        // Two of the largest do not fit into one frame.
        if state.values.len().saturating_add(value.bytes()) > RAW_LIMIT - RAW_LIMIT / 8 {
            self.write_values(stream)?;
        }
        let state = Self::stream(&self.output, &mut self.streams, stream)?;
        state.values.push(value);
        if state.values.len() >= FRAME_BYTES {
            self.write_values(stream)
        } else {
            Ok(())
        }
    }

    /// Writes what is pending: definitions, and a block per stream that has records; flushes the sink.
    ///
    /// # Errors
    /// Where the sink fails.
    pub fn flush(&mut self) -> Result<(), TraceError> {
        for stream in self.ids() {
            self.write_block(stream)?;
            self.write_values(stream)?;
        }
        self.output.sink.flush().map_err(|e| self.output.fail(e))
    }

    /// Ends a stream. Its number of records is counted here, whatever `end` says. Statistics that are still pending are lost.
    ///
    /// # Errors
    /// Where the sink fails, or the stream has ended before.
    pub fn end_stream(&mut self, stream: StreamId, end: &StreamEnd) -> Result<(), TraceError> {
        Self::stream(&self.output, &mut self.streams, stream)?;
        self.complete_stream(stream)?;
        let state = Self::stream(&self.output, &mut self.streams, stream)?;
        let end = StreamEnd {
            records: state.next_ordinal,
            ..end.clone()
        };
        let (offset, _) =
            self.output
                .frame(kind::STREAM_END, 0, stream.0, &codec::encode(&end)?)?;
        state.footer.end = Some(offset);
        state.ended = true;
        // What a stream holds in memory can be much, and processes come and go.
        state.builder = BlockBuilder::default();
        state.signatures = Vec::new();
        Ok(())
    }

    /// Ends the trace: writes what is pending, the last summaries, the index and the footer.
    ///
    /// # Errors
    /// Where the sink fails.
    pub fn finish(mut self, end: &RunEnd) -> Result<W, TraceError> {
        for stream in self.ids() {
            if self.streams.get(stream.index()).is_some_and(|s| !s.ended) {
                self.complete_stream(stream)?;
            }
        }
        let (run_end, _) = self
            .output
            .frame(kind::RUN_END, 0, 0, &codec::encode(end)?)?;
        let footer = Footer {
            run_end,
            streams: self.streams.iter().map(|s| s.footer.clone()).collect(),
        };
        let payload = footer.encode(self.output.written);
        self.output.frame(kind::FOOTER, 0, 0, &payload)?;
        self.output.sink.flush().map_err(|e| self.output.fail(e))?;
        Ok(self.output.sink)
    }

    /// How many bytes the sink has taken.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.output.written
    }

    /// How many records a stream has, those that are not in the sink yet included.
    #[must_use]
    pub fn records(&self, stream: StreamId) -> u64 {
        self.streams
            .get(stream.index())
            .map_or(0, |s| s.next_ordinal)
    }

    fn ids(&self) -> impl Iterator<Item = StreamId> + use<W> {
        (0..len32(self.streams.len())).map(StreamId)
    }

    /// A stream that takes records.
    #[inline]
    fn stream<'a>(
        output: &Output<W>,
        streams: &'a mut [StreamState],
        id: StreamId,
    ) -> Result<&'a mut StreamState, TraceError> {
        if output.failed {
            return Err(TraceError::SinkFailed);
        }
        let state = streams
            .get_mut(id.index())
            .ok_or(TraceError::NoSuchStream(id))?;
        state.open()?;
        Ok(state)
    }

    fn write_values(&mut self, stream: StreamId) -> Result<(), TraceError> {
        // A value's watch is defined before it.
        self.write_definitions(stream)?;
        let Some(state) = self.streams.get_mut(stream.index()) else {
            return Ok(());
        };
        if state.values.is_empty() {
            return Ok(());
        }
        let (raw, index) = state.values.take();
        let (flags, payload) = summary::pack(raw, &mut self.zstd)?;
        let (offset, _) = self.output.frame(kind::VALUES, flags, stream.0, &payload)?;
        state.index.values.push(ValuesIndex { offset, ..index });
        self.write_index(stream, ENTRIES_PER_FRAME)
    }

    fn write_definitions(&mut self, stream: StreamId) -> Result<(), TraceError> {
        let Some(state) = self.streams.get_mut(stream.index()) else {
            return Ok(());
        };
        if state.definitions.is_empty() {
            return Ok(());
        }
        let (flags, payload) =
            summary::pack(std::mem::take(&mut state.definitions), &mut self.zstd)?;
        let (offset, _) = self
            .output
            .frame(kind::DEFINITIONS, flags, stream.0, &payload)?;
        state.index.definitions.push(offset);
        self.write_index(stream, ENTRIES_PER_FRAME)
    }

    fn write_block(&mut self, stream: StreamId) -> Result<(), TraceError> {
        self.write_definitions(stream)?;
        let Some(state) = self.streams.get_mut(stream.index()) else {
            return Ok(());
        };
        if state.builder.is_empty() {
            return Ok(());
        }
        let (head, payload) = state.builder.encode(state.block_first, &mut self.zstd)?;
        let (offset, bytes) = self.output.frame(kind::BLOCK, 0, stream.0, &payload)?;
        state
            .index
            .blocks
            .push(BlockIndex::new(&head, offset, bytes));
        state.sum_up_block();
        state.builder.clear();
        state.block += 1;
        state.block_first = state.next_ordinal;
        self.write_summaries(stream, false)?;
        self.write_index(stream, ENTRIES_PER_FRAME)
    }

    /// Writes the summaries of all pieces that are complete, in order; with `all`, also of the one being filled.
    fn write_summaries(&mut self, stream: StreamId, all: bool) -> Result<(), TraceError> {
        loop {
            let Some(state) = self.streams.get_mut(stream.index()) else {
                return Ok(());
            };
            let closed = all || state.pieces.len() > 1;
            let Some(piece) = state.pieces.pop_front_if(|p| closed && p.pending == 0) else {
                return Ok(());
            };
            if state.pieces.is_empty() {
                state.pieces.push_back(Piece {
                    first_ordinal: state.next_ordinal,
                    ..Piece::default()
                });
            }
            if piece.records == 0 {
                return Ok(());
            }
            state.pieces_written += 1;
            let head = SummaryHead {
                level: 0,
                first_ordinal: piece.first_ordinal,
                records: piece.records,
            };
            let rows = piece.rows.into_sorted();
            state.whole.add_rows(rows.iter(), &state.patterns);
            self.write_summary(stream, head, &rows)?;
            self.raise(stream, head, rows)?;
        }
    }

    /// Adds a summary to the level above, and goes on upwards where that completes one.
    fn raise(
        &mut self,
        stream: StreamId,
        mut head: SummaryHead,
        mut rows: Vec<SummaryRow>,
    ) -> Result<(), TraceError> {
        while let Some(state) = self.streams.get_mut(stream.index()) {
            let place = usize::from(head.level);
            if state.levels.len() <= place {
                state.levels.resize_with(place + 1, Level::default);
            }
            let Some(level) = state.levels.get_mut(place) else {
                return Ok(());
            };
            if level.count == 0 {
                level.first_ordinal = head.first_ordinal;
            }
            level.count += 1;
            level.records += head.records;
            level.rows.add_rows(rows.iter(), &state.patterns);
            if level.count < FACTOR || head.level + 1 == WHOLE {
                return Ok(());
            }
            let full = std::mem::take(level);
            head = SummaryHead {
                level: head.level + 1,
                first_ordinal: full.first_ordinal,
                records: full.records,
            };
            rows = full.rows.into_sorted();
            self.write_summary(stream, head, &rows)?;
        }
        Ok(())
    }

    fn write_summary(
        &mut self,
        stream: StreamId,
        head: SummaryHead,
        rows: &[SummaryRow],
    ) -> Result<(), TraceError> {
        let raw = summary::encode(head, rows);
        if raw.len() > RAW_LIMIT {
            // Absurdly many signatures: readers read the blocks instead.
            return Ok(());
        }
        let (flags, payload) = summary::pack(raw, &mut self.zstd)?;
        let (offset, _) = self
            .output
            .frame(kind::SUMMARY, flags, stream.0, &payload)?;
        if let Some(state) = self.streams.get_mut(stream.index()) {
            state.index.summaries.push(SummaryIndex::new(head, offset));
        }
        Ok(())
    }

    /// Writes an index frame if there are at least so many entries for it.
    fn write_index(&mut self, stream: StreamId, least: usize) -> Result<(), TraceError> {
        let Some(state) = self.streams.get_mut(stream.index()) else {
            return Ok(());
        };
        if state.index.len() < least {
            return Ok(());
        }
        let (flags, payload) =
            summary::pack(std::mem::take(&mut state.index).encode(), &mut self.zstd)?;
        let (offset, _) = self.output.frame(kind::INDEX, flags, stream.0, &payload)?;
        state.footer.index.push(offset);
        Ok(())
    }

    /// Writes everything of a stream that nothing can be added to any more.
    fn complete_stream(&mut self, stream: StreamId) -> Result<(), TraceError> {
        self.write_block(stream)?;
        self.write_values(stream)?;
        if let Some(state) = self.streams.get_mut(stream.index()) {
            state.give_up()?;
            state.footer.records = state.next_ordinal;
        }
        self.write_definitions(stream)?;
        self.write_summaries(stream, true)?;
        if let Some(state) = self.streams.get_mut(stream.index())
            && state.pieces_written > 1
        {
            let rows = std::mem::take(&mut state.whole).into_sorted();
            let head = SummaryHead {
                level: WHOLE,
                first_ordinal: 0,
                records: state.next_ordinal,
            };
            self.write_summary(stream, head, &rows)?;
        }
        self.write_index(stream, 1)
    }
}

impl From<Corrupt> for String {
    fn from(corrupt: Corrupt) -> Self {
        corrupt.0.into_owned()
    }
}
