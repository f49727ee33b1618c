//! Statistics that arrive after their call, from a simulated source with delays: what a GPU does.

use std::collections::BTreeMap;

use optape_trace::{
    Columns, Definition, Event, LateStatistic, Moment, Operand, Ordinal, Pattern, PatternId,
    Record, RunEnd, State, StreamEnd, StreamId, ThreadId, Trace, TraceWriter, When, fields,
    verify_bytes,
};

use crate::program::{Call, Entry, Loop, Random, run_info};

/// `PENDING` of the program, the pattern that waits for its first operand.
const PENDING: u32 = 4;

/// Calls by ordinal, and what arrived for them.
type Calls = BTreeMap<u64, (Call, Option<LateStatistic>)>;

/// A source that answers after a while, out of order, or never.
struct LateSource {
    random: Random,
    /// By the number of the record before which the answer comes.
    due: BTreeMap<(u64, u64), LateStatistic>,
    longest: u64,
}

impl LateSource {
    fn ask(&mut self, ordinal: u64) -> Option<LateStatistic> {
        if self.random.below(10) == 0 {
            return None;
        }
        let lost = self.random.below(10) == 0;
        let binary = Some(self.random.below(2) == 0);
        let late = LateStatistic {
            operand: Operand::Tensor(0),
            when: When::Before,
            binary: if lost { None } else { binary },
            fields: if lost { 0 } else { fields::NONZEROS },
            values: if lost {
                vec![]
            } else {
                vec![self.random.below(5000)]
            },
            lost,
        };
        self.due.insert(
            (ordinal + 1 + self.random.below(self.longest), ordinal),
            late.clone(),
        );
        Some(late)
    }
}

/// A trace with late statistics, and what every call should say in the end.
fn record(longest_delay: u64, flush_every: u64, end_stream: bool) -> (Vec<u8>, Calls) {
    let mut program = Loop::new(11, 50);
    let mut source = LateSource {
        random: Random::new(12),
        due: BTreeMap::new(),
        longest: longest_delay,
    };
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let mut calls = BTreeMap::new();
    let mut next = 0;
    for entry in (0..60).flat_map(|_| program.step()).collect::<Vec<_>>() {
        while let Some(due) = source.due.first_entry().filter(|d| d.key().0 <= next) {
            let ((_, call), late) = due.remove_entry();
            let event = Event::Statistics {
                call: Ordinal(call),
                values: vec![late],
            };
            writer
                .moment(
                    stream,
                    &Moment {
                        time_ns: 5,
                        thread: ThreadId(0),
                        event,
                    },
                )
                .unwrap();
            next += 1;
        }
        match entry {
            Entry::Moment(moment) => {
                writer.moment(stream, &moment).unwrap();
            }
            Entry::Call(mut call) => {
                let mut late = None;
                if call.pattern == 0 && call.signature % 3 == 0 {
                    call.pattern = PENDING;
                    late = source.ask(next);
                }
                writer.op_call(stream, call.view()).unwrap();
                calls.insert(next, (call, late));
            }
        }
        next += 1;
        if next % flush_every == 0 {
            writer.flush().unwrap();
        }
    }
    // What is still due never arrives.
    for ((_, call), _) in source.due {
        calls.get_mut(&call).unwrap().1 = None;
    }
    if end_stream {
        writer.end_stream(stream, &StreamEnd::default()).unwrap();
    }
    (writer.finish(&RunEnd::default()).unwrap(), calls)
}

fn state(pattern: &Pattern) -> State {
    pattern
        .entry(Operand::Tensor(0), When::Before)
        .unwrap()
        .state
}

