//! Monitors: what the machine did meanwhile. GPUs, the processor's energy counters, the host, the recorded processes.
//!
//! Every kind of measurement is a [`Source`]. [`Monitors`] opens those that are asked for and samples them together. A source
//! that is not to be had on this machine (no driver, no permission) is a state with a hint, never an error. Names and
//! units of series stand in [`optape_trace::series`], which is what recorder and readers share.
//!
//! `optape record` samples them on a thread of the daemon's, into a stream of their own beside the ops; `optape monitor` runs
//! them [`alone`].

pub mod alone;
pub mod events;
mod host;
mod nvml;
mod proc_file;
mod process;
mod rapl;
mod simulated;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use optape_trace::series::{self, Quantity};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clock::monotonic_ns;

pub use rapl::POWERCAP_DIRECTORY;

/// So many series at most: processes come and go on a GPU, and a long recording must stay bounded.
const SERIES_LIMIT: usize = 4096;
/// Counters that wrap around are read at least so often, however rarely samples are asked for: a 300 W processor's wraps
/// after a quarter of an hour.
pub const LONGEST_SILENCE: Duration = Duration::from_secs(60);
/// Samples are not taken more often than this: no counter is renewed faster.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);

/// A kind of source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SourceKind {
    /// GPUs, by NVML.
    Gpu,
    /// The processor's energy counters.
    Rapl,
    /// Processors and memory of the machine.
    Host,
    /// The recorded processes themselves.
    Process,
}

impl SourceKind {
    /// All, in the order in which they are sampled.
    pub const ALL: [Self; 4] = [Self::Gpu, Self::Rapl, Self::Host, Self::Process];

    /// As flags and facts spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Rapl => "rapl",
            Self::Host => "host",
            Self::Process => "process",
        }
    }
}

/// What to sample, and how often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorSettings {
    /// Which sources.
    pub sources: Vec<SourceKind>,
    /// Between two samples, at least [`SHORTEST_INTERVAL`].
    pub interval: Duration,
    /// Which GPUs, by NVML's numbers; `None`: all.
    pub gpus: Option<Vec<u32>>,
    /// The user named the sources, so that he is told at once which of them are not to be had. Else it is only recorded.
    pub asked_for: bool,
    /// So many made-up GPUs in place of real ones, for tests and demonstrations. Said aloud and recorded.
    pub simulated_gpus: Option<u32>,
    /// Where Linux shows the processor's energy counters.
    pub rapl_directory: PathBuf,
}

impl Default for MonitorSettings {
    fn default() -> Self {
        Self {
            sources: SourceKind::ALL.to_vec(),
            interval: Duration::from_secs(1),
            gpus: None,
            asked_for: false,
            simulated_gpus: None,
            rapl_directory: POWERCAP_DIRECTORY.into(),
        }
    }
}

/// Why a source gives nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absence {
    /// What is missing.
    pub what: String,
    /// What helps.
    pub hint: Option<String>,
}

/// A source, and whether it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceState {
    /// Which.
    pub source: SourceKind,
    /// What it samples, or why it does not.
    pub state: Result<String, Absence>,
}

impl SourceState {
    /// One line for the user's eyes.
    #[must_use]
    pub fn line(&self) -> String {
        let name = self.source.name();
        match &self.state {
            Ok(what) => format!("monitor {name}: {what}"),
            Err(Absence { what, hint: None }) => format!("monitor {name} gives nothing: {what}"),
            Err(Absence {
                what,
                hint: Some(hint),
            }) => format!("monitor {name} gives nothing: {what}; {hint}"),
        }
    }

    /// As the trace keeps it.
    fn fact(&self) -> (String, Value) {
        let key = format!("{}{}", series::facts::SOURCE_PREFIX, self.source.name());
        let value = match &self.state {
            Ok(what) => json!({"state": "running", "what": what}),
            Err(absence) => {
                json!({"state": "absent", "what": absence.what, "hint": absence.hint})
            }
        };
        (key, value)
    }
}

/// A number of a series, in the order of first use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeriesId(u32);

