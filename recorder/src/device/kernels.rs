//! What is asked of the kernel, and what it answers: the structures of `kernels.cu`, filled in and read.
//!
//! The kernel finds numbers; what they mean for a question is said here, so that a GPU's answers differ from the processor's in
//! nothing but the order in which floats were added.

use optape_trace::needs::Product;
use optape_trace::{DType, NotTaken};

use crate::statistics::{Answer, ConvolutionAnswer, Geometry, Question};

/// The kernel, for NVRTC.
pub(super) const SOURCE: &str = include_str!("kernels.cu");
/// Its name.
pub(super) const ENTRY: &str = "optape_statistics";

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Operands of one launch.
pub const MOST_ITEMS: usize = 8;
/// Dimensions of an operand, after those that walk the memory like one were merged.
const MOST_DIMS: usize = 8;
/// Blocks of one launch.
const MOST_BLOCKS: u32 = 512;
/// Elements that one thread looks at before another block is worth its start.
const WORTH_A_THREAD: u64 = 8;
/// Joint indices that a product may run along: kernel elements of all input channels, for convolutions.
const MOST_JOINT: u64 = 1 << 16;
/// A factor of a product must not have more nonzeros than a 32-bit counter holds.
const MOST_FACTOR_ELEMENTS: u64 = 1 << 31;
/// The longest kernel of a convolution along one dimension: every element of it is tried.
const LONGEST_KERNEL: i64 = 1 << 10;
/// Sizes and steps of a convolution fit into 32 bits.
const GREATEST_SIZE: i64 = 1 << 30;

/// `Axis`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Axis {
    input: i32,
    kernel: i32,
    stride: i32,
    padding: i32,
    dilation: i32,
    output: i32,
    transposed: i32,
    place: i32,
}

/// `Item`: one operand.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Item {
    /// Address of the first element, on the device.
    pub data: u64,
    /// Their number, what repeats them left out.
    pub elements: u64,
    /// `c10::ScalarType`.
    pub dtype: i32,
    question: i32,
    dims: i32,
    spatial: i32,
    first_block: i32,
    blocks: i32,
    factor: i32,
    reserved: i32,
    sizes: [i64; MOST_DIMS],
    strides: [i64; MOST_DIMS],
    places: [i64; MOST_DIMS],
    axes: [Axis; 3],
}

/// `Tally`: what was found of an operand.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Elements that are not zero.
    pub nonzeros: u64,
    /// The same, each as often as it feeds an output position.
    pub weighted: u64,
    sum_low: u64,
    sum_high: i64,
    weighted_low: u64,
    weighted_high: i64,
    sum: f64,
    weighted_sum: f64,
    least: u64,
    greatest: u64,
    /// Whether any element is neither 0 nor 1.
    pub other: u32,
    nan: u32,
}

/// `Answer`: what a launch writes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// By item.
    pub items: [Tally; MOST_ITEMS],
    /// Sum of the product, where both factors are binary.
    pub product: u64,
    /// The launch's ticket, written last.
    pub(super) done: u32,
    reserved: u32,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            items: [Tally::default(); MOST_ITEMS],
            product: 0,
            done: 0,
            reserved: 0,
        }
    }
}

/// Bytes of an `Area`: what the launches of a stream share. All zeros before the first.
pub(super) const AREA_BYTES: usize =
    size_of::<Tally>() * MOST_BLOCKS as usize + 2 * 4 * MOST_JOINT as usize + 8;

/// `Job`: one launch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// The operands.
    pub items: [Item; MOST_ITEMS],
    pub(super) area: u64,
    pub(super) answer: u64,
    /// How many operands.
    pub count: u32,
    pub(super) blocks: u32,
    pub(super) ticket: u32,
    joint: u32,
    a: u32,
    b: u32,
}

/// What is needed to read an operand's tally.
#[derive(Clone, Copy, Debug)]
struct Reading {
    dtype: DType,
    question: Question,
    /// How often every element is there (expanded dimensions).
    repeated: u64,
    /// Output channels of a group, of a convolution's input.
    outputs: Option<u64>,
}

/// A launch in the making.
#[derive(Clone, Debug)]
pub struct Request {
    job: Job,
    readings: [Option<Reading>; MOST_ITEMS],
}