#[test]
fn late_statistics_end_up_in_their_calls() {
    for (delay, flush_every, end_stream) in [
        (1, 1 << 40, true),
        (40, 100, true),
        (3000, 100, false),
        (100_000, 500, true),
    ] {
        let (bytes, calls) = record(delay, flush_every, end_stream);
        let trace = Trace::from_bytes(bytes.clone()).unwrap();
        let dictionary = trace.streams()[0].dictionary();
        let mut sums: BTreeMap<(u32, u32), (u64, u128)> = BTreeMap::new();
        let mut seen = 0;
        for read in trace.records(StreamId(0)) {
            let (ordinal, read) = read.unwrap();
            let Record::OpCall(read) = read else { continue };
            let (call, late) = &calls[&ordinal.0];
            seen += 1;
            assert_eq!(
                (read.signature.0, read.start_ns),
                (call.signature, call.start_ns)
            );
            let row = sums.entry((read.signature.0, read.pattern.0)).or_default();
            row.0 += 1;
            if call.pattern != PENDING {
                assert_eq!(
                    (read.pattern.0, &read.statistics),
                    (call.pattern, &call.statistics)
                );
                row.1 += call.statistics.first().map_or(0, |&v| u128::from(v));
                continue;
            }
            let pattern = dictionary.pattern(read.pattern).unwrap();
            match late {
                Some(late) if !late.lost => {
                    let entry = pattern.entry(Operand::Tensor(0), When::Before).unwrap();
                    assert_eq!(
                        (entry.state, entry.binary, entry.fields),
                        (State::Present, late.binary, late.fields)
                    );
                    assert_eq!(read.statistics, late.values);
                    row.1 += u128::from(late.values[0]);
                }
                _ => assert_eq!(state(pattern), State::Lost, "record {ordinal}"),
            }
        }
        assert_eq!(seen, calls.len());
        let rows = trace.summary(StreamId(0), 0..u64::MAX).unwrap();
        let rows: BTreeMap<_, _> = rows
            .iter()
            .map(|r| {
                (
                    (r.signature.0, r.pattern.0),
                    (r.calls, r.integer_sums.first().copied().unwrap_or(0)),
                )
            })
            .collect();
        assert_eq!(rows, sums);
        let verification = verify_bytes(bytes).unwrap();
        assert_eq!(verification.findings, []);
        // The columns that counters read are the resolved ones too.
        let block = trace.block(StreamId(0), 0, Columns::COUNTERS).unwrap();
        for &pattern in &block.patterns {
            assert!(!dictionary.pattern(PatternId(pattern)).unwrap().is_pending());
        }
    }
}

#[test]
fn pending_calls_are_pending_until_the_stream_ends() {
    let mut program = Loop::new(13, 10);
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let mut call = program
        .step()
        .into_iter()
        .find_map(|e| {
            if let Entry::Call(c) = e {
                Some(c)
            } else {
                None
            }
        })
        .unwrap();
    call.pattern = PENDING;
    call.statistics.clear();
    writer.op_call(stream, call.view()).unwrap();
    writer.flush().unwrap();
    // A failing sink is how a test gets hold of the bytes of an unfinished trace: here the writer's own sink is simply asked.
    let written = writer.bytes_written() as usize;
    let bytes = writer.finish(&RunEnd::default()).unwrap();
    let first_state = |bytes: Vec<u8>| {
        let trace = Trace::from_bytes(bytes).unwrap();
        let block = trace.block(StreamId(0), 0, Columns::ALL).unwrap();
        state(
            trace.streams()[0]
                .dictionary()
                .pattern(PatternId(block.patterns[0]))
                .unwrap(),
        )
    };
    assert_eq!(first_state(bytes[..written].to_vec()), State::Pending);
    assert_eq!(first_state(bytes), State::Lost);
}

#[test]
fn a_call_may_be_answered_bit_by_bit() {
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let program = Loop::new(14, 10);
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    let mut definitions = program.definitions();
    let waiting = |i| optape_trace::PatternEntry {
        operand: Operand::Tensor(i),
        when: When::Before,
        state: State::Pending,
        binary: None,
        fields: 0,
    };
    definitions.push(Definition::Pattern(
        PatternId(6),
        Pattern {
            entries: vec![waiting(0), waiting(1)],
        },
    ));
    for definition in definitions {
        writer.define(stream, &definition).unwrap();
    }
    let mut call = Loop::new(14, 10)
        .step()
        .into_iter()
        .find_map(|e| {
            if let Entry::Call(c) = e {
                Some(c)
            } else {
                None
            }
        })
        .unwrap();
    call.pattern = 6;
    call.statistics.clear();
    let ordinal = writer.op_call(stream, call.view()).unwrap();
    for (operand, value) in [(1u16, 11), (0, 10), (0, 99)] {
        let late = LateStatistic {
            operand: Operand::Tensor(operand),
            when: When::Before,
            binary: Some(true),
            fields: fields::NONZEROS,
            values: vec![value],
            lost: false,
        };
        let event = Event::Statistics {
            call: ordinal,
            values: vec![late],
        };
        writer
            .moment(
                stream,
                &Moment {
                    time_ns: 0,
                    thread: ThreadId(0),
                    event,
                },
            )
            .unwrap();
        writer.flush().unwrap();
    }
    let trace = Trace::from_bytes(writer.finish(&RunEnd::default()).unwrap()).unwrap();
    let block = trace.block(StreamId(0), 0, Columns::ALL).unwrap();
    // The second answer for operand 0 changes nothing.
    assert_eq!(block.statistics, [10, 11]);
    assert_eq!(
        trace.summary(StreamId(0), 0..9).unwrap()[0].integer_sums,
        [10, 11]
    );
}

