//! What a replay says, as data, and the ways to write it down.

mod csv;
mod json;
mod latex;
mod markdown;
pub(crate) mod numbers;
pub(crate) mod section;
mod table;

use std::collections::BTreeMap;
use std::io::Write;

use serde::Serialize;

use optape_trace::TraceEnd;

use crate::basis::Basis;
use crate::energy::EnergyReport;
use crate::error::ReplayError;
use crate::load::{Source, StreamRef};
use crate::ordered::Tree;
use crate::selection::{Selection, steps_text};

pub use numbers::{grouped, scaled};

/// What totals are divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Per {
    /// Nothing.
    #[default]
    Run,
    /// Whole steps.
    Step,
    /// Samples (images).
    Sample,
    /// Calls of the root module, or of the group's module.
    Call,
}

impl Per {
    /// As the flag names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Step => "step",
            Self::Sample => "sample",
            Self::Call => "call",
        }
    }
}

/// An ordered map that is written as an object: reports keep the order of rule sets and first use, not the alphabet.
#[derive(Clone, Debug, PartialEq)]
pub struct Ordered<T>(Vec<(String, T)>);

impl<T> Default for Ordered<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Ordered<T> {
    /// A value by name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value)
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// Values, in order.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }

    /// Adds a value behind the others.
    pub fn push(&mut self, name: &str, value: T) {
        self.0.push((name.to_owned(), value));
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T> FromIterator<(String, T)> for Ordered<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

impl<T: Serialize> Serialize for Ordered<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// A replay's result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this shape.
    pub schema: u32,
    /// Version of optape that replayed.
    pub optape: String,
    /// The files.
    pub trace: Vec<SourceInfo>,
    /// Their selected streams.
    pub streams: Vec<StreamReport>,
    /// The rules that counted.
    pub rules: RulesInfo,
    /// What was looked at.
    pub selection: SelectionInfo,
    /// What the groups are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// What was and what was not counted.
    pub coverage: Coverage,
    /// What the figures are of: estimators, stages, costs, sparsity of the input.
    pub basis: Basis,
    /// Counters, in the order of the rule set.
    pub counters: Ordered<CounterReport>,
    /// Energy models.
    pub energy: Ordered<EnergyReport>,
    /// What monitors saw meanwhile, where any ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitors: Option<MonitorsReport>,
    /// Spiking layers, in the order in which they first fired.
    pub firing_rates: Vec<FiringRate>,
    /// Totals divided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per: Option<Normalised>,
    /// Totals per sample (image), where the number of samples is known and nothing else was to be divided by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_sample: Option<Normalised>,
    /// Groups, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<Group>>,
    /// `section/name` of what could not be computed, and why.
    pub skipped: BTreeMap<String, String>,
    /// Truncation, damage, drops.
    pub notes: Vec<String>,
    /// Ops that ran, as the rule set names them, and how many calls.
    #[serde(skip)]
    pub ops: BTreeMap<String, u64>,
}

/// A file.
#[derive(Clone, Debug, Serialize)]
pub struct SourceInfo {
    /// Its path as it was given.
    pub path: String,
    /// The run that it belongs to.
    pub run_uuid: String,
    /// The recorded command.
    pub command: Vec<String>,
    /// Host of the recording.
    pub host: String,
    /// Start of the recording.
    pub started_unix_ns: u64,
    /// Version of optape that recorded.
    pub recorded_by: String,
    /// `none`, `rules`, `all`.
    pub statistics: String,
    /// Version of the needs table that capture used.
    pub needs_version: u32,
    /// `clean`, `unfinished`, `damaged`.
    pub end: &'static str,
}

impl SourceInfo {
    pub(crate) fn of(source: &Source) -> Self {
        let run = source.trace.run();
        Self {
            path: source.path.display().to_string(),
            run_uuid: uuid_text(&run.run_uuid),
            command: run.command.clone(),
            host: run.host.clone(),
            started_unix_ns: run.started_unix_ns,
            recorded_by: run.optape_version.clone(),
            statistics: run.statistics.clone(),
            needs_version: run.needs_version,
            end: match source.trace.end() {
                TraceEnd::Clean(_) => "clean",
                TraceEnd::Unfinished { .. } => "unfinished",
                TraceEnd::Damaged { .. } => "damaged",
            },
        }
    }
}

/// A UUID in its usual form.
#[must_use]
pub fn uuid_text(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// A recorded process.
#[derive(Clone, Debug, Serialize)]
pub struct StreamReport {
    /// Index into `trace`.
    pub trace: usize,
    /// Number in its file.
    pub id: u32,
    /// Process id.
    pub process_id: u32,
    /// Rank, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// Names and versions.
    pub versions: BTreeMap<String, String>,
    /// Records in the file.
    pub records: u64,
    /// Op calls among them.
    pub op_calls: u64,
    /// Records that were lost.
    pub dropped_records: u64,
}

impl StreamReport {
    pub(crate) fn of(at: StreamRef<'_>) -> Self {
        let info = at.stream.info();
        Self {
            trace: at.source,
            id: at.stream.id().0,
            process_id: info.process_id,
            rank: info.rank,
            versions: info.versions.clone(),
            records: at.stream.records(),
            op_calls: at.stream.op_calls(),
            dropped_records: at.stream.dropped_records(),
        }
    }
}

/// The rules.
#[derive(Clone, Debug, Serialize)]
pub struct RulesInfo {
    /// Name of the set.
    pub name: String,
    /// Its version.
    pub version: u32,
    /// One line.
    pub description: String,
}

/// The selection, as it was given.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SelectionInfo {
    /// Ranges.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub range: Vec<String>,
    /// Steps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub step: Vec<String>,
    /// Stages.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stage: Vec<String>,
    /// Scopes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scope: Vec<String>,
    /// Ops.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub op: Vec<String>,
    /// Ranks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rank: Vec<u32>,
    /// Excluded modules.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

impl SelectionInfo {
    pub(crate) fn of(selection: &Selection) -> Self {
        let texts =
            |globs: &[crate::selection::Glob]| globs.iter().map(ToString::to_string).collect();
        Self {
            range: selection.ranges.clone(),
            step: selection.steps.iter().map(steps_text).collect(),
            stage: selection.stages.clone(),
            scope: texts(&selection.scopes),
            op: texts(&selection.ops),
            rank: selection.ranks.clone(),
            exclude: texts(&selection.exclude),
        }
    }

    /// As flags; empty for everything.
    #[must_use]
    pub fn text(&self) -> String {
        let mut parts = Vec::new();
        let named: [(&str, &Vec<String>); 6] = [
            ("--range", &self.range),
            ("--step", &self.step),
            ("--stage", &self.stage),
            ("--scope", &self.scope),
            ("--op", &self.op),
            ("--exclude", &self.exclude),
        ];
        for (flag, values) in named {
            parts.extend(values.iter().map(|value| format!("{flag} {value}")));
        }
        parts.extend(self.rank.iter().map(|rank| format!("--rank {rank}")));
        parts.join(" ")
    }
}

/// What was and what was not counted, in op calls. The recorder's own calls (watches, range marks) are in no figure.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Coverage {
    /// Selected calls that ran.
    pub op_calls: u64,
    /// Calls that no kernel computed (tracing, compiling); counted by no rule.
    pub not_executed: u64,
    /// Calls that ran and whose module could not be found; they are counted, under `Global` alone.
    pub unattributed: u64,
    /// Selected regions that ran outside of the dispatcher (compiled code, CUDA graphs): work that no figure holds. Absent
    /// where the run is long and its summaries were enough, so that nobody looked.
    pub opaque_regions: Option<u64>,
    /// Records that were lost while recording, in the whole streams.
    pub dropped_records: u64,
    /// Each counter's.
    pub counters: Ordered<CounterCoverage>,
}

/// What a counter counted.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CounterCoverage {
    /// Calls with a number.
    pub counted: u64,
    /// Calls that count nothing, by rule.
    pub zero_by_rule: u64,
    /// Calls of ops without a rule.
    pub unknown: u64,
    /// Calls whose rule needs statistics that the trace does not hold.
    pub without_statistics: u64,
    /// Calls at which the rules fail.
    pub failed: u64,
    /// Share of calls that have a number or are zero by rule.
    pub share: f64,
    /// Ops without a rule, and how many calls.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub unknown_ops: BTreeMap<String, u64>,
    /// What is missing, and for how many calls.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub missing: BTreeMap<String, u64>,
    /// Failures, and how many calls.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, u64>,
}

