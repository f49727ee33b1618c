//! The daemon over fake processes: threads of this one, and children that run a test function of this binary.

mod fake;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use optape_trace::{
    Definition, DropReason, Event, LateStatistic, Moment, Operand, Ordinal, Pattern, PatternEntry,
    PatternId, Record, SignatureId, State, Stream, ThreadId, Trace, TraceEnd, When, codec, fields,
};

use super::run_directory::RunDirectory;
use super::sink::BackgroundSink;
use super::*;
use crate::ring;
use fake::Fake;

const RING: usize = 1 << 20;

fn quiet() -> Notice {
    Box::new(|_| {})
}

/// What was told, for tests to look at.
fn heard() -> (Notice, Arc<Mutex<Vec<String>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let notice = Arc::clone(&heard);
    (
        Box::new(move |text: &str| notice.lock().unwrap().push(text.to_owned())),
        heard,
    )
}

fn options(notice: Notice) -> InProcess {
    InProcess {
        settings: Settings {
            ring_bytes: RING,
            ..Settings::default()
        },
        force: false,
        notice,
    }
}

fn recording(directory: &Path) -> (Recording, PathBuf) {
    let path = directory.join("t.optape");
    (
        Recording::in_process(&path, options(quiet())).unwrap(),
        path,
    )
}

fn calls(trace: &Trace, stream: &Stream) -> Vec<u64> {
    let starts = trace
        .records(stream.id())
        .filter_map(|record| match record.unwrap().1 {
            Record::OpCall(call) => Some(call.start_ns),
            _ => None,
        });
    starts.collect()
}

fn events(trace: &Trace, stream: &Stream) -> Vec<Event> {
    trace
        .moments(stream.id())
        .unwrap()
        .into_iter()
        .map(|(_, moment)| moment.event)
        .collect()
}

/// Starts `function` of this test binary in a process of its own, with the run directory and one more path.
fn child(function: &str, run: &Path, extra: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("daemon::tests::{function}"),
            "--nocapture",
            "--test-threads=1",
        ])
        .env("OPTAPE_TEST_RUN", run)
        .env("OPTAPE_TEST_EXTRA", extra)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Where a child is to work; `None` in the test run itself.
fn child_paths() -> Option<(PathBuf, PathBuf)> {
    Some((
        std::env::var_os("OPTAPE_TEST_RUN")?.into(),
        std::env::var_os("OPTAPE_TEST_EXTRA")?.into(),
    ))
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_thread_records_its_own_process() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let run_directory = recording.directory().to_owned();
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    for n in 0..50_000 {
        assert!(fake.call(u32::from(n % 10 == 9)));
        if n % 1000 == 999 {
            fake.step(n / 1000);
        }
    }
    fake.end();
    let report = recording.finish();
    assert!(!run_directory.exists());
    assert_eq!(report.path.as_deref(), Some(path.as_path()));
    assert_eq!(report.failure, None);
    assert_eq!(
        (
            report.op_calls(),
            report.dropped_records(),
            report.streams.len()
        ),
        (50_000, 0, 1)
    );
    let stream = &report.streams[0];
    assert_eq!(
        (stream.records, stream.unattributed, stream.clean),
        (50_050, 5000, true)
    );
    assert_eq!(stream.costs["capture.time_ns"], 300 * 50_000);
    assert_eq!(report.bytes, std::fs::metadata(&path).unwrap().len());
    assert!(report.daemon_cpu_ns > 0);

    let trace = Trace::open(&path).unwrap();
    assert!(
        matches!(trace.end(), TraceEnd::Clean(_)),
        "{:?}",
        trace.end()
    );
    assert_eq!(trace.run().statistics, "rules");
    assert_eq!(trace.run().facts["capture.ring_bytes"], RING.to_string());
    let [stream] = trace.streams() else {
        panic!("{} streams", trace.streams().len())
    };
    assert_eq!(
        calls(&trace, stream),
        (0..50_000).map(|n| 1000 * n).collect::<Vec<_>>()
    );
    assert_eq!(events(&trace, stream).len(), 50);
    assert!(stream.end().unwrap().clean);
}

