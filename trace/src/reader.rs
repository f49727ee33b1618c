//! The reader. A finished file is opened by its index; any other, and one whose index is damaged, by reading every
//! frame from the front, which [`Trace::refresh`] continues while the file grows.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::block::{self, Block, BlockHead, Columns, Slot};
use crate::bytes::{Cursor, len32, len64};
use crate::codec;
use crate::dictionary::Definition;
use crate::error::{Corrupt, TraceError};
use crate::frame::{FRAME_HEAD, FrameHead, HEADER_PEEK, Header, decode_header, kind};
use crate::ids::{Ordinal, PatternId, SignatureId, StreamId};
use crate::index::{BlockIndex, Footer, IndexChunk, SummaryIndex, TRAILER};
use crate::info::{Role, RunEnd, RunInfo, StreamEnd, StreamInfo};
use crate::record::{Event, LateStatistic, Moment, Record};
use crate::source::Source;
use crate::summary::{self, Rows, SummaryHead, SummaryRow};
use crate::table::{Dictionary, give_up, resolve};
use crate::values::{self, Value, ValuesIndex};

/// What a finding at the end of a truncated file says.
pub(crate) const NOT_WHOLE: &str = "the last frame is not whole";

/// A trace that can be read.
#[derive(Debug)]
pub struct Trace {
    pub(crate) source: Source,
    header: Header,
    run: RunInfo,
    streams: Vec<Stream>,
    run_end: Option<RunEnd>,
    end: TraceEnd,
    /// Where the next frame is expected.
    position: u64,
    /// What is missing before a frame is no reason to refuse the frame.
    tolerant: bool,
    /// How many frames have been read one by one.
    frames: u64,
}

/// How a trace ends.
#[derive(Clone, Debug, PartialEq)]
pub enum TraceEnd {
    /// The recording was finished in order.
    Clean(RunEnd),
    /// It is still being written, or the writer died. Every whole frame can be read.
    Unfinished {
        /// Up to here the frames are whole.
        valid_bytes: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// Frames up to `offset` can be read. `optape recover` also saves what stands behind.
    Damaged {
        /// Where the first damaged frame begins.
        offset: u64,
        /// What is wrong with it.
        what: String,
        /// The file's length.
        file_bytes: u64,
    },
}

/// One recorded process, or another [`Role`].
#[derive(Debug)]
pub struct Stream {
    id: StreamId,
    info: StreamInfo,
    end: Option<StreamEnd>,
    dictionary: Dictionary,
    records: u64,
    op_calls: u64,
    dropped: u64,
    blocks: Vec<BlockIndex>,
    summaries: Vec<SummaryIndex>,
    values: Vec<ValuesIndex>,
    /// Blocks with late statistics, in order: index, and the ordinals that these are for.
    late: Vec<(usize, u64, u64)>,
    /// Of each entry of `late` and all behind it the least ordinal.
    late_floor: Vec<u64>,
}

impl Stream {
    fn new(id: StreamId, info: StreamInfo) -> Self {
        Self {
            id,
            info,
            end: None,
            dictionary: Dictionary::default(),
            records: 0,
            op_calls: 0,
            dropped: 0,
            blocks: Vec::new(),
            summaries: Vec::new(),
            values: Vec::new(),
            late: Vec::new(),
            late_floor: Vec::new(),
        }
    }

    /// Its id: its place in [`Trace::streams`].
    #[must_use]
    pub fn id(&self) -> StreamId {
        self.id
    }

    /// Which process it is.
    #[must_use]
    pub fn info(&self) -> &StreamInfo {
        &self.info
    }

    /// How it ended; `None` while it has not, or where nobody could say.
    #[must_use]
    pub fn end(&self) -> Option<&StreamEnd> {
        self.end.as_ref()
    }

    /// What its ids mean.
    #[must_use]
    pub fn dictionary(&self) -> &Dictionary {
        &self.dictionary
    }

    /// How many records can be read.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records
    }

    /// How many of them are op calls.
    #[must_use]
    pub fn op_calls(&self) -> u64 {
        self.op_calls
    }

    /// How many records were lost: what its drops say, or its end, whichever says more.
    #[must_use]
    pub fn dropped_records(&self) -> u64 {
        self.dropped
            .max(self.end.as_ref().map_or(0, |e| e.dropped_records))
    }

    /// Its blocks, in order.
    #[must_use]
    pub fn blocks(&self) -> &[BlockIndex] {
        &self.blocks
    }

    /// Its summaries, in the order of the file.
    #[must_use]
    pub fn summaries(&self) -> &[SummaryIndex] {
        &self.summaries
    }

