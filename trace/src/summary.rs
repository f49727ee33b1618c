//! Sums over ranges of records, keyed by signature and pattern: what counters that are linear in the statistics replay from.

use std::collections::HashMap;
use std::sync::Arc;

use crate::block::{Block, Compressor};
use crate::bytes::{Cursor, add_difference, difference, len32, len64, put_varint};
use crate::error::{Corrupt, TraceError};
use crate::ids::{PatternId, SignatureId};
use crate::table::{Dictionary, WordKind};

/// A summary of the lowest level covers whole blocks of at least this many records together.
pub(crate) const PIECE_RECORDS: u64 = 1 << 16;
/// So many summaries of one level make one of the next.
pub(crate) const FACTOR: usize = 16;
/// The level of the summary of a whole stream.
pub(crate) const WHOLE: u8 = 255;

/// Sums over the calls of one signature with one pattern.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SummaryRow {
    /// The structure.
    pub signature: SignatureId,
    /// The statistics, after late ones have been put in.
    pub pattern: PatternId,
    /// How many calls.
    pub calls: u64,
    /// The sum of their durations.
    pub duration_ns: u64,
    /// The sums of the pattern's integer words, in the pattern's order.
    pub integer_sums: Vec<u128>,
    /// The sums of the pattern's float words, in the pattern's order; of minima the least, of maxima the greatest (NaN if any is).
    pub float_sums: Vec<f64>,
}

impl SummaryRow {
    fn new(signature: SignatureId, pattern: PatternId, kinds: &[WordKind]) -> Self {
        let integers = kinds.iter().filter(|&&k| k == WordKind::Integer).count();
        let floats = kinds
            .iter()
            .filter(|&&k| k != WordKind::Integer)
            .map(|&k| start(k))
            .collect();
        Self {
            signature,
            pattern,
            integer_sums: vec![0; integers],
            float_sums: floats,
            ..Self::default()
        }
    }

    #[inline]
    fn add_call(&mut self, kinds: &[WordKind], duration_ns: u64, words: &[u64]) {
        self.calls += 1;
        self.duration_ns = self.duration_ns.wrapping_add(duration_ns);
        let mut integers = self.integer_sums.iter_mut();
        let mut floats = self.float_sums.iter_mut();
        for (&kind, &word) in kinds.iter().zip(words) {
            if kind == WordKind::Integer {
                if let Some(sum) = integers.next() {
                    *sum = sum.wrapping_add(u128::from(word));
                }
            } else if let Some(sum) = floats.next() {
                *sum = combine(kind, *sum, f64::from_bits(word));
            }
        }
    }

    /// Whether the rows say the same. Sums of floats depend on the order of adding, so those only nearly.
    pub(crate) fn agrees(&self, other: &Self) -> bool {
        let near = |(a, b): (&f64, &f64)| {
            a == b
                || (a.is_nan() && b.is_nan())
                || (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0)
        };
        (self.signature, self.pattern, self.calls, self.duration_ns)
            == (
                other.signature,
                other.pattern,
                other.calls,
                other.duration_ns,
            )
            && self.integer_sums == other.integer_sums
            && self.float_sums.len() == other.float_sums.len()
            && self.float_sums.iter().zip(&other.float_sums).all(near)
    }

    fn add_row(&mut self, kinds: &[WordKind], other: &Self) {
        self.calls = self.calls.wrapping_add(other.calls);
        self.duration_ns = self.duration_ns.wrapping_add(other.duration_ns);
        for (sum, &more) in self.integer_sums.iter_mut().zip(&other.integer_sums) {
            *sum = sum.wrapping_add(more);
        }
        let float_kinds = kinds.iter().filter(|&&k| k != WordKind::Integer);
        for ((sum, &more), &kind) in self
            .float_sums
            .iter_mut()
            .zip(&other.float_sums)
            .zip(float_kinds)
        {
            *sum = combine(kind, *sum, more);
        }
    }
}

/// What combining begins with.
const fn start(kind: WordKind) -> f64 {
    match kind {
        WordKind::Integer | WordKind::Float => 0.0,
        WordKind::Minimum => f64::INFINITY,
        WordKind::Maximum => f64::NEG_INFINITY,
    }
}

