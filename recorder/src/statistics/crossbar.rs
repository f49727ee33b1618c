//! What a convolution's input means to hardware that works spike by spike (T3, T5).
//!
//! A *site* is one output position of one sample; its *receptive field* are the input positions that it sees. Crossbar arrays
//! of X rows take X input channels each, so that the channels come in blocks: a *patch* is a site's receptive field in one
//! block, *active* if there is a nonzero in it, and its *active rows* are the nonzeros in it.
//!
//! Each input position becomes a word with a bit for every four channels. What a site sees is then the union of the words
//! in its field, for all channels at once; fields are boxes, so that the union goes one dimension after the other. Blocks of more
//! channels are unions of neighbouring bits.

use optape_trace::{CHANNELS_PER_BLOCK, CROSSBARS, NotTaken};

use super::convolution::{Axis, Geometry, Meeting};
use super::element::{Element, with_element};
use super::kernel::{Kernels, WEIGHTED_PIECE};
use super::memory::{Strided, View};

/// The most input positions of a channel, and the most outputs, that are looked at.
const GREATEST_PLANE: usize = 1 << 20;

/// The most channels.
const GREATEST_CHANNELS: usize = 1 << 16;

/// Bits of a word.
const BITS: usize = 64;

/// What a convolution's outputs see of its input.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// Outputs, counted in all their channels, whose receptive field (in the channels of their group) has a nonzero.
    pub nonempty_outputs: u64,
    /// Sites with a nonzero in the receptive field, all channels together.
    pub active_sites: u64,
    /// By block of four channels: nonzeros in the receptive fields of all sites. A nonzero counts for every site that sees it.
    pub active_rows: Vec<u64>,
    /// By size of [`CROSSBARS`], and then by block of so many channels: active patches.
    pub active_patches: [Vec<u64>; CROSSBARS.len()],
}

/// Looks at the input of a convolution, `[N, C, spatial..]` or `[C, spatial..]` with any strides. What is not zero counts as a
/// spike.
///
/// # Errors
///
/// [`NotTaken::DType`] for element types without statistics, [`NotTaken::Layout`] if view and geometry do not fit together, or
/// where there are more than 2^20 positions or 2^16 channels.
pub fn measure_occupancy(view: &View<'_>, geometry: &Geometry<'_>) -> Result<Occupancy, NotTaken> {
    with_element!(view.dtype(), E => occupancy::<E>(view, geometry), else Err(NotTaken::DType))
}

/// How many elements of a convolution's output are not zero, where input and weight have zeros and ones alone. The weight is
/// `[C_out, C_in / groups, kernel..]`, transposed `[C_in, C_out / groups, kernel..]`.
///
/// # Errors
///
/// As [`measure_occupancy`]; also [`NotTaken::Layout`] where the work would be that of a large convolution.
pub fn nonempty_outputs_convolution(
    view: &View<'_>,
    weight: &View<'_>,
    geometry: &Geometry<'_>,
) -> Result<u64, NotTaken> {
    let input = Input::new(view, geometry).ok_or(NotTaken::Layout)?;
    let weights = Weights::new(&input, weight, geometry).ok_or(NotTaken::Layout)?;
    let of_weight = super::occupancy::bytes(weight)?;
    if of_weight.is_empty() {
        return Ok(0);
    }
    with_element!(
        view.dtype(),
        E => product_outputs::<E>(&input, &weights, &of_weight),
        else Err(NotTaken::DType)
    )
}

/// An input and the dimensions that it has for a convolution.
struct Input<'a> {
    /// None if it is empty.
    all: Option<Strided<'a>>,
    /// Index of the dimension of channels.
    channel: usize,
    samples: usize,
    channels: usize,
    /// Outermost first.
    axes: [Axis; 3],
    /// Dimensions that the axes have more than the view.
    added: usize,
    positions: usize,
    outputs: usize,
    groups: usize,
}

/// How far the next index of a dimension is.
#[derive(Clone, Copy, Default)]
struct Step {
    channels: usize,
    positions: usize,
}

/// Where channels are marked: a plane of bytes, and a bit in it.
type Place<'p> = &'p dyn Fn(usize) -> (usize, u8);

