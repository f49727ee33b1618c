//! A device for tests: its answers come late, in any order across streams, and may never come.
//!
//! What it answers is worked out at the launch, by whatever the test gives it; when it can be polled follows from a clock that the
//! test moves.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Clock, Device, DeviceError, Found, Job, LANES, Stream, Streams};

/// What it has been told to be and to do.
#[derive(Debug, Default)]
pub struct Script {
    /// The stream of the thread that launches next.
    pub stream: u64,
    /// Streams that capture.
    pub capturing: Vec<u64>,
    /// Answers come only to as many polls of the clock later.
    pub delay: u64,
    /// No answers of these streams come any more.
    pub stuck: Vec<u64>,
    /// The next launch is refused.
    pub refuses: bool,
    /// The clock.
    pub now: u64,
    /// Launches that were made.
    pub launches: u64,
    /// Launches, or events, that were polled.
    pub polls: u64,
    /// The device's own clock, nanoseconds.
    pub device_ns: u64,
}

type Worker = Box<dyn Fn(&Job) -> Found + Send>;

/// The device.
pub struct Simulated {
    script: Arc<Mutex<Script>>,
    worker: Worker,
    lanes: [Option<u64>; LANES],
    /// By lane, in order: place, ticket, when it is done.
    queues: [VecDeque<(usize, u32, u64)>; LANES],
    answers: HashMap<usize, (u32, Found)>,
}

impl Simulated {
    /// A device that answers what `worker` works out, when `script` says.
    pub fn new(
        script: Arc<Mutex<Script>>,
        worker: impl Fn(&Job) -> Found + Send + 'static,
    ) -> Self {
        Self {
            script,
            worker: Box::new(worker),
            lanes: [None; LANES],
            queues: Default::default(),
            answers: HashMap::new(),
        }
    }
}

/// Both do what the same script says.
macro_rules! streams_of_script {
    ($($kind:ty),*) => {
        $(impl Streams for $kind {
            fn name(&self) -> String {
                "simulated".to_owned()
            }

            fn current_stream(&self) -> Option<Stream> {
                let handle = self.script.lock().stream;
                Some(Stream { handle, id: handle })
            }

            fn is_capturing(&mut self, stream: Stream) -> bool {
                self.script.lock().capturing.contains(&stream.handle)
            }
        })*
    };
}

streams_of_script!(Simulated, SimulatedClock);

/// The clock of such a device. What it says is what the test moved `device_ns` by between an op's begin and its end.
pub struct SimulatedClock {
    script: Arc<Mutex<Script>>,
    /// By pair: the stream, when it began, when it ended, and when that may be known.
    pairs: HashMap<usize, Pair>,
}

#[derive(Clone, Copy)]
struct Pair {
    stream: u64,
    began_ns: u64,
    ended: Option<(u64, u64)>,
}

impl SimulatedClock {
    /// A clock that goes as `script` says.
    #[must_use]
    pub fn new(script: Arc<Mutex<Script>>) -> Self {
        Self {
            script,
            pairs: HashMap::new(),
        }
    }
}

impl Clock for SimulatedClock {
    fn begin(&mut self, pair: usize, stream: Stream) -> Result<(), DeviceError> {
        let script = self.script.lock();
        if script.refuses {
            return Err(DeviceError("refused".to_owned()));
        }
        let begun = Pair {
            stream: stream.id,
            began_ns: script.device_ns,
            ended: None,
        };
        self.pairs.insert(pair, begun);
        Ok(())
    }

    fn end(&mut self, pair: usize, stream: Stream) -> Result<(), DeviceError> {
        let script = self.script.lock();
        let due = if script.stuck.contains(&stream.handle) {
            u64::MAX
        } else {
            script.now + script.delay
        };
        match self.pairs.get_mut(&pair).filter(|p| p.stream == stream.id) {
            Some(pair) if !script.refuses => {
                pair.ended = Some((script.device_ns, due));
                Ok(())
            }
            _ => Err(DeviceError("refused".to_owned())),
        }
    }

    fn elapsed(&mut self, pair: usize) -> Result<Option<u64>, DeviceError> {
        let mut script = self.script.lock();
        script.polls += 1;
        let pair = self.pairs.get(&pair);
        let Some((pair, (ended_ns, due))) = pair.and_then(|p| Some((p, p.ended?))) else {
            return Err(DeviceError("the pair has not ended".to_owned()));
        };
        Ok((due <= script.now).then(|| ended_ns - pair.began_ns))
    }
}

impl Device for Simulated {
    fn bind(&mut self, lane: usize, stream: Stream) -> Result<(), DeviceError> {
        if !self.queues[lane].is_empty() {
            return Err(DeviceError("the lane has launches in flight".to_owned()));
        }
        self.lanes[lane] = Some(stream.id);
        Ok(())
    }

    fn launch(
        &mut self,
        lane: usize,
        stream: Stream,
        place: usize,
        ticket: u32,
        job: &Job,
    ) -> Result<(), DeviceError> {
        let mut script = self.script.lock();
        if script.refuses || self.lanes[lane] != Some(stream.id) {
            return Err(DeviceError("refused".to_owned()));
        }
        script.launches += 1;
        let due = if script.stuck.contains(&stream.handle) {
            u64::MAX
        } else {
            script.now + script.delay
        };
        self.queues[lane].push_back((place, ticket, due));
        self.answers.insert(place, (ticket, (self.worker)(job)));
        Ok(())
    }

    fn poll(&mut self, place: usize, ticket: u32) -> Option<Found> {
        let mut script = self.script.lock();
        script.polls += 1;
        let queue = self
            .queues
            .iter_mut()
            .find(|q| q.iter().any(|(p, t, _)| (*p, *t) == (place, ticket)))?;
        // A stream's launches are done in order: all up to this one.
        let at = queue
            .iter()
            .position(|(p, t, _)| (*p, *t) == (place, ticket))?;
        if queue
            .iter()
            .take(at + 1)
            .any(|(_, _, due)| *due > script.now)
        {
            return None;
        }
        queue.remove(at);
        let (known, found) = self.answers.remove(&place)?;
        (known == ticket).then_some(found)
    }
}
