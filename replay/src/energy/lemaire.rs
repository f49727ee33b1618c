//! Lemaire's analytical model as SpikingJelly has it at commit db3b6df0 (June 2026).
//!
//! Three parts: operations, addressing, and memory accesses that cost more the larger the memory is. Each kind of memory is as large
//! as the largest access of a call to it. Synaptic operations are added to the accumulates, although these include them.

use optape_trace::{DType, ModuleId};

use super::{CostFile, EnergyModel, EnergyReport, Given, Input, float, memory_cost_pj};
use crate::ordered::{Amounts, ModuleCall, OrderedCall, Simulation, TensorRef, World};
use crate::rules::spikingjelly::NeuronStateSettings;
use crate::rules::spikingjelly::Version;
use crate::rules::spikingjelly::neuromorphic_memory_access::{CONVOLUTIONS, LINEAR, missing_fact};
use crate::rules::spikingjelly::neuron_state::{self, BASE_NODE};
use crate::rules::{MissingLevel, RuleError, WayOut};

pub(super) const TRANSPOSED: [&str; 3] = [
    "torch.nn.modules.conv.ConvTranspose1d",
    "torch.nn.modules.conv.ConvTranspose2d",
    "torch.nn.modules.conv.ConvTranspose3d",
];

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Lemaire {
    file: CostFile,
}

impl Lemaire {
    /// The model with the costs of a file.
    #[must_use]
    pub fn new(file: &CostFile) -> Self {
        Self { file: file.clone() }
    }
}

/// What accesses are added up under, and the sizes of memories.
const BYTES: &str = "bytes";
const BUFFERS: &str = "buffers";
const WARNINGS: &str = "warnings";

impl EnergyModel for Lemaire {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn inputs(&self) -> Vec<Input> {
        let outside_of_neurons = |counter| Input {
            counter,
            ignored: &[BASE_NODE],
        };
        vec![
            Input::all("synop"),
            outside_of_neurons("mac"),
            outside_of_neurons("ac"),
            Input::all("lemaire_addressing"),
        ]
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        let settings = NeuronStateSettings {
            version: Version::June2026,
            sparse: self.file.flag("enable_sparse_memory_estimation"),
            zero_ratio: self.file.number("sparse_zero_ratio_threshold"),
        };
        Some(Box::new(Layers {
            settings,
            strict: self.file.flag("strict"),
            neurons: neuron_state::Following::new(settings),
        }))
    }

    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
        if self.file.flag("strict")
            && let Some(op) = given.unknown.first()
        {
            return Err(RuleError::Failed(format!(
                "NotImplementedError: {op} not defined by SynOpCounter; with strict = false in the cost file it counts nothing"
            )));
        }
        let state = |name| given.followed("projections", &["Global", name]);
        let address = |name| given.amount("lemaire_addressing", "metrics", &["Global", name]);
        let bytes = |name| given.followed(BYTES, &[name]);
        let buffer = |name| given.followed(BUFFERS, &[name]);
        let counts = [
            ("synop", given.total("synop")),
            ("mac", given.total("mac")),
            ("ac", given.total("ac")),
            ("state_mac_like", state("state_mac_like")),
            ("state_acc_like", state("state_acc_like")),
            ("read_in_bytes", bytes("read_in")),
            ("write_out_bytes", bytes("write_out")),
            ("read_params_bytes", bytes("read_params")),
            ("read_potential_bytes", state("read_potential")),
            ("write_potential_bytes", state("write_potential")),
            ("acc_addr", address("acc_addr")),
            ("mac_addr", address("mac_addr")),
        ];
        let [
            synop,
            mac,
            ac,
            state_mac,
            state_acc,
            read_in,
            write_out,
            read_params,
            read_potential,
            write_potential,
            acc_addr,
            mac_addr,
        ] = counts.map(|(_, count)| count);
        let (add, mul) = (self.file.cost("e_add_pj"), self.file.cost("e_mul_pj"));
        let points = self.file.points("memory_breakpoints");
        let access =
            |bytes: i128, memory: i128| float(bytes) * memory_cost_pj(points, float(memory));
        let potential = state("potential_buffer_bytes");