fn combine(kind: WordKind, a: f64, b: f64) -> f64 {
    match kind {
        WordKind::Integer | WordKind::Float => a + b,
        _ if a.is_nan() || b.is_nan() => f64::NAN,
        WordKind::Minimum => a.min(b),
        WordKind::Maximum => a.max(b),
    }
}

/// Gives the kinds of a pattern's words.
pub(crate) trait Patterns {
    fn kinds(&self, pattern: PatternId) -> Option<&Arc<[WordKind]>>;
}

impl Patterns for Dictionary {
    fn kinds(&self, pattern: PatternId) -> Option<&Arc<[WordKind]>> {
        self.pattern_kinds(pattern)
    }
}

/// Rows being summed up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    places: HashMap<(u32, u32), usize>,
    rows: Vec<(SummaryRow, Arc<[WordKind]>)>,
}

impl Rows {
    fn place(
        &mut self,
        signature: SignatureId,
        pattern: PatternId,
        patterns: &impl Patterns,
    ) -> usize {
        *self
            .places
            .entry((signature.0, pattern.0))
            .or_insert_with(|| {
                let kinds = patterns.kinds(pattern).cloned().unwrap_or_default();
                self.rows
                    .push((SummaryRow::new(signature, pattern, &kinds), kinds));
                self.rows.len() - 1
            })
    }

    /// Adds one call.
    pub(crate) fn add_call(
        &mut self,
        signature: SignatureId,
        pattern: PatternId,
        duration_ns: u64,
        words: &[u64],
        patterns: &impl Patterns,
    ) {
        let place = self.place(signature, pattern, patterns);
        if let Some((row, kinds)) = self.rows.get_mut(place) {
            row.add_call(kinds, duration_ns, words);
        }
    }

    /// Adds calls of a block's slots: `calls` gives slot, duration and words of each.
    pub(crate) fn add_calls<'a>(
        &mut self,
        slots: impl Iterator<Item = (SignatureId, PatternId)>,
        calls: impl Iterator<Item = (u32, u64, &'a [u64])>,
        patterns: &impl Patterns,
    ) {
        // A slot that no call uses must not make a row, so places are looked up when a call comes.
        let mut places: Vec<(SignatureId, PatternId, Option<usize>)> =
            slots.map(|(s, p)| (s, p, None)).collect();
        for (slot, duration_ns, words) in calls {
            let Some((signature, pattern, place)) = places.get_mut(slot as usize) else {
                continue;
            };
            let place = *place.get_or_insert_with(|| self.place(*signature, *pattern, patterns));
            if let Some((row, kinds)) = self.rows.get_mut(place) {
                row.add_call(kinds, duration_ns, words);
            }
        }
    }

    /// Adds the calls of a block that `wanted` (places in the block's columns) names.
    pub(crate) fn add_block(
        &mut self,
        block: &Block,
        wanted: &std::ops::Range<usize>,
        patterns: &impl Patterns,
    ) {
        let slots = block.slot_table.iter().map(|s| (s.signature, s.pattern));
        let calls = block.op_calls().filter(|(i, _)| wanted.contains(i));
        let calls = calls.map(|(i, call)| {
            (
                block.slots.get(i).copied().unwrap_or(0),
                call.duration_ns,
                call.statistics,
            )
        });
        self.add_calls(slots, calls, patterns);
    }

    /// Adds rows.
    pub(crate) fn add_rows<'a>(
        &mut self,
        rows: impl Iterator<Item = &'a SummaryRow>,
        patterns: &impl Patterns,
    ) {
        for other in rows {
            let place = self.place(other.signature, other.pattern, patterns);
            if let Some((row, kinds)) = self.rows.get_mut(place) {
                row.add_row(kinds, other);
            }
        }
    }

    /// The rows, by signature, then pattern.
    pub(crate) fn into_sorted(self) -> Vec<SummaryRow> {
        let mut rows: Vec<SummaryRow> = self.rows.into_iter().map(|(row, _)| row).collect();
        rows.sort_unstable_by_key(|r| (r.signature, r.pattern));
        rows
    }
}

/// What a summary frame says besides its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SummaryHead {
    pub(crate) level: u8,
    pub(crate) first_ordinal: u64,
    pub(crate) records: u64,
}

