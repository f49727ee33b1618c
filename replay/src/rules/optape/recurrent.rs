//! Recurrent layers that are one op, and products of three factors.
//!
//! Per time step and sample, an LSTM of h units multiplies the input and the state with its weights and then works on
//! four gates: 4h sums of the two projections, 8h biases, three sigmoids and two hyperbolic tangents, and f * c + i * g and
//! o * tanh(c). A GRU has three gates and (1 - z) * n + z * h.

use super::{NO_ADDITIONS, NO_SYNAPSES, Tables, Work, per_call, traffic, zero};
use crate::rules::{CallRow, RuleError, TensorView};

/// Flops and additions per unit, time step and sample, products left out; with biases.
#[derive(Clone, Copy)]
struct Cell {
    flops: i128,
    additions: i128,
    biases: i128,
}

/// 4 sums, 3 sigmoids of 4, 2 tangents of 5, 3 + 1.
const LSTM: Cell = Cell {
    flops: 4 + 12 + 10 + 4,
    additions: 4 + 3 + 4 + 1,
    biases: 8,
};
/// 3 sums, 2 sigmoids, 1 tangent, r * n, 4.
const GRU: Cell = Cell {
    flops: 3 + 8 + 5 + 1 + 4,
    additions: 3 + 2 + 2 + 2,
    biases: 6,
};

/// 1 sum, and a tangent or a comparison.
const RNN_TANH: Cell = Cell {
    flops: 1 + 5,
    additions: 1 + 2,
    biases: 2,
};
const RNN_RELU: Cell = Cell {
    flops: 1 + 1,
    additions: 1,
    biases: 2,
};

pub(super) fn fill(tables: &mut Tables) {
    for (name, cell) in [
        ("lstm", LSTM),
        ("gru", GRU),
        ("rnn_tanh", RNN_TANH),
        ("rnn_relu", RNN_RELU),
    ] {
        // Of sequences of one length, and packed ones.
        tables.insert(format!("aten::{name}.input"), layers(cell));
        tables.insert(format!("aten::{name}.data"), layers(cell));
        tables.insert(format!("aten::{name}_cell"), one_step(cell));
    }
    tables.insert("aten::mkldnn_rnn_layer", one_layer());
    tables.insert("aten::mkldnn_rnn_layer_backward", one_layer_backward());
    tables.insert("aten::_trilinear", three_factors(trilinear));
    tables.insert("aten::bilinear", three_factors(bilinear));
}

/// Multiplications and unit updates of all layers.
fn sizes_of_layers(row: &CallRow<'_>) -> Result<(i128, i128), RuleError> {
    let input = row.tensor("input").or_else(|_| row.tensor("data"))?;
    let steps = input.elements() / input.size(-1)?.max(1);
    let weights: i128 = row
        .tensors("params")
        .iter()
        .filter(|t| t.dimensions() == 2)
        .map(TensorView::elements)
        .sum();
    let hidden = row
        .tensors("hx")
        .first()
        .copied()
        .ok_or_else(|| RuleError::Unsuited("the call has no state".to_owned()))?;
    let directions = if row.boolean("bidirectional")? { 2 } else { 1 };
    let units = row.integer("num_layers")? * directions * hidden.size(-1)?;
    Ok((
        row.note("products", steps * weights),
        row.note("updates", steps * units),
    ))
}

fn layers(cell: Cell) -> Work {
    let biases = move |row: &CallRow<'_>| {
        Ok::<i128, RuleError>(if row.boolean("has_biases")? {
            cell.biases
        } else {
            0
        })
    };
    Work {
        flop: per_call(
            format!(
                "2 * products + {} * updates + [biases] {} * updates",
                cell.flops, cell.biases
            ),
            move |row| {
                let (products, updates) = sizes_of_layers(row)?;
                Ok(2 * products + (cell.flops + biases(row)?) * updates)
            },
        ),
        memory_access: traffic(),
        mac: per_call(
            "products; whether a factor is binary is not looked at",
            |row| Ok(sizes_of_layers(row)?.0),
        ),
        ac: per_call(
            format!(
                "{} * updates + [biases] {} * updates",
                cell.additions, cell.biases
            ),
            move |row| Ok((cell.additions + biases(row)?) * sizes_of_layers(row)?.1),
        ),
        synop: zero(NO_SYNAPSES),
    }
}

/// One time step.
fn one_step(cell: Cell) -> Work {
    let sizes = |row: &CallRow<'_>| {
        let (input, state) = (row.tensor("input")?, row.tensor("w_hh")?);
        let batch = input.elements() / input.size(-1)?.max(1);
        let weights = row.tensor("w_ih")?.elements() + state.elements();
        Ok::<_, RuleError>((
            row.note("products", batch * weights),
            row.note("updates", batch * state.size(1)?),
        ))
    };
    let biases = move |row: &CallRow<'_>| {
        if row.is_given("b_ih") { cell.biases } else { 0 }
    };
    Work {
        flop: per_call(
            format!(
                "2 * products + {} * updates + [biases] {} * updates",
                cell.flops, cell.biases
            ),
            move |row| {
                let (products, updates) = sizes(row)?;
                Ok(2 * products + (cell.flops + biases(row)) * updates)
            },
        ),
        memory_access: traffic(),
        mac: per_call(
            "products; whether a factor is binary is not looked at",
            move |row| Ok(sizes(row)?.0),
        ),
        ac: per_call(
            format!(
                "{} * updates + [biases] {} * updates",
                cell.additions, cell.biases
            ),
            move |row| Ok((cell.additions + biases(row)) * sizes(row)?.1),
        ),
        synop: zero(NO_SYNAPSES),
    }
}

