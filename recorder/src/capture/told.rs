//! What modules, optimizers and the program say between ops.

use optape_trace::{
    CallId, Definition, Event, ModuleDef, ModuleId, Moment, StepSource, TensorId, TextId, WatchDef,
    WatchId,
};

use super::measuring::Preset;
use super::scopes::{Entry, OpenRange};
use super::{Capture, Failure, State, facts, full, this_thread};
use crate::clock::monotonic_ns;

/// Names of opaque regions that are counted by themselves; others are counted together.
const MOST_OPAQUE_NAMES: usize = 256;

impl Capture {
    /// Tells a module: its scope name, its classes (its own first), whether it is a spiking neuron, and the TensorImpl
    /// addresses of the parameters that it owns.
    pub fn define_module(&'static self, definition: ModuleDef, parameters: &[usize]) -> ModuleId {
        self.with(|state| {
            let id = ModuleId(u32::try_from(state.modules.len())?);
            if let Some(stream) = state.stream.as_mut() {
                stream
                    .outlet
                    .define(&Definition::Module(id, definition.clone()))?;
            }
            state.modules.push(definition);
            state.scopes.own(id.0, parameters);
            Ok(id)
        })
    }

    /// Tells the parameters of a module again, after they changed.
    pub fn module_parameters(&'static self, module: ModuleId, parameters: &[usize]) {
        self.with(|state| {
            state.scopes.own(module.0, parameters);
            Ok(())
        });
    }

    /// Tells a watch.
    pub fn define_watch(&'static self, definition: WatchDef) -> WatchId {
        self.with(|state| {
            let id = WatchId(u32::try_from(state.watches.len())?);
            if let Some(stream) = state.stream.as_mut() {
                stream
                    .outlet
                    .define(&Definition::Watch(id, definition.clone()))?;
            }
            state.watches.push(definition);
            Ok(id)
        })
    }

    /// An optimizer step begins (`true`) or has ended, on this thread. The end marks a step.
    pub fn optimizer(&'static self, enter: bool) {
        self.with(|state| {
            let thread = state.thread(None)?;
            state.scopes.optimizer(thread, enter);
            if !enter && !state.scopes.in_optimizer(thread) {
                state.step(thread, StepSource::Optimizer)?;
            }
            Ok(())
        });
    }

    /// Names the stage on this thread, or takes the name back.
    pub fn stage(&'static self, name: Option<&str>) {
        self.with(|state| {
            let thread = state.thread(None)?;
            let name = name.map(|n| state.text(n)).transpose()?;
            state.scopes.threads[thread].stage_name = name;
            state.moment(thread, Event::StageChange { name })
        });
    }

    /// Marks a step, with the number of samples (images) that it processed; 0: not said.
    pub fn step(&'static self, samples: u64) {
        self.with(|state| {
            let thread = state.thread(None)?;
            if samples > 0 && state.paused == 0 {
                state.moment(thread, Event::Samples { count: samples })?;
            }
            state.step(thread, StepSource::Program)
        });
    }

    /// Begins a named range on this thread.
    pub fn range_enter(&'static self, name: &str) {
        self.with(|state| {
            if state.stopped {
                return Ok(());
            }
            let thread = state.thread(None)?;
            let name = state.text(name)?;
            state.range_enter(thread, name)
        });
    }

    /// Ends the innermost range on this thread.
    pub fn range_exit(&'static self) {
        self.with(|state| {
            let thread = state.thread(None)?;
            state.range_exit(thread)
        });
    }

    /// A region begins in which work may run that the dispatcher does not see, between ops that it does. Nobody knows what it writes, nor when.
    pub fn opaque_enter(&'static self) {
        self.with(|state| {
            state.identities.enter_opaque();
            Ok(())
        });
    }

    /// It has ended: [`Self::opaque`] of it.
    pub fn opaque_exit(&'static self, name: &str, began_ns: u64, ended_ns: u64) {
        self.with(|state| {
            state.identities.exit_opaque();
            Ok(())
        });
        self.opaque(name, began_ns, ended_ns);
    }

