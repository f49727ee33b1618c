//! Blocks: a run of records of one stream, column by column. A reader decodes the columns that it needs and no others;
//! every column has its own checksum, so that the others need not even be read.

use std::ops::BitOr;

use crate::bytes::{Cursor, add_difference, difference, len32, len64, put_varint};
use crate::column::{self, KeyWords, Largest};
use crate::error::{Corrupt, TraceError};
use crate::frame::RAW_LIMIT;
use crate::ids::{Ordinal, PatternId, SignatureId, StorageId, TensorId, ThreadId};
use crate::moments::{self, MomentColumns};
use crate::record::{Event, Moment, OpCall, Record};
use crate::table::Dictionary;

/// No block has more records.
pub(crate) const RECORDS_LIMIT: usize = 1 << 16;
/// No column of a block has more values. A signature with as many tensors as it can name still fits.
pub(crate) const WORDS_LIMIT: usize = 1 << 20;
/// Length of the number that stands before a block's head.
pub(crate) const HEAD_LENGTH: usize = 4;
/// No head is longer.
const HEAD_LIMIT: u32 = 1 << 16;

/// Columns in the file. 17 and above are for later versions, which a reader steps over.
pub(crate) mod id {
    pub(crate) const KINDS: u8 = 1;
    pub(crate) const SLOT_TABLE: u8 = 2;
    pub(crate) const SLOTS: u8 = 3;
    pub(crate) const STATISTICS: u8 = 4;
    pub(crate) const THREADS: u8 = 5;
    pub(crate) const GAPS: u8 = 6;
    pub(crate) const DURATIONS: u8 = 7;
    pub(crate) const SEQUENCE: u8 = 8;
    pub(crate) const PAYLOAD: u8 = 9;
    pub(crate) const STORAGES: u8 = 10;
    pub(crate) const TENSORS: u8 = 11;
    pub(crate) const MOMENT_TAGS: u8 = 12;
    pub(crate) const MOMENT_THREADS: u8 = 13;
    pub(crate) const MOMENT_TIMES: u8 = 14;
    pub(crate) const MOMENT_MODULES: u8 = 15;
    pub(crate) const MOMENT_OTHERS: u8 = 16;
}

/// Which columns of a block to decode. [`Block::slots`] and [`Block::slot_table`] come with every column of op calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Columns(u32);

impl Columns {
    /// None: an empty block with its head.
    pub const NONE: Self = Self(0);
    /// [`Block::kinds`].
    pub const KINDS: Self = Self(1 << 0);
    /// [`Block::slots`] and [`Block::slot_table`], the compact form of signatures and patterns.
    pub const SLOTS: Self = Self(1 << 1);
    /// [`Block::signatures`].
    pub const SIGNATURES: Self = Self(1 << 2);
    /// [`Block::patterns`].
    pub const PATTERNS: Self = Self(1 << 3);
    /// [`Block::statistics`].
    pub const STATISTICS: Self = Self(1 << 4);
    /// [`Block::threads`].
    pub const THREADS: Self = Self(1 << 5);
    /// [`Block::duration_ns`].
    pub const DURATION: Self = Self(1 << 6);
    /// [`Block::start_ns`]. Costs the durations and threads as well, from which starts are counted.
    pub const START: Self = Self(1 << 7);
    /// [`Block::sequence_numbers`].
    pub const SEQUENCE_NUMBERS: Self = Self(1 << 8);
    /// [`Block::payload`].
    pub const PAYLOAD: Self = Self(1 << 9);
    /// [`Block::storages`].
    pub const STORAGES: Self = Self(1 << 10);
    /// [`Block::tensors`].
    pub const TENSORS: Self = Self(1 << 11);
    /// [`Block::moments`].
    pub const MOMENTS: Self = Self(1 << 12);
    /// Everything.
    pub const ALL: Self = Self((1 << 13) - 1);
    /// What counters that are linear in the statistics need.
    pub const COUNTERS: Self = Self(Self::SIGNATURES.0 | Self::PATTERNS.0 | Self::STATISTICS.0);

    /// Whether any of `other`'s columns is among these.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Columns {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// One pair of signature and pattern that a block's op calls use. All calls of a slot have as many payload words, tensors and
/// statistics as the slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The structure.
    pub signature: SignatureId,
    /// The statistics.
    pub pattern: PatternId,
    /// Payload words of each call.
    pub payload: u32,
    /// Tensors of each call: 0 where the stream has no identities.
    pub tensors: u32,
    /// Statistics of each call.
    pub statistics: u32,
}

