//! The records of a stream that are no op calls, boiled down to what a replay asks of them.
//!
//! Reading them means going through the whole stream, which an answer from summaries must not do on a long run. So a
//! timeline is read only where the question needs one, or where the stream is short.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use optape_trace::{
    Columns, Dictionary, Event, Moment, StepSource, Stream, TextId, ThreadId, Trace, TraceError,
};

use crate::load::StreamRef;

/// Streams of at most so many records are always read: it takes a fraction of a second.
const SHORT_RECORDS: u64 = 1 << 21;

/// In `StreamEnd::costs`: all regions outside of the dispatcher.
const OPAQUE_REGIONS: &str = "capture.opaque_regions";
/// The same, before the name of some.
const OPAQUE_COST: &str = "opaque.";

/// What happened between the op calls.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    /// Names of all ranges.
    pub(crate) range_names: BTreeSet<String>,
    /// The records strictly inside of the ranges asked for, joined where they overlap.
    pub(crate) inside: Vec<Range<u64>>,
    /// Step marks: ordinal, source, step.
    pub(crate) steps: Vec<(u64, StepSource, u64)>,
    /// Samples reported: ordinal, count.
    pub(crate) samples: Vec<(u64, u64)>,
    /// Module calls: ordinal, module, whether no other was running on the thread.
    pub(crate) module_calls: Vec<(u64, u32, bool)>,
    /// Regions outside of the dispatcher: ordinal, name.
    pub(crate) opaque: Vec<(u64, TextId)>,
    /// When step marks and the marks of ranges were: ordinal, nanoseconds since the stream's start.
    pub(crate) times: Vec<(u64, u64)>,
    /// Why the recorder switched itself off.
    pub(crate) disabled: Vec<String>,
    /// How often recording was paused.
    pub(crate) pauses: u64,
    /// Modules that take all time steps in one call, or one, where the trace says so.
    pub(crate) multi_step: BTreeMap<u32, bool>,
    /// The whole stream was read; else only its end.
    pub(crate) complete: bool,
}

impl Timeline {
    /// Reads a stream. `needed`: the question cannot be answered without; else a long stream is read at its end only, for
    /// why the recorder stopped. `ranges` are the names of the ranges asked for.
    pub(crate) fn read(
        at: StreamRef<'_>,
        needed: bool,
        ranges: &[String],
    ) -> Result<Self, TraceError> {
        let blocks = at.stream.blocks();
        let complete = needed || at.stream.records() <= SHORT_RECORDS;
        let first = if complete {
            0
        } else {
            blocks.len().saturating_sub(1)
        };
        let mut reading = Reading {
            timeline: Self {
                complete,
                ..Self::default()
            },
            dictionary: at.stream.dictionary(),
            wanted: ranges,
            open: HashMap::new(),
            depth: HashMap::new(),
            names: HashMap::new(),
        };
        for (index, entry) in blocks.iter().enumerate().skip(first) {
            if entry.op_calls == entry.records {
                continue;
            }
            let block = at
                .trace
                .block(at.stream.id(), index, Columns::MOMENTS | Columns::KINDS)?;
            let ordinals = (block.first_ordinal..)
                .zip(&block.kinds)
                .filter(|(_, kind)| **kind == 1)
                .map(|(ordinal, _)| ordinal);
            for (ordinal, moment) in ordinals.zip(&block.moments) {
                reading.take(ordinal, moment);
            }
        }
        Ok(reading.finish(at.stream.records()))
    }

    /// When a step mark or a mark of a range was, nanoseconds since the stream's start.
    pub(crate) fn time_of(&self, ordinal: u64) -> Option<u64> {
        let at = self
            .times
            .binary_search_by_key(&ordinal, |(ordinal, _)| *ordinal)
            .ok()?;
        self.times.get(at).map(|(_, time)| *time)
    }

    /// The steps of the stream: each ends with its mark; what stands behind the last mark belongs to none. Marks of the
    /// program win over marks of the optimizer, and these over calls of the root module.
    pub(crate) fn step_intervals(&self, records: u64) -> Vec<(Range<u64>, Option<u64>)> {
        let sources = [
            StepSource::Program,
            StepSource::Optimizer,
            StepSource::RootCall,
        ];
        let source = sources
            .into_iter()
            .find(|wanted| self.steps.iter().any(|(_, source, _)| source == wanted));
        let mut steps = Vec::new();
        let mut start = 0;
        for (ordinal, _, step) in self.steps.iter().filter(|(_, of, _)| Some(*of) == source) {
            steps.push((start..*ordinal, Some(*step)));
            start = ordinal + 1;
        }
        if start < records {
            steps.push((start..records, None));
        }
        steps
    }
}

struct Reading<'a> {
    timeline: Timeline,
    dictionary: &'a Dictionary,
    wanted: &'a [String],
    /// Where ranges that are wanted began.
    open: HashMap<(ThreadId, TextId), Vec<u64>>,
    /// How many modules run.
    depth: HashMap<ThreadId, u64>,
    /// Whether a name is wanted.
    names: HashMap<TextId, bool>,
}

