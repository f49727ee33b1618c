//! Rules, tables of rules, and named sets of tables.
//!
//! A counter counts one quantity. The built-in ones are tables: overload -> [`Rule`], every overload named, each
//! rule with its formula, unit and source. An op without a line in the table is *unknown* and reported as such; an
//! op that counts nothing has a line that says why. [`Counter`] is the trait behind them; a counter of your own
//! needs no table:
//!
//! ```
//! use optape_replay::rules::{CallRow, Counted, Counter, Rule};
//!
//! /// Counts the elements that ops write.
//! struct Written;
//!
//! impl Counter for Written {
//!     fn name(&self) -> &str {
//!         "written"
//!     }
//!
//!     fn unit(&self) -> &str {
//!         "elements"
//!     }
//!
//!     fn rule(&self, _op: &str) -> Option<&Rule> {
//!         None
//!     }
//!
//!     fn count(&self, row: &CallRow<'_>) -> Counted {
//!         let per_call: i128 = row.outputs().iter().map(|t| t.elements()).sum();
//!         Counted::Value(per_call * i128::from(row.calls))
//!     }
//! }
//! ```

mod call;
#[cfg(test)]
mod containment;
pub mod optape;
mod product;
pub mod spikingjelly;
#[cfg(test)]
mod tests;
mod user;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use optape_trace::{OpDef, call_flags};

use crate::expression::Mistake;
use crate::ordered::{Amounts, Simulation};

pub(crate) use call::integer_position;
pub use call::{CallRow, MissingLevel, Notes, Number, RuleError, TensorView, WayOut};

/// What a counter says of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Counted {
    /// The sum over all calls of the row.
    Value(i128),
    /// Nothing to count, by rule.
    Zero,
    /// No rule for the op; `Some` says why the rule that there is does not apply.
    Unknown(Option<String>),
    /// The trace lacks what the rule needs.
    Missing(Box<MissingLevel>),
    /// The rules fail at such a call; the counter is refused.
    Failed(String),
    /// A rule of the user's is wrong at such a call; nothing is counted until it is mended.
    Mistaken(Box<Mistake>),
}

/// Counts one quantity over the calls of a selection.
///
/// See the [module's documentation](self) for an example.
pub trait Counter: Send + Sync {
    /// `flop`.
    fn name(&self) -> &str;
    /// `FLOP`, `byte`.
    fn unit(&self) -> &str;
    /// The rule of an overload (`aten::add.Tensor`), where the counter works by rules.
    fn rule(&self, op: &str) -> Option<&Rule>;
    /// The overloads that have a rule, sorted; empty for a counter that does not work by rules.
    fn ops(&self) -> Vec<&str> {
        Vec::new()
    }
    /// The rule that [`count`](Self::count) applies to a row.
    fn rule_of(&self, row: &CallRow<'_>) -> Option<&Rule> {
        self.rule(&row.rule_name())
    }
    /// Counts all calls of a row. Of a counter with a [`simulation`](Self::simulation): what calls count of which the simulation
    /// counted none.
    fn count(&self, row: &CallRow<'_>) -> Counted;
    /// Adds what the report has beside the count of a row, under the section's name.
    fn amounts(&self, row: &CallRow<'_>, out: &mut Amounts) {
        let _ = (row, out);
    }
    /// What follows the records of a stream, for a counter whose numbers depend on what ran before; see [`crate::ordered`].
    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        None
    }
    /// How the numbers of a counter with a [`simulation`](Self::simulation) come about, and the source of that, for `--explain`.
    fn method(&self) -> Option<(&'static str, &'static str)> {
        None
    }
    /// The counter looks at every op itself: none is without a rule.
    fn knows_every_op(&self) -> bool {
        false
    }
    /// What `--set` and `--sweep` change of it: numbers that are not negative, by key, units in their names.
    fn settings(&self) -> BTreeMap<&'static str, f64> {
        BTreeMap::new()
    }
    /// The same counter with other settings (all of [`settings`](Self::settings)), under some name; `None`: it has none.
    fn configured(
        &self,
        name: &str,
        settings: &BTreeMap<&'static str, f64>,
    ) -> Option<Box<dyn Counter>> {
        let _ = (name, settings);
        None
    }
    /// Belongs to what a replay shows that was asked for nothing in particular: it is answered from summaries.
    fn is_usual(&self) -> bool {
        self.simulation().is_none()
    }
}

