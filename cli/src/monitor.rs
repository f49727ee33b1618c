//! `optape monitor`: GPUs, energy counters and the machine, without a recording. Also the flags for the monitors of a recording.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum, ValueHint};
use optape_recorder::monitor::alone::{self, Round, Until};
use optape_recorder::monitor::events::{EventFile, tag_and_value};
use optape_recorder::monitor::{
    MonitorSettings, Monitors, POWERCAP_DIRECTORY, SHORTEST_INTERVAL, SourceKind,
};
use optape_replay::report::scaled;
use optape_trace::series::{self, SeriesName};
use serde_json::json;

use crate::exit::Failure;
use crate::options::GlobalOptions;

/// Values of `--monitor` and `--source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceName {
    /// NVIDIA GPUs: utilization, memory, power, energy, temperature, clocks, processes
    Gpu,
    /// Energy counters of the processor
    Rapl,
    /// Processors and memory of the machine
    Host,
    /// Memory, processor time and threads of the recorded processes
    Process,
    /// Nothing
    None,
}

impl SourceName {
    const fn kind(self) -> Option<SourceKind> {
        match self {
            Self::Gpu => Some(SourceKind::Gpu),
            Self::Rapl => Some(SourceKind::Rapl),
            Self::Host => Some(SourceKind::Host),
            Self::Process => Some(SourceKind::Process),
            Self::None => None,
        }
    }
}

/// Where values come from that tests make up. Hidden: nobody is to meet made-up numbers by accident.
#[derive(Clone, Debug, Args)]
pub struct Simulation {
    /// So many made-up GPUs in place of real ones
    #[arg(long, value_name = "N", hide = true, env = "OPTAPE_SIMULATED_GPUS")]
    pub simulated_gpus: Option<u32>,
    /// Where Linux shows the processor's energy counters
    #[arg(long, value_name = "DIR", hide = true, default_value = POWERCAP_DIRECTORY, env = "OPTAPE_POWERCAP_DIRECTORY")]
    pub powercap_directory: PathBuf,
}

/// Flags for the monitors of a recording.
#[derive(Clone, Debug, Args)]
pub struct MonitorOptions {
    /// What to sample beside the ops: all that there is, unless some are named
    #[arg(
        long,
        value_name = "SOURCES",
        value_delimiter = ',',
        env = "OPTAPE_MONITOR"
    )]
    pub monitor: Vec<SourceName>,
    /// Seconds between two samples of the monitors
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval, env = "OPTAPE_MONITOR_INTERVAL")]
    pub monitor_interval: Duration,
    /// For tests.
    #[command(flatten)]
    pub simulation: Simulation,
}

impl MonitorOptions {
    /// As the recorder takes them; `None`: no monitors.
    #[must_use]
    pub fn settings(&self) -> Option<MonitorSettings> {
        let asked_for = !self.monitor.is_empty();
        let sources: Vec<SourceKind> = if asked_for {
            self.monitor.iter().filter_map(|name| name.kind()).collect()
        } else {
            SourceKind::ALL.to_vec()
        };
        (!sources.is_empty()).then(|| MonitorSettings {
            sources,
            interval: self.monitor_interval,
            gpus: None,
            asked_for,
            simulated_gpus: self.simulation.simulated_gpus,
            rapl_directory: self.simulation.powercap_directory.clone(),
        })
    }
}

/// Options of `optape monitor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Ends with the process that started it, on SIGINT, SIGTERM and SIGHUP, and after --samples rounds.\n\n\
    A machine without a GPU, or without permission to read energy counters, gets a hint, and the exit code is 0."
)]
pub struct Options {
    /// GPUs, by the numbers that nvidia-smi prints [default: all]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub gpu: Vec<u32>,
    /// What to sample
    #[arg(
        long,
        value_name = "SOURCES",
        value_delimiter = ',',
        default_value = "gpu"
    )]
    pub source: Vec<SourceName>,
    /// Seconds between two samples
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
    /// End after so many samples of everything
    #[arg(long, value_name = "N")]
    pub samples: Option<u64>,
    /// Write TensorBoard event files into DIR, and print nothing
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "format")]
    pub log_dir: Option<PathBuf>,
    /// How to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub format: MonitorFormat,
    /// End with this process, which --source process samples [default: the one that started optape; 0: none]
    #[arg(long, value_name = "PID")]
    pub parent: Option<u32>,
    /// For tests.
    #[command(flatten)]
    pub simulation: Simulation,
}

/// Values of `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MonitorFormat {
    /// For people: a line per device
    Table,
    /// A JSON object per round
    Json,
    /// A line per sample: time, series, value
    Csv,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds; for example 0.1".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(interval)
            if interval >= SHORTEST_INTERVAL && interval <= Duration::from_secs(86_400) =>
        {
            Ok(interval)
        }
        _ => Err("must be between 0.001 and 86400 seconds".to_owned()),
    }
}

