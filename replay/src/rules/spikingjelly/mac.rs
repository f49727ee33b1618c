//! Multiply-accumulates: none where a factor is made of spikes.

use super::Version;
use crate::rules::product::Form;
use crate::rules::{CallRow, Need, Rule, RuleError, TableCounter};

/// The products that upstream knows.
pub(super) const PRODUCTS: [(&str, Form); 5] = [
    ("aten::mm", Form::Matrix("self", "mat2")),
    ("aten::addmm", Form::Matrix("mat1", "mat2")),
    ("aten::bmm", Form::Batched("self", "mat2")),
    ("aten::baddbmm", Form::Batched("batch1", "batch2")),
    ("aten::convolution", Form::Convolution(None)),
];

/// The table; both versions have the same.
pub(super) fn table(version: Version) -> TableCounter {
    let source = match version {
        Version::June2026 => "SpikingJelly db3b6df0, op_counter/mac.py",
        Version::V2_0_0 => "SpikingJelly 2.0.0, op_counter/mac.py",
    };
    let mut table = TableCounter::new("mac", "MAC");
    for (op, form) in PRODUCTS {
        let (a, b) = form.factors();
        let needs = vec![Need::Spikes(a, false), Need::Spikes(b, false)];
        let formula = format!("{} per call; 0 where a factor is binary", form.text());
        table.insert(
            op,
            Rule::per_row(formula, source, needs, move |row| {
                form.geometry(row)?.macs(row)
            }),
        );
    }
    table.insert(
        "aten::native_batch_norm",
        Rule::per_call(
            "[weight] n + [training, running statistics] 2c",
            source,
            batch_norm,
        ),
    );
    table
}

fn batch_norm(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let x = row.tensor_at(0)?;
    let c = row.note("c", x.size(1)?);
    let affine = if row.is_given("weight") {
        row.note("n", x.elements())
    } else {
        0
    };
    let running = if row.boolean("training")? && row.is_given("running_mean") {
        2 * c
    } else {
        0
    };
    Ok(affine + running)
}
