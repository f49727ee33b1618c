//! Scaled dot-product attention as one op. Products with masked-out keys are counted: the op's arguments do not say
//! which kernels skip them.

use super::{NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, RuleError};

pub(super) fn fill(tables: &mut Tables) {
    for op in [
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_attention_math",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    ] {
        tables.insert(op, forward());
    }
    for op in [
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::_scaled_dot_product_flash_attention_backward",
        "aten::_scaled_dot_product_efficient_attention_backward",
        "aten::_scaled_dot_product_cudnn_attention_backward",
        "aten::_scaled_dot_product_fused_attention_overrideable_backward",
    ] {
        tables.insert(op, backward());
    }
}

/// Scores (batch * heads * queries * keys), rows of scores, features of queries and of values.
struct Sizes {
    scores: i128,
    rows: i128,
    d_q: i128,
    d_v: i128,
}

fn sizes(row: &CallRow<'_>) -> Result<Sizes, RuleError> {
    let (q, k, v) = (row.tensor("query")?, row.tensor("key")?, row.tensor("value")?);
    let (d_q, d_v) = (row.note("d_q", q.size(-1)?), row.note("d_v", v.size(-1)?));
    let rows = if d_q == 0 { 0 } else { q.elements() / d_q };
    let rows = row.note("rows", rows);
    Ok(Sizes { scores: row.note("scores", rows * k.size(-2)?), rows, d_q, d_v })
}

fn masked(row: &CallRow<'_>) -> bool {
    row.optional_tensor("attn_mask").or_else(|| row.optional_tensor("attn_bias")).is_some()
}

fn forward() -> Work {
    Work {
        // Two products, scaling, softmax (maximum, differences, exponentials, sum, quotients), mask.
        flop: per_call("2 * scores * (d_q + d_v) + scores * 6 - 2 * rows + [mask] scores", |row| {
            let s = sizes(row)?;
            let mask = i128::from(masked(row)) * s.scores;
            Ok((2 * s.scores * (s.d_q + s.d_v) + 6 * s.scores - 2 * s.rows + mask).max(0))
        }),
        memory_access: traffic(),
        mac: per_call("scores * (d_q + d_v); whether a factor is binary is not looked at", |row| {
            let s = sizes(row)?;
            Ok(s.scores * (s.d_q + s.d_v))
        }),
        ac: per_call("2 * scores - rows + [mask] scores", |row| {
            let s = sizes(row)?;
            Ok((2 * s.scores - s.rows + i128::from(masked(row)) * s.scores).max(0))
        }),
        synop: zero(NO_SYNAPSES),
    }
}

fn backward() -> Work {
    Work {
        // Scores again, gradients of values, probabilities, queries, keys: five products; softmax again and its gradient.
        flop: per_call("2 * scores * (3 * d_q + 2 * d_v) + 9 * scores - 2 * rows", |row| {
            let s = sizes(row)?;
            Ok((2 * s.scores * (3 * s.d_q + 2 * s.d_v) + 9 * s.scores - 2 * s.rows).max(0))
        }),
        memory_access: traffic(),
        mac: per_call("scores * (3 * d_q + 2 * d_v) + scores", |row| {
            let s = sizes(row)?;
            Ok(s.scores * (3 * s.d_q + 2 * s.d_v) + s.scores)
        }),
        ac: per_call("2 * scores", |row| Ok(2 * sizes(row)?.scores)),
        synop: zero(NO_SYNAPSES),
    }
}
