//! Work on a GPU: asking its ring about operands (`crate::device`), and turning answers into late statistics; how long it took is in
//! [`gpu_time`].
//!
//! Who records ops of the processor alone comes by here with one look at a byte per operand, and never takes a lock of this module.

pub(super) mod gpu_time;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use optape_trace::needs::Product;
use optape_trace::{DType, LateStatistic, NotTaken, Operand, When, fields};
use parking_lot::Mutex;

use super::measuring::{self, GeometryRoom, OpPlan, PRODUCT, Slot};
use crate::abi::{Call, Tensor};
use crate::device::timing::{PAIRS, Stopwatch, Times};
use crate::device::{
    self, Arrival, CUDA, Clock, Counts, Device, LaunchId, MOST_ITEMS, PLACES, Request, Ring,
};
use crate::statistics::{self, Question, View};

/// How long the end of a recording waits for answers.
const GRACE: Duration = Duration::from_millis(500);
/// Devices of a process.
const MOST_DEVICES: usize = 64;

/// What an answer is for.
#[derive(Clone, Copy)]
struct Asked {
    operands: [(u16, When); MOST_ITEMS],
    product: bool,
    /// Minima and maxima, too.
    extremes: bool,
}

/// What asks a device, once an op had operands on it.
enum Opened<T> {
    Usable(Box<T>),
    /// Nothing can be asked of it.
    Unusable,
}

impl<T> Opened<T> {
    fn usable(&mut self) -> Option<&mut T> {
        match self {
            Self::Usable(asker) => Some(asker),
            Self::Unusable => None,
        }
    }
}

struct Devices {
    opened: [Option<Opened<Ring<Asked>>>; MOST_DEVICES],
    /// With `--gpu-time`.
    stopwatches: [Option<Opened<Stopwatch>>; MOST_DEVICES],
    /// Calls with work for devices that have no stopwatch.
    untimed: u64,
    /// What there is to say about devices, as facts: key and JSON text.
    about: Vec<(String, String)>,
}

static DEVICES: Mutex<Devices> = Mutex::new(Devices {
    opened: [const { None }; MOST_DEVICES],
    stopwatches: [const { None }; MOST_DEVICES],
    untimed: 0,
    about: Vec::new(),
});
/// Launches whose answers were not read, and calls whose times were not.
static IN_FLIGHT: AtomicUsize = AtomicUsize::new(0);
/// There is something new in `about`.
static NEWS: AtomicBool = AtomicBool::new(false);

/// Makes `device` the one that tensors of `cuda:index` are asked of, in the place of one that would be opened. For tests.
pub fn install(index: usize, device: Box<dyn Device>, places: usize) {
    let mut devices = DEVICES.lock();
    devices.admit(index, Ok(device), places);
}

/// Whether the operand is a GPU's.
pub(super) fn has(tensor: &Tensor) -> bool {
    tensor.device_kind == CUDA
}

/// What one side of a call asks of a device.
#[derive(Default)]
pub(super) struct Asking {
    /// Made with the first operand that is worth it.
    open: Option<(Box<Request>, Asked, usize)>,
}

impl Asking {
    /// Adds an operand, of which `has` is true. Gives its slot, pending or with what is known at once.
    pub(super) fn ask(
        &mut self,
        plan: &OpPlan,
        call: &Call,
        operand: u16,
        when: When,
        tensor: &Tensor,
        question: Question,
    ) -> Slot {
        match self.try_ask(plan, call, operand, when, tensor, question) {
            Ok(slot) => slot,
            Err(reason) => Slot::missing(operand, when, reason),
        }
    }

