//! Firing rates of spiking neurons, from the values that capture watches: spikes over elements of a layer's output, where
//! the output is binary.

use std::collections::BTreeMap;

use optape_trace::{Argument, ModuleId, Operand, SignatureDef, WatchId, When, fields};

use crate::evaluate::{Kind, Seen};
use crate::load::Traces;
use crate::report::FiringRate;
use crate::rules::integer_position;
use crate::timeline::Timeline;

/// The watch of a call of `optape::watch`, and which of its tensors is the value.
pub(crate) fn watch_of(signature: &SignatureDef) -> Option<(WatchId, u16)> {
    let mut found = (None, None);
    for argument in &signature.arguments {
        match argument {
            Argument::Int(id) => found.0 = u32::try_from(*id).ok(),
            Argument::Tensor(index) => found.1 = Some(*index),
            _ => {}
        }
    }
    Some((WatchId(found.0?), found.1?))
}

/// One line per watched output of a spiking module, in the order in which they first fired.
pub(crate) fn rates(traces: &Traces, timelines: &[Timeline], seen: &[Seen<'_>]) -> Vec<FiringRate> {
    let mut multi_step: BTreeMap<(usize, usize, ModuleId), bool> = BTreeMap::new();
    for (at, timeline) in traces.streams().zip(timelines) {
        let place = (at.source, at.stream.id().index());
        multi_step.extend(
            timeline
                .multi_step
                .iter()
                .map(|(module, multi)| ((place.0, place.1, ModuleId(*module)), *multi)),
        );
    }
    let mut layers: Vec<FiringRate> = Vec::new();
    for s in seen.iter().filter(|s| s.facts.kind == Kind::Watch) {
        let signature = s.call.signature;
        let Some((id, index)) = watch_of(signature) else {
            continue;
        };
        let Some(tensor) = signature.tensors.get(usize::from(index)) else {
            continue;
        };
        let Some(watch) = s.dictionary.watch(id) else {
            continue;
        };
        let Some((module_id, module)) = watch
            .module
            .and_then(|m| s.dictionary.module(m).map(|def| (m, def)))
        else {
            continue;
        };
        if !module.spiking || watch.what != "output" {
            continue;
        }
        let entry = s.call.pattern.entry(Operand::Tensor(index), When::Before);
        let nonzeros = integer_position(
            s.call.pattern,
            Operand::Tensor(index),
            When::Before,
            fields::NONZEROS,
        )
        .and_then(|at| s.row.sums.integer_sums.get(at).copied());
        let calls = s.row.sums.calls;
        let elements = u128::from(tensor.elements()) * u128::from(calls);
        let steps_per_call = match multi_step.get(&(s.row.source, s.row.stream, module_id)) {
            Some(true) => tensor.shape.first().and_then(|&t| u64::try_from(t).ok()),
            Some(false) => Some(1),
            None => None,
        };
        let place = layers
            .iter()
            .position(|layer| layer.module == module.name)
            .unwrap_or_else(|| {
                layers.push(FiringRate {
                    module: module.name.clone(),
                    class: module.classes.first().cloned().unwrap_or_default(),
                    time_steps: Some(0),
                    rate: Some(0.0),
                    binary: true,
                    ..FiringRate::default()
                });
                layers.len() - 1
            });
        let Some(layer) = layers.get_mut(place) else {
            continue;
        };
        layer.calls += calls;
        layer.elements += elements;
        layer.shape = tensor.shape.clone();
        layer.time_steps = layer
            .time_steps
            .zip(steps_per_call)
            .map(|(sum, t)| sum + t * calls);
        match nonzeros {
            Some(nonzeros) => layer.spikes += nonzeros,
            None => layer.without_statistics += calls,
        }
        layer.binary &= entry.and_then(|e| e.binary) == Some(true);
    }
    for layer in &mut layers {
        #[expect(clippy::cast_precision_loss, reason = "a rate is a float")]
        let rate = layer.spikes as f64 / layer.elements as f64;
        layer.rate =
            (layer.binary && layer.elements > 0 && layer.without_statistics == 0).then_some(rate);
    }
    layers
}