#[test]
fn what_arrived_is_in_the_file_soon() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    for round in 1..4 {
        for _ in 0..100 {
            assert!(fake.call(0));
        }
        let sent = Instant::now();
        wait_until("the file has the calls", || {
            Trace::open(&path).is_ok_and(|t| {
                t.streams()
                    .first()
                    .is_some_and(|s| s.records() >= 100 * round)
            })
        });
        assert!(
            sent.elapsed() < Duration::from_secs(1),
            "took {:?}",
            sent.elapsed()
        );
    }
    fake.end();
    assert_eq!(recording.finish().op_calls(), 300);
}

#[test]
fn nothing_recorded_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    std::fs::write(
        recording.directory().join("attach-error-7.txt"),
        "no torch\n",
    )
    .unwrap();
    std::fs::write(
        recording.directory().join("attach-error-8.txt"),
        "no torch\n",
    )
    .unwrap();
    std::fs::write(recording.directory().join("attached-9"), "").unwrap();
    let report = recording.finish();
    assert_eq!((report.path.as_ref(), report.attached), (None, 1));
    assert_eq!(report.attach_errors, [("no torch".to_owned(), 2)].into());
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    drop(
        Recording::in_process(
            &path,
            InProcess {
                force: true,
                ..options(quiet())
            },
        )
        .unwrap(),
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_dropped_recording_completes_its_file() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    assert!(fake.call(0));
    drop(recording);
    let trace = Trace::open(&path).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    assert!(
        !trace.streams()[0].end().unwrap().clean,
        "the process had not said goodbye"
    );
}

/// In a process of its own: records until it is killed, and notes after each call how many there were.
#[test]
fn child_that_records_until_it_is_killed() {
    let Some((run, noted)) = child_paths() else {
        return;
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(noted)
        .unwrap();
    // SAFETY: a file of this test, which nobody cuts while it is mapped.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    let mut fake = Fake::begin(&run, RING, OnFull::Wait);
    loop {
        if fake.call(0) {
            map[..8].copy_from_slice(&fake.calls.to_le_bytes());
        }
    }
}

#[test]
fn killed_processes_lose_no_committed_record() {
    const ROUNDS: u64 = 25;
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let mut noted = std::collections::BTreeMap::new();
    for round in 0..ROUNDS {
        let note = directory.path().join(format!("note-{round}"));
        std::fs::write(&note, [0; 8]).unwrap();
        let read = || u64::from_le_bytes(std::fs::read(&note).unwrap().try_into().unwrap());
        let mut child = child(
            "child_that_records_until_it_is_killed",
            recording.directory(),
            &note,
        );
        wait_until("the child records", || read() > 0);
        // Different moments of the ring's, the daemon's and the flush's cycles.
        thread::sleep(Duration::from_micros((round * 7919) % 40_000));
        child.kill().unwrap();
        child.wait().unwrap();
        noted.insert(child.id(), read());
    }
    let report = recording.finish();
    assert_eq!(report.streams.len(), noted.len());
    let trace = Trace::open(&path).unwrap();
    for stream in trace.streams() {
        let starts = calls(&trace, stream);
        let least = noted[&stream.info().process_id];
        assert!(
            starts.len() as u64 >= least,
            "{} of {least} calls",
            starts.len()
        );
        assert!(
            starts
                .iter()
                .enumerate()
                .all(|(n, &start)| start == 1000 * n as u64),
            "in order, none missing"
        );
        assert!(!stream.end().unwrap().clean);
    }
}

/// In a process of its own: a daemon, which says where its rings go.
#[test]
fn child_that_is_a_daemon() {
    let Some((path, said)) = child_paths() else {
        return;
    };
    let recording = Recording::in_process(&path, options(quiet())).unwrap();
    std::fs::write(
        said.with_extension("new"),
        recording.directory().to_str().unwrap(),
    )
    .unwrap();
    std::fs::rename(said.with_extension("new"), &said).unwrap();
    wait_until("somebody kills this", || {
        // Records of the daemon's own, which no ring counts.
        let (reply, _answer) = bounded(1);
        let text = "alive".to_owned();
        let orders = recording.orders.as_ref().unwrap();
        orders.send(Order::Mark { text, reply }).unwrap();
        false
    });
}

#[test]
fn a_stopped_or_killed_daemon_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let said = directory.path().join("said");
    let path = directory.path().join("t.optape");
    let mut daemon = child("child_that_is_a_daemon", &path, &said);
    wait_until("the daemon says where", || said.exists());
    let run = PathBuf::from(std::fs::read_to_string(&said).unwrap());
    let signal = |signal| {
        rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), signal).unwrap()
    };

    let mut fake = Fake::begin(&run, RING, OnFull::Wait);
    let fill = |fake: &mut Fake| {
        let began = Instant::now();
        while fake.call(0) {}
        for _ in 0..10_000 {
            assert!(!fake.call(0));
        }
        began.elapsed()
    };
    assert!(fake.call(0));
    wait_until("the daemon follows", || {
        Trace::open(&path).is_ok_and(|t| t.streams().first().is_some_and(|s| s.records() > 0))
    });
    signal(rustix::process::Signal::STOP);
    // 100 ms until the silence is noticed, and what a busy machine adds.
    let stopped = fill(&mut fake);
    signal(rustix::process::Signal::CONT);
    wait_until("there is room again", || fake.call(0));
    signal(rustix::process::Signal::KILL);
    let killed = fill(&mut fake);
    daemon.wait().unwrap();
    assert!(stopped < Duration::from_millis(400), "stopped: {stopped:?}");
    assert!(killed < Duration::from_millis(400), "killed: {killed:?}");
    std::fs::remove_dir_all(run).unwrap();
    // What the daemon wrote is whole.
    assert!(matches!(
        Trace::open(&path).unwrap().end(),
        TraceEnd::Unfinished { .. }
    ));
}

