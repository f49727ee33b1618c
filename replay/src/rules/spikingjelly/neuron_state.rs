//! Accesses to the states of spiking neurons: what is read, written and computed where an op meets memory that a neuron's state
//! lies in.
//!
//! The state is known by the memory that it lies in. Under the rules of June 2026 that is what the `_memories` of the active neurons hold
//! when an op has run, so a state counts from its first assignment on. The release also follows the results of ops that
//! wrote a state, over all neurons, as long as these tensors live, and takes a new `full_like` or `zeros_like` for a state where it knows
//! none.

use std::collections::HashSet;

use optape_trace::{DType, TensorMeta, call_flags, tensor_flags};

use super::Version;
use crate::ordered::{Amounts, OrderedCall, Simulation, World};
use crate::rules::{CallRow, Counted, Counter, MissingLevel, Rule, RuleError, WayOut};

/// SpikingJelly's base class of neurons.
pub(crate) const BASE_NODE: &str = "spikingjelly.activation_based.neuron.base_node.BaseNode";

/// How states are counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Which rules.
    pub version: Version,
    /// Where a spike or a sparse tensor meets the state, only as many of its elements are accessed as are not zero.
    pub sparse: bool,
    /// A tensor with at least this share of zeros is sparse.
    pub zero_ratio: f64,
}

/// The counter.
#[derive(Clone, Copy, Debug)]
pub struct NeuronState(pub Settings);

impl NeuronState {
    /// As upstream counts unless told otherwise.
    #[must_use]
    pub const fn new(version: Version) -> Self {
        Self(Settings {
            version,
            sparse: true,
            zero_ratio: 0.5,
        })
    }
}

impl Counter for NeuronState {
    fn name(&self) -> &str {
        "neuron_state"
    }

    fn unit(&self) -> &str {
        "sum of metrics"
    }

    fn rule(&self, _op: &str) -> Option<&Rule> {
        None
    }

    fn count(&self, _row: &CallRow<'_>) -> Counted {
        Counted::Zero
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        Some(Box::new(Following::new(self.0)))
    }

    fn knows_every_op(&self) -> bool {
        true
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Add,
    Multiply,
    Compare,
    Nonlinear { in_place: bool },
    Select,
    Copy,
    Other,
}

fn work(op: &str) -> Work {
    let Some((name, overload)) = op
        .strip_prefix("aten::")
        .map(|op| match op.split_once('.') {
            Some((name, overload)) => (name, overload),
            None => (op, ""),
        })
    else {
        return Work::Other;
    };
    match (name, overload) {
        ("add" | "add_" | "sub" | "sub_" | "rsub", "Tensor" | "Scalar") => Work::Add,
        ("mul" | "mul_" | "div" | "div_", "Tensor" | "Scalar") => Work::Multiply,
        ("eq" | "ne" | "lt" | "le" | "gt" | "ge", "Tensor" | "Scalar") => Work::Compare,
        ("sigmoid" | "rsqrt" | "sqrt" | "exp" | "tanh", "") => Work::Nonlinear { in_place: false },
        ("sigmoid_" | "sqrt_" | "exp_" | "tanh_", "") => Work::Nonlinear { in_place: true },
        ("where", "self" | "ScalarOther" | "ScalarSelf") => Work::Select,
        ("clone" | "copy_" | "_to_copy", "") => Work::Copy,
        _ => Work::Other,
    }
}

/// Ops that move no values, by the beginnings of their names as Python prints them.
const IGNORED: [&str; 15] = [
    "aten.detach",
    "aten.view",
    "aten.alias",
    "aten._unsafe_view",
    "aten.as_strided",
    "aten.expand",
    "aten.slice",
    "aten.select.int",
    "aten.select_copy",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.transpose",
    "aten.permute",
    "aten.lift_fresh",
    "profiler.",
];

/// Follows the states of a stream.
pub(crate) struct Following {
    settings: Settings,
    /// Tensors that came out of ops that wrote a state; the release's.
    results: HashSet<u64>,
}

/// Memory and type: views of one memory under two types are two things upstream.
type Key = (u64, i8);

fn key(meta: &TensorMeta, storage: u64) -> Key {
    (storage, meta.dtype.0)
}

impl Following {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            settings,
            results: HashSet::new(),
        }
    }

    fn known_states(&mut self, world: &World<'_>, call: &OrderedCall<'_>) -> Option<HashSet<Key>> {
        let mut neurons = call
            .modules
            .iter()
            .filter(|module| world.is(**module, BASE_NODE))
            .peekable();
        neurons.peek()?;
        let place = |tensor: u64| Some(key(world.meta_of(tensor)?, world.storage_of(tensor)?));
        let mut states: HashSet<Key> = neurons
            .filter_map(|module| world.module(*module))
            .flat_map(|module| module.states.values())
            .filter_map(|tensor| place(*tensor))
            .collect();
        if self.settings.version >= Version::V2_0_0 {
            self.results
                .retain(|tensor| world.meta_of(*tensor).is_some());
            states.extend(self.results.iter().filter_map(|tensor| place(*tensor)));
            let makes = matches!(
                call.row.op.qualified_name().as_str(),
                "aten::full_like" | "aten::zeros_like"
            );
            if states.is_empty() && makes {
                let result = usize::from(call.row.signature.inputs);
                if let Some(tensor) = call.tensors.get(result) {
                    self.results.insert(*tensor);
                    states.extend(place(*tensor));
                }
            }
        }
        Some(states)
    }
}