impl<'a> Input<'a> {
    fn new(view: &View<'a>, geometry: &Geometry<'_>) -> Option<Self> {
        let axes = geometry.axes()?;
        let channel = axes.channels(view)?;
        let added = 3 - axes.as_slice().len();
        let axes = axes.three();
        let plane = |size: fn(&Axis) -> i64| {
            let mut product = 1usize;
            for axis in &axes {
                product = product.checked_mul(usize::try_from(size(axis)).ok()?)?;
            }
            (product <= GREATEST_PLANE).then_some(product)
        };
        // What is half done has sizes of both kinds.
        plane(|axis| axis.input.max(axis.output))?;
        plane(|axis| axis.kernel)?;
        let channels = usize::try_from(*view.sizes().get(channel)?).ok()?;
        let groups = usize::try_from(geometry.groups).ok()?;
        if channels > GREATEST_CHANNELS || groups == 0 || !channels.is_multiple_of(groups) {
            return None;
        }
        view.elements()?;
        Some(Self {
            all: Strided::new(view),
            channel,
            samples: match channel {
                0 => 1,
                _ => usize::try_from(*view.sizes().first()?).ok()?,
            },
            channels,
            added,
            positions: plane(|axis| axis.input)?,
            outputs: plane(|axis| axis.output)?,
            axes,
            groups,
        })
    }

    fn step(&self, tag: usize) -> Step {
        match tag.checked_sub(self.channel + 1) {
            None => Step {
                channels: 1,
                positions: 0,
            },
            Some(spatial) => {
                let inner = self.axes.get(spatial + self.added + 1..);
                Step {
                    channels: 0,
                    positions: inner
                        .unwrap_or_default()
                        .iter()
                        .map(|axis| axis.input as usize)
                        .product(),
                }
            }
        }
    }

