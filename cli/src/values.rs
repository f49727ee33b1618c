//! `optape values TRACE...`: kept values, listed or exported.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum, ValueHint};
use optape_replay::report::{columns, grouped};
use optape_replay::{
    Glob, Selection, Traces, Values, ValuesFormat, ValuesRequest, WatchSelection, parse_steps,
};
use serde_json::json;

use crate::exit::Failure;
use crate::options::GlobalOptions;

/// Options of `optape values`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  optape record --watch 'IFNode:output,v' --keep values -- python train.py
  optape values run.optape
      What was kept.
  optape values run.optape --watch 'IFNode:output' --stack -o spikes.npz
      One array for each neuron layer, calls first: numpy.load(\"spikes.npz\")[\"sn1/output\"].
  optape values run.optape --step 5 -o step5.safetensors

Values are arrays MODULE/WHAT/NUMBER; types stay as they are, but for bfloat16 in .npz, which becomes float32.")]
pub struct Options {
    /// Trace files; several of one run are looked at together
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub traces: Vec<PathBuf>,

    /// Write the values to FILE: .npz (NumPy) or .safetensors; without it, list them
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Overwrite FILE if it exists
    #[arg(short, long, requires = "output")]
    pub force: bool,
    /// The kind of file, where its name does not say it
    #[arg(long, value_name = "FORMAT", requires = "output")]
    pub to: Option<FileFormat>,
    /// All values of one module as one array, with the calls as first dimension
    #[arg(long, requires = "output")]
    pub stack: bool,
    /// How to write the list
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "table",
        conflicts_with = "output"
    )]
    pub format: ListFormat,

    /// Which: 'IFNode:output,v', fc1:input, output; as in optape record --watch
    #[arg(long, value_name = "MODULES:WHAT", value_parser = |text: &str| WatchSelection::parse(text), help_heading = "Selection")]
    pub watch: Vec<Vec<WatchSelection>>,
    /// Calls inside of ranges of this name (record_function)
    #[arg(long, value_name = "NAME", help_heading = "Selection")]
    pub range: Vec<String>,
    /// Steps: 5, 5..10 (without 10), 5..=10, 5.., ..10
    #[arg(long, value_name = "N|A..B", value_parser = |text: &str| parse_steps(text), help_heading = "Selection")]
    pub step: Vec<std::ops::Range<u64>>,
    /// Modules and what is inside of them: Net.conv1, 'Net.layer*'
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

/// Values of `--to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileFormat {
    /// NumPy's archive of arrays
    Npz,
    /// Safetensors
    Safetensors,
}

/// Values of `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ListFormat {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Lists or exports kept values.
///
/// # Errors
/// As [`Values::of`] and [`Values::write`]; a file that was begun is removed.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let format = options
        .output
        .as_deref()
        .map(|path| file_format(path, options.to))
        .transpose()?;
    let traces = Traces::open(&options.traces)?;
    let request = ValuesRequest {
        selection: Selection {
            ranges: options.range.clone(),
            steps: options.step.clone(),
            scopes: options.scope.iter().map(|text| Glob::new(text)).collect(),
            ranks: options.rank.clone(),
            ..Selection::default()
        },
        watches: options.watch.concat(),
    };
    let values = Values::of(&traces, &request)?;
    match (&options.output, format) {
        (Some(path), Some(format)) => {
            export(&values, path, format, options)?;
            if !global.quiet {
                let count: u64 = values.groups().iter().map(|group| group.values).sum();
                tracing::info!("Wrote {count} values to {}", path.display());
            }
        }
        _ => list(&values, options.format)?,
    }
    if values.lost() > 0 {
        tracing::warn!("{} values were lost while recording and are in no file", values.lost());
    }
    Ok(ExitCode::SUCCESS)
}

fn file_format(path: &Path, given: Option<FileFormat>) -> anyhow::Result<ValuesFormat> {
    match (given, path.extension().and_then(|e| e.to_str())) {
        (Some(FileFormat::Npz), _) | (None, Some("npz")) => Ok(ValuesFormat::Npz),
        (Some(FileFormat::Safetensors), _) | (None, Some("safetensors")) => {
            Ok(ValuesFormat::Safetensors)
        }
        _ => Err(Failure::usage(format!(
            "{} is neither .npz nor .safetensors; name the file so, or say which with --to",
            path.display()
        ))
        .into()),
    }
}

fn export(
    values: &Values<'_>,
    path: &Path,
    format: ValuesFormat,
    options: &Options,
) -> anyhow::Result<()> {
    // Refuses a file that is there; what is written goes to a neighbour first, so that none is ever half written.
    if !options.force && path.exists() {
        return Err(Failure::usage(format!(
            "{} exists; choose another name with --output, or overwrite it with --force",
            path.display()
        ))
        .into());
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(name);
    let written = values
        .write(&part, format, options.stack)
        .map_err(anyhow::Error::from)
        .and_then(|_| Ok(std::fs::rename(&part, path)?));
    if written.is_err() {
        // It may never have been made.
        let _ = std::fs::remove_file(&part);
    }
    written
}

fn list(values: &Values<'_>, format: ListFormat) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match format {
        ListFormat::Json => {
            let list = json!({"schema": 1, "values": values.groups()});
            serde_json::to_writer_pretty(&mut out, &list)?;
            writeln!(out)?;
        }
        ListFormat::Table => {
            let body = values
                .groups()
                .iter()
                .map(|group| {
                    let shapes: Vec<String> =
                        group.shapes.iter().map(|shape| format!("{shape:?}")).collect();
                    let class = group.class.rsplit('.').next().unwrap_or_default();
                    vec![
                        group.name.clone(),
                        class.to_owned(),
                        group.dtypes.join(", "),
                        shapes.join(" "),
                        grouped(i128::from(group.values)),
                        grouped(i128::from(group.elements)),
                    ]
                })
                .collect();
            let head = ["name", "class", "type", "shape", "values", "elements"];
            writeln!(out, "{}", columns(&head, body, &[0, 1, 2, 3]))?;
        }
    }
    Ok(())
}
