//! What each element type says about one element, written so that loops over it become vector code.

use std::ops::{AddAssign, BitOr, BitOrAssign};

use super::kernel::{self, Values};
use super::memory::Plain;

/// A counter as wide as the elements that it counts, so that both fit the same vector registers.
pub(super) trait Lane:
    Copy
    + Default
    + PartialEq
    + From<bool>
    + Into<u64>
    + AddAssign
    + BitOr<Output = Self>
    + BitOrAssign
    + 'static
{
}
impl Lane for u8 {}
impl Lane for u16 {}
impl Lane for u32 {}
impl Lane for u64 {}

/// An element type.
pub(super) trait Element: Sized + 'static {
    /// One element in memory.
    type Bytes: Plain;
    /// Counts elements.
    type Lane: Lane;
    /// Whether there is a least and a greatest.
    const ORDERED: bool = true;

    /// Whether the element is not zero. NaN is not, negative zero is.
    fn nonzero(bytes: Self::Bytes) -> bool;

    /// Not zero if the element is neither 0 nor 1.
    fn residue(bytes: Self::Bytes) -> Self::Lane;

    /// Whether the element is neither 0 nor 1.
    #[inline(always)]
    fn other(bytes: Self::Bytes) -> bool {
        Self::residue(bytes) != Self::Lane::default()
    }

    /// The kernel that answers binary and nonzeros, with as many lanes as two 64-byte vectors hold.
    fn scan(data: &[Self::Bytes], stop: bool) -> kernel::Scan;

    /// The kernel that takes everything, least and greatest only with `RANGE`, for at most [`kernel::PIECE`] elements.
    fn values<const RANGE: bool>(data: &[Self::Bytes]) -> Values;

    /// The sum of the elements, each multiplied by its weight.
    fn weighted_sum(data: &[Self::Bytes], weights: &[u32]) -> kernel::Sum;
}

/// A floating-point type: its bits as an integer, and its value.
pub(super) trait Float: Element {
    /// `f32` where that is exact, else `f64`.
    type Value: Copy + Default + PartialOrd + Into<f64>;
    /// Greater than all.
    const INFINITY: Self::Value;
    /// Less than all.
    const NEGATIVE_INFINITY: Self::Value;
    /// The value.
    fn value(bytes: Self::Bytes) -> Self::Value;
}

/// An integer type.
pub(super) trait Integer: Element {
    /// The type.
    type Value: Copy + Ord + Into<i128>;
    /// The least of all.
    const LEAST: Self::Value;
    /// The greatest of all.
    const GREATEST: Self::Value;
    /// The value.
    fn value(bytes: Self::Bytes) -> Self::Value;
    /// The sum of at most [`kernel::PIECE`] elements.
    fn sum(data: &[Self::Bytes]) -> i128;
}

macro_rules! float {
    ($name:ident, $bytes:literal, $bits:ty, one: $one:literal, value: $value:ty = $convert:expr) => {
        #[doc = concat!("`torch.", stringify!($name), "`.")]
        pub(super) struct $name;

        impl Element for $name {
            type Bytes = [u8; $bytes];
            type Lane = $bits;

            #[inline(always)]
            fn nonzero(bytes: Self::Bytes) -> bool {
                // Shifting the sign out makes the two zeros one.
                <$bits>::from_ne_bytes(bytes) << 1 != 0
            }

            #[inline(always)]
            fn residue(bytes: Self::Bytes) -> $bits {
                let bits = <$bits>::from_ne_bytes(bytes);
                if (bits << 1 != 0) & (bits != $one) {
                    bits
                } else {
                    0
                }
            }

            #[inline(always)]
            fn scan(data: &[Self::Bytes], stop: bool) -> kernel::Scan {
                kernel::scan::<Self, { 128 / $bytes }>(data, stop)
            }

            #[inline(always)]
            fn values<const RANGE: bool>(data: &[Self::Bytes]) -> Values {
                kernel::float_values::<Self, { 128 / $bytes }, RANGE>(data)
            }

            #[inline(always)]
            fn weighted_sum(data: &[Self::Bytes], weights: &[u32]) -> kernel::Sum {
                kernel::float_weighted_sum::<Self>(data, weights)
            }
        }

        impl Float for $name {
            type Value = $value;
            const INFINITY: $value = <$value>::INFINITY;
            const NEGATIVE_INFINITY: $value = <$value>::NEG_INFINITY;

            #[inline(always)]
            fn value(bytes: Self::Bytes) -> $value {
                let convert: fn($bits) -> $value = $convert;
                convert(<$bits>::from_ne_bytes(bytes))
            }
        }
    };
}