/// An operand of a [`Request`].
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// Address of the first element, on the device.
    pub data: u64,
    /// Element type.
    pub dtype: DType,
    /// Sizes.
    pub sizes: &'a [i64],
    /// Strides in elements, as many.
    pub strides: &'a [i64],
}

impl Operand<'_> {
    /// How many elements; `None` where sizes and strides are none of a tensor.
    #[must_use]
    pub fn elements(&self) -> Option<u64> {
        if self.sizes.len() != self.strides.len() {
            return None;
        }
        let mut elements = 1u64;
        for size in self.sizes {
            elements = elements.checked_mul(u64::try_from(*size).ok()?)?;
        }
        Some(elements)
    }
}

impl Default for Request {
    fn default() -> Self {
        Self {
            job: Job {
                items: [Item::default(); MOST_ITEMS],
                area: 0,
                answer: 0,
                count: 0,
                blocks: 0,
                ticket: 0,
                joint: 0,
                a: 0,
                b: 0,
            },
            readings: [None; MOST_ITEMS],
        }
    }
}

const fn code(question: Question) -> i32 {
    match question {
        Question::Binary => 0,
        Question::Nonzeros => 1,
        Question::Sum | Question::Full => 2,
    }
}

/// A dimension: size, stride, place, whether it is spatial.
#[derive(Clone, Copy)]
struct Dim {
    size: i64,
    stride: i64,
    place: i64,
}

