//! Op calls: what is looked at before and behind the kernel, and the record.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use optape_trace::{
    Definition, Event, Moment, OpDef, OpId, PatternId, SignatureDef, TextId, ThreadId, call_flags,
};

use super::device::{Asking, gpu_time};
use super::identities::Identities;
use super::inference::Inference;
use super::lifetimes::Lifetimes;
use super::measuring::{OpPlan, Preset, Slot};
use super::outlet::KeptValue;
use super::signatures::{Found, Surroundings, Wildness};
use super::stream::Stream;
use super::{
    Capture, Failure, HOOK_ONLY, OWN_TIME_NS, SLOTS, STATISTICS_TIME_NS, State, device, measuring,
    plans, replace_plans, signatures,
};
use crate::abi::{Call, Plan, plan};
use crate::clock::monotonic_ns;
use crate::device::LaunchId;
use crate::ring::OpCallMessage;

/// Distinct patterns: in practice some dozens.
const MOST_PATTERNS: usize = 1 << 16;

/// In the first of a call's own words: the second says where its slots begin, and the third what was launched.
const BEGUN: u64 = 1;

/// Every so many calls capture's own time is measured. A prime: steps repeat, and what divides their length would see the same ops
/// every time.
const OWN_TIME_EVERY: u64 = 61;

impl Capture {
    pub(super) fn define_op(&'static self, definition: OpDef, out: &mut Plan) -> bool {
        self.state.lock().get_or_insert_default();
        self.with(|state| {
            let op = u32::try_from(state.ops.len())?;
            let plan = OpPlan::new(&definition, &state.settings);
            out.op = op;
            out.flags = plan_flags(&definition, &plan, state.settings.statistics);
            if opens_range(&definition) {
                state.range_ops.enters.push(op);
            } else if definition.name == "profiler::_record_function_exit" {
                state.range_ops.exits.push(op);
            }
            let wildness = Wildness::new(definition.arguments.len());
            out.wild = wildness.as_ptr();
            state.wildness.push(wildness);
            let plans = plans().unwrap_or_else(|| replace_plans(boxcar::Vec::new()));
            let index = plans.push(plan);
            if index != op as usize {
                return Err(Failure("ops and their plans are out of step".to_owned()));
            }
            if let Some(stream) = state.stream.as_mut() {
                stream
                    .outlet
                    .define(&Definition::Op(OpId(op), definition.clone()))?;
            }
            state.ops.push(definition);
            Ok(true)
        })
    }

    /// Before the kernel: looks at the inputs.
    pub(super) fn begin(&'static self, call: &mut Call) {
        let Some(plan) = plans().and_then(|p| p.get(call.op as usize)) else {
            return;
        };
        if call.flags & call_flags::NOT_EXECUTED != 0 {
            return;
        }
        let sampled = sample();
        let began = if sampled { monotonic_ns() } else { 0 };
        let recall =
            |tensor: &crate::abi::Tensor| self.state.lock().as_mut().and_then(|s| s.recall(tensor));
        if let Some(tensor) = plan.inference.and_then(|inference| inference.premise(call))
            && let Some(answer) = measuring::premise(tensor, recall)
            && let Some(state) = self.state.lock().as_mut()
        {
            state.identities.remember(tensor, &answer);
        }
        if plan.looks_before {
            let taken = SLOTS.try_with(|slots| {
                let mut slots = slots.borrow_mut();
                let first = slots.len();
                let mut asking = Asking::default();
                // One lock for all operands would mean a place to keep the answers: most calls have one operand worth asking for.
                measuring::before(plan, call, recall, &mut asking, &mut slots);
                (first, asking.send(&mut slots[first..]))
            });
            if let Ok((first, launch)) = taken {
                call.capture[0] = BEGUN;
                call.capture[1] = first as u64;
                call.capture[2] = launch.map_or(0, LaunchId::to_word);
            }
        }
        // Behind what was launched: that is no work of the call.
        if plan.timed {
            gpu_time::begin(plan, call);
        }
        if sampled {
            STATISTICS_TIME_NS
                .fetch_add((monotonic_ns() - began) * OWN_TIME_EVERY, Ordering::Relaxed);
        }
    }

    /// The kernel threw: forgets what was found of the inputs.
    pub(super) fn abort(&'static self, call: &mut Call) {
        if call.capture[0] & gpu_time::TIMED != 0 {
            gpu_time::abort(call);
        }
        if call.capture[0] & BEGUN != 0 {
            let first = call.capture[1] as usize;
            // A thread that is going away has no slots left to forget.
            let _ = SLOTS.try_with(|slots| slots.borrow_mut().truncate(first));
            if let Some(launch) = LaunchId::from_word(call.capture[2]) {
                device::written(launch, None);
            }
        }
    }

