//! NeuroMC's runtime model, as SpikingJelly has it in June 2026 and in 2.0.0: forward, backward and optimizer.
//!
//! What runs is cut into *fragments*: the forward of a layer or a neuron, the gradients of its input and of its weight, the update of
//! parameters. Each is given loops (batch, time steps, channels in and out, output, kernel), a kind of core, and kinds of memory; its
//! multiply-accumulates, its further operations and its memory traffic follow. Products that no module accounts for make fragments of their own.
//! Ops that are on none of the lists are refused.

use std::collections::{BTreeMap, HashMap, HashSet};

use optape_trace::{DType, ModuleId, Stage, call_flags, tensor_flags};
use serde_json::Value;

use super::lemaire::{ends, missing_values};
use super::{CostFile, EnergyModel, EnergyReport, Figure, Given, Input, Setting, float};
use crate::ordered::{Amounts, ModuleCall, ModuleState, OrderedCall, Simulation, TensorRef, World};
use crate::report::Ordered;
use crate::rules::spikingjelly::Version;
use crate::rules::spikingjelly::neuromorphic_memory_access::{CONVOLUTIONS, LINEAR, missing_fact};
use crate::rules::spikingjelly::neuron_state::BASE_NODE;
use crate::rules::{RuleError, TensorView};

const BATCH_NORMS: [&str; 3] = [
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.BatchNorm3d",
];

/// The memories that a cost file describes.
pub(super) const MEMORIES: [&str; 22] = [
    "reg_1b",
    "reg_16b",
    "reg_32b",
    "sram_fp_conv_in_s",
    "sram_fp_conv_in_w",
    "sram_fp_conv_out_xi",
    "sram_fp_soma_u",
    "sram_fp_soma_s",
    "sram_fp_soma_smask",
    "sram_bp_conv_in_du",
    "sram_bp_conv_in_w",
    "sram_bp_conv_out_res",
    "sram_bp_grad_in_u",
    "sram_bp_grad_in_s",
    "sram_bp_grad_in_smask",
    "sram_bp_grad_out_du",
    "sram_wg_conv_in_s",
    "sram_wg_conv_in_du",
    "sram_wg_conv_out_dw",
    "sram_2MB",
    "sram_6MB",
    "dram",
];

/// Cores that multiply and accumulate; a cost file has `e_mac_CORE_pj` of each.
const CORES: [&str; 6] = ["fp_soma", "bp_grad", "wg", "ann_fe", "ann_be", "ann_we"];
/// Further operations; a cost file has `e_NAME_pj` of each.
const OPERATIONS: [&str; 5] = ["mux", "add", "mul", "comp", "sqrt"];

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct NeuroMc {
    file: CostFile,
    version: Version,
}

impl NeuroMc {
    /// The model of a version with the costs of a file.
    #[must_use]
    pub fn new(file: &CostFile, version: Version) -> Self {
        Self {
            file: file.clone(),
            version,
        }
    }

    fn memory(&self, name: &str) -> Memory {
        let number = |key| match self.file.settings.get(name) {
            Some(Setting::Table(table)) => table.get(key).copied().unwrap_or(0.0),
            _ => 0.0,
        };
        Memory {
            read_bits: number("read_bits"),
            write_bits: number("write_bits"),
            read_pj: number("read_pj"),
            write_pj: number("write_pj"),
        }
    }
}

/// A memory: what an access of so many bits costs.
struct Memory {
    read_bits: f64,
    write_bits: f64,
    read_pj: f64,
    write_pj: f64,
}

/// Loops of a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Loops {
    batch: i128,
    steps: i128,
    channels: i128,
    outputs: i128,
    height: i128,
    width: i128,
    kernel_height: i128,
    kernel_width: i128,
}

impl Loops {
    /// Every loop runs at least once.
    fn new(batch: [i128; 2], channels: [i128; 2], out: [i128; 2], kernel: [i128; 2]) -> Self {
        let [steps, batch] = batch.map(|n| n.max(1));
        let [channels, outputs] = channels.map(|n| n.max(1));
        let [height, width] = out.map(|n| n.max(1));
        let [kernel_height, kernel_width] = kernel.map(|n| n.max(1));
        Self {
            batch,
            steps,
            channels,
            outputs,
            height,
            width,
            kernel_height,
            kernel_width,
        }
    }

    fn macs(&self) -> i128 {
        self.kernel() * self.outputs * self.sites()
    }

    /// Kernel times input channels.
    fn kernel(&self) -> i128 {
        self.kernel_height * self.kernel_width * self.channels
    }

    /// Output positions in all samples and time steps.
    fn sites(&self) -> i128 {
        self.height * self.width * self.batch * self.steps
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Process {
    Nothing,
    Soma,
    BatchNorm,
    Optimizer,
}

impl Process {
    const fn key(self) -> &'static str {
        match self {
            Self::Nothing => "with_nothing",
            Self::Soma => "with_sg",
            Self::BatchNorm => "with_bn",
            Self::Optimizer => "with_opt",
        }
    }
}

/// A piece of work. Equal ones are counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Fragment {
    stage: &'static str,
    op: String,
    core: &'static str,
    process: Process,
    loops: Loops,
    /// Bits of an element of input, weight and output.
    bits: [i128; 3],
    /// Elements of input, weight and output.
    elements: [i128; 3],
    macs: i128,
    momentum: bool,
    weight_decay: bool,
    momentum_buffer: bool,
}

impl Fragment {
    /// Whether two stand for the same work, one told by a module and one by an op: time steps may be part of the batch.
    fn overlaps(&self) -> Self {
        Self {
            op: String::new(),
            loops: Loops {
                batch: self.loops.batch * self.loops.steps,
                steps: 1,
                ..self.loops
            },
            ..self.clone()
        }
    }

    fn product(
        stage: &'static str,
        op: &str,
        core: &'static str,
        loops: Loops,
        input_bits: i128,
        elements: [i128; 3],
    ) -> Self {
        Self {
            stage,
            op: op.to_owned(),
            core,
            process: Process::Nothing,
            loops,
            bits: [input_bits, 16, 16],
            elements,
            macs: loops.macs(),
            momentum: false,
            weight_decay: false,
            momentum_buffer: false,
        }
    }

    fn other(
        stage: &'static str,
        op: &str,
        core: &'static str,
        process: Process,
        loops: Loops,
        output_bits: i128,
        elements: [i128; 3],
    ) -> Self {
        Self {
            process,
            macs: 0,
            bits: [16, 16, output_bits],
            ..Self::product(stage, op, core, loops, 16, elements)
        }
    }

    /// Elements that an optimizer updates.
    fn parameters(&self) -> i128 {
        self.loops.outputs + self.loops.kernel()
    }

