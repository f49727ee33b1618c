//! Bytes of weights, biases and neuron states that an event-driven machine would move: SpikingJelly 2.0.0.
//!
//! A spike reads the weights that it meets, a dense input reads them for every output; each output reads its bias; a neuron
//! reads and writes its states in every time step. Layers are linear and convolution modules, told from the products inside of them;
//! scopes are named after the first path under which a module stands in the tree (`named_modules`).

use std::collections::HashMap;
use std::sync::Arc;

use optape_trace::{ModuleId, Stage};

use super::neuron_state::BASE_NODE;
use crate::ordered::{Amounts, ModuleCall, OrderedCall, Simulation, World};
use crate::rules::{CallRow, Counted, Counter, MissingLevel, Rule, RuleError};

pub(crate) const LINEAR: &str = "torch.nn.modules.linear.Linear";
pub(crate) const CONVOLUTIONS: [&str; 3] = [
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.conv.Conv3d",
];

/// The metrics, as the report names them.
pub(crate) const METRICS: [&str; 4] = [
    "weight_read_bytes",
    "bias_read_bytes",
    "neuron_state_read_bytes",
    "neuron_state_write_bytes",
];

/// Section of what counting itself adds up in the live tool: see [`Following`].
pub(crate) const OWN_ADDITIONS: &str = "own_additions";

/// The counter.
#[derive(Clone, Copy, Debug)]
pub struct NeuromorphicMemoryAccess;

impl Counter for NeuromorphicMemoryAccess {
    fn name(&self) -> &str {
        "neuromorphic_memory_access"
    }

    fn unit(&self) -> &str {
        "byte"
    }

    fn rule(&self, _op: &str) -> Option<&Rule> {
        None
    }

    fn count(&self, _row: &CallRow<'_>) -> Counted {
        Counted::Zero
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        Some(Box::new(Following::default()))
    }

    fn method(&self) -> Option<(&'static str, &'static str)> {
        Some((
            "weights: with spikes bytes(weight element) * synaptic operations, else elements(out) * fan-in; biases: one for each output; states: \
             read and written once per time step",
            "SpikingJelly 2.0.0, op_counter/neuromorphic_memory_access.py",
        ))
    }

    fn knows_every_op(&self) -> bool {
        true
    }
}

/// Scopes by the first path of a module in the tree of a root.
#[derive(Debug, Default)]
pub(crate) struct NamedScopes {
    of: HashMap<ModuleId, Arc<[String]>>,
    roots: usize,
}

impl NamedScopes {
    /// `Global`, the root's class, and every prefix of the path.
    pub(crate) fn of(&mut self, world: &World<'_>, module: ModuleId) -> Arc<[String]> {
        if self.roots != world.roots().len() || !self.of.contains_key(&module) {
            self.roots = world.roots().len();
            self.of.clear();
            for &root in world.roots() {
                let name = world.definition(root).map_or("", |def| def.name.as_str());
                for (path, module) in world.named_modules(root) {
                    let mut scopes = vec!["Global".to_owned(), name.to_owned()];
                    let ends = path.match_indices('.').map(|(at, _)| at);
                    let ends = ends.chain((!path.is_empty()).then_some(path.len()));
                    scopes.extend(
                        ends.filter_map(|end| Some(format!("{name}.{}", path.get(..end)?))),
                    );
                    self.of.entry(module).or_insert_with(|| scopes.into());
                }
            }
        }
        self.of
            .get(&module)
            .cloned()
            .unwrap_or_else(|| vec!["Global".to_owned()].into())
    }
}

/// Follows the layers and neurons of a stream.
///
/// Beside the metrics it adds up what the live tool's own work costs it: where the input of a convolution is binary, it sums a
/// tensor of [batch, groups, positions], and the counter of accumulates that watches beside it takes that for an op of the network.
#[derive(Debug, Default)]
pub(crate) struct Following {
    scopes: NamedScopes,
}

