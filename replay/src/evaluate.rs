//! Applies rules to rows and puts the results together: totals, scopes, groups, energy, coverage.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use optape_trace::{Dictionary, OpDef, Pattern, SignatureDef, call_flags};

use crate::aggregate::{self, Reading, Row, Rows};
use crate::basis::{Basis, FigureBasis};
use crate::energy::{self, CostFile, EnergyModel, EnergyReport, Given};
use crate::error::ReplayError;
use crate::firing;
use crate::load::{Traces, stack};
use crate::monitors::{Measurement, Part};
use crate::ordered::{Amounts, Following, Place, RowKey, walk};
use crate::report::{
    CounterCoverage, CounterReport, Coverage, Group, GroupCounter, Measured, MonitorsReport,
    Normalised, Ordered, Per, Report, RulesInfo, SelectionInfo, SourceInfo, StreamReport,
};
use crate::rules::{CallRow, Counted, Counter, MissingLevel, RuleError, RuleSet};
use crate::selection::{Divisors, Selection, stage_of};
use crate::timeline::Timeline;

/// Which estimators to evaluate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// What answers the first questions, from summaries; what cannot be had is skipped, with the reason.
    #[default]
    Usual,
    /// All that the rule set has; what cannot be had is skipped, with the reason.
    All,
    /// These; what cannot be had is an error.
    Named(Vec<String>),
}

/// What groups are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum By {
    /// Modules with everything inside: a call counts in every module on its stack.
    Scope,
    /// Overloads.
    Op,
    /// Stages.
    Stage,
    /// Steps.
    Step,
    /// Modules without what is inside of others: a call counts in its innermost module alone.
    Module,
}

impl By {
    /// As the flag names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scope => "scope",
            Self::Op => "op",
            Self::Stage => "stage",
            Self::Step => "step",
            Self::Module => "module",
        }
    }
}

/// A replay.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// What to look at.
    pub selection: Selection,
    /// Counters.
    pub counters: Wanted,
    /// Energy presets.
    pub energy: Wanted,
    /// Energy models with costs of the user's.
    pub costs: Vec<CostFile>,
    /// Grouping.
    pub by: Option<By>,
    /// What totals are divided by.
    pub per: Per,
    /// Number of samples, where the program did not report it.
    pub samples: Option<u64>,
    /// Count what can be counted where a level is missing, and mark the total as partial.
    pub lenient: bool,
    /// Read events even where summaries would do.
    pub from_events: bool,
    /// Threads that read events; 0: as many as there are processors.
    pub threads: usize,
}

/// What kind of call a row is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An op that ran.
    Op,
    /// An op that no kernel computed.
    NotExecuted,
    /// A watched value: the recorder's own.
    Watch,
    /// A call of a Python function, which the ops that it ran stand beside.
    Function,
    /// The begin or end of a range.
    Range,
}

/// What all rows of a signature have in common.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) kind: Kind,
    /// `aten.add.Tensor`, as the rule set's reports name it.
    pub(crate) shown: Arc<str>,
    /// Names on the stack as a set, `Global` among them.
    pub(crate) scopes: Arc<[String]>,
    /// The innermost module.
    pub(crate) module: String,
    pub(crate) stage: String,
    pub(crate) unattributed: bool,
}

/// A row with what is known about its signature.
pub(crate) struct Seen<'a> {
    pub(crate) row: &'a Row,
    pub(crate) facts: Arc<Facts>,
    pub(crate) call: CallRow<'a>,
    pub(crate) dictionary: &'a Dictionary,
}

impl Seen<'_> {
    /// The groups that it is in.
    pub(crate) fn keys(&self, by: By) -> Vec<String> {
        match by {
            By::Scope => self.facts.scopes.to_vec(),
            By::Op => vec![self.facts.shown.to_string()],
            By::Stage => vec![self.facts.stage.clone()],
            By::Module => vec![self.facts.module.clone()],
            By::Step => vec![
                self.row
                    .step
                    .map_or_else(|| "-".to_owned(), |step| step.to_string()),
            ],
        }
    }
}

pub(crate) fn kind_of(op: &OpDef, flags: u32) -> Kind {
    if op.name.starts_with("profiler::") {
        Kind::Range
    } else if op.name.starts_with("optape::") {
        Kind::Watch
    } else if op.function().is_some() {
        Kind::Function
    } else if flags & call_flags::NOT_EXECUTED != 0 {
        Kind::NotExecuted
    } else {
        Kind::Op
    }
}

