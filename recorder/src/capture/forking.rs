//! A mutex that is in order on both sides of a fork, whoever waited for it.
//!
//! The standard library's keeps nothing but a word of its own: those who wait do so in the kernel, and a child has none of them.
//! `parking_lot` keeps a table of those who wait. In a child it still lists threads that are not there, and an unlock may
//! hand the mutex over to one of them, for ever.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::sync::{MutexGuard, PoisonError, TryLockError};

/// A mutex that knows no poisoning: what holds it gives up recording where it panics.
pub(super) struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(super) const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    #[inline]
    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None`: somebody holds it.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// A mutex that a thread holds while it forks. Nothing of it is dropped with the thread, so that it can be had until its very end.
pub(super) struct Held<T: 'static>(Cell<Option<ManuallyDrop<MutexGuard<'static, T>>>>);

impl<T> Held<T> {
    pub(super) const fn nothing() -> Self {
        Self(Cell::new(None))
    }

    /// Before the fork.
    pub(super) fn lock(&self, mutex: &'static Mutex<T>) {
        self.0.set(Some(ManuallyDrop::new(mutex.lock())));
    }

    /// Behind it, in both.
    pub(super) fn unlock(&self) {
        drop(self.0.take().map(ManuallyDrop::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Threads wait for the mutex at every fork; each child takes it.
    #[test]
    fn a_child_can_lock_what_others_waited_for() {
        static MUTEX: Mutex<u64> = Mutex::new(0);
        let held = Held::nothing();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while *MUTEX.lock() < 100 {
                        thread::sleep(Duration::from_micros(20));
                    }
                });
            }
            for _ in 0..100 {
                held.lock(&MUTEX);
                // Long enough for the others to wait, and for a fair mutex to hand itself over.
                thread::sleep(Duration::from_millis(2));
                // SAFETY: the child calls nothing but the mutex, `alarm` and `_exit`.
                let child = unsafe { libc::fork() };
                assert!(child >= 0);
                held.unlock();
                if child == 0 {
                    // SAFETY: a child that waits for ever is ended by the signal.
                    unsafe { libc::alarm(5) };
                    for _ in 0..3 {
                        *MUTEX.lock() += 1;
                    }
                    // SAFETY: ends the child without the parent's exit handlers.
                    unsafe { libc::_exit(7) };
                }
                let mut status = 0;
                // SAFETY: a child of this process, and a word to write.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                assert!(
                    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7,
                    "{status}"
                );
                *MUTEX.lock() += 1;
            }
        });
    }
}