    /// After the kernel: looks at the outputs and writes the record.
    pub(super) fn end(&'static self, call: &mut Call) {
        if self.recording.load(Ordering::Relaxed) == HOOK_ONLY {
            return;
        }
        let sampled = sample();
        let began = if sampled { monotonic_ns() } else { 0 };
        let executed = call.flags & call_flags::NOT_EXECUTED == 0;
        let plan = plans()
            .and_then(|p| p.get(call.op as usize))
            .filter(|plan| executed && plan.looks_after);
        if call.capture[0] == 0 && plan.is_none() {
            self.with(|state| state.op_call(call, &[], None));
        } else {
            self.end_with_statistics(call, plan, None);
        }
        if sampled {
            OWN_TIME_NS.fetch_add((monotonic_ns() - began) * OWN_TIME_EVERY, Ordering::Relaxed);
        }
    }

    pub(super) fn end_with_statistics(
        &'static self,
        call: &Call,
        plan: Option<&OpPlan>,
        kept: Option<&KeptValue>,
    ) {
        // Before anything else is given to the device.
        let timed = (call.capture[0] & gpu_time::TIMED != 0).then(|| gpu_time::end(call));
        let mut record = None;
        // A thread that is going away has no slots left, and is past recording.
        let _ = SLOTS.try_with(|slots| {
            let mut slots = slots.borrow_mut();
            let first = if call.capture[0] & BEGUN != 0 {
                call.capture[1] as usize
            } else {
                slots.len()
            };
            let mut launches = [None; 2];
            if call.capture[0] & BEGUN != 0 {
                launches[0] = LaunchId::from_word(call.capture[2]);
            }
            if let Some(plan) = plan {
                let behind = slots.len();
                let mut asking = Asking::default();
                measuring::after(plan, call, &mut asking, &mut slots);
                launches[1] = asking.send(&mut slots[behind..]);
            }
            slots.extend(timed.map(|(slot, _)| slot));
            if slots.len() > first + 1 {
                measuring::sort(&mut slots[first..]);
            }
            record = self.with(|state| {
                state.record = None;
                state.op_call(call, &slots[first..], kept)?;
                Ok(state.record)
            });
            for launch in launches.into_iter().flatten() {
                device::written(launch, record);
            }
            slots.truncate(first);
        });
        if let Some((_, Some(timed))) = timed {
            gpu_time::written(timed, record);
        }
    }
}

impl State {
    pub(super) fn recall(
        &mut self,
        tensor: &crate::abi::Tensor,
    ) -> Option<crate::statistics::Answer> {
        let answer = self.identities.recall(tensor);
        self.recalled += u64::from(answer.is_some());
        answer
    }

    /// A call while nothing is recorded: only ranges are followed.
    #[cold]
    pub(super) fn unrecorded_call(&mut self, thread: usize, call: &Call) -> Result<(), Failure> {
        if self.range_ops.exits.contains(&call.op) {
            self.range_exit(thread)?;
        }
        if self.range_ops.enters.contains(&call.op) {
            let name = measuring::payload(call).first().copied().unwrap_or(0);
            self.range_enter(thread, TextId(name as u32))?;
        }
        Ok(())
    }

