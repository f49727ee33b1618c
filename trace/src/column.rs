//! The encodings of columns, without any I/O. Every encoder has its decoder beside it, and the state that both keep is one
//! type that both run, so that they cannot drift apart. FORMAT.md, "Column encodings", describes the bytes.
//!
//! The decoders take what nobody vouches for: they give an error, never a panic, and they allocate no more
//! than the number of values that the caller has bounded.

use std::cell::RefCell;

use crate::bytes::{Cursor, add_difference, difference, put_varint, unzigzag, zigzag};
use crate::error::Corrupt;
use crate::frame::RAW_LIMIT;

/// zstd level of everything.
pub(crate) const ZSTD_LEVEL: i32 = 3;

thread_local! {
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decodes a zstd frame of exactly `raw` bytes.
pub(crate) fn decompress(bytes: &[u8], raw: usize) -> Result<Vec<u8>, Corrupt> {
    if raw > RAW_LIMIT {
        return Err(Corrupt::from(format!(
            "compressed bytes claim to hold {raw} bytes, more than the limit of {RAW_LIMIT}"
        )));
    }
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot
                .insert(zstd::bulk::Decompressor::new().map_err(|e| Corrupt::from(e.to_string()))?),
        };
        let out = decompressor
            .decompress(bytes, raw)
            .map_err(|e| Corrupt::from(format!("zstd: {e}")))?;
        if out.len() == raw {
            Ok(out)
        } else {
            Err(Corrupt::from(format!(
                "compressed bytes hold {} bytes instead of {raw}",
                out.len()
            )))
        }
    })
}

/// Bytes that hold the largest of `values`.
fn width_of(largest: u64) -> usize {
    (64 - largest.leading_zeros() as usize).div_ceil(8)
}

/// Planes: the width, then the lowest byte of every value, then the second lowest of every value ...
pub(crate) fn put_planes(values: &[u64], out: &mut Vec<u8>) {
    let width = width_of(values.iter().fold(0, |a, b| a | b));
    out.push(width.to_le_bytes()[0]);
    for plane in 0..width {
        let shift = 8 * plane;
        out.extend(values.iter().map(|v| ((v >> shift) & 0xff) as u8));
    }
}

/// Decodes `count` values from all of `bytes`.
pub(crate) fn planes(bytes: &[u8], count: usize) -> Result<Vec<u64>, Corrupt> {
    let (&width, rest) = bytes
        .split_first()
        .ok_or(Corrupt::from("a column of planes is empty"))?;
    if width > 8 || count.checked_mul(usize::from(width)) != Some(rest.len()) {
        return Err(Corrupt::from("a column of planes has the wrong length"));
    }
    let mut out = vec![0u64; count];
    if count > 0 {
        for (plane, bytes) in rest.chunks_exact(count).enumerate() {
            let shift = 8 * plane;
            for (value, &byte) in out.iter_mut().zip(bytes) {
                *value |= u64::from(byte) << shift;
            }
        }
    }
    Ok(out)
}

/// Small numbers: a width of 0 (one varint: the value of all), 1, 2 or 4 bytes, then the values.
pub(crate) fn put_small(values: &[u32], out: &mut Vec<u8>) {
    let largest = values.iter().fold(0, |a, b| a | b);
    let first = values.first().copied().unwrap_or(0);
    if values.iter().all(|&v| v == first) {
        out.push(0);
        put_varint(out, u64::from(first));
    } else if largest < 1 << 8 {
        out.push(1);
        out.extend(values.iter().map(|v| (v & 0xff) as u8));
    } else if largest < 1 << 16 {
        out.push(2);
        out.extend(
            values
                .iter()
                .flat_map(|v| ((v & 0xffff) as u16).to_le_bytes()),
        );
    } else {
        out.push(4);
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
}

/// Decodes `count` values from all of `bytes`.
pub(crate) fn small(bytes: &[u8], count: usize) -> Result<Vec<u32>, Corrupt> {
    let mut cursor = Cursor::new(bytes);
    let width = cursor.u8()?;
    let rest = cursor.rest();
    let wrong = || Corrupt::from("a column of small numbers has the wrong length");
    match width {
        0 => {
            let value = cursor.varint_u32()?;
            if cursor.is_empty() {
                Ok(vec![value; count])
            } else {
                Err(wrong())
            }
        }
        1 if rest.len() == count => Ok(rest.iter().map(|&b| u32::from(b)).collect()),
        2 if Some(rest.len()) == count.checked_mul(2) => Ok(rest
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| u32::from(u16::from_le_bytes(b)))
            .collect()),
        4 if Some(rest.len()) == count.checked_mul(4) => Ok(rest
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&b| u32::from_le_bytes(b))
            .collect()),
        _ => Err(wrong()),
    }
}

