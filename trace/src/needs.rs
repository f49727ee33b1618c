//! The table of needs: which statistics capture takes of which operand, so that the rules of replay can
//! count. It is data that both sides share; a test in replay proves that the built-in rules need nothing
//! beyond it.

use crate::statistics::When;

/// Version of [`RULES`] and [`FULL`]; written into every trace.
/// 2: also the overloads that write to `out`, `addbmm_`, `addmv_`. 3: [`FULL`]. 4: of spiking neurons, [`FULL`] takes nonzeros
/// without sums, in the backward pass too.
pub const NEEDS_VERSION: u32 = 4;

/// What a recording by one preset holds: the levels of statistics (`docs/levels.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PresetLevels {
    /// As traces spell it ([`RunInfo::statistics`](crate::RunInfo)).
    pub name: &'static str,
    /// The flags of `optape record` that ask for it.
    pub flag: &'static str,
    /// The levels that it takes of every op call that a rule needs them of.
    pub levels: &'static [&'static str],
}

/// Asks for the statistics that mac, ac, synop and firing rates need.
pub const RULES_FLAG: &str = "--stats rules";
/// Asks for the statistics of every tensor.
pub const ALL_FLAG: &str = "--stats all";
/// Asks for what the energy models need beyond that.
pub const FULL_FLAG: &str = "--level full";

/// The presets, from the least to the most; `all` and `full` each have what the other has not: `all` the values of every tensor,
/// `full` the rest of the levels.
pub const PRESETS: &[PresetLevels] = &[
    PresetLevels {
        name: "none",
        flag: "--stats none",
        levels: &["T0"],
    },
    PresetLevels {
        name: "rules",
        flag: RULES_FLAG,
        levels: &["T0", "T1", "T2", "T4"],
    },
    PresetLevels {
        name: "all",
        flag: ALL_FLAG,
        levels: &["T0", "T1", "T2", "T4"],
    },
    PresetLevels {
        name: "full",
        flag: FULL_FLAG,
        levels: &["T0", "T1", "T2", "T3", "T4", "T5", "T6"],
    },
];

/// The preset that a trace says it was recorded with.
#[must_use]
pub fn preset(name: &str) -> Option<&'static PresetLevels> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// Every level that some preset takes, in order, with the flag of the least preset that does.
#[must_use]
pub fn levels() -> Vec<(&'static str, &'static str)> {
    let mut all: Vec<(&str, &str)> = Vec::new();
    for preset in PRESETS {
        for level in preset.levels {
            if !all.iter().any(|(known, _)| known == level) {
                all.push((level, preset.flag));
            }
        }
    }
    all.sort_unstable();
    all
}

/// What is needed of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Need {
    /// Binary or not; the nonzeros if it is. Stops at the first element that is neither 0 nor 1.
    Binary,
    /// Binary or not, and the nonzeros either way.
    Nonzeros,
    /// Binary or not, nonzeros, sum.
    Sum,
}

/// A call that multiplies two factors: what T2 and T4 are taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Product {
    /// `[m, k] x [k, n]`, or batched with the same leading dimension.
    Matrix,
    /// `x @ weight^T`, any leading dimensions (`linear`).
    Linear,
    /// `torch.matmul`: broadcasting, 1-dimensional operands.
    Broadcast,
    /// `aten::convolution`: stride, padding, dilation, transposed, output_padding, groups by name.
    Convolution,
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpNeeds {
    /// `aten::add.Tensor`.
    pub op: &'static str,
    /// (argument name, need) of the tensors looked at before the op, and, where the op writes them, again after.
    pub arguments: &'static [(&'static str, Need)],
    /// (index of the return value, need), looked at after the op.
    pub returns: &'static [(usize, Need)],
    /// The two factors, and which product they form: exact sums where both are binary (T4), and for convolutions
    /// fan-out-weighted statistics of the first (T2).
    pub product: Option<(&'static str, &'static str, Product)>,
}

const fn product(
    op: &'static str,
    arguments: &'static [(&'static str, Need)],
    a: &'static str,
    b: &'static str,
    kind: Product,
) -> OpNeeds {
    OpNeeds {
        op,
        arguments,
        returns: &[],
        product: Some((a, b, kind)),
    }
}

const fn elementwise(op: &'static str) -> OpNeeds {
    OpNeeds {
        op,
        arguments: &[("self", Need::Binary), ("other", Need::Binary)],
        returns: &[],
        product: None,
    }
}

