//! The kernel, compiled as C++, finds what the processor's statistics find. NVRTC compiles it for real architectures, where NVRTC is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use libloading::os::unix::{Library, Symbol};
use optape_trace::DType;
use optape_trace::needs::Product;
use proptest::prelude::*;

use super::super::driver::Nvrtc;
use super::super::kernels::{self, AREA_BYTES, Found, Job, Operand, Request};
use crate::statistics::{
    self, Answer, Geometry, Question, View, product_sum_broadcast, product_sum_convolution,
    product_sum_linear, product_sum_matrix,
};

/// The kernel as a library; `None` where there is no C++ compiler.
struct Kernel {
    run: Symbol<unsafe extern "C" fn(*const Job)>,
    area: Mutex<Vec<u64>>,
}

fn kernel() -> Option<&'static Kernel> {
    static KERNEL: OnceLock<Option<Kernel>> = OnceLock::new();
    KERNEL.get_or_init(build).as_ref()
}

fn build() -> Option<Kernel> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let directory = tempfile::tempdir().unwrap();
    let library = directory.path().join("kernel.so");
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device");
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"])
        .args(["-fno-strict-aliasing", "-shared", "-fPIC", "-I"])
        .arg(&here)
        .arg(here.join("tests/shim.cpp"))
        .arg("-o")
        .arg(&library)
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            println!("NOT RUN: no C++ compiler ({compiler}: {error})");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // SAFETY: the library that was just built, without initializers.
    let library = unsafe { Library::open(Some(&library), 2) }.unwrap();
    // SAFETY: the types of `shim.cpp`.
    let (run, size) = unsafe {
        (
            library
                .get::<unsafe extern "C" fn(*const Job)>(b"optape_run")
                .unwrap(),
            library
                .get::<unsafe extern "C" fn(i32) -> u64>(b"optape_size")
                .unwrap(),
        )
    };
    let sizes = [
        size_of::<kernels::Item>(),
        size_of::<kernels::Tally>(),
        size_of::<Found>(),
        AREA_BYTES,
        size_of::<Job>(),
    ];
    for (which, expected) in (0..).zip(sizes) {
        // SAFETY: `which` is one of the five.
        assert_eq!(unsafe { size(which) }, expected as u64, "structure {which}");
    }
    std::mem::forget(library);
    Some(Kernel {
        run,
        area: Mutex::new(vec![0; AREA_BYTES.div_ceil(8)]),
    })
}

impl Kernel {
    fn run(&self, request: &mut Request) -> Found {
        let mut area = self.area.lock().unwrap();
        let mut found = Found::default();
        request.divide();
        let job = request.job();
        job.area = area.as_mut_ptr() as u64;
        job.answer = (&raw mut found) as u64;
        job.ticket = 0x8000_0007;
        // SAFETY: what the job names is memory of this process: the operands of the test, the area, the answer.
        unsafe { (self.run)(job) };
        assert_eq!(found.done, 0x8000_0007);
        // What the next launch finds: no blocks have arrived, no counts.
        let partial = size_of::<kernels::Tally>() * 512 / 8;
        assert!(area[partial..].iter().all(|word| *word == 0));
        found
    }
}

/// A tensor in host memory.
#[derive(Clone, Debug)]
struct Tensor {
    dtype: DType,
    bytes: Vec<u64>,
    first: usize,
    sizes: Vec<i64>,
    strides: Vec<i64>,
}