    /// [`OPERATIONS`] beyond the multiply-accumulates.
    fn operations(&self) -> [i128; 5] {
        let loops = &self.loops;
        let outputs = loops.sites() * loops.outputs;
        let inputs = loops.sites() * loops.channels;
        match (self.process, self.stage) {
            (Process::Nothing, _) => [0; 5],
            (Process::Soma, "backward") => [inputs, 2 * inputs, 4 * inputs, 0, 0],
            (Process::Soma, _) => [outputs, outputs, outputs, 3 * outputs, 0],
            (Process::BatchNorm, "backward") => [
                0,
                7 * inputs,
                3 * inputs + 22 * loops.channels * loops.steps,
                0,
                0,
            ],
            (Process::BatchNorm, _) => {
                let channels = loops.outputs * loops.steps;
                [
                    0,
                    3 * outputs + 2 * channels,
                    3 * outputs + 4 * channels,
                    0,
                    channels,
                ]
            }
            (Process::Optimizer, _) if self.op == "sgd" => {
                let more = i128::from(self.weight_decay)
                    + i128::from(self.momentum && self.momentum_buffer);
                let updates = self.parameters() * (1 + more);
                [0, updates, updates, 0, 0]
            }
            (Process::Optimizer, _) => {
                let (small, large) = (loops.outputs, loops.kernel());
                [
                    0,
                    8 * small + 4 * large,
                    22 * small + 11 * large,
                    0,
                    2 * small + large,
                ]
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Count {
    /// Output positions, samples, time steps, output channels.
    Outputs,
    /// The same with input channels.
    Inputs,
    /// Output channels and time steps.
    OutputChannels,
    /// Input channels and time steps.
    InputChannels,
    /// Kernel and channels.
    Kernel,
}

/// A variable beyond the operands of products: how many, of how many bits, in which register and SRAM, how often 2.0.0 reads it
/// into each of them, and whether it writes it.
type Variable = (Count, i128, &'static str, &'static str, i128, bool);

const SOMA: &[Variable] = &[
    (
        Count::Outputs,
        16,
        "reg_16b",
        "sram_fp_conv_out_xi",
        1,
        true,
    ),
    (Count::Outputs, 16, "reg_16b", "sram_fp_soma_u", 1, true),
    (Count::Outputs, 1, "reg_1b", "sram_fp_soma_s", 1, true),
    (Count::Outputs, 1, "reg_1b", "sram_fp_soma_smask", 0, true),
];
/// Of these 2.0.0 writes the second to SRAM and the last to registers.
const SOMA_BACKWARD: &[Variable] = &[
    (
        Count::Inputs,
        16,
        "reg_16b",
        "sram_bp_conv_out_res",
        1,
        false,
    ),
    (Count::Inputs, 16, "reg_16b", "sram_bp_grad_in_u", 1, false),
    (Count::Inputs, 1, "reg_1b", "sram_bp_grad_in_s", 1, false),
    (
        Count::Inputs,
        1,
        "reg_1b",
        "sram_bp_grad_in_smask",
        1,
        false,
    ),
    (
        Count::Inputs,
        16,
        "reg_16b",
        "sram_bp_grad_out_du",
        1,
        false,
    ),
];
const BATCH_NORM: &[Variable] = &[
    (Count::OutputChannels, 16, "reg_16b", "sram_2MB", 2, true),
    (Count::OutputChannels, 16, "reg_16b", "sram_2MB", 1, true),
    (Count::Outputs, 16, "reg_16b", "sram_2MB", 1, true),
    (Count::OutputChannels, 16, "reg_16b", "sram_2MB", 1, true),
    (Count::Outputs, 16, "reg_16b", "sram_2MB", 1, true),
    (Count::OutputChannels, 16, "reg_16b", "sram_2MB", 1, false),
    (Count::OutputChannels, 16, "reg_16b", "sram_2MB", 1, false),
];
const BATCH_NORM_BACKWARD: &[Variable] = &[
    (Count::Inputs, 16, "reg_16b", "sram_2MB", 2, false),
    (Count::InputChannels, 16, "reg_16b", "sram_2MB", 2, false),
    (Count::InputChannels, 16, "reg_16b", "sram_2MB", 2, false),
    (Count::Inputs, 16, "reg_16b", "sram_2MB", 3, true),
    (Count::Inputs, 16, "reg_16b", "sram_2MB", 3, false),
    (Count::InputChannels, 16, "reg_16b", "sram_2MB", 1, true),
    (Count::InputChannels, 16, "reg_16b", "sram_2MB", 1, true),
    (Count::InputChannels, 16, "reg_16b", "sram_2MB", 2, true),
    (Count::InputChannels, 16, "reg_16b", "sram_2MB", 0, true),
    (Count::InputChannels, 16, "reg_16b", "sram_2MB", 0, true),
    (Count::Inputs, 16, "reg_16b", "sram_2MB", 0, true),
];
/// Of seven kinds, each for scales, biases and weights: values, gradients, both moments, both corrected, new values.
const ADAM: [(i128, bool); 7] = [
    (1, false),
    (1, false),
    (1, true),
    (1, true),
    (1, true),
    (1, true),
    (0, true),
];

/// Bits and energy by level and direction: to (`h2l`) and from (`l2h`) the compute side, read (`r`) or written (`w`).
#[derive(Default)]
struct Traffic {
    bits: BTreeMap<(&'static str, &'static str), i128>,
    energy_pj: BTreeMap<(&'static str, &'static str), f64>,
}

impl Traffic {
    fn total_pj(&self) -> f64 {
        self.energy_pj.values().sum()
    }
}

impl NeuroMc {
    fn add(&self, traffic: &mut Traffic, direction: &'static str, bits: i128, name: &str) {
        let level = match name {
            "dram" => "dram",
            _ if name.starts_with("reg") => "reg",
            _ => "sram",
        };
        let high = matches!(direction, "rl2h" | "wh2l");
        let free = (level == "dram" && self.file.flag("zero_dram_in_paper_energy"))
            || (level == "sram" && high && self.file.flag("zero_sram_high_directions"));
        if bits <= 0 || free {
            return;
        }
        let memory = self.memory(name);
        let (width, cost) = if direction.starts_with('r') {
            (memory.read_bits, memory.read_pj)
        } else {
            (memory.write_bits, memory.write_pj)
        };
        let place = (level, direction);
        *traffic.bits.entry(place).or_default() += bits;
        let energy = traffic.energy_pj.entry(place).or_default();
        if width > 0.0 {
            *energy += float(bits) / width * cost;
        }
    }

    /// Traffic of the operands of products.
    fn base(&self, fragment: &Fragment) -> Traffic {
        let mut traffic = Traffic::default();
        if fragment.macs == 0 {
            return traffic;
        }
        let (registers, memories) = match fragment.core {
            "fp_soma" => (
                ["reg_1b", "reg_16b", "reg_16b"],
                [
                    "sram_fp_conv_in_s",
                    "sram_fp_conv_in_w",
                    "sram_fp_conv_out_xi",
                ],
            ),
            "ann_fe" => (
                ["reg_16b"; 3],
                [
                    "sram_fp_conv_in_w",
                    "sram_fp_conv_in_w",
                    "sram_fp_conv_out_xi",
                ],
            ),
            "bp_grad" | "ann_be" => (
                ["reg_16b"; 3],
                [
                    "sram_bp_conv_in_du",
                    "sram_bp_conv_in_w",
                    "sram_bp_conv_out_res",
                ],
            ),
            "ann_we" => (
                ["reg_16b"; 3],
                [
                    "sram_wg_conv_in_du",
                    "sram_wg_conv_in_du",
                    "sram_wg_conv_out_dw",
                ],
            ),
            "wg" => (
                ["reg_1b", "reg_16b", "reg_16b"],
                [
                    "sram_wg_conv_in_s",
                    "sram_wg_conv_in_du",
                    "sram_wg_conv_out_dw",
                ],
            ),
            _ => return traffic,
        };
        let [input, weight, output] = fragment.elements;
        let [input_bits, weight_bits, output_bits] = fragment.bits;
        let mut add = |direction, bits, name| self.add(&mut traffic, direction, bits, name);
        if self.version == Version::June2026 {
            for (direction, elements, bits, at) in [
                ("rh2l", input, input_bits, 0),
                ("rh2l", weight, weight_bits, 1),
                ("wl2h", output, output_bits, 2),
            ] {
                add(direction, elements * bits, registers[at]);
                add(direction, elements * bits, memories[at]);
            }
            return traffic;
        }
        let (macs, loops) = (fragment.macs, &fragment.loops);
        if matches!(fragment.core, "wg" | "ann_we") {
            for direction in ["rh2l", "wh2l"] {
                add(direction, macs * input_bits, registers[0]);
                add(direction, macs * weight_bits, registers[1]);
            }
            add("rl2h", output * output_bits, registers[2]);
            add("rh2l", (macs - output) * output_bits, registers[2]);
            add("wl2h", macs * output_bits, registers[2]);
            let shared = |lanes: i128| (macs + lanes.min(16) - 1) / lanes.min(16);
            add("rh2l", shared(loops.outputs) * input_bits, memories[0]);
            add("rh2l", shared(loops.channels) * weight_bits, memories[1]);
            add("wl2h", output * output_bits, memories[2]);
            return traffic;
        }
        let reduced = if matches!(fragment.core, "bp_grad" | "ann_be") {
            loops.outputs
        } else {
            loops.channels
        };
        let chunks = (reduced + 15) / 16 * loops.kernel_height * loops.kernel_width;
        let partial = output * (chunks - 1);
        for direction in ["rh2l", "wh2l"] {
            add(direction, macs * input_bits, registers[0]);
            add(direction, weight * weight_bits, registers[1]);
        }
        add("rh2l", weight * weight_bits, memories[1]);
        add("rl2h", macs * output_bits, registers[2]);
        add("rh2l", (macs - output) * output_bits, registers[2]);
        add("wh2l", macs * output_bits, registers[2]);
        add("wl2h", partial * output_bits, registers[2]);
        add("rh2l", output * chunks * input_bits, memories[0]);
        add("rh2l", partial * output_bits, memories[2]);
        add("wl2h", output * chunks * output_bits, memories[2]);
        traffic
    }

    /// Traffic of neurons, batch norms and optimizers.
    fn extra(&self, fragment: &Fragment) -> Traffic {
        let mut traffic = Traffic::default();
        let loops = &fragment.loops;
        let backward = fragment.stage == "backward";
        let adam: Vec<Variable>;
        let variables: &[Variable] = match fragment.process {
            Process::Nothing => return traffic,
            Process::Soma if backward => SOMA_BACKWARD,
            Process::Soma => SOMA,
            Process::BatchNorm if backward => BATCH_NORM_BACKWARD,
            Process::BatchNorm => BATCH_NORM,
            Process::Optimizer if fragment.op == "sgd" => {
                let bits = fragment.parameters() * 32;
                let buffered = fragment.momentum && fragment.momentum_buffer;
                for _ in 0..2 + i32::from(buffered) {
                    self.add(&mut traffic, "rh2l", bits, "sram_6MB");
                }
                for _ in 0..1 + i32::from(fragment.momentum) {
                    self.add(&mut traffic, "wl2h", bits, "sram_6MB");
                }
                return traffic;
            }
            Process::Optimizer => {
                let of = [Count::OutputChannels, Count::OutputChannels, Count::Kernel];
                adam = ADAM
                    .iter()
                    .flat_map(|(reads, writes)| {
                        of.map(|count| (count, 32, "reg_32b", "sram_6MB", *reads, *writes))
                    })
                    .collect();
                &adam
            }
        };
        let steps = if fragment.process == Process::Optimizer {
            1
        } else {
            loops.steps
        };
        for (at, (count, bits, register, memory, reads, writes)) in variables.iter().enumerate() {
            let elements = match count {
                Count::Outputs => loops.sites() * loops.outputs,
                Count::Inputs => loops.sites() * loops.channels,
                Count::OutputChannels => loops.outputs * steps,
                Count::InputChannels => loops.channels * loops.steps,
                Count::Kernel => loops.kernel(),
            };
            let bits = elements * bits;
            if self.version == Version::June2026 {
                self.add(&mut traffic, "rh2l", bits, memory);
                self.add(&mut traffic, "wl2h", bits, memory);
                continue;
            }
            let soma_backward = fragment.process == Process::Soma && backward;
            for (name, own) in [(register, 4), (memory, 1)] {
                self.add(&mut traffic, "rh2l", bits * reads, name);
                if *writes || (soma_backward && at == own) {
                    self.add(&mut traffic, "wl2h", bits, name);
                }
            }
        }
        traffic
    }
}

/// Sums of a report.
#[derive(Default)]
struct Sums {
    by_stage: BTreeMap<String, f64>,
    by_op: BTreeMap<String, f64>,
    by_core: BTreeMap<String, f64>,
    by_process: BTreeMap<String, f64>,
    operations_by_stage: BTreeMap<String, [i128; 5]>,
    operations_by_op: BTreeMap<String, [i128; 5]>,
    counts_by_core: BTreeMap<String, [i128; 7]>,
    counts_by_process: BTreeMap<String, [i128; 7]>,
    traffic: Traffic,
}

fn figures<V: Copy + Into<Figure>>(map: &BTreeMap<String, V>) -> Figure {
    Figure::Map(
        map.iter()
            .map(|(name, value)| (name.clone(), (*value).into()))
            .collect(),
    )
}

fn named<const N: usize>(names: [&str; N], values: &[i128]) -> Ordered<Figure> {
    names
        .iter()
        .zip(values)
        .map(|(name, value)| ((*name).to_owned(), Figure::Integer(*value)))
        .collect()
}

fn by_level<V: Copy + Into<Figure>>(values: &BTreeMap<(&str, &str), V>) -> Figure {
    let mut levels: BTreeMap<&str, Ordered<Figure>> = BTreeMap::new();
    for ((level, direction), value) in values {
        levels
            .entry(level)
            .or_default()
            .push(direction, (*value).into());
    }
    Figure::Map(
        levels
            .into_iter()
            .map(|(level, directions)| (level.to_owned(), Figure::Map(directions)))
            .collect(),
    )
}

impl EnergyModel for NeuroMc {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn inputs(&self) -> Vec<Input> {
        Vec::new()
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        Some(Box::new(Fragments {
            version: self.version,
            told: HashMap::new(),
            ops: BTreeMap::new(),
            products: Vec::new(),
            calls: Vec::new(),
            backwards: HashMap::new(),
            epoch: 0,
            in_backward: false,
            trained: false,
        }))
    }

    fn stages(&self) -> Option<&'static [&'static str]> {
        Some(&["forward", "backward", "optimizer"])
    }

    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
        let fragments = given
            .followed
            .map(|followed| followed.kept::<Vec<(Fragment, i128)>>().flatten())
            .into_iter()
            .flatten();
        let mut sums = Sums::default();
        let (mut macs, mut mac_pj, mut base_pj, mut extra_pj, mut compute_pj) =
            (0, 0.0, 0.0, 0.0, 0.0);
        for (fragment, times) in fragments {
            let repeated = float(*times);
            let operations = fragment.operations();
            let (base, extra) = (self.base(fragment), self.extra(fragment));
            let mac_cost = if CORES.contains(&fragment.core) {
                self.file.cost(&format!("e_mac_{}_pj", fragment.core))
            } else {
                0.0
            };
            let own_macs = float(fragment.macs) * mac_cost * repeated;
            let own_compute: f64 = OPERATIONS
                .iter()
                .zip(operations)
                .map(|(name, count)| float(count) * self.file.cost(&format!("e_{name}_pj")))
                .sum::<f64>()
                * repeated;
            let (own_base, own_extra) = (base.total_pj() * repeated, extra.total_pj() * repeated);
            let total = own_macs + own_compute + own_base + own_extra;
            macs += fragment.macs * times;
            mac_pj += own_macs;
            compute_pj += own_compute;
            base_pj += own_base;
            extra_pj += own_extra;
            let keys = [
                (&mut sums.by_stage, fragment.stage),
                (&mut sums.by_op, fragment.op.as_str()),
                (&mut sums.by_core, fragment.core),
                (&mut sums.by_process, fragment.process.key()),
            ];
            for (map, key) in keys {
                *map.entry(key.to_owned()).or_default() += total;
            }
            for (map, key) in [
                (&mut sums.operations_by_stage, fragment.stage),
                (&mut sums.operations_by_op, fragment.op.as_str()),
            ] {
                let counts = map.entry(key.to_owned()).or_default();
                for (count, more) in counts.iter_mut().zip(operations) {
                    *count += more * times;
                }
            }
            let [mux, add, mul, comp, sqrt] = operations;
            for (map, key) in [
                (&mut sums.counts_by_core, fragment.core),
                (&mut sums.counts_by_process, fragment.process.key()),
            ] {
                let counts = map.entry(key.to_owned()).or_default();
                let more = [1, fragment.macs, mux, add, mul, comp, sqrt];
                for (count, more) in counts.iter_mut().zip(more) {
                    *count += more * times;
                }
            }
            for part in [base, extra] {
                for (place, bits) in part.bits {
                    *sums.traffic.bits.entry(place).or_default() += bits * times;
                }
                for (place, energy) in part.energy_pj {
                    *sums.traffic.energy_pj.entry(place).or_default() += energy * repeated;
                }
            }
        }
        Ok(self.written(given, &sums, [mac_pj, compute_pj, base_pj, extra_pj], macs))
    }
}

impl NeuroMc {
    fn written(
        &self,
        given: &Given<'_>,
        sums: &Sums,
        [mac_pj, extra_compute_pj, base_pj, extra_pj]: [f64; 4],
        macs: i128,
    ) -> EnergyReport {
        let (compute_pj, memory_pj) = (mac_pj + extra_compute_pj, base_pj + extra_pj);
        let operations = |map: &BTreeMap<String, [i128; 5]>| {
            Figure::Map(
                map.iter()
                    .map(|(name, counts)| (name.clone(), Figure::Map(named(OPERATIONS, counts))))
                    .collect(),
            )
        };
        let counts = |map: &BTreeMap<String, [i128; 7]>| {
            const NAMES: [&str; 7] = ["fragments", "mac", "mux", "add", "mul", "comp", "sqrt"];
            Figure::Map(
                map.iter()
                    .map(|(name, counts)| (name.clone(), Figure::Map(named(NAMES, counts))))
                    .collect(),
            )
        };
        let mut totals = [0; 5];
        for counts in sums.operations_by_stage.values() {
            for (total, count) in totals.iter_mut().zip(counts) {
                *total += count;
            }
        }
        let mut totals = named(OPERATIONS, &totals);
        totals.push("mac", Figure::Integer(macs));
        let mut primitives: Ordered<Figure> = Ordered::default();
        primitives.push("totals", Figure::Map(totals));
        primitives.push("by_stage", operations(&sums.operations_by_stage));
        primitives.push("by_op", operations(&sums.operations_by_op));
        if self.version == Version::June2026 {
            primitives.push("core_type", "fp_soma".into());
        }
        let mut by_memory: BTreeMap<String, i128> = BTreeMap::new();
        for ((level, _), bits) in &sums.traffic.bits {
            *by_memory.entry((*level).to_owned()).or_default() += bits;
        }
        let mut report = EnergyReport::new(compute_pj + memory_pj, given);
        report.field("energy_total_pj", report.total_pj);
        report.field("energy_compute_pj", compute_pj);
        report.field("energy_memory_pj", memory_pj);
        report.field("energy_mac_pj", mac_pj);
        report.field("energy_base_memory_pj", base_pj);
        report.field("energy_extra_memory_pj", extra_pj);
        report.field("energy_extra_compute_pj", extra_compute_pj);
        report.field("energy_by_stage", figures(&sums.by_stage));
        report.field("energy_by_op", figures(&sums.by_op));
        report.field("energy_by_core_type", figures(&sums.by_core));
        report.field("energy_by_process_key", figures(&sums.by_process));
        report.field(
            "energy_by_memory_level_dir",
            by_level(&sums.traffic.energy_pj),
        );
        report.field("counts_by_core_type", counts(&sums.counts_by_core));
        report.field("counts_by_process_key", counts(&sums.counts_by_process));
        report.field("primitive_counts", Figure::Map(primitives));
        report.field(
            "memory_bits_by_level",
            [
                ("preset_name", Figure::from("neuromc_like_v1")),
                ("totals", figures(&by_memory)),
                ("by_level_dir", by_level(&sums.traffic.bits)),
            ],
        );
        report.boundary = "multiply-accumulates, further operations and register and SRAM traffic of layers and neurons, forward, \
                           backward and update; DRAM and network on chip are free, as in the paper; the loss is left out";
        report.configure(&self.file);
        report
    }
}

/// A product that an op computed.
struct Product {
    shown: String,
    stage: &'static str,
    x: Vec<i64>,
    y: Vec<i64>,
    out: Vec<i64>,
    x_learns: bool,
    y_learns: bool,
    spikes: bool,
    /// In a root module or in the backward pass.
    inside: bool,
}

/// An op and the shapes of its first factor and its result.
type OpAndShapes<'p> = (&'p str, &'p [i64], &'p [i64]);

/// A module's call, with what was known.
struct Layer {
    ordinal: u64,
    module: ModuleId,
    input: TensorRef,
    output: TensorRef,
    spikes: bool,
    learns: bool,
}

/// Collects fragments.
struct Fragments {
    version: Version,
    told: HashMap<ModuleId, Kind>,
    /// Ops by whether they ran in a root module or in the backward pass, and how often.
    ops: BTreeMap<(bool, String), u64>,
    products: Vec<Product>,
    calls: Vec<Layer>,
    /// When the backward pass came to a module, once per pass.
    backwards: HashMap<ModuleId, Vec<(u64, u64)>>,
    epoch: u64,
    in_backward: bool,
    trained: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Convolution,
    Linear,
    BatchNorm,
    Neuron,
    Other,
}

impl Kind {
    fn of(world: &World<'_>, module: ModuleId) -> Self {
        let is = |class: &&str| world.is(module, class);
        if CONVOLUTIONS.iter().any(is) {
            Self::Convolution
        } else if is(&LINEAR) {
            Self::Linear
        } else if BATCH_NORMS.iter().any(is) {
            Self::BatchNorm
        } else if is(&BASE_NODE) {
            Self::Neuron
        } else {
            Self::Other
        }
    }
}

const IGNORED: [&str; 14] = [
    "aten.detach",
    "aten.view",
    "aten.t.default",
    "aten.transpose",
    "aten.permute",
    "aten.expand",
    "aten.slice",
    "aten.select",
    "aten.alias",
    "aten._unsafe_view",
    "aten.as_strided",
    "aten.clone",
    "aten.copy_",
    "profiler.",
];
const IGNORED_SINCE_2_0_0: [&str; 3] = ["aten.unsqueeze", "aten.squeeze", "aten.unbind"];
const MAPPED: [&str; 6] = [
    "aten.convolution.default",
    "aten.addmm.default",
    "aten.mm.default",
    "aten.bmm.default",
    "aten.native_batch_norm.default",
    "aten.native_batch_norm_backward.default",
];

/// Ops that upstream takes for a part of what modules do.
fn is_auxiliary(shown: &str) -> bool {
    let Some((name, overload)) = shown
        .strip_prefix("aten.")
        .and_then(|op| op.split_once('.'))
    else {
        return false;
    };
    matches!(
        (name, overload),
        (
            "all"
                | "_local_scalar_dense"
                | "lift_fresh"
                | "_to_copy"
                | "cat"
                | "stack"
                | "full_like"
                | "mse_loss"
                | "mse_loss_backward"
                | "sqrt"
                | "sqrt_"
                | "rsqrt"
                | "sigmoid"
                | "sigmoid_"
                | "sum"
                | "logical_and"
                | "logical_or"
                | "logical_xor"
                | "logical_not"
                | "new_empty_strided"
                | "ones_like"
                | "zeros_like",
            "default"
        ) | (
            "add"
                | "add_"
                | "sub"
                | "sub_"
                | "rsub"
                | "mul"
                | "mul_"
                | "div"
                | "div_"
                | "eq"
                | "ne"
                | "lt"
                | "le"
                | "gt"
                | "ge",
            "Tensor" | "Scalar"
        ) | ("where", "self" | "ScalarOther" | "ScalarSelf")
            | ("empty", "memory_format")
            | ("split" | "index", "Tensor")
            | ("sum", "dim_IntList")
            | ("mean", "dim")
    )
}

impl Simulation for Fragments {
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let row = &call.row;
        let backward = row.signature.stage == Stage::Backward;
        if backward {
            self.trained = true;
            for module in call.modules {
                let passes = self.backwards.entry(*module).or_default();
                if passes.last().is_none_or(|(epoch, _)| *epoch != self.epoch) {
                    passes.push((self.epoch, call.ordinal));
                }
            }
        } else if self.in_backward && row.signature.stage == Stage::Forward {
            self.epoch += 1;
        }
        if backward || row.signature.stage == Stage::Forward {
            self.in_backward = backward;
        }
        let inside = matches!(
            row.signature.stage,
            Stage::Forward | Stage::Backward | Stage::Recompute
        );
        *self.ops.entry((inside, call.shown.to_owned())).or_default() += 1;
        let again = backward && row.signature.flags & call_flags::GRAD_MODE != 0;
        if again && self.version >= Version::V2_0_0 {
            return Ok(());
        }
        let (x, y, name) = match call.shown {
            "aten.mm.default" | "aten.bmm.default" => (0, 1, "self"),
            "aten.addmm.default" => (1, 2, "mat1"),
            "aten.convolution.default" if !backward => (0, 1, "input"),
            "aten.native_batch_norm.default" if !backward => (0, 0, "input"),
            "aten.native_batch_norm_backward.default" => (0, 0, "grad_out"),
            _ => return Ok(()),
        };
        let (x, y) = (row.tensor_at(x)?, row.tensor_at(y)?);
        let shape = |t: &TensorView<'_>| t.meta.shape.clone();
        let learns = |t: &TensorView<'_>| {
            call.tensors
                .get(usize::from(t.index))
                .is_some_and(|tensor| world.requires_grad(*tensor))
        };
        // What a batch norm's gradient was given is no tensor any more when upstream asks whether it is made of spikes.
        let spikes = x.elements() > 0
            && name != "grad_out"
            && (x.meta.dtype == DType::BOOL || row.binary(name, row.seen_after(name))?);
        self.products.push(Product {
            shown: call.shown.to_owned(),
            stage: if backward { "backward" } else { "forward" },
            x: shape(&x),
            y: shape(&y),
            out: row
                .optional_output(0)
                .map_or_else(|| vec![0], |out| shape(&out)),
            x_learns: learns(&x),
            y_learns: learns(&y),
            spikes,
            inside,
        });
        Ok(())
    }

    fn module_call(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let kind = *self
            .told
            .entry(call.module)
            .or_insert_with(|| Kind::of(world, call.module));
        if kind == Kind::Other {
            return Ok(());
        }
        let (input, output) = ends(world, call)?;
        let known = world.known(input.content);
        let spikes = match known.binary {
            _ if kind == Kind::Neuron => false,
            _ if input.meta.dtype == DType::BOOL => true,
            _ if input.meta.elements() == 0 => false,
            Some(binary) => binary,
            None => return Err(missing_values(world, call.module, "input")),
        };
        self.calls.push(Layer {
            ordinal: call.ordinal,
            module: call.module,
            input: input.clone(),
            output: output.clone(),
            spikes,
            learns: input.meta.is(tensor_flags::REQUIRES_GRAD),
        });
        Ok(())
    }

    fn finish(&mut self, world: &World<'_>, out: &mut Amounts) -> Result<(), RuleError> {
        let exact = match self.version {
            Version::June2026 => "Exact NeuroMC runtime",
            Version::V2_0_0 => "NeuroMC runtime",
        };
        let refuse = |text: String| Err(RuleError::Failed(format!("ValueError: {text}")));
        for &root in world.roots() {
            for (_, module) in world.named_modules(root) {
                if world.is(module, CONVOLUTIONS[2]) {
                    return refuse(format!("{exact} does not support nn.Conv3d yet."));
                }
            }
        }
        let mut fragments: BTreeMap<Fragment, i128> = BTreeMap::new();
        let convolutions = self.modules(world, &mut fragments)?;
        let existing: HashSet<Fragment> = fragments.keys().map(Fragment::overlaps).collect();
        let trained = self.trained;
        for fragment in self.of_products(world, exact)? {
            if !existing.contains(&fragment.overlaps()) {
                *fragments.entry(fragment).or_default() += 1;
            }
        }
        let unsupported: Vec<String> = self
            .unsupported(convolutions)
            .into_iter()
            .map(|(op, calls)| format!("{op} (calls={calls})"))
            .take(30)
            .collect();
        if !unsupported.is_empty() {
            let list = unsupported.join(", ");
            return refuse(format!("{exact} does not support these aten ops: {list}"));
        }
        if trained {
            for step in 0..world.optimizer_steps() {
                for fragment in optimizer(world, step, exact)? {
                    *fragments.entry(fragment).or_default() += 1;
                }
            }
        }
        if fragments.is_empty() {
            return refuse("No NeuroMC-supported runtime fragments were recognized.".to_owned());
        }
        out.keep(fragments.into_iter().collect::<Vec<_>>());
        Ok(())
    }
}

