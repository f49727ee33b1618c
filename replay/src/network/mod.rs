//! What the modules of a process did: their tree and facts, what went into their calls and came out, and which calls feed which.
//!
//! One pass over a stream ([`Following`]) gives a [`Network`]; estimators of layers (sinabs, Qualia) and the layer graph
//! ([`graph::LayerGraph`]) are functions of it. Its size depends on the number of modules and of the shapes that they were given,
//! and on the length of one call of the root, not on the length of the run.

mod follow;
pub mod graph;
mod names;
mod show;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use optape_trace::{CallId, DType, Dictionary, ModuleDef, ModuleId, TensorMeta, Value};

pub(crate) use follow::Following;
pub(crate) use names::Namespace;
pub use show::{GraphOptions, GraphReport, NodeReport, RootReport, SideReport};

use crate::ordered::{Known, ModuleState};
use crate::rules::{MissingLevel, RuleError, WayOut};

/// Shape and type of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    /// Sizes.
    pub shape: Vec<i64>,
    /// Element type.
    pub dtype: DType,
}

impl Form {
    pub(crate) fn of(meta: &TensorMeta) -> Self {
        Self {
            shape: meta.shape.clone(),
            dtype: meta.dtype,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |n: u64, &size| {
            n.saturating_mul(u64::try_from(size).unwrap_or(0))
        })
    }
}

/// What is known of the values of one tensor, or of as many as there were calls; what is not known of one is known of none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// How many elements are not 0.
    pub nonzeros: Option<u64>,
    /// Their sum.
    pub sum: Option<f64>,
    /// All are 0 or 1.
    pub binary: Option<bool>,
}

impl Figures {
    /// Of no tensor.
    pub(crate) const NONE: Self = Self {
        nonzeros: Some(0),
        sum: Some(0.0),
        binary: Some(true),
    };
    const UNKNOWN: Self = Self {
        nonzeros: None,
        sum: None,
        binary: None,
    };

    pub(crate) fn of(form: &Form, known: Known) -> Self {
        if form.elements() == 0 {
            return Self::NONE;
        }
        let truth = (form.dtype == DType::BOOL).then_some(true);
        #[expect(clippy::cast_precision_loss, reason = "no tensor has 2^53 elements")]
        let trues = known.nonzeros.filter(|_| truth.is_some()).map(|n| n as f64);
        Self {
            nonzeros: known.nonzeros,
            sum: known.sum.or(trues),
            binary: truth.or(known.binary),
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.nonzeros = self
            .nonzeros
            .zip(other.nonzeros)
            .map(|(a, b)| a.saturating_add(b));
        self.sum = self.sum.zip(other.sum).map(|(a, b)| a + b);
        self.binary = match (self.binary, other.binary) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (Some(true), Some(true)) => Some(true),
            _ => None,
        };
    }
}

/// Calls of a module with tensors of the same shapes.
#[derive(Clone, Debug)]
pub struct CallGroup {
    /// Of the tensor arguments; `None` for one that no op has had.
    pub inputs: Vec<Option<Form>>,
    /// Of the tensor results.
    pub outputs: Vec<Option<Form>>,
    /// How many calls.
    pub calls: u64,
    /// By argument, all calls together.
    pub input: Vec<Figures>,
    /// By result.
    pub output: Vec<Figures>,
    /// Of a two-dimensional convolution: the elements of its input, each times the outputs that it feeds.
    pub fan_out_sum: Option<f64>,
}

/// The latest call of a module.
#[derive(Clone, Debug)]
pub struct LastCall {
    ordinal: u64,
    /// Index of its group.
    pub group: usize,
    /// By argument.
    pub input: Vec<Figures>,
    /// By result.
    pub output: Vec<Figures>,
    /// As [`CallGroup::fan_out_sum`].
    pub fan_out_sum: Option<f64>,
}

/// Shapes of a call's arguments and results.
type Shapes = (Vec<Option<Form>>, Vec<Option<Form>>);

/// The calls of a module.
#[derive(Clone, Debug, Default)]
pub struct Calls {
    /// By shapes, in the order of their first call.
    pub groups: Vec<CallGroup>,
    /// The latest one.
    pub last: Option<LastCall>,
    places: HashMap<Shapes, usize>,
}

impl Calls {
    /// The index of the group of some shapes.
    fn group_of(&mut self, shapes: Shapes) -> usize {
        let groups = &mut self.groups;
        *self.places.entry(shapes).or_insert_with_key(|(inputs, outputs)| {
            groups.push(CallGroup {
                inputs: inputs.clone(),
                outputs: outputs.clone(),
                calls: 0,
                input: vec![Figures::NONE; inputs.len()],
                output: vec![Figures::NONE; outputs.len()],
                fan_out_sum: Some(0.0),
            });
            groups.len() - 1
        })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.groups.iter().map(|group| group.calls).sum()
    }
}

