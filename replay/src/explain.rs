//! Which rule gave which number, with the formula filled in.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write;

use serde::Serialize;

use optape_trace::{Argument, OpDef, SignatureDef, tensor_flags};

use crate::aggregate::{self, Reading};
use crate::error::ReplayError;
use crate::evaluate::{Followed, Kind, Request, Wanted, is_full, not_full, refused, see, set_counters};
use crate::load::Traces;
use crate::ordered::{Explaining, Following, Told, Tree, Way, walk};
use crate::rules::{CallRow, Counted, Counter, Notes, RuleError, RuleSet};
use crate::selection::{Glob, op_matches};
use crate::timeline::Timeline;

/// Everything about the calls of an op or in a scope.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The rule set.
    pub rules: String,
    /// What was asked about.
    pub target: String,
    /// One per kind of call, in the order of first use.
    pub calls: Vec<Explained>,
    /// What counters that follow the stream made of the calls, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub followed: Vec<ExplainedFollowing>,
}

/// A counter that follows the stream, and what it made of some calls.
#[derive(Clone, Debug, Serialize)]
pub struct ExplainedFollowing {
    /// The counter.
    pub counter: String,
    /// Its unit.
    pub unit: String,
    /// How its numbers come about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub formula: Option<String>,
    /// Where that comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Calls, in the order of the first of each kind; those that are alike in all that is shown stand together.
    pub calls: Vec<ExplainedCall>,
    /// Kinds of calls beyond those that are shown.
    #[serde(skip_serializing_if = "is_zero")]
    pub more: u64,
    /// Why there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What a counter that follows the stream made of a call.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExplainedCall {
    /// The op as the rule set names it, or the module that was called.
    pub op: String,
    /// The innermost module.
    pub module: String,
    /// The stage; absent for calls of modules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// How many calls were alike.
    pub calls: u64,
    /// Arguments and results, with shapes and types.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub structure: String,
    /// What was said about it, formulas filled in.
    pub lines: Vec<String>,
    /// What formulas were filled in with.
    pub values: Vec<(String, String)>,
    /// What one of them added to the count.
    pub count: i128,
    /// What one of them added besides, by section and name.
    pub added: Vec<(String, i128)>,
    /// Why it added nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// So many kinds of calls are shown of a counter.
const MOST_KINDS: usize = 500;

/// Calls that are alike.
#[derive(Clone, Debug, Serialize)]
pub struct Explained {
    /// As the rule set names it.
    pub op: String,
    /// The innermost module.
    pub module: String,
    /// The stage.
    pub stage: String,
    /// How many calls.
    pub calls: u64,
    /// Arguments and results, with shapes and types.
    pub structure: String,
    /// What each counter makes of them.
    pub counters: Vec<ExplainedCounter>,
}

/// What a counter makes of some calls.
#[derive(Clone, Debug, Serialize)]
pub struct ExplainedCounter {
    /// The counter.
    pub counter: String,
    /// The rule's formula; absent where there is no rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub formula: Option<String>,
    /// Where the formula comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What the formula was filled in with.
    pub values: Vec<(String, String)>,
    /// The number over all calls, or why there is none.
    pub result: String,
}

/// Explains the selected calls of an op (`aten::mm`, `aten.add.Tensor`) or inside a scope.
///
/// # Errors
/// Where the target is neither, or a trace cannot be read.
pub fn explain(
    traces: &Traces,
    rules: &RuleSet,
    request: &Request,
    target: &str,
) -> Result<Explanation, ReplayError> {
    if let Wanted::Named(names) = &request.counters {
        for name in names {
            if rules.counter(name).is_none() {
                return Err(ReplayError::unknown_name(
                    "counter",
                    name,
                    rules.counter_names(),
                ));
            }
        }
    }
    let timelines =
        traces.timelines(!request.selection.is_whole_run(), &request.selection.ranges)?;
    request.selection.check(traces, &timelines)?;
    let reading = Reading {
        by_step: false,
        from_events: request.from_events,
        threads: 1,
    };
    let rows = aggregate::rows(traces, &timelines, &request.selection, reading)?;
    let seen = see(traces, rules, &rows.rows);
    let glob = Glob::new(target);
    let is_op = seen
        .iter()
        .any(|s| op_matches(&glob, s.call.op) || glob.matches(&s.facts.shown));
    let is_wanted = |counter: &dyn Counter| match &request.counters {
        Wanted::Usual => counter.is_usual(),
        Wanted::All => true,
        Wanted::Named(names) => names.iter().any(|name| name == counter.name()),
    };
    let mut calls = Vec::new();
    for s in seen
        .iter()
        .filter(|s| matches!(s.facts.kind, Kind::Op | Kind::NotExecuted))
    {
        let wanted = if is_op {
            op_matches(&glob, s.call.op) || glob.matches(&s.facts.shown)
        } else {
            s.facts.scopes.iter().any(|scope| glob.matches(scope))
        };
        if !wanted {
            continue;
        }
        let counters = rules
            .counters
            .iter()
            .filter(|counter| is_wanted(counter.as_ref()) && counter.simulation().is_none())
            .map(|counter| {
                let notes: Notes = RefCell::new(Vec::new());
                let row = CallRow {
                    notes: Some(&notes),
                    ..s.call
                };
                let counted = if s.facts.kind == Kind::Op {
                    Some(counter.count(&row))
                } else {
                    None
                };
                let rule = counter.rule_of(&row);
                ExplainedCounter {
                    counter: counter.name().to_owned(),
                    formula: rule.map(|r| r.formula.to_string()),
                    source: rule.map(|r| r.source.to_string()),
                    values: notes.into_inner(),
                    result: match counted {
                        None => "not counted: no kernel computed the call".to_owned(),
                        Some(Counted::Value(value)) => format!("{value} {}", counter.unit()),
                        Some(Counted::Zero) => {
                            format!(
                                "0 {}: {}",
                                counter.unit(),
                                rule.and_then(|r| r.zero_reason()).unwrap_or("by rule")
                            )
                        }
                        Some(Counted::Unknown(None)) => "unknown: no rule for the op".to_owned(),
                        Some(Counted::Unknown(Some(why))) => format!("unknown: {why}"),
                        Some(Counted::Missing(missing)) => missing.to_string(),
                        Some(Counted::Failed(text)) => format!("refused: {text}"),
                        Some(Counted::Mistaken(mistake)) => mistake.to_string(),
                    },
                }
            })
            .collect();
        calls.push(Explained {
            op: s.facts.shown.to_string(),
            module: s.facts.module.clone(),
            stage: s.facts.stage.clone(),
            calls: s.row.sums.calls,
            structure: structure(&s.call),
            counters,
        });
    }
    if calls.is_empty() {
        let mut known: Vec<String> = seen
            .iter()
            .filter(|s| s.facts.kind == Kind::Op)
            .map(|s| s.facts.shown.to_string())
            .collect();
        known.extend(seen.iter().flat_map(|s| s.facts.scopes.iter().cloned()));
        return Err(ReplayError::unknown_name(
            "op or scope",
            target,
            known.iter().map(String::as_str),
        ));
    }
    let set = set_counters(rules, &request.settings)?;
    let following: Vec<&dyn Counter> = rules
        .counters
        .iter()
        .zip(&set)
        .map(|(counter, set)| set.as_deref().unwrap_or(counter.as_ref()))
        .filter(|counter| is_wanted(*counter) && counter.simulation().is_some())
        .collect();
    let collector = Collector::new(&glob, is_op, &following);
    Ok(Explanation {
        rules: rules.name.to_string(),
        target: target.to_owned(),
        calls,
        followed: follow(traces, rules, request, &timelines, &following, collector)?,
    })
}

/// Goes through the streams once for all counters that follow them.
fn follow(
    traces: &Traces,
    rules: &RuleSet,
    request: &Request,
    timelines: &[Timeline],
    counters: &[&dyn Counter],
    mut collector: Collector<'_>,
) -> Result<Vec<ExplainedFollowing>, ReplayError> {
    if counters.is_empty() {
        return Ok(Vec::new());
    }
    let streams = traces
        .streams()
        .zip(timelines)
        .filter(|(at, _)| request.selection.takes(*at));
    for (at, timeline) in streams {
        if !is_full(at) {
            if let (Wanted::Named(_), Some(first)) = (&request.counters, counters.first()) {
                return Err(refused(&not_full(), first.name()));
            }
            for explained in &mut collector.explained {
                explained.missing = Some(not_full().to_string());
            }
            continue;
        }
        let pieces = request.selection.pieces(at, timeline, false);
        let mut nowhere: Vec<Followed> = counters.iter().map(|_| Followed::default()).collect();
        let mut following: Vec<Following<'_>> = counters
            .iter()
            .zip(&mut nowhere)
            // What one call lacks, the next may have.
            .filter_map(|(counter, into)| Some(Following::new(counter.simulation()?, into, true)))
            .collect();
        let way = Way {
            traces,
            rules,
            selection: &request.selection,
            at,
            pieces: &pieces,
            most_records: u64::MAX,
        };
        walk(way, &mut following, Some(&mut collector))?;
    }
    Ok(collector.explained)
}

/// Puts calls together that are alike.
struct Collector<'c> {
    glob: &'c Glob,
    is_op: bool,
    explained: Vec<ExplainedFollowing>,
    /// By counter and all that is shown but for the number: the place among the counter's calls; `None`: it is one too many.
    known: HashMap<(usize, String), Option<usize>>,
}

