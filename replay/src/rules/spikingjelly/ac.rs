//! Accumulates: additions without a multiplication, those of spike-driven products among them.

use super::mac::PRODUCTS;
use super::{ADD_SCALAR, ADD_TENSOR, Version, add_all, synop};
use crate::rules::{CallRow, Need, Rule, RuleError, TableCounter};

/// The table; both versions have the same.
pub(super) fn table(version: Version) -> TableCounter {
    let source = match version {
        Version::June2026 => "SpikingJelly db3b6df0, op_counter/ac.py",
        Version::V2_0_0 => "SpikingJelly 2.0.0, op_counter/ac.py",
    };
    let mut table = TableCounter::new("ac", "AC");
    for (op, form) in PRODUCTS {
        table.insert(op, synop::spikes(form, source));
    }
    table.insert(
        "aten::native_batch_norm",
        Rule::per_call(
            "training: (n - c) + n + c + n + [running statistics] 2c; evaluation: c + n",
            source,
            batch_norm,
        ),
    );
    table.insert(
        "aten::avg_pool2d",
        Rule::per_call("elements(out) * (kernel - 1)", source, |row| {
            let kernel: i128 = row.integers("kernel_size")?.iter().product();
            Ok(row.note("elements(out)", row.output(0)?.elements())
                * (row.note("kernel", kernel) - 1))
        }),
    );
    let reduction = Rule::per_call("elements(self) - elements(out)", source, |row| {
        Ok(row.note("elements(self)", row.tensor_at(0)?.elements())
            - row.note("elements(out)", row.output(0)?.elements()))
    });
    add_all(
        &mut table,
        &["aten::sum", "aten::sum.dim_IntList", "aten::mean.dim"],
        &reduction,
    );
    let add = Rule::per_row(
        "both binary: nonzeros(self) + nonzeros(other); else elements(out) per call",
        source,
        vec![Need::Spikes("self", true), Need::Spikes("other", false)],
        element_wise,
    );
    add_all(&mut table, &ADD_TENSOR, &add);
    let every = Rule::per_call("elements(out)", source, |row| {
        Ok(row.note("elements(out)", row.output(0)?.elements()))
    });
    add_all(&mut table, &ADD_SCALAR, &every);
    table.insert("aten::sigmoid_", every);
    table
}

fn element_wise(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let x = row.tensor_at(0)?;
    if x.is_number() {
        return Err(RuleError::Failed(
            "AttributeError: 'float' object has no attribute 'dtype'".to_owned(),
        ));
    }
    let dense = row.note("elements(out)", row.output(0)?.elements()) * i128::from(row.calls);
    let both = row.optional_tensor_at(1).is_some_and(|y| !y.is_number())
        && row.binary("self", row.seen_after("self"))?
        && row.binary("other", row.seen_after("other"))?;
    if !both {
        return Ok(dense);
    }
    Ok(row.nonzeros("self", row.seen_after("self"))?
        + row.nonzeros("other", row.seen_after("other"))?)
}

fn batch_norm(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let x = row.tensor_at(0)?;
    let (n, c) = (row.note("n", x.elements()), row.note("c", x.size(1)?));
    if !row.boolean("training")? {
        return Ok(c + n);
    }
    let running = if row.is_given("running_mean") {
        2 * c
    } else {
        0
    };
    Ok((n - c) + n + c + n + running)
}
