//! Applies rules to rows and puts the results together: totals, scopes, groups, energy, coverage.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use optape_trace::{Dictionary, OpDef, Pattern, SignatureDef, call_flags};

use crate::aggregate::{self, Reading, Row, Rows};
use crate::energy::{ComputeModel, CostFile, PRESETS};
use crate::error::ReplayError;
use crate::firing;
use crate::load::{Traces, stack};
use crate::monitors::{Measurement, Part};
use crate::report::{
    CounterCoverage, CounterReport, Coverage, Group, GroupCounter, Measured, MonitorsReport,
    Normalised, Per, Report, RulesInfo, SelectionInfo, SourceInfo, StreamReport,
};
use crate::rules::{CallRow, Counted, Counter, MissingLevel, RuleSet};
use crate::selection::{Divisors, Selection, stage_of};
use crate::timeline::Timeline;

/// Which estimators to evaluate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// All that the rule set has; what cannot be had is skipped, with the reason.
    #[default]
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
    pub(crate) shown: String,
    /// Names on the stack as a set, `Global` among them.
    pub(crate) scopes: Vec<String>,
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
        shown: rules.shown_name(op, signature.flags),
        scopes,
        module,
        stage: stage_of(dictionary, signature),
        unattributed: signature.flags & call_flags::UNATTRIBUTED != 0,
    }
}

const NO_PATTERN: &Pattern = &Pattern {
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
}

enum Refusal {
    Missing(Box<MissingLevel>),
    Failed(String),
}

