//! The file's header and its frames: what every reader, also of another version, can step over.

use crate::bytes::Cursor;
use crate::error::{Corrupt, TraceError};

/// First bytes of every trace. The first has its top bit set and the last is a line feed, so that a transfer that
/// mangles text mangles them.
pub(crate) const MAGIC: [u8; 8] = *b"\x89OPTAPE\n";
/// Last bytes of every finished trace.
pub(crate) const END_MAGIC: [u8; 8] = *b"\x89OPTEND\n";
/// Version that this crate writes.
pub(crate) const VERSION: (u16, u16) = (1, 0);
/// Oldest major version that this crate reads; the newest is that of [`VERSION`].
pub(crate) const OLDEST_MAJOR: u16 = 1;
/// Length of the header that this crate writes.
pub(crate) const HEADER_LEN: u32 = 24;
/// No header is longer.
const HEADER_LIMIT: u32 = 4096;

/// Length of a frame's head.
pub(crate) const FRAME_HEAD: usize = 20;
/// First bytes of every frame.
const SYNC: [u8; 2] = [0xf5, 0x0a];
/// No payload is longer, so that a wrong length cannot ask for more.
pub(crate) const PAYLOAD_LIMIT: u32 = 256 << 20;
/// No compressed payload or column decodes to more.
pub(crate) const RAW_LIMIT: usize = 64 << 20;

/// Kinds of frames. 0 is never used, so that zeros are no frame; 11 to 127 are for later versions, 128 to 255 for private use.
pub(crate) mod kind {
    /// The run's information, first frame of every file.
    pub(crate) const RUN: u8 = 1;
    /// A stream begins.
    pub(crate) const STREAM: u8 = 2;
    /// Dictionary entries of a stream.
    pub(crate) const DEFINITIONS: u8 = 3;
    /// Records of a stream.
    pub(crate) const BLOCK: u8 = 4;
    /// Sums over a range of a stream's records.
    pub(crate) const SUMMARY: u8 = 5;
    /// Where a part of a stream's frames stand.
    pub(crate) const INDEX: u8 = 6;
    /// A stream has ended.
    pub(crate) const STREAM_END: u8 = 7;
    /// The run has ended.
    pub(crate) const RUN_END: u8 = 8;
    /// Where the index frames stand; last frame of a finished file.
    pub(crate) const FOOTER: u8 = 9;
    /// Kept values of a stream.
    pub(crate) const VALUES: u8 = 10;

    /// The name that messages use.
    pub(crate) const fn name(kind: u8) -> &'static str {
        match kind {
            RUN => "run",
            STREAM => "stream",
            DEFINITIONS => "definitions",
            BLOCK => "block",
            SUMMARY => "summary",
            INDEX => "index",
            STREAM_END => "stream end",
            RUN_END => "run end",
            FOOTER => "footer",
            VALUES => "values",
            _ => "unknown",
        }
    }
}

/// Bit of [`FrameHead::flags`]: the payload is its raw length (u32) and a zstd frame.
pub(crate) const COMPRESSED: u8 = 1;
/// All flags that this version knows.
const KNOWN_FLAGS: u8 = COMPRESSED;

/// What stands before every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHead {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) length: u32,
    pub(crate) payload_checksum: u32,
}