impl Fragments {
    /// Ops on none of the lists. In training only what models and the backward pass run is looked at.
    fn unsupported(&self, convolution_backwards: u64) -> BTreeMap<&str, u64> {
        let mut found: BTreeMap<&str, u64> = BTreeMap::new();
        for ((inside, op), calls) in &self.ops {
            let since = &IGNORED_SINCE_2_0_0;
            let ignored = IGNORED.iter().any(|begin| op.starts_with(begin))
                || (self.version >= Version::V2_0_0
                    && since.iter().any(|begin| op.starts_with(begin)));
            let mapped = MAPPED.contains(&op.as_str());
            if (*inside || !self.trained) && !ignored && !mapped && !is_auxiliary(op) {
                *found.entry(op).or_default() += calls;
            }
        }
        let backward = "aten.convolution_backward.default";
        if self.version >= Version::V2_0_0
            && found
                .get(backward)
                .is_some_and(|n| *n <= convolution_backwards)
        {
            found.remove(backward);
        }
        found
    }

    /// Fragments of modules; and how many calls of convolutions the backward pass came to.
    fn modules(
        &mut self,
        world: &World<'_>,
        fragments: &mut BTreeMap<Fragment, i128>,
    ) -> Result<u64, RuleError> {
        self.calls.sort_by_key(|call| call.ordinal);
        let mut by_module: HashMap<ModuleId, Vec<&Layer>> = HashMap::new();
        let mut convolutions = 0;
        for call in &self.calls {
            *fragments.entry(self.forward(world, call)?).or_default() += 1;
            by_module.entry(call.module).or_default().push(call);
        }
        for (module, calls) in by_module {
            let mut waiting = calls.as_slice();
            for (_, from) in self.backwards.get(&module).into_iter().flatten() {
                let (due, rest) =
                    waiting.split_at(waiting.partition_point(|call| call.ordinal < *from));
                waiting = rest;
                for call in due {
                    // June's rules know the last input of a module only.
                    let remembered = match self.version {
                        Version::June2026 => due.last().copied().unwrap_or(call),
                        Version::V2_0_0 => call,
                    };
                    let made = self.backward(world, call, remembered)?;
                    if self.told.get(&module) == Some(&Kind::Convolution) {
                        convolutions += 1;
                    }
                    for fragment in made {
                        *fragments.entry(fragment).or_default() += 1;
                    }
                }
            }
        }
        Ok(convolutions)
    }

