//! Convolutions: how many outputs each position of the input feeds, and statistics weighted by it.
//!
//! The number is a product of one factor per spatial dimension and of the output channels of a group, so that one
//! pass over the input gives what a second convolution with ones for weights would give. The factors
//! that belong to neighbouring elements in memory are multiplied out beforehand into a row of weights (the *block*);
//! the others multiply the block's result. Networks ask the same question again at every step, so the
//! blocks are kept, per thread and bounded.

use std::cell::RefCell;
use std::rc::Rc;

use optape_trace::NotTaken;

use super::element::{Element, with_element};
use super::kernel::{self, GREATEST_WEIGHT, PIECE, Sum, WEIGHTED_PIECE};
use super::memory::{Dim, Run, Strided, View};
use super::{Answer, Question, Tally};

/// The shape of a convolution. Lists have one entry per spatial dimension; `stride`, `padding` and `dilation`
/// may have a single one that holds for all, as torch allows.
#[derive(Clone, Copy, Debug)]
pub struct Geometry<'a> {
    /// Spatial sizes of the input.
    pub input: &'a [i64],
    /// Spatial sizes of the weight; their number says how many spatial dimensions there are, 1 to 3.
    pub kernel: &'a [i64],
    /// Distance of the outputs in the input, transposed the other way round.
    pub stride: &'a [i64],
    /// Positions before the first element. What is behind the last follows from `output`, so that uneven
    /// padding (`padding="same"` with an even kernel) needs nothing more.
    pub padding: &'a [i64],
    /// Distance of the kernel's elements.
    pub dilation: &'a [i64],
    /// Spatial sizes of the output, `output_padding` included.
    pub output: &'a [i64],
    /// A transposed convolution.
    pub transposed: bool,
    /// Groups of channels.
    pub groups: i64,
    /// Output channels of one group.
    pub outputs_per_group: i64,
}

/// The most positions along one spatial dimension, and the most elements of a kernel along it. Beyond it statistics are not taken.
const GREATEST_SIZE: i64 = 1 << 26;

/// A convolution along one spatial dimension.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Axis {
    pub(super) input: i64,
    pub(super) kernel: i64,
    stride: i64,
    padding: i64,
    dilation: i64,
    pub(super) output: i64,
    transposed: bool,
}

/// The input positions that meet one element of the kernel: how many, from which on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tap {
    pub(super) start: usize,
    pub(super) count: usize,
}

/// Input positions and outputs that meet at one element of the kernel, pair by pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Meeting {
    pub(super) input: usize,
    pub(super) input_step: usize,
    pub(super) output: usize,
    pub(super) output_step: usize,
    pub(super) count: usize,
}

impl Geometry<'_> {
    /// Whether these are the sizes of an input of the convolution: `[N, C, spatial..]` or `[C, spatial..]`.
    pub(crate) fn takes(&self, sizes: &[i64]) -> bool {
        let leading = sizes.len().checked_sub(self.kernel.len());
        matches!(leading, Some(1 | 2)) && self.axes().is_some() && sizes.ends_with(self.input)
    }

    /// The spatial dimensions, outermost first; `None` if the lists do not fit together.
    pub(super) fn axes(&self) -> Option<Axes> {
        let spatial = self.kernel.len();
        let each = |list: &[i64], at: usize| {
            if list.len() == 1 {
                list.first()
            } else {
                list.get(at)
            }
            .copied()
        };
        let lengths_fit = [self.stride, self.padding, self.dilation]
            .iter()
            .all(|l| l.len() == 1 || l.len() == spatial);
        let sizes_fit = self.input.len() == spatial && self.output.len() == spatial;
        if !(1..=3).contains(&spatial)
            || !lengths_fit
            || !sizes_fit
            || self.groups < 1
            || self.outputs_per_group < 0
        {
            return None;
        }
        let mut axes = Axes {
            axes: [Axis::default(); 3],
            spatial,
        };
        for (at, axis) in axes.axes.iter_mut().take(spatial).enumerate() {
            *axis = Axis {
                input: each(self.input, at)?,
                kernel: each(self.kernel, at)?,
                stride: each(self.stride, at)?,
                padding: each(self.padding, at)?,
                dilation: each(self.dilation, at)?,
                output: each(self.output, at)?,
                transposed: self.transposed,
            };
            if !axis.is_valid() {
                return None;
            }
        }
        Some(axes)
    }
}