impl<'c> Collector<'c> {
    fn new(glob: &'c Glob, is_op: bool, counters: &[&dyn Counter]) -> Self {
        let explained = counters
            .iter()
            .map(|counter| {
                let (formula, source) = counter.method().unzip();
                ExplainedFollowing {
                    counter: counter.name().to_owned(),
                    unit: counter.unit().to_owned(),
                    formula: formula.map(str::to_owned),
                    source: source.map(str::to_owned),
                    calls: Vec::new(),
                    more: 0,
                    missing: None,
                }
            })
            .collect();
        Self {
            glob,
            is_op,
            explained,
            known: HashMap::new(),
        }
    }
}

impl Explaining for Collector<'_> {
    fn wants_op(&self, op: &OpDef, shown: &str, scopes: &[String]) -> bool {
        if self.is_op {
            op_matches(self.glob, op) || self.glob.matches(shown)
        } else {
            scopes.iter().any(|scope| self.glob.matches(scope))
        }
    }

    fn wants_module(&self, scopes: &[String]) -> bool {
        !self.is_op && scopes.iter().any(|scope| self.glob.matches(scope))
    }

    fn told(&mut self, told: Told<'_>) {
        let Told {
            following,
            row,
            module,
            shown,
            innermost,
            mut amounts,
            values,
            error,
        } = told;
        let Some(explained) = self.explained.get_mut(following) else {
            return;
        };
        let lines = amounts.explanations();
        let mut added = Vec::new();
        for (section, tree) in &amounts.sections {
            numbers(tree, &mut (*section).to_owned(), &mut added);
        }
        if amounts.total == 0 && added.is_empty() && lines.is_empty() && error.is_none() {
            return;
        }
        let call = ExplainedCall {
            op: match module {
                Some(_) => format!("call of {shown}"),
                None => shown.to_owned(),
            },
            module: innermost.to_owned(),
            stage: row.map(|row| row.signature.stage.name().to_owned()),
            calls: 1,
            structure: row.as_ref().map(structure).unwrap_or_default(),
            lines,
            values,
            count: amounts.total,
            added,
            error: error.as_ref().map(RuleError::to_string),
        };
        let kind = (following, format!("{call:?}"));
        match self.known.get(&kind) {
            Some(Some(at)) => {
                if let Some(known) = explained.calls.get_mut(*at) {
                    known.calls += 1;
                }
            }
            Some(None) => {}
            None if explained.calls.len() < MOST_KINDS => {
                self.known.insert(kind, Some(explained.calls.len()));
                explained.calls.push(call);
            }
            None => {
                explained.more += 1;
                self.known.insert(kind, None);
            }
        }
    }
}

