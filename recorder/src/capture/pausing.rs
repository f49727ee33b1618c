//! When nothing is recorded: pauses, schedules, and the daemon's commands.

use std::sync::atomic::Ordering;

use optape_trace::{CallId, Event, ModuleId, PauseReason};

use super::schedule::StepCounts;
use super::{CAPTURE, Capture, Failure, PAUSED, RECORDING, State};
use crate::clock::monotonic_ns;
use crate::ring::{PAUSED_BY_COMMAND, PAUSED_BY_SCHEDULE, command};

impl Capture {
    /// Pauses (`false`) or resumes recording, as the daemon may, too: the last one who says something is obeyed. Ops pass
    /// through untouched meanwhile. A schedule that leaves the present step out is not overruled.
    pub fn set_recording(&'static self, on: bool) {
        self.with(|state| match state.started && !state.given_up {
            true => state.set_paused(PAUSED_BY_COMMAND, !on),
            false => Ok(()),
        });
    }

    /// While paused, at every op that passes: begins the stream, so that the daemon can be heard, and listens.
    pub(super) fn idle(&'static self, torch_thread: u64) {
        // Whoever holds the lock listens, too.
        let Some(mut guard) = self.state.try_lock() else {
            return;
        };
        let Some(state) = guard.as_mut().filter(|state| state.started) else {
            return;
        };
        if let Err(failure) = state.listen(torch_thread) {
            self.give_up(&mut guard, &failure.0);
        }
    }
}

impl State {
    pub(super) fn pause_reason(&self) -> Option<PauseReason> {
        match self.paused {
            0 => None,
            bits if bits & PAUSED_BY_COMMAND != 0 => Some(PauseReason::Asked),
            _ => Some(PauseReason::Schedule),
        }
    }

    /// Sets or clears one reason for recording nothing.
    pub(super) fn set_paused(&mut self, reason: u64, on: bool) -> Result<(), Failure> {
        let before = self.paused;
        self.paused = if on {
            before | reason
        } else {
            before & !reason
        };
        if self.paused == before || self.stopped {
            return Ok(());
        }
        self.publish_pause();
        // Nothing but these two changes here: a recorder that is switched off stays so.
        let (from, to) = match self.paused {
            0 => (PAUSED, RECORDING),
            _ => (RECORDING, PAUSED),
        };
        let _ = CAPTURE
            .recording
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
        match (before, self.pause_reason()) {
            (0, Some(reason)) => self.aside(Event::Paused { reason }),
            (_, None) => {
                self.identities.missed_ops();
                self.scopes.missed_ops();
                self.aside(Event::Resumed)?;
                self.tell_what_is_open(monotonic_ns())
            }
            _ => Ok(()),
        }
    }

    /// Module calls and ranges that run, and whose beginning is not in the trace: as if they began at `at_ns` (CLOCK_MONOTONIC).
    pub(super) fn tell_what_is_open(&mut self, at_ns: u64) -> Result<(), Failure> {
        for (thread, call, module) in self.scopes.tell_open_calls() {
            self.moment_at(
                at_ns,
                thread,
                Event::ModuleEnter {
                    call: CallId(call),
                    module: ModuleId(module),
                    arguments: Vec::new(),
                },
            )?;
        }
        for (thread, name) in self.scopes.tell_open_ranges() {
            self.moment_at(at_ns, thread, Event::RangeEnter { name })?;
        }
        Ok(())
    }

    pub(super) fn publish_pause(&self) {
        if let Some(stream) = &self.stream {
            stream.outlet.ring().obeyed(self.obeyed, self.paused);
        }
    }

    pub(super) fn publish_steps(&self) {
        if let Some(stream) = &self.stream {
            let [optimizer, root_calls, program] = self.steps;
            stream
                .outlet
                .ring()
                .set_steps([optimizer, root_calls, program, self.inferences]);
        }
    }

    pub(super) fn step_counts(&self) -> StepCounts {
        StepCounts {
            by_source: self.steps,
            inferences: self.inferences,
        }
    }

    /// A step may have begun: whether it is recorded.
    pub(super) fn follow_schedule(&mut self) -> Result<(), Failure> {
        match self.settings.schedule {
            None => Ok(()),
            Some(schedule) => {
                let records = schedule.records(&self.step_counts());
                self.set_paused(PAUSED_BY_SCHEDULE, !records)
            }
        }
    }

    /// Hears the daemon while nothing is recorded.
    pub(super) fn listen(&mut self, torch_thread: u64) -> Result<(), Failure> {
        if self.stopped {
            return Ok(());
        }
        self.thread(Some(torch_thread))?;
        if !self.has_stream(monotonic_ns())? {
            return Ok(());
        }
        match self.command() {
            command if command == self.obeyed => Ok(()),
            command => self.obey(command),
        }
    }

    /// What the daemon said last.
    #[inline]
    pub(super) fn command(&self) -> u32 {
        self.stream
            .as_ref()
            .map_or(self.obeyed, |stream| stream.outlet.ring().command())
    }

    /// Does what the daemon says.
    #[cold]
    pub(super) fn obey(&mut self, command: u32) -> Result<(), Failure> {
        self.obeyed = command;
        if command & command::STOP != 0 {
            CAPTURE.recording.store(0, Ordering::Release);
            self.stopped = true;
            self.publish_pause();
            self.end_stream();
            return Ok(());
        }
        self.set_paused(PAUSED_BY_COMMAND, command & command::PAUSE != 0)?;
        self.publish_pause();
        Ok(())
    }
}
