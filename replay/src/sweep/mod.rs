//! One trace under many configurations.
//!
//! What is swept through is either a *coefficient*, which a model looks at when it makes its report (costs, parameters, most memories): then all
//! configurations come from one pass. Or it is *structural*: it changes what a model or a counter follows (the size of a cache, of a crossbar array), and
//! every value is a simulation of its own. Simulations share passes over the events, and run side by side.
//!
//! Configurations are independent of each other and are put together in their order, so the result does not depend on the number of threads.

mod axis;
mod table;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

pub use axis::Axis;
pub use table::{AxisInfo, Cell, Column, SweepReport};

use crate::aggregate::{self, Reading};
use crate::energy::keys::{Assignment, Key, is_structural};
use crate::energy::{self, CostFile, EnergyModel, EnergyReport, Figure, Given};
use crate::error::ReplayError;
use crate::evaluate::{
    self, Asked, Followed, Outcome, Request, Seen, Wanted, counter_keys, find_key, processors, see,
};
use crate::load::Traces;
use crate::ordered::{Following, Tree, Way, walk};
use crate::report::{CounterReport, Per, RulesInfo, SelectionInfo, SourceInfo};
use crate::rules::{Counter, RuleSet};
use crate::selection::Glob;
use crate::timeline::Timeline;

/// What is swept through, and which figures are wanted.
#[derive(Clone, Debug, Default)]
pub struct Sweep {
    /// The keys with their values; the first changes slowest.
    pub axes: Vec<Axis>,
    /// Columns by name, of all figures that there are; empty: totals and their parts.
    pub columns: Vec<Glob>,
}

/// So many configurations are computed without being asked twice.
const MANY_CONFIGURATIONS: u64 = 100_000;
/// And simulations that take so long.
const MANY_SECONDS: f64 = 60.0;
/// Beyond this, memory ends before patience.
const MOST_CONFIGURATIONS: u64 = 10_000_000;
/// Simulations that share a pass; each has its own tables.
const SIMULATIONS_PER_PASS: usize = 32;
/// Records that an estimate is made of.
const PROBED_RECORDS: u64 = 200_000;
/// Configurations that an estimate is made of.
const TIMED_CONFIGURATIONS: usize = 64;
/// Configurations that a thread takes at once.
const CHUNK: usize = 256;

/// What a sweep will take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Configurations.
    pub configurations: u64,
    /// Simulations.
    pub simulations: u64,
    /// Records that each goes through.
    pub records: u64,
    /// On so many threads.
    pub threads: usize,
    /// From the first records or configurations, which were timed.
    pub seconds: f64,
}

impl Estimate {
    /// Whether somebody should be asked first.
    #[must_use]
    pub fn is_large(&self) -> bool {
        self.configurations > MANY_CONFIGURATIONS || self.seconds > MANY_SECONDS
    }

    /// Whether there is something to say before it begins.
    #[must_use]
    pub const fn is_worth_telling(&self) -> bool {
        self.simulations > 1 || self.configurations > MANY_CONFIGURATIONS / 10
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grouped = |n: u64| crate::report::grouped(i128::from(n));
        write!(f, "{} configurations", grouped(self.configurations))?;
        if self.simulations > 0 {
            write!(
                f,
                ", {} simulations of {} records each",
                grouped(self.simulations),
                grouped(self.records)
            )?;
        }
        let about = match self.seconds {
            s if s < 1.0 => "less than a second".to_owned(),
            s if s < 90.0 => format!("about {s:.0} s"),
            s if s < 5400.0 => format!("about {:.0} minutes", s / 60.0),
            s => format!("about {:.0} hours", s / 3600.0),
        };
        write!(f, ": {about} on {} thread(s)", self.threads)
    }
}

/// The index of a configuration's value on each axis.
fn places(axes: &[Axis], configuration: usize) -> impl Iterator<Item = usize> + '_ {
    let mut after: usize = axes.iter().map(|axis| axis.values.len()).product();
    axes.iter().map(move |axis| {
        let length = axis.values.len().max(1);
        after /= length;
        configuration / after.max(1) % length
    })
}

/// Some of the axes, and the configurations that they make among themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Part {
    /// Indices of axes, rising.
    axes: Vec<usize>,
}

