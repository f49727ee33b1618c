//! Reads a stream from its first record to its last and tells simulations what is selected.
//!
//! This runs for every record, so what depends on a call's structure or pattern alone is worked out once and kept by number.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use optape_trace::{
    Argument, Block, Columns, Event, ModuleId, Moment, OpCallRef, OpDef, Operand, Pattern,
    PatternId, SignatureDef, SignatureId, StepSource, TextId, ThreadId, When, fields,
};
use smallvec::SmallVec;

use super::{Amounts, Map, ModuleCall, OrderedCall, Place, RowKey, Simulation, World};
use crate::error::ReplayError;
use crate::evaluate::{Followed, Kind, NO_PATTERN, kind_of};
use crate::load::{StreamRef, Traces, stack};
use crate::rules::{CallRow, Notes, RuleError, RuleSet};
use crate::selection::{Pieces, Selection};

/// A simulation of one stream, with what it adds up and the first error that it met.
pub(crate) struct Following<'s> {
    simulation: Box<dyn Simulation>,
    amounts: &'s mut Amounts,
    errors: &'s mut Vec<RuleError>,
    /// Go on after an error: what could not be had counts nothing.
    lenient: bool,
    /// It met an error that it does not go on after.
    stopped: bool,
    takes_module_calls: bool,
}

impl<'s> Following<'s> {
    pub(crate) fn new(
        simulation: Box<dyn Simulation>,
        followed: &'s mut Followed,
        lenient: bool,
    ) -> Self {
        let mut following = Self {
            takes_module_calls: simulation.takes_module_calls(),
            simulation,
            amounts: &mut followed.amounts,
            errors: &mut followed.errors,
            lenient,
            stopped: false,
        };
        // What an earlier stream has shown holds for this one, too.
        following.look();
        following
    }

    fn look(&mut self) {
        let lenient = self.lenient;
        let over = |e: &RuleError| !matches!(e, RuleError::Missing(_)) || !lenient;
        self.stopped = self.errors.iter().any(over);
    }

    #[inline]
    fn heard(&mut self, result: Result<(), RuleError>) {
        if let Err(error) = result {
            if !self.errors.contains(&error) {
                self.errors.push(error);
            }
            self.look();
        }
    }

    fn tell(
        &mut self,
        place: &Place,
        what: impl FnOnce(&mut dyn Simulation, &mut Amounts) -> Result<(), RuleError>,
    ) {
        if !self.stopped {
            self.amounts.stand_at(place.clone());
            let result = what(self.simulation.as_mut(), self.amounts);
            self.heard(result);
        }
    }
}

/// What a call or a module call made of a simulation's sums.
pub(crate) struct Told<'a> {
    /// Index of the simulation.
    pub(crate) following: usize,
    /// The call; `None` for a module's.
    pub(crate) row: Option<CallRow<'a>>,
    /// The module call.
    pub(crate) module: Option<&'a ModuleCall>,
    /// As the rule set names the op, or the module's name.
    pub(crate) shown: &'a str,
    /// The innermost module's name.
    pub(crate) innermost: &'a str,
    /// What it added, and what was said about it.
    pub(crate) amounts: Amounts,
    /// What formulas were filled in with.
    pub(crate) values: Vec<(String, String)>,
    /// Why it added nothing.
    pub(crate) error: Option<RuleError>,
}

/// Somebody who wants to see calls alone.
pub(crate) trait Explaining {
    /// Whether calls of an op, as the rule set names it, in some scopes are of interest.
    fn wants_op(&self, op: &OpDef, shown: &str, scopes: &[String]) -> bool;
    /// Whether module calls in some scopes are.
    fn wants_module(&self, scopes: &[String]) -> bool;
    /// Such a call, for each simulation.
    fn told(&mut self, told: Told<'_>);
}

/// What all calls of a signature have in common.
struct Signature<'a> {
    definition: &'a SignatureDef,
    op: &'a OpDef,
    shown: Arc<str>,
    scopes: Arc<[String]>,
    innermost: String,
    modules: Vec<ModuleId>,
    /// An op that is selected: simulations hear of it.
    told: bool,
    explained: bool,
    inputs: usize,
    /// Tensors that the op writes.
    written: Vec<usize>,
    /// Of each tensor of the results, the tensors of the arguments whose elements it may share.
    results: Vec<(usize, SmallVec<[usize; 4]>)>,
    /// Gradients flow from its results to what they are views of.
    flows: bool,
    /// Numbers of places, by pattern and step.
    places: SmallVec<[(PatternId, Option<u64>, usize); 2]>,
}

