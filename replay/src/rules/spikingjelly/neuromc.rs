//! NeuroMC's primitive operations of June 2026: additions, multiplications, comparisons, roots and selections, forward and backward.
//!
//! Other than for the other counters, an empty tensor is no spike here, and a spike that is the first to reach a sum is not an addition.

use optape_trace::{DType, When, fields};

use super::{ADD_SCALAR, ADD_TENSOR, BINARY, add_all, memory_residency::guessed_stage};
use crate::ordered::Amounts;
use crate::rules::product::Form;
use crate::rules::{CallRow, Counted, Counter, Rule, RuleError, TableCounter, TensorView};

const SOURCE: &str = "SpikingJelly db3b6df0, op_counter/neuromc";

/// A table whose numbers are also told by stage.
pub(super) struct Primitive(TableCounter);

impl Counter for Primitive {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn unit(&self) -> &str {
        self.0.unit()
    }

    fn rule(&self, op: &str) -> Option<&Rule> {
        self.0.rule(op)
    }

    fn ops(&self) -> Vec<&str> {
        self.0.ops()
    }

    fn count(&self, row: &CallRow<'_>) -> Counted {
        self.0.count(row)
    }

    fn amounts(&self, row: &CallRow<'_>, out: &mut Amounts) {
        if let Counted::Value(value) = self.0.count(row) {
            let op = out.op();
            out.add("stage_ops", &[guessed_stage(row, &op), &op], value);
        }
    }

    fn is_usual(&self) -> bool {
        false
    }
}

/// The five counters.
pub(super) fn counters() -> [Primitive; 5] {
    [
        additions(),
        multiplications(),
        comparisons(),
        roots(),
        selections(),
    ]
    .map(Primitive)
}

fn elements_out() -> Rule {
    Rule::per_call("elements(out)", SOURCE, |row| {
        Ok(row.note("elements(out)", row.output(0)?.elements()))
    })
}

const WHERE: [&str; 3] = [
    "aten::where.self",
    "aten::where.ScalarOther",
    "aten::where.ScalarSelf",
];

fn selections() -> TableCounter {
    let mut table = TableCounter::new("neuromc_mux", "selection");
    add_all(&mut table, &WHERE, &elements_out());
    table
}

fn roots() -> TableCounter {
    let mut table = TableCounter::new("neuromc_sqrt", "root");
    add_all(
        &mut table,
        &["aten::sqrt", "aten::sqrt_", "aten::rsqrt"],
        &elements_out(),
    );
    table.insert(
        "aten::native_batch_norm",
        Rule::per_call("c", SOURCE, |row| {
            Ok(row.note("c", row.tensor_at(0)?.size(1)?))
        }),
    );
    table
}

fn comparisons() -> TableCounter {
    let mut table = TableCounter::new("neuromc_cmp", "comparison");
    let compares = |op: &&&str| !op.starts_with("aten::mul") && !op.starts_with("aten::div");
    for op in BINARY.iter().filter(compares) {
        table.insert(*op, elements_out());
    }
    table.insert("aten::logical_not", elements_out());
    table.insert(
        "aten::max_pool2d_with_indices",
        Rule::per_call("elements(out) * (kernel - 1)", SOURCE, |row| {
            let kernel: i128 = row.integers("kernel_size")?.iter().product();
            Ok(row.note("elements(out)", row.output(0)?.elements())
                * (row.note("kernel", kernel) - 1).max(0))
        }),
    );
    table
}

