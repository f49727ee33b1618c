//! Two replays side by side: two runs, two rule sets, two parts of a run, a spiking network against one that does not spike.
//!
//! [`diff`] replays both and aligns what they say: totals by counter and model, rows by scope (or op, module, stage, step), firing
//! rates by layer. What only one of them has is shown as such, and what makes the two incomparable is said: other rules, other
//! selections, other costs, ops that only one ran or only one has rules for.
//!
//! ```no_run
//! use optape_replay::diff::{DiffOptions, Side, diff};
//! use optape_replay::rules::RuleSet;
//! use optape_replay::{Format, Request, Traces};
//!
//! let (before, after) = (Traces::open(&["before.optape"])?, Traces::open(&["after.optape"])?);
//! let (rules, request) = (RuleSet::named("optape")?, Request::default());
//! let side = |traces| Side { traces, rules: &rules, request: &request };
//! let diff = diff(side(&before), side(&after), &DiffOptions::default())?;
//! diff.write(Format::Table, &mut std::io::stdout())?;
//! # Ok::<(), optape_replay::ReplayError>(())
//! ```

mod align;
mod limit;
#[cfg(test)]
mod tests;
mod write;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::energy;
use crate::error::ReplayError;
use crate::evaluate::{By, Request, Wanted, evaluate};
use crate::load::Traces;
use crate::report::{Group, Report, RulesInfo, SelectionInfo, SourceInfo, StreamReport, numbers};
use crate::rules::RuleSet;

use align::{Names, Pair};

pub use limit::{Bound, Direction, Limit};

/// One of the two that are compared.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// The files.
    pub traces: &'a Traces,
    /// The rules.
    pub rules: &'a RuleSet,
    /// What of them; its grouping is not looked at.
    pub request: &'a Request,
}

/// How two replays are compared.
#[derive(Clone, Debug, PartialEq)]
pub struct DiffOptions {
    /// What rows are.
    pub by: By,
    /// Modules of the first that are others of the second, with everything inside.
    pub map: Vec<(String, String)>,
    /// How much may differ.
    pub limits: Vec<Limit>,
    /// Limits hold for every row, too, and not for totals alone.
    pub limit_rows: bool,
}

impl Default for DiffOptions {
    fn default() -> Self {
        Self {
            by: By::Scope,
            map: Vec::new(),
            limits: Vec::new(),
            limit_rows: false,
        }
    }
}

/// A number of a report.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Amount {
    /// A count.
    Integer(i128),
    /// A quantity, or a mean.
    Float(f64),
}

impl Amount {
    /// As a float.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "for ratios; counts beyond 2^53 keep 53 bits"
    )]
    pub const fn value(self) -> f64 {
        match self {
            Self::Integer(value) => value as f64,
            Self::Float(value) => value,
        }
    }

    fn minus(self, other: Self) -> Self {
        match (self, other) {
            (Self::Integer(a), Self::Integer(b)) => Self::Integer(a.saturating_sub(b)),
            (a, b) => Self::Float(a.value() - b.value()),
        }
    }

    fn is_zero(self) -> bool {
        match self {
            Self::Integer(value) => value == 0,
            Self::Float(value) => value == 0.0,
        }
    }
}

/// A counter or a model in both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// `counters/flop`, `energy/compute_fp32`, `measured/cpu`, `calls`.
    pub metric: String,
    /// Its unit.
    pub unit: String,
    /// In the first; absent where it has no such row.
    pub a: Option<Amount>,
    /// In the second.
    pub b: Option<Amount>,
    /// The second less the first.
    pub difference: Option<Amount>,
    /// The difference over the first; absent where that is zero and the second is not.
    pub relative: Option<f64>,
}

impl Change {
    fn of(metric: &Metric, a: Option<Amount>, b: Option<Amount>) -> Self {
        let difference = a.zip(b).map(|(a, b)| b.minus(a));
        let relative = difference.and_then(|difference| match a {
            _ if difference.is_zero() => Some(0.0),
            Some(a) if !a.is_zero() => Some(difference.value() / a.value().abs()),
            _ => None,
        });
        Self {
            metric: metric.name.clone(),
            unit: metric.unit.clone(),
            a,
            b,
            difference,
            relative,
        }
    }

    /// Both have it, and the same of it.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.difference.is_some_and(Amount::is_zero)
    }
}

/// A row: a scope, an op, a module, a stage, a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DiffRow {
    /// Its name in the first; absent where only the second has it.
    pub a: Option<String>,
    /// Its name in the second.
    pub b: Option<String>,
    /// In the order of the totals.
    pub changes: Vec<Change>,
}

