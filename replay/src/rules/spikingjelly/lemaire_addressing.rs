//! Additions and multiply-accumulates that find addresses, after Lemaire et al. (arXiv:2210.13107), inside of linear and convolution modules.
//!
//! A spike finds the weights that it meets; a dense input is gone through once, and so is the output.

use super::{Version, mac};
use crate::load::stack;
use crate::ordered::Amounts;
use crate::rules::{CallRow, Counted, Counter, Need, Rule, RuleError, TableCounter};

const LINEAR: &str = "torch.nn.modules.linear.Linear";
const CONVOLUTIONS: [&str; 3] = [
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.conv.Conv3d",
];

/// The counter.
pub(super) struct LemaireAddressing {
    table: TableCounter,
}

impl LemaireAddressing {
    pub(super) fn new() -> Self {
        debug_assert!(Version::June2026 < Version::V2_0_0);
        let source = "SpikingJelly db3b6df0, op_counter/lemaire_addressing.py";
        let mut table = TableCounter::new("lemaire_addressing", "operation");
        for (op, form) in mac::PRODUCTS {
            let input = form.factors().0;
            let formula = if op == "aten::convolution" {
                "in a convolution module, not transposed: input binary: nonzeros * (weight.size(0) / groups * kernel + 2); else \
                 elements(input) + elements(out) + weight.size(0) * kernel"
            } else {
                "in a linear module: input binary: nonzeros * out.size(-1); else elements(input) + elements(out)"
            };
            let mut rule = Rule::per_row(
                formula,
                source,
                vec![Need::Spikes(input, false)],
                move |row| Ok(addresses(row, input)?.iter().sum()),
            );
            rule.needs.dedup_by(|a, b| a == b);
            table.insert(op, rule);
        }
        Self { table }
    }
}

/// Additions and multiply-accumulates of a row.
fn addresses(row: &CallRow<'_>, input: &'static str) -> Result<[i128; 2], RuleError> {
    let inside = |wanted: &[&str]| {
        row.dictionary.is_some_and(|dictionary| {
            stack(dictionary, row.signature.scope)
                .iter()
                .any(|(_, classes)| classes.iter().any(|c| wanted.contains(&c.as_str())))
        })
    };
    let calls = i128::from(row.calls);
    let x = row.tensor(input)?;
    let out = row.output(0)?;
    if row.op.name != "aten::convolution" {
        if !inside(&[LINEAR]) {
            return Ok([0, 0]);
        }
        return Ok(if row.binary(input, row.seen_after(input))? {
            [
                row.nonzeros(input, row.seen_after(input))? * out.size(-1)?,
                0,
            ]
        } else {
            [(x.elements() + out.elements()) * calls, 0]
        });
    }
    if !inside(&CONVOLUTIONS) || row.boolean("transposed")? {
        return Ok([0, 0]);
    }
    let weight = row.tensor("weight")?;
    let kernel = row.note("kernel", weight.elements_from(2));
    let channels = row.note("weight.size(0)", weight.size(0)?);
    if row.binary(input, row.seen_after(input))? {
        let spikes = row.nonzeros(input, row.seen_after(input))?;
        let per_group = channels / row.integer("groups")?.max(1);
        return Ok([spikes * per_group * kernel, spikes * 2]);
    }
    Ok([
        (x.elements() + out.elements() + channels * kernel) * calls,
        0,
    ])
}

impl Counter for LemaireAddressing {
    fn name(&self) -> &str {
        self.table.name()
    }

    fn unit(&self) -> &str {
        self.table.unit()
    }

    fn rule(&self, op: &str) -> Option<&Rule> {
        self.table.rule(op)
    }

    fn ops(&self) -> Vec<&str> {
        self.table.ops()
    }

    fn count(&self, row: &CallRow<'_>) -> Counted {
        self.table.count(row)
    }

    fn amounts(&self, row: &CallRow<'_>, out: &mut Amounts) {
        let name = row.rule_name();
        let Some((_, form)) = mac::PRODUCTS.iter().find(|(op, _)| *op == name) else {
            return;
        };
        // What cannot be had is said by the count.
        if let Ok([additions, products]) = addresses(row, form.factors().0) {
            out.add_by_scope("metrics", "acc_addr", additions);
            out.add_by_scope("metrics", "mac_addr", products);
        }
    }

    fn is_usual(&self) -> bool {
        false
    }
}
