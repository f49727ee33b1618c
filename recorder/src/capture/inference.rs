//! What follows about a result's values from what is known of its operands: no need to look at it.
//!
//! Zeros made by `zeros`, spikes put together by `stack`, and the `spike * 0.0` of a hard reset fill a good part of the memory
//! that a spiking network writes, and each of them is asked about soon afterwards. What is concluded here is
//! exact, and about zeros and ones alone: they are the same in every element type.

use optape_trace::{DType, OpDef, tensor_flags};

use super::identities::Identities;
use super::measuring::{self, Value};
use crate::abi::{Call, Tensor};
use crate::statistics::Answer;

/// How an op's result follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inference {
    /// Every element is this number.
    Constant(u8),
    /// Every element is the argument of this index, if that is 0 or 1.
    Filled(usize),
    /// The elements of the operands, no others.
    Joined,
    /// `mul` by a number: zeros where the number is 0 and the operand is all zeros and ones (not infinite, not NaN).
    Scaled,
}

impl Inference {
    pub(super) fn of(op: &OpDef) -> Option<Self> {
        Some(match op.qualified_name().as_str() {
            "aten::zeros" | "aten::zeros_like" | "aten::new_zeros" => Self::Constant(0),
            "aten::ones" | "aten::ones_like" | "aten::new_ones" => Self::Constant(1),
            "aten::full" | "aten::full_like" | "aten::new_full" => {
                Self::Filled(op.arguments.iter().position(|a| a.name == "fill_value")?)
            }
            "aten::cat" | "aten::stack" => Self::Joined,
            "aten::mul.Tensor" => Self::Scaled,
            _ => return None,
        })
    }

    /// The operand that has to be known for the conclusion, and that is worth a look for it.
    pub(super) fn premise(self, call: &Call) -> Option<&Tensor> {
        match (self, measuring::tensors(call)) {
            (Self::Scaled, [tensor, number, ..]) if is_zero(call, tensor, number) => Some(tensor),
            _ => None,
        }
    }

    /// What the result holds, now that the op has run.
    pub(super) fn conclude(self, call: &Call, identities: &Identities) -> Option<(Tensor, Answer)> {
        let inputs = call.input_count as usize;
        let (operands, [result]) = measuring::tensors(call).split_at_checked(inputs)? else {
            return None;
        };
        let elements = measuring::sizes(result)
            .iter()
            .try_fold(1u64, |n, size| n.checked_mul(u64::try_from(*size).ok()?))?;
        let nonzeros = match self {
            Self::Constant(0) => 0,
            Self::Constant(_) => elements,
            Self::Filled(argument) => match measuring::argument(call, argument)? {
                Value::Integer(0) | Value::Zero => 0,
                Value::Integer(1) | Value::One => elements,
                _ => return None,
            },
            Self::Joined => {
                let mut sum = 0u64;
                for operand in operands {
                    // Lazy bits: the memory holds other values than the tensor.
                    measuring::view(operand).ok()?;
                    let known = identities
                        .recall(operand)
                        .filter(|a| a.binary == Some(true))?;
                    sum = sum.checked_add(known.nonzeros?)?;
                }
                sum
            }
            Self::Scaled => {
                let [tensor, number] = operands else {
                    return None;
                };
                measuring::view(tensor).ok()?;
                let known = is_zero(call, tensor, number).then(|| identities.recall(tensor))??;
                if known.binary != Some(true) {
                    return None;
                }
                0
            }
        };
        let ordered = !DType(result.dtype).is_complex();
        Some((*result, Answer::of_binary(elements, nonzeros, ordered)))
    }
}

/// Whether `number` is a Python number, and 0: the payload then is its bits, 0 in every type.
fn is_zero(call: &Call, tensor: &Tensor, number: &Tensor) -> bool {
    tensor.flags & tensor_flags::WRAPPED_NUMBER == 0
        && number.flags & tensor_flags::WRAPPED_NUMBER != 0
        && measuring::payload(call) == [0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use optape_trace::ArgumentDef;

    fn op(name: &str, overload: &str, arguments: &[&str]) -> OpDef {
        OpDef {
            name: name.to_owned(),
            overload: overload.to_owned(),
            arguments: arguments
                .iter()
                .map(|name| ArgumentDef {
                    name: (*name).to_owned(),
                    ..ArgumentDef::default()
                })
                .collect(),
            returns: Vec::new(),
        }
    }

    #[test]
    fn only_ops_whose_results_are_certain() {
        let full = op("aten::full_like", "", &["self", "fill_value"]);
        assert_eq!(Inference::of(&full), Some(Inference::Filled(1)));
        assert_eq!(
            Inference::of(&op("aten::mul", "Tensor", &["self", "other"])),
            Some(Inference::Scaled)
        );
        // Written in place, or into an `out` that may have another type: not concluded.
        for (name, overload) in [
            ("aten::mul_", "Tensor"),
            ("aten::cat", "out"),
            ("aten::empty", ""),
        ] {
            assert_eq!(Inference::of(&op(name, overload, &[])), None, "{name}");
        }
    }

    #[test]
    fn zeros_and_ones_have_sums_and_ends() {
        let some = Answer::of_binary(4, 3, true);
        assert_eq!(
            (some.sum, some.minimum, some.maximum),
            (Some(3.0), Some(0.0), Some(1.0))
        );
        let ones = Answer::of_binary(4, 4, true);
        assert_eq!((ones.minimum, ones.maximum), (Some(1.0), Some(1.0)));
        let none = Answer::of_binary(0, 0, true);
        assert_eq!((none.sum, none.minimum), (Some(0.0), None));
        assert_eq!(Answer::of_binary(4, 3, false).minimum, None);
    }
}