impl DiffRow {
    /// Its name; both where they differ in more than the root's.
    #[must_use]
    pub fn name(&self, root: Option<&(String, String)>) -> String {
        row_name(self.a.as_deref(), self.b.as_deref(), root)
    }

    /// Both have it, with the same numbers.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.changes.iter().all(Change::is_equal)
    }
}

fn row_name(a: Option<&str>, b: Option<&str>, root: Option<&(String, String)>) -> String {
    match (a, b) {
        (Some(a), Some(b)) => {
            let renamed = root.and_then(|(from, to)| align::moved(a, from, to));
            if a == b || renamed.as_deref() == Some(b) {
                a.to_owned()
            } else {
                format!("{a} = {b}")
            }
        }
        (Some(only), None) | (None, Some(only)) => only.to_owned(),
        (None, None) => String::new(),
    }
}

/// A spiking layer in both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RateRow {
    /// Its name in the first.
    pub a: Option<String>,
    /// Its name in the second.
    pub b: Option<String>,
    /// Spikes per neuron and time step in the first; absent where it has no such layer, or no rate of it.
    pub rate_a: Option<f64>,
    /// In the second.
    pub rate_b: Option<f64>,
    /// The second less the first.
    pub difference: Option<f64>,
}

/// Ops that do not match.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OpsDiff {
    /// Ops that only the first ran, and how many calls.
    pub only_a: BTreeMap<String, u64>,
    /// Ops that only the second ran.
    pub only_b: BTreeMap<String, u64>,
    /// By counter: ops of the first without a rule.
    pub unknown_a: BTreeMap<String, BTreeMap<String, u64>>,
    /// By counter: ops of the second without a rule.
    pub unknown_b: BTreeMap<String, BTreeMap<String, u64>>,
}

/// What one of the two is.
#[derive(Clone, Debug, Serialize)]
pub struct SideInfo {
    /// The files.
    pub trace: Vec<SourceInfo>,
    /// Their selected streams.
    pub streams: Vec<StreamReport>,
    /// The rules.
    pub rules: RulesInfo,
    /// What of them.
    pub selection: SelectionInfo,
    /// Selected op calls that ran.
    pub op_calls: u64,
    /// The stages in words.
    pub stages: String,
    /// Share of zeros in what the first layer with weights reads.
    pub input_sparsity: Option<f64>,
    /// What its totals were divided by, and how many there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per: Option<(String, u64)>,
    /// Truncation, damage, drops.
    pub notes: Vec<String>,
}

impl SideInfo {
    fn of(report: &Report) -> Self {
        Self {
            trace: report.trace.clone(),
            streams: report.streams.clone(),
            rules: report.rules.clone(),
            selection: report.selection.clone(),
            op_calls: report.coverage.op_calls,
            stages: report.basis.extent.clone(),
            input_sparsity: report.basis.input.as_ref().and_then(|i| i.input.sparsity),
            per: report
                .per
                .as_ref()
                .map(|per| (per.unit.to_owned(), per.divisor)),
            notes: report.notes.clone(),
        }
    }
}

/// A limit that is passed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Exceeded {
    /// As it was given.
    pub limit: String,
    /// The row; absent for a total.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub row: Option<String>,
    /// What passes it.
    pub change: Change,
}

impl Exceeded {
    /// In a line.
    #[must_use]
    pub fn text(&self) -> String {
        let row = self
            .row
            .as_ref()
            .map_or_else(String::new, |row| format!(" of {row}"));
        format!(
            "{}{row} is past {}: {} -> {} ({})",
            self.change.metric,
            self.limit,
            write::amount(self.change.a, &self.change.unit),
            write::amount(self.change.b, &self.change.unit),
            write::relative(&self.change)
        )
    }
}

/// What differs.
#[derive(Clone, Debug, Serialize)]
pub struct Diff {
    /// Version of this shape.
    pub schema: u32,
    /// Version of optape that compared.
    pub optape: String,
    /// The first.
    pub a: SideInfo,
    /// The second.
    pub b: SideInfo,
    /// What makes the two other than alike, beside the numbers.
    pub setup: Vec<String>,
    /// The root module of the first that was taken for one of another name in the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<(String, String)>,
    /// Totals (means, where they were divided).
    pub totals: Vec<Change>,
    /// What rows are.
    pub by: String,
    /// Rows, in the order of first use.
    pub rows: Vec<DiffRow>,
    /// Spiking layers.
    pub firing_rates: Vec<RateRow>,
    /// Ops that do not match.
    pub ops: OpsDiff,
    /// What was not compared, and why.
    pub not_compared: BTreeMap<String, String>,
    /// Limits that are passed.
    pub exceeded: Vec<Exceeded>,
}