    /// Where its kept values stand, in the order of the file.
    #[must_use]
    pub fn values(&self) -> &[ValuesIndex] {
        &self.values
    }

    /// The index of the block that holds a record.
    #[must_use]
    pub fn block_of(&self, ordinal: Ordinal) -> Option<usize> {
        let index = self
            .blocks
            .partition_point(|b| b.ordinals().end <= ordinal.0);
        (ordinal.0 < self.records).then_some(index)
    }

    fn add_block(&mut self, block: BlockIndex) -> Result<(), Corrupt> {
        if block.first_ordinal != self.records {
            return Err(Corrupt::from(format!(
                "a block of stream {} begins with record {} where {} is the next",
                self.id, block.first_ordinal, self.records
            )));
        }
        if let Some((least, greatest)) = block.late {
            self.late.push((self.blocks.len(), least, greatest));
        }
        self.records = block.ordinals().end;
        self.op_calls += u64::from(block.op_calls);
        self.dropped = self.dropped.saturating_add(block.dropped);
        self.blocks.push(block);
        Ok(())
    }

    /// To be called when blocks have been added.
    fn settle(&mut self) {
        self.late_floor = vec![u64::MAX; self.late.len()];
        let mut floor = u64::MAX;
        for (slot, &(_, least, _)) in self.late_floor.iter_mut().zip(&self.late).rev() {
            floor = floor.min(least);
            *slot = floor;
        }
    }

    /// The blocks that hold late statistics for records of `ordinals`, which stand in block `index`.
    fn late_blocks(&self, index: usize, ordinals: &Range<u64>) -> Vec<usize> {
        let from = self.late.partition_point(|l| l.0 < index);
        let candidates = self.late.iter().zip(&self.late_floor).skip(from);
        let near = candidates.take_while(|(_, floor)| **floor < ordinals.end);
        near.filter(|((_, least, greatest), _)| {
            *least < ordinals.end && *greatest >= ordinals.start
        })
        .map(|(l, _)| l.0)
        .collect()
    }
}

/// Reads a frame that must be of a certain kind.
fn frame_of(source: &Source, wanted: u8, offset: u64) -> Result<(FrameHead, Vec<u8>), TraceError> {
    let (head, payload) = read_frame(source, offset)?;
    if head.kind == wanted {
        Ok((head, payload))
    } else {
        let (found, wanted) = (kind::name(head.kind), kind::name(wanted));
        Err(Corrupt::from(format!(
            "a {found} frame stands where a {wanted} frame should"
        ))
        .at(offset))
    }
}

/// Reads a frame and checks it; its payload is decompressed.
pub(crate) fn read_frame(source: &Source, offset: u64) -> Result<(FrameHead, Vec<u8>), TraceError> {
    let head = FrameHead::decode(&source.read(offset, FRAME_HEAD)?).map_err(|e| e.at(offset))?;
    let payload = source.read(offset + len64(FRAME_HEAD), head.length as usize)?;
    head.check(&payload).map_err(|e| e.at(offset))?;
    let payload = if (kind::RUN..=kind::VALUES).contains(&head.kind) {
        head.unwrap_payload(payload).map_err(|e| e.at(offset))?
    } else {
        payload
    };
    Ok((head, payload))
}

/// Decodes a metadata record that is all of `payload`.
pub(crate) fn metadata<T: bincode::Decode<()>>(payload: &[u8]) -> Result<T, Corrupt> {
    // What follows belongs to later minor versions.
    Ok(codec::decode(payload)?.0)
}

/// Kinds of definitions that this version knows: the variants of [`Definition`].
const DEFINITION_KINDS: u32 = 8;

/// Decodes definitions up to the payload's end. Kinds that a later minor version has added are left out.
pub(crate) fn definitions(
    payload: &[u8],
    mut take: impl FnMut(Definition) -> Result<(), Corrupt>,
) -> Result<(), Corrupt> {
    let mut cursor = Cursor::new(payload);
    while !cursor.is_empty() {
        let length = cursor.count(1)?;
        let bytes = cursor.take(length)?;
        let (kind, _) = codec::decode::<u32>(bytes)?;
        if kind < DEFINITION_KINDS {
            take(metadata(bytes)?)?;
        }
    }
    Ok(())
}

