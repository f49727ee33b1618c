//! Bytes per second: the triad of J. McCalpin's STREAM, `a = b + s * c` over arrays that no cache holds.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Duration;

use crate::exit::Failure;

/// One thread's parts of the three arrays.
struct Part {
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
}

/// Bytes per second of so many threads, over three arrays of so many MiB together.
///
/// # Errors
/// Where there is no memory for the arrays.
pub(super) fn measure(threads: usize, array_mib: u64, time: Duration) -> anyhow::Result<f64> {
    let elements = usize::try_from(array_mib * (1 << 20) / 8 / threads as u64)?;
    let array = || -> anyhow::Result<Vec<f64>> {
        let mut array = Vec::new();
        array.try_reserve_exact(elements).map_err(|_| {
            Failure::usage(format!(
                "there is no memory for three arrays of {array_mib} MiB; choose a smaller --array"
            ))
        })?;
        Ok(array)
    };
    let mut parts = Vec::with_capacity(threads);
    for _ in 0..threads {
        parts.push(Mutex::new(Part {
            a: array()?,
            b: array()?,
            c: array()?,
        }));
    }
    Ok(super::best(threads, time, |thread| {
        let Some(Ok(mut part)) = parts.get(thread).map(Mutex::lock) else {
            return 0.0;
        };
        let Part { a, b, c } = &mut *part;
        if a.is_empty() {
            // Memory belongs to the node of the thread that first writes to it.
            a.resize(elements, 0.0);
            b.resize(elements, 1.0);
            c.resize(elements, 2.0);
        }
        triad(a, b, c, black_box(3.0));
        black_box(&a);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let bytes = (3 * 8 * a.len()) as f64;
        bytes
    }))
}

fn triad(a: &mut [f64], b: &[f64], c: &[f64], factor: f64) {
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        *a = b + factor * c;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_triad_is_one() {
        let (b, c) = ([1.0, 2.0], [10.0, 20.0]);
        let mut a = [0.0; 2];
        triad(&mut a, &b, &c, 3.0);
        assert_eq!(a, [31.0, 62.0]);
    }
}