/// The last values of a repeating quantity, at most nine of them, and their median as the next one's prediction. The median
/// shrugs off the outliers that times have; nine was the best of the lengths tried.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Recent {
    values: [i64; 9],
    /// How many there are.
    len: u8,
    /// Which is the oldest.
    oldest: u8,
}

impl Recent {
    /// The median; of an even number of values the lower of the two in the middle. 0 where there are none.
    #[inline]
    pub(crate) fn predict(&self) -> i64 {
        if self.len == 9 {
            median_of_nine(self.values)
        } else {
            self.predict_early()
        }
    }

    fn predict_early(&self) -> i64 {
        let len = usize::from(self.len);
        let mut sorted = self.values;
        let sorted = sorted.get_mut(..len).unwrap_or_default();
        sorted.sort_unstable();
        sorted.get(len.saturating_sub(1) / 2).copied().unwrap_or(0)
    }

    #[inline]
    pub(crate) fn push(&mut self, value: i64) {
        if let Some(slot) = self.values.get_mut(usize::from(self.oldest)) {
            *slot = value;
        }
        self.oldest = if self.oldest == 8 { 0 } else { self.oldest + 1 };
        self.len = (self.len + 1).min(9);
    }
}

/// The median by a network of minima and maxima: no branches that noise could mispredict.
#[inline]
fn median_of_nine(v: [i64; 9]) -> i64 {
    let sort = |a: i64, b: i64| (a.min(b), a.max(b));
    let sort3 = |a: i64, b: i64, c: i64| {
        let (a, b) = sort(a, b);
        let (b, c) = sort(b, c);
        let (a, b) = sort(a, b);
        (a, b, c)
    };
    let [a, b, c, d, e, f, g, h, i] = v;
    let (low1, mid1, high1) = sort3(a, b, c);
    let (low2, mid2, high2) = sort3(d, e, f);
    let (low3, mid3, high3) = sort3(g, h, i);
    let low = low1.max(low2).max(low3);
    let mid = sort3(mid1, mid2, mid3).1;
    let high = high1.min(high2).min(high3);
    sort3(low, mid, high).1
}

/// Values of which each belongs to a key (a signature) and is near the median of the key's last nine: what is
/// stored is the difference, zigzag, in planes.
pub(crate) fn put_predicted(
    keys: impl Iterator<Item = usize>,
    values: &[i64],
    key_count: usize,
    out: &mut Vec<u8>,
) {
    let mut recent = vec![Recent::default(); key_count];
    let residuals: Vec<u64> = keys
        .zip(values)
        .map(|(key, &value)| match recent.get_mut(key) {
            Some(recent) => {
                let residual = zigzag(value.wrapping_sub(recent.predict()));
                recent.push(value);
                residual
            }
            None => zigzag(value),
        })
        .collect();
    put_planes(&residuals, out);
}

/// Decodes `count` values from all of `bytes`; the keys are those that the encoder saw.
pub(crate) fn predicted(
    bytes: &[u8],
    keys: impl Iterator<Item = usize>,
    count: usize,
    key_count: usize,
) -> Result<Vec<i64>, Corrupt> {
    let residuals = planes(bytes, count)?;
    let mut recent = vec![Recent::default(); key_count];
    Ok(keys
        .zip(residuals)
        .map(|(key, residual)| match recent.get_mut(key) {
            Some(recent) => {
                let value = recent.predict().wrapping_add(unzigzag(residual));
                recent.push(value);
                value
            }
            None => unzigzag(residual),
        })
        .collect())
}

