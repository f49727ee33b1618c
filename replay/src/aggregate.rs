//! From traces to rows: all selected calls of one signature with one pattern, in one piece of one stream, together.
//!
//! Two ways lead there and give the same: the trace's summaries, whose cost does not grow with the run, and the events,
//! block by block on several threads. Blocks are taken in any order and put together in theirs, so the result does not
//! depend on the number of threads.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use optape_trace::{Columns, Dictionary, Pattern, PatternId, SignatureId, SummaryRow, fields};

use crate::error::ReplayError;
use crate::load::{StreamRef, Traces};
use crate::selection::{Divisors, Piece, Pieces, Selection};

/// Selected calls that are alike.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    /// Index into [`Traces::sources`].
    pub source: usize,
    /// Index into the trace's streams.
    pub stream: usize,
    /// The step, where steps are told apart.
    pub step: Option<u64>,
    /// The sums.
    pub sums: SummaryRow,
}

/// All rows of a selection, and what totals can be divided by.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    /// In the order of sources, streams, pieces, signatures, patterns.
    pub rows: Vec<Row>,
    /// What totals can be divided by.
    pub divisors: Divisors,
    /// The same for each step, where steps are told apart.
    pub by_step: BTreeMap<Option<u64>, Divisors>,
    /// Calls of modules in the selection, by name.
    pub module_calls: BTreeMap<String, u64>,
    /// Regions in the selection that ran outside of the dispatcher.
    pub opaque_regions: u64,
}

/// How rows are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    /// Tell steps apart.
    pub by_step: bool,
    /// Read events even where summaries would do.
    pub from_events: bool,
    /// Threads that read events.
    pub threads: usize,
}

/// From so many pieces on, one pass over the blocks is cheaper than asking for the summary of each.
const MANY_PIECES: usize = 16;

/// Reads what is selected.
///
/// # Errors
/// Where a trace cannot be read.
pub(crate) fn rows(traces: &Traces, selection: &Selection, reading: Reading) -> Result<Rows, ReplayError> {
    let mut all = Rows::default();
    for at in traces.streams().filter(|at| selection.takes(*at)) {
        let pieces = selection.pieces(traces, at, reading.by_step)?;
        all.divisors.add(pieces.divisors);
        all.opaque_regions += pieces.opaque_regions;
        for (step, divisors) in &pieces.by_step {
            all.by_step.entry(*step).or_default().add(*divisors);
        }
        for (name, calls) in &pieces.module_calls {
            *all.module_calls.entry(name.clone()).or_default() += calls;
        }
        let sums = if reading.from_events || pieces.pieces.len() >= MANY_PIECES {
            from_events(traces, at, &pieces, reading.threads)?
        } else {
            from_summaries(traces, at, &pieces)?
        };
        let dictionary = at.stream.dictionary();
        for (step, mut sums) in sums {
            sums.sort_by_key(|row| (row.signature, row.pattern));
            for row in sums {
                let Some(signature) = dictionary.signature(row.signature) else { continue };
                let Some(op) = dictionary.op(signature.op) else { continue };
                if selection.matches(dictionary, signature, op) {
                    all.rows.push(Row { source: at.source, stream: at.stream.id().index(), step, sums: row });
                }
            }
        }
    }
    Ok(all)
}

type Sums = Vec<(Option<u64>, Vec<SummaryRow>)>;

fn from_summaries(traces: &Traces, at: StreamRef<'_>, pieces: &Pieces) -> Result<Sums, ReplayError> {
    let mut all: Sums = Vec::new();
    for piece in &pieces.pieces {
        let rows =
            at.trace.summary(at.stream.id(), piece.ordinals.clone()).map_err(|e| traces.error(at.source, e))?;
        match all.iter_mut().find(|(step, _)| *step == piece.step) {
            Some((_, into)) => {
                let mut merged = Accumulator::of(at.stream.dictionary(), std::mem::take(into));
                for row in &rows {
                    merged.add_row(at.stream.dictionary(), row);
                }
                *into = merged.rows;
            }
            None => all.push((piece.step, rows)),
        }
    }
    Ok(all)
}

