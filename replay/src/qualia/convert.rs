//! From a trace to the graph that Qualia computes on: its layers with their sizes, and what they saw of spikes.

use std::collections::HashSet;

use optape_trace::ModuleId;
use serde_json::Value;

use super::{Rate, Spiking, class, failed};
use crate::energy::{CostFile, float};
use crate::network::graph::{self, LayerGraph, Leaves};
use crate::network::{CallGroup, Figures, Form, Module, Namespace, Network};
use crate::rules::RuleError;

const STEP_MODULE: &str = "spikingjelly.activation_based.base.StepModule";
const SPIKING_MODEL: &str = "qualia_plugin_snn.learningmodel.pytorch.SNN.SNN";

/// What a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Input,
    Convolution,
    Dense,
    Add,
    Flatten,
    /// IF.
    Neuron,
    /// LIF, also with a learned time constant.
    LeakyNeuron,
    /// One that the original knows and has no formula for.
    Other,
    /// One that it does not know (without `strict`).
    Unknown,
}

impl Kind {
    pub(super) const fn is_neuron(self) -> bool {
        matches!(self, Self::Neuron | Self::LeakyNeuron)
    }

    pub(super) const fn has_weights(self) -> bool {
        matches!(self, Self::Convolution | Self::Dense)
    }
}

/// Classes that the original maps, by their last name: torch's own, and SpikingJelly's of the same name where marked.
const TORCH: &[(&str, Kind)] = &[
    ("AdaptiveAvgPool1d", Kind::Other),
    ("AvgPool1d", Kind::Other),
    ("AvgPool2d", Kind::Other),
    ("BatchNorm1d", Kind::Other),
    ("BatchNorm2d", Kind::Other),
    ("Conv1d", Kind::Convolution),
    ("Conv2d", Kind::Convolution),
    ("Dropout", Kind::Other),
    ("Flatten", Kind::Flatten),
    ("Identity", Kind::Other),
    ("Linear", Kind::Dense),
    ("MaxPool1d", Kind::Other),
    ("MaxPool2d", Kind::Other),
    ("ReLU", Kind::Other),
    ("ReLU6", Kind::Other),
    ("Upsample", Kind::Other),
];
const LAYERS: &[&str] = &[
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "Dropout",
    "Flatten",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
];
const NEURONS: &[(&str, Kind)] = &[
    ("IFNode", Kind::Neuron),
    ("LIFNode", Kind::LeakyNeuron),
    ("ParametricLIFNode", Kind::LeakyNeuron),
];
/// Qualia's own, also as `Quantized...`.
const OWN: &[(&str, Kind)] = &[
    ("Add", Kind::Add),
    ("GlobalSumPool1d", Kind::Other),
    ("GlobalSumPool2d", Kind::Other),
    ("BatchNorm1d", Kind::Other),
    ("BatchNorm2d", Kind::Other),
    ("Conv1d", Kind::Convolution),
    ("Conv2d", Kind::Convolution),
    ("Identity", Kind::Other),
    ("Linear", Kind::Dense),
    ("MaxPool1d", Kind::Other),
    ("MaxPool2d", Kind::Other),
    ("IFNode", Kind::Neuron),
    ("LIFNode", Kind::LeakyNeuron),
];

/// What a class is, by its qualified name.
fn kind_of(class: &str) -> Option<Kind> {
    let last = class.rsplit('.').next().unwrap_or(class);
    let find = |table: &[(&str, Kind)], name: &str| {
        table
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, kind)| *kind)
    };
    if class.starts_with("torch.nn.") {
        find(TORCH, last)
    } else if class.starts_with("spikingjelly.activation_based.layer") {
        LAYERS.contains(&last).then(|| find(TORCH, last)).flatten()
    } else if class.starts_with("spikingjelly.activation_based.neuron") {
        find(NEURONS, last)
    } else if class.starts_with("qualia_core.") || class.starts_with("qualia_plugin_snn.") {
        find(OWN, last.strip_prefix("Quantized").unwrap_or(last))
    } else {
        None
    }
}

/// Whether the original's tracer takes a module for a layer: its class or a base of it is one that the original maps.
pub(crate) fn is_known(module: &Module) -> bool {
    module
        .definition
        .classes
        .iter()
        .any(|class| kind_of(class).is_some())
}