float!(F64, 8, u64, one: 0x3ff0_0000_0000_0000, value: f64 = f64::from_bits);
float!(F32, 4, u32, one: 0x3f80_0000, value: f32 = f32::from_bits);
float!(BF16, 2, u16, one: 0x3f80, value: f32 = |bits| f32::from_bits(u32::from(bits) << 16));
float!(F16, 2, u16, one: 0x3c00, value: f32 = half_value);

/// Half precision to single, without branches and without relying on subnormal arithmetic, which torch can switch off
/// (`torch.set_flush_denormal`).
#[inline(always)]
fn half_value(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let normal = (magnitude << 13) + ((127 - 15) << 23);
    // Infinity and NaN: the exponent goes from all ones to all ones.
    let normal = if magnitude >= 0x7c00 {
        normal + ((128 - 16) << 23)
    } else {
        normal
    };
    // Below the least normal number the mantissa counts units of 2^-24.
    let subnormal = (magnitude as i32 as f32 * (1.0 / 16_777_216.0)).to_bits();
    f32::from_bits(
        sign | if magnitude < 0x0400 {
            subnormal
        } else {
            normal
        },
    )
}

macro_rules! integer {
    ($name:ident, $bytes:literal, $type:ty, $bits:ty, sum: $sum:expr) => {
        #[doc = concat!("`torch.", stringify!($type), "`, named as Rust names it.")]
        pub(super) struct $name;

        impl Element for $name {
            type Bytes = [u8; $bytes];
            type Lane = $bits;

            #[inline(always)]
            fn nonzero(bytes: Self::Bytes) -> bool {
                <$bits>::from_ne_bytes(bytes) != 0
            }

            #[inline(always)]
            fn residue(bytes: Self::Bytes) -> $bits {
                <$bits>::from_ne_bytes(bytes) & !1
            }

            #[inline(always)]
            fn scan(data: &[Self::Bytes], stop: bool) -> kernel::Scan {
                kernel::scan::<Self, { 128 / $bytes }>(data, stop)
            }

            #[inline(always)]
            fn values<const RANGE: bool>(data: &[Self::Bytes]) -> Values {
                kernel::integer_values::<Self, { 128 / $bytes }, RANGE>(data)
            }

            #[inline(always)]
            fn weighted_sum(data: &[Self::Bytes], weights: &[u32]) -> kernel::Sum {
                kernel::integer_weighted_sum::<Self>(data, weights)
            }
        }

        impl Integer for $name {
            type Value = $type;
            const LEAST: $type = <$type>::MIN;
            const GREATEST: $type = <$type>::MAX;

            #[inline(always)]
            fn value(bytes: Self::Bytes) -> $type {
                <$type>::from_ne_bytes(bytes)
            }

            #[inline(always)]
            fn sum(data: &[Self::Bytes]) -> i128 {
                $sum(data.iter().map(|&bytes| Self::value(bytes)))
            }
        }
    };
}

// Sums of a piece in the narrowest type that holds them: as many lanes as possible.
integer!(U8, 1, u8, u8, sum: narrow_sum);
integer!(I8, 1, i8, u8, sum: narrow_sum);
integer!(U16, 2, u16, u16, sum: narrow_sum);
integer!(I16, 2, i16, u16, sum: narrow_sum);
integer!(U32, 4, u32, u32, sum: wide_sum);
integer!(I32, 4, i32, u32, sum: wide_sum);
integer!(U64, 8, u64, u64, sum: |all| split_sum(all, |v: u64| ((v >> 32) as i64, (v & 0xffff_ffff) as i64)));
integer!(I64, 8, i64, u64, sum: |all| split_sum(all, |v: i64| (v >> 32, v & 0xffff_ffff)));

#[inline(always)]
fn narrow_sum<T: Into<i32>>(values: impl Iterator<Item = T>) -> i128 {
    values.map(Into::into).sum::<i32>().into()
}

#[inline(always)]
fn wide_sum<T: Into<i64>>(values: impl Iterator<Item = T>) -> i128 {
    values.map(Into::into).sum::<i64>().into()
}

/// The values come apart into `high << 32` and `low`.
#[inline(always)]
fn split_sum<T>(values: impl Iterator<Item = T>, parts: impl Fn(T) -> (i64, i64)) -> i128 {
    let (high, low) = values
        .map(parts)
        .fold((0i64, 0i64), |sum, (high, low)| (sum.0 + high, sum.1 + low));
    (i128::from(high) << 32) + i128::from(low)
}

/// `torch.bool`: any byte but 0 is true, and nothing is other than 0 or 1.
pub(super) struct Bool;

impl Element for Bool {
    type Bytes = [u8; 1];
    type Lane = u8;