impl Tensor {
    fn operand(&self) -> Operand<'_> {
        let element = self.dtype.bytes() as usize;
        Operand {
            data: self.bytes.as_ptr() as u64 + (self.first * element) as u64,
            dtype: self.dtype,
            sizes: &self.sizes,
            strides: &self.strides,
        }
    }

    fn view(&self) -> View<'_> {
        let data = self.operand().data as *const u8;
        // SAFETY: `of` has made room for every element that sizes and strides reach.
        unsafe { View::new(data, self.dtype, &self.sizes, &self.strides) }
    }

    /// Elements come from `element`, at every place of memory.
    fn of(
        dtype: DType,
        sizes: &[i64],
        strides: &[i64],
        mut element: impl FnMut() -> [u8; 16],
    ) -> Self {
        let reach = |negative: bool| -> usize {
            let dims = sizes.iter().zip(strides);
            let parts = dims.filter(|(_, stride)| (**stride < 0) == negative);
            parts
                .map(|(size, stride)| (size - 1).max(0) as usize * stride.unsigned_abs() as usize)
                .sum()
        };
        let (first, count) = (reach(true), reach(true) + reach(false) + 1);
        let width = dtype.bytes() as usize;
        let mut bytes: Vec<u8> = Vec::with_capacity(count * width + 8);
        for _ in 0..count {
            bytes.extend_from_slice(&element()[..width]);
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let words = bytes.as_chunks::<8>().0;
        Self {
            dtype,
            bytes: words.iter().map(|word| u64::from_ne_bytes(*word)).collect(),
            first,
            sizes: sizes.to_vec(),
            strides: strides.to_vec(),
        }
    }
}

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

/// What elements are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Spikes,
    Values,
    Wild,
}

fn real(dtype: DType, value: f64) -> Vec<u8> {
    match dtype {
        DType::F16 => half::f16::from_f64(value).to_ne_bytes().to_vec(),
        DType::BF16 => half::bf16::from_f64(value).to_ne_bytes().to_vec(),
        DType::F32 => (value as f32).to_ne_bytes().to_vec(),
        DType::F64 => value.to_ne_bytes().to_vec(),
        DType::C32 => [real(DType::F16, value), real(DType::F16, 0.0)].concat(),
        DType::C64 => [real(DType::F32, value), real(DType::F32, -0.0)].concat(),
        DType::C128 => [real(DType::F64, value), real(DType::F64, 0.0)].concat(),
        _ => (value as i64).to_ne_bytes().to_vec(),
    }
}

/// The next element: a linear congruence is random enough.
fn element(dtype: DType, kind: Kind, seed: &mut u64) -> [u8; 16] {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    let dice = *seed >> 33;
    let bytes = match kind {
        Kind::Spikes => real(dtype, f64::from(u8::from(dice.is_multiple_of(5)))),
        Kind::Values => {
            let numbers = [0.0, 1.0, 1.0, 0.5, -3.0, 100.0, 7.25, -0.0, 1e-7, -1e-40];
            real(dtype, numbers[(dice % 10) as usize])
        }
        Kind::Wild => {
            // Any bits: NaN, infinities, subnormal numbers, the least and greatest integers.
            let mut bytes = seed.rotate_left(17).to_ne_bytes().to_vec();
            bytes.extend(seed.rotate_left(41).to_ne_bytes());
            bytes
        }
    };
    let mut element = [0; 16];
    element[..bytes.len().min(16)].copy_from_slice(&bytes[..bytes.len().min(16)]);
    element
}

fn tensor(dtype: DType, kind: Kind, sizes: &[i64], strides: &[i64], seed: u64) -> Tensor {
    let mut seed = seed;
    Tensor::of(dtype, sizes, strides, || element(dtype, kind, &mut seed))
}

fn contiguous(sizes: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; sizes.len()];
    for d in (1..sizes.len()).rev() {
        strides[d - 1] = strides[d] * sizes[d].max(1);
    }
    strides
}

/// Whether two numbers are the same but for the order of additions of numbers that together are at most `scale`.
fn close(a: Option<f64>, b: Option<f64>, scale: f64) -> bool {
    match (a, b) {
        // Where a part of the sum may overflow, the order decides whether it does.
        (Some(_), Some(_)) if scale.is_infinite() => true,
        (Some(a), Some(b)) => {
            a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-12 * scale
        }
        (a, b) => a == b,
    }
}

