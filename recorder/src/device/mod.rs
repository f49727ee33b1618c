//! Statistics of tensors on a GPU.
//!
//! A launch on the op's own stream looks at all operands of a call that are asked about, and writes what it found to pinned host memory,
//! with a word behind that says so. The word is polled when the next record is written; nothing ever waits for the device, and no
//! driver call is made to poll: `cuEventQuery` would break a graph that another thread captures. Answers come late, in any order
//! across streams, as `Statistics` records.
//!
//! Places for answers are a ring, made at start-up. When all are in use, statistics are not taken, and counted. The
//! device is a trait: [`driver`] is CUDA's, [`simulated`] is for tests.
//!
//! How long the work of calls took is another question ([`timing`]), which events answer.

pub mod driver;
mod kernels;
pub mod simulated;
pub mod timing;

use std::collections::VecDeque;

use optape_trace::NotTaken;

pub use kernels::{Found, Item, Job, MOST_ITEMS, Operand, Request, Tally};
pub use timing::Clock;

/// `c10::DeviceType::CUDA`.
pub const CUDA: u8 = 1;

/// Places for answers: a training thread runs at most about a thousand launches ahead of its GPU.
pub const PLACES: usize = 4096;
/// Streams that may have launches in flight at one time.
pub const LANES: usize = 8;

/// A stream of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// What launches name it by.
    pub handle: u64,
    /// Never given to another stream, unlike the handle.
    pub id: u64,
}

/// Where the work of a device goes to.
pub trait Streams: Send {
    /// What the device is, for the trace.
    fn name(&self) -> String;

    /// The stream that work of the calling thread goes to now. `None`: it cannot be told.
    fn current_stream(&self) -> Option<Stream>;

    /// Whether work given to the stream now would become part of a graph instead of being done.
    fn is_capturing(&mut self, stream: Stream) -> bool;
}

/// A device that can be asked.
pub trait Device: Streams {
    /// The lane belongs to this stream from now on; launches on it that were in flight are done.
    ///
    /// # Errors
    /// Where the device refuses.
    fn bind(&mut self, lane: usize, stream: Stream) -> Result<(), DeviceError>;

    /// Starts a launch that will answer at `place`, with `ticket` written last. Launches of a lane are done one after the other.
    ///
    /// # Errors
    /// Where the device refuses. Then there will be no answer.
    fn launch(
        &mut self,
        lane: usize,
        stream: Stream,
        place: usize,
        ticket: u32,
        job: &Job,
    ) -> Result<(), DeviceError>;

    /// The answer at `place`, once it is there. Never waits.
    fn poll(&mut self, place: usize, ticket: u32) -> Option<Found>;
}

/// A device refused.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// A launch, from its start until its answer is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaunchId(u64);

impl LaunchId {
    /// As a word that is never 0.
    #[must_use]
    pub const fn to_word(self) -> u64 {
        self.0
    }

    /// One of a device's as one of the process's.
    pub(crate) const fn of_device(self, index: usize, devices: usize) -> Self {
        Self(self.0 * devices as u64 + index as u64)
    }

    /// The other way round: with the device's index.
    pub(crate) const fn split(self, devices: usize) -> (Self, usize) {
        let devices = devices as u64;
        (Self(self.0 / devices), (self.0 % devices) as usize)
    }

    /// From [`LaunchId::to_word`]; `None` for 0.
    #[must_use]
    pub const fn from_word(word: u64) -> Option<Self> {
        if word == 0 { None } else { Some(Self(word)) }
    }
}

/// What happened to statistics, as far as they are on a device's account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Launches.
    pub launches: u64,
    /// Answers that came.
    pub answers: u64,
    /// Calls whose operands were not looked at because no place was free.
    pub full: u64,
    /// Because the stream was capturing a graph.
    pub capturing: u64,
    /// Because the device refused.
    pub refused: u64,
    /// Launches whose answers had not come when the stream of records ended.
    pub lost: u64,
}

/// What goes with a launch: `T` says what the answer is for.
struct Flight<T> {
    id: LaunchId,
    place: usize,
    ticket: u32,
    lane: usize,
    /// `None` once the answer was handed out, or thrown away.
    load: Option<Load<T>>,
    /// Record of the call; `None` while it is not written.
    record: Option<u64>,
    /// The call has no record.
    abandoned: bool,
    /// Came before the record was written.
    found: Option<Box<Found>>,
}

/// What was asked, and what for.
struct Load<T> {
    request: Box<Request>,
    what: T,
}

/// A lane's stream, and how many launches it has in flight.
#[derive(Clone, Copy, Debug, Default)]
struct Lane {
    stream: Option<Stream>,
    in_flight: usize,
}

/// The ring of one device.
pub struct Ring<T> {
    device: Box<dyn Device>,
    free: VecDeque<usize>,
    flights: VecDeque<Flight<T>>,
    lanes: [Lane; LANES],
    next: u64,
    counts: Counts,
    /// It refused once: nothing more is asked of it.
    broken: Option<String>,
}

/// An answer, with what it is for.
pub struct Arrival<T> {
    /// Record of the call.
    pub record: u64,
    /// What was said at the launch.
    pub what: T,
    /// What was asked.
    pub request: Box<Request>,
    /// What was found.
    pub found: Box<Found>,
}

