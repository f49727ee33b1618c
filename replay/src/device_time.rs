//! How long the work of op calls took on GPUs, where it was recorded (`optape record --gpu-time`).

use optape_trace::{Operand, Pattern, Stream, SummaryRow, Trace, TraceError, When, fields};
use serde::Serialize;

use crate::rules::integer_position;

/// Time on GPUs, of some op calls.
///
/// It is what passed between two events on a stream, one before the work of a call and one behind it. What the GPU waited for that work to
/// be launched is in it, so a run that is bound by launches shows more than its kernels took; calls on several streams may overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceTime {
    /// Sum over the calls that have a time.
    pub time_ns: u128,
    /// Those calls.
    pub calls: u64,
    /// Calls that had work for a GPU, but whose time is not in the file: lost, or not taken.
    pub missing_calls: u64,
}

impl DeviceTime {
    /// Adds the calls of a row.
    pub(crate) fn add(&mut self, pattern: &Pattern, row: &SummaryRow) {
        if pattern.entry(Operand::Call, When::After).is_none() {
            return;
        }
        let at = integer_position(pattern, Operand::Call, When::After, fields::DEVICE_TIME);
        match at.and_then(|at| row.integer_sums.get(at)) {
            Some(ns) => {
                self.time_ns = self.time_ns.saturating_add(*ns);
                self.calls += row.calls;
            }
            None => self.missing_calls += row.calls,
        }
    }

    /// Whether no call had work for a GPU, or nobody asked.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.calls == 0 && self.missing_calls == 0
    }
}

/// Time on GPUs of a whole stream; empty where none was recorded.
///
/// # Errors
/// Where the file cannot be read.
pub fn device_time(trace: &Trace, stream: &Stream) -> Result<DeviceTime, TraceError> {
    let dictionary = stream.dictionary();
    let mut sum = DeviceTime::default();
    let any = dictionary
        .patterns()
        .any(|(_, pattern)| pattern.entry(Operand::Call, When::After).is_some());
    if any {
        for row in trace.summary(stream.id(), 0..stream.records())? {
            if let Some(pattern) = dictionary.pattern(row.pattern) {
                sum.add(pattern, &row);
            }
        }
    }
    Ok(sum)
}