impl Trace {
    /// Opens a file. A finished one is read by its index, any other frame by frame.
    ///
    /// # Errors
    /// Where the file cannot be read, is not a trace, is of another major version, or ends before the information about the run
    /// does. A file that is truncated or damaged later on is opened: see [`Trace::end`].
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        Self::read(Source::open(path)?)
    }

    /// Opens a trace in memory.
    ///
    /// # Errors
    /// As [`Trace::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, TraceError> {
        Self::read(Source::Bytes(bytes))
    }

    fn read(source: Source) -> Result<Self, TraceError> {
        let mut trace = Self::begin(source)?;
        if trace.read_index().is_ok() {
            return Ok(trace);
        }
        // No index, or a damaged one: the frames themselves say everything.
        let Self { source, .. } = trace;
        let mut trace = Self::begin(source)?;
        trace.scan()?;
        Ok(trace)
    }

    /// Opens a trace frame by frame, even if it has an index, and goes on behind damage: `found` gets each damaged place. The blocks of
    /// a stream may have gaps then, and blocks may use definitions that were lost.
    pub(crate) fn salvage(
        source: Source,
        mut found: impl FnMut(u64, String),
    ) -> Result<Self, TraceError> {
        let mut trace = Self::begin(source)?;
        trace.tolerant = true;
        loop {
            let file_bytes = trace.source.length()?;
            match trace.scan_frame(file_bytes) {
                Ok(true) => continue,
                Ok(false) if trace.position == file_bytes => break,
                Ok(false) => found(trace.position, NOT_WHOLE.to_owned()),
                Err(TraceError::Damaged { offset, what }) => found(offset, what),
                Err(other) => return Err(other),
            }
            match trace.next_frame(trace.position + 1, file_bytes)? {
                Some(offset) => trace.position = offset,
                None => break,
            }
        }
        if let Some(end) = &trace.run_end {
            trace.end = TraceEnd::Clean(end.clone());
        }
        for stream in &mut trace.streams {
            stream.settle();
        }
        Ok(trace)
    }

    /// The first place from `from` on where a frame stands whose checksums are right.
    fn next_frame(&self, from: u64, file_bytes: u64) -> Result<Option<u64>, TraceError> {
        const STEP: usize = 1 << 20;
        let mut at = from;
        while at.saturating_add(len64(FRAME_HEAD)) <= file_bytes {
            let left = usize::try_from(file_bytes - at).unwrap_or(usize::MAX);
            let bytes = self.source.read(at, left.min(STEP))?;
            let heads = bytes.windows(FRAME_HEAD);
            for (offset, _) in (at..)
                .zip(heads)
                .filter(|(_, head)| FrameHead::decode(head).is_ok())
            {
                match read_frame(&self.source, offset) {
                    Ok(_) => return Ok(Some(offset)),
                    Err(TraceError::Damaged { .. } | TraceError::Cut { .. }) => {}
                    Err(other) => return Err(other),
                }
            }
            at += len64(bytes.len().saturating_sub(FRAME_HEAD - 1).max(1));
        }
        Ok(None)
    }

    /// Reads the header and the first frame.
    fn begin(source: Source) -> Result<Self, TraceError> {
        let file_bytes = source.length()?;
        let peek = usize::try_from(file_bytes)
            .unwrap_or(usize::MAX)
            .min(HEADER_PEEK);
        let header = decode_header(&source.read(0, peek)?, file_bytes)?;
        let offset = u64::from(header.length);
        let short = |needed: u64| {
            if needed > file_bytes {
                Err(TraceError::TooShort { file_bytes })
            } else {
                Ok(())
            }
        };
        short(offset + len64(FRAME_HEAD))?;
        let head =
            FrameHead::decode(&source.read(offset, FRAME_HEAD)?).map_err(|e| e.at(offset))?;
        short(offset + head.total())?;
        let (head, payload) = frame_of(&source, kind::RUN, offset)?;
        let run = metadata(&payload).map_err(|e| e.at(offset))?;
        let position = offset + head.total();
        let end = TraceEnd::Unfinished {
            valid_bytes: position,
            file_bytes,
        };
        Ok(Self {
            source,
            header,
            run,
            streams: Vec::new(),
            run_end: None,
            end,
            position,
            tolerant: false,
            frames: 1,
        })
    }

    /// Reads a finished file's index. On an error the trace is unusable.
    fn read_index(&mut self) -> Result<(), TraceError> {
        let file_bytes = self.source.length()?;
        let trailer = file_bytes
            .checked_sub(len64(TRAILER))
            .ok_or(TraceError::TooShort { file_bytes })?;
        let offset = Footer::find(&self.source.read(trailer, TRAILER)?)
            .ok_or(TraceError::TooShort { file_bytes })?;
        let (head, payload) = frame_of(&self.source, kind::FOOTER, offset)?;
        if offset + head.total() != file_bytes {
            return Err(Corrupt::from("the footer is not the last frame").at(offset));
        }
        let footer = Footer::decode(&payload).map_err(|e| e.at(offset))?;
        for (id, entry) in (0u32..).zip(&footer.streams) {
            let (head, payload) = frame_of(&self.source, kind::STREAM, entry.begin)?;
            let mut stream = Stream::new(
                StreamId(id),
                metadata(&payload).map_err(|e| e.at(entry.begin))?,
            );
            let mine = |head: &FrameHead, offset: u64| {
                if head.stream == id {
                    Ok(())
                } else {
                    Err(Corrupt::from("a frame belongs to another stream").at(offset))
                }
            };
            mine(&head, entry.begin)?;
            for &offset in &entry.index {
                let (head, payload) = frame_of(&self.source, kind::INDEX, offset)?;
                mine(&head, offset)?;
                let chunk = IndexChunk::decode(&payload).map_err(|e| e.at(offset))?;
                for offset in chunk.definitions {
                    let (head, payload) = frame_of(&self.source, kind::DEFINITIONS, offset)?;
                    mine(&head, offset)?;
                    definitions(&payload, |d| stream.dictionary.add(d))
                        .map_err(|e| e.at(offset))?;
                }
                for block in chunk.blocks {
                    stream.add_block(block).map_err(|e| e.at(offset))?;
                }
                stream.summaries.extend(chunk.summaries);
                stream.values.extend(chunk.values);
            }
            if stream.records != entry.records {
                return Err(Corrupt::from("the footer and the index disagree").at(offset));
            }
            if let Some(offset) = entry.end {
                let (head, payload) = frame_of(&self.source, kind::STREAM_END, offset)?;
                mine(&head, offset)?;
                stream.end = Some(metadata(&payload).map_err(|e| e.at(offset))?);
            }
            stream.settle();
            self.streams.push(stream);
        }
        let (_, payload) = frame_of(&self.source, kind::RUN_END, footer.run_end)?;
        let run_end: RunEnd = metadata(&payload).map_err(|e| e.at(footer.run_end))?;
        self.position = file_bytes;
        self.end = TraceEnd::Clean(run_end);
        Ok(())
    }

    /// Reads the frames from `position` on, as far as they are whole.
    fn scan(&mut self) -> Result<(), TraceError> {
        loop {
            let file_bytes = self.source.length()?;
            if self.position > file_bytes {
                return Err(TraceError::Cut {
                    offset: file_bytes,
                    file_bytes,
                });
            }
            match self.scan_frame(file_bytes) {
                Ok(true) => {}
                Ok(false) => {
                    self.end = TraceEnd::Unfinished {
                        valid_bytes: self.position,
                        file_bytes,
                    };
                    break;
                }
                Err(TraceError::Damaged { offset, what }) => {
                    self.end = TraceEnd::Damaged {
                        offset,
                        what,
                        file_bytes,
                    };
                    break;
                }
                Err(other) => return Err(other),
            }
            if matches!(self.end, TraceEnd::Clean(_)) {
                break;
            }
        }
        for stream in &mut self.streams {
            stream.settle();
        }
        Ok(())
    }

    /// Takes in the frame at `position`; false where it is not whole yet.
    fn scan_frame(&mut self, file_bytes: u64) -> Result<bool, TraceError> {
        let offset = self.position;
        let left = file_bytes - offset;
        if left < len64(FRAME_HEAD) {
            return Ok(false);
        }
        let head =
            FrameHead::decode(&self.source.read(offset, FRAME_HEAD)?).map_err(|e| e.at(offset))?;
        if left < head.total() {
            return Ok(false);
        }
        let (head, payload) = read_frame(&self.source, offset)?;
        self.take(&head, &payload, offset)
            .map_err(|e| e.at(offset))?;
        self.position = offset + head.total();
        self.frames += 1;
        Ok(true)
    }

    /// How many frames a scan has read.
    pub(crate) fn frames(&self) -> u64 {
        self.frames
    }

    fn take(&mut self, head: &FrameHead, payload: &[u8], offset: u64) -> Result<(), Corrupt> {
        match head.kind {
            kind::RUN => return Err(Corrupt::from("a second run begins here")),
            kind::RUN_END => {
                self.run_end = Some(metadata(payload)?);
                return Ok(());
            }
            kind::FOOTER => {
                let end = self
                    .run_end
                    .clone()
                    .ok_or(Corrupt::from("a footer stands before the run's end"))?;
                self.end = TraceEnd::Clean(end);
                return Ok(());
            }
            kind::STREAM => {
                let next = len32(self.streams.len());
                if head.stream != next {
                    return Err(Corrupt::from(format!(
                        "stream {} begins where {next} is the next",
                        head.stream
                    )));
                }
                self.streams
                    .push(Stream::new(StreamId(next), metadata(payload)?));
                return Ok(());
            }
            _ => {}
        }
        let known = [
            kind::DEFINITIONS,
            kind::BLOCK,
            kind::SUMMARY,
            kind::STREAM_END,
            kind::VALUES,
        ];
        if !known.contains(&head.kind) {
            return Ok(());
        }
        let stream = self.streams.get_mut(head.stream as usize).ok_or_else(|| {
            Corrupt::from(format!(
                "a {} frame is of stream {}, which has not begun",
                kind::name(head.kind),
                head.stream
            ))
        })?;
        match head.kind {
            kind::DEFINITIONS if self.tolerant => {
                definitions(payload, |d| stream.dictionary.add_after_loss(d))
            }
            kind::DEFINITIONS => definitions(payload, |d| stream.dictionary.add(d)),
            kind::BLOCK => {
                let block = BlockHead::decode(payload, head.length)?;
                if self.tolerant {
                    stream.records = stream.records.max(block.first_ordinal);
                }
                stream.add_block(BlockIndex::new(
                    &block,
                    offset,
                    head.length + len32(FRAME_HEAD),
                ))
            }
            kind::SUMMARY => {
                let summary = SummaryHead::decode(&mut Cursor::new(payload))?;
                stream.summaries.push(SummaryIndex::new(summary, offset));
                Ok(())
            }
            kind::VALUES => {
                stream.values.push(values::index_of(payload, offset)?);
                Ok(())
            }
            _ => {
                stream.end = Some(metadata(payload)?);
                Ok(())
            }
        }
    }

    /// Picks up the frames that a growing file has gained; true if there were any.
    ///
    /// # Errors
    /// Where the file cannot be read or has become shorter.
    pub fn refresh(&mut self) -> Result<bool, TraceError> {
        if matches!(self.end, TraceEnd::Clean(_)) {
            return Ok(false);
        }
        let before = self.position;
        self.scan()?;
        Ok(self.position != before)
    }

    /// The run.
    #[must_use]
    pub fn run(&self) -> &RunInfo {
        &self.run
    }

    /// All streams, by id: recorded processes, and the recorder's monitors.
    #[must_use]
    pub fn streams(&self) -> &[Stream] {
        &self.streams
    }

    /// The streams of recorded processes.
    pub fn processes(&self) -> impl Iterator<Item = &Stream> {
        self.with_role(Role::Process)
    }

    /// The streams of monitors: one at most, unless files were put together.
    pub fn monitors(&self) -> impl Iterator<Item = &Stream> {
        self.with_role(Role::Monitor)
    }

    fn with_role(&self, role: Role) -> impl Iterator<Item = &Stream> {
        self.streams.iter().filter(move |s| s.info.role == role)
    }

    /// How the trace ends.
    #[must_use]
    pub fn end(&self) -> &TraceEnd {
        &self.end
    }

    /// Major and minor version of the format.
    #[must_use]
    pub fn format_version(&self) -> (u16, u16) {
        self.header.version
    }

    /// The file's length now.
    ///
    /// # Errors
    /// Where the file system cannot say.
    pub fn file_bytes(&self) -> Result<u64, TraceError> {
        self.source.length()
    }

    /// A stream.
    ///
    /// # Errors
    /// [`TraceError::NoSuchStream`].
    pub fn stream(&self, id: StreamId) -> Result<&Stream, TraceError> {
        self.streams
            .get(id.index())
            .ok_or(TraceError::NoSuchStream(id))
    }

    /// Reads the wanted columns of a block, late statistics put in.
    ///
    /// # Errors
    /// Where the file cannot be read, was cut or is damaged there, or there is no such block.
    pub fn block(
        &self,
        stream: StreamId,
        index: usize,
        columns: Columns,
    ) -> Result<Block, TraceError> {
        let state = self.stream(stream)?;
        let entry = Self::entry(state, index)?;
        let with_statistics = columns.has(Columns::SLOTS | Columns::PATTERNS | Columns::STATISTICS);
        if entry.pending == 0 || !with_statistics {
            return self.raw_block(state, entry, columns);
        }
        let mut block = self.raw_block(state, entry, columns | Columns::KINDS)?;
        let mut late: HashMap<u64, Vec<Vec<LateStatistic>>> = HashMap::new();
        for index in state.late_blocks(index, &entry.ordinals()) {
            for moment in self
                .raw_block(state, Self::entry(state, index)?, Columns::MOMENTS)?
                .moments
            {
                if let Event::Statistics { call, values } = moment.event
                    && entry.ordinals().contains(&call.0)
                {
                    late.entry(call.0).or_default().push(values);
                }
            }
        }
        let over = state.end.is_some() || matches!(self.end, TraceEnd::Clean(_));
        apply_late(&mut block, columns, &state.dictionary, &late, over)
            .map_err(|e| e.at(entry.offset))?;
        if !columns.has(Columns::KINDS | Columns::MOMENTS) {
            block.kinds = Vec::new();
        }
        Ok(block)
    }

    fn entry(stream: &Stream, index: usize) -> Result<&BlockIndex, TraceError> {
        stream.blocks.get(index).ok_or(TraceError::NoSuchBlock {
            stream: stream.id,
            block: index,
            blocks: stream.blocks.len(),
        })
    }

    /// The head of a block's frame, and as many bytes behind it as one read gives.
    fn block_head(
        &self,
        stream: &Stream,
        entry: &BlockIndex,
    ) -> Result<(BlockHead, Vec<u8>), TraceError> {
        // Holds the head and, mostly, the columns that counters need.
        const PEEK: usize = 16 << 10;
        let at = |corrupt: Corrupt| corrupt.at(entry.offset);
        let bytes = self
            .source
            .read(entry.offset, (entry.bytes as usize).min(PEEK))?;
        let frame = FrameHead::decode(&bytes).map_err(at)?;
        if frame.kind != kind::BLOCK
            || frame.stream != stream.id.0
            || frame.total() != u64::from(entry.bytes)
        {
            return Err(at(Corrupt::from(
                "the index names a block where another frame stands",
            )));
        }
        let mut payload = bytes.get(FRAME_HEAD..).unwrap_or_default().to_vec();
        let length = BlockHead::length(&payload).map_err(at)?;
        if length > frame.length as usize {
            return Err(at(Corrupt::from("a block's head is longer than its frame")));
        }
        if length > payload.len() {
            payload = self.source.read(entry.offset + len64(FRAME_HEAD), length)?;
        }
        let head = BlockHead::decode(&payload, frame.length).map_err(at)?;
        if BlockIndex::new(&head, entry.offset, entry.bytes) != *entry {
            return Err(at(Corrupt::from("the index and a block's head disagree")));
        }
        Ok((head, payload))
    }

    /// The columns of all blocks of a stream by their number in FORMAT.md, and the bytes that each takes in the file: where the
    /// bytes of a trace go.
    ///
    /// # Errors
    /// As [`Trace::block`].
    pub fn column_bytes(&self, stream: StreamId) -> Result<Vec<(u8, u32)>, TraceError> {
        let state = self.stream(stream)?;
        let mut all = Vec::new();
        for entry in &state.blocks {
            all.extend(
                self.block_head(state, entry)?
                    .0
                    .columns
                    .iter()
                    .map(|c| (c.id, c.stored)),
            );
        }
        Ok(all)
    }

    /// A block as it was written.
    pub(crate) fn raw_block(
        &self,
        stream: &Stream,
        entry: &BlockIndex,
        columns: Columns,
    ) -> Result<Block, TraceError> {
        let (head, payload) = self.block_head(stream, entry)?;
        block::decode(
            &head,
            columns,
            &stream.dictionary,
            stream.info.identities,
            entry.offset,
            |column| {
                let start = usize::try_from(column.at).unwrap_or(usize::MAX);
                match payload
                    .get(start..)
                    .and_then(|p| p.get(..column.stored as usize))
                {
                    Some(bytes) => Ok(bytes.to_vec()),
                    None => self.source.read(
                        entry.offset + len64(FRAME_HEAD) + column.at,
                        column.stored as usize,
                    ),
                }
            },
        )
    }

    /// Sums over the op calls among a range of records. Combines the fewest stored summaries, and reads blocks only where none fits: at
    /// the range's edges, and where late statistics are still missing.
    ///
    /// # Errors
    /// As [`Trace::block`].
    pub fn summary(
        &self,
        stream: StreamId,
        range: Range<u64>,
    ) -> Result<Vec<SummaryRow>, TraceError> {
        let state = self.stream(stream)?;
        let end = range.end.min(state.records);
        let mut pieces: Vec<&SummaryIndex> = state
            .summaries
            .iter()
            .filter(|s| s.records > 0 && s.first_ordinal >= range.start && s.ordinals().end <= end)
            .collect();
        pieces.sort_unstable_by_key(|s| (s.first_ordinal, std::cmp::Reverse(s.records)));
        let mut pieces = pieces.into_iter().peekable();
        let mut rows = Rows::default();
        let mut at = range.start;
        while at < end {
            while pieces.next_if(|p| p.first_ordinal < at).is_some() {}
            if let Some(piece) = pieces.next_if(|p| p.first_ordinal == at) {
                let more = self.read_summary(state, piece)?;
                rows.add_rows(more.iter(), &state.dictionary);
                at = piece.ordinals().end;
                continue;
            }
            let Some(index) = state.block_of(Ordinal(at)) else {
                break;
            };
            let ordinals = Self::entry(state, index)?.ordinals();
            let until = ordinals.end.min(end);
            self.sum_block(
                stream,
                index,
                at - ordinals.start..until - ordinals.start,
                &mut rows,
                &state.dictionary,
            )?;
            at = until;
        }
        Ok(rows.into_sorted())
    }

    /// Adds the op calls among the records `wanted` of a block.
    fn sum_block(
        &self,
        stream: StreamId,
        index: usize,
        wanted: Range<u64>,
        rows: &mut Rows,
        dictionary: &Dictionary,
    ) -> Result<(), TraceError> {
        let columns = Columns::STATISTICS | Columns::SLOTS | Columns::DURATION | Columns::KINDS;
        let block = self.block(stream, index, columns)?;
        let calls_before = |record: u64| {
            let record = usize::try_from(record).unwrap_or(usize::MAX);
            block.kinds.iter().take(record).filter(|&&k| k == 0).count()
        };
        rows.add_block(
            &block,
            &(calls_before(wanted.start)..calls_before(wanted.end)),
            dictionary,
        );
        Ok(())
    }

    /// What a summary should say: the sum of the summaries of the level below, or of its blocks where these do not cover it.
    pub(crate) fn sum_below(
        &self,
        stream: &Stream,
        summary: &SummaryIndex,
    ) -> Result<Vec<SummaryRow>, TraceError> {
        let range = summary.ordinals();
        let below = match summary.level {
            0 => None,
            summary::WHOLE => Some(0),
            level => Some(level - 1),
        };
        let inside = |s: &&SummaryIndex| {
            Some(s.level) == below
                && s.first_ordinal >= range.start
                && s.ordinals().end <= range.end
        };
        let parts: Vec<&SummaryIndex> = stream.summaries.iter().filter(inside).collect();
        let mut rows = Rows::default();
        if below.is_some() && parts.iter().map(|p| p.records).sum::<u64>() == summary.records {
            for part in parts {
                rows.add_rows(self.read_summary(stream, part)?.iter(), &stream.dictionary);
            }
            return Ok(rows.into_sorted());
        }
        let mut at = range.start;
        while let Some(index) = stream.block_of(Ordinal(at)).filter(|_| at < range.end) {
            let ordinals = Self::entry(stream, index)?.ordinals();
            if ordinals.start > at {
                return Err(
                    Corrupt::from("records that a summary covers are missing").at(summary.offset)
                );
            }
            let until = ordinals.end.min(range.end);
            self.sum_block(
                stream.id,
                index,
                at - ordinals.start..until - ordinals.start,
                &mut rows,
                &stream.dictionary,
            )?;
            at = until;
        }
        Ok(rows.into_sorted())
    }

    /// Bytes that the frame at `offset` takes in the file, its head included.
    ///
    /// # Errors
    /// Where the file cannot be read there, or no frame begins there.
    pub fn frame_bytes(&self, offset: u64) -> Result<u64, TraceError> {
        let head = FrameHead::decode(&self.source.read(offset, FRAME_HEAD)?);
        Ok(head.map_err(|e| e.at(offset))?.total())
    }

    /// The kept values of one frame ([`Stream::values`]).
    ///
    /// # Errors
    /// Where it cannot be read, or does not hold what the index says.
    pub fn values_of(
        &self,
        stream: StreamId,
        index: &ValuesIndex,
    ) -> Result<Vec<Value>, TraceError> {
        let (head, payload) = frame_of(&self.source, kind::VALUES, index.offset)?;
        let values = values::decode(&payload).map_err(|e| e.at(index.offset))?;
        if head.stream != stream.0 || len64(values.len()) != index.count {
            return Err(Corrupt::from("the index and a frame of values disagree").at(index.offset));
        }
        Ok(values)
    }

    pub(crate) fn read_summary(
        &self,
        stream: &Stream,
        index: &SummaryIndex,
    ) -> Result<Vec<SummaryRow>, TraceError> {
        let (head, payload) = frame_of(&self.source, kind::SUMMARY, index.offset)?;
        let (summary, rows) =
            summary::decode(&payload, &stream.dictionary).map_err(|e| e.at(index.offset))?;
        if head.stream != stream.id.0 || SummaryIndex::new(summary, index.offset) != *index {
            return Err(Corrupt::from("the index and a summary disagree").at(index.offset));
        }
        Ok(rows)
    }

    /// All records of a stream that are not op calls, in order. No column of op calls is read.
    ///
    /// # Errors
    /// As [`Trace::block`].
    pub fn moments(&self, stream: StreamId) -> Result<Vec<(Ordinal, Moment)>, TraceError> {
        let state = self.stream(stream)?;
        let mut all = Vec::new();
        for entry in state.blocks.iter().filter(|b| b.op_calls < b.records) {
            let block = self.raw_block(state, entry, Columns::MOMENTS)?;
            let ordinals = (block.first_ordinal..)
                .zip(&block.kinds)
                .filter(|(_, k)| **k == 1)
                .map(|(o, _)| Ordinal(o));
            all.extend(ordinals.zip(block.moments));
        }
        Ok(all)
    }

    /// How many records of a stream that are no op calls are such, without holding them all.
    ///
    /// # Errors
    /// As [`Self::moments`].
    pub fn count_moments(
        &self,
        stream: StreamId,
        such: impl Fn(&Event) -> bool,
    ) -> Result<u64, TraceError> {
        let state = self.stream(stream)?;
        let mut count = 0;
        for entry in state.blocks.iter().filter(|b| b.op_calls < b.records) {
            let block = self.raw_block(state, entry, Columns::MOMENTS)?;
            let found = block.moments.iter().filter(|moment| such(&moment.event));
            count += found.count() as u64;
        }
        Ok(count)
    }

    /// All records of a stream, in order. After an error nothing more comes.
    pub fn records(
        &self,
        stream: StreamId,
    ) -> impl Iterator<Item = Result<(Ordinal, Record), TraceError>> + '_ {
        let blocks = self
            .streams
            .get(stream.index())
            .map_or(0, |s| s.blocks.len());
        let missing =
            (self.streams.len() <= stream.index()).then_some(Err(TraceError::NoSuchStream(stream)));
        let mut failed = false;
        let all = (0..blocks).map_while(move |index| {
            if failed {
                return None;
            }
            match self.block(stream, index, Columns::ALL) {
                Ok(block) => Some(block.records().map(Ok).collect::<Vec<_>>()),
                Err(error) => {
                    failed = true;
                    Some(vec![Err(error)])
                }
            }
        });
        missing.into_iter().chain(all.flatten())
    }
}

