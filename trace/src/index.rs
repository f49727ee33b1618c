//! The index of a finished file: where the frames of each stream stand, so that opening it reads no block.

use std::ops::Range;

use crate::block::BlockHead;
use crate::bytes::{Cursor, len64, put_varint};
use crate::error::Corrupt;
use crate::frame::END_MAGIC;
use crate::summary::SummaryHead;
use crate::values::ValuesIndex;

/// So many entries make an index frame.
pub(crate) const ENTRIES_PER_FRAME: usize = 1024;

/// Where a block stands and what its head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockIndex {
    /// Ordinal of the first record.
    pub first_ordinal: u64,
    /// How many records there are.
    pub records: u32,
    /// How many of them are op calls.
    pub op_calls: u32,
    /// Least time of a record, nanoseconds since the stream's start.
    pub first_ns: u64,
    /// Greatest time of a record, ends of op calls included.
    pub last_ns: u64,
    /// Where the frame begins in the file.
    pub offset: u64,
    /// Length of the frame in the file.
    pub bytes: u32,
    /// Op calls that were written with something pending.
    pub pending: u32,
    /// Records that the block's drops stand for.
    pub dropped: u64,
    /// Least and greatest ordinal that the block's late statistics are for.
    pub(crate) late: Option<(u64, u64)>,
}

impl BlockIndex {
    pub(crate) fn new(head: &BlockHead, offset: u64, bytes: u32) -> Self {
        Self {
            first_ordinal: head.first_ordinal,
            records: head.records,
            op_calls: head.op_calls,
            first_ns: head.first_ns,
            last_ns: head.last_ns,
            offset,
            bytes,
            pending: head.pending,
            dropped: head.dropped,
            late: head.late,
        }
    }

    /// The ordinals of the block's records.
    #[must_use]
    pub fn ordinals(&self) -> Range<u64> {
        self.first_ordinal..self.first_ordinal.saturating_add(u64::from(self.records))
    }
}

/// Where a summary stands and what it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SummaryIndex {
    /// 0 covers whole blocks; 16 of one level make one of the next; 255 covers the whole stream.
    pub level: u8,
    /// First ordinal that it covers.
    pub first_ordinal: u64,
    /// How many records it covers.
    pub records: u64,
    /// Where the frame begins in the file.
    pub offset: u64,
}

impl SummaryIndex {
    pub(crate) const fn new(head: SummaryHead, offset: u64) -> Self {
        Self {
            level: head.level,
            first_ordinal: head.first_ordinal,
            records: head.records,
            offset,
        }
    }

    /// The ordinals that it covers.
    #[must_use]
    pub const fn ordinals(&self) -> Range<u64> {
        self.first_ordinal..self.first_ordinal.saturating_add(self.records)
    }
}

/// The entries of an index frame, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IndexChunk {
    pub(crate) definitions: Vec<u64>,
    pub(crate) blocks: Vec<BlockIndex>,
    pub(crate) summaries: Vec<SummaryIndex>,
    pub(crate) values: Vec<ValuesIndex>,
}