fn multiplications() -> TableCounter {
    let mut table = TableCounter::new("neuromc_mul", "multiplication");
    let products = [
        ("aten::mm", Form::Matrix("self", "mat2"), false),
        ("aten::addmm", Form::Matrix("mat1", "mat2"), true),
        ("aten::bmm", Form::Batched("self", "mat2"), false),
        ("aten::baddbmm", Form::Batched("batch1", "batch2"), true),
    ];
    for (op, form, added) in products {
        let formula = if added {
            "no factor of spikes: products; + [alpha != 1] elements(out) + [beta is neither 0 nor 1] elements(out)"
        } else {
            "no factor of spikes: products; else 0"
        };
        table.insert(
            op,
            Rule::per_row(formula, SOURCE, Vec::new(), move |row| {
                let (a, b) = form.factors();
                let mut products = 0;
                if !is_spikes(row, a)? && !is_spikes(row, b)? {
                    products = row.note("products", form.geometry(row)?.products);
                }
                if added {
                    let out = row.note("elements(out)", row.output(0)?.elements());
                    let beta = row.keyword_number("beta", 1.0);
                    products += out * i128::from(!row.keyword_number("alpha", 1.0).is_one());
                    products += out * i128::from(!beta.is_zero() && !beta.is_one());
                }
                Ok(products * i128::from(row.calls))
            }),
        );
    }
    table.insert(
        "aten::convolution",
        Rule::per_row(
            "no factor of spikes: elements(out) * input.size(1) / groups * kernel; else 0",
            SOURCE,
            Vec::new(),
            |row| {
                if is_spikes(row, "input")? || is_spikes(row, "weight")? {
                    return Ok(0);
                }
                let [per_output, out] = convolution(row)?;
                Ok(out * per_output * i128::from(row.calls))
            },
        ),
    );
    table.insert(
        "aten::convolution_backward",
        Rule::per_call(
            "[mask 0] elements(input gradient) * grad.size(1) / groups * kernel + [mask 1] elements(weight gradient) * batch / \
             groups * positions of the gradient",
            SOURCE,
            |row| {
                let parts = convolution_backward(row)?;
                Ok(parts.iter().flatten().map(|[depth, out]| depth * out).sum())
            },
        ),
    );
    for op in BINARY
        .iter()
        .filter(|op| op.starts_with("aten::mul") || op.starts_with("aten::div"))
    {
        table.insert(*op, elements_out());
    }
    let scaled = Rule::per_call("[alpha != 1] elements(out)", SOURCE, |row| {
        let scales = !row.keyword_number("alpha", 1.0).is_one();
        Ok(row.note("elements(out)", row.output(0)?.elements()) * i128::from(scales))
    });
    add_all(&mut table, &ADD_TENSOR, &scaled);
    add_all(&mut table, &ADD_SCALAR, &scaled);
    table.insert(
        "aten::native_batch_norm",
        Rule::per_call(
            "training: 2n + c + [weight] n + [running statistics] 2c; evaluation: n + [weight] n",
            SOURCE,
            |row| {
                let [n, c] = batch_norm_sizes(row)?;
                let affine = if row.is_given("weight") { n } else { 0 };
                if !row.boolean("training")? {
                    return Ok(n + affine);
                }
                let running = if row.is_given("running_mean") {
                    2 * c
                } else {
                    0
                };
                Ok(2 * n + c + affine + running)
            },
        ),
    );
    table.insert(
        "aten::native_batch_norm_backward",
        Rule::per_call(
            "[mask 0] 5n in training, 2n in evaluation; [mask 1] n",
            SOURCE,
            |row| {
                let n = row.note("n", row.tensor_at(0)?.elements());
                let mask = row.booleans("output_mask")?;
                let asked = |at: usize| mask.get(at).copied().unwrap_or(false);
                let input = if row.boolean("train")? { 5 * n } else { 2 * n };
                Ok(input * i128::from(asked(0)) + n * i128::from(asked(1)))
            },
        ),
    );
    table
}