/// Decoded columns of a block. Only those that were asked for are filled; the others are empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Block {
    /// Ordinal of the first record.
    pub first_ordinal: u64,
    /// How many records there are, of all kinds.
    pub records: u32,
    /// How many of them are op calls: the length of the columns of op calls.
    pub op_calls: u32,
    /// Per record: 0 for an op call, 1 for a moment, 2 for a record of a kind that a later version has added (it is in no column).
    pub kinds: Vec<u8>,
    /// The pairs of signature and pattern, in order of first use.
    pub slot_table: Vec<Slot>,
    /// Per op call: index into `slot_table`. Always in range.
    pub slots: Vec<u32>,
    /// Per op call. Always defined in the stream's dictionary.
    pub signatures: Vec<u32>,
    /// Per op call: the pattern after late statistics have been put in. Always defined.
    pub patterns: Vec<u32>,
    /// Per op call.
    pub threads: Vec<u32>,
    /// Per op call.
    pub start_ns: Vec<u64>,
    /// Per op call.
    pub duration_ns: Vec<u64>,
    /// Per op call; -1: none.
    pub sequence_numbers: Vec<i64>,
    /// As many words per op call as its slot says.
    pub payload: Vec<u64>,
    /// As many per op call as its slot has tensors.
    pub storages: Vec<u64>,
    /// As many per op call as its slot has tensors.
    pub tensors: Vec<u64>,
    /// As many words per op call as its slot says; late ones have been put in.
    pub statistics: Vec<u64>,
    /// The records that are not op calls, in order.
    pub moments: Vec<Moment>,
}

/// Takes `length` values off the front; fewer, if there are fewer (a column that was not asked for).
fn front<'a, T>(rest: &mut &'a [T], length: usize) -> &'a [T] {
    let (mine, others) = rest.split_at_checked(length).unwrap_or((rest, &[]));
    *rest = others;
    mine
}

impl Block {
    /// The block's records, in order. Columns that were not asked for give zeros and empty lists.
    ///
    /// Needs [`Columns::KINDS`] where the block has moments.
    pub fn records(&self) -> impl Iterator<Item = (Ordinal, Record)> + '_ {
        let mut calls = self.op_calls();
        let mut moments = self.moments.iter();
        let kinds = self.kinds.iter().copied().chain(std::iter::repeat(0));
        (self.first_ordinal..)
            .map(Ordinal)
            .zip(kinds)
            .take(self.records as usize)
            .filter_map(move |(ordinal, kind)| match kind {
                0 => calls
                    .next()
                    .map(|(_, call)| (ordinal, Record::OpCall(call.to_owned()))),
                1 => moments
                    .next()
                    .map(|moment| (ordinal, Record::Other(moment.clone()))),
                _ => None,
            })
    }

    /// The op calls, in order, each with its place in the columns.
    pub fn op_calls(&self) -> impl Iterator<Item = (usize, OpCallRef<'_>)> + '_ {
        let (mut payload, mut storages) = (self.payload.as_slice(), self.storages.as_slice());
        let (mut tensors, mut statistics) = (self.tensors.as_slice(), self.statistics.as_slice());
        self.slots.iter().enumerate().filter_map(move |(i, &slot)| {
            let slot = self.slot_table.get(slot as usize)?;
            let call = OpCallRef {
                signature: slot.signature,
                pattern: slot.pattern,
                thread: ThreadId(self.threads.get(i).copied().unwrap_or(0)),
                start_ns: self.start_ns.get(i).copied().unwrap_or(0),
                duration_ns: self.duration_ns.get(i).copied().unwrap_or(0),
                sequence_number: self.sequence_numbers.get(i).copied().unwrap_or(-1),
                payload: front(&mut payload, slot.payload as usize),
                storages: front(&mut storages, slot.tensors as usize),
                tensors: front(&mut tensors, slot.tensors as usize),
                statistics: front(&mut statistics, slot.statistics as usize),
            };
            Some((i, call))
        })
    }
}

/// An op call whose lists stand elsewhere: what the writer takes and what [`Block::op_calls`] gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpCallRef<'a> {
    /// As [`OpCall::signature`].
    pub signature: SignatureId,
    /// As [`OpCall::pattern`].
    pub pattern: PatternId,
    /// As [`OpCall::thread`].
    pub thread: ThreadId,
    /// As [`OpCall::start_ns`].
    pub start_ns: u64,
    /// As [`OpCall::duration_ns`].
    pub duration_ns: u64,
    /// As [`OpCall::sequence_number`].
    pub sequence_number: i64,
    /// As [`OpCall::payload`].
    pub payload: &'a [u64],
    /// As [`OpCall::storages`].
    pub storages: &'a [u64],
    /// As [`OpCall::tensors`].
    pub tensors: &'a [u64],
    /// As [`OpCall::statistics`].
    pub statistics: &'a [u64],
}

