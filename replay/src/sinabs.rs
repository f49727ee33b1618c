//! What sinabs 3.1.3 says of a network: `SNNAnalyzer`, `SynOpCounter` and the hooks of `register_synops_hooks`, from what a trace holds of
//! the calls of its modules.
//!
//! A synaptic operation is one element of a layer's input times the outputs that it feeds, borders included. Of convolutions the trace
//! has that sum (T2), of linear layers it is the sum of the input times `out_features`. Poolings that average scale it down; the statistics
//! of layers multiply it back by the size of the kernel, those of the model do not.

use optape_trace::ModuleId;
use serde_json::Value;

use crate::energy::{CostFile, Figure};
use crate::network::{Figures, Form, Module, Network};
use crate::report::Ordered;
use crate::report::layers::{About, LayerReport, tensor};
use crate::rules::{MissingLevel, RuleError, WayOut};

/// The rules that these numbers follow.
pub(crate) const RULES: &str = "sinabs-3.1.3";
pub(crate) const ANALYZER: &str = "sinabs-analyzer";
pub(crate) const SYNOP_COUNTER: &str = "sinabs-synop-counter";
pub(crate) const SYNOPS_HOOKS: &str = "sinabs-synops-hooks";

const STATEFUL: &str = "sinabs.layers.stateful_layer.StatefulLayer";
const SQUEEZE: &str = "sinabs.layers.reshape.SqueezeMixin";
const RELU: &str = "sinabs.layers.neuromorphic_relu.NeuromorphicReLU";
const CONV2D: &str = "torch.nn.modules.conv.Conv2d";
const LINEAR: &str = "torch.nn.modules.linear.Linear";
const AVG_POOL2D: &str = "torch.nn.modules.pooling.AvgPool2d";
const SEQUENTIAL: &str = "torch.nn.modules.container.Sequential";

/// Which part of a network a report is about, and how it is asked.
struct Asked<'a> {
    network: &'a Network,
    root: ModuleId,
    file: &'a CostFile,
    lenient: bool,
}

/// The report of one of the models of this module.
///
/// # Errors
/// Where the original fails, or the trace lacks a level.
pub(crate) fn report(
    network: &Network,
    root: ModuleId,
    file: &CostFile,
    lenient: bool,
) -> Result<LayerReport, RuleError> {
    let asked = Asked {
        network,
        root,
        file,
        lenient,
    };
    match file.model.as_str() {
        ANALYZER => asked.analyzer(),
        SYNOP_COUNTER => asked.synop_counter(),
        _ => asked.synops_hooks(),
    }
}

/// How a layer with parameters is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weights {
    Convolution,
    Linear,
}

fn weights(module: &Module) -> Option<Weights> {
    if module.is(CONV2D) {
        Some(Weights::Convolution)
    } else if module.is(LINEAR) {
        Some(Weights::Linear)
    } else {
        None
    }
}

/// Synaptic operations of a layer: those of its last call, and of all.
struct Synops {
    last: f64,
    mean: f64,
    time_steps: i64,
}

fn failed(text: impl Into<String>) -> RuleError {
    RuleError::Failed(text.into())
}

fn no_attribute(module: &Module, name: &str) -> RuleError {
    failed(format!(
        "AttributeError: '{}' object has no attribute '{name}': {} was not called",
        module.short_class(),
        module.definition.name
    ))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the original calculates in floats"
)]
const fn float(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::cast_precision_loss, reason = "sizes are small")]
const fn size_float(size: i64) -> f64 {
    size as f64
}

/// The numbers before and behind the first dimension taken apart: `reshape(batch, steps, *shape[1:])`.
fn unflatten(form: &Form, [batch, steps]: [i64; 2], of: &Module) -> Result<Form, RuleError> {
    let wrong = || {
        failed(format!(
            "RuntimeError: shape '[{batch}, {steps}, ...]' is invalid for a tensor of shape {:?} at {}",
            form.shape, of.definition.name
        ))
    };
    let (first, rest) = form.shape.split_first().ok_or_else(wrong)?;
    let (batch, steps) = match (batch, steps) {
        (-1, steps) if steps > 0 && first % steps == 0 => (first / steps, steps),
        (batch, -1) if batch > 0 && first % batch == 0 => (batch, first / batch),
        (batch, steps) if batch.checked_mul(steps) == Some(*first) => (batch, steps),
        _ => return Err(wrong()),
    };
    let mut shape = vec![batch, steps];
    shape.extend(rest);
    Ok(Form {
        shape,
        dtype: form.dtype,
    })
}