/// Where the words of each op call go: its key, of which all calls have the same number of words. Two calls with one key have
/// one state, word by word.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeyWords {
    /// First state of each key; one more entry than keys.
    starts: Vec<usize>,
}

impl KeyWords {
    pub(crate) fn new(words: impl Iterator<Item = usize>) -> Self {
        let mut starts = vec![0];
        let mut sum = 0usize;
        for n in words {
            sum = sum.saturating_add(n);
            starts.push(sum);
        }
        Self { starts }
    }

    /// The states of a key.
    #[inline]
    pub(crate) fn range(&self, key: usize) -> std::ops::Range<usize> {
        let start = self.starts.get(key).copied().unwrap_or(0);
        start..self.starts.get(key + 1).copied().unwrap_or(start)
    }

    /// How many states there are.
    pub(crate) fn states(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }
}

/// Numbers that stay near their key's last (statistics): the difference to it, zigzag, in planes. Floats are taken by
/// their bits: equal ones differ by 0.
pub(crate) fn put_deltas(
    keys: impl Iterator<Item = usize>,
    words: &KeyWords,
    values: &[u64],
    out: &mut Vec<u8>,
) {
    let mut last = vec![0u64; words.states()];
    let mut residuals = Vec::with_capacity(values.len());
    let mut rest = values;
    for key in keys {
        let last = last.get_mut(words.range(key)).unwrap_or_default();
        let (mine, others) = rest.split_at(last.len().min(rest.len()));
        rest = others;
        for (last, &value) in last.iter_mut().zip(mine) {
            residuals.push(difference(value, *last));
            *last = value;
        }
    }
    put_planes(&residuals, out);
}

/// Decodes `count` values from all of `bytes`: as many as the keys have words.
pub(crate) fn deltas(
    bytes: &[u8],
    keys: impl Iterator<Item = usize>,
    words: &KeyWords,
    count: usize,
) -> Result<Vec<u64>, Corrupt> {
    let mut values = planes(bytes, count)?;
    let mut last = vec![0u64; words.states()];
    let mut rest = values.as_mut_slice();
    for key in keys {
        let last = last.get_mut(words.range(key)).unwrap_or_default();
        if last.is_empty() {
            continue;
        }
        let (mine, others) = rest
            .split_at_mut_checked(last.len())
            .ok_or(Corrupt::from("a column of deltas ends early"))?;
        rest = others;
        for (value, last) in mine.iter_mut().zip(last) {
            *last = add_difference(*last, *value);
            *value = *last;
        }
    }
    Ok(values)
}

/// Codes of payload words.
mod word_code {
    /// The key's last value (0 at first).
    pub(super) const SAME: u8 = 0;
    /// The key's last value plus its last change (0 at first): counters.
    pub(super) const STRIDE: u8 = 1;
    /// The newest literal of the block; the code plus n is the nth before it.
    pub(super) const RECENT: u8 = 2;
    /// A value of its own.
    pub(super) const LITERAL: u8 = 255;
}
/// How many literals are remembered.
const RECENT_LITERALS: usize = 64;

#[derive(Clone, Copy, Default)]
struct WordState {
    last: u64,
    change: u64,
}

impl WordState {
    fn set(&mut self, value: u64) {
        self.change = value.wrapping_sub(self.last);
        self.last = value;
    }

    const fn next(self) -> u64 {
        self.last.wrapping_add(self.change)
    }
}

/// The last literals, newest first.
#[derive(Default)]
struct Literals {
    ring: Vec<u64>,
    next: usize,
}

impl Literals {
    fn find(&self, value: u64) -> Option<usize> {
        (0..self.ring.len()).find(|&back| self.get(back) == Some(value))
    }

    fn get(&self, back: usize) -> Option<u64> {
        if back >= self.ring.len() {
            return None;
        }
        self.ring
            .get((self.next + RECENT_LITERALS - 1 - back) % RECENT_LITERALS)
            .copied()
    }

    fn push(&mut self, value: u64) {
        match self.ring.get_mut(self.next) {
            Some(slot) => *slot = value,
            None => self.ring.push(value),
        }
        self.next = (self.next + 1) % RECENT_LITERALS;
    }
}

