//! How to record, and what may be wrong with it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::measuring::Preset;
use super::schedule::Schedule;
use crate::ring::OnFull;

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
    /// How long the work of calls takes on a GPU, too.
    pub gpu_time: bool,
}

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
        settings.gpu_time = variable("OPTAPE_GPU_TIME").as_deref() == Some("1");
        Ok(settings)
    }

    /// Whether calls are timed on GPUs.
    pub(super) const fn times_gpus(&self) -> bool {
        self.gpu_time && !self.hook_only
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
            gpu_time: recording.gpu_time,
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
            gpu_time: false,
        }
    }
}
