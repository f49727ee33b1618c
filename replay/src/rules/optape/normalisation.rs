//! Batch, layer, group and RMS normalisation, forward and backward.
//!
//! n: elements, c: statistics that are computed or applied (channels of a batch norm, rows of a layer norm), w: elements
//! of the weight.

use super::{NO_ADDITIONS, NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, RuleError};

/// How a normalisation groups its elements, and whether it computes statistics.
#[derive(Clone, Copy)]
enum Kind {
    /// Per channel; statistics of the batch where the argument of that name is true.
    Batch(Option<&'static str>),
    /// Per channel; `true`: statistics of the batch, always.
    BatchAlways(bool),
    /// Rows over `normalized_shape`.
    Layer,
    /// Groups of channels of each sample.
    Group,
}

impl Kind {
    /// Number of statistics.
    fn groups(self, row: &CallRow<'_>, input: &str) -> Result<i128, RuleError> {
        let x = row.tensor(input)?;
        let c = match self {
            Self::Batch(_) | Self::BatchAlways(_) => x.size(1)?,
            Self::Layer => {
                let inner: i128 = row.integers("normalized_shape")?.iter().product();
                if inner == 0 { 0 } else { x.elements() / inner }
            }
            Self::Group => {
                let groups = row
                    .integer("group")
                    .or_else(|_| row.integer("num_groups"))?;
                x.size(0)? * groups
            }
        };
        Ok(row.note("c", c))
    }