/// Replays both and compares what they say.
///
/// Counters and models that follow the stream have totals alone, and scopes where the counter has them: their numbers belong to
/// no op.
///
/// # Errors
/// As [`evaluate`]; where the two have no counter and no model in common; and where a name of [`DiffOptions::map`] or
/// [`DiffOptions::limits`] does not exist.
pub fn diff(a: Side<'_>, b: Side<'_>, options: &DiffOptions) -> Result<Diff, ReplayError> {
    let replayed = |side: Side<'_>| -> Result<(Report, Report), ReplayError> {
        let totals = Request {
            by: None,
            ..side.request.clone()
        };
        let whole = evaluate(side.traces, side.rules, &totals)?;
        let rows = groupable(side.rules, side.request, options.by)?;
        Ok((whole, evaluate(side.traces, side.rules, &rows)?))
    };
    let (a, rows_a) = replayed(a)?;
    let (b, rows_b) = replayed(b)?;
    Diff::of((&a, &rows_a), (&b, &rows_b), options)
}

/// The request for rows, without what cannot be grouped.
fn groupable(rules: &RuleSet, request: &Request, by: By) -> Result<Request, ReplayError> {
    let counters = match &request.counters {
        Wanted::Usual | Wanted::All => Wanted::Usual,
        Wanted::Named(names) => {
            let rows = |name: &&String| rules.counter(name).is_some_and(|c| c.is_usual());
            Wanted::Named(names.iter().filter(rows).cloned().collect())
        }
    };
    let of_ops = |file: &energy::CostFile| energy::model(file).simulation().is_none();
    let energy = match &request.energy {
        Wanted::Usual | Wanted::All => Wanted::Usual,
        Wanted::Named(names) => {
            let mut rows = Vec::new();
            for name in names {
                let file = energy::CostFile::preset(name, rules.name, rules.models)?;
                if of_ops(&file) {
                    rows.push(name.clone());
                }
            }
            Wanted::Named(rows)
        }
    };
    Ok(Request {
        by: Some(by),
        counters,
        energy,
        costs: request
            .costs
            .iter()
            .filter(|file| of_ops(file))
            .cloned()
            .collect(),
        ..request.clone()
    })
}

/// Something that both may have numbers of.
struct Metric {
    name: String,
    unit: String,
}

/// Where a metric's name begins with this, the rest is a counter's.
const COUNTERS: &str = "counters/";
const ENERGY: &str = "energy/";
const MEASURED: &str = "measured/";
const CALLS: &str = "calls";

impl Diff {
    /// Compares what was replayed already: of each side the whole, and the same request grouped by [`DiffOptions::by`].
    ///
    /// # Errors
    /// Where the two have no counter and no model in common; and where a name of [`DiffOptions::map`] or
    /// [`DiffOptions::limits`] does not exist.
    pub fn of(
        a: (&Report, &Report),
        b: (&Report, &Report),
        options: &DiffOptions,
    ) -> Result<Self, ReplayError> {
        let ((a, rows_a), (b, rows_b)) = (a, b);
        let mut not_compared = BTreeMap::new();
        let metrics = metrics(a, b, &mut not_compared);
        if !metrics.iter().any(|m| m.name != CALLS) {
            let why: String = not_compared
                .iter()
                .map(|(name, why)| format!("\n  {name}: {why}"))
                .collect();
            return Err(ReplayError::Selection(format!(
                "the two have no counter and no energy model in common{why}"
            )));
        }
        let totals: Vec<Change> = metrics
            .iter()
            .map(|metric| Change::of(metric, total(a, &metric.name), total(b, &metric.name)))
            .collect();
        let names = Names::of(scopes(a, rows_a), scopes(b, rows_b), &options.map)?;
        let aligned = matches!(options.by, By::Scope | By::Module);
        let (groups_a, groups_b) = (groups(rows_a), groups(rows_b));
        let keys = |groups: &[Group]| groups.iter().map(|g| g.key.clone()).collect::<Vec<_>>();
        let same = Names::default();
        let pairs = align::pairs(
            &keys(groups_a),
            &keys(groups_b),
            if aligned { &names } else { &same },
        );
        let by_scope = options.by == By::Scope;
        let rows: Vec<DiffRow> = pairs
            .into_iter()
            .map(|pair| row(&pair, &metrics, [(a, groups_a), (b, groups_b)], by_scope))
            .collect();
        let mut diff = Self {
            schema: 1,
            optape: env!("CARGO_PKG_VERSION").to_owned(),
            a: SideInfo::of(a),
            b: SideInfo::of(b),
            setup: setup(a, b),
            firing_rates: rates(a, b, &names),
            root: names.root.clone(),
            totals,
            by: options.by.name().to_owned(),
            rows,
            ops: ops(a, b),
            not_compared,
            exceeded: Vec::new(),
        };
        if let Some((from, to)) = &diff.root {
            diff.setup
                .push(format!("the module {from} of A is taken for {to} of B"));
        }
        for (from, to) in &options.map {
            diff.setup
                .push(format!("{from} of A is taken for {to} of B"));
        }
        diff.exceeded = diff.past(options)?;
        Ok(diff)
    }

