//! Matrix products and convolutions, forward and backward, under every name that they are seen by: the composite ones
//! (`linear`, `conv2d`, `matmul`) appear under inference mode.

use super::{
    NO_ADDITIONS, NO_SYNAPSES, SOURCE, Tables, Work, per_call, traffic, traffic_without, zero,
};
use crate::rules::product::{Form, is_transposed};
use crate::rules::{CallRow, Need, Rule, RuleError};

/// Name, whether there are an in-place overload and one that writes to `out`, how the factors meet, what is added.
const PRODUCTS: &[(&str, Overloads, Form, Added)] = &[
    ("mm", OUT, Form::Matrix("self", "mat2"), Added::None),
    ("bmm", OUT, Form::Batched("self", "mat2"), Added::None),
    ("addmm", ALL, Form::Matrix("mat1", "mat2"), Added::Scaled),
    (
        "baddbmm",
        ALL,
        Form::Batched("batch1", "batch2"),
        Added::Scaled,
    ),
    (
        "addbmm",
        ALL,
        Form::Batched("batch1", "batch2"),
        Added::Scaled,
    ),
    ("matmul", OUT, Form::Broadcast("self", "other"), Added::None),
    ("mv", OUT, Form::Broadcast("self", "vec"), Added::None),
    ("addmv", ALL, Form::Broadcast("mat", "vec"), Added::Scaled),
    ("dot", OUT, Form::Broadcast("self", "tensor"), Added::None),
    ("linear", OUT, Form::Linear, Added::Bias),
    ("convolution", OUT, Form::Convolution(None), Added::Bias),
    ("conv1d", FRESH, Form::Convolution(Some(false)), Added::Bias),
    (
        "conv1d.padding",
        FRESH,
        Form::Convolution(Some(false)),
        Added::Bias,
    ),
    ("conv2d", FRESH, Form::Convolution(Some(false)), Added::Bias),
    (
        "conv2d.padding",
        FRESH,
        Form::Convolution(Some(false)),
        Added::Bias,
    ),
    ("conv3d", FRESH, Form::Convolution(Some(false)), Added::Bias),
    (
        "conv3d.padding",
        FRESH,
        Form::Convolution(Some(false)),
        Added::Bias,
    ),
    (
        "conv_transpose1d",
        FRESH,
        Form::Convolution(Some(true)),
        Added::Bias,
    ),
    (
        "conv_transpose2d.input",
        FRESH,
        Form::Convolution(Some(true)),
        Added::Bias,
    ),
    (
        "conv_transpose3d.input",
        FRESH,
        Form::Convolution(Some(true)),
        Added::Bias,
    ),
];

/// Which overloads there are beside the one that gives a new tensor: in place, and into `out`.
type Overloads = (bool, bool);
const FRESH: Overloads = (false, false);
const OUT: Overloads = (false, true);
const ALL: Overloads = (true, true);

/// What is added to the product.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Added {
    None,
    /// `bias`, where it is given.
    Bias,
    /// `beta * self`, and the product is scaled with `alpha`.
    Scaled,
}

pub(super) fn fill(tables: &mut Tables) {
    for &(name, (in_place, out), form, added) in PRODUCTS {
        tables.insert(format!("aten::{name}"), product(form, added));
        if in_place {
            tables.insert(format!("aten::{name}_"), product(form, added));
        }
        if out {
            tables.insert(format!("aten::{name}.out"), product(form, added));
        }
    }
    for op in [
        "aten::convolution_backward",
        "aten::convolution_backward_overrideable",
    ] {
        tables.insert(op, convolution_backward());
    }
    // Every pair of elements is multiplied once.
    for op in [
        "aten::outer",
        "aten::outer.out",
        "aten::ger",
        "aten::ger.out",
    ] {
        tables.insert(
            op,
            Work {
                flop: per_call("elements(out)", |row| {
                    Ok(row.note("elements(out)", row.output(0)?.elements()))
                }),
                memory_access: traffic(),
                mac: zero("an outer product: nothing is accumulated"),
                ac: zero(NO_ADDITIONS),
                synop: zero(NO_SYNAPSES),
            },
        );
    }
}

