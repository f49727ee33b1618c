//! The monitors of a recording: a thread samples them, and the drain loop writes what it samples into a stream of its own.
//!
//! The thread is apart because a driver may take its time: neither the rings nor the end of the recording wait for it. Samples
//! are taken in rhythm, and besides when a process begins or ends to record, so that also a short run has its energy
//! measured from begin to end.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded, unbounded};
use optape_trace::series::facts;
use optape_trace::{
    Definition, Event, Moment, Role, StreamEnd, StreamId, StreamInfo, TextId, ThreadDef, ThreadId,
    TraceError, TraceWriter,
};
use serde_json::Value;

use super::cost::thread_cpu_ns;
use super::sink::BackgroundSink;
use crate::clock::{monotonic_ns, unix_ns};
use crate::monitor::{LONGEST_SILENCE, MonitorSettings, Monitors, Reading, Rhythm, SourceState};

/// Rounds that may wait for the drain loop. It looks a hundred times a second: these are there for one that hangs.
const WAITING_ROUNDS: usize = 1024;
/// The last sample is waited for at most so long: a driver that hangs must not hold up the end.
const LAST_SAMPLE_PATIENCE: Duration = Duration::from_millis(500);
/// Where only the last minutes are kept: at most so many readings of them, 6 MiB.
const MOST_KEPT: usize = 1 << 18;

enum Control {
    /// A process began to record.
    Begun(u32),
    /// A process ended its recording.
    Ended,
    /// Take a last sample and end.
    Stop,
}

/// What was sampled at one time.
struct Round {
    /// Series that are new: their numbers follow those before.
    series: Vec<String>,
    facts: Vec<(String, Value)>,
    readings: Vec<Reading>,
    /// In the first round alone.
    states: Vec<SourceState>,
    /// Rounds before this one that found no room.
    lost: u64,
    /// Processor time of the thread so far.
    cpu_ns: u64,
}

/// The sampling thread, seen from the drain loop, and the stream that it fills.
pub(super) struct MonitorStream {
    control: Sender<Control>,
    rounds: Receiver<Round>,
    /// Never joined where the driver hangs.
    _thread: JoinHandle<()>,
    asked_for: bool,
    /// CLOCK_MONOTONIC at the stream's time 0, and the wall clock's word for it.
    epoch_ns: u64,
    epoch_unix_ns: u64,
    stream: Option<StreamId>,
    ended: bool,
    texts: u32,
    /// By series: its name, and its text once it has one.
    series: Vec<(String, Option<TextId>)>,
    /// Facts and readings from before there was a stream. Of the readings only the last round's are worth keeping, or those of
    /// the time that is to be kept.
    facts: Vec<(String, Value)>,
    readings: VecDeque<Reading>,
    kept_ns: u64,
    last_ns: u64,
    records: u64,
    lost: u64,
    /// What became of the sources, and how many samples were written.
    pub(super) states: Vec<SourceState>,
    pub(super) samples: u64,
    pub(super) cpu_ns: u64,
}

