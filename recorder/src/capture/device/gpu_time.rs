//! How long the work of op calls takes on a GPU: `--gpu-time`.
//!
//! Nothing of this is reached without that flag: plans of ops say whether calls are timed, and of what a call says of it
//! one bit is looked at that stands in a word that is looked at anyway.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use optape_trace::{LateStatistic, NotTaken, Operand, When, fields};

use super::super::measuring::{self, CALL, OpPlan, Slot, Value};
use super::{CUDA, Clock, DEVICES, Devices, IN_FLIGHT, Opened, PAIRS, Stopwatch};
use crate::abi::Call;
use crate::device::timing::Span;
use crate::device::{DeviceError, Stream, driver};

/// In the first of the call's own words: the others say what was begun.
pub(in crate::capture) const TIMED: u64 = 2;
/// Where they stand: whether it is timed, device, pair or reason, stream.
const WORDS: std::ops::Range<usize> = 8..13;

thread_local! {
    /// A call on this thread is being timed. What runs inside of it is in its time.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A call whose time is to come.
#[derive(Clone, Copy)]
pub(in crate::capture) struct Timed {
    device: usize,
    span: Span,
}

/// Makes `clock` the one that times of `cuda:index` are asked of, in the place of one that would be opened. For tests.
pub fn install(index: usize, clock: Box<dyn Clock>, pairs: usize) {
    DEVICES.lock().admit_clock(index, Ok(clock), pairs);
}

/// The call's kernel is about to run: times begin, where there may be work for a device.
pub(in crate::capture) fn begin(plan: &OpPlan, call: &mut Call) {
    if INSIDE.with(Cell::get) {
        return;
    }
    let Some(device) = device_of(plan, call) else {
        return;
    };
    call.capture[0] |= TIMED;
    let begun = DEVICES.lock().begin(device);
    let words = match begun {
        Ok(Span { pair, stream }) => [1, device as u64, pair as u64, stream.handle, stream.id],
        Err(reason) => [0, device as u64, reason as u64, 0, 0],
    };
    call.capture[WORDS].copy_from_slice(&words);
    INSIDE.with(|inside| inside.set(true));
}

/// The call's kernel has run: gives its slot, and what is to come. Only for calls that are [`TIMED`].
pub(in crate::capture) fn end(call: &Call) -> (Slot, Option<Timed>) {
    INSIDE.with(|inside| inside.set(false));
    let ended = match begun(call) {
        Ok(timed) => DEVICES.lock().end(timed).map(|()| timed),
        Err(reason) => Err(reason),
    };
    match ended {
        Ok(timed) => (Slot::pending(CALL, When::After), Some(timed)),
        Err(reason) => (Slot::missing(CALL, When::After, reason), None),
    }
}

/// It threw. Only for calls that are [`TIMED`].
pub(in crate::capture) fn abort(call: &Call) {
    INSIDE.with(|inside| inside.set(false));
    if let Ok(timed) = begun(call) {
        written(timed, None);
    }
}

/// The call is this record; `None`: it has none.
pub(in crate::capture) fn written(timed: Timed, record: Option<u64>) {
    let mut devices = DEVICES.lock();
    if let Some(watch) = devices.stopwatch(timed.device) {
        watch.written(timed.span, record);
        if record.is_some() {
            IN_FLIGHT.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What `begin` has said.
fn begun(call: &Call) -> Result<Timed, NotTaken> {
    let [is_timed, device, pair, handle, id] = [8, 9, 10, 11, 12].map(|at| call.capture[at]);
    if is_timed == 0 {
        return Err(measuring::reason(pair));
    }
    Ok(Timed {
        device: device as usize,
        span: Span {
            pair: pair as usize,
            stream: Stream { handle, id },
        },
    })
}

/// The device that the call's work is for: that of its first tensor on one, or the one that it is to make its result on.
fn device_of(plan: &OpPlan, call: &Call) -> Option<usize> {
    let tensors = measuring::tensors(call);
    let index = match tensors.iter().find(|tensor| super::has(tensor)) {
        Some(tensor) => i32::from(tensor.device_index),
        None => match measuring::argument(call, plan.device_argument?)? {
            Value::Device { kind: CUDA, index } if index >= 0 => i32::from(index),
            Value::Device { kind: CUDA, .. } => driver::current_device()?,
            _ => return None,
        },
    };
    usize::try_from(index).ok()
}

impl Devices {
    fn stopwatch(&mut self, index: usize) -> Option<&mut Stopwatch> {
        self.stopwatches.get_mut(index)?.as_mut()?.usable()
    }

    fn begin(&mut self, index: usize) -> Result<Span, NotTaken> {
        if self
            .stopwatches
            .get(index)
            .ok_or(NotTaken::Device)?
            .is_none()
        {
            let clock = i32::try_from(index)
                .map_err(|_| DeviceError("no such device".to_owned()))
                .and_then(|index| driver::EventPairs::open(index, PAIRS))
                .map(|clock| Box::new(clock) as Box<dyn Clock>);
            self.admit_clock(index, clock, PAIRS);
        }
        self.asked(index, Stopwatch::begin)
    }

    fn end(&mut self, timed: Timed) -> Result<(), NotTaken> {
        self.asked(timed.device, |watch| watch.end(timed.span))
    }

    /// Asks a device, and tells where it has just refused.
    fn asked<T>(
        &mut self,
        index: usize,
        ask: impl FnOnce(&mut Stopwatch) -> Result<T, NotTaken>,
    ) -> Result<T, NotTaken> {
        let Some(watch) = self.stopwatch(index) else {
            self.untimed += 1;
            return Err(NotTaken::Device);
        };
        let usable = watch.broken().is_none();
        let answer = ask(watch);
        let why = watch.broken().filter(|_| usable).map(str::to_owned);
        if let Some(why) = why {
            self.tell("gpu_time", index, &serde_json::json!({ "broken": why }));
        }
        answer
    }

    fn admit_clock(
        &mut self,
        index: usize,
        clock: Result<Box<dyn Clock>, DeviceError>,
        pairs: usize,
    ) {
        let (opened, about) = match clock {
            Ok(clock) => {
                let about = serde_json::json!({ "name": clock.name(), "pairs": pairs });
                let watch = Stopwatch::new(clock, pairs);
                (Opened::Usable(Box::new(watch)), about)
            }
            Err(error) => (
                Opened::Unusable,
                serde_json::json!({ "not_taken": error.0 }),
            ),
        };
        if let Some(place) = self.stopwatches.get_mut(index) {
            *place = Some(opened);
        }
        self.tell("gpu_time", index, &about);
    }

    /// Hands out the times that have come. Gives how many are to come.
    pub(super) fn times_arrived(
        &mut self,
        now: bool,
        each: &mut impl FnMut(u64, Vec<LateStatistic>),
    ) -> usize {
        let mut in_flight = 0;
        let mut refused = None;
        for (index, opened) in self.stopwatches.iter_mut().enumerate() {
            let Some(watch) = opened.as_mut().and_then(Opened::usable) else {
                continue;
            };
            let usable = watch.broken().is_none();
            watch.arrived(now, |record, ns| {
                let late = LateStatistic {
                    operand: Operand::Call,
                    when: When::After,
                    binary: None,
                    fields: fields::DEVICE_TIME,
                    values: vec![ns],
                    lost: false,
                };
                each(record, vec![late]);
            });
            if let Some(why) = watch.broken().filter(|_| usable) {
                refused = Some((index, why.to_owned()));
            }
            in_flight += watch.in_flight();
        }
        if let Some((index, why)) = refused {
            self.tell("gpu_time", index, &serde_json::json!({ "broken": why }));
        }
        in_flight
    }
}