fn additions() -> TableCounter {
    let mut table = TableCounter::new("neuromc_add", "addition");
    let products = [
        ("aten::mm", Form::Matrix("self", "mat2"), false),
        ("aten::addmm", Form::Matrix("mat1", "mat2"), true),
        ("aten::bmm", Form::Batched("self", "mat2"), false),
        ("aten::baddbmm", Form::Batched("batch1", "batch2"), true),
    ];
    for (op, form, added) in products {
        let formula = if added {
            "both of spikes: sum of the product - its nonzeros; first: (nonzeros - rows with a spike) * n; second: (nonzeros - \
             columns with a spike) * m; none: m * n * (k - 1); + [beta != 0] elements(out)"
        } else {
            "both of spikes: sum of the product - its nonzeros; first: (nonzeros - rows with a spike) * n; second: (nonzeros - \
             columns with a spike) * m; none: m * n * (k - 1)"
        };
        table.insert(
            op,
            Rule::per_row(formula, SOURCE, Vec::new(), move |row| {
                let mut sum = product_additions(row, form)?;
                if added && !row.keyword_number("beta", 1.0).is_zero() {
                    sum += row.note("elements(out)", row.output(0)?.elements())
                        * i128::from(row.calls);
                }
                Ok(sum)
            }),
        );
    }
    table.insert(
        "aten::convolution",
        Rule::per_row(
            "both of spikes: sum of the product - its nonzeros; input: fan-out of its nonzeros - outputs with a spike in sight; \
             weight: nonzeros * batch * positions; none: elements(out) * (products per output - 1 + [bias] 1)",
            SOURCE,
            Vec::new(),
            convolution_additions,
        ),
    );
    table.insert(
        "aten::convolution_backward",
        Rule::per_call(
            "the additions of the convolutions that give the gradients asked for + [mask 2] C_out * (b * positions - 1)",
            SOURCE,
            |row| {
                let parts = convolution_backward(row)?;
                let mut sum: i128 = parts
                    .iter()
                    .flatten()
                    .map(|[depth, out]| (depth - 1).max(0) * out)
                    .sum();
                let mask = row.booleans("output_mask")?;
                if mask.get(2).copied().unwrap_or(false) && row.optional_output(2).is_some() {
                    let grad = row.tensor_at(0)?;
                    sum += grad.size(1)? * (grad.size(0)? * grad.elements_from(2) - 1);
                }
                Ok(sum)
            },
        ),
    );
    add_all(&mut table, &ADD_TENSOR, &elements_out());
    add_all(&mut table, &ADD_SCALAR, &elements_out());
    let reduction = Rule::per_call("elements(self) - elements(out)", SOURCE, |row| {
        let (all, out) = (row.tensor_at(0)?.elements(), row.output(0)?.elements());
        Ok((row.note("elements(self)", all) - row.note("elements(out)", out)).max(0))
    });
    add_all(
        &mut table,
        &["aten::sum", "aten::sum.dim_IntList", "aten::mean.dim"],
        &reduction,
    );
    table.insert(
        "aten::native_batch_norm",
        Rule::per_call(
            "training: 3n + c + [running statistics] 2c; evaluation: n + c",
            SOURCE,
            |row| {
                let [n, c] = batch_norm_sizes(row)?;
                if !row.boolean("training")? {
                    return Ok(n + c);
                }
                let running = if row.is_given("running_mean") {
                    2 * c
                } else {
                    0
                };
                Ok((n - c) + (n + c) + n + c + running)
            },
        ),
    );
    table.insert(
        "aten::native_batch_norm_backward",
        Rule::per_call(
            "[training, mask 0] 3n - 2c + [mask 1] n - c + [mask 2] n - c",
            SOURCE,
            |row| {
                let grad = row.tensor_at(0)?;
                let n = row.note("n", grad.elements());
                let c = match row.optional_tensor_at(2) {
                    Some(gamma) => gamma.elements(),
                    None => grad.size(1)?,
                };
                let mask = row.booleans("output_mask")?;
                let asked = |at: usize| i128::from(mask.get(at).copied().unwrap_or(false));
                let input = if row.boolean("train")? {
                    ((n - c) + (2 * n - c)) * asked(0)
                } else {
                    0
                };
                Ok(input + (n - c) * (asked(1) + asked(2)))
            },
        ),
    );
    table
}

fn batch_norm_sizes(row: &CallRow<'_>) -> Result<[i128; 2], RuleError> {
    let x = row.tensor_at(0)?;
    Ok([row.note("n", x.elements()), row.note("c", x.size(1)?)])
}

/// All elements are 0 or 1, and there is one.
fn is_spikes(row: &CallRow<'_>, name: &'static str) -> Result<bool, RuleError> {
    let tensor = row.tensor(name)?;
    if tensor.meta.dtype == DType::BOOL {
        return Ok(true);
    }
    if tensor.elements() == 0 {
        return Ok(false);
    }
    row.binary(name, row.seen_after(name))
}