impl Following {
    /// In the backward pass autograd hands out what it saved of a node's own results as tensor objects of their own; the objects that came out of
    /// the forward ops are gone by then, and with them what the release knows of states. Operands that are the very object still count.
    fn may_live(&self, world: &World<'_>, call: &OrderedCall<'_>, index: usize) -> bool {
        if self.settings.version < Version::V2_0_0
            || call.row.signature.stage != optape_trace::Stage::Backward
        {
            return true;
        }
        let (Some(tensor), Some(storage)) = (call.tensors.get(index), call.storages.get(index))
        else {
            return true;
        };
        let held = call
            .modules
            .iter()
            .filter(|module| world.is(**module, BASE_NODE))
            .filter_map(|module| world.module(*module))
            .flat_map(|module| module.states.values())
            .any(|state| world.storage_of(*state) == Some(*storage));
        held || self.results.contains(tensor)
    }
}

/// A tensor of the call that Python would have as a tensor.
struct Operand<'a> {
    index: usize,
    meta: &'a TensorMeta,
    elements: i128,
    element_bytes: i128,
    state: bool,
}

impl Operand<'_> {
    fn bytes(&self) -> i128 {
        self.elements * self.element_bytes
    }
}

impl Simulation for Following {
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let Some(states) = self.known_states(world, call) else {
            return Ok(());
        };
        if states.is_empty() || IGNORED.iter().any(|begin| call.shown.starts_with(begin)) {
            return Ok(());
        }
        let signature = call.row.signature;
        let inputs = usize::from(signature.inputs);
        let fresh_result = call.row.values_before;
        let operand = |index: usize| -> Option<Operand<'_>> {
            let meta = signature.tensors.get(index)?;
            if meta.is(tensor_flags::WRAPPED_NUMBER) {
                return None;
            }
            let elements = i128::from(meta.elements());
            let bytes = i128::from(meta.bytes());
            Some(Operand {
                index,
                meta,
                elements,
                element_bytes: if elements == 0 { 0 } else { bytes / elements },
                state: call
                    .storages
                    .get(index)
                    .is_some_and(|storage| states.contains(&key(meta, *storage)))
                    && self.may_live(world, call, index),
            })
        };
        let given: Vec<Operand<'_>> = (0..inputs).filter_map(operand).collect();
        let results: Vec<Operand<'_>> = (inputs..signature.tensors.len())
            .filter_map(operand)
            .collect();
        let op = call.row.rule_name();
        let copies_into_state = op == "aten::copy_" && given.first().is_some_and(|t| t.state);
        let sources: Vec<&Operand<'_>> = given
            .iter()
            .skip(usize::from(copies_into_state))
            .filter(|t| t.state)
            .collect();
        let targets: &[Operand<'_>] = if copies_into_state {
            given.get(..1).unwrap_or(&[])
        } else {
            &[]
        };
        if sources.is_empty() && targets.is_empty() {
            return Ok(());
        }
        let written: &[Operand<'_>] = if copies_into_state { targets } else { &results };
        let elements: i128 = results.iter().map(|t| t.elements).sum();

        // What drives the state: of the tensors that are none, those that are mostly zero.
        let mut driver: Option<i128> = None;
        if self.settings.sparse {
            for tensor in given.iter().filter(|t| !t.state && t.elements > 0) {
                if let Some(nonzeros) =
                    sparse_nonzeros(world, call, tensor, self.settings.zero_ratio)?
                {
                    driver = Some(driver.unwrap_or(0).max(nonzeros));
                }
            }
        }
        let accessed = |t: &Operand<'_>| match driver {
            Some(nonzeros) if !copies_into_state => nonzeros.min(t.elements) * t.element_bytes,
            _ => t.bytes(),
        };
        let reads: i128 = sources.iter().map(|t| accessed(t)).sum();
        let out_bytes: i128 = written.iter().map(accessed).sum();
        let buffer = sources
            .iter()
            .copied()
            .chain(targets)
            .map(Operand::bytes)
            .max()
            .unwrap_or(0);

        let work = work(&op);
        let (adds, muls, comparisons, nonlinear, selects) = match work {
            Work::Add => (elements, 0, 0, 0, 0),
            Work::Multiply => (0, elements, 0, 0, 0),
            Work::Compare => (0, 0, elements, 0, 0),
            Work::Nonlinear { .. } => (0, 0, 0, elements, 0),
            Work::Select => (0, 0, 0, 0, elements),
            Work::Copy | Work::Other => (0, 0, 0, 0, 0),
        };
        let writes = !written.is_empty()
            && matches!(
                work,
                Work::Add
                    | Work::Multiply
                    | Work::Select
                    | Work::Copy
                    | Work::Nonlinear { in_place: true }
            );
        let (mut state_writes, mut gated, mut dense) = (0, 0, 0);
        if writes {
            state_writes = out_bytes;
            if driver.is_some() {
                gated = elements;
            } else {
                dense = elements;
            }
            // An accumulation of autograd's counts as an `add` whose result is no tensor of the trace.
            if self.settings.version >= Version::V2_0_0 && !fresh_result {
                let tensor = |t: &Operand<'_>| call.tensors.get(t.index).copied();
                self.results.extend(written.iter().filter_map(tensor));
            }
        }
        let metrics = [
            ("state_reads", reads),
            ("state_writes", state_writes),
            ("state_adds", adds),
            ("state_muls", muls),
            ("state_comps", comparisons),
            ("state_nonlinear_ops", nonlinear),
            ("state_reset_ops", gated),
            ("state_select_ops", selects),
            ("spike_triggered_ops", gated),
            ("timestep_dense_ops", dense),
        ];
        if metrics.iter().all(|(_, amount)| *amount == 0) {
            return Ok(());
        }
        for (name, amount) in metrics {
            out.add_by_scope("metrics", name, amount);
        }
        for (name, amount) in [
            ("read_potential", reads),
            ("write_potential", state_writes),
            ("state_mac_like", muls),
            ("state_acc_like", adds + comparisons + nonlinear + selects),
        ] {
            out.add_by_scope("projections", name, amount);
        }
        out.raise_by_scope("projections", "potential_buffer_bytes", buffer);
        out.count(metrics.iter().map(|(_, amount)| amount).sum());
        Ok(())
    }
}

