//! A counter with rules of the user's in front of those that it has, and modules that it leaves out.

use std::borrow::Cow;
use std::collections::BTreeMap;

use optape_trace::ModuleId;

use crate::load::stack;
use crate::ordered::{Amounts, ModuleCall, OrderedCall, Simulation, World};
use crate::rules::{CallRow, Counted, Counter, Rule, RuleError};
use crate::selection::{Glob, module_matches};

/// The counter.
pub(super) struct Extended {
    pub(super) name: String,
    pub(super) unit: String,
    /// What it extends; `None`: it has the rules of its file alone.
    pub(super) base: Option<Box<dyn Counter>>,
    pub(super) rules: BTreeMap<String, Rule>,
    /// Classes or scopes of modules whose calls count nothing.
    pub(super) ignored: Vec<Glob>,
    /// The rule of calls inside of such a module.
    pub(super) ignoring: Rule,
}

/// The rule of calls that count nothing because of where they are.
pub(super) fn ignoring(globs: &[Glob], path: &str) -> Rule {
    let list: Vec<String> = globs.iter().map(ToString::to_string).collect();
    Rule::zero(
        format!("inside of a module that is ignored: {}", list.join(", ")),
        path.to_owned(),
    )
}

impl Extended {
    fn ignores(&self, row: &CallRow<'_>) -> bool {
        if self.ignored.is_empty() {
            return false;
        }
        row.dictionary.is_some_and(|dictionary| {
            stack(dictionary, row.signature.scope)
                .iter()
                .any(|(name, classes)| {
                    let matches = |glob| module_matches(glob, name, classes);
                    self.ignored.iter().any(matches)
                })
        })
    }
}

impl Counter for Extended {
    fn name(&self) -> &str {
        &self.name
    }

    fn unit(&self) -> &str {
        &self.unit
    }

    fn rule(&self, op: &str) -> Option<&Rule> {
        let of_base = || self.base.as_ref()?.rule(op);
        self.rules.get(op).or_else(of_base)
    }

    fn ops(&self) -> Vec<&str> {
        let mut ops: Vec<&str> = self.rules.keys().map(String::as_str).collect();
        ops.extend(self.base.iter().flat_map(|base| base.ops()));
        ops.sort_unstable();
        ops.dedup();
        ops
    }

    fn rule_of(&self, row: &CallRow<'_>) -> Option<&Rule> {
        if self.ignores(row) {
            return Some(&self.ignoring);
        }
        let of_base = || self.base.as_ref()?.rule_of(row);
        self.rules.get(&row.rule_name()).or_else(of_base)
    }

    fn count(&self, row: &CallRow<'_>) -> Counted {
        if self.ignores(row) {
            return Counted::Zero;
        }
        match (self.rules.get(&row.rule_name()), &self.base) {
            (Some(rule), _) => rule.count(row),
            (None, Some(base)) => base.count(row),
            (None, None) => Counted::Unknown(None),
        }
    }

    fn amounts(&self, row: &CallRow<'_>, out: &mut Amounts) {
        if let Some(base) = &self.base
            && !self.ignores(row)
            && !self.rules.contains_key(&row.rule_name())
        {
            base.amounts(row, out);
        }
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        let simulation = self.base.as_ref()?.simulation()?;
        Some(if self.ignored.is_empty() {
            simulation
        } else {
            Box::new(Ignoring {
                simulation,
                ignored: self.ignored.clone(),
            })
        })
    }

    fn method(&self) -> Option<(&'static str, &'static str)> {
        self.base.as_ref()?.method()
    }

    fn knows_every_op(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.knows_every_op())
    }

    fn settings(&self) -> BTreeMap<&'static str, f64> {
        self.base
            .as_ref()
            .map(|base| base.settings())
            .unwrap_or_default()
    }

    fn configured(
        &self,
        name: &str,
        settings: &BTreeMap<&'static str, f64>,
    ) -> Option<Box<dyn Counter>> {
        Some(Box::new(Self {
            name: name.to_owned(),
            unit: self.unit.clone(),
            base: Some(self.base.as_ref()?.configured(name, settings)?),
            rules: self.rules.clone(),
            ignored: self.ignored.clone(),
            ignoring: self.ignoring.clone(),
        }))
    }

    fn is_usual(&self) -> bool {
        self.base.as_ref().is_none_or(|base| base.is_usual())
    }
}

/// A simulation that does not see what runs inside of some modules.
struct Ignoring {
    simulation: Box<dyn Simulation>,
    ignored: Vec<Glob>,
}

impl Ignoring {
    fn ignores(&self, world: &World<'_>, modules: &[ModuleId]) -> bool {
        modules
            .iter()
            .filter_map(|module| world.definition(*module))
            .any(|def| {
                let matches = |glob| module_matches(glob, &def.name, &def.classes);
                self.ignored.iter().any(matches)
            })
    }
}

impl Simulation for Ignoring {
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        if self.ignores(world, call.modules) {
            return Ok(());
        }
        self.simulation.call(world, call, out)
    }

    fn module_call(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        if self.ignores(world, &call.stack) {
            return Ok(());
        }
        self.simulation.module_call(world, call, out)
    }

    fn takes_module_calls(&self) -> bool {
        self.simulation.takes_module_calls()
    }

    fn settle(&mut self, out: &mut Amounts) {
        self.simulation.settle(out);
    }

    fn finish(&mut self, world: &World<'_>, out: &mut Amounts) -> Result<(), RuleError> {
        self.simulation.finish(world, out)
    }
}

/// A unit or a name as a rule set keeps it.
pub(super) fn owned(text: &str) -> Cow<'static, str> {
    Cow::Owned(text.to_owned())
}