const fn scaled(op: &'static str) -> OpNeeds {
    OpNeeds {
        op,
        arguments: &[("self", Need::Binary)],
        returns: &[],
        product: None,
    }
}

const MATRICES: &[(&str, Need)] = &[("self", Need::Binary), ("mat2", Need::Binary)];
const ADDED_MATRICES: &[(&str, Need)] = &[("mat1", Need::Binary), ("mat2", Need::Binary)];
const BATCHES: &[(&str, Need)] = &[("batch1", Need::Binary), ("batch2", Need::Binary)];
const LAYER: &[(&str, Need)] = &[("input", Need::Binary), ("weight", Need::Binary)];
const BROADCAST: &[(&str, Need)] = &[("self", Need::Binary), ("other", Need::Binary)];
const ADDED_VECTOR: &[(&str, Need)] = &[("mat", Need::Binary), ("vec", Need::Binary)];
const VECTOR: &[(&str, Need)] = &[("self", Need::Binary), ("vec", Need::Binary)];
const DOT: &[(&str, Need)] = &[("self", Need::Binary), ("tensor", Need::Binary)];

/// What mac, ac and synop need: the preset `rules`. Sorted by op.
pub const RULES: &[OpNeeds] = &[
    scaled("aten::add.Scalar"),
    scaled("aten::add.Scalar_out"),
    elementwise("aten::add.Tensor"),
    elementwise("aten::add.out"),
    scaled("aten::add_.Scalar"),
    elementwise("aten::add_.Tensor"),
    product("aten::addbmm", BATCHES, "batch1", "batch2", Product::Matrix),
    product(
        "aten::addbmm.out",
        BATCHES,
        "batch1",
        "batch2",
        Product::Matrix,
    ),
    product(
        "aten::addbmm_",
        BATCHES,
        "batch1",
        "batch2",
        Product::Matrix,
    ),
    product(
        "aten::addmm",
        ADDED_MATRICES,
        "mat1",
        "mat2",
        Product::Matrix,
    ),
    product(
        "aten::addmm.out",
        ADDED_MATRICES,
        "mat1",
        "mat2",
        Product::Matrix,
    ),
    product(
        "aten::addmm_",
        ADDED_MATRICES,
        "mat1",
        "mat2",
        Product::Matrix,
    ),
    product(
        "aten::addmv",
        ADDED_VECTOR,
        "mat",
        "vec",
        Product::Broadcast,
    ),
    product(
        "aten::addmv.out",
        ADDED_VECTOR,
        "mat",
        "vec",
        Product::Broadcast,
    ),
    product(
        "aten::addmv_",
        ADDED_VECTOR,
        "mat",
        "vec",
        Product::Broadcast,
    ),
    product(
        "aten::baddbmm",
        BATCHES,
        "batch1",
        "batch2",
        Product::Matrix,
    ),
    product(
        "aten::baddbmm.out",
        BATCHES,
        "batch1",
        "batch2",
        Product::Matrix,
    ),
    product(
        "aten::baddbmm_",
        BATCHES,
        "batch1",
        "batch2",
        Product::Matrix,
    ),
    product("aten::bmm", MATRICES, "self", "mat2", Product::Matrix),
    product("aten::bmm.out", MATRICES, "self", "mat2", Product::Matrix),
    product(
        "aten::conv1d",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv1d.padding",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv2d",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv2d.padding",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv3d",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv3d.padding",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv_transpose1d",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv_transpose2d.input",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::conv_transpose3d.input",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::convolution",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product(
        "aten::convolution.out",
        LAYER,
        "input",
        "weight",
        Product::Convolution,
    ),
    product("aten::dot", DOT, "self", "tensor", Product::Broadcast),
    product("aten::dot.out", DOT, "self", "tensor", Product::Broadcast),
    OpNeeds {
        op: "aten::einsum",
        arguments: &[("tensors", Need::Binary)],
        returns: &[],
        product: None,
    },
    product("aten::linear", LAYER, "input", "weight", Product::Linear),
    product(
        "aten::linear.out",
        LAYER,
        "input",
        "weight",
        Product::Linear,
    ),
    product(
        "aten::matmul",
        BROADCAST,
        "self",
        "other",
        Product::Broadcast,
    ),
    product(
        "aten::matmul.out",
        BROADCAST,
        "self",
        "other",
        Product::Broadcast,
    ),
    product("aten::mm", MATRICES, "self", "mat2", Product::Matrix),
    product("aten::mm.out", MATRICES, "self", "mat2", Product::Matrix),
    product("aten::mv", VECTOR, "self", "vec", Product::Broadcast),
    product("aten::mv.out", VECTOR, "self", "vec", Product::Broadcast),
    scaled("aten::rsub.Scalar"),
    scaled("aten::rsub.Scalar_out"),
    elementwise("aten::rsub.Tensor"),
    elementwise("aten::rsub.Tensor_out"),
    scaled("aten::sub.Scalar"),
    scaled("aten::sub.Scalar_out"),
    elementwise("aten::sub.Tensor"),
    elementwise("aten::sub.out"),
    scaled("aten::sub_.Scalar"),
    elementwise("aten::sub_.Tensor"),
    // A watched value (a spiking neuron's output, a user's watch) is what firing rates are made of.
    OpNeeds {
        op: "optape::watch",
        arguments: &[("value", Need::Sum)],
        returns: &[],
        product: None,
    },
];

