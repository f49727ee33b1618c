//! What sensors measured while the ops ran: joules, mean power and peak memory of a selection, from the samples of the
//! recorder's monitors.
//!
//! Ops and samples meet on the clock. A selection is a set of time intervals of one process, the one of the file with the
//! most op calls; where stages matter, the time from one op's start to the next one's belongs to the stage of the first. Energy is
//! the difference of a cumulative counter between the ends of an interval, the counter taken as linear between two samples. So
//! what is shorter than the sampling interval gets that interval's mean power, and on a GPU, which runs behind the program, energy belongs to what
//! the program did at the time, not to the kernel that used it.

use std::collections::BTreeMap;
use std::ops::Range;

use optape_trace::series::{self, SeriesName};
use optape_trace::{Columns, Event, Stream};

use crate::error::ReplayError;
use crate::load::{StreamRef, Traces, text};
use crate::report::{HardwareReport, Measured, Ordered, SeriesReport};
use crate::selection::{Pieces, Selection, stage_of};
use crate::timeline::Timeline;

/// What is said of every measured energy.
const BOUNDARY: &str = "measured by sensors, whole devices, whoever used them; linear between samples; never added to modelled energies";

/// Intervals of wall time, nanoseconds since the Unix epoch: in order, without overlap.
type Intervals = Vec<Range<u64>>;

/// A series, read.
struct Series {
    name: String,
    /// Time in nanoseconds since the Unix epoch, and value; in order of time.
    samples: Vec<(u64, f64)>,
}

impl Series {
    fn parsed(&self) -> SeriesName<'_> {
        SeriesName::parse(&self.name)
    }

    fn is(&self, quantity: &series::Quantity) -> bool {
        self.parsed().quantity == quantity.name
    }

    /// The value at a time between the first and the last sample, linear between two.
    #[expect(
        clippy::cast_precision_loss,
        reason = "differences of times within a recording are exact enough"
    )]
    fn at(&self, time: u64) -> Option<f64> {
        let next = self.samples.partition_point(|(at, _)| *at < time);
        let (after, value_after) = *self.samples.get(next).or(self.samples.last())?;
        let Some((before, value_before)) = next.checked_sub(1).and_then(|i| self.samples.get(i))
        else {
            return Some(value_after);
        };
        if time >= after || after == *before {
            return Some(value_after);
        }
        let share = (time - before) as f64 / (after - before) as f64;
        Some(value_before + share * (value_after - value_before))
    }

    /// From the first to the last sample.
    fn span(&self) -> Option<Range<u64>> {
        Some(self.samples.first()?.0..self.samples.last()?.0)
    }

    /// How far a cumulative series went within intervals, and how many nanoseconds of them its samples cover.
    fn advance(&self, intervals: &Intervals) -> Option<(f64, u64)> {
        let span = self.span()?;
        let (mut sum, mut covered) = (0.0, 0);
        for interval in intervals {
            let (from, to) = (interval.start.max(span.start), interval.end.min(span.end));
            if from < to {
                sum += self.at(to)? - self.at(from)?;
                covered += to - from;
            }
        }
        Some((sum, covered))
    }

    /// Mean over time of a series that says what is at the moment: trapezoids.
    #[expect(clippy::cast_precision_loss, reason = "as above")]
    fn mean(&self, intervals: &Intervals) -> Option<f64> {
        let span = self.span()?;
        let (mut area, mut covered) = (0.0, 0u64);
        for interval in intervals {
            let (from, to) = (interval.start.max(span.start), interval.end.min(span.end));
            let mut at = from;
            let mut next = self.samples.partition_point(|(time, _)| *time <= from);
            while at < to {
                let until = self
                    .samples
                    .get(next)
                    .map_or(to, |(time, _)| (*time).min(to));
                area += (until - at) as f64 * 0.5 * (self.at(at)? + self.at(until)?);
                covered += until - at;
                at = until;
                next += 1;
            }
        }
        (covered > 0).then(|| area / covered as f64)
    }

    /// The greatest sample within intervals.
    fn peak(&self, intervals: &Intervals) -> Option<f64> {
        let inside = intervals.iter().flat_map(|interval| {
            let from = self
                .samples
                .partition_point(|(time, _)| *time < interval.start);
            let to = self
                .samples
                .partition_point(|(time, _)| *time <= interval.end);
            self.samples.get(from..to).unwrap_or_default()
        });
        inside.map(|(_, value)| *value).reduce(f64::max)
    }
}

/// The monitors of one file.
struct Monitors {
    source: usize,
    series: Vec<Series>,
    facts: BTreeMap<String, serde_json::Value>,
}

