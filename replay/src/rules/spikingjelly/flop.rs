//! FLOPs: one for every addition, multiplication, comparison ...

use super::{
    ADD_SCALAR, ADD_TENSOR, ATTENTION, ATTENTION_BACKWARD, BINARY, VIEWS, VIEWS_OF_2_0_0, Version,
    add_all,
};
use crate::rules::{CallRow, Number, Rule, RuleError, TableCounter, TensorView};

/// The table of a version.
pub(super) fn table(version: Version) -> TableCounter {
    let source = match version {
        Version::June2026 => "SpikingJelly db3b6df0, op_counter/flop.py",
        Version::V2_0_0 => "SpikingJelly 2.0.0, op_counter/flop.py",
    };
    let mut table = TableCounter::new("flop", "FLOP");
    // The release counts 2k per output of a product, the older rules do not count the first addition.
    let first_addition = i128::from(version == Version::V2_0_0);
    let depth = move |k: i128| 2 * k - 1 + first_addition;
    let products = |older: &'static str, release: &'static str| {
        if version == Version::V2_0_0 {
            release
        } else {
            older
        }
    };

    table.insert(
        "aten::mm",
        Rule::per_call(
            products("m * n * (2k - 1)", "m * n * 2k"),
            source,
            move |row| {
                let [m, k, n] = matrix(row, 0, 1)?;
                Ok(m * n * depth(k))
            },
        ),
    );
    table.insert(
        "aten::addmm",
        Rule::per_call(
            products(
                "m * n * (2k - 1) + [alpha != 1] m * n + [beta == 1] m * n or [beta != 0] (elements(self) + m * n)",
                "m * n * 2k + [alpha != 1] m * n + [beta == 1] m * n or [beta != 0] (elements(self) + m * n)",
            ),
            source,
            move |row| {
                let [m, k, n] = matrix(row, 1, 2)?;
                Ok(m * n * depth(k) + scaled_bias(row, m * n)?)
            },
        ),
    );
    table.insert(
        "aten::bmm",
        Rule::per_call(
            products("b * m * n * (2k - 1)", "b * m * n * 2k"),
            source,
            move |row| {
                let [b, m, k, n] = batch(row, 0, 1)?;
                Ok(b * m * n * depth(k))
            },
        ),
    );
    table.insert(
        "aten::baddbmm",
        Rule::per_call(
            products(
                "b * m * n * (2k - 1) + [alpha != 1] b * m * n + [beta == 1] b * m * n or [beta != 0] (elements(self) + b * m * n)",
                "b * m * n * 2k + [alpha != 1] b * m * n + [beta == 1] b * m * n or [beta != 0] (elements(self) + b * m * n)",
            ),
            source,
            move |row| {
                let [b, m, k, n] = batch(row, 1, 2)?;
                Ok(b * m * n * depth(k) + scaled_bias(row, b * m * n)?)
            },
        ),
    );

    table.insert(
        "aten::convolution",
        Rule::per_call(
            products(
                "2 * weight.size(1) * kernel * positions * weight.size(0) * b - elements(out) + [bias] elements(out)",
                "2 * weight.size(1) * kernel * positions * weight.size(0) * b + [bias] elements(out)",
            ),
            source,
            move |row| {
                let (x, w, out) = (row.tensor("input")?, row.tensor("weight")?, row.output(0)?);
                let bias = if row.is_given("bias") { out.elements() } else { 0 };
                Ok(convolution(row, version, row.boolean("transposed")?, x, w, out)? + bias)
            },
        ),
    );
    table.insert(
        "aten::convolution_backward",
        Rule::per_call(
            "[mask 0] flop of the convolution that gives the input's gradient + [mask 1] flop of the one that gives the \
             weight's + [mask 2] C_out * (b * positions - 1)",
            source,
            move |row| convolution_backward(row, version),
        ),
    );

    table.insert(
        "aten::native_batch_norm",
        Rule::per_call(BATCH_NORM, source, batch_norm),
    );
    table.insert(
        "aten::native_batch_norm_backward",
        Rule::per_call(BATCH_NORM_BACKWARD, source, batch_norm_backward),
    );

    table.insert(
        "aten::max_pool2d_with_indices",
        Rule::per_call("elements(out) * (kernel - 1)", source, |row| {
            Ok(row.output(0)?.elements() * (kernel(row)? - 1))
        }),
    );
    table.insert(
        "aten::max_pool2d_with_indices_backward",
        Rule::zero("upstream counts nothing", source),
    );
    table.insert(
        "aten::avg_pool2d",
        Rule::per_call("elements(out) * kernel", source, |row| {
            Ok(row.output(0)?.elements() * kernel(row)?)
        }),
    );

    let sum = Rule::per_call("elements(self) - elements(out)", source, |row| {
        Ok(row.note("elements(self)", row.tensor_at(0)?.elements())
            - row.note("elements(out)", row.output(0)?.elements()))
    });
    add_all(&mut table, &["aten::sum", "aten::sum.dim_IntList"], &sum);
    table.insert(
        "aten::mean.dim",
        Rule::per_call("elements(self)", source, |row| {
            Ok(row.note("elements(self)", row.tensor_at(0)?.elements()))
        }),
    );

    let add = Rule::per_call(
        "elements(out) + [alpha != 1] elements(other)",
        source,
        |row| {
            let out = row.note("elements(out)", row.output(0)?.elements());
            if row.keyword_number("alpha", 1.0).is_one() {
                return Ok(out);
            }
            let other = row.optional_tensor_at(1).map_or(1, |t| t.elements());
            Ok(row.note("elements(other)", other) + out)
        },
    );
    add_all(&mut table, &ADD_TENSOR, &add);
    add_all(&mut table, &ADD_SCALAR, &add);

    let one = Rule::per_call("elements(out)", source, |row| {
        Ok(row.note("elements(out)", row.output(0)?.elements()))
    });
    add_all(&mut table, &BINARY, &one);
    add_all(
        &mut table,
        &["aten::neg", "aten::neg_", "aten::logical_not"],
        &one,
    );

    let sigmoid = Rule::per_call("4 * elements(out)", source, |row| {
        Ok(4 * row.note("elements(out)", row.output(0)?.elements()))
    });
    table.insert("aten::sigmoid_", sigmoid.clone());

    let moves = Rule::zero("moves or fills, no arithmetic", source);
    add_all(
        &mut table,
        &[
            "aten::stack",
            "aten::clone",
            "aten::_to_copy",
            "aten::full_like",
            "aten::ones_like",
            "aten::select_backward",
        ],
        &moves,
    );
    let view = Rule::zero("a view or an allocation", source);
    add_all(&mut table, &VIEWS, &view);

    if version >= Version::V2_0_0 {
        table.insert("aten::sigmoid", sigmoid);
        add_all(&mut table, &VIEWS_OF_2_0_0, &view);
        let forward = Rule::per_call("2 * b * h * s_q * s_k * (d_q + d_v)", source, |row| {
            let (products, d_q, d_v) = attention(row, 0)?;
            Ok(2 * products * (d_q + d_v))
        });
        add_all(&mut table, &ATTENTION, &forward);
        let backward = Rule::per_call(
            "2 * b * h * s_q * s_k * (3 * d_q + 2 * d_v)",
            source,
            |row| {
                let (products, d_q, d_v) = attention(row, 1)?;
                Ok(2 * products * (3 * d_q + 2 * d_v))
            },
        );
        add_all(&mut table, &ATTENTION_BACKWARD, &backward);
    }
    table
}

