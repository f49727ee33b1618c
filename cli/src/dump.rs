//! `optape dump TRACE`: one line of text per record.

use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueHint};
use optape_trace::{StreamId, Trace, dump};

use crate::exit::Failure;
use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape dump`.
#[derive(Debug, Args)]
pub struct Options {
    /// The trace file
    #[arg(value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub trace: PathBuf,
    /// One process (or the monitors) only, by its number in the file
    #[arg(long, value_name = "N")]
    pub stream: Option<u32>,
    /// Records by ordinal: 100..200, 100.., ..200, 150
    #[arg(long, value_name = "A..B", default_value = "..", value_parser = ordinals)]
    pub records: Range<u64>,
    /// What the numbers in the records mean: ops, signatures, scopes, modules, statistics
    #[arg(long)]
    pub definitions: bool,
    /// The values that --keep kept, after the records
    #[arg(long)]
    pub values: bool,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

fn ordinals(text: &str) -> Result<Range<u64>, String> {
    if text == ".." {
        Ok(0..u64::MAX)
    } else {
        optape_replay::parse_steps(text).map_err(|e| e.replace("step", "record"))
    }
}

/// Dumps.
///
/// # Errors
/// Where the file cannot be read, or the lines cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let trace = Trace::open(&options.trace).with_context(|| options.trace.display().to_string())?;
    let streams: Vec<StreamId> = match options.stream {
        None => trace.streams().iter().map(|stream| stream.id()).collect(),
        Some(number) if (number as usize) < trace.streams().len() => vec![StreamId(number)],
        Some(number) => {
            let message = format!(
                "there is no stream {number} in the trace: it has {}",
                trace.streams().len()
            );
            return Err(Failure::usage(message).into());
        }
    };
    options.output.write_with(|out| {
        for stream in streams {
            if options.definitions
                && let Some(state) = trace.streams().get(stream.index())
            {
                for definition in state.dictionary().definitions() {
                    writeln!(out, "{}", dump::definition_line(stream, &definition))?;
                }
            }
            for line in dump::record_lines(&trace, stream, options.records.clone()) {
                writeln!(
                    out,
                    "{}",
                    line.with_context(|| options.trace.display().to_string())?
                )?;
            }
            if options.values
                && let Some(state) = trace.streams().get(stream.index())
            {
                for value in trace.values(stream) {
                    let value = value.with_context(|| options.trace.display().to_string())?;
                    if options.records.contains(&value.ordinal.0) {
                        writeln!(out, "{}", dump::value_line(state, &value))?;
                    }
                }
            }
        }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}
