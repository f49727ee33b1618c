//! Exact sums over the products of two binary factors, without computing the products (T4).
//!
//! The sum over all elements of `a @ b` is a sum over the dimension that the product runs along: ones of `a` at `k`
//! times ones of `b` at `k`. So each factor is read once and counted, and the cost is that of reading. The
//! functions count what is not zero; that the factors are binary is for the caller to know.

use optape_trace::{DType, NotTaken};

use super::convolution::{Axis, Geometry};
use super::element::{Element, with_element};
use super::kernel::Kernels;
use super::memory::{Strided, View};

/// How many indices of the joint dimension are counted at once, on the stack.
const BLOCK: usize = 512;

/// The most positions or kernel elements of one channel for which a convolution's product is summed.
const GREATEST_CHANNEL: usize = 1 << 28;

/// Sum of `a @ b` for `[m, k]` and `[k, n]`, or for `[b, m, k]` and `[b, k, n]`.
///
/// # Errors
///
/// [`NotTaken::DType`] for element types without statistics, [`NotTaken::Layout`] if the sizes do not fit together.
pub fn product_sum_matrix(a: &View<'_>, b: &View<'_>) -> Result<u64, NotTaken> {
    match (a.sizes().len(), b.sizes().len()) {
        (2, 2) => joint_sum(a, b, &mut vec![(1, 0)]),
        (3, 3) => joint_sum(a, b, &mut vec![(0, 0), (2, 1)]),
        _ => Err(NotTaken::Layout),
    }
}

/// Sum of `x @ weight^T` for `[.., k]` and `[n, k]` or `[k]`.
///
/// # Errors
///
/// As [`product_sum_matrix`].
pub fn product_sum_linear(x: &View<'_>, weight: &View<'_>) -> Result<u64, NotTaken> {
    match (x.sizes().len(), weight.sizes().len()) {
        (1.., 1 | 2) => joint_sum(
            x,
            weight,
            &mut vec![(x.sizes().len() - 1, weight.sizes().len() - 1)],
        ),
        _ => Err(NotTaken::Layout),
    }
}

/// Sum of `torch.matmul(a, b)`: 1-dimensional factors are vectors, leading dimensions are broadcast.
///
/// # Errors
///
/// As [`product_sum_matrix`].
pub fn product_sum_broadcast(a: &View<'_>, b: &View<'_>) -> Result<u64, NotTaken> {
    let (rank_a, rank_b) = (a.sizes().len(), b.sizes().len());
    if rank_a == 0 || rank_b == 0 {
        return Err(NotTaken::Layout);
    }
    let leading = (rank_a.saturating_sub(2), rank_b.saturating_sub(2));
    let mut joint = Vec::with_capacity(leading.0.min(leading.1) + 1);
    for (at_a, at_b) in (0..leading.0).rev().zip((0..leading.1).rev()) {
        match (a.sizes()[at_a], b.sizes()[at_b]) {
            (x, y) if x == y => joint.push((at_a, at_b)),
            // The product repeats the one factor; its sum is that factor times the sum of the other.
            (1, _) | (_, 1) => {}
            _ => return Err(NotTaken::Layout),
        }
    }
    joint.push((rank_a - 1, rank_b.saturating_sub(2)));
    joint_sum(a, b, &mut joint)
}

/// Sum over the joint indices of (ones of `a` there) times (ones of `b` there). `joint` pairs dimensions of `a` and `b`.
fn joint_sum(a: &View<'_>, b: &View<'_>, joint: &mut Vec<(usize, usize)>) -> Result<u64, NotTaken> {
    if joint
        .iter()
        .any(|&(at_a, at_b)| a.sizes().get(at_a) != b.sizes().get(at_b))
    {
        return Err(NotTaken::Layout);
    }
    let (count_a, count_b) = (counter(a.dtype())?, counter(b.dtype())?);
    match (a.elements(), b.elements()) {
        (None, _) | (_, None) => return Err(NotTaken::Layout),
        (Some(0), _) | (_, Some(0)) => return Ok(0),
        _ => {}
    }
    let mut of_a = Strided::new(a).ok_or(NotTaken::Layout)?;
    let mut of_b = Strided::new(b).ok_or(NotTaken::Layout)?;
    joint.retain(|&(at_a, at_b)| {
        // What one factor repeats is summed over in the other.
        if a.strides()[at_a] == 0 {
            of_a.fix(at_a, 0);
            false
        } else if b.strides()[at_b] == 0 {
            of_b.fix(at_b, 0);
            false
        } else {
            a.sizes()[at_a] > 1
        }
    });
    let mut sum = 0u128;
    joint_blocks((&of_a, count_a), (&of_b, count_b), joint, &mut sum);
    Ok(u64::try_from(sum).unwrap_or(u64::MAX))
}

