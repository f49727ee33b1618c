//! Whether the process behind a ring still lives.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, test_kill_process};

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
    /// The process that made the ring file `path` and calls itself `process_id`.
    pub(super) fn of_ring(path: &Path, process_id: u32) -> Self {
        let Some(pid) = i32::try_from(process_id).ok().and_then(Pid::from_raw) else {
            return Self::Gone;
        };
        match Self::open(pid) {
            // Its number may be one of an inner pid namespace.
            Self::Gone => outer_process_id(process_id).map_or(Self::Gone, Self::open),
            found if started_after(pid, path) => {
                drop(found);
                Self::Gone
            }
            found => found,
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

/// Whether the process was born after the file: then it is another one, which got a dead process's number.
fn started_after(pid: Pid, path: &Path) -> bool {
    let started = process_age(pid).and_then(|age| SystemTime::now().checked_sub(age));
    let made = std::fs::metadata(path).and_then(|m| m.created());
    match (started, made) {
        // The age is known to a hundredth of a second, and clocks get adjusted.
        (Some(started), Ok(made)) => started > made + Duration::from_secs(1),
        _ => false,
    }
}

fn process_age(pid: Pid) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name may hold anything, also blanks and parentheses: count from its end. Field 22 is the start.
    let ticks: u64 = stat
        .rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()?;
    let started =
        Duration::from_millis(ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second());
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_ascii_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(uptime)
        .ok()?
        .checked_sub(started)
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
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let process = Process::of_ring(file.path(), child.id());
        assert!(matches!(process, Process::Watched(_) | Process::Asked(_)));
        assert!(!process.is_gone());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.is_gone());
        assert!(Process::of_ring(file.path(), child.id()).is_gone());
    }

    #[test]
    fn a_younger_process_of_the_same_number_is_not_the_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::thread::sleep(Duration::from_millis(1200));
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let found = Process::of_ring(file.path(), child.id()).is_gone();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found || std::fs::metadata(file.path()).unwrap().created().is_err());
    }

    #[test]
    fn nonsense_is_nobody() {
        assert!(Process::of_ring(Path::new("/nowhere"), 0).is_gone());
        assert!(Process::of_ring(Path::new("/nowhere"), u32::MAX).is_gone());
    }
}