    /// Writes the record of a call, and right behind it the value that is kept of it.
    pub(super) fn op_call(
        &mut self,
        call: &Call,
        slots: &[Slot],
        kept: Option<&KeptValue>,
    ) -> Result<(), Failure> {
        if self.stopped {
            return Ok(());
        }
        let thread = self.thread(Some(call.thread))?;
        if !self.has_stream(call.start_ns)? {
            return Ok(());
        }
        // On a line of the ring that every record reads anyway.
        let command = self.command();
        if command != self.obeyed {
            self.obey(command)?;
        }
        if self.paused != 0 || self.stopped {
            return self.unrecorded_call(thread, call);
        }
        let range_exit = self.range_ops.exits.contains(&call.op);
        if range_exit {
            // The exit op itself is outside of the range, as the enter op is.
            self.range_exit(thread)?;
        }
        let grad_mode = call.flags & call_flags::GRAD_MODE != 0;
        let place = self.scopes.place(thread, call, grad_mode);
        let state = &self.scopes.threads[thread];
        let mut flags = call.flags;
        if state.training {
            flags |= call_flags::TRAINING;
        }
        if place.unattributed {
            flags |= call_flags::UNATTRIBUTED;
        }
        let around = Surroundings {
            op: call.op,
            flags,
            scope: place.scope,
            stage: place.stage,
            stage_name: state.stage_name,
        };
        let Some(stream) = self.stream.as_mut() else {
            return Ok(());
        };
        let words = measuring::words(call);
        let (signature, structure) = match stream.signatures.find(words, around) {
            Found::Known(id) => (id, true),
            Found::New(id) => {
                let definition = signatures::decode(words, call.argument_words as usize, around)?;
                check(&definition, call)?;
                if let Some(wildness) = self.wildness.get_mut(call.op as usize) {
                    wildness.observe(&definition.arguments);
                }
                stream
                    .outlet
                    .define(&Definition::Signature(id, definition))?;
                (id, true)
            }
            Found::Lost { id, define } => {
                if define {
                    stream
                        .outlet
                        .define(&Definition::Signature(id, signatures::lost(around)))?;
                }
                (id, false)
            }
        };
        stream.metas.clear();
        stream.numbers.clear();
        stream.storages.clear();
        stream.tensors.clear();
        if structure {
            for slot in slots {
                stream.metas.push(slot.meta);
                stream.numbers.extend_from_slice(slot.numbers());
            }
        }
        let pattern = match stream.patterns.get(&stream.metas) {
            Some(pattern) => *pattern,
            None => {
                if stream.patterns.len() >= MOST_PATTERNS {
                    return Err(Failure(format!(
                        "more than {MOST_PATTERNS} patterns of statistics"
                    )));
                }
                let id = PatternId(stream.patterns.len() as u32);
                stream
                    .outlet
                    .define(&Definition::Pattern(id, measuring::pattern(&stream.metas)))?;
                stream.patterns.insert(stream.metas.clone(), id);
                id
            }
        };
        if self.settings.statistics != Preset::None {
            let lifetimes = self.lifetimes.as_deref_mut();
            identify(&mut self.identities, lifetimes, call, slots, stream);
            if let Some(lifetimes) = self.lifetimes.as_deref_mut() {
                tell_lifetimes(lifetimes, call, thread, stream)?;
            }
        }
        let sequence_number = match call.node {
            crate::abi::NO_NODE if call.graph_task == 0 => call.peek as i64,
            crate::abi::NO_NODE => -1,
            node => node as i64,
        };
        let identities: (&[u64], &[u64]) = if structure {
            (&stream.storages, &stream.tensors)
        } else {
            (&[], &[])
        };
        // A function call may have begun before the first op in it, which began the stream.
        let start_ns = call.start_ns.max(stream.epoch_ns);
        let sent = stream.outlet.op_call(&OpCallMessage {
            signature: signature.0,
            pattern: pattern.0,
            thread: thread as u32,
            start_ns: start_ns - stream.epoch_ns,
            duration_ns: call.end_ns.saturating_sub(start_ns),
            sequence_number,
            payload: if structure {
                measuring::payload(call)
            } else {
                &[]
            },
            storages: identities.0,
            tensors: identities.1,
            statistics: &stream.numbers,
        });
        // A call whose structure is lost has no pattern that could wait.
        self.record = sent.filter(|_| structure);
        if let Some(kept) = kept {
            let whole = sent.is_some() && stream.outlet.value(kept);
            self.kept_values += u64::from(whole);
            self.dropped_values += u64::from(!whole);
        }
        // The call may name what ended with it.
        for event in stream.ended.drain(..) {
            stream.outlet.moment(&Moment {
                time_ns: call.end_ns.saturating_sub(stream.epoch_ns),
                thread: ThreadId(thread as u32),
                event,
            })?;
        }
        self.calls += 1;
        if device::is_busy() {
            self.late_statistics(thread)?;
        }
        if self.range_ops.enters.contains(&call.op) {
            let name = measuring::payload(call).first().copied().unwrap_or(0);
            self.range_enter(thread, TextId(name as u32))?;
        }
        Ok(())
    }

    /// Writes what devices have answered by now, and what there is to say about them.
    #[cold]
    pub(super) fn late_statistics(&mut self, thread: usize) -> Result<(), Failure> {
        for (key, value) in device::news() {
            let key = self.text(&key)?;
            self.fact(None, key, &value)?;
        }
        let Some(stream) = self.stream.as_mut() else {
            return Ok(());
        };
        let time_ns = monotonic_ns().saturating_sub(stream.epoch_ns);
        let mut result = Ok(());
        device::arrived(|record, values| {
            let told = stream.late(time_ns, thread, record, values);
            if result.is_ok() {
                result = told;
            }
        });
        result
    }
}

/// Opens a range whose name is its argument.
fn opens_range(op: &OpDef) -> bool {
    matches!(
        op.name.as_str(),
        "profiler::_record_function_enter_new" | "profiler::_record_function_enter"
    )
}

