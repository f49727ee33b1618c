//! The statistics kernels against references that look at one element at a time.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use half::{bf16, f16};
use std::collections::BTreeSet;

use optape_recorder::statistics::{
    Answer, Geometry, Matrix, NonemptyLines, Occupancy, Question, View, measure,
    measure_convolution, measure_occupancy, nonempty_lines, nonempty_outputs,
    nonempty_outputs_convolution, product_sum_broadcast, product_sum_convolution,
    product_sum_linear, product_sum_matrix,
};
use optape_trace::{CROSSBARS, DType, NotTaken};
use proptest::prelude::*;

const DTYPES: [DType; 16] = [
    DType::U8,
    DType::I8,
    DType::I16,
    DType::I32,
    DType::I64,
    DType::F16,
    DType::F32,
    DType::F64,
    DType::C32,
    DType::C64,
    DType::C128,
    DType::BOOL,
    DType::BF16,
    DType::U16,
    DType::U32,
    DType::U64,
];

/// A tensor with memory of its own.
#[derive(Clone, Debug)]
struct Tensor {
    memory: Vec<u8>,
    dtype: DType,
    /// In elements.
    offset: usize,
    sizes: Vec<i64>,
    strides: Vec<i64>,
}

impl Tensor {
    fn contiguous(dtype: DType, sizes: &[i64], values: impl IntoIterator<Item = Number>) -> Self {
        let memory = values
            .into_iter()
            .flat_map(|value| value.encode(dtype))
            .collect();
        let mut strides = vec![1; sizes.len()];
        for at in (1..sizes.len()).rev() {
            strides[at - 1] = strides[at] * sizes[at].max(1);
        }
        let tensor = Self {
            memory,
            dtype,
            offset: 0,
            sizes: sizes.to_vec(),
            strides,
        };
        assert_eq!(tensor.memory.len() as u64, tensor.count() * dtype.bytes());
        tensor
    }

    fn reals(dtype: DType, sizes: &[i64], values: &[f64]) -> Self {
        Self::contiguous(dtype, sizes, values.iter().map(|&v| Number::real(v)))
    }

    fn count(&self) -> u64 {
        self.sizes.iter().product::<i64>() as u64
    }

    fn view(&self) -> View<'_> {
        let at = self.offset * self.dtype.bytes() as usize;
        for index in self.indices().iter().flat_map(|index| self.address(index)) {
            assert!(index < self.memory.len());
        }
        // SAFETY: the addresses of all elements were just held against the memory.
        unsafe {
            View::new(
                self.memory[at.min(self.memory.len())..].as_ptr(),
                self.dtype,
                &self.sizes,
                &self.strides,
            )
        }
    }

    fn indices(&self) -> Vec<Vec<i64>> {
        indices(&self.sizes)
    }

    /// First and last byte.
    fn address(&self, index: &[i64]) -> [usize; 2] {
        let element: i64 = index.iter().zip(&self.strides).map(|(i, s)| i * s).sum();
        let width = self.dtype.bytes() as usize;
        let at = usize::try_from(self.offset as i64 + element).unwrap() * width;
        [at, at + width - 1]
    }

    fn at(&self, index: &[i64]) -> Number {
        let [first, last] = self.address(index);
        Number::decode(self.dtype, &self.memory[first..=last])
    }

    fn numbers(&self) -> Vec<Number> {
        self.indices().iter().map(|index| self.at(index)).collect()
    }

    fn transpose(&mut self, a: usize, b: usize) {
        self.sizes.swap(a, b);
        self.strides.swap(a, b);
    }
}

fn indices(sizes: &[i64]) -> Vec<Vec<i64>> {
    sizes.iter().fold(vec![vec![]], |all, &size| {
        all.iter()
            .flat_map(|index| (0..size).map(move |i| [&index[..], &[i]].concat()))
            .collect()
    })
}

/// One element, decoded: whole numbers exactly, complex numbers with their imaginary part.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Number {
    integer: Option<i128>,
    real: f64,
    imaginary: f64,
}

impl Number {
    fn real(real: f64) -> Self {
        Self {
            integer: None,
            real,
            imaginary: 0.0,
        }
    }

    fn encode(self, dtype: DType) -> Vec<u8> {
        let whole = self.integer.unwrap_or(self.real as i128);
        match dtype {
            DType::U8 => (whole as u8).to_ne_bytes().to_vec(),
            DType::I8 => (whole as i8).to_ne_bytes().to_vec(),
            DType::I16 => (whole as i16).to_ne_bytes().to_vec(),
            DType::I32 => (whole as i32).to_ne_bytes().to_vec(),
            DType::I64 => (whole as i64).to_ne_bytes().to_vec(),
            DType::U16 => (whole as u16).to_ne_bytes().to_vec(),
            DType::U32 => (whole as u32).to_ne_bytes().to_vec(),
            DType::U64 => (whole as u64).to_ne_bytes().to_vec(),
            DType::BOOL => vec![if self.real == 0.0 {
                0
            } else {
                (whole as u8).max(1)
            }],
            DType::F16 => f16::from_f64(self.real).to_ne_bytes().to_vec(),
            DType::BF16 => bf16::from_f64(self.real).to_ne_bytes().to_vec(),
            DType::F32 => (self.real as f32).to_ne_bytes().to_vec(),
            DType::F64 => self.real.to_ne_bytes().to_vec(),
            DType::C32 => [
                f16::from_f64(self.real).to_ne_bytes(),
                f16::from_f64(self.imaginary).to_ne_bytes(),
            ]
            .concat(),
            DType::C64 => [
                (self.real as f32).to_ne_bytes(),
                (self.imaginary as f32).to_ne_bytes(),
            ]
            .concat(),
            DType::C128 => [self.real.to_ne_bytes(), self.imaginary.to_ne_bytes()].concat(),
            _ => panic!("{dtype:?}"),
        }
    }

    fn decode(dtype: DType, bytes: &[u8]) -> Self {
        let whole = |integer: i128| Self {
            integer: Some(integer),
            real: integer as f64,
            imaginary: 0.0,
        };
        let half = |bytes: &[u8]| f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64();
        let single = |bytes: &[u8]| f64::from(f32::from_ne_bytes(bytes.try_into().unwrap()));
        let double = |bytes: &[u8]| f64::from_ne_bytes(bytes.try_into().unwrap());
        let pair = |part: fn(&[u8]) -> f64| {
            let (real, imaginary) = bytes.split_at(bytes.len() / 2);
            Self {
                integer: None,
                real: part(real),
                imaginary: part(imaginary),
            }
        };
        match dtype {
            DType::U8 => whole(bytes[0].into()),
            DType::I8 => whole((bytes[0] as i8).into()),
            DType::I16 => whole(i16::from_ne_bytes(bytes.try_into().unwrap()).into()),
            DType::I32 => whole(i32::from_ne_bytes(bytes.try_into().unwrap()).into()),
            DType::I64 => whole(i64::from_ne_bytes(bytes.try_into().unwrap()).into()),
            DType::U16 => whole(u16::from_ne_bytes(bytes.try_into().unwrap()).into()),
            DType::U32 => whole(u32::from_ne_bytes(bytes.try_into().unwrap()).into()),
            DType::U64 => whole(u64::from_ne_bytes(bytes.try_into().unwrap()).into()),
            DType::BOOL => whole((bytes[0] != 0).into()),
            DType::F16 => Self::real(half(bytes)),
            DType::BF16 => Self::real(bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64()),
            DType::F32 => Self::real(single(bytes)),
            DType::F64 => Self::real(double(bytes)),
            DType::C32 => pair(half),
            DType::C64 => pair(single),
            DType::C128 => pair(double),
            _ => panic!("{dtype:?}"),
        }
    }