impl Axis {
    /// A dimension of size 1 that changes nothing.
    pub(super) const IDENTITY: Self = Self {
        input: 1,
        kernel: 1,
        stride: 1,
        padding: 0,
        dilation: 1,
        output: 1,
        transposed: false,
    };
}

/// One to three [`Axis`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Axes {
    axes: [Axis; 3],
    spatial: usize,
}

impl Axes {
    pub(super) fn as_slice(&self) -> &[Axis] {
        &self.axes[..self.spatial]
    }

    /// Always three, the outer ones of size 1 where there are fewer.
    pub(super) fn three(&self) -> [Axis; 3] {
        let mut three = [Axis::IDENTITY; 3];
        three[3 - self.spatial..].copy_from_slice(self.as_slice());
        three
    }

    /// Whether the view is an input of the convolution: `[N, C, spatial..]` or `[C, spatial..]`. Gives the place of the channels.
    pub(super) fn channels(&self, view: &View<'_>) -> Option<usize> {
        let leading = view.sizes().len().checked_sub(self.spatial)?;
        let spatial = view.sizes().iter().skip(leading);
        let fits =
            matches!(leading, 1 | 2) && spatial.eq(self.as_slice().iter().map(|axis| &axis.input));
        fits.then(|| leading - 1)
    }
}

impl Axis {
    fn is_valid(&self) -> bool {
        let size = 0..=GREATEST_SIZE;
        let step = 1..=GREATEST_SIZE;
        size.contains(&self.input)
            && size.contains(&self.kernel)
            && (0..=1 << 40).contains(&self.output)
            && step.contains(&self.stride)
            && step.contains(&self.dilation)
            && (-GREATEST_SIZE..=GREATEST_SIZE).contains(&self.padding)
    }

    /// The distance of the input positions that meet one element of the kernel.
    pub(super) fn tap_step(&self) -> usize {
        if self.transposed {
            1
        } else {
            self.stride as usize
        }
    }

    /// The input positions that meet element `k` of the kernel, [`tap_step`](Self::tap_step) apart.
    pub(super) fn tap(&self, k: i64) -> Tap {
        // Position p meets output o where p = o * stride - padding + k * dilation; transposed, p and o change places.
        let shift = k * self.dilation - self.padding;
        let (stepping, reached) = if self.transposed {
            (self.input, self.output)
        } else {
            (self.output, self.input)
        };
        let first =
            (-shift).div_euclid(self.stride) + i64::from((-shift).rem_euclid(self.stride) != 0);
        let first = first.max(0);
        let end = ((reached - 1 - shift).div_euclid(self.stride) + 1).min(stepping);
        if first >= end {
            return Tap::default();
        }
        let count = (end - first) as usize;
        let start = if self.transposed {
            first
        } else {
            first * self.stride + shift
        };
        Tap {
            start: start as usize,
            count,
        }
    }

    /// Which input positions meet which outputs at element `k` of the kernel.
    pub(super) fn meeting(&self, k: i64) -> Meeting {
        let tap = self.tap(k);
        if tap.count == 0 {
            return Meeting::default();
        }
        let shift = k * self.dilation - self.padding;
        let start = tap.start as i64;
        let (output, output_step) = if self.transposed {
            (start * self.stride + shift, self.stride as usize)
        } else {
            ((start - shift) / self.stride, 1)
        };
        Meeting {
            input: tap.start,
            input_step: self.tap_step(),
            output: output as usize,
            output_step,
            count: tap.count,
        }
    }

