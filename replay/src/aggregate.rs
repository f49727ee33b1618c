//! From traces to rows: all selected calls of one signature with one pattern, in one piece of one stream, together.
//!
//! Two ways lead there and give the same: the trace's summaries, whose cost does not grow with the run, and the events,
//! chunk by chunk on several threads. Chunks are taken in any order and put together in theirs, so the result does not
//! depend on the number of threads.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use optape_trace::{Columns, Dictionary, PatternId, SignatureId, SummaryRow, TraceError, fields};

use crate::error::ReplayError;
use crate::load::{StreamRef, Traces};
use crate::selection::{Divisors, Piece, Pieces, Selection};
use crate::timeline::Timeline;

/// Selected calls that are alike.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    /// Index into [`Traces::sources`].
    pub source: usize,
    /// Index into the trace's streams.
    pub stream: usize,
    /// The step, where steps are told apart.
    pub step: Option<u64>,
    /// The sums; times are summed up where [`Reading::times`] says so.
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
    /// Sum up how long calls took. No counter asks for times, and to decode them takes longer than all the rest.
    pub times: bool,
}

/// From so many pieces on, one pass over the blocks is cheaper than asking for the summary of each.
const MANY_PIECES: usize = 16;

/// Reads what is selected.
///
/// # Errors
/// Where a trace cannot be read.
pub(crate) fn rows(
    traces: &Traces,
    timelines: &[Timeline],
    selection: &Selection,
    reading: Reading,
) -> Result<Rows, ReplayError> {
    let mut all = Rows::default();
    for (at, timeline) in traces
        .streams()
        .zip(timelines)
        .filter(|(at, _)| selection.takes(*at))
    {
        let pieces = selection.pieces(at, timeline, reading.by_step);
        all.divisors.add(pieces.divisors);
        all.opaque_regions += pieces.opaque_regions;
        for (step, divisors) in &pieces.by_step {
            all.by_step.entry(*step).or_default().add(*divisors);
        }
        for (name, calls) in &pieces.module_calls {
            *all.module_calls.entry(name.clone()).or_default() += calls;
        }
        let sums = if reading.from_events || pieces.pieces.len() >= MANY_PIECES {
            from_events(traces, at, &pieces, reading)?
        } else {
            from_summaries(traces, at, &pieces)?
        };
        let dictionary = at.stream.dictionary();
        for (step, mut sums) in sums {
            sums.sort_by_key(|row| (row.signature, row.pattern));
            for row in sums {
                let Some(signature) = dictionary.signature(row.signature) else {
                    continue;
                };
                let Some(op) = dictionary.op(signature.op) else {
                    continue;
                };
                if selection.matches(dictionary, signature, op) {
                    all.rows.push(Row {
                        source: at.source,
                        stream: at.stream.id().index(),
                        step,
                        sums: row,
                    });
                }
            }
        }
    }
    Ok(all)
}

type Sums = Vec<(Option<u64>, Vec<SummaryRow>)>;

fn from_summaries(
    traces: &Traces,
    at: StreamRef<'_>,
    pieces: &Pieces,
) -> Result<Sums, ReplayError> {
    let mut all = BySteps::new(at.stream.dictionary());
    for piece in &pieces.pieces {
        let rows = at
            .trace
            .summary(at.stream.id(), piece.ordinals.clone())
            .map_err(|e| traces.error(at.source, e))?;
        let into = all.of(piece.step);
        for row in &rows {
            into.add_row(row);
        }
    }
    Ok(all.finish())
}

/// Blocks are taken in chunks of about so many records. Chunks do not depend on the number of threads, so neither does the
/// order in which floats are added.
const CHUNK_RECORDS: u64 = 1 << 19;

/// One pass over the blocks that the pieces touch.
fn from_events(
    traces: &Traces,
    at: StreamRef<'_>,
    pieces: &Pieces,
    reading: Reading,
) -> Result<Sums, ReplayError> {
    let dictionary = at.stream.dictionary();
    let mut chunks: Vec<Vec<usize>> = Vec::new();
    let mut records = CHUNK_RECORDS;
    for (index, block) in at.stream.blocks().iter().enumerate() {
        if touched(&pieces.pieces, &block.ordinals()).is_empty() {
            continue;
        }
        if records >= CHUNK_RECORDS {
            chunks.push(Vec::new());
            records = 0;
        }
        records += u64::from(block.records);
        if let Some(chunk) = chunks.last_mut() {
            chunk.push(index);
        }
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, Result<Sums, ReplayError>)>> =
        Mutex::new(Vec::with_capacity(chunks.len()));
    let work = || {
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = chunks.get(place) else {
                return;
            };
            let mut sums = BySteps::new(dictionary);
            let read = chunk
                .iter()
                .try_for_each(|&index| read_block(at, &pieces.pieces, index, reading, &mut sums));
            let sums = read
                .map(|()| sums.finish())
                .map_err(|e| traces.error(at.source, e));
            if let Ok(mut results) = results.lock() {
                results.push((place, sums));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..reading.threads.clamp(1, chunks.len().max(1)) {
            scope.spawn(work);
        }
        work();
    });
    let mut results = results.into_inner().unwrap_or_default();
    results.sort_by_key(|(place, _)| *place);
    let mut merged = BySteps::new(dictionary);
    for (_, sums) in results {
        for (step, rows) in sums? {
            let into = merged.of(step);
            for row in &rows {
                into.add_row(row);
            }
        }
    }
    Ok(merged.finish())
}