impl Monitors {
    fn read(traces: &Traces, at: StreamRef<'_>) -> Result<Self, ReplayError> {
        let dictionary = at.stream.dictionary();
        let epoch = traces.epoch_unix_ns(at);
        let mut by_text: BTreeMap<u32, Series> = BTreeMap::new();
        let mut facts = BTreeMap::new();
        let moments = at
            .trace
            .moments(at.stream.id())
            .map_err(|e| traces.error(at.source, e))?;
        for (_, moment) in moments {
            match moment.event {
                Event::Sample { series, value } => by_text
                    .entry(series.0)
                    .or_insert_with(|| Series {
                        name: text(dictionary, series),
                        samples: Vec::new(),
                    })
                    .samples
                    .push((epoch.saturating_add(moment.time_ns), value)),
                Event::Fact {
                    module: None,
                    key,
                    value,
                } => {
                    let value =
                        serde_json::from_str(&value).unwrap_or(serde_json::Value::String(value));
                    facts.insert(text(dictionary, key), value);
                }
                _ => {}
            }
        }
        let mut series: Vec<Series> = by_text.into_values().collect();
        for series in &mut series {
            series.samples.sort_by_key(|(time, _)| *time);
        }
        Ok(Self {
            source: at.source,
            series,
            facts,
        })
    }
}

/// When things happened in the process that the monitors of a file are held against.
struct Clock<'a> {
    at: StreamRef<'a>,
    epoch_unix_ns: u64,
    timeline: &'a Timeline,
    /// Stages by time, where they are asked for: since when, and which. Behind the last one there is none.
    stages: Option<Vec<(u64, StageName)>>,
}

/// A stage's name as reports show it, and that of the stage that the program gave another name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct StageName {
    shown: String,
    plain: &'static str,
}

impl Clock<'_> {
    fn unix_ns(&self, time_ns: u64) -> u64 {
        self.epoch_unix_ns.saturating_add(time_ns)
    }

    /// From the first to the last record.
    fn whole(&self) -> Range<u64> {
        let blocks = self.at.stream.blocks();
        let first = blocks.iter().map(|b| b.first_ns).min().unwrap_or(0);
        let last = blocks.iter().map(|b| b.last_ns).max().unwrap_or(0);
        self.unix_ns(first)..self.unix_ns(last)
    }

    /// The time of records that stand together. Pieces begin and end at marks, whose times the timeline knows.
    fn interval(&self, ordinals: &Range<u64>) -> Range<u64> {
        let whole = self.whole();
        let from = match ordinals.start.checked_sub(1) {
            None => whole.start,
            Some(before) => self
                .timeline
                .time_of(before)
                .or_else(|| self.timeline.time_of(ordinals.start))
                .map_or(whole.start, |time| self.unix_ns(time)),
        };
        let to = self
            .timeline
            .time_of(ordinals.end)
            .map_or(whole.end, |time| self.unix_ns(time));
        from..to.max(from)
    }

    fn intervals<'p>(&self, pieces: impl Iterator<Item = &'p Range<u64>>) -> Intervals {
        joined(pieces.map(|ordinals| self.interval(ordinals)).collect())
    }

    /// The times of stages whose name is wanted.
    fn stage_intervals(&self, wanted: impl Fn(&StageName) -> bool) -> Intervals {
        let end = self.whole().end;
        let stages = self.stages.as_deref().unwrap_or_default();
        let mut intervals = Vec::new();
        for (at, (from, stage)) in stages.iter().enumerate() {
            if wanted(stage) {
                let to = stages.get(at + 1).map_or(end, |(next, _)| *next);
                intervals.push(*from..to.max(*from));
            }
        }
        joined(intervals)
    }
}

/// In order, overlaps and neighbours joined, empty ones left out.
fn joined(mut intervals: Intervals) -> Intervals {
    intervals.sort_by_key(|i| i.start);
    let mut all: Intervals = Vec::with_capacity(intervals.len());
    for interval in intervals.into_iter().filter(|i| !i.is_empty()) {
        match all.last_mut() {
            Some(last) if interval.start <= last.end => last.end = last.end.max(interval.end),
            _ => all.push(interval),
        }
    }
    all
}

/// What is in both.
fn both(a: &Intervals, b: &Intervals) -> Intervals {
    let mut all = Vec::new();
    for interval in a {
        let first = b.partition_point(|other| other.end <= interval.start);
        for other in b
            .iter()
            .skip(first)
            .take_while(|other| other.start < interval.end)
        {
            all.push(interval.start.max(other.start)..interval.end.min(other.end));
        }
    }
    joined(all)
}

