//! Medians, and the tables that are printed.

use std::fmt::Write;

use crate::bench::overhead::{Measured, Overhead};

/// A row of the table, worked out.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) milliseconds: f64,
    /// To the bare step beside it: lower quartile, median, upper quartile.
    pub(super) ratio: [f64; 3],
    /// What comes on top of the bare step, over its ops.
    pub(super) microseconds_per_op: f64,
}

impl Line {
    /// Each block is held against the bare step's right before and after it, so that what drifts (heat, neighbours) cancels.
    pub(super) fn of(row: &Measured, ops: u64) -> Option<Self> {
        let pairs = || row.seconds.iter().zip(&row.bare);
        #[expect(clippy::cast_precision_loss, reason = "a step has a few hundred ops")]
        let ops = ops as f64;
        Some(Self {
            milliseconds: 1e3 * quantile(row.seconds.iter().copied(), 0.5)?,
            ratio: [
                quantile(pairs().map(|(row, bare)| row / bare), 0.25)?,
                quantile(pairs().map(|(row, bare)| row / bare), 0.5)?,
                quantile(pairs().map(|(row, bare)| row / bare), 0.75)?,
            ],
            microseconds_per_op: 1e6 * quantile(pairs().map(|(row, bare)| row - bare), 0.5)? / ops,
        })
    }
}

/// By linear interpolation; `None` of nothing.
pub(super) fn quantile(values: impl Iterator<Item = f64>, q: f64) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place among some dozens of repetitions"
    )]
    let (below, part) = {
        let place = q * last as f64;
        (place.floor() as usize, place.fract())
    };
    let above = (below + 1).min(last);
    Some(sorted[below] + part * (sorted[above] - sorted[below]))
}

/// What the overhead may be at most, where there is a limit.
fn limit(row: &str, measured: &Overhead) -> Option<f64> {
    if measured.gpu {
        return match (row, measured.batch) {
            ("optape record --stats none", 8) => Some(1.10),
            ("optape record --stats rules", 8) => Some(1.30),
            // It fills the device.
            ("optape record --stats none" | "optape record --stats rules", _) => Some(1.08),
            _ => None,
        };
    }
    match (row, measured.batch, measured.pinned) {
        ("optape record --stats none", 8, true) => Some(1.10),
        ("optape record --stats none", 128, true) => Some(1.02),
        ("optape record --stats rules", 8, true) => Some(1.15),
        ("optape record --stats rules", 128, true) => Some(1.05),
        ("optape record --level full", 8, true) => Some(1.35),
        ("optape record --level full", 128, true) => Some(1.10),
        _ => None,
    }
}

/// One setting as a Markdown table.
pub(super) fn overhead(measured: &Overhead) -> String {
    let mut text = String::new();
    let turns = measured.rows.first().map_or(0, |row| row.seconds.len());
    let threads = match measured.threads {
        1 => "one torch thread".to_owned(),
        threads => format!("{threads} torch threads"),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "Batch {}, {threads}{}{}: {} op calls per step, medians of {turns} turns.\n",
        measured.batch,
        if measured.pinned {
            ", on a core of its own"
        } else {
            ""
        },
        if measured.gpu { ", on the GPU" } else { "" },
        measured.ops_per_step
    );
    text.push_str("| | ms per step | times the bare step (quartiles) | us per op on top | limit |\n|---|---:|---:|---:|---:|\n");
    for row in &measured.rows {
        let limit = limit(row.name, measured);
        match (Line::of(row, measured.ops_per_step), &row.failed) {
            (Some(line), None) => {
                let [low, median, high] = line.ratio;
                let verdict = limit.map_or(String::new(), |limit| {
                    format!(
                        "{limit:.2} {}",
                        if median <= limit {
                            "(kept)"
                        } else {
                            "(EXCEEDED)"
                        }
                    )
                });
                let _ = writeln!(
                    text,
                    "| {} | {:.3} | {median:.3} ({low:.3} to {high:.3}) | {:.2} | {verdict} |",
                    row.name, line.milliseconds, line.microseconds_per_op
                );
            }
            (_, failed) => {
                let why = failed
                    .as_deref()
                    .unwrap_or("no measurement")
                    .replace(['\n', '|'], " ");
                let _ = writeln!(text, "| {} | not measured: {why} | | | |", row.name);
            }
        }
    }
    text
}

/// Whether every row that has a limit was measured and keeps it.
pub(super) fn within_limits(measured: &Overhead) -> bool {
    measured
        .rows
        .iter()
        .all(|row| match limit(row.name, measured) {
            None => true,
            Some(limit) => {
                Line::of(row, measured.ops_per_step).is_some_and(|line| line.ratio[1] <= limit)
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(name: &'static str, seconds: &[f64]) -> Measured {
        Measured {
            name,
            seconds: seconds.to_vec(),
            bare: vec![0.010, 0.020, 0.010],
            failed: None,
        }
    }

    fn overhead_of(rules: &[f64]) -> Overhead {
        Overhead {
            batch: 8,
            threads: 1,
            torch: "2.13.0".to_owned(),
            pinned: true,
            gpu: false,
            ops_per_step: 100,
            rows: vec![
                measured("bare step", &[0.010, 0.020, 0.010]),
                measured("optape record --stats rules", rules),
            ],
        }
    }

    #[test]
    fn quantiles_interpolate() {
        let values = || [4.0, 1.0, 3.0, 2.0].into_iter();
        assert_eq!(quantile(values(), 0.5), Some(2.5));
        assert_eq!(quantile(values(), 0.25), Some(1.75));
        assert_eq!(quantile(values(), 1.0), Some(4.0));
        assert_eq!(quantile([].into_iter(), 0.5), None);
    }

    #[test]
    fn ratios_are_taken_block_by_block() {
        let overhead = overhead_of(&[0.011, 0.022, 0.011]);
        let line = Line::of(&overhead.rows[1], overhead.ops_per_step).unwrap();
        assert!(
            line.ratio.iter().all(|ratio| (ratio - 1.1).abs() < 1e-12),
            "{line:?}"
        );
        assert!((line.microseconds_per_op - 10.0).abs() < 1e-9, "{line:?}");
    }

    #[test]
    fn a_limit_that_is_exceeded_or_not_measured_shows() {
        assert!(within_limits(&overhead_of(&[0.011, 0.022, 0.011])));
        let slow = overhead_of(&[0.012, 0.024, 0.012]);
        assert!(!within_limits(&slow));
        assert!(overhead(&slow).contains("1.15 (EXCEEDED)"));
        // Launches cost more, and have a limit of their own.
        let on_gpu = Overhead { gpu: true, ..slow };
        assert!(within_limits(&on_gpu));
        assert!(overhead(&on_gpu).contains("1.30 (kept)"));
        let filled = Overhead {
            batch: 8192,
            ..on_gpu
        };
        assert!(!within_limits(&filled));
        let mut failed = overhead_of(&[]);
        failed.rows[1].failed = Some("no | such\nthing".to_owned());
        assert!(!within_limits(&failed));
        assert!(
            overhead(&failed)
                .contains("| optape record --stats rules | not measured: no   such thing | | | |")
        );
    }
}