    fn forward(&self, world: &World<'_>, call: &Layer) -> Result<Fragment, RuleError> {
        let state = facts(world, call.module)?;
        let elements = |t: &TensorRef| i128::from(t.meta.elements());
        let (x, y) = (elements(&call.input), elements(&call.output));
        let core = if call.spikes { "fp_soma" } else { "ann_fe" };
        let bits = if call.spikes { 1 } else { 16 };
        Ok(match self.told.get(&call.module) {
            Some(Kind::Neuron) => {
                let layout = layout(state, &call.output.meta.shape)?;
                let loops = layout.channelwise();
                Fragment::other(
                    "forward",
                    "soma.forward",
                    "fp_soma",
                    Process::Soma,
                    loops,
                    1,
                    [x, 0, y],
                )
            }
            Some(Kind::BatchNorm) => {
                let layout = layout(state, &call.input.meta.shape)?;
                let core = if call.spikes { "fp_bn" } else { "ann_bn" };
                let loops = layout.channelwise();
                let elements = [x, layout.channels * 2, y];
                Fragment::other(
                    "forward",
                    "bn.forward",
                    core,
                    Process::BatchNorm,
                    loops,
                    16,
                    elements,
                )
            }
            Some(Kind::Linear) => {
                let loops = linear_loops(world, call.module, state, &call.input.meta.shape)?;
                let weight = weight(world, call.module, state)?;
                Fragment::product(
                    "forward",
                    "linear.forward",
                    core,
                    loops,
                    bits,
                    [x, weight, y],
                )
            }
            _ => {
                let loops = convolution_loops(world, call.module, state, &call.output.meta.shape)?;
                let weight = weight(world, call.module, state)?;
                Fragment::product("forward", "conv.forward", core, loops, bits, [x, weight, y])
            }
        })
    }