    fn is_nonzero(self) -> bool {
        self.real != 0.0 || self.imaginary != 0.0
    }

    fn is_binary(self) -> bool {
        (self.real == 0.0 || self.real == 1.0) && self.imaginary == 0.0
    }
}

/// The reference: weighted sum, and a bound of what rounding may do to it.
fn weighted_sum(numbers: &[(Number, u64)]) -> (f64, f64) {
    let fed: Vec<_> = numbers.iter().filter(|n| n.1 > 0).collect();
    let exact: Option<i128> = fed
        .iter()
        .map(|(n, w)| n.integer.map(|i| i * i128::from(*w)))
        .sum();
    if let Some(exact) = exact {
        return (exact as f64, 0.0);
    }
    let size: f64 = fed
        .iter()
        .map(|(n, w)| n.real.abs() * *w as f64)
        .filter(|s| s.is_finite())
        .sum();
    (
        fed.iter().map(|(n, w)| n.real * *w as f64).sum(),
        size * 1e-12,
    )
}

fn assert_sum(ours: Option<f64>, (exact, bound): (f64, f64)) {
    let ours = ours.expect("a sum");
    let equal = ours == exact || (ours.is_nan() && exact.is_nan()) || (ours - exact).abs() <= bound;
    assert!(equal, "sum {ours}, should be {exact} within {bound}");
}

fn assert_same(a: Option<f64>, b: Option<f64>) {
    assert!(
        a == b || (a.is_some_and(f64::is_nan) && b.is_some_and(f64::is_nan)),
        "{a:?} {b:?}"
    );
}

/// Holds an answer against the numbers.
fn assert_answer(answer: &Answer, question: Question, dtype: DType, numbers: &[Number]) {
    let binary = numbers.iter().all(|n| n.is_binary());
    let nonzeros = Some(numbers.iter().filter(|n| n.is_nonzero()).count() as u64);
    match question {
        Question::Binary => {
            let nonzeros = nonzeros.filter(|_| binary);
            assert_eq!(
                *answer,
                Answer {
                    binary: Some(binary),
                    nonzeros,
                    ..Answer::default()
                }
            );
        }
        Question::Nonzeros => assert_eq!(
            *answer,
            Answer {
                binary: Some(binary),
                nonzeros,
                ..Answer::default()
            }
        ),
        Question::Sum => {
            assert_eq!((answer.binary, answer.nonzeros), (Some(binary), nonzeros));
            let weighted: Vec<_> = numbers.iter().map(|&n| (n, 1)).collect();
            assert_sum(answer.sum, weighted_sum(&weighted));
            assert_eq!((answer.minimum, answer.maximum), (None, None));
        }
        Question::Full => {
            assert_eq!((answer.binary, answer.nonzeros), (Some(binary), nonzeros));
            let weighted: Vec<_> = numbers.iter().map(|&n| (n, 1)).collect();
            assert_sum(answer.sum, weighted_sum(&weighted));
            let range = |pick: fn(f64, f64) -> f64| {
                let either = |a: f64, b: f64| {
                    if a.is_nan() || b.is_nan() {
                        f64::NAN
                    } else {
                        pick(a, b)
                    }
                };
                numbers
                    .iter()
                    .map(|n| n.real)
                    .reduce(either)
                    .filter(|_| !dtype.is_complex())
            };
            assert_same(answer.minimum, range(f64::min));
            assert_same(answer.maximum, range(f64::max));
        }
    }
}

const QUESTIONS: [Question; 4] = [
    Question::Binary,
    Question::Nonzeros,
    Question::Sum,
    Question::Full,
];

fn assert_measured(tensor: &Tensor) {
    for question in QUESTIONS {
        let answer = measure(&tensor.view(), question).unwrap();
        assert_answer(&answer, question, tensor.dtype, &tensor.numbers());
    }
}

// Strategies.

fn dtype() -> impl Strategy<Value = DType> {
    proptest::sample::select(&DTYPES[..])
}

/// Zeros and ones, negative zero among them.
fn binary_number() -> impl Strategy<Value = Number> {
    prop_oneof![
        Just(Number::real(0.0)),
        Just(Number::real(-0.0)),
        Just(Number::real(1.0))
    ]
}

fn any_number() -> impl Strategy<Value = Number> {
    const SPECIALS: [f64; 11] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        2.0,
        0.5,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        6e-8,
        1e-40,
    ];
    let real = prop_oneof![proptest::sample::select(&SPECIALS[..]), -1e4..1e4];
    let imaginary =
        prop_oneof![3 => Just(0.0), 1 => Just(-0.0), 1 => Just(f64::NAN), 1 => -2.0..2.0];
    prop_oneof![
        4 => binary_number(),
        2 => (real, imaginary).prop_map(|(real, imaginary)| Number { integer: None, real, imaginary }),
        1 => any::<i64>().prop_map(|i| Number { integer: Some(i.into()), real: i as f64, imaginary: 0.0 }),
        1 => any::<u64>().prop_map(|i| Number { integer: Some(i.into()), real: i as f64, imaginary: 0.0 }),
    ]
}

/// Mostly binary tensors, some with anything, some with few others.
fn numbers(count: usize) -> BoxedStrategy<Vec<Number>> {
    let binary = || proptest::collection::vec(binary_number(), count);
    prop_oneof![
        2 => binary(),
        2 => proptest::collection::vec(any_number(), count),
        1 => (binary(), any::<proptest::sample::Index>(), any_number()).prop_map(move |(mut all, at, other)| {
            if count > 0 {
                all[at.index(count)] = other;
            }
            all
        }),
    ]
    .boxed()
}

/// How one dimension lies in memory: its size there, the first index taken, the step, or repeated so many times.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Whole(i64),
    Stepped { size: i64, start: i64, step: i64 },
    Expanded,
}

impl Cut {
    fn stored(self) -> i64 {
        match self {
            Self::Whole(size) | Self::Stepped { size, .. } => size,
            Self::Expanded => 1,
        }
    }
}

/// A way of storing each of the sizes.
fn cuts(sizes: &[i64]) -> BoxedStrategy<Vec<Cut>> {
    let each: Vec<_> = sizes
        .iter()
        .map(|&size| {
            prop_oneof![
                4 => Just(Cut::Whole(size)),
                2 => (0i64..3, 1i64..4, 0i64..3).prop_map(move |(start, step, more)| {
                    Cut::Stepped { size: start + (size - 1).max(0) * step + 1 + more, start, step }
                }),
                1 => Just(Cut::Expanded),
            ]
        })
        .collect();
    each.boxed()
}