/// The pieces that overlap an interval.
fn touched<'a>(pieces: &'a [Piece], ordinals: &Range<u64>) -> &'a [Piece] {
    let from = pieces.partition_point(|piece| piece.ordinals.end <= ordinals.start);
    let to = pieces.partition_point(|piece| piece.ordinals.start < ordinals.end);
    pieces.get(from..to).unwrap_or(&[])
}

fn read_block(
    at: StreamRef<'_>,
    pieces: &[Piece],
    index: usize,
    reading: Reading,
    sums: &mut BySteps<'_>,
) -> Result<(), TraceError> {
    let Some(entry) = at.stream.blocks().get(index) else {
        return Ok(());
    };
    let ordinals = entry.ordinals();
    let pieces = touched(pieces, &ordinals);
    let mut columns = Columns::SLOTS | Columns::STATISTICS;
    if reading.times {
        columns = columns | Columns::DURATION;
    }
    if let [only] = pieces
        && only.ordinals.start <= ordinals.start
        && only.ordinals.end >= ordinals.end
    {
        let block = at.trace.block(at.stream.id(), index, columns)?;
        let into = sums.of(only.step);
        let places: Vec<u32> = block
            .slot_table
            .iter()
            .map(|slot| into.place(slot.signature, slot.pattern))
            .collect();
        let lengths: Vec<u32> = block
            .slot_table
            .iter()
            .map(|slot| slot.statistics)
            .collect();
        let mut words = block.statistics.as_slice();
        for &slot in &block.slots {
            let (Some(&place), Some(&length)) =
                (places.get(slot as usize), lengths.get(slot as usize))
            else {
                continue;
            };
            let (of_call, rest) = words
                .split_at_checked(length as usize)
                .unwrap_or((words, &[]));
            words = rest;
            into.add_call(place, of_call);
        }
        if reading.times {
            for (&slot, &duration_ns) in block.slots.iter().zip(&block.duration_ns) {
                if let Some(&place) = places.get(slot as usize) {
                    into.add_time(place, duration_ns);
                }
            }
        }
        return Ok(());
    }
    // Which op call has which ordinal: every record has a kind, only op calls have a slot.
    let block = at
        .trace
        .block(at.stream.id(), index, columns | Columns::KINDS)?;
    let mut words = block.statistics.as_slice();
    let mut calls = block.slots.iter();
    let mut durations = block.duration_ns.iter();
    let mut piece_at = 0;
    for (ordinal, _) in (ordinals.start..)
        .zip(&block.kinds)
        .filter(|(_, kind)| **kind == 0)
    {
        let Some(&slot) = calls.next() else { break };
        let duration_ns = durations.next().copied().unwrap_or(0);
        let Some(slot) = block.slot_table.get(slot as usize) else {
            continue;
        };
        let (of_call, rest) = words
            .split_at_checked(slot.statistics as usize)
            .unwrap_or((words, &[]));
        words = rest;
        while pieces
            .get(piece_at)
            .is_some_and(|piece| piece.ordinals.end <= ordinal)
        {
            piece_at += 1;
        }
        if let Some(piece) = pieces
            .get(piece_at)
            .filter(|piece| piece.ordinals.contains(&ordinal))
        {
            let into = sums.of(piece.step);
            let place = into.place(slot.signature, slot.pattern);
            into.add_call(place, of_call);
            into.add_time(place, duration_ns);
        }
    }
    Ok(())
}

/// How a word of the statistics is put together.
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

/// Sums for each step, or for all together.
struct BySteps<'d> {
    dictionary: &'d Dictionary,
    steps: Vec<(Option<u64>, Accumulator<'d>)>,
    places: HashMap<Option<u64>, usize>,
    /// The step that came last is most often the next.
    last: usize,
}

impl<'d> BySteps<'d> {
    fn new(dictionary: &'d Dictionary) -> Self {
        Self {
            dictionary,
            steps: Vec::new(),
            places: HashMap::new(),
            last: 0,
        }
    }