    /// The elements of one sample.
    fn sample(&self, all: &Strided<'a>, index: usize) -> Strided<'a> {
        let mut elements = all.clone();
        if self.channel == 1 {
            elements.fix(0, index);
        }
        elements.drop_dims(|dim| dim.size == 1);
        elements.sort();
        elements.merge(|outer, inner| {
            let (outer, step) = (self.step(outer.tag), self.step(inner.tag));
            outer.channels == 0
                && step.channels == 0
                && outer.positions == inner.size * step.positions
        });
        elements
    }

    /// Marks where one sample is not zero, and adds up by mark what the weights of these positions are.
    fn mark<E: Element>(
        &self,
        elements: &Strided<'a>,
        place: Place<'_>,
        weights: &PositionWeights,
        marks: &mut [u8],
        mut weighted: impl FnMut(usize, u64),
    ) {
        let kernels = Kernels::<E>::get();
        let inner = elements
            .dims()
            .last()
            .map_or_else(Step::default, |dim| self.step(dim.tag));
        let mut buffer = Vec::new();
        elements.runs::<E::Bytes>(|indices, run| {
            let (mut channel, mut position) = (0, 0);
            for (dim, index) in elements.dims().iter().zip(indices) {
                let step = self.step(dim.tag);
                channel += index * step.channels;
                position += index * step.positions;
            }
            let whole = inner.channels == 0 && (inner.positions == 1 || run.len() == 1);
            let mut at = 0;
            while at < run.len() {
                let data = match run.slice() {
                    Some(data) => &data[at..(at + weights.piece).min(run.len())],
                    None => {
                        buffer.clear();
                        run.append(at, &mut buffer, weights.piece.min(1024));
                        &buffer
                    }
                };
                if whole {
                    let (plane, bit) = place(channel);
                    let first = position + at;
                    let sum = kernels.weighted_mark(
                        data,
                        &weights.all[first..first + data.len()],
                        bit,
                        &mut marks[plane * self.positions + first..],
                    );
                    weighted(channel, sum);
                } else {
                    for (i, &element) in data.iter().enumerate() {
                        if E::nonzero(element) {
                            let channel = channel + (at + i) * inner.channels;
                            let position = position + (at + i) * inner.positions;
                            let (plane, bit) = place(channel);
                            marks[plane * self.positions + position] |= bit;
                            weighted(channel, weights.all[position].into());
                        }
                    }
                }
                at += data.len();
            }
            true
        });
    }

    /// The words that eight neighbouring planes of marks make.
    fn words(&self, marks: &[u8], first: usize, planes: usize, words: &mut Vec<u64>) {
        words.clear();
        words.resize(self.positions, 0);
        for (at, plane) in marks
            .chunks_exact(self.positions)
            .skip(first)
            .take(planes.min(8))
            .enumerate()
        {
            for (word, &mark) in words.iter_mut().zip(plane) {
                *word |= u64::from(mark) << (8 * at);
            }
        }
    }
}

/// A number for each position: how many outputs it feeds.
struct PositionWeights {
    all: Vec<u32>,
    /// So many of them add up within 32 bits.
    piece: usize,
}

impl PositionWeights {
    fn new(axes: &[Axis; 3]) -> Option<Self> {
        let mut all = vec![1u32];
        for axis in axes {
            let factors = axis.fan_out();
            let mut product = Vec::with_capacity(all.len() * factors.len());
            for a in &all {
                for b in &factors {
                    product.push(a.checked_mul(*b)?);
                }
            }
            all = product;
        }
        let greatest = all.iter().copied().max().unwrap_or(0).max(1);
        let piece = WEIGHTED_PIECE.min((u32::MAX / greatest) as usize);
        Some(Self { all, piece })
    }
}

fn occupancy<E: Element>(view: &View<'_>, geometry: &Geometry<'_>) -> Result<Occupancy, NotTaken> {
    let input = Input::new(view, geometry).ok_or(NotTaken::Layout)?;
    let blocks = input.channels.div_ceil(CHANNELS_PER_BLOCK);
    let mut found = Occupancy {
        active_rows: vec![0; blocks],
        active_patches: CROSSBARS.map(|(size, _)| vec![0; input.channels.div_ceil(size)]),
        ..Occupancy::default()
    };
    let Some(all) = &input.all else {
        return Ok(found);
    };
    let weights = PositionWeights::new(&input.axes).ok_or(NotTaken::Layout)?;
    let per_group = input.channels / input.groups;
    let planes = blocks.div_ceil(8);
    let group_planes = if input.groups == 1 {
        0
    } else {
        input.groups.div_ceil(8)
    };
    let mut marks = vec![0u8; planes.max(group_planes) * input.positions];
    let mut seen = Seen::new(&input);
    let mut words = Vec::new();
    let mut sites = Vec::new();
    let mut outputs = 0u64;
    for index in 0..input.samples {
        let elements = input.sample(all, index);
        marks.fill(0);
        input.mark::<E>(
            &elements,
            &|channel| {
                let block = channel / CHANNELS_PER_BLOCK;
                (block / 8, 1 << (block % 8))
            },
            &weights,
            &mut marks,
            |channel, sum| found.active_rows[channel / CHANNELS_PER_BLOCK] += sum,
        );
        sites.clear();
        sites.resize(input.outputs, 0);
        for word in 0..planes.div_ceil(8) {
            input.words(&marks, word * 8, planes - word * 8, &mut words);
            let seen = seen.see(&words);
            for (site, seen) in sites.iter_mut().zip(seen) {
                *site |= seen;
            }
            for ((size, _), patches) in CROSSBARS.iter().zip(&mut found.active_patches) {
                // One block for all channels: its patches are the sites.
                if patches.len() > 1 {
                    let per_word = BITS * CHANNELS_PER_BLOCK / size;
                    let patches = patches.iter_mut().skip(word * per_word).take(per_word);
                    tally(seen, size / CHANNELS_PER_BLOCK, patches);
                }
            }
        }
        found.active_sites += sites.iter().map(|site| u64::from(*site != 0)).sum::<u64>();
        if input.groups > 1 {
            marks.fill(0);
            input.mark::<E>(
                &elements,
                &|channel| (channel / per_group / 8, 1 << (channel / per_group % 8)),
                &weights,
                &mut marks,
                |_, _| (),
            );
            for first in (0..group_planes).step_by(8) {
                input.words(&marks, first, group_planes - first, &mut words);
                let seen = seen.see(&words);
                outputs += seen
                    .iter()
                    .map(|seen| u64::from(seen.count_ones()))
                    .sum::<u64>();
            }
        }
    }
    if input.groups == 1 {
        outputs = found.active_sites;
    }
    for patches in &mut found.active_patches {
        if let [one] = &mut patches[..] {
            *one = found.active_sites;
        }
    }
    found.nonempty_outputs = outputs.saturating_mul(geometry.outputs_per_group.unsigned_abs());
    Ok(found)
}

/// The union of what each site sees.
struct Seen {
    axes: [Along; 3],
    from: Vec<u64>,
    to: Vec<u64>,
}

/// One dimension of the receptive fields.
struct Along {
    /// Input positions and outputs in the dimensions outside and inside, the outer ones not yet done, the inner ones done.
    outside: usize,
    inside: usize,
    input: usize,
    output: usize,
    meetings: Vec<Meeting>,
}

impl Along {
    /// Every position is seen by the output at its place and by no other.
    fn changes_nothing(&self) -> bool {
        let [meeting] = &self.meetings[..] else {
            return false;
        };
        let ends = meeting.input == 0 && meeting.output == 0;
        let steps = (meeting.input_step == 1 && meeting.output_step == 1) || meeting.count == 1;
        ends && steps && meeting.count == self.input && meeting.count == self.output
    }
}

fn meetings(axis: &Axis) -> Vec<Meeting> {
    (0..axis.kernel)
        .map(|k| axis.meeting(k))
        .filter(|meeting| meeting.count > 0)
        .collect()
}

impl Seen {
    fn new(input: &Input<'_>) -> Self {
        let along = |at: usize| Along {
            outside: input.axes[..at]
                .iter()
                .map(|axis| axis.input as usize)
                .product(),
            inside: input.axes[at + 1..]
                .iter()
                .map(|axis| axis.output as usize)
                .product(),
            input: input.axes[at].input as usize,
            output: input.axes[at].output as usize,
            meetings: meetings(&input.axes[at]),
        };
        Self {
            axes: [along(0), along(1), along(2)],
            from: Vec::new(),
            to: Vec::new(),
        }
    }

