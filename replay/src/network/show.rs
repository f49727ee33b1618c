//! The layer graph for people and programs: text, JSON, DOT.

use std::collections::BTreeMap;
use std::io::Write;

use optape_trace::ModuleId;
use serde::Serialize;
use serde_json::Value;

use super::graph::{Kind, LayerGraph, Leaves, Node};
use super::{Figures, Form, Module, Network};
use crate::error::ReplayError;
use crate::report::{SelectionInfo, SourceInfo, grouped};
use crate::rules::RuleError;

/// What a graph is to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphOptions {
    /// Every call of a layer is a node, instead of every layer.
    pub unrolled: bool,
    /// Batch norms are part of the convolutions before them.
    pub fuse_batch_norm: bool,
}

/// A layer graph with what is known of its layers.
#[derive(Clone, Debug, Serialize)]
pub struct GraphReport {
    /// Version of this shape.
    pub schema: u32,
    /// Version of optape.
    pub optape: String,
    /// The files.
    pub trace: Vec<SourceInfo>,
    /// What was looked at.
    pub selection: SelectionInfo,
    /// The module whose graph it is.
    pub root: RootReport,
    /// Every call of a layer is a node.
    pub unrolled: bool,
    /// How many batch norms became part of convolutions.
    pub fused_batch_norms: usize,
    /// In the order in which they ran.
    pub nodes: Vec<NodeReport>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// The root of a graph.
#[derive(Clone, Debug, Serialize)]
pub struct RootReport {
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: String,
    /// Selected calls of it; the graph is that of the first one.
    pub calls: u64,
    /// Elements of all parameters below it.
    pub parameter_elements: i128,
    /// Its attribute `timesteps`, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_steps: Option<u64>,
}

/// A node of a graph.
#[derive(Clone, Debug, Serialize)]
pub struct NodeReport {
    /// Its own.
    pub name: String,
    /// `input`, `layer`, `op`, `output`.
    pub kind: &'static str,
    /// Of a layer, its path below the root; of an op, that of the module that it ran in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// Of a layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// Of an op.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub op: Option<String>,
    /// A spiking neuron.
    #[serde(skip_serializing_if = "is_false")]
    pub spiking: bool,
    /// Names of the nodes that feed it.
    pub inputs: Vec<String>,
    /// Names of the nodes that it feeds.
    pub outputs: Vec<String>,
    /// Shapes of its tensor arguments; null where no op has had the tensor.
    pub input_shapes: Vec<Option<Vec<i64>>>,
    /// Shapes of its results.
    pub output_shapes: Vec<Option<Vec<i64>>>,
    /// Element type of its first result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<&'static str>,
    /// Calls inside of one call of the root.
    pub calls: u64,
    /// Time steps inside of one call of the root: calls, times the steps that each takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_steps: Option<u64>,
    /// Shapes of its own parameters.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, Vec<i64>>,
    /// Its attributes of simple type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attributes: Option<Value>,
    /// Path of the batch norm that is part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_norm: Option<String>,
    /// What went in, in all selected calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<SideReport>,
    /// What came out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<SideReport>,
}

/// What went into a layer or came out of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SideReport {
    /// Elements of all calls.
    pub elements: u64,
    /// How many were not 0; null where a call has no statistics.
    pub nonzeros: Option<u64>,
    /// All were 0 or 1.
    pub binary: Option<bool>,
    /// Nonzeros over elements, where all were 0 or 1.
    pub firing_rate: Option<f64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_false(value: &bool) -> bool {
    !*value
}

impl GraphReport {
    pub(crate) fn of(
        network: &Network,
        root: ModuleId,
        options: GraphOptions,
        trace: Vec<SourceInfo>,
        selection: SelectionInfo,
    ) -> Result<Self, RuleError> {
        let mut graph = LayerGraph::of(network, root, Leaves::Innermost)?;
        let fused = if options.fuse_batch_norm {
            graph.fuse_batch_norm(network)
        } else {
            0
        };
        if !options.unrolled {
            graph = graph.folded();
        }
        let mut notes = Vec::new();
        let others: Vec<&str> = network
            .roots
            .iter()
            .filter(|other| **other != root)
            .map(|other| network.name(*other))
            .collect();
        if !others.is_empty() {
            notes.push(format!(
                "the program also calls {}: --scope NAME shows another one's graph",
                others.join(", ")
            ));
        }
        let module = network.modules.get(&root);
        let nodes = (0..graph.nodes.len())
            .filter_map(|at| NodeReport::of(network, &graph, at))
            .collect();
        Ok(Self {
            schema: 1,
            optape: env!("CARGO_PKG_VERSION").to_owned(),
            trace,
            selection,
            root: RootReport {
                name: network.name(root).to_owned(),
                class: module.map_or_else(String::new, |m| m.class().to_owned()),
                calls: network.calls(root).map_or(0, super::Calls::count),
                parameter_elements: network
                    .named_modules(root)
                    .map(|(_, _, module)| module.parameter_elements())
                    .sum(),
                time_steps: module
                    .and_then(|m| m.state.integer("timesteps"))
                    .and_then(|steps| u64::try_from(steps).ok()),
            },
            unrolled: options.unrolled,
            fused_batch_norms: fused,
            nodes,
            notes,
        })
    }

