//! `optape recover TRACE -o COPY`.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueHint};

use crate::exit::Failure;
use crate::options::GlobalOptions;
use crate::output;

/// Options of `optape recover`.
#[derive(Debug, Args)]
pub struct Options {
    /// The unfinished or damaged trace; it is not touched
    #[arg(value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub trace: PathBuf,
    /// Write the finished copy to FILE [default: TRACE with .recovered.optape for its ending]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Overwrite FILE if it exists
    #[arg(short, long)]
    pub force: bool,
}

/// Writes a finished copy of what can be read.
///
/// # Errors
/// Where nothing can be read, or the copy cannot be written.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let copy = options
        .output
        .clone()
        .unwrap_or_else(|| options.trace.with_extension("recovered.optape"));
    let same = |a: &PathBuf, b: &PathBuf| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(&copy, &options.trace) {
        return Err(Failure::usage(
            "the copy cannot take the place of the trace that it is made from; name another file",
        )
        .into());
    }
    // An input that cannot be read at all must not leave an empty copy behind.
    optape_trace::Trace::open(&options.trace)
        .with_context(|| options.trace.display().to_string())?;
    let sink = BufWriter::new(output::create(&copy, options.force)?);
    let (mut sink, saved) = optape_trace::recover(&options.trace, sink, &[])
        .with_context(|| options.trace.display().to_string())?;
    sink.flush()
        .with_context(|| format!("cannot write {}", copy.display()))?;
    if !global.quiet {
        let mut err = std::io::stderr().lock();
        writeln!(
            err,
            "saved {} records, {} are lost through damage",
            saved.records, saved.lost
        )?;
        for finding in &saved.findings {
            writeln!(err, "  {finding}")?;
        }
        if saved.finished && saved.findings.is_empty() {
            writeln!(err, "  the trace was whole; the copy holds the same")?;
        }
        writeln!(err, "wrote {}", copy.display())?;
    }
    Ok(ExitCode::SUCCESS)
}