/// What a pattern tells of a tensor's values.
struct Learned {
    tensor: usize,
    binary: Option<bool>,
    /// Which of the call's words.
    nonzeros: Option<usize>,
}

/// What all calls of a pattern have in common.
struct OfPattern<'a> {
    pattern: &'a Pattern,
    /// Of each word, whether it is an integer.
    integers: Vec<bool>,
    before: Vec<Learned>,
    after: Vec<Learned>,
}

/// What a walk goes through.
#[derive(Clone, Copy)]
pub(crate) struct Way<'w, 'a> {
    pub(crate) traces: &'w Traces,
    pub(crate) rules: &'w RuleSet,
    pub(crate) selection: &'w Selection,
    pub(crate) at: StreamRef<'a>,
    pub(crate) pieces: &'w Pieces,
    /// At least so many records are read where the stream has as many, and not many more.
    pub(crate) most_records: u64,
}

struct Walk<'w, 'a, 's, 'f, 'e> {
    way: Way<'w, 'a>,
    world: World<'a>,
    /// By number.
    signatures: Vec<Option<Signature<'a>>>,
    patterns: Vec<Option<Rc<OfPattern<'a>>>>,
    places: Vec<Place>,
    /// Module calls that are open, by thread: call, module, arguments.
    open: HashMap<ThreadId, Vec<(u64, ModuleId, Vec<u64>)>>,
    /// Stages that the program has named, by thread.
    stages: HashMap<ThreadId, TextId>,
    waiting: Waiting,
    takes_module_calls: bool,
    following: &'f mut [Following<'s>],
    explaining: Option<&'e mut (dyn Explaining + 'e)>,
    integer_sums: Vec<u128>,
    float_sums: Vec<f64>,
}

/// Module calls of which something may still become known, and where they stand.
#[derive(Default)]
struct Waiting {
    calls: Map<u64, (ModuleCall, Place)>,
    /// Numbers of calls by the memory of their tensors; those that were told of meanwhile are in it, too.
    by_storage: Map<u64, SmallVec<[u64; 2]>>,
    next: u64,
}

impl Waiting {
    fn push(&mut self, call: ModuleCall, place: Place) {
        for tensor in call.arguments.iter().chain(&call.results).flatten() {
            let list = self.by_storage.entry(tensor.content.storage()).or_default();
            if list.last() != Some(&self.next) {
                list.push(self.next);
            }
        }
        self.calls.insert(self.next, (call, place));
        self.next += 1;
    }

    /// Takes the calls out that have a tensor in some memory.
    fn touching(&mut self, storage: u64) -> SmallVec<[(ModuleCall, Place); 1]> {
        let numbers = self.by_storage.remove(&storage).unwrap_or_default();
        numbers.iter().filter_map(|number| self.calls.remove(number)).collect()
    }

    fn all(&mut self) -> Vec<(ModuleCall, Place)> {
        let mut all: Vec<(u64, (ModuleCall, Place))> = self.calls.drain().collect();
        all.sort_by_key(|(number, _)| *number);
        all.into_iter().map(|(_, call)| call).collect()
    }
}

