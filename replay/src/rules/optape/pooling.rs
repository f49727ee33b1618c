//! Pooling and resampling, in 1 to 3 dimensions.

use super::amount::Quantity::{Input, Out};
use super::amount::{insert_all, out_elements};
use super::{NO_ADDITIONS, NO_PRODUCTS, NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, RuleError, TensorView};

pub(super) fn fill(tables: &mut Tables) {
    for (op, dimensions) in [
        ("aten::max_pool2d_with_indices", 2),
        ("aten::max_pool3d_with_indices", 3),
        ("aten::max_pool1d_with_indices", 1),
        ("aten::max_pool1d", 1),
        ("aten::max_pool2d", 2),
        ("aten::max_pool3d", 3),
    ] {
        tables.insert(op, maximum(dimensions));
    }
    for (op, dimensions) in [
        ("aten::avg_pool1d", 1),
        ("aten::avg_pool2d", 2),
        ("aten::avg_pool3d", 3),
    ] {
        tables.insert(op, average(dimensions));
    }
    for (op, dimensions) in [
        ("aten::avg_pool2d_backward", 2),
        ("aten::avg_pool3d_backward", 3),
    ] {
        tables.insert(op, average_backward(dimensions));
    }
    // Every gradient is added at the place of its maximum.
    insert_all(
        tables,
        &[
            "aten::max_pool2d_with_indices_backward",
            "aten::max_pool3d_with_indices_backward",
            "aten::adaptive_max_pool2d_backward",
            "aten::adaptive_max_pool3d_backward",
        ],
        &[(1, Input)],
        &[(1, Input)],
    );
    for (op, dimensions) in [
        ("aten::_adaptive_avg_pool2d", 2),
        ("aten::_adaptive_avg_pool3d", 3),
        ("aten::adaptive_avg_pool1d", 1),
        ("aten::adaptive_avg_pool2d", 2),
        ("aten::adaptive_avg_pool3d", 3),
    ] {
        tables.insert(op, adaptive(dimensions, true));
    }
    for (op, dimensions) in [
        ("aten::adaptive_max_pool1d", 1),
        ("aten::adaptive_max_pool2d", 2),
        ("aten::adaptive_max_pool3d", 3),
    ] {
        tables.insert(op, adaptive(dimensions, false));
    }
    for (op, dimensions) in [
        ("aten::_adaptive_avg_pool2d_backward", 2),
        ("aten::_adaptive_avg_pool3d_backward", 3),
    ] {
        tables.insert(op, adaptive_backward(dimensions));
    }

    // Weighted means of 2, 4, 8 or 16 neighbours, and the same number of additions back.
    for (op, neighbours) in [
        ("aten::upsample_linear1d", 2),
        ("aten::upsample_linear1d.vec", 2),
        ("aten::upsample_linear1d_backward", 2),
        ("aten::upsample_bilinear2d", 4),
        ("aten::upsample_bilinear2d.vec", 4),
        ("aten::upsample_bilinear2d_backward", 4),
        ("aten::_upsample_bilinear2d_aa", 4),
        ("aten::_upsample_bilinear2d_aa.vec", 4),
        ("aten::grid_sampler_2d", 4),
        ("aten::upsample_trilinear3d", 8),
        ("aten::upsample_trilinear3d.vec", 8),
        ("aten::upsample_trilinear3d_backward", 8),
        ("aten::grid_sampler_3d", 8),
        ("aten::upsample_bicubic2d", 16),
        ("aten::upsample_bicubic2d.vec", 16),
        ("aten::upsample_bicubic2d_backward", 16),
    ] {
        tables.insert(op, interpolation(neighbours, op.ends_with("_backward")));
    }
    insert_all(
        tables,
        &[
            "aten::upsample_nearest1d",
            "aten::upsample_nearest2d",
            "aten::upsample_nearest2d.vec",
            "aten::upsample_nearest3d",
            "aten::upsample_nearest3d.vec",
            "aten::_upsample_nearest_exact2d",
        ],
        &[],
        &[],
    );
    insert_all(
        tables,
        &[
            "aten::upsample_nearest1d_backward",
            "aten::upsample_nearest2d_backward",
            "aten::upsample_nearest3d_backward",
        ],
        &[(1, Input), (-1, Out)],
        &[(1, Input), (-1, Out)],
    );
}

fn work(flop: crate::rules::Rule, ac: crate::rules::Rule) -> Work {
    Work {
        flop,
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac,
        synop: zero(NO_SYNAPSES),
    }
}