    /// For each position of the input, how many pairs of output and kernel element it belongs to.
    pub(super) fn fan_out(&self) -> Vec<u32> {
        let size = self.input as usize;
        let step = self.tap_step();
        // Where the number changes by how much, in comparison with the position one step before.
        let mut counts = vec![0u32; size];
        for k in 0..self.kernel {
            let tap = self.tap(k);
            if tap.count == 0 {
                continue;
            }
            counts[tap.start] = counts[tap.start].wrapping_add(1);
            if let Some(past) = counts.get_mut(tap.start + tap.count * step) {
                *past = past.wrapping_sub(1);
            }
        }
        for at in step..size {
            counts[at] = counts[at].wrapping_add(counts[at - step]);
        }
        counts
    }
}

/// What was found about a convolution's input.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ConvolutionAnswer {
    /// About the input itself, as [`measure`](super::measure) gives it.
    pub answer: Answer,
    /// Nonzeros, each counted once per output element that it feeds. `None` after an early stop.
    pub fan_out_nonzeros: Option<u64>,
    /// Values, each added once per output element that it feeds. Where the question asks for sums.
    pub fan_out_sum: Option<f64>,
}

/// Looks at the input of a convolution, `[N, C, spatial..]` or `[C, spatial..]` with any strides.
///
/// With [`Question::Binary`] it stops at the first element that is neither 0 nor 1, and then there is no fan-out.
///
/// # Errors
///
/// [`NotTaken::DType`] for element types without statistics, [`NotTaken::Layout`] if view and geometry do not fit together.
pub fn measure_convolution(
    view: &View<'_>,
    geometry: &Geometry<'_>,
    question: Question,
) -> Result<ConvolutionAnswer, NotTaken> {
    with_element!(
        view.dtype(),
        E => measure_elements::<E>(view, geometry, question),
        else Err(NotTaken::DType)
    )
}

fn measure_elements<E: Element>(
    view: &View<'_>,
    geometry: &Geometry<'_>,
    question: Question,
) -> Result<ConvolutionAnswer, NotTaken> {
    let not_binary = ConvolutionAnswer {
        answer: Answer::NOT_BINARY,
        fan_out_nonzeros: None,
        fan_out_sum: None,
    };
    let Some(first) = view.peek::<E::Bytes>() else {
        if view.elements() != Some(0)
            || geometry
                .axes()
                .is_none_or(|axes| axes.channels(view).is_none())
        {
            return Err(NotTaken::Layout);
        }
        let answer = Answer::empty(question);
        return Ok(ConvolutionAnswer {
            answer,
            fan_out_nonzeros: Some(0),
            fan_out_sum: question.sums().then_some(0.0),
        });
    };
    if question == Question::Binary && E::other(first) {
        return Ok(not_binary);
    }
    let axes = geometry.axes().ok_or(NotTaken::Layout)?;
    let channels = axes.channels(view).ok_or(NotTaken::Layout)?;
    let plan = plan(view, &axes, channels + 1).ok_or(NotTaken::Layout)?;
    let mut elements = Strided::new(view).ok_or(NotTaken::Layout)?;
    let repeated = elements.drop_repeated();
    elements.sort();
    let mut merges = plan.merges.iter();
    elements.merge(|_, _| merges.next().copied().unwrap_or(false));

    let mut tally = FanOut {
        tally: Tally::<E>::new(question),
        weighted: 0,
        sum: Sum::default(),
        buffer: Vec::new(),
        take: 256,
    };
    // The indices that `runs` gives are those of all dimensions but the innermost.
    let mut outer = [&[][..]; 5];
    for (slot, dim) in outer.iter_mut().zip(elements.dims()) {
        *slot = plan.factors(*dim);
    }
    elements.runs(|indices, run| {
        let mut weight = 1u64;
        for (factors, &index) in outer.iter().zip(indices) {
            // Even dimensions have no factors: theirs is in the plan's.
            weight = weight.saturating_mul(factors.get(index).map_or(1, |&factor| factor.into()));
        }
        tally.add(run, &plan, weight);
        !tally.tally.stopped()
    });
    if tally.tally.stopped() {
        return Ok(not_binary);
    }
    let factor = plan
        .factor
        .saturating_mul(geometry.outputs_per_group.unsigned_abs());
    Ok(ConvolutionAnswer {
        answer: tally.tally.answer(repeated),
        fan_out_nonzeros: Some(
            u64::try_from(tally.weighted.saturating_mul(factor.into())).unwrap_or(u64::MAX),
        ),
        fan_out_sum: question.sums().then(|| tally.sum.times(factor).total()),
    })
}