    fn try_ask(
        &mut self,
        plan: &OpPlan,
        call: &Call,
        operand: u16,
        when: When,
        tensor: &Tensor,
        question: Question,
    ) -> Result<Slot, NotTaken> {
        let described = describe(tensor)?;
        let mut room = GeometryRoom::default();
        let factor = when == When::Before
            && plan
                .product
                .is_some_and(|(a, _, kind)| a == tensor.argument && kind == Product::Convolution);
        let geometry = if factor {
            Some(measuring::geometry(plan, call, &mut room).ok_or(NotTaken::Layout)?)
        } else {
            None
        };
        if described.elements() == Some(0) {
            // SAFETY: there are no elements, so nothing is read.
            let view = unsafe {
                View::new(
                    std::ptr::null(),
                    described.dtype,
                    described.sizes,
                    described.strides,
                )
            };
            let found = match &geometry {
                Some(geometry) => statistics::measure_convolution(&view, geometry, question)?,
                None => statistics::ConvolutionAnswer {
                    answer: statistics::measure(&view, question)?,
                    ..statistics::ConvolutionAnswer::default()
                },
            };
            return Ok(measuring::with_fan_out(
                plan.extremes,
                operand,
                when,
                &found.answer,
                question,
                found.fan_out_nonzeros,
                found.fan_out_sum,
            ));
        }
        let index = usize::try_from(tensor.device_index).map_err(|_| NotTaken::Device)?;
        let (request, asked, device) = self.open.get_or_insert_with(|| {
            let asked = Asked {
                operands: [(0, when); MOST_ITEMS],
                product: false,
                extremes: plan.extremes,
            };
            (Box::default(), asked, index)
        });
        if *device != index {
            return Err(NotTaken::Device);
        }
        let at = request.add(&described, question, geometry.as_ref())?;
        asked.operands[at] = (operand, when);
        Ok(Slot::pending(operand, when))
    }

    /// Asks for the sum of the product, where both factors were asked about. Gives its slot.
    pub(super) fn product(&mut self, plan: &OpPlan, call: &Call) -> Option<Slot> {
        let (request, asked, _) = self.open.as_mut()?;
        let (a, b, kind) = plan.product?;
        let tensors = measuring::tensors(call);
        let find = |argument: u32| {
            asked
                .operands
                .iter()
                .take(request.len())
                .position(|(operand, when)| {
                    *when == When::Before
                        && tensors
                            .get(usize::from(*operand))
                            .is_some_and(|t| t.argument == argument)
                })
        };
        let (a, b) = (find(a)?, find(b)?);
        let described = |at: usize| describe(tensors.get(usize::from(asked.operands[at].0))?).ok();
        let (of_a, of_b) = (described(a)?, described(b)?);
        let mut room = GeometryRoom::default();
        let geometry = measuring::geometry(plan, call, &mut room);
        match request.multiply((a, &of_a), (b, &of_b), kind, geometry.as_ref()) {
            Ok(()) => {
                asked.product = true;
                Some(Slot::pending(PRODUCT, When::Before))
            }
            Err(reason) => Some(Slot::missing(PRODUCT, When::Before, reason)),
        }
    }

    /// Launches what was asked. Where that cannot be, the pending ones of `slots` get the reason.
    pub(super) fn send(self, slots: &mut [Slot]) -> Option<LaunchId> {
        let (request, asked, index) = self.open.filter(|(request, ..)| !request.is_empty())?;
        let sent = DEVICES.lock().launch(index, request, asked);
        match sent {
            Ok(id) => Some(id),
            Err(reason) => {
                for slot in slots.iter_mut().filter(|slot| slot.is_pending()) {
                    slot.give_up(reason);
                }
                None
            }
        }
    }
}

/// The tensor as a device sees it.
fn describe(tensor: &Tensor) -> Result<device::Operand<'_>, NotTaken> {
    measuring::is_plain(tensor)?;
    let strided = !tensor.strides.is_null() || tensor.dim == 0;
    let sizes = measuring::sizes(tensor);
    if !strided || (tensor.device_data == 0 && !sizes.contains(&0)) {
        return Err(NotTaken::NoData);
    }
    Ok(device::Operand {
        data: tensor.device_data,
        dtype: DType(tensor.dtype),
        sizes,
        strides: measuring::strides(tensor),
    })
}

