//! Ops of optimizers: `_foreach_*` over lists of tensors, and the fused ones.

use super::amount::{insert_per_element, out_elements};
use super::{
    NO_ADDITIONS, NO_PRODUCTS, NO_SYNAPSES, Tables, Work, per_call, traffic, traffic_without, zero,
};
use crate::rules::{CallRow, RuleError, TensorView};

/// (name, overloads, flops per element, additions per element); each also in place.
const FOREACH: &[(&str, &[&str], i128, i128)] = &[
    ("add", &["Scalar", "ScalarList"], 1, 1),
    ("sub", &["Scalar", "ScalarList"], 1, 1),
    ("mul", &["Scalar", "List", "ScalarList", "Tensor"], 1, 0),
    ("div", &["Scalar", "List", "ScalarList", "Tensor"], 1, 0),
    ("maximum", &["Scalar", "List", "ScalarList"], 1, 0),
    ("minimum", &["Scalar", "List", "ScalarList"], 1, 0),
    ("clamp_max", &["Scalar", "List", "ScalarList"], 1, 0),
    ("clamp_min", &["Scalar", "List", "ScalarList"], 1, 0),
    ("pow", &["Scalar", "List", "ScalarList"], 1, 0),
    ("lerp", &["Scalar", "List", "ScalarList"], 3, 2),
    // value * a * b (or a / b), and the sum.
    ("addcmul", &["Scalar", "ScalarList", "Tensor"], 3, 1),
    ("addcdiv", &["Scalar", "ScalarList", "Tensor"], 3, 1),
    ("abs", &[""], 1, 0),
    ("neg", &[""], 1, 0),
    ("sqrt", &[""], 1, 0),
    ("rsqrt", &[""], 2, 0),
    ("exp", &[""], 1, 0),
    ("log", &[""], 1, 0),
    ("sign", &[""], 1, 0),
    ("reciprocal", &[""], 1, 0),
    ("sigmoid", &[""], 4, 1),
    ("tanh", &[""], 5, 2),
    ("round", &[""], 1, 0),
    ("floor", &[""], 1, 0),
    ("ceil", &[""], 1, 0),
    ("trunc", &[""], 1, 0),
    ("erf", &[""], 1, 0),
];

pub(super) fn fill(tables: &mut Tables) {
    for (name, overloads, flops, additions) in FOREACH {
        for overload in *overloads {
            let suffix = if overload.is_empty() {
                String::new()
            } else {
                format!(".{overload}")
            };
            insert_per_element(
                tables,
                format!("aten::_foreach_{name}{suffix}"),
                *flops,
                *additions,
            );
            insert_per_element(
                tables,
                format!("aten::_foreach_{name}_{suffix}"),
                *flops,
                *additions,
            );
        }
    }
    for name in ["add", "sub"] {
        for op in [
            format!("aten::_foreach_{name}.List"),
            format!("aten::_foreach_{name}_.List"),
        ] {
            tables.insert(op, foreach_add());
        }
    }
    for op in ["aten::_foreach_add.Tensor", "aten::_foreach_add_.Tensor"] {
        tables.insert(op, foreach_add());
    }
    // Squares, accumulated, and a root; comparisons.
    for (op, flops, macs) in [
        ("aten::_foreach_norm.Scalar", 2, 1),
        ("aten::_foreach_max", 1, 0),
    ] {
        tables.insert(
            op,
            Work {
                flop: per_call(format!("{flops} * elements(self)"), move |row| {
                    Ok(flops * elements(row, "self"))
                }),
                memory_access: traffic(),
                mac: if macs == 0 {
                    zero(NO_PRODUCTS)
                } else {
                    per_call("elements(self)", |row| Ok(elements(row, "self")))
                },
                ac: zero(NO_ADDITIONS),
                synop: zero(NO_SYNAPSES),
            },
        );
    }
    for (op, overwritten) in [
        ("aten::_foreach_zero_", "self"),
        ("aten::_foreach_copy_", "self"),
        ("aten::_foreach_zero", "self"),
    ] {
        tables.insert(
            op,
            Work {
                flop: zero("moves or fills, no arithmetic"),
                memory_access: traffic_without(overwritten),
                mac: zero(NO_PRODUCTS),
                ac: zero(NO_ADDITIONS),
                synop: zero(NO_SYNAPSES),
            },
        );
    }

    for name in ["adam", "adamw"] {
        for op in [
            format!("aten::_fused_{name}_"),
            format!("aten::_fused_{name}_.tensor_lr"),
        ] {
            tables.insert(op, adam(name == "adamw"));
        }
    }
    for op in ["aten::_fused_sgd_", "aten::_fused_sgd_.tensor_lr"] {
        tables.insert(op, sgd());
    }
    for op in ["aten::_fused_adagrad_", "aten::_fused_adagrad_.tensor_lr"] {
        tables.insert(
            op,
            fused(
                // sum + g * g; p - lr * g / (sqrt(sum) + eps).
                "(7 + [weight_decay] 2) * elements(self)",
                |row| Ok(7 + 2 * given(row, "weight_decay")),
                "(3 + [weight_decay] 1) * elements(self)",
                |row| Ok(3 + given(row, "weight_decay")),
            ),
        );
    }
    // Scales gradients and looks for infinities.
    tables.insert(
        "aten::_amp_foreach_non_finite_check_and_unscale_",
        fused("2 * elements(self)", |_| Ok(2), "", |_| Ok(0)),
    );
    tables.insert(
        "aten::_amp_update_scale_",
        Work {
            flop: per_call("2", |_| Ok(2)),
            memory_access: traffic(),
            mac: zero(NO_PRODUCTS),
            ac: per_call("1", |_| Ok(1)),
            synop: zero(NO_SYNAPSES),
        },
    );
}

