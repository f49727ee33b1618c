//! Ops that compute every element of the result on its own: arithmetic, comparisons, activations and their gradients.

use super::amount::{insert_per_element, out_elements};
use super::{
    NO_ADDITIONS, NO_PRODUCTS, NO_SYNAPSES, SOURCE, Tables, Work, per_call, traffic, zero,
};
use crate::rules::product::times;
use crate::rules::{CallRow, Need, Rule, RuleError};

/// (names, flops per element, additions per element). Each name stands for the op, its in-place and its `out` overload.
/// Functions of one argument: a root, a transcendental function, a comparison are one flop each.
const UNARY: &[(&[&str], i128, i128)] = &[
    (
        &[
            "exp",
            "exp2",
            "log",
            "log2",
            "log10",
            "sqrt",
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "erf",
            "erfc",
            "erfinv",
            "abs",
            "neg",
            "sign",
            "sgn",
            "reciprocal",
            "floor",
            "ceil",
            "round",
            "trunc",
            "lgamma",
            "digamma",
            "bitwise_not",
            "logical_not",
            "relu",
            "sinc",
        ],
        1,
        0,
    ),
    // A root and a division.
    (&["rsqrt"], 2, 0),
    // x - trunc(x); exp(x) - 1; log(1 + x).
    (&["frac", "expm1", "log1p"], 2, 1),
    // (exp(x) +- 1 / exp(x)) / 2.
    (&["sinh", "cosh"], 4, 1),
    // (e - 1) / (e + 1) with e = exp(2x).
    (&["tanh"], 5, 2),
    // log(x + sqrt(x * x +- 1)); log((1 + x) / (1 - x)) / 2.
    (&["asinh", "acosh", "atanh"], 5, 2),
    // 1 / (1 + exp(-x)).
    (&["sigmoid"], 4, 1),
    // x * sigmoid(x); x / 2 * (1 + erf(x / sqrt 2)).
    (&["silu", "gelu"], 5, 1),
    // x * tanh(log(1 + exp(x))).
    (&["mish"], 9, 3),
    // clamp(x + 3, 0, 6) / 6, and that times x.
    (&["hardsigmoid"], 4, 1),
    (&["hardswish"], 5, 1),
    // A comparison and a multiplication; two comparisons.
    (&["leaky_relu", "hardtanh"], 2, 0),
    // A comparison and scale * (exp(x) - 1).
    (&["elu"], 4, 1),
    (&["clamp"], 2, 0),
    (&["clamp_min", "clamp_max", "threshold"], 1, 0),
    (&["nan_to_num"], 3, 0),
    (&["square"], 1, 0),
];

/// As [`UNARY`], for ops without an in-place overload.
const UNARY_FRESH: &[(&[&str], i128, i128)] = &[
    // log(1 + exp(beta * x)) / beta.
    (&["softplus"], 5, 1),
    (&["hardshrink"], 2, 0),
    (&["softshrink"], 3, 1),
    (&["logit"], 3, 1),
];