impl MonitorStream {
    /// `window`: only the last so long is kept, until there is a trace to write it to.
    pub(super) fn start(settings: MonitorSettings, window: Option<Duration>) -> io::Result<Self> {
        let (control, controlled) = unbounded();
        let (sender, rounds) = bounded(WAITING_ROUNDS);
        let asked_for = settings.asked_for;
        let thread = std::thread::Builder::new()
            .name("optape-monitor".into())
            .spawn(move || sample(&settings, &controlled, &sender))?;
        Ok(Self {
            control,
            rounds,
            _thread: thread,
            asked_for,
            epoch_ns: monotonic_ns(),
            epoch_unix_ns: unix_ns(),
            stream: None,
            ended: false,
            texts: 0,
            series: Vec::new(),
            facts: Vec::new(),
            readings: VecDeque::new(),
            kept_ns: window.map_or(0, |length| {
                u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)
            }),
            last_ns: 0,
            records: 0,
            lost: 0,
            states: Vec::new(),
            samples: 0,
            cpu_ns: 0,
        })
    }

    pub(super) fn process_began(&self, process_id: u32) {
        // A thread that is gone has said why by now.
        let _ = self.control.send(Control::Begun(process_id));
    }

    pub(super) fn process_ended(&self) {
        let _ = self.control.send(Control::Ended);
    }

    /// Takes what has arrived, and writes it once there is a trace to write it to (`writer`). Gives the number of records written.
    pub(super) fn look(
        &mut self,
        mut writer: Option<&mut TraceWriter<BackgroundSink>>,
        notice: &dyn Fn(&str),
    ) -> Result<u64, TraceError> {
        let before = self.records;
        if writer.is_some() && self.stream.is_none() {
            self.write(writer.as_deref_mut())?;
        }
        while let Ok(round) = self.rounds.try_recv() {
            self.take(round, notice);
            self.write(writer.as_deref_mut())?;
        }
        Ok(self.records - before)
    }

    /// Takes the last sample and ends the stream.
    pub(super) fn finish(
        &mut self,
        mut writer: Option<&mut TraceWriter<BackgroundSink>>,
        notice: &dyn Fn(&str),
    ) -> Result<u64, TraceError> {
        let before = self.records;
        let _ = self.control.send(Control::Stop);
        let deadline = Instant::now() + LAST_SAMPLE_PATIENCE;
        loop {
            match self.rounds.recv_deadline(deadline) {
                Ok(round) => {
                    self.take(round, notice);
                    self.write(writer.as_deref_mut())?;
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    notice(
                        "a monitor does not answer (a driver that hangs?); its last sample is missing",
                    );
                    break;
                }
            }
        }
        self.write(writer.as_deref_mut())?;
        if let (Some(writer), Some(stream)) = (writer, self.stream)
            && !std::mem::replace(&mut self.ended, true)
        {
            let end = StreamEnd {
                records: self.records,
                dropped_records: self.lost,
                ended_ns: self.last_ns,
                clean: true,
                costs: BTreeMap::from([("monitors.cpu_ns".to_owned(), self.cpu_ns)]),
            };
            writer.end_stream(stream, &end)?;
        }
        Ok(self.records - before)
    }

    fn take(&mut self, round: Round, notice: &dyn Fn(&str)) {
        for state in &round.states {
            if self.asked_for && state.state.is_err() {
                notice(&state.line());
            }
        }
        for (key, value) in &round.facts {
            if key == facts::SIMULATED {
                notice(value.as_str().unwrap_or("monitored values are made up"));
            }
        }
        self.states.extend(round.states);
        self.series
            .extend(round.series.into_iter().map(|name| (name, None)));
        self.facts.extend(round.facts);
        if self.stream.is_none() {
            self.forget_old(&round.readings);
        }
        self.readings.extend(round.readings);
        self.lost += round.lost;
        self.cpu_ns = round.cpu_ns;
    }

    /// Before these readings are added to what waits.
    fn forget_old(&mut self, new: &[Reading]) {
        let newest_ns = new.first().map_or(0, |reading| reading.time_ns);
        let oldest_ns = newest_ns.saturating_sub(self.kept_ns);
        while let Some(reading) = self.readings.front()
            && reading.time_ns < oldest_ns
        {
            self.readings.pop_front();
        }
        let room = MOST_KEPT.saturating_sub(new.len());
        while self.readings.len() > room {
            self.readings.pop_front();
            self.lost += 1;
        }
    }

    fn write(
        &mut self,
        writer: Option<&mut TraceWriter<BackgroundSink>>,
    ) -> Result<(), TraceError> {
        let Some(writer) = writer else { return Ok(()) };
        if self.facts.is_empty() && self.readings.is_empty() {
            return Ok(());
        }
        let stream = match self.stream {
            Some(stream) => stream,
            None => self.begin(writer)?,
        };
        for (key, value) in std::mem::take(&mut self.facts) {
            let key = self.text(stream, &key, writer)?;
            let event = Event::Fact {
                module: None,
                key,
                value: value.to_string(),
            };
            let now = self.epoch_ns + self.last_ns;
            self.record(stream, now, event, writer)?;
        }
        for reading in std::mem::take(&mut self.readings) {
            let Some((name, known)) = self.series.get(reading.series.index()) else {
                continue;
            };
            let series = match known {
                Some(text) => *text,
                None => {
                    let name = name.clone();
                    let text = self.text(stream, &name, writer)?;
                    if let Some((_, known)) = self.series.get_mut(reading.series.index()) {
                        *known = Some(text);
                    }
                    text
                }
            };
            let event = Event::Sample {
                series,
                value: reading.value,
            };
            self.record(stream, reading.time_ns, event, writer)?;
            self.samples += 1;
        }
        Ok(())
    }

    fn begin(&mut self, writer: &mut TraceWriter<BackgroundSink>) -> Result<StreamId, TraceError> {
        let info = StreamInfo {
            process_id: std::process::id(),
            parent_process_id: std::os::unix::process::parent_id(),
            command: vec!["optape".to_owned(), "monitors".to_owned()],
            epoch_unix_ns: self.epoch_unix_ns,
            role: Role::Monitor,
            epoch_monotonic_ns: Some(self.epoch_ns),
            ..StreamInfo::default()
        };
        let stream = writer.begin_stream(&info)?;
        let thread = ThreadDef {
            native_id: u64::from(info.process_id),
            name: "optape-monitor".to_owned(),
        };
        writer.define(stream, &Definition::Thread(ThreadId(0), thread))?;
        self.stream = Some(stream);
        Ok(stream)
    }

    fn text(
        &mut self,
        stream: StreamId,
        text: &str,
        writer: &mut TraceWriter<BackgroundSink>,
    ) -> Result<TextId, TraceError> {
        let id = TextId(self.texts);
        writer.define(stream, &Definition::Text(id, text.to_owned()))?;
        self.texts += 1;
        Ok(id)
    }

    fn record(
        &mut self,
        stream: StreamId,
        at_ns: u64,
        event: Event,
        writer: &mut TraceWriter<BackgroundSink>,
    ) -> Result<(), TraceError> {
        let time_ns = at_ns.saturating_sub(self.epoch_ns);
        self.last_ns = self.last_ns.max(time_ns);
        writer.moment(
            stream,
            &Moment {
                time_ns,
                thread: ThreadId(0),
                event,
            },
        )?;
        self.records += 1;
        Ok(())
    }
}

