//! Loops over elements that lie behind each other, compiled once per instruction set.
//!
//! Each loop is plain Rust over fixed-size rows of lanes. Marked `inline(always)`, it is compiled anew inside
//! each of the functions of [`Kernels`], which differ in nothing but the instruction set that the compiler may use. The number of
//! lanes is fixed in the source, so that float sums are the same on every machine.

use std::hint::black_box;

use super::element::{Element, Float, Integer, Lane};

/// Elements that are looked at one by one before anything else: behind a zero from a ReLU soon comes a number.
const FIRST: usize = 16;

/// Rows of 128 bytes between two looks at whether to stop.
const ROWS: [usize; 3] = [2, 32, 128];

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
        Self {
            float: 0.0,
            integer,
        }
    }

    #[must_use]
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            float: self.float + other.float,
            integer: self.integer.saturating_add(other.integer),
        }
    }

    #[must_use]
    pub(super) fn times(self, factor: u64) -> Self {
        // A zero factor must not make NaN of an infinite sum: nothing was added zero times.
        let float = if factor == 0 {
            0.0
        } else {
            self.float * factor as f64
        };
        Self {
            float,
            integer: self.integer.saturating_mul(factor.into()),
        }
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
    /// NaN if any element is; the neutral element if there are none. `None` for complex numbers, and where it was not asked for.
    pub(super) range: Option<(f64, f64)>,
}

/// The values of `count` zeros and ones.
#[inline(always)]
pub(super) fn binary_values(count: usize, nonzeros: u64) -> Values {
    let least = if count as u64 > nonzeros { 0.0 } else { 1.0 };
    let greatest = if nonzeros > 0 { 1.0 } else { 0.0 };
    let range = if count == 0 {
        (f64::INFINITY, f64::NEG_INFINITY)
    } else {
        (least, greatest)
    };
    Values {
        nonzeros,
        sum: Sum::integer(nonzeros.into()),
        range: Some(range),
    }
}

#[inline(always)]
fn total<L: Lane, const N: usize>(lanes: [L; N]) -> u64 {
    lanes.into_iter().map(Into::into).sum()
}

/// Binary, and nonzeros. With `stop`, gives up once an element is neither 0 nor 1.
#[inline(always)]
pub(super) fn scan<E: Element, const LANES: usize>(data: &[E::Bytes], stop: bool) -> Scan {
    if stop && data.iter().take(FIRST).any(|&element| E::other(element)) {
        return Scan {
            binary: false,
            nonzeros: 0,
        };
    }
    // Not a constant to the compiler, so that it adds under a mask instead of turning the mask into numbers.
    let one: E::Lane = black_box(true).into();
    let none = E::Lane::default();
    let (mut rows, rest) = data.as_chunks::<LANES>();
    let mut binary = true;
    let mut nonzeros = 0u64;
    for &element in rest {
        nonzeros += u64::from(E::nonzero(element));
        binary &= !E::other(element);
    }
    let [mut take, mut next, last] = ROWS;
    while !rows.is_empty() && (binary || !stop) {
        let (now, later) = rows.split_at(take.min(rows.len()));
        let mut counts = [none; LANES];
        let mut residues = [none; LANES];
        for row in now {
            for lane in 0..LANES {
                // At most 128 rows: even 8-bit lanes cannot overflow.
                counts[lane] += if E::nonzero(row[lane]) { one } else { none };
                residues[lane] |= E::residue(row[lane]);
            }
        }
        nonzeros += total(counts);
        binary &= residues.into_iter().fold(none, |a, b| a | b) == none;
        rows = later;
        (take, next) = (next, last);
    }
    Scan { binary, nonzeros }
}

/// Binary, nonzeros, and the weights of the nonzeros. As many weights as elements, at most [`WEIGHTED_PIECE`], none above
/// [`GREATEST_WEIGHT`].
#[inline(always)]
pub(super) fn weighted_scan<E: Element, const LANES: usize>(
    data: &[E::Bytes],
    weights: &[u32],
) -> WeightedScan {
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
            weighted[lane] =
                weighted[lane].wrapping_add(if nonzero { weight_row[lane] } else { 0 });
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
    WeightedScan {
        scan: Scan { binary, nonzeros },
        weighted: sum,
    }
}

/// Adds 1 to the count of every element that is not zero.
#[inline(always)]
fn count<E: Element>(data: &[E::Bytes], counts: &mut [u64]) {
    for (&element, count) in data.iter().zip(counts) {
        *count += u64::from(E::nonzero(element));
    }
}