impl SeriesId {
    /// As an index into [`Samples::names`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// One sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Of which series.
    pub series: SeriesId,
    /// CLOCK_MONOTONIC when it was read.
    pub time_ns: u64,
    /// Its value, in the series' unit.
    pub value: f64,
}

/// Something that can be sampled.
pub trait Source: Send {
    /// Which kind it is.
    fn kind(&self) -> SourceKind;

    /// What it samples, in a few words.
    fn what(&self) -> String;

    /// Samples everything once.
    fn sample(&mut self, into: &mut Samples);

    /// Reads counters that would otherwise wrap around unseen; called at least every [`LONGEST_SILENCE`].
    fn keep_up(&mut self) {}

    /// Takes a process in, where the source is about processes.
    fn watch(&mut self, _process_id: u32) {}
}

/// What sources have sampled: their series, their readings since the last round, and facts about devices.
#[derive(Debug, Default)]
pub struct Samples {
    names: Vec<String>,
    by_name: HashMap<String, SeriesId>,
    readings: Vec<Reading>,
    facts: Vec<(String, Value)>,
    time_ns: u64,
    full: bool,
}

impl Samples {
    /// The number of a series; the same for the same name. `None`: there are too many, which is noted once.
    pub fn series(&mut self, device: &str, quantity: &Quantity) -> Option<SeriesId> {
        let name = series::series_name(device, quantity);
        if let Some(id) = self.by_name.get(&name) {
            return Some(*id);
        }
        if self.names.len() >= SERIES_LIMIT {
            if !std::mem::replace(&mut self.full, true) {
                self.note(
                    "monitors",
                    format!("more than {SERIES_LIMIT} series; later ones are left out"),
                );
            }
            return None;
        }
        let id = SeriesId(self.names.len() as u32);
        self.names.push(name.clone());
        self.by_name.insert(name, id);
        Some(id)
    }

    /// What is added from here on was read now.
    pub fn now(&mut self) {
        self.time_ns = monotonic_ns();
    }

    /// Adds a reading of a series that has a number.
    pub fn add(&mut self, series: Option<SeriesId>, value: f64) {
        if let Some(series) = series {
            self.readings.push(Reading {
                series,
                time_ns: self.time_ns,
                value,
            });
        }
    }

    /// Adds a fact, by one of the keys of [`series::facts`].
    pub fn fact(&mut self, key: String, value: Value) {
        self.facts.push((key, value));
    }

    /// Notes why something of a device is missing.
    pub fn note(&mut self, device: &str, text: String) {
        let key = format!("{}{device}", series::facts::NOTE_PREFIX);
        self.fact(key, Value::String(text));
    }

    /// All series so far; their number is their place.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The readings of the last round.
    #[must_use]
    pub fn readings(&self) -> &[Reading] {
        &self.readings
    }

    /// Facts that nobody has taken yet.
    pub fn take_facts(&mut self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.facts)
    }
}

/// The sources that were asked for, as far as they are there.
pub struct Monitors {
    sources: Vec<Box<dyn Source>>,
    states: Vec<SourceState>,
    samples: Samples,
}

impl Monitors {
    /// Opens what is asked for. Loading a GPU driver takes some time: do it where nobody waits.
    #[must_use]
    pub fn open(settings: &MonitorSettings) -> Self {
        let mut monitors = Self {
            sources: Vec::new(),
            states: Vec::new(),
            samples: Samples::default(),
        };
        let samples = &mut monitors.samples;
        samples.fact(
            series::facts::INTERVAL.to_owned(),
            json!(settings.interval.as_secs_f64()),
        );
        for kind in SourceKind::ALL {
            if !settings.sources.contains(&kind) {
                continue;
            }
            let opened = match kind {
                SourceKind::Gpu => match settings.simulated_gpus {
                    Some(count) => Ok(simulated::open(count, settings.gpus.as_deref(), samples)),
                    None => nvml::open(settings.gpus.as_deref(), samples),
                },
                SourceKind::Rapl => rapl::open(&settings.rapl_directory, samples),
                SourceKind::Host => host::open(),
                SourceKind::Process => Ok(process::open()),
            };
            let state = SourceState {
                source: kind,
                state: match &opened {
                    Ok(source) => Ok(source.what()),
                    Err(absence) => Err(absence.clone()),
                },
            };
            let (key, value) = state.fact();
            samples.fact(key, value);
            monitors.states.push(state);
            monitors.sources.extend(opened);
        }
        monitors
    }