    /// What the sites see of these positions.
    fn see(&mut self, positions: &[u64]) -> &[u64] {
        self.from.clear();
        self.from.extend_from_slice(positions);
        for along in self
            .axes
            .iter()
            .rev()
            .filter(|along| !along.changes_nothing())
        {
            self.to.clear();
            self.to
                .resize(along.outside * along.output * along.inside, 0);
            unite(along, &self.from, &mut self.to);
            std::mem::swap(&mut self.from, &mut self.to);
        }
        &self.from
    }
}

fn unite(along: &Along, from: &[u64], to: &mut [u64]) {
    let inside = along.inside;
    if inside == 0 || along.output == 0 || along.input == 0 {
        return;
    }
    let rows = from.chunks_exact(along.input * inside);
    for (from, to) in rows.zip(to.chunks_exact_mut(along.output * inside)) {
        for meeting in &along.meetings {
            let (length, times) = if meeting.input_step == 1 && meeting.output_step == 1 {
                (meeting.count * inside, 1)
            } else {
                (inside, meeting.count)
            };
            for at in 0..times {
                let first = (meeting.input + at * meeting.input_step) * inside;
                let to_first = (meeting.output + at * meeting.output_step) * inside;
                let from = &from[first..first + length];
                for (to, from) in to[to_first..to_first + length].iter_mut().zip(from) {
                    *to |= from;
                }
            }
        }
    }
}

/// Counts, for every run of `width` bits (a power of two), the words that have one of them set.
fn tally<'c>(words: &[u64], width: usize, counts: impl Iterator<Item = &'c mut u64>) {
    // Eight counters of a byte in each; they are emptied before they overflow.
    const LOWEST: u64 = 0x0101_0101_0101_0101;
    let mut totals = [0u64; BITS];
    for words in words.chunks(255) {
        let mut counters = [0u64; 8];
        for &word in words {
            let mut folded = word;
            let mut by = 1;
            while by < width {
                folded |= folded >> by;
                by *= 2;
            }
            if width >= 8 {
                counters[0] += folded & LOWEST;
            } else {
                for (shift, counter) in counters.iter_mut().enumerate().step_by(width) {
                    *counter += folded >> shift & LOWEST;
                }
            }
        }
        for (bit, total) in totals.iter_mut().enumerate().step_by(width) {
            *total += counters[bit % 8] >> (bit / 8 * 8) & 0xff;
        }
    }
    for (count, total) in counts.zip(totals.iter().step_by(width)) {
        *count += total;
    }
}

/// The weight of a convolution: where its elements stand.
struct Weights {
    transposed: bool,
    /// Input and output channels of a group.
    inputs: usize,
    outputs: usize,
    taps: usize,
}

impl Weights {
    fn new(input: &Input<'_>, weight: &View<'_>, geometry: &Geometry<'_>) -> Option<Self> {
        let [outer, inner, kernel @ ..] = weight.sizes() else {
            return None;
        };
        let weights = Self {
            transposed: geometry.transposed,
            inputs: input.channels / input.groups,
            outputs: usize::try_from(geometry.outputs_per_group).ok()?,
            taps: input.axes.iter().map(|axis| axis.kernel as usize).product(),
        };
        let sizes = if geometry.transposed {
            (input.channels, weights.outputs)
        } else {
            (weights.outputs.checked_mul(input.groups)?, weights.inputs)
        };
        let fits = kernel.iter().eq(geometry.kernel)
            && usize::try_from(*outer) == Ok(sizes.0)
            && usize::try_from(*inner) == Ok(sizes.1);
        fits.then_some(weights)
    }