    fn of(&mut self, step: Option<u64>) -> &mut Accumulator<'d> {
        if self.steps.get(self.last).is_none_or(|(s, _)| *s != step) {
            self.last = *self.places.entry(step).or_insert_with(|| {
                self.steps
                    .push((step, Accumulator::new(self.dictionary, step.is_none())));
                self.steps.len() - 1
            });
        }
        &mut self.steps[self.last].1
    }

    fn finish(self) -> Sums {
        self.steps
            .into_iter()
            .map(|(step, sums)| (step, sums.rows))
            .collect()
    }
}

/// Rows that are being added up.
struct Accumulator<'d> {
    dictionary: &'d Dictionary,
    /// By signature: patterns and the places of their rows. A signature has few patterns.
    index: Vec<Vec<(PatternId, u32)>>,
    /// The same where there are many accumulators, one for each step, that each have few rows.
    sparse_index: Option<HashMap<(SignatureId, PatternId), u32>>,
    rows: Vec<SummaryRow>,
    /// Each row's words.
    words: Vec<Vec<Word>>,
}

impl<'d> Accumulator<'d> {
    fn new(dictionary: &'d Dictionary, dense: bool) -> Self {
        let sparse_index = (!dense).then(HashMap::new);
        Self {
            dictionary,
            index: Vec::new(),
            sparse_index,
            rows: Vec::new(),
            words: Vec::new(),
        }
    }

    /// The place of a row; a new one where there is none. The trace vouches for signatures being defined, and so for their
    /// numbers being small.
    fn place(&mut self, signature: SignatureId, pattern: PatternId) -> u32 {
        let place = self.rows.len() as u32;
        if let Some(index) = &mut self.sparse_index {
            let known = *index.entry((signature, pattern)).or_insert(place);
            if known != place {
                return known;
            }
        } else {
            if self.index.len() <= signature.index() {
                self.index.resize_with(signature.index() + 1, Vec::new);
            }
            let places = &mut self.index[signature.index()];
            if let Some((_, known)) = places.iter().find(|(p, _)| *p == pattern) {
                return *known;
            }
            places.push((pattern, place));
        }
        self.add_empty(signature, pattern);
        place
    }

    fn add_empty(&mut self, signature: SignatureId, pattern: PatternId) {
        let words: Vec<Word> = self.dictionary.pattern(pattern).map_or_else(Vec::new, |p| {
            p.entries
                .iter()
                .flat_map(|e| fields::each(e.fields))
                .map(Word::of)
                .collect()
        });
        self.rows.push(SummaryRow {
            signature,
            pattern,
            calls: 0,
            duration_ns: 0,
            integer_sums: vec![0; words.iter().filter(|w| **w == Word::Integer).count()],
            float_sums: words
                .iter()
                .filter(|w| **w != Word::Integer)
                .map(|w| w.start())
                .collect(),
        });
        self.words.push(words);
    }

    #[inline]
    fn add_call(&mut self, place: u32, words: &[u64]) {
        let (Some(row), Some(kinds)) = (
            self.rows.get_mut(place as usize),
            self.words.get(place as usize),
        ) else {
            return;
        };
        row.calls += 1;
        if row.float_sums.is_empty() {
            for (sum, &word) in row.integer_sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(u128::from(word));
            }
            return;
        }
        let (mut integers, mut floats) = (row.integer_sums.iter_mut(), row.float_sums.iter_mut());
        for (kind, &word) in kinds.iter().zip(words) {
            if *kind == Word::Integer {
                if let Some(sum) = integers.next() {
                    *sum = sum.wrapping_add(u128::from(word));
                }
            } else if let Some(sum) = floats.next() {
                *sum = kind.combine(*sum, f64::from_bits(word));
            }
        }
    }

    fn add_time(&mut self, place: u32, duration_ns: u64) {
        if let Some(row) = self.rows.get_mut(place as usize) {
            row.duration_ns = row.duration_ns.wrapping_add(duration_ns);
        }
    }

    fn add_row(&mut self, row: &SummaryRow) {
        let place = self.place(row.signature, row.pattern) as usize;
        let (Some(into), Some(kinds)) = (self.rows.get_mut(place), self.words.get(place)) else {
            return;
        };
        into.calls = into.calls.wrapping_add(row.calls);
        into.duration_ns = into.duration_ns.wrapping_add(row.duration_ns);
        for (sum, more) in into.integer_sums.iter_mut().zip(&row.integer_sums) {
            *sum = sum.wrapping_add(*more);
        }
        let floats = kinds.iter().filter(|w| **w != Word::Integer);
        for ((sum, more), kind) in into.float_sums.iter_mut().zip(&row.float_sums).zip(floats) {
            *sum = kind.combine(*sum, *more);
        }
    }
}