    /// Which sources were asked for, and which are there.
    #[must_use]
    pub fn states(&self) -> &[SourceState] {
        &self.states
    }

    /// Whether there is nothing to sample.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// Samples every source once.
    pub fn sample(&mut self) -> &mut Samples {
        self.samples.readings.clear();
        for source in &mut self.sources {
            self.samples.now();
            source.sample(&mut self.samples);
        }
        &mut self.samples
    }

    /// Reads counters that wrap around.
    pub fn keep_up(&mut self) {
        self.sources.iter_mut().for_each(|source| source.keep_up());
    }

    /// Takes a process in.
    pub fn watch(&mut self, process_id: u32) {
        for source in &mut self.sources {
            source.watch(process_id);
        }
    }
}

/// When to sample next: at multiples of the interval since the start, however long sampling takes; rounds that were missed
/// (a machine that slept) are left out.
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    start_ns: u64,
    interval_ns: u64,
}

impl Rhythm {
    /// Begins now.
    #[must_use]
    pub fn start(interval: Duration) -> Self {
        let interval = interval.max(SHORTEST_INTERVAL);
        Self {
            start_ns: monotonic_ns(),
            interval_ns: u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// How long until the next round behind `now_ns` (CLOCK_MONOTONIC).
    #[must_use]
    pub fn until_next(&self, now_ns: u64) -> Duration {
        let since = now_ns.saturating_sub(self.start_ns);
        Duration::from_nanos(self.interval_ns - since % self.interval_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rhythm_neither_drifts_nor_catches_up() {
        let rhythm = Rhythm {
            start_ns: 1000,
            interval_ns: 100,
        };
        for (now, left) in [(1000, 100), (1001, 99), (1099, 1), (1730, 70), (5, 100)] {
            assert_eq!(rhythm.until_next(now), Duration::from_nanos(left), "{now}");
        }
    }

    #[test]
    fn series_are_numbered_once_and_bounded() {
        let mut samples = Samples::default();
        let first = samples.series("gpu0", &series::POWER);
        assert_eq!(first, samples.series("gpu0", &series::POWER));
        for n in 1..=SERIES_LIMIT {
            let id = samples.series(&format!("gpu{n}"), &series::POWER);
            assert_eq!(id.is_some(), n < SERIES_LIMIT, "{n}");
        }
        assert_eq!(samples.series("one more", &series::POWER), None);
        assert_eq!(samples.take_facts().len(), 1, "told once");
    }

    #[test]
    fn what_is_not_there_is_a_state() {
        let directory = tempfile::tempdir().unwrap();
        let settings = MonitorSettings {
            sources: vec![SourceKind::Rapl, SourceKind::Host],
            rapl_directory: directory.path().join("none"),
            ..MonitorSettings::default()
        };
        let mut monitors = Monitors::open(&settings);
        let [rapl, host] = monitors.states() else {
            panic!("{:?}", monitors.states())
        };
        assert!(
            rapl.state.is_err() && host.state.is_ok(),
            "{rapl:?} {host:?}"
        );
        assert!(rapl.line().contains("gives nothing"), "{}", rapl.line());
        let samples = monitors.sample();
        assert!(samples.names().iter().all(|name| name.starts_with("host/")));
        let facts = samples.take_facts();
        let state = |key: &str| {
            let (_, value) = facts.iter().find(|(k, _)| k == key).unwrap();
            value["state"].as_str().unwrap().to_owned()
        };
        assert_eq!(
            (state("monitor.rapl"), state("monitor.host")),
            ("absent".into(), "running".into())
        );
    }
}
