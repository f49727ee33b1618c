//! `optape rules [OP]`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use optape_replay::ReplayError;
use optape_replay::rules::{RULE_SETS, RuleSet};

use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape rules`.
#[derive(Debug, Args)]
pub struct Options {
    /// An op, `aten::mm`; without it, the rule sets
    pub op: Option<String>,
    /// These rule sets only: built-in ones, or TOML files, whose tests run
    #[arg(long, value_name = "NAME|FILE")]
    pub rules: Vec<String>,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Prints rule sets, or the rules of an op with formula and source.
///
/// # Errors
/// Where a name does not exist, or the text cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let sets = if options.rules.is_empty() {
        RuleSet::load_all(&RULE_SETS)?
    } else {
        RuleSet::load_all(&options.rules)?
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