fn product_additions(row: &CallRow<'_>, form: Form) -> Result<i128, RuleError> {
    let (a, b) = form.factors();
    let (x, y) = (row.tensor(a)?, row.tensor(b)?);
    let (rows, columns) = (x.size(-2)?, y.size(-1)?);
    match (is_spikes(row, a)?, is_spikes(row, b)?) {
        (true, true) => Ok(row.product_sum()? - row.nonempty_products()?),
        (true, false) => {
            let more = row.nonzeros(a, When::Before)? - row.nonempty(a, fields::NONEMPTY_ROWS)?;
            Ok(more * row.note("n", columns))
        }
        (false, true) => {
            let more =
                row.nonzeros(b, When::Before)? - row.nonempty(b, fields::NONEMPTY_COLUMNS)?;
            Ok(more * row.note("m", rows))
        }
        (false, false) => {
            let depth = row.note("k", x.size(-1)?);
            let out = row.note("elements(out)", row.output(0)?.elements());
            Ok(out * (depth - 1).max(0) * i128::from(row.calls))
        }
    }
}

fn convolution_additions(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let calls = i128::from(row.calls);
    match (is_spikes(row, "input")?, is_spikes(row, "weight")?) {
        (true, true) => Ok(row.product_sum()? - row.nonempty_products()?),
        (true, false) => {
            let fan_out = row.fan_out_nonzeros("input")?;
            Ok(fan_out - row.nonempty("input", fields::NONEMPTY_OUTPUTS)?)
        }
        (false, true) => {
            let positions = if row.boolean("transposed")? {
                row.tensor("input")?
            } else {
                row.output(0)?
            };
            let uses = positions.size(0)? * positions.elements_from(2);
            Ok(row.nonzeros("weight", When::Before)? * row.note("uses", uses))
        }
        (false, false) => {
            let [per_output, out] = convolution(row)?;
            let bias = i128::from(row.is_given("bias"));
            Ok(out * ((per_output - 1).max(0) + bias) * calls)
        }
    }
}

/// Products of an output, and outputs.
fn convolution(row: &CallRow<'_>) -> Result<[i128; 2], RuleError> {
    let groups = row.integer("groups")?;
    let out = row.note("elements(out)", row.output(0)?.elements());
    Ok([
        depth(row, row.tensor("input")?, row.tensor("weight")?, groups)?,
        out,
    ])
}

fn depth(
    row: &CallRow<'_>,
    x: TensorView<'_>,
    w: TensorView<'_>,
    groups: i128,
) -> Result<i128, RuleError> {
    let kernel = row.note("kernel", w.elements_from(2));
    Ok(x.size(1)? / groups.max(1) * kernel)
}

/// Products of an output, and outputs, of the convolutions that give the gradients of the input and of the weight.
fn convolution_backward(row: &CallRow<'_>) -> Result<[Option<[i128; 2]>; 2], RuleError> {
    let (grad, x, w) = (row.tensor_at(0)?, row.tensor_at(1)?, row.tensor_at(2)?);
    let groups = row.integer("groups")?;
    let mask = row.booleans("output_mask")?;
    let asked = |at: usize| mask.get(at).copied().unwrap_or(false);
    let input = asked(0)
        .then(|| Ok([depth(row, grad, w, groups)?, row.output(0)?.elements()]))
        .transpose()?;
    let weight = asked(1)
        .then(|| {
            // With batch and channels changed over, the batch is the depth and the gradient's positions are the kernel.
            let (image, kernel) = if row.boolean("transposed")? {
                (grad, x)
            } else {
                (x, grad)
            };
            let depth = image.size(0)? / groups.max(1) * kernel.elements_from(2);
            Ok([depth, row.output(1)?.elements()])
        })
        .transpose()?;
    Ok([input, weight])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_the_size_that_upstream_has() {
        let sizes = counters().map(|c| c.ops().len());
        assert_eq!(sizes, [21, 26, 17, 4, 3]);
    }
}