/// Goes through a stream; gives how many records were read.
///
/// # Errors
/// Where it cannot be read.
pub(crate) fn walk<'e>(
    way: Way<'_, '_>,
    following: &mut [Following<'_>],
    explaining: Option<&'e mut (dyn Explaining + 'e)>,
) -> Result<u64, ReplayError> {
    let at = way.at;
    let mut walk = Walk {
        way,
        world: World::new(at.stream.dictionary()),
        signatures: Vec::new(),
        patterns: Vec::new(),
        places: Vec::new(),
        open: HashMap::new(),
        stages: HashMap::new(),
        waiting: Waiting::default(),
        takes_module_calls: following.iter().any(|f| f.takes_module_calls),
        following,
        explaining,
        integer_sums: Vec::new(),
        float_sums: Vec::new(),
    };
    let columns = Columns::KINDS
        | Columns::SLOTS
        | Columns::STATISTICS
        | Columns::STORAGES
        | Columns::TENSORS
        | Columns::MOMENTS;
    let mut records = 0;
    for index in 0..at.stream.blocks().len() {
        if records >= way.most_records {
            break;
        }
        let block = at
            .trace
            .block(at.stream.id(), index, columns)
            .map_err(|e| way.traces.error(at.source, e))?;
        records += u64::from(block.records);
        walk.block(&block);
    }
    walk.finish();
    Ok(records)
}

impl<'a> Walk<'_, 'a, '_, '_, '_> {
    fn block(&mut self, block: &Block) {
        let mut calls = block.op_calls();
        let mut moments = block.moments.iter();
        let kinds = block.kinds.iter().copied().chain(std::iter::repeat(0));
        for (ordinal, kind) in (block.first_ordinal..)
            .zip(kinds)
            .take(block.records as usize)
        {
            if kind == 0 {
                if let Some((_, call)) = calls.next() {
                    self.call(ordinal, &call);
                }
            } else if let Some(moment) = moments.next() {
                self.moment(ordinal, moment);
            }
        }
    }

    fn finish(&mut self) {
        for (call, place) in self.waiting.all() {
            self.tell_module(&call, &place);
        }
        let world = &self.world;
        for following in self.following.iter_mut() {
            following.tell(&Place::default(), |simulation, amounts| {
                simulation.settle(amounts);
                simulation.finish(world, amounts)
            });
            following.amounts.settle();
        }
    }

    /// Makes sure that what is common to a signature is known.
    fn know_signature(&mut self, id: SignatureId) {
        if self.signatures.len() <= id.index() {
            self.signatures.resize_with(id.index() + 1, || None);
        }
        if let Some(None) = self.signatures.get(id.index()) {
            let made = self.make_signature(id);
            if let Some(place) = self.signatures.get_mut(id.index()) {
                *place = made;
            }
        }
    }