impl SummaryHead {
    pub(crate) fn decode(cursor: &mut Cursor<'_>) -> Result<Self, Corrupt> {
        let level = cursor.u8()?;
        let first_ordinal = cursor.varint()?;
        let records = cursor.varint()?;
        if first_ordinal.checked_add(records).is_none() {
            return Err(Corrupt::from(
                "a summary covers more records than there can be",
            ));
        }
        Ok(Self {
            level,
            first_ordinal,
            records,
        })
    }
}

/// The lower and the upper 64 bits.
#[expect(
    clippy::cast_possible_truncation,
    reason = "cutting it into halves is the point"
)]
const fn halves(sum: u128) -> [u64; 2] {
    [sum as u64, (sum >> 64) as u64]
}

/// The payload of a summary frame, before compression.
pub(crate) fn encode(head: SummaryHead, rows: &[SummaryRow]) -> Vec<u8> {
    let mut out = vec![head.level];
    put_varint(&mut out, head.first_ordinal);
    put_varint(&mut out, head.records);
    put_varint(&mut out, len64(rows.len()));
    let mut before = 0u64;
    for row in rows {
        let signature = u64::from(row.signature.0);
        put_varint(&mut out, difference(signature, before));
        before = signature;
        put_varint(&mut out, u64::from(row.pattern.0));
        put_varint(&mut out, row.calls);
        put_varint(&mut out, row.duration_ns);
        for &sum in &row.integer_sums {
            let [low, high] = halves(sum);
            put_varint(&mut out, low);
            put_varint(&mut out, high);
        }
        for sum in &row.float_sums {
            out.extend(sum.to_bits().to_le_bytes());
        }
    }
    out
}

/// Decodes the payload of a summary frame.
pub(crate) fn decode(
    payload: &[u8],
    dictionary: &Dictionary,
) -> Result<(SummaryHead, Vec<SummaryRow>), Corrupt> {
    let mut cursor = Cursor::new(payload);
    let head = SummaryHead::decode(&mut cursor)?;
    let count = cursor.count(4)?;
    let mut rows = Vec::with_capacity(count);
    let mut before = 0u64;
    for _ in 0..count {
        before = add_difference(before, cursor.varint()?);
        let signature = SignatureId(
            u32::try_from(before)
                .map_err(|_| Corrupt::from("a signature's id is larger than 32 bits"))?,
        );
        let pattern = PatternId(cursor.varint_u32()?);
        if dictionary.signature(signature).is_none() {
            return Err(Corrupt::from(format!(
                "a summary uses signature {signature}, which is not defined"
            )));
        }
        let kinds = dictionary.pattern_kinds(pattern).ok_or_else(|| {
            Corrupt::from(format!(
                "a summary uses pattern {pattern}, which is not defined"
            ))
        })?;
        if kinds.len() > cursor.rest().len() {
            return Err(Corrupt::from("a summary's row ends early"));
        }
        let calls = cursor.varint()?;
        let duration_ns = cursor.varint()?;
        let integers = kinds.iter().filter(|&&k| k == WordKind::Integer).count();
        let integer_sums = (0..integers)
            .map(|_| Ok(u128::from(cursor.varint()?) | u128::from(cursor.varint()?) << 64))
            .collect::<Result<_, Corrupt>>()?;
        let float_sums = (integers..kinds.len())
            .map(|_| Ok(f64::from_bits(cursor.u64()?)))
            .collect::<Result<_, Corrupt>>()?;
        rows.push(SummaryRow {
            signature,
            pattern,
            calls,
            duration_ns,
            integer_sums,
            float_sums,
        });
    }
    if cursor.is_empty() {
        Ok((head, rows))
    } else {
        Err(Corrupt::from("a summary has bytes left over"))
    }
}

/// Wraps a payload for a frame with [`crate::frame::COMPRESSED`], if that makes it shorter.
pub(crate) fn pack(raw: Vec<u8>, zstd: &mut Compressor) -> Result<(u8, Vec<u8>), TraceError> {
    const WORTH_IT: usize = 128;
    if raw.len() < WORTH_IT {
        return Ok((0, raw));
    }
    match zstd.compress(&raw)? {
        Some(compressed) if compressed.len() + 4 < raw.len() => {
            let mut out = len32(raw.len()).to_le_bytes().to_vec();
            out.extend(compressed);
            Ok((crate::frame::COMPRESSED, out))
        }
        _ => Ok((0, raw)),
    }
}
