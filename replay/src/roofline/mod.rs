//! The roofline: operations per byte of scopes, against what a machine can do.
//!
//! S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore architectures", CACM 52(4),
//! 2009: of a program with `i` operations per byte a machine runs at most `min(peak, i * bandwidth)` operations per second. Left of the
//! ridge, where the two are equal, memory limits, right of it arithmetic does.
//!
//! Operations are those of the counter `flop`. Bytes are those of `memory_access`: operands read once and results written once, op
//! by op, as if no cache kept anything between two ops. So an intensity is a lower bound, and what runs out of a cache can lie above
//! the memory's roof. Times are those of the recorded calls that have rules, added up; calls on a GPU end before their kernels do, so
//! scopes that ran there have none.

mod peaks;
mod plot;
#[cfg(test)]
mod tests;
mod write;

use std::collections::HashMap;

use serde::Serialize;

use optape_trace::{DType, tensor_flags};

use crate::aggregate::{self, Reading};
use crate::error::ReplayError;
use crate::evaluate::{By, Kind, Request, Seen, processors, run, see};
use crate::load::Traces;
use crate::report::{RulesInfo, SelectionInfo, SourceInfo};
use crate::rules::{Counted, RuleSet};

pub use peaks::{Peaks, Roof};
pub use write::RooflineFormat;

/// Where scopes stand.
#[derive(Clone, Debug, Serialize)]
pub struct Roofline {
    /// Version of this shape.
    pub schema: u32,
    /// Version of optape.
    pub optape: String,
    /// The files.
    pub trace: Vec<SourceInfo>,
    /// The rules that counted.
    pub rules: RulesInfo,
    /// What was looked at.
    pub selection: SelectionInfo,
    /// What points are.
    pub by: String,
    /// What the machine can do, where that is known.
    pub peaks: Option<Peaks>,
    /// The roof that points are held against.
    pub roof: Option<Roof>,
    /// Operations per byte at its ridge.
    pub ridge_flop_per_byte: Option<f64>,
    /// Everything that is selected, as one point.
    pub total: Point,
    /// In the order of first use.
    pub points: Vec<Point>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// What limits a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// It has fewer operations per byte than the ridge.
    Memory,
    /// It has as many or more.
    Compute,
}

impl Limit {
    /// As reports print it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Compute => "compute",
        }
    }
}

/// A scope (op, module, stage, step).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Point {
    /// Its name.
    pub key: String,
    /// Op calls that have rules.
    pub calls: u64,
    /// Operations.
    pub flop: i128,
    /// Bytes of operands and results.
    pub bytes: i128,
    /// Operations per byte; absent where there are no bytes.
    pub flop_per_byte: Option<f64>,
    /// How long the calls took; absent where some ran on a device, or took no time that could be measured.
    pub time_ns: Option<u64>,
    /// Operations per second.
    pub flop_per_s: Option<f64>,
    /// Bytes per second.
    pub bytes_per_s: Option<f64>,
    /// What the roof allows, in operations per second.
    pub attainable_flop_per_s: Option<f64>,
    /// The share of it that was reached.
    pub share_of_roof: Option<f64>,
    /// What limits it.
    pub limit: Option<Limit>,
}

impl Point {
    #[expect(clippy::cast_precision_loss, reason = "rates are floats")]
    fn finish(&mut self, roof: Option<&Roof>) {
        let per = |amount: i128, of: f64| (of > 0.0).then(|| amount as f64 / of);
        self.flop_per_byte = per(self.flop, self.bytes as f64);
        let seconds = self.time_ns.map(|ns| ns as f64 / 1e9);
        self.flop_per_s = seconds.and_then(|s| per(self.flop, s));
        self.bytes_per_s = seconds.and_then(|s| per(self.bytes, s));
        let (Some(roof), Some(intensity)) = (roof, self.flop_per_byte) else {
            return;
        };
        let attainable = roof.attainable_flop_per_s(intensity);
        self.attainable_flop_per_s = Some(attainable);
        self.share_of_roof = self
            .flop_per_s
            .filter(|_| attainable > 0.0)
            .map(|rate| rate / attainable);
        self.limit = Some(if intensity < roof.ridge_flop_per_byte() {
            Limit::Memory
        } else {
            Limit::Compute
        });
    }
}