    /// For people: one line per node.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write_text(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        writeln!(out, "Layer graph of {} ({})", self.root.name, self.root.class)?;
        writeln!(
            out,
            "  {} {}, {} parameters{}",
            grouped(i128::from(self.root.calls)),
            if self.root.calls == 1 { "call" } else { "calls" },
            grouped(self.root.parameter_elements),
            if self.fused_batch_norms > 0 {
                format!(", {} batch norms fused", self.fused_batch_norms)
            } else {
                String::new()
            }
        )?;
        for note in &self.notes {
            writeln!(out, "  note: {note}")?;
        }
        writeln!(out)?;
        let head = ["node", "what", "from", "output", "params", "steps", "rate in", "out"];
        let body = self.nodes.iter().map(NodeReport::line).collect();
        writeln!(out, "{}", crate::report::columns(&head, body, &[0, 1, 2, 3]))?;
        Ok(())
    }

    /// For programs.
    ///
    /// # Errors
    /// As [`Self::write_text`].
    pub fn write_json(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        serde_json::to_writer_pretty(&mut *out, self).map_err(std::io::Error::from)?;
        out.write_all(b"\n")?;
        Ok(())
    }

    /// For graphviz.
    ///
    /// # Errors
    /// As [`Self::write_text`].
    pub fn write_dot(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        writeln!(out, "digraph {} {{", quoted(&self.root.name))?;
        writeln!(out, "  rankdir=TB;\n  node [fontname=\"sans-serif\", shape=box];")?;
        for node in &self.nodes {
            let shape = match (node.kind, node.spiking) {
                ("input" | "output", _) => "ellipse",
                ("op", _) => "plaintext",
                (_, true) => "hexagon",
                _ => "box",
            };
            let mut lines = vec![node.name.clone()];
            lines.extend(node.what());
            lines.extend(node.output_shapes.first().and_then(|shape| {
                Some(format!("{:?}", shape.as_ref()?))
            }));
            if let Some(rate) = node.output.and_then(|side| side.firing_rate) {
                lines.push(format!("rate {rate:.4}"));
            }
            let label: Vec<String> = lines.iter().map(|line| escaped(line)).collect();
            writeln!(
                out,
                "  {} [shape={shape}, label=\"{}\"];",
                quoted(&node.name),
                label.join("\\n")
            )?;
        }
        for node in &self.nodes {
            for input in &node.inputs {
                writeln!(out, "  {} -> {};", quoted(input), quoted(&node.name))?;
            }
        }
        writeln!(out, "}}")?;
        Ok(())
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", escaped(text))
}

impl NodeReport {
    fn of(network: &Network, graph: &LayerGraph, at: usize) -> Option<Self> {
        let node = graph.nodes.get(at)?;
        let name = |at: &usize| graph.nodes.get(*at).map(|node| node.name.clone());
        let shapes = |forms: &[Option<Form>]| {
            forms
                .iter()
                .map(|form| form.as_ref().map(|form| form.shape.clone()))
                .collect()
        };
        let path = |module: ModuleId| {
            let path = network.path(graph.root, module)?;
            Some(if path.is_empty() {
                network.name(graph.root).to_owned()
            } else {
                path.to_owned()
            })
        };
        let module = match node.kind {
            Kind::Layer(id) => network.modules.get(&id),
            _ => None,
        };
        let sides = match node.kind {
            Kind::Layer(id) => {
                let norm = node.fused.unwrap_or(id);
                (
                    side(network, id, |group| (&group.inputs, &group.input)),
                    side(network, norm, |group| (&group.outputs, &group.output)),
                )
            }
            _ => (None, None),
        };
        Some(Self {
            name: node.name.clone(),
            kind: match node.kind {
                Kind::Input => "input",
                Kind::Layer(_) => "layer",
                Kind::Op(_) => "op",
                Kind::Output => "output",
            },
            module: node.module.and_then(path),
            class: module.map(|module| module.class().to_owned()),
            op: match &node.kind {
                Kind::Op(op) => Some(op.to_string()),
                _ => None,
            },
            spiking: module.is_some_and(|module| module.definition.spiking),
            inputs: node.inputs.iter().filter_map(name).collect(),
            outputs: graph.consumers(at).filter_map(|at| name(&at)).collect(),
            input_shapes: shapes(&node.input_forms),
            output_shapes: shapes(&node.output_forms),
            dtype: node
                .output_forms
                .iter()
                .flatten()
                .next()
                .map(|form| form.dtype.name()),
            calls: node.calls,
            time_steps: module.map(|module| time_steps(module, node)),
            parameters: module.map(parameters).unwrap_or_default(),
            attributes: module.and_then(|module| module.state.facts.get("attributes").cloned()),
            batch_norm: node.fused.and_then(path),
            input: sides.0,
            output: sides.1,
        })
    }