/// Multiplications and unit updates of one layer in one direction; the weights are two matrices.
fn sizes_of_layer(row: &CallRow<'_>, weights: [&str; 2]) -> Result<(i128, i128), RuleError> {
    // torch's modes: 2 is LSTM. oneDNN runs no other as one op.
    if row.integer("mode")? != 2 {
        return Err(RuleError::Unsuited(
            "a recurrent layer that is no LSTM".to_owned(),
        ));
    }
    let input = row.tensor("input")?;
    let steps = input.elements() / input.size(-1)?.max(1);
    let mut products = 0;
    for weight in weights {
        products += steps * row.tensor(weight)?.elements();
    }
    Ok((
        row.note("products", products),
        row.note("updates", steps * row.integer("hidden_size")?),
    ))
}

fn one_layer() -> Work {
    const WEIGHTS: [&str; 2] = ["weight0", "weight1"];
    let biases = |row: &CallRow<'_>| {
        Ok::<i128, RuleError>(if row.boolean("has_biases")? {
            LSTM.biases
        } else {
            0
        })
    };
    Work {
        flop: per_call(
            "2 * products + 30 * updates + [biases] 8 * updates",
            move |row| {
                let (products, updates) = sizes_of_layer(row, WEIGHTS)?;
                Ok(2 * products + (LSTM.flops + biases(row)?) * updates)
            },
        ),
        memory_access: traffic(),
        mac: per_call(
            "products; whether a factor is binary is not looked at",
            |row| Ok(sizes_of_layer(row, WEIGHTS)?.0),
        ),
        ac: per_call("12 * updates + [biases] 8 * updates", move |row| {
            Ok((LSTM.additions + biases(row)?) * sizes_of_layer(row, WEIGHTS)?.1)
        }),
        synop: zero(NO_SYNAPSES),
    }
}

/// Both factors of both products get a gradient; then four gate gradients, the state's, and sums for the biases.
fn one_layer_backward() -> Work {
    const WEIGHTS: [&str; 2] = ["weight1", "weight2"];
    Work {
        flop: per_call("4 * products + 27 * updates", |row| {
            let (products, updates) = sizes_of_layer(row, WEIGHTS)?;
            Ok(4 * products + 27 * updates)
        }),
        memory_access: traffic(),
        mac: per_call(
            "2 * products",
            |row| Ok(2 * sizes_of_layer(row, WEIGHTS)?.0),
        ),
        ac: per_call("11 * updates", |row| {
            Ok(11 * sizes_of_layer(row, WEIGHTS)?.1)
        }),
        synop: zero("a gradient: no spike drives it"),
    }
}

/// Terms of a sum over products of three factors: two multiplications and one addition each.
fn three_factors(terms: fn(&CallRow<'_>) -> Result<i128, RuleError>) -> Work {
    Work {
        flop: per_call(
            "3 * terms - elements(out) + [bias] elements(out)",
            move |row| {
                let out = row.note("elements(out)", row.output(0)?.elements());
                Ok(3 * terms(row)? - out + if row.is_given("bias") { out } else { 0 })
            },
        ),
        memory_access: traffic(),
        mac: per_call("terms: one multiplication of each is accumulated", terms),
        ac: zero(NO_ADDITIONS),
        synop: zero(NO_SYNAPSES),
    }
}

fn bilinear(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let weight = row.tensor("weight")?;
    Ok(row.note(
        "terms",
        row.output(0)?.elements() * weight.size(1)? * weight.size(2)?,
    ))
}

/// Each factor gets dimensions of size 1 at the places of its `expand` list; the terms fill what they span together.
fn trilinear(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let mut span: Vec<i128> = Vec::new();
    for (factor, expand) in [("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")] {
        let tensor = row.tensor(factor)?;
        let expanded = row.integers(expand)?;
        let mut sizes = tensor.meta.shape.iter();
        for at in 0..tensor.dimensions() + expanded.len() {
            let size = if expanded.contains(&(at as i128)) {
                1
            } else {
                i128::from(sizes.next().copied().unwrap_or(1))
            };
            match span.get_mut(at) {
                Some(largest) => *largest = size.max(*largest),
                None => span.push(size),
            }
        }
    }
    let terms = span.iter().try_fold(1i128, |n, &size| n.checked_mul(size));
    terms
        .map(|terms| row.note("terms", terms))
        .ok_or_else(|| RuleError::Unsuited("the count overflows".to_owned()))
}