/// What the finite ones of as many elements add up to at most, without their signs.
fn scale(tensor: &Tensor) -> f64 {
    let bytes: Vec<u8> = tensor.bytes.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let value = |element: &[u8]| match tensor.dtype {
        DType::F16 | DType::C32 => half::f16::from_ne_bytes([element[0], element[1]]).to_f64(),
        DType::BF16 => half::bf16::from_ne_bytes([element[0], element[1]]).to_f64(),
        DType::F32 | DType::C64 => f32::from_ne_bytes(element[..4].try_into().unwrap()).into(),
        DType::F64 | DType::C128 => f64::from_ne_bytes(element[..8].try_into().unwrap()),
        // Integers are exact.
        _ => 0.0,
    };
    let elements = bytes.chunks_exact(tensor.dtype.bytes() as usize);
    let greatest = elements
        .map(|element| value(element).abs())
        .filter(|value| value.is_finite())
        .fold(0.0, f64::max);
    greatest * tensor.operand().elements().unwrap_or(0) as f64
}

#[track_caller]
fn same(found: &Answer, expected: &Answer, scale: f64, what: &dyn std::fmt::Debug) {
    assert_eq!(found.binary, expected.binary, "{what:?}");
    assert_eq!(found.nonzeros, expected.nonzeros, "{what:?}");
    assert!(
        close(found.sum, expected.sum, scale),
        "{found:?} {expected:?} {what:?}"
    );
    assert!(
        close(found.minimum, expected.minimum, 0.0) && close(found.maximum, expected.maximum, 0.0),
        "{found:?} {expected:?} {what:?}"
    );
}

const QUESTIONS: [Question; 4] = [
    Question::Binary,
    Question::Nonzeros,
    Question::Sum,
    Question::Full,
];

fn compare(kernel: &Kernel, tensor: &Tensor) {
    let mut request = Request::default();
    for question in QUESTIONS {
        request.add(&tensor.operand(), question, None).unwrap();
    }
    let found = kernel.run(&mut request);
    for (at, question) in QUESTIONS.into_iter().enumerate() {
        let expected = statistics::measure(&tensor.view(), question).unwrap();
        let (answer, asked) = request.read(at, &found).unwrap();
        assert_eq!(asked, question);
        let what = (tensor.dtype, question, &tensor.sizes, &tensor.strides);
        same(&answer.answer, &expected, scale(tensor), &what);
    }
}

#[test]
fn every_element_type_in_every_layout() {
    let Some(kernel) = kernel() else { return };
    let layouts: &[(&[i64], &[i64])] = &[
        (&[], &[]),
        (&[1], &[1]),
        (&[5000], &[1]),
        (&[1000], &[3]),
        (&[700], &[-1]),
        (&[30, 40], &[40, 1]),
        (&[30, 40], &[1, 30]),
        (&[30, 40], &[45, 1]),
        (&[30, 40], &[1, 33]),
        (&[7, 1, 5, 6], &[30, 99, 6, 1]),
        (&[7, 4, 5, 6], &[120, 1, 24, 4]),
        (&[7, 4, 5], &[5, 0, 1]),
        (&[3, 3], &[0, 0]),
        (&[4, 5, 6], &[1000, 30, 2]),
        (&[3, 10], &[1, 1]),
        (&[2, 2, 2, 2, 2, 2, 2], &[64, 1, 32, 2, 16, 4, 8]),
        (&[400, 500], &[500, 1]),
    ];
    for dtype in DTYPES {
        for kind in [Kind::Spikes, Kind::Values, Kind::Wild] {
            for (sizes, strides) in layouts {
                compare(kernel, &tensor(dtype, kind, sizes, strides, 7));
            }
        }
    }
}