/// The daemon is killed while it is busy, the process goes on: the recovered file has every call that found room, in order, and every
/// other one is counted.
#[test]
fn what_a_killed_daemon_left_in_the_ring_is_recovered() {
    for (round, ring_bytes) in [RING, RING, RING, RING, 1 << 16, 1 << 16, 1 << 16]
        .into_iter()
        .enumerate()
    {
        let directory = tempfile::tempdir().unwrap();
        let said = directory.path().join("said");
        let path = directory.path().join("t.optape");
        let mut daemon = Some(child("child_that_is_a_daemon", &path, &said));
        wait_until("the daemon says where", || said.exists());
        let run = PathBuf::from(std::fs::read_to_string(&said).unwrap());
        let mut fake = Fake::begin(&run, ring_bytes, OnFull::Drop);
        // Before its first flush the file has no head, and says nothing of the run.
        assert!(fake.call(0));
        wait_until("the file has the call", || {
            Trace::open(&path).is_ok_and(|t| t.streams().first().is_some_and(|s| s.records() > 0))
        });
        let began = Instant::now();
        let mut refused = 0;
        let mut taken = vec![0];
        while daemon.is_some() || fake.calls < 400_000 {
            match fake.call(0) {
                true => taken.push(1000 * (fake.calls - 1)),
                false => refused += 1,
            }
            // Within a flush, between two, behind several.
            let due = Duration::from_millis(30 + 70 * round as u64);
            if began.elapsed() > due
                && let Some(mut daemon) = daemon.take()
            {
                daemon.kill().unwrap();
                daemon.wait().unwrap();
            }
            if fake.calls.is_multiple_of(256) {
                thread::sleep(Duration::from_micros(300));
            }
        }
        let (bytes, recovery, found) = salvage(&path, Vec::new(), None).unwrap();
        assert_eq!(found.directory.as_deref(), Some(run.as_path()));
        let [ring] = &found.rings[..] else {
            panic!("{found:?}")
        };
        assert_eq!((ring.fault.as_ref(), ring.still_running), (None, true));
        assert_eq!(
            optape_trace::verify_bytes(bytes.clone()).unwrap().findings,
            []
        );
        let trace = Trace::from_bytes(bytes).unwrap();
        let stream = &trace.streams()[0];
        let saved = calls(&trace, stream);
        // Where the daemon was too slow for a small ring, freed room may not have reached the file: it is among the lost.
        let freed = taken.len() - saved.len();
        if ring_bytes == RING {
            assert_eq!(freed, 0, "round {round}: {found:?}");
            assert_eq!(saved, taken, "round {round}");
        }
        assert!(saved.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(ring.lost, refused + freed as u64, "round {round}");
        assert_eq!(recovery.lost, ring.lost);
        assert_eq!(stream.dropped_records(), ring.lost, "round {round}");
        assert_eq!(saved.len() as u64 + ring.lost, fake.calls);
        std::fs::remove_dir_all(run).unwrap();
    }
}

/// Statistics name their call by its number in the ring; those that come after the daemon's death, too.
#[test]
fn late_statistics_find_their_calls_behind_a_dead_daemon() {
    const BEHIND: usize = 50;
    let directory = tempfile::tempdir().unwrap();
    let said = directory.path().join("said");
    let path = directory.path().join("t.optape");
    let mut daemon = child("child_that_is_a_daemon", &path, &said);
    wait_until("the daemon says where", || said.exists());
    let run = PathBuf::from(std::fs::read_to_string(&said).unwrap());
    let mut fake = Fake::begin(&run, RING, OnFull::Drop);
    let entry = PatternEntry {
        operand: Operand::Product,
        when: When::Before,
        state: State::Pending,
        binary: None,
        fields: 0,
    };
    let pending = Pattern {
        entries: vec![entry],
    };
    fake.define(&Definition::Pattern(PatternId(1), pending));
    assert!(fake.call(0));
    wait_until("the file has the call", || {
        Trace::open(&path).is_ok_and(|t| t.streams().first().is_some_and(|s| s.records() > 0))
    });
    let (mut records, mut calls) = (1, 0u64);
    let mut waiting = std::collections::VecDeque::new();
    let mut go_on = |ring: &mut ring::Producer, count: usize| {
        for _ in 0..count {
            calls += 1;
            let call = ring::OpCallMessage {
                signature: 0,
                pattern: 1,
                thread: 0,
                start_ns: calls,
                duration_ns: 0,
                sequence_number: -1,
                payload: &[],
                storages: &[],
                tensors: &[],
                statistics: &[],
            };
            assert!(call.push(ring));
            waiting.push_back((records, calls));
            records += 1;
            if waiting.len() > BEHIND
                && let Some((call, value)) = waiting.pop_front()
            {
                let late = LateStatistic {
                    operand: Operand::Product,
                    when: When::Before,
                    binary: None,
                    fields: fields::PRODUCT_SUM,
                    values: vec![value],
                    lost: false,
                };
                let moment = Moment {
                    time_ns: value,
                    thread: ThreadId(0),
                    event: Event::Statistics {
                        call: Ordinal(call),
                        values: vec![late],
                    },
                };
                let bytes = codec::encode(&moment).unwrap();
                assert!(ring.push_bytes(ring::MessageKind::Moment, &bytes));
                records += 1;
            }
        }
        calls
    };
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(400) {
        go_on(&mut fake.ring, 4);
        thread::sleep(Duration::from_millis(1));
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let calls = go_on(&mut fake.ring, 1000);
    let (bytes, _, found) = salvage(&path, Vec::new(), None).unwrap();
    let [ring] = &found.rings[..] else {
        panic!("{found:?}")
    };
    assert_eq!((ring.fault.as_ref(), ring.lost), (None, 0));
    // Some before, some behind what the file had.
    assert!(ring.appended > 1000 && ring.appended < records, "{found:?}");
    let verification = optape_trace::verify_bytes(bytes.clone()).unwrap();
    assert_eq!(verification.findings, []);
    let trace = Trace::from_bytes(bytes).unwrap();
    let stream = &trace.streams()[0];
    let mut seen = 0;
    for record in trace.records(stream.id()) {
        let (_, Record::OpCall(call)) = record.unwrap() else {
            continue;
        };
        let state = stream
            .dictionary()
            .pattern(call.pattern)
            .unwrap()
            .entries
            .first()
            .map(|e| e.state);
        if call.start_ns == 0 || call.start_ns > calls - BEHIND as u64 {
            assert_ne!(state, Some(State::Present));
            continue;
        }
        assert_eq!(
            (state, &call.statistics[..]),
            (Some(State::Present), &[call.start_ns][..])
        );
        seen += 1;
    }
    assert_eq!(seen, calls - BEHIND as u64);
    std::fs::remove_dir_all(run).unwrap();
}

#[test]
fn rings_of_a_living_daemon_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    assert!(fake.call(0));
    wait_until("the file has the call", || {
        Trace::open(&path).is_ok_and(|t| t.streams().first().is_some_and(|s| s.records() > 0))
    });
    let (_, recovery, found) = salvage(&path, Vec::new(), None).unwrap();
    assert_eq!(recovery.records, 1);
    assert_eq!(found.daemon, Some(std::process::id().to_string()));
    assert!(found.rings.is_empty());
    fake.end();
    assert_eq!(recording.finish().op_calls(), 1);
    let (_, recovery, found) = salvage(&path, Vec::new(), None).unwrap();
    assert!(recovery.finished);
    assert_eq!(found, Salvage::default());
}

/// A disk that is full after some bytes, and slow.
struct Disk {
    left: usize,
    delay: Duration,
    got: Arc<Mutex<Vec<u8>>>,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        thread::sleep(self.delay);
        let n = bytes.len().min(self.left);
        if n == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.left -= n;
        self.got.lock().unwrap().extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn recording_on(disk: Disk, notice: Notice) -> Recording {
    let directory = RunDirectory::create(&|_| {}).unwrap();
    let setting = Setting {
        monitors: None,
        ring_bytes: RING,
        own_process: false,
        window: None,
    };
    Recording::start_with(directory, disk, &RunInfo::default(), setting, notice).unwrap()
}

#[test]
fn a_full_disk_is_told_once_and_the_program_goes_on() {
    let got = Arc::default();
    let (notice, heard) = heard();
    let recording = recording_on(
        Disk {
            left: 20_000,
            delay: Duration::ZERO,
            got: Arc::clone(&got),
        },
        notice,
    );
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    let mut longest = Duration::ZERO;
    for _ in 0..40 {
        for _ in 0..5000 {
            let began = Instant::now();
            assert!(fake.call(0), "the ring is drained, also without a disk");
            longest = longest.max(began.elapsed());
        }
        thread::sleep(Duration::from_millis(10));
    }
    fake.end();
    let report = recording.finish();
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    assert_eq!(report.op_calls(), 200_000);
    assert!(
        report.failure.as_ref().unwrap().contains("No space left"),
        "{report:?}"
    );
    let heard = heard.lock().unwrap();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(heard[0].contains("No space left") && heard[0].contains("goes on"));
    // What was written before is readable, and the count of what is missing is right.
    let trace = Trace::from_bytes(got.lock().unwrap().clone()).unwrap();
    let starts = calls(&trace, &trace.streams()[0]);
    assert!(!starts.is_empty());
    let safe = 200_000 - report.unwritten_records;
    assert!(
        starts.len() as u64 >= safe,
        "{} in the file, {safe} promised",
        starts.len()
    );
    assert!(
        safe > 0
            && report
                .complaints()
                .iter()
                .any(|line| line.contains("records are lost"))
    );
}

#[test]
fn a_slow_disk_does_not_look_like_death() {
    let got = Arc::default();
    let recording = recording_on(
        Disk {
            left: usize::MAX,
            delay: Duration::from_millis(300),
            got: Arc::clone(&got),
        },
        quiet(),
    );
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    for _ in 0..20 {
        for _ in 0..2000 {
            assert!(fake.call(0));
        }
        thread::sleep(Duration::from_millis(25));
        assert!(!fake.ring.consumer_silent());
    }
    fake.end();
    let report = recording.finish();
    assert_eq!(
        (report.op_calls(), report.dropped_records(), report.failure),
        (40_000, 0, None)
    );
    let trace = Trace::from_bytes(got.lock().unwrap().clone()).unwrap();
    assert_eq!(trace.streams()[0].records(), 40_000);
}

#[test]
fn nonsense_ends_its_own_stream_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("t.optape");
    let (notice, heard) = heard();
    let recording = Recording::in_process(&path, options(notice)).unwrap();
    let mut good = Fake::begin(recording.directory(), RING, OnFull::Wait);
    let mut undefined = Fake::begin(recording.directory(), RING, OnFull::Wait);
    let mut garbled = Fake::begin(recording.directory(), RING, OnFull::Wait);
    std::fs::write(recording.directory().join("ring-1-0"), "no ring").unwrap();
    for n in 0..1000 {
        assert!(good.call(0));
        undefined.call(if n == 10 { 99 } else { 0 });
        if n == 20 {
            garbled
                .ring
                .push_bytes(ring::MessageKind::Definition, &[0xff; 40]);
        }
        garbled.call(0);
    }
    good.end();
    wait_until("both are told", || heard.lock().unwrap().len() >= 3);
    let report = recording.finish();
    assert_eq!(report.bad_rings.len(), 1, "{:?}", report.bad_rings);
    assert_eq!(
        report
            .streams
            .iter()
            .filter(|s| s.disabled.is_some())
            .count(),
        2
    );

    let trace = Trace::open(&path).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    let mut ends: Vec<_> = trace
        .streams()
        .iter()
        .map(|s| (calls(&trace, s).len(), events(&trace, s)))
        .collect();
    ends.sort_by_key(|(calls, _)| *calls);
    let reasons: Vec<_> = ends
        .iter()
        .map(|(calls, events)| {
            (
                *calls,
                matches!(events.last(), Some(Event::Disabled { .. })),
            )
        })
        .collect();
    assert_eq!(reasons, [(10, true), (20, true), (1000, false)]);
    assert!(
        matches!(&ends[0].1[0], Event::Disabled { reason } if reason.contains("signature 99")),
        "{:?}",
        ends[0].1
    );
}

/// In a process of its own: fills a ring that is not waited for, and dies without a word.
#[test]
fn child_that_drops_records() {
    let Some((run, done)) = child_paths() else {
        return;
    };
    let mut fake = Fake::begin(&run, 1 << 16, OnFull::Drop);
    // More than the daemon can drain meanwhile; then it is killed before a `Drop` record can be written.
    for _ in 0..200_000 {
        fake.call(0);
    }
    // The last one is among the lost.
    while fake.call(0) {}
    std::fs::write(done, fake.calls.to_string()).unwrap();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
        .unwrap();
}

#[test]
fn drops_of_the_dead_are_told_in_their_place() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let done = directory.path().join("done");
    let mut child = child("child_that_drops_records", recording.directory(), &done);
    child.wait().unwrap();
    let made: u64 = std::fs::read_to_string(done).unwrap().parse().unwrap();
    let report = recording.finish();
    let trace = Trace::open(&path).unwrap();
    let [stream] = trace.streams() else {
        panic!("{} streams", trace.streams().len())
    };
    let there = calls(&trace, stream).len() as u64;
    let events = events(&trace, stream);
    let Some(Event::Drop {
        records,
        from_ns,
        until_ns,
        reason,
    }) = events.last()
    else {
        panic!("{events:?}")
    };
    assert_eq!(
        there + records,
        made,
        "every call is in the file or counted as lost"
    );
    assert!(*records > 0 && from_ns < until_ns && *until_ns == 1000 * (made - 1));
    assert!(matches!(
        reason,
        DropReason::RingFull | DropReason::DaemonGone
    ));
    assert_eq!(
        (
            report.dropped_records(),
            stream.end().unwrap().dropped_records
        ),
        (*records, *records)
    );
}

