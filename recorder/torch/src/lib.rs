//! Records programs that train with tch.
//!
//! The hook is built against the libtorch that tch links, and records what this process runs in it: to the daemon of
//! `optape record` ([`attach`]), or into a file of its own ([`record`]). What a Python program tells by itself (modules, the optimizer's
//! step) a tch program says in its own words: scopes, stages, steps, ranges, each a guard or a call on the [`Tape`].
//!
//! ```no_run
//! use tch::nn::{self, Module};
//!
//! fn main() -> Result<(), optape_torch::Error> {
//!     let tape = optape_torch::record("train.optape".as_ref(), optape_torch::Options::default())?;
//!     let variables = nn::VarStore::new(tch::Device::Cpu);
//!     let root = variables.root();
//!     let network = nn::seq()
//!         .add(optape_torch::scoped("fc1", nn::linear(&root / "fc1", 64, 32, Default::default())))
//!         .add_fn(|x| x.relu())
//!         .add(optape_torch::scoped("fc2", nn::linear(&root / "fc2", 32, 10, Default::default())));
//!     let images = tch::Tensor::rand([8, 64], (tch::Kind::Float, tch::Device::Cpu));
//!     let _network = tape.scope("Net");
//!     network.forward(&images);
//!     tape.step(8);
//!     Ok(())
//! }
//! ```
//!
//! A program that is not recorded pays nothing: [`scoped`] layers outside of a recording only call their layer.

mod hook;

use std::cell::RefCell;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use optape_recorder::capture::{self, Capture, CaptureError, Settings};
use optape_recorder::daemon::{InProcess, RecordError, Recording};
use optape_recorder::trace::{ModuleDef, ModuleId, WatchDef};
use tch::Tensor;
use tch::nn::{Module, ModuleT};

pub use optape_recorder::capture::Preset;
pub use optape_recorder::daemon::{InProcess as Options, Report, Settings as RecordSettings};

/// Recording could not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The program does not run under `optape record`.
    #[error(
        "OPTAPE_RUN is not set: start the program with `optape record -- PROGRAM`, or let it write its own file with \
         optape_torch::record(path, options)"
    )]
    NoDaemon,
    /// The daemon's settings cannot be used.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The file or the run directory cannot be made.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The hook could not be registered with libtorch.
    #[error("cannot hook this libtorch: {0}")]
    Hook(String),
}

/// Attaches this process to the daemon of `optape record`.
///
/// # Errors
/// [`Error::NoDaemon`] where the program was started without it.
pub fn attach() -> Result<Tape, Error> {
    let run = std::env::var_os("OPTAPE_RUN")
        .filter(|r| !r.is_empty())
        .ok_or(Error::NoDaemon)?;
    begin(Settings::from_environment(PathBuf::from(run))?, None)
}

/// Records this process into the file `path`.
///
/// # Errors
/// Where the file exists (unless `options.force`) or cannot be made, or the process is being recorded already.
pub fn record(path: &Path, options: Options) -> Result<Tape, Error> {
    let settings = options.settings.clone();
    let recording = Recording::in_process(path, InProcess { ..options })?;
    let settings = Settings::of_recording(recording.directory(), &settings);
    begin(settings, Some(recording))
}

fn begin(mut settings: Settings, recording: Option<Recording>) -> Result<Tape, Error> {
    hook::install(capture::table()).map_err(Error::Hook)?;
    let (key, torch) = hook::versions();
    settings.versions.insert("dispatch key".to_owned(), key);
    settings.versions.insert("torch".to_owned(), torch);
    settings.command = std::env::args().collect();
    Capture::get().start(settings)?;
    hook::thread(true);
    Ok(Tape { recording })
}

/// A recording. It ends when this is dropped.
#[must_use = "the recording ends when the tape is dropped"]
pub struct Tape {
    recording: Option<Recording>,
}

impl Tape {
    /// Ends the recording. Where this process wrote its own file, says what it wrote.
    #[must_use]
    pub fn finish(mut self) -> Option<Report> {
        Capture::get().stop();
        self.recording.take().map(Recording::finish)
    }

    /// Ops belong to the module `name` until the guard is dropped. Scopes nest: `fc1` inside `Net` is `Net.fc1`. Whether it trains is
    /// taken from the scope around it; [`Tape::scope_t`] says it.
    pub fn scope(&self, name: &str) -> Scope {
        Scope::enter(name, None)
    }

    /// As [`Tape::scope`], and says whether the module is in training mode.
    pub fn scope_t(&self, name: &str, training: bool) -> Scope {
        Scope::enter(name, Some(training))
    }

    /// Names the stage until the guard is dropped. `"optimizer"` is the stage of that name; forward, loss and backward are found
    /// by themselves; any other name is kept beside the stage that was found.
    pub fn stage(&self, name: &str) -> Stage {
        let optimizer = name == "optimizer";
        if optimizer {
            Capture::get().optimizer(true);
        } else {
            Capture::get().stage(Some(name));
        }
        Stage {
            optimizer,
            _thread: PhantomData,
        }
    }

    /// Marks the end of a step that processed `samples` samples (0: not said).
    pub fn step(&self, samples: u64) {
        Capture::get().step(samples);
    }

    /// A named range until the guard is dropped.
    pub fn range(&self, name: &str) -> Range {
        Capture::get().range_enter(name);
        Range {
            _thread: PhantomData,
        }
    }

