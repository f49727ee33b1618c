//! The heartbeat: a thread that does nothing else, so that neither compressing a block nor a slow disk looks like death to
//! the recorded processes. It ends with the thread that drains the rings, also where that one panics.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::cost::thread_cpu_ns;
use crate::clock::monotonic_ns;
use crate::ring::{CONSUMER_TIMEOUT_NS, Consumer};

/// Between two beats. Recorded processes give up on a daemon after [`CONSUMER_TIMEOUT_NS`].
const INTERVAL: Duration = Duration::from_millis(15);

pub(super) struct Pulse {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// A mapping of its own per ring, of which only the control page is ever touched.
    rings: Mutex<Vec<Consumer>>,
    stop: AtomicBool,
    /// CLOCK_MONOTONIC of the last time that the daemon had been silent for too long: stopped, or starved.
    silent_until_ns: AtomicU64,
    cpu_ns: AtomicU64,
}

impl Pulse {
    pub(super) fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = thread::Builder::new().name("optape-pulse".into()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.beat()
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Begins to beat for a ring.
    pub(super) fn add(&self, path: &Path) -> std::io::Result<()> {
        let ring = Consumer::open(path)?;
        ring.heartbeat();
        self.shared.lock().push(ring);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        Ok(())
    }

    /// Stops beating for a ring.
    pub(super) fn remove(&self, path: &Path) {
        self.shared.lock().retain(|ring| ring.path() != path);
    }

    /// Whether the daemon fell silent at some time since `since_ns` (CLOCK_MONOTONIC).
    pub(super) fn was_silent_since(&self, since_ns: u64) -> bool {
        self.shared.silent_until_ns.load(Ordering::Relaxed) > since_ns
    }

    /// Ends the thread; gives its processor time.
    pub(super) fn stop(mut self) -> u64 {
        self.join();
        self.shared.cpu_ns.load(Ordering::Relaxed)
    }

    fn join(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Consumer>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beat(&self) {
        let mut last: Option<u64> = None;
        while !self.stop.load(Ordering::Relaxed) {
            let busy = {
                let rings = self.lock();
                rings.iter().for_each(Consumer::heartbeat);
                !rings.is_empty()
            };
            let now = monotonic_ns();
            if last.is_some_and(|last| now.saturating_sub(last) > CONSUMER_TIMEOUT_NS) {
                self.silent_until_ns.store(now, Ordering::Relaxed);
            }
            if busy {
                last = Some(now);
                thread::park_timeout(INTERVAL);
            } else {
                last = None;
                thread::park();
            }
        }
        self.cpu_ns.store(thread_cpu_ns(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{OnFull, Producer};

    #[test]
    fn rings_are_kept_alive_until_they_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let pulse = Pulse::start().unwrap();
        let ring = Producer::create(directory.path(), 1 << 16, OnFull::Wait).unwrap();
        pulse.add(ring.path()).unwrap();
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(30));
            assert!(!ring.consumer_silent());
        }
        pulse.remove(ring.path());
        thread::sleep(Duration::from_millis(150));
        assert!(ring.consumer_silent());
    }

    #[test]
    fn the_pulse_ends_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let ring = Producer::create(directory.path(), 1 << 16, OnFull::Wait).unwrap();
        let path = ring.path().to_owned();
        let _ = thread::spawn(move || {
            let pulse = Pulse::start().unwrap();
            pulse.add(&path).unwrap();
            panic!("the drain thread fell over");
        })
        .join();
        thread::sleep(Duration::from_millis(150));
        assert!(ring.consumer_silent());
    }
}
