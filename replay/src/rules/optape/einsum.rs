//! `einsum`, which appears as one op under inference mode; elsewhere the products that it is made of are seen.

use std::collections::BTreeMap;

use super::{SOURCE, Tables, Work, per_call, traffic};
use crate::rules::product::times;
use crate::rules::{CallRow, Need, Rule, RuleError, TensorView};

pub(super) fn fill(tables: &mut Tables) {
    let accumulates = || {
        Rule::per_row(
            "sums over products, one factor binary: its nonzeros * how often each is used; both binary: sum of the product; else 0",
            SOURCE,
            vec![Need::Spikes("tensors", false)],
            |row| Einsum::of(row)?.accumulates(row),
        )
    };
    let work = Work {
        flop: per_call(
            "product of the sizes of all indices, twice where products are summed; of one tensor: elements(self) - elements(out)",
            |row| {
                let einsum = Einsum::of(row)?;
                Ok(match einsum.second {
                    None => einsum.additions(row)?,
                    Some(_) => einsum.products * (1 + i128::from(einsum.sums)),
                })
            },
        ),
        memory_access: traffic(),
        mac: Rule::per_row(
            "product of the sizes of all indices per call where products are summed; 0 where a factor is binary",
            SOURCE,
            vec![Need::Spikes("tensors", false)],
            |row| Einsum::of(row)?.macs(row),
        ),
        ac: accumulates(),
        synop: accumulates(),
    };
    tables.insert("aten::einsum", work);
}

/// Whether it is binary, the tensor, its name in messages.
type Factor<'a> = (bool, TensorView<'a>, &'static str);

/// An index: a letter, or the nth from the end of those that `...` stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Index {
    Letter(char),
    Broadcast(usize),
}

struct Einsum<'a> {
    first: TensorView<'a>,
    second: Option<TensorView<'a>>,
    /// Product of the sizes of all indices.
    products: i128,
    /// An index is summed over.
    sums: bool,
}

impl<'a> Einsum<'a> {
    fn of(row: &CallRow<'a>) -> Result<Self, RuleError> {
        let unsuited = |text: &str| RuleError::Unsuited(text.to_owned());
        let equation: String = row.text("equation")?.split_whitespace().collect();
        let tensors = row.tensors("tensors");
        let (operands, result) = match equation.split_once("->") {
            Some((operands, result)) => (operands, Some(result)),
            None => (equation.as_str(), None),
        };
        let operands: Vec<&str> = operands.split(',').collect();
        if operands.len() != tensors.len() {
            return Err(unsuited("its equation and its tensors do not fit"));
        }
        let (first, second) = match tensors.as_slice() {
            [one] => (*one, None),
            [one, other] => (*one, Some(*other)),
            _ => {
                return Err(unsuited(
                    "an einsum of more than two tensors: in which order they are multiplied is not in the trace",
                ));
            }
        };
        let mut sizes: BTreeMap<Index, i128> = BTreeMap::new();
        let mut occurrences: BTreeMap<Index, usize> = BTreeMap::new();
        for (operand, tensor) in operands.iter().zip(&tensors) {
            let indices = indices(operand, tensor.dimensions())
                .ok_or_else(|| unsuited("its equation and its tensors do not fit"))?;
            for (at, index) in indices.iter().enumerate() {
                if indices.iter().skip(at + 1).any(|other| other == index) {
                    return Err(unsuited("an einsum over a diagonal"));
                }
                let size = tensor.size(isize::try_from(at).unwrap_or(isize::MAX))?;
                let known = sizes.entry(*index).or_insert(1);
                *known = (*known).max(size);
                // A size of 0 empties the sum.
                if size == 0 {
                    *known = 0;
                }
                *occurrences.entry(*index).or_default() += 1;
            }
        }
        let stays = |index: &Index, count: usize| match (result, index) {
            (Some(result), Index::Letter(letter)) => result.contains(*letter),
            (Some(result), Index::Broadcast(_)) => result.contains("..."),
            (None, Index::Letter(_)) => count == 1,
            (None, Index::Broadcast(_)) => true,
        };
        let sums = occurrences
            .iter()
            .any(|(index, count)| !stays(index, *count));
        let products = sizes
            .values()
            .try_fold(1i128, |product, size| product.checked_mul(*size))
            .ok_or_else(|| unsuited("the count overflows"))?;
        Ok(Self {
            first,
            second,
            products: row.note("products", products),
            sums,
        })
    }

    /// Of one tensor that is summed.
    fn additions(&self, row: &CallRow<'_>) -> Result<i128, RuleError> {
        Ok((self.first.elements() - row.output(0)?.elements()).max(0))
    }

    /// Whether each factor is binary, where there are two and their products are summed.
    fn binary(&self, row: &CallRow<'_>) -> Result<Option<[Factor<'a>; 2]>, RuleError> {
        let (Some(second), true) = (self.second, self.sums) else {
            return Ok(None);
        };
        Ok(Some([
            (
                row.tensor_is_binary("first", self.first)?,
                self.first,
                "first",
            ),
            (row.tensor_is_binary("second", second)?, second, "second"),
        ]))
    }

    fn macs(&self, row: &CallRow<'_>) -> Result<i128, RuleError> {
        match self.binary(row)? {
            Some([(false, ..), (false, ..)]) => times(self.products, i128::from(row.calls)),
            _ => Ok(0),
        }
    }

