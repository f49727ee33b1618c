//! The ring: late answers, back pressure, order, loss.

use std::sync::Arc;

use optape_trace::{DType, NotTaken};
use parking_lot::Mutex;
use proptest::prelude::*;

use super::super::simulated::{Script, Simulated};
use super::super::*;
use crate::statistics::Question;

/// A ring over a device that answers with the operand's address as its nonzeros.
fn ring(places: usize) -> (Ring<u64>, Arc<Mutex<Script>>) {
    let script = Arc::new(Mutex::new(Script::default()));
    let device = Simulated::new(Arc::clone(&script), |job| {
        let mut found = Found::default();
        found.items[0].nonzeros = job.items[0].data;
        found
    });
    (Ring::new(Box::new(device), places), script)
}

fn request(data: u64) -> Box<Request> {
    let mut request = Box::<Request>::default();
    let operand = Operand {
        data,
        dtype: DType::F32,
        sizes: &[3, 5],
        strides: &[5, 1],
    };
    request.add(&operand, Question::Nonzeros, None).unwrap();
    request
}

/// Launches with `data` and tells its record; `None`: not taken.
fn send(ring: &mut Ring<u64>, data: u64) -> Result<(), NotTaken> {
    let id = ring.launch(request(data), data)?;
    ring.written(id, Some(data));
    Ok(())
}

/// Records of the answers that have come, each checked to be its own.
fn arrived(ring: &mut Ring<u64>) -> Vec<u64> {
    let mut records = Vec::new();
    ring.arrived(|arrival| {
        let (found, _) = arrival.request.read(0, &arrival.found).unwrap();
        assert_eq!(found.answer.nonzeros, Some(arrival.record));
        assert_eq!(arrival.what, arrival.record);
        records.push(arrival.record);
    });
    records
}

#[test]
fn answers_come_late_and_across_streams_in_any_order() {
    let (mut ring, script) = ring(8);
    script.lock().delay = 5;
    send(&mut ring, 1).unwrap();
    {
        let mut script = script.lock();
        script.stream = 1;
        script.delay = 1;
    }
    send(&mut ring, 2).unwrap();
    assert_eq!(arrived(&mut ring), [0; 0]);
    script.lock().now = 1;
    assert_eq!(arrived(&mut ring), [2]);
    assert_eq!(arrived(&mut ring), [0; 0]);
    script.lock().now = 5;
    assert_eq!(arrived(&mut ring), [1]);
    assert_eq!((ring.in_flight(), ring.is_awaited()), (0, false));
}

