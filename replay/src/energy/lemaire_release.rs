//! Lemaire's analytical model as SpikingJelly 2.0.0 has it: linear and convolution layers, IF and LIF neurons, forward.
//!
//! Every number has 32 bits, whatever torch computed with. A dense layer of a network without neurons writes its outputs; in
//! one with neurons, spikes update potentials, and neurons read and write them once per time step. Each access costs by the size of the
//! memory of its own layer; spikes wait in queues of a fixed size.

use std::collections::HashSet;

use optape_trace::{DType, ModuleId};

use super::lemaire::{TRANSPOSED, class_name, ends, missing_values};
use super::{CostFile, EnergyModel, EnergyReport, Given, Input, float, memory_cost_pj};
use crate::ordered::{Amounts, ModuleCall, ModuleState, Simulation, TensorRef, World};
use crate::rules::RuleError;
use crate::rules::spikingjelly::neuromorphic_memory_access::{CONVOLUTIONS, LINEAR, missing_fact};
use crate::rules::spikingjelly::neuron_state::BASE_NODE;

const IF_NODE: &str = "spikingjelly.activation_based.neuron.integrate_and_fire.IFNode";
const LIF_NODE: &str = "spikingjelly.activation_based.neuron.lif.LIFNode";

/// Bytes of a number.
const WORD: i128 = 4;

const COUNTS: &str = "counts";
/// Kind of access, size of the memory in bytes, bytes.
const ACCESSES: &str = "accesses";
const BUFFERS: &str = "buffers";
const WARNINGS: &str = "warnings";

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct LemaireRelease {
    file: CostFile,
}

impl LemaireRelease {
    /// The model with the costs of a file.
    #[must_use]
    pub fn new(file: &CostFile) -> Self {
        Self { file: file.clone() }
    }
}

impl EnergyModel for LemaireRelease {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn inputs(&self) -> Vec<Input> {
        Vec::new()
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a whole number, as the cost file was checked for"
        )]
        let fifo_elements = self.file.number("snn_fifo_capacity_elements") as i128;
        Some(Box::new(Layers {
            strict: self.file.flag("strict"),
            fifo_bytes: fifo_elements.saturating_mul(WORD),
            spiking: None,
        }))
    }

    fn stages(&self) -> Option<&'static [&'static str]> {
        Some(&["forward"])
    }

    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
        let points = self.file.points("memory_breakpoints");
        let accesses = |name: &str| {
            given
                .followed
                .map(|followed| followed.numbers(ACCESSES, name))
                .unwrap_or_default()
        };
        let bytes = |name| accesses(name).iter().map(|(_, bytes)| bytes).sum::<i128>();
        let energy = |name| -> f64 {
            accesses(name)
                .iter()
                .map(|(memory, bytes)| {
                    let memory = memory.parse().unwrap_or(f64::INFINITY);
                    float(*bytes) * memory_cost_pj(points, memory)
                })
                .sum()
        };
        let count = |name| given.followed(COUNTS, &[name]);
        let (add, mul) = (self.file.cost("e_add_pj"), self.file.cost("e_mul_pj"));
        let (ac, mac) = (count("ac"), count("mac"));
        let (acc_addr, mac_addr) = (count("acc_addr"), count("mac_addr"));
        let ops_pj = float(ac) * add + float(mac) * (mul + add);
        let addressing_pj = float(acc_addr) * add + float(mac_addr) * (mul + add);
        let inout_pj = energy("read_in_bytes") + energy("write_out_bytes");
        let params_pj = energy("read_params_bytes");
        let potential_pj = energy("read_potential_bytes") + energy("write_potential_bytes");
        let memory_pj = inout_pj + params_pj + potential_pj;

        let mut report = EnergyReport::new(ops_pj + addressing_pj + memory_pj, given);
        report.field("total_pj", report.total_pj);
        report.field(
            "breakdown_pj",
            [
                ("ops_pj", ops_pj),
                ("addressing_pj", addressing_pj),
                ("memory_pj", memory_pj),
                ("inout_pj", inout_pj),
                ("params_pj", params_pj),
                ("potential_pj", potential_pj),
            ],
        );
        report.field(
            "counts",
            [
                ("synop", count("synop")),
                ("mac", mac),
                ("ac", ac),
                ("read_in_bytes", bytes("read_in_bytes")),
                ("write_out_bytes", bytes("write_out_bytes")),
                ("read_params_bytes", bytes("read_params_bytes")),
                ("read_potential_bytes", bytes("read_potential_bytes")),
                ("write_potential_bytes", bytes("write_potential_bytes")),
                ("acc_addr", acc_addr),
                ("mac_addr", mac_addr),
            ],
        );
        report.field(
            "buffer_sizes_bytes",
            [
                "inout_buffer_bytes",
                "params_buffer_bytes",
                "potential_buffer_bytes",
            ]
            .map(|name| (name, given.followed(BUFFERS, &[name]))),
        );
        if let Some(followed) = given.followed {
            report.warnings.extend(followed.names(WARNINGS));
        }
        report.boundary = "forward inference of linear and convolution layers and of IF and LIF neurons: operations, addressing and \
                           memory accesses; no other layers";
        report.configure(&self.file);
        Ok(report)
    }
}

