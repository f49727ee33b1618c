//! Kept values (T8): the elements of watched tensors themselves, in frames beside the records.
//!
//! Several values share a frame, so that also small ones are compressed well: spikes are one bit each, and a compressor's table of the
//! frequencies of bytes must be paid for by many of them.

use crate::bytes::{Cursor, add_difference, difference, len64, put_varint};
use crate::dictionary::DType;
use crate::error::{Corrupt, TraceError};
use crate::frame::RAW_LIMIT;
use crate::ids::{Ordinal, WatchId};

/// A frame is written when its values have grown to this, also without a flush.
pub(crate) const FRAME_BYTES: usize = 1 << 20;
/// No value has more bytes, so that it fits into a frame with its head.
pub const VALUE_LIMIT: usize = RAW_LIMIT / 2;
/// No value has more dimensions.
const DIMENSIONS_LIMIT: usize = 64;

/// The elements of a tensor as they stand in a trace, in row-major order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Elements {
    /// As the dtype stores them, little endian.
    Raw(Vec<u8>),
    /// All are 0 or 1: a bit each, element i in bit i mod 8 of byte i / 8.
    Bits(Vec<u8>),
    /// They were to be kept and are lost: the ring was full.
    Lost,
}

impl Elements {
    const fn code(&self) -> u8 {
        match self {
            Self::Raw(_) => 0,
            Self::Bits(_) => 1,
            Self::Lost => 2,
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Raw(bytes) | Self::Bits(bytes) => bytes,
            Self::Lost => &[],
        }
    }
}

/// The value of one call of `optape::watch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// The call.
    pub ordinal: Ordinal,
    /// What was watched.
    pub watch: WatchId,
    /// The tensor's dtype, also where its elements are stored as bits.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its elements.
    pub elements: Elements,
}

impl Value {
    /// How many elements the tensor has.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.shape.iter().fold(1, |n, size| n.saturating_mul(*size))
    }

    /// Bytes of its elements as they are stored.
    pub(crate) fn bytes(&self) -> usize {
        self.elements.bytes().len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as floats; `None` where they are lost, or complex, quantized or of another dtype without one number each.
    #[must_use]
    pub fn to_f64(&self) -> Option<Vec<f64>> {
        match &self.elements {
            Elements::Lost => None,
            Elements::Bits(bytes) => {
                let count = usize::try_from(self.len()).ok()?;
                let bits = bytes
                    .iter()
                    .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1));
                Some(bits.take(count).map(f64::from).collect())
            }
            Elements::Raw(bytes) => floats(self.dtype, bytes),
        }
    }

    /// Whether the bytes are as many as dtype and shape ask for.
    pub(crate) fn check(&self) -> Result<(), Corrupt> {
        let count = self
            .shape
            .iter()
            .try_fold(1u64, |n, size| n.checked_mul(*size))
            .ok_or(Corrupt::from("a value has too many elements"))?;
        let wanted = match self.elements {
            Elements::Lost => 0,
            Elements::Bits(_) => count.div_ceil(8),
            Elements::Raw(_) => Some(self.dtype.bytes())
                .filter(|size| *size > 0)
                .and_then(|size| count.checked_mul(size))
                .ok_or(Corrupt::from("a value's dtype has no size"))?,
        };
        if wanted > len64(VALUE_LIMIT) || self.shape.len() > DIMENSIONS_LIMIT {
            return Err(Corrupt::from("a value is too large"));
        }
        if wanted == len64(self.elements.bytes().len()) {
            Ok(())
        } else {
            Err(Corrupt::from(format!(
                "a value has {} bytes where its shape asks for {wanted}",
                self.elements.bytes().len()
            )))
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "floats were asked for")]
fn floats(dtype: DType, bytes: &[u8]) -> Option<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|b| read(*b)).collect()
    }
    Some(match dtype.name() {
        "uint8" | "bool" => each(bytes, |[b]: [u8; 1]| f64::from(b)),
        "int8" => each(bytes, |b| f64::from(i8::from_le_bytes(b))),
        "int16" => each(bytes, |b| f64::from(i16::from_le_bytes(b))),
        "int32" => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
        "int64" => each(bytes, |b| i64::from_le_bytes(b) as f64),
        "uint16" => each(bytes, |b| f64::from(u16::from_le_bytes(b))),
        "uint32" => each(bytes, |b| f64::from(u32::from_le_bytes(b))),
        "uint64" => each(bytes, |b| u64::from_le_bytes(b) as f64),
        "float32" => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        "float64" => each(bytes, f64::from_le_bytes),
        "bfloat16" => each(bytes, |b| {
            f64::from(f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
        }),
        "float16" => each(bytes, |b| half(u16::from_le_bytes(b))),
        _ => return None,
    })
}