/// Kept outputs of a module.
#[derive(Clone, Debug)]
pub struct KeptOutputs {
    /// How many.
    pub count: u64,
    /// The latest.
    pub last: Value,
    /// The sum of all, where there are several of one shape.
    pub total: Option<Vec<f32>>,
}

/// A module, as it was when the first call of its root ended.
#[derive(Clone, Debug)]
pub struct Module {
    /// Name and classes.
    pub definition: ModuleDef,
    /// Its facts.
    pub state: ModuleState,
}

impl Module {
    /// The qualified name of its own class.
    #[must_use]
    pub fn class(&self) -> &str {
        self.definition.classes.first().map_or("", String::as_str)
    }

    /// Its class without where that stands.
    #[must_use]
    pub fn short_class(&self) -> &str {
        let class = self.class();
        class.rsplit('.').next().unwrap_or(class)
    }

    /// Whether its class or one of its bases is this one.
    #[must_use]
    pub fn is(&self, class: &str) -> bool {
        self.definition.classes.iter().any(|c| c == class)
    }

    /// Whether its class or one of its bases has this name in a package, wherever in it.
    #[must_use]
    pub fn is_of(&self, package: &str, class: &str) -> bool {
        self.definition
            .classes
            .iter()
            .any(|c| c.starts_with(package) && c.rsplit('.').next() == Some(class))
    }

    /// Whether it has an attribute of this name, a parameter, buffer or child among them, whatever it holds.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        let facts = &self.state.facts;
        let keyed = |key: &str| facts.get(key).is_some_and(|of| of.get(name).is_some());
        let listed = |key: &str| {
            facts
                .get(key)
                .and_then(serde_json::Value::as_array)
                .into_iter()
                .flatten()
                .any(|one| one.get("name").and_then(serde_json::Value::as_str) == Some(name))
        };
        keyed("attributes")
            || keyed("objects")
            || ["parameters", "buffers", "tensors", "states"]
                .into_iter()
                .any(listed)
            || self.state.children().any(|(child, _)| child == name)
    }

    /// A flag or number as Python takes it for a truth value; false where there is none.
    #[must_use]
    pub fn is_true(&self, name: &str) -> bool {
        match self.state.attribute(name) {
            Some(serde_json::Value::Bool(flag)) => *flag,
            Some(serde_json::Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(serde_json::Value::String(text)) => !text.is_empty(),
            Some(serde_json::Value::Array(list)) => !list.is_empty(),
            _ => false,
        }
    }

    /// Elements of all its own parameters.
    #[must_use]
    pub fn parameter_elements(&self) -> i128 {
        self.state.parameters().map(|(_, elements, _)| elements).sum()
    }
}

/// What happened inside of a root's call.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Enter {
        module: ModuleId,
        arguments: Vec<u64>,
    },
    Exit {
        module: ModuleId,
        results: Vec<u64>,
    },
    Op {
        name: Arc<str>,
        inputs: Vec<u64>,
        outputs: Vec<u64>,
        /// Of the inputs, those that it writes.
        written: Vec<u64>,
    },
}

/// A tensor that was at hand inside of a root's call.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) storage: u64,
    pub(crate) form: Form,
}

/// One call of a root module, step by step.
#[derive(Clone, Debug)]
pub(crate) struct Recording {
    pub(crate) root: ModuleId,
    pub(crate) call: CallId,
    pub(crate) steps: Vec<Step>,
    pub(crate) tensors: HashMap<u64, Seen>,
    /// It has ended.
    pub(crate) complete: bool,
    /// It was too long to be kept.
    pub(crate) too_long: bool,
}

/// What the modules of a process did in a selection.
#[derive(Clone, Debug)]
pub struct Network {
    /// The process's rank, where it has one.
    pub rank: Option<u32>,
    /// Modules that were called while no other selected one was running, in the order of their first call.
    pub roots: Vec<ModuleId>,
    /// All modules below the roots, and those called.
    pub modules: BTreeMap<ModuleId, Module>,
    /// What was called.
    pub calls: BTreeMap<ModuleId, Calls>,
    /// Outputs whose values were kept, of modules that somebody asks about.
    pub kept: BTreeMap<ModuleId, KeptOutputs>,
    pub(crate) recordings: Vec<Recording>,
    /// Paths of the modules below each root.
    trees: BTreeMap<ModuleId, Vec<(String, ModuleId)>>,
}