#[test]
fn definitions_may_come_at_any_time_but_not_twice_different() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    assert!(fake.call(0));
    for n in 0..100 {
        fake.define(&Definition::Text(
            optape_trace::TextId(n),
            format!("text {n}"),
        ));
        assert!(fake.call(0));
    }
    fake.end();
    assert_eq!(recording.finish().op_calls(), 101);
    let trace = Trace::open(&path).unwrap();
    let dictionary = trace.streams()[0].dictionary();
    assert!(dictionary.signature(SignatureId(1)).is_some());
}

#[test]
fn a_run_directory_that_vanishes_is_told_and_survived() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("t.optape");
    let (notice, heard) = heard();
    let recording = Recording::in_process(&path, options(notice)).unwrap();
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    wait_until("the ring is found", || {
        path.metadata().is_ok_and(|m| m.len() > 0)
    });
    std::fs::remove_dir_all(recording.directory()).unwrap();
    for _ in 0..1000 {
        assert!(fake.call(0));
    }
    wait_until("it is told", || !heard.lock().unwrap().is_empty());
    fake.end();
    let report = recording.finish();
    assert_eq!(report.op_calls(), 1000);
    assert!(heard.lock().unwrap()[0].contains("is gone"));
}

#[test]
fn a_forked_owner_does_not_end_its_parents_recording() {
    let directory = tempfile::tempdir().unwrap();
    let (mut recording, path) = recording(directory.path());
    let run = recording.directory().to_owned();
    let mut fake = Fake::begin(&run, RING, OnFull::Wait);
    assert!(fake.call(0));
    // As in a fork, whose process has another number.
    recording.process_id += 1;
    let (finish, thread, claim) = (
        recording.orders.clone(),
        recording.thread.take(),
        recording.claim.clone(),
    );
    drop(recording);
    assert!(run.exists());
    assert!(fake.call(0));
    fake.end();
    finish
        .unwrap()
        .send(Order::Finish(Finish::default()))
        .unwrap();
    assert_eq!(thread.unwrap().join().unwrap().op_calls(), 2);
    assert_eq!(claim.unwrap().path, path);
    std::fs::remove_dir_all(run).unwrap();
}