/// One pass over the blocks that the pieces touch.
fn from_events(traces: &Traces, at: StreamRef<'_>, pieces: &Pieces, threads: usize) -> Result<Sums, ReplayError> {
    let dictionary = at.stream.dictionary();
    let blocks: Vec<usize> = at
        .stream
        .blocks()
        .iter()
        .enumerate()
        .filter(|(_, block)| !touched(&pieces.pieces, &block.ordinals()).is_empty())
        .map(|(index, _)| index)
        .collect();
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, Result<BlockSums, ReplayError>)>> = Mutex::new(Vec::with_capacity(blocks.len()));
    let work = || {
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(&index) = blocks.get(place) else { return };
            let sums = read_block(at, &pieces.pieces, index).map_err(|e| traces.error(at.source, e));
            if let Ok(mut results) = results.lock() {
                results.push((place, sums));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.clamp(1, blocks.len().max(1)) {
            scope.spawn(work);
        }
        work();
    });
    let mut results = results.into_inner().unwrap_or_default();
    results.sort_by_key(|(place, _)| *place);
    let mut merged: HashMap<Option<u64>, Accumulator> = HashMap::new();
    let mut order: Vec<Option<u64>> = Vec::new();
    for (_, sums) in results {
        for (step, rows) in sums? {
            let into = merged.entry(step).or_insert_with(|| {
                order.push(step);
                Accumulator::default()
            });
            for row in &rows {
                into.add_row(dictionary, row);
            }
        }
    }
    Ok(order.into_iter().filter_map(|step| merged.remove(&step).map(|sums| (step, sums.rows))).collect())
}

/// The pieces that overlap an interval.
fn touched<'a>(pieces: &'a [Piece], ordinals: &Range<u64>) -> &'a [Piece] {
    let from = pieces.partition_point(|piece| piece.ordinals.end <= ordinals.start);
    let to = pieces.partition_point(|piece| piece.ordinals.start < ordinals.end);
    pieces.get(from..to).unwrap_or(&[])
}

type BlockSums = Vec<(Option<u64>, Vec<SummaryRow>)>;

fn read_block(at: StreamRef<'_>, pieces: &[Piece], index: usize) -> Result<BlockSums, optape_trace::TraceError> {
    let Some(entry) = at.stream.blocks().get(index) else { return Ok(Vec::new()) };
    let ordinals = entry.ordinals();
    let pieces = touched(pieces, &ordinals);
    let whole = matches!(pieces, [only] if only.ordinals.start <= ordinals.start && only.ordinals.end >= ordinals.end);
    let columns = Columns::SLOTS | Columns::STATISTICS | Columns::DURATION;
    let columns = if whole { columns } else { columns | Columns::KINDS };
    let block = at.trace.block(at.stream.id(), index, columns)?;
    let dictionary = at.stream.dictionary();
    let slots: Vec<SlotWords> = block
        .slot_table
        .iter()
        .map(|slot| SlotWords::of(dictionary, slot.signature, slot.pattern, slot.statistics as usize))
        .collect();

    let mut sums: BlockSums = Vec::new();
    let mut words = block.statistics.iter().copied();
    if whole {
        let mut rows = slot_rows(&slots);
        for (&slot, &duration) in block.slots.iter().zip(&block.duration_ns) {
            let (Some(kind), Some(row)) = (slots.get(slot as usize), rows.get_mut(slot as usize)) else { continue };
            kind.add(row, duration, &mut words);
        }
        rows.retain(|row| row.calls > 0);
        sums.push((pieces.first().and_then(|piece| piece.step), rows));
        return Ok(sums);
    }
    // Which op call has which ordinal: every record has a kind, only op calls have a slot.
    let mut call = 0;
    let mut piece_at = 0;
    let mut rows = slot_rows(&slots);
    let finish = |sums: &mut BlockSums, rows: &mut Vec<SummaryRow>, step| {
        let mut done = std::mem::replace(rows, slot_rows(&slots));
        done.retain(|row| row.calls > 0);
        if !done.is_empty() {
            sums.push((step, done));
        }
    };
    for (offset, kind) in (0u64..).zip(&block.kinds) {
        if *kind != 0 {
            continue;
        }
        let ordinal = ordinals.start + offset;
        let (slot, duration) = (block.slots.get(call).copied(), block.duration_ns.get(call).copied());
        call += 1;
        let Some(words_of) = slot.and_then(|slot| slots.get(slot as usize)) else { continue };
        while let Some(piece) = pieces.get(piece_at).filter(|piece| piece.ordinals.end <= ordinal) {
            finish(&mut sums, &mut rows, piece.step);
            piece_at += 1;
        }
        let inside = pieces.get(piece_at).is_some_and(|piece| piece.ordinals.contains(&ordinal));
        match slot.and_then(|slot| rows.get_mut(slot as usize)) {
            Some(row) if inside => words_of.add(row, duration.unwrap_or(0), &mut words),
            _ => words_of.skip(&mut words),
        }
    }
    if let Some(piece) = pieces.get(piece_at) {
        finish(&mut sums, &mut rows, piece.step);
    }
    Ok(sums)
}