impl Request {
    /// How many operands it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.job.count as usize
    }

    /// Nothing is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.job.count == 0
    }

    pub(super) const fn job(&mut self) -> &mut Job {
        &mut self.job
    }

    /// Asks about an operand that has elements; `geometry`: it is the input of this convolution. Gives its number.
    ///
    /// # Errors
    /// Where it cannot be looked at, and why.
    pub fn add(
        &mut self,
        operand: &Operand<'_>,
        question: Question,
        geometry: Option<&Geometry<'_>>,
    ) -> Result<usize, NotTaken> {
        let at = self.len();
        if at >= MOST_ITEMS {
            return Err(NotTaken::DeviceFull);
        }
        if !is_known(operand.dtype) {
            return Err(NotTaken::DType);
        }
        if operand.elements().is_none_or(|elements| elements == 0) || operand.data == 0 {
            return Err(NotTaken::Layout);
        }
        let mut item = Item {
            data: operand.data,
            dtype: i32::from(operand.dtype.0),
            question: code(question),
            ..Item::default()
        };
        let mut repeated = 1u64;
        let mut dims: Vec<Dim> = Vec::with_capacity(operand.sizes.len());
        let spatial = geometry.map_or(0, |geometry| geometry.kernel.len());
        let first_spatial = operand.sizes.len().saturating_sub(spatial);
        for (d, (&size, &stride)) in operand.sizes.iter().zip(operand.strides).enumerate() {
            let place = 0;
            if d >= first_spatial {
                dims.push(Dim {
                    size,
                    stride,
                    place,
                });
            } else if size == 1 {
            } else if stride == 0 && geometry.is_none() {
                repeated = repeated
                    .checked_mul(size.unsigned_abs())
                    .ok_or(NotTaken::Layout)?;
            } else {
                dims.push(Dim {
                    size,
                    stride,
                    place,
                });
            }
        }
        if geometry.is_none() {
            // Neighbours that walk the memory like one dimension.
            dims.sort_by_key(|dim| std::cmp::Reverse(dim.stride.unsigned_abs()));
            dims.dedup_by(|inner, outer| {
                let one = inner.size.checked_mul(inner.stride) == Some(outer.stride);
                if one {
                    outer.size *= inner.size;
                    outer.stride = inner.stride;
                }
                one
            });
        }
        let outputs = geometry
            .map(|geometry| {
                item.spatial = i32::try_from(spatial).map_err(|_| NotTaken::Layout)?;
                item.axes = axes(geometry, operand.sizes).ok_or(NotTaken::Layout)?;
                Ok(geometry.outputs_per_group.unsigned_abs())
            })
            .transpose()?;
        put(&mut item, &dims)?;
        self.job.items[at] = item;
        self.readings[at] = Some(Reading {
            dtype: operand.dtype,
            question,
            repeated,
            outputs,
        });
        self.job.count += 1;
        Ok(at)
    }

    /// Asks for the sum of the product of two operands that were added, too.
    ///
    /// # Errors
    /// Where the product is not one that can be summed here.
    pub fn multiply(
        &mut self,
        (a, of_a): (usize, &Operand<'_>),
        (b, of_b): (usize, &Operand<'_>),
        kind: Product,
        geometry: Option<&Geometry<'_>>,
    ) -> Result<(), NotTaken> {
        let factors = if kind == Product::Convolution {
            convolution_factors(of_a, of_b, geometry.ok_or(NotTaken::Layout)?)
        } else {
            joint_dims(of_a.sizes, of_b.sizes, kind)
                .and_then(|joint| matrix_factors(of_a, of_b, &joint))
        };
        let (dims_a, dims_b, joint) = factors.ok_or(NotTaken::Layout)?;
        let few =
            |operand: &Operand<'_>| operand.elements().is_some_and(|n| n < MOST_FACTOR_ELEMENTS);
        if joint == 0 || joint > MOST_JOINT || !few(of_a) || !few(of_b) {
            return Err(NotTaken::Device);
        }
        for (at, dims, factor) in [(a, dims_a, 1), (b, dims_b, 2)] {
            let mut item = *self.job.items.get(at).ok_or(NotTaken::Layout)?;
            put(&mut item, &dims)?;
            item.factor = factor;
            if kind == Product::Convolution && factor == 1 {
                let mut place = 1;
                for axis in item.axes.iter_mut().take(item.spatial as usize).rev() {
                    axis.place = place;
                    place = place.saturating_mul(axis.kernel);
                }
            }
            self.job.items[at] = item;
            // Repeated elements are walked over now.
            if let Some(reading) = self.readings.get_mut(at).and_then(Option::as_mut) {
                reading.repeated = 1;
            }
        }
        self.job.joint = joint as u32;
        self.job.a = a as u32;
        self.job.b = b as u32;
        Ok(())
    }

    /// Divides the elements among blocks.
    pub(super) fn divide(&mut self) {
        let most = MOST_BLOCKS / self.job.count.max(1);
        let mut first = 0;
        for item in self.job.items.iter_mut().take(self.job.count as usize) {
            let wanted = item.elements.div_ceil(u64::from(THREADS) * WORTH_A_THREAD);
            let blocks = wanted.clamp(1, u64::from(most)) as u32;
            item.first_block = first as i32;
            item.blocks = blocks as i32;
            first += blocks;
        }
        self.job.blocks = first;
    }

    /// What a launch says of one of its operands, and what was asked.
    #[must_use]
    pub fn read(&self, at: usize, found: &Found) -> Option<(ConvolutionAnswer, Question)> {
        let reading = (*self.readings.get(at)?)?;
        Some((reading.read(found.items.get(at)?), reading.question))
    }

    /// The product's sum, if both factors turned out to be binary.
    #[must_use]
    pub fn product(&self, found: &Found) -> Option<u64> {
        let binary = |at: u32| found.items.get(at as usize).is_some_and(|t| t.other == 0);
        (self.job.joint != 0 && binary(self.job.a) && binary(self.job.b)).then_some(found.product)
    }
}

/// Whether the kernel has the element type.
const fn is_known(dtype: DType) -> bool {
    matches!(dtype.0, 0..=11 | 15 | 27..=29)
}

fn put(item: &mut Item, dims: &[Dim]) -> Result<(), NotTaken> {
    if dims.len() > MOST_DIMS {
        return Err(NotTaken::Layout);
    }
    item.dims = dims.len() as i32;
    item.elements = 1;
    for (at, dim) in dims.iter().enumerate() {
        item.sizes[at] = dim.size;
        item.strides[at] = dim.stride;
        item.places[at] = dim.place;
        item.elements = item
            .elements
            .checked_mul(dim.size.unsigned_abs())
            .ok_or(NotTaken::Layout)?;
    }
    Ok(())
}

/// The spatial dimensions of a convolution, if sizes are those of its input and all of it fits the kernel's numbers.
fn axes(geometry: &Geometry<'_>, sizes: &[i64]) -> Option<[Axis; 3]> {
    if !geometry.takes(sizes) {
        return None;
    }
    let each = |list: &[i64], at: usize| -> Option<i32> {
        let value = if list.len() == 1 {
            list[0]
        } else {
            *list.get(at)?
        };
        (value.abs() <= GREATEST_SIZE).then_some(value as i32)
    };
    let mut axes = [Axis::default(); 3];
    let mut greatest = 1u64;
    for (at, axis) in axes.iter_mut().take(geometry.kernel.len()).enumerate() {
        *axis = Axis {
            input: each(geometry.input, at)?,
            kernel: each(geometry.kernel, at).filter(|k| i64::from(*k) <= LONGEST_KERNEL)?,
            stride: each(geometry.stride, at)?,
            padding: each(geometry.padding, at)?,
            dilation: each(geometry.dilation, at)?,
            output: each(geometry.output, at)?,
            transposed: geometry.transposed.into(),
            place: 0,
        };
        greatest = greatest.checked_mul(u64::from(axis.kernel.unsigned_abs()))?;
    }
    // Weights have 32 bits.
    (greatest <= u64::from(u32::MAX)).then_some(axes)
}

/// The dimensions of two factors that their product runs along, pair by pair; as `product_sum_*` have them.
fn joint_dims(a: &[i64], b: &[i64], kind: Product) -> Option<Vec<(usize, usize)>> {
    match kind {
        Product::Matrix => match (a.len(), b.len()) {
            (2, 2) => Some(vec![(1, 0)]),
            (3, 3) => Some(vec![(0, 0), (2, 1)]),
            _ => None,
        },
        Product::Linear => match (a.len(), b.len()) {
            (1.., 1 | 2) => Some(vec![(a.len() - 1, b.len() - 1)]),
            _ => None,
        },
        Product::Broadcast => {
            if a.is_empty() || b.is_empty() {
                return None;
            }
            let leading = (a.len().saturating_sub(2), b.len().saturating_sub(2));
            let mut joint = Vec::new();
            for (at_a, at_b) in (0..leading.0).rev().zip((0..leading.1).rev()) {
                match (a[at_a], b[at_b]) {
                    (x, y) if x == y => joint.push((at_a, at_b)),
                    (1, _) | (_, 1) => {}
                    _ => return None,
                }
            }
            joint.push((a.len() - 1, b.len().saturating_sub(2)));
            Some(joint)
        }
        Product::Convolution => None,
    }
}

type Factors = (Vec<Dim>, Vec<Dim>, u64);

fn matrix_factors(a: &Operand<'_>, b: &Operand<'_>, joint: &[(usize, usize)]) -> Option<Factors> {
    let plain = |operand: &Operand<'_>| -> Vec<Dim> {
        let dims = operand.sizes.iter().zip(operand.strides);
        dims.map(|(&size, &stride)| Dim {
            size,
            stride,
            place: 0,
        })
        .collect()
    };
    let (mut dims_a, mut dims_b) = (plain(a), plain(b));
    let mut place = 1i64;
    for &(at_a, at_b) in joint {
        let (of_a, of_b) = (dims_a.get_mut(at_a)?, dims_b.get_mut(at_b)?);
        if of_a.size != of_b.size {
            return None;
        }
        of_a.place = place;
        of_b.place = place;
        place = place.checked_mul(of_a.size)?;
    }
    for dims in [&mut dims_a, &mut dims_b] {
        dims.retain(|dim| dim.size != 1);
    }
    Some((dims_a, dims_b, u64::try_from(place).ok()?))
}