    fn backward(
        &self,
        world: &World<'_>,
        call: &Layer,
        remembered: &Layer,
    ) -> Result<Vec<Fragment>, RuleError> {
        let state = facts(world, call.module)?;
        let elements = |t: &TensorRef| i128::from(t.meta.elements());
        let (x, y) = (elements(&call.input), elements(&call.output));
        let shape = &call.output.meta.shape;
        let spikes = remembered.spikes;
        let (name, loops) = match self.told.get(&call.module) {
            Some(Kind::Neuron) => {
                let tensor = if call.learns {
                    &call.input
                } else {
                    &call.output
                };
                let loops = layout(state, &tensor.meta.shape)?.channelwise();
                let sizes = [y, 0, elements(tensor)];
                return Ok(vec![Fragment::other(
                    "backward",
                    "soma.backward",
                    "bp_grad",
                    Process::Soma,
                    loops,
                    16,
                    sizes,
                )]);
            }
            Some(Kind::BatchNorm) => {
                let layout = layout(state, shape)?;
                let core = if spikes { "bp_bn" } else { "ann_bn_bp" };
                let sizes = [y, layout.channels * 2, if call.learns { x } else { y }];
                return Ok(vec![Fragment::other(
                    "backward",
                    "bn.backward",
                    core,
                    Process::BatchNorm,
                    layout.channelwise(),
                    16,
                    sizes,
                )]);
            }
            Some(Kind::Linear) => ("linear", linear_loops(world, call.module, state, shape)?),
            _ => ("conv", convolution_loops(world, call.module, state, shape)?),
        };
        let weight = weight(world, call.module, state)?;
        let mut made = Vec::new();
        if call.learns {
            let core = if spikes { "bp_grad" } else { "ann_be" };
            let name = format!("{name}.backward.grad_input");
            made.push(Fragment::product(
                "backward",
                &name,
                core,
                loops,
                16,
                [y, weight, x],
            ));
        }
        let parameters = state.facts.get("parameters").and_then(Value::as_array);
        let trains = parameters.into_iter().flatten().any(|p| {
            p.get("name").and_then(Value::as_str) == Some("weight")
                && p.get("requires_grad").and_then(Value::as_bool) == Some(true)
        });
        if trains {
            let core = if spikes { "wg" } else { "ann_we" };
            let bits = if spikes { 1 } else { 16 };
            let name = format!("{name}.backward.grad_weight");
            let sizes = [elements(&remembered.input), y, weight];
            made.push(Fragment::product(
                "backward", &name, core, loops, bits, sizes,
            ));
        }
        Ok(made)
    }