impl OpCallRef<'_> {
    /// The call with lists of its own.
    #[must_use]
    pub fn to_owned(&self) -> OpCall {
        OpCall {
            signature: self.signature,
            pattern: self.pattern,
            thread: self.thread,
            start_ns: self.start_ns,
            duration_ns: self.duration_ns,
            sequence_number: self.sequence_number,
            payload: self.payload.to_vec(),
            storages: self.storages.iter().copied().map(StorageId).collect(),
            tensors: self.tensors.iter().copied().map(TensorId).collect(),
            statistics: self.statistics.to_vec(),
        }
    }
}

/// What stands before a block's columns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BlockHead {
    pub(crate) first_ordinal: u64,
    pub(crate) records: u32,
    pub(crate) op_calls: u32,
    /// Least time of a record.
    pub(crate) first_ns: u64,
    /// Greatest time of a record, ends of op calls included.
    pub(crate) last_ns: u64,
    /// Op calls whose pattern has something pending.
    pub(crate) pending: u32,
    /// Records that the block's drops stand for.
    pub(crate) dropped: u64,
    /// Least and greatest ordinal that the block's late statistics are for.
    pub(crate) late: Option<(u64, u64)>,
    pub(crate) columns: Vec<ColumnEntry>,
}

/// Where a column stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ColumnEntry {
    pub(crate) id: u8,
    pub(crate) compressed: bool,
    /// Bytes when decompressed.
    pub(crate) raw: u32,
    /// Bytes in the file.
    pub(crate) stored: u32,
    pub(crate) checksum: u32,
    /// Where its bytes begin, counted from the payload's first byte.
    pub(crate) at: u64,
}

impl BlockHead {
    /// The head with its length before and its checksum behind it.
    fn encode(&self) -> Vec<u8> {
        let mut head = Vec::with_capacity(256);
        put_varint(&mut head, self.first_ordinal);
        put_varint(&mut head, u64::from(self.records));
        put_varint(&mut head, u64::from(self.op_calls));
        put_varint(&mut head, self.first_ns);
        put_varint(&mut head, self.last_ns.saturating_sub(self.first_ns));
        put_varint(&mut head, u64::from(self.pending));
        put_varint(&mut head, self.dropped);
        match self.late {
            None => put_varint(&mut head, 0),
            Some((least, greatest)) => {
                put_varint(&mut head, 1);
                put_varint(&mut head, least);
                put_varint(&mut head, greatest.saturating_sub(least));
            }
        }
        put_varint(&mut head, len64(self.columns.len()));
        for column in &self.columns {
            head.push(column.id);
            head.push(u8::from(column.compressed));
            put_varint(&mut head, u64::from(column.raw));
            put_varint(&mut head, u64::from(column.stored));
            head.extend(column.checksum.to_le_bytes());
        }
        let mut out = len32(head.len()).to_le_bytes().to_vec();
        out.extend(&head);
        out.extend(crc32c::crc32c(&head).to_le_bytes());
        out
    }

    /// As the writer encodes it, for bent ones.
    #[cfg(test)]
    pub(crate) fn encode_for_tests(&self) -> Vec<u8> {
        self.encode()
    }

    /// How many bytes of the payload belong to the head, from its first [`HEAD_LENGTH`] bytes.
    pub(crate) fn length(payload: &[u8]) -> Result<usize, Corrupt> {
        let length = Cursor::new(payload).u32()?;
        if length > HEAD_LIMIT {
            return Err(Corrupt::from(format!("a block's head of {length} bytes")));
        }
        Ok(length as usize + HEAD_LENGTH + 4)
    }

    /// Decodes the head from the front of the payload, of which `payload_length` bytes are in the file.
    pub(crate) fn decode(payload: &[u8], payload_length: u32) -> Result<Self, Corrupt> {
        let total = Self::length(payload)?;
        let bytes = payload
            .get(HEAD_LENGTH..total)
            .ok_or(Corrupt::from("a block's head ends early"))?;
        let (bytes, checksum) = bytes.split_at_checked(bytes.len() - 4).unwrap_or_default();
        if Cursor::new(checksum).u32()? != crc32c::crc32c(bytes) {
            return Err(Corrupt::from("the checksum of a block's head is wrong"));
        }
        let mut cursor = Cursor::new(bytes);
        let first_ordinal = cursor.varint()?;
        let records = cursor.varint_u32()?;
        let op_calls = cursor.varint_u32()?;
        if records as usize > RECORDS_LIMIT
            || op_calls > records
            || first_ordinal.checked_add(u64::from(records)).is_none()
        {
            return Err(Corrupt::from(format!(
                "a block of {records} records, {op_calls} of them op calls, from {first_ordinal} on"
            )));
        }
        let first_ns = cursor.varint()?;
        let last_ns = first_ns.saturating_add(cursor.varint()?);
        let pending = cursor.varint_u32()?;
        let dropped = cursor.varint()?;
        let late = match cursor.varint()? {
            0 => None,
            1 => {
                let least = cursor.varint()?;
                Some((least, least.saturating_add(cursor.varint()?)))
            }
            other => {
                return Err(Corrupt::from(format!(
                    "a block's late statistics have the unknown form {other}"
                )));
            }
        };
        let count = cursor.count(8)?;
        let mut columns = Vec::with_capacity(count);
        let mut at = len64(total);
        for _ in 0..count {
            let id = cursor.u8()?;
            let encoding = cursor.u8()?;
            if encoding > 1 {
                return Err(Corrupt::from(format!(
                    "column {id} of a block has the unknown encoding {encoding}"
                )));
            }
            let raw = cursor.varint_u32()?;
            let stored = cursor.varint_u32()?;
            let checksum = cursor.u32()?;
            columns.push(ColumnEntry {
                id,
                compressed: encoding == 1,
                raw,
                stored,
                checksum,
                at,
            });
            at += u64::from(stored);
        }
        if at > u64::from(payload_length) {
            return Err(Corrupt::from("a block's columns are longer than its frame"));
        }
        // What follows in the head belongs to later minor versions.
        Ok(Self {
            first_ordinal,
            records,
            op_calls,
            first_ns,
            last_ns,
            pending,
            dropped,
            late,
            columns,
        })
    }
}

