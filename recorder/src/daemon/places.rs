//! Where a ring's records stand in the file.
//!
//! A process numbers the records that it puts into its ring, and late statistics name their call by that number. In the file there are records
//! of the daemon's own between them, and of a window only the last ones are left.

use optape_trace::{Event, Moment, Ordinal};

/// The places of a stream's records.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Number of the next record of the ring.
    next: u64,
    /// From which number on, and how much the ordinal is greater. Rising; one entry per record of the daemon's own.
    shifts: Vec<(u64, i64)>,
}

impl Places {
    /// Of a ring whose next record has this number. None of those before it has a place.
    pub(super) fn from(next: u64) -> Self {
        Self {
            next,
            shifts: Vec::new(),
        }
    }

    /// Of a ring whose records up to `next` are in a file: the daemon's own stand at the ordinals `own`, rising, and the copy that is being
    /// written has `more` records more (or fewer) than the file.
    pub(super) fn in_file(next: u64, own: &[u64], more: i64) -> Self {
        let mut shifts = vec![(0, more)];
        for (before, ordinal) in (0u64..).zip(own) {
            // The first record behind `before + 1` of the daemon's own.
            shifts.push((
                ordinal.saturating_sub(before),
                more + before.cast_signed() + 1,
            ));
        }
        Self { next, shifts }
    }

    /// The ring's next record was written.
    pub(super) fn written(&mut self, ordinal: Ordinal) {
        let shift = ordinal.0.wrapping_sub(self.next).cast_signed();
        if self.shifts.last().is_none_or(|(_, known)| *known != shift) {
            self.shifts.push((self.next, shift));
        }
        self.next += 1;
    }

    /// The ring's next record was passed over: it has the place that it had, if any.
    pub(super) fn passed(&mut self) {
        self.next += 1;
    }

    /// Names calls by their places in the file, in the place of their numbers. False: the call is not in the file.
    pub(super) fn settle(&self, moment: &mut Moment) -> bool {
        let Event::Statistics { call, .. } = &mut moment.event else {
            return true;
        };
        let behind = self.shifts.partition_point(|(from, _)| *from <= call.0);
        let shift = behind.checked_sub(1).and_then(|at| self.shifts.get(at));
        match shift.and_then(|(_, shift)| call.0.checked_add_signed(*shift)) {
            Some(ordinal) if call.0 < self.next => {
                call.0 = ordinal;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use optape_trace::ThreadId;

    fn place(places: &Places, number: u64) -> Option<u64> {
        let mut moment = Moment {
            time_ns: 0,
            thread: ThreadId(0),
            event: Event::Statistics {
                call: Ordinal(number),
                values: Vec::new(),
            },
        };
        let known = places.settle(&mut moment);
        match moment.event {
            Event::Statistics { call, .. } if known => Some(call.0),
            _ => None,
        }
    }

    #[test]
    fn records_of_the_daemons_own_shift_what_is_behind_them() {
        let mut live = Places::default();
        // Marks at the ordinals 2, 3 and 6.
        for ordinal in [0, 1, 4, 5, 7, 8] {
            live.written(Ordinal(ordinal));
        }
        let file = Places::in_file(6, &[2, 3, 6], 0);
        for places in [&live, &file] {
            let all: Vec<_> = (0..7).map(|number| place(places, number)).collect();
            let expected = [0, 1, 4, 5, 7, 8].map(Some);
            assert_eq!(all[..6], expected);
            assert_eq!(all[6], None);
        }
        let shorter = Places::in_file(6, &[2, 3, 6], -2);
        assert_eq!(place(&shorter, 4), Some(5));
    }

    #[test]
    fn what_is_not_there_has_no_place() {
        let mut places = Places::from(10);
        places.written(Ordinal(3));
        places.passed();
        assert_eq!(place(&places, 9), None);
        assert_eq!(place(&places, 10), Some(3));
        assert_eq!(place(&places, 12), None);
    }
}