/// Follows layers and neurons.
struct Layers {
    strict: bool,
    fifo_bytes: i128,
    /// The network has neurons; as known after so many roots.
    spiking: Option<(usize, bool)>,
}

fn access(out: &mut Amounts, name: &str, bytes: i128, memory: i128) {
    let buffer = match name {
        "read_in_bytes" | "write_out_bytes" => "inout_buffer_bytes",
        "read_params_bytes" => "params_buffer_bytes",
        _ => "potential_buffer_bytes",
    };
    out.raise(BUFFERS, &[buffer], memory);
    out.add(ACCESSES, &[name, &memory.to_string()], bytes);
}

fn elements(tensor: &TensorRef) -> i128 {
    i128::from(tensor.meta.elements())
}

/// Time steps of a call.
fn steps(state: &ModuleState, input: &TensorRef) -> i128 {
    if state.is_multi_step() {
        i128::from(input.meta.shape.first().copied().unwrap_or(1)).max(1)
    } else {
        1
    }
}

impl Simulation for Layers {
    fn module_call(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let is = |class: &str| world.is(call.module, class);
        let layer = is(LINEAR) || CONVOLUTIONS.into_iter().any(is);
        let neuron = is(IF_NODE) || is(LIF_NODE);
        if !layer && !neuron {
            return Ok(());
        }
        let (x, y) = ends(world, call)?;
        let state = world
            .module(call.module)
            .ok_or_else(|| missing_fact(world, call.module, "facts"))?;
        if layer {
            self.layer(world, call, state, x, y, out)
        } else {
            self.neuron(world, call, state, x, y, out)
        }
    }

    fn finish(&mut self, world: &World<'_>, out: &mut Amounts) -> Result<(), RuleError> {
        let mut warned = HashSet::new();
        for &root in world.roots() {
            let modules = world.named_modules(root);
            let inside: HashSet<ModuleId> = modules
                .iter()
                .filter(|(_, module)| world.is(*module, BASE_NODE))
                .flat_map(|(_, neuron)| world.named_modules(*neuron).into_iter().skip(1))
                .map(|(_, module)| module)
                .collect();
            for (_, module) in modules {
                let is = |class: &str| world.is(module, class);
                let supported = is(LINEAR) || CONVOLUTIONS.into_iter().any(is);
                let leaf = world
                    .module(module)
                    .is_none_or(|state| state.children().next().is_none());
                let unsupported = TRANSPOSED.into_iter().any(is)
                    || if is(BASE_NODE) {
                        !is(IF_NODE) && !is(LIF_NODE)
                    } else {
                        leaf && !supported
                    };
                if inside.contains(&module) || !unsupported {
                    continue;
                }
                let class = class_name(world, module);
                let text =
                    format!("Lemaire formulas do not support {class}; its energy is omitted.");
                if self.strict {
                    return Err(RuleError::Failed(format!("ValueError: {text}")));
                }
                if warned.insert(class) {
                    out.raise(WARNINGS, &[&text], 1);
                }
            }
        }
        Ok(())
    }
}

impl Layers {
    /// Whether there are neurons anywhere in the network.
    fn is_spiking(&mut self, world: &World<'_>) -> bool {
        let roots = world.roots();
        match self.spiking {
            Some((known, spiking)) if known == roots.len() => spiking,
            _ => {
                let spiking = roots
                    .iter()
                    .flat_map(|root| world.named_modules(*root))
                    .any(|(_, module)| world.is(module, BASE_NODE));
                self.spiking = Some((roots.len(), spiking));
                spiking
            }
        }
    }