/// The nonzeros of a tensor that upstream calls sparse: a binary one, or one with enough zeros.
fn sparse_nonzeros(
    world: &World<'_>,
    call: &OrderedCall<'_>,
    tensor: &Operand<'_>,
    zero_ratio: f64,
) -> Result<Option<i128>, RuleError> {
    // What is known of the values now: as tools see them that look after the op.
    let known = call
        .tensors
        .get(tensor.index)
        .and_then(|id| world.content_of(*id))
        .map(|content| world.known(content))
        .unwrap_or_default();
    let binary = (tensor.meta.dtype == DType::BOOL) || known.binary == Some(true);
    let missing = || missing(&call.row, tensor.index);
    let Some(nonzeros) = known.nonzeros.map(i128::from) else {
        return Err(missing());
    };
    if !binary && known.binary.is_none() {
        return Err(missing());
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "upstream divides floats; counts of elements stay below 2^53"
    )]
    let zeros = 1.0 - nonzeros as f64 / tensor.elements as f64;
    Ok((binary || zeros >= zero_ratio).then_some(nonzeros))
}

fn missing(row: &CallRow<'_>, index: usize) -> RuleError {
    let backward = row.signature.stage == optape_trace::Stage::Backward;
    let training = row.signature.flags & call_flags::TRAINING != 0;
    RuleError::Missing(Box::new(MissingLevel {
        level: "T1",
        what: format!(
            "the nonzeros of tensor {index} of {}{}",
            row.op.qualified_name(),
            if backward {
                " in the backward pass"
            } else {
                ""
            }
        ),
        way_out: if backward && training {
            WayOut::Other(
                "no preset takes them there; select the forward with --stage forward".to_owned(),
            )
        } else {
            WayOut::Record(optape_trace::needs::FULL_FLAG)
        },
    }))
}
