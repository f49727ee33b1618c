//! `optape rules [OP]`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use optape_replay::ReplayError;
use optape_replay::energy::{PRESETS, Preset};
use optape_replay::rules::{RULE_SETS, RuleSet};

use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape rules`.
#[derive(Debug, Args)]
pub struct Options {
    /// An op, `aten::mm`; without it, the rule sets
    pub op: Option<String>,
    /// One rule set only
    #[arg(long, value_name = "NAME")]
    pub rules: Option<String>,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Prints rule sets, or the rules of an op with formula and source.
///
/// # Errors
/// Where a name does not exist, or the text cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let sets = match &options.rules {
        Some(name) => vec![RuleSet::named(name)?],
        None => RULE_SETS
            .iter()
            .map(|name| RuleSet::named(name))
            .collect::<Result<Vec<_>, _>>()?,
    };
    let mut text = Vec::new();
    match &options.op {
        None => {
            for set in &sets {
                writeln!(
                    text,
                    "{} (version {}): {}",
                    set.name, set.version, set.description
                )?;
                for counter in &set.counters {
                    let by = if counter.simulation().is_some() {
                        "follows the stream".to_owned()
                    } else {
                        format!("{} ops", counter.ops().len())
                    };
                    writeln!(
                        text,
                        "  {:<14} in {:<6} {by}",
                        counter.name(),
                        counter.unit()
                    )?;
                }
                // Sets about layers have estimators instead.
                let of_set = |preset: &&Preset| {
                    set.counters.is_empty() && preset.rules == Some(set.name)
                };
                let names: Vec<&str> = PRESETS.iter().filter(of_set).map(|p| p.name).collect();
                for names in names.chunks(6) {
                    writeln!(text, "  {}", names.join(", "))?;
                }
            }
        }
        Some(op) => {
            let known = sets
                .iter()
                .any(|set| set.counters.iter().any(|c| c.rule(op).is_some()));
            if !known {
                let ops = sets
                    .iter()
                    .flat_map(|set| set.counters.iter().flat_map(|c| c.ops()));
                return Err(ReplayError::unknown_name("op with a rule", op, ops).into());
            }
            for set in &sets {
                writeln!(text, "{op} under {}", set.name)?;
                for counter in set.counters.iter().filter(|c| c.simulation().is_none()) {
                    match counter.rule(op) {
                        None => writeln!(text, "  {:<14} no rule", counter.name())?,
                        Some(rule) => match rule.zero_reason() {
                            Some(reason) => writeln!(text, "  {:<14} 0: {reason}", counter.name())?,
                            None => writeln!(text, "  {:<14} {}", counter.name(), rule.formula)?,
                        },
                    }
                }
            }
        }
    }
    options.output.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}