fn unequal(a: i128, b: i128) -> Result<(), RuleError> {
    if a == b {
        Ok(())
    } else {
        Err(RuleError::Failed(format!(
            "AssertionError: inner dimensions {a} and {b} differ"
        )))
    }
}

/// m, k, n of the matrices at two argument places.
fn matrix(row: &CallRow<'_>, x: usize, y: usize) -> Result<[i128; 3], RuleError> {
    let (x, y) = (row.tensor_at(x)?, row.tensor_at(y)?);
    unequal(x.size(1)?, y.size(0)?)?;
    Ok([
        row.note("m", x.size(0)?),
        row.note("k", x.size(1)?),
        row.note("n", y.size(1)?),
    ])
}

/// b, m, k, n of the batches at two argument places.
fn batch(row: &CallRow<'_>, x: usize, y: usize) -> Result<[i128; 4], RuleError> {
    let (x, y) = (row.tensor_at(x)?, row.tensor_at(y)?);
    unequal(x.size(0)?, y.size(0)?)?;
    unequal(x.size(2)?, y.size(1)?)?;
    Ok([
        row.note("b", x.size(0)?),
        row.note("m", x.size(1)?),
        row.note("k", x.size(2)?),
        row.note("n", y.size(2)?),
    ])
}

fn scaled_bias(row: &CallRow<'_>, elements: i128) -> Result<i128, RuleError> {
    let mut flops = if row.keyword_number("alpha", 1.0).is_one() {
        0
    } else {
        elements
    };
    let beta: Number = row.keyword_number("beta", 1.0);
    if beta.is_one() {
        flops += elements;
    } else if !beta.is_zero() {
        flops += row.note("elements(self)", row.tensor_at(0)?.elements()) + elements;
    }
    Ok(flops)
}

/// A convolution of `x` with `w` that gives `out`, bias left out. Upstream takes the first size of `w` for the output
/// channels also where the convolution is transposed.
fn convolution(
    row: &CallRow<'_>,
    version: Version,
    transposed: bool,
    x: TensorView<'_>,
    w: TensorView<'_>,
    out: TensorView<'_>,
) -> Result<i128, RuleError> {
    let positions = if transposed {
        x.elements_from(2)
    } else {
        out.elements_from(2)
    };
    let [b, c_in, c_out] = [
        row.note("b", x.size(0)?),
        row.note("weight.size(1)", w.size(1)?),
        row.note("weight.size(0)", w.size(0)?),
    ];
    let kernel = row.note("kernel", w.elements_from(2));
    let flops = 2 * c_in * kernel * row.note("positions", positions) * c_out * b;
    Ok(if version == Version::June2026 {
        flops - row.note("elements(out)", out.elements())
    } else {
        flops
    })
}

