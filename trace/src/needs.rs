//! The table of needs: which statistics capture takes of which operand, so that the rules of replay can
//! count. It is data that both sides share; a test in replay proves that the built-in rules need nothing
//! beyond it.

use crate::statistics::When;

/// Version of [`RULES`]; written into every trace.
/// 2: also the overloads that write to `out`, `addbmm_`, `addmv_`.
pub const NEEDS_VERSION: u32 = 2;

/// What is needed of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Need {
    /// Binary or not; the nonzeros if it is. Stops at the first element that is neither 0 nor 1.
    Binary,
    /// The nonzeros, binary or not.
    Nonzeros,
    /// T1: binary or not, nonzeros, sum; minimum and maximum under the preset `all`.
    Full,
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
        arguments: &[("value", Need::Full)],
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

impl OpNeeds {
    /// What is needed of an argument.
    #[must_use]
    pub fn argument(&self, name: &str) -> Option<Need> {
        self.arguments
            .iter()
            .find(|(n, _)| *n == name)
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