/// Without in-place or `out` overloads, or with names of their own: (overloads, flops per element, additions per element).
const NAMED: &[(&[&str], i128, i128)] = &[
    (
        &[
            "aten::isnan",
            "aten::isinf",
            "aten::isfinite",
            "aten::signbit",
            "aten::isposinf",
            "aten::isneginf",
        ],
        1,
        0,
    ),
    (
        &["aten::selu", "aten::selu_", "aten::celu", "aten::celu_"],
        4,
        1,
    ),
    (&["aten::relu6", "aten::relu6_"], 2, 0),
    (&["aten::clamp.Tensor", "aten::clamp_.Tensor"], 2, 0),
    (
        &[
            "aten::clamp_min.Tensor",
            "aten::clamp_min_.Tensor",
            "aten::clamp_max.Tensor",
            "aten::clamp_max_.Tensor",
        ],
        1,
        0,
    ),
    (&["aten::clip", "aten::clip_"], 2, 0),
    (&["aten::_prelu_kernel", "aten::prelu"], 2, 0),
    (
        &[
            "aten::rrelu_with_noise",
            "aten::rrelu_with_noise_",
            "aten::rrelu",
            "aten::rrelu_",
        ],
        2,
        0,
    ),
    // sigmoid of one half times the other.
    (&["aten::glu", "aten::glu.out"], 5, 1),
    (
        &[
            "aten::pow.Tensor_Scalar",
            "aten::pow.Tensor_Tensor",
            "aten::pow.Scalar",
            "aten::pow_.Scalar",
            "aten::pow_.Tensor",
            "aten::pow.Tensor_Scalar_out",
            "aten::pow.Tensor_Tensor_out",
            "aten::pow.Scalar_out",
            "aten::float_power.Tensor_Scalar",
            "aten::float_power.Tensor_Tensor",
        ],
        1,
        0,
    ),
    (
        &[
            "aten::div.Tensor_mode",
            "aten::div.Scalar_mode",
            "aten::div_.Tensor_mode",
            "aten::div_.Scalar_mode",
        ],
        2,
        0,
    ),
    (
        &[
            "aten::floor_divide",
            "aten::floor_divide.Scalar",
            "aten::floor_divide_.Tensor",
            "aten::floor_divide_.Scalar",
        ],
        2,
        0,
    ),
    (
        &[
            "aten::true_divide.Tensor",
            "aten::true_divide.Scalar",
            "aten::true_divide_.Tensor",
            "aten::divide.Tensor",
            "aten::divide.Scalar",
        ],
        1,
        0,
    ),
    (
        &[
            "aten::multiply.Tensor",
            "aten::multiply.Scalar",
            "aten::multiply_.Tensor",
            "aten::multiply_.Scalar",
        ],
        1,
        0,
    ),
    (
        &[
            "aten::maximum",
            "aten::maximum.out",
            "aten::minimum",
            "aten::minimum.out",
            "aten::fmax",
            "aten::fmin",
        ],
        1,
        0,
    ),
    (&["aten::max.other", "aten::min.other"], 1, 0),
    (
        &[
            "aten::logical_and",
            "aten::logical_and_",
            "aten::logical_or",
            "aten::logical_or_",
            "aten::logical_xor",
            "aten::logical_xor_",
        ],
        1,
        0,
    ),
    (
        &[
            "aten::logical_and.out",
            "aten::logical_or.out",
            "aten::logical_xor.out",
        ],
        1,
        0,
    ),
    (
        &[
            "aten::atan2",
            "aten::atan2_",
            "aten::copysign.Tensor",
            "aten::copysign.Scalar",
            "aten::heaviside",
            "aten::heaviside_",
        ],
        1,
        0,
    ),
    // sqrt(a * a + b * b).
    (&["aten::hypot", "aten::hypot_"], 4, 1),
    (
        &[
            "aten::xlogy.Tensor",
            "aten::xlogy.Scalar_Other",
            "aten::xlogy.Scalar_Self",
        ],
        2,
        0,
    ),
    // max + log(exp(a - max) + exp(b - max)).
    (&["aten::logaddexp", "aten::logaddexp2"], 8, 4),
    // min(x, 0) - log(1 + exp(-|x|)).
    (&["aten::log_sigmoid", "aten::log_sigmoid_forward"], 7, 2),
    // Mask and scale.
    (
        &["aten::native_dropout", "aten::native_dropout_backward"],
        2,
        0,
    ),
    (&["aten::_masked_scale"], 2, 0),
    // A random number is compared with the probability.
    (
        &[
            "aten::bernoulli",
            "aten::bernoulli.p",
            "aten::bernoulli_.float",
            "aten::bernoulli_.Tensor",
        ],
        1,
        0,
    ),
    // start + i * step.
    (
        &[
            "aten::arange",
            "aten::arange.start",
            "aten::arange.start_step",
            "aten::arange.out",
            "aten::arange.start_out",
        ],
        2,
        1,
    ),
    (&["aten::linspace", "aten::linspace.out"], 2, 1),
    // Gradients of activations: g * y * (1 - y); g * (1 - y * y); g where x > t.
    (
        &[
            "aten::sigmoid_backward",
            "aten::tanh_backward",
            "aten::sigmoid_backward.grad_input",
            "aten::tanh_backward.grad_input",
        ],
        3,
        1,
    ),
    (
        &[
            "aten::threshold_backward",
            "aten::threshold_backward.grad_input",
            "aten::hardshrink_backward",
            "aten::softshrink_backward",
        ],
        1,
        0,
    ),
    // g * (cdf(x) + x * pdf(x)).
    (
        &["aten::gelu_backward", "aten::gelu_backward.grad_input"],
        11,
        2,
    ),
    // g * s * (1 + x * (1 - s)) with s = sigmoid(x).
    (
        &["aten::silu_backward", "aten::silu_backward.grad_input"],
        9,
        3,
    ),
    (&["aten::mish_backward"], 14, 4),
    (
        &[
            "aten::hardsigmoid_backward",
            "aten::hardtanh_backward",
            "aten::leaky_relu_backward",
        ],
        2,
        0,
    ),
    (&["aten::hardswish_backward"], 4, 1),
    (&["aten::elu_backward"], 4, 1),
    // g * z / (z + 1) with z = exp(beta * x).
    (
        &[
            "aten::softplus_backward",
            "aten::softplus_backward.grad_input",
        ],
        5,
        1,
    ),
    (
        &[
            "aten::log_sigmoid_backward",
            "aten::logit_backward",
            "aten::glu_backward",
        ],
        5,
        1,
    ),
    (&["aten::_prelu_kernel_backward"], 3, 0),
    (&["aten::rrelu_with_noise_backward"], 1, 0),
    (&["aten::square.out"], 1, 0),
];