/// Sizes of a sample at one side of a layer, without batch and time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Size {
    /// Channels or features.
    pub(super) channels: f64,
    /// All elements.
    pub(super) elements: f64,
    /// The sizes added up, which the original takes for their product where it adds layers.
    pub(super) sum: f64,
}

/// A layer of the graph.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    /// As the original names it, neurons behind it included.
    pub(super) name: String,
    pub(super) class: String,
    pub(super) kind: Kind,
    /// Indices of the layers that it takes from, and that take from it.
    pub(super) inputs: Vec<usize>,
    pub(super) outputs: Vec<usize>,
    /// By argument.
    pub(super) input: Vec<Size>,
    pub(super) output: Size,
    pub(super) kernel: Vec<f64>,
    pub(super) stride: Vec<f64>,
    pub(super) weight_elements: f64,
    /// `None`: it has no bias.
    pub(super) bias_elements: Option<f64>,
}

/// Spikes that were counted at one side of a module.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Counter {
    spikes: f64,
    /// Of all elements, where it is known.
    sum: Option<f64>,
    elements: f64,
    binary: bool,
    samples: f64,
    /// It is of a module, and in the total.
    told: bool,
}

impl Counter {
    const ZERO: Self = Self {
        spikes: 0.0,
        sum: Some(0.0),
        elements: 0.0,
        binary: true,
        samples: 0.0,
        told: true,
    };
}

/// What the modules of a spiking network saw, by name. Names of layers with their neuron stand beside the others and share their counters.
#[derive(Clone, Debug)]
pub(super) struct Activity {
    pub(super) time_steps: f64,
    counters: Vec<Counter>,
    /// Name, counters of input and output, whether the module is SpikingJelly's.
    names: Vec<(String, [usize; 2], bool)>,
}

impl Activity {
    fn find(&self, name: &str) -> Result<&(String, [usize; 2], bool), RuleError> {
        self.names
            .iter()
            .find(|(known, _, _)| known == name)
            .ok_or_else(|| failed(format!("KeyError: '{name}': no module of this name was called")))
    }

    fn counter(&self, at: usize) -> Result<&Counter, RuleError> {
        self.counters
            .get(at)
            .ok_or_else(|| failed("IndexError: a counter is missing"))
    }

    fn rate(&self, name: &str, side: usize) -> Result<Rate, RuleError> {
        let (_, sides, _) = self.find(name)?;
        let counter = self.counter(sides[side])?;
        if counter.elements == 0.0 || counter.samples == 0.0 {
            return Err(failed(format!(
                "ZeroDivisionError: division by zero: the tensors of {name} are empty"
            )));
        }
        Ok(Rate {
            rate: counter.spikes / counter.elements,
            count: self.time_steps * counter.spikes / counter.samples,
            binary: counter.binary,
        })
    }

    pub(super) fn input(&self, name: &str) -> Result<Rate, RuleError> {
        self.rate(name, 0)
    }

    pub(super) fn output(&self, name: &str) -> Result<Rate, RuleError> {
        self.rate(name, 1)
    }

    pub(super) fn is_spiking(&self, name: &str) -> Result<bool, RuleError> {
        Ok(self.find(name)?.2)
    }

    /// Rates over all names.
    pub(super) fn total(&self, exclude_nonbinary: bool) -> [Rate; 2] {
        [0, 1].map(|side| {
            let counters = || {
                self.names
                    .iter()
                    .filter_map(|(_, sides, _)| self.counters.get(sides[side]))
                    .filter(|counter| counter.told && (!exclude_nonbinary || counter.binary))
            };
            let elements: f64 = counters().map(|c| c.elements).sum();
            let spikes: f64 = counters().map(|c| c.spikes).sum();
            Rate {
                rate: if elements > 0.0 {
                    spikes / elements
                } else {
                    0.0
                },
                count: counters()
                    .map(|c| self.time_steps * c.spikes / c.samples)
                    .sum(),
                binary: false,
            }
        })
    }

    pub(super) fn all_spiking(&self) -> Spiking {
        let yes = self.names.iter().filter(|(_, _, spiking)| *spiking).count();
        match yes {
            n if n == self.names.len() => Spiking::Yes,
            0 => Spiking::No,
            _ => Spiking::Hybrid,
        }
    }