impl Devices {
    fn launch(
        &mut self,
        index: usize,
        request: Box<Request>,
        asked: Asked,
    ) -> Result<LaunchId, NotTaken> {
        let place = self.opened.get(index).ok_or(NotTaken::Device)?;
        if place.is_none() {
            let device = i32::try_from(index)
                .map_err(|_| device::DeviceError("no such device".to_owned()))
                .and_then(|index| device::driver::Gpu::open(index, PLACES))
                .map(|gpu| Box::new(gpu) as Box<dyn Device>);
            self.admit(index, device, PLACES);
        }
        let ring = self.opened.get_mut(index).and_then(Option::as_mut);
        let Some(ring) = ring.and_then(Opened::usable) else {
            return Err(NotTaken::Device);
        };
        let usable = ring.broken().is_none();
        match ring.launch(request, asked) {
            Ok(id) => {
                IN_FLIGHT.fetch_add(1, Ordering::Relaxed);
                // Numbers of launches differ between devices in their last digits.
                Ok(id.of_device(index, MOST_DEVICES))
            }
            Err(reason) => {
                if let Some(why) = ring.broken().filter(|_| usable) {
                    let why = why.to_owned();
                    self.tell("statistics", index, &serde_json::json!({ "broken": why }));
                }
                Err(reason)
            }
        }
    }

    fn admit(
        &mut self,
        index: usize,
        device: Result<Box<dyn Device>, device::DeviceError>,
        places: usize,
    ) {
        let (opened, about) = match device {
            Ok(device) => {
                let about = serde_json::json!({
                    "name": device.name(),
                    "taken": ["T1", "T2", "T4"],
                    "not_taken": {
                        "T3": "non-empty rows, columns and outputs are not counted on a GPU",
                        "T5": "patches, rows and sites of convolutions are not counted on a GPU",
                        "T8": "values are not kept of tensors on a GPU",
                    },
                });
                (Opened::Usable(Box::new(Ring::new(device, places))), about)
            }
            Err(error) => (
                Opened::Unusable,
                serde_json::json!({ "not_taken": error.0 }),
            ),
        };
        if let Some(place) = self.opened.get_mut(index) {
            *place = Some(opened);
        }
        self.tell("statistics", index, &about);
    }

    fn tell(&mut self, what: &str, index: usize, about: &serde_json::Value) {
        self.about
            .push((format!("{what}.cuda:{index}"), about.to_string()));
        NEWS.store(true, Ordering::Release);
    }

    fn rings(&mut self) -> impl Iterator<Item = &mut Ring<Asked>> {
        let opened = self.opened.iter_mut().flatten();
        opened.filter_map(Opened::usable)
    }

    fn stopwatches(&mut self) -> impl Iterator<Item = &mut Stopwatch> {
        let opened = self.stopwatches.iter_mut().flatten();
        opened.filter_map(Opened::usable)
    }
}

/// The call of a launch is this record; `None`: it has none, and nobody wants the answer.
pub(super) fn written(id: LaunchId, record: Option<u64>) {
    let (id, index) = id.split(MOST_DEVICES);
    let mut devices = DEVICES.lock();
    let ring = devices.opened.get_mut(index).and_then(Option::as_mut);
    if let Some(ring) = ring.and_then(Opened::usable) {
        ring.written(id, record);
    }
}

/// Whether there may be answers to read, or something to say about devices.
#[inline]
pub(super) fn is_busy() -> bool {
    IN_FLIGHT.load(Ordering::Relaxed) != 0 || NEWS.load(Ordering::Relaxed)
}

/// What there is to say about devices, if anything is new.
pub(super) fn news() -> Vec<(String, String)> {
    if !NEWS.load(Ordering::Acquire) {
        return Vec::new();
    }
    match DEVICES.try_lock() {
        Some(devices) => {
            NEWS.store(false, Ordering::Release);
            devices.about.clone()
        }
        None => Vec::new(),
    }
}

/// Another recording begins, which does not know what was said about devices.
pub(super) fn tell_again() {
    let known = !DEVICES.lock().about.is_empty();
    NEWS.store(known, Ordering::Release);
}