impl ColumnEntry {
    /// The column from its bytes in the file.
    pub(crate) fn decode(&self, stored: Vec<u8>) -> Result<Vec<u8>, Corrupt> {
        if crc32c::crc32c(&stored) != self.checksum {
            return Err(Corrupt::from(format!(
                "the checksum of column {} of a block is wrong",
                self.id
            )));
        }
        if self.compressed {
            column::decompress(&stored, self.raw as usize)
        } else if stored.len() == self.raw as usize {
            Ok(stored)
        } else {
            Err(Corrupt::from(format!(
                "column {} of a block has the wrong length",
                self.id
            )))
        }
    }
}

/// The records of a block that is being filled.
#[derive(Default)]
pub(crate) struct BlockBuilder {
    /// True for a moment.
    pub(crate) kinds: Vec<bool>,
    pub(crate) slot_table: Vec<Slot>,
    pub(crate) slots: Vec<u32>,
    pub(crate) threads: Vec<u32>,
    pub(crate) start_ns: Vec<u64>,
    pub(crate) duration_ns: Vec<u64>,
    pub(crate) sequence_numbers: Vec<i64>,
    pub(crate) payload: Vec<u64>,
    pub(crate) storages: Vec<u64>,
    pub(crate) tensors: Vec<u64>,
    pub(crate) statistics: Vec<u64>,
    pub(crate) moments: Vec<Moment>,
    /// Bytes that the moments' texts and lists take, roughly.
    pub(crate) moment_bytes: usize,
    pub(crate) pending: u32,
    pub(crate) dropped: u64,
    pub(crate) late: Option<(u64, u64)>,
}

/// The least time of some records and the greatest, ends of calls included; 0 where there are none.
pub(crate) fn time_span(start_ns: &[u64], duration_ns: &[u64], moments: &[Moment]) -> (u64, u64) {
    let calls = start_ns.iter().zip(duration_ns);
    let ends = calls.map(|(start, duration)| start.saturating_add(*duration));
    let times = || moments.iter().map(|moment| moment.time_ns);
    let first = start_ns.iter().copied().chain(times()).min();
    let last = ends.chain(times()).max();
    (first.unwrap_or(0), last.unwrap_or(0))
}

impl BlockBuilder {
    pub(crate) fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Whether a call with that many words may make a column too long. Half the limit, because one call alone can take the other half.
    pub(crate) fn is_full(&self) -> bool {
        let half = WORDS_LIMIT / 2;
        self.kinds.len() >= RECORDS_LIMIT
            || self.storages.len() >= half
            || self.payload.len() >= half
            || self.statistics.len() >= half
            || self.moment_bytes >= RAW_LIMIT / 8
    }