/// Since when which stage ran: op calls in the order of their starts.
fn stages(traces: &Traces, at: StreamRef<'_>) -> Result<Vec<(u64, StageName)>, ReplayError> {
    let dictionary = at.stream.dictionary();
    let epoch = traces.epoch_unix_ns(at);
    let names: BTreeMap<u32, StageName> = dictionary
        .signatures()
        .map(|(id, signature)| {
            let name = StageName {
                shown: stage_of(dictionary, signature),
                plain: signature.stage.name(),
            };
            (id.0, name)
        })
        .collect();
    let mut all: Vec<(u64, StageName)> = Vec::new();
    let mut last_ns = 0;
    for (index, entry) in at.stream.blocks().iter().enumerate() {
        if entry.op_calls == 0 {
            continue;
        }
        let block = at
            .trace
            .block(at.stream.id(), index, Columns::START | Columns::SIGNATURES)
            .map_err(|e| traces.error(at.source, e))?;
        let mut calls: Vec<(u64, u32)> = block
            .start_ns
            .iter()
            .copied()
            .zip(block.signatures.iter().copied())
            .collect();
        // Nested calls are recorded before the one that they are nested in.
        calls.sort_by_key(|(start, _)| *start);
        for (start, signature) in calls {
            let Some(name) = names.get(&signature) else {
                continue;
            };
            if all.last().is_none_or(|(_, stage)| stage != name) {
                last_ns = start.max(last_ns);
                all.push((epoch.saturating_add(last_ns), name.clone()));
            }
        }
    }
    Ok(all)
}

/// Monitors of all files, held against a selection.
pub(crate) struct Measurement<'a> {
    monitors: Vec<Monitors>,
    /// By file: its clock, and the selected pieces of that process with their steps.
    clocks: BTreeMap<usize, (Clock<'a>, Pieces)>,
    selection: &'a Selection,
}

/// What is asked of a measurement.
pub(crate) enum Part<'a> {
    All,
    Stage(&'a str),
    Step(Option<u64>),
}

impl<'a> Measurement<'a> {
    /// Reads the monitors; `None` where there are none. `by_stage`: parts are asked for by stage; `by_step`: by step.
    pub(crate) fn read(
        traces: &'a Traces,
        timelines: &'a [Timeline],
        selection: &'a Selection,
        by_stage: bool,
        by_step: bool,
    ) -> Result<Option<Self>, ReplayError> {
        let monitors = traces
            .monitors()
            .map(|at| Monitors::read(traces, at))
            .collect::<Result<Vec<_>, _>>()?;
        if monitors.is_empty() {
            return Ok(None);
        }
        let mut clocks = BTreeMap::new();
        let measures_energy = |source: usize| {
            monitors
                .iter()
                .any(|m| m.source == source && !m.series.is_empty())
        };
        for source in 0..traces.sources.len() {
            let candidates = traces
                .streams()
                .zip(timelines)
                .filter(|(at, _)| at.source == source && selection.takes(*at));
            // The first of those with the most calls.
            let busiest = candidates.fold(
                None,
                |best: Option<(StreamRef<'a>, &Timeline)>, next| match best {
                    Some(best) if best.0.stream.op_calls() >= next.0.stream.op_calls() => {
                        Some(best)
                    }
                    _ => Some(next),
                },
            );
            let Some((at, timeline)) = busiest.filter(|_| measures_energy(source)) else {
                continue;
            };
            let needed = by_stage || !selection.stages.is_empty();
            let clock = Clock {
                at,
                epoch_unix_ns: traces.epoch_unix_ns(at),
                timeline,
                stages: needed.then(|| stages(traces, at)).transpose()?,
            };
            let pieces = selection.pieces(at, timeline, by_step);
            clocks.insert(source, (clock, pieces));
        }
        Ok(Some(Self {
            monitors,
            clocks,
            selection,
        }))
    }

    /// Why energies cannot be narrowed down to the selection, if so.
    pub(crate) fn refusal(&self) -> Option<String> {
        let selection = self.selection;
        let flags: Vec<&str> = [
            ("--scope", !selection.scopes.is_empty()),
            ("--op", !selection.ops.is_empty()),
            ("--exclude", !selection.exclude.is_empty()),
        ]
        .into_iter()
        .filter_map(|(flag, given)| given.then_some(flag))
        .collect();
        (!flags.is_empty()).then(|| {
            format!(
                "sensors measure time, not ops: what they measured cannot be narrowed down by {}; select by --range, --step or --stage",
                flags.join(", ")
            )
        })
    }