/// A [`Tally`], and the same weighted.
struct FanOut<E: Element> {
    tally: Tally<E>,
    weighted: u128,
    sum: Sum,
    buffer: Vec<E::Bytes>,
    /// How many elements to look at next. The first look is short, in case that the tensor is not binary.
    take: usize,
}

impl<E: Element> FanOut<E> {
    fn add(&mut self, run: Run<'_, E::Bytes>, plan: &Plan, weight: u64) {
        let slice = run.slice();
        let period = plan.block.len();
        let most = if slice.is_some() {
            plan.piece
        } else {
            plan.piece.min(PIECE)
        };
        let mut at = 0;
        while at < run.len() && !self.tally.stopped() {
            let phase = if period == 0 { 0 } else { at % period };
            let left = if period == 0 {
                run.len() - at
            } else {
                (period - phase).min(run.len() - at)
            };
            let count = left.min(self.take).min(most);
            self.take = usize::MAX;
            if let Some(data) = slice {
                self.add_piece(
                    &data[at..at + count],
                    plan.block.get(phase..phase + count),
                    weight,
                );
            } else {
                let mut buffer = std::mem::take(&mut self.buffer);
                buffer.clear();
                run.append(at, &mut buffer, count);
                self.add_piece(&buffer, plan.block.get(phase..phase + count), weight);
                self.buffer = buffer;
            }
            at += count;
        }
    }

    /// `weights` are those of the elements, if they differ; `weight` is what they have in common.
    fn add_piece(&mut self, data: &[E::Bytes], weights: Option<&[u32]>, weight: u64) {
        let tally = &mut self.tally;
        let Some(weights) = weights else {
            let before = tally.nonzeros;
            if tally.question.sums() {
                for piece in data.chunks(PIECE) {
                    let sum = tally.add_piece(piece);
                    self.sum = self.sum.plus(sum.times(weight));
                }
            } else {
                tally.add(data);
            }
            self.weighted += u128::from(tally.nonzeros - before) * u128::from(weight);
            return;
        };
        let scan = tally.kernels.weighted_scan(data, weights);
        self.weighted += u128::from(scan.weighted) * u128::from(weight);
        if tally.question.sums() && !(tally.binary && scan.scan.binary) {
            tally.binary = false;
            for (data, weights) in data.chunks(PIECE).zip(weights.chunks(PIECE)) {
                tally.add_values(tally.values(data));
                let sum = tally.kernels.weighted_sum(data, weights);
                self.sum = self.sum.plus(sum.times(weight));
            }
            return;
        }
        tally.binary &= scan.scan.binary;
        if tally.question.sums() {
            tally.add_values(kernel::binary_values(data.len(), scan.scan.nonzeros));
            self.sum = self
                .sum
                .plus(Sum::integer(scan.weighted.into()).times(weight));
        } else {
            tally.nonzeros += scan.scan.nonzeros;
        }
    }
}

/// Everything about a layout and a geometry that does not depend on the values.
struct Plan {
    key: Key,
    /// By dimension of the view: the factors, where they differ along it.
    factors: Vec<Vec<u32>>,
    /// The product of the factors that do not differ.
    factor: u64,
    /// Which neighbouring dimensions become one, in the order in which [`Strided::merge`] asks.
    merges: Vec<bool>,
    /// The weights along the innermost dimension, from there on repeating themselves. Empty if they are all the same.
    block: Vec<u32>,
    /// How many weighted elements a kernel may take at once.
    piece: usize,
}

