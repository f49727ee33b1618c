//! What every counter and model would need beyond what a file holds.
//!
//! The answer comes from counting: every estimator is asked as in a replay of the whole run, and what it then misses is
//! listed, with the flag of `optape record` that takes it. So it says neither more nor less than a replay would refuse.

use std::collections::BTreeMap;
use std::io::Write;

use optape_trace::needs::{self, NEEDS_VERSION};
use optape_trace::series::facts;
use serde::Serialize;

use crate::aggregate::{self, Reading, Rows};
use crate::error::ReplayError;
use crate::evaluate::{
    Kind, Request, Seen, Wanted, follow, given, inputs_of, models, processors, run, see,
};
use crate::firing;
use crate::load::Traces;
use crate::monitors::Measurement;
use crate::report::grouped;
use crate::rules::{Counted, Counter, MissingLevel, RULE_SETS, RuleError, RuleSet};
use crate::selection::Selection;
use crate::timeline::Timeline;

/// So many operands are named in a text; JSON has all.
const SHOWN: usize = 3;

/// What a run's files hold, and what the estimators of every rule set lack.
#[derive(Clone, Debug, Serialize)]
pub struct Needs {
    /// What `optape record` was asked for, as the first file spells it.
    pub statistics: String,
    /// Version of the table of needs that capture worked by.
    pub needs_version: u32,
    /// Levels that it takes, of the op calls that rules need them of.
    pub levels: Vec<&'static str>,
    /// Levels that it does not take, and the flag that does.
    pub other_levels: BTreeMap<&'static str, &'static str>,
    /// Executed op calls that were asked about.
    pub op_calls: u64,
    /// By rule set.
    pub rules: Vec<RulesNeeds>,
    /// What depends on no rules: firing rates, what sensors measured, what totals can be divided by.
    pub always: Vec<Estimator>,
    /// What is missing for everybody: records that were lost, an end that was cut off.
    pub notes: Vec<String>,
}

/// The estimators of a rule set.
#[derive(Clone, Debug, Serialize)]
pub struct RulesNeeds {
    /// `optape`.
    pub name: &'static str,
    /// Its version.
    pub version: u32,
    /// Counters, then energy models.
    pub estimators: Vec<Estimator>,
}

/// Whether an estimator can answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Standing {
    /// The file holds what it needs.
    Held,
    /// A replay refuses it (exit 4), and counts a part of it under `--lenient`.
    Lacks,
    /// Its rules fail at a call of the run; no recording helps.
    Refused {
        /// As the rules say it.
        reason: String,
    },
}

/// A counter or model.
#[derive(Clone, Debug, Serialize)]
pub struct Estimator {
    /// As replay's `skipped` names it: `counters/mac`.
    pub estimator: String,
    /// Whether it can answer.
    #[serde(flatten)]
    pub standing: Standing,
    /// The counters that a model is made of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub made_of: Vec<&'static str>,
    /// What it lacks.
    pub lacking: Vec<Lacking>,
    /// Calls of ops that the rules do not know, which no recording helps either.
    #[serde(skip_serializing_if = "is_zero")]
    pub calls_without_rule: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Something that is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lacking {
    /// `T1`; absent for what is no level of statistics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<&'static str>,
    /// What of which op.
    pub what: String,
    /// Of so many op calls, where it is of op calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<u64>,
    /// The flag of `optape record` that records it; absent where none does.
    pub flag: Option<&'static str>,
    /// What to do.
    pub way_out: String,
}

impl Estimator {
    fn of(estimator: impl Into<String>, lacking: Vec<Lacking>) -> Self {
        Self {
            estimator: estimator.into(),
            standing: if lacking.is_empty() {
                Standing::Held
            } else {
                Standing::Lacks
            },
            made_of: Vec::new(),
            lacking,
            calls_without_rule: 0,
        }
    }
}

impl Estimator {
    fn met(&mut self, error: &RuleError) {
        match error {
            RuleError::Missing(missing) => self.lacks(missing, None),
            RuleError::Failed(reason) | RuleError::Unsuited(reason) => self.fails(reason),
        }
    }