    /// What passes the limits.
    fn past(&self, options: &DiffOptions) -> Result<Vec<Exceeded>, ReplayError> {
        let mut exceeded = Vec::new();
        for limit in &options.limits {
            let metric = limit.metric(&self.totals, &self.not_compared)?;
            // How many calls there are is no estimate: it counts where it is named.
            let concerned = |change: &&Change| match metric {
                Some(name) => change.metric == name,
                None => change.metric != CALLS,
            };
            let mut add = |row: Option<String>, change: &Change| {
                if limit.is_passed_by(change) {
                    exceeded.push(Exceeded {
                        limit: limit.to_string(),
                        row,
                        change: change.clone(),
                    });
                }
            };
            for change in self.totals.iter().filter(concerned) {
                add(None, change);
            }
            if options.limit_rows {
                for row in &self.rows {
                    for change in row.changes.iter().filter(concerned) {
                        add(Some(row.name(self.root.as_ref())), change);
                    }
                }
            }
        }
        Ok(exceeded)
    }

    /// Both say the same of everything that was compared.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.totals.iter().all(Change::is_equal) && self.rows.iter().all(DiffRow::is_equal)
    }
}

/// What both have, in the order of the first; what only one has is not compared.
fn metrics(a: &Report, b: &Report, not_compared: &mut BTreeMap<String, String>) -> Vec<Metric> {
    let mut metrics = Vec::new();
    if a.per.is_none() && b.per.is_none() {
        metrics.push(Metric {
            name: CALLS.to_owned(),
            unit: "op call".to_owned(),
        });
    }
    let (of_a, of_b) = (named(a), named(b));
    for (name, unit) in &of_a {
        match of_b.iter().find(|(other, _)| other == name) {
            Some((_, other)) if other == unit => metrics.push(Metric {
                name: name.clone(),
                unit: unit.clone(),
            }),
            Some((_, other)) => {
                not_compared.insert(name.clone(), format!("{unit} in A, {other} in B"));
            }
            None => {
                not_compared.insert(name.clone(), absent(b, "B", name));
            }
        }
    }
    for (name, _) in &of_b {
        if !of_a.iter().any(|(other, _)| other == name) {
            not_compared.insert(name.clone(), absent(a, "A", name));
        }
    }
    for (side, report) in [("A", a), ("B", b)] {
        for (name, why) in &report.skipped {
            not_compared
                .entry(name.clone())
                .or_insert_with(|| format!("not computed in {side}: {why}"));
        }
    }
    metrics
}

fn absent(report: &Report, side: &str, name: &str) -> String {
    match report.skipped.get(name) {
        Some(why) => format!("not computed in {side}: {why}"),
        None if name.starts_with(MEASURED) => format!("no such measurement in {side}"),
        None => format!("{side} has none: its rules are {}", report.rules.name),
    }
}

/// Names and units of all that a report has.
fn named(report: &Report) -> Vec<(String, String)> {
    let counters = report
        .counters
        .iter()
        .map(|(name, c)| (format!("{COUNTERS}{name}"), c.unit.clone()));
    let energy = report
        .energy
        .iter()
        .map(|(name, e)| (format!("{ENERGY}{name}"), e.unit.to_owned()));
    let measured = measured(report)
        .into_iter()
        .flat_map(|m| m.energy_j.iter())
        .map(|(device, _)| (format!("{MEASURED}{device}"), "J".to_owned()));
    counters.chain(energy).chain(measured).collect()
}

fn measured(report: &Report) -> Option<&crate::report::Measured> {
    report
        .monitors
        .as_ref()
        .and_then(|m| m.hardware.measured.as_ref())
}