    /// Forgets the records, keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.kinds.clear();
        self.slot_table.clear();
        self.slots.clear();
        self.threads.clear();
        self.start_ns.clear();
        self.duration_ns.clear();
        self.sequence_numbers.clear();
        self.payload.clear();
        self.storages.clear();
        self.tensors.clear();
        self.statistics.clear();
        self.moments.clear();
        self.moment_bytes = 0;
        self.pending = 0;
        self.dropped = 0;
        self.late = None;
    }

    /// Appends a moment and notes what the head says about moments.
    pub(crate) fn push_moment(&mut self, moment: &Moment) {
        match &moment.event {
            Event::Drop { records, .. } => self.dropped = self.dropped.saturating_add(*records),
            Event::Statistics { call, .. } => {
                let (least, greatest) = self.late.unwrap_or((call.0, call.0));
                self.late = Some((least.min(call.0), greatest.max(call.0)));
            }
            _ => {}
        }
        self.moment_bytes += moment_bytes(moment);
        self.kinds.push(true);
        self.moments.push(moment.clone());
    }

    /// The payload of the block's frame and what its head says.
    pub(crate) fn encode(
        &self,
        first_ordinal: u64,
        zstd: &mut Compressor,
    ) -> Result<(BlockHead, Vec<u8>), TraceError> {
        let (first_ns, last_ns) = time_span(&self.start_ns, &self.duration_ns, &self.moments);
        let mut columns = ColumnSet {
            zstd,
            entries: Vec::new(),
            bytes: Vec::new(),
            raw: Vec::new(),
        };
        if !self.moments.is_empty() && !self.slots.is_empty() {
            columns.add(id::KINDS, |out| column::put_runs(&self.kinds, out))?;
        }
        if !self.slots.is_empty() {
            self.encode_calls(first_ns, &mut columns)?;
        }
        if !self.moments.is_empty() {
            let encoded = moments::encode(&self.moments, first_ns);
            columns.add_encoded(id::MOMENT_TAGS, &encoded.tags)?;
            columns.add_encoded(id::MOMENT_THREADS, &encoded.threads)?;
            columns.add_encoded(id::MOMENT_TIMES, &encoded.times)?;
            columns.add_encoded(id::MOMENT_MODULES, &encoded.modules)?;
            columns.add_encoded(id::MOMENT_OTHERS, &encoded.others)?;
        }
        let mut head = BlockHead {
            first_ordinal,
            records: len32(self.kinds.len()),
            op_calls: len32(self.slots.len()),
            first_ns,
            last_ns,
            pending: self.pending,
            dropped: self.dropped,
            late: self.late,
            columns: columns.entries,
        };
        let mut payload = head.encode();
        let mut at = len64(payload.len());
        for column in &mut head.columns {
            column.at = at;
            at += u64::from(column.stored);
        }
        payload.extend(columns.bytes);
        Ok((head, payload))
    }

    fn encode_calls(&self, first_ns: u64, columns: &mut ColumnSet<'_>) -> Result<(), TraceError> {
        let keys = SlotKeys::new(&self.slot_table);
        let slots = || self.slots.iter().map(|&s| s as usize);
        let signatures = || slots().map(|s| keys.signature_of(s));
        columns.add(id::SLOT_TABLE, |out| put_slot_table(&self.slot_table, out))?;
        columns.add(id::SLOTS, |out| column::put_small(&self.slots, out))?;
        if !self.statistics.is_empty() {
            columns.add(id::STATISTICS, |out| {
                column::put_deltas(slots(), &keys.statistics, &self.statistics, out)
            })?;
        }
        columns.add(id::THREADS, |out| column::put_small(&self.threads, out))?;
        let mut end = ThreadEnds::new(first_ns);
        let times = self
            .threads
            .iter()
            .zip(self.start_ns.iter().zip(&self.duration_ns));
        let gaps: Vec<i64> = times
            .map(|(&thread, (&start, &duration))| end.gap(thread, start, duration))
            .collect();
        columns.add(id::GAPS, |out| {
            column::put_predicted(signatures(), &gaps, keys.signatures, out)
        })?;
        let durations: Vec<i64> = self.duration_ns.iter().map(|d| d.cast_signed()).collect();
        columns.add(id::DURATIONS, |out| {
            column::put_predicted(signatures(), &durations, keys.signatures, out)
        })?;
        columns.add(id::SEQUENCE, |out| {
            column::put_sequence(&self.threads, &self.sequence_numbers, out)
        })?;
        if !self.payload.is_empty() {
            columns.add(id::PAYLOAD, |out| {
                column::put_words(signatures(), &keys.payload, &self.payload, out)
            })?;
        }
        if !self.storages.is_empty() {
            columns.add(id::STORAGES, |out| {
                column::put_ids(signatures(), &keys.tensors, &self.storages, out)
            })?;
            columns.add(id::TENSORS, |out| {
                column::put_ids(signatures(), &keys.tensors, &self.tensors, out)
            })?;
        }
        Ok(())
    }
}

/// What a moment takes in its column, roughly and at most.
fn moment_bytes(moment: &Moment) -> usize {
    const PLAIN: usize = 48;
    PLAIN
        + match &moment.event {
            Event::ModuleEnter {
                arguments: tensors, ..
            }
            | Event::ModuleExit {
                results: tensors, ..
            } => 10 * tensors.len(),
            Event::Statistics { values, .. } => {
                values.iter().map(|v| 24 + 10 * v.values.len()).sum()
            }
            Event::Fact { value: text, .. }
            | Event::Disabled { reason: text }
            | Event::Mark { text } => text.len(),
            _ => 0,
        }
}

