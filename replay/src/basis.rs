//! What the figures of a report are of. An energy says nothing without its estimator, the stages of training that are in it,
//! the costs that were assumed, and how sparse the network's input was: a spiking network that is shown silence is cheap.

use std::collections::HashMap;

use serde::Serialize;

use optape_trace::{Operand, Stage, When, fields};

use crate::evaluate::{Kind, Seen};
use crate::report::Ordered;
use crate::rules::integer_position;

/// What figures are of.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Basis {
    /// Stages of the selected op calls, and how many calls each has.
    pub stages: Ordered<u64>,
    /// The same in words: `forward only`, `forward, loss, backward, optimizer`.
    pub extent: String,
    /// Samples (images) in the selection, where the program or the user says.
    pub samples: Option<u64>,
    /// What the first layer with weights reads in the forward pass: the network's input.
    pub input: Option<LayerInput>,
    /// What all layers with weights read in the forward pass.
    pub inputs: Sparsity,
    /// Each of these layers, in the order of first use.
    pub layers: Vec<LayerInput>,
    /// By `section/name`.
    pub figures: Ordered<FigureBasis>,
}

/// What one estimator's figures are of.
#[derive(Clone, Debug, Serialize)]
pub struct FigureBasis {
    /// The model, or the rule set of a counter.
    pub estimator: String,
    /// Stages that are in the figure.
    pub stages: String,
    /// What costs were assumed, in words; the costs themselves stand in the model's `config`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regime: Option<String>,
}

/// How many zeros some tensors hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sparsity {
    /// Elements of all of them.
    pub elements: u128,
    /// Elements of those that hold nothing but 0 and 1.
    pub spiking_elements: u128,
    /// Elements of those whose nonzeros the trace holds: by default of spikes alone.
    pub counted_elements: u128,
    /// Nonzeros among these.
    pub nonzeros: u128,
    /// Share of zeros among the counted elements; absent where there are none.
    pub sparsity: Option<f64>,
}

/// What a layer with weights reads.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerInput {
    /// The layer's scope.
    pub module: String,
    /// Calls of ops that multiply with the weights.
    pub calls: u64,
    /// Its input.
    #[serde(flatten)]
    pub input: Sparsity,
}

/// Ops that multiply an activation with weights, and the activation's argument. `mm` and `addmm` are what `linear` is made of.
const WEIGHTED: [(&str, &str); 12] = [
    ("aten::convolution", "input"),
    ("aten::_convolution", "input"),
    ("aten::conv1d", "input"),
    ("aten::conv2d", "input"),
    ("aten::conv3d", "input"),
    ("aten::conv_transpose1d", "input"),
    ("aten::conv_transpose2d", "input"),
    ("aten::conv_transpose3d", "input"),
    ("aten::mkldnn_convolution", "self"),
    ("aten::linear", "input"),
    ("aten::addmm", "mat1"),
    ("aten::mm", "self"),
];

impl Sparsity {
    #[expect(clippy::cast_precision_loss, reason = "a share is a float")]
    fn finish(&mut self) {
        self.sparsity = (self.counted_elements > 0)
            .then(|| 1.0 - self.nonzeros as f64 / self.counted_elements as f64);
    }

    fn add(&mut self, other: Self) {
        self.elements += other.elements;
        self.spiking_elements += other.spiking_elements;
        self.counted_elements += other.counted_elements;
        self.nonzeros += other.nonzeros;
    }