    fn accumulates(&self, row: &CallRow<'_>) -> Result<i128, RuleError> {
        match self.binary(row)? {
            Some([(true, ..), (true, ..)]) => row.product_sum(),
            Some([(true, tensor, name), _]) | Some([_, (true, tensor, name)]) => {
                let elements = tensor.elements();
                let uses = if elements == 0 {
                    0
                } else {
                    self.products / elements
                };
                times(
                    row.nonzeros_of_tensor(name, tensor)?,
                    row.note("uses", uses),
                )
            }
            _ => Ok(0),
        }
    }
}

/// The indices of an operand of so many dimensions; `None` where its term has other ones.
fn indices(term: &str, dimensions: usize) -> Option<Vec<Index>> {
    let letters = |text: &str| -> Option<Vec<Index>> {
        text.chars()
            .map(|c| c.is_ascii_alphabetic().then_some(Index::Letter(c)))
            .collect()
    };
    let all = match term.split_once("...") {
        None => letters(term)?,
        Some((before, behind)) => {
            let (mut all, behind) = (letters(before)?, letters(behind)?);
            let broadcast = dimensions.checked_sub(all.len() + behind.len())?;
            all.extend((0..broadcast).rev().map(Index::Broadcast));
            all.extend(behind);
            all
        }
    };
    (all.len() == dimensions).then_some(all)
}

#[cfg(test)]
mod tests {
    use optape_trace::{Argument, ScopeId};

    use super::*;
    use crate::rules::{Counted, RuleSet};
    use crate::testing::{Call, Statistic, Tape, op, tensor};

    const SCHEMA: &str =
        "aten::einsum(str equation, Tensor[] tensors, *, int[]? path=None) -> Tensor";

    fn counted(counter: &str, equation: &str, call: Call) -> Counted {
        let mut tape = Tape::new();
        let text = tape.text(equation);
        let mut call = call;
        call.arguments.insert(0, Argument::Text(text));
        tape.call(ScopeId::GLOBAL, &call);
        let trace = tape.trace();
        let stream = &trace.streams()[0];
        let rows = trace.summary(stream.id(), 0..stream.records()).unwrap();
        let set = RuleSet::named(super::super::NAME).unwrap();
        let op = op(SCHEMA);
        let row = CallRow {
            op: &op,
            signature: stream.dictionary().signature(rows[0].signature).unwrap(),
            pattern: stream.dictionary().pattern(rows[0].pattern).unwrap(),
            calls: rows[0].calls,
            integer_sums: &rows[0].integer_sums,
            float_sums: &rows[0].float_sums,
            values_before: false,
            dictionary: Some(stream.dictionary()),
            notes: None,
        };
        set.counter(counter).unwrap().count(&row)
    }

    fn two(a: &[i64], b: &[i64], out: &[i64], statistics: [Statistic; 2]) -> Call {
        let list = Argument::TensorList(vec![Some(0), Some(1)]);
        Call::new(
            SCHEMA,
            vec![list, Argument::None],
            vec![tensor(a), tensor(b)],
            vec![tensor(out)],
        )
        .with(statistics.to_vec())
    }

    fn analog() -> [Statistic; 2] {
        [Statistic::analog(0), Statistic::analog(1)]
    }

    #[test]
    fn a_contraction_counts_like_the_product_that_it_is() {
        let product = |statistics| two(&[2, 3], &[3, 4], &[2, 4], statistics);
        assert_eq!(
            counted("flop", "ij,jk->ik", product(analog())),
            Counted::Value(48)
        );
        assert_eq!(
            counted("mac", "ij, jk", product(analog())),
            Counted::Value(24)
        );
        assert_eq!(
            counted("ac", "ij,jk->ik", product(analog())),
            Counted::Value(0)
        );
        assert_eq!(
            counted("memory_access", "ij,jk->ik", product(analog())),
            Counted::Value(4 * (6 + 12 + 8))
        );
        let spikes = || product([Statistic::spikes(0, 5), Statistic::analog(1)]);
        assert_eq!(counted("mac", "ij,jk->ik", spikes()), Counted::Value(0));
        assert_eq!(
            counted("synop", "ij,jk->ik", spikes()),
            Counted::Value(5 * 4)
        );
        // The sum over the product of two binary factors is not taken of it.
        let both = product([Statistic::spikes(0, 5), Statistic::spikes(1, 7)]);
        assert!(matches!(
            counted("synop", "ij,jk->ik", both),
            Counted::Missing(_)
        ));
    }

    #[test]
    fn broadcast_dimensions_and_plain_products() {
        let batched = two(&[7, 2, 3], &[3, 4], &[7, 2, 4], analog());
        assert_eq!(
            counted("mac", "...ij,jk->...ik", batched),
            Counted::Value(7 * 24)
        );
        let outer = || two(&[2], &[3], &[2, 3], analog());
        assert_eq!(counted("flop", "i,j->ij", outer()), Counted::Value(6));
        assert_eq!(counted("mac", "i,j->ij", outer()), Counted::Value(0));
    }

    #[test]
    fn what_the_equation_does_not_say_is_unknown() {
        let diagonal = two(&[3, 3], &[3, 4], &[3, 4], analog());
        assert!(matches!(
            counted("mac", "ii,ij->ij", diagonal),
            Counted::Unknown(Some(_))
        ));
        let wrong = two(&[3, 3], &[3, 4], &[3, 4], analog());
        assert!(matches!(
            counted("mac", "ijk,kl->l", wrong),
            Counted::Unknown(Some(_))
        ));
    }
}