fn facts_of(
    rules: &RuleSet,
    dictionary: &Dictionary,
    signature: &SignatureDef,
    op: &OpDef,
) -> Facts {
    let stack = stack(dictionary, signature.scope);
    let module = stack
        .first()
        .map_or_else(|| "Global".to_owned(), |(name, _)| name.clone());
    let mut scopes: Vec<String> = stack.into_iter().map(|(name, _)| name).collect();
    scopes.sort_unstable();
    scopes.dedup();
    Facts {
        kind: kind_of(op, signature.flags),
        shown: rules.shown_name(op, signature.flags).into(),
        scopes: scopes.into(),
        module,
        stage: stage_of(dictionary, signature),
        unattributed: signature.flags & call_flags::UNATTRIBUTED != 0,
    }
}

pub(crate) const NO_PATTERN: &Pattern = &Pattern {
    entries: Vec::new(),
};

/// Looks up what the rows mean.
pub(crate) fn see<'a>(traces: &'a Traces, rules: &RuleSet, rows: &'a [Row]) -> Vec<Seen<'a>> {
    let mut known: HashMap<(usize, usize, u32), Arc<Facts>> = HashMap::new();
    let mut all = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(stream) = traces
            .sources
            .get(row.source)
            .and_then(|s| s.trace.streams().get(row.stream))
        else {
            continue;
        };
        let dictionary = stream.dictionary();
        let Some(signature) = dictionary.signature(row.sums.signature) else {
            continue;
        };
        let Some(op) = dictionary.op(signature.op) else {
            continue;
        };
        let facts = known
            .entry((row.source, row.stream, row.sums.signature.0))
            .or_insert_with(|| Arc::new(facts_of(rules, dictionary, signature, op)))
            .clone();
        let call = rules.seen(CallRow {
            op,
            signature,
            pattern: dictionary.pattern(row.sums.pattern).unwrap_or(NO_PATTERN),
            calls: row.sums.calls,
            integer_sums: &row.sums.integer_sums,
            float_sums: &row.sums.float_sums,
            values_before: false,
            dictionary: Some(dictionary),
            notes: None,
        });
        all.push(Seen {
            row,
            facts,
            call,
            dictionary,
        });
    }
    all
}

/// A counter's verdict on every row, or why it is skipped.
pub(crate) struct Outcome<'a> {
    counter: &'a dyn Counter,
    /// One per row; `None` for rows that are no executed ops.
    pub(crate) counted: Vec<Option<Counted>>,
    refusal: Option<Refusal>,
    /// What the counter has beside the rows.
    amounts: Amounts,
    /// It followed the stream.
    followed: bool,
}

enum Refusal {
    Missing(Box<MissingLevel>),
    Failed(String),
}

impl Refusal {
    fn of(error: &RuleError) -> Self {
        match error {
            RuleError::Missing(missing) => Self::Missing(missing.clone()),
            RuleError::Failed(text) | RuleError::Unsuited(text) => Self::Failed(text.clone()),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Missing(missing) => missing.to_string(),
            Self::Failed(text) => text.clone(),
        }
    }

    fn error(&self, estimator: &str) -> ReplayError {
        match self {
            Self::Missing(missing) => ReplayError::MissingLevel {
                estimator: estimator.to_owned(),
                missing: missing.clone(),
            },
            Self::Failed(reason) => ReplayError::Refused {
                estimator: estimator.to_owned(),
                reason: reason.clone(),
            },
        }
    }
}

/// What something that follows the streams has added up, and what it met.
#[derive(Default)]
pub(crate) struct Followed {
    amounts: Amounts,
    pub(crate) errors: Vec<RuleError>,
}

impl Followed {
    /// Why there is no result; what is missing is none with `lenient`.
    fn refusal(&self, lenient: bool) -> Option<Refusal> {
        let counts = |e: &&RuleError| !lenient || !matches!(e, RuleError::Missing(_));
        self.errors.iter().find(counts).map(Refusal::of)
    }
}

pub(crate) fn run<'a>(
    counter: &'a dyn Counter,
    seen: &[Seen<'_>],
    lenient: bool,
    followed: Option<Followed>,
) -> Outcome<'a> {
    let value_of = |s: &Seen<'_>| {
        let followed = followed.as_ref()?;
        followed.amounts.rows.get(&row_key(s.row)).copied()
    };
    let counted: Vec<Option<Counted>> = seen
        .iter()
        .map(|s| {
            (s.facts.kind == Kind::Op)
                .then(|| value_of(s).map_or_else(|| counter.count(&s.call), Counted::Value))
        })
        .collect();
    let mut refusal = followed.as_ref().and_then(|f| f.refusal(lenient));
    for counted in counted.iter().flatten() {
        match counted {
            Counted::Failed(text) => {
                refusal = Some(Refusal::Failed(text.clone()));
                break;
            }
            Counted::Missing(missing) if !lenient && refusal.is_none() => {
                refusal = Some(Refusal::Missing(missing.clone()));
            }
            _ => {}
        }
    }
    let is_followed = followed.is_some();
    let amounts = match followed {
        Some(followed) => followed.amounts,
        None => {
            let mut amounts = Amounts::default();
            for s in seen.iter().filter(|s| s.facts.kind == Kind::Op) {
                amounts.place = Place {
                    scopes: Arc::clone(&s.facts.scopes),
                    op: Arc::clone(&s.facts.shown),
                    row: None,
                };
                counter.amounts(&s.call, &mut amounts);
            }
            amounts
        }
    };
    Outcome {
        counter,
        counted,
        refusal,
        amounts,
        followed: is_followed,
    }
}

