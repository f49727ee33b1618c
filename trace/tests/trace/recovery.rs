//! What can be saved of a broken trace.

use optape_trace::{
    DropReason, Event, Loss, Record, StreamId, Trace, TraceEnd, recover_bytes, verify_bytes,
};

use crate::program::{Entry, Loop, Random, record, write};

fn damaged_source() -> (Vec<u8>, Vec<Record>) {
    let mut program = Loop::new(61, 20);
    let entries: Vec<Entry> = (0..30).flat_map(|_| program.step()).collect();
    let bytes = write(&entries, &program, 50);
    (bytes, entries.iter().map(record).collect())
}

fn records(bytes: Vec<u8>) -> (Trace, Vec<Record>) {
    let trace = Trace::from_bytes(bytes).unwrap();
    let all = if trace.streams().is_empty() {
        vec![]
    } else {
        trace.records(StreamId(0)).map(|r| r.unwrap().1).collect()
    };
    (trace, all)
}

#[test]
fn a_truncated_trace_gives_its_prefix() {
    let (bytes, all) = damaged_source();
    let mut random = Random::new(62);
    for _ in 0..60 {
        let cut = 200 + random.below(bytes.len() as u64 - 200) as usize;
        let prefix = records(bytes[..cut].to_vec()).1;
        let (copy, recovery) = recover_bytes(bytes[..cut].to_vec(), Vec::new(), &[]).unwrap();
        assert_eq!(
            verify_bytes(copy.clone()).unwrap().findings,
            [],
            "cut at {cut}"
        );
        let (trace, saved) = records(copy);
        assert!(matches!(trace.end(), TraceEnd::Clean(_)));
        assert_eq!(trace.run().facts["recovered"], "true");
        assert_eq!(saved, prefix, "cut at {cut}");
        assert_eq!(saved, all[..saved.len()]);
        assert_eq!((recovery.records, recovery.lost), (saved.len() as u64, 0));
    }
}

#[test]
fn a_hole_becomes_a_drop_and_what_stands_behind_it_is_saved() {
    let (bytes, all) = damaged_source();
    let whole = Trace::from_bytes(bytes.clone()).unwrap();
    let blocks = whole.streams()[0].blocks();
    for victim in [0, 3, blocks.len() - 1] {
        let entry = blocks[victim];
        let mut bent = bytes.clone();
        bent[entry.offset as usize + entry.bytes as usize / 2] ^= 0x10;
        assert!(
            verify_bytes(bent.clone())
                .unwrap()
                .findings
                .iter()
                .any(|f| f.offset == entry.offset)
        );
        let (copy, recovery) = recover_bytes(bent, Vec::new(), &[]).unwrap();
        assert_eq!(recovery.lost, u64::from(entry.records));
        assert_eq!(recovery.findings[0].offset, entry.offset);
        assert_eq!(verify_bytes(copy.clone()).unwrap().findings, []);
        let (trace, saved) = records(copy);
        assert_eq!(
            trace.streams()[0].dropped_records(),
            u64::from(entry.records)
        );
        let hole = entry.first_ordinal as usize..entry.ordinals().end as usize;
        let (before, rest) = saved.split_at(hole.start);
        assert_eq!(before, &all[..hole.start]);
        let (lost, after) = rest.split_first().unwrap();
        assert!(
            matches!(lost, Record::Other(m) if matches!(m.event, Event::Drop { records, .. } if records == u64::from(entry.records)))
        );
        assert_eq!(after, &all[hole.end..]);
    }
}

#[test]
fn everything_but_the_first_frame_may_be_bent() {
    let (bytes, _) = damaged_source();
    let mut random = Random::new(63);
    for _ in 0..40 {
        let mut bent = bytes.clone();
        for _ in 0..1 + random.below(20) {
            let at = 200 + random.below(bent.len() as u64 - 200) as usize;
            bent[at] = random.next() as u8;
        }
        let (copy, recovery) = recover_bytes(bent, Vec::new(), &[]).unwrap();
        assert!(!recovery.findings.is_empty());
        assert_eq!(verify_bytes(copy).unwrap().findings, []);
    }
}

#[test]
fn known_losses_are_added() {
    let (bytes, all) = damaged_source();
    let loss = Loss {
        stream: StreamId(0),
        records: 17,
        from_ns: 0,
        until_ns: u64::MAX / 2,
        reason: DropReason::DaemonGone,
    };
    let cut = bytes.len() / 2;
    let (copy, recovery) = recover_bytes(bytes[..cut].to_vec(), Vec::new(), &[loss]).unwrap();
    assert_eq!(recovery.lost, 17);
    let (trace, saved) = records(copy);
    assert_eq!(trace.streams()[0].dropped_records(), 17);
    let (last, before) = saved.split_last().unwrap();
    assert!(
        matches!(last, Record::Other(m) if matches!(m.event, Event::Drop { records: 17, reason: DropReason::DaemonGone, .. }))
    );
    assert_eq!(before, &all[..before.len()]);
}

#[test]
fn a_whole_trace_is_copied_as_it_is() {
    let (bytes, all) = damaged_source();
    let (copy, recovery) = recover_bytes(bytes, Vec::new(), &[]).unwrap();
    assert!(recovery.finished && recovery.findings.is_empty() && recovery.lost == 0);
    let (trace, saved) = records(copy);
    assert_eq!(saved, all);
    assert!(matches!(trace.end(), TraceEnd::Clean(end) if end.exit_code == Some(0)));
}