/// Whether a moment fits into a block at all.
pub(crate) fn moment_fits(moment: &Moment) -> bool {
    moment_bytes(moment) <= RAW_LIMIT / 4
}

/// The compressor that all frames of a writer share, and its buffer: a fresh one for every column would cost more in page faults
/// than compressing does.
pub(crate) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new() -> Result<Self, TraceError> {
        let zstd = zstd::bulk::Compressor::new(column::ZSTD_LEVEL)
            .map_err(|e| TraceError::Encode(e.to_string()))?;
        Ok(Self {
            zstd,
            buffer: Vec::new(),
        })
    }

    /// The bytes compressed, or `None` where that does not make them fewer.
    pub(crate) fn compress(&mut self, raw: &[u8]) -> Result<Option<&[u8]>, TraceError> {
        const WORTH_IT: usize = 16;
        if raw.len() < WORTH_IT {
            return Ok(None);
        }
        self.buffer.clear();
        self.buffer
            .reserve(zstd::zstd_safe::compress_bound(raw.len()));
        self.zstd
            .compress_to_buffer(raw, &mut self.buffer)
            .map_err(|e| TraceError::Encode(e.to_string()))?;
        Ok((self.buffer.len() < raw.len()).then_some(self.buffer.as_slice()))
    }
}

struct ColumnSet<'a> {
    zstd: &'a mut Compressor,
    entries: Vec<ColumnEntry>,
    bytes: Vec<u8>,
    raw: Vec<u8>,
}

impl ColumnSet<'_> {
    fn add(&mut self, id: u8, put: impl FnOnce(&mut Vec<u8>)) -> Result<(), TraceError> {
        let mut raw = std::mem::take(&mut self.raw);
        raw.clear();
        put(&mut raw);
        let added = self.add_encoded(id, &raw);
        self.raw = raw;
        added
    }

    /// Empty columns are left out.
    fn add_encoded(&mut self, id: u8, raw: &[u8]) -> Result<(), TraceError> {
        if raw.is_empty() {
            return Ok(());
        }
        let compressed = self.zstd.compress(raw)?;
        let stored = compressed.unwrap_or(raw);
        self.entries.push(ColumnEntry {
            id,
            compressed: compressed.is_some(),
            raw: len32(raw.len()),
            stored: len32(stored.len()),
            checksum: crc32c::crc32c(stored),
            at: 0,
        });
        self.bytes.extend(stored);
        Ok(())
    }
}

/// The pairs of signature and pattern: a count, then for each the signature's zigzag difference to the one before and the pattern.
fn put_slot_table(table: &[Slot], out: &mut Vec<u8>) {
    put_varint(out, len64(table.len()));
    let mut before = 0u64;
    for slot in table {
        let signature = u64::from(slot.signature.0);
        put_varint(out, difference(signature, before));
        put_varint(out, u64::from(slot.pattern.0));
        before = signature;
    }
}

fn slot_table(
    bytes: &[u8],
    op_calls: usize,
    dictionary: &Dictionary,
    identities: bool,
) -> Result<Vec<Slot>, Corrupt> {
    let mut cursor = Cursor::new(bytes);
    let count = cursor.count(2)?;
    // Every slot has a call, so that neither the table nor what is remembered per word is longer than the columns.
    if count > op_calls {
        return Err(Corrupt::from(format!(
            "a block has {count} slots for {op_calls} op calls"
        )));
    }
    let mut table = Vec::with_capacity(count);
    let mut before = 0u64;
    for _ in 0..count {
        before = add_difference(before, cursor.varint()?);
        let signature = SignatureId(
            u32::try_from(before)
                .map_err(|_| Corrupt::from("a signature's id is larger than 32 bits"))?,
        );
        let pattern = PatternId(cursor.varint_u32()?);
        let (payload, tensors) = dictionary.signature_words(signature).ok_or_else(|| {
            Corrupt::from(format!(
                "a block uses signature {signature}, which is not defined"
            ))
        })?;
        let statistics = dictionary
            .pattern_kinds(pattern)
            .map(|kinds| len32(kinds.len()))
            .ok_or_else(|| {
                Corrupt::from(format!(
                    "a block uses pattern {pattern}, which is not defined"
                ))
            })?;
        table.push(Slot {
            signature,
            pattern,
            payload,
            tensors: if identities { tensors } else { 0 },
            statistics,
        });
    }
    for words in [
        |s: &Slot| s.payload,
        |s: &Slot| s.tensors,
        |s: &Slot| s.statistics,
    ] {
        if table.iter().map(|s| u64::from(words(s))).sum::<u64>() > WORDS_LIMIT as u64 {
            return Err(Corrupt::from(
                "the slots of a block have more words than a block can have",
            ));
        }
    }
    if cursor.is_empty() {
        Ok(table)
    } else {
        Err(Corrupt::from("a slot table has bytes left over"))
    }
}