#[test]
fn special_values() {
    let Some(kernel) = kernel() else { return };
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        for values in [
            vec![-0.0, 0.0],
            vec![-0.0],
            vec![1.0, f64::NAN],
            vec![f64::NAN],
            vec![f64::INFINITY, f64::NEG_INFINITY],
            vec![f64::INFINITY, 0.0],
            vec![-1.0, 0.0],
            vec![0.0, 1.0, 2.0],
            vec![6e-8, -6e-8],
        ] {
            let mut next = values.iter().cycle();
            let tensor = Tensor::of(dtype, &[values.len() as i64], &[1], || {
                let mut bytes = [0; 16];
                let value = real(dtype, *next.next().unwrap());
                bytes[..value.len()].copy_from_slice(&value);
                bytes
            });
            compare(kernel, &tensor);
        }
    }
}

/// A convolution along each spatial dimension: input, kernel, stride, padding, dilation, output.
type Dimension = [i64; 6];

struct Shape {
    lists: [Vec<i64>; 6],
    transposed: bool,
    groups: i64,
    outputs: i64,
}

impl Shape {
    fn of(dimensions: &[Dimension], transposed: bool, groups: i64, outputs: i64) -> Self {
        let list = |which: usize| dimensions.iter().map(|d| d[which]).collect();
        Self {
            lists: [list(0), list(1), list(2), list(3), list(4), list(5)],
            transposed,
            groups,
            outputs,
        }
    }

    fn geometry(&self) -> Geometry<'_> {
        let [input, kernel, stride, padding, dilation, output] = &self.lists;
        Geometry {
            input,
            kernel,
            stride,
            padding,
            dilation,
            output,
            transposed: self.transposed,
            groups: self.groups,
            outputs_per_group: self.outputs,
        }
    }
}

fn dimension(
    (input, kernel, stride, padding, dilation): (i64, i64, i64, i64, i64),
    transposed: bool,
) -> Dimension {
    let reach = dilation * (kernel - 1);
    let output = if transposed {
        (input - 1) * stride - 2 * padding + reach + 1
    } else {
        (input + 2 * padding - reach - 1).div_euclid(stride) + 1
    };
    [input, kernel, stride, padding, dilation, output.max(0)]
}

fn compare_convolution(
    kernel: &Kernel,
    dtype: DType,
    kinds: [Kind; 2],
    shape: &Shape,
    (batch, channels): (i64, i64),
    channels_last: bool,
    seed: u64,
) {
    let geometry = shape.geometry();
    let mut sizes = vec![batch, channels];
    sizes.extend(geometry.input);
    let mut strides = contiguous(&sizes);
    if channels_last {
        let mut step = channels;
        strides[1] = 1;
        for d in (2..sizes.len()).rev() {
            strides[d] = step;
            step *= sizes[d];
        }
        strides[0] = step;
    }
    let input = tensor(dtype, kinds[0], &sizes, &strides, seed);
    let per_group = channels / shape.groups;
    let mut weight_sizes = if shape.transposed {
        vec![channels, shape.outputs]
    } else {
        vec![shape.outputs * shape.groups, per_group]
    };
    weight_sizes.extend(geometry.kernel);
    let weight = tensor(
        dtype,
        kinds[1],
        &weight_sizes,
        &contiguous(&weight_sizes),
        seed + 1,
    );
    let what = (dtype, kinds, &shape.lists, shape.transposed, shape.groups);
    for question in QUESTIONS {
        let mut request = Request::default();
        let at = request
            .add(&input.operand(), question, Some(&geometry))
            .unwrap();
        let of_weight = request
            .add(&weight.operand(), Question::Binary, None)
            .unwrap();
        let asked = request.multiply(
            (at, &input.operand()),
            (of_weight, &weight.operand()),
            Product::Convolution,
            Some(&geometry),
        );
        let found = kernel.run(&mut request);
        let (answer, _) = request.read(at, &found).unwrap();
        let expected = statistics::measure_convolution(&input.view(), &geometry, question).unwrap();
        // An element feeds fewer outputs than that.
        let scale = scale(&input) * 1e4;
        same(&answer.answer, &expected.answer, scale, &what);
        assert_eq!(
            answer.fan_out_nonzeros, expected.fan_out_nonzeros,
            "{what:?}"
        );
        assert!(
            close(answer.fan_out_sum, expected.fan_out_sum, scale),
            "{answer:?} {expected:?} {what:?}"
        );
        if asked.is_ok() {
            let both = [&input, &weight].iter().all(|t| {
                statistics::measure(&t.view(), Question::Binary)
                    .unwrap()
                    .binary
                    == Some(true)
            });
            let sum = both.then(|| {
                product_sum_convolution(&input.view(), &weight.view(), &geometry).unwrap()
            });
            assert_eq!(request.product(&found), sum, "{what:?}");
        }
    }
}