    #[inline(always)]
    fn nonzero([byte]: [u8; 1]) -> bool {
        byte != 0
    }

    #[inline(always)]
    fn residue(_: [u8; 1]) -> u8 {
        0
    }

    #[inline(always)]
    fn scan(data: &[[u8; 1]], stop: bool) -> kernel::Scan {
        kernel::scan::<Self, 128>(data, stop)
    }

    #[inline(always)]
    fn values<const RANGE: bool>(data: &[[u8; 1]]) -> Values {
        kernel::binary_values(data.len(), kernel::scan::<Self, 128>(data, false).nonzeros)
    }

    #[inline(always)]
    fn weighted_sum(data: &[[u8; 1]], weights: &[u32]) -> kernel::Sum {
        kernel::Sum::integer(
            kernel::weighted_scan::<Self, 16>(data, weights)
                .weighted
                .into(),
        )
    }
}

macro_rules! complex {
    ($name:ident, $bytes:literal, $half:ty, $lane:ty, $part:ty, lanes: $lanes:literal) => {
        #[doc = concat!("Two of `", stringify!($part), "`, the real part first.")]
        pub(super) struct $name;

        impl $name {
            /// The bits of the real and of the imaginary part.
            #[inline(always)]
            fn parts(bytes: [u8; $bytes]) -> ([u8; $bytes / 2], [u8; $bytes / 2]) {
                let mut parts = ([0; $bytes / 2], [0; $bytes / 2]);
                parts.0.copy_from_slice(&bytes[..$bytes / 2]);
                parts.1.copy_from_slice(&bytes[$bytes / 2..]);
                parts
            }
        }

        impl Element for $name {
            type Bytes = [u8; $bytes];
            type Lane = $lane;
            const ORDERED: bool = false;

            #[inline(always)]
            fn nonzero(bytes: Self::Bytes) -> bool {
                let (real, imaginary) = Self::parts(bytes);
                <$part>::nonzero(real) | <$part>::nonzero(imaginary)
            }

            #[inline(always)]
            fn residue(bytes: Self::Bytes) -> $lane {
                let (real, imaginary) = Self::parts(bytes);
                (<$part>::other(real) | <$part>::nonzero(imaginary)).into()
            }

            #[inline(always)]
            fn scan(data: &[Self::Bytes], stop: bool) -> kernel::Scan {
                kernel::scan::<Self, { 128 / $bytes }>(data, stop)
            }

            #[inline(always)]
            fn values<const RANGE: bool>(data: &[Self::Bytes]) -> Values {
                kernel::complex_values::<Self, $lanes>(data, |bytes| {
                    <$part>::value(Self::parts(bytes).0).into()
                })
            }

            #[inline(always)]
            fn weighted_sum(data: &[Self::Bytes], weights: &[u32]) -> kernel::Sum {
                let real = |bytes| f64::from(<$part>::value(Self::parts(bytes).0));
                let fed = data.iter().zip(weights).filter(|&(_, &weight)| weight != 0);
                kernel::Sum::float(fed.map(|(&x, &weight)| real(x) * f64::from(weight)).sum())
            }
        }
    };
}

complex!(C32, 4, u16, u32, F16, lanes: 16);
complex!(C64, 8, u32, u64, F32, lanes: 16);
complex!(C128, 16, u64, u64, F64, lanes: 8);

/// Runs `$body` with `$element` standing for the element type of `$dtype`, or gives `$else`.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr, else $else:expr) => {{
        use optape_trace::DType;
        macro_rules! arm {
            ($type:ident) => {{
                type $element = $crate::statistics::element::$type;
                $body
            }};
        }
        match $dtype {
            DType::F32 => arm!(F32),
            DType::F64 => arm!(F64),
            DType::F16 => arm!(F16),
            DType::BF16 => arm!(BF16),
            DType::BOOL => arm!(Bool),
            DType::U8 => arm!(U8),
            DType::I8 => arm!(I8),
            DType::I16 => arm!(I16),
            DType::I32 => arm!(I32),
            DType::I64 => arm!(I64),
            DType::U16 => arm!(U16),
            DType::U32 => arm!(U32),
            DType::U64 => arm!(U64),
            DType::C32 => arm!(C32),
            DType::C64 => arm!(C64),
            DType::C128 => arm!(C128),
            _ => $else,
        }
    }};
}
pub(super) use with_element;

#[cfg(test)]
mod tests {
    use super::half_value;

    #[test]
    fn every_half_converts_as_the_half_crate_converts_it() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_value(bits), half::f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
                "{bits:#06x}: {ours} {theirs}"
            );
        }
    }
}