/// Functions of two arguments with `Tensor` and `Scalar` overloads, one flop each.
const BINARY: &[&str] = &[
    "mul",
    "div",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "fmod",
    "remainder",
];

/// As [`BINARY`], under the names that Python's operators use.
const OPERATORS: &[&str] = &[
    "__and__",
    "__or__",
    "__xor__",
    "__iand__",
    "__ior__",
    "__ixor__",
    "__lshift__",
    "__rshift__",
];

pub(super) fn fill(tables: &mut Tables) {
    for (names, flops, additions) in UNARY {
        for name in *names {
            insert_per_element(tables, format!("aten::{name}"), *flops, *additions);
            insert_per_element(tables, format!("aten::{name}_"), *flops, *additions);
            if *name != "square" {
                insert_per_element(tables, format!("aten::{name}.out"), *flops, *additions);
            }
        }
    }
    for (names, flops, additions) in UNARY_FRESH {
        for name in *names {
            insert_per_element(tables, format!("aten::{name}"), *flops, *additions);
            insert_per_element(tables, format!("aten::{name}.out"), *flops, *additions);
        }
    }
    for (ops, flops, additions) in NAMED {
        for op in *ops {
            insert_per_element(tables, (*op).to_owned(), *flops, *additions);
        }
    }
    for name in BINARY {
        for overload in ["Tensor", "Scalar"] {
            insert_per_element(tables, format!("aten::{name}.{overload}"), 1, 0);
            insert_per_element(tables, format!("aten::{name}_.{overload}"), 1, 0);
        }
        let out = if matches!(*name, "mul" | "div") {
            "out"
        } else {
            "Tensor_out"
        };
        insert_per_element(tables, format!("aten::{name}.{out}"), 1, 0);
        insert_per_element(tables, format!("aten::{name}.Scalar_out"), 1, 0);
    }
    for name in OPERATORS {
        for overload in ["Tensor", "Scalar"] {
            insert_per_element(tables, format!("aten::{name}.{overload}"), 1, 0);
        }
    }
    // Mask and scale; with a mean and a variance to be kept a random number is compared, and scaled and shifted.
    for (op, flops, additions) in [
        ("aten::dropout", 2, 0),
        ("aten::dropout_", 2, 0),
        ("aten::feature_dropout", 2, 0),
        ("aten::feature_dropout_", 2, 0),
        ("aten::alpha_dropout", 4, 1),
        ("aten::alpha_dropout_", 4, 1),
        ("aten::feature_alpha_dropout", 4, 1),
        ("aten::feature_alpha_dropout_", 4, 1),
    ] {
        tables.insert(op, while_training(flops, additions));
    }
    for op in ADD_LIKE {
        tables.insert(*op, add_like(false));
    }
    for op in ADD_LIKE_WITHOUT_STATISTICS {
        tables.insert(*op, add_like(true));
    }
    for op in [
        "aten::addcmul",
        "aten::addcmul_",
        "aten::addcmul.out",
        "aten::addcdiv",
        "aten::addcdiv_",
        "aten::addcdiv.out",
    ] {
        tables.insert(op, fused(2, 1, "value"));
    }
    for op in [
        "aten::lerp.Scalar",
        "aten::lerp_.Scalar",
        "aten::lerp.Scalar_out",
        "aten::lerp.Tensor",
        "aten::lerp_.Tensor",
        "aten::lerp.Tensor_out",
    ] {
        // self + weight * (end - self).
        insert_per_element(tables, op.to_owned(), 3, 2);
    }
}

