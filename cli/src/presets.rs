//! `optape presets [NAME]`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use optape_replay::ReplayError;
use optape_replay::energy::{PRESETS, preset_text};

use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape presets`.
#[derive(Debug, Args)]
pub struct Options {
    /// The preset; without it, their names
    pub name: Option<String>,
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
    match &options.name {
        None => {
            for (name, _) in PRESETS {
                writeln!(text, "{name}")?;
            }
        }
        Some(name) => {
            let found = preset_text(name).ok_or_else(|| {
                ReplayError::unknown_name(
                    "energy preset",
                    name,
                    PRESETS.iter().map(|(name, _)| *name),
                )
            })?;
            text.extend_from_slice(found.as_bytes());
        }
    }
    options.output.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}
