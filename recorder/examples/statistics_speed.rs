//! How fast the statistics are: gigabytes per second of each question, and nanoseconds where bytes do not matter.
//!
//! `cargo run --release -p optape-recorder --example statistics_speed`

use std::hint::black_box;
use std::time::Instant;

use optape_recorder::statistics::{
    Geometry, Question, View, measure, measure_convolution, product_sum_linear, product_sum_matrix,
};
use optape_trace::DType;

const DTYPES: [DType; 11] = [
    DType::F32,
    DType::F64,
    DType::F16,
    DType::BF16,
    DType::BOOL,
    DType::U8,
    DType::I16,
    DType::I32,
    DType::I64,
    DType::C64,
    DType::C128,
];

/// Nanoseconds per call: the best of many short series, for others may be using the machine.
fn time<R>(mut call: impl FnMut() -> R) -> f64 {
    let start = Instant::now();
    black_box(call());
    let once = start.elapsed().as_nanos().max(1);
    let calls = u32::try_from((200_000 / once).clamp(1, 10_000)).unwrap_or(1);
    let series = (0..40).map(|_| {
        let start = Instant::now();
        for _ in 0..calls {
            black_box(call());
        }
        start.elapsed().as_nanos() as f64 / f64::from(calls)
    });
    series.fold(f64::INFINITY, f64::min)
}

/// One fifth ones, or, with `binary` off, numbers.
fn memory(dtype: DType, bytes: usize, binary: bool) -> Vec<u8> {
    let one: &[u8] = match (dtype, binary) {
        (DType::F32 | DType::C64, true) => &1f32.to_ne_bytes(),
        (DType::F64 | DType::C128, true) => &1f64.to_ne_bytes(),
        (DType::F16, true) => &0x3c00u16.to_ne_bytes(),
        (DType::BF16, true) => &0x3f80u16.to_ne_bytes(),
        (_, true) => &1i8.to_ne_bytes(),
        // Ordinary in every type: 16-bit and wider floats are small normal numbers.
        (_, false) => &[0x21, 0x32, 0x21, 0x32, 0x21, 0x32, 0x21, 0x32],
    };
    let width = dtype.bytes() as usize;
    let mut memory = vec![0u8; bytes];
    for (at, element) in memory.chunks_exact_mut(width).enumerate() {
        if at * 2_654_435_761 % 5 == 0 {
            let count = one.len().min(width);
            element[..count].copy_from_slice(&one[..count]);
        }
    }
    memory
}

fn print(name: &str, bytes: usize, ns: f64) {
    println!("{name:<58} {ns:>12.1} ns  {:>7.1} GB/s", bytes as f64 / ns);
}