impl Part {
    fn of(axes: &[Axis], takes: impl Fn(&Axis) -> bool) -> Self {
        Self {
            axes: (0..axes.len())
                .filter(|at| axes.get(*at).is_some_and(&takes))
                .collect(),
        }
    }

    fn join(&mut self, other: &Self) {
        self.axes.extend(&other.axes);
        self.axes.sort_unstable();
        self.axes.dedup();
    }

    fn count(&self, axes: &[Axis]) -> usize {
        self.among(axes).map(|axis| axis.values.len()).product()
    }

    fn among<'a>(&'a self, axes: &'a [Axis]) -> impl Iterator<Item = &'a Axis> + 'a {
        self.axes.iter().filter_map(|at| axes.get(*at))
    }

    /// Which of them a configuration of all axes belongs to.
    fn variant(&self, axes: &[Axis], configuration: usize) -> usize {
        let all: Vec<usize> = places(axes, configuration).collect();
        self.axes.iter().fold(0, |number, at| {
            let length = axes.get(*at).map_or(1, |axis| axis.values.len());
            number * length + all.get(*at).copied().unwrap_or(0)
        })
    }

    /// What a variant sets.
    fn settings(&self, axes: &[Axis], variant: usize) -> Vec<Assignment> {
        let own: Vec<Axis> = self.among(axes).cloned().collect();
        settings(&own, variant)
    }
}

fn settings(axes: &[Axis], configuration: usize) -> Vec<Assignment> {
    places(axes, configuration)
        .zip(axes)
        .filter_map(|(at, axis)| {
            Some(Assignment {
                key: axis.key.clone(),
                value: axis.values.get(at)?.clone(),
            })
        })
        .collect()
}

fn one(axis: &Axis) -> Assignment {
    Assignment {
        key: axis.key.clone(),
        value: String::new(),
    }
}

/// A model that is swept.
struct Model {
    file: CostFile,
    by_name: bool,
    /// Axes that change what it follows.
    structural: Part,
    /// Axes that change what its report is made of: these, and those of its counters.
    given: Part,
}

/// A counter, and the axes that change it.
struct Swept<'r> {
    counter: &'r dyn Counter,
    /// As `--set` has it.
    set: Option<Box<dyn Counter>>,
    structural: Part,
    /// It has columns of its own.
    shown: bool,
    by_name: bool,
}

impl Swept<'_> {
    fn base(&self) -> &dyn Counter {
        self.set.as_deref().unwrap_or(self.counter)
    }

    /// The counter of a variant; `None`: it is the same in all.
    fn variant(&self, axes: &[Axis], variant: usize) -> Result<Option<Box<dyn Counter>>, ReplayError> {
        if self.structural.axes.is_empty() {
            return Ok(None);
        }
        let settings = self.structural.settings(axes, variant);
        evaluate::set_counter(self.base(), &settings)
    }
}

/// A simulation: of which model or counter, and which of its variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Task {
    Counter(usize, usize),
    Model(usize, usize),
}