/// A tensor of these sizes, its dimensions in any order in memory, sliced, stepped and expanded.
fn tensor_of(dtype: DType, sizes: Vec<i64>, expand: bool, binary: bool) -> BoxedStrategy<Tensor> {
    let order: Vec<usize> = (0..sizes.len()).collect();
    (cuts(&sizes), Just(order).prop_shuffle(), any::<bool>())
        .prop_flat_map(move |(mut cuts, mut order, plain)| {
            for (cut, &size) in cuts.iter_mut().zip(&sizes) {
                if plain || (!expand && matches!(cut, Cut::Expanded)) {
                    *cut = Cut::Whole(size);
                }
            }
            if plain {
                order.sort_unstable();
            }
            let stored: Vec<i64> = order.iter().map(|&d| cuts[d].stored()).collect();
            let count = stored.iter().product::<i64>() as usize;
            let values = if binary {
                proptest::collection::vec(binary_number(), count).boxed()
            } else {
                numbers(count)
            };
            let sizes = sizes.clone();
            values.prop_map(move |values| {
                let dense = Tensor::contiguous(dtype, &stored, values);
                let mut tensor = Tensor {
                    sizes: sizes.clone(),
                    strides: vec![0; sizes.len()],
                    ..dense.clone()
                };
                for (at, &d) in order.iter().enumerate() {
                    match cuts[d] {
                        Cut::Whole(_) => tensor.strides[d] = dense.strides[at],
                        Cut::Stepped { start, step, .. } => {
                            tensor.strides[d] = dense.strides[at] * step;
                            tensor.offset += (start * dense.strides[at]) as usize;
                        }
                        Cut::Expanded => {}
                    }
                }
                tensor
            })
        })
        .boxed()
}

fn any_tensor() -> impl Strategy<Value = Tensor> {
    (
        dtype(),
        proptest::collection::vec(
            prop_oneof![1 => Just(0i64), 2 => Just(1i64), 20 => 2i64..8],
            0..5,
        ),
    )
        .prop_flat_map(|(dtype, sizes)| tensor_of(dtype, sizes, true, false))
}

proptest! {
    #[test]
    fn any_layout_and_type(tensor in any_tensor()) {
        assert_measured(&tensor);
    }

    #[test]
    fn long_runs(dtype in dtype(), length in 0usize..40_000, at in 0usize..40_000, other in any_number(), first in any::<bool>()) {
        // Long enough for every block of the loops, with one element that may spoil it anywhere.
        let mut values: Vec<_> = (0..length).map(|i| Number::real(f64::from(u8::from(i % 3 == 0 || i % 7 == 1)))).collect();
        if at < length {
            values[at] = other;
            if first {
                values[0] = other;
            }
        }
        let tensor = Tensor::contiguous(dtype, &[length as i64], values.iter().copied());
        let numbers = tensor.memory.chunks(dtype.bytes() as usize).map(|bytes| Number::decode(dtype, bytes)).collect::<Vec<_>>();
        // SAFETY: sizes and strides are those of the memory.
        let view = unsafe { View::new(tensor.memory.as_ptr(), dtype, &tensor.sizes, &tensor.strides) };
        for question in QUESTIONS {
            assert_answer(&measure(&view, question).unwrap(), question, dtype, &numbers);
        }
    }

    #[test]
    fn long_values(dtype in dtype(), values in proptest::collection::vec(any_number(), 0..10_000)) {
        let tensor = Tensor::contiguous(dtype, &[values.len() as i64], values.iter().copied());
        let numbers = tensor.numbers();
        for question in QUESTIONS {
            assert_answer(&measure(&tensor.view(), question).unwrap(), question, dtype, &numbers);
        }
    }

    #[test]
    fn negative_strides(dtype in dtype(), values in numbers(24)) {
        let mut tensor = Tensor::contiguous(dtype, &[4, 6], values);
        tensor.strides = vec![6, -1];
        tensor.offset = 5;
        assert_measured(&tensor);
        tensor.strides = vec![-6, -1];
        tensor.offset = 23;
        assert_measured(&tensor);
        tensor.strides = vec![-6, 1];
        tensor.offset = 18;
        assert_measured(&tensor);
    }

    #[test]
    fn memory_without_alignment(dtype in dtype(), values in numbers(300), shift in 1usize..16) {
        let tensor = Tensor::contiguous(dtype, &[300], values);
        let moved = [vec![0xff; shift], tensor.memory.clone()].concat();
        // SAFETY: the 300 elements lie from `shift` on.
        let view = unsafe { View::new(moved[shift..].as_ptr(), dtype, &tensor.sizes, &tensor.strides) };
        for question in QUESTIONS {
            assert_answer(&measure(&view, question).unwrap(), question, dtype, &tensor.numbers());
        }
    }
}

#[test]
fn zeros_and_ones_by_hand() {
    for dtype in DTYPES {
        let tensor = Tensor::reals(dtype, &[2, 3], &[0.0, 1.0, 1.0, -0.0, 0.0, 1.0]);
        let binary = measure(&tensor.view(), Question::Binary).unwrap();
        assert_eq!(
            binary,
            Answer {
                binary: Some(true),
                nonzeros: Some(3),
                ..Answer::default()
            },
            "{dtype:?}"
        );
        let full = measure(&tensor.view(), Question::Full).unwrap();
        assert_eq!(
            (full.binary, full.nonzeros, full.sum),
            (Some(true), Some(3), Some(3.0)),
            "{dtype:?}"
        );
        let range = (full.minimum, full.maximum);
        assert_eq!(
            range,
            if dtype.is_complex() {
                (None, None)
            } else {
                (Some(0.0), Some(1.0))
            },
            "{dtype:?}"
        );
    }
}

#[test]
fn special_floats_by_hand() {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let nan = Tensor::reals(dtype, &[3], &[0.0, f64::NAN, 1.0]);
        let full = measure(&nan.view(), Question::Full).unwrap();
        assert_eq!((full.binary, full.nonzeros), (Some(false), Some(2)));
        assert!(
            [full.sum, full.minimum, full.maximum]
                .iter()
                .all(|v| v.is_some_and(f64::is_nan)),
            "{full:?}"
        );

        let infinite = Tensor::reals(dtype, &[3], &[f64::INFINITY, f64::NEG_INFINITY, 1.0]);
        let full = measure(&infinite.view(), Question::Full).unwrap();
        assert_eq!(
            (full.minimum, full.maximum),
            (Some(f64::NEG_INFINITY), Some(f64::INFINITY))
        );
        assert!(full.sum.is_some_and(f64::is_nan));

        let zeros = Tensor::reals(dtype, &[2], &[-0.0, -0.0]);
        assert_eq!(
            measure(&zeros.view(), Question::Nonzeros).unwrap().nonzeros,
            Some(0)
        );
        assert_eq!(
            measure(&zeros.view(), Question::Binary).unwrap().binary,
            Some(true)
        );
    }
}