/// Payload words: a code for each, then the literals in planes. Scalars that change (a scheduled learning rate) come once per
/// step in many signatures, so the block's last literals are remembered.
pub(crate) fn put_words(
    keys: impl Iterator<Item = usize>,
    words: &KeyWords,
    values: &[u64],
    out: &mut Vec<u8>,
) {
    let mut states = vec![WordState::default(); words.states()];
    let mut recent = Literals::default();
    let mut literals = Vec::new();
    let mut rest = values;
    for key in keys {
        let states = states.get_mut(words.range(key)).unwrap_or_default();
        let (mine, others) = rest.split_at(states.len().min(rest.len()));
        rest = others;
        for (state, &value) in states.iter_mut().zip(mine) {
            if value == state.last {
                out.push(word_code::SAME);
            } else if value == state.next() {
                out.push(word_code::STRIDE);
            } else if let Some(back) = recent.find(value) {
                out.push(word_code::RECENT + back.to_le_bytes()[0]);
            } else {
                out.push(word_code::LITERAL);
                literals.push(value);
                recent.push(value);
            }
            state.set(value);
        }
    }
    put_planes(&literals, out);
}

/// Decodes `count` words from all of `bytes`: as many as the keys have words.
pub(crate) fn words(
    bytes: &[u8],
    keys: impl Iterator<Item = usize>,
    words: &KeyWords,
    count: usize,
) -> Result<Vec<u64>, Corrupt> {
    let (codes, tail) = bytes
        .split_at_checked(count)
        .ok_or(Corrupt::from("a column of words ends early"))?;
    let literal_count = codes.iter().filter(|&&c| c == word_code::LITERAL).count();
    let mut literals = planes(tail, literal_count)?.into_iter();
    let mut states = vec![WordState::default(); words.states()];
    let mut recent = Literals::default();
    let mut codes = codes.iter();
    let mut out = Vec::with_capacity(count);
    for key in keys {
        for state in states.get_mut(words.range(key)).unwrap_or_default() {
            let value = match *codes
                .next()
                .ok_or(Corrupt::from("a column of words ends early"))?
            {
                word_code::SAME => state.last,
                word_code::STRIDE => state.next(),
                word_code::LITERAL => {
                    let value = literals
                        .next()
                        .ok_or(Corrupt::from("a literal is missing"))?;
                    recent.push(value);
                    value
                }
                code => recent
                    .get(usize::from(code - word_code::RECENT))
                    .ok_or(Corrupt::from("a word repeats a literal that is not there"))?,
            };
            state.set(value);
            out.push(value);
        }
    }
    Ok(out)
}

/// Codes of identities.
mod id_code {
    /// Id 0: none.
    pub(super) const NONE: u8 = 0;
    /// One more than the newest id so far.
    pub(super) const NEW: u8 = 1;
    /// The id that stood here last time: parameters.
    pub(super) const SAME: u8 = 2;
    /// As far behind the newest as last time: what a step makes anew.
    pub(super) const SAME_AGE: u8 = 3;
    /// So far behind the newest: the code minus this.
    pub(super) const AGE: u8 = 4;
    /// The largest age that has a code.
    pub(super) const MAX_AGE: u64 = 250;
    /// The difference to the newest follows in the tail.
    pub(super) const FAR: u8 = 255;
}

#[derive(Clone, Copy, Default)]
struct IdState {
    id: u64,
    age: u64,
    seen: bool,
}

