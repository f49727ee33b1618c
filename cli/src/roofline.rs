//! `optape roofline TRACE...`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum, ValueHint};
use optape_replay::roofline::{Peaks, RooflineFormat, roofline};
use optape_replay::rules::RuleSet;
use optape_replay::{Request, Traces};

use crate::options::GlobalOptions;
use crate::output::OutputOptions;
use crate::replay::Grouping;
use crate::selection::SelectionOptions;

/// Options of `optape roofline`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  optape peak -o peaks.toml && optape roofline train.optape --peaks peaks.toml
      Modules against what this machine can do.
  optape roofline train.optape --peaks peaks.toml --by module --format svg -o roofline.svg
      The picture.
  optape roofline train.optape --peak-flops 67T --peak-bandwidth 4.8T
      Against the data sheet of a GPU.

Operations are those of the counter flop. Bytes are those of memory_access: operands read once and results written once, op by op, as if no cache \
kept any. Calls on a GPU end before their kernels do, so what ran there has no time and no rate.

Exit codes: 0 done, 2 usage, 5 no trace or a damaged one.")]
pub struct Options {
    /// Trace files; several of one run are taken together
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub traces: Vec<PathBuf>,

    /// What the machine can do (`optape peak` writes such a file)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with_all = ["peak_flops", "peak_bandwidth"], help_heading = "Peaks")]
    pub peaks: Option<PathBuf>,
    /// The roof of the peaks that scopes are held against [default: the first]
    #[arg(long, value_name = "NAME", requires = "peaks", help_heading = "Peaks")]
    pub roof: Option<String>,
    /// Operations per second, with a prefix if you like: 67T, 500G
    #[arg(long, value_name = "N", value_parser = quantity, requires = "peak_bandwidth", help_heading = "Peaks")]
    pub peak_flops: Option<f64>,
    /// Bytes per second: 4.8T, 25G
    #[arg(long, value_name = "N", value_parser = quantity, requires = "peak_flops", help_heading = "Peaks")]
    pub peak_bandwidth: Option<f64>,

    /// The rule set
    #[arg(
        long,
        value_name = "NAME",
        default_value = "optape",
        env = "OPTAPE_RULES",
        help_heading = "What to compute"
    )]
    pub rules: String,
    /// What points are
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "scope",
        help_heading = "What to compute"
    )]
    pub by: Grouping,

    /// What to look at.
    #[command(flatten)]
    pub selection: SelectionOptions,

    /// How to write it
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "table",
        help_heading = "Presentation"
    )]
    pub format: PlotFormat,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,

    /// Threads that read events [default: one per processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Strictness and reading")]
    pub threads: Option<u64>,
}

/// Values of `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlotFormat {
    /// For people
    Table,
    /// Exact and complete
    Json,
    /// For spreadsheets
    Csv,
    /// For documents
    Markdown,
    /// For papers (needs the package booktabs)
    Latex,
    /// The picture
    Svg,
}

impl PlotFormat {
    const fn format(self) -> RooflineFormat {
        match self {
            Self::Table => RooflineFormat::Table,
            Self::Json => RooflineFormat::Json,
            Self::Csv => RooflineFormat::Csv,
            Self::Markdown => RooflineFormat::Markdown,
            Self::Latex => RooflineFormat::Latex,
            Self::Svg => RooflineFormat::Svg,
        }
    }
}

/// A number with an SI prefix.
fn quantity(text: &str) -> Result<f64, String> {
    let (number, factor) = match text.char_indices().last() {
        Some((at, 'k')) => (&text[..at], 1e3),
        Some((at, 'M')) => (&text[..at], 1e6),
        Some((at, 'G')) => (&text[..at], 1e9),
        Some((at, 'T')) => (&text[..at], 1e12),
        Some((at, 'P')) => (&text[..at], 1e15),
        _ => (text, 1.0),
    };
    let number: Option<f64> = number.trim().parse().ok();
    number
        .map(|number| number * factor)
        .filter(|number| number.is_finite() && *number > 0.0)
        .ok_or_else(|| {
            "a number above 0, with k, M, G, T or P if you like; for example 67T".to_owned()
        })
}

/// Puts scopes under a roof.
///
/// # Errors
/// As [`roofline`]; where the peaks cannot be read; and where the result cannot be written.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let rules = RuleSet::named(&options.rules)?;
    let peaks = match (&options.peaks, options.peak_flops, options.peak_bandwidth) {
        (Some(path), _, _) => Some(Peaks::read(path)?),
        (None, Some(flops), Some(bandwidth)) => Some(Peaks::given(flops, bandwidth)?),
        _ => None,
    };
    let traces = Traces::open(&options.traces)?;
    let request = Request {
        selection: options.selection.selection(),
        by: Some(options.by.by()),
        threads: options
            .threads
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0),
        ..Request::default()
    };
    let found = roofline(
        &traces,
        &rules,
        &request,
        peaks.as_ref(),
        options.roof.as_deref(),
    )?;
    let mut text = Vec::new();
    found.write(options.format.format(), &mut text)?;
    options.output.write_all(&text)?;
    if !global.quiet && options.format != PlotFormat::Table {
        for note in &found.notes {
            tracing::warn!("{note}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_prefixes() {
        assert_eq!(quantity("67T"), Ok(67e12));
        assert_eq!(quantity("4.8 T"), Ok(4.8e12));
        assert_eq!(quantity("25000000000"), Ok(25e9));
        for wrong in ["", "T", "-1G", "0", "nan", "5X", "1e999"] {
            assert!(quantity(wrong).is_err(), "{wrong}");
        }
    }
}