    /// Fragments of products, in the order of the ops.
    fn of_products(&self, world: &World<'_>, exact: &str) -> Result<Vec<Fragment>, RuleError> {
        let refuse = |text: &str| Err(RuleError::Failed(format!("ValueError: {exact} {text}")));
        let parameters = self.trained_shapes(world);
        let mut seen: HashMap<OpAndShapes<'_>, Vec<bool>> = HashMap::new();
        let mut made = Vec::new();
        for product in self.products.iter().filter(|p| p.inside || !self.trained) {
            let size = |shape: &[i64]| shape.iter().map(|&s| i128::from(s)).product::<i128>();
            let at = |shape: &[i64], at: usize| i128::from(shape.get(at).copied().unwrap_or(1));
            let last = |shape: &[i64]| i128::from(shape.last().copied().unwrap_or(1));
            let (x, y, out) = (&product.x[..], &product.y[..], &product.out[..]);
            let sizes = [size(x), size(y), size(out)];
            let op = product.shown.as_str();
            let bits = if product.spikes { 1 } else { 16 };
            let forward = product.stage == "forward";
            if op == MAPPED[0] {
                if x.len() > 4 || out.len() > 4 {
                    return refuse("does not support multi-step or 3D Conv trace fallback yet.");
                }
                let core = if product.spikes { "fp_soma" } else { "ann_fe" };
                let loops = Loops::new(
                    [1, at(x, 0)],
                    [at(x, 1), at(out, 1)],
                    [at(out, 2), at(out, 3)],
                    [at(y, 2), at(y, 3)],
                );
                made.push(Fragment::product(
                    product.stage,
                    op,
                    core,
                    loops,
                    bits,
                    sizes,
                ));
                continue;
            }
            if op.contains("batch_norm") {
                let forward = op == MAPPED[4];
                if forward && x.len() > 4 {
                    let what = "does not support multi-step or 3D BatchNorm trace fallback yet.";
                    return refuse(what);
                }
                let (name, core) = match (forward, product.spikes) {
                    (true, true) => ("bn.forward", "fp_bn"),
                    (true, false) => ("bn.forward", "ann_bn"),
                    (false, _) => ("bn.backward", "ann_bn_bp"),
                };
                let layout = layout(&ModuleState::default(), x)?;
                let sizes = [size(x), layout.channels * 2, size(out)];
                let loops = layout.channelwise();
                let norm = Process::BatchNorm;
                made.push(Fragment::other(
                    product.stage,
                    name,
                    core,
                    norm,
                    loops,
                    16,
                    sizes,
                ));
                continue;
            }
            let matrix = x.len() == 2;
            let rows = if matrix {
                at(x, 0)
            } else {
                at(x, 0) * at(x, 1)
            };
            let plain = Loops::new([1, rows], [last(x), last(y)], [1, 1], [1, 1]);
            if forward {
                seen.entry((op, x, out)).or_default().push(product.spikes);
                let core = if product.spikes { "fp_soma" } else { "ann_fe" };
                made.push(Fragment::product(
                    product.stage,
                    op,
                    core,
                    plain,
                    bits,
                    sizes,
                ));
                continue;
            }
            let of_weight = match (product.x_learns, product.y_learns) {
                (true, false) => true,
                (false, true) => false,
                _ => parameters.contains(out),
            };
            if of_weight {
                let depth = if matrix { last(x) } else { at(x, 0) * last(x) };
                let channels = at(x, usize::from(!matrix));
                let loops = Loops::new([1, depth], [channels, last(y)], [1, 1], [1, 1]);
                let core = if product.spikes { "wg" } else { "ann_we" };
                made.push(Fragment::product(
                    product.stage,
                    op,
                    core,
                    loops,
                    bits,
                    sizes,
                ));
            } else {
                let other = match op {
                    "aten.addmm.default" => "aten.mm.default",
                    "aten.mm.default" => "aten.addmm.default",
                    _ => "",
                };
                let mut last_of = |op| seen.get_mut(&(op, out, x)).and_then(Vec::pop);
                let spikes = last_of(op).or_else(|| last_of(other)).unwrap_or(false);
                let core = if spikes { "bp_grad" } else { "ann_be" };
                made.push(Fragment::product(product.stage, op, core, plain, 16, sizes));
            }
        }
        Ok(made)
    }

