//! Whether the process behind a ring still lives.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, test_kill_process};

use crate::clock::process_start_ticks;

/// A recorded process, held by a descriptor so that another one which gets its number later is not taken for it.
pub(super) enum Process {
    /// Its descriptor turns readable when it dies.
    Watched(OwnedFd),
    /// No descriptor to be had (kernels before 5.3, too many open files): asked by number.
    Asked(Pid),
    /// It is dead.
    Gone,
}

impl Process {
    /// The process that calls itself `process_id` and started at `started_ticks` (see [`process_start_ticks`]; `None`: not known).
    pub(super) fn of_ring(process_id: u32, started_ticks: Option<u64>) -> Self {
        let Some(pid) = i32::try_from(process_id).ok().and_then(Pid::from_raw) else {
            return Self::Gone;
        };
        // Its number may be one of an inner pid namespace.
        [Some(pid), None]
            .into_iter()
            .filter_map(|pid| pid.or_else(|| outer_process_id(process_id)))
            .map(|pid| Self::open_started(pid, started_ticks))
            .find(|process| !matches!(process, Self::Gone))
            .unwrap_or(Self::Gone)
    }

    /// The process of that number, unless it is another one, which got a dead process's number.
    fn open_started(pid: Pid, started_ticks: Option<u64>) -> Self {
        let process = Self::open(pid);
        // Asked after it was opened: what is held cannot change any more.
        let now = u32::try_from(pid.as_raw_nonzero().get())
            .ok()
            .and_then(process_start_ticks);
        match (started_ticks, now) {
            (Some(then), Some(now)) if then != now => Self::Gone,
            _ => process,
        }
    }

    fn open(pid: Pid) -> Self {
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => Self::Watched(descriptor),
            Err(rustix::io::Errno::SRCH) => Self::Gone,
            Err(_) if test_kill_process(pid) == Err(rustix::io::Errno::SRCH) => Self::Gone,
            Err(_) => Self::Asked(pid),
        }
    }

    /// Whether it has died. What it committed before is visible to whoever asks this first and drains then.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::Watched(descriptor) => {
                let mut descriptors = [PollFd::new(descriptor, PollFlags::IN)];
                matches!(poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(n) if n > 0)
            }
            Self::Asked(pid) => test_kill_process(*pid) == Err(rustix::io::Errno::SRCH),
            Self::Gone => true,
        }
    }
}

/// The process that is called `inner` in a pid namespace below ours.
fn outer_process_id(inner: u32) -> Option<Pid> {
    std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let outer: i32 = entry.file_name().to_str()?.parse().ok()?;
            let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
            let ids = status
                .lines()
                .find_map(|line| line.strip_prefix("NSpid:"))?;
            let ids: Vec<u32> = ids
                .split_ascii_whitespace()
                .filter_map(|id| id.parse().ok())
                .collect();
            (ids.len() > 1 && ids.last() == Some(&inner))
                .then(|| Pid::from_raw(outer))
                .flatten()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_gone_once_it_is_dead_not_before() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let process = Process::of_ring(child.id(), process_start_ticks(child.id()));
        assert!(matches!(process, Process::Watched(_) | Process::Asked(_)));
        assert!(!process.is_gone());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.is_gone());
        assert!(Process::of_ring(child.id(), None).is_gone());
    }

    #[test]
    fn another_process_with_its_number_is_not_the_one() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let started = process_start_ticks(child.id()).unwrap();
        let found = |ticks| !Process::of_ring(child.id(), ticks).is_gone();
        let same = (found(Some(started)), found(None), found(Some(started - 1)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(same, (true, true, false));
    }

    #[test]
    fn nonsense_is_nobody() {
        assert!(Process::of_ring(0, None).is_gone());
        assert!(Process::of_ring(u32::MAX, None).is_gone());
    }
}
