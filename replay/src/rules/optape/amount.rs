//! Counts that are sums of simple quantities: the formula's text and its value come from the same terms, so that
//! they cannot drift apart.

use super::{NO_ADDITIONS, NO_PRODUCTS, NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, Rule, RuleError, TensorView};

/// A quantity of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantity {
    /// Elements of the first output, or of what the op writes where it returns nothing.
    Out,
    /// Elements of the first tensor argument (all tensors of it, if it is a list).
    Input,
    /// Elements of the first argument over the size of the dimension `dim`: slices that are reduced on their own.
    Slices,
}

use Quantity::{Input, Out, Slices};

/// A sum of multiples of quantities.
pub(super) type Amount = &'static [(i128, Quantity)];

impl Quantity {
    const fn text(self) -> &'static str {
        match self {
            Out => "elements(out)",
            Input => "elements(self)",
            Slices => "slices",
        }
    }

    fn value(self, row: &CallRow<'_>) -> Result<i128, RuleError> {
        let value = match self {
            Out => out_elements(row),
            Input => input_elements(row)?,
            Slices => {
                let x = first(row)?;
                if x.dimensions() == 0 {
                    1
                } else {
                    let dim = row.integer("dim")?;
                    let size = x.size(isize::try_from(dim).unwrap_or(isize::MAX))?;
                    if size == 0 { 0 } else { x.elements() / size }
                }
            }
        };
        Ok(row.note(self.text(), value))
    }
}

fn first<'a>(row: &CallRow<'a>) -> Result<TensorView<'a>, RuleError> {
    (0..row.op.arguments.len())
        .find_map(|i| row.optional_tensor_at(i))
        .ok_or_else(|| RuleError::Unsuited("the call has no tensor argument".to_owned()))
}

fn input_elements(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let tensors = (0..row.op.arguments.len())
        .map(|i| row.tensors_at(i))
        .find(|t| !t.is_empty());
    // A list may be empty; a single tensor has to be there.
    match tensors {
        Some(tensors) => Ok(tensors.iter().map(TensorView::elements).sum()),
        None if row
            .op
            .arguments
            .iter()
            .any(|a| a.type_name.contains("Tensor[]")) =>
        {
            Ok(0)
        }
        None => Err(RuleError::Unsuited(
            "the call has no tensor argument".to_owned(),
        )),
    }
}

/// Elements of the results: the first output (all tensors of a list), or what is written where nothing is returned.
pub(super) fn out_elements(row: &CallRow<'_>) -> i128 {
    if let Some(first) = row.optional_output(0) {
        return first.elements();
    }
    let outputs = row.outputs();
    if !outputs.is_empty() {
        return outputs.iter().map(TensorView::elements).sum();
    }
    let written = row.op.arguments.iter().position(|a| a.written);
    written.map_or(0, |i| {
        row.tensors_at(i).iter().map(TensorView::elements).sum()
    })
}

/// The rule of an amount; an empty one is zero, for the reason given.
pub(super) fn rule(amount: Amount, why_zero: &'static str) -> Rule {
    if amount.is_empty() {
        return zero(why_zero);
    }
    per_call(text(amount), move |row| {
        let mut sum = 0;
        for (factor, quantity) in amount {
            sum += factor * quantity.value(row)?;
        }
        // Reductions of nothing: 0 elements give one output.
        Ok(sum.max(0))
    })
}

fn text(amount: Amount) -> String {
    let mut text = String::new();
    for (i, (factor, quantity)) in amount.iter().enumerate() {
        let sign = match (i, *factor < 0) {
            (0, false) => "",
            (0, true) => "-",
            (_, false) => " + ",
            (_, true) => " - ",
        };
        text.push_str(sign);
        match (factor.abs(), quantity) {
            (1, q) => text.push_str(q.text()),
            (n, q) => text.push_str(&format!("{n} * {}", q.text())),
        }
    }
    text
}

/// Flops and additions of an op; its memory is its operands and results.
pub(super) fn work(flop: Amount, ac: Amount) -> Work {
    Work {
        flop: rule(flop, "moves or selects values, no arithmetic"),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: rule(ac, NO_ADDITIONS),
        synop: zero(NO_SYNAPSES),
    }
}

/// As [`work`], with multiply-accumulates.
pub(super) fn work_with_mac(flop: Amount, mac: Amount, ac: Amount) -> Work {
    Work {
        mac: rule(mac, NO_PRODUCTS),
        ..work(flop, ac)
    }
}

/// Adds the same work for several ops.
pub(super) fn insert_all(tables: &mut Tables, ops: &[&'static str], flop: Amount, ac: Amount) {
    for &op in ops {
        tables.insert(op, work(flop, ac));
    }
}

/// `flops` and `additions` per element of the result.
pub(super) fn insert_per_element(tables: &mut Tables, op: String, flops: i128, additions: i128) {
    let per_element = move |count: i128, why: &'static str| match count {
        0 => zero(why),
        1 => per_call("elements(out)", |row| {
            Ok(row.note("elements(out)", out_elements(row)))
        }),
        n => per_call(format!("{n} * elements(out)"), move |row| {
            Ok(n * row.note("elements(out)", out_elements(row)))
        }),
    };
    tables.insert(
        op,
        Work {
            flop: per_element(flops, "moves or selects values, no arithmetic"),
            memory_access: traffic(),
            mac: zero(NO_PRODUCTS),
            ac: per_element(additions, NO_ADDITIONS),
            synop: zero(NO_SYNAPSES),
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_an_amount_reads_like_a_formula() {
        assert_eq!(
            text(&[(5, Input), (-2, Slices)]),
            "5 * elements(self) - 2 * slices"
        );
        assert_eq!(text(&[(1, Out)]), "elements(out)");
    }
}