/// IEEE 754 binary16.
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let exponent = i32::from(bits >> 10 & 0x1f);
    let fraction = f64::from(bits & 0x3ff) / 1024.0;
    sign * match exponent {
        0 => fraction * 2f64.powi(-14),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        e => (1.0 + fraction) * 2f64.powi(e - 15),
    }
}

/// Where a frame of values stands, and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValuesIndex {
    /// Where the frame begins in the file.
    pub offset: u64,
    /// How many values it holds.
    pub count: u64,
    /// Least ordinal.
    pub first_ordinal: u64,
    /// Greatest ordinal.
    pub last_ordinal: u64,
}

/// Values on their way into a frame.
#[derive(Debug, Default)]
pub(crate) struct ValuesBuilder {
    heads: Vec<u8>,
    bytes: Vec<u8>,
    count: u64,
    last: u64,
    range: Option<(u64, u64)>,
}

impl ValuesBuilder {
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of the frame, about.
    pub(crate) fn len(&self) -> usize {
        self.heads.len() + self.bytes.len()
    }

    pub(crate) fn push(&mut self, value: &Value) {
        let ordinal = value.ordinal.0;
        let bytes = value.elements.bytes();
        put_varint(&mut self.heads, difference(ordinal, self.last));
        put_varint(&mut self.heads, u64::from(value.watch.0));
        self.heads.push(value.dtype.0.cast_unsigned());
        self.heads.push(value.elements.code());
        put_varint(&mut self.heads, len64(value.shape.len()));
        for size in &value.shape {
            put_varint(&mut self.heads, *size);
        }
        put_varint(&mut self.heads, len64(bytes.len()));
        self.bytes.extend_from_slice(bytes);
        self.count += 1;
        self.last = ordinal;
        self.range = Some(self.range.map_or((ordinal, ordinal), |(a, b)| {
            (a.min(ordinal), b.max(ordinal))
        }));
    }

    /// The payload, and the index entry without its offset.
    pub(crate) fn take(&mut self) -> (Vec<u8>, ValuesIndex) {
        let done = std::mem::take(self);
        let mut payload = Vec::with_capacity(done.len() + 10);
        put_varint(&mut payload, done.count);
        payload.extend(done.heads);
        payload.extend(done.bytes);
        let (first_ordinal, last_ordinal) = done.range.unwrap_or_default();
        let index = ValuesIndex {
            offset: 0,
            count: done.count,
            first_ordinal,
            last_ordinal,
        };
        (payload, index)
    }
}

/// The values of a frame.
pub(crate) fn decode(payload: &[u8]) -> Result<Vec<Value>, Corrupt> {
    const LEAST_HEAD: usize = 6;
    let mut cursor = Cursor::new(payload);
    let count = cursor.count(LEAST_HEAD)?;
    let mut heads = Vec::with_capacity(count);
    let mut ordinal = 0;
    for _ in 0..count {
        ordinal = add_difference(ordinal, cursor.varint()?);
        let watch = WatchId(cursor.varint_u32()?);
        let dtype = DType(cursor.u8()?.cast_signed());
        let code = cursor.u8()?;
        let dimensions = cursor.count(1)?;
        if dimensions > DIMENSIONS_LIMIT {
            return Err(Corrupt::from("a value has too many dimensions"));
        }
        let shape = (0..dimensions)
            .map(|_| cursor.varint())
            .collect::<Result<Vec<u64>, Corrupt>>()?;
        let length =
            usize::try_from(cursor.varint()?).map_err(|_| Corrupt::from("a value is too large"))?;
        heads.push((Ordinal(ordinal), watch, dtype, code, shape, length));
    }
    let mut values = Vec::with_capacity(count);
    for (ordinal, watch, dtype, code, shape, length) in heads {
        let bytes = cursor.take(length)?.to_vec();
        let elements = match code {
            0 => Elements::Raw(bytes),
            1 => Elements::Bits(bytes),
            2 => Elements::Lost,
            _ => return Err(Corrupt::from(format!("a value is stored in way {code}"))),
        };
        let value = Value {
            ordinal,
            watch,
            dtype,
            shape,
            elements,
        };
        value.check()?;
        values.push(value);
    }
    Ok(values)
}