/// What does nothing outside of training, not even a copy: the op of inference mode.
fn while_training(flops: i128, additions: i128) -> Work {
    let trains = |row: &CallRow<'_>| Ok::<i128, RuleError>(i128::from(row.boolean("train")?));
    Work {
        flop: per_call(format!("[train] {flops} * elements(out)"), move |row| {
            Ok(trains(row)? * flops * row.note("elements(out)", out_elements(row)))
        }),
        memory_access: per_call("[train] bytes(operands) + bytes(results)", move |row| {
            let read = row.optional_tensor_at(0).map_or(0, |x| x.bytes());
            Ok(trains(row)? * (read + super::written(row)))
        }),
        mac: zero(NO_PRODUCTS),
        ac: if additions == 0 {
            zero(NO_ADDITIONS)
        } else {
            per_call(format!("[train] {additions} * elements(out)"), move |row| {
                Ok(trains(row)? * additions * row.note("elements(out)", out_elements(row)))
            })
        },
        synop: zero(NO_SYNAPSES),
    }
}

/// Additions and subtractions whose operands the trace knows as binary or not.
const ADD_LIKE: &[&str] = &[
    "aten::add.Tensor",
    "aten::add_.Tensor",
    "aten::sub.Tensor",
    "aten::sub_.Tensor",
    "aten::rsub.Tensor",
    "aten::add.out",
    "aten::sub.out",
    "aten::rsub.Tensor_out",
];

/// The same with a number, or under other names of which statistics are not taken: every element counts.
const ADD_LIKE_WITHOUT_STATISTICS: &[&str] = &[
    "aten::add.Scalar",
    "aten::add_.Scalar",
    "aten::sub.Scalar",
    "aten::sub_.Scalar",
    "aten::rsub.Scalar",
    "aten::add.Scalar_out",
    "aten::sub.Scalar_out",
    "aten::rsub.Scalar_out",
    "aten::subtract.Tensor",
    "aten::subtract_.Tensor",
    "aten::subtract.Scalar",
    "aten::subtract_.Scalar",
];

fn add_like(every_element: bool) -> Work {
    let flop = per_call("elements(out) + [alpha != 1] elements(other)", |row| {
        let out = row.note("elements(out)", out_elements(row));
        if row.number("alpha", 1.0).is_one() {
            return Ok(out);
        }
        Ok(out
            + row.note(
                "elements(other)",
                row.optional_tensor("other").map_or(1, |t| t.elements()),
            ))
    });
    let ac = if every_element {
        per_call("elements(out)", |row| {
            Ok(row.note("elements(out)", out_elements(row)))
        })
    } else {
        Rule::per_row(
            "both binary and alpha == 1: the nonzeros of each * how often it is used; else elements(out) per call",
            SOURCE,
            vec![Need::Spikes("self", false), Need::Spikes("other", false)],
            additions,
        )
    };
    Work {
        flop,
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac,
        synop: zero(NO_SYNAPSES),
    }
}

/// Adding spikes to spikes costs an addition per spike. Values are those before the op, also where it is in place.
fn additions(row: &CallRow<'_>) -> Result<i128, RuleError> {
    use optape_trace::When::Before;

    let out = row.note("elements(out)", out_elements(row));
    let dense = times(out, i128::from(row.calls))?;
    let (Some(x), Some(y)) = (row.optional_tensor("self"), row.optional_tensor("other")) else {
        return Ok(dense);
    };
    if x.is_number() || y.is_number() || !row.number("alpha", 1.0).is_one() {
        return Ok(dense);
    }
    if !row.binary("self", Before)? || !row.binary("other", Before)? {
        return Ok(dense);
    }
    let uses = |elements: i128| if elements == 0 { 0 } else { out / elements };
    let left = times(row.nonzeros("self", Before)?, uses(x.elements()))?;
    Ok(left + times(row.nonzeros("other", Before)?, uses(y.elements()))?)
}

/// self + value * (a op b): `flops` per element, one more where `value` is not 1.
fn fused(flops: i128, additions: i128, scale: &'static str) -> Work {
    Work {
        flop: per_call(
            format!("{flops} * elements(out) + [{scale} != 1] elements(out)"),
            move |row| {
                let scaled = i128::from(!row.number(scale, 1.0).is_one());
                Ok((flops + scaled) * row.note("elements(out)", out_elements(row)))
            },
        ),
        memory_access: traffic(),
        mac: zero("elementwise: the product is added to another tensor, not accumulated"),
        ac: if additions == 0 {
            zero(NO_ADDITIONS)
        } else {
            per_call(format!("{additions} * elements(out)"), move |row| {
                Ok(additions * row.note("elements(out)", out_elements(row)))
            })
        },
        synop: zero(NO_SYNAPSES),
    }
}