impl Reading<'_> {
    fn is_wanted(&mut self, name: TextId) -> bool {
        if let Some(wanted) = self.names.get(&name) {
            return *wanted;
        }
        let text = self.dictionary.text(name);
        let wanted = text.is_some_and(|text| self.wanted.contains(text));
        self.timeline.range_names.extend(text.cloned());
        self.names.insert(name, wanted);
        wanted
    }

    fn take(&mut self, ordinal: u64, moment: &Moment) {
        if matches!(
            moment.event,
            Event::StepMark { .. } | Event::RangeEnter { .. } | Event::RangeExit { .. }
        ) {
            self.timeline.times.push((ordinal, moment.time_ns));
        }
        match &moment.event {
            Event::RangeEnter { name } if self.is_wanted(*name) => {
                self.open
                    .entry((moment.thread, *name))
                    .or_default()
                    .push(ordinal);
            }
            Event::RangeExit { name } => {
                if let Some(start) = self
                    .open
                    .get_mut(&(moment.thread, *name))
                    .and_then(Vec::pop)
                {
                    self.timeline.inside.push(start + 1..ordinal);
                }
            }
            Event::StepMark { step, source } => self.timeline.steps.push((ordinal, *source, *step)),
            Event::Samples { count } => self.timeline.samples.push((ordinal, *count)),
            Event::ModuleEnter { module, .. } => {
                let depth = self.depth.entry(moment.thread).or_default();
                self.timeline
                    .module_calls
                    .push((ordinal, module.0, *depth == 0));
                *depth += 1;
            }
            Event::ModuleExit { .. } => {
                let depth = self.depth.entry(moment.thread).or_default();
                *depth = depth.saturating_sub(1);
            }
            Event::Opaque { name, .. } => self.timeline.opaque.push((ordinal, *name)),
            Event::Paused { .. } => self.timeline.pauses += 1,
            Event::Disabled { reason } => self.timeline.disabled.push(reason.clone()),
            Event::Fact {
                module: Some(module),
                key,
                value,
            } if self
                .dictionary
                .text(*key)
                .is_some_and(|key| key == "step_mode") =>
            {
                self.timeline
                    .multi_step
                    .insert(module.0, value.trim_matches('"') == "m");
            }
            _ => {}
        }
    }

    /// A range that does not end reaches to the last record.
    fn finish(mut self, records: u64) -> Timeline {
        let found = &mut self.timeline.inside;
        found.extend(
            self.open
                .into_values()
                .flatten()
                .map(|start| start + 1..records),
        );
        found.retain(|range| !range.is_empty());
        found.sort_by_key(|range| (range.start, range.end));
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(found.len());
        for range in found.drain(..) {
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        *found = joined;
        self.timeline
    }
}

/// What ran outside of the dispatcher (code that torch.compile has made, CUDA graphs) in a whole stream: how often, by name. `None`: a long
/// stream whose process did not say, for which one would have to read all of it.
///
/// # Errors
/// Where the file cannot be read.
pub fn opaque_regions(
    trace: &Trace,
    stream: &Stream,
) -> Result<Option<BTreeMap<String, u64>>, TraceError> {
    if let Some(end) = stream
        .end()
        .filter(|end| end.costs.contains_key(OPAQUE_REGIONS))
    {
        let told = end
            .costs
            .iter()
            .filter_map(|(name, count)| Some((name.strip_prefix(OPAQUE_COST)?.to_owned(), *count)));
        return Ok(Some(told.collect()));
    }
    if stream.records() > SHORT_RECORDS {
        return Ok(None);
    }
    let mut regions = BTreeMap::new();
    for (_, moment) in trace.moments(stream.id())? {
        if let Event::Opaque { name, .. } = moment.event
            && let Some(name) = stream.dictionary().text(name)
        {
            *regions.entry(name.clone()).or_default() += 1;
        }
    }
    Ok(Some(regions))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Traces;
    use crate::testing::Tape;

    fn inside(fill: impl FnOnce(&mut Tape)) -> Vec<Range<u64>> {
        let mut tape = Tape::new();
        fill(&mut tape);
        let traces = Traces::of("ranges", tape.trace());
        let at = traces.streams().next().unwrap();
        Timeline::read(at, true, &["measure".to_owned()])
            .unwrap()
            .inside
    }

    #[test]
    fn ranges_are_strictly_inside_and_joined_where_they_overlap() {
        let simple = inside(|tape| {
            tape.enter_range("measure");
            tape.step(0);
            tape.step(1);
            tape.exit_range("measure");
        });
        assert_eq!(
            simple.iter().map(|r| (r.start, r.end)).collect::<Vec<_>>(),
            [(1, 3)]
        );
        let nested = inside(|tape| {
            tape.enter_range("measure");
            tape.enter_range("measure");
            tape.step(0);
            tape.exit_range("measure");
            tape.step(1);
            tape.exit_range("measure");
        });
        assert_eq!(
            nested.iter().map(|r| (r.start, r.end)).collect::<Vec<_>>(),
            [(1, 5)]
        );
        let open = inside(|tape| {
            tape.step(0);
            tape.enter_range("measure");
            tape.step(1);
        });
        assert_eq!(
            open.iter().map(|r| (r.start, r.end)).collect::<Vec<_>>(),
            [(2, 3)]
        );
        let empty = inside(|tape| {
            tape.enter_range("measure");
            tape.exit_range("measure");
        });
        assert_eq!(empty, Vec::new());
        let other = inside(|tape| {
            tape.enter_range("other");
            tape.step(0);
            tape.exit_range("other");
        });
        assert_eq!(other, Vec::new());
    }
}
