//! What is written is read, however it is cut into blocks.

use optape_trace::{
    Argument, Columns, Definition, OpId, RunEnd, ScopeId, SignatureDef, SignatureId, Stage,
    StreamId, SummaryRow, TensorMeta, Trace, TraceEnd, TraceWriter,
};

use crate::program::{Call, Entry, Loop, record, run_info, write};

fn check_records(trace: &Trace, entries: &[Entry]) {
    let mut count = 0;
    for ((i, read), entry) in trace.records(StreamId(0)).enumerate().zip(entries) {
        let (ordinal, read) = read.unwrap();
        assert_eq!(ordinal.0, i as u64);
        assert_eq!(read, record(entry));
        count += 1;
    }
    assert_eq!(count, entries.len());
}

#[test]
fn records_come_back_in_order() {
    // Without a flush, blocks end by themselves at 64 Ki records.
    for (flush_every, steps) in [(usize::MAX, 1200), (1, 20), (97, 40), (2000, 40)] {
        let mut program = Loop::new(1, 60);
        let entries: Vec<Entry> = (0..steps).flat_map(|_| program.step()).collect();
        let bytes = write(&entries, &program, flush_every);
        let trace = Trace::from_bytes(bytes).unwrap();
        assert!(
            matches!(trace.end(), TraceEnd::Clean(end) if end.exit_code == Some(0)),
            "{:?}",
            trace.end()
        );
        assert_eq!(
            trace.streams()[0].end().unwrap().records,
            entries.len() as u64
        );
        assert_eq!(trace.run(), &run_info());
        check_records(&trace, &entries);
    }
}

/// `torch._foreach_*` calls have thousands of tensors; a block ends before its columns get too long.
#[test]
fn calls_with_many_tensors_come_back() {
    const TENSORS: usize = 50_000;
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let program = Loop::new(5, 3);
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    let mut definitions = program.definitions();
    let many = SignatureDef {
        op: OpId(0),
        arguments: vec![Argument::TensorList(
            (0..TENSORS as u16).map(Some).collect(),
        )],
        outputs: vec![],
        tensors: vec![TensorMeta::default(); TENSORS],
        inputs: TENSORS as u16,
        flags: 0,
        scope: ScopeId::GLOBAL,
        stage: Stage::Optimizer,
        stage_name: None,
    };
    definitions.push(Definition::Signature(SignatureId(3), many));
    for definition in definitions {
        writer.define(stream, &definition).unwrap();
    }
    let calls: Vec<Call> = (0..30u64)
        .map(|i| {
            let ids: Vec<u64> = (0..TENSORS as u64)
                .map(|t| 1 + t + i * (t % 3) * 100_000)
                .collect();
            Call {
                signature: 3,
                thread: 0,
                start_ns: i,
                sequence_number: -1,
                storages: ids.clone(),
                tensors: ids,
                ..Call::default()
            }
        })
        .collect();
    for call in &calls {
        writer.op_call(stream, call.view()).unwrap();
    }
    let trace = Trace::from_bytes(writer.finish(&RunEnd::default()).unwrap()).unwrap();
    assert!(trace.streams()[0].blocks().len() > 1);
    let entries: Vec<Entry> = calls.into_iter().map(Entry::Call).collect();
    check_records(&trace, &entries);
}

/// Readers and writers go to threads.
#[test]
fn traces_can_be_shared() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Trace>();
    sent::<TraceWriter<Vec<u8>>>();
}

/// Sums over calls, straightforwardly.
fn sums(entries: &[Entry]) -> Vec<(u32, u32, u64, u64, Vec<u128>)> {
    let mut rows = std::collections::BTreeMap::new();
    for entry in entries {
        if let Entry::Call(call) = entry {
            let row = rows
                .entry((call.signature, call.pattern))
                .or_insert((0, 0, Vec::new()));
            row.0 += 1;
            row.1 += call.duration_ns;
            let integers = if call.pattern == 1 {
                2
            } else {
                usize::from(call.pattern == 3)
            };
            row.2.resize(integers, 0u128);
            for (sum, &word) in row.2.iter_mut().zip(&call.statistics) {
                *sum += u128::from(word);
            }
        }
    }
    rows.into_iter()
        .map(|((s, p), (n, d, w))| (s, p, n, d, w))
        .collect()
}

fn plain(rows: Vec<SummaryRow>) -> Vec<(u32, u32, u64, u64, Vec<u128>)> {
    rows.into_iter()
        .map(|r| {
            (
                r.signature.0,
                r.pattern.0,
                r.calls,
                r.duration_ns,
                r.integer_sums,
            )
        })
        .collect()
}

#[test]
fn summaries_are_the_sums_of_their_range() {
    let mut program = Loop::new(2, 300);
    let entries: Vec<Entry> = (0..900).flat_map(|_| program.step()).collect();
    let bytes = write(&entries, &program, 30_000);
    let trace = Trace::from_bytes(bytes).unwrap();
    let all = entries.len() as u64;
    assert!(
        trace.streams()[0]
            .summaries()
            .iter()
            .any(|s| s.level == 255)
    );
    for range in [
        0..all,
        0..10,
        5..all - 5,
        1234..200_000,
        65_536..131_072,
        7..7,
        all - 1..all + 10,
    ] {
        let part = &entries[range.start.min(all) as usize..range.end.min(all) as usize];
        assert_eq!(
            plain(trace.summary(StreamId(0), range.clone()).unwrap()),
            sums(part),
            "{range:?}"
        );
    }
}

#[test]
fn only_the_wanted_columns_are_decoded() {
    let mut program = Loop::new(3, 60);
    let entries: Vec<Entry> = (0..4).flat_map(|_| program.step()).collect();
    let trace = Trace::from_bytes(write(&entries, &program, usize::MAX)).unwrap();
    let all = trace.block(StreamId(0), 0, Columns::ALL).unwrap();
    let some = trace.block(StreamId(0), 0, Columns::COUNTERS).unwrap();
    assert_eq!(
        (&some.signatures, &some.patterns, &some.statistics),
        (&all.signatures, &all.patterns, &all.statistics)
    );
    assert!(
        some.start_ns.is_empty()
            && some.moments.is_empty()
            && some.storages.is_empty()
            && some.kinds.is_empty()
    );
    let moments: Vec<_> = entries
        .iter()
        .filter_map(|e| {
            if let Entry::Moment(m) = e {
                Some(m.clone())
            } else {
                None
            }
        })
        .collect();
    assert_eq!(
        trace
            .moments(StreamId(0))
            .unwrap()
            .into_iter()
            .map(|(_, m)| m)
            .collect::<Vec<_>>(),
        moments
    );
}

#[test]
fn a_repeating_loop_takes_at_most_six_and_a_half_bytes_per_op() {
    let mut program = Loop::new(4, 330);
    let entries: Vec<Entry> = (0..400).flat_map(|_| program.step()).collect();
    let calls = entries
        .iter()
        .filter(|e| matches!(e, Entry::Call(_)))
        .count();
    for (flush_every, limit) in [(usize::MAX, 6.5), (9_400, 7.0)] {
        let bytes = write(&entries, &program, flush_every);
        let per_op = bytes.len() as f64 / calls as f64;
        println!(
            "flush every {flush_every}: {per_op:.3} bytes per op, {:.3} records per op",
            entries.len() as f64 / calls as f64
        );
        assert!(per_op <= limit, "{per_op} bytes per op");
    }
}