/// Flags of [`Plan`].
pub(super) fn plan_flags(op: &OpDef, plan: &OpPlan, statistics: Preset) -> u32 {
    let mut flags = 0;
    if plan.looks_before || plan.timed || plan.inference == Some(Inference::Scaled) {
        flags |= plan::BEGIN;
    }
    if statistics != Preset::None {
        flags |= plan::IDENTITIES;
    }
    if opens_range(op) {
        flags |= plan::TEXT_PAYLOAD;
    }
    flags
}

/// Every [`OWN_TIME_EVERY`]th time on this thread.
fn sample() -> bool {
    thread_local! {
        static COUNT: Cell<u64> = const { Cell::new(0) };
    }
    COUNT.with(|count| {
        count.set(count.get() + 1);
        count.get() % OWN_TIME_EVERY == 0
    })
}

/// Whether a definition fits the call that it was read from: the daemon will take its lengths from it.
fn check(definition: &SignatureDef, call: &Call) -> Result<(), Failure> {
    if definition.tensors.len() != call.tensor_count as usize
        || u32::from(definition.inputs) != call.input_count
        || definition.payload_words() != call.payload_count as usize
    {
        return Err(Failure(format!(
            "op {}: its words tell of {} tensors and {} payload words, the call has {} and {}",
            call.op,
            definition.tensors.len(),
            definition.payload_words(),
            call.tensor_count,
            call.payload_count
        )));
    }
    Ok(())
}

/// What a call's tensors, identified, say about lifetimes: births are told before the call itself, ends are kept for after it.
fn tell_lifetimes(
    lifetimes: &mut Lifetimes,
    call: &Call,
    thread: usize,
    stream: &mut Stream,
) -> Result<(), Failure> {
    let inputs = call.input_count as usize;
    let ids = stream.storages.iter().zip(&stream.tensors);
    for (index, (tensor, (storage, id))) in measuring::tensors(call).iter().zip(ids).enumerate() {
        let time_ns = if index < inputs {
            call.start_ns
        } else {
            call.end_ns
        };
        let mut result = Ok(());
        lifetimes.seen(tensor, *storage, *id, |event| {
            if !matches!(event, Event::StorageBorn { .. }) {
                stream.ended.push(event);
                return;
            }
            let told = stream.outlet.moment(&Moment {
                time_ns: time_ns.saturating_sub(stream.epoch_ns),
                thread: ThreadId(thread as u32),
                event,
            });
            if told.is_err() {
                result = told;
            }
        });
        result?;
    }
    Ok(())
}

/// Identities of a call's tensors, and what is known of their values now.
fn identify(
    identities: &mut Identities,
    lifetimes: Option<&mut Lifetimes>,
    call: &Call,
    slots: &[Slot],
    stream: &mut Stream,
) {
    let tensors = measuring::tensors(call);
    let inputs = call.input_count as usize;
    let plan = plans().and_then(|p| p.get(call.op as usize));
    let function = plan.is_some_and(|plan| plan.function);
    for (index, tensor) in tensors.iter().enumerate() {
        let gone = lifetimes
            .as_deref()
            .filter(|_| index < inputs)
            .and_then(|lifetimes| lifetimes.gone_since(tensor, call.start_ns));
        let storage = gone.unwrap_or_else(|| identities.storage(tensor));
        // A function's results are objects that ops inside it have returned.
        let returned = !function
            && index >= inputs
            && !tensors[..inputs]
                .iter()
                .any(|input| std::ptr::eq(input.implementation, tensor.implementation));
        stream.storages.push(storage);
        stream
            .tensors
            .push(identities.tensor(tensor, storage, returned));
    }
    // What a function calls has been here already, with what it wrote.
    let Some(plan) = plan.filter(|plan| !plan.function) else {
        return;
    };
    let written = |t: &crate::abi::Tensor| {
        plan.opaque
            || plan
                .written
                .get(t.argument as usize)
                .copied()
                .unwrap_or(false)
    };
    for slot in slots.iter().filter(|s| s.is_before()) {
        if let (Some(answer), Some(tensor)) =
            (&slot.answer, slot.operand().and_then(|o| tensors.get(o)))
            && !written(tensor)
        {
            identities.remember(tensor, answer);
        }
    }
    for tensor in &tensors[..inputs] {
        if written(tensor) {
            identities.written(tensor);
        }
    }
    for slot in slots.iter().filter(|s| !s.is_before()) {
        if let (Some(answer), Some(tensor)) =
            (&slot.answer, slot.operand().and_then(|o| tensors.get(o)))
        {
            identities.remember(tensor, answer);
        }
    }
    if call.flags & call_flags::NOT_EXECUTED == 0
        && let Some((result, answer)) = plan
            .inference
            .and_then(|inference| inference.conclude(call, identities))
    {
        identities.remember(&result, &answer);
    }
}