impl FrameHead {
    pub(crate) fn encode(&self) -> [u8; FRAME_HEAD] {
        let mut out = Vec::with_capacity(FRAME_HEAD);
        out.extend(SYNC);
        out.push(self.kind);
        out.push(self.flags);
        out.extend(self.stream.to_le_bytes());
        out.extend(self.length.to_le_bytes());
        out.extend(self.payload_checksum.to_le_bytes());
        let checksum = crc32c::crc32c(&out);
        out.extend(checksum.to_le_bytes());
        let mut head = [0; FRAME_HEAD];
        head.copy_from_slice(&out);
        head
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Corrupt> {
        let mut cursor = Cursor::new(bytes);
        let head = cursor.take(FRAME_HEAD)?;
        let checked = head.get(..FRAME_HEAD - 4).unwrap_or_default();
        let mut cursor = Cursor::new(head);
        if cursor.take(2)? != SYNC {
            return Err(Corrupt::from("no frame begins here"));
        }
        let kind = cursor.u8()?;
        let flags = cursor.u8()?;
        let stream = cursor.u32()?;
        let length = cursor.u32()?;
        let payload_checksum = cursor.u32()?;
        if cursor.u32()? != crc32c::crc32c(checked) {
            return Err(Corrupt::from("the checksum of a frame's head is wrong"));
        }
        if length > PAYLOAD_LIMIT {
            return Err(Corrupt::from(format!(
                "a frame of {length} bytes is longer than the limit of {PAYLOAD_LIMIT}"
            )));
        }
        Ok(Self {
            kind,
            flags,
            stream,
            length,
            payload_checksum,
        })
    }

    pub(crate) fn check(&self, payload: &[u8]) -> Result<(), Corrupt> {
        if crc32c::crc32c(payload) == self.payload_checksum {
            Ok(())
        } else {
            Err(Corrupt::from(format!(
                "the checksum of a {} frame is wrong",
                kind::name(self.kind)
            )))
        }
    }

    /// Head and payload together.
    pub(crate) fn total(&self) -> u64 {
        u64::from(self.length) + FRAME_HEAD as u64
    }

    /// The payload as the kind's own section of FORMAT.md describes it.
    pub(crate) fn unwrap_payload(&self, payload: Vec<u8>) -> Result<Vec<u8>, Corrupt> {
        if self.flags & !KNOWN_FLAGS != 0 {
            return Err(Corrupt::from(format!(
                "a {} frame has unknown flags {:#x}",
                kind::name(self.kind),
                self.flags
            )));
        }
        if self.flags & COMPRESSED == 0 {
            return Ok(payload);
        }
        let mut cursor = Cursor::new(&payload);
        let raw = cursor.u32()? as usize;
        crate::column::decompress(cursor.rest(), raw)
    }
}

/// The file's first bytes.
pub(crate) fn encode_header() -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN as usize);
    out.extend(MAGIC);
    out.extend(VERSION.0.to_le_bytes());
    out.extend(VERSION.1.to_le_bytes());
    out.extend(HEADER_LEN.to_le_bytes());
    out.extend([0; 4]);
    let checksum = crc32c::crc32c(&out);
    out.extend(checksum.to_le_bytes());
    out
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: (u16, u16),
    pub(crate) length: u32,
}

/// How many bytes [`decode_header`] wants, at most.
pub(crate) const HEADER_PEEK: usize = HEADER_LIMIT as usize;

/// Reads the header from the file's first bytes (up to [`HEADER_PEEK`] of them).
pub(crate) fn decode_header(bytes: &[u8], file_bytes: u64) -> Result<Header, TraceError> {
    let seen = bytes
        .get(..MAGIC.len().min(bytes.len()))
        .unwrap_or_default();
    if !MAGIC.starts_with(seen) || (bytes.is_empty() && file_bytes > 0) {
        return Err(TraceError::NotATrace {
            found: format!("\"{}\"", seen.escape_ascii()),
        });
    }
    let mut cursor = Cursor::new(bytes);
    let short = |_| TraceError::TooShort { file_bytes };
    cursor.take(MAGIC.len()).map_err(short)?;
    let version = (cursor.u16().map_err(short)?, cursor.u16().map_err(short)?);
    let length = cursor.u32().map_err(short)?;
    // Versions come before everything that a version may change.
    if version.0 > VERSION.0 {
        return Err(TraceError::VersionTooNew {
            found_major: version.0,
            found_minor: version.1,
            supported_major: VERSION.0,
        });
    }
    if version.0 < OLDEST_MAJOR {
        return Err(TraceError::VersionTooOld {
            found_major: version.0,
            found_minor: version.1,
            oldest_major: OLDEST_MAJOR,
        });
    }
    if !(HEADER_LEN..=HEADER_LIMIT).contains(&length) {
        return Err(Corrupt::from(format!("a header of {length} bytes")).at(0));
    }
    let head = bytes
        .get(..length as usize)
        .ok_or(TraceError::TooShort { file_bytes })?;
    let (checked, checksum) = head.split_at_checked(head.len() - 4).unwrap_or_default();
    if Cursor::new(checksum).u32().map_err(|e| e.at(0))? != crc32c::crc32c(checked) {
        return Err(Corrupt::from("the checksum of the header is wrong").at(0));
    }
    Ok(Header { version, length })
}