    fn make_signature(&self, id: SignatureId) -> Option<Signature<'a>> {
        let dictionary = self.world.dictionary;
        let definition = dictionary.signature(id)?;
        let op = dictionary.op(definition.op)?;
        let stack = stack(dictionary, definition.scope);
        let innermost = stack.first().map_or_else(String::new, |(name, _)| name.clone());
        let mut scopes: Vec<String> = stack.into_iter().map(|(name, _)| name).collect();
        scopes.sort_unstable();
        scopes.dedup();
        let mut modules = Vec::new();
        let mut scope = Some(definition.scope);
        while let Some((id, known)) = scope.and_then(|id| Some((id, dictionary.scope(id)?))) {
            modules.extend(known.module);
            scope = known.parent.filter(|parent| *parent < id);
        }
        let places = |argument: &Argument| -> Vec<usize> {
            match argument {
                Argument::Tensor(at) => vec![usize::from(*at)],
                Argument::TensorList(list) => {
                    list.iter().flatten().map(|at| usize::from(*at)).collect()
                }
                _ => Vec::new(),
            }
        };
        let written = op
            .arguments
            .iter()
            .zip(&definition.arguments)
            .filter(|(schema, _)| schema.written)
            .flat_map(|(_, argument)| places(argument))
            .collect();
        // A result of as many elements in the same memory holds the same elements, in whatever order; but for ops that
        // choose offsets and strides, or read the bytes as another type.
        let chooses = matches!(
            op.name.as_str(),
            "aten::as_strided" | "aten::_reshape_alias"
        ) || op.name.contains("view_as_")
            || op.overload == "dtype";
        let inputs = usize::from(definition.inputs);
        let results = (inputs..definition.tensors.len())
            .map(|result| {
                let elements = definition.tensors.get(result).map(|t| t.elements());
                let bases = (0..inputs)
                    .filter(|at| {
                        !chooses && definition.tensors.get(*at).map(|t| t.elements()) == elements
                    })
                    .collect();
                (result, bases)
            })
            .collect();
        let shown: Arc<str> = self.way.rules.shown_name(op, definition.flags).into();
        let told = kind_of(op, definition.flags) == Kind::Op
            && self.way.selection.matches(dictionary, definition, op);
        Some(Signature {
            definition,
            op,
            explained: told
                && self
                    .explaining
                    .as_ref()
                    .is_some_and(|explaining| explaining.wants_op(op, &shown, &scopes)),
            told,
            shown,
            scopes: scopes.into(),
            innermost,
            modules,
            inputs,
            written,
            results,
            flows: !op.name.starts_with("aten::detach"),
            places: SmallVec::new(),
        })
    }

    fn pattern(&mut self, id: PatternId) -> Rc<OfPattern<'a>> {
        if let Some(Some(known)) = self.patterns.get(id.index()) {
            return Rc::clone(known);
        }
        let pattern = self.world.dictionary.pattern(id).unwrap_or(NO_PATTERN);
        let mut made = OfPattern {
            pattern,
            integers: Vec::new(),
            before: Vec::new(),
            after: Vec::new(),
        };
        for entry in &pattern.entries {
            let nonzeros = (entry.fields & fields::NONZEROS != 0).then_some(made.integers.len());
            made.integers
                .extend(fields::each(entry.fields).map(fields::is_integer));
            if let Operand::Tensor(tensor) = entry.operand
                && (entry.binary.is_some() || nonzeros.is_some())
            {
                let learned = Learned {
                    tensor: usize::from(tensor),
                    binary: entry.binary,
                    nonzeros,
                };
                match entry.when {
                    When::Before => made.before.push(learned),
                    When::After => made.after.push(learned),
                }
            }
        }
        let made = Rc::new(made);
        if self.patterns.len() <= id.index() {
            self.patterns.resize_with(id.index() + 1, || None);
        }
        if let Some(place) = self.patterns.get_mut(id.index()) {
            *place = Some(Rc::clone(&made));
        }
        made
    }

    fn call(&mut self, ordinal: u64, call: &OpCallRef<'_>) {
        self.know_signature(call.signature);
        let pattern = self.pattern(call.pattern);
        let Some(Some(signature)) = self.signatures.get(call.signature.index()) else {
            return;
        };
        let definition = signature.definition;
        let tensors = definition.tensors.iter().zip(call.tensors).zip(call.storages);
        for ((meta, &tensor), &storage) in tensors.take(signature.inputs) {
            self.world.place(tensor, storage, meta);
        }
        learn(&mut self.world, call, &pattern.before);
        if !signature.written.is_empty() {
            let mut due: SmallVec<[(ModuleCall, Place); 1]> = SmallVec::new();
            for &at in &signature.written {
                if let Some(&storage) = call.storages.get(at)
                    && self.takes_module_calls
                {
                    due.extend(self.waiting.touching(storage));
                }
            }
            for (call, place) in due {
                self.tell_module(&call, &place);
            }
        }
        let Some(Some(signature)) = self.signatures.get(call.signature.index()) else {
            return;
        };
        for &at in &signature.written {
            if let Some(&storage) = call.storages.get(at) {
                self.world.written(storage);
            }
        }
        for (result, bases) in &signature.results {
            let (Some(meta), Some(&tensor), Some(&storage)) = (
                definition.tensors.get(*result),
                call.tensors.get(*result),
                call.storages.get(*result),
            ) else {
                continue;
            };
            let base = bases
                .iter()
                .filter(|at| call.storages.get(**at) == Some(&storage))
                .find_map(|at| call.tensors.get(*at).copied());
            self.world
                .place_result(tensor, storage, meta, base, signature.flows);
        }
        learn(&mut self.world, call, &pattern.after);
        if signature.told
            && let Some(step) = self.way.pieces.step_of(ordinal)
        {
            self.tell(ordinal, call, &pattern, step);
        }
    }

    fn tell(
        &mut self,
        ordinal: u64,
        call: &OpCallRef<'_>,
        pattern: &OfPattern<'a>,
        step: Option<u64>,
    ) {
        self.integer_sums.clear();
        self.float_sums.clear();
        for (&is_integer, &word) in pattern.integers.iter().zip(call.statistics) {
            if is_integer {
                self.integer_sums.push(u128::from(word));
            } else {
                self.float_sums.push(f64::from_bits(word));
            }
        }
        let Some(Some(signature)) = self.signatures.get_mut(call.signature.index()) else {
            return;
        };
        let alike = |(pattern, of_step, _): &&(PatternId, Option<u64>, usize)| {
            *pattern == call.pattern && *of_step == step
        };
        let number = match signature.places.iter().find(alike) {
            Some((_, _, number)) => *number,
            None => {
                let row: RowKey = (
                    self.way.at.source,
                    self.way.at.stream.id().index(),
                    step,
                    call.signature,
                    call.pattern,
                );
                self.places.push(Place {
                    scopes: Arc::clone(&signature.scopes),
                    op: Arc::clone(&signature.shown),
                    row: Some(row),
                });
                let number = self.places.len() - 1;
                signature.places.push((call.pattern, step, number));
                number
            }
        };
        let row = self.way.rules.seen(CallRow {
            op: signature.op,
            signature: signature.definition,
            pattern: pattern.pattern,
            calls: 1,
            integer_sums: &self.integer_sums,
            float_sums: &self.float_sums,
            values_before: false,
            dictionary: Some(self.world.dictionary),
            notes: None,
        });
        let call = OrderedCall {
            ordinal,
            signature: call.signature,
            row,
            storages: call.storages,
            tensors: call.tensors,
            modules: &signature.modules,
            shown: &signature.shown,
        };
        if signature.explained
            && let Some(explaining) = &mut self.explaining
            && let Some(place) = self.places.get(number)
        {
            for (at, following) in self.following.iter_mut().enumerate() {
                let notes = Notes::default();
                let row = CallRow {
                    notes: Some(&notes),
                    ..call.row
                };
                let call = OrderedCall { row, ..call };
                let (amounts, error) = following.alone(place, |simulation, amounts| {
                    simulation.call(&self.world, &call, amounts)
                });
                explaining.told(Told {
                    following: at,
                    row: Some(CallRow { notes: None, ..row }),
                    module: None,
                    shown: &signature.shown,
                    innermost: &signature.innermost,
                    amounts,
                    values: notes.take(),
                    error,
                });
            }
            return;
        }
        for following in self.following.iter_mut() {
            if !following.stopped {
                following.amounts.stand_alike(number, &self.places);
                let result = following.simulation.call(&self.world, &call, following.amounts);
                following.heard(result);
            }
        }
    }

    fn moment(&mut self, ordinal: u64, moment: &Moment) {
        match &moment.event {
            Event::StorageDied { storage } => {
                if self.takes_module_calls {
                    for (call, place) in self.waiting.touching(storage.0) {
                        self.tell_module(&call, &place);
                    }
                }
                self.world.forget_storage(storage.0);
            }
            Event::TensorDied { tensor } => self.world.forget_tensor(tensor.0),
            Event::Fact { module, key, value } => {
                if let Some(key) = self.world.dictionary.text(*key) {
                    match module {
                        Some(module) => self.world.fact(*module, key, value),
                        None => self.world.program_fact(key, value),
                    }
                }
            }
            Event::StepMark {
                source: StepSource::Optimizer,
                ..
            } => {
                let pieces = self.way.pieces;
                let selected = pieces.step_of(ordinal).is_some()
                    || ordinal
                        .checked_sub(1)
                        .is_some_and(|before| pieces.step_of(before).is_some());
                self.world.optimizer_step(
                    selected && self.way.selection.takes_stage("optimizer"),
                    self.stages.get(&moment.thread).copied(),
                );
            }
            Event::StageChange { name } => {
                match name {
                    Some(name) => self.stages.insert(moment.thread, *name),
                    None => self.stages.remove(&moment.thread),
                };
            }
            Event::StateAssign {
                module,
                attribute,
                tensor,
            } => self.world.state(*module, *attribute, tensor.0),
            Event::ModuleEnter {
                call,
                module,
                arguments,
            } => {
                let open = self.open.entry(moment.thread).or_default();
                if open.is_empty() && self.way.pieces.step_of(ordinal).is_some() {
                    self.world.root(*module);
                }
                let arguments = if self.takes_module_calls {
                    arguments.iter().map(|tensor| tensor.0).collect()
                } else {
                    Vec::new()
                };
                open.push((call.0, *module, arguments));
            }
            Event::ModuleExit {
                call,
                module,
                results,
            } => {
                let open = self.open.entry(moment.thread).or_default();
                // Calls above it that never ended were left by an exception.
                let Some(at) = open.iter().rposition(|(id, _, _)| *id == call.0) else {
                    return;
                };
                if !self.takes_module_calls || self.way.pieces.step_of(ordinal).is_none() {
                    open.truncate(at);
                    return;
                }
                let mut modules: Vec<ModuleId> = open.iter().take(at + 1).map(|o| o.1).collect();
                let arguments = open.get(at).map(|o| o.2.clone()).unwrap_or_default();
                open.truncate(at);
                modules.reverse();
                let names = self
                    .way
                    .selection
                    .takes_modules(self.world.dictionary, &modules);
                let Some(scopes) = names else { return };
                let world = &self.world;
                let refer = |tensor: &u64| world.reference(*tensor);
                let results: Vec<u64> = results.iter().map(|tensor| tensor.0).collect();
                let ended = ModuleCall {
                    ordinal,
                    call: *call,
                    stage_name: self.stages.get(&moment.thread).copied(),
                    module: *module,
                    stack: modules,
                    arguments: arguments.iter().map(refer).collect(),
                    results: results.iter().map(refer).collect(),
                    state_bytes: world.state_bytes(*module),
                    scopes: scopes.clone(),
                };
                let place = Place {
                    scopes: scopes.into(),
                    ..Place::default()
                };
                self.waiting.push(ended, place);
            }
            _ => {}
        }
    }

    /// Tells of a module call whose values are about to be gone.
    fn tell_module(&mut self, call: &ModuleCall, place: &Place) {
        let world = &self.world;
        let explained = self
            .explaining
            .as_mut()
            .filter(|explaining| explaining.wants_module(&call.scopes));
        let taking = self
            .following
            .iter_mut()
            .enumerate()
            .filter(|(_, f)| f.takes_module_calls);
        let Some(explaining) = explained else {
            for (_, following) in taking {
                following.tell(place, |simulation, amounts| {
                    simulation.module_call(world, call, amounts)
                });
            }
            return;
        };
        let name = world
            .definition(call.module)
            .map_or("", |def| def.name.as_str());
        for (at, following) in taking {
            let (amounts, error) = following.alone(place, |simulation, amounts| {
                simulation.module_call(world, call, amounts)
            });
            explaining.told(Told {
                following: at,
                row: None,
                module: Some(call),
                shown: name,
                innermost: name,
                amounts,
                values: Vec::new(),
                error,
            });
        }
    }
}

impl Following<'_> {
    /// What a call alone adds.
    fn alone(
        &mut self,
        place: &Place,
        what: impl FnOnce(&mut dyn Simulation, &mut Amounts) -> Result<(), RuleError>,
    ) -> (Amounts, Option<RuleError>) {
        // What it has kept back before is not this call's.
        self.simulation.settle(self.amounts);
        let mut own = Amounts::explaining(place.clone());
        let result = what(self.simulation.as_mut(), &mut own);
        self.simulation.settle(&mut own);
        own.settle();
        (own, result.err())
    }
}

#[inline]
fn learn(world: &mut World<'_>, call: &OpCallRef<'_>, all: &[Learned]) {
    for learned in all {
        if let Some(&tensor) = call.tensors.get(learned.tensor) {
            let nonzeros = learned
                .nonzeros
                .and_then(|word| call.statistics.get(word).copied());
            world.learn(tensor, learned.binary, nonzeros);
        }
    }
}
