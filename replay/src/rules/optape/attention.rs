//! Scaled dot-product attention as one op. Products with masked-out keys are counted: the op's arguments do not say
//! which kernels skip them.

use super::{NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, RuleError, TensorView};

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
    tables.insert("aten::_transformer_encoder_layer_fwd", encoder_layer());
    tables.insert("aten::_native_multi_head_attention", multi_head());
}

/// Scores (batch * heads * queries * keys), rows of scores, features of queries and of values.
struct Sizes {
    scores: i128,
    rows: i128,
    d_q: i128,
    d_v: i128,
}

fn sizes(row: &CallRow<'_>) -> Result<Sizes, RuleError> {
    let (q, k, v) = (
        row.tensor("query")?,
        row.tensor("key")?,
        row.tensor("value")?,
    );
    let (d_q, d_v) = (row.note("d_q", q.size(-1)?), row.note("d_v", v.size(-1)?));
    let rows = if d_q == 0 { 0 } else { q.elements() / d_q };
    let rows = row.note("rows", rows);
    Ok(Sizes {
        scores: row.note("scores", rows * k.size(-2)?),
        rows,
        d_q,
        d_v,
    })
}

fn masked(row: &CallRow<'_>) -> bool {
    row.optional_tensor("attn_mask")
        .or_else(|| row.optional_tensor("attn_bias"))
        .is_some()
}

fn forward() -> Work {
    Work {
        // Two products, scaling, softmax (maximum, differences, exponentials, sum, quotients), mask.
        flop: per_call(
            "2 * scores * (d_q + d_v) + scores * 6 - 2 * rows + [mask] scores",
            |row| {
                let s = sizes(row)?;
                let mask = i128::from(masked(row)) * s.scores;
                Ok((2 * s.scores * (s.d_q + s.d_v) + 6 * s.scores - 2 * s.rows + mask).max(0))
            },
        ),
        memory_access: traffic(),
        mac: per_call(
            "scores * (d_q + d_v); whether a factor is binary is not looked at",
            |row| {
                let s = sizes(row)?;
                Ok(s.scores * (s.d_q + s.d_v))
            },
        ),
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
        flop: per_call(
            "2 * scores * (3 * d_q + 2 * d_v) + 9 * scores - 2 * rows",
            |row| {
                let s = sizes(row)?;
                Ok((2 * s.scores * (3 * s.d_q + 2 * s.d_v) + 9 * s.scores - 2 * s.rows).max(0))
            },
        ),
        memory_access: traffic(),
        mac: per_call("scores * (3 * d_q + 2 * d_v) + scores", |row| {
            let s = sizes(row)?;
            Ok(s.scores * (3 * s.d_q + 2 * s.d_v) + s.scores)
        }),
        ac: per_call("2 * scores", |row| Ok(2 * sizes(row)?.scores)),
        synop: zero(NO_SYNAPSES),
    }
}

/// Self-attention with its projections, as the fused inference path runs it: n = batch * length tokens of e features.
struct MultiHead {
    /// Tokens times features.
    tokens_features: i128,
    /// Multiplications of the projections and of the two attention products.
    products: i128,
    /// Scores of all heads, and rows of them.
    scores: i128,
    rows: i128,
    /// Elements of biases that are added.
    biases: i128,
}

fn multi_head_sizes(
    row: &CallRow<'_>,
    tokens: TensorView<'_>,
    heads: &str,
) -> Result<MultiHead, RuleError> {
    let features = row.integer("embed_dim")?;
    let tokens_features = row.note("elements(tokens)", tokens.elements());
    let n = if features == 0 {
        0
    } else {
        tokens_features / features
    };
    let length = row.note("length", tokens.size(-2)?);
    let heads = row.note("heads", row.integer(heads)?);
    let rows = n * heads;
    let scores = row.note("scores", rows * length);
    // Queries, keys and values; the projection back; scores and weighted values, each `length` long per token.
    let products = n * row.tensor("qkv_weight")?.elements()
        + n * row.tensor("proj_weight")?.elements()
        + 2 * tokens_features * length;
    let biases = n * (row.tensor("qkv_bias")?.elements() + row.tensor("proj_bias")?.elements());
    Ok(MultiHead {
        tokens_features,
        products: row.note("products", products),
        scores,
        rows,
        biases,
    })
}

impl MultiHead {
    /// Products, biases, scaling and softmax.
    fn flops(&self) -> i128 {
        2 * self.products + self.biases + 6 * self.scores - 2 * self.rows
    }

    /// Biases, differences and sums of the softmax.
    fn additions(&self) -> i128 {
        self.biases + 2 * self.scores - self.rows
    }
}

fn multi_head() -> Work {
    let sizes = |row: &CallRow<'_>| multi_head_sizes(row, row.tensor("query")?, "num_head");
    Work {
        flop: per_call(
            "2 * products + biases + 6 * scores - 2 * rows",
            move |row| Ok(sizes(row)?.flops()),
        ),
        memory_access: traffic(),
        mac: per_call(
            "products; whether a factor is binary is not looked at",
            move |row| Ok(sizes(row)?.products),
        ),
        ac: per_call("biases + 2 * scores - rows", move |row| {
            Ok(sizes(row)?.additions())
        }),
        synop: zero(NO_SYNAPSES),
    }
}

/// Attention, two residual additions, two layer norms, and two linear layers with an activation between them.
fn encoder_layer() -> Work {
    struct Layer {
        attention: MultiHead,
        tokens: i128,
        /// Multiplications of the linear layers.
        products: i128,
        /// Outputs of the first and the second.
        hidden: i128,
        gelu: bool,
    }
    fn sizes(row: &CallRow<'_>) -> Result<Layer, RuleError> {
        let src = row.tensor("src")?;
        let attention = multi_head_sizes(row, src, "num_heads")?;
        let (first, second) = (row.tensor("ffn_weight_1")?, row.tensor("ffn_weight_2")?);
        let tokens = src.elements() / src.size(-1)?.max(1);
        let products = row.note(
            "products(ffn)",
            tokens * (first.elements() + second.elements()),
        );
        Ok(Layer {
            tokens,
            products,
            hidden: tokens * first.size(0)?,
            gelu: row.boolean("use_gelu")?,
            attention,
        })
    }
    Work {
        flop: per_call(
            "attention + 2 * products(ffn) + biases + activation + 2 residual additions + 2 layer norms",
            |row| {
                let Layer {
                    attention,
                    tokens,
                    products,
                    hidden,
                    gelu,
                } = sizes(row)?;
                let n = attention.tokens_features;
                let activation = if gelu { 5 * hidden } else { hidden };
                let norms = 2 * (7 * n + 4 * tokens);
                Ok(attention.flops() + 2 * products + (hidden + n) + activation + 2 * n + norms)
            },
        ),
        memory_access: traffic(),
        mac: per_call(
            "products of attention and linear layers + 2 * elements(src) of the norms",
            |row| {
                let layer = sizes(row)?;
                Ok(layer.attention.products + layer.products + 2 * layer.attention.tokens_features)
            },
        ),
        ac: per_call(
            "attention + biases + activation + 2 residual additions + 2 * 3 * elements(src) of the norms",
            |row| {
                let Layer {
                    attention,
                    hidden,
                    gelu,
                    ..
                } = sizes(row)?;
                let n = attention.tokens_features;
                let activation = if gelu { hidden } else { 0 };
                Ok(attention.additions() + (hidden + n) + activation + 2 * n + 6 * n)
            },
        ),
        synop: zero(NO_SYNAPSES),
    }
}