    /// Names of series and devices, told apart by file where several files have monitors.
    fn shown(&self, monitors: &Monitors, name: &str) -> String {
        if self.monitors.len() > 1 {
            format!("trace{}/{name}", monitors.source)
        } else {
            name.to_owned()
        }
    }

    /// What was measured in a part of the selection.
    #[expect(clippy::cast_precision_loss, reason = "seconds of a recording")]
    pub(crate) fn measured(&self, part: &Part<'_>) -> Measured {
        let mut measured = Measured::default();
        let (mut energies, mut powers, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
        for monitors in &self.monitors {
            let Some((clock, pieces)) = self.clocks.get(&monitors.source) else {
                continue;
            };
            let chosen = pieces.pieces.iter().filter(|piece| match part {
                Part::Step(step) => piece.step == *step,
                _ => true,
            });
            let mut intervals = clock.intervals(chosen.map(|piece| &piece.ordinals));
            if !self.selection.stages.is_empty() {
                let wanted = |stage: &StageName| {
                    let chosen = &self.selection.stages;
                    chosen.iter().any(|s| *s == stage.shown || s == stage.plain)
                };
                intervals = both(&intervals, &clock.stage_intervals(wanted));
            }
            if let Part::Stage(stage) = part {
                intervals = both(
                    &intervals,
                    &clock.stage_intervals(|other| other.shown == *stage),
                );
            }
            let total: u64 = intervals.iter().map(|i| i.end - i.start).sum();
            measured.seconds = measured.seconds.max(total as f64 / 1e9);
            let mut devices_with_energy = Vec::new();
            for one in monitors.series.iter().filter(|s| s.is(&series::ENERGY)) {
                let device = self.shown(monitors, one.parsed().device);
                let Some((joules, covered)) = one.advance(&intervals) else {
                    continue;
                };
                if covered < total {
                    let lacking = (total - covered) as f64 / 1e9;
                    measured.uncovered_seconds = measured.uncovered_seconds.max(lacking);
                }
                devices_with_energy.push(one.parsed().device);
                // What no sample covers is unknown, not zero.
                if covered > 0 {
                    powers.push((device.clone(), joules / (covered as f64 / 1e9)));
                    energies.push((device, joules));
                }
            }
            for one in monitors.series.iter().filter(|s| s.is(&series::POWER)) {
                let device = one.parsed().device;
                if !devices_with_energy.contains(&device)
                    && let Some(milliwatts) = one.mean(&intervals)
                {
                    powers.push((self.shown(monitors, device), milliwatts / 1e3));
                }
            }
            let memory = |s: &&Series| s.is(&series::MEMORY_USED) || s.is(&series::RESIDENT);
            for one in monitors.series.iter().filter(memory) {
                if let Some(bytes) = one.peak(&intervals) {
                    peaks.push((self.shown(monitors, one.parsed().device), bytes));
                }
            }
        }
        measured.energy_j = energies.into_iter().collect();
        measured.mean_power_w = powers.into_iter().collect();
        measured.peak_memory_bytes = peaks.into_iter().collect();
        measured
    }

    /// The whole section of a report.
    pub(crate) fn report(&self) -> HardwareReport {
        let mut all = Vec::new();
        let mut facts = BTreeMap::new();
        for monitors in &self.monitors {
            for one in &monitors.series {
                all.push((self.shown(monitors, &one.name), series_report(one)));
            }
            for (key, value) in &monitors.facts {
                facts.insert(self.shown(monitors, key), value.clone());
            }
        }
        HardwareReport {
            boundary: BOUNDARY,
            measured: self.refusal().is_none().then(|| self.measured(&Part::All)),
            part_of: self.parts(),
            series: all.into_iter().collect(),
            facts,
        }
    }

    /// Devices whose energy another one's holds, so that nobody adds them.
    fn parts(&self) -> Ordered<String> {
        let parts = self.monitors.iter().flat_map(|monitors| {
            let energies = monitors.series.iter().filter(|s| s.is(&series::ENERGY));
            energies.filter_map(|s| {
                let whole = s.parsed().energy_is_part_of()?;
                Some((
                    self.shown(monitors, s.parsed().device),
                    self.shown(monitors, whole),
                ))
            })
        });
        parts.collect()
    }
}

#[expect(clippy::cast_precision_loss, reason = "means are floats")]
fn series_report(series: &Series) -> SeriesReport {
    let known = series.parsed().known();
    let values = series.samples.iter().map(|(_, value)| *value);
    let cumulative = known.is_some_and(|q| q.cumulative);
    SeriesReport {
        unit: known.map(|q| q.unit),
        cumulative,
        samples: series.samples.len() as u64,
        minimum: values.clone().reduce(f64::min),
        mean: (!cumulative && !series.samples.is_empty())
            .then(|| values.clone().sum::<f64>() / series.samples.len() as f64),
        maximum: values.reduce(f64::max),
    }
}

/// How many samples each series of a stream has, in the order of first use: for overviews.
///
/// # Errors
/// Where the trace cannot be read.
pub fn sample_counts(
    trace: &optape_trace::Trace,
    stream: &Stream,
) -> Result<Vec<(String, u64)>, optape_trace::TraceError> {
    let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
    for (_, moment) in trace.moments(stream.id())? {
        if let Event::Sample { series, .. } = moment.event {
            *counts.entry(series.0).or_default() += 1;
        }
    }
    let name = |id: u32| text(stream.dictionary(), optape_trace::TextId(id));
    Ok(counts
        .into_iter()
        .map(|(id, count)| (name(id), count))
        .collect())
}

/// The facts of a stream that are about no module, by key: a monitors' stream says in them which sources there were.
///
/// # Errors
/// Where the trace cannot be read.
pub fn facts(
    trace: &optape_trace::Trace,
    stream: &Stream,
) -> Result<BTreeMap<String, serde_json::Value>, optape_trace::TraceError> {
    let mut facts = BTreeMap::new();
    for (_, moment) in trace.moments(stream.id())? {
        if let Event::Fact {
            module: None,
            key,
            value,
        } = moment.event
        {
            let value = serde_json::from_str(&value).unwrap_or(serde_json::Value::String(value));
            facts.insert(text(stream.dictionary(), key), value);
        }
    }
    Ok(facts)
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "one interval is meant, not its numbers"
)]
mod tests {
    use super::*;

