//! The layer graph: which module call feeds which, rebuilt from the tensors of module calls and ops.
//!
//! A node is a call of a layer (a module inside of which no other module matters), an op that runs between layers (the addition of a
//! residual block, a reshape), an input or the output of the root. [`Leaves`] says which modules are layers. Edges follow
//! tensors: by the object first, else by the memory that was written last.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use optape_trace::{ModuleId, Value};

use super::{Form, Module, Namespace, Network, Recording, Step, parents};
use crate::ordered::ModuleState;
use crate::rules::RuleError;

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A tensor that the root was given.
    Input,
    /// A call of a module.
    Layer(ModuleId),
    /// An op between layers, `aten::add.Tensor`.
    Op(Arc<str>),
    /// What the root gave back.
    Output,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its own name in the graph, as torch.fx would call it.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The module that an op ran in, or that is the layer.
    pub module: Option<ModuleId>,
    /// Indices of the nodes that its tensors come from, each once, in the order of its arguments.
    pub inputs: Vec<usize>,
    /// Its tensor arguments; `None` where no op has had the tensor.
    pub input_forms: Vec<Option<Form>>,
    /// Its results.
    pub output_forms: Vec<Option<Form>>,
    /// Calls of it inside of one call of the root.
    pub calls: u64,
    /// The batch norm that is part of it after [`LayerGraph::fuse_batch_norm`].
    pub fused: Option<ModuleId>,
}

impl Node {
    /// Whether it is an op that makes one dimension of all but the first, as `torch.flatten(x, 1)` does.
    #[must_use]
    pub fn flattens(&self) -> bool {
        let Kind::Op(op) = &self.kind else {
            return false;
        };
        let reshapes = matches!(
            op.as_ref(),
            "aten::view" | "aten::_unsafe_view" | "aten::reshape" | "aten::flatten.using_ints"
        );
        let first = |forms: &[Option<Form>]| forms.first().cloned().flatten();
        let ends = first(&self.input_forms).zip(first(&self.output_forms));
        reshapes
            && ends.is_some_and(|(from, to)| {
                to.shape.len() == 2
                    && from.shape.len() > 2
                    && to.shape.first() == from.shape.first()
                    && to.elements() == from.elements()
            })
    }
}

/// A root's layers and what they feed.
#[derive(Clone, Debug)]
pub struct LayerGraph {
    /// The root.
    pub root: ModuleId,
    /// In the order in which they ran; inputs first, the output last.
    pub nodes: Vec<Node>,
}

/// Which modules are layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// Those that call no other module, and spiking neurons.
    Innermost,
    /// Those that a tracer of torch.fx takes for leaves: torch's own but containers, and those that Qualia adds. Spiking neurons, too.
    Traced,
}

impl Leaves {
    fn has(self, module: Option<&Module>, calls_others: bool) -> bool {
        let Some(module) = module else {
            return true;
        };
        if module.definition.spiking {
            return true;
        }
        match self {
            Self::Innermost => !calls_others,
            Self::Traced => {
                let class = module.class();
                let torch = class.starts_with("torch.nn.") || class.starts_with("torch.ao.nn.");
                (torch && !module.is("torch.nn.modules.container.Sequential"))
                    || crate::qualia::is_known(module)
            }
        }
    }
}

/// Where tensors come from, while a call of the root is gone through.
#[derive(Default)]
struct Producers {
    tensors: HashMap<u64, usize>,
    storages: HashMap<u64, usize>,
}

impl Producers {
    fn of(&self, recording: &Recording, tensor: u64) -> Option<usize> {
        let by_memory = || {
            let storage = recording.tensors.get(&tensor)?.storage;
            self.storages.get(&storage).copied()
        };
        self.tensors.get(&tensor).copied().or_else(by_memory)
    }

    fn set(&mut self, recording: &Recording, tensor: u64, node: usize) {
        if tensor == 0 {
            return;
        }
        self.tensors.insert(tensor, node);
        if let Some(seen) = recording.tensors.get(&tensor) {
            self.storages.insert(seen.storage, node);
        }
    }
}

impl LayerGraph {
    /// The graph of a root's first call; every call of a layer is a node of its own.
    ///
    /// # Errors
    /// Where the trace holds no whole call of it, or one that is too long.
    pub fn of(network: &Network, root: ModuleId, leaves: Leaves) -> Result<Self, RuleError> {
        let recording = network
            .recordings
            .iter()
            .find(|recording| recording.root == root)
            .ok_or_else(|| {
                RuleError::Failed(format!(
                    "no call of {} lies in the selection as a whole",
                    network.name(root)
                ))
            })?;
        if recording.too_long {
            return Err(RuleError::Failed(format!(
                "one call of {} has more steps than a graph is made of",
                network.name(root)
            )));
        }
        Ok(Self::from(network, recording, leaves))
    }