fn elements(row: &CallRow<'_>, argument: &str) -> i128 {
    let sum = row.tensors(argument).iter().map(TensorView::elements).sum();
    row.note(&format!("elements({argument})"), sum)
}

/// 1 where a number argument is not 0.
fn given(row: &CallRow<'_>, argument: &str) -> i128 {
    i128::from(!row.number(argument, 0.0).is_zero())
}

/// 1 where a flag is set.
fn set(row: &CallRow<'_>, argument: &str) -> Result<i128, RuleError> {
    Ok(i128::from(row.boolean(argument)?))
}

fn foreach_add() -> Work {
    Work {
        flop: per_call("elements(out) + [alpha != 1] elements(out)", |row| {
            let scaled = i128::from(!row.number("alpha", 1.0).is_one());
            Ok((1 + scaled) * row.note("elements(out)", out_elements(row)))
        }),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: per_call("elements(out)", |row| {
            Ok(row.note("elements(out)", out_elements(row)))
        }),
        synop: zero(NO_SYNAPSES),
    }
}

type PerElement = fn(&CallRow<'_>) -> Result<i128, RuleError>;

/// Flops and additions per element of the parameters.
fn fused(flop: &'static str, flops: PerElement, ac: &'static str, additions: PerElement) -> Work {
    Work {
        flop: per_call(flop, move |row| Ok(flops(row)? * elements(row, "self"))),
        memory_access: per_call(
            "bytes(operands) + bytes(operands that are written)",
            |row| {
                let arguments = &row.op.arguments;
                let read: i128 = (0..arguments.len())
                    .map(|i| super::bytes(&row.tensors_at(i)))
                    .sum();
                let written: i128 = arguments
                    .iter()
                    .enumerate()
                    .filter(|(_, a)| a.written)
                    .map(|(i, _)| super::bytes(&row.tensors_at(i)))
                    .sum();
                Ok(row.note("bytes(operands)", read) + row.note("bytes(written)", written))
            },
        ),
        mac: zero("elementwise: products are added to state, not accumulated over a dimension"),
        ac: if ac.is_empty() {
            zero(NO_ADDITIONS)
        } else {
            per_call(ac, move |row| Ok(additions(row)? * elements(row, "self")))
        },
        synop: zero(NO_SYNAPSES),
    }
}

fn adam(decoupled: bool) -> Work {
    // First moment 3 (a lerp), second 4, root, correction and epsilon 3, step 3.
    if decoupled {
        return fused(
            "(13 + [weight_decay] 1 + [amsgrad] 1 + [maximize] 1) * elements(self)",
            |row| {
                Ok(13 + given(row, "weight_decay") + set(row, "amsgrad")? + set(row, "maximize")?)
            },
            "5 * elements(self)",
            |_| Ok(5),
        );
    }
    fused(
        "(13 + [weight_decay] 2 + [amsgrad] 1 + [maximize] 1) * elements(self)",
        |row| {
            Ok(13 + 2 * given(row, "weight_decay") + set(row, "amsgrad")? + set(row, "maximize")?)
        },
        "(5 + [weight_decay] 1) * elements(self)",
        |row| Ok(5 + given(row, "weight_decay")),
    )
}

fn sgd() -> Work {
    fused(
        "(2 + [weight_decay] 2 + [momentum] 3 + [nesterov] 2 + [maximize] 1) * elements(self)",
        |row| {
            Ok(2 + 2 * given(row, "weight_decay")
                + 3 * given(row, "momentum")
                + 2 * set(row, "nesterov")?
                + set(row, "maximize")?)
        },
        "(1 + [weight_decay] 1 + [momentum] 1 + [nesterov] 1) * elements(self)",
        |row| Ok(1 + given(row, "weight_decay") + given(row, "momentum") + set(row, "nesterov")?),
    )
}