    /// Shapes of parameters that learn. When June's rules ask for them, they have let go of the model.
    fn trained_shapes(&self, world: &World<'_>) -> HashSet<Vec<i64>> {
        if self.version == Version::June2026 {
            return HashSet::new();
        }
        let modules = world.roots().iter().flat_map(|r| world.named_modules(*r));
        modules
            .filter_map(|(_, module)| world.module(module)?.facts.get("parameters")?.as_array())
            .flatten()
            .filter(|p| p.get("requires_grad").and_then(Value::as_bool) == Some(true))
            .filter_map(|p| {
                p.get("shape")?
                    .as_array()?
                    .iter()
                    .map(Value::as_i64)
                    .collect()
            })
            .collect()
    }
}

fn facts<'w>(world: &'w World<'_>, module: ModuleId) -> Result<&'w ModuleState, RuleError> {
    world
        .module(module)
        .ok_or_else(|| missing_fact(world, module, "facts"))
}

fn weight(world: &World<'_>, module: ModuleId, state: &ModuleState) -> Result<i128, RuleError> {
    state
        .parameter_elements("weight")
        .ok_or_else(|| missing_fact(world, module, "weight"))
}

/// Time steps, samples, channels and the rest of a tensor.
struct Layout {
    steps: i128,
    batch: i128,
    channels: i128,
    spatial: Vec<i128>,
}