/// Both factors of a convolution, by input channel and element of the kernel.
fn convolution_factors(
    input: &Operand<'_>,
    weight: &Operand<'_>,
    geometry: &Geometry<'_>,
) -> Option<Factors> {
    let [outer, inner, kernel @ ..] = weight.sizes else {
        return None;
    };
    let [outer_stride, inner_stride, kernel_strides @ ..] = weight.strides else {
        return None;
    };
    let groups = geometry.groups;
    let leading = input.sizes.len().checked_sub(kernel.len())?;
    let channel = leading.checked_sub(1)?;
    let channels = input.sizes[channel];
    let (of_weight, outputs) = if geometry.transposed {
        (*outer, *inner)
    } else {
        (inner.checked_mul(groups)?, outer.checked_div(groups)?)
    };
    let fits = kernel == geometry.kernel
        && channels == of_weight
        && channels % groups == 0
        && outputs == geometry.outputs_per_group
        && (geometry.transposed || outer % groups == 0);
    if !fits {
        return None;
    }
    let taps = kernel
        .iter()
        .try_fold(1i64, |taps, size| taps.checked_mul(*size))?;
    let mut of_input = Vec::with_capacity(input.sizes.len());
    for (d, (&size, &stride)) in input.sizes.iter().zip(input.strides).enumerate() {
        of_input.push(Dim {
            size,
            stride,
            place: if d == channel { taps } else { 0 },
        });
    }
    let mut of_kernel = Vec::with_capacity(kernel.len());
    let mut place = 1;
    for (&size, &stride) in kernel.iter().zip(kernel_strides).rev() {
        of_kernel.insert(
            0,
            Dim {
                size,
                stride,
                place,
            },
        );
        place *= size;
    }
    let mut of_weights = if geometry.transposed {
        // [channels, outputs of a group, kernel..]
        let by_channel = Dim {
            size: *outer,
            stride: *outer_stride,
            place: taps,
        };
        let by_output = Dim {
            size: *inner,
            stride: *inner_stride,
            place: 0,
        };
        vec![by_channel, by_output]
    } else {
        // [groups, outputs of a group, channels of a group, kernel..]
        let by_group = Dim {
            size: groups,
            stride: outer_stride.checked_mul(outputs)?,
            place: inner.checked_mul(taps)?,
        };
        let by_output = Dim {
            size: outputs,
            stride: *outer_stride,
            place: 0,
        };
        let by_channel = Dim {
            size: *inner,
            stride: *inner_stride,
            place: taps,
        };
        vec![by_group, by_output, by_channel]
    };
    of_weights.extend(of_kernel);
    Some((
        of_input,
        of_weights,
        u64::try_from(channels.checked_mul(taps)?).ok()?,
    ))
}