#[test]
fn every_bool_byte_but_zero_is_true() {
    let tensor = Tensor {
        memory: vec![0, 1, 2, 255, 128, 0],
        ..Tensor::reals(DType::BOOL, &[6], &[0.0; 6])
    };
    let full = measure(&tensor.view(), Question::Full).unwrap();
    assert_eq!(
        (full.binary, full.nonzeros, full.sum),
        (Some(true), Some(4), Some(4.0))
    );
    assert_eq!((full.minimum, full.maximum), (Some(0.0), Some(1.0)));
}

#[test]
fn integers_are_summed_exactly() {
    let whole = |i: i128| Number {
        integer: Some(i),
        real: i as f64,
        imaginary: 0.0,
    };
    let max = i128::from(i64::MAX);
    let tensor = Tensor::contiguous(
        DType::I64,
        &[4],
        [whole(max), whole(3), whole(-max), whole(max - 1)],
    );
    assert_eq!(
        measure(&tensor.view(), Question::Full).unwrap().sum,
        Some((max + 2) as f64)
    );
    let tensor = Tensor::contiguous(
        DType::U64,
        &[2],
        [whole(u64::MAX.into()), whole(u64::MAX.into())],
    );
    assert_eq!(
        measure(&tensor.view(), Question::Full).unwrap().sum,
        Some(2.0 * u64::MAX as f64)
    );
}

#[test]
fn nothing_is_binary_without_ones() {
    for dtype in DTYPES {
        for sizes in [&[0][..], &[3, 0, 2], &[0, 0]] {
            let tensor = Tensor::reals(dtype, sizes, &[]);
            let full = measure(&tensor.view(), Question::Full).unwrap();
            let nothing = Answer {
                binary: Some(true),
                nonzeros: Some(0),
                sum: Some(0.0),
                ..Answer::default()
            };
            assert_eq!(full, nothing);
        }
    }
}

#[test]
fn more_than_eight_dimensions() {
    let values: Vec<f64> = (0..1024).map(|i| f64::from(i % 5)).collect();
    let mut tensor = Tensor::reals(DType::F32, &[2; 10], &values);
    assert_measured(&tensor);
    tensor.transpose(0, 9);
    tensor.transpose(3, 5);
    tensor.strides[7] = 0;
    assert_measured(&tensor);
}

#[test]
fn expanded_tensors_are_counted_as_often_as_they_repeat() {
    let one = 1.0f32;
    let (sizes, strides) = ([1 << 20, 1 << 20], [0, 0]);
    // SAFETY: the only element addressed is `one`.
    let view = unsafe { View::new((&raw const one).cast(), DType::F32, &sizes, &strides) };
    let full = measure(&view, Question::Full).unwrap();
    assert_eq!(
        (full.nonzeros, full.sum),
        (Some(1 << 40), Some((1u64 << 40) as f64))
    );
}

#[test]
fn what_is_no_tensor_is_refused() {
    let byte = 0u8;
    let measured = |dtype, sizes: &[i64], strides: &[i64]| {
        // SAFETY: no sizes below address anything; all are refused before memory is read.
        let view = unsafe { View::new(&raw const byte, dtype, sizes, strides) };
        measure(&view, Question::Full)
    };
    assert_eq!(measured(DType(16), &[1], &[1]), Err(NotTaken::DType));
    assert_eq!(measured(DType(24), &[1], &[1]), Err(NotTaken::DType));
    assert_eq!(measured(DType::U8, &[-1], &[1]), Err(NotTaken::Layout));
    assert_eq!(measured(DType::U8, &[1, 1], &[1]), Err(NotTaken::Layout));
    assert_eq!(
        measured(DType::U8, &[i64::MAX, i64::MAX], &[0, 0]),
        Err(NotTaken::Layout)
    );
}

// Convolutions.

#[derive(Clone, Debug)]
struct Convolution {
    batch: i64,
    batched: bool,
    groups: i64,
    inputs_per_group: i64,
    outputs_per_group: i64,
    input: Vec<i64>,
    kernel: Vec<i64>,
    stride: Vec<i64>,
    padding: Vec<i64>,
    dilation: Vec<i64>,
    output: Vec<i64>,
    transposed: bool,
}

impl Convolution {
    fn geometry(&self) -> Geometry<'_> {
        Geometry {
            input: &self.input,
            kernel: &self.kernel,
            stride: &self.stride,
            padding: &self.padding,
            dilation: &self.dilation,
            output: &self.output,
            transposed: self.transposed,
            groups: self.groups,
            outputs_per_group: self.outputs_per_group,
        }
    }

    fn input_sizes(&self) -> Vec<i64> {
        let mut sizes = if self.batched {
            vec![self.batch]
        } else {
            vec![]
        };
        sizes.push(self.groups * self.inputs_per_group);
        sizes.extend(&self.input);
        sizes
    }

    fn weight_sizes(&self) -> Vec<i64> {
        let mut sizes = if self.transposed {
            vec![self.groups * self.inputs_per_group, self.outputs_per_group]
        } else {
            vec![self.groups * self.outputs_per_group, self.inputs_per_group]
        };
        sizes.extend(&self.kernel);
        sizes
    }

    /// Whether input position, output position and kernel element meet.
    fn meets(&self, p: &[i64], o: &[i64], k: &[i64]) -> bool {
        (0..p.len()).all(|d| {
            let (near, far) = if self.transposed {
                (o[d], p[d])
            } else {
                (p[d], o[d])
            };
            near == far * self.stride[d] - self.padding[d] + k[d] * self.dilation[d]
        })
    }

    /// Outputs that a spatial position feeds in one channel, each as often as kernel elements lead there.
    fn fan_out(&self, p: &[i64]) -> u64 {
        let output = |k: &Vec<i64>| -> Vec<i64> {
            let near = |d: usize| {
                if self.transposed {
                    p[d] * self.stride[d] - self.padding[d] + k[d] * self.dilation[d]
                } else {
                    (p[d] + self.padding[d] - k[d] * self.dilation[d]).div_euclid(self.stride[d])
                }
            };
            (0..p.len()).map(near).collect()
        };
        let fed = |k: &&Vec<i64>| {
            let o = output(k);
            let exists = o
                .iter()
                .zip(&self.output)
                .all(|(o, size)| (0..*size).contains(o));
            exists && self.meets(p, &o, k)
        };
        indices(&self.kernel).iter().filter(fed).count() as u64
    }
}

