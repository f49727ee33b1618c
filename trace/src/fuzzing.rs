//! Bounded fuzzing on stable Rust: traces of the kept corpus are bent at random, and whatever comes out must be answered with a result or an
//! error, quickly. Plain noise mostly dies at a checksum, so half of the mutations bend what stands behind the checksums,
//! compressed columns included, and make the checksums right again.
//!
//! `OPTAPE_FUZZ_ROUNDS` (default 1500) says how often, `OPTAPE_FUZZ_SEED` where the random numbers begin; a failure prints both.

use std::path::PathBuf;

use crate::block::{BlockHead, ColumnEntry, Columns, Compressor};
use crate::frame::{COMPRESSED, FRAME_HEAD, FrameHead, HEADER_LEN, kind};
use crate::ids::StreamId;
use crate::reader::Trace;
use crate::{dump, recover_bytes, verify_bytes};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Bends some bytes: flips, interesting values, insertions, deletions, copies.
    fn bend(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..1 + self.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = self.below(bytes.len());
            match self.below(8) {
                0 | 1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes[at] = self.next() as u8,
                3 => bytes[at] = [0, 1, 0x7f, 0x80, 0xfe, 0xff][self.below(6)],
                4 => bytes.insert(at, [0, 0x80, 0xff][self.below(3)]),
                5 => drop(bytes.remove(at)),
                6 => {
                    let end = (at + 1 + self.below(9)).min(bytes.len());
                    bytes[at..end].fill(0xff);
                }
                _ => {
                    let from = self.below(bytes.len());
                    let length = self.below(16).min(bytes.len() - at).min(bytes.len() - from);
                    bytes.copy_within(from..from + length, at);
                }
            }
        }
    }
}

/// A frame's head and payload, the payload decompressed.
type Frames = Vec<(FrameHead, Vec<u8>)>;

fn split(bytes: &[u8]) -> Frames {
    let mut frames = Vec::new();
    let mut at = HEADER_LEN as usize;
    while at < bytes.len() {
        let head = FrameHead::decode(&bytes[at..]).unwrap();
        let payload = bytes[at + FRAME_HEAD..][..head.length as usize].to_vec();
        at += FRAME_HEAD + payload.len();
        let payload = head.unwrap_payload(payload).unwrap();
        frames.push((head, payload));
    }
    frames
}

/// Puts frames together with right lengths and checksums.
fn join(frames: &Frames) -> Vec<u8> {
    let mut bytes = crate::frame::encode_header();
    for (head, payload) in frames {
        let head = FrameHead {
            flags: head.flags & !COMPRESSED,
            length: payload.len() as u32,
            payload_checksum: crc32c::crc32c(payload),
            ..*head
        };
        bytes.extend(head.encode());
        bytes.extend(payload);
    }
    bytes
}

/// Bends a block's head or one of its columns, decompressed, and makes its checksums right again.
fn bend_block(payload: &[u8], random: &mut Random) -> Vec<u8> {
    let mut head = BlockHead::decode(payload, payload.len() as u32).unwrap();
    let mut columns: Vec<Vec<u8>> = head
        .columns
        .iter()
        .map(|c| {
            c.decode(payload[c.at as usize..][..c.stored as usize].to_vec())
                .unwrap()
        })
        .collect();
    match random.below(6) {
        0 => {
            head.records = head
                .records
                .wrapping_add(random.below(5) as u32)
                .wrapping_sub(2)
        }
        1 => {
            head.op_calls = head
                .op_calls
                .wrapping_add(random.below(5) as u32)
                .wrapping_sub(2)
        }
        2 => head.first_ns = random.next(),
        _ => {
            let victim = random.below(columns.len());
            random.bend(&mut columns[victim]);
        }
    }
    for (entry, bytes) in head.columns.iter_mut().zip(&columns) {
        let length = bytes.len() as u32;
        *entry = ColumnEntry {
            compressed: false,
            raw: length,
            stored: length,
            checksum: crc32c::crc32c(bytes),
            ..*entry
        };
    }
    let mut out = head.encode_for_tests();
    columns.iter().for_each(|c| out.extend(c));
    out
}

