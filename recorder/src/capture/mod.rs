//! Capture: what the hook sees becomes records in the ring.
//!
//! One [`Capture`] per process. Everything that has an order (signatures, scopes, identities, the ring) stands behind one lock, taken
//! at most twice per op; values are measured outside of it. A stream is begun with the first op, so that launchers which attach and run
//! nothing leave no trace; a forked child begins its own.
//!
//! Nothing here may harm the program: no panic crosses the ABI (see [`exports`](self)), and what fails switches
//! the recorder off, once and with its reason in the trace.

pub mod exports;
mod facts;
mod full;
mod identities;
mod inference;
mod lifetimes;
mod measuring;
mod outlet;
mod schedule;
mod scopes;
mod signatures;
pub mod watching;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use optape_trace::{
    CallId, Definition, Event, ModuleDef, ModuleId, Moment, OpDef, OpId, PatternId, PauseReason,
    Role, ScopeDef, ScopeId, SignatureDef, StepSource, StreamEnd, StreamInfo, TensorId, TextId,
    ThreadDef, ThreadId, WatchDef, WatchId, call_flags, codec,
};
use parking_lot::{Mutex, MutexGuard};

pub use exports::table;
pub use measuring::Preset;
pub use schedule::{Schedule, StepCounts, StepsBy};

use crate::abi::{Call, Plan, plan};
use crate::clock::{monotonic_ns, unix_ns};
use crate::ring::{
    MessageKind, OnFull, OpCallMessage, PAUSED_BY_COMMAND, PAUSED_BY_SCHEDULE, Producer, command,
};
use facts::Facts;
use identities::Identities;
use inference::Inference;
use lifetimes::Lifetimes;
use measuring::{OpPlan, Slot};
use outlet::{KeptValue, Outlet};
use scopes::{Entry, OpenRange, Scopes, ThreadState};
use signatures::{Found, Signatures, Surroundings, Wildness};
use watching::Watching;

/// Distinct texts that a stream may hold; what comes after them is [`Texts::OVERFLOW`].
const MOST_TEXTS: usize = 1 << 16;
/// Distinct patterns: in practice some dozens.
const MOST_PATTERNS: usize = 1 << 16;
/// In [`THREAD`]: torch's name for the thread is not known yet, since the program said something before it ran an op.
const UNNAMED: u32 = 1 << 31;
/// Every so many calls capture's own time is measured. A prime: steps repeat, and what divides their length would see the same ops
/// every time.
const OWN_TIME_EVERY: u64 = 61;

/// How to record.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where rings are made.
    pub run_directory: PathBuf,
    /// Which statistics are taken.
    pub statistics: Preset,
    /// Bytes of the ring.
    pub ring_bytes: usize,
    /// What to do when it is full.
    pub on_full: OnFull,
    /// Nothing is captured; ops only pass through the hook. For measuring the hook alone.
    pub hook_only: bool,
    /// `torch`, `python`: versions for the stream's head.
    pub versions: BTreeMap<String, String>,
    /// The process's command line.
    pub command: Vec<String>,
    /// Rank, where there is one.
    pub rank: Option<u32>,
    /// Which steps are recorded; `None`: all.
    pub schedule: Option<Schedule>,
}

/// In the run directory: processes that begin to record do so paused.
pub const PAUSED_MARKER: &str = "paused";
/// In the run directory: the recording was stopped; no process begins any more.
pub const STOPPED_MARKER: &str = "stopped";

/// Capture could not begin, or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// Begun twice.
    #[error("this process is being recorded already")]
    Running,
    /// The settings cannot be read.
    #[error("settings: {0}")]
    Settings(String),
    /// The ring cannot be made.
    #[error(
        "cannot make a ring of {bytes} bytes in {directory}: {source}; use a smaller one (--ring-size), or make room there"
    )]
    Ring {
        /// Its size.
        bytes: usize,
        /// Where.
        directory: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The process's capture.
pub struct Capture {
    /// Read by the hook at every op.
    recording: AtomicU32,
    state: Mutex<Option<Box<State>>>,
}

/// Values of [`Capture::recording`] beside 0.
const RECORDING: u32 = 1;
/// The hook runs and nothing is captured.
const HOOK_ONLY: u32 = 2;
/// Ops pass through; the hook reports that they do ([`Capture::idle`]), module calls and profiler ranges.
const PAUSED: u32 = 4;

static CAPTURE: Capture = Capture {
    recording: AtomicU32::new(0),
    state: Mutex::new(None),
};
/// Plans of ops by number: read without the lock, since `begin` runs outside of it. Another recording may want other plans; then
/// the vector is replaced, and the one before it is never freed.
static PLANS: AtomicPtr<boxcar::Vec<OpPlan>> = AtomicPtr::new(std::ptr::null_mut());
/// Statistics: time and calls, estimated from samples.
static OWN_TIME_NS: AtomicU64 = AtomicU64::new(0);
static STATISTICS_TIME_NS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Index of this thread in `Scopes::threads`, plus one, with [`UNNAMED`]; 0: not known yet.
    static THREAD: Cell<u32> = const { Cell::new(0) };
    /// Slots of the calls that run on this thread, innermost last.
    static SLOTS: RefCell<Vec<Slot>> = const { RefCell::new(Vec::new()) };
}