#[test]
fn the_sink_thread_can_be_started_alone() {
    let got = Arc::default();
    let mut sink = BackgroundSink::start(Disk {
        left: 10,
        delay: Duration::ZERO,
        got: Arc::clone(&got),
    })
    .unwrap();
    sink.state().release();
    sink.write_all(b"123").unwrap();
    sink.close();
    assert_eq!(*got.lock().unwrap(), b"123");
}

/// Changes a word of a ring's control page.
fn patch(path: &Path, offset: u64, value: u64) {
    use std::os::unix::fs::FileExt;
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&value.to_le_bytes(), offset).unwrap();
}

#[test]
fn a_ring_whose_image_is_gone_ends_though_its_process_lives() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let mut first = Fake::begin(recording.directory(), RING, OnFull::Wait);
    for _ in 0..10 {
        assert!(first.call(0));
    }
    let ring = first.ring.path().to_owned();
    // As exec does: mapping and lock are gone, the process is the same.
    drop(first);
    wait_until("its ring is given up", || !ring.exists());
    let mut second = Fake::begin(recording.directory(), RING, OnFull::Wait);
    for _ in 0..20 {
        assert!(second.call(0));
    }
    second.end();
    let _ = recording.finish();
    let trace = Trace::open(&path).unwrap();
    let ends: Vec<_> = trace
        .streams()
        .iter()
        .map(|s| (s.records(), s.end().unwrap().clean))
        .collect();
    assert_eq!(ends, [(10, false), (20, true)]);
}