        let ops_pj = float(synop + ac + state_acc) * add + float(mac + state_mac) * (mul + add);
        let addressing_pj = float(acc_addr) * add + float(mac_addr) * (mul + add);
        let inout_pj = access(read_in, buffer("read_in")) + access(write_out, buffer("write_out"));
        let params_pj = access(read_params, buffer("read_params"));
        let potential_pj = access(read_potential, potential) + access(write_potential, potential);
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
        report.field("counts", counts);
        report.field(
            "buffer_sizes_bytes",
            [
                (
                    "inout_buffer_bytes",
                    buffer("read_in").max(buffer("write_out")),
                ),
                ("params_buffer_bytes", buffer("read_params")),
                ("potential_buffer_bytes", potential),
            ],
        );
        if let Some(followed) = given.followed {
            report.warnings.extend(followed.names(WARNINGS));
        }
        report.boundary = "operations, addressing and memory accesses of linear and convolution layers and of neurons; what other \
                           layers move is left out";
        report.configure(&self.file);
        Ok(report)
    }
}

/// Follows layers and neurons.
struct Layers {
    settings: NeuronStateSettings,
    strict: bool,
    neurons: neuron_state::Following,
}

impl Simulation for Layers {
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        self.neurons.call(world, call, out)
    }

    fn module_call(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let module = call.module;
        if world.is(module, BASE_NODE) {
            return self.backend(world, module, out);
        }
        let linear = world.is(module, LINEAR);
        let convolution = CONVOLUTIONS.iter().any(|class| world.is(module, class));
        let transposed = TRANSPOSED.iter().any(|class| world.is(module, class));
        if !linear && !convolution && !transposed {
            return Ok(());
        }
        let (x, y) = ends(world, call)?;
        let state = world
            .module(module)
            .ok_or_else(|| missing_fact(world, module, "facts"))?;
        let parameters: i128 = state.parameters().map(|(_, n, bytes)| n * bytes).sum();
        let mut moved = [bytes(x), bytes(y), parameters];
        let input = self.sparse(world, call, x, "input")?;
        if transposed {
            let output = self.sparse(world, call, y, "output")?;
            if input.is_some() || output.is_some() {
                let class = class_name(world, module);
                let text = format!(
                    "Lemaire forward tracker falls back to dense lower-bound memory for {class}."
                );
                out.raise(WARNINGS, &[&text], 1);
            }
        } else if let Some(active) = input {
            let fact = |name: &str| {
                state
                    .integer(name)
                    .ok_or_else(|| missing_fact(world, module, name))
            };
            let weights = if linear {
                fact("out_features")?
            } else {
                let kernel = state
                    .integers("kernel_size")
                    .ok_or_else(|| missing_fact(world, module, "kernel_size"))?;
                fact("out_channels")? / fact("groups")?.max(1) * kernel.iter().product::<i128>()
            };
            let parameter = |name: &str| state.parameters().find(|(n, _, _)| *n == name);
            let (_, _, weight_bytes) =
                parameter("weight").ok_or_else(|| missing_fact(world, module, "weight"))?;
            let output = self.sparse(world, call, y, "output")?;
            let written = output.unwrap_or_else(|| i128::from(y.meta.elements()));
            let bias = parameter("bias").map_or(0, |(_, _, bytes)| written * bytes);
            moved = [
                active * element_bytes(x),
                written * element_bytes(y),
                active * weights * weight_bytes + bias,
            ];
        }
        for (name, amount) in ["read_in", "write_out", "read_params"]
            .into_iter()
            .zip(moved)
        {
            out.add(BYTES, &[name], amount);
            out.raise(BUFFERS, &[name], amount);
        }
        Ok(())
    }
}