impl Following {
    fn record(&self, amounts: [i128; 4], out: &mut Amounts) {
        for (name, amount) in METRICS.into_iter().zip(amounts) {
            out.count_as(name, amount);
        }
    }
}

impl Simulation for Following {
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let row = &call.row;
        let Some(&module) = call.modules.first() else {
            return Ok(());
        };
        if row.signature.stage == Stage::Backward {
            return Ok(());
        }
        let linear = world.is(module, LINEAR);
        if !linear && !CONVOLUTIONS.iter().any(|class| world.is(module, class)) {
            return Ok(());
        }
        let (input, weight, bias) = match (row.op.qualified_name().as_str(), linear) {
            ("aten::mm", true) => ("self", "mat2", None),
            ("aten::addmm", true) => ("mat1", "mat2", Some("self")),
            ("aten::linear", true) | ("aten::convolution", false) => {
                ("input", "weight", Some("bias"))
            }
            (
                op @ ("aten::mv" | "aten::addmv" | "aten::bmm" | "aten::baddbmm" | "aten::matmul"),
                true,
            ) => {
                return Err(RuleError::Unsuited(format!(
                    "a linear module was computed by {op}, which these rules have no formula for"
                )));
            }
            _ => return Ok(()),
        };
        let (w, output) = (row.tensor(weight)?, row.output(0)?);
        let depth = if linear {
            world
                .module(module)
                .and_then(|m| m.integer("in_features"))
                .ok_or_else(|| missing_fact(world, module, "in_features"))?
        } else {
            w.size(1)? * w.elements_from(2)
        };
        let uses = if row.binary(input, row.seen_after(input))? {
            if linear {
                let features = output.size(-1)?;
                row.nonzeros(input, row.seen_after(input))? * features
            } else {
                let groups = row.integer("groups")?;
                let sums = output.size(0)? * groups * output.elements_from(2);
                out.add(OWN_ADDITIONS, &["ac"], sums - 1);
                row.fan_out_nonzeros(input)?
            }
        } else {
            output.elements() * depth
        };
        let bytes = |t: crate::rules::TensorView<'_>| i128::from(t.meta.dtype.bytes());
        let bias = bias
            .and_then(|name| row.optional_tensor(name))
            .map_or(0, |bias| output.elements() * bytes(bias));
        out.explain(|| {
            format!(
                "weight_read_bytes = {uses} uses * {} bytes; bias_read_bytes = {bias}",
                bytes(w)
            )
        });
        out.set_scopes(self.scopes.of(world, module));
        self.record([uses * bytes(w), bias, 0, 0], out);
        Ok(())
    }

    fn module_call(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        if !world.is(call.module, BASE_NODE) {
            return Ok(());
        }
        let multi = world
            .module(call.module)
            .is_some_and(crate::ordered::ModuleState::is_multi_step);
        let steps = match (multi, call.arguments.first()) {
            (false, _) => 1,
            (true, Some(Some(input))) => {
                i128::from(input.meta.shape.first().copied().unwrap_or(1).max(0))
            }
            (true, _) => return Err(missing_fact(world, call.module, "shape of its input")),
        };
        let bytes = i128::from(call.state_bytes) * steps;
        out.explain(|| {
            format!(
                "neuron_state_read_bytes = neuron_state_write_bytes = {} bytes of states * {steps} time steps",
                call.state_bytes
            )
        });
        out.set_scopes(self.scopes.of(world, call.module));
        self.record([0, 0, bytes, bytes], out);
        Ok(())
    }
}

/// A fact that a trace should have.
pub(crate) fn missing_fact(world: &World<'_>, module: ModuleId, what: &str) -> RuleError {
    let name = world
        .definition(module)
        .map_or("a module", |def| def.name.as_str());
    RuleError::Missing(Box::new(MissingLevel {
        level: "T7",
        what: format!("{what} of {name}"),
        way_out: crate::rules::WayOut::Record(optape_trace::needs::FULL_FLAG),
    }))
}
