//! Times of calls: late, in order by stream, lost, refused, never waited for.

use std::sync::Arc;

use optape_trace::NotTaken;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::super::simulated::{Script, SimulatedClock};
use super::super::timing::{Span, Stopwatch, Times};

fn stopwatch(pairs: usize) -> (Stopwatch, Arc<Mutex<Script>>) {
    let script = Arc::new(Mutex::new(Script::default()));
    let clock = SimulatedClock::new(Arc::clone(&script));
    (Stopwatch::new(Box::new(clock), pairs), script)
}

/// A call of this record whose work takes so long.
fn call(
    watch: &mut Stopwatch,
    script: &Mutex<Script>,
    record: u64,
    ns: u64,
) -> Result<Span, NotTaken> {
    let span = watch.begin()?;
    script.lock().device_ns += ns;
    watch.end(span)?;
    watch.written(span, Some(record));
    Ok(span)
}

fn arrived(watch: &mut Stopwatch) -> Vec<(u64, u64)> {
    let mut times = Vec::new();
    watch.arrived(true, |record, ns| times.push((record, ns)));
    times
}

#[test]
fn times_come_late_and_in_the_order_of_their_stream() {
    let (mut watch, script) = stopwatch(8);
    script.lock().delay = 5;
    call(&mut watch, &script, 1, 100).unwrap();
    script.lock().delay = 1;
    call(&mut watch, &script, 2, 200).unwrap();
    script.lock().stream = 7;
    call(&mut watch, &script, 3, 300).unwrap();
    assert_eq!(arrived(&mut watch), []);
    script.lock().now = 1;
    // The second call of the first stream stands behind one that has not come.
    assert_eq!(arrived(&mut watch), [(3, 300)]);
    script.lock().now = 5;
    assert_eq!(arrived(&mut watch), [(1, 100), (2, 200)]);
    assert_eq!(watch.in_flight(), 0);
    let expected = Times {
        calls: 3,
        read: 3,
        ..Times::default()
    };
    assert_eq!(watch.finish(), expected);
}

#[test]
fn the_device_is_asked_now_and_then() {
    let (mut watch, script) = stopwatch(100);
    script.lock().delay = 1;
    call(&mut watch, &script, 1, 10).unwrap();
    for _ in 0..31 {
        watch.arrived(false, |_, _| panic!("nothing has come"));
    }
    assert_eq!(script.lock().polls, 1);
    // Where pairs get scarce it is asked at once.
    for record in 2..=80 {
        call(&mut watch, &script, record, 10).unwrap();
    }
    watch.arrived(false, |_, _| panic!("nothing has come"));
    assert_eq!(script.lock().polls, 2);
}

#[test]
fn a_call_that_throws_gives_its_pair_back() {
    let (mut watch, script) = stopwatch(1);
    let span = watch.begin().unwrap();
    watch.written(span, None);
    call(&mut watch, &script, 1, 10).unwrap();
    assert_eq!(arrived(&mut watch), [(1, 10)]);
    assert_eq!(watch.times().calls, 1);
}

#[test]
fn nothing_is_recorded_while_a_stream_captures() {
    let (mut watch, script) = stopwatch(1);
    script.lock().capturing.push(0);
    assert_eq!(watch.begin(), Err(NotTaken::Capturing));
    script.lock().capturing.clear();
    call(&mut watch, &script, 1, 10).unwrap();
    assert_eq!(watch.begin(), Err(NotTaken::DeviceFull));
    assert_eq!(arrived(&mut watch), [(1, 10)]);
    let times = watch.finish();
    assert_eq!((times.capturing, times.full, times.read), (1, 1, 1));
}

#[test]
fn a_device_that_refuses_once_is_left_alone() {
    let (mut watch, script) = stopwatch(4);
    script.lock().delay = 1;
    call(&mut watch, &script, 1, 10).unwrap();
    let open = watch.begin().unwrap();
    script.lock().refuses = true;
    assert_eq!(watch.end(open), Err(NotTaken::Device));
    script.lock().refuses = false;
    assert_eq!(watch.begin(), Err(NotTaken::Device));
    assert_eq!(watch.broken(), Some("refused"));
    // What had ended before is still read.
    script.lock().now = 1;
    assert_eq!(arrived(&mut watch), [(1, 10)]);
    let times = watch.finish();
    assert_eq!((times.calls, times.read, times.refused), (3, 1, 2));
}

#[test]
fn what_has_not_come_at_the_end_is_lost_and_its_pair_free() {
    let (mut watch, script) = stopwatch(2);
    script.lock().stuck.push(0);
    call(&mut watch, &script, 1, 10).unwrap();
    call(&mut watch, &script, 2, 10).unwrap();
    assert_eq!(watch.begin(), Err(NotTaken::DeviceFull));
    assert_eq!(arrived(&mut watch), []);
    assert_eq!(watch.finish().lost, 2);
    script.lock().stuck.clear();
    call(&mut watch, &script, 1, 20).unwrap();
    // Not what the pair was about before.
    assert_eq!(arrived(&mut watch), [(1, 20)]);
}

proptest! {
    /// Whatever happens in whatever order: every call has its own time once, or is counted under the reason why not.
    #[test]
    fn every_call_has_its_time_once(
        actions in prop::collection::vec((0u64..40, 0u64..4, 0u8..10), 1..200),
    ) {
        let (mut watch, script) = stopwatch(6);
        let mut open: Vec<(Span, u64, u64)> = Vec::new();
        let mut sent = Vec::new();
        let mut got = Vec::new();
        for (number, (stream, delay, action)) in (1u64..).zip(actions) {
            {
                let mut script = script.lock();
                script.stream = stream;
                script.delay = delay;
                script.now += u64::from(action % 2 == 0);
                script.device_ns += number;
                script.capturing = if action == 9 { vec![stream] } else { Vec::new() };
            }
            let device_ns = script.lock().device_ns;
            match action {
                0..4 | 9 => match watch.begin() {
                    Ok(span) => open.push((span, number, device_ns)),
                    Err(reason) => {
                        let why = if action == 9 { NotTaken::Capturing } else { NotTaken::DeviceFull };
                        prop_assert_eq!(reason, why);
                    }
                },
                4..7 => if let Some((span, record, began)) = open.pop() {
                    prop_assert_eq!(watch.end(span), Ok(()));
                    if action == 6 {
                        watch.written(span, None);
                    } else {
                        watch.written(span, Some(record));
                        sent.push((record, device_ns - began));
                    }
                },
                _ => watch.arrived(action == 7, |record, ns| got.push((record, ns))),
            }
        }
        for (span, ..) in open {
            watch.written(span, None);
        }
        script.lock().now += 10;
        got.extend(arrived(&mut watch));
        got.sort_unstable();
        sent.sort_unstable();
        prop_assert_eq!(&got, &sent);
        let times = watch.finish();
        prop_assert_eq!(times.read, got.len() as u64);
        prop_assert_eq!(times.lost, 0);
        prop_assert_eq!(times.calls, times.read + times.full + times.capturing);
    }
}