fn convolution() -> impl Strategy<Value = Convolution> {
    let axis = (1i64..7, 1i64..4, 1i64..4, 0i64..3, 1i64..3, 0i64..3);
    (
        (
            0i64..3,
            any::<bool>(),
            1i64..3,
            1i64..4,
            1i64..4,
            any::<bool>(),
        ),
        proptest::collection::vec(axis, 1..4),
        prop_oneof![4 => Just(1i64), 1 => Just(7i64)],
    )
        .prop_map(
            |(
                (batch, batched, groups, inputs_per_group, outputs_per_group, transposed),
                axes,
                wider,
            )| {
                let mut c = Convolution {
                    batch,
                    batched,
                    groups,
                    inputs_per_group,
                    outputs_per_group,
                    input: vec![],
                    kernel: vec![],
                    stride: vec![],
                    padding: vec![],
                    dilation: vec![],
                    output: vec![],
                    transposed,
                };
                // Three dimensions are many elements for the reference.
                let wider = if axes.len() == 3 { 1 } else { wider };
                for (input, kernel, stride, padding, dilation, more) in axes {
                    let input = input * wider;
                    let output = if transposed {
                        (input - 1) * stride - 2 * padding
                            + dilation * (kernel - 1)
                            + 1
                            + more.min(stride - 1)
                    } else {
                        (input + 2 * padding - dilation * (kernel - 1) - 1).div_euclid(stride) + 1
                    };
                    c.input.push(input);
                    c.kernel.push(kernel);
                    c.stride.push(stride);
                    c.padding.push(padding);
                    c.dilation.push(dilation);
                    c.output.push(output.max(0));
                }
                c
            },
        )
}

fn convolution_and_input() -> impl Strategy<Value = (Convolution, Tensor)> {
    (convolution(), dtype()).prop_flat_map(|(c, dtype)| {
        (
            Just(c.clone()),
            tensor_of(dtype, c.input_sizes(), true, false),
        )
    })
}

fn assert_convolution(c: &Convolution, tensor: &Tensor) {
    let leading = tensor.sizes.len() - c.input.len();
    let fan_out: std::collections::HashMap<Vec<i64>, u64> = indices(&c.input)
        .into_iter()
        .map(|p| (p.clone(), c.fan_out(&p) * c.outputs_per_group as u64))
        .collect();
    let weighted: Vec<(Number, u64)> = tensor
        .indices()
        .iter()
        .map(|index| (tensor.at(index), fan_out[&index[leading..]]))
        .collect();
    let numbers: Vec<Number> = weighted.iter().map(|n| n.0).collect();
    for question in QUESTIONS {
        let found = measure_convolution(&tensor.view(), &c.geometry(), question).unwrap();
        assert_answer(&found.answer, question, tensor.dtype, &numbers);
        let nonzeros: u64 = weighted
            .iter()
            .filter(|n| n.0.is_nonzero())
            .map(|n| n.1)
            .sum();
        let stopped = found.answer.binary == Some(false) && question == Question::Binary;
        assert_eq!(found.fan_out_nonzeros, (!stopped).then_some(nonzeros));
        if question.sums() {
            assert_sum(found.fan_out_sum, weighted_sum(&weighted));
        } else {
            assert_eq!(found.fan_out_sum, None);
        }
    }
}

proptest! {
    #[test]
    fn fan_out_is_that_of_a_dense_convolution((c, tensor) in convolution_and_input()) {
        // Twice: the second time the plan is there already.
        assert_convolution(&c, &tensor);
        assert_convolution(&c, &tensor);
    }

    #[test]
    fn products_of_convolutions(
        (c, input, weight) in (convolution(), dtype(), dtype()).prop_flat_map(|(c, a, b)| {
            let (input, weight) = (tensor_of(a, c.input_sizes(), true, true), tensor_of(b, c.weight_sizes(), true, true));
            (Just(c), input, weight)
        })
    ) {
        let (positions, outputs, taps) = (indices(&c.input), indices(&c.output), indices(&c.kernel));
        let meetings: Vec<_> = positions.iter().flat_map(|p| {
            let (c, taps) = (&c, &taps);
            outputs.iter().flat_map(move |o| taps.iter().filter(move |k| c.meets(p, o, k)).map(move |k| (p, k)))
        }).collect();
        let mut sum = 0;
        for n in 0..if c.batched { c.batch } else { 1 } {
            for channel in 0..c.groups * c.inputs_per_group {
                let (group, inner) = (channel / c.inputs_per_group, channel % c.inputs_per_group);
                for output in 0..c.outputs_per_group {
                    for (p, k) in &meetings {
                        let x = if c.batched { [&[n, channel][..], p].concat() } else { [&[channel][..], p].concat() };
                        let w = if c.transposed {
                            [&[channel, output][..], k].concat()
                        } else {
                            [&[group * c.outputs_per_group + output, inner][..], k].concat()
                        };
                        sum += u64::from(input.at(&x).is_nonzero() && weight.at(&w).is_nonzero());
                    }
                }
            }
        }
        prop_assert_eq!(product_sum_convolution(&input.view(), &weight.view(), &c.geometry()), Ok(sum));
    }
}

fn image(
    batch: i64,
    channels: i64,
    size: i64,
    kernel: i64,
    stride: i64,
    padding: i64,
) -> Convolution {
    let output = (size + 2 * padding - kernel) / stride + 1;
    Convolution {
        batch,
        batched: true,
        groups: 1,
        inputs_per_group: channels,
        outputs_per_group: 5,
        input: vec![size; 2],
        kernel: vec![kernel; 2],
        stride: vec![stride; 2],
        padding: vec![padding; 2],
        dilation: vec![1; 2],
        output: vec![output; 2],
        transposed: false,
    }
}

#[test]
fn images_in_both_memory_formats() {
    // 3x3 and 1x1 kernels over planes that fill a block, repeat it, and exceed it.
    for (batch, channels, size, kernel, stride, padding) in [
        (3, 4, 8, 3, 1, 1),
        (2, 3, 28, 3, 2, 1),
        (1, 2, 140, 3, 1, 1),
        (2, 70, 7, 1, 1, 0),
        (1, 40, 30, 5, 2, 2),
        (2, 3, 9, 2, 3, 0),
    ] {
        let c = image(batch, channels, size, kernel, stride, padding);
        for other in [1.0, 2.5] {
            let mut seed = 12_345u64;
            let mut next = || {
                seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                seed >> 33
            };
            let count = (batch * channels * size * size) as usize;
            let values: Vec<f64> = (0..count)
                .map(|_| if next() % 5 == 0 { other } else { 0.0 })
                .collect();
            assert_convolution(
                &c,
                &Tensor::reals(DType::F32, &[batch, channels, size, size], &values),
            );
            let mut last = Tensor::reals(DType::F32, &[batch, size, size, channels], &values);
            last.transpose(1, 3);
            last.transpose(2, 3);
            assert_convolution(&c, &last);
        }
    }
}