/// Does everything that can be done with a trace. Only panics, hangs and monstrous allocations are failures.
fn use_trace(bytes: Vec<u8>) {
    if let Ok(trace) = Trace::from_bytes(bytes.clone()) {
        for stream in trace.streams() {
            let _ = trace.summary(stream.id(), 0..u64::MAX);
            let _ = trace.summary(stream.id(), 3..stream.records().saturating_sub(2));
            let _ = trace.moments(stream.id());
            for value in trace.values(stream.id()) {
                let _ = value.map(|value| value.to_f64());
            }
            for index in 0..stream.blocks().len() {
                let _ = trace.block(stream.id(), index, Columns::COUNTERS);
                if let Ok(block) = trace.block(stream.id(), index, Columns::ALL) {
                    // What the reader promises of a block that it gives out.
                    assert!(
                        block
                            .slots
                            .iter()
                            .all(|s| (*s as usize) < block.slot_table.len())
                    );
                    let calls = block.op_calls as usize;
                    assert_eq!(
                        [
                            block.slots.len(),
                            block.start_ns.len(),
                            block.sequence_numbers.len()
                        ],
                        [calls; 3]
                    );
                    let words: u64 = block
                        .slots
                        .iter()
                        .map(|s| u64::from(block.slot_table[*s as usize].statistics))
                        .sum();
                    assert_eq!(words, block.statistics.len() as u64);
                }
            }
            let lines = dump::record_lines(&trace, stream.id(), 0..u64::MAX).filter_map(Result::ok);
            assert!(lines.map(|l| l.len()).sum::<usize>() < 1 << 30);
            for definition in stream.dictionary().definitions() {
                let _ = dump::definition_line(StreamId(0), &definition);
            }
        }
    }
    let _ = verify_bytes(bytes.clone());
    if let Ok((copy, _)) = recover_bytes(bytes, Vec::new(), &[]) {
        assert_eq!(
            verify_bytes(copy).unwrap().findings,
            [],
            "a recovered trace is not whole"
        );
    }
}

fn corpus() -> Vec<(PathBuf, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "trace"));
    files.sort();
    assert!(files.len() >= 3, "the corpus is missing");
    files
        .into_iter()
        .map(|f| (f.clone(), std::fs::read(f).unwrap()))
        .collect()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap())
}

#[test]
fn bent_traces_are_answered() {
    let seed = setting("OPTAPE_FUZZ_SEED", 0x6f70_7461_7065);
    let corpus = corpus();
    for round in 0..setting("OPTAPE_FUZZ_ROUNDS", 1500) {
        let mut random = Random(seed ^ (round + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.next();
        let (file, original) = &corpus[random.below(corpus.len())];
        let mut bytes = original.clone();
        if random.below(4) == 0 {
            random.bend(&mut bytes);
        } else {
            let mut frames = split(&bytes);
            let last = random.below(frames.len());
            match random.below(8) {
                0 => drop(frames.remove(last)),
                1 => {
                    let other = random.below(frames.len());
                    frames.swap(last, other);
                }
                2 => {
                    let copy = frames[last].clone();
                    frames.insert(last, copy);
                }
                _ => {
                    let (head, payload) = &mut frames[last];
                    if head.kind == kind::BLOCK && random.below(4) > 0 {
                        *payload = bend_block(payload, &mut random);
                    } else {
                        random.bend(payload);
                    }
                }
            }
            bytes = join(&frames);
        }
        let used = std::panic::catch_unwind(|| use_trace(bytes));
        assert!(
            used.is_ok(),
            "OPTAPE_FUZZ_SEED={seed} round {round}, from {}",
            file.display()
        );
    }
}

/// What claims to hold much must not get the memory for it.
#[test]
fn large_claims_are_refused() {
    let bytes = corpus().remove(0).1;
    let mut zstd = Compressor::new().unwrap();
    // A zstd frame of 512 MiB of zeros is a few bytes; so is the number that says so.
    let zeros = zstd.compress(&vec![0; 32 << 20]).unwrap().unwrap().to_vec();
    let mut payload = (u32::MAX).to_le_bytes().to_vec();
    payload.extend(zeros);
    let mut frames = split(&bytes);
    let place = frames
        .iter()
        .position(|(head, _)| head.kind == kind::DEFINITIONS)
        .unwrap();
    frames[place].1 = payload;
    let mut bytes = join(&frames);
    // The flag, and the checksum of the head.
    let mut at = HEADER_LEN as usize;
    for (_, payload) in &frames[..place] {
        at += FRAME_HEAD + payload.len();
    }
    bytes[at + 3] = COMPRESSED;
    let checksum = crc32c::crc32c(&bytes[at..at + 16]);
    bytes[at + 16..at + 20].copy_from_slice(&checksum.to_le_bytes());
    let verification = verify_bytes(bytes).unwrap();
    assert!(
        verification.findings[0]
            .what
            .contains("more than the limit"),
        "{:?}",
        verification.findings
    );
}
