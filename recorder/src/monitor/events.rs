//! Event files of TensorBoard, written without it.
//!
//! A file is a sequence of records framed as TFRecords (tensorflow/core/lib/io/record_writer.h): length (`u64`), masked CRC-32C of
//! the length, that many bytes, masked CRC-32C of these; all little endian. A record holds one protobuf message `Event`
//! (tensorflow/core/util/event.proto): `double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5`, where
//! `Summary` (summary.proto) has `repeated Value value = 1` and `Value` `string tag = 1; float simple_value = 2`. This module writes
//! these few fields itself: the crates that could are either abandoned or bring a protobuf compiler.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// What readers look for in the first record.
const FILE_VERSION: &str = "brain.Event:2";

/// An event file of scalars.
#[derive(Debug)]
pub struct EventFile<W: Write> {
    out: W,
}

impl EventFile<BufWriter<File>> {
    /// Makes a file with a name of its own in `directory`, which is made if need be.
    ///
    /// # Errors
    /// Where they cannot be made.
    pub fn create(directory: &Path, unix_ns: u64) -> io::Result<(Self, PathBuf)> {
        std::fs::create_dir_all(directory)?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host: String = host
            .trim()
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '-' {
                    c
                } else {
                    '_'
                }
            })
            .collect();
        let mut attempt = 0;
        loop {
            let name = format!(
                "events.out.tfevents.{}.{host}.{}.{attempt}",
                unix_ns / 1_000_000_000,
                std::process::id()
            );
            let path = directory.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
                file => return Ok((Self::new(BufWriter::new(file?), unix_ns)?, path)),
            }
        }
    }
}

impl<W: Write> EventFile<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn new(out: W, unix_ns: u64) -> io::Result<Self> {
        let mut file = Self { out };
        let mut event = Vec::new();
        put_double(&mut event, 1, seconds(unix_ns));
        put_bytes(&mut event, 3, FILE_VERSION.as_bytes());
        file.record(&event)?;
        Ok(file)
    }

    /// Writes scalars of one step and hands them to the system, so that a running TensorBoard sees them.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn scalars<'a>(
        &mut self,
        unix_ns: u64,
        step: u64,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut message = Vec::new();
            put_bytes(&mut message, 1, tag.as_bytes());
            put_key(&mut message, 2, 5);
            message.extend_from_slice(&(value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &message);
        }
        let mut event = Vec::new();
        put_double(&mut event, 1, seconds(unix_ns));
        put_key(&mut event, 2, 0);
        put_varint(&mut event, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)?;
        self.out.flush()
    }

    fn record(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_checksum(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_checksum(data).to_le_bytes());
        self.out.write_all(&record)
    }
}

fn seconds(unix_ns: u64) -> f64 {
    unix_ns as f64 / 1e9
}

/// As TFRecords want it, so that a checksum of data that holds checksums is still a good one.
fn masked_checksum(data: &[u8]) -> u32 {
    crc32c::crc32c(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_key(out, field, 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// The tag of a series: for utilization and memory of a GPU that of SpikingJelly's `GPUMonitor` (2.0.0), in its unit
/// (percent, MiB), so that its users find their charts again; for all others the series' name.
#[must_use]
pub fn tag_and_value(series: &str, value: f64) -> (String, f64) {
    const MIB: f64 = (1u64 << 20) as f64;
    let gpu = series
        .strip_prefix("gpu")
        .and_then(|rest| rest.split_once('/'))
        .filter(|(index, _)| index.parse::<u32>().is_ok());
    match gpu {
        Some((index, "utilization_percent")) => (format!("utilization_{index}"), value),
        Some((index, "memory_used_bytes")) => (format!("memory_used_{index}"), value / MIB),
        _ => (series.to_owned(), value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Fields of a protobuf message: number, and the value's bytes (of a varint its eight).
    fn fields(mut data: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn varint(data: &mut &[u8]) -> u64 {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = data[0];
                *data = &data[1..];
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        }
        let mut all = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let length = match key & 7 {
                0 => {
                    all.push((key >> 3, varint(&mut data).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => varint(&mut data) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            all.push((key >> 3, data[..length].to_vec()));
            data = &data[length..];
        }
        all
    }

    /// The records of a file, their checksums checked.
    fn records(mut data: &[u8]) -> Vec<Vec<u8>> {
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let mut all = Vec::new();
        while !data.is_empty() {
            let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
            assert_eq!(number(&data[8..12]), masked_checksum(&data[..8]));
            let record = &data[12..12 + length];
            assert_eq!(
                number(&data[12 + length..16 + length]),
                masked_checksum(record)
            );
            all.push(record.to_vec());
            data = &data[16 + length..];
        }
        all
    }

    #[test]
    fn the_checksum_is_the_one_that_tensorflow_writes() {
        // The CRC-32C of 32 zero bytes is 0x8a9136aa (RFC 3720, B.4); masked as record_writer.h says.
        let masked = 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_checksum(&[0; 32]), masked);
    }

    #[test]
    fn the_first_record_tells_the_version() {
        let file = EventFile::new(Vec::new(), 1_500_000_000).unwrap();
        let records = records(&file.out);
        assert_eq!(
            fields(&records[0]),
            [
                (1, 1.5f64.to_le_bytes().to_vec()),
                (3, b"brain.Event:2".to_vec())
            ]
        );
    }

    #[test]
    fn tags_are_those_of_the_reference_where_it_has_them() {
        assert_eq!(
            tag_and_value("gpu3/utilization_percent", 50.0),
            ("utilization_3".into(), 50.0)
        );
        assert_eq!(
            tag_and_value("gpu0/memory_used_bytes", 1048576.0),
            ("memory_used_0".into(), 1.0)
        );
        for own in [
            "gpu0/power_mw",
            "gpu0/process/7/memory_used_bytes",
            "host/memory_used_bytes",
            "gpux/memory_used_bytes",
        ] {
            assert_eq!(tag_and_value(own, 7.0), (own.into(), 7.0));
        }
    }

    proptest! {
        #[test]
        fn scalars_are_read_back(
            step in any::<u64>(),
            unix_ns in any::<u64>(),
            values in proptest::collection::vec(("[a-z0-9/_]{0,300}", -1e30..1e30f64), 0..5),
        ) {
            let mut file = EventFile::new(Vec::new(), 0).unwrap();
            file.scalars(unix_ns, step, values.iter().map(|(tag, value)| (tag.as_str(), *value))).unwrap();
            let event = fields(&records(&file.out)[1]);
            prop_assert_eq!(&event[0], &(1, seconds(unix_ns).to_le_bytes().to_vec()));
            prop_assert_eq!(&event[1], &(2, step.to_le_bytes().to_vec()));
            prop_assert_eq!(event[2].0, 5);
            let read: Vec<_> = fields(&event[2].1).iter().map(|(_, value)| fields(value)).collect();
            let written: Vec<_> = values
                .iter()
                .map(|(tag, value)| vec![(1, tag.as_bytes().to_vec()), (2, (*value as f32).to_le_bytes().to_vec())])
                .collect();
            prop_assert_eq!(read, written);
        }
    }
}
