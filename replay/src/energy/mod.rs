//! Energy models: counts times published costs, with their assumptions beside every figure.
//!
//! [`EnergyModel`] is the trait behind the built-in ones. A model names the counters that it reads, may follow the stream
//! itself ([`crate::ordered`]), and makes a report of both. A model of your own:
//!
//! ```
//! use optape_replay::energy::{EnergyModel, EnergyReport, Figure, Given, Input};
//! use optape_replay::rules::RuleError;
//!
//! /// Every byte that an op moves costs the same.
//! struct Bytes {
//!     pj_per_byte: f64,
//! }
//!
//! impl EnergyModel for Bytes {
//!     fn name(&self) -> &str {
//!         "bytes"
//!     }
//!
//!     fn inputs(&self) -> Vec<Input> {
//!         vec![Input::all("memory_access")]
//!     }
//!
//!     fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
//!         let bytes = given.total("memory_access");
//!         let energy_pj = bytes as f64 * self.pj_per_byte;
//!         let mut report = EnergyReport::new(energy_pj, given);
//!         report.field("energy_total_pj", energy_pj);
//!         report.field("bytes", bytes);
//!         report.boundary = "operands and results of ops, moved once";
//!         report.setting("pj_per_byte", self.pj_per_byte);
//!         Ok(report)
//!     }
//! }
//! ```

mod compute;
mod costs;
mod lemaire;
mod lemaire_release;
mod neuromc;
mod simple;
mod spikesim;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::ordered::{Amounts, Simulation};
use crate::report::Ordered;
use crate::rules::RuleError;
use crate::rules::spikingjelly::Version;

pub use compute::ComputeModel;
pub use costs::{CostFile, PRESETS, Preset, Setting, presets, presets_of};
pub use lemaire::Lemaire;
pub use lemaire_release::LemaireRelease;
pub use neuromc::NeuroMc;
pub use simple::Simple;
pub use spikesim::SpikeSim;

/// A counter that a model reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its name.
    pub counter: &'static str,
    /// Calls inside of modules of these classes (qualified names, bases too) are left out.
    pub ignored: &'static [&'static str],
}

impl Input {
    /// Everything that a counter counts.
    #[must_use]
    pub const fn all(counter: &'static str) -> Self {
        Self {
            counter,
            ignored: &[],
        }
    }
}

/// What a model makes its report of.
#[derive(Debug)]
pub struct Given<'a> {
    /// Name of the rule set.
    pub rules: &'a str,
    /// Of each of [`EnergyModel::inputs`], in that order: its name and its total.
    pub totals: Vec<(&'static str, i128)>,
    /// What counters have beside their totals, by name.
    pub amounts: BTreeMap<&'static str, &'a Amounts>,
    /// What the model itself has followed.
    pub followed: Option<&'a Amounts>,
    /// Any op has a rule in any of the inputs.
    pub matched: bool,
    /// Share of the op calls that have a rule, by input.
    pub coverage: Vec<(&'static str, f64)>,
    /// Ops without a rule in the first input, by name.
    pub unknown: Vec<String>,
    /// Some calls lack statistics and count as zero (`--lenient`).
    pub partial: bool,
}

impl Given<'_> {
    /// The total of an input; 0 where there is none of that name.
    #[must_use]
    pub fn total(&self, counter: &str) -> i128 {
        self.totals
            .iter()
            .find(|(name, _)| *name == counter)
            .map_or(0, |(_, total)| *total)
    }

    /// A number that a counter has beside its total.
    #[must_use]
    pub fn amount(&self, counter: &str, section: &str, path: &[&str]) -> i128 {
        self.amounts
            .get(counter)
            .map_or(0, |amounts| amounts.get(section, path))
    }

    /// A number that the model itself has followed.
    #[must_use]
    pub fn followed(&self, section: &str, path: &[&str]) -> i128 {
        self.followed
            .map_or(0, |amounts| amounts.get(section, path))
    }
}

/// A model with its costs.
pub trait EnergyModel: Send + Sync {
    /// Under which its report appears.
    fn name(&self) -> &str;

    /// The counters that it reads.
    fn inputs(&self) -> Vec<Input>;

    /// What it follows itself, where counters are not enough. Such a model cannot be grouped.
    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        None
    }

    /// The stages of training that it counts, whatever else is selected; `None`: all.
    fn stages(&self) -> Option<&'static [&'static str]> {
        None
    }

    /// Its report.
    ///
    /// # Errors
    /// Where the model refuses what ran.
    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError>;
}

/// A value in a report.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Figure {
    /// A count.
    Integer(i128),
    /// A quantity.
    Float(f64),
    /// A flag.
    Flag(bool),
    /// A text.
    Text(String),
    /// Several.
    List(Vec<Figure>),
    /// Several by name.
    Map(Ordered<Figure>),
}