impl Plan {
    fn factors(&self, dim: Dim) -> &[u32] {
        self.factors.get(dim.tag).map_or(&[], |factors| factors)
    }

    fn new(view: &View<'_>, axes: &Axes, leading: usize, key: Key) -> Option<Self> {
        let mut factors = vec![Vec::new(); leading];
        factors.extend(axes.as_slice().iter().map(Axis::fan_out));
        let mut elements = Strided::new(view)?;
        let mut factor = 1u64;
        elements.drop_dims(|dim| {
            let drop = dim.size == 1 || dim.stride == 0;
            if drop {
                let repeated = match &factors[dim.tag][..] {
                    [] => dim.size as u64,
                    all => all.iter().map(|&f| u64::from(f)).sum(),
                };
                factor = factor.saturating_mul(repeated);
                factors[dim.tag].clear();
            }
            drop
        });
        for all in &mut factors {
            if let [first, rest @ ..] = &all[..]
                && rest.iter().all(|f| f == first)
            {
                factor = factor.saturating_mul((*first).into());
                all.clear();
            }
        }
        elements.sort();

        let innermost = elements.dims().last().copied().unwrap_or_default();
        let mut block = elements
            .dims()
            .last()
            .map_or_else(Vec::new, |dim| factors[dim.tag].clone());
        let mut repeats = false;
        let mut merges = Vec::new();
        elements.merge(|outer, inner| {
            let new = &factors[outer.tag];
            let may = if inner.tag != innermost.tag {
                // Outside of the block: what has no factors.
                new.is_empty() && factors[inner.tag].is_empty()
            } else if new.is_empty() {
                repeats |= !block.is_empty();
                true
            } else {
                let greatest = |all: &[u32]| u64::from(all.iter().copied().max().unwrap_or(1));
                let fits = !repeats
                    && inner.size * outer.size <= WEIGHTED_PIECE
                    && greatest(new) * greatest(&block) <= GREATEST_WEIGHT.into();
                if fits {
                    if block.is_empty() {
                        block.resize(inner.size, 1);
                    }
                    block = new
                        .iter()
                        .flat_map(|f| block.iter().map(move |b| f * b))
                        .collect();
                }
                fits
            };
            merges.push(may);
            may
        });
        let greatest = block.iter().copied().max().unwrap_or(0).max(1);
        if repeats && block.len() < 1024 {
            block = block.repeat(1024 / block.len() + 1);
        }
        // Elements that share a lane must not overflow it: one of 16 lanes gets every 16th.
        let piece = if block.is_empty() {
            usize::MAX
        } else {
            WEIGHTED_PIECE.min(16 * (u32::MAX / greatest) as usize)
        };
        Some(Self {
            key,
            factors,
            factor,
            merges,
            block,
            piece,
        })
    }

    /// Whether it is small enough to be kept.
    fn is_small(&self) -> bool {
        self.block.len() + self.factors.iter().map(Vec::len).sum::<usize>() <= 2 * WEIGHTED_PIECE
    }
}

/// Sizes, strides and axes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    /// 0 and 0 where there are fewer dimensions; that there are, the axes tell.
    layout: [(i64, i64); 5],
    leading: usize,
    axes: [Axis; 3],
}

/// How many plans a thread keeps: more than a large network has different convolutions.
const KEPT: usize = 64;

thread_local! {
    /// The kept plans, and which one goes next.
    static PLANS: RefCell<(Vec<Rc<Plan>>, usize)> = const { RefCell::new((Vec::new(), 0)) };
}

