//! Loops over elements that lie behind each other, compiled once per instruction set.
//!
//! Each loop is plain Rust over fixed-size rows of lanes. Marked `inline(always)`, it is compiled anew inside
//! each of the functions of [`Kernels`], which differ in nothing but the instruction set that the compiler may use. The number of
//! lanes is fixed in the source, so that float sums are the same on every machine.

use super::element::{Element, Float, Integer, Lane};

/// Rows between two looks at whether to stop: 4 KiB at first, 16 KiB later.
const ROWS: [usize; 2] = [32, 128];

/// The most elements that [`Element::values`] takes at once.
pub(super) const PIECE: usize = 4096;

/// The most elements that [`Kernels::weighted_scan`] takes at once.
pub(super) const WEIGHTED_PIECE: usize = 1 << 14;

/// The greatest weight for which [`WEIGHTED_PIECE`] elements in 16 lanes of 32 bits cannot overflow.
pub(super) const GREATEST_WEIGHT: u32 = u32::MAX / ((WEIGHTED_PIECE / 16) as u32 + 1);

/// What one look at zeros and ones gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scan {
    /// Every element is 0 or 1.
    pub(super) binary: bool,
    /// Elements that are not zero; means nothing after an early stop.
    pub(super) nonzeros: u64,
}

/// [`Scan`] with a weight per element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WeightedScan {
    pub(super) scan: Scan,
    /// Sum of the weights of the elements that are not zero.
    pub(super) weighted: u64,
}

/// A sum of floats or of integers: the other half is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sum {
    float: f64,
    integer: i128,
}

impl Sum {
    pub(super) const fn float(float: f64) -> Self {
        Self { float, integer: 0 }
    }

    pub(super) const fn integer(integer: i128) -> Self {
        Self { float: 0.0, integer }
    }

    #[must_use]
    pub(super) fn plus(self, other: Self) -> Self {
        Self { float: self.float + other.float, integer: self.integer.saturating_add(other.integer) }
    }

    #[must_use]
    pub(super) fn times(self, factor: u64) -> Self {
        // A zero factor must not make NaN of an infinite sum: nothing was added zero times.
        let float = if factor == 0 { 0.0 } else { self.float * factor as f64 };
        Self { float, integer: self.integer.saturating_mul(factor.into()) }
    }

    pub(super) fn total(self) -> f64 {
        self.float + self.integer as f64
    }
}

/// What a look at the values gives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Values {
    pub(super) nonzeros: u64,
    pub(super) sum: Sum,
    /// NaN if any element is; the neutral element if there are none. `None` for complex numbers.
    pub(super) range: Option<(f64, f64)>,
}

/// The values of `count` zeros and ones.
#[inline(always)]
pub(super) fn binary_values(count: usize, nonzeros: u64) -> Values {
    let least = if count as u64 > nonzeros { 0.0 } else { 1.0 };
    let greatest = if nonzeros > 0 { 1.0 } else { 0.0 };
    let range = if count == 0 { (f64::INFINITY, f64::NEG_INFINITY) } else { (least, greatest) };
    Values { nonzeros, sum: Sum::integer(nonzeros.into()), range: Some(range) }
}

#[inline(always)]
fn total<L: Lane, const N: usize>(lanes: [L; N]) -> u64 {
    lanes.into_iter().map(Into::into).sum()
}

/// Binary, and nonzeros. With `stop`, gives up once an element is neither 0 nor 1.
#[inline(always)]
pub(super) fn scan<E: Element, const LANES: usize>(data: &[E::Bytes], stop: bool) -> Scan {
    let (rows, rest) = data.as_chunks::<LANES>();
    let mut binary = true;
    let mut nonzeros = 0u64;
    for &element in rest {
        nonzeros += u64::from(E::nonzero(element));
        binary &= !E::other(element);
    }
    let mut rows = rows;
    let mut take = ROWS[0];
    while !rows.is_empty() && (binary || !stop) {
        let (now, later) = rows.split_at(take.min(rows.len()));
        let mut counts = [E::Lane::default(); LANES];
        let mut others = [E::Lane::default(); LANES];
        for row in now {
            for lane in 0..LANES {
                // At most 128 rows: even 8-bit lanes cannot overflow.
                counts[lane] += E::nonzero(row[lane]).into();
                others[lane] |= E::other(row[lane]).into();
            }
        }
        nonzeros += total(counts);
        binary &= total(others) == 0;
        rows = later;
        take = ROWS[1];
    }
    Scan { binary, nonzeros }
}

