//! How long the work of calls takes on a GPU (`--gpu-time`): a pair of events on the stream that it goes to, one before it and one behind it.
//!
//! All pairs are made at the start, and used again and again. Whether the device has come to a pair's second event is asked some calls
//! later, stream by stream in the order in which they were given to it, and nothing waits. When all pairs are on their way, the times of further
//! calls are not taken, and counted.

use std::collections::VecDeque;

use optape_trace::NotTaken;

use super::{DeviceError, Stream, Streams};

/// Pairs of events of a device.
pub const PAIRS: usize = 4096;
/// The device is asked once for so many calls, unless pairs get scarce: to ask is a call of the driver.
const CALLS_PER_LOOK: u32 = 16;
/// Queues of streams that may be empty.
const MOST_IDLE_QUEUES: usize = 32;

/// A device that can say how long its work took.
pub trait Clock: Streams {
    /// In the order of the stream: the work that `pair` is about begins here. What the pair was used for before is forgotten.
    ///
    /// # Errors
    /// Where the device refuses.
    fn begin(&mut self, pair: usize, stream: Stream) -> Result<(), DeviceError>;

    /// It ends here.
    ///
    /// # Errors
    /// Where the device refuses.
    fn end(&mut self, pair: usize, stream: Stream) -> Result<(), DeviceError>;

    /// Nanoseconds from begin to end; `None` while the device has not come so far. Never waits.
    ///
    /// # Errors
    /// Where the device refuses.
    fn elapsed(&mut self, pair: usize) -> Result<Option<u64>, DeviceError>;
}

/// A call whose work is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Which of the pairs.
    pub pair: usize,
    /// The stream that it stands on.
    pub stream: Stream,
}

/// What became of the calls that had work for a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Calls whose times were to be taken.
    pub calls: u64,
    /// Times that were read.
    pub read: u64,
    /// Calls whose times had not come when the stream of records ended, or when the device refused.
    pub lost: u64,
    /// Not taken because no pair was free.
    pub full: u64,
    /// Because the stream was capturing a graph.
    pub capturing: u64,
    /// Because the device refused.
    pub refused: u64,
}

impl Times {
    /// Those of two devices.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            read: self.read + other.read,
            lost: self.lost + other.lost,
            full: self.full + other.full,
            capturing: self.capturing + other.capturing,
            refused: self.refused + other.refused,
        }
    }
}

/// The calls of a stream whose times are to come, in order: pair, record.
struct Queue {
    stream: u64,
    waiting: VecDeque<(usize, u64)>,
}

/// The times of a device.
pub struct Stopwatch {
    clock: Box<dyn Clock>,
    pairs: usize,
    /// The last one given back is the next: those in use stay few.
    free: Vec<usize>,
    queues: Vec<Queue>,
    in_flight: usize,
    /// Calls since the device was asked.
    calls: u32,
    times: Times,
    /// It refused once: nothing more is asked of it.
    broken: Option<String>,
}

impl Stopwatch {
    /// One over so many pairs, which the clock has made.
    #[must_use]
    pub fn new(clock: Box<dyn Clock>, pairs: usize) -> Self {
        Self {
            clock,
            pairs,
            free: (0..pairs).rev().collect(),
            queues: Vec::new(),
            in_flight: 0,
            calls: 0,
            times: Times::default(),
            broken: None,
        }
    }

    /// Times that are still to come.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Why nothing is asked of the device any more.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// What became of everything so far.
    #[must_use]
    pub const fn times(&self) -> Times {
        self.times
    }

    /// A call begins, whose work goes to the calling thread's stream.
    ///
    /// # Errors
    /// Why its time is not taken.
    pub fn begin(&mut self) -> Result<Span, NotTaken> {
        self.times.calls += 1;
        let stream = match self.broken {
            None => self.clock.current_stream(),
            Some(_) => None,
        };
        let Some(stream) = stream else {
            self.times.refused += 1;
            return Err(NotTaken::Device);
        };
        if self.clock.is_capturing(stream) {
            self.times.capturing += 1;
            return Err(NotTaken::Capturing);
        }
        let Some(pair) = self.free.pop() else {
            self.times.full += 1;
            return Err(NotTaken::DeviceFull);
        };
        match self.clock.begin(pair, stream) {
            Ok(()) => Ok(Span { pair, stream }),
            Err(error) => {
                self.free.push(pair);
                Err(self.refused(error))
            }
        }
    }

    /// The work of the call has been given to the device.
    ///
    /// # Errors
    /// Why its time is not taken.
    pub fn end(&mut self, span: Span) -> Result<(), NotTaken> {
        if self.broken.is_some() {
            self.free.push(span.pair);
            self.times.refused += 1;
            return Err(NotTaken::Device);
        }
        self.clock.end(span.pair, span.stream).map_err(|error| {
            self.free.push(span.pair);
            self.refused(error)
        })
    }

    fn refused(&mut self, error: DeviceError) -> NotTaken {
        self.times.refused += 1;
        self.broken = Some(error.0);
        NotTaken::Device
    }

    /// A call that has ended is this record. `None`: it has none (also that of a call whose kernel threw), and nobody wants to know its time.
    pub fn written(&mut self, span: Span, record: Option<u64>) {
        let Some(record) = record else {
            // It may have begun before the stream of records did.
            self.times.calls = self.times.calls.saturating_sub(1);
            self.free.push(span.pair);
            return;
        };
        if self.broken.is_some() {
            self.times.lost += 1;
            self.free.push(span.pair);
            return;
        }
        let stream = span.stream.id;
        let queue = match self.queues.iter().position(|q| q.stream == stream) {
            Some(at) => at,
            None => {
                if self.queues.len() >= MOST_IDLE_QUEUES {
                    self.queues.retain(|queue| !queue.waiting.is_empty());
                }
                self.queues.push(Queue {
                    stream,
                    waiting: VecDeque::new(),
                });
                self.queues.len() - 1
            }
        };
        self.queues[queue].waiting.push_back((span.pair, record));
        self.in_flight += 1;
    }

    /// Hands out the times that have come: record of the call, nanoseconds. Never waits. `now`: also where the device was asked just before.
    pub fn arrived(&mut self, now: bool, mut each: impl FnMut(u64, u64)) {
        self.calls += 1;
        let scarce = self.free.len() < self.pairs / 4;
        if self.in_flight == 0 || !(now || scarce || self.calls >= CALLS_PER_LOOK) {
            return;
        }
        self.calls = 0;
        let mut refused = None;
        'device: for queue in &mut self.queues {
            // What is behind one that has not come has not come either.
            while let Some(&(pair, record)) = queue.waiting.front() {
                match self.clock.elapsed(pair) {
                    Ok(None) => break,
                    Ok(Some(ns)) => {
                        queue.waiting.pop_front();
                        self.free.push(pair);
                        self.in_flight -= 1;
                        self.times.read += 1;
                        each(record, ns);
                    }
                    Err(error) => {
                        refused = Some(error);
                        break 'device;
                    }
                }
            }
        }
        if let Some(error) = refused {
            self.broken = Some(error.0);
            self.give_up();
        }
    }

    /// The stream of records ends: what has not come is lost.
    pub fn finish(&mut self) -> Times {
        self.give_up();
        std::mem::take(&mut self.times)
    }

    /// Events may be recorded again whether they have come or not: no pair stays taken.
    fn give_up(&mut self) {
        for queue in &mut self.queues {
            self.times.lost += queue.waiting.len() as u64;
            self.free
                .extend(queue.waiting.drain(..).map(|(pair, _)| pair));
        }
        self.in_flight = 0;
    }
}