impl CounterCoverage {
    pub(crate) fn finish(&mut self) {
        let known = self.counted + self.zero_by_rule;
        let all = known + self.unknown + self.without_statistics + self.failed;
        #[expect(clippy::cast_precision_loss, reason = "a share is a float")]
        let share = if all == 0 {
            1.0
        } else {
            known as f64 / all as f64
        };
        self.share = share;
    }
}

/// A counter's result.
#[derive(Clone, Debug, Serialize)]
pub struct CounterReport {
    /// Sum over all selected calls.
    pub total: i128,
    /// `FLOP`, `byte`.
    pub unit: String,
    /// Scope, op, number; zeros are left out. A call counts in every scope on its stack.
    pub scopes: BTreeMap<String, BTreeMap<String, i128>>,
    /// Ops without a rule and how often they occurred, for rule sets that report it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unsupported: Option<BTreeMap<String, u64>>,
    /// Calls without statistics count as zero (`--lenient`).
    #[serde(skip_serializing_if = "is_false")]
    pub partial: bool,
    /// What the counter has beside its count: metrics by scope, bits by level, operations by stage.
    #[serde(flatten)]
    pub details: BTreeMap<&'static str, Tree>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// A spiking layer.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FiringRate {
    /// Its scope.
    pub module: String,
    /// Its class.
    pub class: String,
    /// Calls of it.
    pub calls: u64,
    /// Time steps of all calls, where the trace says how many a call has.
    pub time_steps: Option<u64>,
    /// Shape of its last output.
    pub shape: Vec<i64>,
    /// Elements of all outputs.
    pub elements: u128,
    /// Nonzeros of all outputs.
    pub spikes: u128,
    /// Every output was binary.
    pub binary: bool,
    /// Spikes over elements; absent where an output was not binary or has no statistics.
    pub rate: Option<f64>,
    /// Calls without statistics.
    #[serde(skip_serializing_if = "is_zero")]
    pub without_statistics: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
const fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// What monitors saw.
#[derive(Clone, Debug, Serialize)]
pub struct MonitorsReport {
    /// The machine's sensors.
    pub hardware: HardwareReport,
}

/// What the machine's sensors said.
#[derive(Clone, Debug, Serialize)]
pub struct HardwareReport {
    /// What measured energies hold and what not.
    pub boundary: &'static str,
    /// In the selection; absent where a selection of ops or modules cannot be told in time.
    pub measured: Option<Measured>,
    /// Devices whose energy another one's holds: they are not to be added.
    #[serde(skip_serializing_if = "Ordered::is_empty")]
    pub part_of: Ordered<String>,
    /// All series, in the whole recording.
    pub series: Ordered<SeriesReport>,
    /// Which sources there were, what devices are, what is missing and why.
    pub facts: BTreeMap<String, serde_json::Value>,
}

/// Measured quantities of a span of time, by device.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// How long it is (of several files, the longest).
    pub seconds: f64,
    /// Of it, not covered by samples of some energy counter: what was used then is in no figure.
    pub uncovered_seconds: f64,
    /// Joules, from cumulative counters; devices that no sample covers are left out.
    pub energy_j: Ordered<f64>,
    /// Watts: energy over covered time where there is a counter, else the mean of the sampled power.
    pub mean_power_w: Ordered<f64>,
    /// The greatest sample of memory in use; devices without a sample in that time are left out.
    pub peak_memory_bytes: Ordered<f64>,
}