/// Sets `bit` in the mark of every element that is not zero. Gives whether there is any.
#[inline(always)]
fn mark<E: Element>(data: &[E::Bytes], bit: u8, marks: &mut [u8]) -> bool {
    let mut any = false;
    for (&element, mark) in data.iter().zip(marks) {
        let nonzero = E::nonzero(element);
        *mark |= u8::from(nonzero).wrapping_neg() & bit;
        any |= nonzero;
    }
    any
}

/// [`mark`], and the sum of the weights of the elements that are not zero. At most [`WEIGHTED_PIECE`] elements, and weights
/// whose sum fits into 32 bits.
#[inline(always)]
fn weighted_mark<E: Element>(data: &[E::Bytes], weights: &[u32], bit: u8, marks: &mut [u8]) -> u64 {
    let mut sum = 0u32;
    for ((&element, &weight), mark) in data.iter().zip(weights).zip(marks) {
        let nonzero = E::nonzero(element);
        *mark |= u8::from(nonzero).wrapping_neg() & bit;
        sum = sum.wrapping_add(if nonzero { weight } else { 0 });
    }
    sum.into()
}

/// Elements that are converted at once.
const CONVERTED: usize = 256;

/// Everything about floats, least and greatest only with `RANGE`. `LANES` are those of [`scan`].
#[inline(always)]
pub(super) fn float_values<E: Float, const LANES: usize, const RANGE: bool>(
    data: &[E::Bytes],
) -> Values {
    // Each question in a loop of its own: mixed widths make the compiler take vectors apart.
    let mut buffer = [E::Value::default(); CONVERTED];
    let mut least = [E::INFINITY; 32];
    let mut greatest = [E::NEGATIVE_INFINITY; 32];
    let mut sums = [0f64; 32];
    for block in data.chunks(CONVERTED) {
        let values = &mut buffer[..block.len()];
        for (value, &element) in values.iter_mut().zip(block) {
            *value = E::value(element);
        }
        let (rows, rest) = values.as_chunks::<32>();
        for row in rows {
            for lane in 0..32 {
                sums[lane] += row[lane].into();
            }
        }
        for (lane, &value) in rest.iter().enumerate() {
            sums[lane] += value.into();
        }
        if !RANGE {
            continue;
        }
        for row in rows {
            for lane in 0..32 {
                // As the instruction does it: a NaN leaves the old value.
                least[lane] = if row[lane] < least[lane] {
                    row[lane]
                } else {
                    least[lane]
                };
                greatest[lane] = if row[lane] > greatest[lane] {
                    row[lane]
                } else {
                    greatest[lane]
                };
            }
        }
        for (lane, &value) in rest.iter().enumerate() {
            least[lane] = if value < least[lane] {
                value
            } else {
                least[lane]
            };
            greatest[lane] = if value > greatest[lane] {
                value
            } else {
                greatest[lane]
            };
        }
    }
    let sum: f64 = sums.into_iter().sum();
    let nonzeros = scan::<E, LANES>(data, false).nonzeros;
    if !RANGE {
        return Values {
            nonzeros,
            sum: Sum::float(sum),
            range: None,
        };
    }
    let mut range = (f64::INFINITY, f64::NEG_INFINITY);
    for lane in 0..32 {
        range = (
            range.0.min(least[lane].into()),
            range.1.max(greatest[lane].into()),
        );
    }
    // A NaN makes the sum NaN, but so do infinities of both signs.
    if sum.is_nan()
        && data
            .iter()
            .any(|&element| E::value(element).into().is_nan())
    {
        range = (f64::NAN, f64::NAN);
    }
    Values {
        nonzeros,
        sum: Sum::float(sum),
        range: Some(range),
    }
}

/// Sum of value times weight.
#[inline(always)]
pub(super) fn float_weighted_sum<E: Float>(data: &[E::Bytes], weights: &[u32]) -> Sum {
    // Zero times infinity is NaN, and an element that feeds no output adds nothing.
    let term = |value: E::Value, weight: u32| {
        if weight == 0 {
            0.0
        } else {
            value.into() * f64::from(weight)
        }
    };
    let mut buffer = [E::Value::default(); CONVERTED];
    let mut sums = [0f64; 16];
    for (block, weights) in data.chunks(CONVERTED).zip(weights.chunks(CONVERTED)) {
        let values = &mut buffer[..block.len()];
        for (value, &element) in values.iter_mut().zip(block) {
            *value = E::value(element);
        }
        let (rows, rest) = values.as_chunks::<16>();
        let (weight_rows, weight_rest) = weights.as_chunks::<16>();
        for (row, weight_row) in rows.iter().zip(weight_rows) {
            for lane in 0..16 {
                sums[lane] += term(row[lane], weight_row[lane]);
            }
        }
        for (lane, (&value, &weight)) in rest.iter().zip(weight_rest).enumerate() {
            sums[lane] += term(value, weight);
        }
    }
    Sum::float(sums.into_iter().sum())
}