const fn row_key(row: &Row) -> RowKey {
    (
        row.source,
        row.stream,
        row.step,
        row.sums.signature,
        row.sums.pattern,
    )
}

impl Outcome<'_> {
    fn value(&self, row: usize) -> i128 {
        match self.counted.get(row) {
            Some(Some(Counted::Value(value))) => *value,
            _ => 0,
        }
    }

    fn is_partial(&self) -> bool {
        self.counted
            .iter()
            .flatten()
            .any(|c| matches!(c, Counted::Missing(_)))
    }

    fn matched(&self) -> bool {
        self.counted
            .iter()
            .flatten()
            .any(|c| matches!(c, Counted::Value(_) | Counted::Zero))
    }

    /// Whether its count is the sum over rows, so that it can be grouped.
    fn counts_ops(&self) -> bool {
        !self.followed || self.amounts.rows.values().sum::<i128>() == self.amounts.total
    }

    fn report(&self, seen: &[Seen<'_>], lists_unsupported: bool) -> CounterReport {
        let mut scopes: BTreeMap<String, BTreeMap<String, i128>> = BTreeMap::new();
        let mut total: i128 = 0;
        if self.followed {
            scopes.clone_from(&self.amounts.scopes);
            total = self.amounts.total;
        } else {
            for (at, s) in seen.iter().enumerate() {
                let value = self.value(at);
                if value == 0 {
                    continue;
                }
                total = total.saturating_add(value);
                for scope in s.facts.scopes.iter() {
                    let ops = scopes.entry(scope.clone()).or_default();
                    let sum = ops.entry(s.facts.shown.to_string()).or_default();
                    *sum = sum.saturating_add(value);
                }
            }
        }
        let unsupported = lists_unsupported.then(|| {
            let mut unsupported: BTreeMap<String, u64> = BTreeMap::new();
            for (at, s) in seen.iter().enumerate() {
                let without_rule = match s.facts.kind {
                    Kind::Op => matches!(self.counted.get(at), Some(Some(Counted::Unknown(None)))),
                    // Live tools see the ops that begin and end ranges, and have no rule for them.
                    Kind::Range => !self.counter.knows_every_op(),
                    Kind::NotExecuted | Kind::Watch | Kind::Function => false,
                };
                if without_rule {
                    *unsupported.entry(s.facts.shown.to_string()).or_default() += s.row.sums.calls;
                }
            }
            unsupported
        });
        CounterReport {
            total,
            unit: self.counter.unit().to_owned(),
            scopes,
            unsupported,
            partial: self.is_partial(),
            details: self.amounts.sections.clone(),
        }
    }

    fn coverage(&self, seen: &[Seen<'_>]) -> CounterCoverage {
        let mut coverage = CounterCoverage::default();
        for (at, s) in seen.iter().enumerate() {
            let calls = s.row.sums.calls;
            match self.counted.get(at) {
                Some(Some(Counted::Value(_))) => coverage.counted += calls,
                Some(Some(Counted::Zero)) => coverage.zero_by_rule += calls,
                Some(Some(Counted::Unknown(why))) => {
                    coverage.unknown += calls;
                    let name = match why {
                        Some(why) => format!("{}: {why}", s.facts.shown),
                        None => s.facts.shown.to_string(),
                    };
                    *coverage.unknown_ops.entry(name).or_default() += calls;
                }
                Some(Some(Counted::Missing(missing))) => {
                    coverage.without_statistics += calls;
                    *coverage.missing.entry(missing.to_string()).or_default() += calls;
                }
                Some(Some(Counted::Failed(text))) => {
                    coverage.failed += calls;
                    *coverage
                        .failures
                        .entry(format!("{}: {text}", s.facts.shown))
                        .or_default() += calls;
                }
                Some(None) | None => {}
            }
        }
        coverage.finish();
        coverage
    }
}

/// Everything that a replay says.
///
/// # Errors
/// Where names or selections are wrong, a trace cannot be read, or an estimator that was asked for by name cannot be
/// computed.
pub fn evaluate(
    traces: &Traces,
    rules: &RuleSet,
    request: &Request,
) -> Result<Report, ReplayError> {
    let models = models(rules, request)?;
    let counters = counters(rules, request)?;
    let needed = !request.selection.is_whole_run()
        || request.by == Some(By::Step)
        || request.per != Per::Run;
    let timelines = traces.timelines(needed, &request.selection.ranges)?;
    request.selection.check(traces, &timelines)?;
    let threads = match request.threads {
        0 => processors(),
        n => n,
    };
    let reading = Reading {
        by_step: request.by == Some(By::Step),
        from_events: request.from_events,
        threads,
        times: false,
    };
    let rows = aggregate::rows(traces, &timelines, &request.selection, reading)?;
    let seen = see(traces, rules, &rows.rows);
    if !seen
        .iter()
        .any(|s| matches!(s.facts.kind, Kind::Op | Kind::NotExecuted))
    {
        let hint = nothing_selected(traces);
        return Err(ReplayError::NothingSelected {
            selection: request.selection.to_string(),
            hint,
        });
    }

    let mut skipped = BTreeMap::new();
    // Counters that energy models need are counted too, but shown only where they were asked for.
    let inputs: Vec<energy::Input> = models.iter().flat_map(|(m, _)| m.inputs()).collect();
    let wanted: Vec<(&dyn Counter, bool)> = rules
        .counters
        .iter()
        .map(|counter| {
            let shown = counters.iter().any(|name| name == counter.name());
            (counter.as_ref(), shown)
        })
        .filter(|(counter, shown)| {
            *shown || inputs.iter().any(|input| input.counter == counter.name())
        })
        .collect();
    let (mut by_counter, mut by_model) =
        follow(traces, rules, request, &timelines, &wanted, &models)?;
    let mut results: Vec<(Outcome<'_>, bool)> = Vec::new();
    for (at, (counter, shown)) in wanted.iter().enumerate() {
        let outcome = run(*counter, &seen, request.lenient, by_counter.remove(&at));
        results.push((outcome, *shown));
    }
    let grouped = request.by.is_some();
    let mut reports = Vec::new();
    for (result, shown) in &results {
        let name = result.counter.name();
        let by_name = matches!(request.counters, Wanted::Named(_));
        let refusal = match &result.refusal {
            None if grouped && !result.counts_ops() => Some(Refusal::Failed(UNGROUPED.to_owned())),
            _ => None,
        };
        match result.refusal.as_ref().or(refusal.as_ref()) {
            _ if !shown => {}
            None => reports.push((
                name.to_owned(),
                result.report(&seen, rules.lists_unsupported),
            )),
            Some(refusal) if by_name => return Err(refusal.error(name)),
            Some(refusal) => {
                skipped.insert(format!("counters/{name}"), refusal.text());
            }
        }
    }

    // Without a timeline nobody knows how many samples a long run has.
    let reported = timelines.iter().all(|t| t.complete);
    let reported = reported.then_some(rows.divisors.samples).flatten();
    let samples = request.samples.or(reported).filter(|samples| *samples > 0);
    let mut basis = Basis::of(&seen, samples);
    let mut energy = Vec::new();
    let mut usable_models = Vec::new();
    for (at, (model, by_name)) in models.iter().enumerate() {
        let followed = by_model.remove(&at);
        let inputs = inputs_of(model.as_ref(), &results);
        let refused = inputs.iter().find_map(|(_, r)| {
            r.refusal
                .as_ref()
                .map(|refusal| (r.counter.name(), refusal))
        });
        let own = followed.as_ref().and_then(|f| f.refusal(request.lenient));
        let ungrouped = (grouped && model.simulation().is_some())
            .then(|| Refusal::Failed(UNGROUPED.to_owned()));
        let report = match (refused, own.or(ungrouped)) {
            (Some((counter, refusal)), _) if *by_name => {
                return Err(refusal.error(&format!("{} (its counter {counter})", model.name())));
            }
            (Some((counter, refusal)), _) => Err(format!("counter {counter}: {}", refusal.text())),
            (None, Some(refusal)) if *by_name => return Err(refusal.error(model.name())),
            (None, Some(refusal)) => Err(refusal.text()),
            (None, None) => {
                let all = 0..seen.len();
                let given = given(rules, &inputs, &seen, all, followed.as_ref());
                match model.report(&given) {
                    Ok(mut report) => {
                        report.stages = basis.stages_of(model.stages());
                        Ok(report)
                    }
                    Err(error) if *by_name => return Err(Refusal::of(&error).error(model.name())),
                    Err(error) => Err(error.to_string()),
                }
            }
        };
        match report {
            Ok(report) => {
                energy.push((model.name().to_owned(), report));
                usable_models.push(model.as_ref());
            }
            Err(reason) => {
                skipped.insert(format!("energy/{}", model.name()), reason);
            }
        }
    }

    let shown: Vec<&Outcome<'_>> = results
        .iter()
        .filter(|(r, shown)| *shown && r.refusal.is_none() && (!grouped || r.counts_ops()))
        .map(|(r, _)| r)
        .collect();
    let measurement = Measurement::read(
        traces,
        &timelines,
        &request.selection,
        request.by == Some(By::Stage),
        request.by == Some(By::Step),
    )?;
    let hardware = measurement.as_ref().map(Measurement::report);
    if let Some(refusal) = measurement.as_ref().and_then(Measurement::refusal) {
        skipped.insert("monitors/hardware".to_owned(), refusal);
    }
    let grouper = Grouper {
        measurement: measurement.as_ref().filter(|m| m.refusal().is_none()),
        rules,
        request,
        rows: &rows,
        seen: &seen,
        shown: &shown,
        results: &results,
        models: &usable_models,
    };
    let groups = request.by.map(|by| grouper.groups(by)).transpose()?;
    let measured = hardware.as_ref().and_then(|h| h.measured.as_ref());
    let per = grouper.normalised_total(&reports, &energy, measured)?;
    let per_sample = samples.filter(|_| request.per == Per::Run).map(|samples| {
        Normalised::of(
            Per::Sample,
            samples,
            reports.iter().map(|(name, r)| (name.clone(), r.total)),
            energy.iter().map(|(name, e)| (name.clone(), e.total_pj)),
            measured,
        )
    });
    basis.figures = figures(rules, &basis, &reports, &energy);

    let mut notes = traces.incompleteness(&timelines);
    notes.extend_from_slice(traces.clock_notes());
    if let Some(range) = unfinished_steps(request, &rows) {
        notes.push(range);
    }
    Ok(Report {
        schema: 1,
        optape: env!("CARGO_PKG_VERSION").to_owned(),
        trace: traces.sources.iter().map(SourceInfo::of).collect(),
        streams: traces
            .streams()
            .filter(|at| request.selection.takes(*at))
            .map(StreamReport::of)
            .collect(),
        rules: RulesInfo {
            name: rules.name.to_owned(),
            version: rules.version,
            description: rules.description.to_owned(),
        },
        selection: SelectionInfo::of(&request.selection),
        by: request.by.map(|by| by.name().to_owned()),
        coverage: coverage(
            traces,
            &timelines,
            &rows,
            &seen,
            results.iter().map(|(r, _)| r),
        ),
        basis,
        counters: reports.into_iter().collect(),
        energy: energy.into_iter().collect(),
        monitors: hardware.map(|hardware| MonitorsReport { hardware }),
        firing_rates: firing::rates(traces, &timelines, &seen),
        per,
        per_sample,
        groups,
        skipped,
        notes,
        ops: op_calls(&seen),
    })
}

/// Ops that ran, and how many calls.
fn op_calls(seen: &[Seen<'_>]) -> BTreeMap<String, u64> {
    let mut ops: BTreeMap<String, u64> = BTreeMap::new();
    for s in seen.iter().filter(|s| s.facts.kind == Kind::Op) {
        match ops.get_mut(s.facts.shown.as_ref()) {
            Some(calls) => *calls += s.row.sums.calls,
            None => drop(ops.insert(s.facts.shown.to_string(), s.row.sums.calls)),
        }
    }
    ops
}

/// What each figure is of.
fn figures(
    rules: &RuleSet,
    basis: &Basis,
    counters: &[(String, CounterReport)],
    energy: &[(String, EnergyReport)],
) -> Ordered<FigureBasis> {
    let of_counters = counters.iter().map(|(name, _)| {
        let figure = FigureBasis {
            estimator: format!("{} (version {})", rules.name, rules.version),
            stages: basis.extent.clone(),
            regime: None,
        };
        (format!("counters/{name}"), figure)
    });
    let of_energy = energy.iter().map(|(name, report)| {
        let figure = FigureBasis {
            estimator: match report.estimator.as_str() {
                "" => name.clone(),
                estimator => estimator.to_owned(),
            },
            stages: report.stages.clone(),
            regime: report.regime.clone(),
        };
        (format!("energy/{name}"), figure)
    });
    of_counters.chain(of_energy).collect()
}

pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn counters(rules: &RuleSet, request: &Request) -> Result<Vec<String>, ReplayError> {
    match &request.counters {
        Wanted::Usual => Ok(rules
            .counters
            .iter()
            .filter(|counter| counter.is_usual())
            .map(|counter| counter.name().to_owned())
            .collect()),
        Wanted::All => Ok(rules.counter_names().map(str::to_owned).collect()),
        Wanted::Named(names) => {
            for name in names {
                if rules.counter(name).is_none() {
                    return Err(ReplayError::unknown_name(
                        "counter",
                        name,
                        rules.counter_names(),
                    ));
                }
            }
            Ok(names.clone())
        }
    }
}

/// Why something is left out where groups are asked for.
const UNGROUPED: &str = "it counts calls of modules, not of ops, and cannot be grouped; leave --by away, or select with --scope, \
                         --stage or --step";

/// A model, and whether it was asked for by name.
pub(crate) type Asked = (Box<dyn EnergyModel>, bool);

pub(crate) fn models(rules: &RuleSet, request: &Request) -> Result<Vec<Asked>, ReplayError> {
    let mut files: Vec<(CostFile, bool)> = Vec::new();
    match &request.energy {
        Wanted::Usual | Wanted::All => {
            for preset in energy::presets_of(rules.name, rules.models) {
                files.push((preset.costs()?, false));
            }
            if request.energy == Wanted::Usual {
                files.retain(|(file, _)| energy::model(file).simulation().is_none());
            }
        }
        Wanted::Named(names) => {
            for name in names {
                if let Some(elsewhere) = energy::presets(name).next()
                    && !energy::presets_of(rules.name, rules.models).any(|p| p.name == name)
                {
                    return Err(ReplayError::Selection(format!(
                        "the rule set {} has no energy model '{name}': it belongs to {}",
                        rules.name,
                        elsewhere.rules.unwrap_or("optape and spikingjelly-2026-06")
                    )));
                }
                let file = CostFile::preset(name, rules.name, rules.models)?;
                files.push((file, true));
            }
        }
    }
    for file in &request.costs {
        if !rules.models.contains(&file.model.as_str()) {
            return Err(ReplayError::Selection(format!(
                "the rule set {} has no energy model '{}', which the cost file '{}' is for; it has: {}",
                rules.name,
                file.model,
                file.name,
                rules.models.join(", ")
            )));
        }
        files.push((file.clone(), true));
    }
    for (at, (file, _)) in files.iter().enumerate() {
        if files
            .iter()
            .skip(at + 1)
            .any(|(other, _)| other.name == file.name)
        {
            return Err(ReplayError::Selection(format!(
                "two energy models are named '{}'; give the cost file another `name`",
                file.name
            )));
        }
    }
    Ok(files
        .iter()
        .map(|(file, by_name)| (energy::model(file), *by_name))
        .collect())
}

pub(crate) type ByPlace = HashMap<usize, Followed>;

/// Goes through the streams once for all counters and models that follow them; by their places.
pub(crate) fn follow(
    traces: &Traces,
    rules: &RuleSet,
    request: &Request,
    timelines: &[Timeline],
    counters: &[(&dyn Counter, bool)],
    models: &[Asked],
) -> Result<(ByPlace, ByPlace), ReplayError> {
    let following = |simulates: bool, at: usize| simulates.then(|| (at, Followed::default()));
    let mut by_counter: ByPlace = counters
        .iter()
        .enumerate()
        .filter_map(|(at, (counter, _))| following(counter.simulation().is_some(), at))
        .collect();
    let mut by_model: ByPlace = models
        .iter()
        .enumerate()
        .filter_map(|(at, (model, _))| following(model.simulation().is_some(), at))
        .collect();
    if by_counter.is_empty() && by_model.is_empty() {
        return Ok((by_counter, by_model));
    }
    let streams = traces
        .streams()
        .zip(timelines)
        .filter(|(at, _)| request.selection.takes(*at));
    for (at, timeline) in streams {
        let full = at.trace.run().statistics == "full" && at.stream.info().identities;
        if !full {
            let missing = MissingLevel {
                level: "T6, T7",
                what: "lifetimes of storages, calls of modules and states of neurons".to_owned(),
                way_out: crate::rules::WayOut::Record(optape_trace::needs::FULL_FLAG),
            };
            for followed in by_counter.values_mut().chain(by_model.values_mut()) {
                followed
                    .errors
                    .push(RuleError::Missing(Box::new(missing.clone())));
            }
            continue;
        }
        let by_step = request.by == Some(By::Step);
        let pieces = request.selection.pieces(at, timeline, by_step);
        let of_counter = |place: &usize| counters.get(*place).and_then(|(c, _)| c.simulation());
        let of_model = |place: &usize| models.get(*place).and_then(|(m, _)| m.simulation());
        let simulations = by_counter
            .iter_mut()
            .map(|(place, followed)| (of_counter(place), followed))
            .chain(
                by_model
                    .iter_mut()
                    .map(|(place, followed)| (of_model(place), followed)),
            );
        let mut following: Vec<Following<'_>> = simulations
            .filter_map(|(simulation, followed)| {
                Some(Following {
                    simulation: simulation?,
                    amounts: &mut followed.amounts,
                    errors: &mut followed.errors,
                    lenient: request.lenient,
                })
            })
            .collect();
        walk(
            traces,
            rules,
            &request.selection,
            at,
            &pieces,
            &mut following,
        )?;
    }
    Ok((by_counter, by_model))
}

/// The results that a model reads.
pub(crate) fn inputs_of<'r, 'a>(
    model: &dyn EnergyModel,
    results: &'r [(Outcome<'a>, bool)],
) -> Vec<(energy::Input, &'r Outcome<'a>)> {
    model
        .inputs()
        .into_iter()
        .filter_map(|input| {
            let (outcome, _) = results
                .iter()
                .find(|(r, _)| r.counter.name() == input.counter)?;
            Some((input, outcome))
        })
        .collect()
}

/// What a model makes its report of, from some rows.
pub(crate) fn given<'g>(
    rules: &'g RuleSet,
    inputs: &[(energy::Input, &'g Outcome<'_>)],
    seen: &[Seen<'_>],
    rows: impl Iterator<Item = usize> + Clone,
    followed: Option<&'g Followed>,
) -> Given<'g> {
    let ignored = |row: usize, classes: &[&str]| {
        !classes.is_empty()
            && seen.get(row).is_some_and(|s| {
                stack(s.dictionary, s.call.signature.scope)
                    .iter()
                    .any(|(_, of)| of.iter().any(|class| classes.contains(&class.as_str())))
            })
    };
    let totals = inputs
        .iter()
        .map(|(input, outcome)| {
            let total = rows
                .clone()
                .filter(|row| !ignored(*row, input.ignored))
                .fold(0i128, |sum, row| sum.saturating_add(outcome.value(row)));
            (input.counter, total)
        })
        .collect();
    let coverage: Vec<(&'static str, CounterCoverage)> = inputs
        .iter()
        .map(|(input, outcome)| (input.counter, outcome.coverage(seen)))
        .collect();
    Given {
        rules: rules.name,
        totals,
        amounts: inputs
            .iter()
            .map(|(input, outcome)| (input.counter, &outcome.amounts))
            .collect(),
        followed: followed.map(|f| &f.amounts),
        matched: inputs.iter().any(|(_, r)| r.matched()),
        unknown: coverage
            .first()
            .map(|(_, first)| first.unknown_ops.keys().cloned().collect())
            .unwrap_or_default(),
        coverage: coverage
            .iter()
            .map(|(name, coverage)| (*name, coverage.share))
            .collect(),
        partial: inputs.iter().any(|(_, r)| r.is_partial())
            || followed.is_some_and(|f| !f.errors.is_empty()),
    }
}

fn nothing_selected(traces: &Traces) -> String {
    let records: u64 = traces.streams().map(|at| at.stream.op_calls()).sum();
    if records == 0 {
        // Why there is nothing matters more than that there is nothing.
        let notes: String = traces
            .incompleteness(&[])
            .iter()
            .map(|note| format!("\n  {note}"))
            .collect();
        format!("; the trace holds none at all{notes}")
    } else {
        format!("; the trace holds {records}")
    }
}

fn unfinished_steps(request: &Request, rows: &Rows) -> Option<String> {
    (request.by == Some(By::Step) && rows.rows.iter().any(|row| row.step.is_none()))
        .then(|| "some calls stand behind the last step mark; they are listed under '-'".to_owned())
}

fn coverage<'r, 'a: 'r>(
    traces: &Traces,
    timelines: &[Timeline],
    rows: &Rows,
    seen: &[Seen<'_>],
    results: impl Iterator<Item = &'r Outcome<'a>>,
) -> Coverage {
    let calls = |wanted: fn(&Facts) -> bool| {
        seen.iter()
            .filter(|s| wanted(&s.facts))
            .map(|s| s.row.sums.calls)
            .sum()
    };
    Coverage {
        op_calls: calls(|f| f.kind == Kind::Op),
        not_executed: calls(|f| f.kind == Kind::NotExecuted),
        unattributed: calls(|f| f.kind == Kind::Op && f.unattributed),
        opaque_regions: timelines
            .iter()
            .all(|t| t.complete)
            .then_some(rows.opaque_regions),
        dropped_records: traces.streams().map(|at| at.stream.dropped_records()).sum(),
        counters: results
            .map(|r| (r.counter.name().to_owned(), r.coverage(seen)))
            .collect(),
    }
}

struct Grouper<'g, 'a> {
    measurement: Option<&'g Measurement<'g>>,
    rules: &'g RuleSet,
    request: &'g Request,
    rows: &'g Rows,
    seen: &'g [Seen<'a>],
    shown: &'g [&'g Outcome<'g>],
    results: &'g [(Outcome<'g>, bool)],
    models: &'g [&'g dyn EnergyModel],
}