/// What `rules` takes of every tensor argument of a function call (ops of [`FUNCTION_NAMESPACE`](crate::FUNCTION_NAMESPACE)):
/// what live tools ask at function level.
pub const FUNCTION: Need = Need::Binary;

/// The line of an op in [`RULES`].
#[must_use]
pub fn rules_need(op: &str) -> Option<&'static OpNeeds> {
    RULES
        .binary_search_by(|n| n.op.cmp(op))
        .ok()
        .and_then(|i| RULES.get(i))
}

/// Where a line of [`FULL`] holds. Elsewhere the op's line in [`RULES`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Within {
    /// Outside of the backward pass: the energy models that read these values are about inference.
    Forward,
    /// In the forward of a spiking neuron, and where autograd runs what it made.
    Neuron,
}

/// What the preset `full` takes of an op beyond [`RULES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoreNeeds {
    /// Where.
    pub within: Within,
    /// In the place of the line in [`RULES`].
    pub needs: OpNeeds,
}

const fn forward(
    op: &'static str,
    arguments: &'static [(&'static str, Need)],
    product: Option<(&'static str, &'static str, Product)>,
) -> MoreNeeds {
    MoreNeeds {
        within: Within::Forward,
        needs: OpNeeds {
            op,
            arguments,
            returns: &[(0, Need::Sum)],
            product,
        },
    }
}

const fn layer(op: &'static str) -> MoreNeeds {
    const ARGUMENTS: &[(&str, Need)] = &[("input", Need::Sum), ("weight", Need::Binary)];
    forward(
        op,
        ARGUMENTS,
        Some(("input", "weight", Product::Convolution)),
    )
}

const fn of_input(op: &'static str) -> MoreNeeds {
    const ARGUMENTS: &[(&str, Need)] = &[("input", Need::Sum)];
    forward(op, ARGUMENTS, None)
}

const fn of_self(op: &'static str) -> MoreNeeds {
    const ARGUMENTS: &[(&str, Need)] = &[("self", Need::Sum)];
    forward(op, ARGUMENTS, None)
}