/// Times of calls on a GPU come by themselves, before or behind the numbers of operands, or not at all.
#[test]
fn the_time_of_a_call_on_a_device_comes_late() {
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let mut program = Loop::new(16, 10);
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    let waiting = |operand, when| optape_trace::PatternEntry {
        operand,
        when,
        state: State::Pending,
        binary: None,
        fields: 0,
    };
    let mut definitions = program.definitions();
    definitions.push(Definition::Pattern(
        PatternId(6),
        Pattern {
            entries: vec![
                waiting(Operand::Tensor(0), When::Before),
                waiting(Operand::Call, When::After),
            ],
        },
    ));
    for definition in definitions {
        writer.define(stream, &definition).unwrap();
    }
    let mut call = program
        .step()
        .into_iter()
        .find_map(|e| match e {
            Entry::Call(call) => Some(call),
            _ => None,
        })
        .unwrap();
    call.pattern = 6;
    call.statistics.clear();
    let late = |operand, when, field, value| LateStatistic {
        operand,
        when,
        binary: None,
        fields: field,
        values: vec![value],
        lost: false,
    };
    let nonzeros = late(Operand::Tensor(0), When::Before, fields::NONZEROS, 7);
    let time = |ns| late(Operand::Call, When::After, fields::DEVICE_TIME, ns);
    let answers = [
        vec![nonzeros.clone(), time(1500)],
        vec![time(u64::MAX), nonzeros.clone()],
        vec![nonzeros],
    ];
    for values in answers {
        let call = writer.op_call(stream, call.view()).unwrap();
        for value in values {
            let event = Event::Statistics {
                call,
                values: vec![value],
            };
            let moment = Moment {
                time_ns: 0,
                thread: ThreadId(0),
                event,
            };
            writer.moment(stream, &moment).unwrap();
        }
    }
    let bytes = writer.finish(&RunEnd::default()).unwrap();
    assert_eq!(verify_bytes(bytes.clone()).unwrap().findings, []);
    let trace = Trace::from_bytes(bytes).unwrap();
    let rows = trace.summary(StreamId(0), 0..u64::MAX).unwrap();
    let mut sums: Vec<_> = rows
        .iter()
        .map(|row| (row.calls, row.integer_sums.clone()))
        .collect();
    sums.sort();
    // A call whose time is lost has no number for it, and no zero.
    let both = u128::from(u64::MAX) + 1500;
    assert_eq!(sums, [(1, vec![7]), (2, vec![14, both])]);
    let lines: Vec<String> = optape_trace::dump::record_lines(&trace, StreamId(0), 0..u64::MAX)
        .map(Result::unwrap)
        .collect();
    assert!(
        lines[0].contains(" stats=0:nonzeros=7;call':device_time_ns=1500"),
        "{}",
        lines[0]
    );
    assert!(
        lines.iter().any(|l| l.contains(";call':lost")),
        "{lines:#?}"
    );
    assert!(
        lines
            .iter()
            .any(|l| l.ends_with("statistics call=0 call':device_time_ns=1500")),
        "{lines:#?}"
    );
}

/// A source that never answers must not use up the memory: the oldest calls are given up, by records that say so.
#[test]
fn the_writer_does_not_wait_for_ever() {
    const WAITING: u64 = 1 << 18;
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let mut program = Loop::new(15, 5);
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    let mut call = program
        .step()
        .into_iter()
        .find_map(|e| {
            if let Entry::Call(c) = e {
                Some(c)
            } else {
                None
            }
        })
        .unwrap();
    call.pattern = PENDING;
    call.statistics.clear();
    for _ in 0..WAITING + 10 {
        writer.op_call(stream, call.view()).unwrap();
    }
    let bytes = writer.finish(&RunEnd::default()).unwrap();
    let trace = Trace::from_bytes(bytes).unwrap();
    let given_up: Vec<u64> = trace
        .moments(stream)
        .unwrap()
        .into_iter()
        .map(|(_, m)| {
            if let Event::Statistics { call, values } = m.event {
                (values[0].lost, call.0)
            } else {
                (false, 0)
            }
        })
        .map(|(lost, call)| if lost { call } else { u64::MAX })
        .collect();
    assert_eq!(given_up, (0..10).collect::<Vec<_>>());
    assert_eq!(
        trace.summary(stream, 0..u64::MAX).unwrap()[0].calls,
        WAITING + 10
    );
}