/// Elements of the window; a single size is meant for all dimensions.
fn window(row: &CallRow<'_>, dimensions: u32) -> Result<i128, RuleError> {
    let sizes = row.integers("kernel_size")?;
    let window = match sizes.as_slice() {
        [size] => size.pow(dimensions),
        sizes => sizes.iter().product(),
    };
    Ok(row.note("window", window))
}

fn maximum(dimensions: u32) -> Work {
    work(
        per_call("elements(out) * (window - 1)", move |row| {
            Ok(row.note("elements(out)", out_elements(row)) * (window(row, dimensions)? - 1))
        }),
        zero(NO_ADDITIONS),
    )
}

fn average(dimensions: u32) -> Work {
    work(
        per_call("elements(out) * window", move |row| {
            Ok(row.note("elements(out)", out_elements(row)) * window(row, dimensions)?)
        }),
        per_call("elements(out) * (window - 1)", move |row| {
            Ok(row.note("elements(out)", out_elements(row)) * (window(row, dimensions)? - 1))
        }),
    )
}

fn average_backward(dimensions: u32) -> Work {
    let gradients = |row: &CallRow<'_>| {
        Ok::<i128, RuleError>(row.note("elements(grad)", row.tensor_at(0)?.elements()))
    };
    work(
        per_call("elements(grad) * (window + 1)", move |row| {
            Ok(gradients(row)? * (window(row, dimensions)? + 1))
        }),
        per_call("elements(grad) * window", move |row| {
            Ok(gradients(row)? * window(row, dimensions)?)
        }),
    )
}

/// Elements of all windows of an adaptive pooling from `large` to `small`: window i reaches from floor(i * in / out) to
/// ceil((i + 1) * in / out), so neighbours may overlap.
fn adaptive_windows(
    large: TensorView<'_>,
    small: TensorView<'_>,
    dimensions: u32,
) -> Result<i128, RuleError> {
    let mut windows = 1;
    let mut positions = 1;
    for back in 1..=dimensions as isize {
        let (from, to) = (large.size(-back)?, small.size(-back)?);
        positions *= to;
        // Pooling to more than 2^16 positions is not what adaptive pooling is for; the loop stays short.
        let along: i128 = (0..to.min(1 << 16))
            .map(|i| {
                ((i + 1) * from).div_euclid(to) + i128::from(((i + 1) * from).rem_euclid(to) != 0)
                    - i * from / to
            })
            .sum();
        windows *= along;
    }
    let lead = if positions == 0 {
        0
    } else {
        small.elements() / positions
    };
    Ok(lead * windows)
}

fn adaptive(dimensions: u32, mean: bool) -> Work {
    let windows = move |row: &CallRow<'_>| {
        let windows = adaptive_windows(row.tensor("self")?, row.output(0)?, dimensions)?;
        Ok::<i128, RuleError>(row.note("elements(windows)", windows))
    };
    let reduced = move |row: &CallRow<'_>| {
        Ok((windows(row)? - row.note("elements(out)", row.output(0)?.elements())).max(0))
    };
    if mean {
        work(
            per_call("elements(windows)", windows),
            per_call("elements(windows) - elements(out)", reduced),
        )
    } else {
        work(
            per_call("elements(windows) - elements(out)", reduced),
            zero(NO_ADDITIONS),
        )
    }
}

fn adaptive_backward(dimensions: u32) -> Work {
    let windows = move |row: &CallRow<'_>| {
        let windows = adaptive_windows(row.output(0)?, row.tensor("grad_output")?, dimensions)?;
        Ok::<i128, RuleError>(row.note("elements(windows)", windows))
    };
    work(
        per_call("elements(windows) + elements(grad)", move |row| {
            Ok(windows(row)? + row.note("elements(grad)", row.tensor("grad_output")?.elements()))
        }),
        per_call("elements(windows)", windows),
    )
}

fn interpolation(neighbours: i128, backward: bool) -> Work {
    let base = move |row: &CallRow<'_>| {
        let elements = if backward {
            row.tensor_at(0)?.elements()
        } else {
            out_elements(row)
        };
        Ok::<i128, RuleError>(row.note("elements", elements))
    };
    let additions = if backward { neighbours } else { neighbours - 1 };
    Work {
        flop: per_call(
            format!("{} * elements", neighbours + additions),
            move |row| Ok((neighbours + additions) * base(row)?),
        ),
        memory_access: traffic(),
        mac: per_call(format!("{neighbours} * elements"), move |row| {
            Ok(neighbours * base(row)?)
        }),
        ac: zero("the additions are part of the multiply-accumulates"),
        synop: zero(NO_SYNAPSES),
    }
}
