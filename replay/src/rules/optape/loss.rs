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
            "aten::multilabel_margin_loss",
        ],
        &[(3, Input)],
        &[(2, Input)],
    );
    insert_all(
        tables,
        &[
            "aten::multi_margin_loss_backward",
            "aten::multilabel_margin_loss_backward",
        ],
        &[(3, Out)],
        &[(2, Out)],
    );
    composites(tables);
    for op in [
        "aten::_ctc_loss",
        "aten::_ctc_loss.Tensor",
        "aten::ctc_loss.IntList",
        "aten::ctc_loss.Tensor",
        "aten::_cudnn_ctc_loss",
        "aten::_cudnn_ctc_loss.Tensor",
    ] {
        tables.insert(op, connectionist());
    }
    for op in [
        "aten::_ctc_loss_backward",
        "aten::_ctc_loss_backward.Tensor",
    ] {
        tables.insert(op, connectionist_backward());
    }
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

/// Losses that are several ops, and one under inference mode.
fn composites(tables: &mut Tables) {
    /// So many per element of an argument, and the sum where the op reduces.
    fn of(argument: &'static str, flop: (&str, Counts), ac: (&str, Counts)) -> Work {
        let rule = |(text, per): (&str, Counts)| {
            per_call(
                format!("({text}) * elements({argument}) + [reduced] (elements({argument}) - 1)"),
                move |row| {
                    let n = row.note(
                        &format!("elements({argument})"),
                        row.tensor(argument)?.elements(),
                    );
                    let sum = if reduced(row)? { (n - 1).max(0) } else { 0 };
                    Ok(per(row)? * n + sum)
                },
            )
        };
        Work {
            flop: rule(flop),
            memory_access: traffic(),
            mac: zero(NO_PRODUCTS),
            ac: rule(ac),
            synop: zero(NO_SYNAPSES),
        }
    }
    // exp(x) - t * x, or x - t * log(x + eps); with Stirling's t * log(t) - t + log(2 pi t) / 2.
    tables.insert(
        "aten::poisson_nll_loss",
        of(
            "target",
            ("[log_input] 3, else 4; [full] 8 more", |row| {
                let plain = if row.boolean("log_input")? { 3 } else { 4 };
                Ok(plain + if row.boolean("full")? { 8 } else { 0 })
            }),
            ("[log_input] 1, else 2; [full] 3 more", |row| {
                let plain = if row.boolean("log_input")? { 1 } else { 2 };
                Ok(plain + if row.boolean("full")? { 3 } else { 0 })
            }),
        ),
    );
    // t == 1 ? x : max(0, margin - x).
    tables.insert(
        "aten::hinge_embedding_loss",
        of("target", ("4", |_| Ok(4)), ("1", |_| Ok(1))),
    );
    // max(0, -t * (x - y) + margin).
    tables.insert(
        "aten::margin_ranking_loss",
        of("input1", ("5", |_| Ok(5)), ("2", |_| Ok(2))),
    );
    // Distances of d features, from the positive and the negative (and between these): differences, eps, absolute values or squares, sums;
    // then two roots, margin, difference and maximum.
    let features = |row: &CallRow<'_>| {
        let x = row.tensor("anchor")?;
        let distances = if row.boolean("swap")? { 3 } else { 2 };
        let d = if x.dimensions() == 0 { 1 } else { x.size(-1)? };
        let rows = if d == 0 { 0 } else { x.elements() / d };
        Ok::<_, RuleError>((
            row.note("elements(anchor)", x.elements()) * row.note("distances", distances),
            row.note("rows", rows),
        ))
    };
    tables.insert(
        "aten::triplet_margin_loss",
        Work {
            flop: per_call("4 * distances * elements(anchor) + 6 * rows", move |row| {
                let (terms, rows) = features(row)?;
                Ok(4 * terms + 6 * rows)
            }),
            memory_access: traffic(),
            mac: per_call("distances * elements(anchor)", move |row| {
                Ok(features(row)?.0)
            }),
            ac: per_call("2 * distances * elements(anchor) + 3 * rows", move |row| {
                let (terms, rows) = features(row)?;
                Ok(2 * terms + 3 * rows)
            }),
            synop: zero(NO_SYNAPSES),
        },
    );
    // A product and two norms of d features; per row a root, a quotient, 1 - cos or max(0, cos - margin), the choice, the sum.
    let elements = |row: &CallRow<'_>| {
        Ok::<_, RuleError>((
            row.note("elements(input1)", row.tensor("input1")?.elements()),
            targets(row)?,
        ))
    };
    tables.insert(
        "aten::cosine_embedding_loss",
        Work {
            flop: per_call("6 * elements(input1) + 8 * elements(target)", move |row| {
                let (n, rows) = elements(row)?;
                Ok(6 * n + 8 * rows)
            }),
            memory_access: traffic(),
            mac: per_call("3 * elements(input1)", move |row| Ok(3 * elements(row)?.0)),
            ac: per_call("3 * elements(target)", move |row| Ok(3 * elements(row)?.1)),
            synop: zero(NO_SYNAPSES),
        },
    );
}

type Counts = fn(&CallRow<'_>) -> Result<i128, RuleError>;

/// Steps in time of the forward variables of connectionist temporal classification (A. Graves et al., ICML 2006): at every time step
/// 2 L + 1 states of a target of length L, in all of the batch.
fn states(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let scores = row.tensor("log_probs")?;
    let time = row.note("time steps", scores.size(0)?);
    let batch = if scores.dimensions() > 2 {
        scores.size(1)?
    } else {
        1
    };
    let targets = row.note("elements(targets)", row.tensor("targets")?.elements());
    Ok(row.note("states", time * (2 * targets + row.note("batch", batch))))
}

fn connectionist() -> Work {
    Work {
        // log(exp(a) + exp(b) + exp(c)) + score: two comparisons, three differences and exponentials, two sums, a logarithm, two sums.
        flop: per_call("13 * time steps * (2 * elements(targets) + batch)", |row| {
            Ok(13 * states(row)?)
        }),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: per_call("7 * time steps * (2 * elements(targets) + batch)", |row| {
            Ok(7 * states(row)?)
        }),
        synop: zero(NO_SYNAPSES),
    }
}

fn connectionist_backward() -> Work {
    let scores = |row: &CallRow<'_>| {
        let scores = row.tensor("log_probs")?.elements();
        Ok::<i128, RuleError>(row.note("elements(log_probs)", scores))
    };
    Work {
        // The backward variables, their sum with the forward ones by class, and (exp(score) - exp(sum)) * g.
        flop: per_call("20 * states + 6 * elements(log_probs)", move |row| {
            Ok(20 * states(row)? + 6 * scores(row)?)
        }),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: per_call("11 * states + 3 * elements(log_probs)", move |row| {
            Ok(11 * states(row)? + 3 * scores(row)?)
        }),
        synop: zero(NO_SYNAPSES),
    }
}
