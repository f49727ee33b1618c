//! Capture: what the hook sees becomes records in the ring.
//!
//! One [`Capture`] per process. Everything that has an order (signatures, scopes, identities, the ring) stands behind one lock, taken
//! at most twice per op; values are measured outside of it. A stream is begun with the first op, so that launchers which attach and run
//! nothing leave no trace; a forked child begins its own.
//!
//! Nothing here may harm the program: no panic crosses the ABI (see [`exports`](self)), and what fails switches
//! the recorder off, once and with its reason in the trace.

mod calls;
mod device;
pub mod exports;
mod facts;
mod full;
mod identities;
mod inference;
mod lifetimes;
mod measuring;
mod outlet;
mod pausing;
mod schedule;
mod scopes;
mod settings;
mod signatures;
mod stream;
mod texts;
mod told;
pub mod watching;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use optape_trace::{
    Definition, Event, ModuleDef, Moment, OpDef, TextId, ThreadDef, ThreadId, WatchDef,
};
use parking_lot::{Mutex, MutexGuard};

pub use device::gpu_time::install as install_clock;
pub use device::install as install_device;
pub use exports::table;
pub use measuring::Preset;
pub use schedule::{Schedule, StepCounts, StepsBy};
pub use settings::{CaptureError, Settings};

use crate::clock::monotonic_ns;
use crate::ring::{PAUSED_BY_COMMAND, PAUSED_BY_SCHEDULE};
use calls::plan_flags;
use facts::Facts;
use identities::Identities;
use lifetimes::Lifetimes;
use measuring::{OpPlan, Slot};
use scopes::{Scopes, ThreadState};
use signatures::Wildness;
use stream::Stream;
use texts::Texts;
use watching::Watching;

/// In [`THREAD`]: torch's name for the thread is not known yet, since the program said something before it ran an op.
const UNNAMED: u32 = 1 << 31;

/// In the run directory: processes that begin to record do so paused.
pub const PAUSED_MARKER: &str = "paused";
/// In the run directory: the recording was stopped; no process begins any more.
pub const STOPPED_MARKER: &str = "stopped";

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
    /// Number in the ring of the record that was written last, if late statistics may name it.
    record: Option<u64>,
    /// How often regions ran outside of the dispatcher, by name.
    opaque_regions: BTreeMap<String, u64>,
}

/// The ops that `record_function` runs, once the hook has told them.
#[derive(Default)]
struct RangeOps {
    enters: Vec<u32>,
    exits: Vec<u32>,
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
}

/// This thread; the first one, where it has run no op and said nothing yet: then it is none of the stream's.
fn this_thread() -> ThreadId {
    ThreadId((THREAD.with(Cell::get) & !UNNAMED).saturating_sub(1))
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
            record: None,
            opaque_regions: BTreeMap::new(),
        }
    }
}

impl State {
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

    /// In a forked child: the stream and its ring are the parent's.
    fn forked(&mut self) {
        if let Some(stream) = self.stream.take() {
            // Unmapping is the child's right; the file stays.
            drop(stream);
        }
        self.scopes.forked();
        self.identities.forked();
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
        self.opaque_regions.clear();
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
        if (settings.statistics, settings.times_gpus())
            != (self.settings.statistics, self.settings.times_gpus())
        {
            let plans = boxcar::Vec::new();
            for op in &self.ops {
                plans.push(OpPlan::new(op, &settings));
            }
            replace_plans(plans);
        }
        // A new stream knows of no births, and of no facts: these are told anew.
        let known = self.identities.given();
        self.lifetimes =
            (settings.statistics == Preset::Full).then(|| Box::new(Lifetimes::new(known)));
        self.facts = Facts::default();
        device::tell_again();
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
