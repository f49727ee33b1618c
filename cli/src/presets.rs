//! `optape presets [NAME]`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use optape_replay::ReplayError;
use optape_replay::energy::{PRESETS, Preset, presets};

use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape presets`.
#[derive(Debug, Args)]
pub struct Options {
    /// The preset; without it, their names
    pub name: Option<String>,
    /// Those of a rule set: some have presets of the same name
    #[arg(long, value_name = "NAME")]
    pub rules: Option<String>,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Prints a preset, to be copied, edited and given to `optape replay --costs`.
///
/// # Errors
/// Where there is no such preset, or it cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    let taken = |preset: &&Preset| {
        options
            .rules
            .as_deref()
            .is_none_or(|rules| preset.rules.is_none_or(|of| of == rules))
    };
    match &options.name {
        None => {
            for preset in PRESETS.iter().filter(taken) {
                match preset.rules {
                    Some(rules) => writeln!(text, "{} ({rules})", preset.name)?,
                    None => writeln!(text, "{}", preset.name)?,
                }
            }
        }
        Some(name) => {
            let mut found = presets(name).filter(taken);
            let Some(preset) = found.next() else {
                let known = PRESETS.iter().filter(taken).map(|preset| preset.name);
                return Err(ReplayError::unknown_name("energy preset", name, known).into());
            };
            if found.next().is_some() {
                let rules: Vec<&str> = presets(name).filter_map(|preset| preset.rules).collect();
                return Err(ReplayError::Selection(format!(
                    "several rule sets have an energy preset '{name}': add --rules {}",
                    rules.join(" or --rules ")
                ))
                .into());
            }
            text.extend_from_slice(preset.text.as_bytes());
        }
    }
    options.output.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}