/// Identities (never-reused ids): a code for each, then the far ones as varints.
pub(crate) fn put_ids(
    keys: impl Iterator<Item = usize>,
    words: &KeyWords,
    ids: &[u64],
    out: &mut Vec<u8>,
) {
    let mut states = vec![IdState::default(); words.states()];
    let mut newest = 0u64;
    let mut tail = Vec::new();
    let mut rest = ids;
    for key in keys {
        let states = states.get_mut(words.range(key)).unwrap_or_default();
        let (mine, others) = rest.split_at(states.len().min(rest.len()));
        rest = others;
        for (state, &id) in states.iter_mut().zip(mine) {
            if id == 0 {
                out.push(id_code::NONE);
                continue;
            }
            let age = newest.wrapping_sub(id);
            if id == newest.wrapping_add(1) {
                out.push(id_code::NEW);
            } else if state.seen && id == state.id {
                out.push(id_code::SAME);
            } else if state.seen && age == state.age {
                out.push(id_code::SAME_AGE);
            } else if age <= id_code::MAX_AGE {
                out.push(id_code::AGE + age.to_le_bytes()[0]);
            } else {
                out.push(id_code::FAR);
                put_varint(&mut tail, difference(newest, id));
            }
            *state = IdState {
                id,
                age,
                seen: true,
            };
            newest = newest.max(id);
        }
    }
    out.extend(tail);
}

/// Decodes `count` ids from all of `bytes`: as many as the keys have words.
pub(crate) fn ids(
    bytes: &[u8],
    keys: impl Iterator<Item = usize>,
    words: &KeyWords,
    count: usize,
) -> Result<Vec<u64>, Corrupt> {
    let (codes, tail) = bytes
        .split_at_checked(count)
        .ok_or(Corrupt::from("a column of ids ends early"))?;
    let mut tail = Cursor::new(tail);
    let mut codes = codes.iter();
    let mut states = vec![IdState::default(); words.states()];
    let mut newest = 0u64;
    let mut out = Vec::with_capacity(count);
    for key in keys {
        for state in states.get_mut(words.range(key)).unwrap_or_default() {
            let id = match *codes
                .next()
                .ok_or(Corrupt::from("a column of ids ends early"))?
            {
                id_code::NONE => {
                    out.push(0);
                    continue;
                }
                id_code::NEW => newest.wrapping_add(1),
                id_code::SAME => state.id,
                id_code::SAME_AGE => newest.wrapping_sub(state.age),
                id_code::FAR => newest.wrapping_sub(unzigzag(tail.varint()?).cast_unsigned()),
                code => newest.wrapping_sub(u64::from(code - id_code::AGE)),
            };
            *state = IdState {
                id,
                age: newest.wrapping_sub(id),
                seen: true,
            };
            newest = newest.max(id);
            out.push(id);
        }
    }
    if tail.is_empty() {
        Ok(out)
    } else {
        Err(Corrupt::from("a column of ids has bytes left over"))
    }
}

/// Sequence numbers: 0 for -1 (none), else one more than the zigzag difference between the thread's largest so far and
/// the number, in planes. Forward calls stand at the largest or one above, backward calls walk down from it: the
/// same way in every step.
pub(crate) fn put_sequence(threads: &[u32], values: &[i64], out: &mut Vec<u8>) {
    let mut largest = Largest::default();
    let codes: Vec<u64> = threads
        .iter()
        .zip(values)
        .map(|(&thread, &value)| {
            if value < 0 {
                return 0;
            }
            let value = value.cast_unsigned();
            let largest = largest.of(thread);
            let code = difference(*largest, value).wrapping_add(1);
            *largest = (*largest).max(value);
            code
        })
        .collect();
    put_planes(&codes, out);
}

/// Decodes one number per thread entry from all of `bytes`.
pub(crate) fn sequence(bytes: &[u8], threads: &[u32]) -> Result<Vec<i64>, Corrupt> {
    let codes = planes(bytes, threads.len())?;
    let mut largest = Largest::default();
    let mut out = Vec::with_capacity(codes.len());
    for (&thread, code) in threads.iter().zip(codes) {
        if code == 0 {
            out.push(-1);
            continue;
        }
        let largest = largest.of(thread);
        let value = largest.wrapping_sub(unzigzag(code - 1).cast_unsigned());
        *largest = (*largest).max(value);
        let value = i64::try_from(value)
            .map_err(|_| Corrupt::from("a sequence number is larger than 63 bits"))?;
        out.push(value);
    }
    Ok(out)
}

/// One number per thread. Few threads run ops, so a list is faster than a map; the last one asked for comes first.
#[derive(Default)]
pub(crate) struct Largest {
    values: Vec<(u32, u64)>,
    recent: usize,
}

