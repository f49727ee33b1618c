//! The flags that say which op calls to look at, of every subcommand that counts.

use std::ops::Range;

use clap::Args;
use optape_replay::{Glob, Selection, parse_steps};

/// Which op calls to look at.
#[derive(Clone, Debug, Default, Args)]
pub struct SelectionOptions {
    /// Ops inside of ranges of this name (record_function), all occurrences
    #[arg(long, value_name = "NAME", help_heading = "Selection")]
    pub range: Vec<String>,
    /// Steps: 5, 5..10 (without 10), 5..=10, 5.., ..10
    #[arg(long, value_name = "N|A..B", value_parser = |text: &str| parse_steps(text), help_heading = "Selection")]
    pub step: Vec<Range<u64>>,
    /// Stages: forward, loss, backward, recompute, optimizer, other, or the program's own
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        help_heading = "Selection"
    )]
    pub stage: Vec<String>,
    /// Ops inside of modules: Net.conv1, 'Net.layer*'
    #[arg(long, value_name = "GLOB", help_heading = "Selection")]
    pub scope: Vec<String>,
    /// Ops: aten::add.Tensor, aten::mm, 'aten::conv*'
    #[arg(long, value_name = "GLOB", help_heading = "Selection")]
    pub op: Vec<String>,
    /// Ranks of a distributed run
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        help_heading = "Selection"
    )]
    pub rank: Vec<u32>,
    /// Leave out ops inside of modules, by class or scope: 'BatchNorm*', Net.head
    #[arg(long, value_name = "GLOB", help_heading = "Selection")]
    pub exclude: Vec<String>,
}

impl SelectionOptions {
    /// As replay takes it.
    #[must_use]
    pub fn selection(&self) -> Selection {
        let globs = |texts: &[String]| texts.iter().map(|text| Glob::new(text)).collect();
        Selection {
            ranges: self.range.clone(),
            steps: self.step.clone(),
            stages: self.stage.clone(),
            scopes: globs(&self.scope),
            ops: globs(&self.op),
            ranks: self.rank.clone(),
            exclude: globs(&self.exclude),
        }
    }
}
