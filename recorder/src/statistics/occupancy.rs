//! Rows and columns of a matrix that have a nonzero, and elements of a product that are not zero (T3).
//!
//! An event-driven adder that meets s spikes in a row adds s - 1 times, and not at all where there is none: so what a
//! model of it needs beside the spikes is the number of rows, columns and outputs that are not empty.

use optape_trace::NotTaken;

use super::element::{Element, with_element};
use super::kernel::Kernels;
use super::memory::{Strided, View};

/// The most rows and columns of one matrix that are looked at, and the most elements of a factor of [`nonempty_outputs`].
const GREATEST: usize = 1 << 24;

/// Elements that are copied at once where they do not lie behind each other.
const BLOCK: usize = 1024;

/// How the dimensions of a tensor become those of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrix {
    /// The last two dimensions are one; the others say how many there are, and each counts for itself (`bmm`).
    Batched,
    /// All dimensions but the last are rows of a single one (the input of `linear`).
    Flat,
}

/// Rows and columns with a nonzero. A vector is one row, a scalar one element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NonemptyLines {
    /// Rows.
    pub rows: u64,
    /// Columns.
    pub columns: u64,
}

/// Counts the rows and columns of a tensor that have a nonzero.
///
/// # Errors
///
/// [`NotTaken::DType`] for element types without statistics, [`NotTaken::Layout`] if sizes and strides do not make a
/// tensor, or a matrix has more than 2^24 rows or columns.
pub fn nonempty_lines(view: &View<'_>, matrix: Matrix) -> Result<NonemptyLines, NotTaken> {
    with_element!(view.dtype(), E => lines::<E>(view, matrix), else Err(NotTaken::DType))
}

/// Where the dimensions of a tensor stand in its matrix.
struct Shape {
    rank: usize,
    /// Leading dimensions that count matrices.
    batch: usize,
    rows: usize,
    columns: usize,
}

impl Shape {
    fn new(view: &View<'_>, matrix: Matrix) -> Option<Self> {
        let sizes = view.sizes();
        let rank = sizes.len();
        let batch = match matrix {
            Matrix::Batched => rank.saturating_sub(2),
            Matrix::Flat => 0,
        };
        let size = |range: std::ops::Range<usize>| {
            let mut product = 1usize;
            for size in sizes.get(range)? {
                product = product.checked_mul(usize::try_from(*size).ok()?)?;
            }
            (product <= GREATEST).then_some(product)
        };
        let column = rank.saturating_sub(1);
        Some(Self {
            rank,
            batch,
            rows: size(batch.min(column)..column)?,
            columns: size(column..rank)?,
        })
    }

    fn is_column(&self, tag: usize) -> bool {
        tag + 1 == self.rank
    }

    /// The step that a dimension makes among the rows.
    fn row_step(&self, view: &View<'_>, tag: usize) -> usize {
        if tag < self.batch || tag + 1 >= self.rank {
            return 0;
        }
        // Cannot overflow: part of `rows`.
        let inner = &view.sizes()[tag + 1..self.rank - 1];
        inner.iter().map(|&size| size as usize).product()
    }
}

/// Calls `visit` with each matrix.
fn each_matrix(elements: &Strided<'_>, batch: usize, visit: &mut impl FnMut(Strided<'_>)) {
    let next = elements.dims().iter().find(|dim| dim.tag < batch).copied();
    match next {
        None => visit(elements.clone()),
        Some(dim) => {
            for index in 0..dim.size {
                let mut one = elements.clone();
                one.fix(dim.tag, index);
                each_matrix(&one, batch, visit);
            }
        }
    }
}

fn lines<E: Element>(view: &View<'_>, matrix: Matrix) -> Result<NonemptyLines, NotTaken> {
    if view.elements().ok_or(NotTaken::Layout)? == 0 {
        return Ok(NonemptyLines::default());
    }
    let shape = Shape::new(view, matrix).ok_or(NotTaken::Layout)?;
    let all = Strided::new(view).ok_or(NotTaken::Layout)?;
    let kernels = Kernels::<E>::get();
    let (mut rows, mut columns) = (vec![0u8; shape.rows], vec![0u8; shape.columns]);
    let mut found = NonemptyLines::default();
    let mut buffer = Vec::new();
    each_matrix(&all, shape.batch, &mut |mut elements| {
        rows.fill(0);
        columns.fill(0);
        elements.drop_dims(|dim| dim.size == 1);
        elements.sort();
        let step = |tag: usize| shape.row_step(view, tag);
        elements.merge(|outer, inner| {
            !shape.is_column(outer.tag)
                && !shape.is_column(inner.tag)
                && step(outer.tag) == inner.size * step(inner.tag)
        });
        let innermost = elements.dims().last().map(|dim| dim.tag);
        let along_columns = innermost.is_none_or(|tag| shape.is_column(tag));
        let inner_step = innermost.map_or(1, |tag| if along_columns { 1 } else { step(tag) });
        elements.runs::<E::Bytes>(|indices, run| {
            let (mut row, mut column) = (0, 0);
            for (dim, index) in elements.dims().iter().zip(indices) {
                if shape.is_column(dim.tag) {
                    column += index;
                } else {
                    row += index * step(dim.tag);
                }
            }
            let (lines, first, other) = if along_columns {
                (&mut columns, column, &mut rows[row])
            } else {
                (&mut rows, row, &mut columns[column])
            };
            let mut at = 0;
            while at < run.len() {
                let data = if let Some(data) = run.slice() {
                    data
                } else {
                    buffer.clear();
                    run.append(at, &mut buffer, BLOCK);
                    &buffer
                };
                if inner_step == 1 {
                    *other |= u8::from(kernels.mark(data, 1, &mut lines[first + at..]));
                } else {
                    for (i, &element) in data.iter().enumerate() {
                        let nonzero = u8::from(E::nonzero(element));
                        lines[first + (at + i) * inner_step] |= nonzero;
                        *other |= nonzero;
                    }
                }
                at += data.len();
            }
            true
        });
        let count = |lines: &[u8]| lines.iter().map(|&line| u64::from(line)).sum::<u64>();
        found.rows += count(&rows);
        found.columns += count(&columns);
    });
    Ok(found)
}

