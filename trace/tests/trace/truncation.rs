//! A trace that ends anywhere gives the records of every whole block, and never a panic; a bit that flips anywhere is noticed.

use optape_trace::{Record, StreamId, Trace, TraceEnd, TraceError, verify_bytes};

use crate::program::{Entry, Loop, Random, write};

fn small_trace() -> (Vec<u8>, Vec<Record>) {
    let mut program = Loop::new(21, 7);
    let entries: Vec<Entry> = (0..12).flat_map(|_| program.step()).collect();
    let bytes = write(&entries, &program, 20);
    (bytes, entries.iter().map(crate::program::record).collect())
}

fn read_all(trace: &Trace) -> Result<Vec<Record>, TraceError> {
    if trace.streams().is_empty() {
        return Ok(vec![]);
    }
    trace
        .records(StreamId(0))
        .map(|r| r.map(|(_, record)| record))
        .collect()
}

#[test]
fn every_cut_gives_a_prefix() {
    let (bytes, records) = small_trace();
    let mut last = None;
    let mut lengths = std::collections::BTreeSet::new();
    for cut in 0..=bytes.len() {
        match Trace::from_bytes(bytes[..cut].to_vec()) {
            Err(TraceError::TooShort { file_bytes }) => {
                assert_eq!(file_bytes, cut as u64);
                assert!(last.is_none(), "cut at {cut}: a shorter file could be read");
            }
            Err(other) => panic!("cut at {cut}: {other}"),
            Ok(trace) => {
                let read = read_all(&trace).unwrap();
                assert_eq!(read, records[..read.len()], "cut at {cut}");
                assert!(
                    last.unwrap_or(0) <= read.len(),
                    "cut at {cut}: fewer records than in a shorter file"
                );
                match trace.end() {
                    // The index frames and the footer come after everything that counts.
                    TraceEnd::Clean(_) => assert_eq!(cut, bytes.len()),
                    TraceEnd::Unfinished {
                        valid_bytes,
                        file_bytes,
                    } => {
                        assert_eq!(*file_bytes, cut as u64);
                        assert!(*valid_bytes <= *file_bytes);
                    }
                    TraceEnd::Damaged { .. } => panic!("cut at {cut}: a cut is no damage"),
                }
                last = Some(read.len());
                lengths.insert(read.len());
            }
        }
    }
    assert_eq!(last, Some(records.len()));
    assert!(
        lengths.len() > 4,
        "too few blocks to say anything: {lengths:?}"
    );
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (bytes, records) = small_trace();
    let mut random = Random::new(22);
    for at in 0..bytes.len() {
        let mut bent = bytes.clone();
        bent[at] ^= 1 << random.below(8);
        let noticed = match verify_bytes(bent.clone()) {
            Err(_) => true,
            Ok(verification) => !verification.findings.is_empty(),
        };
        assert!(noticed, "a flipped bit of byte {at} is not noticed");
        // Nor does reading give a wrong record: the right ones, or an error.
        if let Ok(trace) = Trace::from_bytes(bent)
            && trace.streams().len() == 1
        {
            for (read, record) in trace.records(StreamId(0)).zip(&records) {
                match read {
                    Ok((_, read)) => assert_eq!(read, *record, "byte {at}"),
                    Err(TraceError::Damaged { .. }) => break,
                    Err(other) => panic!("byte {at}: {other}"),
                }
            }
        }
    }
}