fn total(report: &Report, metric: &str) -> Option<Amount> {
    if metric == CALLS {
        return Some(Amount::Integer(i128::from(report.coverage.op_calls)));
    }
    if let Some(name) = metric.strip_prefix(COUNTERS) {
        return match &report.per {
            Some(per) => per.counters.get(name).copied().map(Amount::Float),
            None => Some(Amount::Integer(report.counters.get(name)?.total)),
        };
    }
    if let Some(name) = metric.strip_prefix(ENERGY) {
        return match &report.per {
            Some(per) => per.energy_total_pj.get(name).copied().map(Amount::Float),
            None => Some(Amount::Float(report.energy.get(name)?.total_pj)),
        };
    }
    let device = metric.strip_prefix(MEASURED)?;
    let joules = match &report.per {
        Some(per) => per.measured_j.get(device).copied(),
        None => measured(report)?.energy_j.get(device).copied(),
    };
    joules.map(Amount::Float)
}

fn groups(report: &Report) -> &[Group] {
    report.groups.as_deref().unwrap_or_default()
}

/// Every scope that a report names.
fn scopes(report: &Report, rows: &Report) -> BTreeSet<String> {
    let of_counters = report.counters.values().flat_map(|c| c.scopes.keys());
    let mut scopes: BTreeSet<String> = of_counters.cloned().collect();
    scopes.extend(report.firing_rates.iter().map(|layer| layer.module.clone()));
    if matches!(rows.by.as_deref(), Some("scope" | "module")) {
        scopes.extend(groups(rows).iter().map(|group| group.key.clone()));
    }
    scopes
}

fn row(
    pair: &Pair,
    metrics: &[Metric],
    sides: [(&Report, &[Group]); 2],
    by_scope: bool,
) -> DiffRow {
    let value = |side: usize, key: Option<&String>, metric: &str| {
        let ((report, groups), key) = (sides.get(side)?, key?);
        let group = groups.iter().find(|group| group.key == *key)?;
        amount_of(report, group, metric, by_scope)
    };
    let changes = metrics
        .iter()
        .filter_map(|metric| {
            let a = value(0, pair.a.as_ref(), &metric.name);
            let b = value(1, pair.b.as_ref(), &metric.name);
            (a.is_some() || b.is_some()).then(|| Change::of(metric, a, b))
        })
        .collect();
    DiffRow {
        a: pair.a.clone(),
        b: pair.b.clone(),
        changes,
    }
}

fn amount_of(report: &Report, group: &Group, metric: &str, by_scope: bool) -> Option<Amount> {
    if metric == CALLS {
        return Some(Amount::Integer(i128::from(group.calls)));
    }
    let divided = report.per.is_some();
    if let Some(name) = metric.strip_prefix(COUNTERS) {
        let of_group = match &group.per {
            Some(per) => per.counters.get(name).copied().map(Amount::Float),
            None if divided => None,
            None => group.counters.get(name).map(|c| Amount::Integer(c.total)),
        };
        // What follows the stream has no groups, but scopes.
        let of_scope = || {
            let counter = report.counters.get(name)?;
            let scopes = by_scope && !divided && !counter.scopes.is_empty();
            scopes.then(|| {
                let ops = counter.scopes.get(&group.key);
                Amount::Integer(ops.map_or(0, |ops| ops.values().sum()))
            })
        };
        return of_group.or_else(of_scope);
    }
    if let Some(name) = metric.strip_prefix(ENERGY) {
        return match &group.per {
            Some(per) => per.energy_total_pj.get(name).copied().map(Amount::Float),
            None if divided => None,
            None => group.energy.get(name).map(|e| Amount::Float(e.total_pj)),
        };
    }
    let device = metric.strip_prefix(MEASURED)?;
    let joules = match &group.per {
        Some(per) => per.measured_j.get(device).copied(),
        None if divided => None,
        None => group.measured.as_ref()?.energy_j.get(device).copied(),
    };
    joules.map(Amount::Float)
}

fn rates(a: &Report, b: &Report, names: &Names) -> Vec<RateRow> {
    let modules = |report: &Report| -> Vec<String> {
        let layers = report.firing_rates.iter();
        layers.map(|layer| layer.module.clone()).collect()
    };
    let rate = |report: &Report, module: Option<&String>| {
        let layer = report
            .firing_rates
            .iter()
            .find(|layer| Some(&layer.module) == module)?;
        layer.rate
    };
    align::pairs(&modules(a), &modules(b), names)
        .into_iter()
        .map(|pair| {
            let (rate_a, rate_b) = (rate(a, pair.a.as_ref()), rate(b, pair.b.as_ref()));
            RateRow {
                a: pair.a,
                b: pair.b,
                rate_a,
                rate_b,
                difference: rate_a.zip(rate_b).map(|(a, b)| b - a),
            }
        })
        .collect()
}