const fn neuron(op: &'static str, arguments: &'static [(&'static str, Need)]) -> MoreNeeds {
    MoreNeeds {
        within: Within::Neuron,
        needs: OpNeeds {
            op,
            arguments,
            returns: &[],
            product: None,
        },
    }
}

const SUM_MATRICES: &[(&str, Need)] = &[("self", Need::Sum), ("mat2", Need::Binary)];
const SUM_ADDED: &[(&str, Need)] = &[("mat1", Need::Sum), ("mat2", Need::Binary)];
const SUM_BATCHES: &[(&str, Need)] = &[("batch1", Need::Sum), ("batch2", Need::Binary)];
const NONZEROS_OF_TWO: &[(&str, Need)] = &[("self", Need::Nonzeros), ("other", Need::Nonzeros)];
const NONZEROS_OF_ONE: &[(&str, Need)] = &[("self", Need::Nonzeros)];

/// What the energy models need beyond [`RULES`], sorted by op. Nonzeros and sums of what goes into layers and comes out of
/// them: Lemaire's sparse memory, Qualia's spike rates, sinabs' synaptic operations (which also count multiple spikes and
/// currents), NeuroMC's kinds of inputs. In neurons, what drives the state: SpikingJelly's neuron_state counts accesses by
/// the nonzeros of the tensors that meet it. Of factors that turn out to be binary T3 is taken, and of inputs of convolutions T5,
/// wherever the op runs: NeuroMC counts additions of the backward pass, too.
pub const FULL: &[MoreNeeds] = &[
    of_self("aten::_adaptive_avg_pool2d"),
    of_self("aten::_adaptive_avg_pool3d"),
    of_input("aten::_native_batch_norm_legit"),
    of_input("aten::_native_batch_norm_legit.no_stats"),
    neuron("aten::_to_copy", NONZEROS_OF_ONE),
    neuron("aten::add.Scalar", NONZEROS_OF_ONE),
    neuron("aten::add.Tensor", NONZEROS_OF_TWO),
    neuron("aten::add_.Scalar", NONZEROS_OF_ONE),
    neuron("aten::add_.Tensor", NONZEROS_OF_TWO),
    forward(
        "aten::addbmm",
        SUM_BATCHES,
        Some(("batch1", "batch2", Product::Matrix)),
    ),
    forward(
        "aten::addmm",
        SUM_ADDED,
        Some(("mat1", "mat2", Product::Matrix)),
    ),
    forward(
        "aten::addmm_",
        SUM_ADDED,
        Some(("mat1", "mat2", Product::Matrix)),
    ),
    forward(
        "aten::addmv",
        &[("mat", Need::Sum), ("vec", Need::Sum)],
        Some(("mat", "vec", Product::Broadcast)),
    ),
    of_self("aten::avg_pool2d"),
    of_self("aten::avg_pool3d"),
    forward(
        "aten::baddbmm",
        SUM_BATCHES,
        Some(("batch1", "batch2", Product::Matrix)),
    ),
    forward(
        "aten::baddbmm_",
        SUM_BATCHES,
        Some(("batch1", "batch2", Product::Matrix)),
    ),
    of_input("aten::batch_norm"),
    forward(
        "aten::bmm",
        SUM_MATRICES,
        Some(("self", "mat2", Product::Matrix)),
    ),
    neuron("aten::clone", NONZEROS_OF_ONE),
    layer("aten::conv1d"),
    layer("aten::conv1d.padding"),
    layer("aten::conv2d"),
    layer("aten::conv2d.padding"),
    layer("aten::conv3d"),
    layer("aten::conv3d.padding"),
    layer("aten::conv_transpose1d"),
    layer("aten::conv_transpose2d.input"),
    layer("aten::conv_transpose3d.input"),
    layer("aten::convolution"),
    neuron(
        "aten::copy_",
        &[("self", Need::Nonzeros), ("src", Need::Nonzeros)],
    ),
    neuron("aten::div.Scalar", NONZEROS_OF_ONE),
    neuron("aten::div.Tensor", NONZEROS_OF_TWO),
    neuron("aten::div_.Scalar", NONZEROS_OF_ONE),
    neuron("aten::div_.Tensor", NONZEROS_OF_TWO),
    neuron("aten::eq.Scalar", NONZEROS_OF_ONE),
    neuron("aten::eq.Tensor", NONZEROS_OF_TWO),
    neuron("aten::exp", NONZEROS_OF_ONE),
    neuron("aten::exp_", NONZEROS_OF_ONE),
    neuron("aten::ge.Scalar", NONZEROS_OF_ONE),
    neuron("aten::ge.Tensor", NONZEROS_OF_TWO),
    neuron("aten::gt.Scalar", NONZEROS_OF_ONE),
    neuron("aten::gt.Tensor", NONZEROS_OF_TWO),
    neuron("aten::le.Scalar", NONZEROS_OF_ONE),
    neuron("aten::le.Tensor", NONZEROS_OF_TWO),
    forward(
        "aten::linear",
        &[("input", Need::Sum), ("weight", Need::Binary)],
        Some(("input", "weight", Product::Linear)),
    ),
    neuron("aten::lt.Scalar", NONZEROS_OF_ONE),
    neuron("aten::lt.Tensor", NONZEROS_OF_TWO),
    forward(
        "aten::matmul",
        &[("self", Need::Sum), ("other", Need::Binary)],
        Some(("self", "other", Product::Broadcast)),
    ),
    of_self("aten::max_pool2d_with_indices"),
    of_self("aten::max_pool3d_with_indices"),
    forward(
        "aten::mm",
        SUM_MATRICES,
        Some(("self", "mat2", Product::Matrix)),
    ),
    neuron("aten::mul.Scalar", NONZEROS_OF_ONE),
    neuron("aten::mul.Tensor", NONZEROS_OF_TWO),
    neuron("aten::mul_.Scalar", NONZEROS_OF_ONE),
    neuron("aten::mul_.Tensor", NONZEROS_OF_TWO),
    forward(
        "aten::mv",
        &[("self", Need::Sum), ("vec", Need::Sum)],
        Some(("self", "vec", Product::Broadcast)),
    ),
    of_input("aten::native_batch_norm"),
    neuron("aten::ne.Scalar", NONZEROS_OF_ONE),
    neuron("aten::ne.Tensor", NONZEROS_OF_TWO),
    of_self("aten::relu"),
    of_self("aten::relu_"),
    neuron("aten::rsqrt", NONZEROS_OF_ONE),
    neuron("aten::rsub.Scalar", NONZEROS_OF_ONE),
    neuron("aten::rsub.Tensor", NONZEROS_OF_TWO),
    neuron("aten::sigmoid", NONZEROS_OF_ONE),
    neuron("aten::sigmoid_", NONZEROS_OF_ONE),
    neuron("aten::sqrt", NONZEROS_OF_ONE),
    neuron("aten::sqrt_", NONZEROS_OF_ONE),
    neuron("aten::sub.Scalar", NONZEROS_OF_ONE),
    neuron("aten::sub.Tensor", NONZEROS_OF_TWO),
    neuron("aten::sub_.Scalar", NONZEROS_OF_ONE),
    neuron("aten::sub_.Tensor", NONZEROS_OF_TWO),
    neuron("aten::tanh", NONZEROS_OF_ONE),
    neuron("aten::tanh_", NONZEROS_OF_ONE),
    neuron(
        "aten::where.ScalarOther",
        &[("condition", Need::Nonzeros), ("self", Need::Nonzeros)],
    ),
    neuron(
        "aten::where.ScalarSelf",
        &[("condition", Need::Nonzeros), ("other", Need::Nonzeros)],
    ),
    neuron(
        "aten::where.self",
        &[
            ("condition", Need::Nonzeros),
            ("self", Need::Nonzeros),
            ("other", Need::Nonzeros),
        ],
    ),
];

/// The line of an op in [`FULL`].
#[must_use]
pub fn full_needs(op: &str) -> Option<&'static MoreNeeds> {
    FULL.binary_search_by(|more| more.needs.op.cmp(op))
        .ok()
        .and_then(|i| FULL.get(i))
}

impl OpNeeds {
    /// What is needed of an argument.
    #[must_use]
    pub fn argument(&self, name: &str) -> Option<Need> {
        self.arguments
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, need)| *need)
    }

    /// What is needed of a return value.
    #[must_use]
    pub fn returned(&self, index: usize) -> Option<Need> {
        self.returns
            .iter()
            .find(|(at, _)| *at == index)
            .map(|(_, need)| *need)
    }

    /// Whether a rule may read this operand at that time: outputs and written arguments after, all arguments before.
    #[must_use]
    pub fn covers(&self, argument: &str, when: When, written: bool) -> bool {
        self.argument(argument).is_some() && (when == When::Before || written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_without_duplicates() {
        for pair in RULES.windows(2) {
            assert!(
                pair[0].op < pair[1].op,
                "{} before {}",
                pair[0].op,
                pair[1].op
            );
        }
    }

    #[test]
    fn full_asks_of_every_op_for_no_less_than_rules() {
        for pair in FULL.windows(2) {
            let (a, b) = (pair[0].needs.op, pair[1].needs.op);
            assert!(a < b, "{a} before {b}");
        }
        for more in FULL {
            let Some(line) = rules_need(more.needs.op) else {
                continue;
            };
            assert_eq!(more.needs.product, line.product, "{}", line.op);
            for (argument, need) in line.arguments {
                assert!(
                    more.needs.argument(argument) >= Some(*need),
                    "{argument} of {}",
                    line.op
                );
            }
        }
        assert!(PRESETS.iter().all(|p| preset(p.name) == Some(p)));
    }

    #[test]
    fn factors_are_among_the_arguments() {
        for line in RULES {
            if let Some((a, b, _)) = line.product {
                assert!(
                    line.argument(a).is_some() && line.argument(b).is_some(),
                    "{}",
                    line.op
                );
            }
        }
    }
}