    /// Records the ops of the calling thread until the guard is dropped. The thread that began the recording, and the threads of
    /// autograd, are recorded without it.
    pub fn thread(&self) -> ThreadGuard {
        ThreadGuard {
            before: hook::thread(true),
            _thread: PhantomData,
        }
    }

    /// Looks at the spikes of a layer of neurons: its firing rate. The layer is the innermost scope that is open, `name` within it
    /// unless that scope has the name already.
    pub fn spikes(&self, name: &str, spikes: &Tensor) {
        watch(name, spikes);
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        Capture::get().stop();
    }
}

/// An open scope.
#[must_use = "the scope ends when the guard is dropped"]
pub struct Scope {
    module: ModuleId,
    _thread: PhantomData<*const ()>,
}

struct Open {
    module: ModuleId,
    name: String,
    training: bool,
}

thread_local! {
    static OPEN: RefCell<Vec<Open>> = const { RefCell::new(Vec::new()) };
}

/// Modules and watches by full name.
#[derive(Default)]
struct Names {
    /// Also by whether it is a layer of neurons: a scope learns of its spikes only after it was opened.
    modules: HashMap<(String, bool), ModuleId>,
    watches: HashMap<ModuleId, u32>,
}

fn names() -> &'static Mutex<Names> {
    static NAMES: OnceLock<Mutex<Names>> = OnceLock::new();
    NAMES.get_or_init(Mutex::default)
}

fn module(name: &str, spiking: bool) -> ModuleId {
    let mut names = names().lock().unwrap_or_else(PoisonError::into_inner);
    let key = (name.to_owned(), spiking);
    if let Some(module) = names.modules.get(&key) {
        return *module;
    }
    let definition = ModuleDef {
        name: name.to_owned(),
        classes: Vec::new(),
        spiking,
    };
    let module = Capture::get().define_module(definition, &[]);
    names.modules.insert(key, module);
    module
}

impl Scope {
    fn enter(name: &str, training: Option<bool>) -> Self {
        OPEN.with_borrow_mut(|open| {
            let (full, inherited) = match open.last() {
                Some(outer) => (format!("{}.{name}", outer.name), outer.training),
                None => (name.to_owned(), false),
            };
            let training = training.unwrap_or(inherited);
            let module = module(&full, false);
            hook::module_enter(module.0, training);
            open.push(Open {
                module,
                name: full,
                training,
            });
            Self {
                module,
                _thread: PhantomData,
            }
        })
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        hook::module_exit(self.module.0);
        OPEN.with_borrow_mut(|open| {
            if let Some(at) = open.iter().rposition(|o| o.module == self.module) {
                open.truncate(at);
            }
        });
    }
}

/// A named stage.
#[must_use = "the stage ends when the guard is dropped"]
pub struct Stage {
    optimizer: bool,
    _thread: PhantomData<*const ()>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.optimizer {
            Capture::get().optimizer(false);
        } else {
            Capture::get().stage(None);
        }
    }
}

/// A named range.
#[must_use = "the range ends when the guard is dropped"]
pub struct Range {
    _thread: PhantomData<*const ()>,
}

impl Drop for Range {
    fn drop(&mut self) {
        Capture::get().range_exit();
    }
}

/// A recorded thread.
#[must_use = "the thread is recorded until the guard is dropped"]
pub struct ThreadGuard {
    before: bool,
    _thread: PhantomData<*const ()>,
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        hook::thread(self.before);
    }
}

fn watch(name: &str, spikes: &Tensor) {
    if Capture::get().takes_no_statistics() {
        return;
    }
    let full = OPEN.with_borrow(|open| match open.last() {
        Some(o) if o.name == name || o.name.ends_with(&format!(".{name}")) => o.name.clone(),
        Some(o) => format!("{}.{name}", o.name),
        None => name.to_owned(),
    });
    let neuron = module(&full, true);
    let id = {
        let mut names = names().lock().unwrap_or_else(PoisonError::into_inner);
        match names.watches.get(&neuron) {
            Some(id) => *id,
            None => {
                let definition = WatchDef {
                    module: Some(neuron),
                    what: "output".to_owned(),
                };
                let id = Capture::get().define_watch(definition).0;
                names.watches.insert(neuron, id);
                id
            }
        }
    };
    hook::watch(spikes, id);
}

/// A layer whose ops belong to the module `name`; see [`Tape::scope`].
#[derive(Debug)]
pub struct Scoped<M> {
    name: String,
    layer: M,
}

/// Gives a layer a name, for `nn::seq().add(...)`.
pub fn scoped<M>(name: &str, layer: M) -> Scoped<M> {
    Scoped {
        name: name.to_owned(),
        layer,
    }
}

impl<M> Scoped<M> {
    fn enter(&self, training: Option<bool>) -> Option<Scope> {
        Capture::get()
            .is_started()
            .then(|| Scope::enter(&self.name, training))
    }
}

impl<M: Module> Module for Scoped<M> {
    fn forward(&self, xs: &Tensor) -> Tensor {
        let _scope = self.enter(None);
        self.layer.forward(xs)
    }
}

/// For layers that are told whether they train. Layers that implement [`Module`] get [`ModuleT`] from tch, here by name.
impl<M: ModuleT> Scoped<M> {
    /// As [`ModuleT::forward_t`].
    pub fn forward_scoped_t(&self, xs: &Tensor, train: bool) -> Tensor {
        let _scope = self.enter(Some(train));
        self.layer.forward_t(xs, train)
    }
}