/// A series of samples.
#[derive(Clone, Debug, Serialize)]
pub struct SeriesReport {
    /// Its unit, where this version knows the quantity.
    pub unit: Option<&'static str>,
    /// It counts from the start of the monitoring.
    pub cumulative: bool,
    /// How many samples there are.
    pub samples: u64,
    /// The least.
    pub minimum: Option<f64>,
    /// Their mean; absent for cumulative ones.
    pub mean: Option<f64>,
    /// The greatest.
    pub maximum: Option<f64>,
}

/// Totals divided by something.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Normalised {
    /// By what.
    pub unit: &'static str,
    /// How many there are.
    pub divisor: u64,
    /// Counters.
    pub counters: Ordered<f64>,
    /// Energies in pJ.
    pub energy_total_pj: Ordered<f64>,
    /// Measured joules, by device.
    #[serde(skip_serializing_if = "Ordered::is_empty")]
    pub measured_j: Ordered<f64>,
}

impl Normalised {
    #[expect(clippy::cast_precision_loss, reason = "means are floats")]
    pub(crate) fn of(
        per: Per,
        divisor: u64,
        counters: impl Iterator<Item = (String, i128)>,
        energy: impl Iterator<Item = (String, f64)>,
        measured: Option<&Measured>,
    ) -> Self {
        Self {
            unit: per.name(),
            divisor,
            counters: counters
                .map(|(name, total)| (name, total as f64 / divisor as f64))
                .collect(),
            energy_total_pj: energy
                .map(|(name, total)| (name, total / divisor as f64))
                .collect(),
            measured_j: measured
                .into_iter()
                .flat_map(|measured| measured.energy_j.iter())
                .map(|(device, joules)| (device.to_owned(), joules / divisor as f64))
                .collect(),
        }
    }
}

/// One group of `--by`.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// The scope, op, stage or step.
    pub key: String,
    /// Op calls in it.
    pub calls: u64,
    /// Counters.
    pub counters: Ordered<GroupCounter>,
    /// Energy models.
    pub energy: Ordered<EnergyReport>,
    /// What sensors measured meanwhile; by stage and step alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// Totals divided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per: Option<Normalised>,
}

/// A counter of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GroupCounter {
    /// Sum over the group.
    pub total: i128,
}

/// How a report is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For spreadsheets.
    Csv,
    /// For documents.
    Markdown,
    /// For papers.
    Latex,
}

impl Report {
    /// Whether every selected call that ran has a rule in every counter.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.coverage.counters.values().all(|c| c.unknown == 0)
    }

    /// Writes the report.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write(&self, format: Format, out: &mut dyn Write) -> Result<(), ReplayError> {
        match format {
            Format::Table => table::write(self, out),
            Format::Json => json::write(self, out),
            Format::Csv => csv::write(self, out),
            Format::Markdown => markdown::write(self, out),
            Format::Latex => latex::write(self, out),
        }
    }
}