/// The answers that have come: record of the call, and its statistics. Never waits, for a device or for anybody else.
pub(super) fn arrived(mut each: impl FnMut(u64, Vec<LateStatistic>)) {
    if let Some(mut devices) = DEVICES.try_lock() {
        devices.arrived(false, &mut each);
    }
}

impl Devices {
    /// `now`: times are asked for even where they were asked for just before.
    fn arrived(&mut self, now: bool, each: &mut impl FnMut(u64, Vec<LateStatistic>)) {
        let mut in_flight = 0;
        for ring in self.rings() {
            ring.arrived(|arrival| each(arrival.record, late(&arrival)));
            in_flight += ring.in_flight();
        }
        in_flight += self.times_arrived(now, each);
        IN_FLIGHT.store(in_flight, Ordering::Relaxed);
    }
}

/// Of the stream of records that ends: hands out what has come, and counts the rest as lost. Of what is on its way now it takes what
/// comes within [`GRACE`]: of operands memory is looked at, and the device is not asked; of times it is asked whether it has come so far.
pub(super) fn end(mut each: impl FnMut(u64, Vec<LateStatistic>)) -> (Counts, Times) {
    let mut devices = DEVICES.lock();
    let began = Instant::now();
    loop {
        devices.arrived(true, &mut each);
        let awaited = devices.rings().any(|ring| ring.is_awaited())
            || devices.stopwatches().any(|watch| watch.in_flight() > 0);
        if !awaited || began.elapsed() > GRACE {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let untimed = std::mem::take(&mut devices.untimed);
    let untimed = Times {
        calls: untimed,
        refused: untimed,
        ..Times::default()
    };
    let times = devices
        .stopwatches()
        .fold(untimed, |sum, watch| sum.and(watch.finish()));
    let mut sum = Counts::default();
    for ring in devices.rings() {
        let counts = ring.end();
        sum.launches += counts.launches;
        sum.answers += counts.answers;
        sum.full += counts.full;
        sum.capturing += counts.capturing;
        sum.refused += counts.refused;
        sum.lost += counts.lost;
    }
    (sum, times)
}

/// Before a fork: nobody is within this module, so that the child finds it in order.
pub(super) fn before_fork() {
    std::mem::forget(DEVICES.lock());
}

/// Behind it, in both.
pub(super) fn after_fork() {
    // SAFETY: `before_fork` has locked it and forgotten the guard, on this thread.
    unsafe { DEVICES.force_unlock() };
}

/// In a forked child: it has none of its parent's devices, and CUDA cannot be used in it any more.
pub(super) fn forked() {
    let mut devices = DEVICES.lock();
    // Not dropped: nothing of them may be touched here.
    for opened in &mut devices.opened {
        std::mem::forget(opened.replace(Opened::Unusable));
    }
    for opened in &mut devices.stopwatches {
        std::mem::forget(opened.replace(Opened::Unusable));
    }
    devices.about.clear();
    IN_FLIGHT.store(0, Ordering::Relaxed);
}

/// The statistics of an answer.
fn late(arrival: &Arrival<Asked>) -> Vec<LateStatistic> {
    let asked = &arrival.what;
    let operands = asked.operands.iter().take(arrival.request.len());
    let mut values = Vec::with_capacity(MOST_ITEMS + 1);
    for (at, (operand, when)) in operands.enumerate() {
        let Some((found, question)) = arrival.request.read(at, &arrival.found) else {
            continue;
        };
        let slot = measuring::with_fan_out(
            asked.extremes,
            *operand,
            *when,
            &found.answer,
            question,
            found.fan_out_nonzeros,
            found.fan_out_sum,
        );
        values.push(LateStatistic {
            operand: Operand::Tensor(*operand),
            when: *when,
            binary: found.answer.binary,
            fields: slot.fields(),
            values: slot.numbers().to_vec(),
            lost: false,
        });
    }
    if asked.product {
        let sum = arrival.request.product(&arrival.found);
        values.push(LateStatistic {
            operand: Operand::Product,
            when: When::Before,
            binary: None,
            fields: sum.map_or(0, |_| fields::PRODUCT_SUM),
            values: sum.into_iter().collect(),
            lost: false,
        });
    }
    values
}