    fn computes_statistics(self, row: &CallRow<'_>) -> Result<bool, RuleError> {
        match self {
            Self::Batch(Some(argument)) => row.boolean(argument),
            Self::Batch(None) | Self::Layer | Self::Group => Ok(true),
            Self::BatchAlways(always) => Ok(always),
        }
    }
}

pub(super) fn fill(tables: &mut Tables) {
    let batch: [(&str, Kind); 10] = [
        ("aten::native_batch_norm", Kind::Batch(Some("training"))),
        (
            "aten::_native_batch_norm_legit",
            Kind::Batch(Some("training")),
        ),
        (
            "aten::_native_batch_norm_legit.no_stats",
            Kind::Batch(Some("training")),
        ),
        (
            "aten::_native_batch_norm_legit_no_training",
            Kind::BatchAlways(false),
        ),
        ("aten::_batch_norm_with_update", Kind::BatchAlways(true)),
        ("aten::_batch_norm_no_update", Kind::BatchAlways(false)),
        ("aten::cudnn_batch_norm", Kind::Batch(Some("training"))),
        ("aten::miopen_batch_norm", Kind::Batch(Some("training"))),
        ("aten::batch_norm", Kind::Batch(Some("training"))),
        ("aten::instance_norm", Kind::Batch(Some("use_input_stats"))),
    ];
    for (op, kind) in batch {
        tables.insert(op, forward(kind));
    }
    tables.insert("aten::native_layer_norm", forward(Kind::Layer));
    tables.insert("aten::layer_norm", forward(Kind::Layer));
    tables.insert("aten::native_group_norm", forward(Kind::Group));
    tables.insert("aten::group_norm", forward(Kind::Group));

    tables.insert(
        "aten::native_batch_norm_backward",
        backward(Kind::Batch(Some("train")), "grad_out"),
    );
    tables.insert(
        "aten::batch_norm_backward",
        backward(Kind::Batch(Some("update")), "grad_out"),
    );
    tables.insert(
        "aten::cudnn_batch_norm_backward",
        backward(Kind::Batch(None), "grad_output"),
    );
    tables.insert(
        "aten::miopen_batch_norm_backward",
        backward(Kind::Batch(None), "grad_output"),
    );
    tables.insert(
        "aten::native_layer_norm_backward",
        backward(Kind::Layer, "grad_out"),
    );
    tables.insert(
        "aten::native_group_norm_backward",
        backward(Kind::Group, "grad_out"),
    );

    for op in ["aten::_fused_rms_norm", "aten::rms_norm"] {
        tables.insert(op, rms());
    }
    tables.insert("aten::_fused_rms_norm_backward", rms_backward());
}

/// n elements, c statistics, whether there is a weight, whether statistics are computed, whether running ones are kept.
struct Shape {
    n: i128,
    c: i128,
    affine: i128,
    computes: bool,
    running: bool,
}

fn shape(row: &CallRow<'_>, kind: Kind) -> Result<Shape, RuleError> {
    let n = row.note("n", row.tensor("input")?.elements());
    Ok(Shape {
        n,
        c: kind.groups(row, "input")?,
        affine: if row.is_given("weight") { n } else { 0 },
        computes: kind.computes_statistics(row)?,
        running: row.is_given("running_mean"),
    })
}

fn forward(kind: Kind) -> Work {
    Work {
        flop: per_call(
            "with statistics: 5n + 4c + [weight] 2n + [running statistics] 6c; without: 2n + 2c + [weight] 2n",
            move |row| {
                let Shape {
                    n,
                    c,
                    affine,
                    computes,
                    running,
                } = shape(row, kind)?;
                // Mean n, variance 2n + 2c, root 2c, normalisation 2n; weight and bias 2n; running mean and variance 6c.
                Ok(if computes {
                    5 * n + 4 * c + 2 * affine + if running { 6 * c } else { 0 }
                } else {
                    2 * n + 2 * c + 2 * affine
                })
            },
        ),
        memory_access: traffic(),
        mac: per_call(
            "[weight] n + [statistics computed and kept] 2c",
            move |row| {
                let Shape {
                    c,
                    affine,
                    computes,
                    running,
                    ..
                } = shape(row, kind)?;
                Ok(affine + if computes && running { 2 * c } else { 0 })
            },
        ),
        ac: per_call(
            "with statistics: 3n + [running statistics] 2c; without: n + c",
            move |row| {
                let Shape {
                    n,
                    c,
                    computes,
                    running,
                    ..
                } = shape(row, kind)?;
                // Sum n - c, variance n, epsilon c, deviations n.
                Ok(if computes {
                    3 * n + if running { 2 * c } else { 0 }
                } else {
                    n + c
                })
            },
        ),
        synop: zero(NO_SYNAPSES),
    }
}

/// Which gradients are asked for: of the input, the weight, the bias.
fn asked(row: &CallRow<'_>) -> [bool; 3] {
    match row.booleans("output_mask") {
        Ok(mask) => [0, 1, 2].map(|i| mask.get(i).copied().unwrap_or(false)),
        // Ops without a mask give all gradients that have a tensor.
        Err(_) => [0, 1, 2].map(|i| row.optional_output(i).is_some()),
    }
}

fn backward(kind: Kind, grad: &'static str) -> Work {
    /// (n, c, elements of the weight, gradients asked for, statistics were computed)
    fn parts(
        row: &CallRow<'_>,
        kind: Kind,
        grad: &str,
    ) -> Result<(i128, i128, i128, [bool; 3], bool), RuleError> {
        let n = row.note("n", row.tensor(grad)?.elements());
        let c = kind.groups(row, "input")?;
        let weight = row.optional_tensor("weight").map_or(c, |w| w.elements());
        Ok((
            n,
            c,
            row.note("w", weight),
            asked(row),
            kind.computes_statistics(row)?,
        ))
    }
    Work {
        flop: per_call(
            "[input] with statistics 12n, without 2n; [weight] 4n - w; [bias] n - w; sums that the input's gradient of a \
             batch norm already has are not counted again",
            move |row| {
                let (n, c, w, [input, weight, bias], computes) = parts(row, kind, grad)?;
                let per_channel = matches!(kind, Kind::Batch(_) | Kind::BatchAlways(_));
                let shared = input && computes && per_channel;
                let mut flops = 0;
                if input {
                    // Normalised input 2n, two sums (n - c and 2n - c), their combination 5n + 2c; layer and group norms
                    // multiply with the weight first, n.
                    flops += if computes {
                        2 * n + (n - c) + (2 * n - c) + (5 * n + 2 * c)
                    } else {
                        2 * n
                    };
                    if !per_channel && row.is_given("weight") {
                        flops += n;
                    }
                    if !per_channel {
                        // Their weight's gradient needs the normalised input, which is there already.
                        flops -= if weight { 2 * n } else { 0 };
                    }
                }
                if weight && !shared {
                    flops += 2 * n + (2 * n - w);
                }
                if bias && !shared {
                    flops += n - w;
                }
                Ok(flops.max(0))
            },
        ),
        memory_access: traffic(),
        mac: per_call("[input with statistics, or weight] n", move |row| {
            let (n, _, _, [input, weight, _], computes) = parts(row, kind, grad)?;
            let per_channel = matches!(kind, Kind::Batch(_) | Kind::BatchAlways(_));
            let in_input = i128::from(input && computes) * n;
            let in_weight = if weight && !(per_channel && input && computes) {
                n
            } else {
                0
            };
            Ok(in_input + in_weight)
        }),
        ac: per_call(
            "[input with statistics] 4n - c; [weight alone] n; [bias alone] n - w",
            move |row| {
                let (n, c, w, [input, weight, bias], computes) = parts(row, kind, grad)?;
                let per_channel = matches!(kind, Kind::Batch(_) | Kind::BatchAlways(_));
                let shared = input && computes && per_channel;
                let mut additions = 0;
                if input && computes {
                    additions += n + (n - c) + 2 * n;
                }
                if weight && !shared && !(input && computes) {
                    additions += n;
                }
                if bias && !shared {
                    additions += n - w;
                }
                Ok(additions.max(0))
            },
        ),
        synop: zero(NO_SYNAPSES),
    }
}

/// x / sqrt(mean(x * x) + eps) * weight.
fn rms() -> Work {
    Work {
        flop: per_call("3n + 3c + [weight] n", |row| {
            let n = row.note("n", row.tensor("input")?.elements());
            let c = Kind::Layer.groups(row, "input")?;
            Ok(3 * n + 3 * c + if row.is_given("weight") { n } else { 0 })
        }),
        memory_access: traffic(),
        mac: per_call(
            "n",
            |row| Ok(row.note("n", row.tensor("input")?.elements())),
        ),
        ac: per_call("c", |row| Kind::Layer.groups(row, "input")),
        synop: zero(NO_SYNAPSES),
    }
}

fn rms_backward() -> Work {
    Work {
        flop: per_call("[input] 6n + 2c + [weight] n; [weight] 3n - w", |row| {
            let n = row.note("n", row.tensor("grad_out")?.elements());
            let c = Kind::Layer.groups(row, "input")?;
            let weight = row.optional_tensor("weight");
            let [input, of_weight, _] = asked(row);
            // <g, x> per row 2n, x times it n, difference n, scale 2n.
            let mut flops = if input {
                6 * n + 2 * c + if weight.is_some() { n } else { 0 }
            } else {
                0
            };
            if of_weight {
                flops += 3 * n - weight.map_or(0, |w| w.elements());
            }
            Ok(flops)
        }),
        memory_access: traffic(),
        mac: per_call("n for each gradient", |row| {
            let n = row.note("n", row.tensor("grad_out")?.elements());
            let [input, weight, _] = asked(row);
            Ok(n * (i128::from(input) + i128::from(weight)))
        }),
        ac: per_call("[input] n", |row| {
            let n = row.note("n", row.tensor("grad_out")?.elements());
            Ok(if asked(row)[0] { n } else { 0 })
        }),
        synop: zero(NO_ADDITIONS),
    }
}