    fn series(name: &str, samples: &[(u64, f64)]) -> Series {
        Series {
            name: name.to_owned(),
            samples: samples.to_vec(),
        }
    }

    #[test]
    fn counters_are_linear_between_samples_and_unknown_outside() {
        let energy = series("gpu0/energy_j", &[(100, 0.0), (200, 10.0), (300, 40.0)]);
        let advance = |intervals: &[Range<u64>]| energy.advance(&intervals.to_vec()).unwrap();
        assert_eq!(advance(&[100..300]), (40.0, 200));
        assert_eq!(advance(&[150..250]), (20.0, 100));
        assert_eq!(advance(&[150..160, 290..400]), (1.0 + 3.0, 20));
        assert_eq!(advance(&[0..100, 300..400]), (0.0, 0));
        assert_eq!(series("x", &[]).advance(&vec![0..1]), None);
        assert_eq!(
            series("x", &[(5, 1.0)]).advance(&vec![0..10]),
            Some((0.0, 0))
        );
        // The parts of an interval make up the whole.
        let parts: f64 = (10..31).map(|n| advance(&[n * 10..n * 10 + 10]).0).sum();
        assert!((parts - 40.0).abs() < 1e-12);
    }

    #[test]
    fn means_are_over_time_and_peaks_over_samples() {
        let power = series("gpu0/power_mw", &[(0, 0.0), (10, 100.0), (30, 100.0)]);
        assert_eq!(power.mean(&vec![0..10]), Some(50.0));
        assert_eq!(power.mean(&vec![0..20]), Some(75.0));
        assert_eq!(
            power.mean(&vec![5..10, 20..100]),
            Some((5.0 * 75.0 + 10.0 * 100.0) / 15.0)
        );
        assert_eq!(power.mean(&vec![40..50]), None);
        let memory = series("gpu0/memory_used_bytes", &[(0, 1.0), (10, 7.0), (20, 3.0)]);
        assert_eq!(memory.peak(&vec![0..20]), Some(7.0));
        assert_eq!(memory.peak(&vec![0..9, 11..30]), Some(3.0));
        assert_eq!(memory.peak(&vec![11..19]), None);
    }

    #[test]
    fn intervals_are_cut() {
        assert_eq!(joined(vec![5..7, 1..3, 3..4, 6..9, 8..8]), [1..4, 5..9]);
        assert_eq!(
            both(&vec![0..10, 20..30], &vec![5..25, 28..40]),
            [5..10, 20..25, 28..30]
        );
        assert_eq!(both(&vec![0..10], &vec![10..20]), Vec::new());
    }
}