impl Layout {
    fn channelwise(&self) -> Loops {
        let sites = self.spatial.iter().product::<i128>();
        let channels = [self.channels; 2];
        Loops::new([self.steps, self.batch], channels, [sites, 1], [1, 1])
    }
}

fn layout(state: &ModuleState, shape: &[i64]) -> Result<Layout, RuleError> {
    let sizes: Vec<i128> = shape.iter().map(|&s| i128::from(s)).collect();
    let (steps, rest) = match (state.is_multi_step(), sizes.as_slice()) {
        (true, [steps, rest @ ..]) if rest.len() >= 2 => (*steps, rest),
        (true, _) => {
            return Err(RuleError::Failed(format!(
                "ValueError: Expected multi-step tensor with shape [T, N, C, ...], got {shape:?}."
            )));
        }
        (false, all) => (1, all),
    };
    Ok(match rest {
        [batch, channels, spatial @ ..] => Layout {
            steps,
            batch: *batch,
            channels: *channels,
            spatial: spatial.to_vec(),
        },
        _ => Layout {
            steps,
            batch: rest.first().copied().unwrap_or(1),
            channels: rest.iter().product(),
            spatial: Vec::new(),
        },
    })
}

fn linear_loops(
    world: &World<'_>,
    module: ModuleId,
    state: &ModuleState,
    shape: &[i64],
) -> Result<Loops, RuleError> {
    let layout = layout(state, shape)?;
    let fact = |name: &str| {
        state
            .integer(name)
            .ok_or_else(|| missing_fact(world, module, name))
    };
    let features = [fact("in_features")?, fact("out_features")?];
    Ok(Loops::new(
        [layout.steps, layout.batch],
        features,
        [1, 1],
        [1, 1],
    ))
}

fn convolution_loops(
    world: &World<'_>,
    module: ModuleId,
    state: &ModuleState,
    out: &[i64],
) -> Result<Loops, RuleError> {
    let layout = layout(state, out)?;
    let missing = |name: &str| missing_fact(world, module, name);
    let fact = |name: &str| state.integer(name).ok_or_else(|| missing(name));
    let kernel = state
        .integers("kernel_size")
        .ok_or_else(|| missing("kernel_size"))?;
    let two = |sizes: &[i128]| [0, 1].map(|at| sizes.get(at).copied().unwrap_or(1));
    Ok(Loops::new(
        [layout.steps, layout.batch],
        [fact("in_channels")?, fact("out_channels")?],
        two(&layout.spatial),
        two(&kernel),
    ))
}

/// Fragments of one step of every optimizer.
fn optimizer(world: &World<'_>, step: u64, exact: &str) -> Result<Vec<Fragment>, RuleError> {
    let refuse = |text: String| Err(RuleError::Failed(format!("ValueError: {text}")));
    let mut made = Vec::new();
    for number in 0.. {
        let Some(about) = world.program(&format!("optimizer.{number}")) else {
            break;
        };
        let classes: Vec<&str> = about
            .get("classes")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let is = |name: &str| {
            classes
                .iter()
                .any(|class| class.starts_with("torch.optim.") && class.ends_with(name))
        };
        let groups: Vec<(&Value, &Value)> = (0..)
            .map_while(|group| {
                let key = format!("optimizer.{number}.group.{group}");
                Some((
                    world.program(&key)?,
                    world.program(&format!("{key}.parameters"))?,
                ))
            })
            .collect();
        let own = classes.first().copied().unwrap_or_default();
        let own = own.rsplit('.').next().unwrap_or(own);
        // Elements of small parameters (scales, biases) and of weights, by momentum and weight decay.
        let mut elements: BTreeMap<(bool, bool, bool), i128> = BTreeMap::new();
        for (group, parameters) in &groups {
            let flag = |key: &str| group.get(key).and_then(Value::as_bool).unwrap_or(false);
            let number = |key: &str| group.get(key).and_then(Value::as_f64).unwrap_or(0.0);
            if is("SGD") {
                let only = format!("{exact} SGD modeling currently supports only");
                let only = only.replace("Exact NeuroMC runtime SGD", "Exact NeuroMC SGD");
                if flag("nesterov") {
                    return refuse(format!("{only} nesterov=False."));
                }
                if number("dampening") != 0.0 {
                    return refuse(format!("{only} dampening=0."));
                }
                if flag("maximize") {
                    return refuse(format!("{only} maximize=False."));
                }
            }
            let shapes = parameters.get("shape").and_then(Value::as_array);
            for shape in shapes.into_iter().flatten().filter_map(Value::as_array) {
                let count: i128 = shape
                    .iter()
                    .map(|s| i128::from(s.as_i64().unwrap_or(0)))
                    .product();
                let key = (
                    shape.len() <= 1,
                    is("SGD") && number("momentum") > 0.0,
                    is("SGD") && number("weight_decay") > 0.0,
                );
                *elements.entry(key).or_default() += count;
            }
        }
        let of = |op: &str, small: i128, large: i128| {
            let loops = Loops {
                outputs: small,
                channels: 1,
                kernel_width: large,
                ..Loops::new([1, 1], [1, 1], [1, 1], [1, 1])
            };
            let sizes = [small, large, small + large];
            Fragment {
                bits: [32; 3],
                ..Fragment::other(
                    "optimizer",
                    op,
                    "bp_grad_opt",
                    Process::Optimizer,
                    loops,
                    32,
                    sizes,
                )
            }
        };
        if is(".Adam") || is(".AdamW") {
            let sum = |small: bool| {
                elements
                    .iter()
                    .filter(|(key, _)| key.0 == small)
                    .map(|(_, n)| n)
                    .sum()
            };
            made.push(of(&own.to_lowercase(), sum(true), sum(false)));
        } else if is(".SGD") {
            for ((small, momentum, weight_decay), count) in elements {
                if count > 0 {
                    let (small, large) = if small { (count, 0) } else { (0, count) };
                    made.push(Fragment {
                        momentum,
                        weight_decay,
                        momentum_buffer: momentum && step + world.earlier_optimizer_steps() > 0,
                        ..of("sgd", small, large)
                    });
                }
            }
        } else {
            let exact = exact.replace("Exact NeuroMC runtime", "Exact NeuroMC");
            return refuse(format!(
                "{exact} optimizer modeling only supports Adam/AdamW and common SGD (nesterov=False, dampening=0, \
                 maximize=False); got {own}."
            ));
        }
    }
    Ok(made)
}