/// A tensor's elements as bytes, 1 where they are not zero, row by row.
pub(super) fn bytes(view: &View<'_>) -> Result<Vec<u8>, NotTaken> {
    with_element!(view.dtype(), E => marks::<E>(view), else Err(NotTaken::DType))
}

fn marks<E: Element>(view: &View<'_>) -> Result<Vec<u8>, NotTaken> {
    let count = view.elements().ok_or(NotTaken::Layout)?;
    let count = usize::try_from(count).map_err(|_| NotTaken::Layout)?;
    if count > GREATEST {
        return Err(NotTaken::Layout);
    }
    let mut marks = vec![0u8; count];
    let kernels = Kernels::<E>::get();
    if let Some(data) = view.contiguous::<E::Bytes>() {
        kernels.mark(data, 1, &mut marks);
        return Ok(marks);
    }
    let elements = Strided::new(view).ok_or(NotTaken::Layout)?;
    let mut at = 0;
    let mut buffer = Vec::new();
    // In the order of the indices, whatever the order in memory.
    elements.runs::<E::Bytes>(|_, run| {
        buffer.clear();
        run.append(0, &mut buffer, usize::MAX);
        kernels.mark(&buffer, 1, &mut marks[at..]);
        at += run.len();
        true
    });
    Ok(marks)
}

/// How many elements of the product `a @ b` are not zero, where both factors have zeros and ones alone: `[m, k]` and
/// `[k, n]`, the same with a leading dimension each, or `[.., k]` and a weight `[n, k]` with `transposed`.
///
/// # Errors
///
/// [`NotTaken::DType`] for element types without statistics, [`NotTaken::Layout`] if the sizes do not fit together or there are
/// more than 2^24 elements in a factor.
pub fn nonempty_outputs(a: &View<'_>, b: &View<'_>, transposed: bool) -> Result<u64, NotTaken> {
    let size = |size: i64| usize::try_from(size).map_err(|_| NotTaken::Layout);
    let (batch, joint, columns) = match (a.sizes(), b.sizes()) {
        ([.., k], [n, joint]) if transposed && k == joint => (1, size(*k)?, size(*n)?),
        ([_, k], [joint, n]) if !transposed && k == joint => (1, size(*k)?, size(*n)?),
        ([batch, _, k], [same, joint, n]) if !transposed && k == joint && batch == same => {
            (size(*batch)?, size(*k)?, size(*n)?)
        }
        _ => return Err(NotTaken::Layout),
    };
    let (of_a, of_b) = (bytes(a)?, bytes(b)?);
    if of_a.is_empty() || of_b.is_empty() {
        return Ok(0);
    }
    // Which columns each joint index reaches, 64 to a word.
    let words = columns.div_ceil(64);
    let mut reached = vec![0u64; joint * words];
    let mut sum = vec![0u64; words];
    let mut outputs = 0u64;
    let per_matrix = (of_a.len() / batch, of_b.len() / batch);
    for (of_a, of_b) in of_a
        .chunks_exact(per_matrix.0)
        .zip(of_b.chunks_exact(per_matrix.1))
    {
        reached.fill(0);
        for (at, &mark) in of_b.iter().enumerate() {
            let (index, column) = if transposed {
                (at % joint, at / joint)
            } else {
                (at / columns, at % columns)
            };
            reached[index * words + column / 64] |= u64::from(mark) << (column % 64);
        }
        for row in of_a.chunks_exact(joint) {
            sum.fill(0);
            for (_, reached) in row
                .iter()
                .zip(reached.chunks_exact(words))
                .filter(|(mark, _)| **mark != 0)
            {
                for (sum, reached) in sum.iter_mut().zip(reached) {
                    *sum |= reached;
                }
            }
            outputs += sum
                .iter()
                .map(|word| u64::from(word.count_ones()))
                .sum::<u64>();
        }
    }
    Ok(outputs)
}