/// Binary, nonzeros, and the weights of the nonzeros. As many weights as elements, at most [`WEIGHTED_PIECE`], none above
/// [`GREATEST_WEIGHT`].
#[inline(always)]
pub(super) fn weighted_scan<E: Element, const LANES: usize>(data: &[E::Bytes], weights: &[u32]) -> WeightedScan {
    let (rows, rest) = data.as_chunks::<LANES>();
    let (weight_rows, weight_rest) = weights.as_chunks::<LANES>();
    let mut counts = [0u32; LANES];
    let mut others = [0u32; LANES];
    let mut weighted = [0u32; LANES];
    for (row, weight_row) in rows.iter().zip(weight_rows) {
        for lane in 0..LANES {
            let nonzero = E::nonzero(row[lane]);
            counts[lane] += u32::from(nonzero);
            others[lane] |= u32::from(E::other(row[lane]));
            weighted[lane] = weighted[lane].wrapping_add(if nonzero { weight_row[lane] } else { 0 });
        }
    }
    let mut binary = total(others) == 0;
    let mut nonzeros = total(counts);
    let mut sum = total(weighted);
    for (&element, &weight) in rest.iter().zip(weight_rest) {
        let nonzero = E::nonzero(element);
        nonzeros += u64::from(nonzero);
        binary &= !E::other(element);
        sum += if nonzero { u64::from(weight) } else { 0 };
    }
    WeightedScan { scan: Scan { binary, nonzeros }, weighted: sum }
}

/// Adds 1 to the count of every element that is not zero.
#[inline(always)]
fn count<E: Element>(data: &[E::Bytes], counts: &mut [u64]) {
    for (&element, count) in data.iter().zip(counts) {
        *count += u64::from(E::nonzero(element));
    }
}

/// Everything about floats.
#[inline(always)]
pub(super) fn float_values<E: Float, const LANES: usize>(data: &[E::Bytes]) -> Values {
    let (rows, rest) = data.as_chunks::<LANES>();
    let mut counts = [0u32; LANES];
    let mut sums = [0f64; LANES];
    let mut least = [E::INFINITY; LANES];
    let mut greatest = [E::NEGATIVE_INFINITY; LANES];
    for row in rows {
        for lane in 0..LANES {
            let value = E::value(row[lane]);
            counts[lane] += u32::from(E::nonzero(row[lane]));
            sums[lane] += value.into();
            // As the instruction does it: a NaN leaves the old value.
            least[lane] = if value < least[lane] { value } else { least[lane] };
            greatest[lane] = if value > greatest[lane] { value } else { greatest[lane] };
        }
    }
    let mut nonzeros = total(counts);
    let mut sum: f64 = sums.into_iter().sum();
    let mut range = (f64::INFINITY, f64::NEG_INFINITY);
    let mut widen = |low: f64, high: f64| {
        range.0 = if low < range.0 { low } else { range.0 };
        range.1 = if high > range.1 { high } else { range.1 };
    };
    for lane in 0..LANES {
        widen(least[lane].into(), greatest[lane].into());
    }
    for &element in rest {
        let value = E::value(element).into();
        nonzeros += u64::from(E::nonzero(element));
        sum += value;
        widen(value, value);
    }
    // A NaN makes the sum NaN, but so do infinities of both signs.
    if sum.is_nan() && data.iter().any(|&element| E::value(element).into().is_nan()) {
        range = (f64::NAN, f64::NAN);
    }
    Values { nonzeros, sum: Sum::float(sum), range: Some(range) }
}