/// Samples until it is time to end.
///
/// # Errors
/// Where the event files or the output cannot be written.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let sources: Vec<SourceKind> = options
        .source
        .iter()
        .filter_map(|name| name.kind())
        .collect();
    if sources.is_empty() {
        return Err(
            Failure::usage("there is nothing to sample: name a source with --source").into(),
        );
    }
    let settings = MonitorSettings {
        sources,
        interval: options.interval,
        gpus: (!options.gpu.is_empty()).then(|| options.gpu.clone()),
        asked_for: true,
        simulated_gpus: options.simulation.simulated_gpus,
        rapl_directory: options.simulation.powercap_directory.clone(),
    };
    let monitors = Monitors::open(&settings);
    for state in monitors.states() {
        // Made-up numbers are never silent.
        if state.state.is_err() || settings.simulated_gpus.is_some() || global.verbose > 0 {
            say(&state.line());
        }
    }
    if monitors.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let until = Until {
        rounds: options.samples,
        process: match options.parent {
            None => alone::parent(),
            Some(0) => None,
            Some(process) => Some(process),
        },
    };
    match &options.log_dir {
        Some(directory) => log(monitors, &settings, until, directory)?,
        None => print(monitors, &settings, until, options.format)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn log(
    monitors: Monitors,
    settings: &MonitorSettings,
    until: Until,
    directory: &Path,
) -> anyhow::Result<()> {
    let context = || format!("cannot write event files into {}", directory.display());
    let mut file = None;
    alone::run(monitors, settings, until, |round: Round<'_>| {
        tell_notes(&round.facts);
        let file = match &mut file {
            Some(file) => file,
            None => file.insert(
                EventFile::create(directory, round.unix_ns)
                    .with_context(context)?
                    .0,
            ),
        };
        let names = round.samples.names();
        let values: Vec<(String, f64)> = round
            .samples
            .readings()
            .iter()
            .filter_map(|reading| {
                Some(tag_and_value(
                    names.get(reading.series.index())?,
                    reading.value,
                ))
            })
            .collect();
        file.scalars(
            round.unix_ns,
            round.number,
            values.iter().map(|(tag, value)| (tag.as_str(), *value)),
        )
        .with_context(context)
    })
}

fn print(
    monitors: Monitors,
    settings: &MonitorSettings,
    until: Until,
    format: MonitorFormat,
) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if format == MonitorFormat::Csv {
        writeln!(out, "time_unix_ns,series,value")?;
    }
    let mut began = None;
    alone::run(
        monitors,
        settings,
        until,
        |round: Round<'_>| -> anyhow::Result<()> {
            tell_notes(&round.facts);
            let names = round.samples.names();
            let values = round.samples.readings().iter().filter_map(|reading| {
                Some((names.get(reading.series.index())?.as_str(), reading.value))
            });
            match format {
                MonitorFormat::Json => {
                    let values: serde_json::Map<String, serde_json::Value> = values
                        .map(|(name, value)| (name.to_owned(), value.into()))
                        .collect();
                    writeln!(
                        out,
                        "{}",
                        json!({"time_unix_ns": round.unix_ns, "values": values})
                    )?;
                }
                MonitorFormat::Csv => {
                    for (name, value) in values {
                        writeln!(out, "{},{name},{value}", round.unix_ns)?;
                    }
                }
                MonitorFormat::Table => {
                    let since = *began.get_or_insert(round.unix_ns);
                    table(&round, since, values, &mut out)?;
                }
            }
            Ok(out.flush()?)
        },
    )
}

/// A line per device: what it is at, how much, in units for people.
fn table<'a>(
    round: &Round<'_>,
    since: u64,
    values: impl Iterator<Item = (&'a str, f64)>,
    out: &mut impl Write,
) -> io::Result<()> {
    #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
    let seconds = round.unix_ns.saturating_sub(since) as f64 / 1e9;
    let mut devices: Vec<(&str, Vec<String>)> = Vec::new();
    for (name, value) in values {
        let parsed = SeriesName::parse(name);
        let text = match parsed.known() {
            None => format!("{} {value}", parsed.quantity),
            Some(quantity) => {
                let unit = match quantity.unit {
                    "byte" => "B",
                    unit => unit,
                };
                let words = match quantity.name.rsplit_once('_') {
                    Some((words, _)) if !quantity.unit.is_empty() => words,
                    _ => quantity.name,
                };
                let words = words.replace('_', " ");
                if *quantity == series::POWER {
                    format!("{words} {}", scaled(value / 1e3, "W"))
                } else if matches!(unit, "%" | "°C" | "MHz" | "") {
                    format!("{words} {value:.0} {unit}").trim_end().to_owned()
                } else {
                    format!("{words} {}", scaled(value, unit))
                }
            }
        };
        match devices
            .iter_mut()
            .find(|(device, _)| *device == parsed.device)
        {
            Some((_, texts)) => texts.push(text),
            None => devices.push((parsed.device, vec![text])),
        }
    }
    let width = devices
        .iter()
        .map(|(device, _)| device.len())
        .max()
        .unwrap_or(0);
    for (device, texts) in devices {
        writeln!(
            out,
            "{seconds:8.1} s  {device:<width$}  {}",
            texts.join(", ")
        )?;
    }
    Ok(())
}

/// What is missing of a device, once.
fn tell_notes(facts: &[(String, serde_json::Value)]) {
    for (key, value) in facts {
        if let (Some(device), Some(text)) =
            (key.strip_prefix(series::facts::NOTE_PREFIX), value.as_str())
        {
            say(&format!("{device}: {text}"));
        }
    }
}

fn say(text: &str) {
    let _ = writeln!(io::stderr(), "optape: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        assert_eq!(interval("0.1"), Ok(Duration::from_millis(100)));
        for wrong in ["0", "-1", "x", "NaN", "1e9", "0.0001"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
