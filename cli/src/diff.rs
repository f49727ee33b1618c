//! `optape diff A [B]`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueHint};
use optape_replay::diff::{DiffOptions, Limit, Side, diff};
use optape_replay::energy::CostFile;
use optape_replay::rules::RuleSet;
use optape_replay::{Glob, Request, Traces, parse_steps};

use crate::exit::{self, Failure};
use crate::options::GlobalOptions;
use crate::output::OutputOptions;
use crate::replay::{Divisor, Grouping, ReportFormat, wanted};
use crate::selection::SelectionOptions;

/// Options of `optape diff`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  optape diff before.optape after.optape --fail-over compute_fp32=+5%
      Two runs; exit code 1 where the energy of arithmetic grew by more than 5 %.
  optape diff run.optape --rules spikingjelly-2.0.0 --b-rules optape --by op
      One run under two rule sets, op by op.
  optape diff snn.optape ann.optape --range test --per sample --samples 360 --map SpikingNet.lif1=Net.relu1
      A spiking network against one that does not spike, per image.
  optape diff run.optape --stage forward --b-stage backward
      Two parts of one run.

Scopes of the same name are compared. Where each side has one root module that the other lacks, the two are taken for each other. What only one \
side has is listed as such.

Exit codes: 0 done, 1 a limit of --fail-over is passed, 2 usage, 4 a trace lacks a level that was asked for, 5 no trace or a damaged one.")]
pub struct Options {
    /// The first trace
    #[arg(value_name = "A", value_hint = ValueHint::FilePath)]
    pub a: PathBuf,
    /// The second trace; without it, A again, under other rules or another selection
    #[arg(value_name = "B", value_hint = ValueHint::FilePath)]
    pub b: Option<PathBuf>,
    /// Another file of the run that A is a part of
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub a_part: Vec<PathBuf>,
    /// Another file of the run that B is a part of
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "b")]
    pub b_part: Vec<PathBuf>,

    /// The rule set
    #[arg(
        long,
        value_name = "NAME",
        default_value = "optape",
        env = "OPTAPE_RULES",
        help_heading = "What to compute"
    )]
    pub rules: String,
    /// Counters, separated by commas
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        help_heading = "What to compute"
    )]
    pub counters: Vec<String>,
    /// Energy presets, separated by commas
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        help_heading = "What to compute"
    )]
    pub energy: Vec<String>,
    /// An energy model with the costs of a TOML file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "What to compute")]
    pub costs: Vec<PathBuf>,
    /// Everything that the rule sets have
    #[arg(long, conflicts_with_all = ["counters", "energy"], help_heading = "What to compute")]
    pub all: bool,

    /// What to look at.
    #[command(flatten)]
    pub selection: SelectionOptions,

    /// What B is, where it is not as A.
    #[command(flatten)]
    pub other: OtherOptions,

    /// What rows are
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "scope",
        help_heading = "Alignment and limits"
    )]
    pub by: Grouping,
    /// A module of A that is another one of B, with everything inside
    #[arg(long, value_name = "A=B", value_parser = renamed, help_heading = "Alignment and limits")]
    pub map: Vec<(String, String)>,
    /// Exit with 1 where a total differs by more: 5%, +5% (more alone), -5% (less alone), 1e6 (in its unit); compute_fp32=+5%, flop=0: of one
    /// counter or model
    #[arg(long, value_name = "LIMIT", help_heading = "Alignment and limits")]
    pub fail_over: Vec<Limit>,
    /// The limits hold for every row, too
    #[arg(long, requires = "fail_over", help_heading = "Alignment and limits")]
    pub fail_rows: bool,

    /// Divide totals
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "run",
        help_heading = "Presentation"
    )]
    pub per: Divisor,
    /// Number of samples (images), where the program did not report it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Presentation")]
    pub samples: Option<u64>,
    /// How to write it
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "table",
        help_heading = "Presentation"
    )]
    pub format: ReportFormat,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,

    /// Where a level is missing, count the rest and mark the total as partial
    #[arg(long, help_heading = "Strictness and reading")]
    pub lenient: bool,
    /// Threads that read events [default: one per processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Strictness and reading")]
    pub threads: Option<u64>,
}

/// What of B is other than of A.
#[derive(Clone, Debug, Default, Args)]
pub struct OtherOptions {
    /// The rule set of B
    #[arg(long, value_name = "NAME", help_heading = "B, where it is not as A")]
    pub b_rules: Option<String>,
    /// Ranges of B
    #[arg(long, value_name = "NAME", help_heading = "B, where it is not as A")]
    pub b_range: Vec<String>,
    /// Steps of B
    #[arg(long, value_name = "N|A..B", value_parser = |text: &str| parse_steps(text), help_heading = "B, where it is not as A")]
    pub b_step: Vec<std::ops::Range<u64>>,
    /// Stages of B
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        help_heading = "B, where it is not as A"
    )]
    pub b_stage: Vec<String>,
    /// Modules of B
    #[arg(long, value_name = "GLOB", help_heading = "B, where it is not as A")]
    pub b_scope: Vec<String>,
    /// Ops of B
    #[arg(long, value_name = "GLOB", help_heading = "B, where it is not as A")]
    pub b_op: Vec<String>,
    /// Ranks of B
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        help_heading = "B, where it is not as A"
    )]
    pub b_rank: Vec<u32>,
    /// Modules of B to leave out
    #[arg(long, value_name = "GLOB", help_heading = "B, where it is not as A")]
    pub b_exclude: Vec<String>,
    /// Number of samples of B
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "B, where it is not as A")]
    pub b_samples: Option<u64>,
}