fn joint_blocks(
    (a, count_a): (&Strided<'_>, Count),
    (b, count_b): (&Strided<'_>, Count),
    joint: &[(usize, usize)],
    sum: &mut u128,
) {
    let size = |at: usize| {
        a.dims()
            .iter()
            .find(|dim| dim.tag == at)
            .map_or(1, |dim| dim.size)
    };
    let (mut counts_a, mut counts_b) = ([0u64; BLOCK], [0u64; BLOCK]);
    match joint {
        [] => {
            let factor = u128::from(count_a(a.clone(), &|_| 0, &mut counts_a))
                * u128::from(count_b(b.clone(), &|_| 0, &mut counts_b));
            *sum += factor * u128::from(counts_a[0]) * u128::from(counts_b[0]);
        }
        &[(at_a, at_b)] => {
            let size = size(at_a);
            for start in (0..size).step_by(BLOCK) {
                let len = BLOCK.min(size - start);
                let (mut a, mut b) = (a.clone(), b.clone());
                a.narrow(at_a, start, len);
                b.narrow(at_b, start, len);
                let (counts_a, counts_b) = (&mut counts_a[..len], &mut counts_b[..len]);
                counts_a.fill(0);
                counts_b.fill(0);
                let factor = u128::from(count_a(a, &|tag| usize::from(tag == at_a), counts_a))
                    * u128::from(count_b(b, &|tag| usize::from(tag == at_b), counts_b));
                *sum += factor * dot(counts_a, counts_b);
            }
        }
        &[(at_a, at_b), ref inner @ ..] => {
            for index in 0..size(at_a) {
                let (mut a, mut b) = (a.clone(), b.clone());
                a.fix(at_a, index);
                b.fix(at_b, index);
                joint_blocks((&a, count_a), (&b, count_b), inner, sum);
            }
        }
    }
}

fn dot(a: &[u64], b: &[u64]) -> u128 {
    a.iter()
        .zip(b)
        .map(|(&x, &y)| u128::from(x) * u128::from(y))
        .sum()
}

/// [`count`] for one element type. Products go through this pointer: compiled for every pair of types, they would be 256 times the
/// same code.
type Count = fn(Strided<'_>, &dyn Fn(usize) -> usize, &mut [u64]) -> u64;

fn counter(dtype: DType) -> Result<Count, NotTaken> {
    with_element!(dtype, E => Ok(count::<E> as Count), else Err(NotTaken::DType))
}

/// Adds to `counts` the elements that are not zero, each at the place `sum(index * place(tag))` over its dimensions; those
/// with place 0 are summed over. Gives a factor that the caller has still to multiply with.
fn count<E: Element>(
    mut elements: Strided<'_>,
    place: &dyn Fn(usize) -> usize,
    counts: &mut [u64],
) -> u64 {
    let kernels = Kernels::<E>::get();
    let mut factor = 1u64;
    elements.drop_dims(|dim| {
        let drop = dim.size == 1 || (dim.stride == 0 && place(dim.tag) == 0);
        if drop {
            factor *= dim.size as u64;
        }
        drop
    });
    elements.sort();
    elements.merge(|outer, inner| place(outer.tag) == inner.size * place(inner.tag));
    let innermost = elements.dims().last().map_or(0, |dim| place(dim.tag));
    let mut buffer = Vec::new();
    elements.runs::<E::Bytes>(|indices, run| {
        let base: usize = elements
            .dims()
            .iter()
            .zip(indices)
            .map(|(dim, index)| index * place(dim.tag))
            .sum();
        let mut at = 0;
        while at < run.len() {
            let data = if let Some(data) = run.slice() {
                data
            } else {
                buffer.clear();
                run.append(at, &mut buffer, BLOCK);
                &buffer
            };
            match innermost {
                0 => counts[base] += kernels.scan(data, false).nonzeros,
                1 => kernels.count(data, &mut counts[base + at..]),
                step => {
                    for (i, &element) in data.iter().enumerate() {
                        counts[base + (at + i) * step] += u64::from(E::nonzero(element));
                    }
                }
            }
            at += data.len();
        }
        true
    });
    factor
}

/// Sum of the outputs of a convolution, bias left out. Input `[N, C, spatial..]` or `[C, spatial..]`; weight
/// `[C_out, C_in / groups, kernel..]`, transposed `[C_in, C_out / groups, kernel..]`.
///
/// # Errors
///
/// [`NotTaken::DType`] for element types without statistics, [`NotTaken::Layout`] if input, weight and geometry do not
/// fit together.
pub fn product_sum_convolution(
    input: &View<'_>,
    weight: &View<'_>,
    geometry: &Geometry<'_>,
) -> Result<u64, NotTaken> {
    let (count_input, count_weights) = (counter(input.dtype())?, counter(weight.dtype())?);
    let axes = geometry.axes().ok_or(NotTaken::Layout)?;
    let channel = axes.channels(input).ok_or(NotTaken::Layout)?;
    let axes = axes.as_slice();
    let [outer, inner, kernel @ ..] = weight.sizes() else {
        return Err(NotTaken::Layout);
    };
    let channels = input.sizes()[channel];
    let group = if geometry.transposed {
        *outer
    } else {
        inner.saturating_mul(geometry.groups)
    };
    let outputs = if geometry.transposed {
        *inner
    } else {
        outer / geometry.groups
    };
    let fits = kernel.iter().eq(axes.iter().map(|axis| &axis.kernel))
        && channels == group
        && channels % geometry.groups == 0
        && outputs == geometry.outputs_per_group
        && (geometry.transposed || outer % geometry.groups == 0);
    if !fits {
        return Err(NotTaken::Layout);
    }
    match (input.elements(), weight.elements()) {
        (None, _) | (_, None) => return Err(NotTaken::Layout),
        (Some(0), _) | (_, Some(0)) => return Ok(0),
        _ => {}
    }
    let positions = product(axes.iter().map(|axis| axis.input)).ok_or(NotTaken::Layout)?;
    let taps = product(axes.iter().map(|axis| axis.kernel)).ok_or(NotTaken::Layout)?;
    product(axes.iter().map(|axis| axis.kernel.max(axis.input))).ok_or(NotTaken::Layout)?;

    let all_input = Strided::new(input).ok_or(NotTaken::Layout)?;
    let all_weights = Strided::new(weight).ok_or(NotTaken::Layout)?;
    let (mut of_input, mut met, mut of_weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut sum = 0u128;
    let (channels, groups, outputs) = (
        channels as usize,
        geometry.groups as usize,
        outputs as usize,
    );
    for index in 0..channels {
        let mut weights = all_weights.clone();
        if geometry.transposed {
            weights.fix(0, index);
        } else {
            let group = channels / groups;
            weights.narrow(0, index / group * outputs, outputs);
            weights.fix(1, index % group);
        }
        of_weights.clear();
        of_weights.resize(taps, 0);
        let factor = count_weights(
            weights,
            &place(axes, 2, |axis| axis.kernel),
            &mut of_weights,
        );

        let mut elements = all_input.clone();
        elements.fix(channel, index);
        of_input.clear();
        of_input.resize(positions, 0);
        let repeated = count_input(
            elements,
            &place(axes, channel + 1, |axis| axis.input),
            &mut of_input,
        );
        // What each kernel element meets, one spatial dimension after the other, the last one first.
        for at in (0..axes.len()).rev() {
            let inner =
                product(axes[at + 1..].iter().map(|axis| axis.kernel)).ok_or(NotTaken::Layout)?;
            meet(&axes[at], inner, &mut of_input, &mut met);
            std::mem::swap(&mut of_input, &mut met);
        }
        sum += u128::from(factor) * u128::from(repeated) * dot(&of_input, &of_weights);
    }
    Ok(u64::try_from(sum).unwrap_or(u64::MAX))
}

/// The product of sizes, if it is within [`GREATEST_CHANNEL`].
fn product(sizes: impl Iterator<Item = i64>) -> Option<usize> {
    let mut product = 1usize;
    for size in sizes {
        product = product.checked_mul(usize::try_from(size).ok()?)?;
    }
    (product <= GREATEST_CHANNEL).then_some(product)
}

/// Row-major places of the spatial dimensions, which begin at the tag `first`. Size 1 has no need of a place.
fn place(axes: &[Axis], first: usize, size: impl Fn(&Axis) -> i64) -> impl Fn(usize) -> usize {
    let mut places = [0usize; 3];
    let mut step = 1usize;
    for (slot, axis) in places.iter_mut().zip(axes).rev() {
        *slot = step;
        step *= size(axis) as usize;
    }
    move |tag| {
        tag.checked_sub(first)
            .and_then(|at| places.get(at))
            .copied()
            .unwrap_or(0)
    }
}

/// Sums the positions `[.., input, inner]` that each element of the kernel meets into `[.., kernel, inner]`.
fn meet(axis: &Axis, inner: usize, positions: &mut [u64], met: &mut Vec<u64>) {
    met.clear();
    let row = axis.input as usize * inner;
    let step = axis.tap_step();
    for positions in positions.chunks_exact_mut(row) {
        // Running sums, so that a tap's sum is one difference.
        for at in step * inner..row {
            positions[at] += positions[at - step * inner];
        }
        for k in 0..axis.kernel {
            let tap = axis.tap(k);
            for i in 0..inner {
                let sum = match tap.count {
                    0 => 0,
                    count => {
                        let through = positions[(tap.start + (count - 1) * step) * inner + i];
                        let before = tap
                            .start
                            .checked_sub(step)
                            .map_or(0, |at| positions[at * inner + i]);
                        through - before
                    }
                };
                met.push(sum);
            }
        }
    }
}