/// Puts the scopes of a replay under a roof. Of the request the selection, the grouping (scopes, where there is none) and the reading are
/// looked at; `roof` names one of the peaks' roofs, else it is the first.
///
/// # Errors
/// As [`evaluate`](crate::evaluate); where the rule set has no `flop` or `memory_access`; and where there is no roof of the name.
pub fn roofline(
    traces: &Traces,
    rules: &RuleSet,
    request: &Request,
    peaks: Option<&Peaks>,
    roof: Option<&str>,
) -> Result<Roofline, ReplayError> {
    let roof = match (peaks, roof) {
        (Some(peaks), Some(name)) => Some(peaks.named(name)?.clone()),
        (Some(peaks), None) => peaks.roofs.first().cloned(),
        (None, Some(name)) => {
            return Err(ReplayError::Selection(format!(
                "there is no roof '{name}': no peaks are given"
            )));
        }
        (None, None) => None,
    };
    let counter = |name| {
        rules
            .counter(name)
            .ok_or_else(|| ReplayError::unknown_name("counter", name, rules.counter_names()))
    };
    let (flop, memory) = (counter("flop")?, counter("memory_access")?);
    let by = request.by.unwrap_or(By::Scope);
    let needed = !request.selection.is_whole_run() || by == By::Step;
    let timelines = traces.timelines(needed, &request.selection.ranges)?;
    request.selection.check(traces, &timelines)?;
    let reading = Reading {
        by_step: by == By::Step,
        from_events: request.from_events,
        threads: match request.threads {
            0 => processors(),
            n => n,
        },
        times: true,
    };
    let rows = aggregate::rows(traces, &timelines, &request.selection, reading)?;
    let seen = see(traces, rules, &rows.rows);
    if !seen.iter().any(|s| s.facts.kind == Kind::Op) {
        return Err(ReplayError::NothingSelected {
            selection: request.selection.to_string(),
            hint: String::new(),
        });
    }
    let flops = run(flop, &seen, request.lenient, None);
    let bytes = run(memory, &seen, request.lenient, None);
    let mut found = Found::default();
    for (at, s) in seen.iter().enumerate() {
        if s.facts.kind != Kind::Op {
            continue;
        }
        let of = |counted: &[Option<Counted>]| match counted.get(at) {
            Some(Some(Counted::Value(value))) => Some(*value),
            Some(Some(Counted::Zero)) => Some(0),
            _ => None,
        };
        found.add(s, of(&flops.counted).zip(of(&bytes.counted)), by);
    }
    let mut notes = traces.incompleteness(&timelines);
    notes.extend(found.notes());
    let Found {
        mut total,
        mut points,
        ..
    } = found;
    if by == By::Scope {
        points.sort_by_key(|point| point.key != "Global");
    }
    total.finish(roof.as_ref());
    for point in &mut points {
        point.finish(roof.as_ref());
    }
    Ok(Roofline {
        schema: 1,
        optape: env!("CARGO_PKG_VERSION").to_owned(),
        trace: traces.sources.iter().map(SourceInfo::of).collect(),
        rules: RulesInfo {
            name: rules.name.to_owned(),
            version: rules.version,
            description: rules.description.to_owned(),
        },
        selection: SelectionInfo::of(&request.selection),
        by: by.name().to_owned(),
        peaks: peaks.cloned(),
        ridge_flop_per_byte: roof.as_ref().map(Roof::ridge_flop_per_byte),
        roof,
        total,
        points,
        notes,
    })
}

/// Types of arithmetic that is not float32's.
const OTHER_TYPES: [DType; 6] = [
    DType::F16,
    DType::BF16,
    DType::F64,
    DType::C32,
    DType::C64,
    DType::C128,
];

/// Points while rows are added to them.
#[derive(Default)]
struct Found {
    total: Point,
    points: Vec<Point>,
    places: HashMap<String, usize>,
    /// Points with a call on a device, and whether the total has one.
    on_device: Vec<bool>,
    any_on_device: bool,
    /// Calls without a rule.
    unknown: u64,
    all: u64,
    /// Calls with operands of another type than float32.
    other_types: u64,
}

impl Found {
    fn add(&mut self, s: &Seen<'_>, counted: Option<(i128, i128)>, by: By) {
        let calls = s.row.sums.calls;
        self.all += calls;
        let Some((flop, bytes)) = counted else {
            self.unknown += calls;
            return;
        };
        let tensors = &s.call.signature.tensors;
        let on_device = tensors.iter().any(|t| t.device.kind != 0);
        let other_type = tensors
            .iter()
            .any(|t| OTHER_TYPES.contains(&t.dtype) && !t.is(tensor_flags::WRAPPED_NUMBER));
        if flop > 0 && other_type {
            self.other_types += calls;
        }
        let add = |point: &mut Point| {
            point.calls += calls;
            point.flop = point.flop.saturating_add(flop);
            point.bytes = point.bytes.saturating_add(bytes);
            let time = point.time_ns.get_or_insert(0);
            *time = time.saturating_add(s.row.sums.duration_ns);
        };
        add(&mut self.total);
        self.total.key = "total".to_owned();
        self.any_on_device |= on_device;
        for key in s.keys(by) {
            let place = *self.places.entry(key.clone()).or_insert_with(|| {
                self.points.push(Point {
                    key,
                    ..Point::default()
                });
                self.on_device.push(false);
                self.points.len() - 1
            });
            if let (Some(point), Some(device)) =
                (self.points.get_mut(place), self.on_device.get_mut(place))
            {
                add(point);
                *device |= on_device;
            }
        }
    }

    /// What a reader should know; forgets times that are none.
    fn notes(&mut self) -> Vec<String> {
        let mut notes = Vec::new();
        for (point, device) in self.points.iter_mut().zip(&self.on_device) {
            if *device || point.time_ns == Some(0) {
                point.time_ns = None;
            }
        }
        if self.any_on_device || self.total.time_ns == Some(0) {
            self.total.time_ns = None;
        }
        if self.any_on_device {
            notes.push(
                "calls on a GPU end before their kernels do: scopes that ran there have no time"
                    .to_owned(),
            );
        }
        if self.unknown > 0 {
            notes.push(format!(
                "{} of {} op calls have no rule: neither their work nor their time is in any point",
                self.unknown, self.all
            ));
        }
        if self.other_types > 0 {
            notes.push(format!(
                "{} of {} op calls compute with other types than float32: hold them against peaks of their type",
                self.other_types, self.all
            ));
        }
        notes
    }
}