fn product(form: Form, added: Added) -> Work {
    let (a, b) = form.factors();
    let extra = match added {
        Added::None => "",
        Added::Bias => " + [bias] elements(out)",
        Added::Scaled => {
            " + [alpha != 1] elements(out) + [beta != 0] elements(out) + [beta neither 0 nor 1] elements(self)"
        }
    };
    let accumulates = || {
        Rule::per_row(
            "both factors binary: sum of the product; one binary: its nonzeros * how often each is used (by fan-out in a \
             convolution); else 0",
            SOURCE,
            form.needs(),
            move |row| form.geometry(row)?.accumulates(row),
        )
    };
    Work {
        flop: per_call(format!("2 * {}{extra}", form.text()), move |row| {
            Ok(2 * form.geometry(row)?.products + addition(row, added)?)
        }),
        memory_access: if added == Added::Scaled {
            per_call(
                "bytes(operands) + bytes(results); self is not read where beta == 0",
                move |row| {
                    let bias = if row.number("beta", 1.0).is_zero() {
                        0
                    } else {
                        row.tensor("self")?.bytes()
                    };
                    Ok(row.tensor(a)?.bytes()
                        + row.tensor(b)?.bytes()
                        + bias
                        + row.output(0)?.bytes())
                },
            )
        } else {
            traffic_without("out")
        },
        mac: Rule::per_row(
            format!("{} per call; 0 where a factor is binary", form.text()),
            SOURCE,
            vec![Need::Spikes(a, false), Need::Spikes(b, false)],
            move |row| form.geometry(row)?.macs(row),
        ),
        ac: accumulates(),
        synop: accumulates(),
    }
}

fn addition(row: &CallRow<'_>, added: Added) -> Result<i128, RuleError> {
    let out = row.output(0)?.elements();
    Ok(match added {
        Added::None => 0,
        Added::Bias => i128::from(row.is_given("bias")) * out,
        Added::Scaled => {
            let (alpha, beta) = (row.number("alpha", 1.0), row.number("beta", 1.0));
            let mut flops = i128::from(!alpha.is_one()) * out;
            if !beta.is_zero() {
                flops += out;
                if !beta.is_one() {
                    flops += row.tensor("self")?.elements();
                }
            }
            flops
        }
    })
}

/// Both gradients of a convolution multiply as often as the convolution itself, groups included.
fn products_of_backward(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let (grad, input, weight) = (
        row.tensor("grad_output")?,
        row.tensor("input")?,
        row.tensor("weight")?,
    );
    let positions = if is_transposed(row, None)? {
        input
    } else {
        grad
    };
    let positions = row.note("positions", positions.elements());
    Ok(positions
        * row.note("weight.size(1)", weight.size(1)?)
        * row.note("kernel", weight.elements_from(2)))
}

fn asked(row: &CallRow<'_>, gradient: usize) -> Result<i128, RuleError> {
    Ok(i128::from(
        row.booleans("output_mask")?
            .get(gradient)
            .copied()
            .unwrap_or(false),
    ))
}

fn bias_gradient(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let grad = row.tensor("grad_output")?;
    let channels = grad.size(1)?;
    Ok(asked(row, 2)? * (grad.elements() - channels).max(0))
}

fn convolution_backward() -> Work {
    Work {
        flop: per_call(
            "2 * positions * weight.size(1) * kernel for each of the input's and the weight's gradient + [mask 2] \
             elements(grad) - channels",
            |row| {
                Ok(
                    2 * (asked(row, 0)? + asked(row, 1)?) * products_of_backward(row)?
                        + bias_gradient(row)?,
                )
            },
        ),
        memory_access: traffic(),
        mac: per_call(
            "positions * weight.size(1) * kernel for each of the input's and the weight's gradient; a factor is a gradient, \
             so all are counted",
            |row| Ok((asked(row, 0)? + asked(row, 1)?) * products_of_backward(row)?),
        ),
        ac: per_call("[mask 2] elements(grad) - channels", bias_gradient),
        synop: zero("a gradient: no spike drives it"),
    }
}