#[test]
fn a_ring_of_a_process_whose_number_was_given_again_is_drained_and_ended() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let mut fake = Fake::begin(directory.path(), RING, OnFull::Wait);
    for _ in 0..10 {
        assert!(fake.call(0));
    }
    // Made by a process that started at another time: field 24 of the control page.
    patch(fake.ring.path(), 24, 1);
    let moved = recording
        .directory()
        .join(fake.ring.path().file_name().unwrap());
    std::fs::copy(fake.ring.path(), recording.directory().join(".copy")).unwrap();
    std::fs::rename(recording.directory().join(".copy"), &moved).unwrap();
    wait_until("its ring is given up", || !moved.exists());
    let report = recording.finish();
    assert_eq!(report.op_calls(), 10, "{report:?}");
    let trace = Trace::open(&path).unwrap();
    assert!(!trace.streams()[0].end().unwrap().clean);
}

#[test]
fn marks_stand_in_every_open_stream() {
    let directory = tempfile::tempdir().unwrap();
    let (recording, path) = recording(directory.path());
    let ask = |text: &str| {
        let (reply, answer) = bounded(1);
        let order = Order::Mark {
            text: text.into(),
            reply,
        };
        recording.orders.as_ref().unwrap().send(order).unwrap();
        answer.recv().unwrap()
    };
    assert!(ask("nobody").unwrap_err().contains("no process"));
    let mut fakes: Vec<Fake> = (0..3)
        .map(|_| Fake::begin(recording.directory(), RING, OnFull::Wait))
        .collect();
    wait_until("they are found", || {
        let (reply, answer) = bounded(1);
        let orders = recording.orders.as_ref().unwrap();
        orders.send(Order::Status(reply)).unwrap();
        answer.recv().unwrap().len() == 3
    });
    assert_eq!(ask("here"), Ok(3));
    for fake in &mut fakes {
        assert!(fake.call(0));
    }
    fakes.into_iter().for_each(Fake::end);
    let _ = recording.finish();
    let trace = Trace::open(&path).unwrap();
    for stream in trace.streams() {
        assert_eq!(
            events(&trace, stream),
            [Event::Mark {
                text: "here".into()
            }]
        );
    }
}