impl Network {
    /// The module that estimators are about: of the roots the one with the most parameters; the first of several.
    #[must_use]
    pub fn root(&self) -> Option<ModuleId> {
        let size = |root: &ModuleId| -> i128 {
            self.tree(*root)
                .iter()
                .filter_map(|(_, module)| self.modules.get(module))
                .map(Module::parameter_elements)
                .sum()
        };
        let mut best: Option<(ModuleId, i128)> = None;
        for root in &self.roots {
            let size = size(root);
            if best.is_none_or(|(_, most)| size > most) {
                best = Some((*root, size));
            }
        }
        best.map(|(root, _)| root)
    }

    /// The module and all below it by the paths of `named_modules()`: each once, under its first name. The root's path is empty.
    #[must_use]
    pub fn tree(&self, root: ModuleId) -> &[(String, ModuleId)] {
        self.trees.get(&root).map_or(&[], Vec::as_slice)
    }

    /// The same with the modules.
    pub fn named_modules(
        &self,
        root: ModuleId,
    ) -> impl Iterator<Item = (&str, ModuleId, &Module)> {
        self.tree(root)
            .iter()
            .filter_map(|(path, id)| Some((path.as_str(), *id, self.modules.get(id)?)))
    }

    /// The path of a module below a root.
    #[must_use]
    pub fn path(&self, root: ModuleId, module: ModuleId) -> Option<&str> {
        self.tree(root)
            .iter()
            .find(|(_, of)| *of == module)
            .map(|(path, _)| path.as_str())
    }

    pub(crate) fn name(&self, module: ModuleId) -> &str {
        self.modules
            .get(&module)
            .map_or("a module", |module| module.definition.name.as_str())
    }

    /// The calls of a module that was called.
    #[must_use]
    pub fn calls(&self, module: ModuleId) -> Option<&Calls> {
        self.calls.get(&module).filter(|calls| calls.count() > 0)
    }

    /// Something about the values of a module's input or output that the trace does not hold.
    pub(crate) fn missing(
        &self,
        level: &'static str,
        module: ModuleId,
        side: &str,
        what: &str,
    ) -> RuleError {
        let class = self.modules.get(&module).map_or("", Module::short_class);
        let keep = if level == "T8" { " --keep values" } else { "" };
        RuleError::Missing(Box::new(MissingLevel {
            level,
            what: format!("{what} of the {side} of {}", self.name(module)),
            way_out: WayOut::Other(format!(
                "record with `optape record --level full --watch '{class}:{side}'{keep}`"
            )),
        }))
    }

    /// A fact that is not there.
    pub(crate) fn missing_fact(&self, module: ModuleId, what: &str) -> RuleError {
        RuleError::Missing(Box::new(MissingLevel {
            level: "T7",
            what: format!("{what} of {}", self.name(module)),
            way_out: WayOut::Record(optape_trace::needs::FULL_FLAG),
        }))
    }

    /// The only tensor of a side of a call, with what is known of it.
    pub(crate) fn only<'a>(
        &self,
        module: ModuleId,
        side: &str,
        forms: &'a [Option<Form>],
        figures: &'a [Figures],
    ) -> Result<(&'a Form, &'a Figures), RuleError> {
        match (forms, figures) {
            ([Some(form)], [figures]) => Ok((form, figures)),
            ([None], _) => Err(self.missing("T1", module, side, "shape and values")),
            ([], _) => Err(RuleError::Failed(format!(
                "{} has no tensor as {side}",
                self.name(module)
            ))),
            _ => Err(RuleError::Failed(format!(
                "{} has {} tensors as {side}, of which there may be one",
                self.name(module),
                forms.len()
            ))),
        }
    }

    fn merge_tree(&mut self, root: ModuleId, tree: Vec<(String, ModuleId)>) {
        self.trees.entry(root).or_insert(tree);
    }
}

/// Everything that is called inside of the call of something else.
pub(crate) fn parents(steps: &[Step]) -> HashSet<ModuleId> {
    let mut stack: Vec<ModuleId> = Vec::new();
    let mut parents = HashSet::new();
    for step in steps {
        match step {
            Step::Enter { module, .. } => {
                parents.extend(stack.last());
                stack.push(*module);
            }
            Step::Exit { module, .. } => {
                if let Some(at) = stack.iter().rposition(|open| open == module) {
                    stack.truncate(at);
                }
            }
            Step::Op { .. } => {}
        }
    }
    parents
}

fn definition(dictionary: &Dictionary, module: ModuleId) -> ModuleDef {
    dictionary.module(module).cloned().unwrap_or_default()
}