impl Largest {
    /// The thread's number, 0 at first.
    #[inline]
    pub(crate) fn of(&mut self, thread: u32) -> &mut u64 {
        if self.values.get(self.recent).is_none_or(|v| v.0 != thread) {
            self.recent = self
                .values
                .iter()
                .position(|v| v.0 == thread)
                .unwrap_or_else(|| {
                    self.values.push((thread, 0));
                    self.values.len() - 1
                });
        }
        #[expect(
            clippy::indexing_slicing,
            reason = "`recent` was found or pushed just above, and nothing is ever removed"
        )]
        &mut self.values[self.recent].1
    }
}

/// Kinds of records in order: lengths of runs as varints, beginning with a run (perhaps of length 0) of kind 0, then of
/// kind 1, and so on in turn.
pub(crate) fn put_runs(kinds: &[bool], out: &mut Vec<u8>) {
    let mut current = false;
    let mut length = 0u64;
    for &kind in kinds {
        if kind != current {
            put_varint(out, length);
            current = kind;
            length = 0;
        }
        length += 1;
    }
    put_varint(out, length);
}

/// Decodes `count` kinds from all of `bytes`.
pub(crate) fn runs(bytes: &[u8], count: usize) -> Result<Vec<u8>, Corrupt> {
    let mut cursor = Cursor::new(bytes);
    let mut out = Vec::with_capacity(count);
    let mut kind = 0u8;
    while !cursor.is_empty() {
        let length =
            usize::try_from(cursor.varint()?).map_err(|_| Corrupt::from("a run is too long"))?;
        if length > count - out.len() {
            return Err(Corrupt::from("the runs of kinds are longer than the block"));
        }
        out.resize(out.len() + length, kind);
        kind = 1 - kind;
    }
    if out.len() == count {
        Ok(out)
    } else {
        Err(Corrupt::from(
            "the runs of kinds are shorter than the block",
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Numbers of every magnitude: uniform ones are nearly all huge.
    fn number() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0..64u32).prop_map(|(v, shift)| v >> shift)
    }

    /// Keys and their numbers of words, and one value per word.
    fn keyed(
        value: impl Strategy<Value = u64> + Clone + 'static,
    ) -> impl Strategy<Value = (Vec<usize>, Vec<usize>, Vec<u64>)> {
        (
            prop::collection::vec(0..4usize, 1..6),
            prop::collection::vec(any::<prop::sample::Index>(), 0..200),
        )
            .prop_flat_map(move |(words, picks)| {
                let keys: Vec<usize> = picks.iter().map(|p| p.index(words.len())).collect();
                let total = keys.iter().map(|&k| words[k]).sum::<usize>();
                (
                    Just(words),
                    Just(keys),
                    prop::collection::vec(value.clone(), total),
                )
            })
    }

    proptest! {
        #[test]
        fn planes_come_back(values in prop::collection::vec(number(), 0..300)) {
            let mut bytes = Vec::new();
            put_planes(&values, &mut bytes);
            prop_assert_eq!(planes(&bytes, values.len()).unwrap(), values);
        }

        #[test]
        fn small_numbers_come_back(values in prop::collection::vec(any::<u32>(), 0..300), shift in 0..32u32) {
            let values: Vec<u32> = values.iter().map(|v| v >> shift).collect();
            let mut bytes = Vec::new();
            put_small(&values, &mut bytes);
            prop_assert_eq!(small(&bytes, values.len()).unwrap(), values);
        }

        #[test]
        fn predicted_values_come_back(values in prop::collection::vec((0..5usize, any::<i64>()), 0..300)) {
            let (keys, values): (Vec<usize>, Vec<i64>) = values.into_iter().unzip();
            let mut bytes = Vec::new();
            put_predicted(keys.iter().copied(), &values, 5, &mut bytes);
            prop_assert_eq!(predicted(&bytes, keys.iter().copied(), values.len(), 5).unwrap(), values);
        }

        #[test]
        fn deltas_come_back((words, keys, values) in keyed(number().boxed())) {
            let words = KeyWords::new(words.into_iter());
            let mut bytes = Vec::new();
            put_deltas(keys.iter().copied(), &words, &values, &mut bytes);
            prop_assert_eq!(deltas(&bytes, keys.iter().copied(), &words, values.len()).unwrap(), values);
        }

        #[test]
        fn words_come_back((key_words, keys, values) in keyed(prop_oneof![0..100u64, number()].boxed())) {
            let key_words = KeyWords::new(key_words.into_iter());
            let mut bytes = Vec::new();
            put_words(keys.iter().copied(), &key_words, &values, &mut bytes);
            prop_assert_eq!(words(&bytes, keys.iter().copied(), &key_words, values.len()).unwrap(), values);
        }

        #[test]
        fn ids_come_back((words, keys, values) in keyed(prop_oneof![0..40u64, 0..1000u64, number()].boxed())) {
            let words = KeyWords::new(words.into_iter());
            let mut bytes = Vec::new();
            put_ids(keys.iter().copied(), &words, &values, &mut bytes);
            prop_assert_eq!(ids(&bytes, keys.iter().copied(), &words, values.len()).unwrap(), values);
        }

        #[test]
        fn sequence_numbers_come_back(values in prop::collection::vec((0..3u32, prop_oneof![Just(-1i64), 0..50i64, 0..=i64::MAX]), 0..300)) {
            let (threads, values): (Vec<u32>, Vec<i64>) = values.into_iter().unzip();
            let mut bytes = Vec::new();
            put_sequence(&threads, &values, &mut bytes);
            prop_assert_eq!(sequence(&bytes, &threads).unwrap(), values);
        }

        #[test]
        fn runs_come_back(kinds in prop::collection::vec(any::<bool>(), 0..300)) {
            let mut bytes = Vec::new();
            put_runs(&kinds, &mut bytes);
            let kinds: Vec<u8> = kinds.into_iter().map(u8::from).collect();
            prop_assert_eq!(runs(&bytes, kinds.len()).unwrap(), kinds);
        }

        /// Whatever the bytes are, no decoder panics or gives a wrong number of values.
        #[test]
        fn decoders_survive_anything(bytes in prop::collection::vec(any::<u8>(), 0..200), count in 0..100usize) {
            let keys = || (0..count).map(|i| i % 3);
            let key_words = KeyWords::new([1, 0, 2].into_iter());
            let total: usize = keys().map(|k| key_words.range(k).len()).sum();
            for values in [planes(&bytes, count), predicted(&bytes, keys(), count, 3).map(|v| v.into_iter().map(i64::cast_unsigned).collect())] {
                prop_assert!(values.is_err() || values.unwrap().len() == count);
            }
            for values in [deltas(&bytes, keys(), &key_words, total), words(&bytes, keys(), &key_words, total), ids(&bytes, keys(), &key_words, total)] {
                prop_assert!(values.is_err() || values.unwrap().len() == total);
            }
            let threads: Vec<u32> = (0..count).map(|i| i as u32 % 2).collect();
            for values in [small(&bytes, count).map(|v| v.len()), sequence(&bytes, &threads).map(|v| v.len()), runs(&bytes, count).map(|v| v.len())] {
                prop_assert!(values.is_err() || values.unwrap() == count);
            }
            let _ = decompress(&bytes, count);
        }

        #[test]
        fn the_median_is_the_median(mut values in prop::array::uniform9(any::<i64>())) {
            let mut recent = Recent::default();
            for v in values {
                recent.push(v);
            }
            values.sort_unstable();
            prop_assert_eq!(recent.predict(), values[4]);
        }
    }

    #[test]
    fn what_repeats_costs_one_code() {
        let words = KeyWords::new([2].into_iter());
        let keys = || std::iter::repeat_n(0usize, 4);
        let mut bytes = Vec::new();
        // A parameter (id 1) and a tensor that every step makes anew.
        put_ids(keys(), &words, &[1, 2, 1, 3, 1, 4, 1, 5], &mut bytes);
        assert_eq!(bytes, [1, 1, 2, 1, 2, 1, 2, 1]);
    }

    #[test]
    fn claims_beyond_the_limit_are_refused() {
        assert!(decompress(&[0; 16], RAW_LIMIT + 1).is_err());
    }
}
