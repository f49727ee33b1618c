//! Distances between all pairs of rows.

use super::{NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, RuleError};

pub(super) fn fill(tables: &mut Tables) {
    for op in [
        "aten::_cdist_forward",
        "aten::cdist",
        "aten::_euclidean_dist",
    ] {
        tables.insert(op, pairs());
    }
    tables.insert("aten::_cdist_backward", pairs_backward());
}

/// Pairs of rows times features, and pairs.
fn sizes(row: &CallRow<'_>, pairs: i128) -> Result<(i128, i128), RuleError> {
    let features = row.note("features", row.tensor("x1")?.size(-1)?);
    let pairs = row.note("pairs", pairs);
    Ok((pairs * features, pairs))
}

/// Differences, their squares (or powers), sums, a root.
fn pairs() -> Work {
    let of = |row: &CallRow<'_>| sizes(row, row.output(0)?.elements());
    Work {
        flop: per_call("3 * pairs * features + pairs", move |row| {
            let (terms, pairs) = of(row)?;
            Ok(3 * terms + pairs)
        }),
        memory_access: traffic(),
        mac: per_call("pairs * features", move |row| Ok(of(row)?.0)),
        ac: per_call("pairs * features", move |row| Ok(of(row)?.0)),
        synop: zero(NO_SYNAPSES),
    }
}

/// Each difference again, times the gradient over the distance, added up.
fn pairs_backward() -> Work {
    let of = |row: &CallRow<'_>| sizes(row, row.tensor("cdist")?.elements());
    Work {
        flop: per_call("3 * pairs * features + pairs", move |row| {
            let (terms, pairs) = of(row)?;
            Ok(3 * terms + pairs)
        }),
        memory_access: traffic(),
        mac: per_call("pairs * features", move |row| Ok(of(row)?.0)),
        ac: per_call("pairs * features", move |row| Ok(of(row)?.0)),
        synop: zero("a gradient: no spike drives it"),
    }
}