    /// Tells of work that the dispatcher did not see. Times are those of CLOCK_MONOTONIC. Nobody knows what it wrote.
    pub fn opaque(&'static self, name: &str, began_ns: u64, ended_ns: u64) {
        self.with(|state| {
            state.identities.forget_values();
            if state.paused != 0 || !state.has_stream(began_ns)? {
                return Ok(());
            }
            let thread = state.thread(None)?;
            let room = state.opaque_regions.len() < MOST_OPAQUE_NAMES;
            match state.opaque_regions.get_mut(name) {
                Some(count) => *count += 1,
                None => {
                    let name = if room { name } else { "others" };
                    *state.opaque_regions.entry(name.to_owned()).or_default() += 1;
                }
            }
            let name = state.text(name)?;
            state.moment_at(
                began_ns,
                thread,
                Event::Opaque {
                    name,
                    duration_ns: ended_ns.saturating_sub(began_ns),
                },
            )
        });
    }

    /// States a fact about a module, or about the program, to the recording that runs. `value` is JSON text. What is known already is not told
    /// again; what is told before the stream begins stands at its beginning.
    pub fn fact(&'static self, module: Option<ModuleId>, key: &str, value: &str) {
        self.with(|state| {
            let key = state.text(key)?;
            state.fact(module, key, value)
        });
    }

    /// The ids of a tensor's storage and of the tensor object; zeros where identities are not recorded.
    pub(super) fn identities(&'static self, tensor: &crate::abi::Tensor) -> [u64; 2] {
        self.with(|state| state.identity(tensor))
    }

    /// A state attribute of a module holds this tensor, or nothing that is a tensor.
    pub(super) fn state_assigned(
        &'static self,
        torch_thread: u64,
        module: ModuleId,
        attribute: TextId,
        tensor: Option<&crate::abi::Tensor>,
    ) {
        self.with(|state| {
            if state.paused != 0 {
                state.facts.forget_state(module, attribute);
                return Ok(());
            }
            let id = match tensor {
                Some(tensor) => state.identity(tensor)?[1],
                None => 0,
            };
            if !state.facts.assign(module, attribute, id) {
                return Ok(());
            }
            let thread = state.thread(Some(torch_thread))?;
            state.moment(
                thread,
                Event::StateAssign {
                    module,
                    attribute,
                    tensor: TensorId(id),
                },
            )
        });
    }

    pub(super) fn module_enter(
        &'static self,
        torch_thread: u64,
        entry: Entry,
        arguments: &[crate::abi::Tensor],
    ) {
        self.with(|state| {
            let thread = state.thread(Some(torch_thread))?;
            if state.settings.schedule.is_some()
                && !entry.graph_task
                && state.scopes.is_outside(thread)
            {
                state.follow_schedule()?;
            }
            let told = state.paused == 0 && state.stream.is_some();
            let (module, training) = (ModuleId(entry.module), entry.training);
            let (call, fresh) = state.scopes.enter(thread, entry, told);
            if let Some(scope) = fresh {
                state.define_scope(scope)?;
            }
            if state.started && state.facts.trains(module, training) {
                let key = state.text("training")?;
                state.fact(Some(module), key, if training { "true" } else { "false" })?;
            }
            state.look_for_neurons(thread);
            if !told {
                return Ok(());
            }
            let arguments = state.tensor_ids(arguments)?;
            state.moment(
                thread,
                Event::ModuleEnter {
                    call: CallId(call),
                    module,
                    arguments,
                },
            )
        });
    }

    pub(super) fn module_exit(
        &'static self,
        torch_thread: u64,
        module: u32,
        results: &[crate::abi::Tensor],
    ) {
        self.with(|state| {
            let thread = state.thread(Some(torch_thread))?;
            let Some(ended) = state.scopes.exit(thread, module) else {
                return Ok(());
            };
            state.look_for_neurons(thread);
            if ended.told {
                let results = state.tensor_ids(results)?;
                state.moment(
                    thread,
                    Event::ModuleExit {
                        call: CallId(ended.call),
                        module: ModuleId(module),
                        results,
                    },
                )?;
            }
            if ended.root {
                state.inferences += u64::from(!ended.trained);
                state.step(thread, StepSource::RootCall)?;
            }
            Ok(())
        });
    }

    pub(super) fn storage_freed(&'static self, base: usize) {
        self.with(|state| {
            let storage = state.identities.freed(base);
            match (&mut state.lifetimes, &mut state.stream, storage) {
                (Some(lifetimes), Some(stream), Some(storage)) => {
                    // Memory may be freed on a thread that runs no ops, and on one that is going away.
                    let thread = this_thread();
                    let time_ns = monotonic_ns().saturating_sub(stream.epoch_ns);
                    let mut result = Ok(());
                    lifetimes.freed(base, storage, |event| {
                        result = stream.outlet.moment(&Moment {
                            time_ns,
                            thread,
                            event,
                        });
                    });
                    Ok(result?)
                }
                _ => Ok(()),
            }
        });
    }
}

