//! The clock: CLOCK_MONOTONIC, which all processes of a host share, so that streams of one run line up.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds of CLOCK_MONOTONIC.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a valid pointer to a timespec; CLOCK_MONOTONIC always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// When a process started, in clock ticks since the machine did. No clock that somebody sets takes part in it.
#[must_use]
pub fn process_start_ticks(process_id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process_id}/stat")).ok()?;
    // The name may hold anything, also blanks and parentheses: count from its end. Field 22 is the start.
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

/// Nanoseconds since the Unix epoch.
#[must_use]
pub fn unix_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// How far the wall clock may be from true time, in nanoseconds, as the kernel reckons where something (NTP) keeps it right;
/// `None` where nothing does, or where that may not be asked.
#[must_use]
pub fn wall_clock_error_ns() -> Option<u64> {
    // SAFETY: `timex` is a C structure of numbers, for which zeros are values.
    let mut clock: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: a valid pointer to a timex; with no bit of `modes` set, nothing is changed.
    let state = unsafe { libc::adjtimex(&mut clock) };
    if state < 0 || clock.status & libc::STA_UNSYNC != 0 {
        return None;
    }
    u64::try_from(clock.maxerror).ok()?.checked_mul(1000)
}