fn ops(a: &Report, b: &Report) -> OpsDiff {
    let only = |these: &Report, others: &Report| {
        let ops = these.ops.iter();
        ops.filter(|(op, _)| !others.ops.contains_key(*op))
            .map(|(op, calls)| (op.clone(), *calls))
            .collect()
    };
    let unknown = |report: &Report| {
        let counters = report.coverage.counters.iter();
        counters
            .filter(|(_, c)| !c.unknown_ops.is_empty())
            .map(|(name, c)| (name.to_owned(), c.unknown_ops.clone()))
            .collect()
    };
    OpsDiff {
        only_a: only(a, b),
        only_b: only(b, a),
        unknown_a: unknown(a),
        unknown_b: unknown(b),
    }
}

/// What makes the two other than alike, beside what ran.
fn setup(a: &Report, b: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    let other = |text_a: &str, text_b: &str, what: &str| {
        (text_a != text_b).then(|| format!("other {what}: {text_a} in A, {text_b} in B"))
    };
    let rules = |report: &Report| format!("{} ({})", report.rules.name, report.rules.version);
    notes.extend(other(&rules(a), &rules(b), "rules"));
    let selection = |report: &Report| match report.selection.text() {
        text if text.is_empty() => "everything".to_owned(),
        text => text,
    };
    notes.extend(other(&selection(a), &selection(b), "selections"));
    notes.extend(other(&a.basis.extent, &b.basis.extent, "stages"));
    let statistics = |report: &Report| {
        let kinds: BTreeSet<&str> = report.trace.iter().map(|t| t.statistics.as_str()).collect();
        kinds.into_iter().collect::<Vec<_>>().join(", ")
    };
    notes.extend(other(&statistics(a), &statistics(b), "statistics recorded"));
    let per = |report: &Report| {
        report.per.as_ref().map_or_else(String::new, |per| {
            let divisor = numbers::grouped(i128::from(per.divisor));
            format!("{divisor} of {}", per.unit)
        })
    };
    notes.extend(other(&per(a), &per(b), "divisors"));
    let mut shares: Vec<((f64, f64), Vec<&str>)> = Vec::new();
    for (name, of_a) in a.coverage.counters.iter() {
        let Some(of_b) = b.coverage.counters.get(name) else {
            continue;
        };
        let both = (of_a.share, of_b.share);
        match shares.iter_mut().find(|(known, _)| *known == both) {
            Some((_, names)) => names.push(name),
            None => shares.push((both, vec![name])),
        }
    }
    for ((of_a, of_b), names) in shares {
        if of_a < 1.0 || of_b < 1.0 {
            notes.push(format!(
                "{}: {} of A's op calls are covered, {} of B's",
                names.join(", "),
                numbers::percent(of_a),
                numbers::percent(of_b)
            ));
        }
    }
    for (name, of_a) in a.energy.iter() {
        let Some(of_b) = b.energy.get(name) else {
            continue;
        };
        notes.extend(other(
            &of_a.estimator,
            &of_b.estimator,
            &format!("models behind {name}"),
        ));
        let mut keys: BTreeSet<&str> = of_a.config.iter().map(|(key, _)| key).collect();
        keys.extend(of_b.config.iter().map(|(key, _)| key));
        let differing: Vec<&str> = keys
            .into_iter()
            .filter(|key| of_a.config.get(key) != of_b.config.get(key))
            .collect();
        if !differing.is_empty() {
            notes.push(format!(
                "other costs or settings of {name}: {}",
                differing.join(", ")
            ));
        }
    }
    for (side, report) in [("A", a), ("B", b)] {
        for (name, counter) in report.counters.iter().filter(|(_, c)| c.partial) {
            notes.push(format!("{name} of {side} is partial ({})", counter.unit));
        }
        notes.extend(report.notes.iter().map(|note| format!("{side}: {note}")));
    }
    let runs = |report: &Report| -> BTreeSet<String> {
        report.trace.iter().map(|t| t.run_uuid.clone()).collect()
    };
    if runs(a) == runs(b) {
        notes.push("both are of the same run".to_owned());
    }
    notes
}
