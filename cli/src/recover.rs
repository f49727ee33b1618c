//! `optape recover TRACE -o COPY`.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueHint};

use optape_recorder::daemon::{self, Salvage};

use crate::exit::Failure;
use crate::options::GlobalOptions;
use crate::output;

/// Options of `optape recover`.
#[derive(Debug, Args)]
pub struct Options {
    /// The unfinished or damaged trace; it is not touched
    #[arg(value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub trace: PathBuf,
    /// Take what a killed recorder left in the rings from DIRECTORY [default: found by the run's number]
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
    pub rings: Option<PathBuf>,
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
    let (mut sink, saved, found) = daemon::salvage(&options.trace, sink, options.rings.as_deref())
        .with_context(|| options.trace.display().to_string())?;
    sink.flush()
        .with_context(|| format!("cannot write {}", copy.display()))?;
    if !global.quiet {
        let mut err = std::io::stderr().lock();
        writeln!(
            err,
            "saved {} records, {} are lost",
            saved.records, saved.lost
        )?;
        tell(&mut err, &found)?;
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

/// What the rings gave.
fn tell(err: &mut impl Write, found: &Salvage) -> std::io::Result<()> {
    if let Some(daemon) = &found.daemon {
        writeln!(
            err,
            "  the recording still runs (process {daemon}): what is not in the file yet is not in the copy"
        )?;
    }
    if let Some(directory) = &found.directory {
        writeln!(err, "  rings in {}:", directory.display())?;
    }
    for ring in &found.rings {
        let lost = match ring.lost {
            0 => String::new(),
            lost => format!(", {lost} are lost"),
        };
        writeln!(
            err,
            "    process {}: {} records more{lost}",
            ring.process_id, ring.appended
        )?;
        if ring.still_running {
            writeln!(
                err,
                "      it still runs; nobody takes its records any more"
            )?;
        }
        if let Some(fault) = &ring.fault {
            writeln!(err, "      not all of it can be read: {fault}")?;
        }
    }
    Ok(())
}
