//! The one place that knows bincode. FORMAT.md specifies the bytes ("Metadata encoding"), so that a
//! successor that writes the same bytes can take its place.

use bincode::{Decode, Encode, config};

use crate::error::TraceError;

/// No single metadata record may ask for more than this while it is decoded.
pub const DECODE_LIMIT_BYTES: usize = 64 << 20;

const fn configuration()
-> config::Configuration<config::LittleEndian, config::Varint, config::Limit<DECODE_LIMIT_BYTES>> {
    config::standard().with_limit::<DECODE_LIMIT_BYTES>()
}

/// Encodes `value` behind what `out` already holds.
///
/// # Errors
/// Only where a value cannot be encoded at all (none of this crate's types).
pub fn encode_into<T: Encode>(value: &T, out: &mut Vec<u8>) -> Result<(), TraceError> {
    bincode::encode_into_std_write(value, out, configuration())
        .map_err(|e| TraceError::Encode(e.to_string()))?;
    Ok(())
}

/// Encodes `value` into a new vector.
///
/// # Errors
/// As [`encode_into`].
pub fn encode<T: Encode>(value: &T) -> Result<Vec<u8>, TraceError> {
    let mut out = Vec::new();
    encode_into(value, &mut out)?;
    Ok(out)
}

/// Decodes one value from the front of `bytes`; gives it and the number of bytes read.
///
/// # Errors
/// [`TraceError::Decode`] where the bytes are not such a value or ask for more than
/// [`DECODE_LIMIT_BYTES`].
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<(T, usize), TraceError> {
    bincode::decode_from_slice(bytes, configuration())
        .map_err(|e| TraceError::Decode(e.to_string()))
}
