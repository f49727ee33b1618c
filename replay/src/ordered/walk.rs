//! Reads a stream from its first record to its last and tells simulations what is selected.

use std::collections::HashMap;
use std::sync::Arc;

use optape_trace::{
    Argument, CallId, Columns, Event, ModuleId, Moment, OpCallRef, OpDef, Operand, Pattern,
    SignatureDef, SignatureId, StepSource, ThreadId, WatchId, When, fields,
};

use super::world::is_about;
use super::{
    Amounts, KeptValues, Known, ModuleCall, ModuleEdge, OrderedCall, Place, RowKey, Simulation,
    WatchedCall, World,
};
use crate::error::ReplayError;
use crate::evaluate::{Kind, NO_PATTERN, kind_of};
use crate::firing::watch_of;
use crate::load::{StreamRef, Traces, stack};
use crate::rules::{CallRow, RuleError, RuleSet};
use crate::selection::{Pieces, Selection};

/// A simulation of one stream, with what it adds up and the first error that it met.
pub(crate) struct Following<'s> {
    pub(crate) simulation: Box<dyn Simulation>,
    pub(crate) amounts: &'s mut Amounts,
    pub(crate) errors: &'s mut Vec<RuleError>,
    /// Go on after an error: what could not be had counts nothing.
    pub(crate) lenient: bool,
}

impl Following<'_> {
    fn tell(
        &mut self,
        place: &Place,
        what: impl FnOnce(&mut dyn Simulation, &mut Amounts) -> Result<(), RuleError>,
    ) {
        let over = |e: &RuleError| !matches!(e, RuleError::Missing(_)) || !self.lenient;
        if self.errors.iter().any(over) {
            return;
        }
        self.amounts.place.clone_from(place);
        if let Err(error) = what(self.simulation.as_mut(), self.amounts)
            && !self.errors.contains(&error)
        {
            self.errors.push(error);
        }
    }
}

/// What all calls of a signature have in common.
struct Signature<'a> {
    definition: &'a SignatureDef,
    op: &'a OpDef,
    kind: Kind,
    shown: Arc<str>,
    scopes: Arc<[String]>,
    modules: Vec<ModuleId>,
    selected: bool,
    /// The same, whichever ops are selected.
    placed: bool,
    /// Of a watched value: the watch, and the tensor.
    watched: Option<(WatchId, u16)>,
    /// Tensors that the op writes.
    written: Vec<usize>,
    /// Of each tensor of the results, a tensor of the arguments whose elements it may share.
    bases: Vec<(usize, Vec<usize>)>,
    /// Gradients flow from its results to what they are views of.
    flows: bool,
}

/// A module call that is open.
struct Open {
    call: CallId,
    module: ModuleId,
    arguments: Vec<u64>,
}

struct Walk<'a, 's, 'f> {
    at: StreamRef<'a>,
    rules: &'a RuleSet,
    selection: &'a Selection,
    pieces: &'a Pieces,
    world: World<'a>,
    signatures: HashMap<SignatureId, Option<Arc<Signature<'a>>>>,
    /// Module calls that are open, by thread.
    open: HashMap<ThreadId, Vec<Open>>,
    kept: KeptValues<'a>,
    /// Somebody wants to know of op calls and of the values of module calls.
    calls: bool,
    /// Somebody wants to know when module calls begin and end.
    edges: bool,
    /// Module calls of which something may still become known, and where they stand.
    waiting: Vec<(ModuleCall, Place)>,
    following: &'f mut [Following<'s>],
    integer_sums: Vec<u128>,
    float_sums: Vec<f64>,
}