impl<T> Ring<T> {
    /// A ring with so many places, which the device has made.
    #[must_use]
    pub fn new(device: Box<dyn Device>, places: usize) -> Self {
        Self {
            device,
            free: (0..places).collect(),
            flights: VecDeque::with_capacity(places),
            lanes: [Lane::default(); LANES],
            next: 1,
            counts: Counts::default(),
            broken: None,
        }
    }

    /// What became of everything so far.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Launches whose answers are not read.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Whether answers are to come that somebody wants.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.flights
            .iter()
            .any(|f| f.found.is_none() && f.record.is_some())
    }

    /// Why nothing is asked of the device any more.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Launches what is asked, on the calling thread's stream.
    ///
    /// # Errors
    /// Why it is not taken.
    pub fn launch(&mut self, mut request: Box<Request>, what: T) -> Result<LaunchId, NotTaken> {
        if self.broken.is_some() {
            self.counts.refused += 1;
            return Err(NotTaken::Device);
        }
        let Some(stream) = self.device.current_stream() else {
            self.counts.refused += 1;
            return Err(NotTaken::Device);
        };
        if self.device.is_capturing(stream) {
            self.counts.capturing += 1;
            return Err(NotTaken::Capturing);
        }
        let lane = self.lane(stream)?;
        let Some(place) = self.free.pop_front() else {
            self.counts.full += 1;
            return Err(NotTaken::DeviceFull);
        };
        let id = LaunchId(self.next);
        self.next += 1;
        // Never 0, which a fresh place holds, and not what the place held before.
        let ticket = (id.0 as u32) | 1 << 31;
        request.divide();
        if let Err(error) = self
            .device
            .launch(lane, stream, place, ticket, request.job())
        {
            self.free.push_front(place);
            return Err(self.refused(error));
        }
        self.counts.launches += 1;
        self.lanes[lane].in_flight += 1;
        self.flights.push_back(Flight {
            id,
            place,
            ticket,
            lane,
            load: Some(Load { request, what }),
            record: None,
            abandoned: false,
            found: None,
        });
        Ok(id)
    }

    /// The lane of a stream. Where it has none, one without launches in flight becomes its own.
    fn lane(&mut self, stream: Stream) -> Result<usize, NotTaken> {
        if let Some(lane) = self.lanes.iter().position(|l| l.stream == Some(stream)) {
            return Ok(lane);
        }
        let unused = self.lanes.iter().position(|l| l.stream.is_none());
        let idle = || self.lanes.iter().position(|l| l.in_flight == 0);
        let Some(lane) = unused.or_else(idle) else {
            self.counts.full += 1;
            return Err(NotTaken::DeviceFull);
        };
        match self.device.bind(lane, stream) {
            Ok(()) => {
                self.lanes[lane].stream = Some(stream);
                Ok(lane)
            }
            Err(error) => Err(self.refused(error)),
        }
    }

    fn refused(&mut self, error: DeviceError) -> NotTaken {
        self.counts.refused += 1;
        self.broken = Some(error.0);
        NotTaken::Device
    }

    fn flight(&mut self, id: LaunchId) -> Option<&mut Flight<T>> {
        let at = self.flights.binary_search_by_key(&id, |f| f.id).ok()?;
        self.flights.get_mut(at)
    }

    /// The call of a launch is this record; `None`: it has none.
    pub fn written(&mut self, id: LaunchId, record: Option<u64>) {
        if let Some(flight) = self.flight(id) {
            flight.record = record;
            flight.abandoned = record.is_none();
        }
    }

    /// Hands out the answers that have come, those of calls without a record left out. Never waits.
    pub fn arrived(&mut self, mut each: impl FnMut(Arrival<T>)) {
        // A lane's answers come in order: behind one that is not there yet none of its others is looked for.
        let mut waiting = [false; LANES];
        let mut flying = self.lanes.iter().filter(|l| l.in_flight > 0).count();
        for flight in &mut self.flights {
            if flying == 0 && flight.found.is_none() {
                // Neither this one nor, on any lane, one behind it can have come.
                break;
            }
            if flight.load.is_none() {
                continue;
            }
            if flight.found.is_none() && !waiting[flight.lane] {
                match self.device.poll(flight.place, flight.ticket) {
                    Some(found) => {
                        flight.found = Some(Box::new(found));
                        self.counts.answers += 1;
                        self.free.push_back(flight.place);
                        let lane = &mut self.lanes[flight.lane];
                        lane.in_flight -= 1;
                        flying -= usize::from(lane.in_flight == 0);
                    }
                    None => {
                        waiting[flight.lane] = true;
                        flying -= 1;
                    }
                }
            }
            if flight.found.is_none() || (flight.record.is_none() && !flight.abandoned) {
                continue;
            }
            if let (Some(record), Some(found), Some(load)) =
                (flight.record, flight.found.take(), flight.load.take())
            {
                each(Arrival {
                    record,
                    what: load.what,
                    request: load.request,
                    found,
                });
            }
            flight.load = None;
        }
        while self.flights.front().is_some_and(|f| f.load.is_none()) {
            self.flights.pop_front();
        }
    }

    /// The stream of records ends: what has not come is lost. Places of launches that the device may still write to stay taken until it has.
    pub fn end(&mut self) -> Counts {
        for flight in &mut self.flights {
            if flight.found.is_none() && flight.record.is_some() {
                self.counts.lost += 1;
            }
            flight.record = None;
            flight.abandoned = true;
        }
        std::mem::take(&mut self.counts)
    }
}

#[cfg(test)]
mod tests;