impl Refusal {
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

pub(crate) fn run<'a>(counter: &'a dyn Counter, seen: &[Seen<'_>], lenient: bool) -> Outcome<'a> {
    let counted: Vec<Option<Counted>> = seen
        .iter()
        .map(|s| (s.facts.kind == Kind::Op).then(|| counter.count(&s.call)))
        .collect();
    let mut refusal = None;
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
    Outcome {
        counter,
        counted,
        refusal,
    }
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

    fn report(&self, seen: &[Seen<'_>], lists_unsupported: bool) -> CounterReport {
        let mut scopes: BTreeMap<String, BTreeMap<String, i128>> = BTreeMap::new();
        let mut total: i128 = 0;
        for (at, s) in seen.iter().enumerate() {
            let value = self.value(at);
            if value == 0 {
                continue;
            }
            total = total.saturating_add(value);
            for scope in &s.facts.scopes {
                let ops = scopes.entry(scope.clone()).or_default();
                let sum = ops.entry(s.facts.shown.clone()).or_default();
                *sum = sum.saturating_add(value);
            }
        }
        let unsupported = lists_unsupported.then(|| {
            let mut unsupported: BTreeMap<String, u64> = BTreeMap::new();
            for (at, s) in seen.iter().enumerate() {
                let without_rule = match s.facts.kind {
                    Kind::Op => matches!(self.counted.get(at), Some(Some(Counted::Unknown(None)))),
                    // Live tools see the ops that begin and end ranges, and have no rule for them.
                    Kind::Range => true,
                    Kind::NotExecuted | Kind::Watch | Kind::Function => false,
                };
                if without_rule {
                    *unsupported.entry(s.facts.shown.clone()).or_default() += s.row.sums.calls;
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
                        None => s.facts.shown.clone(),
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
    let mut results: Vec<(Outcome<'_>, bool)> = Vec::new();
    for counter in &rules.counters {
        let shown = counters.iter().any(|name| name == counter.name());
        let needed = !models.is_empty() && ComputeModel::COUNTERS.contains(&counter.name());
        if shown || needed {
            results.push((run(counter.as_ref(), &seen, request.lenient), shown));
        }
    }
    let mut reports = Vec::new();
    for (result, shown) in &results {
        let name = result.counter.name();
        match &result.refusal {
            _ if !shown => {}
            None => reports.push((
                name.to_owned(),
                result.report(&seen, rules.lists_unsupported),
            )),
            Some(refusal) if matches!(request.counters, Wanted::Named(_)) => {
                return Err(refusal.error(name));
            }
            Some(refusal) => {
                skipped.insert(format!("counters/{name}"), refusal.text());
            }
        }
    }

    let inputs: Vec<&Outcome<'_>> = ComputeModel::COUNTERS
        .iter()
        .filter_map(|name| {
            results
                .iter()
                .map(|(r, _)| r)
                .find(|r| r.counter.name() == *name)
        })
        .collect();
    let refused = inputs.iter().find_map(|r| {
        r.refusal
            .as_ref()
            .map(|refusal| (r.counter.name(), refusal))
    });
    let mut energy = Vec::new();
    let mut usable_models = Vec::new();
    for (model, by_name) in models {
        match refused {
            Some((counter, refusal)) if by_name => {
                return Err(refusal.error(&format!("{} (its counter {counter})", model.name)));
            }
            Some((counter, refusal)) => {
                skipped.insert(
                    format!("energy/{}", model.name),
                    format!("counter {counter}: {}", refusal.text()),
                );
            }
            None => {
                let all = 0..seen.len();
                energy.push((model.name.clone(), energy_of(rules, &model, &inputs, all)));
                usable_models.push(model);
            }
        }
    }

    let shown: Vec<&Outcome<'_>> = results
        .iter()
        .filter(|(r, shown)| *shown && r.refusal.is_none())
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
        inputs: &inputs,
        models: &usable_models,
    };
    let groups = request.by.map(|by| grouper.groups(by)).transpose()?;
    let measured = hardware.as_ref().and_then(|h| h.measured.as_ref());
    let per = grouper.normalised_total(&reports, &energy, measured)?;

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
        counters: reports.into_iter().collect(),
        energy: energy.into_iter().collect(),
        monitors: hardware.map(|hardware| MonitorsReport { hardware }),
        firing_rates: firing::rates(traces, &timelines, &seen),
        per,
        groups,
        skipped,
        notes,
    })
}

pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn counters(rules: &RuleSet, request: &Request) -> Result<Vec<String>, ReplayError> {
    match &request.counters {
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

/// The models, and whether each was asked for by name.
fn models(rules: &RuleSet, request: &Request) -> Result<Vec<(ComputeModel, bool)>, ReplayError> {
    let mut models = Vec::new();
    let presets: Vec<(String, bool)> = match &request.energy {
        Wanted::All if rules.has_compute_model => PRESETS
            .iter()
            .map(|(name, _)| ((*name).to_owned(), false))
            .collect(),
        Wanted::All => Vec::new(),
        Wanted::Named(names) => names.iter().map(|name| (name.clone(), true)).collect(),
    };
    if !rules.has_compute_model
        && let Some(name) = presets
            .iter()
            .map(|(name, _)| name)
            .chain(request.costs.iter().map(|c| &c.name))
            .next()
    {
        return Err(ReplayError::Selection(format!(
            "the rule set {} has no energy model '{name}': the compute-only model belongs to optape and spikingjelly-2026-06",
            rules.name
        )));
    }
    for (name, by_name) in presets {
        models.push((ComputeModel::new(&CostFile::preset(&name)?), by_name));
    }
    models.extend(
        request
            .costs
            .iter()
            .map(|costs| (ComputeModel::new(costs), true)),
    );
    for (at, (model, _)) in models.iter().enumerate() {
        if models
            .iter()
            .skip(at + 1)
            .any(|(other, _)| other.name == model.name)
        {
            return Err(ReplayError::Selection(format!(
                "two energy models are named '{}'; give the cost file another `name`",
                model.name
            )));
        }
    }
    Ok(models)
}

fn energy_of(
    rules: &RuleSet,
    model: &ComputeModel,
    inputs: &[&Outcome<'_>],
    rows: impl Iterator<Item = usize> + Clone,
) -> crate::energy::ComputeReport {
    let mut totals = [0i128; 4];
    for (total, input) in totals.iter_mut().zip(inputs) {
        for row in rows.clone() {
            *total = total.saturating_add(input.value(row));
        }
    }
    let mut report = model.report(rules.name, totals, inputs.iter().any(|r| r.matched()));
    if inputs.iter().any(|r| r.is_partial()) {
        report
            .warnings
            .push("partial: calls without statistics count as zero (--lenient)".to_owned());
    }
    report
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
    inputs: &'g [&'g Outcome<'g>],
    models: &'g [ComputeModel],
}

impl Grouper<'_, '_> {
    fn groups(&self, by: By) -> Result<Vec<Group>, ReplayError> {
        let mut order: Vec<String> = Vec::new();
        let mut members: HashMap<String, Vec<usize>> = HashMap::new();
        for (at, s) in self.seen.iter().enumerate() {
            if s.facts.kind != Kind::Op {
                continue;
            }
            let keys: Vec<String> = match by {
                By::Scope => s.facts.scopes.clone(),
                By::Op => vec![s.facts.shown.clone()],
                By::Stage => vec![s.facts.stage.clone()],
                By::Module => vec![s.facts.module.clone()],
                By::Step => vec![
                    s.row
                        .step
                        .map_or_else(|| "-".to_owned(), |step| step.to_string()),
                ],
            };
            for key in keys {
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
        let energy: Vec<(String, crate::energy::ComputeReport)> = self
            .models
            .iter()
            .map(|model| {
                (
                    model.name.clone(),
                    energy_of(self.rules, model, self.inputs, rows.iter().copied()),
                )
            })
            .collect();
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
                energy
                    .iter()
                    .map(|(name, e)| (name.clone(), e.energy_total_pj)),
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
        energy: &[(String, crate::energy::ComputeReport)],
        measured: Option<&Measured>,
    ) -> Result<Option<Normalised>, ReplayError> {
        Ok(self.divisor(None)?.map(|divisor| {
            Normalised::of(
                self.request.per,
                divisor,
                reports.iter().map(|(name, r)| (name.clone(), r.total)),
                energy
                    .iter()
                    .map(|(name, e)| (name.clone(), e.energy_total_pj)),
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
