//! What Qualia's plugin for spiking networks (qualia-plugin-snn 2.6.0) says of a network: `EnergyEstimationMetric` and `OperationCounter`,
//! after E. Lemaire et al., "An analytical estimation of spiking neural networks energy efficiency" (ICONIP 2022, arXiv:2210.13107).
//!
//! The original traces the model into a graph of layers, takes their sizes from it and, of a spiking network, how many spikes go into each
//! and come out of it while a data set is presented. Here both come from the trace: the graph from the calls ([`crate::network::graph`]),
//! the spikes from the statistics of what went into them. Layers that the original does not know, or names that it does not find again,
//! are refused as it does, unless a cost file says `strict = false`.

mod convert;
mod energy;
mod operations;

use crate::energy::{CostFile, Figure};
use crate::network::{Module, Network};
use crate::report::Ordered;
use crate::report::layers::{About, LayerReport};
use crate::rules::RuleError;

use optape_trace::ModuleId;

pub(crate) use convert::is_known;
use convert::{Activity, Converted, Kind, Layer, convert};

/// The rules that these numbers follow.
pub(crate) const RULES: &str = "qualia-2.6.0";
pub(crate) const ENERGY: &str = "qualia-energy";
pub(crate) const OPERATIONS: &str = "qualia-operations";

/// The report of one of the models of this module.
///
/// # Errors
/// Where the original fails, or the trace lacks a level.
pub(crate) fn report(
    network: &Network,
    root: ModuleId,
    file: &CostFile,
) -> Result<LayerReport, RuleError> {
    let converted = convert(network, root, file)?;
    let (rows, unit, boundary) = if file.model == ENERGY {
        let costs = energy::Costs::of(file)?;
        (
            rows(&converted, file, |layer, how| costs.row(layer, how))?,
            "pJ per inference",
            "accesses to weights, biases, potentials and queues, operations and addressing of convolution and linear layers (and additions \
             without spikes); pooling, batch norm and other layers are not in it",
        )
    } else {
        (
            rows(&converted, file, operations::row)?,
            "operations and accesses per inference",
            "convolution and linear layers (and additions without spikes); pooling, batch norm and other layers are not in it",
        )
    };
    let mut about = About::of(RULES, unit, boundary, network, root, file);
    about.warnings.extend(converted.warnings.iter().cloned());
    about.not_counted = rows
        .iter()
        .filter(|row| !row.handled)
        .map(|row| (row.name.clone(), row.class.clone()))
        .collect();
    about.counted = rows.iter().filter(|row| row.handled).count() as u64 - 1;
    let value = rows
        .into_iter()
        .map(|row| row.figure(file.model == ENERGY))
        .collect();
    Ok(LayerReport {
        value: Figure::List(value),
        about,
    })
}

fn failed(text: impl Into<String>) -> RuleError {
    RuleError::Failed(text.into())
}

/// Whether a layer is one of a spiking network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spiking {
    Yes,
    No,
    /// A layer of a spiking network whose input is not binary.
    Hybrid,
}

impl From<Spiking> for Figure {
    fn from(spiking: Spiking) -> Self {
        match spiking {
            Spiking::Yes => Self::Flag(true),
            Spiking::No => Self::Flag(false),
            Spiking::Hybrid => Self::Text("Hybrid".to_owned()),
        }
    }
}

/// Spikes at one side of a layer: per element and time step, and per inference.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rate {
    rate: f64,
    count: f64,
    binary: bool,
}

/// What a layer of a spiking network is computed from.
#[derive(Clone, Copy, Debug)]
struct Spikes {
    time_steps: f64,
    /// Of its input per element and time step.
    input_rate: f64,
    /// Of its output, per element and inference; 0 where no neuron follows.
    output: f64,
    input_is_binary: bool,
    /// Its potentials leak.
    leak: bool,
}

/// By which formulas a layer is computed.
#[derive(Clone, Copy, Debug)]
enum How<'a> {
    /// In a network without spikes.
    Formal,
    /// A layer without spikes in a network that has them.
    Beside,
    /// With spikes.
    Spiking(&'a Spikes),
}

