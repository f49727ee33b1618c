//! The command line as clap sees it. The options of a subcommand stand in the subcommand's file.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::{
    completions, config, ctl, daemon, diff, dump, info, man, monitor, peak, presets, record,
    recover, replay, roofline, rules, verify,
};

/// Records what PyTorch runs, op by op, and answers questions about it afterwards.
///
/// `optape record -- python train.py` writes a trace; `optape replay TRACE` counts over it.
#[derive(Debug, Parser)]
#[command(
    name = "optape",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub struct Options {
    /// What all subcommands share.
    #[command(flatten)]
    pub global: GlobalOptions,
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// What all subcommands share.
#[derive(Clone, Debug, Default, Args)]
pub struct GlobalOptions {
    /// Say nothing but errors
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Global options"
    )]
    pub quiet: bool,
    /// Say more; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
    /// Colour on a terminal, always, or never
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = "Global options"
    )]
    pub color: Color,
    /// Take defaults of flags from FILE, too (see optape config)
    #[arg(long, global = true, value_name = "FILE", env = "OPTAPE_CONFIG", value_hint = ValueHint::FilePath, help_heading = "Global options")]
    pub config: Option<PathBuf>,
}

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl Color {
    /// Whether to colour what goes to `stream`.
    pub fn on(self, stream: &impl IsTerminal) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            }
        }
    }
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command and record what torch does in it
    Record(record::Options),
    /// Watch GPUs, energy counters and the machine without recording
    Monitor(monitor::Options),
    /// Record the runs of others, as a service
    Daemon(daemon::Options),
    /// Show what is being recorded; pause, resume, mark, flush or stop it
    Ctl(ctl::Options),
    /// Count over a trace: operations, bytes, energy, firing rates
    Replay(Box<replay::Options>),
    /// Compare two runs, two rule sets, or two parts of a run
    Diff(Box<diff::Options>),
    /// Show operations per byte, and how far modules are from what the machine can do
    Roofline(Box<roofline::Options>),
    /// Measure what this machine can do, for optape roofline
    Peak(peak::Options),
    /// Say what a trace is: command, versions, processes, size, how it ended
    Info(info::Options),
    /// Print a trace, one line per record
    Dump(dump::Options),
    /// Check every byte of a trace
    Verify(verify::Options),
    /// Make a finished copy of an unfinished or damaged trace
    Recover(recover::Options),
    /// Show the rule sets, or the rules of an op
    Rules(rules::Options),
    /// Show the energy presets, or print one to start a cost file from
    Presets(presets::Options),
    /// Show which values flags have when they are not given, and where from
    Config(config::Options),
    /// Print a completion script for a shell
    Completions(completions::Options),
    /// Write manual pages, one per subcommand
    Man(man::Options),
}