impl Layers {
    /// The active elements of a tensor that counts as sparse.
    fn sparse(
        &self,
        world: &World<'_>,
        call: &ModuleCall,
        tensor: &TensorRef,
        what: &str,
    ) -> Result<Option<i128>, RuleError> {
        let elements = i128::from(tensor.meta.elements());
        if !self.settings.sparse || elements == 0 {
            return Ok(None);
        }
        let known = world.known(tensor.content);
        let binary = tensor.meta.dtype == DType::BOOL || known.binary == Some(true);
        match (known.nonzeros, known.binary) {
            (Some(nonzeros), _) if binary => Ok(Some(i128::from(nonzeros))),
            (Some(nonzeros), Some(false)) => {
                let nonzeros = i128::from(nonzeros);
                let zeros = 1.0 - float(nonzeros) / float(elements);
                Ok((zeros >= self.settings.zero_ratio).then_some(nonzeros))
            }
            _ => Err(missing_values(world, call.module, what)),
        }
    }

    fn backend(
        &self,
        world: &World<'_>,
        module: ModuleId,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let Some(backend) = world
            .module(module)
            .and_then(|state| state.attribute("backend")?.as_str())
            .filter(|backend| *backend != "torch")
        else {
            return Ok(());
        };
        let text = format!(
            "LemaireEnergyProfiler only supports torch backend for BaseNode modules, got '{backend}' from {}.",
            class_name(world, module)
        );
        if self.strict {
            return Err(RuleError::Failed(format!("ValueError: {text}")));
        }
        out.raise(WARNINGS, &[&text], 1);
        Ok(())
    }
}

/// The first argument and the first result of a module's call.
pub(super) fn ends<'c>(
    world: &World<'_>,
    call: &'c ModuleCall,
) -> Result<(&'c TensorRef, &'c TensorRef), RuleError> {
    let of = |list: &'c [Option<TensorRef>], what| {
        list.first()
            .and_then(Option::as_ref)
            .ok_or_else(|| missing_fact(world, call.module, what))
    };
    Ok((
        of(&call.arguments, "shape of the input")?,
        of(&call.results, "shape of the output")?,
    ))
}

/// The name of a module's class, without where it stands.
pub(super) fn class_name(world: &World<'_>, module: ModuleId) -> String {
    let class = world
        .definition(module)
        .and_then(|def| def.classes.first())
        .map_or("", String::as_str);
    class.rsplit('.').next().unwrap_or(class).to_owned()
}

pub(super) fn missing_values(world: &World<'_>, module: ModuleId, what: &str) -> RuleError {
    let name = world
        .definition(module)
        .map_or("a module", |def| def.name.as_str());
    RuleError::Missing(Box::new(MissingLevel {
        level: "T1",
        what: format!("whether the {what} of {name} is binary, and its nonzeros"),
        way_out: WayOut::Other(format!(
            "no op inside reads it as it is; record with `optape record --level full --watch '{}:{what}'`",
            class_name(world, module)
        )),
    }))
}

fn bytes(tensor: &TensorRef) -> i128 {
    i128::from(tensor.meta.bytes())
}

fn element_bytes(tensor: &TensorRef) -> i128 {
    i128::from(tensor.meta.dtype.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy::{given, presets};

    #[test]
    fn synaptic_operations_are_added_to_the_accumulates() {
        let file = presets("lemaire_no_sparse")
            .next()
            .unwrap()
            .costs()
            .unwrap();
        let counts = given(&[("synop", 10), ("mac", 2), ("ac", 30)]);
        let report = Lemaire::new(&file).report(&counts).unwrap();
        assert!((report.total_pj - (4.0 + 6.4)).abs() < 1e-9);
    }

    #[test]
    fn strict_refuses_what_has_no_rule() {
        let mut file = presets("lemaire_no_sparse")
            .next()
            .unwrap()
            .costs()
            .unwrap();
        file.settings
            .insert("strict".to_owned(), crate::energy::Setting::Flag(true));
        let mut counts = given(&[]);
        counts.unknown.push("aten.relu.default".to_owned());
        let refused = Lemaire::new(&file).report(&counts).unwrap_err().to_string();
        assert!(refused.contains("aten.relu.default"), "{refused}");
    }
}