    fn from(network: &Network, recording: &Recording, leaves: Leaves) -> Self {
        let parents = parents(&recording.steps);
        let mut producers = Producers::default();
        let mut names = Namespace::default();
        let mut nodes: Vec<Node> = Vec::new();
        let mut stack: Vec<ModuleId> = Vec::new();
        // Where in the stack the layer stands that is being called.
        let mut layer: Option<(usize, Vec<u64>)> = None;
        let form = |tensor: &u64| recording.tensors.get(tensor).map(|seen| seen.form.clone());
        let forms =
            |tensors: &[u64]| -> Vec<Option<Form>> { tensors.iter().map(&form).collect() };
        for step in &recording.steps {
            match step {
                Step::Enter { module, arguments } => {
                    if stack.is_empty() {
                        for tensor in arguments {
                            let name = format!("input{}", nodes.len());
                            producers.set(recording, *tensor, nodes.len());
                            nodes.push(Node {
                                name,
                                kind: Kind::Input,
                                module: None,
                                inputs: Vec::new(),
                                input_forms: Vec::new(),
                                output_forms: vec![form(tensor)],
                                calls: 1,
                                fused: None,
                            });
                        }
                    }
                    // A tracer always goes into the root.
                    let into = stack.is_empty() && leaves == Leaves::Traced;
                    let leaf = leaves.has(network.modules.get(module), parents.contains(module));
                    if layer.is_none() && leaf && !into {
                        layer = Some((stack.len(), arguments.clone()));
                    }
                    stack.push(*module);
                }
                Step::Exit { module, results } => {
                    let Some(at) = stack.iter().rposition(|open| open == module) else {
                        continue;
                    };
                    stack.truncate(at);
                    if let Some((place, arguments)) = layer.take_if(|(place, _)| *place >= at) {
                        if place == at {
                            let path = network.path(recording.root, *module).unwrap_or_default();
                            let path = if path.is_empty() {
                                network
                                    .modules
                                    .get(module)
                                    .map_or("layer", Module::short_class)
                            } else {
                                path
                            };
                            let node = Node {
                                name: names.create(path),
                                kind: Kind::Layer(*module),
                                module: Some(*module),
                                inputs: sources(&producers, recording, &arguments),
                                input_forms: forms(&arguments),
                                output_forms: forms(results),
                                calls: 1,
                                fused: None,
                            };
                            for tensor in results {
                                producers.set(recording, *tensor, nodes.len());
                            }
                            nodes.push(node);
                        }
                    }
                    if stack.is_empty() {
                        nodes.push(Node {
                            name: "output".to_owned(),
                            kind: Kind::Output,
                            module: None,
                            inputs: sources(&producers, recording, results),
                            input_forms: forms(results),
                            output_forms: Vec::new(),
                            calls: 1,
                            fused: None,
                        });
                    }
                }
                Step::Op {
                    name,
                    inputs,
                    outputs,
                    written,
                } => {
                    if layer.is_some() {
                        continue;
                    }
                    let mut node = Node {
                        name: String::new(),
                        kind: Kind::Op(Arc::clone(name)),
                        module: stack.last().copied(),
                        inputs: sources(&producers, recording, inputs),
                        input_forms: forms(inputs),
                        output_forms: forms(outputs),
                        calls: 1,
                        fused: None,
                    };
                    node.name = names.create(if node.flattens() {
                        "flatten"
                    } else {
                        short(name)
                    });
                    for tensor in outputs.iter().chain(written) {
                        producers.set(recording, *tensor, nodes.len());
                    }
                    nodes.push(node);
                }
            }
        }
        let mut graph = Self {
            root: recording.root,
            nodes,
        };
        graph.prune();
        graph
    }

    /// Leaves out ops that nothing needs: whose results go into no node that leads to a layer or the output.
    fn prune(&mut self) {
        let mut needed: Vec<bool> = self
            .nodes
            .iter()
            .map(|node| !matches!(node.kind, Kind::Op(_)))
            .collect();
        for at in (0..self.nodes.len()).rev() {
            if needed.get(at) == Some(&true) {
                for input in self.nodes.get(at).map_or(&[][..], |node| &node.inputs) {
                    if let Some(needed) = needed.get_mut(*input) {
                        *needed = true;
                    }
                }
            }
        }
        self.keep(&needed);
    }