/// The keys by which columns are predicted: a call's slot, or its signature's place among the block's signatures.
struct SlotKeys {
    by_slot: Vec<usize>,
    signatures: usize,
    payload: KeyWords,
    tensors: KeyWords,
    statistics: KeyWords,
}

impl SlotKeys {
    fn new(table: &[Slot]) -> Self {
        let mut places = std::collections::HashMap::with_capacity(table.len());
        let mut firsts: Vec<&Slot> = Vec::new();
        let by_slot = table
            .iter()
            .map(|slot| {
                *places.entry(slot.signature.0).or_insert_with(|| {
                    firsts.push(slot);
                    firsts.len() - 1
                })
            })
            .collect();
        Self {
            by_slot,
            signatures: firsts.len(),
            payload: KeyWords::new(firsts.iter().map(|s| s.payload as usize)),
            tensors: KeyWords::new(firsts.iter().map(|s| s.tensors as usize)),
            statistics: KeyWords::new(table.iter().map(|s| s.statistics as usize)),
        }
    }

    #[inline]
    fn signature_of(&self, slot: usize) -> usize {
        self.by_slot.get(slot).copied().unwrap_or(0)
    }
}

/// Where the last op call of each thread ended: what gaps are counted from.
struct ThreadEnds {
    first_ns: u64,
    /// Minus `first_ns`, so that a new thread's is 0.
    ends: Largest,
}

impl ThreadEnds {
    fn new(first_ns: u64) -> Self {
        Self {
            first_ns,
            ends: Largest::default(),
        }
    }

    fn gap(&mut self, thread: u32, start: u64, duration: u64) -> i64 {
        let start = start.wrapping_sub(self.first_ns);
        let end = self.ends.of(thread);
        let gap = start.wrapping_sub(*end).cast_signed();
        *end = start.wrapping_add(duration);
        gap
    }

    fn start(&mut self, thread: u32, gap: i64, duration: u64) -> u64 {
        let end = self.ends.of(thread);
        let start = end.wrapping_add(gap.cast_unsigned());
        *end = start.wrapping_add(duration);
        start.wrapping_add(self.first_ns)
    }
}

