//! Fourier transforms, as FFTW's benchmarks count them (fftw.org/speed/method.html): of n complex numbers 5 n log2(n) flops,
//! 3 n log2(n) of them additions (radix 2: a multiplication and two additions of complex numbers for every two results); half of it where one
//! side is real.

use super::{NO_SYNAPSES, SOURCE, Tables, Work, traffic, zero};
use crate::rules::{CallRow, Rule, RuleError};

pub(super) fn fill(tables: &mut Tables) {
    for (op, factor) in [
        ("aten::_fft_c2c", 2),
        ("aten::_fft_r2c", 1),
        ("aten::_fft_c2r", 1),
    ] {
        tables.insert(
            op,
            Work {
                flop: rule("5", factor, 5),
                memory_access: traffic(),
                mac: zero("butterflies: no product is accumulated over a dimension"),
                ac: rule("3", factor, 3),
                synop: zero(NO_SYNAPSES),
            },
        );
    }
}

/// `per / 2 * factor` per element and halving.
fn rule(per: &str, factor: i128, each: i128) -> Rule {
    let half = if factor == 1 { " / 2" } else { "" };
    Rule::per_call(
        format!("{per} * elements * log2(length){half}"),
        SOURCE,
        move |row| Ok(each * factor * halvings(row)? / 2),
    )
}

/// Elements of the longer side times the logarithm of the number of elements that are transformed together, rounded up.
fn halvings(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let (input, out) = (row.tensor("self")?, row.output(0)?);
    let x = if input.elements() >= out.elements() {
        input
    } else {
        out
    };
    let elements = row.note("elements", x.elements());
    let mut length: i128 = 1;
    for dim in row.integers("dim")? {
        let size = x.size(isize::try_from(dim).unwrap_or(isize::MAX))?;
        length = length.saturating_mul(size.max(1));
    }
    let levels = i128::from(128 - (length - 1).leading_zeros());
    Ok(elements * row.note("log2(length)", levels))
}

#[cfg(test)]
mod tests {
    use crate::rules::Counter;
    use crate::rules::optape::rule_set;

    #[test]
    fn transforms_are_no_multiply_accumulates() {
        let set = rule_set();
        for op in ["aten::_fft_c2c", "aten::_fft_r2c", "aten::_fft_c2r"] {
            assert!(set.counter("mac").and_then(|c| c.rule(op)).is_some());
            let flop: &dyn Counter = set.counter("flop").unwrap();
            assert!(flop.rule(op).unwrap().zero_reason().is_none());
        }
    }
}