    /// Keeps these nodes; edges to others are gone.
    fn keep(&mut self, kept: &[bool]) {
        let mut places: Vec<Option<usize>> = Vec::with_capacity(kept.len());
        let mut next = 0;
        for kept in kept {
            places.push(kept.then_some(next));
            next += usize::from(*kept);
        }
        let mut at = 0;
        self.nodes.retain(|_| {
            at += 1;
            kept.get(at - 1) == Some(&true)
        });
        for node in &mut self.nodes {
            node.inputs = node
                .inputs
                .iter()
                .filter_map(|input| places.get(*input).copied().flatten())
                .collect();
        }
    }

    /// The nodes that take what a node gives, in their order.
    pub fn consumers(&self, node: usize) -> impl Iterator<Item = usize> {
        self.nodes
            .iter()
            .enumerate()
            .filter(move |(_, other)| other.inputs.contains(&node))
            .map(|(at, _)| at)
    }

    /// One node for all calls of a layer, and for ops that stand at the same place of a loop: behind the same layer, as the same of its
    /// ops. Edges are joined; a layer that feeds itself over time steps has an edge to itself.
    #[must_use]
    pub fn folded(&self) -> Self {
        let mut nodes: Vec<Node> = Vec::new();
        let mut known: HashMap<(Option<usize>, Kind, Option<ModuleId>, usize), usize> =
            HashMap::new();
        let mut place_of: Vec<usize> = Vec::with_capacity(self.nodes.len());
        let mut behind: Option<usize> = None;
        let mut since: HashMap<(Kind, Option<ModuleId>), usize> = HashMap::new();
        let mut inputs = 0;
        for node in &self.nodes {
            let key = match &node.kind {
                Kind::Layer(module) => (None, Kind::Layer(*module), None, 0),
                Kind::Op(_) => {
                    let count = since.entry((node.kind.clone(), node.module)).or_default();
                    *count += 1;
                    (behind, node.kind.clone(), node.module, *count)
                }
                Kind::Input => {
                    inputs += 1;
                    (None, Kind::Input, None, inputs)
                }
                Kind::Output => (None, Kind::Output, None, 0),
            };
            let place = *known.entry(key).or_insert_with(|| {
                nodes.push(Node {
                    inputs: Vec::new(),
                    calls: 0,
                    ..node.clone()
                });
                nodes.len() - 1
            });
            place_of.push(place);
            if let Some(folded) = nodes.get_mut(place) {
                folded.calls += node.calls;
            }
            if matches!(node.kind, Kind::Layer(_)) {
                behind = Some(place);
                since.clear();
            }
        }
        for (node, place) in self.nodes.iter().zip(&place_of) {
            for input in &node.inputs {
                if let (Some(from), Some(to)) = (place_of.get(*input), nodes.get_mut(*place))
                    && !to.inputs.contains(from)
                {
                    to.inputs.push(*from);
                }
            }
        }
        Self {
            root: self.root,
            nodes,
        }
    }

    /// Makes a batch norm part of the convolution before it, as for inference: the convolution gets a bias, and what came out of the batch
    /// norm comes out of it. Only where nothing else takes what the convolution gives, where its module stands in the graph once, and where
    /// the batch norm was evaluated, with running statistics. Gives how many.
    pub fn fuse_batch_norm(&mut self, network: &Network) -> usize {
        let mut uses: HashMap<ModuleId, usize> = HashMap::new();
        for node in &self.nodes {
            if let Kind::Layer(module) = node.kind {
                *uses.entry(module).or_default() += 1;
            }
        }
        let mut kept = vec![true; self.nodes.len()];
        let mut fused = 0;
        for at in 0..self.nodes.len() {
            let Some((convolution, norm)) = self.pair(network, at) else {
                continue;
            };
            let once = [convolution, at].iter().all(|place| {
                self.nodes
                    .get(*place)
                    .and_then(|node| node.module)
                    .is_some_and(|module| uses.get(&module) == Some(&1))
            });
            if !once || self.consumers(convolution).count() != 1 {
                continue;
            }
            let output_forms = self.nodes.get(at).map(|node| node.output_forms.clone());
            if let (Some(node), Some(forms)) = (self.nodes.get_mut(convolution), output_forms) {
                node.fused = Some(norm);
                node.output_forms = forms;
            }
            for node in &mut self.nodes {
                for input in &mut node.inputs {
                    if *input == at {
                        *input = convolution;
                    }
                }
            }
            if let Some(kept) = kept.get_mut(at) {
                *kept = false;
            }
            fused += 1;
        }
        self.keep(&kept);
        fused
    }