/// Puts late statistics into a block. With `over`, what is still pending is lost.
fn apply_late(
    block: &mut Block,
    columns: Columns,
    dictionary: &Dictionary,
    late: &HashMap<u64, Vec<Vec<LateStatistic>>>,
    over: bool,
) -> Result<(), Corrupt> {
    let mut table = block.slot_table.clone();
    let mut places: HashMap<(SignatureId, PatternId), u32> = (0u32..)
        .zip(&table)
        .map(|(i, s)| ((s.signature, s.pattern), i))
        .collect();
    let mut statistics = Vec::with_capacity(block.statistics.len());
    let mut slots = Vec::with_capacity(block.slots.len());
    let ordinals = (block.first_ordinal..)
        .zip(&block.kinds)
        .filter(|(_, k)| **k == 0)
        .map(|(o, _)| o);
    for (ordinal, ((_, call), &slot)) in ordinals.zip(block.op_calls().zip(&block.slots)) {
        let written = dictionary
            .pattern(call.pattern)
            .ok_or(Corrupt::from("a pattern is not defined"))?;
        if !written.is_pending() {
            slots.push(slot);
            statistics.extend(call.statistics);
            continue;
        }
        let (mut pattern, mut words) = (written.clone(), call.statistics.to_vec());
        for values in late.get(&ordinal).into_iter().flatten() {
            (pattern, words) = resolve(&pattern, &words, values);
        }
        if over {
            pattern = give_up(&pattern);
        }
        let id = dictionary.find_pattern(&pattern).ok_or_else(|| {
            Corrupt::from(format!(
                "the pattern of record {ordinal} after late statistics is not defined"
            ))
        })?;
        let place = *places.entry((call.signature, id)).or_insert_with(|| {
            let place = len32(table.len());
            let old = block.slot_table.get(slot as usize);
            table.push(Slot {
                signature: call.signature,
                pattern: id,
                payload: old.map_or(0, |s| s.payload),
                tensors: old.map_or(0, |s| s.tensors),
                statistics: len32(pattern.words()),
            });
            place
        });
        slots.push(place);
        statistics.extend(words);
    }
    block.slot_table = table;
    block.slots = slots;
    if columns.has(Columns::PATTERNS) {
        let patterns = block
            .slots
            .iter()
            .map(|&s| block.slot_table.get(s as usize).map_or(0, |s| s.pattern.0));
        block.patterns = patterns.collect();
    }
    if columns.has(Columns::STATISTICS) {
        block.statistics = statistics;
    }
    Ok(())
}
