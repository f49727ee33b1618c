//! Reductions, scans, sorting, softmax.

use super::amount::Quantity::{Input, Out, Slices};
use super::amount::{Amount, insert_all, out_elements, work_with_mac};
use super::{NO_ADDITIONS, NO_PRODUCTS, NO_SYNAPSES, Tables, Work, per_call, traffic, zero};

const SUM: Amount = &[(1, Input), (-1, Out)];

pub(super) fn fill(tables: &mut Tables) {
    insert_all(
        tables,
        &[
            "aten::sum",
            "aten::sum.dim_IntList",
            "aten::sum.IntList_out",
            "aten::nansum",
            "aten::trace",
        ],
        SUM,
        SUM,
    );
    // A scan has as many results as operands: every one but the first of a slice is an addition.
    insert_all(
        tables,
        &["aten::cumsum", "aten::cumsum_"],
        &[(1, Input), (-1, Slices)],
        &[(1, Input), (-1, Slices)],
    );
    insert_all(
        tables,
        &["aten::cumprod", "aten::cummax", "aten::cummin"],
        &[(1, Input), (-1, Slices)],
        &[],
    );
    // The division comes on top of the sum.
    insert_all(
        tables,
        &[
            "aten::mean",
            "aten::mean.dim",
            "aten::mean.out",
            "aten::nanmean",
        ],
        &[(1, Input)],
        SUM,
    );
    // Multiplications, comparisons.
    insert_all(
        tables,
        &[
            "aten::prod",
            "aten::prod.dim_int",
            "aten::amax",
            "aten::amin",
            "aten::amax.out",
            "aten::amin.out",
            "aten::max",
            "aten::min",
            "aten::max.dim",
            "aten::min.dim",
            "aten::argmax",
            "aten::argmin",
            "aten::any",
            "aten::any.dim",
            "aten::any.dims",
            "aten::all",
            "aten::all.dim",
            "aten::all.dims",
            "aten::aminmax",
        ],
        SUM,
        &[],
    );
    insert_all(
        tables,
        &["aten::count_nonzero", "aten::count_nonzero.dim_IntList"],
        &[(2, Input), (-1, Out)],
        SUM,
    );
    // Mean, deviations, squares, their mean.
    insert_all(
        tables,
        &[
            "aten::var",
            "aten::var.dim",
            "aten::var.correction",
            "aten::var_mean",
            "aten::var_mean.dim",
            "aten::var_mean.correction",
        ],
        &[(4, Input)],
        &[(3, Input), (-2, Out)],
    );
    insert_all(
        tables,
        &[
            "aten::std",
            "aten::std.dim",
            "aten::std.correction",
            "aten::std_mean",
            "aten::std_mean.dim",
            "aten::std_mean.correction",
        ],
        &[(4, Input), (1, Out)],
        &[(3, Input), (-2, Out)],
    );
    // Squares (or powers), accumulated at once, and a root.
    for op in [
        "aten::norm.Scalar",
        "aten::norm.ScalarOpt_dim",
        "aten::norm.ScalarOpt_dtype",
        "aten::norm.ScalarOpt_dim_dtype",
        "aten::linalg_vector_norm",
        "aten::linalg_vector_norm.out",
    ] {
        tables.insert(op, work_with_mac(&[(2, Input)], &[(1, Input)], &[]));
    }
    // Maximum, differences, exponentials, sum, logarithm, sum.
    insert_all(
        tables,
        &["aten::logsumexp", "aten::logsumexp.out"],
        &[(4, Input)],
        &[(2, Input)],
    );

    // Maximum, differences, exponentials, sum, quotients.
    insert_all(
        tables,
        &[
            "aten::_softmax",
            "aten::_softmax.out",
            "aten::softmax.int",
            "aten::_safe_softmax",
        ],
        &[(5, Input), (-2, Slices)],
        &[(2, Input), (-1, Slices)],
    );
    // Maximum, differences, exponentials, sum, logarithms, differences.
    insert_all(
        tables,
        &[
            "aten::_log_softmax",
            "aten::_log_softmax.out",
            "aten::log_softmax.int",
        ],
        &[(5, Input), (-1, Slices)],
        &[(3, Input), (-1, Slices)],
    );
    // y * (g - <g, y>).
    for op in [
        "aten::_softmax_backward_data",
        "aten::_softmax_backward_data.out",
    ] {
        tables.insert(
            op,
            work_with_mac(&[(4, Input), (-1, Slices)], &[(1, Input)], &[(1, Input)]),
        );
    }
    // g - exp(y) * sum(g).
    insert_all(
        tables,
        &[
            "aten::_log_softmax_backward_data",
            "aten::_log_softmax_backward_data.out",
        ],
        &[(4, Input), (-1, Slices)],
        &[(2, Input), (-1, Slices)],
    );

    for op in [
        "aten::sort",
        "aten::sort.stable",
        "aten::argsort",
        "aten::argsort.stable",
        "aten::msort",
    ] {
        tables.insert(op, sorting());
    }
    // At least one comparison per element.
    insert_all(
        tables,
        &[
            "aten::topk",
            "aten::topk.values",
            "aten::kthvalue",
            "aten::median",
            "aten::median.dim",
            "aten::nanmedian",
            "aten::mode",
        ],
        &[(1, Input)],
        &[],
    );
    insert_all(
        tables,
        &[
            "aten::equal",
            "aten::isclose",
            "aten::allclose",
            "aten::is_nonzero",
        ],
        &[(1, Input)],
        &[],
    );
    insert_all(
        tables,
        &["aten::bincount", "aten::histc"],
        &[(1, Input)],
        &[(1, Input)],
    );
}

/// Comparisons of a merge sort.
fn sorting() -> Work {
    Work {
        flop: per_call("elements(out) * ceil(log2(length))", |row| {
            let x = row.tensor("self")?;
            let dim = row.integer("dim").unwrap_or(-1);
            let length = if x.dimensions() == 0 {
                1
            } else {
                x.size(isize::try_from(dim).unwrap_or(isize::MAX))?
            };
            let levels = i128::from(128 - (length - 1).max(0).leading_zeros());
            Ok(row.note("elements(out)", out_elements(row))
                * row.note("ceil(log2(length))", levels))
        }),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: zero(NO_ADDITIONS),
        synop: zero(NO_SYNAPSES),
    }
}
