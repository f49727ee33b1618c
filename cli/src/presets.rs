//! `optape presets [NAME]`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use optape_replay::ReplayError;
use optape_replay::energy::{Key, PRESETS, Preset, presets};
use optape_replay::rules::{RULE_SETS, RuleSet};

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
    /// List what `optape replay --set KEY=VALUE` and `--sweep KEY=VALUES` can change, in presets and in counters
    #[arg(long)]
    pub keys: bool,
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
        None if options.keys => {
            for preset in PRESETS.iter().filter(taken) {
                write_keys(&mut text, &title(preset), &preset.costs()?.keys())?;
            }
            let sets = RULE_SETS
                .iter()
                .filter(|name| options.rules.as_deref().is_none_or(|wanted| wanted == **name));
            for name in sets {
                let rules = RuleSet::named(name)?;
                for counter in &rules.counters {
                    let keys = Key::of_counter(counter.as_ref());
                    if !keys.is_empty() {
                        let title = format!("counter {} ({name})", counter.name());
                        write_keys(&mut text, &title, &keys)?;
                    }
                }
            }
        }
        None => {
            for preset in PRESETS.iter().filter(taken) {
                writeln!(text, "{}", title(preset))?;
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
            if options.keys {
                write_keys(&mut text, &title(preset), &preset.costs()?.keys())?;
            } else {
                text.extend_from_slice(preset.text.as_bytes());
            }
        }
    }
    options.output.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn title(preset: &Preset) -> String {
    match preset.rules {
        Some(rules) => format!("{} ({rules})", preset.name),
        None => preset.name.to_owned(),
    }
}

/// One line for each key: its value and unit, what it has to be, and whether another value needs another simulation.
fn write_keys(out: &mut dyn Write, title: &str, keys: &[Key]) -> std::io::Result<()> {
    let value = |key: &Key| match key.unit {
        Some(unit) => format!("{} {unit}", key.value),
        None => key.value.clone(),
    };
    // Points and lists are long; they do not set the width of the column.
    let width = |text: &dyn Fn(&Key) -> usize| {
        keys.iter().map(text).filter(|n| *n <= 24).max().unwrap_or(0)
    };
    let names = width(&|key| key.key.len());
    let values = width(&|key| value(key).len());
    writeln!(out, "{title}")?;
    for key in keys {
        let simulation = if key.structural {
            "; one simulation for each value"
        } else {
            ""
        };
        writeln!(
            out,
            "  {:<names$}  {:<values$}  {}{simulation}",
            key.key,
            value(key),
            key.kind
        )?;
    }
    Ok(())
}
