//! The default rules: the documented formulas, upstream's faults mended, more ops covered.
//!
//! One line per overload gives all five counters at once, so that no op can be known to one of them and
//! unknown to another. An op that does arithmetic is never zero in flop; an op that is zero says why.
//!
//! Conventions: one flop for every addition, multiplication, comparison, root or transcendental function of real
//! numbers. `ac` counts additions and subtractions that are not part of a multiply-accumulate. `mac` counts products
//! that are accumulated at once; where a factor of a matrix product or a convolution is binary, its products are
//! accumulates instead. `synop` counts the accumulates that spikes cause in such products. `memory_access` counts the
//! bytes of the operands read once and of the results written once.

mod amount;
mod attention;
mod data;
mod distance;
mod einsum;
mod elementwise;
mod fourier;
mod loss;
mod normalisation;
mod optimizer;
mod pooling;
mod products;
mod recurrent;
mod reduction;

use std::borrow::Cow;

use super::{CallRow, Rule, RuleError, RuleSet, TableCounter, TensorView};

/// Name of the rule set.
pub const NAME: &str = "optape";

/// Version of the rules: changes with every change of a formula.
const VERSION: u32 = 3;

/// Source of all formulas here: they follow from the definitions of the ops.
const SOURCE: &str = "optape 3, from the definition of the op";

/// What an op does, by counter.
struct Work {
    flop: Rule,
    memory_access: Rule,
    mac: Rule,
    ac: Rule,
    synop: Rule,
}

/// The five tables while they are filled.
struct Tables {
    flop: TableCounter,
    memory_access: TableCounter,
    mac: TableCounter,
    ac: TableCounter,
    synop: TableCounter,
}

impl Tables {
    fn insert(&mut self, op: impl Into<Cow<'static, str>>, work: Work) {
        let op = op.into();
        let before = self.flop.insert(op.clone(), work.flop);
        debug_assert!(before.is_none(), "{op} has two lines");
        self.memory_access.insert(op.clone(), work.memory_access);
        self.mac.insert(op.clone(), work.mac);
        self.ac.insert(op.clone(), work.ac);
        self.synop.insert(op, work.synop);
    }
}

/// The rule set.
#[must_use]
pub fn rule_set() -> RuleSet {
    let mut tables = Tables {
        flop: TableCounter::new("flop", "FLOP"),
        memory_access: TableCounter::new("memory_access", "byte"),
        mac: TableCounter::new("mac", "MAC"),
        ac: TableCounter::new("ac", "AC"),
        synop: TableCounter::new("synop", "SynOp"),
    };
    products::fill(&mut tables);
    einsum::fill(&mut tables);
    distance::fill(&mut tables);
    fourier::fill(&mut tables);
    elementwise::fill(&mut tables);
    reduction::fill(&mut tables);
    normalisation::fill(&mut tables);
    pooling::fill(&mut tables);
    attention::fill(&mut tables);
    recurrent::fill(&mut tables);
    loss::fill(&mut tables);
    optimizer::fill(&mut tables);
    data::fill(&mut tables);
    RuleSet {
        name: NAME,
        version: VERSION,
        description: "optape's own rules: documented formulas, upstream's faults mended, more ops covered",
        counters: vec![
            Box::new(tables.flop),
            Box::new(tables.memory_access),
            Box::new(tables.mac),
            Box::new(tables.ac),
            Box::new(tables.synop),
        ],
        accumulations_are_add: false,
        lists_unsupported: false,
        models: &["compute"],
    }
}

const NO_PRODUCTS: &str = "no product is accumulated";
const NO_ADDITIONS: &str = "no additions";
const NO_SYNAPSES: &str = "no product of an activation with weights";

fn zero(reason: &'static str) -> Rule {
    Rule::zero(reason, SOURCE)
}

fn per_call(
    formula: impl Into<Cow<'static, str>>,
    evaluate: impl Fn(&CallRow<'_>) -> Result<i128, RuleError> + Send + Sync + 'static,
) -> Rule {
    Rule::per_call(formula, SOURCE, evaluate)
}

/// Operands read once, results written once. Arguments that are only written (`out=`) are not read; where an op returns
/// nothing, its results are what it writes in place.
fn traffic() -> Rule {
    per_call("bytes(operands) + bytes(results)", |row| {
        let read: i128 = row
            .op
            .arguments
            .iter()
            .enumerate()
            .filter(|(_, a)| !(a.written && a.keyword_only))
            .map(|(i, _)| bytes(&row.tensors_at(i)))
            .sum();
        Ok(row.note("bytes(operands)", read) + row.note("bytes(results)", written(row)))
    })
}

/// As [`traffic`], without what an argument names: it is overwritten, not read.
fn traffic_without(argument: &'static str) -> Rule {
    per_call(
        format!("bytes(operands but {argument}) + bytes(results)"),
        move |row| {
            let read: i128 = row
                .op
                .arguments
                .iter()
                .enumerate()
                .filter(|(_, a)| a.name != argument && !(a.written && a.keyword_only))
                .map(|(i, _)| bytes(&row.tensors_at(i)))
                .sum();
            Ok(row.note("bytes(operands)", read) + row.note("bytes(results)", written(row)))
        },
    )
}

/// Results written once.
fn results_only() -> Rule {
    per_call("bytes(results)", |row| {
        Ok(row.note("bytes(results)", written(row)))
    })
}

fn bytes(tensors: &[TensorView<'_>]) -> i128 {
    tensors.iter().map(TensorView::bytes).sum()
}

fn written(row: &CallRow<'_>) -> i128 {
    let outputs = row.outputs();
    if !outputs.is_empty() {
        return bytes(&outputs);
    }
    row.op
        .arguments
        .iter()
        .enumerate()
        .filter(|(_, a)| a.written)
        .map(|(i, _)| bytes(&row.tensors_at(i)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_counters_know_the_same_ops() {
        let set = rule_set();
        let names: Vec<Vec<&str>> = ["flop", "memory_access", "mac", "ac", "synop"]
            .iter()
            .map(|name| {
                let counter = set.counter(name).unwrap();
                ALL_OPS
                    .iter()
                    .copied()
                    .filter(|op| counter.rule(op).is_some())
                    .collect()
            })
            .collect();
        assert!(
            names
                .iter()
                .all(|n| *n == names[0] && n.len() == ALL_OPS.len())
        );
    }

    /// A sample over all families.
    const ALL_OPS: [&str; 12] = [
        "aten::mm",
        "aten::convolution_backward",
        "aten::gelu",
        "aten::_foreach_add_.List",
        "aten::native_layer_norm",
        "aten::avg_pool3d",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::nll_loss_forward",
        "aten::_fused_adamw_",
        "aten::view",
        "aten::embedding",
        "aten::sum.dim_IntList",
    ];

    #[test]
    fn every_zero_has_a_reason_and_every_rule_a_formula_and_a_source() {
        for counter in &rule_set().counters {
            for op in ALL_OPS {
                let rule = counter.rule(op).unwrap();
                assert!(!rule.formula.is_empty() && !rule.source.is_empty(), "{op}");
                assert!(rule.zero_reason().is_none_or(|r| !r.is_empty()), "{op}");
            }
        }
    }
}