/// Goes through a stream.
///
/// # Errors
/// Where it cannot be read.
pub(crate) fn walk<'a>(
    traces: &Traces,
    rules: &'a RuleSet,
    selection: &'a Selection,
    at: StreamRef<'a>,
    pieces: &'a Pieces,
    following: &mut [Following<'_>],
) -> Result<(), ReplayError> {
    let mut walk = Walk {
        at,
        rules,
        selection,
        pieces,
        world: World::new(at.stream.dictionary()),
        signatures: HashMap::new(),
        open: HashMap::new(),
        kept: KeptValues::of(at.trace, at.stream),
        calls: following.iter().any(|f| f.simulation.wants_calls()),
        edges: following.iter().any(|f| f.simulation.wants_edges()),
        waiting: Vec::new(),
        following,
        integer_sums: Vec::new(),
        float_sums: Vec::new(),
    };
    let mut columns = Columns::KINDS
        | Columns::SLOTS
        | Columns::STATISTICS
        | Columns::THREADS
        | Columns::MOMENTS;
    if walk.calls {
        columns = columns | Columns::STORAGES | Columns::TENSORS;
    }
    for index in 0..at.stream.blocks().len() {
        let block = at
            .trace
            .block(at.stream.id(), index, columns)
            .map_err(|e| traces.error(at.source, e))?;
        let mut calls = block.op_calls();
        let mut moments = block.moments.iter();
        let kinds = block.kinds.iter().copied().chain(std::iter::repeat(0));
        for (ordinal, kind) in (block.first_ordinal..)
            .zip(kinds)
            .take(block.records as usize)
        {
            match kind {
                0 => {
                    if let Some((_, call)) = calls.next() {
                        walk.call(ordinal, &call);
                    }
                }
                _ => {
                    if let Some(moment) = moments.next() {
                        walk.moment(ordinal, moment);
                    }
                }
            }
        }
        if let Some(error) = walk.kept.failure() {
            return Err(traces.error(at.source, error));
        }
    }
    walk.deliver(|_| true);
    let world = &walk.world;
    for following in walk.following.iter_mut() {
        following.tell(&Place::default(), |simulation, amounts| {
            simulation.finish(world, amounts)
        });
    }
    Ok(())
}