fn convolution_backward(row: &CallRow<'_>, version: Version) -> Result<i128, RuleError> {
    let (grad, x, w) = (row.tensor_at(0)?, row.tensor_at(1)?, row.tensor_at(2)?);
    let mask = row.booleans("output_mask")?;
    let transposed = row.boolean("transposed")?;
    let asked = |i: usize| mask.get(i).copied().unwrap_or(false);
    let older = |out: TensorView<'_>| {
        if version == Version::June2026 {
            out.elements()
        } else {
            0
        }
    };
    let mut flops = 0;
    if asked(0) {
        let out = row.output(0)?;
        let positions = if transposed {
            out.elements_from(2)
        } else {
            grad.elements_from(2)
        };
        flops += 2 * w.elements() * positions * grad.size(0)? - older(out);
    }
    if asked(1) {
        let out = row.output(1)?;
        // The gradient is a convolution of the batch-transposed input with the batch-transposed gradient: its kernel has
        // the gradient's positions, its depth is the batch. Groups are not looked at.
        let (image, kernel) = if transposed { (grad, x) } else { (x, grad) };
        flops += 2
            * kernel.size(0)?
            * kernel.elements_from(2)
            * out.elements_from(2)
            * kernel.size(1)?
            * image.size(1)?
            - older(out);
    }
    if asked(2) && row.is_given("bias_sizes") {
        flops += grad.size(1)? * (grad.size(0)? * grad.elements_from(2) - 1);
    }
    Ok(flops)
}

const BATCH_NORM: &str =
    "training: 5n + 4c + [weight] 2n + [running statistics] 6c; evaluation: 2c + 2n + [weight] 2n";

fn batch_norm(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let x = row.tensor_at(0)?;
    let (n, c) = (row.note("n", x.elements()), row.note("c", x.size(1)?));
    let affine = if row.is_given("weight") { 2 * n } else { 0 };
    if !row.boolean("training")? {
        return Ok(2 * c + 2 * n + affine);
    }
    let running = if row.is_given("running_mean") {
        6 * c
    } else {
        0
    };
    // Mean n, variance 2n + 2c, root 2c, normalisation 2n.
    Ok(n + (2 * n + 2 * c) + 2 * c + 2 * n + affine + running)
}

const BATCH_NORM_BACKWARD: &str = "training: [mask 0] 12n or ([mask 1] 4n - c + [mask 2] n - c); evaluation: [mask 0] 2n + [mask 1] 4n - c + [mask 2] n - c";

fn batch_norm_backward(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let n = row.note("n", row.tensor_at(0)?.elements());
    let Some(gamma) = row.optional_tensor_at(2) else {
        return Err(RuleError::Failed(
            "AttributeError: 'NoneType' object has no attribute 'numel'".to_owned(),
        ));
    };
    let c = row.note("c", gamma.elements());
    let mask = row.booleans("output_mask")?;
    let asked = |i: usize| mask.get(i).copied().unwrap_or(false);
    let gamma_gradient = if asked(1) { 2 * n + (2 * n - c) } else { 0 };
    let beta_gradient = if asked(2) { n - c } else { 0 };
    if !row.boolean("train")? {
        return Ok(if asked(0) { 2 * n } else { 0 } + gamma_gradient + beta_gradient);
    }
    if asked(0) {
        // Normalised input 2n, two sums per channel (which are the other gradients), and their combination.
        return Ok(2 * n + (n - c) + (2 * n - c) + (5 * n + 2 * c));
    }
    Ok(gamma_gradient + beta_gradient)
}

fn kernel(row: &CallRow<'_>) -> Result<i128, RuleError> {
    Ok(row.note("kernel", row.integers("kernel_size")?.iter().product()))
}

/// Products per feature of an attention, and the features of queries and values.
fn attention(row: &CallRow<'_>, query: usize) -> Result<(i128, i128, i128), RuleError> {
    let (q, k, v) = (
        row.tensor_at(query)?,
        row.tensor_at(query + 1)?,
        row.tensor_at(query + 2)?,
    );
    let [b, h, s_q] = [
        row.note("b", q.size(0)?),
        row.note("h", q.size(1)?),
        row.note("s_q", q.size(2)?),
    ];
    let [s_k, d_q, d_v] = [
        row.note("s_k", k.size(2)?),
        row.note("d_q", q.size(3)?),
        row.note("d_v", v.size(3)?),
    ];
    Ok((b * h * s_q * s_k, d_q, d_v))
}