    fn at(&self, group: usize, output: usize, input: usize, tap: usize) -> usize {
        let (outer, inner, size) = if self.transposed {
            (group * self.inputs + input, output, self.outputs)
        } else {
            (group * self.outputs + output, input, self.inputs)
        };
        (outer * size + inner) * self.taps + tap
    }

    /// For an output channel, a word per 64 input channels of the group and per element of the kernel.
    fn masks(&self, of_weight: &[u8], group: usize, output: usize, masks: &mut Vec<u64>) {
        let words = self.inputs.div_ceil(BITS);
        masks.clear();
        masks.resize(words * self.taps, 0);
        for input in 0..self.inputs {
            for tap in 0..self.taps {
                let mark = of_weight[self.at(group, output, input, tap)];
                masks[input / BITS * self.taps + tap] |= u64::from(mark) << (input % BITS);
            }
        }
    }
}

fn product_outputs<E: Element>(
    input: &Input<'_>,
    weights: &Weights,
    of_weight: &[u8],
) -> Result<u64, NotTaken> {
    /// Words that are looked at: a few seconds at the most.
    const MOST_WORK: u128 = 1 << 31;
    let Some(all) = &input.all else {
        return Ok(0);
    };
    let words = weights.inputs.div_ceil(BITS);
    let work = [
        input.samples,
        input.groups,
        weights.outputs,
        input.outputs,
        weights.taps,
        words,
    ]
    .iter()
    .fold(1u128, |work, &factor| work.saturating_mul(factor as u128));
    if work > MOST_WORK {
        return Err(NotTaken::Layout);
    }
    let fan_out = PositionWeights::new(&input.axes).ok_or(NotTaken::Layout)?;
    let planes = weights.inputs.div_ceil(8);
    let mut marks = vec![0u8; planes * input.groups * input.positions];
    let [first, second, third] = input.axes.each_ref().map(|axis| {
        let meeting = |k| axis.meeting(k);
        (0..axis.kernel).map(meeting).collect::<Vec<_>>()
    });
    let (mut masks, mut last) = (Vec::new(), Vec::new());
    let mut inputs = vec![Vec::new(); words];
    let mut hit = Vec::new();
    let mut total = 0u64;
    for index in 0..input.samples {
        let elements = input.sample(all, index);
        marks.fill(0);
        input.mark::<E>(
            &elements,
            &|channel| {
                let (group, inner) = (channel / weights.inputs, channel % weights.inputs);
                (group * planes + inner / 8, 1 << (inner % 8))
            },
            &fan_out,
            &mut marks,
            |_, _| (),
        );
        for group in 0..input.groups {
            for (word, inputs) in inputs.iter_mut().enumerate() {
                input.words(&marks, group * planes + word * 8, planes - word * 8, inputs);
            }
            let mut count = None;
            for output in 0..weights.outputs {
                weights.masks(of_weight, group, output, &mut masks);
                // Binary weights are mostly all ones, or all zeros.
                if let Some(count) = count
                    && masks == last
                {
                    total += count;
                    continue;
                }
                hit.clear();
                hit.resize(input.outputs, false);
                let (outer, inner) = (&input.axes[1..], &input.axes[2]);
                let rows = (outer[0].input * inner.input) as usize;
                let output_rows = (outer[0].output * inner.output) as usize;
                let mut tap = 0;
                for a in &first {
                    for b in &second {
                        for c in &third {
                            let masks: Vec<u64> = masks
                                .iter()
                                .skip(tap)
                                .step_by(weights.taps)
                                .copied()
                                .collect();
                            tap += 1;
                            if masks.iter().all(|mask| *mask == 0) {
                                continue;
                            }
                            for at in 0..a.count * b.count * c.count {
                                let (i, rest) =
                                    (at / (b.count * c.count), at % (b.count * c.count));
                                let (j, k) = (rest / c.count, rest % c.count);
                                let from = (a.input + i * a.input_step) * rows
                                    + (b.input + j * b.input_step) * inner.input as usize
                                    + c.input
                                    + k * c.input_step;
                                let to = (a.output + i * a.output_step) * output_rows
                                    + (b.output + j * b.output_step) * inner.output as usize
                                    + c.output
                                    + k * c.output_step;
                                hit[to] |= inputs
                                    .iter()
                                    .zip(&masks)
                                    .any(|(inputs, mask)| inputs[from] & mask != 0);
                            }
                        }
                    }
                }
                let found = hit.iter().map(|hit| u64::from(*hit)).sum::<u64>();
                count = Some(found);
                total += found;
                std::mem::swap(&mut masks, &mut last);
            }
        }
    }
    Ok(total)
}
