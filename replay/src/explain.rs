//! Which rule gave which number, with the formula filled in.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::Write;

use serde::Serialize;

use optape_trace::{Argument, SignatureDef, tensor_flags};

use crate::aggregate::{self, Reading};
use crate::error::ReplayError;
use crate::evaluate::{Kind, Request, Wanted, see};
use crate::load::Traces;
use crate::rules::{CallRow, Counted, Notes, RuleSet};
use crate::selection::{Glob, op_matches};

/// Everything about the calls of an op or in a scope.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The rule set.
    pub rules: String,
    /// What was asked about.
    pub target: String,
    /// One per kind of call, in the order of first use.
    pub calls: Vec<Explained>,
}

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
        times: false,
    };
    let rows = aggregate::rows(traces, &timelines, &request.selection, reading)?;
    let seen = see(traces, rules, &rows.rows);
    let glob = Glob::new(target);
    let is_op = seen
        .iter()
        .any(|s| op_matches(&glob, s.call.op) || glob.matches(&s.facts.shown));
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
            .filter(|c| match &request.counters {
                Wanted::Usual => c.is_usual(),
                Wanted::All => true,
                Wanted::Named(names) => names.iter().any(|name| name == c.name()),
            })
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
    Ok(Explanation {
        rules: rules.name.to_owned(),
        target: target.to_owned(),
        calls,
    })
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
