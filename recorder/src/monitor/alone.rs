//! Monitors without a recording: `optape monitor`.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};

use super::{LONGEST_SILENCE, MonitorSettings, Monitors, Rhythm, Samples};
use crate::clock::{monotonic_ns, unix_ns};

/// What ends it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Until {
    /// So many rounds.
    pub rounds: Option<u64>,
    /// The end of this process.
    pub process: Option<u32>,
}

/// The process that started this one, unless that is the system's first, which never ends before us.
#[must_use]
pub fn parent() -> Option<u32> {
    let parent = u32::try_from(getppid()?.as_raw_nonzero().get()).ok()?;
    (parent > 1).then_some(parent)
}

/// One round.
pub struct Round<'a> {
    /// Counted from 0.
    pub number: u64,
    /// Nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// What was sampled.
    pub samples: &'a Samples,
    /// Facts that are new: notes on what is missing.
    pub facts: Vec<(String, serde_json::Value)>,
}

/// Samples until a signal (SIGINT, SIGTERM, SIGHUP), the end of a process or the last round; hands every round to `take`.
///
/// # Errors
/// What `take` says, and where the system refuses to handle signals.
pub fn run<E: From<io::Error>>(
    mut monitors: Monitors,
    settings: &MonitorSettings,
    until: Until,
    mut take: impl FnMut(Round<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let end = End::watch(until.process)?;
    if let Some(process) = until.process {
        monitors.watch(process);
    }
    let rhythm = Rhythm::start(settings.interval);
    let mut number = 0;
    while until.rounds.is_none_or(|rounds| number < rounds) {
        let samples = monitors.sample();
        let facts = samples.take_facts();
        take(Round {
            number,
            unix_ns: unix_ns(),
            samples,
            facts,
        })?;
        number += 1;
        if until.rounds == Some(number) {
            break;
        }
        let mut left = rhythm.until_next(monotonic_ns());
        while !left.is_zero() {
            let nap = left.min(LONGEST_SILENCE);
            if end.wait(nap)? {
                return Ok(());
            }
            left -= nap;
            if !left.is_zero() {
                monitors.keep_up();
            }
        }
    }
    Ok(())
}

/// Signals and the end of a process, as descriptors that turn readable.
struct End {
    signals: UnixStream,
    process: Option<OwnedFd>,
    /// It had ended before it could be watched.
    gone: bool,
}

impl End {
    fn watch(process: Option<u32>) -> io::Result<Self> {
        let (signals, write) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        let mut end = Self {
            signals,
            process: None,
            gone: false,
        };
        if let Some(process) = process {
            let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
            match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
                Some(Ok(descriptor)) => end.process = Some(descriptor),
                Some(Err(rustix::io::Errno::SRCH)) | None => end.gone = true,
                Some(Err(error)) => return Err(error.into()),
            }
        }
        Ok(end)
    }

    /// Waits; true: it is time to end.
    fn wait(&self, time: Duration) -> io::Result<bool> {
        if self.gone {
            return Ok(true);
        }
        let deadline =
            monotonic_ns().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        loop {
            let left = deadline.saturating_sub(monotonic_ns());
            let mut descriptors = vec![PollFd::from_borrowed_fd(
                self.signals.as_fd(),
                PollFlags::IN,
            )];
            descriptors.extend(self.process.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
            let timeout = Timespec {
                tv_sec: (left / 1_000_000_000) as i64,
                tv_nsec: (left % 1_000_000_000) as _,
            };
            match poll(&mut descriptors, Some(&timeout)) {
                Ok(0) => return Ok(false),
                Ok(_) => {
                    // Emptied, so that whoever runs this twice in a process does not see the first one's end.
                    let _ = (&self.signals).read(&mut [0; 16]);
                    return Ok(true);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
