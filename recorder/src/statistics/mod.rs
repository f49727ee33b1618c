//! Statistics of tensor values: binary or not, nonzeros, sums, and what they mean for products.
//!
//! Pure functions over tensor memory. [`measure`] looks at one tensor (level T1), [`measure_convolution`] at a
//! convolution's input together with the number of outputs that each position feeds (T2), and the `product_sum_*` functions
//! add up the products of two binary factors without computing any product (T4). [`nonempty_lines`], [`nonempty_outputs`],
//! [`measure_occupancy`] and [`nonempty_outputs_convolution`] say what of a product is not empty (T3), and which parts of a
//! convolution's input crossbar arrays see (T5).
//!
//! Most tensors that are looked at are not binary and say so in their first element; the others are
//! read once, at the speed of the cache. So the first element is asked before anything else is worked out, and
//! a tensor is first looked at for zeros and ones alone, by far the cheapest question: sum, minimum and maximum of zeros and
//! ones follow from the count.

mod convolution;
mod crossbar;
mod element;
mod kernel;
mod memory;
mod occupancy;
mod product;

use optape_trace::NotTaken;
use optape_trace::needs::Need;

pub use convolution::{ConvolutionAnswer, Geometry, measure_convolution};
pub use crossbar::{Occupancy, measure_occupancy, nonempty_outputs_convolution};
pub use memory::View;
pub use occupancy::{Matrix, NonemptyLines, nonempty_lines, nonempty_outputs};
pub use product::{
    product_sum_broadcast, product_sum_convolution, product_sum_linear, product_sum_matrix,
};

use element::{Element, with_element};
use kernel::{Kernels, PIECE, Sum};
use memory::{Plain, Run, Strided};

/// What is asked of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Binary or not; the nonzeros if it is. Stops at the first element that is neither 0 nor 1.
    Binary,
    /// Binary or not, and the nonzeros either way.
    Nonzeros,
    /// Binary or not, nonzeros, sum.
    Sum,
    /// Binary or not, nonzeros, sum, minimum, maximum.
    Full,
}

impl Question {
    /// Whether the values themselves are asked for.
    #[must_use]
    pub const fn sums(self) -> bool {
        matches!(self, Self::Sum | Self::Full)
    }
}

impl From<Need> for Question {
    fn from(need: Need) -> Self {
        match need {
            Need::Binary => Self::Binary,
            Need::Nonzeros => Self::Nonzeros,
            Need::Sum => Self::Sum,
        }
    }
}

/// What was found. Each field is there if it was asked for and exists.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Answer {
    /// Every element is 0 or 1. NaN is neither, negative zero is 0, every bool is one of them; complex numbers must be
    /// `0+0i` or `1+0i`. No elements: true.
    pub binary: Option<bool>,
    /// Elements that are not zero. NaN is not.
    pub nonzeros: Option<u64>,
    /// Sum in `f64`, of complex numbers the real parts. Exact for integers before the last rounding; for floats the order of
    /// the additions follows from the layout alone. `Sum` and `Full` only.
    pub sum: Option<f64>,
    /// Least element, NaN if any is. `Full` only; absent for complex numbers and where there are no elements.
    pub minimum: Option<f64>,
    /// Greatest element, likewise.
    pub maximum: Option<f64>,
}

impl Answer {
    const NOT_BINARY: Self = Self {
        binary: Some(false),
        nonzeros: None,
        sum: None,
        minimum: None,
        maximum: None,
    };

    /// What `elements` zeros and ones answer, `nonzeros` of them ones. `ordered`: not complex.
    pub(crate) fn of_binary(elements: u64, nonzeros: u64, ordered: bool) -> Self {
        let range = (ordered && elements > 0).then(|| {
            (
                f64::from(u8::from(nonzeros == elements)),
                f64::from(u8::from(nonzeros > 0)),
            )
        });
        Self {
            binary: Some(true),
            nonzeros: Some(nonzeros),
            sum: Some(nonzeros as f64),
            minimum: range.map(|r| r.0),
            maximum: range.map(|r| r.1),
        }
    }

    const fn empty(question: Question) -> Self {
        let sum = if question.sums() { Some(0.0) } else { None };
        Self {
            binary: Some(true),
            nonzeros: Some(0),
            sum,
            minimum: None,
            maximum: None,
        }
    }
}

/// Looks at a tensor.
///
/// # Errors
///
/// [`NotTaken::DType`] for element types without statistics, [`NotTaken::Layout`] if sizes and strides do not make a
/// tensor.
pub fn measure(view: &View<'_>, question: Question) -> Result<Answer, NotTaken> {
    with_element!(view.dtype(), E => measure_elements::<E>(view, question), else Err(NotTaken::DType))
}