    fn what(&self) -> Option<String> {
        let class = self
            .class
            .as_ref()
            .map(|class| class.rsplit('.').next().unwrap_or(class).to_owned());
        let fused = self.batch_norm.as_ref().map_or("", |_| " + BatchNorm");
        class
            .map(|class| format!("{class}{fused}"))
            .or_else(|| self.op.clone())
    }

    fn line(&self) -> Vec<String> {
        let elements: i64 = self
            .parameters
            .values()
            .map(|shape| shape.iter().product::<i64>())
            .sum();
        let shape = self.output_shapes.iter().flatten().next();
        let rate = |side: Option<SideReport>| match side {
            Some(side) => match side.firing_rate {
                Some(rate) => format!("{rate:.4}"),
                None if side.binary == Some(false) => "analog".to_owned(),
                None => "?".to_owned(),
            },
            None => String::new(),
        };
        vec![
            self.name.clone(),
            self.what().unwrap_or_else(|| self.kind.to_owned()),
            self.inputs.join(", "),
            shape.map(|shape| format!("{shape:?}")).unwrap_or_default(),
            if elements > 0 {
                grouped(i128::from(elements))
            } else {
                String::new()
            },
            self.time_steps
                .map(|steps| steps.to_string())
                .unwrap_or_default(),
            rate(self.input),
            rate(self.output),
        ]
    }
}

fn side<'n>(
    network: &'n Network,
    module: ModuleId,
    of: impl Fn(&'n super::CallGroup) -> (&'n Vec<Option<Form>>, &'n Vec<Figures>),
) -> Option<SideReport> {
    let calls = network.calls(module)?;
    let mut elements = 0u64;
    let mut all = Figures::NONE;
    for group in &calls.groups {
        let (forms, figures) = of(group);
        for (form, figures) in forms.iter().zip(figures) {
            let each = form.as_ref().map_or(0, Form::elements);
            elements = elements.saturating_add(each.saturating_mul(group.calls));
            all.add(figures);
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate is a float")]
    let rate = all
        .nonzeros
        .filter(|_| all.binary == Some(true) && elements > 0)
        .map(|nonzeros| nonzeros as f64 / elements as f64);
    Some(SideReport {
        elements,
        nonzeros: all.nonzeros,
        binary: all.binary,
        firing_rate: rate,
    })
}

fn time_steps(module: &Module, node: &Node) -> u64 {
    let each = if module.state.is_multi_step() {
        node.input_forms
            .iter()
            .flatten()
            .next()
            .and_then(|form| form.shape.first())
            .and_then(|size| u64::try_from(*size).ok())
            .unwrap_or(1)
    } else {
        1
    };
    node.calls.saturating_mul(each)
}

fn parameters(module: &Module) -> BTreeMap<String, Vec<i64>> {
    let list = module
        .state
        .facts
        .get("parameters")
        .and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(|parameter| {
            let shape = parameter.get("shape")?.as_array()?;
            let sizes: Option<Vec<i64>> = shape.iter().map(Value::as_i64).collect();
            Some((parameter.get("name")?.as_str()?.to_owned(), sizes?))
        })
        .collect()
}
