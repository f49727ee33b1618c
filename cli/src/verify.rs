//! `optape verify TRACE...`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueHint};
use optape_trace::TraceEnd;

use crate::exit;
use crate::options::GlobalOptions;

/// Options of `optape verify`.
#[derive(Debug, Args)]
pub struct Options {
    /// Trace files
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub traces: Vec<PathBuf>,
}

/// Checks every byte.
///
/// # Errors
/// Where a file is no trace, or something in it is wrong.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let mut damaged = false;
    for path in &options.traces {
        let found = optape_trace::verify(path).with_context(|| path.display().to_string())?;
        let end = match &found.end {
            TraceEnd::Clean(_) => "finished",
            TraceEnd::Unfinished { .. } => "unfinished",
            TraceEnd::Damaged { .. } => "damaged",
        };
        writeln!(
            out,
            "{}: {end}, {} bytes, {} frames, {} processes, {} blocks, {} records, {} records lost while recording",
            path.display(),
            found.file_bytes,
            found.frames,
            found.processes,
            found.blocks,
            found.records,
            found.dropped_records
        )?;
        for finding in &found.findings {
            writeln!(out, "  {finding}")?;
        }
        if found.findings.is_empty() {
            writeln!(out, "  nothing wrong")?;
        } else {
            damaged = true;
        }
    }
    out.flush()?;
    if damaged {
        let message = "a trace is damaged; `optape recover` saves what is whole".to_owned();
        return Err(exit::Failure {
            code: exit::CORRUPT,
            message,
        }
        .into());
    }
    Ok(ExitCode::SUCCESS)
}