/// Goes through all configurations.
///
/// `agreed` is told what it will take, before simulations and before many configurations; where it says no, nothing more is done.
///
/// # Errors
/// As [`evaluate::evaluate`]; [`ReplayError::Setting`] for keys that nothing has, values that are none, and a sweep that was not agreed to.
pub fn sweep(
    traces: &Traces,
    rules: &RuleSet,
    request: &Request,
    sweep: &Sweep,
    agreed: &mut dyn FnMut(&Estimate) -> bool,
) -> Result<SweepReport, ReplayError> {
    let axes = sweep.axes.as_slice();
    let configurations = check_axes(axes, request)?;
    let (models, counters) = estimators(rules, request, axes)?;
    check_values(axes, &models, &counters)?;

    let timelines = traces.timelines(
        !request.selection.is_whole_run() || request.per != Per::Run,
        &request.selection.ranges,
    )?;
    request.selection.check(traces, &timelines)?;
    let threads = match request.threads {
        0 => processors(),
        n => n,
    };
    let reading = Reading {
        by_step: false,
        from_events: request.from_events,
        threads,
    };
    let rows = aggregate::rows(traces, &timelines, &request.selection, reading)?;
    let seen = see(traces, rules, &rows.rows);
    evaluate::something_selected(traces, request, &seen)?;
    let divisor = evaluate::divisor(request, &rows)?;

    let tasks = tasks(axes, &models, &counters);
    let records = traces
        .streams()
        .filter(|at| request.selection.takes(*at))
        .map(|at| at.stream.records())
        .sum();
    let mut estimate = Estimate {
        configurations,
        simulations: tasks.len() as u64,
        records,
        threads,
        seconds: 0.0,
    };
    let context = Context {
        traces,
        rules,
        request,
        timelines: &timelines,
        axes,
    };
    let mut ask = |estimate: &Estimate| {
        if agreed(estimate) {
            return Ok(());
        }
        Err(ReplayError::Setting(format!(
            "the sweep is large: {estimate}; add --yes to run it, or take fewer values"
        )))
    };
    if tasks.len() > 1 {
        let rate = context.probe(&models, &counters, &tasks)?;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let waves = (tasks.len() as f64 / threads as f64).ceil();
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let records = records as f64;
        estimate.seconds = waves * records * rate;
        ask(&estimate)?;
    }

    let mut followed = context.simulate(&models, &counters, &tasks, threads)?;
    let variants: Vec<Vec<Option<Box<dyn Counter>>>> = counters
        .iter()
        .map(|swept| {
            (0..swept.structural.count(axes))
                .map(|variant| swept.variant(axes, variant))
                .collect()
        })
        .collect::<Result<_, _>>()?;
    let mut outcomes: Vec<Vec<Outcome<'_>>> = Vec::with_capacity(counters.len());
    for (at, (swept, variants)) in counters.iter().zip(&variants).enumerate() {
        let mut of_variants = Vec::with_capacity(variants.len());
        for (variant, own) in variants.iter().enumerate() {
            let counter = own.as_deref().unwrap_or(swept.base());
            let followed = followed.remove(&Task::Counter(at, variant));
            of_variants.push(evaluate::run(counter, &seen, request.lenient, followed));
        }
        outcomes.push(of_variants);
    }
    let mut skipped = BTreeMap::new();
    let mut reports: Vec<(&Swept<'_>, Vec<CounterReport>)> = Vec::new();
    for (swept, outcomes) in counters.iter().zip(&outcomes) {
        for refusal in outcomes.iter().filter_map(Outcome::refusal) {
            refusal.mistake()?;
        }
        let name = swept.counter.name();
        match outcomes.iter().find_map(Outcome::refusal) {
            _ if !swept.shown => {}
            None => {
                let of_variants = outcomes.iter().map(|outcome| outcome.report(&seen, false));
                reports.push((swept, of_variants.collect()));
            }
            Some(refusal) if swept.by_name => return Err(refusal.error(name)),
            Some(refusal) => {
                skipped.insert(format!("counters/{name}"), refusal.text());
            }
        }
    }

    let mut computed = Vec::new();
    for (at, model) in models.iter().enumerate() {
        match context.given(at, model, &counters, &outcomes, &followed, &seen)? {
            Ok(givens) => computed.push((model, givens)),
            Err(reason) => {
                skipped.insert(format!("energy/{}", model.file.name), reason);
            }
        }
    }
    if computed.is_empty() && reports.is_empty() {
        let reasons: Vec<String> = skipped.iter().map(|(what, why)| format!("{what}: {why}")).collect();
        return Err(ReplayError::Refused {
            estimator: "the sweep".to_owned(),
            reason: reasons.join("; "),
        });
    }
    let figures = Figures {
        context: &context,
        columns: &sweep.columns,
        models: &computed,
        counters: &reports,
        divisor: divisor.map(|n| (request.per, n)),
    };
    if configurations > MANY_CONFIGURATIONS / 10 {
        let started = Instant::now();
        figures.chunk(0..TIMED_CONFIGURATIONS)?;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let turns = configurations as f64 / (TIMED_CONFIGURATIONS * threads) as f64;
        ask(&Estimate {
            simulations: 0,
            seconds: turns * started.elapsed().as_secs_f64(),
            ..estimate
        })?;
    }
    let (columns, cells) = figures.all(configurations, threads)?;
    let mut notes = traces.incompleteness(&timelines);
    notes.extend_from_slice(traces.clock_notes());
    Ok(SweepReport {
        trace: traces.sources.iter().map(SourceInfo::of).collect(),
        rules: RulesInfo {
            name: rules.name.to_string(),
            version: rules.version,
            description: rules.description.to_string(),
        },
        selection: SelectionInfo::of(&request.selection),
        axes: axes
            .iter()
            .enumerate()
            .map(|(at, axis)| axis_info(at, axis, &models, &counters))
            .collect(),
        columns,
        skipped,
        notes,
        given: axes.to_vec(),
        cells,
    })
}

fn axis_info(at: usize, axis: &Axis, models: &[Model], counters: &[Swept<'_>]) -> AxisInfo {
    let one = one(axis);
    let files = models
        .iter()
        .filter(|model| model.file.has_key(one.key_of(&model.file.name)))
        .map(|model| (model.file.name.clone(), model.structural.axes.contains(&at)));
    let counters = counters
        .iter()
        .filter(|swept| swept.structural.axes.contains(&at))
        .map(|swept| (swept.counter.name().to_owned(), true));
    let sets: Vec<(String, bool)> = files.chain(counters).collect();
    AxisInfo {
        key: axis.key.clone(),
        values: axis.values.len(),
        structural: sets.iter().any(|(_, structural)| *structural),
        sets: sets.into_iter().map(|(name, _)| name).collect(),
    }
}

/// How many configurations there are.
fn check_axes(axes: &[Axis], request: &Request) -> Result<u64, ReplayError> {
    let wrong = |message: String| Err(ReplayError::Setting(message));
    for (at, axis) in axes.iter().enumerate() {
        if axes.iter().take(at).any(|other| other.key == axis.key) {
            return wrong(format!("--sweep {}: the key stands there twice", axis.key));
        }
    }
    if request.by.is_some() {
        return wrong("--sweep has a row for each configuration; leave --by away".to_owned());
    }
    let count = axes
        .iter()
        .try_fold(1u64, |n, axis| n.checked_mul(axis.values.len() as u64));
    match count {
        Some(count) if count <= MOST_CONFIGURATIONS => Ok(count),
        _ => {
            let list: Vec<String> = axes.iter().map(ToString::to_string).collect();
            wrong(format!(
                "the sweep has more than {MOST_CONFIGURATIONS} configurations: {}; take fewer values",
                list.join(" x ")
            ))
        }
    }
}

/// What is swept: what was asked for by name, and of the rest what has one of the keys.
fn estimators<'r>(
    rules: &'r RuleSet,
    request: &Request,
    axes: &[Axis],
) -> Result<(Vec<Model>, Vec<Swept<'r>>), ReplayError> {
    let files = evaluate::files(rules, request)?;
    let names = evaluate::counters(rules, request)?;
    let set = evaluate::set_counters(rules, &request.settings)?;
    let mut asked: Vec<(String, Vec<Key>)> = files
        .iter()
        .map(|(file, _)| (file.name.clone(), file.keys()))
        .collect();
    let wanted = |counter: &dyn Counter| names.iter().any(|name| name == counter.name());
    asked.extend(
        rules
            .counters
            .iter()
            .filter(|counter| wanted(counter.as_ref()))
            .map(|counter| counter_keys(counter.as_ref())),
    );
    for axis in axes {
        find_key(rules, "--sweep", &axis.key, &asked)?;
    }
    for assignment in &request.settings {
        find_key(rules, "--set", &assignment.key, &asked)?;
    }
    let by_name = matches!(request.counters, Wanted::Named(_));
    let mut counters: Vec<Swept<'r>> = rules
        .counters
        .iter()
        .zip(set)
        .map(|(counter, set)| {
            let settings = counter.settings();
            let structural = Part::of(axes, |axis| {
                settings.contains_key(one(axis).key_of(counter.name()))
            });
            Swept {
                counter: counter.as_ref(),
                set,
                shown: wanted(counter.as_ref()) && (by_name || !structural.axes.is_empty()),
                structural,
                by_name,
            }
        })
        .collect();
    let mut models: Vec<Model> = Vec::new();
    for (file, by_name) in files {
        let has = |axis: &Axis| file.has_key(one(axis).key_of(&file.name));
        if !by_name && !axes.iter().any(has) {
            continue;
        }
        let structural = Part::of(axes, |axis| {
            has(axis) && is_structural(&file, one(axis).key_of(&file.name))
        });
        let inputs = energy::model(&file).inputs();
        let mut given = structural.clone();
        for swept in &counters {
            if inputs.iter().any(|input| input.counter == swept.counter.name()) {
                given.join(&swept.structural);
            }
        }
        models.push(Model {
            file,
            by_name,
            structural,
            given,
        });
    }
    // Counters that nobody looks at are not counted.
    counters.retain(|swept| {
        let name = swept.counter.name();
        let is_input = |model: &Model| {
            let inputs = energy::model(&model.file).inputs();
            inputs.iter().any(|input| input.counter == name)
        };
        swept.shown || models.iter().any(is_input)
    });
    Ok((models, counters))
}

/// Every value is one that its key can have, before anything is read.
fn check_values(
    axes: &[Axis],
    models: &[Model],
    counters: &[Swept<'_>],
) -> Result<(), ReplayError> {
    for axis in axes {
        for value in &axis.values {
            let assignment = Assignment {
                key: axis.key.clone(),
                value: value.clone(),
            };
            let of_axis = |error: ReplayError| ReplayError::Setting(format!("--sweep {error}"));
            for model in models {
                let mut file = model.file.clone();
                evaluate::set_in(&mut file, std::slice::from_ref(&assignment)).map_err(of_axis)?;
            }
            for swept in counters {
                evaluate::set_counter(swept.base(), std::slice::from_ref(&assignment))
                    .map_err(of_axis)?;
            }
        }
    }
    Ok(())
}

/// All simulations: of each variant of what follows the stream.
fn tasks(axes: &[Axis], models: &[Model], counters: &[Swept<'_>]) -> Vec<Task> {
    let mut tasks = Vec::new();
    for (at, swept) in counters.iter().enumerate() {
        if swept.base().simulation().is_some() {
            tasks.extend((0..swept.structural.count(axes)).map(|v| Task::Counter(at, v)));
        }
    }
    for (at, model) in models.iter().enumerate() {
        if energy::model(&model.file).simulation().is_some() {
            tasks.extend((0..model.structural.count(axes)).map(|v| Task::Model(at, v)));
        }
    }
    tasks
}

struct Context<'a> {
    traces: &'a Traces,
    rules: &'a RuleSet,
    request: &'a Request,
    timelines: &'a [Timeline],
    axes: &'a [Axis],
}

type BatchResult = Result<Vec<(Task, Followed)>, ReplayError>;

impl Context<'_> {
    fn model(&self, model: &Model, variant: usize) -> Result<Box<dyn EnergyModel>, ReplayError> {
        let mut file = model.file.clone();
        evaluate::set_in(&mut file, &model.structural.settings(self.axes, variant))?;
        Ok(energy::model(&file))
    }

    /// Seconds for a record of a simulation, from the first records of the first stream.
    fn probe(
        &self,
        models: &[Model],
        counters: &[Swept<'_>],
        tasks: &[Task],
    ) -> Result<f64, ReplayError> {
        let simulation = match tasks.first() {
            Some(Task::Counter(at, variant)) => match counters.get(*at) {
                Some(swept) => swept
                    .variant(self.axes, *variant)?
                    .as_deref()
                    .unwrap_or(swept.base())
                    .simulation(),
                None => None,
            },
            Some(Task::Model(at, variant)) => match models.get(*at) {
                Some(model) => self.model(model, *variant)?.simulation(),
                None => None,
            },
            None => None,
        };
        let stream = self
            .traces
            .streams()
            .zip(self.timelines)
            .find(|(at, _)| self.request.selection.takes(*at) && evaluate::is_full(*at));
        let (Some(simulation), Some((at, timeline))) = (simulation, stream) else {
            return Ok(0.0);
        };
        let pieces = self.request.selection.pieces(at, timeline, false);
        let mut nowhere = Followed::default();
        let started = Instant::now();
        let way = Way {
            traces: self.traces,
            rules: self.rules,
            selection: &self.request.selection,
            at,
            pieces: &pieces,
            most_records: PROBED_RECORDS,
        };
        let mut following = [Following::new(simulation, &mut nowhere, true)];
        let records = walk(way, &mut following, None)?;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let records = records.max(1) as f64;
        Ok(started.elapsed().as_secs_f64() / records)
    }

    /// Runs all simulations, several in a pass, passes side by side.
    fn simulate(
        &self,
        models: &[Model],
        counters: &[Swept<'_>],
        tasks: &[Task],
        threads: usize,
    ) -> Result<BTreeMap<Task, Followed>, ReplayError> {
        let size = tasks.len().div_ceil(threads.max(1)).clamp(1, SIMULATIONS_PER_PASS);
        let batches: Vec<&[Task]> = tasks.chunks(size).collect();
        let results = in_parallel(batches.len(), threads, |at| {
            batches
                .get(at)
                .map_or(Ok(Vec::new()), |batch| self.pass(models, counters, batch))
        });
        let mut all = BTreeMap::new();
        for result in results {
            all.extend(result?);
        }
        Ok(all)
    }

    fn pass(&self, models: &[Model], counters: &[Swept<'_>], batch: &[Task]) -> BatchResult {
        let (mut own_counters, mut own_models) = (Vec::new(), Vec::new());
        let mut places = Vec::new();
        for task in batch {
            match *task {
                Task::Counter(at, variant) => {
                    if let Some(swept) = counters.get(at) {
                        places.push((*task, false, own_counters.len()));
                        own_counters.push((swept, swept.variant(self.axes, variant)?));
                    }
                }
                Task::Model(at, variant) => {
                    if let Some(model) = models.get(at) {
                        places.push((*task, true, own_models.len()));
                        let asked: Asked = (self.model(model, variant)?, model.by_name);
                        own_models.push(asked);
                    }
                }
            }
        }
        let own_counters: Vec<(&dyn Counter, bool)> = own_counters
            .iter()
            .map(|(swept, own)| (own.as_deref().unwrap_or(swept.base()), true))
            .collect();
        let (mut by_counter, mut by_model) = evaluate::follow(
            self.traces,
            self.rules,
            self.request,
            self.timelines,
            &own_counters,
            &own_models,
        )?;
        Ok(places
            .into_iter()
            .filter_map(|(task, is_model, at)| {
                let followed = if is_model {
                    by_model.remove(&at)
                } else {
                    by_counter.remove(&at)
                };
                Some((task, followed?))
            })
            .collect())
    }

    /// What a model's reports are made of, by variant; or why there are none.
    fn given<'g>(
        &'g self,
        at: usize,
        model: &Model,
        counters: &[Swept<'_>],
        outcomes: &'g [Vec<Outcome<'_>>],
        followed: &'g BTreeMap<Task, Followed>,
        seen: &[Seen<'_>],
    ) -> Result<Result<Vec<Given<'g>>, String>, ReplayError> {
        let built = energy::model(&model.file);
        let own: Vec<Axis> = model.given.among(self.axes).cloned().collect();
        let mut all = Vec::new();
        for variant in 0..model.given.count(self.axes) {
            let within = |part: &Part| {
                // The same axes, counted among the model's own.
                let axes = part
                    .axes
                    .iter()
                    .filter_map(|axis| model.given.axes.iter().position(|own| own == axis));
                Part {
                    axes: axes.collect(),
                }
                .variant(&own, variant)
            };
            let mut inputs = Vec::new();
            for input in built.inputs() {
                let found = counters
                    .iter()
                    .zip(outcomes)
                    .find(|(swept, _)| swept.counter.name() == input.counter);
                if let Some((swept, outcomes)) = found
                    && let Some(outcome) = outcomes.get(within(&swept.structural))
                {
                    inputs.push((input, outcome));
                }
            }
            let followed = followed.get(&Task::Model(at, within(&model.structural)));
            let refused = inputs
                .iter()
                .find_map(|(input, outcome)| Some((Some(input.counter), outcome.refusal()?.clone())))
                .or_else(|| Some((None, followed?.refusal(self.request.lenient)?)));
            if let Some((counter, refusal)) = refused {
                let name = &model.file.name;
                return match counter {
                    Some(counter) if model.by_name => {
                        Err(refusal.error(&format!("{name} (its counter {counter})")))
                    }
                    None if model.by_name => Err(refusal.error(name)),
                    Some(counter) => Ok(Err(format!("counter {counter}: {}", refusal.text()))),
                    None => Ok(Err(refusal.text())),
                };
            }
            all.push(evaluate::given(
                self.rules,
                &inputs,
                seen,
                0..seen.len(),
                followed,
            ));
        }
        Ok(Ok(all))
    }
}

/// Results of pieces of work that several threads take, in the order of the pieces.
fn in_parallel<T: Send>(count: usize, threads: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, T)>> = Mutex::new(Vec::with_capacity(count));
    let take = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return;
            }
            let result = work(at);
            if let Ok(mut done) = done.lock() {
                done.push((at, result));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.clamp(1, count.max(1)) {
            scope.spawn(take);
        }
        take();
    });
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

/// A figure's name below its estimator, its unit, its value.
type Named = (String, Option<String>, Cell);

struct Figures<'f> {
    context: &'f Context<'f>,
    columns: &'f [Glob],
    models: &'f [(&'f Model, Vec<Given<'f>>)],
    counters: &'f [(&'f Swept<'f>, Vec<CounterReport>)],
    divisor: Option<(Per, u64)>,
}

