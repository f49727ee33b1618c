//! What `--level full` takes beside the values: what is not empty of binary factors (T3, T5), and whether an op runs within a
//! spiking neuron.

use std::cell::Cell;

use optape_trace::needs::Product;
use optape_trace::{CHANNELS_PER_BLOCK, CROSSBARS, When, fields};

use super::measuring::{self, GeometryRoom, OpPlan, PRODUCT, Slot};
use crate::abi::{Call, Tensor};
use crate::statistics::{
    Matrix, measure_occupancy, nonempty_lines, nonempty_outputs, nonempty_outputs_convolution,
};

/// Blocks of four channels that a call may have: with their numbers it still fits into the smallest ring.
const MOST_BLOCKS: usize = 1024;

thread_local! {
    static IN_NEURON: Cell<bool> = const { Cell::new(false) };
}

/// Whether a spiking neuron's forward runs on this thread.
pub(super) fn in_neuron() -> bool {
    IN_NEURON.get()
}

/// Says whether a spiking neuron's forward runs on this thread.
pub(super) fn set_in_neuron(inside: bool) {
    IN_NEURON.set(inside);
}

/// Adds to the slots of a call, which begin at `first`, what is not empty of its binary factors.
pub(super) fn occupancy(
    plan: &OpPlan,
    call: &Call,
    (a, b, kind): (u32, u32, Product),
    slots: &mut Vec<Slot>,
    first: usize,
) {
    let mut factors = [None, None];
    for (factor, argument) in factors.iter_mut().zip([a, b]) {
        *factor = slots.iter().enumerate().skip(first).find_map(|(at, slot)| {
            let tensor = measuring::tensors(call).get(slot.operand()?)?;
            (tensor.argument == argument && slot.is_binary()).then_some((at, *tensor))
        });
    }
    let [a, b] = factors;
    if kind == Product::Convolution {
        if let Some((at, input)) = &a {
            convolution(plan, call, *at, input, slots);
        }
    } else {
        for (at, factor) in [&a, &b].into_iter().flatten() {
            // The input of `linear` may have any number of dimensions; its weight has two.
            let matrix = if kind == Product::Linear {
                Matrix::Flat
            } else {
                Matrix::Batched
            };
            let Ok(view) = measuring::view(factor) else {
                continue;
            };
            if let (Ok(lines), Some(slot)) = (nonempty_lines(&view, matrix), slots.get_mut(*at)) {
                slot.add(fields::NONEMPTY_ROWS, lines.rows);
                slot.add(fields::NONEMPTY_COLUMNS, lines.columns);
            }
        }
    }
    if let (Some((_, a)), Some((_, b))) = (&a, &b)
        && let Some(outputs) = product(plan, call, a, b, kind)
        && let Some(slot) = slots
            .iter_mut()
            .skip(first)
            .find(|slot| slot.operand_code() == PRODUCT)
    {
        slot.add(fields::NONEMPTY_OUTPUTS, outputs);
    }
}

fn convolution(plan: &OpPlan, call: &Call, at: usize, input: &Tensor, slots: &mut Vec<Slot>) {
    let mut room = GeometryRoom::default();
    let Some(geometry) = measuring::geometry(plan, call, &mut room) else {
        return;
    };
    let Ok(view) = measuring::view(input) else {
        return;
    };
    let Ok(found) = measure_occupancy(&view, &geometry) else {
        return;
    };
    if let Some(slot) = slots.get_mut(at) {
        slot.add(fields::NONEMPTY_OUTPUTS, found.nonempty_outputs);
        slot.add(fields::ACTIVE_SITES, found.active_sites);
    }
    if found.active_rows.len() > MOST_BLOCKS {
        return;
    }
    for (block, rows) in (0u16..).zip(&found.active_rows) {
        let mut slot = Slot::present(
            PRODUCT + 1 + block,
            When::Before,
            None,
            &[(fields::ACTIVE_ROWS, *rows)],
        );
        let channel = usize::from(block) * CHANNELS_PER_BLOCK;
        for ((size, field), patches) in CROSSBARS.iter().zip(&found.active_patches) {
            if channel.is_multiple_of(*size)
                && let Some(patches) = patches.get(channel / size)
            {
                slot.add(*field, *patches);
            }
        }
        slots.push(slot);
    }
}

fn product(plan: &OpPlan, call: &Call, a: &Tensor, b: &Tensor, kind: Product) -> Option<u64> {
    let (a, b) = (measuring::view(a).ok()?, measuring::view(b).ok()?);
    match kind {
        Product::Matrix | Product::Broadcast => nonempty_outputs(&a, &b, false).ok(),
        Product::Linear => nonempty_outputs(&a, &b, true).ok(),
        Product::Convolution => {
            let mut room = GeometryRoom::default();
            let geometry = measuring::geometry(plan, call, &mut room)?;
            nonempty_outputs_convolution(&a, &b, &geometry).ok()
        }
    }
}