/// Sum of value times weight.
#[inline(always)]
pub(super) fn float_weighted_sum<E: Float, const LANES: usize>(data: &[E::Bytes], weights: &[u32]) -> Sum {
    // Zero times infinity is NaN, and an element that feeds no output adds nothing.
    let term = |element, weight: u32| {
        let value: f64 = E::value(element).into();
        if weight == 0 { 0.0 } else { value * f64::from(weight) }
    };
    let (rows, rest) = data.as_chunks::<LANES>();
    let (weight_rows, weight_rest) = weights.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for (row, weight_row) in rows.iter().zip(weight_rows) {
        for lane in 0..LANES {
            sums[lane] += term(row[lane], weight_row[lane]);
        }
    }
    let tail: f64 = rest.iter().zip(weight_rest).map(|(&x, &w)| term(x, w)).sum();
    Sum::float(sums.into_iter().sum::<f64>() + tail)
}

/// Everything about integers, at most [`PIECE`] of them.
#[inline(always)]
pub(super) fn integer_values<E: Integer, const LANES: usize>(data: &[E::Bytes]) -> Values {
    let (rows, rest) = data.as_chunks::<LANES>();
    let mut counts = [0u32; LANES];
    let mut highs = [0i64; LANES];
    let mut lows = [0i64; LANES];
    let mut least = [E::GREATEST; LANES];
    let mut greatest = [E::LEAST; LANES];
    for row in rows {
        for lane in 0..LANES {
            let value = E::value(row[lane]);
            let (high, low) = E::parts(value);
            counts[lane] += u32::from(E::nonzero(row[lane]));
            highs[lane] += high;
            lows[lane] += low;
            least[lane] = value.min(least[lane]);
            greatest[lane] = value.max(greatest[lane]);
        }
    }
    let mut nonzeros = total(counts);
    let (mut low, mut high) = (E::GREATEST, E::LEAST);
    let mut sum = 0i128;
    for lane in 0..LANES {
        sum += (i128::from(highs[lane]) << 32) + i128::from(lows[lane]);
        low = low.min(least[lane]);
        high = high.max(greatest[lane]);
    }
    for &element in rest {
        let value = E::value(element);
        nonzeros += u64::from(E::nonzero(element));
        sum += value.into();
        low = low.min(value);
        high = high.max(value);
    }
    let range = if data.is_empty() {
        (f64::INFINITY, f64::NEG_INFINITY)
    } else {
        (low.into() as f64, high.into() as f64)
    };
    Values { nonzeros, sum: Sum::integer(sum), range: Some(range) }
}

/// Sum of value times weight, exact.
#[inline(always)]
pub(super) fn integer_weighted_sum<E: Integer>(data: &[E::Bytes], weights: &[u32]) -> Sum {
    Sum::integer(data.iter().zip(weights).map(|(&x, &w)| E::value(x).into() * i128::from(w)).sum())
}

/// What complex numbers have: no order, and the sum of the real parts.
#[inline(always)]
pub(super) fn complex_values<E: Element, const LANES: usize>(data: &[E::Bytes], real: impl Fn(E::Bytes) -> f64) -> Values {
    let (rows, rest) = data.as_chunks::<LANES>();
    let mut counts = [0u32; LANES];
    let mut sums = [0f64; LANES];
    for row in rows {
        for lane in 0..LANES {
            counts[lane] += u32::from(E::nonzero(row[lane]));
            sums[lane] += real(row[lane]);
        }
    }
    let mut nonzeros = total(counts);
    let mut sum: f64 = sums.into_iter().sum();
    for &element in rest {
        nonzeros += u64::from(E::nonzero(element));
        sum += real(element);
    }
    Values { nonzeros, sum: Sum::float(sum), range: None }
}

/// The loops for one instruction set.
pub(super) struct Kernels<E: Element> {
    scan: unsafe fn(&[E::Bytes], bool) -> Scan,
    weighted_scan: unsafe fn(&[E::Bytes], &[u32]) -> WeightedScan,
    values: unsafe fn(&[E::Bytes]) -> Values,
    weighted_sum: unsafe fn(&[E::Bytes], &[u32]) -> Sum,
    count: unsafe fn(&[E::Bytes], &mut [u64]),
}

