//! The pass over a stream that a [`Network`] is made in.

use std::collections::HashMap;
use std::sync::Arc;

use optape_trace::{Argument, CallId, ModuleId, Stage, ThreadId, Value};

use super::{
    Calls, Figures, Form, KeptOutputs, LastCall, Module, Network, Recording, Seen, Step,
    definition,
};
use crate::ordered::{
    Amounts, Content, ModuleCall, ModuleEdge, OrderedCall, Simulation, TensorRef, WatchedCall,
    World,
};
use crate::rules::RuleError;

const CONV2D: &str = "torch.nn.modules.conv.Conv2d";
/// Steps of a root's call that are kept; a longer one has no graph.
const MOST_STEPS: usize = 1 << 20;
/// Roots whose first call is kept.
const MOST_ROOTS: usize = 64;

/// Whose outputs are kept in the network, where the trace has them.
const KEEPING: &str = "sinabs.layers.stateful_layer.StatefulLayer";

/// What a convolution's op said of its input, and which values that was.
struct FanOut {
    input: Option<Content>,
    sum: Option<f64>,
}

/// Follows the modules of a stream.
#[derive(Default)]
pub(crate) struct Following {
    roots: Vec<ModuleId>,
    modules: std::collections::BTreeMap<ModuleId, Module>,
    calls: std::collections::BTreeMap<ModuleId, Calls>,
    kept: std::collections::BTreeMap<ModuleId, KeptOutputs>,
    trees: Vec<(ModuleId, Vec<(String, ModuleId)>)>,
    fan_outs: HashMap<CallId, FanOut>,
    /// Sums over a kept input with the fan-out of its positions: for calls whose op has seen another tensor.
    kept_fan_outs: HashMap<CallId, f64>,
    /// The outermost selected call that is open, by thread.
    open: HashMap<ThreadId, CallId>,
    recordings: Vec<Recording>,
    /// Of the recording that is going on: where it runs.
    recording: Option<ThreadId>,
    rank: Option<u32>,
}

impl Following {
    pub(crate) fn of_rank(rank: Option<u32>) -> Self {
        Self {
            rank,
            ..Self::default()
        }
    }

    fn record(&mut self, step: Step) {
        if let Some(recording) = self.recordings.last_mut() {
            if recording.steps.len() < MOST_STEPS {
                recording.steps.push(step);
            } else {
                recording.too_long = true;
            }
        }
    }

    fn see(&mut self, world: &World<'_>, tensors: &[u64]) {
        let Some(recording) = self.recordings.last_mut() else {
            return;
        };
        for &tensor in tensors.iter().filter(|tensor| **tensor != 0) {
            if let (Some(meta), Some(storage)) = (world.meta_of(tensor), world.storage_of(tensor)) {
                recording.tensors.entry(tensor).or_insert_with(|| Seen {
                    storage,
                    form: Form::of(meta),
                });
            }
        }
    }

    fn know(&mut self, world: &World<'_>, module: ModuleId) {
        self.modules.entry(module).or_insert_with(|| Module {
            definition: definition(world.dictionary, module),
            state: world.module(module).cloned().unwrap_or_default(),
        });
    }
}

impl Simulation for Following {
    fn wants_edges(&self) -> bool {
        true
    }