impl<'a> Walk<'a, '_, '_> {
    fn signature(&mut self, id: SignatureId) -> Option<Arc<Signature<'a>>> {
        if let Some(known) = self.signatures.get(&id) {
            return known.clone();
        }
        let made = self.make_signature(id).map(Arc::new);
        self.signatures.insert(id, made.clone());
        made
    }

    fn make_signature(&self, id: SignatureId) -> Option<Signature<'a>> {
        let dictionary = self.at.stream.dictionary();
        let definition = dictionary.signature(id)?;
        let op = dictionary.op(definition.op)?;
        let mut scopes: Vec<String> = stack(dictionary, definition.scope)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
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
        let bases = (inputs..definition.tensors.len())
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
        Some(Signature {
            definition,
            op,
            kind: kind_of(op, definition.flags),
            shown: self.rules.shown_name(op, definition.flags).into(),
            scopes: scopes.into(),
            modules,
            selected: self.selection.matches(dictionary, definition, op),
            placed: self.selection.matches_place(dictionary, definition),
            watched: watch_of(definition),
            written,
            bases,
            flows: !op.name.starts_with("aten::detach"),
        })
    }

    fn call(&mut self, ordinal: u64, call: &OpCallRef<'_>) {
        let Some(signature) = self.signature(call.signature) else {
            return;
        };
        if !self.calls {
            // Nobody asks about the others.
            if signature.kind == Kind::Watch {
                self.watched(ordinal, &signature, call);
            }
            return;
        }
        let definition = signature.definition;
        let inputs = usize::from(definition.inputs);
        let tensors = || {
            definition
                .tensors
                .iter()
                .zip(call.tensors)
                .zip(call.storages)
        };
        for ((meta, &tensor), &storage) in tensors().take(inputs) {
            self.world.place(tensor, storage, meta, None, false);
        }
        let pattern = self
            .at
            .stream
            .dictionary()
            .pattern(call.pattern)
            .unwrap_or(NO_PATTERN);
        self.learn(call, pattern, When::Before);
        for &at in &signature.written {
            if let Some(&storage) = call.storages.get(at) {
                self.deliver(|call| touches(call, storage));
                self.world.written(storage);
            }
        }
        for (result, bases) in &signature.bases {
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
                .place(tensor, storage, meta, base, signature.flows);
        }
        self.learn(call, pattern, When::After);
        let step = self.pieces.step_of(ordinal);
        if let Some(step) = step
            && signature.selected
            && signature.kind == Kind::Op
        {
            self.tell(ordinal, &signature, call, pattern, step);
        }
        if signature.kind == Kind::Watch {
            self.watched(ordinal, &signature, call);
        }
    }

    fn watched(&mut self, ordinal: u64, signature: &Signature<'a>, call: &OpCallRef<'_>) {
        if !signature.placed || self.pieces.step_of(ordinal).is_none() {
            return;
        }
        let pattern = self
            .at
            .stream
            .dictionary()
            .pattern(call.pattern)
            .unwrap_or(NO_PATTERN);
        let Some((watch, tensor)) = signature.watched else {
            return;
        };
        let (Some(definition), Some(meta)) = (
            self.world.dictionary.watch(watch),
            signature.definition.tensors.get(usize::from(tensor)),
        ) else {
            return;
        };
        let entry = pattern.entry(Operand::Tensor(tensor), When::Before);
        let mut words = call.statistics;
        let mut known = Known::default();
        for one in &pattern.entries {
            let (own, rest) = words
                .split_at_checked(one.fields.count_ones() as usize)
                .unwrap_or((words, &[]));
            words = rest;
            if Some(one) == entry {
                known = Known::of(one, own);
            }
        }
        let watched = WatchedCall {
            ordinal,
            watch,
            definition,
            meta,
            within: self.within(call.thread),
            known,
            state: entry.map(|entry| entry.state),
            kept: &self.kept,
        };
        let place = Place {
            scopes: Arc::clone(&signature.scopes),
            op: Arc::clone(&signature.shown),
            row: None,
        };
        let world = &self.world;
        for following in self.following.iter_mut() {
            following.tell(&place, |simulation, amounts| {
                simulation.watched(world, &watched, amounts)
            });
        }
    }

    fn learn(&mut self, call: &OpCallRef<'_>, pattern: &Pattern, when: When) {
        let mut words = call.statistics;
        for entry in &pattern.entries {
            let (own, rest) = words
                .split_at_checked(entry.fields.count_ones() as usize)
                .unwrap_or((words, &[]));
            words = rest;
            let tensor = call
                .tensors
                .iter()
                .enumerate()
                .find(|(at, _)| is_about(entry, *at, when));
            if let Some((_, &tensor)) = tensor {
                self.world.learn(tensor, entry, own);
            }
        }
    }

    fn tell(
        &mut self,
        ordinal: u64,
        signature: &Signature<'a>,
        call: &OpCallRef<'_>,
        pattern: &'a Pattern,
        step: Option<u64>,
    ) {
        self.integer_sums.clear();
        self.float_sums.clear();
        let each = pattern
            .entries
            .iter()
            .flat_map(|entry| fields::each(entry.fields));
        for (field, &word) in each.zip(call.statistics) {
            if fields::is_integer(field) {
                self.integer_sums.push(u128::from(word));
            } else {
                self.float_sums.push(f64::from_bits(word));
            }
        }
        let row = self.rules.seen(CallRow {
            op: signature.op,
            signature: signature.definition,
            pattern,
            calls: 1,
            integer_sums: &self.integer_sums,
            float_sums: &self.float_sums,
            values_before: false,
            dictionary: Some(self.at.stream.dictionary()),
            notes: None,
        });
        let call_given = OrderedCall {
            ordinal,
            row,
            storages: call.storages,
            tensors: call.tensors,
            modules: &signature.modules,
            thread: call.thread,
            within: self.within(call.thread),
            shown: &signature.shown,
        };
        let row: RowKey = (
            self.at.source,
            self.at.stream.id().index(),
            step,
            call.signature,
            call.pattern,
        );
        let place = Place {
            scopes: Arc::clone(&signature.scopes),
            op: Arc::clone(&signature.shown),
            row: Some(row),
        };
        let world = &self.world;
        let wanting = self.following.iter_mut();
        for following in wanting.filter(|following| following.simulation.wants_calls()) {
            following.tell(&place, |simulation, amounts| {
                simulation.call(world, &call_given, amounts)
            });
        }
    }

    fn moment(&mut self, ordinal: u64, moment: &Moment) {
        match &moment.event {
            Event::Fact {
                module: Some(module),
                key,
                value,
            } => {
                if let Some(key) = self.world.dictionary.text(*key) {
                    let key = key.clone();
                    self.world.fact(*module, &key, value);
                }
            }
            Event::Fact {
                module: None,
                key,
                value,
            } => {
                if let Some(key) = self.world.dictionary.text(*key) {
                    let key = key.clone();
                    self.world.program_fact(&key, value);
                }
            }
            Event::StepMark {
                source: StepSource::Optimizer,
                ..
            } => {
                let selected = self.pieces.step_of(ordinal).is_some()
                    || ordinal
                        .checked_sub(1)
                        .is_some_and(|before| self.pieces.step_of(before).is_some());
                self.world
                    .optimizer_step(selected && self.selection.takes_stage("optimizer"));
            }
            Event::StateAssign {
                module,
                attribute,
                tensor,
            } => self.world.state(*module, *attribute, tensor.0),
            Event::StorageDied { storage } => {
                self.deliver(|call| touches(call, storage.0));
                self.world.forget_storage(storage.0);
            }
            Event::TensorDied { tensor } => self.world.forget_tensor(tensor.0),
            Event::ModuleEnter {
                call,
                module,
                arguments,
            } => {
                let selected = self.pieces.step_of(ordinal).is_some();
                let open = self.open.entry(moment.thread).or_default();
                if open.is_empty() && selected {
                    self.world.root(*module);
                }
                open.push(Open {
                    call: *call,
                    module: *module,
                    arguments: arguments.iter().map(|tensor| tensor.0).collect(),
                });
                if !selected || !self.edges {
                    return;
                }
                let modules: Vec<ModuleId> = open.iter().rev().map(|open| open.module).collect();
                if let Some(scopes) = self
                        .selection
                        .takes_modules(self.world.dictionary, &modules)
                {
                    let tensors: Vec<u64> = arguments.iter().map(|tensor| tensor.0).collect();
                    let edge = ModuleEdge {
                        ordinal,
                        thread: moment.thread,
                        call: *call,
                        module: *module,
                        tensors: &tensors,
                    };
                    self.tell_edge(scopes, |simulation, world, amounts| {
                        simulation.module_enter(world, &edge, amounts)
                    });
                }
            }
            Event::ModuleExit {
                call,
                module,
                results,
            } => {
                let open = self.open.entry(moment.thread).or_default();
                // Calls above it that never ended were left by an exception.
                let Some(at) = open.iter().rposition(|open| open.call == *call) else {
                    return;
                };
                let mut modules: Vec<ModuleId> =
                    open.iter().take(at + 1).map(|o| o.module).collect();
                let arguments = open
                    .get(at)
                    .map(|o| o.arguments.clone())
                    .unwrap_or_default();
                open.truncate(at);
                if self.pieces.step_of(ordinal).is_none() || !(self.calls || self.edges) {
                    return;
                }
                modules.reverse();
                let names = self
                    .selection
                    .takes_modules(self.world.dictionary, &modules);
                let Some(scopes) = names else { return };
                let results: Vec<u64> = results.iter().map(|tensor| tensor.0).collect();
                let edge = ModuleEdge {
                    ordinal,
                    thread: moment.thread,
                    call: *call,
                    module: *module,
                    tensors: &results,
                };
                self.tell_edge(scopes.clone(), |simulation, world, amounts| {
                    simulation.module_exit(world, &edge, amounts)
                });
                if !self.calls {
                    return;
                }
                let world = &self.world;
                let refer = |tensor: &u64| world.reference(*tensor);
                let ended = ModuleCall {
                    ordinal,
                    call: *call,
                    module: *module,
                    arguments: arguments.iter().map(refer).collect(),
                    results: results.iter().map(refer).collect(),
                    state_bytes: world.state_bytes(*module),
                    scopes: scopes.clone(),
                };
                let place = Place {
                    scopes: scopes.into(),
                    ..Place::default()
                };
                self.waiting.push((ended, place));
            }
            _ => {}
        }
    }

    /// The innermost module call that is open on a thread.
    fn within(&self, thread: ThreadId) -> Option<(CallId, ModuleId)> {
        let open = self.open.get(&thread)?.last()?;
        Some((open.call, open.module))
    }

    fn tell_edge(
        &mut self,
        scopes: Vec<String>,
        tell: impl Fn(&mut dyn Simulation, &World<'_>, &mut Amounts) -> Result<(), RuleError>,
    ) {
        let place = Place {
            scopes: scopes.into(),
            ..Place::default()
        };
        let world = &self.world;
        let wanting = self.following.iter_mut();
        for following in wanting.filter(|following| following.simulation.wants_edges()) {
            following.tell(&place, |simulation, amounts| {
                tell(simulation, world, amounts)
            });
        }
    }

    /// Tells of module calls whose values are about to be gone.
    fn deliver(&mut self, which: impl Fn(&ModuleCall) -> bool) {
        if !self.waiting.iter().any(|(call, _)| which(call)) {
            return;
        }
        let world = &self.world;
        let following = &mut *self.following;
        self.waiting.retain(|(call, place)| {
            if !which(call) {
                return true;
            }
            for following in following.iter_mut() {
                following.tell(place, |simulation, amounts| {
                    simulation.module_call(world, call, amounts)
                });
            }
            false
        });
    }
}

fn touches(call: &ModuleCall, storage: u64) -> bool {
    call.arguments
        .iter()
        .chain(&call.results)
        .flatten()
        .any(|tensor| tensor.content.storage() == storage)
}