/// The calling thread's index in `Scopes::threads`, plus one; 0: not known yet.
fn here() -> usize {
    (THREAD.with(Cell::get) & !UNNAMED) as usize
}

#[inline]
fn plans() -> Option<&'static boxcar::Vec<OpPlan>> {
    // SAFETY: null, or what `replace_plans` leaked, which nobody frees.
    unsafe { PLANS.load(Ordering::Acquire).as_ref() }
}

/// Makes these the plans from now on. Calls that have begun may end under the plans before.
fn replace_plans(plans: boxcar::Vec<OpPlan>) -> &'static boxcar::Vec<OpPlan> {
    let plans = Box::into_raw(Box::new(plans));
    PLANS.store(plans, Ordering::Release);
    // SAFETY: just leaked.
    unsafe { &*plans }
}

/// Interned texts.
struct Texts {
    ids: HashMap<String, TextId>,
    all: Vec<String>,
}

impl Texts {
    const OVERFLOW: &'static str = "(too many different texts)";

    fn new() -> Self {
        let mut texts = Self {
            ids: HashMap::new(),
            all: Vec::new(),
        };
        for text in measuring::WELL_KNOWN_TEXTS {
            texts.intern(text);
        }
        texts
    }

    /// The text's id, and whether it is new.
    fn intern(&mut self, text: &str) -> (TextId, bool) {
        if let Some(id) = self.ids.get(text) {
            return (*id, false);
        }
        if self.all.len() >= MOST_TEXTS && text != Self::OVERFLOW {
            return self.intern(Self::OVERFLOW);
        }
        let id = TextId(self.all.len() as u32);
        self.all.push(text.to_owned());
        self.ids.insert(text.to_owned(), id);
        (id, true)
    }
}

/// Everything behind the lock. Exists before [`Capture::start`] where the hook tells its operators earlier.
struct State {
    started: bool,
    /// It switched itself off, and stays off until it is started again.
    given_up: bool,
    settings: Settings,
    /// The stream, once begun.
    stream: Option<Stream>,
    texts: Texts,
    ops: Vec<OpDef>,
    /// Owned by the ops that the hook knows; never freed.
    wildness: Vec<Wildness>,
    modules: Vec<ModuleDef>,
    watches: Vec<WatchDef>,
    threads: Vec<ThreadDef>,
    scopes: Scopes,
    identities: Identities,
    facts: Facts,
    /// By watch; those behind the end are as they are by default.
    watching: Vec<Watching>,
    kept_values: u64,
    dropped_values: u64,
    /// At `--level full`.
    lifetimes: Option<Box<Lifetimes>>,
    steps: [u64; 3],
    calls: u64,
    recalled: u64,
    range_ops: RangeOps,
    /// Why nothing is recorded now: bits of [`PAUSED_BY_COMMAND`] and [`PAUSED_BY_SCHEDULE`].
    paused: u64,
    /// The last command of the daemon's that was followed.
    obeyed: u32,
    /// The daemon ended the recording.
    stopped: bool,
    /// Root-module calls that did not train.
    inferences: u64,
}

/// The ops that `record_function` runs, once the hook has told them.
#[derive(Default)]
struct RangeOps {
    enters: Vec<u32>,
    exits: Vec<u32>,
}

struct Stream {
    outlet: Outlet,
    epoch_ns: u64,
    signatures: Signatures,
    patterns: HashMap<Vec<u64>, PatternId>,
    /// Reused.
    metas: Vec<u64>,
    storages: Vec<u64>,
    tensors: Vec<u64>,
    numbers: Vec<u64>,
    /// What ended with the call that is being written.
    ended: Vec<Event>,
}

