//! Accesses to the states of spiking neurons: what is read, written and computed where an op meets memory that a neuron's state
//! lies in.
//!
//! The state is known by the memory that it lies in. Under the rules of June 2026 that is what the `_memories` of the active neurons hold
//! when an op has run, so a state counts from its first assignment on. The release also follows the results of ops that
//! wrote a state, over all neurons, as long as these tensors live, and takes a new `full_like` or `zeros_like` for a state where it knows
//! none.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use optape_trace::{DType, ModuleId, TensorMeta, call_flags, tensor_flags};
use smallvec::SmallVec;

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
#[derive(Clone, Debug)]
pub struct NeuronState {
    name: Cow<'static, str>,
    settings: Settings,
}

impl NeuronState {
    /// As upstream counts unless told otherwise.
    #[must_use]
    pub const fn new(version: Version) -> Self {
        Self {
            name: Cow::Borrowed("neuron_state"),
            settings: Settings {
                version,
                sparse: true,
                zero_ratio: 0.5,
            },
        }
    }
}

impl Counter for NeuronState {
    fn name(&self) -> &str {
        &self.name
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
        Some(Box::new(Following::new(self.settings)))
    }

    fn settings(&self) -> BTreeMap<&'static str, f64> {
        BTreeMap::from([("sparse_zero_ratio_threshold", self.settings.zero_ratio)])
    }

    fn configured(
        &self,
        name: &str,
        settings: &BTreeMap<&'static str, f64>,
    ) -> Option<Box<dyn Counter>> {
        let settings = Settings {
            zero_ratio: *settings.get("sparse_zero_ratio_threshold")?,
            ..self.settings
        };
        Some(Box::new(Self {
            name: name.to_owned().into(),
            settings,
        }))
    }

    fn method(&self) -> Option<(&'static str, &'static str)> {
        Some((
            "inside of neurons, of each op with a state among its operands: state_reads = bytes read of states, state_writes = bytes of results \
             that become states, and the elements of its results as additions, multiplications, comparisons, functions or selections, and as \
             spike_triggered_ops where a sparse tensor drives them, else as timestep_dense_ops; the count is the sum of all",
            match self.settings.version {
                Version::June2026 => "SpikingJelly db3b6df0, op_counter/neuron_state.py",
                Version::V2_0_0 => "SpikingJelly 2.0.0, op_counter/neuron_state.py",
            },
        ))
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
    results: HashSet<u64, foldhash::fast::FixedState>,
    /// How many of them lived when they were looked through last.
    living: usize,
    /// By number of the structure; `None`: of no interest.
    plans: Vec<Option<Option<Plan>>>,
}

/// What is known of all calls of a structure that run inside of a neuron.
struct Plan {
    neurons: SmallVec<[ModuleId; 2]>,
    /// Moves no values.
    ignored: bool,
    /// Makes a tensor that may be taken for a state.
    makes: bool,
    work: Work,
    name: String,
    copies: bool,
    given: Vec<Operand>,
    results: Vec<Operand>,
    /// Elements of the results.
    elements: i128,
}

/// A tensor of the call that Python would have as a tensor.
#[derive(Clone, Copy, Debug)]
struct Operand {
    index: usize,
    dtype: DType,
    elements: i128,
    element_bytes: i128,
}

impl Operand {
    fn bytes(&self) -> i128 {
        self.elements * self.element_bytes
    }
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
            results: HashSet::default(),
            living: 0,
            plans: Vec::new(),
        }
    }

    fn plan(world: &World<'_>, call: &OrderedCall<'_>) -> Option<Plan> {
        let neurons: SmallVec<[ModuleId; 2]> = call
            .modules
            .iter()
            .copied()
            .filter(|module| world.is(*module, BASE_NODE))
            .collect();
        if neurons.is_empty() {
            return None;
        }
        let signature = call.row.signature;
        let inputs = usize::from(signature.inputs);
        let operand = |index: usize| -> Option<Operand> {
            let meta = signature.tensors.get(index)?;
            if meta.is(tensor_flags::WRAPPED_NUMBER) {
                return None;
            }
            let elements = i128::from(meta.elements());
            let bytes = i128::from(meta.bytes());
            Some(Operand {
                index,
                dtype: meta.dtype,
                elements,
                element_bytes: if elements == 0 { 0 } else { bytes / elements },
            })
        };
        let results: Vec<Operand> = (inputs..signature.tensors.len())
            .filter_map(operand)
            .collect();
        let name = call.row.rule_name();
        Some(Plan {
            neurons,
            ignored: IGNORED.iter().any(|begin| call.shown.starts_with(begin)),
            makes: matches!(name.as_str(), "aten::full_like" | "aten::zeros_like"),
            work: work(&name),
            copies: name == "aten::copy_",
            name,
            given: (0..inputs).filter_map(operand).collect(),
            elements: results.iter().map(|t| t.elements).sum(),
            results,
        })
    }

    /// Whether a living tensor that came out of a state op lies there.
    fn has_result(&self, world: &World<'_>, (storage, dtype): Key) -> bool {
        !self.results.is_empty()
            && world.tensors_in(storage).any(|tensor| {
                self.results.contains(&tensor)
                    && world.meta_of(tensor).is_some_and(|meta| meta.dtype.0 == dtype)
            })
    }

    /// Forgets results that are gone, now and then.
    fn tidy(&mut self, world: &World<'_>) {
        if self.results.len() > 64 + 2 * self.living {
            self.results.retain(|tensor| world.meta_of(*tensor).is_some());
            self.living = self.results.len();
        }
    }
}