impl Grouper<'_, '_> {
    fn groups(&self, by: By) -> Result<Vec<Group>, ReplayError> {
        let mut order: Vec<String> = Vec::new();
        let mut members: HashMap<String, Vec<usize>> = HashMap::new();
        for (at, s) in self.seen.iter().enumerate() {
            if s.facts.kind != Kind::Op {
                continue;
            }
            for key in s.keys(by) {
                members
                    .entry(key)
                    .or_insert_with_key(|key| {
                        order.push(key.clone());
                        Vec::new()
                    })
                    .push(at);
            }
        }
        let mut groups = Vec::with_capacity(order.len());
        for key in order {
            let Some(rows) = members.get(&key) else {
                continue;
            };
            groups.push(self.group(by, key, rows)?);
        }
        match by {
            // Rows come in the order of first use, which is the network's: it reads better than the alphabet.
            By::Scope => groups.sort_by_key(|group| group.key != "Global"),
            By::Module | By::Step => {}
            By::Stage => groups.sort_by_key(|group| {
                optape_trace::Stage::ALL
                    .iter()
                    .position(|stage| stage.name() == group.key)
                    .unwrap_or(usize::MAX)
            }),
            By::Op => groups.sort_by(|a, b| {
                let total = |group: &Group| group.counters.values().next().map_or(0, |c| c.total);
                total(b)
                    .cmp(&total(a))
                    .then_with(|| b.calls.cmp(&a.calls))
                    .then_with(|| a.key.cmp(&b.key))
            }),
        }
        Ok(groups)
    }