    /// `spikes, 81.2 % zeros`.
    fn text(&self) -> String {
        let what = match self.spiking_elements {
            0 => "analog values",
            n if n == self.elements => "spikes",
            _ => "spikes and analog values",
        };
        match self.sparsity {
            Some(sparsity) if self.counted_elements == self.elements => {
                format!("{what}, {} zeros", percent(sparsity))
            }
            Some(sparsity) => {
                format!(
                    "{what}, {} zeros where they were counted",
                    percent(sparsity)
                )
            }
            None => format!("{what}, whose zeros were not counted (--level full does)"),
        }
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Stages in words.
pub(crate) fn extent<'s>(stages: impl Iterator<Item = &'s str>) -> String {
    let names: Vec<&str> = stages.collect();
    match names.as_slice() {
        [] => "none".to_owned(),
        [only] => format!("{only} only"),
        names => names.join(", "),
    }
}

impl Basis {
    /// Stages and inputs of the selected calls; figures are added when they are known.
    pub(crate) fn of(seen: &[Seen<'_>], samples: Option<u64>) -> Self {
        let mut basis = Self {
            samples,
            ..Self::default()
        };
        for stage in Stage::ALL {
            let calls: u64 = seen
                .iter()
                .filter(|s| s.facts.kind == Kind::Op && s.call.signature.stage == stage)
                .map(|s| s.row.sums.calls)
                .sum();
            if calls > 0 {
                basis.stages.push(stage.name(), calls);
            }
        }
        basis.extent = extent(basis.stages.iter().map(|(name, _)| name));
        basis.layers = layers(seen);
        for layer in &basis.layers {
            basis.inputs.add(layer.input);
        }
        basis.inputs.finish();
        basis.input = basis.layers.first().cloned();
        basis
    }

    /// The stages that an estimator counts, of those that are selected.
    pub(crate) fn stages_of(&self, counted: Option<&[&str]>) -> String {
        match counted {
            None => self.extent.clone(),
            Some(counted) => extent(
                self.stages
                    .iter()
                    .map(|(name, _)| name)
                    .filter(|name| counted.contains(name)),
            ),
        }
    }

    /// The sparsity of the input in words; nothing where no layer with weights ran.
    pub(crate) fn input_lines(&self) -> Vec<String> {
        let Some(input) = &self.input else {
            return Vec::new();
        };
        let mut lines = vec![format!(
            "input: the first layer with weights, {}, reads {}",
            input.module,
            input.input.text()
        )];
        if self.layers.len() > 1 {
            lines.push(format!(
                "all {} layers with weights read {}",
                self.layers.len(),
                self.inputs.text()
            ));
        }
        lines
    }
}

/// One entry for each module that multiplies with weights in the forward pass.
fn layers(seen: &[Seen<'_>]) -> Vec<LayerInput> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut layers: Vec<LayerInput> = Vec::new();
    for s in seen
        .iter()
        .filter(|s| s.facts.kind == Kind::Op && s.call.signature.stage == Stage::Forward)
    {
        let Some((_, argument)) = WEIGHTED.iter().find(|(op, _)| *op == s.call.op.name) else {
            continue;
        };
        let Some(tensor) = s.call.optional_tensor(argument) else {
            continue;
        };
        let operand = Operand::Tensor(tensor.index);
        let calls = s.row.sums.calls;
        let elements = u128::from(tensor.meta.elements()) * u128::from(calls);
        let binary = s
            .call
            .pattern
            .entry(operand, When::Before)
            .and_then(|entry| entry.binary);
        let nonzeros = integer_position(s.call.pattern, operand, When::Before, fields::NONZEROS)
            .and_then(|at| s.row.sums.integer_sums.get(at).copied());
        let place = *places.entry(&s.facts.module).or_insert_with(|| {
            layers.push(LayerInput {
                module: s.facts.module.clone(),
                calls: 0,
                input: Sparsity::default(),
            });
            layers.len() - 1
        });
        let Some(layer) = layers.get_mut(place) else {
            continue;
        };
        layer.calls += calls;
        layer.input.add(Sparsity {
            elements,
            spiking_elements: if binary == Some(true) { elements } else { 0 },
            counted_elements: if nonzeros.is_some() { elements } else { 0 },
            nonzeros: nonzeros.unwrap_or(0),
            sparsity: None,
        });
    }
    for layer in &mut layers {
        layer.input.finish();
    }
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_read_like_papers() {
        assert_eq!(extent(["forward"].into_iter()), "forward only");
        assert_eq!(
            extent(["forward", "backward", "optimizer"].into_iter()),
            "forward, backward, optimizer"
        );
        assert_eq!(extent(std::iter::empty()), "none");
    }

    #[test]
    fn sparsity_says_what_was_not_counted() {
        let of = |elements, spiking, counted, nonzeros| {
            let mut sparsity = Sparsity {
                elements,
                spiking_elements: spiking,
                counted_elements: counted,
                nonzeros,
                sparsity: None,
            };
            sparsity.finish();
            sparsity.text()
        };
        assert_eq!(of(10, 10, 10, 4), "spikes, 60.0 % zeros");
        assert_eq!(
            of(10, 5, 5, 1),
            "spikes and analog values, 80.0 % zeros where they were counted"
        );
        assert_eq!(
            of(10, 0, 0, 0),
            "analog values, whose zeros were not counted (--level full does)"
        );
    }
}