/// Batch size and time steps of a layer that works on both in one dimension.
fn squeezed(module: &Module) -> Option<[i64; 2]> {
    if !module.is(SQUEEZE) {
        return None;
    }
    let number = |name: &str| module.state.attribute(name).and_then(Value::as_i64);
    Some([number("batch_size")?, number("num_timesteps")?])
}

fn spikes(module: &Module) -> bool {
    module.is(STATEFUL)
        && module.has("spike_fn")
        && module.state.attribute("spike_fn") != Some(&Value::Null)
}

/// A tensor as the corpus of expected numbers writes it down: a number where it has one element.
fn record(form: &Form, figures: &Figures, missing: impl Fn() -> RuleError) -> Result<Figure, RuleError> {
    let (Some(sum), Some(nonzeros), Some(binary)) = (figures.sum, figures.nonzeros, figures.binary)
    else {
        return Err(missing());
    };
    let elements = form.elements();
    if elements == 1 {
        return Ok(Figure::Float(sum));
    }
    Ok(tensor(form, sum, Some(nonzeros), binary.then_some(nonzeros)))
}

impl Asked<'_> {
    fn about(&self, unit: &'static str, boundary: &'static str) -> About {
        let mut about = About::of(RULES, unit, boundary, self.network, self.root, self.file);
        for (path, _, module) in self.network.named_modules(self.root) {
            if module.parameter_elements() == 0 || module.is(STATEFUL) {
                continue;
            }
            match weights(module) {
                Some(_) => about.counted += 1,
                None => about.leave_out(path, module, "no Conv2d and no Linear"),
            }
        }
        about
    }

    /// `SNNAnalyzer(model, dt)`, after the run.
    fn analyzer(&self) -> Result<LayerReport, RuleError> {
        let mut about = self.about(
            "SynOps; spikes per neuron and time step",
            "inputs of Conv2d and Linear layers times the outputs that they feed, and outputs of spiking layers; no biases, no other layers",
        );
        let (average, dt) = (self.file.flag("average"), self.file.number("dt_ms"));
        let modules = || self.network.named_modules(self.root);
        let unflattened = modules().filter_map(|(_, _, module)| squeezed(module)).last();
        let (mut spiking, mut parameter) = (Ordered::default(), Ordered::default());
        let mut scale = 1.0;
        let (mut synops_of_model, mut neurons, mut rates) = (0.0, 0u64, 0.0);
        let mut any_spiking = false;
        for (path, id, module) in modules() {
            if spikes(module) {
                let layer = self.spiking(id, module, average, &mut about)?;
                any_spiking = true;
                neurons += layer.neurons;
                rates += layer.rates;
                spiking.push(path, layer.figure);
            }
            if module.is(AVG_POOL2D) {
                scale *= pooled(path, module, &mut about);
            }
            if let Some(kind) = weights(module) {
                let synops = self.synops(id, module, kind, unflattened)?;
                let figure = if average { synops.mean } else { synops.last };
                synops_of_model += figure;
                let steps = size_float(synops.time_steps);
                let scaled = figure * scale;
                let per_second = scaled / steps / dt * 1000.0;
                parameter.push(
                    path,
                    Figure::from([
                        ("synops", Figure::Float(scaled)),
                        ("num_timesteps", Figure::Integer(i128::from(synops.time_steps))),
                        ("time_window", Figure::Float(steps * dt)),
                        ("SynOps/s", Figure::Float(per_second)),
                        ("synops/s", Figure::Float(per_second)),
                    ]),
                );
                scale = 1.0;
            }
        }
        let mut model = Ordered::default();
        if any_spiking {
            model.push("firing_rate", Figure::Float(rates / float(neurons)));
        }
        model.push("synops", Figure::Float(synops_of_model));
        model.push("n_spiking_neurons", Figure::Float(float(neurons)));
        let value = Figure::from([
            (
                "layer_statistics",
                Figure::from([
                    ("spiking", Figure::Map(spiking)),
                    ("parameter", Figure::Map(parameter)),
                ]),
            ),
            ("model_statistics", Figure::Map(model)),
        ]);
        Ok(LayerReport { value, about })
    }

    fn spiking(
        &self,
        id: ModuleId,
        module: &Module,
        average: bool,
        about: &mut About,
    ) -> Result<Spiking, RuleError> {
        let network = self.network;
        let calls = network
            .calls(id)
            .ok_or_else(|| no_attribute(module, "n_neurons"))?;
        let (Some(last), Some(first_group)) = (&calls.last, calls.groups.first()) else {
            return Err(no_attribute(module, "n_neurons"));
        };
        let group = calls.groups.get(last.group).unwrap_or(first_group);
        let count = calls.count();
        let values = |side: &'static str| {
            move || network.missing("T1", id, side, "nonzeros and sum")
        };
        let (Some(Some(input)), Some(input_figures)) = (group.inputs.first(), last.input.first())
        else {
            return Err(network.missing("T1", id, "input", "shape and values"));
        };
        let (output, last_output) = network.only(id, "output", &group.outputs, &last.output)?;
        let whole = squeezed(module);
        let unflat = |form: &Form| match whole {
            Some(sizes) => unflatten(form, sizes, module),
            None => Ok(form.clone()),
        };
        let (input_form, form) = (unflat(input)?, unflat(output)?);
        let [batch, steps, rest @ ..] = form.shape.as_slice() else {
            return Err(failed(format!(
                "IndexError: too many indices for the output of {}, whose shape is {:?}",
                module.definition.name, form.shape
            )));
        };
        let rows = batch * steps;
        if rows == 0 {
            return Err(failed(format!(
                "IndexError: the output of {} is empty",
                module.definition.name
            )));
        }
        let neuron_form = Form {
            shape: rest.to_vec(),
            dtype: form.dtype,
        };
        let neurons = neuron_form.elements();
        // What the mean over calls is of, and how many.
        let (figures, calls_of_mean) = if average {
            if calls.groups.iter().any(|g| g.outputs != group.outputs) {
                return Err(failed(format!(
                    "RuntimeError: outputs of {} of different shapes cannot be averaged",
                    module.definition.name
                )));
            }
            let mut all = Figures::NONE;
            for group in &calls.groups {
                let (_, figures) = network.only(id, "output", &group.outputs, &group.output)?;
                all.add(figures);
            }
            (all, count)
        } else {
            (*last_output, 1)
        };
        let sum = figures.sum.ok_or_else(values("output"))? / float(calls_of_mean);
        let per_neuron = self.per_neuron(id, module, average && count > 1, &figures, rows, neurons)?;
        let output = if calls_of_mean == 1 {
            record(&form, last_output, values("output"))?
        } else {
            self.mean_output(id, &form, sum, &figures, count)?
        };
        let rate = sum / float(form.elements());
        let neuron_sum = sum / size_float(rows);
        let rates = match per_neuron {
            Some(_) | None if neurons == 1 => Figure::Float(neuron_sum),
            Some((nonzeros, binary)) => tensor(
                &neuron_form,
                neuron_sum,
                Some(nonzeros),
                binary.then_some(nonzeros),
            ),
            None => {
                about.partial(format!(
                    "nnz and firing_rate of {}'s firing_rate_per_neuron: its outputs were not kept",
                    module.definition.name
                ));
                tensor(&neuron_form, neuron_sum, None, None)
            }
        };
        let figure = Figure::from([
            ("n_neurons", Figure::Integer(i128::from(neurons))),
            ("input", record(&input_form, input_figures, values("input"))?),
            ("output", output),
            ("firing_rate", Figure::Float(rate)),
            ("firing_rate_per_neuron", rates),
        ]);
        Ok(Spiking {
            figure,
            neurons,
            rates: neuron_sum,
        })
    }

    /// How many neurons fire at all, and whether all rates are 0 or 1. `None` where the values were not kept, and that is allowed.
    fn per_neuron(
        &self,
        id: ModuleId,
        module: &Module,
        all_calls: bool,
        figures: &Figures,
        rows: i64,
        neurons: u64,
    ) -> Result<Option<(u64, bool)>, RuleError> {
        if figures.nonzeros == Some(0) {
            return Ok(Some((0, true)));
        }
        if neurons == 1 {
            return Ok(None);
        }
        let kept = self.network.kept.get(&id).filter(|kept| {
            self.network.calls(id).map(crate::network::Calls::count) == Some(kept.count)
        });
        let values: Option<Vec<f64>> = kept.and_then(|kept| {
            if all_calls {
                let total = kept.total.as_ref()?;
                Some(total.iter().map(|x| f64::from(*x)).collect())
            } else {
                kept.last.to_f64()
            }
        });
        let width = usize::try_from(neurons).ok().filter(|width| *width > 0);
        let (Some(values), Some(width)) = (values, width) else {
            if self.lenient {
                return Ok(None);
            }
            return Err(RuleError::Missing(Box::new(MissingLevel {
                level: "T8",
                what: format!(
                    "the values of the output of {}, which firing rates per neuron are counted from",
                    module.definition.name
                ),
                way_out: WayOut::Other(
                    "record with `optape record --level full --keep values` (spikes do where no neuron fires twice in a time step), or \
                     leave them out with --lenient"
                        .to_owned(),
                ),
            })));
        };
        let mut sums = vec![0.0f64; width];
        for row in values.chunks(width) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += x;
            }
        }
        let calls = if all_calls {
            kept.map_or(1.0, |kept| float(kept.count))
        } else {
            1.0
        };
        let nonzeros = sums.iter().filter(|sum| **sum != 0.0).count();
        let binary = sums
            .iter()
            .all(|sum| *sum == 0.0 || *sum == size_float(rows) * calls);
        Ok(Some((nonzeros as u64, binary)))
    }

    /// The mean of several outputs.
    fn mean_output(
        &self,
        id: ModuleId,
        form: &Form,
        sum: f64,
        figures: &Figures,
        count: u64,
    ) -> Result<Figure, RuleError> {
        if form.elements() == 1 {
            return Ok(Figure::Float(sum));
        }
        if figures.nonzeros == Some(0) {
            return Ok(tensor(form, sum, Some(0), Some(0)));
        }
        let kept = self.network.kept.get(&id).filter(|kept| kept.count == count);
        match kept.and_then(|kept| kept.total.as_ref()) {
            Some(total) => {
                let nonzeros = total.iter().filter(|x| **x != 0.0).count() as u64;
                #[expect(clippy::cast_precision_loss, reason = "sinabs adds in float32")]
                let all = count as f32;
                let binary = total.iter().all(|x| *x == 0.0 || *x == all);
                Ok(tensor(form, sum, Some(nonzeros), binary.then_some(nonzeros)))
            }
            None if self.lenient => Ok(tensor(form, sum, None, None)),
            None => Err(self
                .network
                .missing("T8", id, "output", "the values of all calls")),
        }
    }

    /// Synaptic operations of a layer with parameters.
    fn synops(
        &self,
        id: ModuleId,
        module: &Module,
        kind: Weights,
        unflattened: Option<[i64; 2]>,
    ) -> Result<Synops, RuleError> {
        let network = self.network;
        let calls = network
            .calls(id)
            .ok_or_else(|| no_attribute(module, "num_timesteps"))?;
        let mut accumulated = 0.0;
        let mut last = None;
        for (at, group) in calls.groups.iter().enumerate() {
            if group.inputs.len() != 1 {
                return Err(failed(format!(
                    "AssertionError: Multiple inputs not supported for synops hook ({})",
                    module.definition.name
                )));
            }
            let (input, figures) = network.only(id, "input", &group.inputs, &group.input)?;
            let (output, _) = network.only(id, "output", &group.outputs, &group.output)?;
            let (lead, steps, dimensions) = match unflattened {
                Some(sizes) => {
                    let form = unflatten(input, sizes, module)?;
                    unflatten(output, sizes, module)?;
                    let [batch, steps, ..] = form.shape.as_slice() else {
                        return Err(no_attribute(module, "num_timesteps"));
                    };
                    (*batch, *steps, form.shape.len() - 1)
                }
                None => {
                    let lead = input.shape.first().copied().unwrap_or(1);
                    match (kind, input.shape.as_slice()) {
                        (Weights::Linear, [_, steps, _, ..]) => {
                            (lead, *steps, input.shape.len() - 1)
                        }
                        _ => (lead, 0, input.shape.len()),
                    }
                }
            };
            let of = |figures: &Figures, fan_out: Option<f64>| -> Result<f64, RuleError> {
                let total = match kind {
                    Weights::Linear => {
                        let features = module
                            .state
                            .integer("out_features")
                            .ok_or_else(|| network.missing_fact(id, "out_features"))?;
                        let sum = figures
                            .sum
                            .ok_or_else(|| network.missing("T1", id, "input", "the sum"))?;
                        #[expect(clippy::cast_precision_loss, reason = "a number of features")]
                        let features = features as f64;
                        sum * features
                    }
                    Weights::Convolution => {
                        connections(module, dimensions)?;
                        fan_out.ok_or_else(|| self.missing_fan_out(id, module))?
                    }
                };
                Ok(total / size_float(lead))
            };
            accumulated += of(figures, group.fan_out_sum)?;
            if let Some(call) = calls.last.as_ref().filter(|last| last.group == at) {
                let figures = call.input.first().unwrap_or(figures);
                last = Some((of(figures, call.fan_out_sum)?, steps));
            }
        }
        let (last, time_steps) = last.ok_or_else(|| no_attribute(module, "num_timesteps"))?;
        Ok(Synops {
            last,
            mean: accumulated / float(calls.count()),
            time_steps,
        })
    }

    fn missing_fan_out(&self, id: ModuleId, module: &Module) -> RuleError {
        let padded = module
            .state
            .attribute("padding_mode")
            .and_then(Value::as_str)
            .is_some_and(|mode| mode != "zeros");
        let what = "the elements, each times the outputs that it feeds,";
        if padded {
            // The op has seen an input that was padded before.
            self.network.missing("T8", id, "input", what)
        } else {
            self.network.missing("T2", id, "input", what)
        }
    }

    /// `SynOpCounter(model.modules(), sum_activations)`, after the run.
    fn synop_counter(&self) -> Result<LayerReport, RuleError> {
        let mut about = About::of(
            RULES,
            "SynOps per sample",
            "outputs of NeuromorphicReLU layers times their fanout; the fanout is the program's",
            self.network,
            self.root,
            self.file,
        );
        let mut synops = Vec::new();
        for (path, id, module) in self.network.named_modules(self.root) {
            if !module.is(RELU) {
                continue;
            }
            let fanout = module
                .state
                .attribute("fanout")
                .and_then(Value::as_f64)
                .ok_or_else(|| self.network.missing_fact(id, "fanout"))?;
            if fanout <= 0.0 {
                about.leave_out(path, module, "its fanout is not above 0");
                continue;
            }
            let calls = self
                .network
                .calls(id)
                .ok_or_else(|| no_attribute(module, "activity"))?;
            let Some((last, group)) = calls
                .last
                .as_ref()
                .and_then(|last| Some((last, calls.groups.get(last.group)?)))
            else {
                return Err(no_attribute(module, "activity"));
            };
            let (form, figures) =
                self.network
                    .only(id, "output", &group.outputs, &last.output)?;
            let Some(lead) = form.shape.first() else {
                return Err(failed("TypeError: len() of a 0-d tensor"));
            };
            let sum = figures
                .sum
                .ok_or_else(|| self.network.missing("T1", id, "output", "the sum"))?;
            synops.push(sum / size_float(*lead) * fanout);
            about.counted += 1;
        }
        if synops.is_empty() {
            return Err(failed(
                "ValueError: No NeuromorphicReLU found in module list.",
            ));
        }
        let value = if self.file.flag("sum_activations") {
            Figure::Float(synops.iter().sum())
        } else {
            Figure::List(synops.into_iter().map(Figure::Float).collect())
        };
        Ok(LayerReport { value, about })
    }

    /// What `register_synops_hooks(model, dt)` leaves in the model's `hook_data`.
    fn synops_hooks(&self) -> Result<LayerReport, RuleError> {
        let about = self.about(
            "SynOps",
            "inputs of the Conv2d and Linear layers that stand directly in the Sequential, times the outputs that they feed; means over \
             batches and time steps",
        );
        let network = self.network;
        let dt = self.file.number("dt_s");
        let root = network
            .modules
            .get(&self.root)
            .filter(|root| root.is(SEQUENTIAL))
            .ok_or_else(|| {
                failed(format!(
                    "TypeError: {} is no torch.nn.Sequential, whose layers the hooks are for",
                    network.name(self.root)
                ))
            })?;
        let (mut steps, mut seconds) = (Ordered::default(), Ordered::default());
        let (mut total, mut per_second) = (0.0, 0.0);
        let mut scale = 1.0;
        let mut about = about;
        for (index, (_, id)) in root.state.children().enumerate() {
            let Some(module) = network.modules.get(&id) else {
                continue;
            };
            let name = index.to_string();
            if module.is(AVG_POOL2D) {
                scale *= pooled(&name, module, &mut about);
            }
            if let Some(kind) = weights(module)
                && let Some(calls) = network.calls(id)
                && let Some(last) = &calls.last
                && let Some(group) = calls.groups.get(last.group)
            {
                if group.inputs.len() != 1 {
                    return Err(failed(
                        "ValueError: Multiple inputs not supported for `input_diff_hook`",
                    ));
                }
                let (form, figures) = network.only(id, "input", &group.inputs, &last.input)?;
                let lead = size_float(form.shape.first().copied().unwrap_or(1));
                let sum = match kind {
                    Weights::Convolution => {
                        connections(module, form.shape.len())?;
                        last.fan_out_sum
                            .ok_or_else(|| self.missing_fan_out(id, module))?
                    }
                    Weights::Linear => {
                        let features = module
                            .state
                            .integer("out_features")
                            .ok_or_else(|| network.missing_fact(id, "out_features"))?;
                        #[expect(clippy::cast_precision_loss, reason = "a number of features")]
                        let features = features as f64;
                        features
                            * figures
                                .sum
                                .ok_or_else(|| network.missing("T1", id, "input", "the sum"))?
                    }
                };
                let synops = sum / lead * scale;
                total += synops;
                per_second += synops / dt;
                steps.push(&name, Figure::Float(synops));
                seconds.push(&name, Figure::Float(synops / dt));
            }
            if module.has("weight") {
                scale = 1.0;
            }
        }
        let value = Figure::from([
            ("total_synops_per_timestep", Figure::Float(total)),
            ("synops_per_timestep", Figure::Map(steps)),
            ("total_synops_per_second", Figure::Float(per_second)),
            ("synops_per_second", Figure::Map(seconds)),
        ]);
        Ok(LayerReport { value, about })
    }
}

