//! `optape graph TRACE...`: the layers of the recorded model, and what feeds what.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum, ValueHint};
use optape_replay::network::GraphOptions;
use optape_replay::{Glob, Selection, Traces, graph, parse_steps};

use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape graph`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  optape graph run.optape
      One line per layer: what feeds it, its output, parameters, time steps and rates.
  optape graph run.optape --format dot | dot -Tsvg -o run.svg
      A drawing, with graphviz.

The graph is that of the first selected call of the module that the program calls itself; of several, of the one with the most \
parameters (--scope chooses another). It needs a recording of --level full.

Exit codes: 0 done, 2 usage, 4 the trace lacks a level, 5 no trace or a damaged one.")]
pub struct Options {
    /// Trace files; several of one run are looked at together
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub traces: Vec<PathBuf>,

    /// How to write it
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub format: GraphFormat,
    /// A node for every call of a layer, not one for each layer
    #[arg(long)]
    pub unrolled: bool,
    /// Make batch norms part of the convolutions before them, as for inference
    #[arg(long)]
    pub fuse_batch_norm: bool,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,

    /// Calls inside of ranges of this name (record_function)
    #[arg(long, value_name = "NAME", help_heading = "Selection")]
    pub range: Vec<String>,
    /// Steps: 5, 5..10 (without 10), 5..=10, 5.., ..10
    #[arg(long, value_name = "N|A..B", value_parser = |text: &str| parse_steps(text), help_heading = "Selection")]
    pub step: Vec<std::ops::Range<u64>>,
    /// Modules: the graph of what is inside of them
    #[arg(long, value_name = "GLOB", help_heading = "Selection")]
    pub scope: Vec<String>,
    /// Ranks of a distributed run
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        help_heading = "Selection"
    )]
    pub rank: Vec<u32>,
}

/// Values of `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GraphFormat {
    /// For people
    Text,
    /// For programs
    Json,
    /// For graphviz
    Dot,
}

/// Prints the layer graph.
///
/// # Errors
/// As [`graph`], and where it cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let traces = Traces::open(&options.traces)?;
    let selection = Selection {
        ranges: options.range.clone(),
        steps: options.step.clone(),
        scopes: options.scope.iter().map(|text| Glob::new(text)).collect(),
        ranks: options.rank.clone(),
        ..Selection::default()
    };
    let asked = GraphOptions {
        unrolled: options.unrolled,
        fuse_batch_norm: options.fuse_batch_norm,
    };
    let report = graph(&traces, &selection, asked)?;
    let mut text = Vec::new();
    match options.format {
        GraphFormat::Text => report.write_text(&mut text)?,
        GraphFormat::Json => report.write_json(&mut text)?,
        GraphFormat::Dot => report.write_dot(&mut text)?,
    }
    options.output.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}