    fn group(&self, by: By, key: String, rows: &[usize]) -> Result<Group, ReplayError> {
        let calls = rows
            .iter()
            .filter_map(|&at| self.seen.get(at))
            .map(|s| s.row.sums.calls)
            .sum();
        let counters: Vec<(String, GroupCounter)> = self
            .shown
            .iter()
            .map(|result| {
                let total = rows
                    .iter()
                    .fold(0i128, |sum, &at| sum.saturating_add(result.value(at)));
                (result.counter.name().to_owned(), GroupCounter { total })
            })
            .collect();
        let mut energy: Vec<(String, EnergyReport)> = Vec::new();
        for model in self.models {
            let inputs = inputs_of(*model, self.results);
            let rows = rows.iter().copied();
            let report = model
                .report(&given(self.rules, &inputs, self.seen, rows, None))
                .map_err(|error| Refusal::of(&error).error(model.name()))?;
            energy.push((model.name().to_owned(), report));
        }
        let part = match by {
            By::Stage => Some(Part::Stage(&key)),
            By::Step => Some(Part::Step(key.parse().ok())),
            By::Scope | By::Op | By::Module => None,
        };
        let measured = self
            .measurement
            .zip(part)
            .map(|(measurement, part)| measurement.measured(&part));
        let per = self.divisor(Some((by, &key)))?.map(|divisor| {
            Normalised::of(
                self.request.per,
                divisor,
                counters.iter().map(|(name, c)| (name.clone(), c.total)),
                energy.iter().map(|(name, e)| (name.clone(), e.total_pj)),
                measured.as_ref(),
            )
        });
        Ok(Group {
            key,
            calls,
            counters: counters.into_iter().collect(),
            energy: energy.into_iter().collect(),
            measured,
            per,
        })
    }