/// What a frame holds, from its values' heads.
pub(crate) fn index_of(payload: &[u8], offset: u64) -> Result<ValuesIndex, Corrupt> {
    let values = decode(payload)?;
    let ordinals = || values.iter().map(|v| v.ordinal.0);
    Ok(ValuesIndex {
        offset,
        count: len64(values.len()),
        first_ordinal: ordinals().min().unwrap_or(0),
        last_ordinal: ordinals().max().unwrap_or(0),
    })
}

/// Packs elements into bits where all of them are 0 or 1 as the dtype stores these; `None` where one is not, or the dtype is no number
/// of one, two, four or eight bytes. A negative zero is not 0: nothing is lost.
#[must_use]
pub fn pack_bits(dtype: DType, raw: &[u8]) -> Option<Vec<u8>> {
    fn pack<const N: usize>(raw: &[u8], one: [u8; N]) -> Option<Vec<u8>> {
        let (elements, rest) = raw.as_chunks::<N>();
        if !rest.is_empty() {
            return None;
        }
        let mut bits = Vec::with_capacity(elements.len().div_ceil(8));
        for eight in elements.chunks(8) {
            let mut byte = 0;
            for (bit, element) in eight.iter().enumerate() {
                if *element == one {
                    byte |= 1 << bit;
                } else if *element != [0; N] {
                    return None;
                }
            }
            bits.push(byte);
        }
        Some(bits)
    }
    match dtype.name() {
        "bool" | "uint8" | "int8" => pack(raw, [1]),
        "int16" | "uint16" => pack(raw, 1i16.to_le_bytes()),
        "int32" | "uint32" => pack(raw, 1i32.to_le_bytes()),
        "int64" | "uint64" => pack(raw, 1i64.to_le_bytes()),
        "float16" => pack(raw, 0x3c00u16.to_le_bytes()),
        "bfloat16" => pack(raw, 0x3f80u16.to_le_bytes()),
        "float32" => pack(raw, 1f32.to_le_bytes()),
        "float64" => pack(raw, 1f64.to_le_bytes()),
        _ => None,
    }
}