macro_rules! instruction_set {
    ($module:ident $(, enable = $features:literal)?) => {
        mod $module {
            use super::{Element, Kernels, Scan, Sum, Values, WeightedScan};

            $(#[target_feature(enable = $features)])?
            fn scan<E: Element>(data: &[E::Bytes], stop: bool) -> Scan {
                E::scan(data, stop)
            }
            $(#[target_feature(enable = $features)])?
            fn weighted_scan<E: Element>(data: &[E::Bytes], weights: &[u32]) -> WeightedScan {
                super::weighted_scan::<E, 16>(data, weights)
            }
            $(#[target_feature(enable = $features)])?
            fn values<E: Element>(data: &[E::Bytes]) -> Values {
                E::values(data)
            }
            $(#[target_feature(enable = $features)])?
            fn weighted_sum<E: Element>(data: &[E::Bytes], weights: &[u32]) -> Sum {
                E::weighted_sum(data, weights)
            }
            $(#[target_feature(enable = $features)])?
            fn count<E: Element>(data: &[E::Bytes], counts: &mut [u64]) {
                super::count::<E>(data, counts);
            }

            pub(super) const fn kernels<E: Element>() -> Kernels<E> {
                Kernels {
                    scan: scan::<E>,
                    weighted_scan: weighted_scan::<E>,
                    values: values::<E>,
                    weighted_sum: weighted_sum::<E>,
                    count: count::<E>,
                }
            }
        }
    };
}

// Elsewhere than on x86-64 this is all there is: aarch64 has NEON in its baseline.
instruction_set!(baseline);
#[cfg(target_arch = "x86_64")]
instruction_set!(avx2, enable = "avx2,bmi1,bmi2,lzcnt,popcnt");
#[cfg(target_arch = "x86_64")]
instruction_set!(avx512, enable = "avx2,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl");

impl<E: Element> Kernels<E> {
    const BASELINE: &'static Self = &baseline::kernels();
    #[cfg(target_arch = "x86_64")]
    const AVX2: &'static Self = &avx2::kernels();
    #[cfg(target_arch = "x86_64")]
    const AVX512: &'static Self = &avx512::kernels();

    /// The fastest loops that this processor can run.
    #[inline]
    pub(super) fn get() -> &'static Self {
        // The standard library asks the processor once and keeps the answer.
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512f")
                && has_avx2()
            {
                return Self::AVX512;
            }
            if has_avx2() {
                return Self::AVX2;
            }
        }
        Self::BASELINE
    }

    /// All loops that this processor can run.
    #[cfg(test)]
    fn all() -> Vec<&'static Self> {
        let mut all = vec![Self::BASELINE, Self::get()];
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            all.push(Self::AVX2);
        }
        all
    }

    /// See [`scan`].
    #[inline]
    pub(super) fn scan(&self, data: &[E::Bytes], stop: bool) -> Scan {
        // SAFETY: `get` and `all` give out loops whose instruction set the processor has; `baseline` needs none.
        unsafe { (self.scan)(data, stop) }
    }

    /// See [`weighted_scan`].
    #[inline]
    pub(super) fn weighted_scan(&self, data: &[E::Bytes], weights: &[u32]) -> WeightedScan {
        debug_assert!(data.len() == weights.len() && data.len() <= WEIGHTED_PIECE);
        // SAFETY: as in `scan`.
        unsafe { (self.weighted_scan)(data, weights) }
    }

    /// See [`Element::values`].
    #[inline]
    pub(super) fn values(&self, data: &[E::Bytes]) -> Values {
        debug_assert!(data.len() <= PIECE);
        // SAFETY: as in `scan`.
        unsafe { (self.values)(data) }
    }

    /// See [`Element::weighted_sum`].
    #[inline]
    pub(super) fn weighted_sum(&self, data: &[E::Bytes], weights: &[u32]) -> Sum {
        // SAFETY: as in `scan`.
        unsafe { (self.weighted_sum)(data, weights) }
    }

    /// Adds 1 to the count of every element that is not zero.
    #[inline]
    pub(super) fn count(&self, data: &[E::Bytes], counts: &mut [u64]) {
        // SAFETY: as in `scan`.
        unsafe { (self.count)(data, counts) }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}