/// The numbers of a section, each behind its names; those of whole scopes are told by their own.
fn numbers(tree: &Tree, name: &mut String, all: &mut Vec<(String, i128)>) {
    match tree {
        Tree::Amount(amount) => all.push((name.clone(), *amount)),
        Tree::Branch(branch) => {
            // Every scope on the stack has the same: one of them tells it.
            let by_scope = branch.contains_key("Global");
            for (part, tree) in branch.iter().filter(|(part, _)| !by_scope || *part == "Global") {
                let length = name.len();
                if !by_scope {
                    name.push('.');
                    name.push_str(part);
                }
                numbers(tree, name, all);
                name.truncate(length);
            }
        }
    }
}

/// `self: float32[2, 6], mat2: float32[6, 6] -> float32[2, 6]`
fn structure(row: &CallRow<'_>) -> String {
    let mut text = String::new();
    for (at, argument) in row.signature.arguments.iter().enumerate() {
        let name = row.op.arguments.get(at).map_or("?", |a| a.name.as_str());
        let separator = if at == 0 { "" } else { ", " };
        let _ = write!(
            text,
            "{separator}{name}: {}",
            value(row.signature, argument)
        );
    }
    let outputs: Vec<String> = row
        .signature
        .outputs
        .iter()
        .map(|output| value(row.signature, output))
        .collect();
    let _ = write!(
        text,
        " -> {}",
        if outputs.is_empty() {
            "()".to_owned()
        } else {
            outputs.join(", ")
        }
    );
    text
}