/// Decodes the wanted columns of a block. `fetch` gives a column's bytes as they stand in the file; `offset` is the
/// frame's place, for messages. Late statistics are not applied here.
pub(crate) fn decode(
    head: &BlockHead,
    wanted: Columns,
    dictionary: &Dictionary,
    identities: bool,
    offset: u64,
    mut fetch: impl FnMut(&ColumnEntry) -> Result<Vec<u8>, TraceError>,
) -> Result<Block, TraceError> {
    let at = |corrupt: Corrupt| corrupt.at(offset);
    let mut optional = |id: u8| -> Result<Option<Vec<u8>>, TraceError> {
        match head.columns.iter().find(|c| c.id == id) {
            None => Ok(None),
            Some(entry) => Ok(Some(entry.decode(fetch(entry)?).map_err(|e| e.at(offset))?)),
        }
    };
    let mut column = |id: u8| -> Result<Vec<u8>, TraceError> {
        optional(id)?.ok_or_else(|| Corrupt::from(format!("a block has no column {id}")).at(offset))
    };
    let records = head.records as usize;
    let op_calls = head.op_calls as usize;
    let moment_count = records - op_calls;
    let mut block = Block {
        first_ordinal: head.first_ordinal,
        records: head.records,
        op_calls: head.op_calls,
        ..Block::default()
    };

    if wanted.has(Columns::KINDS) || (wanted.has(Columns::MOMENTS) && moment_count > 0) {
        block.kinds = match (op_calls, moment_count) {
            (_, 0) => vec![0; records],
            (0, _) => vec![1; records],
            _ => column::runs(&column(id::KINDS)?, records).map_err(at)?,
        };
        if block.kinds.iter().filter(|&&k| k == 0).count() != op_calls {
            return Err(at(Corrupt::from(
                "a block's kinds and its number of op calls disagree",
            )));
        }
    }
    if wanted.has(Columns::MOMENTS) && moment_count > 0 {
        let columns = MomentColumns {
            tags: column(id::MOMENT_TAGS)?,
            threads: column(id::MOMENT_THREADS)?,
            times: column(id::MOMENT_TIMES)?,
            modules: if head.columns.iter().any(|c| c.id == id::MOMENT_MODULES) {
                column(id::MOMENT_MODULES)?
            } else {
                Vec::new()
            },
            others: if head.columns.iter().any(|c| c.id == id::MOMENT_OTHERS) {
                column(id::MOMENT_OTHERS)?
            } else {
                Vec::new()
            },
        };
        if columns.tags.len() != moment_count {
            return Err(at(Corrupt::from(
                "a block's tags and its number of moments disagree",
            )));
        }
        let moments = moments::decode(&columns, head.first_ns).map_err(at)?;
        for (kind, moment) in block.kinds.iter_mut().filter(|k| **k == 1).zip(&moments) {
            *kind = if moment.is_some() { 1 } else { 2 };
        }
        block.moments = moments.into_iter().flatten().collect();
    }
    if op_calls == 0 || !wanted.has(CALL_COLUMNS) {
        return Ok(block);
    }

    block.slot_table =
        slot_table(&column(id::SLOT_TABLE)?, op_calls, dictionary, identities).map_err(at)?;
    block.slots = column::small(&column(id::SLOTS)?, op_calls).map_err(at)?;
    let most = block.slots.iter().fold(0, |a, &b| a.max(b)) as usize;
    if most >= block.slot_table.len() {
        return Err(at(Corrupt::from(format!(
            "a block uses slot {most} of {}",
            block.slot_table.len()
        ))));
    }
    let table = &block.slot_table;
    let slots = || block.slots.iter().map(|&s| s as usize);
    let by_slot = |of: fn(&Slot) -> u32| table.iter().map(of).collect::<Vec<u32>>();
    let gather = |values: &[u32]| {
        slots()
            .map(|s| values.get(s).copied().unwrap_or(0))
            .collect::<Vec<u32>>()
    };
    let total = |of: fn(&Slot) -> u32| {
        let words = by_slot(of);
        let sum: u64 = slots()
            .map(|s| u64::from(words.get(s).copied().unwrap_or(0)))
            .sum();
        usize::try_from(sum)
            .ok()
            .filter(|&n| n <= WORDS_LIMIT)
            .ok_or_else(|| {
                Corrupt::from(format!("a column of a block has {sum} values")).at(offset)
            })
    };
    if wanted.has(Columns::SIGNATURES) {
        block.signatures = gather(&by_slot(|s| s.signature.0));
    }
    if wanted.has(Columns::PATTERNS) {
        block.patterns = gather(&by_slot(|s| s.pattern.0));
    }
    let keys = SlotKeys::new(table);
    let signatures = || slots().map(|s| keys.signature_of(s));
    if wanted.has(Columns::STATISTICS) {
        let count = total(|s| s.statistics)?;
        if count > 0 {
            block.statistics =
                column::deltas(&column(id::STATISTICS)?, slots(), &keys.statistics, count)
                    .map_err(at)?;
        }
    }
    let with_threads = Columns::THREADS | Columns::START | Columns::SEQUENCE_NUMBERS;
    let threads = if wanted.has(with_threads) {
        column::small(&column(id::THREADS)?, op_calls).map_err(at)?
    } else {
        Vec::new()
    };
    if wanted.has(Columns::DURATION | Columns::START) {
        let durations = column::predicted(
            &column(id::DURATIONS)?,
            signatures(),
            op_calls,
            keys.signatures,
        )
        .map_err(at)?;
        block.duration_ns = durations.into_iter().map(i64::cast_unsigned).collect();
    }
    if wanted.has(Columns::START) {
        let gaps = column::predicted(&column(id::GAPS)?, signatures(), op_calls, keys.signatures)
            .map_err(at)?;
        let mut ends = ThreadEnds::new(head.first_ns);
        let calls = threads.iter().zip(gaps.iter().zip(&block.duration_ns));
        block.start_ns = calls
            .map(|(&thread, (&gap, &duration))| ends.start(thread, gap, duration))
            .collect();
    }
    if wanted.has(Columns::SEQUENCE_NUMBERS) {
        block.sequence_numbers = column::sequence(&column(id::SEQUENCE)?, &threads).map_err(at)?;
    }
    if wanted.has(Columns::PAYLOAD) {
        let count = total(|s| s.payload)?;
        if count > 0 {
            block.payload =
                column::words(&column(id::PAYLOAD)?, signatures(), &keys.payload, count)
                    .map_err(at)?;
        }
    }
    if wanted.has(Columns::STORAGES | Columns::TENSORS) {
        let count = total(|s| s.tensors)?;
        if count > 0 && wanted.has(Columns::STORAGES) {
            block.storages =
                column::ids(&column(id::STORAGES)?, signatures(), &keys.tensors, count)
                    .map_err(at)?;
        }
        if count > 0 && wanted.has(Columns::TENSORS) {
            block.tensors = column::ids(&column(id::TENSORS)?, signatures(), &keys.tensors, count)
                .map_err(at)?;
        }
    }
    block.threads = threads;
    Ok(block)
}

/// All columns of op calls.
const CALL_COLUMNS: Columns = Columns(Columns::ALL.0 & !Columns::KINDS.0 & !Columns::MOMENTS.0);