#[test]
fn convolutions_of_every_shape() {
    let Some(kernel) = kernel() else { return };
    let lines = [
        (9, 3, 1, 1, 1),
        (9, 3, 2, 1, 1),
        (8, 2, 2, 0, 1),
        (9, 3, 1, 2, 2),
        (7, 1, 1, 0, 1),
        (10, 5, 3, 2, 1),
        (5, 3, 1, -1, 1),
        (6, 4, 3, 0, 2),
    ];
    for transposed in [false, true] {
        for (at, line) in lines.iter().enumerate() {
            let next = lines[(at + 3) % lines.len()];
            let usable = |line| dimension(line, transposed)[5] > 0;
            if !usable(*line) || !usable(next) {
                continue;
            }
            let all = [
                dimension(*line, transposed),
                dimension(next, transposed),
                dimension((4, 2, 1, 0, 1), transposed),
            ];
            for spatial in 1..=3 {
                for groups in [1, 2] {
                    let shape = Shape::of(&all[..spatial], transposed, groups, 3);
                    for kinds in [
                        [Kind::Spikes, Kind::Spikes],
                        [Kind::Spikes, Kind::Values],
                        [Kind::Values, Kind::Spikes],
                    ] {
                        let channels_last = at % 2 == 1;
                        compare_convolution(
                            kernel,
                            DType::F32,
                            kinds,
                            &shape,
                            (2, 4),
                            channels_last,
                            at as u64,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn convolutions_of_every_element_type() {
    let Some(kernel) = kernel() else { return };
    let shape = Shape::of(
        &[
            dimension((9, 3, 2, 1, 1), false),
            dimension((7, 3, 1, 1, 1), false),
        ],
        false,
        2,
        3,
    );
    for dtype in DTYPES {
        for kind in [Kind::Spikes, Kind::Values] {
            compare_convolution(
                kernel,
                dtype,
                [kind, Kind::Spikes],
                &shape,
                (2, 4),
                false,
                3,
            );
        }
        // Any bits. Of floats the sum is the rounding's, but integers are exact to the last.
        if !dtype.is_complex()
            && !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
        {
            let kinds = [Kind::Wild, Kind::Spikes];
            compare_convolution(kernel, dtype, kinds, &shape, (2, 4), true, 5);
        }
    }
}

#[test]
fn products_of_matrices() {
    let Some(kernel) = kernel() else { return };
    let cases: &[(Product, &[i64], &[i64])] = &[
        (Product::Matrix, &[6, 300], &[300, 7]),
        (Product::Matrix, &[1, 1], &[1, 1]),
        (Product::Matrix, &[5, 6, 7], &[5, 7, 3]),
        (Product::Linear, &[4, 9, 20], &[6, 20]),
        (Product::Linear, &[20], &[20]),
        (Product::Broadcast, &[9], &[9]),
        (Product::Broadcast, &[4, 9], &[9]),
        (Product::Broadcast, &[9], &[3, 9, 2]),
        (Product::Broadcast, &[2, 1, 4, 9], &[3, 9, 2]),
        (Product::Broadcast, &[2, 3, 4, 9], &[3, 9, 2]),
    ];
    for (kind, a, b) in cases {
        for transposed in [false, true] {
            let mut strides = contiguous(a);
            if transposed && a.len() == 2 {
                strides = vec![1, a[0]];
            }
            for kinds in [[Kind::Spikes; 2], [Kind::Spikes, Kind::Values]] {
                let of_a = tensor(DType::F32, kinds[0], a, &strides, 3);
                let of_b = tensor(DType::F16, kinds[1], b, &contiguous(b), 4);
                let mut request = Request::default();
                let at_a = request
                    .add(&of_a.operand(), Question::Binary, None)
                    .unwrap();
                let at_b = request
                    .add(&of_b.operand(), Question::Binary, None)
                    .unwrap();
                request
                    .multiply(
                        (at_a, &of_a.operand()),
                        (at_b, &of_b.operand()),
                        *kind,
                        None,
                    )
                    .unwrap();
                let found = kernel.run(&mut request);
                let (x, y) = (of_a.view(), of_b.view());
                let sum = match kind {
                    Product::Matrix => product_sum_matrix(&x, &y),
                    Product::Linear => product_sum_linear(&x, &y),
                    _ => product_sum_broadcast(&x, &y),
                };
                let binary = |t: &Tensor| {
                    statistics::measure(&t.view(), Question::Binary)
                        .unwrap()
                        .binary
                        == Some(true)
                };
                let expected = (binary(&of_a) && binary(&of_b)).then(|| sum.unwrap());
                assert_eq!(request.product(&found), expected, "{kind:?} {a:?} {b:?}");
                for (at, tensor) in [(at_a, &of_a), (at_b, &of_b)] {
                    let (answer, _) = request.read(at, &found).unwrap();
                    let expected = statistics::measure(&tensor.view(), Question::Binary).unwrap();
                    same(&answer.answer, &expected, 1.0, &(kind, a, b));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_layout(
        dims in prop::collection::vec((1i64..12, -40i64..40), 0..6),
        dtype in 0usize..16,
        kind in 0usize..3,
        seed: u64,
    ) {
        let Some(kernel) = kernel() else { return Ok(()) };
        let (sizes, strides): (Vec<_>, Vec<_>) = dims.into_iter().unzip();
        let kind = [Kind::Spikes, Kind::Values, Kind::Wild][kind];
        compare(kernel, &tensor(DTYPES[dtype], kind, &sizes, &strides, seed));
    }
}

/// NVRTC needs no GPU to compile. `OPTAPE_NVRTC_DIR` names its directory; else it is looked for where a Python with torch has it.
#[test]
fn nvrtc_compiles_the_kernel() {
    let mut places: Vec<PathBuf> = Vec::new();
    places.extend(std::env::var_os("OPTAPE_NVRTC_DIR").map(PathBuf::from));
    if let Some(python) = std::env::var_os("OPTAPE_PYTHON").map(PathBuf::from) {
        let lib = python
            .parent()
            .and_then(Path::parent)
            .map(|p| p.join("lib"));
        for entry in lib
            .and_then(|lib| std::fs::read_dir(lib).ok())
            .into_iter()
            .flatten()
            .flatten()
        {
            for package in ["cu13/lib", "cuda_nvrtc/lib"] {
                places.push(entry.path().join("site-packages/nvidia").join(package));
            }
        }
    }
    let compiler = places
        .iter()
        .find_map(|place| Nvrtc::in_directory(place).unwrap());
    let Some(compiler) = compiler else {
        println!("NOT RUN: no NVRTC found (OPTAPE_PYTHON, OPTAPE_NVRTC_DIR)");
        return;
    };
    for capability in [75, 80, 90] {
        let code = compiler.compile(capability).unwrap();
        // A cubin is an ELF file.
        assert!(code.starts_with(b"\x7fELF"), "sm_{capability}");
    }
    // One that no compiler of today knows becomes PTX, which the driver of tomorrow compiles.
    let code = compiler.compile(999).unwrap();
    let text = String::from_utf8_lossy(&code);
    assert!(text.contains(".visible .entry optape_statistics"), "{text}");
    let error = compiler.compile(30).unwrap_err().to_string();
    assert!(error.contains("sm_30"), "{error}");
}