    fn lacks(&mut self, missing: &MissingLevel, calls: Option<u64>) {
        self.stands_with(&Standing::Lacks);
        add(
            &mut self.lacking,
            Lacking {
                level: Some(missing.level),
                what: missing.what.clone(),
                calls,
                flag: missing.way_out.flag(),
                way_out: missing.way_out.to_string(),
            },
        );
    }

    fn fails(&mut self, reason: &str) {
        self.stands_with(&Standing::Refused {
            reason: reason.to_owned(),
        });
    }

    /// No better than this.
    fn stands_with(&mut self, other: &Standing) {
        match (&self.standing, other) {
            (Standing::Refused { .. }, _) | (_, Standing::Held) => {}
            _ => self.standing = other.clone(),
        }
    }
}

/// What the files lack.
///
/// # Errors
/// Where a trace cannot be read.
pub fn needs(traces: &Traces) -> Result<Needs, ReplayError> {
    let timelines = traces.timelines(false, &[])?;
    let whole = Selection::default();
    let reading = Reading {
        by_step: false,
        from_events: false,
        threads: processors(),
        times: false,
    };
    let rows = aggregate::rows(traces, &timelines, &whole, reading)?;
    let mut rules = Vec::new();
    for name in RULE_SETS {
        let set = RuleSet::named(name)?;
        let seen = see(traces, &set, &rows.rows);
        rules.push(RulesNeeds {
            name: set.name,
            version: set.version,
            estimators: estimators(traces, &timelines, &set, &seen)?,
        });
    }
    let seen = see(traces, &RuleSet::named(RULE_SETS[0])?, &rows.rows);
    let mut always = vec![
        firing_rates(traces, &timelines, &seen),
        hardware(traces, &timelines, &whole)?,
    ];
    // Marks of a long run are not read for this: they are asked for when a replay divides by them.
    if timelines.iter().all(|timeline| timeline.complete) {
        always.extend(divisors(&rows));
    }
    let info = traces.sources.first().map(|source| source.trace.run());
    let statistics = info.map(|run| run.statistics.clone()).unwrap_or_default();
    let preset = needs::preset(&statistics);
    let levels = preset
        .map(|preset| preset.levels.to_vec())
        .unwrap_or_default();
    Ok(Needs {
        other_levels: needs::levels()
            .into_iter()
            .filter(|(level, _)| preset.is_some() && !levels.contains(level))
            .collect(),
        levels,
        needs_version: info.map_or(NEEDS_VERSION, |run| run.needs_version),
        statistics,
        op_calls: seen
            .iter()
            .filter(|s| s.facts.kind == Kind::Op)
            .map(|s| s.row.sums.calls)
            .sum(),
        rules,
        always,
        notes: traces.incompleteness(&timelines),
    })
}

fn estimators(
    traces: &Traces,
    timelines: &[Timeline],
    set: &RuleSet,
    seen: &[Seen<'_>],
) -> Result<Vec<Estimator>, ReplayError> {
    let request = Request {
        counters: Wanted::All,
        energy: Wanted::All,
        // Not only the first thing that is missing.
        lenient: true,
        ..Request::default()
    };
    let models = models(set, &request)?;
    let counters: Vec<(&dyn Counter, bool)> =
        set.counters.iter().map(|c| (c.as_ref(), true)).collect();
    let (mut by_counter, mut by_model) =
        follow(traces, set, &request, timelines, &counters, &models)?;
    let mut all = Vec::new();
    let mut outcomes = Vec::new();
    for (at, (counter, shown)) in counters.into_iter().enumerate() {
        let followed = by_counter.remove(&at);
        let mut estimator = Estimator::of(format!("counters/{}", counter.name()), Vec::new());
        for error in followed.iter().flat_map(|followed| &followed.errors) {
            estimator.met(error);
        }
        let outcome = run(counter, seen, true, followed);
        for (s, counted) in seen.iter().zip(&outcome.counted) {
            let calls = s.row.sums.calls;
            match counted {
                Some(Counted::Missing(missing)) => estimator.lacks(missing, Some(calls)),
                Some(Counted::Failed(reason)) => estimator.fails(reason),
                Some(Counted::Unknown(_)) => estimator.calls_without_rule += calls,
                Some(Counted::Value(_) | Counted::Zero) | None => {}
            }
        }
        all.push(estimator);
        outcomes.push((outcome, shown));
    }
    for (at, (model, _)) in models.iter().enumerate() {
        let followed = by_model.remove(&at);
        let inputs = inputs_of(model.as_ref(), &outcomes);
        let mut estimator = Estimator::of(format!("energy/{}", model.name()), Vec::new());
        for input in model.inputs() {
            if !estimator.made_of.contains(&input.counter) {
                estimator.made_of.push(input.counter);
            }
        }
        for name in estimator.made_of.clone() {
            let name = format!("counters/{name}");
            let Some(input) = all.iter().find(|e| e.estimator == name) else {
                continue;
            };
            for one in &input.lacking {
                // Two counters lack the same thing of the same calls.
                match estimator.lacking.iter_mut().find(|known| same(known, one)) {
                    Some(known) => known.calls = known.calls.max(one.calls),
                    None => estimator.lacking.push(one.clone()),
                }
            }
            estimator.stands_with(&input.standing);
        }
        for error in followed.iter().flat_map(|followed| &followed.errors) {
            estimator.met(error);
        }
        // A model that lacks something is not asked for its report, as in a replay.
        if estimator.standing == Standing::Held {
            let given = given(set, &inputs, seen, 0..seen.len(), followed.as_ref());
            if let Err(error) = model.report(&given) {
                estimator.met(&error);
            }
        }
        all.push(estimator);
    }
    Ok(all)
}

fn same(a: &Lacking, b: &Lacking) -> bool {
    a.level == b.level && a.what == b.what && a.way_out == b.way_out
}

fn add(all: &mut Vec<Lacking>, one: Lacking) {
    match all.iter_mut().find(|known| same(known, &one)) {
        Some(known) => known.calls = known.calls.zip(one.calls).map(|(a, b)| a + b),
        None => all.push(one),
    }
}

/// Rates of all spiking neurons that the run has, whether or not their outputs were watched.
fn firing_rates(traces: &Traces, timelines: &[Timeline], seen: &[Seen<'_>]) -> Estimator {
    let rates = firing::rates(traces, timelines, seen);
    let mut lacking = Vec::new();
    for at in traces.streams() {
        let modules = at.stream.dictionary().modules().map(|(_, module)| module);
        for module in modules.filter(|module| module.spiking) {
            let rate = rates.iter().find(|rate| rate.module == module.name);
            // What never ran has no rate to lack; what ran unwatched is in no list.
            if !seen.iter().any(|s| s.facts.scopes.contains(&module.name)) {
                continue;
            }
            let calls = match rate {
                Some(rate) if rate.without_statistics > 0 => Some(rate.without_statistics),
                Some(_) => continue,
                None => None,
            };
            add(
                &mut lacking,
                Lacking {
                    level: Some("T1"),
                    what: format!("the spikes of {}", module.name),
                    calls,
                    flag: Some(needs::RULES_FLAG),
                    way_out: format!("record with `optape record {}`", needs::RULES_FLAG),
                },
            );
        }
    }
    Estimator::of("firing_rates", lacking)
}

fn hardware(
    traces: &Traces,
    timelines: &[Timeline],
    whole: &Selection,
) -> Result<Estimator, ReplayError> {
    const FLAG: &str = "--monitor gpu,rapl,host,process";
    let mut lacking = Vec::new();
    match Measurement::read(traces, timelines, whole, false, false)? {
        None => lacking.push(Lacking {
            level: None,
            what: "what devices used meanwhile".to_owned(),
            calls: None,
            flag: Some(FLAG),
            way_out: format!("record with `optape record {FLAG}` (the default)"),
        }),
        Some(measurement) => {
            for (key, value) in measurement.report().facts {
                let word = |name: &str| value.get(name).and_then(serde_json::Value::as_str);
                let is_source = key
                    .rsplit('/')
                    .next()
                    .is_some_and(|key| key.starts_with(facts::SOURCE_PREFIX));
                if is_source && word("state") == Some("absent") {
                    lacking.push(Lacking {
                        level: None,
                        what: format!("{key}: {}", word("what").unwrap_or_default()),
                        calls: None,
                        flag: None,
                        way_out: word("hint")
                            .unwrap_or("no flag helps on that machine")
                            .to_owned(),
                    });
                }
            }
        }
    }
    Ok(Estimator::of("monitors/hardware", lacking))
}

/// What `--per` divides by.
fn divisors(rows: &Rows) -> Vec<Estimator> {
    let found = rows.divisors;
    let one = |name: &str, found: bool, what: &str, way_out: &str| {
        let lacking = (!found).then(|| Lacking {
            level: None,
            what: what.to_owned(),
            calls: None,
            flag: None,
            way_out: way_out.to_owned(),
        });
        Estimator::of(format!("per/{name}"), lacking.into_iter().collect())
    };
    vec![
        one(
            "step",
            found.steps > 0,
            "steps",
            "mark them with optape.step() in the program",
        ),
        one(
            "sample",
            found.samples.is_some_and(|samples| samples > 0),
            "how many samples were processed",
            "mark them with optape.step(samples=N) in the program, or say it in `optape replay --samples N`",
        ),
        one(
            "call",
            found.root_calls > 0,
            "calls of modules",
            "there is none where the program calls no torch.nn.Module",
        ),
    ]
}

impl Needs {
    /// Writes it for people, every line indented as part of `optape info`.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write_text(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        writeln!(out, "  needs")?;
        writeln!(
            out,
            "    {:<26} {}",
            "levels held",
            match self.levels.is_empty() {
                true => format!(
                    "unknown: this version knows no preset '{}'",
                    self.statistics
                ),
                false => self.levels.join(", "),
            }
        )?;
        for (level, flag) in &self.other_levels {
            writeln!(
                out,
                "    {:<26} {level}: `optape record {flag}`",
                "not held"
            )?;
        }
        writeln!(
            out,
            "    {:<26} {}",
            "op calls asked about",
            grouped(i128::from(self.op_calls))
        )?;
        for set in &self.rules {
            writeln!(out, "    under {}, version {}", set.name, set.version)?;
            for estimator in &set.estimators {
                estimator.write_text(out)?;
            }
        }
        writeln!(out, "    under any rules")?;
        for estimator in &self.always {
            estimator.write_text(out)?;
        }
        for note in &self.notes {
            writeln!(out, "    note: {note}")?;
        }
        Ok(())
    }
}

impl Estimator {
    fn write_text(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        let without_rule = match self.calls_without_rule {
            0 => String::new(),
            calls => format!("; no rule for {} calls", grouped(i128::from(calls))),
        };
        let standing = match &self.standing {
            Standing::Held => "held".to_owned(),
            Standing::Lacks if self.made_of.is_empty() => "lacks".to_owned(),
            // The counters' lines say it already.
            Standing::Lacks => {
                format!("lacks what its counters lack ({})", self.made_of.join(", "))
            }
            Standing::Refused { reason } => format!("refused: {reason}"),
        };
        writeln!(out, "      {:<24} {standing}{without_rule}", self.estimator)?;
        if !self.made_of.is_empty() {
            return Ok(());
        }
        let mut ways: Vec<(&str, Option<&str>)> = Vec::new();
        for one in &self.lacking {
            if !ways.contains(&(&one.way_out, one.level)) {
                ways.push((&one.way_out, one.level));
            }
        }
        for (way_out, level) in ways {
            let of_it: Vec<&Lacking> = self
                .lacking
                .iter()
                .filter(|one| one.way_out == way_out && one.level == level)
                .collect();
            for one in of_it.iter().take(SHOWN) {
                let level = level.map(|level| format!("{level}: ")).unwrap_or_default();
                let calls = match one.calls {
                    None => String::new(),
                    Some(1) => " (1 call)".to_owned(),
                    Some(calls) => format!(" ({} calls)", grouped(i128::from(calls))),
                };
                writeln!(out, "        {level}{}{calls}", one.what)?;
            }
            if of_it.len() > SHOWN {
                writeln!(out, "        and {} more", of_it.len() - SHOWN)?;
            }
            writeln!(out, "        -> {way_out}")?;
        }
        Ok(())
    }
}