impl State {
    /// At `--level full`: whether a spiking neuron's forward runs on this thread now.
    pub(super) fn look_for_neurons(&self, thread: usize) {
        if self.lifetimes.is_some() {
            let mut active = self.scopes.active(thread);
            full::set_in_neuron(active.any(|module| {
                self.modules
                    .get(module as usize)
                    .is_some_and(|module| module.spiking)
            }));
        }
    }

    pub(super) fn fact(
        &mut self,
        module: Option<ModuleId>,
        key: TextId,
        value: &str,
    ) -> Result<(), Failure> {
        if !self.started {
            return Ok(());
        }
        let longest = self
            .stream
            .as_ref()
            .map_or(self.settings.ring_bytes / 4, |s| s.outlet.longest())
            .min(facts::LONGEST_VALUE);
        let shorter;
        let value = if value.len() > longest {
            shorter = facts::left_out(value.len());
            &shorter
        } else {
            value
        };
        if !self.facts.learn((module, key), value) {
            return Ok(());
        }
        let Some(stream) = self.stream.as_mut() else {
            return Ok(()); // Told when it begins.
        };
        stream.outlet.fact(&Moment {
            time_ns: monotonic_ns().saturating_sub(stream.epoch_ns),
            thread: this_thread(),
            event: Event::Fact {
                module,
                key,
                value: value.to_owned(),
            },
        })?;
        Ok(())
    }

    /// The ids of a tensor's storage and of the tensor object; zeros where identities are not recorded.
    pub(super) fn identity(&mut self, tensor: &crate::abi::Tensor) -> Result<[u64; 2], Failure> {
        if self.settings.statistics == Preset::None {
            return Ok([0; 2]);
        }
        let storage = self.identities.storage(tensor);
        let id = self.identities.tensor(tensor, storage, false);
        match (self.lifetimes.as_deref_mut(), self.stream.as_mut()) {
            (Some(lifetimes), Some(stream)) => {
                let thread = this_thread();
                let mut result = Ok(());
                lifetimes.seen(tensor, storage, id, |event| {
                    let told = stream.outlet.moment(&Moment {
                        time_ns: monotonic_ns().saturating_sub(stream.epoch_ns),
                        thread,
                        event,
                    });
                    if told.is_err() {
                        result = told;
                    }
                });
                result?;
            }
            (Some(lifetimes), None) => lifetimes.known_before(self.identities.given()),
            (None, _) => {}
        }
        Ok([storage, id])
    }

    pub(super) fn tensor_ids(
        &mut self,
        tensors: &[crate::abi::Tensor],
    ) -> Result<Vec<TensorId>, Failure> {
        let ids = tensors
            .iter()
            .map(|tensor| Ok(TensorId(self.identity(tensor)?[1])));
        ids.collect()
    }

    pub(super) fn step(&mut self, thread: usize, source: StepSource) -> Result<(), Failure> {
        let step = self.steps[source as usize];
        self.steps[source as usize] += 1;
        self.publish_steps();
        if self.paused == 0 {
            self.moment(thread, Event::StepMark { step, source })?;
        }
        // A step that is told by its root module's end may go on with its backward pass: the next call begins the next step.
        if source == StepSource::RootCall {
            Ok(())
        } else {
            self.follow_schedule()
        }
    }

    pub(super) fn range_enter(&mut self, thread: usize, name: TextId) -> Result<(), Failure> {
        if !self.has_stream(monotonic_ns())? {
            return Ok(());
        }
        let told = self.paused == 0;
        self.scopes.threads[thread]
            .ranges
            .push(OpenRange { name, told });
        if told {
            self.moment(thread, Event::RangeEnter { name })
        } else {
            Ok(())
        }
    }

    pub(super) fn range_exit(&mut self, thread: usize) -> Result<(), Failure> {
        match self.scopes.threads[thread].ranges.pop() {
            Some(OpenRange { name, told: true }) => self.moment(thread, Event::RangeExit { name }),
            _ => Ok(()),
        }
    }
}