/// Everything about integers, at most [`PIECE`] of them, least and greatest only with `RANGE`. `LANES` are those of [`scan`].
#[inline(always)]
pub(super) fn integer_values<E: Integer, const LANES: usize, const RANGE: bool>(
    data: &[E::Bytes],
) -> Values {
    let range = RANGE.then(|| {
        let (mut low, mut high) = (E::GREATEST, E::LEAST);
        for &element in data {
            low = low.min(E::value(element));
            high = high.max(E::value(element));
        }
        if data.is_empty() {
            (f64::INFINITY, f64::NEG_INFINITY)
        } else {
            (low.into() as f64, high.into() as f64)
        }
    });
    let nonzeros = scan::<E, LANES>(data, false).nonzeros;
    Values {
        nonzeros,
        sum: Sum::integer(E::sum(data)),
        range,
    }
}

/// Sum of value times weight, exact.
#[inline(always)]
pub(super) fn integer_weighted_sum<E: Integer>(data: &[E::Bytes], weights: &[u32]) -> Sum {
    Sum::integer(
        data.iter()
            .zip(weights)
            .map(|(&x, &w)| E::value(x).into() * i128::from(w))
            .sum(),
    )
}

/// What complex numbers have: no order, and the sum of the real parts.
#[inline(always)]
pub(super) fn complex_values<E: Element, const LANES: usize>(
    data: &[E::Bytes],
    real: impl Fn(E::Bytes) -> f64,
) -> Values {
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
    Values {
        nonzeros,
        sum: Sum::float(sum),
        range: None,
    }
}

/// [`weighted_mark`] for elements `B`.
type WeightedMark<B> = unsafe fn(&[B], &[u32], u8, &mut [u8]) -> u64;