    fn normalised_total(
        &self,
        reports: &[(String, CounterReport)],
        energy: &[(String, EnergyReport)],
        measured: Option<&Measured>,
    ) -> Result<Option<Normalised>, ReplayError> {
        Ok(self.divisor(None)?.map(|divisor| {
            Normalised::of(
                self.request.per,
                divisor,
                reports.iter().map(|(name, r)| (name.clone(), r.total)),
                energy.iter().map(|(name, e)| (name.clone(), e.total_pj)),
                measured,
            )
        }))
    }

    /// What the totals of a group (or of everything) are divided by; `None` where nothing is divided.
    fn divisor(&self, group: Option<(By, &str)>) -> Result<Option<u64>, ReplayError> {
        let of_step = group.and_then(|(by, key)| (by == By::Step).then(|| key.parse::<u64>().ok()));
        let divisors: Divisors = match of_step {
            Some(step) => self.rows.by_step.get(&step).copied().unwrap_or_default(),
            None => self.rows.divisors,
        };
        let or_error = |divisor: u64, message: &str| match (divisor, of_step) {
            (0, None) => Err(ReplayError::Normalisation(message.to_owned())),
            // A step may be without samples or calls of its own; it is shown as it is.
            (0, Some(_)) => Ok(None),
            (divisor, _) => Ok(Some(divisor)),
        };
        match self.request.per {
            Per::Run => Ok(None),
            Per::Step => or_error(
                divisors.steps,
                "the selection holds no whole step: the program ran no optimizer step, called no root module and marked none; \
                 leave --per step away, or mark steps with optape.step()",
            ),
            Per::Sample => {
                let samples = self.request.samples.or(divisors.samples).unwrap_or(0);
                or_error(
                    samples,
                    "the trace does not say how many samples were processed: mark them with optape.step(samples=N), or give the \
                     number with --samples N",
                )
            }
            Per::Call => {
                let module =
                    group.and_then(|(by, key)| matches!(by, By::Scope | By::Module).then_some(key));
                match module.and_then(|name| self.rows.module_calls.get(name)) {
                    Some(&calls) if calls > 0 => Ok(Some(calls)),
                    _ => or_error(
                        divisors.root_calls,
                        "the selection holds no call of a module; leave --per call away",
                    ),
                }
            }
        }
    }
}