impl From<i128> for Figure {
    fn from(value: i128) -> Self {
        Self::Integer(value)
    }
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<bool> for Figure {
    fn from(value: bool) -> Self {
        Self::Flag(value)
    }
}

impl From<&str> for Figure {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<Ordered<Figure>> for Figure {
    fn from(value: Ordered<Figure>) -> Self {
        Self::Map(value)
    }
}

impl<K: Into<String>, V: Into<Figure>, const N: usize> From<[(K, V); N]> for Figure {
    fn from(values: [(K, V); N]) -> Self {
        Self::Map(
            values
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        )
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Flag(value) => value.fmt(f),
            Self::Text(value) => f.write_str(value),
            Self::List(values) => {
                let texts: Vec<String> = values.iter().map(ToString::to_string).collect();
                write!(f, "[{}]", texts.join(", "))
            }
            Self::Map(values) => {
                let texts: Vec<String> = values.iter().map(|(k, v)| format!("{k} {v}")).collect();
                write!(f, "{{{}}}", texts.join(", "))
            }
        }
    }
}

/// What a model says. The fields are those that its original has; beside them stands what a figure is worth nothing without.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EnergyReport {
    /// The whole, whatever its field is called.
    #[serde(skip)]
    pub total_pj: f64,
    /// The original's fields, but for its warnings.
    #[serde(flatten)]
    pub fields: Ordered<Figure>,
    /// What a reader should know.
    pub warnings: Vec<String>,
    /// `pJ`.
    pub unit: &'static str,
    /// What is and is not in the figure.
    pub boundary: &'static str,
    /// The stages of training that are in it, in words.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stages: String,
    /// The model that its name stands for: several presets may be of one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub estimator: String,
    /// What costs were assumed, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regime: Option<String>,
    /// Costs and settings.
    pub config: Ordered<Figure>,
    /// Name of the rule set that counted.
    pub rules: String,
    /// Share of the op calls that have a rule, by counter that the model reads.
    #[serde(skip_serializing_if = "Ordered::is_empty")]
    pub coverage: Ordered<f64>,
}

impl EnergyReport {
    /// A report without fields.
    #[must_use]
    pub fn new(total_pj: f64, given: &Given<'_>) -> Self {
        let mut warnings = Vec::new();
        if given.partial {
            warnings.push("partial: calls without statistics count as zero (--lenient)".to_owned());
        }
        Self {
            total_pj,
            fields: Ordered::default(),
            warnings,
            unit: "pJ",
            boundary: "",
            stages: String::new(),
            estimator: String::new(),
            regime: None,
            config: Ordered::default(),
            rules: given.rules.to_owned(),
            coverage: given
                .coverage
                .iter()
                .map(|(name, share)| ((*name).to_owned(), *share))
                .collect(),
        }
    }

    /// Adds a field.
    pub fn field(&mut self, name: &str, value: impl Into<Figure>) {
        self.fields.push(name, value.into());
    }

    /// Adds a cost or a setting.
    pub fn setting(&mut self, name: &str, value: impl Into<Figure>) {
        self.config.push(name, value.into());
    }

    /// A field that is a quantity.
    #[must_use]
    pub fn quantity(&self, name: &str) -> Option<f64> {
        match self.fields.get(name) {
            Some(Figure::Float(value)) => Some(*value),
            _ => None,
        }
    }

    /// Adds all costs and settings of a file.
    pub(crate) fn configure(&mut self, file: &CostFile) {
        self.estimator.clone_from(&file.model);
        self.regime = file.regime_text();
        for (name, cost) in &file.costs {
            self.setting(name, *cost);
        }
        for (name, setting) in &file.settings {
            match setting {
                Setting::Flag(flag) => self.setting(name, *flag),
                Setting::Number(number) => self.setting(name, *number),
                Setting::Choice(choice) => self.setting(name, choice.as_str()),
                Setting::Table(table) => {
                    let numbers = table.iter().map(|(k, v)| (k.clone(), Figure::Float(*v)));
                    self.config.push(name, Figure::Map(numbers.collect()));
                }
                Setting::Points(points) => {
                    let pair = |pair: &[f64; 2]| Figure::List(pair.map(Figure::Float).to_vec());
                    self.config
                        .push(name, Figure::List(points.iter().map(pair).collect()));
                }
            }
        }
    }
}

/// A model with the costs of a file.
#[must_use]
pub(crate) fn model(file: &CostFile) -> Box<dyn EnergyModel> {
    match file.model.as_str() {
        "spikesim" => Box::new(SpikeSim::new(file)),
        "simple" => Box::new(Simple::new(file)),
        "lemaire-2026-06" => Box::new(Lemaire::new(file)),
        "lemaire-2.0.0" => Box::new(LemaireRelease::new(file)),
        "neuromc-2026-06" => Box::new(NeuroMc::new(file, Version::June2026)),
        "neuromc-2.0.0" => Box::new(NeuroMc::new(file, Version::V2_0_0)),
        _ => Box::new(ComputeModel::new(file)),
    }
}

/// What accesses cost by the size of the memory: on lines between points, and as at the last one beyond it.
pub(crate) fn memory_cost_pj(points: &[[f64; 2]], bytes: f64) -> f64 {
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return 0.0;
    };
    let bytes = bytes.clamp(first[0], last[0]);
    let segment = points
        .windows(2)
        .find(|pair| bytes <= pair[1][0])
        .or_else(|| points.windows(2).last());
    match segment {
        Some([[x0, y0], [x1, y1]]) => y0 + (y1 - y0) / (x1 - x0) * (bytes - x0),
        _ => first[1],
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "energies are floats; counts beyond 2^53 keep 53 bits"
)]
pub(crate) const fn float(count: i128) -> f64 {
    count as f64
}

#[cfg(test)]
pub(crate) fn given(totals: &[(&'static str, i128)]) -> Given<'static> {
    Given {
        rules: "test",
        totals: totals.to_vec(),
        amounts: BTreeMap::new(),
        followed: None,
        matched: true,
        coverage: Vec::new(),
        unknown: Vec::new(),
        partial: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_costs_lie_on_lines_and_end_with_the_last_point() {
        let points = [[0.0, 0.0], [8.0, 2.0], [32.0, 8.0]];
        let cost = |bytes| memory_cost_pj(&points, bytes);
        assert!((cost(4.0) - 1.0).abs() < 1e-12);
        assert!((cost(8.0) - 2.0).abs() < 1e-12);
        assert!((cost(20.0) - 5.0).abs() < 1e-12);
        assert!((cost(1e9) - 8.0).abs() < 1e-12);
        assert!(memory_cost_pj(&[], 1.0).abs() < 1e-12);
    }
}