/// The sampling thread.
fn sample(settings: &MonitorSettings, control: &Receiver<Control>, rounds: &Sender<Round>) {
    let mut monitors = Monitors::open(settings);
    let mut states = monitors.states().to_vec();
    let mut known = 0;
    let mut lost = 0;
    let rhythm = Rhythm::start(settings.interval);
    let mut stop = false;
    loop {
        let samples = monitors.sample();
        let round = Round {
            series: samples.names().get(known..).unwrap_or_default().to_vec(),
            facts: samples.take_facts(),
            readings: samples.readings().to_vec(),
            states: std::mem::take(&mut states),
            lost,
            cpu_ns: thread_cpu_ns(),
        };
        known = samples.names().len();
        let readings = round.readings.len() as u64;
        match rounds.try_send(round) {
            Ok(()) => lost = 0,
            // What is new comes again with the next round that finds room.
            Err(TrySendError::Full(round)) => {
                known -= round.series.len();
                states = round.states;
                for (key, value) in round.facts {
                    samples.fact(key, value);
                }
                lost += readings;
            }
            Err(TrySendError::Disconnected(_)) => return,
        }
        if stop {
            return;
        }
        let mut left = rhythm.until_next(monotonic_ns());
        loop {
            let nap = left.min(LONGEST_SILENCE);
            match control.recv_timeout(nap) {
                Ok(Control::Begun(process_id)) => {
                    monitors.watch(process_id);
                    break;
                }
                Ok(Control::Ended) => break,
                Ok(Control::Stop) | Err(RecvTimeoutError::Disconnected) => {
                    stop = true;
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {
                    left = left.saturating_sub(nap);
                    if left.is_zero() {
                        break;
                    }
                    monitors.keep_up();
                }
            }
        }
    }
}