/// A statistic that a rule reads: the argument, or the product of the two factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Whether the argument is binary, and its nonzeros if it is. `true`: as tools see it that look after the op.
    Spikes(&'static str, bool),
    /// The fan-out-weighted nonzeros of the argument, if it is binary.
    FanOut(&'static str),
    /// The sum over the product of two binary factors.
    Product,
}

type Formula = Arc<dyn Fn(&CallRow<'_>) -> Result<i128, RuleError> + Send + Sync>;

/// How a rule's number comes about.
#[derive(Clone)]
pub enum Evaluate {
    /// Nothing is counted, for this reason.
    Zero(Cow<'static, str>),
    /// The formula gives the number of one call.
    PerCall(Formula),
    /// The formula gives the sum over all calls of the row.
    PerRow(Formula),
}

/// How one counter treats one overload.
#[derive(Clone)]
pub struct Rule {
    /// The formula, as `--explain` shows it.
    pub formula: Cow<'static, str>,
    /// Where the formula comes from.
    pub source: Cow<'static, str>,
    /// The statistics that it reads.
    pub needs: Vec<Need>,
    /// The formula itself.
    pub evaluate: Evaluate,
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rule")
            .field("formula", &self.formula)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Rule {
    /// A rule that counts nothing, for a reason.
    pub fn zero(
        reason: impl Into<Cow<'static, str>>,
        source: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            formula: "0".into(),
            source: source.into(),
            needs: Vec::new(),
            evaluate: Evaluate::Zero(reason.into()),
        }
    }

    /// A rule over metadata alone; the formula is that of one call.
    pub fn per_call(
        formula: impl Into<Cow<'static, str>>,
        source: impl Into<Cow<'static, str>>,
        evaluate: impl Fn(&CallRow<'_>) -> Result<i128, RuleError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            formula: formula.into(),
            source: source.into(),
            needs: Vec::new(),
            evaluate: Evaluate::PerCall(Arc::new(evaluate)),
        }
    }

    /// A rule over statistics; the formula gives the sum over all calls of the row.
    pub fn per_row(
        formula: impl Into<Cow<'static, str>>,
        source: impl Into<Cow<'static, str>>,
        needs: Vec<Need>,
        evaluate: impl Fn(&CallRow<'_>) -> Result<i128, RuleError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            formula: formula.into(),
            source: source.into(),
            needs,
            evaluate: Evaluate::PerRow(Arc::new(evaluate)),
        }
    }

    /// Why nothing is counted, where that is the rule.
    #[must_use]
    pub fn zero_reason(&self) -> Option<&str> {
        match &self.evaluate {
            Evaluate::Zero(reason) => Some(reason),
            _ => None,
        }
    }

    /// Applies the rule.
    #[must_use]
    pub fn count(&self, row: &CallRow<'_>) -> Counted {
        let result = match &self.evaluate {
            Evaluate::Zero(_) => return Counted::Zero,
            Evaluate::PerCall(formula) => row.check().and_then(|()| formula(row)).and_then(|one| {
                one.checked_mul(i128::from(row.calls))
                    .ok_or_else(|| RuleError::Unsuited("the count overflows".into()))
            }),
            Evaluate::PerRow(formula) => row.check().and_then(|()| formula(row)),
        };
        match result {
            Ok(value) => Counted::Value(value),
            Err(RuleError::Missing(missing)) => Counted::Missing(missing),
            Err(RuleError::Failed(text)) => Counted::Failed(text),
            Err(RuleError::Unsuited(text)) => Counted::Unknown(Some(text)),
            Err(RuleError::Mistaken(mistake)) => Counted::Mistaken(mistake),
        }
    }
}

/// A counter that is a table of rules.
#[derive(Clone, Debug)]
pub struct TableCounter {
    name: Cow<'static, str>,
    unit: Cow<'static, str>,
    rules: BTreeMap<Cow<'static, str>, Rule>,
}

impl TableCounter {
    /// An empty table.
    pub fn new(name: impl Into<Cow<'static, str>>, unit: impl Into<Cow<'static, str>>) -> Self {
        Self {
            name: name.into(),
            unit: unit.into(),
            rules: BTreeMap::new(),
        }
    }

    /// Adds the rule of an overload. The later of two wins.
    pub fn insert(&mut self, op: impl Into<Cow<'static, str>>, rule: Rule) -> Option<Rule> {
        self.rules.insert(op.into(), rule)
    }

    /// All rules, sorted by overload.
    pub fn rules(&self) -> impl Iterator<Item = (&str, &Rule)> {
        self.rules.iter().map(|(op, rule)| (op.as_ref(), rule))
    }
}

impl Counter for TableCounter {
    fn name(&self) -> &str {
        &self.name
    }

    fn unit(&self) -> &str {
        &self.unit
    }

    fn rule(&self, op: &str) -> Option<&Rule> {
        self.rules.get(op)
    }

    fn ops(&self) -> Vec<&str> {
        self.rules.keys().map(AsRef::as_ref).collect()
    }

    fn count(&self, row: &CallRow<'_>) -> Counted {
        self.rule_of(row)
            .map_or(Counted::Unknown(None), |rule| rule.count(row))
    }
}

/// The overload that returns a new tensor: `aten::add.Tensor` for `aten::add_.Tensor`.
fn fresh(op: &OpDef) -> OpDef {
    OpDef {
        name: op.name.strip_suffix('_').unwrap_or(&op.name).to_owned(),
        ..op.clone()
    }
}

/// Rules under one name and version.
pub struct RuleSet {
    /// `optape`, `spikingjelly-2.0.0`.
    pub name: Cow<'static, str>,
    /// The built-in set that it extends: presets of that set are its own, too.
    pub extends: Option<&'static str>,
    /// Changes with every change of a rule.
    pub version: u32,
    /// One line.
    pub description: Cow<'static, str>,
    /// The counters, in the order in which reports show them.
    pub counters: Vec<Box<dyn Counter>>,
    /// Count autograd's in-place accumulations as `add`, as tools see them that run as a Python mode.
    pub accumulations_are_add: bool,
    /// Reports say how often ops without a rule occurred, counter by counter.
    pub lists_unsupported: bool,
    /// The energy models that belong to the set.
    pub models: &'static [&'static str],
}

impl fmt::Debug for RuleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuleSet")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Names of the built-in rule sets; the first is the default.
pub const RULE_SETS: [&str; 3] = [
    optape::NAME,
    spikingjelly::Version::June2026.name(),
    spikingjelly::Version::V2_0_0.name(),
];

impl RuleSet {
    /// A built-in rule set by name.
    ///
    /// # Errors
    /// Where there is none of that name; the error names the nearest.
    pub fn named(name: &str) -> Result<Self, crate::ReplayError> {
        use spikingjelly::Version;
        match name {
            optape::NAME => Ok(optape::rule_set()),
            n if n == Version::June2026.name() => Ok(spikingjelly::rule_set(Version::June2026)),
            n if n == Version::V2_0_0.name() => Ok(spikingjelly::rule_set(Version::V2_0_0)),
            _ => Err(crate::ReplayError::unknown_name(
                "rule set", name, RULE_SETS,
            )),
        }
    }

    /// Whose energy presets it has.
    #[must_use]
    pub fn presets(&self) -> &str {
        self.extends.unwrap_or(&self.name)
    }

    /// A counter of the set.
    #[must_use]
    pub fn counter(&self, name: &str) -> Option<&dyn Counter> {
        self.counters
            .iter()
            .find(|c| c.name() == name)
            .map(AsRef::as_ref)
    }

    /// Names of the counters.
    pub fn counter_names(&self) -> impl Iterator<Item = &str> {
        self.counters.iter().map(|c| c.name())
    }

    /// The row as this set's rules see it.
    #[must_use]
    pub fn seen<'a>(&self, row: CallRow<'a>) -> CallRow<'a> {
        CallRow {
            values_before: self.accumulations_are_add && row.is_accumulation(),
            ..row
        }
    }

    /// The name under which the set's reports show the op of a row, as Python prints it: `aten.add.Tensor`.
    #[must_use]
    pub fn shown_name(&self, op: &OpDef, flags: u32) -> String {
        if self.accumulations_are_add && flags & call_flags::ACCUMULATION != 0 {
            fresh(op).python_name()
        } else {
            op.python_name()
        }
    }
}