#[test]
fn a_convolution_by_hand() {
    // A 3x3 kernel with padding: a corner feeds 4 positions, an edge 6, the centre 9.
    let c = image(1, 1, 3, 3, 1, 1);
    let spikes = Tensor::reals(
        DType::F32,
        &[1, 1, 3, 3],
        &[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
    );
    let found = measure_convolution(&spikes.view(), &c.geometry(), Question::Binary).unwrap();
    assert_eq!(found.fan_out_nonzeros, Some((4 + 6 + 9) * 5));
    let ones = Tensor::reals(DType::F32, &[5, 1, 3, 3], &[1.0; 45]);
    assert_eq!(
        product_sum_convolution(&spikes.view(), &ones.view(), &c.geometry()),
        Ok((4 + 6 + 9) * 5)
    );
}

#[test]
fn one_entry_holds_for_all_dimensions() {
    let c = image(2, 2, 6, 3, 2, 1);
    let tensor = Tensor::reals(DType::F32, &[2, 2, 6, 6], &[1.0; 144]);
    let all = measure_convolution(&tensor.view(), &c.geometry(), Question::Binary);
    let short = Geometry {
        stride: &[2],
        padding: &[1],
        dilation: &[1],
        ..c.geometry()
    };
    assert_eq!(
        measure_convolution(&tensor.view(), &short, Question::Binary),
        all
    );
}

#[test]
fn geometries_that_do_not_fit_are_refused() {
    let c = image(2, 2, 6, 3, 1, 1);
    let ones = Tensor::reals(DType::F32, &[2, 2, 6, 6], &[1.0; 144]);
    let weight = Tensor::reals(DType::F32, &[5, 2, 3, 3], &[1.0; 90]);
    let good = c.geometry();
    let bad = [
        Geometry {
            input: &[6, 7],
            ..good
        },
        Geometry {
            input: &[6],
            ..good
        },
        Geometry {
            kernel: &[],
            ..good
        },
        Geometry {
            kernel: &[3, 3, 3, 3],
            ..good
        },
        Geometry {
            kernel: &[3, -3],
            ..good
        },
        Geometry {
            stride: &[0],
            ..good
        },
        Geometry {
            stride: &[1, -1],
            ..good
        },
        Geometry {
            padding: &[i64::MIN],
            ..good
        },
        Geometry {
            dilation: &[i64::MAX],
            ..good
        },
        Geometry {
            dilation: &[1, 1, 1],
            ..good
        },
        Geometry {
            output: &[6, -1],
            ..good
        },
        Geometry {
            output: &[6, i64::MAX],
            ..good
        },
        Geometry { groups: 0, ..good },
        Geometry {
            outputs_per_group: -1,
            ..good
        },
    ];
    for geometry in bad {
        assert_eq!(
            measure_convolution(&ones.view(), &geometry, Question::Full),
            Err(NotTaken::Layout),
            "{geometry:?}"
        );
        assert_eq!(
            product_sum_convolution(&ones.view(), &weight.view(), &geometry),
            Err(NotTaken::Layout),
            "{geometry:?}"
        );
    }
    for geometry in [
        Geometry { groups: 2, ..good },
        Geometry {
            outputs_per_group: 4,
            ..good
        },
        Geometry {
            transposed: true,
            ..good
        },
    ] {
        assert_eq!(
            product_sum_convolution(&ones.view(), &weight.view(), &geometry),
            Err(NotTaken::Layout),
            "{geometry:?}"
        );
    }
    let flat = Tensor::reals(DType::F32, &[6], &[1.0; 6]);
    assert_eq!(
        measure_convolution(&flat.view(), &good, Question::Binary),
        Err(NotTaken::Layout)
    );
}

// Products.

/// Sizes of two factors for `torch.matmul`.
fn broadcast_sizes() -> impl Strategy<Value = (Vec<i64>, Vec<i64>)> {
    let batch = proptest::collection::vec((1i64..4, any::<bool>(), any::<bool>()), 0..3);
    (
        batch,
        0usize..3,
        0usize..3,
        1i64..5,
        0i64..8,
        1i64..5,
        0u8..4,
    )
        .prop_map(|(batch, drop_a, drop_b, m, k, n, vectors)| {
            let mut a: Vec<i64> = batch
                .iter()
                .map(|&(size, one, _)| if one { 1 } else { size })
                .skip(drop_a)
                .collect();
            let mut b: Vec<i64> = batch
                .iter()
                .map(|&(size, _, one)| if one { 1 } else { size })
                .skip(drop_b)
                .collect();
            a.extend([m, k]);
            b.extend([k, n]);
            if vectors & 1 != 0 {
                a = vec![k];
            }
            if vectors & 2 != 0 {
                b = vec![k];
            }
            (a, b)
        })
}

/// `torch.matmul`, then the sum of everything.
fn matmul_sum(a: &Tensor, b: &Tensor) -> u64 {
    let wide = |sizes: &[i64], column: bool| match sizes {
        [k] if column => vec![*k, 1],
        [k] => vec![1, *k],
        sizes => sizes.to_vec(),
    };
    let (sizes_a, sizes_b) = (wide(&a.sizes, false), wide(&b.sizes, true));
    let rank = sizes_a.len().max(sizes_b.len()) - 2;
    let batch = |sizes: &[i64], at: usize| {
        let own = sizes.len() - 2;
        (at + own).checked_sub(rank).map_or(1, |i| sizes[i])
    };
    let shape: Vec<i64> = (0..rank)
        .map(|at| batch(&sizes_a, at).max(batch(&sizes_b, at)))
        .collect();
    let pick =
        |t: &Tensor, sizes: &[i64], index: &[i64], row: i64, column: i64, is_column: bool| {
            if t.sizes.len() == 1 {
                return t.at(&[if is_column { row } else { column }]);
            }
            let own = sizes.len() - 2;
            let mut at: Vec<i64> = (0..own)
                .map(|i| {
                    if sizes[i] == 1 {
                        0
                    } else {
                        index[i + rank - own]
                    }
                })
                .collect();
            at.extend([row, column]);
            t.at(&at)
        };
    let (m, k, n) = (
        sizes_a[sizes_a.len() - 2],
        sizes_a[sizes_a.len() - 1],
        sizes_b[sizes_b.len() - 1],
    );
    let mut sum = 0;
    for index in indices(&shape) {
        for at in indices(&[m, k, n]) {
            let x = pick(a, &sizes_a, &index, at[0], at[1], false);
            let y = pick(b, &sizes_b, &index, at[1], at[2], true);
            sum += u64::from(x.is_nonzero() && y.is_nonzero());
        }
    }
    sum
}

proptest! {
    #[test]
    fn broadcast_products(
        (a, b) in (broadcast_sizes(), dtype(), dtype()).prop_flat_map(|((a, b), x, y)| {
            (tensor_of(x, a, true, true), tensor_of(y, b, true, true))
        })
    ) {
        prop_assert_eq!(product_sum_broadcast(&a.view(), &b.view()), Ok(matmul_sum(&a, &b)));
    }

    #[test]
    fn matrix_products(
        (a, b) in (any::<bool>(), 1i64..5, 1i64..6, 1i64..20, 1i64..6, dtype(), dtype()).prop_flat_map(|(batched, batch, m, k, n, x, y)| {
            let sizes = |rows, columns| if batched { vec![batch, rows, columns] } else { vec![rows, columns] };
            (tensor_of(x, sizes(m, k), true, true), tensor_of(y, sizes(k, n), true, true))
        })
    ) {
        prop_assert_eq!(product_sum_matrix(&a.view(), &b.view()), Ok(matmul_sum(&a, &b)));
    }

    #[test]
    fn linear_products(
        (x, w) in (proptest::collection::vec(1i64..4, 0..3), 1i64..9, 1i64..5, any::<bool>(), dtype(), dtype()).prop_flat_map(
            |(mut leading, k, n, vector, x, w)| {
                leading.push(k);
                let weight = if vector { vec![k] } else { vec![n, k] };
                (tensor_of(x, leading, true, true), tensor_of(w, weight, true, true))
            })
    ) {
        let mut turned = w.clone();
        if w.sizes.len() == 2 {
            turned.transpose(0, 1);
        }
        prop_assert_eq!(product_sum_linear(&x.view(), &w.view()), Ok(matmul_sum(&x, &turned)));
    }
}

#[test]
fn long_joint_dimensions() {
    // Beyond the block that is counted at once.
    let ones = |step: usize| -> Vec<f64> {
        (0..3000)
            .map(|i| f64::from(u8::from(i % step == 0)))
            .collect()
    };
    let (a, b) = (
        Tensor::reals(DType::F32, &[3000], &ones(2)),
        Tensor::reals(DType::U8, &[3000], &ones(3)),
    );
    assert_eq!(product_sum_broadcast(&a.view(), &b.view()), Ok(500));
    let (mut rows, mut columns) = (
        Tensor::reals(DType::F32, &[2, 1500], &ones(2)),
        Tensor::reals(DType::BF16, &[1500, 2], &ones(3)),
    );
    let sum = matmul_sum(&rows, &columns);
    assert_eq!(product_sum_matrix(&rows.view(), &columns.view()), Ok(sum));
    rows.transpose(0, 1);
    columns.transpose(0, 1);
    assert_eq!(
        product_sum_matrix(&columns.view(), &rows.view()),
        Ok(matmul_sum(&columns, &rows))
    );
}

#[test]
fn factors_that_do_not_fit_are_refused() {
    let tensor = |sizes: &[i64]| {
        Tensor::reals(
            DType::F32,
            sizes,
            &vec![1.0; sizes.iter().product::<i64>() as usize],
        )
    };
    let (a, b, c, scalar) = (
        tensor(&[2, 3]),
        tensor(&[2, 3]),
        tensor(&[2, 3, 4]),
        tensor(&[]),
    );
    assert_eq!(
        product_sum_matrix(&a.view(), &b.view()),
        Err(NotTaken::Layout)
    );
    assert_eq!(
        product_sum_matrix(&a.view(), &c.view()),
        Err(NotTaken::Layout)
    );
    assert_eq!(
        product_sum_broadcast(&c.view(), &tensor(&[3, 4, 2]).view()),
        Err(NotTaken::Layout)
    );
    assert_eq!(
        product_sum_broadcast(&scalar.view(), &a.view()),
        Err(NotTaken::Layout)
    );
    assert_eq!(
        product_sum_linear(&a.view(), &c.view()),
        Err(NotTaken::Layout)
    );
    assert_eq!(
        product_sum_linear(&scalar.view(), &a.view()),
        Err(NotTaken::Layout)
    );
    let odd = Tensor {
        dtype: DType(24),
        memory: vec![0; 6],
        ..a.clone()
    };
    assert_eq!(
        product_sum_linear(&a.view(), &odd.view()),
        Err(NotTaken::DType)
    );
    assert_eq!(
        product_sum_linear(&odd.view(), &a.view()),
        Err(NotTaken::DType)
    );
}

// What is not empty.

fn assert_lines(tensor: &Tensor) {
    let nonzero: Vec<Vec<i64>> = tensor
        .indices()
        .into_iter()
        .filter(|index| tensor.at(index).is_nonzero())
        .collect();
    for matrix in [Matrix::Batched, Matrix::Flat] {
        let line = |index: &[i64], column: bool| {
            let Some((last, leading)) = index.split_last() else {
                return Vec::new();
            };
            match (column, matrix) {
                (false, _) => leading.to_vec(),
                (true, Matrix::Flat) => vec![*last],
                (true, Matrix::Batched) => {
                    [&leading[..leading.len().saturating_sub(1)], &[*last]].concat()
                }
            }
        };
        let count = |column: bool| {
            let lines: BTreeSet<_> = nonzero.iter().map(|index| line(index, column)).collect();
            lines.len() as u64
        };
        assert_eq!(
            nonempty_lines(&tensor.view(), matrix),
            Ok(NonemptyLines {
                rows: count(false),
                columns: count(true),
            }),
            "{matrix:?} of {tensor:?}"
        );
    }
}

/// Elements of `torch.matmul(a, b)` that are not zero.
fn matmul_outputs(a: &Tensor, b: &Tensor) -> u64 {
    let batch = a.sizes[..a.sizes.len() - 2].to_vec();
    let (m, k) = (a.sizes[a.sizes.len() - 2], a.sizes[a.sizes.len() - 1]);
    let n = b.sizes[b.sizes.len() - 1];
    let mut outputs = 0;
    for index in indices(&batch) {
        for at in indices(&[m, n]) {
            let hit = (0..k).any(|k| {
                let x = a.at(&[&index[..], &[at[0], k]].concat());
                let y = b.at(&[&index[..b.sizes.len() - 2], &[k, at[1]]].concat());
                x.is_nonzero() && y.is_nonzero()
            });
            outputs += u64::from(hit);
        }
    }
    outputs
}

/// Looks at every pair of a position and an output that meet.
fn occupancy(c: &Convolution, tensor: &Tensor) -> Occupancy {
    let channels = c.groups * c.inputs_per_group;
    let mut found = Occupancy {
        active_rows: vec![0; (channels as usize).div_ceil(4)],
        active_patches: CROSSBARS.map(|(size, _)| vec![0; (channels as usize).div_ceil(size)]),
        ..Occupancy::default()
    };
    let (positions, taps) = (indices(&c.input), indices(&c.kernel));
    for o in indices(&c.output) {
        let field: Vec<&Vec<i64>> = taps
            .iter()
            .flat_map(|k| positions.iter().filter(|p| c.meets(p, &o, k)))
            .collect();
        for n in 0..if c.batched { c.batch } else { 1 } {
            let mut seen = BTreeSet::new();
            for channel in 0..channels {
                let at = |p: &[i64]| match c.batched {
                    true => [&[n, channel][..], p].concat(),
                    false => [&[channel][..], p].concat(),
                };
                let spikes = field
                    .iter()
                    .filter(|p| tensor.at(&at(p)).is_nonzero())
                    .count();
                found.active_rows[channel as usize / 4] += spikes as u64;
                if spikes > 0 {
                    seen.insert(channel as usize);
                }
            }
            found.active_sites += u64::from(!seen.is_empty());
            let groups: BTreeSet<_> = seen
                .iter()
                .map(|c2| c2 / c.inputs_per_group as usize)
                .collect();
            found.nonempty_outputs += groups.len() as u64 * c.outputs_per_group as u64;
            for ((size, _), patches) in CROSSBARS.iter().zip(&mut found.active_patches) {
                let blocks: BTreeSet<_> = seen.iter().map(|channel| channel / size).collect();
                blocks.iter().for_each(|block| patches[*block] += 1);
            }
        }
    }
    found
}

fn product_outputs(c: &Convolution, input: &Tensor, weight: &Tensor) -> u64 {
    let (positions, taps) = (indices(&c.input), indices(&c.kernel));
    let mut outputs = 0;
    for o in indices(&c.output) {
        let met: Vec<_> = taps
            .iter()
            .flat_map(|k| {
                positions
                    .iter()
                    .filter(|p| c.meets(p, &o, k))
                    .map(move |p| (p, k))
            })
            .collect();
        for n in 0..if c.batched { c.batch } else { 1 } {
            for output in 0..c.groups * c.outputs_per_group {
                let (group, of_group) =
                    (output / c.outputs_per_group, output % c.outputs_per_group);
                let hit = (0..c.inputs_per_group).any(|inner| {
                    let channel = group * c.inputs_per_group + inner;
                    met.iter().any(|(p, k)| {
                        let x = if c.batched {
                            [&[n, channel][..], p].concat()
                        } else {
                            [&[channel][..], p].concat()
                        };
                        let w = if c.transposed {
                            [&[channel, of_group][..], k].concat()
                        } else {
                            [&[output, inner][..], k].concat()
                        };
                        input.at(&x).is_nonzero() && weight.at(&w).is_nonzero()
                    })
                });
                outputs += u64::from(hit);
            }
        }
    }
    outputs
}

proptest! {
    #[test]
    fn lines_of_any_layout(tensor in any_tensor()) {
        assert_lines(&tensor);
    }

    #[test]
    fn lines_of_sparse_matrices(
        tensor in (dtype(), 0usize..3, 1i64..40, 1i64..40, any::<bool>()).prop_flat_map(|(dtype, batch, m, n, turn)| {
            let sizes = [vec![3; batch], vec![m, n]].concat();
            let count = sizes.iter().product::<i64>() as usize;
            proptest::collection::vec(0u8..30, count).prop_map(move |values| {
                let values: Vec<f64> = values.iter().map(|v| f64::from(u8::from(*v == 0))).collect();
                let mut tensor = Tensor::reals(dtype, &sizes, &values);
                if turn {
                    tensor.transpose(sizes.len() - 1, sizes.len() - 2);
                }
                tensor
            })
        })
    ) {
        assert_lines(&tensor);
    }

    #[test]
    fn outputs_of_products(
        (a, b) in (any::<bool>(), 1i64..4, 1i64..6, 1i64..20, 1i64..70, dtype(), dtype()).prop_flat_map(|(batched, batch, m, k, n, x, y)| {
            let sizes = |rows, columns| if batched { vec![batch, rows, columns] } else { vec![rows, columns] };
            (tensor_of(x, sizes(m, k), true, true), tensor_of(y, sizes(k, n), true, true))
        })
    ) {
        prop_assert_eq!(nonempty_outputs(&a.view(), &b.view(), false), Ok(matmul_outputs(&a, &b)));
        if b.sizes.len() == 2 {
            let mut weight = b.clone();
            weight.transpose(0, 1);
            prop_assert_eq!(nonempty_outputs(&a.view(), &weight.view(), true), Ok(matmul_outputs(&a, &b)));
        }
    }

    #[test]
    fn what_convolutions_see((c, tensor) in convolution_and_input()) {
        prop_assert_eq!(measure_occupancy(&tensor.view(), &c.geometry()), Ok(occupancy(&c, &tensor)));
    }

    #[test]
    fn outputs_of_binary_convolutions(
        (c, input, weight) in (convolution(), dtype(), dtype()).prop_flat_map(|(c, a, b)| {
            let (input, weight) = (tensor_of(a, c.input_sizes(), true, true), tensor_of(b, c.weight_sizes(), true, true));
            (Just(c), input, weight)
        })
    ) {
        let outputs = product_outputs(&c, &input, &weight);
        prop_assert_eq!(nonempty_outputs_convolution(&input.view(), &weight.view(), &c.geometry()), Ok(outputs));
    }
}

#[test]
fn many_channels() {
    // More than one word of blocks, blocks cut at their ends, groups that do and do not fill blocks.
    for (channels, groups) in [
        (5, 1),
        (18, 1),
        (70, 1),
        (300, 1),
        (12, 4),
        (24, 2),
        (66, 33),
        (130, 130),
    ] {
        let mut c = image(2, channels / groups, 5, 3, 2, 1);
        c.groups = groups;
        let mut seed = 99u64;
        let mut next = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            seed >> 33
        };
        // The second sample is empty but for the last channels.
        let values: Vec<f64> = (0..2 * channels * 25)
            .map(
                |at| match at < channels * 25 || at >= (2 * channels - 2) * 25 {
                    true => f64::from(u8::from(next() % 40 == 0)),
                    false => 0.0,
                },
            )
            .collect();
        let tensor = Tensor::reals(DType::F32, &[2, channels, 5, 5], &values);
        let expected = occupancy(&c, &tensor);
        assert_eq!(
            measure_occupancy(&tensor.view(), &c.geometry()),
            Ok(expected.clone())
        );
        let mut last = Tensor::reals(DType::F32, &[2, channels, 5, 5], &values);
        let turned: Vec<f64> = indices(&[2, 5, 5, channels])
            .iter()
            .map(|i| last.at(&[i[0], i[3], i[1], i[2]]).real)
            .collect();
        last = Tensor::reals(DType::F32, &[2, 5, 5, channels], &turned);
        last.transpose(1, 3);
        last.transpose(2, 3);
        assert_eq!(measure_occupancy(&last.view(), &c.geometry()), Ok(expected));
    }
}