    /// If a node is a batch norm behind a convolution: the convolution's node, and the batch norm.
    fn pair(&self, network: &Network, at: usize) -> Option<(usize, ModuleId)> {
        let node = self.nodes.get(at)?;
        let (Kind::Layer(norm), [before]) = (&node.kind, node.inputs.as_slice()) else {
            return None;
        };
        let Kind::Layer(convolution) = self.nodes.get(*before)?.kind else {
            return None;
        };
        let (norm_of, convolution) = (
            network.modules.get(norm)?,
            network.modules.get(&convolution)?,
        );
        let dimensions = |module: &Module, stem: &str| {
            let digits = module.short_class().strip_prefix(stem)?.strip_suffix('d')?;
            (module.class().starts_with("torch.nn.")
                || module
                    .class()
                    .starts_with("spikingjelly.activation_based.layer"))
            .then(|| digits.to_owned())
        };
        let same = dimensions(norm_of, "BatchNorm").filter(|d| !d.is_empty())
            == dimensions(convolution, "Conv").filter(|d| !d.is_empty());
        let evaluated = norm_of.state.facts.get("training") == Some(&serde_json::Value::Bool(false));
        let is_norm = dimensions(norm_of, "BatchNorm").is_some();
        (is_norm && same && evaluated && norm_of.is_true("track_running_stats"))
            .then_some((*before, *norm))
    }

    /// The modules that the nodes are.
    #[must_use]
    pub fn layers(&self) -> HashSet<ModuleId> {
        self.nodes
            .iter()
            .filter_map(|node| match node.kind {
                Kind::Layer(module) => Some(module),
                _ => None,
            })
            .collect()
    }
}

fn sources(producers: &Producers, recording: &Recording, tensors: &[u64]) -> Vec<usize> {
    let mut found = Vec::new();
    for tensor in tensors {
        if let Some(node) = producers.of(recording, *tensor)
            && !found.contains(&node)
        {
            found.push(node);
        }
    }
    found
}

/// `add` of `aten::add_.Tensor`.
fn short(op: &str) -> &str {
    let name = op.rsplit("::").next().unwrap_or(op);
    let name = name.split('.').next().unwrap_or(name);
    name.trim_matches('_')
}

/// The elements of a kept input of a two-dimensional convolution, each times the outputs that it feeds, with zeros around the input
/// whatever the padding holds. `None` where the facts or the values are not there, or the padding is no number.
pub(crate) fn fan_out_sum(state: &ModuleState, value: &Value) -> Option<f64> {
    let values = value.to_f64()?;
    let pair = |name: &str| -> Option<[i128; 2]> {
        let list = state.integers(name)?;
        <[i128; 2]>::try_from(list).ok()
    };
    let (kernel, stride) = (pair("kernel_size")?, pair("stride")?);
    let (padding, dilation) = (pair("padding")?, pair("dilation")?);
    let features = state.integer("out_channels")? / state.integer("groups")?.max(1);
    let [height, width] = match value.shape.as_slice() {
        [.., height, width] => [*height, *width].map(i128::from),
        _ => return None,
    };
    // How many outputs along an axis see each position.
    let along = |axis: usize, size: i128| -> Option<Vec<f64>> {
        let (k, s) = (*kernel.get(axis)?, *stride.get(axis)?);
        let (p, d) = (*padding.get(axis)?, *dilation.get(axis)?);
        if s < 1 {
            return None;
        }
        let outputs = (size + 2 * p - d * (k - 1) - 1).div_euclid(s) + 1;
        let counts = (0..size).map(|at| {
            let seen = (0..k).filter(|tap| {
                let from = at + p - tap * d;
                from >= 0 && from % s == 0 && from / s < outputs
            });
            u32::try_from(seen.count()).map_or(f64::MAX, f64::from)
        });
        Some(counts.collect())
    };
    let (rows, columns) = (along(0, height)?, along(1, width)?);
    let plane = usize::try_from(height.checked_mul(width)?).ok()?;
    if plane == 0 {
        return Some(0.0);
    }
    let sum: f64 = values
        .chunks(plane)
        .flat_map(|plane| plane.chunks(columns.len()).zip(&rows))
        .map(|(line, row)| {
            let line: f64 = line.iter().zip(&columns).map(|(x, column)| x * column).sum();
            line * row
        })
        .sum();
    #[expect(clippy::cast_precision_loss, reason = "a number of channels")]
    let features = features as f64;
    Some(sum * features)
}