struct Spiking {
    figure: Figure,
    neurons: u64,
    /// Of all its neurons together.
    rates: f64,
}

/// By how much a pooling that averages has scaled down what the next layer counts.
fn pooled(path: &str, module: &Module, about: &mut About) -> f64 {
    let (kernel, stride) = (
        module.state.attribute("kernel_size"),
        module.state.attribute("stride"),
    );
    if kernel != stride {
        about.warnings.push(format!(
            "the kernel of the pooling {path} is not as large as its stride: {} and {}; its factor is that of the kernel",
            kernel.unwrap_or(&Value::Null),
            stride.unwrap_or(&Value::Null)
        ));
    }
    match kernel {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_f64).take(2).product(),
        Some(number) => number.as_f64().map_or(1.0, |k| k * k),
        None => 1.0,
    }
}

/// The original makes a transposed convolution of a layer's attributes to count connections; this is where that fails.
fn connections(module: &Module, dimensions: usize) -> Result<(), RuleError> {
    if module.state.attribute("padding").is_some_and(Value::is_string) {
        return Err(failed(format!(
            "TypeError: the padding of {} is a word, which no transposed convolution has",
            module.definition.name
        )));
    }
    if !(3..=4).contains(&dimensions) {
        return Err(failed(format!(
            "ValueError: ConvTranspose2D: {} was given a tensor of {dimensions} dimensions; it takes 3 or 4",
            module.definition.name
        )));
    }
    Ok(())
}