/// How a float statistic is put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Integer,
    Sum,
    Least,
    Greatest,
}

impl Word {
    fn of(field: u32) -> Self {
        match field {
            fields::MINIMUM => Self::Least,
            fields::MAXIMUM => Self::Greatest,
            field if fields::is_integer(field) => Self::Integer,
            _ => Self::Sum,
        }
    }

    const fn start(self) -> f64 {
        match self {
            Self::Least => f64::INFINITY,
            Self::Greatest => f64::NEG_INFINITY,
            _ => 0.0,
        }
    }

    fn combine(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Least | Self::Greatest if a.is_nan() || b.is_nan() => f64::NAN,
            Self::Least => a.min(b),
            Self::Greatest => a.max(b),
            _ => a + b,
        }
    }
}

fn words_of(pattern: Option<&Pattern>) -> Vec<Word> {
    pattern.map_or_else(Vec::new, |p| p.entries.iter().flat_map(|e| fields::each(e.fields)).map(Word::of).collect())
}

fn empty_row(signature: SignatureId, pattern: PatternId, words: &[Word]) -> SummaryRow {
    SummaryRow {
        signature,
        pattern,
        calls: 0,
        duration_ns: 0,
        integer_sums: vec![0; words.iter().filter(|w| **w == Word::Integer).count()],
        float_sums: words.iter().filter(|w| **w != Word::Integer).map(|w| w.start()).collect(),
    }
}

/// The words that each call of a slot has.
struct SlotWords {
    signature: SignatureId,
    pattern: PatternId,
    words: Vec<Word>,
    /// As many words as the block has of each call.
    length: usize,
}

impl SlotWords {
    fn of(dictionary: &Dictionary, signature: SignatureId, pattern: PatternId, length: usize) -> Self {
        Self { signature, pattern, words: words_of(dictionary.pattern(pattern)), length }
    }

    #[inline]
    fn add(&self, row: &mut SummaryRow, duration_ns: u64, words: &mut impl Iterator<Item = u64>) {
        row.calls += 1;
        row.duration_ns = row.duration_ns.wrapping_add(duration_ns);
        let (mut integer, mut float) = (0, 0);
        for at in 0..self.length {
            let Some(word) = words.next() else { return };
            match self.words.get(at) {
                Some(Word::Integer) => {
                    if let Some(sum) = row.integer_sums.get_mut(integer) {
                        *sum = sum.wrapping_add(u128::from(word));
                    }
                    integer += 1;
                }
                Some(kind) => {
                    if let Some(sum) = row.float_sums.get_mut(float) {
                        *sum = kind.combine(*sum, f64::from_bits(word));
                    }
                    float += 1;
                }
                None => {}
            }
        }
    }

    fn skip(&self, words: &mut impl Iterator<Item = u64>) {
        for _ in 0..self.length {
            words.next();
        }
    }
}

fn slot_rows(slots: &[SlotWords]) -> Vec<SummaryRow> {
    slots.iter().map(|slot| empty_row(slot.signature, slot.pattern, &slot.words)).collect()
}

/// Rows that are being added up.
#[derive(Default)]
struct Accumulator {
    places: HashMap<(SignatureId, PatternId), usize>,
    rows: Vec<SummaryRow>,
}

impl Accumulator {
    fn of(dictionary: &Dictionary, rows: Vec<SummaryRow>) -> Self {
        let mut all = Self::default();
        for row in &rows {
            all.add_row(dictionary, row);
        }
        all
    }

    fn add_row(&mut self, dictionary: &Dictionary, row: &SummaryRow) {
        let place = *self.places.entry((row.signature, row.pattern)).or_insert_with(|| {
            self.rows.push(empty_row(row.signature, row.pattern, &words_of(dictionary.pattern(row.pattern))));
            self.rows.len() - 1
        });
        let Some(into) = self.rows.get_mut(place) else { return };
        into.calls = into.calls.wrapping_add(row.calls);
        into.duration_ns = into.duration_ns.wrapping_add(row.duration_ns);
        for (sum, more) in into.integer_sums.iter_mut().zip(&row.integer_sums) {
            *sum = sum.wrapping_add(*more);
        }
        let floats = words_of(dictionary.pattern(row.pattern)).into_iter().filter(|w| *w != Word::Integer);
        for ((sum, more), kind) in into.float_sums.iter_mut().zip(&row.float_sums).zip(floats) {
            *sum = kind.combine(*sum, *more);
        }
    }
}