impl Reading {
    fn read(&self, tally: &Tally) -> ConvolutionAnswer {
        let binary = tally.other == 0;
        if self.question == Question::Binary && !binary {
            return ConvolutionAnswer {
                answer: Answer {
                    binary: Some(false),
                    ..Answer::default()
                },
                fan_out_nonzeros: None,
                fan_out_sum: None,
            };
        }
        let sums = self.question.sums();
        let range = (self.question == Question::Full && !self.dtype.is_complex()).then(|| {
            if tally.nan != 0 {
                (f64::NAN, f64::NAN)
            } else {
                (self.value(tally.least), self.value(tally.greatest))
            }
        });
        let answer = Answer {
            binary: Some(binary),
            nonzeros: Some(tally.nonzeros.saturating_mul(self.repeated)),
            sum: sums.then(|| total(tally.sum, tally.sum_low, tally.sum_high, self.repeated)),
            minimum: range.map(|r| r.0),
            maximum: range.map(|r| r.1),
        };
        ConvolutionAnswer {
            answer,
            fan_out_nonzeros: self.outputs.map(|n| tally.weighted.saturating_mul(n)),
            fan_out_sum: self.outputs.filter(|_| sums).map(|outputs| {
                total(
                    tally.weighted_sum,
                    tally.weighted_low,
                    tally.weighted_high,
                    outputs,
                )
            }),
        }
    }

    /// The value of a key.
    fn value(&self, key: u64) -> f64 {
        const SIGN: u64 = 1 << 63;
        match self.dtype {
            DType::F16 | DType::F32 | DType::F64 | DType::BF16 => {
                f64::from_bits(if key & SIGN != 0 { key ^ SIGN } else { !key })
            }
            DType::I8 | DType::I16 | DType::I32 | DType::I64 => (key ^ SIGN).cast_signed() as f64,
            _ => key as f64,
        }
    }
}

/// A sum of floats or of integers (the other half is zero), `times` over.
fn total(float: f64, low: u64, high: i64, times: u64) -> f64 {
    if times == 0 {
        // Nothing was added: not even infinities.
        return 0.0;
    }
    let integer = i128::from(high) << 64 | i128::from(low);
    float * times as f64 + integer.saturating_mul(i128::from(times)) as f64
}