impl IndexChunk {
    pub(crate) fn len(&self) -> usize {
        self.definitions.len() + self.blocks.len() + self.summaries.len() + self.values.len()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_offsets(&mut out, &self.definitions);
        put_varint(&mut out, len64(self.blocks.len()));
        let first = self
            .blocks
            .first()
            .map_or((0, 0), |b| (b.first_ordinal, b.first_ns));
        put_varint(&mut out, first.0);
        let mut offset = 0;
        let mut time = 0u64;
        for block in &self.blocks {
            put_varint(&mut out, u64::from(block.records));
            put_varint(&mut out, u64::from(block.op_calls));
            put_varint(&mut out, crate::bytes::difference(block.first_ns, time));
            time = block.first_ns;
            put_varint(&mut out, block.last_ns.saturating_sub(block.first_ns));
            put_varint(&mut out, block.offset - offset);
            offset = block.offset;
            put_varint(&mut out, u64::from(block.bytes));
            put_varint(&mut out, u64::from(block.pending));
            put_varint(&mut out, block.dropped);
            match block.late {
                None => put_varint(&mut out, 0),
                Some((least, greatest)) => {
                    put_varint(&mut out, 1);
                    put_varint(&mut out, least);
                    put_varint(&mut out, greatest.saturating_sub(least));
                }
            }
        }
        put_varint(&mut out, len64(self.summaries.len()));
        let mut offset = 0;
        for summary in &self.summaries {
            out.push(summary.level);
            put_varint(&mut out, summary.first_ordinal);
            put_varint(&mut out, summary.records);
            put_varint(&mut out, summary.offset - offset);
            offset = summary.offset;
        }
        if self.values.is_empty() {
            return out;
        }
        put_varint(&mut out, len64(self.values.len()));
        let mut offset = 0;
        for values in &self.values {
            put_varint(&mut out, values.offset - offset);
            offset = values.offset;
            put_varint(&mut out, values.count);
            put_varint(&mut out, values.first_ordinal);
            put_varint(&mut out, values.last_ordinal - values.first_ordinal);
        }
        out
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, Corrupt> {
        let mut cursor = Cursor::new(payload);
        let definitions = offsets(&mut cursor)?;
        let count = cursor.count(9)?;
        let mut first_ordinal = cursor.varint()?;
        let mut offset = 0u64;
        let mut first_ns = 0u64;
        let mut blocks = Vec::with_capacity(count);
        for _ in 0..count {
            let records = cursor.varint_u32()?;
            let op_calls = cursor.varint_u32()?;
            first_ns = crate::bytes::add_difference(first_ns, cursor.varint()?);
            let last_ns = first_ns.saturating_add(cursor.varint()?);
            offset = offset.saturating_add(cursor.varint()?);
            let bytes = cursor.varint_u32()?;
            let pending = cursor.varint_u32()?;
            let dropped = cursor.varint()?;
            let late = match cursor.varint()? {
                0 => None,
                1 => {
                    let least = cursor.varint()?;
                    Some((least, least.saturating_add(cursor.varint()?)))
                }
                _ => return Err(Corrupt::from("an index entry has an unknown form")),
            };
            blocks.push(BlockIndex {
                first_ordinal,
                records,
                op_calls,
                first_ns,
                last_ns,
                offset,
                bytes,
                pending,
                dropped,
                late,
            });
            first_ordinal = first_ordinal.saturating_add(u64::from(records));
        }
        let count = cursor.count(4)?;
        let mut offset = 0u64;
        let mut summaries = Vec::with_capacity(count);
        for _ in 0..count {
            let head = SummaryHead::decode(&mut cursor)?;
            offset = offset.saturating_add(cursor.varint()?);
            summaries.push(SummaryIndex::new(head, offset));
        }
        // Absent where there are none. What follows belongs to later minor versions.
        let count = if cursor.is_empty() {
            0
        } else {
            cursor.count(4)?
        };
        let mut offset = 0u64;
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            offset = offset.saturating_add(cursor.varint()?);
            let count = cursor.varint()?;
            let first_ordinal = cursor.varint()?;
            values.push(ValuesIndex {
                offset,
                count,
                first_ordinal,
                last_ordinal: first_ordinal.saturating_add(cursor.varint()?),
            });
        }
        Ok(Self {
            definitions,
            blocks,
            summaries,
            values,
        })
    }
}

fn put_offsets(out: &mut Vec<u8>, offsets: &[u64]) {
    put_varint(out, len64(offsets.len()));
    let mut before = 0;
    for &offset in offsets {
        put_varint(out, offset - before);
        before = offset;
    }
}

fn offsets(cursor: &mut Cursor<'_>) -> Result<Vec<u64>, Corrupt> {
    let count = cursor.count(1)?;
    let mut offset = 0u64;
    (0..count)
        .map(|_| {
            offset = offset.saturating_add(cursor.varint()?);
            Ok(offset)
        })
        .collect()
}

/// The footer: where everything is that the index does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Footer {
    /// Where the frame of the run's end stands.
    pub(crate) run_end: u64,
    /// By stream id.
    pub(crate) streams: Vec<FooterStream>,
}

/// A stream in the footer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FooterStream {
    pub(crate) begin: u64,
    pub(crate) end: Option<u64>,
    pub(crate) records: u64,
    /// Its index frames, in order.
    pub(crate) index: Vec<u64>,
}

/// Length of what ends every finished file: the footer frame's offset and [`END_MAGIC`].
pub(crate) const TRAILER: usize = 16;

impl Footer {
    /// The footer's payload; its frame stands at `offset`.
    pub(crate) fn encode(&self, offset: u64) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.run_end);
        put_varint(&mut out, len64(self.streams.len()));
        for stream in &self.streams {
            put_varint(&mut out, stream.begin);
            put_varint(&mut out, stream.end.map_or(0, |e| e));
            put_varint(&mut out, stream.records);
            put_offsets(&mut out, &stream.index);
        }
        out.extend(offset.to_le_bytes());
        out.extend(END_MAGIC);
        out
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, Corrupt> {
        let mut cursor = Cursor::new(payload);
        let run_end = cursor.varint()?;
        let count = cursor.count(4)?;
        let mut streams = Vec::with_capacity(count);
        for _ in 0..count {
            let begin = cursor.varint()?;
            let end = Some(cursor.varint()?).filter(|&e| e != 0);
            let records = cursor.varint()?;
            streams.push(FooterStream {
                begin,
                end,
                records,
                index: offsets(&mut cursor)?,
            });
        }
        Ok(Self { run_end, streams })
    }

    /// The footer frame's offset, from the last [`TRAILER`] bytes of a file.
    pub(crate) fn find(last_bytes: &[u8]) -> Option<u64> {
        let mut cursor = Cursor::new(last_bytes);
        let offset = cursor.u64().ok()?;
        (cursor.rest() == END_MAGIC).then_some(offset)
    }
}
