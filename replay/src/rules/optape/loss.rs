//! Loss functions, forward and backward.

use super::amount::Quantity::{Input, Out};
use super::amount::insert_all;
use super::{NO_PRODUCTS, NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, RuleError};

pub(super) fn fill(tables: &mut Tables) {
    // (op, flops per element, additions per element) before the elements are reduced.
    for (op, flops, additions) in [
        ("aten::mse_loss", 2, 1),
        ("aten::l1_loss", 2, 1),
        // |x - t| < beta ? (x - t)^2 / 2 / beta : |x - t| - beta / 2.
        ("aten::smooth_l1_loss", 5, 2),
        ("aten::huber_loss", 5, 2),
        // -(t * log(x) + (1 - t) * log(1 - x)).
        ("aten::binary_cross_entropy", 8, 3),
        // (1 - t) * x + log(1 + exp(-|x|)) - min(x, 0).
        ("aten::binary_cross_entropy_with_logits", 9, 4),
        ("aten::soft_margin_loss", 5, 1),
        ("aten::kl_div", 4, 1),
    ] {
        tables.insert(op, elementwise(flops, additions));
    }
    for op in [
        "aten::nll_loss_forward",
        "aten::nll_loss2d_forward",
        "aten::nll_loss",
        "aten::nll_loss_nd",
        "aten::nll_loss2d",
    ] {
        tables.insert(op, negative_log_likelihood());
    }
    tables.insert("aten::cross_entropy_loss", cross_entropy());

    // Gradients: per element of the result.
    insert_all(
        tables,
        &[
            "aten::mse_loss_backward",
            "aten::mse_loss_backward.grad_input",
        ],
        &[(3, Out)],
        &[(1, Out)],
    );
    insert_all(
        tables,
        &["aten::smooth_l1_loss_backward", "aten::huber_loss_backward"],
        &[(4, Out)],
        &[(1, Out)],
    );
    insert_all(
        tables,
        &["aten::binary_cross_entropy_backward"],
        &[(5, Out)],
        &[(2, Out)],
    );
    insert_all(
        tables,
        &["aten::soft_margin_loss_backward"],
        &[(5, Out)],
        &[(1, Out)],
    );
    for op in ["aten::nll_loss_backward", "aten::nll_loss2d_backward"] {
        tables.insert(
            op,
            Work {
                flop: per_call("2 * elements(target)", |row| Ok(2 * targets(row)?)),
                memory_access: traffic(),
                mac: zero(NO_PRODUCTS),
                ac: zero("writes one value per target, no additions"),
                synop: zero(NO_SYNAPSES),
            },
        );
    }
    // At least one comparison per element of the scores.
    insert_all(
        tables,
        &[
            "aten::multi_margin_loss",
            "aten::multilabel_margin_loss_forward",
        ],
        &[(3, Input)],
        &[(2, Input)],
    );
}

/// `at::Reduction`: none, mean, sum.
fn reduced(row: &CallRow<'_>) -> Result<bool, RuleError> {
    Ok(row.integer("reduction")? != 0)
}

fn elementwise(flops: i128, additions: i128) -> Work {
    Work {
        flop: per_call(
            format!("{flops} * elements(self) + [reduced] elements(self)"),
            move |row| {
                let n = row.note("elements(self)", row.tensor("self")?.elements());
                Ok((flops + i128::from(reduced(row)?)) * n)
            },
        ),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: per_call(
            format!("{additions} * elements(self) + [reduced] (elements(self) - 1)"),
            move |row| {
                let n = row.note("elements(self)", row.tensor("self")?.elements());
                Ok(additions * n + if reduced(row)? { (n - 1).max(0) } else { 0 })
            },
        ),
        synop: zero(NO_SYNAPSES),
    }
}

fn targets(row: &CallRow<'_>) -> Result<i128, RuleError> {
    Ok(row.note("elements(target)", row.tensor("target")?.elements()))
}

/// Picks one log-probability per target, negates, weighs and averages.
fn negative_log_likelihood() -> Work {
    Work {
        flop: per_call(
            "elements(target) + [weight] elements(target) + [reduced] elements(target)",
            |row| {
                let n = targets(row)?;
                Ok(n * (1 + i128::from(row.is_given("weight")) + i128::from(reduced(row)?)))
            },
        ),
        memory_access: per_call(
            "one element of self per target, targets, weights and results",
            |row| {
                let element = i128::from(row.tensor("self")?.meta.dtype.bytes());
                let target = row.tensor("target")?;
                let weight = row.optional_tensor("weight").map_or(0, |t| t.bytes());
                let results: i128 = row.outputs().iter().map(|t| t.bytes()).sum();
                Ok(targets(row)? * element + target.bytes() + weight + results)
            },
        ),
        mac: zero(NO_PRODUCTS),
        ac: per_call("[reduced] elements(target) - 1", |row| {
            let n = targets(row)?;
            Ok(if reduced(row)? { (n - 1).max(0) } else { 0 })
        }),
        synop: zero(NO_SYNAPSES),
    }
}

/// `log_softmax` and `nll_loss` in one op, as inference mode shows it; classes are dimension 1 (0 without a batch).
fn cross_entropy() -> Work {
    fn parts(row: &CallRow<'_>) -> Result<(i128, i128), RuleError> {
        let x = row.tensor("self")?;
        let classes = x.size(if x.dimensions() > 1 { 1 } else { 0 })?;
        let n = row.note("n", x.elements());
        Ok((
            n,
            row.note("rows", if classes == 0 { 0 } else { n / classes }),
        ))
    }
    Work {
        flop: per_call("5n - rows + rows + [reduced] rows", |row| {
            let (n, rows) = parts(row)?;
            Ok(5 * n + i128::from(reduced(row)?) * rows)
        }),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: per_call("3n - rows + [reduced] (rows - 1)", |row| {
            let (n, rows) = parts(row)?;
            Ok((3 * n - rows + if reduced(row)? { rows - 1 } else { 0 }).max(0))
        }),
        synop: zero(NO_SYNAPSES),
    }
}