/// A row of a report: quantities by name, and rates.
#[derive(Clone, Debug)]
struct Row {
    name: String,
    class: String,
    /// Some formula is for it, or nothing has to be done for it.
    handled: bool,
    quantities: Vec<(&'static str, f64)>,
    /// Input and output; none without spikes.
    rates: Option<[Rate; 2]>,
    spiking: Spiking,
}

/// What the formulas give for a layer: quantities in the order of the report, or none where no formula is for it.
type Quantities = Option<(Vec<(&'static str, f64)>, Spiking)>;

impl Row {
    fn figure(self, energy: bool) -> Figure {
        let of = |name: &str| {
            self.quantities
                .iter()
                .find(|(known, _)| *known == name)
                .map_or(0.0, |(_, value)| *value)
        };
        let sum = |names: &[&str]| names.iter().map(|name| of(name)).sum::<f64>();
        let mut row = Ordered::default();
        row.push("name", Figure::from(self.name.as_str()));
        let mut push = |name: &str, value: f64| row.push(name, Figure::Float(value));
        if energy {
            const MEMORY: [&str; 4] = ["mem_pot", "mem_weights", "mem_bias", "mem_io"];
            for name in MEMORY {
                push(name, of(name));
            }
            let (memory, operations) = (sum(&MEMORY), sum(&["ops", "addr"]));
            push("mem_total", memory);
            push("ops", of("ops"));
            push("addr", of("addr"));
            push("opsaddr", operations);
            push("total", memory + operations);
        } else {
            for name in ["syn_acc", "syn_mac", "addr_acc", "addr_mac"] {
                push(name, of(name));
            }
            push("total_acc", sum(&["syn_acc", "addr_acc"]));
            push("total_mac", sum(&["syn_mac", "addr_mac"]));
            push("mem_write", of("mem_write"));
            push("mem_read", of("mem_read"));
        }
        let rate = |side: usize| self.rates.and_then(|rates| rates.get(side).copied());
        let (input, output) = (rate(0), rate(1));
        row.push("input_spikerate", Figure::from(input.map(|r| r.rate)));
        row.push("output_spikerate", Figure::from(output.map(|r| r.rate)));
        row.push("input_count", Figure::from(input.map(|r| r.count)));
        row.push("output_count", Figure::from(output.map(|r| r.count)));
        row.push(
            "input_is_binary",
            Figure::Flag(input.is_some_and(|r| r.binary)),
        );
        row.push(
            "output_is_binary",
            Figure::Flag(output.is_some_and(|r| r.binary)),
        );
        row.push("is_sj", Figure::from(self.spiking));
        Figure::Map(row)
    }
}

/// A row for each layer, and the total.
fn rows(
    converted: &Converted,
    file: &CostFile,
    quantities: impl Fn(&Layer, How<'_>) -> Quantities,
) -> Result<Vec<Row>, RuleError> {
    let mut rows = match &converted.activity {
        Some(activity) => spiking_rows(converted, activity, &quantities)?,
        None => formal_rows(converted, &quantities),
    };
    let mut total = Row {
        name: "Total".to_owned(),
        class: String::new(),
        handled: true,
        quantities: Vec::new(),
        rates: None,
        spiking: Spiking::No,
    };
    for row in &rows {
        for (name, value) in &row.quantities {
            match total.quantities.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += value,
                None => total.quantities.push((name, *value)),
            }
        }
    }
    if let Some(activity) = &converted.activity {
        let (Some(first), Some(last)) = (converted.layers.get(1), converted.layers.last()) else {
            return Err(failed(
                "IndexError: list index out of range: the graph has one node",
            ));
        };
        let exclude = file.flag("exclude_nonbinary");
        let [mut input, mut output] = activity.total(exclude);
        input.binary = activity.input(&first.name)?.binary;
        output.binary = activity.output(&last.name)?.binary;
        total.rates = Some([input, output]);
        total.spiking = activity.all_spiking();
    }
    rows.push(total);
    Ok(rows)
}

fn spiking_rows(
    converted: &Converted,
    activity: &Activity,
    quantities: &impl Fn(&Layer, How<'_>) -> Quantities,
) -> Result<Vec<Row>, RuleError> {
    let layers = &converted.layers;
    let time_steps = activity.time_steps;
    let mut rows = Vec::new();
    for layer in layers {
        let feeds = layer.inputs.first().and_then(|at| layers.get(*at));
        let hidden = layer.kind.is_neuron() && feeds.is_some_and(|f| f.kind.has_weights());
        if layer.kind == Kind::Input || hidden {
            continue;
        }
        let next = layer.outputs.first().and_then(|at| layers.get(*at));
        let (input, output) = (activity.input(&layer.name)?, activity.output(&layer.name)?);
        let of_spiking = activity.is_spiking(&layer.name)?;
        let spikes = Spikes {
            time_steps,
            input_rate: input.rate,
            output: if next.is_some_and(|next| next.kind.is_neuron()) {
                output.rate * time_steps
            } else {
                0.0
            },
            input_is_binary: input.binary,
            leak: next.is_some_and(|next| next.kind == Kind::LeakyNeuron),
        };
        let default = if of_spiking { Spiking::Yes } else { Spiking::No };
        // Layers of the network that are no spiking ones are computed as without spikes.
        let found = match layer.kind {
            Kind::Flatten => Some((Vec::new(), default)),
            Kind::Add if of_spiking => Some((Vec::new(), default)),
            _ if of_spiking => quantities(layer, How::Spiking(&spikes)),
            _ => quantities(layer, How::Beside),
        };
        let handled = found.is_some();
        let (quantities, spiking) = found.unwrap_or((Vec::new(), default));
        rows.push(Row {
            name: layer.name.clone(),
            class: layer.class.clone(),
            handled,
            quantities,
            rates: Some([input, output]),
            spiking,
        });
    }
    Ok(rows)
}

fn formal_rows(
    converted: &Converted,
    quantities: &impl Fn(&Layer, How<'_>) -> Quantities,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for layer in &converted.layers {
        let found = match layer.kind {
            Kind::Flatten => Some((Vec::new(), Spiking::No)),
            _ => quantities(layer, How::Formal),
        };
        // Other layers have no row.
        let Some((quantities, spiking)) = found else {
            continue;
        };
        rows.push(Row {
            name: layer.name.clone(),
            class: layer.class.clone(),
            handled: true,
            quantities,
            rates: None,
            spiking,
        });
    }
    rows
}

fn class(module: Option<&Module>) -> String {
    module.map_or_else(String::new, |module| module.short_class().to_owned())
}

#[cfg(test)]
mod tests;