fn plan(view: &View<'_>, axes: &Axes, leading: usize) -> Option<Rc<Plan>> {
    let mut key = Key {
        layout: [(0, 0); 5],
        leading,
        axes: axes.axes,
    };
    for (slot, (&size, &stride)) in key
        .layout
        .iter_mut()
        .zip(view.sizes().iter().zip(view.strides()))
    {
        *slot = (size, stride);
    }
    // A thread that is ending has no plans any more; one that is asked while asking cannot be, but would get along too.
    let kept = PLANS.try_with(|plans| {
        let plans = plans.try_borrow().ok()?;
        plans.0.iter().find(|plan| plan.key == key).cloned()
    });
    if let Ok(Some(plan)) = kept {
        return Some(plan);
    }
    let plan = Rc::new(Plan::new(view, axes, leading, key)?);
    if plan.is_small() {
        let _ = PLANS.try_with(|plans| {
            if let Ok(mut plans) = plans.try_borrow_mut() {
                let (plans, next) = &mut *plans;
                if let Some(slot) = plans.get_mut(*next) {
                    *slot = plan.clone();
                } else {
                    plans.push(plan.clone());
                }
                *next = (*next + 1) % KEPT;
            }
        });
    }
    Some(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(
        input: i64,
        kernel: i64,
        stride: i64,
        padding: i64,
        dilation: i64,
        output: i64,
        transposed: bool,
    ) -> Axis {
        Axis {
            input,
            kernel,
            stride,
            padding,
            dilation,
            output,
            transposed,
        }
    }

    #[test]
    fn fan_out_by_hand() {
        assert_eq!(axis(5, 3, 1, 1, 1, 5, false).fan_out(), [2, 3, 3, 3, 2]);
        assert_eq!(axis(5, 3, 1, 0, 1, 3, false).fan_out(), [1, 2, 3, 2, 1]);
        // A stride beyond the kernel leaves positions out.
        assert_eq!(
            axis(7, 2, 3, 0, 1, 2, false).fan_out(),
            [1, 1, 0, 1, 1, 0, 0]
        );
        assert_eq!(axis(5, 2, 1, 0, 3, 2, false).fan_out(), [1, 1, 0, 1, 1]);
        assert_eq!(axis(3, 3, 2, 1, 1, 5, true).fan_out(), [2, 3, 2]);
        // output_padding lets the last position feed one more.
        assert_eq!(axis(3, 3, 2, 1, 1, 6, true).fan_out(), [2, 3, 3]);
    }

    /// The fan-out from meetings, each of which is a pair that meets.
    fn meetings(axis: &Axis) -> Vec<u32> {
        let mut counts = vec![0; axis.input as usize];
        for k in 0..axis.kernel {
            let meeting = axis.meeting(k);
            for at in 0..meeting.count {
                let (p, o) = (
                    meeting.input + at * meeting.input_step,
                    meeting.output + at * meeting.output_step,
                );
                counts[p] += 1;
                let (near, far) = if axis.transposed { (o, p) } else { (p, o) };
                assert_eq!(
                    near as i64,
                    far as i64 * axis.stride - axis.padding + k * axis.dilation
                );
                assert!((o as i64) < axis.output);
            }
        }
        counts
    }

    #[test]
    fn fan_out_counts_pairs() {
        for transposed in [false, true] {
            for input in 0..9 {
                for kernel in 0..4 {
                    for stride in 1..4 {
                        for padding in 0..4 {
                            for dilation in 1..4 {
                                for output in 0..12 {
                                    let axis = axis(
                                        input, kernel, stride, padding, dilation, output,
                                        transposed,
                                    );
                                    let pairs = |p: i64| {
                                        let meets = |o: i64, k: i64| {
                                            let (near, far) =
                                                if transposed { (o, p) } else { (p, o) };
                                            near == far * stride - padding + k * dilation
                                        };
                                        (0..output)
                                            .flat_map(|o| (0..kernel).map(move |k| (o, k)))
                                            .filter(|&(o, k)| meets(o, k))
                                            .count() as u32
                                    };
                                    let naive: Vec<u32> = (0..input).map(pairs).collect();
                                    assert_eq!(axis.fan_out(), naive, "{axis:?}");
                                    assert_eq!(meetings(&axis), naive, "{axis:?}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