#[test]
fn only_the_last_of_it_is_kept_and_the_file_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("t.optape");
    let mut options = options(quiet());
    options.settings.window = Some(Duration::from_millis(400));
    let recording = Recording::in_process(&path, options).unwrap();
    let mut fake = Fake::begin(recording.directory(), RING, OnFull::Wait);
    // Its times are 1 us per call, so early ones are old at once; what is late in its time is young.
    let now = || crate::clock::monotonic_ns();
    let epoch = now();
    fake.ring.set_epoch_ns(epoch);
    while now() < epoch + 1_500_000_000 {
        fake.calls = (now() - epoch) / 1000;
        assert!(fake.call(0));
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(path.metadata().unwrap().len(), 0, "nothing yet");
    let last = fake.calls;
    fake.end();
    let report = recording.finish();
    assert!(report.failure.is_none(), "{report:?}");
    assert!(report.streams[0].expired_records > 0);
    let trace = Trace::open(&path).unwrap();
    assert!(matches!(trace.end(), TraceEnd::Clean(_)));
    let [stream] = trace.streams() else {
        panic!("{} streams", trace.streams().len())
    };
    let starts = calls(&trace, stream);
    assert_eq!(starts.last(), Some(&(1000 * (last - 1))));
    assert_eq!(
        starts.len() as u64 + report.streams[0].expired_records,
        report.op_calls()
    );
    let events = events(&trace, stream);
    assert_eq!(
        events[..2],
        [
            Event::Paused {
                reason: optape_trace::PauseReason::Expired
            },
            Event::Resumed
        ]
    );
    assert_eq!(stream.end().unwrap().costs["recording.pauses"], 1);
}