    /// The layer before a neuron is named by both: its input is the layer's, its output the neuron's.
    fn join(&mut self, layer: &str, neuron: &str) -> Result<String, RuleError> {
        let joined = format!("{layer}{neuron}");
        let (_, [input, _], spiking) = *self.find(layer)?;
        let (_, [_, output], _) = *self.find(neuron)?;
        let entry = (joined.clone(), [input, output], spiking);
        match self.names.iter_mut().find(|(known, _, _)| *known == joined) {
            Some(known) => *known = entry,
            None => self.names.push(entry),
        }
        Ok(joined)
    }
}

/// A network as the original sees it.
#[derive(Clone, Debug)]
pub(super) struct Converted {
    /// The input first, then layers in the order of their calls.
    pub(super) layers: Vec<Layer>,
    /// Of a spiking network.
    pub(super) activity: Option<Activity>,
    pub(super) warnings: Vec<String>,
}

struct Conversion<'a> {
    network: &'a Network,
    root: ModuleId,
    module: &'a Module,
    strict: bool,
    /// The root takes all time steps at once.
    multi_step: bool,
    warnings: Vec<String>,
}

/// Converts.
///
/// # Errors
/// Where the original refuses the model, or the trace lacks a level.
pub(super) fn convert(
    network: &Network,
    root: ModuleId,
    file: &CostFile,
) -> Result<Converted, RuleError> {
    let module = network
        .modules
        .get(&root)
        .ok_or_else(|| network.missing_fact(root, "facts"))?;
    let mut conversion = Conversion {
        network,
        root,
        module,
        strict: file.flag("strict"),
        multi_step: module.state.is_multi_step(),
        warnings: Vec::new(),
    };
    conversion.check()?;
    let mut graph = LayerGraph::of(network, root, Leaves::Traced)?;
    if file.flag("fuse_batch_norm") {
        let fused = graph.fuse_batch_norm(network);
        conversion
            .warnings
            .push(format!("{fused} batch norms are part of the convolutions before them"));
    }
    let mut layers = conversion.layers(&graph)?;
    let spiking = module.is_true("is_snn")
        || module.is(SPIKING_MODEL)
        || (!conversion.strict && layers.iter().any(|layer| layer.kind.is_neuron()));
    let activity = if spiking {
        if file.model == super::ENERGY && file.number("fifo_size") == 0.0 {
            return Err(failed("ValueError: fifo_size is required for SNN models"));
        }
        Some(conversion.activity(&graph, &mut layers, file)?)
    } else {
        None
    };
    Ok(Converted {
        layers,
        activity,
        warnings: conversion.warnings,
    })
}