fn main() {
    println!("# One tensor, contiguous");
    for (place, bytes) in [("L1", 16 << 10), ("L2", 512 << 10), ("DRAM", 256 << 20)] {
        for dtype in DTYPES {
            if place == "DRAM" && dtype != DType::F32 {
                continue;
            }
            for (name, question, binary) in [
                ("binary, of zeros and ones", Question::Binary, true),
                ("nonzeros, of numbers", Question::Nonzeros, false),
                ("full, of zeros and ones", Question::Full, true),
                ("full, of numbers", Question::Full, false),
            ] {
                let memory = memory(dtype, bytes, binary);
                let sizes = [(bytes as u64 / dtype.bytes()) as i64];
                // SAFETY: the view is the memory.
                let view = unsafe { View::new(memory.as_ptr(), dtype, &sizes, &[1]) };
                let ns = time(|| measure(black_box(&view), question));
                print(&format!("{place} {} {name}", dtype.name()), bytes, ns);
            }
        }
    }

    println!("# Early stop");
    let bytes = 4 << 20;
    for (name, at) in [
        ("at the first element", 0usize),
        ("at element 10", 10),
        ("at element 2000", 2000),
    ] {
        let mut memory = memory(DType::F32, bytes, true);
        memory[at * 4..at * 4 + 4].copy_from_slice(&0.5f32.to_ne_bytes());
        let sizes = [8, 128, 32, 32];
        let strides = [131_072, 1024, 32, 1];
        // SAFETY: 2^20 elements of four bytes are the memory.
        let view = unsafe { View::new(memory.as_ptr(), DType::F32, &sizes, &strides) };
        let ns = time(|| measure(black_box(&view), Question::Binary));
        println!("{name:<58} {ns:>12.1} ns");
    }

    println!("# Other layouts, float32, binary, 512 KiB");
    let bytes = 512 << 10;
    let spikes = memory(DType::F32, bytes * 2, true);
    for (name, sizes, strides) in [
        ("transposed", [1, 1, 256, 512], [0, 0, 1, 256]),
        ("channels last", [8, 16, 32, 32], [16_384, 1, 512, 16]),
        ("every other row", [8, 16, 32, 32], [32_768, 2048, 64, 1]),
        ("every other column", [8, 16, 32, 32], [32_768, 2048, 64, 2]),
        ("rows of 3", [1, 1, 43_690, 3], [0, 0, 4, 1]),
    ] {
        // SAFETY: twice the elements are there, and no index leads beyond them.
        let view = unsafe { View::new(spikes.as_ptr(), DType::F32, &sizes, &strides) };
        let ns = time(|| measure(black_box(&view), Question::Binary));
        print(name, bytes, ns);
    }

    println!("# Convolution inputs, float32, with fan-out");
    for (name, sizes, kernel, last, question) in [
        (
            "8x16x32x32, 3x3",
            [8, 16, 32, 32],
            3,
            false,
            Question::Binary,
        ),
        (
            "8x16x32x32, 3x3, full",
            [8, 16, 32, 32],
            3,
            false,
            Question::Full,
        ),
        (
            "8x16x32x32, 1x1",
            [8, 16, 32, 32],
            1,
            false,
            Question::Binary,
        ),
        (
            "8x16x32x32, 3x3, channels last",
            [8, 16, 32, 32],
            3,
            true,
            Question::Binary,
        ),
        (
            "128x16x8x8, 3x3",
            [128, 16, 8, 8],
            3,
            false,
            Question::Binary,
        ),
        ("32x81x7x7, 3x3", [32, 81, 7, 7], 3, false, Question::Binary),
        (
            "1x2x224x224, 3x3",
            [1, 2, 224, 224],
            3,
            false,
            Question::Binary,
        ),
    ] {
        let [_, c, h, w]: [i64; 4] = sizes;
        let strides = if last {
            [c * h * w, 1, w * c, c]
        } else {
            [c * h * w, h * w, w, 1]
        };
        // SAFETY: fewer elements than there are, in a dense layout.
        let view = unsafe { View::new(spikes.as_ptr(), DType::F32, &sizes, &strides) };
        let geometry = Geometry {
            input: &[h, w],
            kernel: &[kernel, kernel],
            stride: &[1, 1],
            padding: &[kernel / 2, kernel / 2],
            dilation: &[1, 1],
            output: &[h, w],
            transposed: false,
            groups: 1,
            outputs_per_group: 64,
        };
        let ns = time(|| measure_convolution(black_box(&view), &geometry, question));
        print(name, sizes.iter().product::<i64>() as usize * 4, ns);
    }

    println!("# Products of binary factors, float32, bytes of both");
    // SAFETY: 256 * 256 elements are there, whichever way round.
    let factor = |strides: &'static [i64]| unsafe {
        View::new(spikes.as_ptr(), DType::F32, &[256, 256], strides)
    };
    let (rows, columns) = (factor(&[256, 1]), factor(&[1, 256]));
    let ns = time(|| product_sum_matrix(black_box(&rows), &rows));
    print("256x256 @ 256x256", 512 << 10, ns);
    let ns = time(|| product_sum_matrix(black_box(&columns), &columns));
    print("256x256 @ 256x256, both transposed", 512 << 10, ns);
    let ns = time(|| product_sum_linear(black_box(&rows), &rows));
    print("linear 256x256, 256x256", 512 << 10, ns);
}