/// Recording stopped because something failed; the text goes into the trace.
#[derive(Debug)]
struct Failure(String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl Capture {
    /// The process's capture.
    #[must_use]
    pub fn get() -> &'static Self {
        &CAPTURE
    }

    /// Prepares recording; the stream begins with the first op.
    ///
    /// # Errors
    /// Where it was begun already.
    pub fn start(&'static self, settings: Settings) -> Result<(), CaptureError> {
        let mut state = self.state.lock();
        let state = state.get_or_insert_default();
        if state.started {
            return Err(CaptureError::Running);
        }
        exports::install_fork_handlers();
        state.begin_anew(settings);
        self.recording.store(state.mode(), Ordering::Release);
        Ok(())
    }

    /// What the hook has to know of an op under the settings of now: flags of its plan ([`crate::abi::plan`]).
    #[must_use]
    pub fn plan_flags(&'static self, op: u32) -> u32 {
        let state = self.state.lock();
        let definition = state.as_ref().and_then(|s| s.ops.get(op as usize));
        match (definition, plans().and_then(|p| p.get(op as usize))) {
            (Some(definition), Some(plan)) => plan_flags(
                definition,
                plan,
                state
                    .as_ref()
                    .map_or(Preset::None, |s| s.settings.statistics),
            ),
            _ => 0,
        }
    }

    /// The number of a text, for arguments that the attach glue hands over.
    pub fn text(&'static self, text: &str) -> TextId {
        self.with(|state| state.text(text))
    }

    /// Runs `work` with the state, and switches the recorder off if it fails.
    fn with<R: Default>(&'static self, work: impl FnOnce(&mut State) -> Result<R, Failure>) -> R {
        let mut guard = self.state.lock();
        let Some(state) = guard.as_mut() else {
            return R::default();
        };
        match work(state) {
            Ok(result) => result,
            Err(failure) => {
                self.give_up(&mut guard, &failure.0);
                R::default()
            }
        }
    }

    /// Switches the recorder off, once, and says so once.
    #[cold]
    fn give_up(&'static self, guard: &mut MutexGuard<'_, Option<Box<State>>>, why: &str) {
        if self.recording.swap(0, Ordering::AcqRel) == 0 {
            return;
        }
        if why.is_empty() {
            return;
        }
        eprintln!("optape: recording stopped, the program goes on: {why}");
        if let Some(state) = guard.as_mut() {
            state.given_up = true;
            let now = monotonic_ns();
            if let Some(stream) = state.stream.as_mut() {
                let moment = Moment {
                    time_ns: now.saturating_sub(stream.epoch_ns),
                    thread: ThreadId(0),
                    event: Event::Disabled {
                        reason: why.to_owned(),
                    },
                };
                // Nothing more can be done where this fails, too.
                let _ = stream.outlet.moment(&moment);
            }
        }
    }

    /// Pauses (`false`) or resumes recording, as the daemon may, too: the last one who says something is obeyed. Ops pass
    /// through untouched meanwhile. A schedule that leaves the present step out is not overruled.
    pub fn set_recording(&'static self, on: bool) {
        self.with(|state| match state.started && !state.given_up {
            true => state.set_paused(PAUSED_BY_COMMAND, !on),
            false => Ok(()),
        });
    }

    /// While paused, at every op that passes: begins the stream, so that the daemon can be heard, and listens.
    fn idle(&'static self, torch_thread: u64) {
        // Whoever holds the lock listens, too.
        let Some(mut guard) = self.state.try_lock() else {
            return;
        };
        let Some(state) = guard.as_mut().filter(|state| state.started) else {
            return;
        };
        if let Err(failure) = state.listen(torch_thread) {
            self.give_up(&mut guard, &failure.0);
        }
    }

    /// Whether recording was begun, paused or not.
    #[must_use]
    pub fn is_started(&'static self) -> bool {
        self.state.lock().as_ref().is_some_and(|s| s.started)
    }

    /// Whether watched values would be thrown away.
    #[must_use]
    pub fn takes_no_statistics(&'static self) -> bool {
        self.state
            .lock()
            .as_ref()
            .is_none_or(|s| !s.started || s.settings.statistics == Preset::None)
    }

    /// Says goodbye: writes the stream's end. It may be started again.
    pub fn stop(&'static self) {
        self.recording.store(0, Ordering::Release);
        if let Some(state) = self.state.lock().as_mut() {
            state.end_stream();
            state.started = false;
        }
    }

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

    /// States a fact about a module, or about the program, to the recording that runs. `value` is JSON text. What is known already is not told
    /// again; what is told before the stream begins stands at its beginning.
    pub fn fact(&'static self, module: Option<ModuleId>, key: &str, value: &str) {
        self.with(|state| {
            let key = state.text(key)?;
            state.fact(module, key, value)
        });
    }

    /// The ids of a tensor's storage and of the tensor object; zeros where identities are not recorded.
    fn identities(&'static self, tensor: &crate::abi::Tensor) -> [u64; 2] {
        self.with(|state| state.identity(tensor))
    }

    /// A state attribute of a module holds this tensor, or nothing that is a tensor.
    fn state_assigned(
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

    fn define_op(&'static self, definition: OpDef, out: &mut Plan) -> bool {
        self.state.lock().get_or_insert_default();
        self.with(|state| {
            let op = u32::try_from(state.ops.len())?;
            let plan = OpPlan::new(&definition, state.settings.statistics);
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
    fn begin(&'static self, call: &mut Call) {
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
                // One lock for all operands would mean a place to keep the answers: most calls have one operand worth asking for.
                measuring::before(plan, call, recall, &mut slots);
                first
            });
            if let Ok(first) = taken {
                call.capture[0] = 1;
                call.capture[1] = first as u64;
            }
        }
        if sampled {
            STATISTICS_TIME_NS
                .fetch_add((monotonic_ns() - began) * OWN_TIME_EVERY, Ordering::Relaxed);
        }
    }

    /// The kernel threw: forgets what was found of the inputs.
    fn abort(&'static self, call: &mut Call) {
        if call.capture[0] == 1 {
            let first = call.capture[1] as usize;
            // A thread that is going away has no slots left to forget.
            let _ = SLOTS.try_with(|slots| slots.borrow_mut().truncate(first));
        }
    }

    /// After the kernel: looks at the outputs and writes the record.
    fn end(&'static self, call: &mut Call) {
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

    fn end_with_statistics(
        &'static self,
        call: &Call,
        plan: Option<&OpPlan>,
        kept: Option<&KeptValue>,
    ) {
        // A thread that is going away has no slots left, and is past recording.
        let _ = SLOTS.try_with(|slots| {
            let mut slots = slots.borrow_mut();
            let first = if call.capture[0] == 1 {
                call.capture[1] as usize
            } else {
                slots.len()
            };
            if let Some(plan) = plan {
                measuring::after(plan, call, &mut slots);
            }
            if slots.len() > first + 1 {
                measuring::sort(&mut slots[first..]);
            }
            self.with(|state| state.op_call(call, &slots[first..], kept));
            slots.truncate(first);
        });
    }

    fn module_enter(
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

    fn module_exit(&'static self, torch_thread: u64, module: u32, results: &[crate::abi::Tensor]) {
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

    fn storage_freed(&'static self, base: usize) {
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

/// This thread; the first one, where it has run no op and said nothing yet: then it is none of the stream's.
fn this_thread() -> ThreadId {
    ThreadId((THREAD.with(Cell::get) & !UNNAMED).saturating_sub(1))
}

/// Opens a range whose name is its argument.
fn opens_range(op: &OpDef) -> bool {
    matches!(
        op.name.as_str(),
        "profiler::_record_function_enter_new" | "profiler::_record_function_enter"
    )
}

/// Flags of [`Plan`].
fn plan_flags(op: &OpDef, plan: &OpPlan, statistics: Preset) -> u32 {
    let mut flags = 0;
    if plan.looks_before || plan.inference == Some(Inference::Scaled) {
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

impl Settings {
    /// What the daemon says in the environment (`OPTAPE_STATS`, `OPTAPE_RING_BYTES`, `OPTAPE_ON_FULL`), for rings in `run_directory`.
    ///
    /// # Errors
    /// Where a variable holds what it cannot mean.
    pub fn from_environment(run_directory: PathBuf) -> Result<Self, CaptureError> {
        Self::from_variables(run_directory, |name| std::env::var(name).ok())
    }

    /// As [`Settings::from_environment`], with variables from elsewhere.
    ///
    /// # Errors
    /// Where a variable holds what it cannot mean.
    pub fn from_variables(
        run_directory: PathBuf,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, CaptureError> {
        let variable = |name: &str| variable(name).filter(|v| !v.is_empty());
        let bad = |text: String| Err(CaptureError::Settings(text));
        let mut settings = Self {
            run_directory,
            ..Self::default()
        };
        match variable("OPTAPE_STATS").as_deref() {
            None => {}
            Some("hook") => (settings.hook_only, settings.statistics) = (true, Preset::None),
            Some(name) => match Preset::from_name(name) {
                Some(preset) => settings.statistics = preset,
                None => {
                    return bad(format!(
                        "OPTAPE_STATS={name}: none, rules, all and full are known"
                    ));
                }
            },
        }
        if let Some(bytes) = variable("OPTAPE_RING_BYTES") {
            match bytes.parse() {
                Ok(bytes) => settings.ring_bytes = bytes,
                Err(_) => return bad(format!("OPTAPE_RING_BYTES={bytes} is no number of bytes")),
            }
        }
        match variable("OPTAPE_ON_FULL").as_deref() {
            None | Some("wait") => {}
            Some("drop") => settings.on_full = OnFull::Drop,
            Some(other) => return bad(format!("OPTAPE_ON_FULL={other}: wait and drop are known")),
        }
        settings.schedule = variable("OPTAPE_SCHEDULE")
            .map(|text| text.parse())
            .transpose()?;
        Ok(settings)
    }

    /// What a recording within this process wants.
    #[must_use]
    pub fn of_recording(
        run_directory: &std::path::Path,
        recording: &crate::daemon::Settings,
    ) -> Self {
        Self {
            run_directory: run_directory.to_owned(),
            statistics: recording.statistics,
            hook_only: recording.hook_only,
            ring_bytes: recording.ring_bytes,
            on_full: recording.on_full,
            schedule: recording.schedule,
            ..Self::default()
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            run_directory: PathBuf::new(),
            statistics: Preset::default(),
            ring_bytes: crate::ring::DEFAULT_CAPACITY,
            on_full: OnFull::Wait,
            hook_only: false,
            versions: BTreeMap::new(),
            command: Vec::new(),
            rank: None,
            schedule: None,
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            started: false,
            given_up: false,
            settings: Settings::default(),
            stream: None,
            texts: Texts::new(),
            ops: Vec::new(),
            wildness: Vec::new(),
            modules: Vec::new(),
            watches: Vec::new(),
            threads: Vec::new(),
            scopes: Scopes::new(),
            identities: Identities::new(),
            facts: Facts::default(),
            watching: Vec::new(),
            kept_values: 0,
            dropped_values: 0,
            lifetimes: None,
            steps: [0; 3],
            calls: 0,
            recalled: 0,
            range_ops: RangeOps::default(),
            paused: 0,
            obeyed: 0,
            stopped: false,
            inferences: 0,
        }
    }
}

impl State {
    fn recall(&mut self, tensor: &crate::abi::Tensor) -> Option<crate::statistics::Answer> {
        let answer = self.identities.recall(tensor);
        self.recalled += u64::from(answer.is_some());
        answer
    }

    /// At `--level full`: whether a spiking neuron's forward runs on this thread now.
    fn look_for_neurons(&self, thread: usize) {
        if self.lifetimes.is_some() {
            let mut active = self.scopes.active(thread);
            full::set_in_neuron(active.any(|module| {
                self.modules
                    .get(module as usize)
                    .is_some_and(|module| module.spiking)
            }));
        }
    }

    /// The index of the calling thread.
    #[inline]
    fn thread(&mut self, torch_id: Option<u64>) -> Result<usize, Failure> {
        let known = THREAD.with(Cell::get);
        if known != 0 && (known as usize) <= self.scopes.threads.len() {
            return Ok(known as usize - 1);
        }
        self.new_thread(known, torch_id)
    }

    #[cold]
    fn new_thread(&mut self, known: u32, torch_id: Option<u64>) -> Result<usize, Failure> {
        let unnamed = known & UNNAMED != 0;
        let index = if unnamed {
            (known & !UNNAMED) as usize - 1
        } else {
            self.scopes.threads.len()
        };
        match torch_id {
            Some(torch_id) => {
                THREAD.with(|t| t.set(index as u32 + 1));
                self.scopes.know_thread(torch_id, index as u32);
            }
            None => THREAD.with(|t| t.set((index as u32 + 1) | UNNAMED)),
        }
        if unnamed {
            return Ok(index);
        }
        self.scopes.threads.push(ThreadState::default());
        // SAFETY: gettid has no preconditions.
        let native_id = unsafe { libc::syscall(libc::SYS_gettid) } as u64;
        let name = std::fs::read_to_string(format!("/proc/self/task/{native_id}/comm"))
            .unwrap_or_default()
            .trim()
            .to_owned();
        let definition = ThreadDef { native_id, name };
        if let Some(stream) = self.stream.as_mut() {
            stream.outlet.define(&Definition::Thread(
                ThreadId(index as u32),
                definition.clone(),
            ))?;
        }
        self.threads.push(definition);
        Ok(index)
    }

    fn text(&mut self, text: &str) -> Result<TextId, Failure> {
        let (id, fresh) = self.texts.intern(text);
        if fresh && let Some(stream) = self.stream.as_mut() {
            stream
                .outlet
                .define(&Definition::Text(id, self.texts.all[id.index()].clone()))?;
        }
        Ok(id)
    }

    fn fact(&mut self, module: Option<ModuleId>, key: TextId, value: &str) -> Result<(), Failure> {
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
    fn identity(&mut self, tensor: &crate::abi::Tensor) -> Result<[u64; 2], Failure> {
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

    fn tensor_ids(&mut self, tensors: &[crate::abi::Tensor]) -> Result<Vec<TensorId>, Failure> {
        let ids = tensors
            .iter()
            .map(|tensor| Ok(TensorId(self.identity(tensor)?[1])));
        ids.collect()
    }

    fn define_scope(&mut self, scope: ScopeId) -> Result<(), Failure> {
        let definition = self.scope_definition(scope);
        if let Some(stream) = self.stream.as_mut() {
            stream
                .outlet
                .define(&Definition::Scope(scope, definition))?;
        }
        Ok(())
    }

    fn scope_definition(&self, scope: ScopeId) -> ScopeDef {
        match self.scopes.nodes.get(scope.index()).copied().flatten() {
            None => ScopeDef {
                parent: None,
                name: "Global".to_owned(),
                module: None,
            },
            Some((parent, module)) => ScopeDef {
                parent: Some(parent),
                name: self
                    .modules
                    .get(module.index())
                    .map_or_else(String::new, |m| m.name.clone()),
                module: Some(module),
            },
        }
    }

    /// Whether there is a stream; it is begun if it was not, with its clock at 0 at `since_ns` (CLOCK_MONOTONIC). None is begun for a call that ends after the recording has.
    #[inline]
    fn has_stream(&mut self, since_ns: u64) -> Result<bool, Failure> {
        if self.stream.is_none() {
            if !self.started || self.stopped {
                return Ok(false);
            }
            self.begin_stream(since_ns)?;
        }
        Ok(true)
    }

    #[cold]
    fn begin_stream(&mut self, since_ns: u64) -> Result<(), Failure> {
        let settings = &self.settings;
        if settings.run_directory.join(STOPPED_MARKER).exists() {
            self.stopped = true;
            // Nothing went wrong, so nothing is said.
            return Err(Failure(String::new()));
        }
        let ring = Producer::create(
            &settings.run_directory,
            settings.ring_bytes,
            settings.on_full,
        )
        .map_err(|source| CaptureError::Ring {
            bytes: settings.ring_bytes,
            directory: settings.run_directory.clone(),
            source,
        })?;
        ring.set_epoch_ns(since_ns);
        let mut outlet = Outlet::new(ring);
        let info = StreamInfo {
            process_id: std::process::id(),
            parent_process_id: std::os::unix::process::parent_id(),
            command: settings.command.clone(),
            versions: settings.versions.clone(),
            epoch_unix_ns: unix_ns().saturating_sub(monotonic_ns().saturating_sub(since_ns)),
            identities: settings.statistics != Preset::None,
            rank: settings.rank,
            role: Role::Process,
            epoch_monotonic_ns: Some(since_ns),
        };
        if !outlet.message(MessageKind::StreamBegin, &codec::encode(&info)?) {
            return Err(Failure(
                "the ring has no room for the stream's head".to_owned(),
            ));
        }
        // What the process knows already; a forked child has it from its parent.
        for (id, text) in self.texts.all.iter().enumerate() {
            outlet.define(&Definition::Text(TextId(id as u32), text.clone()))?;
        }
        for (id, op) in self.ops.iter().enumerate() {
            outlet.define(&Definition::Op(OpId(id as u32), op.clone()))?;
        }
        for (id, module) in self.modules.iter().enumerate() {
            outlet.define(&Definition::Module(ModuleId(id as u32), module.clone()))?;
        }
        for id in 0..self.scopes.nodes.len() {
            let scope = ScopeId(id as u32);
            outlet.define(&Definition::Scope(scope, self.scope_definition(scope)))?;
        }
        for (id, thread) in self.threads.iter().enumerate() {
            outlet.define(&Definition::Thread(ThreadId(id as u32), thread.clone()))?;
        }
        for (id, watch) in self.watches.iter().enumerate() {
            outlet.define(&Definition::Watch(WatchId(id as u32), watch.clone()))?;
        }
        outlet.define(&Definition::Pattern(
            PatternId(0),
            optape_trace::Pattern::default(),
        ))?;
        let thread = this_thread();
        for ((module, key), value) in &self.facts.values {
            outlet.fact(&Moment {
                time_ns: 0,
                thread,
                event: Event::Fact {
                    module: *module,
                    key: *key,
                    value: value.clone(),
                },
            })?;
        }
        for (module, attribute, tensor) in self.facts.states() {
            outlet.moment(&Moment {
                time_ns: 0,
                thread,
                event: Event::StateAssign {
                    module,
                    attribute,
                    tensor: TensorId(tensor),
                },
            })?;
        }
        self.stream = Some(Stream {
            outlet,
            epoch_ns: since_ns,
            signatures: Signatures::new(),
            patterns: HashMap::from([(Vec::new(), PatternId(0))]),
            metas: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
            numbers: Vec::new(),
            ended: Vec::new(),
        });
        self.obeyed = 0;
        self.publish_steps();
        self.scopes.nothing_told();
        match self.pause_reason() {
            Some(reason) => {
                self.publish_pause();
                self.aside(Event::Paused { reason })
            }
            None => self.tell_what_is_open(since_ns),
        }
    }

    /// A record of no thread in particular.
    fn aside(&mut self, event: Event) -> Result<(), Failure> {
        let known = here();
        let thread = match self.threads.len() {
            0 => self.thread(None)?,
            threads if known == 0 || known > threads => 0,
            _ => known - 1,
        };
        self.moment(thread, event)
    }

    fn pause_reason(&self) -> Option<PauseReason> {
        match self.paused {
            0 => None,
            bits if bits & PAUSED_BY_COMMAND != 0 => Some(PauseReason::Asked),
            _ => Some(PauseReason::Schedule),
        }
    }

    /// Sets or clears one reason for recording nothing.
    fn set_paused(&mut self, reason: u64, on: bool) -> Result<(), Failure> {
        let before = self.paused;
        self.paused = if on {
            before | reason
        } else {
            before & !reason
        };
        if self.paused == before || self.stopped {
            return Ok(());
        }
        self.publish_pause();
        // Nothing but these two changes here: a recorder that is switched off stays so.
        let (from, to) = match self.paused {
            0 => (PAUSED, RECORDING),
            _ => (RECORDING, PAUSED),
        };
        let _ = CAPTURE
            .recording
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
        match (before, self.pause_reason()) {
            (0, Some(reason)) => self.aside(Event::Paused { reason }),
            (_, None) => {
                self.identities.missed_ops();
                self.scopes.missed_ops();
                self.aside(Event::Resumed)?;
                self.tell_what_is_open(monotonic_ns())
            }
            _ => Ok(()),
        }
    }

    /// Module calls and ranges that run, and whose beginning is not in the trace: as if they began at `at_ns` (CLOCK_MONOTONIC).
    fn tell_what_is_open(&mut self, at_ns: u64) -> Result<(), Failure> {
        for (thread, call, module) in self.scopes.tell_open_calls() {
            self.moment_at(
                at_ns,
                thread,
                Event::ModuleEnter {
                    call: CallId(call),
                    module: ModuleId(module),
                    arguments: Vec::new(),
                },
            )?;
        }
        for (thread, name) in self.scopes.tell_open_ranges() {
            self.moment_at(at_ns, thread, Event::RangeEnter { name })?;
        }
        Ok(())
    }

    fn publish_pause(&self) {
        if let Some(stream) = &self.stream {
            stream.outlet.ring().obeyed(self.obeyed, self.paused);
        }
    }

    fn publish_steps(&self) {
        if let Some(stream) = &self.stream {
            let [optimizer, root_calls, program] = self.steps;
            stream
                .outlet
                .ring()
                .set_steps([optimizer, root_calls, program, self.inferences]);
        }
    }

    fn step_counts(&self) -> StepCounts {
        StepCounts {
            by_source: self.steps,
            inferences: self.inferences,
        }
    }

    /// A step may have begun: whether it is recorded.
    fn follow_schedule(&mut self) -> Result<(), Failure> {
        match self.settings.schedule {
            None => Ok(()),
            Some(schedule) => {
                let records = schedule.records(&self.step_counts());
                self.set_paused(PAUSED_BY_SCHEDULE, !records)
            }
        }
    }

    /// Hears the daemon while nothing is recorded.
    fn listen(&mut self, torch_thread: u64) -> Result<(), Failure> {
        if self.stopped {
            return Ok(());
        }
        self.thread(Some(torch_thread))?;
        if !self.has_stream(monotonic_ns())? {
            return Ok(());
        }
        match self.command() {
            command if command == self.obeyed => Ok(()),
            command => self.obey(command),
        }
    }

    /// What the daemon said last.
    #[inline]
    fn command(&self) -> u32 {
        self.stream
            .as_ref()
            .map_or(self.obeyed, |stream| stream.outlet.ring().command())
    }

    /// Does what the daemon says.
    #[cold]
    fn obey(&mut self, command: u32) -> Result<(), Failure> {
        self.obeyed = command;
        if command & command::STOP != 0 {
            CAPTURE.recording.store(0, Ordering::Release);
            self.stopped = true;
            self.publish_pause();
            self.end_stream();
            return Ok(());
        }
        self.set_paused(PAUSED_BY_COMMAND, command & command::PAUSE != 0)?;
        self.publish_pause();
        Ok(())
    }

    /// A record that is no op call. Before the first op there is no stream, and nothing to say.
    fn moment(&mut self, thread: usize, event: Event) -> Result<(), Failure> {
        self.moment_at(monotonic_ns(), thread, event)
    }

    fn moment_at(&mut self, at_ns: u64, thread: usize, event: Event) -> Result<(), Failure> {
        let Some(stream) = self.stream.as_mut() else {
            return Ok(());
        };
        stream.outlet.moment(&Moment {
            time_ns: at_ns.saturating_sub(stream.epoch_ns),
            thread: ThreadId(thread as u32),
            event,
        })?;
        Ok(())
    }

    fn step(&mut self, thread: usize, source: StepSource) -> Result<(), Failure> {
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

    fn range_enter(&mut self, thread: usize, name: TextId) -> Result<(), Failure> {
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

    fn range_exit(&mut self, thread: usize) -> Result<(), Failure> {
        match self.scopes.threads[thread].ranges.pop() {
            Some(OpenRange { name, told: true }) => self.moment(thread, Event::RangeExit { name }),
            _ => Ok(()),
        }
    }

    /// A call while nothing is recorded: only ranges are followed.
    #[cold]
    fn unrecorded_call(&mut self, thread: usize, call: &Call) -> Result<(), Failure> {
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
    fn op_call(
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
        if let Some(kept) = kept {
            let whole = sent && stream.outlet.value(kept);
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
        if self.range_ops.enters.contains(&call.op) {
            let name = measuring::payload(call).first().copied().unwrap_or(0);
            self.range_enter(thread, TextId(name as u32))?;
        }
        Ok(())
    }

    fn end_stream(&mut self) {
        let Some(mut stream) = self.stream.take() else {
            return;
        };
        let costs = BTreeMap::from([
            (
                "capture.time_ns".to_owned(),
                OWN_TIME_NS.load(Ordering::Relaxed),
            ),
            (
                "capture.statistics_ns".to_owned(),
                STATISTICS_TIME_NS.load(Ordering::Relaxed),
            ),
            ("capture.calls".to_owned(), self.calls),
            ("capture.recalled_statistics".to_owned(), self.recalled),
            (
                "capture.signatures".to_owned(),
                stream.signatures.len() as u64,
            ),
            (
                "capture.lost_structures".to_owned(),
                stream.signatures.overflowed,
            ),
            ("capture.unattributed".to_owned(), self.scopes.unattributed),
            ("capture.kept_values".to_owned(), self.kept_values),
            ("capture.dropped_values".to_owned(), self.dropped_values),
            ("capture.left_out_facts".to_owned(), self.facts.left_out),
        ]);
        let end = StreamEnd {
            records: 0,
            dropped_records: 0,
            ended_ns: monotonic_ns().saturating_sub(stream.epoch_ns),
            clean: true,
            costs,
        };
        if let Ok(bytes) = codec::encode(&end) {
            // Where there is no room the daemon ends the stream itself.
            stream.outlet.end(end.ended_ns, &bytes);
        }
    }

    /// In a forked child: the stream and its ring are the parent's.
    fn forked(&mut self) {
        if let Some(stream) = self.stream.take() {
            // Unmapping is the child's right; the file stays.
            drop(stream);
        }
        self.scopes.forked();
        self.scopes.nothing_told();
        if let Some(lifetimes) = &mut self.lifetimes {
            // What the parent told, the child's stream does not know.
            **lifetimes = Lifetimes::new(self.identities.given());
        }
        // The thread that goes on is to name itself again.
        THREAD.with(|t| match t.get() {
            0 => {}
            known => t.set(known | UNNAMED),
        });
        self.count_from_zero();
    }

    fn count_from_zero(&mut self) {
        self.calls = 0;
        self.recalled = 0;
        self.kept_values = 0;
        self.dropped_values = 0;
        self.steps = [0; 3];
        self.inferences = 0;
        self.obeyed = 0;
        if self.started && !self.stopped {
            // Its steps are its own. An error could only come from a record, and there is no stream to write one to.
            let _ = self.follow_schedule();
        }
        OWN_TIME_NS.store(0, Ordering::Relaxed);
        STATISTICS_TIME_NS.store(0, Ordering::Relaxed);
    }

    /// A recording begins. What is known of ops, modules, threads and identities stays, from a recording before it or from
    /// what the hook told early.
    fn begin_anew(&mut self, settings: Settings) {
        self.scopes.close_ranges();
        self.count_from_zero();
        self.scopes.unattributed = 0;
        self.identities.missed_ops();
        self.scopes.missed_ops();
        if settings.statistics != self.settings.statistics {
            let plans = boxcar::Vec::new();
            for op in &self.ops {
                plans.push(OpPlan::new(op, settings.statistics));
            }
            replace_plans(plans);
        }
        // A new stream knows of no births, and of no facts: these are told anew.
        let known = self.identities.given();
        self.lifetimes =
            (settings.statistics == Preset::Full).then(|| Box::new(Lifetimes::new(known)));
        self.facts = Facts::default();
        self.watching.clear();
        self.paused = 0;
        if settings.run_directory.join(PAUSED_MARKER).exists() {
            self.paused |= PAUSED_BY_COMMAND;
        }
        if settings
            .schedule
            .is_some_and(|schedule| !schedule.records(&self.step_counts()))
        {
            self.paused |= PAUSED_BY_SCHEDULE;
        }
        self.settings = settings;
        self.obeyed = 0;
        self.stopped = false;
        self.given_up = false;
        self.started = true;
    }

    /// The value of [`Capture::recording`] for a recording that is neither stopped nor given up.
    const fn mode(&self) -> u32 {
        match (self.settings.hook_only, self.paused) {
            (true, _) => HOOK_ONLY,
            (false, 0) => RECORDING,
            _ => PAUSED,
        }
    }
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