impl Conversion<'_> {
    /// What the original asks of the model before it looks at its layers.
    fn check(&self) -> Result<(), RuleError> {
        if !self.strict {
            return Ok(());
        }
        let module = self.module;
        let shaped = matches!(module.state.attribute("input_shape"), Some(Value::Array(_)));
        if !shaped {
            return Err(failed(format!(
                "{} has no attribute input_shape, a tuple, which the original asks for; with strict = false in the cost file shapes are \
                 those of what ran",
                self.network.name(self.root)
            )));
        }
        let spiking = module.is_true("is_snn") || module.is(SPIKING_MODEL);
        if spiking && module.state.attribute("step_mode").is_none() {
            return Err(failed(format!(
                "AttributeError: '{}' object has no attribute 'step_mode'",
                module.short_class()
            )));
        }
        Ok(())
    }

    fn unsupported(&mut self, what: &str, name: &str) -> Result<Kind, RuleError> {
        let text = format!("Unsupported Torch {what}: {name}");
        if self.strict {
            return Err(failed(format!(
                "{text}; with strict = false in the cost file it counts nothing"
            )));
        }
        self.warnings.push(format!("{text}; it counts nothing"));
        Ok(Kind::Unknown)
    }

    fn layers(&mut self, graph: &LayerGraph) -> Result<Vec<Layer>, RuleError> {
        let mut layers = Vec::new();
        let mut places: Vec<Option<usize>> = Vec::with_capacity(graph.nodes.len());
        for node in &graph.nodes {
            let (kind, module) = match &node.kind {
                graph::Kind::Output => {
                    places.push(None);
                    continue;
                }
                // The original has one input, whatever the model takes.
                graph::Kind::Input if !layers.is_empty() => {
                    places.push(Some(0));
                    continue;
                }
                graph::Kind::Input => (Kind::Input, None),
                graph::Kind::Layer(id) => {
                    let module = self.network.modules.get(id);
                    let class = module.map_or("", Module::class);
                    let kind = match kind_of(class) {
                        Some(kind) => kind,
                        None => self.unsupported("layer type", class)?,
                    };
                    (kind, module)
                }
                graph::Kind::Op(op) => (self.function(op, node)?, None),
            };
            let size = |form: &Option<Form>, multi: bool| {
                let strip = if multi { 2 } else { 1 };
                size_of(form.as_ref().map_or(&[][..], |form| form.shape.get(strip..).unwrap_or(&[])))
            };
            let multi = self.multi_step(node, module);
            let mut layer = Layer {
                name: match kind {
                    Kind::Input => "input".to_owned(),
                    _ => node.name.clone(),
                },
                class: match &node.kind {
                    graph::Kind::Op(op) => op.to_string(),
                    _ => class(module),
                },
                kind,
                inputs: Vec::new(),
                outputs: Vec::new(),
                input: node.input_forms.iter().map(|form| size(form, multi)).collect(),
                output: node
                    .output_forms
                    .first()
                    .map_or(size_of(&[]), |form| size(form, multi)),
                kernel: Vec::new(),
                stride: Vec::new(),
                weight_elements: 0.0,
                bias_elements: None,
            };
            if let (Some(module), Some(id)) = (module, node.module) {
                self.weights(&mut layer, module, id, node.fused.is_some())?;
            }
            let at = layers.len();
            for input in &node.inputs {
                let Some(from) = places.get(*input).copied().flatten() else {
                    continue;
                };
                if !layer.inputs.contains(&from) {
                    layer.inputs.push(from);
                }
                if let Some(before) = layers.get_mut(from) {
                    let before: &mut Layer = before;
                    if !before.outputs.contains(&at) {
                        before.outputs.push(at);
                    }
                }
            }
            places.push(Some(at));
            layers.push(layer);
        }
        for layer in &layers {
            let shaped = layer.output.elements > 0.0 || layer.kind == Kind::Input;
            if layer.kind.has_weights() && (!shaped || layer.input.is_empty()) {
                return Err(failed(format!(
                    "IndexError: {} has an output without a batch, or without elements",
                    layer.name
                )));
            }
        }
        Ok(layers)
    }

    /// What an op between layers is, of those that the original's tracer can have met as a function.
    fn function(&mut self, op: &str, node: &graph::Node) -> Result<Kind, RuleError> {
        match op {
            "aten::add.Tensor" => Ok(Kind::Add),
            _ if node.flattens() => Ok(Kind::Flatten),
            "aten::sum.dim_IntList"
            | "aten::permute"
            | "aten::_adaptive_avg_pool2d"
            | "aten::adaptive_avg_pool2d" => Ok(Kind::Other),
            // What average pooling to one position is made of.
            "aten::mean.dim" => Ok(Kind::Other),
            _ => self.unsupported("function", op),
        }
    }

    /// Whether the tensors of a node have time as their first dimension.
    fn multi_step(&self, node: &graph::Node, module: Option<&Module>) -> bool {
        match module {
            Some(module) if module.is(STEP_MODULE) => module.state.is_multi_step(),
            // What a container calls that folds time into the batch has none.
            Some(_) => {
                self.multi_step && node.module.is_none_or(|id| !self.is_folded(id))
            }
            None => self.multi_step,
        }
    }

    /// Whether a module stands in a container that calls it without the dimension of time.
    fn is_folded(&self, id: ModuleId) -> bool {
        let Some(path) = self.network.path(self.root, id) else {
            return false;
        };
        self.network
            .named_modules(self.root)
            .any(|(container, _, module)| {
                let below = path.strip_prefix(container).is_some_and(|rest| rest.starts_with('.'));
                below
                    && module.class().starts_with("spikingjelly.activation_based.layer")
                    && module.short_class().contains("Container")
            })
    }

    fn weights(
        &mut self,
        layer: &mut Layer,
        module: &Module,
        id: ModuleId,
        fused: bool,
    ) -> Result<(), RuleError> {
        if !layer.kind.has_weights() {
            return Ok(());
        }
        let missing = |what: &str| self.network.missing_fact(id, what);
        let parameter = |name: &str| module.state.parameter_elements(name).map(float);
        let floats = |name: &str| -> Result<Vec<f64>, RuleError> {
            let list = module.state.integers(name).ok_or_else(|| missing(name))?;
            Ok(list.into_iter().map(float).collect())
        };
        layer.weight_elements = parameter("weight").ok_or_else(|| missing("weight"))?;
        layer.bias_elements = parameter("bias");
        if layer.kind == Kind::Convolution {
            layer.kernel = floats("kernel_size")?;
            layer.stride = floats("stride")?;
            if fused && layer.bias_elements.is_none() {
                layer.bias_elements = module.state.integer("out_channels").map(float);
            }
        } else if layer.bias_elements.is_none() && self.strict {
            return Err(failed(format!(
                "AttributeError: 'NoneType' object has no attribute 'detach': {} has no bias, and the original takes linear layers with \
                 one alone; with strict = false in the cost file it is computed without",
                self.network.name(id)
            )));
        }
        Ok(())
    }

    /// What the modules of a spiking network saw.
    fn activity(
        &mut self,
        graph: &LayerGraph,
        layers: &mut [Layer],
        file: &CostFile,
    ) -> Result<Activity, RuleError> {
        let network = self.network;
        let mut activity = Activity {
            time_steps: self.time_steps(file)?,
            counters: Vec::new(),
            names: Vec::new(),
        };
        let fused: HashSet<ModuleId> = graph.nodes.iter().filter_map(|node| node.fused).collect();
        let norm_of = |id: ModuleId| {
            graph
                .nodes
                .iter()
                .find(|node| node.module == Some(id) && node.fused.is_some())
                .and_then(|node| node.fused)
        };
        let mut names = Namespace::default();
        for (path, id, module) in network.named_modules(self.root) {
            if module.short_class() == "Quantizer" && module.class().starts_with("qualia_core.") {
                continue;
            }
            let name = names.create(path);
            // A model whose batch norms were fused is made of its layers alone: containers are not called any more.
            let gone = fused.contains(&id)
                || (!fused.is_empty() && id != self.root && self.is_container(graph, id));
            let Some(calls) = network.calls(id).filter(|_| !gone) else {
                continue;
            };
            let mut sides = [Counter::ZERO; 2];
            let step_module = module.is(STEP_MODULE);
            for group in &calls.groups {
                let samples = samples(group, step_module && module.state.is_multi_step())
                    .ok_or_else(|| network.missing("T1", id, "input", "the shape"))?;
                let [input, output] = &mut sides;
                count(network, id, "input", &group.inputs, &group.input, group.calls, input)?;
                input.samples += samples;
                match norm_of(id).and_then(|norm| network.calls(norm)) {
                    None => {
                        network.only(id, "output", &group.outputs, &group.output)?;
                        count(network, id, "output", &group.outputs, &group.output, group.calls, output)?;
                    }
                    // Its output is that of the batch norm.
                    Some(_) => {}
                }
                output.samples += samples;
            }
            if let Some(norm) = norm_of(id)
                && let Some(calls) = network.calls(norm)
            {
                for group in &calls.groups {
                    let [_, output] = &mut sides;
                    count(network, norm, "output", &group.outputs, &group.output, group.calls, output)?;
                }
            }
            let at = activity.counters.len();
            activity.counters.extend(sides);
            activity.names.push((name, [at, at + 1], step_module));
        }
        self.join(layers, &mut activity)?;
        Ok(activity)
    }

    fn is_container(&self, graph: &LayerGraph, id: ModuleId) -> bool {
        let Some(path) = self.network.path(self.root, id) else {
            return false;
        };
        graph.layers().into_iter().any(|layer| {
            self.network
                .path(self.root, layer)
                .and_then(|below| below.strip_prefix(path))
                .is_some_and(|rest| rest.starts_with('.'))
        })
    }

    fn time_steps(&self, file: &CostFile) -> Result<f64, RuleError> {
        let given = file.number("timesteps");
        if given > 0.0 {
            return Ok(given);
        }
        if let Some(own) = self.module.state.attribute("timesteps").and_then(Value::as_f64) {
            return Ok(own);
        }
        let name = self.network.name(self.root);
        Err(failed(format!(
            "AttributeError: {name} has no attribute timesteps; say how many time steps a sample is presented in the settings of a cost \
             file (timesteps = N)"
        )))
    }

    /// Names layers with the neurons behind them, and takes sums of spikes for spikes, as the original does.
    fn join(&mut self, layers: &mut [Layer], activity: &mut Activity) -> Result<(), RuleError> {
        for at in 0..layers.len() {
            let Some(layer) = layers.get(at) else { continue };
            if layer.kind.is_neuron() {
                let Some(&before) = layer.inputs.first() else {
                    return Err(failed(format!(
                        "IndexError: nothing is known to feed the neuron {}",
                        layer.name
                    )));
                };
                let neuron = layer.name.clone();
                if let Some(layer) = layers.get_mut(before) {
                    layer.name = activity.join(&layer.name, &neuron)?;
                }
            } else if layer.kind == Kind::Add && activity.find(&layer.name).is_ok() {
                let (_, [input, output], _) = *activity.find(&layer.name)?;
                if !activity.counter(input)?.binary {
                    continue;
                }
                spikes_are_sums(activity, output, &layer.name)?;
                for next in layer.outputs.clone() {
                    let Some(next) = layers.get(next) else { continue };
                    let mut all = true;
                    for from in next.inputs.iter().filter_map(|from| layers.get(*from)) {
                        all &= activity.output(&from.name)?.binary;
                    }
                    if all {
                        let (_, [input, _], _) = *activity.find(&next.name)?;
                        spikes_are_sums(activity, input, &next.name)?;
                    }
                }
            }
        }
        if !self.strict {
            // Functions were not called as modules: the original has no figures of them.
            for layer in layers.iter() {
                if layer.kind != Kind::Input && activity.find(&layer.name).is_err() {
                    self.warnings.push(format!(
                        "{}: nothing is known of its spikes; it counts nothing",
                        layer.name
                    ));
                    let at = activity.counters.len();
                    let unknown = Counter {
                        elements: 1.0,
                        samples: 1.0,
                        binary: false,
                        told: false,
                        ..Counter::ZERO
                    };
                    activity.counters.extend([unknown; 2]);
                    activity.names.push((layer.name.clone(), [at, at + 1], true));
                }
            }
        }
        Ok(())
    }
}