impl crate::reader::Trace {
    /// The kept values of a stream, in the order of the file, which is that of their calls. After an error nothing more comes.
    ///
    /// Values that were to be kept and did not arrive are [`Elements::Lost`] where the daemon knows of them; calls of a watch that keeps values
    /// without any value here were lost before.
    pub fn values(
        &self,
        stream: crate::ids::StreamId,
    ) -> impl Iterator<Item = Result<Value, TraceError>> + '_ {
        let state = self.stream(stream);
        let (frames, missing) = match state {
            Ok(state) => (state.values(), None),
            Err(error) => (&[][..], Some(Err(error))),
        };
        let mut failed = false;
        let all = frames.iter().map_while(move |entry| {
            if failed {
                return None;
            }
            match self.values_of(stream, entry) {
                Ok(values) => Some(values.into_iter().map(Ok).collect::<Vec<_>>()),
                Err(error) => {
                    failed = true;
                    Some(vec![Err(error)])
                }
            }
        });
        missing.into_iter().chain(all.flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value() -> impl Strategy<Value = Value> {
        let shape = prop::collection::vec(0u64..5, 0..4);
        let dtype = prop::sample::select(vec![0i8, 1, 2, 3, 4, 5, 6, 7, 9, 11, 15]);
        (0u64..1 << 40, 0u32..9, dtype, shape, 0u8..3, any::<u64>()).prop_map(
            |(ordinal, watch, dtype, shape, way, seed)| {
                let count: u64 = shape.iter().product();
                let size = DType(dtype).bytes();
                let noise = |n: u64| {
                    (0..n)
                        .map(|i| (seed.rotate_left(i as u32 % 64) ^ i) as u8)
                        .collect()
                };
                let elements = match way {
                    0 => Elements::Raw(noise(count * size)),
                    1 => Elements::Bits(noise(count.div_ceil(8))),
                    _ => Elements::Lost,
                };
                Value {
                    ordinal: Ordinal(ordinal),
                    watch: WatchId(watch),
                    dtype: DType(dtype),
                    shape,
                    elements,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn values_come_back(values in prop::collection::vec(value(), 0..20)) {
            let mut builder = ValuesBuilder::default();
            values.iter().for_each(|v| builder.push(v));
            let (payload, index) = builder.take();
            prop_assert_eq!(decode(&payload).unwrap(), values);
            prop_assert_eq!(index_of(&payload, 0).unwrap(), index);
            prop_assert!(builder.is_empty());
        }

        #[test]
        fn cut_values_are_an_error(values in prop::collection::vec(value(), 1..9), cut in any::<prop::sample::Index>()) {
            let mut builder = ValuesBuilder::default();
            values.iter().for_each(|v| builder.push(v));
            let (payload, _) = builder.take();
            prop_assert!(decode(&payload[..cut.index(payload.len())]).is_err());
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn bits_say_what_the_elements_said(spikes in prop::collection::vec(any::<bool>(), 0..70)) {
            let numbers: Vec<f64> = spikes.iter().map(|s| f64::from(u8::from(*s))).collect();
            let stored: [(i8, Vec<u8>); 4] = [
                (6, numbers.iter().flat_map(|n| (*n as f32).to_le_bytes()).collect()),
                (7, numbers.iter().flat_map(|n| n.to_le_bytes()).collect()),
                (11, spikes.iter().map(|s| u8::from(*s)).collect()),
                (4, spikes.iter().flat_map(|s| i64::from(*s).to_le_bytes()).collect()),
            ];
            for (dtype, raw) in stored {
                let bits = pack_bits(DType(dtype), &raw).unwrap();
                let value = |elements| Value {
                    ordinal: Ordinal(0),
                    watch: WatchId(0),
                    dtype: DType(dtype),
                    shape: vec![spikes.len() as u64],
                    elements,
                };
                prop_assert_eq!(value(Elements::Bits(bits)).to_f64().unwrap(), numbers.clone());
                prop_assert_eq!(value(Elements::Raw(raw)).to_f64().unwrap(), numbers.clone());
            }
        }
    }

    #[test]
    fn only_zeros_and_ones_are_packed() {
        let pack = |x: f32| pack_bits(DType(6), &x.to_le_bytes());
        assert_eq!(pack(1.0), Some(vec![1]));
        assert_eq!(pack(0.0), Some(vec![0]));
        assert_eq!(pack(-0.0), None);
        assert_eq!(pack(0.5), None);
        assert_eq!(pack(f32::NAN), None);
        assert_eq!(pack_bits(DType(9), &[0; 8]), None, "complex");
    }

    #[test]
    fn half_precision() {
        for (bits, number) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x3555, 0.333_251_953_125),
            (1, 2f64.powi(-24)),
            (0x7c00, f64::INFINITY),
        ] {
            assert_eq!(half(bits), number);
        }
        assert!(half(0x7e00).is_nan());
    }

    #[test]
    fn a_value_larger_than_its_shape_is_refused() {
        let mut builder = ValuesBuilder::default();
        builder.push(&Value {
            ordinal: Ordinal(1),
            watch: WatchId(0),
            dtype: DType(6),
            shape: vec![1 << 40, 1 << 40],
            elements: Elements::Raw(vec![]),
        });
        assert!(decode(&builder.take().0).is_err());
    }
}