#[test]
fn an_answer_waits_for_the_record_of_its_call() {
    let (mut ring, _script) = ring(2);
    let first = ring.launch(request(7), 7).unwrap();
    let thrown = ring.launch(request(8), 8).unwrap();
    assert_eq!(arrived(&mut ring), [0; 0]);
    // Places are free again, although nobody has got the answers yet.
    let third = ring.launch(request(9), 9).unwrap();
    ring.written(third, Some(9));
    ring.written(thrown, None);
    assert_eq!(arrived(&mut ring), [9]);
    ring.written(first, Some(7));
    assert_eq!(arrived(&mut ring), [7]);
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_full_ring_takes_no_more_and_waits_for_nobody() {
    let (mut ring, script) = ring(2);
    script.lock().delay = 1;
    send(&mut ring, 1).unwrap();
    send(&mut ring, 2).unwrap();
    for data in 3..6 {
        assert_eq!(send(&mut ring, data), Err(NotTaken::DeviceFull));
    }
    script.lock().now = 1;
    assert_eq!(arrived(&mut ring), [1, 2]);
    send(&mut ring, 6).unwrap();
    assert_eq!(
        (
            ring.counts().launches,
            ring.counts().full,
            script.lock().launches
        ),
        (3, 3, 3)
    );
}

#[test]
fn more_streams_than_lanes_are_taken_when_lanes_are_idle() {
    let (mut ring, script) = ring(64);
    script.lock().delay = 1;
    for stream in 0..LANES as u64 {
        script.lock().stream = stream;
        send(&mut ring, 1 + stream).unwrap();
    }
    script.lock().stream = 100;
    assert_eq!(send(&mut ring, 50), Err(NotTaken::DeviceFull));
    script.lock().now = 1;
    assert_eq!(arrived(&mut ring).len(), LANES);
    send(&mut ring, 51).unwrap();
    // Its old stream wants it back while it is in use: it gets another.
    script.lock().stream = 0;
    send(&mut ring, 52).unwrap();
    script.lock().now = 2;
    let mut records = arrived(&mut ring);
    records.sort_unstable();
    assert_eq!(records, [51, 52]);
}

#[test]
fn nothing_is_launched_while_a_stream_captures() {
    let (mut ring, script) = ring(4);
    script.lock().capturing.push(0);
    assert_eq!(send(&mut ring, 1), Err(NotTaken::Capturing));
    assert_eq!((ring.counts().capturing, script.lock().launches), (1, 0));
    script.lock().capturing.clear();
    send(&mut ring, 2).unwrap();
    assert_eq!(arrived(&mut ring), [2]);
}

#[test]
fn a_device_that_refuses_once_is_left_alone() {
    let (mut ring, script) = ring(4);
    script.lock().refuses = true;
    assert_eq!(send(&mut ring, 1), Err(NotTaken::Device));
    script.lock().refuses = false;
    assert_eq!(send(&mut ring, 2), Err(NotTaken::Device));
    assert_eq!((ring.counts().refused, ring.broken()), (2, Some("refused")));
}

#[test]
fn what_does_not_come_before_the_end_is_lost_and_counted() {
    let (mut ring, script) = ring(4);
    script.lock().stuck.push(0);
    for data in 1..4 {
        send(&mut ring, data).unwrap();
    }
    assert!(ring.is_awaited());
    let counts = ring.end();
    assert_eq!((counts.launches, counts.answers, counts.lost), (3, 0, 3));
    // The device may still write to their places.
    assert_eq!(send(&mut ring, 4), Ok(()));
    assert_eq!(send(&mut ring, 5), Err(NotTaken::DeviceFull));
}

#[test]
fn more_operands_than_a_launch_takes_are_refused_one_by_one() {
    let mut request = Request::default();
    let operand = Operand {
        data: 64,
        dtype: DType::F32,
        sizes: &[2],
        strides: &[1],
    };
    for _ in 0..MOST_ITEMS {
        request.add(&operand, Question::Full, None).unwrap();
    }
    let more = request.add(&operand, Question::Full, None);
    assert_eq!(more, Err(NotTaken::DeviceFull));
    let odd = Operand {
        dtype: DType(24),
        ..operand
    };
    let refused = Request::default().add(&odd, Question::Full, None);
    assert_eq!(refused, Err(NotTaken::DType));
}

proptest! {
    /// Whatever comes in whatever order: every launch is answered once, to its own call, or counted.
    #[test]
    fn every_launch_is_answered_once(
        actions in prop::collection::vec((0u64..12, 0u64..4, 0u8..8), 1..200),
    ) {
        let (mut ring, script) = ring(6);
        let mut sent = Vec::new();
        let mut got = Vec::new();
        let mut refused = 0;
        for (number, (stream, delay, action)) in (1u64..).zip(actions) {
            {
                let mut script = script.lock();
                script.stream = stream;
                script.delay = delay;
                script.now += u64::from(action % 2 == 0);
            }
            match action {
                0..6 => match ring.launch(request(number), number) {
                    Ok(id) if action == 5 => ring.written(id, None),
                    Ok(id) => {
                        ring.written(id, Some(number));
                        sent.push(number);
                    }
                    Err(reason) => {
                        prop_assert_eq!(reason, NotTaken::DeviceFull);
                        refused += 1;
                    }
                },
                _ => got.extend(arrived(&mut ring)),
            }
        }
        script.lock().now += 10;
        got.extend(arrived(&mut ring));
        got.sort_unstable();
        prop_assert_eq!(&got, &sent);
        let counts = ring.end();
        prop_assert_eq!((counts.lost, counts.full), (0, refused));
        prop_assert_eq!(counts.launches, counts.answers);
        prop_assert_eq!(ring.in_flight(), 0);
    }
}
