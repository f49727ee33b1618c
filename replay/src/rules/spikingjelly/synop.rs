//! Synaptic operations: the accumulates of products that spikes drive.

use super::Version;
use super::mac::PRODUCTS;
use crate::rules::product::Form;
use crate::rules::{CallRow, Rule, RuleError, TableCounter};

/// The table; both versions have the same.
pub(super) fn table(version: Version) -> TableCounter {
    let source = match version {
        Version::June2026 => "SpikingJelly db3b6df0, op_counter/synop.py",
        Version::V2_0_0 => "SpikingJelly 2.0.0, op_counter/synop.py",
    };
    let mut table = TableCounter::new("synop", "SynOp");
    for (op, form) in PRODUCTS {
        table.insert(op, spikes(form, source));
    }
    table
}

/// What spikes add up to in a product. With `alpha` other than 1, upstream counts nothing unless both factors are
/// binary.
pub(super) fn spikes(form: Form, source: &'static str) -> Rule {
    let formula = match form {
        Form::Convolution(_) => {
            "both binary: sum of the product; input binary: its nonzeros by their fan-out; weight binary: its nonzeros * \
             batch * positions; else 0"
        }
        _ => {
            "both binary: sum of the product; one binary and alpha == 1: its nonzeros * how often each is used; else 0"
        }
    };
    Rule::per_row(formula, source, form.needs(), move |row| {
        accumulates(row, form)
    })
}

fn accumulates(row: &CallRow<'_>, form: Form) -> Result<i128, RuleError> {
    let geometry = form.geometry(row)?;
    if !row.keyword_number("alpha", 1.0).is_one() {
        let (a, b) = form.factors();
        let both = row.binary(a, row.seen_after(a))? && row.binary(b, row.seen_after(b))?;
        return if both { row.product_sum() } else { Ok(0) };
    }
    geometry.accumulates(row)
}