fn value(signature: &SignatureDef, argument: &Argument) -> String {
    let tensor = |index: u16| match signature.tensors.get(usize::from(index)) {
        Some(t) if t.is(tensor_flags::WRAPPED_NUMBER) => format!("number ({})", t.dtype.name()),
        Some(t) => format!("{}{:?}", t.dtype.name(), t.shape),
        None => "?".to_owned(),
    };
    match argument {
        Argument::None => "None".to_owned(),
        Argument::Tensor(index) => tensor(*index),
        Argument::TensorList(list) => {
            let shown: Vec<String> = list
                .iter()
                .take(4)
                .map(|t| t.map_or_else(|| "None".to_owned(), tensor))
                .collect();
            let more = if list.len() > 4 {
                format!(", ... {} in all", list.len())
            } else {
                String::new()
            };
            format!("[{}{more}]", shown.join(", "))
        }
        Argument::Int(value) | Argument::Enumerator(value) => value.to_string(),
        Argument::IntList(list) => format!("{list:?}"),
        Argument::Float(value) => value.to_string(),
        Argument::Bool(value) => value.to_string(),
        Argument::BoolList(list) => format!("{list:?}"),
        Argument::DType(dtype) => dtype.name().to_owned(),
        Argument::Device(device) => device.name(),
        _ => "(varies)".to_owned(),
    }
}

impl ExplainedFollowing {
    fn write_text(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        writeln!(out)?;
        writeln!(out, "{}, which follows the stream", self.counter)?;
        if let Some(formula) = &self.formula {
            writeln!(out, "  {formula}")?;
        }
        if let Some(source) = &self.source {
            writeln!(out, "  from {source}")?;
        }
        if let Some(missing) = &self.missing {
            writeln!(out, "  {missing}")?;
        }
        if self.calls.is_empty() && self.missing.is_none() {
            writeln!(out, "  these calls add nothing to it")?;
        }
        for call in &self.calls {
            let stage = call
                .stage
                .as_ref()
                .map_or_else(String::new, |stage| format!(", stage {stage}"));
            let alike = if call.calls == 1 {
                "1 call".to_owned()
            } else {
                format!("{} calls alike", call.calls)
            };
            writeln!(out, "  {} in {}{stage}, {alike}", call.op, call.module)?;
            if !call.structure.is_empty() {
                writeln!(out, "    {}", call.structure)?;
            }
            for line in &call.lines {
                writeln!(out, "    {line}")?;
            }
            if !call.values.is_empty() {
                let values: Vec<String> = call
                    .values
                    .iter()
                    .map(|(name, value)| format!("{name} = {value}"))
                    .collect();
                writeln!(out, "    with {}", values.join(", "))?;
            }
            writeln!(out, "    count {} {}", call.count, self.unit)?;
            // By op and stage it is what stands above.
            let plain = |name: &str| !name.contains(&call.op) && !name.starts_with("stage_");
            let shown = call.added.iter().filter(|(name, _)| plain(name));
            if shown.clone().next().is_some() {
                let added: Vec<String> = shown
                    .map(|(name, amount)| format!("{name} {amount}"))
                    .collect();
                writeln!(out, "    adds {}", added.join(", "))?;
            }
            if let Some(error) = &call.error {
                writeln!(out, "    {error}")?;
            }
        }
        if self.more > 0 {
            let more = self.more;
            writeln!(
                out,
                "  and {more} more kinds of calls; select fewer with --step, --range, --scope or --stage"
            )?;
        }
        Ok(())
    }
}

impl Explanation {
    /// Writes the explanation for people.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write_text(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        writeln!(out, "{} under the rules {}", self.target, self.rules)?;
        for call in &self.calls {
            writeln!(out)?;
            writeln!(
                out,
                "{} in {}, stage {}, {} calls",
                call.op, call.module, call.stage, call.calls
            )?;
            writeln!(out, "  {}", call.structure)?;
            for counter in &call.counters {
                writeln!(out, "  {:<14} {}", counter.counter, counter.result)?;
                if let Some(formula) = counter.formula.as_ref().filter(|f| *f != "0") {
                    writeln!(out, "  {:<14}   = {formula}", "")?;
                }
                if !counter.values.is_empty() {
                    let values: Vec<String> = counter
                        .values
                        .iter()
                        .map(|(name, value)| format!("{name} = {value}"))
                        .collect();
                    writeln!(out, "  {:<14}   with {}", "", values.join(", "))?;
                }
                if let Some(source) = &counter.source {
                    writeln!(out, "  {:<14}   from {source}", "")?;
                }
            }
        }
        for followed in &self.followed {
            followed.write_text(out)?;
        }
        Ok(())
    }

    /// Writes the explanation as JSON.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write_json(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        serde_json::to_writer_pretty(&mut *out, self).map_err(std::io::Error::from)?;
        out.write_all(b"\n")?;
        Ok(())
    }
}