fn measure_elements<E: Element>(view: &View<'_>, question: Question) -> Result<Answer, NotTaken> {
    let Some(first) = view.peek::<E::Bytes>() else {
        return if view.elements() == Some(0) {
            Ok(Answer::empty(question))
        } else {
            Err(NotTaken::Layout)
        };
    };
    if question == Question::Binary && E::other(first) {
        return Ok(Answer::NOT_BINARY);
    }
    let mut tally = Tally::<E>::new(question);
    if let Some(data) = view.contiguous::<E::Bytes>() {
        tally.add(data);
        return Ok(tally.answer(1));
    }
    let mut elements = Strided::new(view).ok_or(NotTaken::Layout)?;
    let repeated = elements.drop_repeated();
    elements.sort();
    elements.merge(|_, _| true);
    let mut pieces = Pieces::new();
    elements.runs(|_, run| {
        pieces.add(run, |data| tally.add(data));
        !tally.stopped()
    });
    pieces.finish(|data| tally.add(data));
    Ok(tally.answer(repeated))
}

/// What was found so far, and what there is still to look for.
struct Tally<E: Element> {
    kernels: &'static Kernels<E>,
    question: Question,
    binary: bool,
    nonzeros: u64,
    sum: Sum,
    /// `None` for complex numbers, and where it was not asked for.
    range: Option<(f64, f64)>,
}

impl<E: Element> Tally<E> {
    fn new(question: Question) -> Self {
        let range = E::ORDERED.then_some((f64::INFINITY, f64::NEG_INFINITY));
        Self {
            kernels: Kernels::get(),
            question,
            binary: true,
            nonzeros: 0,
            sum: Sum::default(),
            range,
        }
    }

    /// Whether the answer is known already.
    fn stopped(&self) -> bool {
        self.question == Question::Binary && !self.binary
    }

    fn add(&mut self, data: &[E::Bytes]) {
        if self.stopped() {
            return;
        }
        if !self.question.sums() {
            let scan = self.kernels.scan(data, self.question == Question::Binary);
            self.binary &= scan.binary;
            self.nonzeros += scan.nonzeros;
            return;
        }
        for piece in data.chunks(PIECE) {
            self.add_piece(piece);
        }
    }

    /// At most [`PIECE`] elements, every number of them. Gives their sum.
    fn add_piece(&mut self, piece: &[E::Bytes]) -> Sum {
        let mut values = None;
        if self.binary {
            // For as long as there are only zeros and ones, counting them is enough.
            let scan = self.kernels.scan(piece, true);
            self.binary = scan.binary;
            values = scan
                .binary
                .then(|| kernel::binary_values(piece.len(), scan.nonzeros));
        }
        let values = values.unwrap_or_else(|| self.values(piece));
        self.add_values(values);
        values.sum
    }

    fn values(&self, piece: &[E::Bytes]) -> kernel::Values {
        if self.question == Question::Full {
            self.kernels.values(piece)
        } else {
            self.kernels.sums(piece)
        }
    }

    fn add_values(&mut self, values: kernel::Values) {
        self.nonzeros += values.nonzeros;
        self.sum = self.sum.plus(values.sum);
        self.range = match (self.range, values.range) {
            (Some(a), Some(b)) => Some((least(a.0, b.0), -least(-a.1, -b.1))),
            _ => None,
        };
    }

    fn answer(&self, repeated: u64) -> Answer {
        if self.stopped() {
            return Answer::NOT_BINARY;
        }
        let range = self.range.filter(|_| self.question == Question::Full);
        Answer {
            binary: Some(self.binary),
            nonzeros: Some(self.nonzeros * repeated),
            sum: self
                .question
                .sums()
                .then(|| self.sum.times(repeated).total()),
            minimum: range.map(|r| r.0),
            maximum: range.map(|r| r.1),
        }
    }
}

/// The lesser, and NaN if either is.
fn least(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else {
        a.min(b)
    }
}

/// Turns runs into slices that are worth a kernel's call: long ones as they are, others collected.
struct Pieces<B> {
    /// Allocated with the first run that needs it.
    buffer: Vec<B>,
}

impl<B: Plain> Pieces<B> {
    const fn new() -> Self {
        Self { buffer: Vec::new() }
    }

    fn add(&mut self, run: Run<'_, B>, mut piece: impl FnMut(&[B])) {
        const WORTH_A_CALL: usize = 128;
        if run.len() >= WORTH_A_CALL
            && let Some(data) = run.slice()
        {
            piece(data);
            return;
        }
        let mut start = 0;
        while start < run.len() {
            start += run.append(start, &mut self.buffer, PIECE);
            if self.buffer.len() >= PIECE {
                piece(&self.buffer);
                self.buffer.clear();
            }
        }
    }

    fn finish(&self, mut piece: impl FnMut(&[B])) {
        if !self.buffer.is_empty() {
            piece(&self.buffer);
        }
    }
}