    fn module_enter(
        &mut self,
        world: &World<'_>,
        edge: &ModuleEdge<'_>,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        if !self.open.contains_key(&edge.thread) {
            self.open.insert(edge.thread, edge.call);
            let new = !self.roots.contains(&edge.module);
            if new {
                self.roots.push(edge.module);
            }
            let known = self
                .recordings
                .iter()
                .any(|r| r.root == edge.module && r.complete);
            if self.recording.is_none() && !known && self.recordings.len() < MOST_ROOTS {
                // One that never ended is of no use.
                self.recordings.retain(|r| r.complete);
                self.recordings.push(Recording {
                    root: edge.module,
                    call: edge.call,
                    steps: Vec::new(),
                    tensors: HashMap::new(),
                    complete: false,
                    too_long: false,
                });
                self.recording = Some(edge.thread);
            }
        }
        if self.recording == Some(edge.thread) {
            self.see(world, edge.tensors);
            self.record(Step::Enter {
                module: edge.module,
                arguments: edge.tensors.to_vec(),
            });
        }
        Ok(())
    }

    fn module_exit(
        &mut self,
        world: &World<'_>,
        edge: &ModuleEdge<'_>,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        if self.recording == Some(edge.thread) {
            self.see(world, edge.tensors);
            self.record(Step::Exit {
                module: edge.module,
                results: edge.tensors.to_vec(),
            });
        }
        if self.open.get(&edge.thread) == Some(&edge.call) {
            self.open.remove(&edge.thread);
            if self.recording == Some(edge.thread) {
                self.recording = None;
                if let Some(recording) = self.recordings.last_mut()
                    && recording.call == edge.call
                {
                    recording.complete = true;
                }
            }
            if !self.trees.iter().any(|(root, _)| *root == edge.module) {
                let tree = world.named_modules(edge.module);
                for (_, module) in &tree {
                    self.know(world, *module);
                }
                self.trees.push((edge.module, tree));
            }
        }
        Ok(())
    }

    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let row = &call.row;
        if row.signature.stage == Stage::Backward {
            return Ok(());
        }
        if let Some((open, module)) = call.within
            && is_convolution(&row.op.name)
            && world.is(module, CONV2D)
            && let Some(input) = row.optional_tensor("input")
        {
            let tensor = call.tensors.get(usize::from(input.index)).copied();
            let fan_out = FanOut {
                input: tensor.and_then(|tensor| world.content_of(tensor)),
                sum: row.fan_out_sum("input").ok(),
            };
            self.fan_outs.insert(open, fan_out);
        }
        if self.recording == Some(call.thread) {
            let inputs = usize::from(row.signature.inputs);
            let mut written = Vec::new();
            for (schema, argument) in row.op.arguments.iter().zip(&row.signature.arguments) {
                if let (true, Argument::Tensor(at)) = (schema.written, argument) {
                    written.extend(call.tensors.get(usize::from(*at)));
                }
            }
            self.see(world, call.tensors);
            self.record(Step::Op {
                name: Arc::from(row.op.qualified_name()),
                inputs: call.tensors.iter().take(inputs).copied().collect(),
                outputs: call.tensors.iter().skip(inputs).copied().collect(),
                written,
            });
        }
        Ok(())
    }

    fn watched(
        &mut self,
        world: &World<'_>,
        call: &WatchedCall<'_>,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let Some(module) = call.definition.module else {
            return Ok(());
        };
        if call.kept.is_empty() {
            return Ok(());
        }
        match call.definition.what.as_str() {
            "output" if world.is(module, KEEPING) => {
                if let Some(value) = call.kept.get(call.ordinal) {
                    keep(&mut self.kept, module, value);
                }
            }
            "input" if world.is(module, CONV2D) => {
                let padded = world
                    .module(module)
                    .and_then(|state| state.attribute("padding_mode")?.as_str())
                    .is_some_and(|mode| mode != "zeros");
                if padded
                    && let Some((open, _)) = call.within.filter(|(_, of)| *of == module)
                    && let Some(value) = call.kept.get(call.ordinal)
                    && let Some(sum) = world
                        .module(module)
                        .and_then(|state| super::graph::fan_out_sum(state, &value))
                {
                    self.kept_fan_outs.insert(open, sum);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn module_call(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        self.know(world, call.module);
        if call.results.is_empty() {
            // Left by an exception, or it gives no tensor: hooks see no such call.
            self.fan_outs.remove(&call.call);
            return Ok(());
        }
        let input = call.arguments.first().and_then(Option::as_ref);
        let fan_out_sum = match self.fan_outs.remove(&call.call) {
            Some(fan_out) if fan_out.input == input.map(|tensor| tensor.content) => fan_out.sum,
            Some(_) => self.kept_fan_outs.remove(&call.call),
            None => None,
        };
        let forms = |tensors: &[Option<TensorRef>]| -> Vec<Option<Form>> {
            tensors
                .iter()
                .map(|tensor| tensor.as_ref().map(|t| Form::of(&t.meta)))
                .collect()
        };
        let figures = |tensors: &[Option<TensorRef>]| -> Vec<Figures> {
            tensors
                .iter()
                .map(|tensor| match tensor {
                    Some(t) => Figures::of(&Form::of(&t.meta), world.known(t.content)),
                    None => Figures::UNKNOWN,
                })
                .collect()
        };
        let (input, output) = (figures(&call.arguments), figures(&call.results));
        let calls = self.calls.entry(call.module).or_default();
        let group = calls.group_of((forms(&call.arguments), forms(&call.results)));
        if let Some(of) = calls.groups.get_mut(group) {
            of.calls += 1;
            for (sum, one) in of.input.iter_mut().zip(&input) {
                sum.add(one);
            }
            for (sum, one) in of.output.iter_mut().zip(&output) {
                sum.add(one);
            }
            of.fan_out_sum = of.fan_out_sum.zip(fan_out_sum).map(|(a, b)| a + b);
        }
        if calls
            .last
            .as_ref()
            .is_none_or(|last| last.ordinal < call.ordinal)
        {
            calls.last = Some(LastCall {
                ordinal: call.ordinal,
                group,
                input,
                output,
                fan_out_sum,
            });
        }
        Ok(())
    }

    fn finish(&mut self, world: &World<'_>, out: &mut Amounts) -> Result<(), RuleError> {
        if self.roots.is_empty() {
            return Ok(());
        }
        let called: Vec<ModuleId> = self.calls.keys().copied().collect();
        for module in called {
            self.know(world, module);
        }
        let mut network = Network {
            rank: self.rank,
            roots: std::mem::take(&mut self.roots),
            modules: std::mem::take(&mut self.modules),
            calls: std::mem::take(&mut self.calls),
            kept: std::mem::take(&mut self.kept),
            recordings: std::mem::take(&mut self.recordings),
            trees: std::collections::BTreeMap::new(),
        };
        network.recordings.retain(|r| r.complete);
        for (root, tree) in std::mem::take(&mut self.trees) {
            network.merge_tree(root, tree);
        }
        out.keep(network);
        Ok(())
    }
}

fn is_convolution(op: &str) -> bool {
    matches!(
        op,
        "aten::convolution" | "aten::_convolution" | "aten::conv2d"
    )
}

fn keep(
    kept: &mut std::collections::BTreeMap<ModuleId, KeptOutputs>,
    module: ModuleId,
    value: Value,
) {
    #[expect(clippy::cast_possible_truncation, reason = "sinabs adds in float32")]
    let floats = |value: &Value| -> Option<Vec<f32>> {
        Some(value.to_f64()?.into_iter().map(|x| x as f32).collect())
    };
    match kept.get_mut(&module) {
        None => {
            let first = KeptOutputs {
                count: 1,
                last: value,
                total: None,
            };
            kept.insert(module, first);
        }
        Some(known) => {
            let total = match known.total.take() {
                None if known.count == 1 => floats(&known.last),
                total => total,
            };
            known.total = total
                .zip(floats(&value))
                .filter(|(total, one)| known.last.shape == value.shape && total.len() == one.len())
                .map(|(mut total, one)| {
                    for (sum, x) in total.iter_mut().zip(one) {
                        *sum += x;
                    }
                    total
                });
            known.count += 1;
            known.last = value;
        }
    }
}