/// Configurations in a row, which have the same columns.
struct Chunk {
    columns: Vec<Column>,
    cells: Vec<Cell>,
}

impl Figures<'_> {
    fn all(&self, configurations: u64, threads: usize) -> Result<(Vec<Column>, Vec<Cell>), ReplayError> {
        let count = usize::try_from(configurations).unwrap_or(usize::MAX);
        let chunks = in_parallel(count.div_ceil(CHUNK), threads, |at| {
            self.chunk(at * CHUNK..((at + 1) * CHUNK).min(count))
        });
        let chunks: Vec<Chunk> = chunks.into_iter().collect::<Result<_, _>>()?;
        // A column that stands nowhere yet comes behind those that stand before it.
        let mut columns: Vec<Column> = Vec::new();
        for chunk in &chunks {
            merge(&mut columns, &chunk.columns);
        }
        if columns.is_empty() {
            let globs: Vec<String> = self.columns.iter().map(ToString::to_string).collect();
            return Err(ReplayError::Setting(format!(
                "--columns {}: no figure has such a name; those that there are stand in the head of a sweep without --columns, and below \
                 its models' names in `optape replay --format json`",
                globs.join(",")
            )));
        }
        let mut cells = Vec::with_capacity(count * columns.len());
        for chunk in chunks {
            if chunk.columns == columns {
                cells.extend(chunk.cells);
                continue;
            }
            let places: Vec<Option<usize>> = columns
                .iter()
                .map(|column| chunk.columns.iter().position(|c| c.name == column.name))
                .collect();
            for row in chunk.cells.chunks(chunk.columns.len().max(1)) {
                cells.extend(places.iter().map(|place| {
                    place
                        .and_then(|at| row.get(at).cloned())
                        .unwrap_or_default()
                }));
            }
        }
        Ok((columns, cells))
    }

    fn chunk(&self, configurations: std::ops::Range<usize>) -> Result<Chunk, ReplayError> {
        let mut columns: Vec<Column> = Vec::new();
        let mut rows: Vec<Vec<(usize, Cell)>> = Vec::with_capacity(configurations.len());
        for configuration in configurations {
            let mut row = Vec::new();
            for (at, (name, unit, cell)) in self.figures(configuration)?.into_iter().enumerate() {
                // Nearly always the same columns in the same order.
                let place = if columns.get(at).is_some_and(|column| column.name == name) {
                    at
                } else if let Some(place) = columns.iter().position(|c| c.name == name) {
                    place
                } else {
                    columns.push(Column { name, unit });
                    columns.len() - 1
                };
                row.push((place, cell));
            }
            rows.push(row);
        }
        let mut cells = vec![Cell::Nothing; rows.len() * columns.len()];
        for (number, row) in rows.into_iter().enumerate() {
            for (place, cell) in row {
                if let Some(into) = cells.get_mut(number * columns.len() + place) {
                    *into = cell;
                }
            }
        }
        Ok(Chunk { columns, cells })
    }

    /// All figures of a configuration.
    fn figures(&self, configuration: usize) -> Result<Vec<Named>, ReplayError> {
        let axes = self.context.axes;
        let mut all = Vec::new();
        for (swept, reports) in self.counters {
            let variant = swept.structural.variant(axes, configuration);
            if let Some(report) = reports.get(variant) {
                self.of_counter(swept.counter.name(), report, &mut all);
            }
        }
        let settings = settings(axes, configuration);
        for (model, givens) in self.models {
            let mut file = model.file.clone();
            evaluate::set_in(&mut file, &settings)?;
            let Some(given) = givens.get(model.given.variant(axes, configuration)) else {
                continue;
            };
            let report = energy::model(&file)
                .report(given)
                .map_err(|error| evaluate::refused(&error, &file.name))?;
            self.of_model(&file.name, &report, &mut all);
        }
        Ok(all)
    }

    fn takes(&self, name: &str, by_default: bool) -> bool {
        if self.columns.is_empty() {
            by_default
        } else {
            self.columns.iter().any(|glob| glob.matches(name))
        }
    }

    fn push(&self, all: &mut Vec<Named>, name: String, unit: Option<String>, cell: Cell, usual: bool) {
        if self.takes(&name, usual) {
            all.push((name, unit, cell));
        }
    }

    /// A total divided by what is asked for.
    #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
    fn divided(&self, all: &mut Vec<Named>, name: &str, unit: &str, total: f64) {
        if let Some((per, divisor)) = self.divisor {
            let name = format!("{name}_per_{}", per.name());
            let cell = Cell::Float(total / divisor as f64);
            self.push(all, name, Some(unit.to_owned()), cell, true);
        }
    }

    fn of_counter(&self, counter: &str, report: &CounterReport, all: &mut Vec<Named>) {
        let unit = || Some(report.unit.clone());
        let total = format!("{counter}.total");
        self.divided(all, &total, &report.unit, energy::float(report.total));
        self.push(all, total, unit(), report.total.into(), true);
        for (section, tree) in &report.details {
            let mut name = format!("{counter}.{section}");
            self.of_tree(tree, &mut name, 1, all);
        }
    }

    /// Numbers that stand directly in a section are usual, deeper ones are asked for.
    fn of_tree(&self, tree: &Tree, name: &mut String, depth: usize, all: &mut Vec<Named>) {
        match tree {
            Tree::Amount(amount) => {
                self.push(all, name.clone(), None, (*amount).into(), depth <= 2);
            }
            Tree::Branch(branch) => {
                for (part, tree) in branch {
                    let length = name.len();
                    name.push('.');
                    name.push_str(part);
                    self.of_tree(tree, name, depth + 1, all);
                    name.truncate(length);
                }
            }
        }
    }

    fn of_model(&self, model: &str, report: &EnergyReport, all: &mut Vec<Named>) {
        for (field, figure) in report.fields.iter() {
            let mut name = format!("{model}.{field}");
            let usual = match figure {
                Figure::Map(_) => field == "breakdown_pj",
                _ => true,
            };
            self.of_figure(figure, &mut name, usual, all);
            if self.divisor.is_some()
                && matches!(figure, Figure::Float(value) if value.to_bits() == report.total_pj.to_bits())
                && (field.starts_with("energy_total") || field.starts_with("total"))
            {
                self.divided(all, &format!("{model}.{field}"), report.unit, report.total_pj);
            }
        }
    }

    fn of_figure(&self, figure: &Figure, name: &mut String, usual: bool, all: &mut Vec<Named>) {
        let unit = |name: &str| {
            let is_energy = name.ends_with("_pj") || name.contains("energy");
            is_energy.then(|| "pJ".to_owned())
        };
        match figure {
            Figure::Integer(value) => self.push(all, name.clone(), None, (*value).into(), usual),
            Figure::Float(value) => {
                self.push(all, name.clone(), unit(name), (*value).into(), usual);
            }
            Figure::Map(map) => {
                for (part, figure) in map.iter() {
                    let length = name.len();
                    name.push('.');
                    name.push_str(part);
                    self.of_figure(figure, name, usual, all);
                    name.truncate(length);
                }
            }
            Figure::Flag(_) | Figure::Text(_) | Figure::List(_) => {}
        }
    }
}

/// Puts columns that are missing behind those that stand before them.
fn merge(into: &mut Vec<Column>, from: &[Column]) {
    let mut after = 0;
    for column in from {
        match into.iter().position(|known| known.name == column.name) {
            Some(at) => after = at + 1,
            None => {
                into.insert(after, column.clone());
                after += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests;