#[test]
fn what_a_convolution_sees_by_hand() {
    // One spike in the corner of channel 5 of 6: four sites of the 3x3 see it, in the second block of four.
    let c = image(1, 6, 3, 3, 1, 1);
    let mut values = [0.0; 54];
    values[5 * 9] = 1.0;
    let spikes = Tensor::reals(DType::BOOL, &[1, 6, 3, 3], &values);
    assert_eq!(
        measure_occupancy(&spikes.view(), &c.geometry()),
        Ok(Occupancy {
            nonempty_outputs: 4 * 5,
            active_sites: 4,
            active_rows: vec![0, 4],
            active_patches: [vec![0, 4], vec![4], vec![4], vec![4], vec![4], vec![4]],
        })
    );
    let ones = Tensor::reals(DType::F32, &[5, 6, 3, 3], &[1.0; 270]);
    assert_eq!(
        nonempty_outputs_convolution(&spikes.view(), &ones.view(), &c.geometry()),
        Ok(20)
    );
    let empty = Tensor::reals(DType::F32, &[0, 6, 3, 3], &[]);
    let nothing = measure_occupancy(&empty.view(), &c.geometry()).unwrap();
    assert_eq!(nothing.active_rows, [0, 0]);
    let flat = Tensor::reals(DType::F32, &[6], &[1.0; 6]);
    assert_eq!(
        measure_occupancy(&flat.view(), &c.geometry()),
        Err(NotTaken::Layout)
    );
}