fn renamed(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() => Ok((a.to_owned(), b.to_owned())),
        _ => Err("two modules with = between; for example Net.lif1=Net.relu1".to_owned()),
    }
}

impl OtherOptions {
    fn is_empty(&self) -> bool {
        let Self {
            b_rules,
            b_range,
            b_step,
            b_stage,
            b_scope,
            b_op,
            b_rank,
            b_exclude,
            b_samples,
        } = self;
        b_rules.is_none()
            && b_range.is_empty()
            && b_step.is_empty()
            && b_stage.is_empty()
            && b_scope.is_empty()
            && b_op.is_empty()
            && b_rank.is_empty()
            && b_exclude.is_empty()
            && b_samples.is_none()
    }

    /// The request of B, from that of A.
    fn request(&self, a: &Request) -> Request {
        fn or<T: Clone>(of_b: &[T], of_a: &[T]) -> Vec<T> {
            if of_b.is_empty() { of_a } else { of_b }.to_vec()
        }
        let globs =
            |texts: &[String]| -> Vec<Glob> { texts.iter().map(|text| Glob::new(text)).collect() };
        let mut request = a.clone();
        let selection = &mut request.selection;
        selection.ranges = or(&self.b_range, &selection.ranges);
        selection.steps = or(&self.b_step, &selection.steps);
        selection.stages = or(&self.b_stage, &selection.stages);
        selection.scopes = or(&globs(&self.b_scope), &selection.scopes);
        selection.ops = or(&globs(&self.b_op), &selection.ops);
        selection.ranks = or(&self.b_rank, &selection.ranks);
        selection.exclude = or(&globs(&self.b_exclude), &selection.exclude);
        request.samples = self.b_samples.or(request.samples);
        request
    }
}

impl Options {
    fn request(&self) -> anyhow::Result<Request> {
        let costs = self
            .costs
            .iter()
            .map(|path| CostFile::read(path))
            .collect::<Result<Vec<_>, _>>()?;
        let asks_energy = !self.energy.is_empty() || (!costs.is_empty() && !self.all);
        Ok(Request {
            selection: self.selection.selection(),
            counters: wanted(&self.counters, asks_energy, self.all),
            energy: wanted(
                &self.energy,
                !self.counters.is_empty() || asks_energy,
                self.all,
            ),
            costs,
            per: self.per.per(),
            samples: self.samples,
            lenient: self.lenient,
            threads: self
                .threads
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(0),
            ..Request::default()
        })
    }
}

/// Compares.
///
/// # Errors
/// As [`diff`]; where B is nowhere other than A; where the result cannot be written; and where a limit is passed.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    if options.b.is_none() && options.other.is_empty() {
        return Err(Failure::usage(
            "there is nothing to compare: name a second trace, or say by --b-rules, --b-range, --b-step, --b-stage, --b-scope, --b-op or \
             --b-exclude what else to look at",
        )
        .into());
    }
    let rules = RuleSet::named(&options.rules)?;
    let other_rules = match &options.other.b_rules {
        Some(name) => RuleSet::named(name)?,
        None => RuleSet::named(&options.rules)?,
    };
    let request = options.request()?;
    let other_request = options.other.request(&request);
    let open = |first: &PathBuf, parts: &[PathBuf]| {
        let files: Vec<&PathBuf> = std::iter::once(first).chain(parts).collect();
        Traces::open(&files)
    };
    let traces = open(&options.a, &options.a_part)?;
    let other_traces = match &options.b {
        Some(b) => Some(open(b, &options.b_part)?),
        None => None,
    };
    let a = Side {
        traces: &traces,
        rules: &rules,
        request: &request,
    };
    let b = Side {
        traces: other_traces.as_ref().unwrap_or(&traces),
        rules: &other_rules,
        request: &other_request,
    };
    let compared = diff(
        a,
        b,
        &DiffOptions {
            by: options.by.by(),
            map: options.map.clone(),
            limits: options.fail_over.clone(),
            limit_rows: options.fail_rows,
        },
    )?;
    let mut text = Vec::new();
    compared.write(options.format.format(), &mut text)?;
    options.output.write_all(&text)?;
    if compared.exceeded.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let lines: Vec<String> = compared.exceeded.iter().map(|e| e.text()).collect();
    Err(Failure {
        code: exit::VIOLATED,
        message: lines.join("\noptape: "),
    }
    .into())
}