impl Simulation for Following {
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let number = call.signature.index();
        if self.plans.len() <= number {
            self.plans.resize_with(number + 1, || None);
        }
        if let Some(unknown @ None) = self.plans.get_mut(number) {
            *unknown = Some(Self::plan(world, call));
        }
        self.tidy(world);
        let Some(Some(Some(plan))) = self.plans.get(number) else {
            return Ok(());
        };
        let release = self.settings.version >= Version::V2_0_0;
        let states: SmallVec<[Key; 4]> = plan
            .neurons
            .iter()
            .filter_map(|module| world.module(*module))
            .flat_map(|module| module.states.values())
            .filter_map(|tensor| world.tensor(*tensor))
            .map(|(storage, meta)| key(meta, storage))
            .collect();
        if release && plan.makes && states.is_empty() {
            let lives = |tensor: &u64| world.meta_of(*tensor).is_some();
            let result = usize::from(call.row.signature.inputs);
            if !self.results.iter().any(lives)
                && let Some(tensor) = call.tensors.get(result)
            {
                self.results.insert(*tensor);
            }
        }
        if plan.ignored || (states.is_empty() && self.results.is_empty()) {
            return Ok(());
        }
        let is_state = |operand: &Operand| {
            call.storages.get(operand.index).is_some_and(|storage| {
                let key = (*storage, operand.dtype.0);
                states.contains(&key) || (release && self.has_result(world, key))
            })
        };
        let given: SmallVec<[(&Operand, bool); 4]> =
            plan.given.iter().map(|t| (t, is_state(t))).collect();
        let copies_into_state = plan.copies && given.first().is_some_and(|(_, state)| *state);
        let sources: SmallVec<[&Operand; 4]> = given
            .iter()
            .skip(usize::from(copies_into_state))
            .filter(|(_, state)| *state)
            .map(|(t, _)| *t)
            .collect();
        let targets: &[Operand] = if copies_into_state {
            plan.given.get(..1).unwrap_or(&[])
        } else {
            &[]
        };
        if sources.is_empty() && targets.is_empty() {
            return Ok(());
        }
        let written: &[Operand] = if copies_into_state {
            targets
        } else {
            &plan.results
        };
        let elements = plan.elements;

        // What drives the state: of the tensors that are none, those that are mostly zero.
        let mut driver: Option<i128> = None;
        if self.settings.sparse {
            for (tensor, _) in given.iter().filter(|(t, state)| !state && t.elements > 0) {
                if let Some(nonzeros) =
                    sparse_nonzeros(world, call, tensor, self.settings.zero_ratio)?
                {
                    driver = Some(driver.unwrap_or(0).max(nonzeros));
                }
            }
        }
        let accessed = |t: &Operand| match driver {
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

        let work = plan.work;
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
        let mut fresh: SmallVec<[u64; 2]> = SmallVec::new();
        if writes {
            state_writes = out_bytes;
            if driver.is_some() {
                gated = elements;
            } else {
                dense = elements;
            }
            // An accumulation of autograd's counts as an `add` whose result is no tensor of the trace.
            if release && !call.row.values_before {
                let tensor = |t: &Operand| call.tensors.get(t.index).copied();
                fresh.extend(written.iter().filter_map(tensor));
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
        out.explain(|| {
            let list = |tensors: &mut dyn Iterator<Item = &Operand>| {
                let texts: Vec<String> = tensors
                    .map(|t| format!(
                            "{} ({} x {} bytes)",
                            call.row.name_of(t.index),
                            t.elements,
                            t.element_bytes
                        ))
                    .collect();
                if texts.is_empty() {
                    "none".to_owned()
                } else {
                    texts.join(", ")
                }
            };
            let of = match driver {
                Some(nonzeros) if !copies_into_state => format!(
                    "min(nonzeros, elements) of each, since a tensor that is no state is sparse: nonzeros = {nonzeros}"
                ),
                _ => "all elements of each".to_owned(),
            };
            format!(
                "{} reads the states {} and writes {}: {of}; elements(results) = {elements}",
                plan.name,
                list(&mut sources.iter().copied()),
                if writes { list(&mut written.iter()) } else { "none".to_owned() }
            )
        });
        self.results.extend(fresh);
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

    fn takes_module_calls(&self) -> bool {
        false
    }
}

/// The nonzeros of a tensor that upstream calls sparse: a binary one, or one with enough zeros.
fn sparse_nonzeros(
    world: &World<'_>,
    call: &OrderedCall<'_>,
    tensor: &Operand,
    zero_ratio: f64,
) -> Result<Option<i128>, RuleError> {
    // What is known of the values now: as tools see them that look after the op.
    let known = call
        .tensors
        .get(tensor.index)
        .and_then(|id| world.content_of(*id))
        .map(|content| world.known(content))
        .unwrap_or_default();
    let binary = tensor.dtype == DType::BOOL || known.binary == Some(true);
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
