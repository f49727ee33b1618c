//! Integers in bytes: the varints of the format, and a cursor that never reads past its end.

use crate::error::Corrupt;

/// Appends `value` in groups of seven bits, lowest first; every byte but the last has its top bit set.
#[inline]
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// Small magnitudes of either sign become small numbers: 0, -1, 1, -2 ... become 0, 1, 2, 3 ...
#[inline]
pub(crate) const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

/// The inverse of [`zigzag`].
#[inline]
pub(crate) const fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

/// `a - b` as a zigzag number; every pair of `u64` has one.
#[inline]
pub(crate) const fn difference(a: u64, b: u64) -> u64 {
    zigzag(a.wrapping_sub(b).cast_signed())
}

/// The `a` that gave `difference(a, b)`.
#[inline]
pub(crate) const fn add_difference(b: u64, difference: u64) -> u64 {
    b.wrapping_add(unzigzag(difference).cast_unsigned())
}

/// A length as the `u64` that the format stores.
#[inline]
pub(crate) const fn len64(length: usize) -> u64 {
    length as u64
}

/// A length as a `u32`, where the caller has bounded it (blocks and frames are far below 4 GiB).
#[inline]
pub(crate) fn len32(length: usize) -> u32 {
    debug_assert!(
        u32::try_from(length).is_ok(),
        "length {length} was not bounded"
    );
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Reads forward through bytes that nobody vouches for.
#[derive(Clone, Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], Corrupt> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(Corrupt::from("bytes end early"))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Corrupt> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(Corrupt::from("bytes end early"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Corrupt> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Corrupt> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Corrupt> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Corrupt> {
        self.array().map(u64::from_le_bytes)
    }

    #[inline]
    pub(crate) fn varint(&mut self) -> Result<u64, Corrupt> {
        let mut value = 0u64;
        let mut shift = 0u32;
        loop {
            let (&byte, rest) = self
                .rest
                .split_first()
                .ok_or(Corrupt::from("a varint ends early"))?;
            self.rest = rest;
            if shift == 63 && byte > 1 {
                return Err(Corrupt::from("a varint is longer than 64 bits"));
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
            shift += 7;
        }
    }

    pub(crate) fn varint_u32(&mut self) -> Result<u32, Corrupt> {
        u32::try_from(self.varint()?).map_err(|_| Corrupt::from("a number is larger than 32 bits"))
    }

    /// A count of things that take at least `least_bytes` each in what follows, so that a wrong count cannot ask for more
    /// memory than the bytes that are there justify.
    pub(crate) fn count(&mut self, least_bytes: usize) -> Result<usize, Corrupt> {
        let count =
            usize::try_from(self.varint()?).map_err(|_| Corrupt::from("a count is too large"))?;
        if count > self.rest.len() / least_bytes.max(1) {
            return Err(Corrupt::from(
                "a count is larger than the bytes that follow",
            ));
        }
        Ok(count)
    }
}