fn spikes_are_sums(activity: &mut Activity, at: usize, name: &str) -> Result<(), RuleError> {
    let Some(counter) = activity.counters.get_mut(at) else {
        return Ok(());
    };
    let sum = counter.sum.ok_or_else(|| {
        RuleError::Missing(Box::new(crate::rules::MissingLevel {
            level: "T1",
            what: format!("the sum of the tensors at {name}"),
            way_out: crate::rules::WayOut::Other(
                "record with `optape record --level full --watch '*:input,output'`".to_owned(),
            ),
        }))
    })?;
    counter.spikes = sum;
    counter.binary = true;
    Ok(())
}

/// Adds the tensors at one side of the calls of a group.
fn count(
    network: &Network,
    id: ModuleId,
    side: &str,
    forms: &[Option<Form>],
    figures: &[Figures],
    calls: u64,
    into: &mut Counter,
) -> Result<(), RuleError> {
    if forms.is_empty() {
        return Err(failed(format!(
            "{} has no tensor as {side}, which the original counts spikes in",
            network.name(id)
        )));
    }
    for (form, figures) in forms.iter().zip(figures) {
        let unknown = || network.missing("T1", id, side, "the nonzeros");
        let form = form.as_ref().ok_or_else(unknown)?;
        #[expect(clippy::cast_precision_loss, reason = "counts of spikes, as floats")]
        let nonzeros = figures.nonzeros.ok_or_else(unknown)? as f64;
        into.spikes += nonzeros;
        into.sum = into.sum.zip(figures.sum).map(|(a, b)| a + b);
        #[expect(clippy::cast_precision_loss, reason = "counts of elements, as floats")]
        let elements = form.elements().saturating_mul(calls) as f64;
        into.elements += elements;
        into.binary &= figures.binary.ok_or_else(unknown)?;
    }
    Ok(())
}

/// How many samples the calls of a group were given.
fn samples(group: &CallGroup, multi_step: bool) -> Option<f64> {
    let shape = &group.inputs.first()?.as_ref()?.shape;
    let leading = if multi_step { 2 } else { 1 };
    let samples: i64 = shape.iter().take(leading).product();
    #[expect(clippy::cast_precision_loss, reason = "counts of samples, as floats")]
    let samples = samples as f64 * group.calls as f64;
    Some(samples)
}

fn size_of(shape: &[i64]) -> Size {
    Size {
        channels: shape.first().map_or(0.0, |size| float(i128::from(*size))),
        elements: if shape.is_empty() {
            0.0
        } else {
            shape.iter().map(|size| float(i128::from(*size))).product()
        },
        sum: shape.iter().map(|size| float(i128::from(*size))).sum(),
    }
}