/// The loops for one instruction set.
pub(super) struct Kernels<E: Element> {
    scan: unsafe fn(&[E::Bytes], bool) -> Scan,
    weighted_scan: unsafe fn(&[E::Bytes], &[u32]) -> WeightedScan,
    values: unsafe fn(&[E::Bytes]) -> Values,
    sums: unsafe fn(&[E::Bytes]) -> Values,
    weighted_sum: unsafe fn(&[E::Bytes], &[u32]) -> Sum,
    count: unsafe fn(&[E::Bytes], &mut [u64]),
    mark: unsafe fn(&[E::Bytes], u8, &mut [u8]) -> bool,
    weighted_mark: WeightedMark<E::Bytes>,
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
                E::values::<true>(data)
            }
            $(#[target_feature(enable = $features)])?
            fn sums<E: Element>(data: &[E::Bytes]) -> Values {
                E::values::<false>(data)
            }
            $(#[target_feature(enable = $features)])?
            fn weighted_sum<E: Element>(data: &[E::Bytes], weights: &[u32]) -> Sum {
                E::weighted_sum(data, weights)
            }
            $(#[target_feature(enable = $features)])?
            fn count<E: Element>(data: &[E::Bytes], counts: &mut [u64]) {
                super::count::<E>(data, counts);
            }
            $(#[target_feature(enable = $features)])?
            fn mark<E: Element>(data: &[E::Bytes], bit: u8, marks: &mut [u8]) -> bool {
                super::mark::<E>(data, bit, marks)
            }
            $(#[target_feature(enable = $features)])?
            fn weighted_mark<E: Element>(
                data: &[E::Bytes],
                weights: &[u32],
                bit: u8,
                marks: &mut [u8],
            ) -> u64 {
                super::weighted_mark::<E>(data, weights, bit, marks)
            }

            pub(super) const fn kernels<E: Element>() -> Kernels<E> {
                Kernels {
                    scan: scan::<E>,
                    weighted_scan: weighted_scan::<E>,
                    values: values::<E>,
                    sums: sums::<E>,
                    weighted_sum: weighted_sum::<E>,
                    count: count::<E>,
                    mark: mark::<E>,
                    weighted_mark: weighted_mark::<E>,
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
instruction_set!(
    avx512,
    enable = "avx2,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl"
);

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

    /// See [`Element::values`], without the least and the greatest.
    #[inline]
    pub(super) fn sums(&self, data: &[E::Bytes]) -> Values {
        debug_assert!(data.len() <= PIECE);
        // SAFETY: as in `scan`.
        unsafe { (self.sums)(data) }
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

    /// See [`mark`].
    #[inline]
    pub(super) fn mark(&self, data: &[E::Bytes], bit: u8, marks: &mut [u8]) -> bool {
        // SAFETY: as in `scan`.
        unsafe { (self.mark)(data, bit, marks) }
    }

    /// See [`weighted_mark`].
    #[inline]
    pub(super) fn weighted_mark(
        &self,
        data: &[E::Bytes],
        weights: &[u32],
        bit: u8,
        marks: &mut [u8],
    ) -> u64 {
        debug_assert!(data.len() == weights.len() && data.len() <= WEIGHTED_PIECE);
        // SAFETY: as in `scan`.
        unsafe { (self.weighted_mark)(data, weights, bit, marks) }
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

#[cfg(test)]
mod tests {
    use super::super::element::*;
    use super::super::memory::Plain;
    use super::*;

    /// Every instruction set that this machine has gives the same bits, whatever the length.
    fn all_agree<E: Element>(decode: impl Fn(&[u8]) -> E::Bytes) {
        let width = size_of::<E::Bytes>();
        let mut seed = 1u64;
        let mut byte = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Many zeros, and few exponents that would let a sum overflow.
            if seed >> 62 == 0 {
                0
            } else {
                (seed >> 40) as u8 & 0x3f
            }
        };
        let bytes: Vec<u8> = (0..PIECE * width).map(|_| byte()).collect();
        let data: Vec<E::Bytes> = bytes.chunks(width).map(decode).collect();
        let weights: Vec<u32> = (0..PIECE as u32).map(|i| i % 10).collect();
        for length in (0..300).chain([1000, PIECE - 1, PIECE]) {
            let (data, weights) = (&data[..length], &weights[..length]);
            let facts = |kernels: &Kernels<E>| {
                let mut counts = vec![7; length];
                kernels.count(data, &mut counts);
                let mut marks = vec![1u8; length];
                let any = kernels.mark(data, 4, &mut marks);
                let marked = kernels.weighted_mark(data, weights, 8, &mut marks);
                let values = kernels.values(data);
                let range = values
                    .range
                    .map(|(low, high)| (low.to_bits(), high.to_bits()));
                let scans = (
                    kernels.scan(data, false),
                    kernels.scan(data, true).binary,
                    kernels.weighted_scan(data, weights),
                );
                let without_range = kernels.sums(data);
                assert_eq!(without_range.nonzeros, values.nonzeros);
                assert_eq!(without_range.sum, values.sum);
                let sums = [values.sum, kernels.weighted_sum(data, weights)]
                    .map(|sum| (sum.float.to_bits(), sum.integer));
                assert_eq!(marked, scans.2.weighted);
                assert!(
                    counts
                        .iter()
                        .zip(&marks)
                        .all(|(&count, &mark)| mark == if count == 8 { 13 } else { 1 })
                );
                assert_eq!(any, values.nonzeros > 0);
                (counts, values.nonzeros, range, scans, sums)
            };
            let baseline = facts(Kernels::BASELINE);
            for kernels in Kernels::<E>::all() {
                assert!(
                    facts(kernels) == baseline,
                    "{length} elements of {}",
                    std::any::type_name::<E>()
                );
            }
        }
    }

    fn bytes<const N: usize>(from: &[u8]) -> [u8; N]
    where
        [u8; N]: Plain,
    {
        from.try_into().unwrap()
    }

    #[test]
    fn instruction_sets_agree() {
        all_agree::<F64>(bytes);
        all_agree::<F32>(bytes);
        all_agree::<F16>(bytes);
        all_agree::<BF16>(bytes);
        all_agree::<Bool>(bytes);
        all_agree::<U8>(bytes);
        all_agree::<I8>(bytes);
        all_agree::<U16>(bytes);
        all_agree::<I16>(bytes);
        all_agree::<U32>(bytes);
        all_agree::<I32>(bytes);
        all_agree::<U64>(bytes);
        all_agree::<I64>(bytes);
        all_agree::<C32>(bytes);
        all_agree::<C64>(bytes);
        all_agree::<C128>(bytes);
    }

    #[test]
    fn the_greatest_weight_fits() {
        let (data, weights) = (
            vec![1f32.to_ne_bytes(); WEIGHTED_PIECE],
            vec![GREATEST_WEIGHT; WEIGHTED_PIECE],
        );
        for kernels in Kernels::<F32>::all() {
            let found = kernels.weighted_scan(&data, &weights).weighted;
            assert_eq!(found, WEIGHTED_PIECE as u64 * u64::from(GREATEST_WEIGHT));
        }
    }
}