    fn layer(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        state: &ModuleState,
        x: &TensorRef,
        y: &TensorRef,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let module = call.module;
        let fact = |name: &str| {
            state
                .integer(name)
                .ok_or_else(|| missing_fact(world, module, name))
        };
        let sizes = |name: &str| {
            state
                .integers(name)
                .ok_or_else(|| missing_fact(world, module, name))
        };
        let linear = world.is(module, LINEAR);
        let known = world.known(x.content);
        let spikes = match (elements(x), known.binary) {
            (0, _) => Some(0),
            (_, Some(false)) if x.meta.dtype != DType::BOOL => None,
            _ if known.binary == Some(true) || x.meta.dtype == DType::BOOL => Some(
                known
                    .nonzeros
                    .map(i128::from)
                    .ok_or_else(|| missing_values(world, module, "input"))?,
            ),
            _ => return Err(missing_values(world, module, "input")),
        };
        let parameters: i128 = state.parameters().map(|(_, n, _)| n * WORD).sum();
        let biased = state.parameters().any(|(name, _, _)| name == "bias");
        let (fan_in, reached, channels, kernel) = if linear {
            let features = fact("out_features")?;
            (fact("in_features")?, features, features, 1)
        } else {
            let kernel = sizes("kernel_size")?;
            let strides = sizes("stride")?;
            let channels = fact("out_channels")?;
            let per_group = channels / fact("groups")?.max(1);
            let volume: i128 = kernel.iter().product();
            let outputs: i128 = kernel
                .iter()
                .zip(&strides)
                .map(|(kernel, stride)| (kernel + stride - 1) / stride.max(&1))
                .product();
            let inputs = fact("in_channels")? / fact("groups")?.max(1);
            (inputs * volume, per_group * outputs, per_group, volume)
        };
        let outputs = elements(y);
        let dense_uses = outputs * fan_in;
        let bias_bytes = if biased { outputs * WORD } else { 0 };
        if biased {
            out.add(COUNTS, &["ac"], outputs);
        }
        match spikes {
            Some(active) => {
                let operations = active * reached;
                let touched = active * channels * kernel;
                out.add(COUNTS, &["ac"], operations);
                out.add(COUNTS, &["synop"], operations);
                out.add(COUNTS, &["acc_addr"], touched);
                if !linear {
                    out.add(COUNTS, &["mac_addr"], active * 2);
                }
                access(out, "read_in_bytes", active * WORD, self.fifo_bytes);
                access(
                    out,
                    "read_params_bytes",
                    touched * WORD + bias_bytes,
                    parameters,
                );
                let potentials = outputs * WORD / steps(state, x);
                access(out, "read_potential_bytes", touched * WORD, potentials);
                access(out, "write_potential_bytes", touched * WORD, potentials);
            }
            None => {
                let weights = if linear {
                    0
                } else {
                    fact("out_channels")? * kernel
                };
                out.add(COUNTS, &["mac"], dense_uses);
                out.add(COUNTS, &["acc_addr"], elements(x) + outputs + weights);
                let read = if linear { elements(x) } else { dense_uses };
                access(out, "read_in_bytes", read * WORD, elements(x) * WORD);
                access(
                    out,
                    "read_params_bytes",
                    dense_uses * WORD + bias_bytes,
                    parameters,
                );
                if !self.is_spiking(world) {
                    access(out, "write_out_bytes", outputs * WORD, outputs * WORD);
                }
            }
        }
        Ok(())
    }

    fn neuron(
        &self,
        world: &World<'_>,
        call: &ModuleCall,
        state: &ModuleState,
        x: &TensorRef,
        y: &TensorRef,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let steps = steps(state, x);
        let potentials = elements(y) / steps * WORD;
        access(out, "read_potential_bytes", potentials * steps, potentials);
        access(out, "write_potential_bytes", potentials * steps, potentials);
        let spikes = world
            .known(y.content)
            .nonzeros
            .map(i128::from)
            .ok_or_else(|| missing_values(world, call.module, "output"))?;
        out.add(COUNTS, &["ac"], spikes);
        if world.is(call.module, LIF_NODE) {
            out.add(COUNTS, &["mac"], elements(y));
        }
        access(out, "write_out_bytes", spikes * WORD, self.fifo_bytes);
        Ok(())
    }
}
