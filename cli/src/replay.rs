//! `optape replay TRACE...`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum, ValueHint};
use optape_replay::energy::{Assignment, CostFile};
use optape_replay::rules::RuleSet;
use optape_replay::sweep::{Axis, Sweep, sweep};
use optape_replay::{
    By, Format, Glob, Per, Request, Selection, Traces, Wanted, evaluate, explain, parse_steps,
};

use crate::exit;
use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape replay`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  optape replay train.optape
      Coverage, counters, energy of arithmetic, and firing rates of the whole run.
  optape replay train.optape --range measure --rules spikingjelly-2.0.0 --all --format json
      What SpikingJelly 2.0.0 would have counted inside record_function(\"measure\").
  optape replay train.optape --stage forward --by module --per sample
      Work of each layer's forward pass, per image.
  optape replay train.optape --energy compute_bits --sweep bits=4,8,16 --format csv
      The energy under each of several costs; one row each.
  optape replay train.optape --explain aten::convolution --scope Net.conv1
      Which rule gave which number, with the formula filled in.
  optape replay train.optape --energy compute_bits --set bits=4
      The energy with another cost than the preset's (optape presets --keys lists what can be set).

Exit codes: 0 done, 2 usage, 3 ops without a rule under --strict, 4 the trace lacks a level that was asked for, \
5 no trace or a damaged one.")]
pub struct Options {
    /// Trace files; several of one run are replayed together
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub traces: Vec<PathBuf>,

    /// The rule set: a built-in one (`optape rules`), or a TOML file of your own
    #[arg(
        long,
        value_name = "NAME|FILE",
        default_value = "optape",
        env = "OPTAPE_RULES",
        help_heading = "What to compute"
    )]
    pub rules: String,
    /// Counters, separated by commas: flop, memory_access, mac, ac, synop, and others of the rule set (`optape rules`)
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        help_heading = "What to compute"
    )]
    pub counters: Vec<String>,
    /// Energy presets, separated by commas: compute_fp32, compute_fp16, compute_int8, and others of the rule set (`optape presets`)
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        help_heading = "What to compute"
    )]
    pub energy: Vec<String>,
    /// An energy model with the costs of a TOML file (`optape presets compute_fp32` prints one to start from)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "What to compute")]
    pub costs: Vec<PathBuf>,
    /// Set a cost or a setting of energy models and counters (`optape presets --keys`): e_mac_pj=5, lemaire.e_add_pj=80fJ, sram_kib=64
    #[arg(long, value_name = "KEY=VALUE", value_parser = |text: &str| Assignment::parse(text), help_heading = "What to compute")]
    pub set: Vec<Assignment>,
    /// Go through values of a cost or a setting, one row for each combination: bits=4,8,16, sram_kib=8..1024:log:16, e_mac_pj=0..5:lin:11
    #[arg(long, value_name = "KEY=VALUES", value_parser = |text: &str| Axis::parse(text), conflicts_with_all = ["by", "explain"], help_heading = "What to compute")]
    pub sweep: Vec<Axis>,
    /// Columns of a sweep, of all figures that its estimators have [default: totals and their parts]
    #[arg(long, value_name = "GLOBS", value_delimiter = ',', requires = "sweep", help_heading = "What to compute")]
    pub columns: Vec<String>,
    /// Run a large sweep (more than 100 000 configurations, or a minute of simulations) without being asked
    #[arg(long, requires = "sweep", help_heading = "What to compute")]
    pub yes: bool,
    /// Everything that the rule set has; what the trace or the rules refuse is listed with the reason
    #[arg(long, conflicts_with_all = ["counters", "energy"], help_heading = "What to compute")]
    pub all: bool,
    /// Show op by op which rule gave which number, for an op or a scope
    #[arg(long, value_name = "OP|SCOPE", conflicts_with_all = ["by", "per", "energy", "costs"], help_heading = "What to compute")]
    pub explain: Option<String>,

    /// Ops inside of ranges of this name (record_function), all occurrences
    #[arg(long, value_name = "NAME", help_heading = "Selection")]
    pub range: Vec<String>,
    /// Steps: 5, 5..10 (without 10), 5..=10, 5.., ..10
    #[arg(long, value_name = "N|A..B", value_parser = |text: &str| parse_steps(text), help_heading = "Selection")]
    pub step: Vec<std::ops::Range<u64>>,
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

    /// Group
    #[arg(long, value_name = "WHAT", help_heading = "Presentation")]
    pub by: Option<Grouping>,
    /// Divide totals
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "run",
        help_heading = "Presentation"
    )]
    pub per: Divisor,
    /// Number of samples, where the program did not report it (with --per sample)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Presentation")]
    pub samples: Option<u64>,
    /// How to write the report
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

    /// Ops without a rule are an error (exit 3)
    #[arg(long, help_heading = "Strictness and reading")]
    pub strict: bool,
    /// Where a level is missing, count the rest and mark the total as partial
    #[arg(long, help_heading = "Strictness and reading")]
    pub lenient: bool,
    /// Read every event, also where the trace's summaries would do
    #[arg(long, help_heading = "Strictness and reading")]
    pub from_events: bool,
    /// Threads that read events [default: one per processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Strictness and reading")]
    pub threads: Option<u64>,
}

/// Values of `--by`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Grouping {
    /// Modules with everything inside
    Scope,
    /// Overloads
    Op,
    /// Stages
    Stage,
    /// Steps
    Step,
    /// Modules without what is inside of other modules; the rows add up
    Module,
}

/// Values of `--per`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Divisor {
    /// By nothing
    Run,
    /// By the selected steps
    Step,
    /// By the samples (images) that the program reported
    Sample,
    /// By the calls of the root module, or of each group's module
    Call,
}

/// Values of `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// For people
    Table,
    /// Exact and complete
    Json,
    /// For spreadsheets
    Csv,
    /// For documents
    Markdown,
}

impl ReportFormat {
    const fn format(self) -> Format {
        match self {
            Self::Table => Format::Table,
            Self::Json => Format::Json,
            Self::Csv => Format::Csv,
            Self::Markdown => Format::Markdown,
        }
    }
}

impl Options {
    fn request(&self) -> anyhow::Result<Request> {
        let globs = |texts: &[String]| texts.iter().map(|text| Glob::new(text)).collect();
        let costs = self
            .costs
            .iter()
            .map(|path| CostFile::read(path))
            .collect::<Result<Vec<_>, _>>()?;
        // Naming one kind of estimator asks for that kind alone.
        let named = |names: &[String], others: bool| match (names.is_empty(), others) {
            (true, false) if self.all => Wanted::All,
            (true, false) => Wanted::Usual,
            (true, true) => Wanted::Named(Vec::new()),
            (false, _) => {
                let mut unique: Vec<String> = Vec::new();
                for name in names.iter().map(|name| name.trim()) {
                    if !unique.iter().any(|n| n == name) {
                        unique.push(name.to_owned());
                    }
                }
                Wanted::Named(unique)
            }
        };
        let asks_energy = !self.energy.is_empty() || (!costs.is_empty() && !self.all);
        Ok(Request {
            selection: Selection {
                ranges: self.range.clone(),
                steps: self.step.clone(),
                stages: self.stage.clone(),
                scopes: globs(&self.scope),
                ops: globs(&self.op),
                ranks: self.rank.clone(),
                exclude: globs(&self.exclude),
            },
            counters: named(&self.counters, asks_energy),
            energy: named(&self.energy, !self.counters.is_empty() || asks_energy),
            costs,
            settings: self.set.clone(),
            by: self.by.map(|by| match by {
                Grouping::Scope => By::Scope,
                Grouping::Op => By::Op,
                Grouping::Stage => By::Stage,
                Grouping::Step => By::Step,
                Grouping::Module => By::Module,
            }),
            per: match self.per {
                Divisor::Run => Per::Run,
                Divisor::Step => Per::Step,
                Divisor::Sample => Per::Sample,
                Divisor::Call => Per::Call,
            },
            samples: self.samples,
            lenient: self.lenient,
            from_events: self.from_events,
            threads: self
                .threads
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(0),
        })
    }
}

/// Replays.
///
/// # Errors
/// As [`evaluate`], and where the report cannot be written.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let rules = RuleSet::load(&options.rules)?;
    let request = options.request()?;
    let traces = Traces::open(&options.traces)?;
    // The report is made before the output is touched: there are no half-written ones.
    let mut text = Vec::new();
    if !options.sweep.is_empty() {
        return run_sweep(options, global, &traces, &rules, &request);
    }
    if let Some(target) = &options.explain {
        let explanation = explain(&traces, &rules, &request, target)?;
        match options.format {
            ReportFormat::Json => explanation.write_json(&mut text)?,
            ReportFormat::Table | ReportFormat::Markdown => explanation.write_text(&mut text)?,
            ReportFormat::Csv => {
                return Err(exit::Failure::usage(
                    "--explain is written as table or json; choose one with --format",
                )
                .into());
            }
        }
        options.output.write_all(&text)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = evaluate(&traces, &rules, &request)?;
    let format = options.format.format();
    report.write(format, &mut text)?;
    options.output.write_all(&text)?;
    if !global.quiet && (format != Format::Table || options.output.output.is_some()) {
        for note in &report.notes {
            tracing::warn!("{note}");
        }
    }
    if options.strict && !report.is_complete() {
        let ops: std::collections::BTreeSet<&str> = report
            .coverage
            .counters
            .values()
            .flat_map(|c| c.unknown_ops.keys().map(String::as_str))
            .collect();
        let message = format!(
            "incomplete coverage (--strict): {} has no rule for {}",
            report.rules.name,
            ops.into_iter().collect::<Vec<_>>().join(", ")
        );
        return Err(exit::Failure {
            code: exit::INCOMPLETE,
            message,
        }
        .into());
    }
    Ok(ExitCode::SUCCESS)
}

fn run_sweep(
    options: &Options,
    global: &GlobalOptions,
    traces: &Traces,
    rules: &RuleSet,
    request: &Request,
) -> anyhow::Result<ExitCode> {
    let wanted = Sweep {
        axes: options.sweep.clone(),
        columns: options.columns.iter().map(|text| Glob::new(text)).collect(),
    };
    let report = sweep(traces, rules, request, &wanted, &mut |estimate| {
        if estimate.is_worth_telling() && !global.quiet {
            // Where nobody reads it, it is not needed.
            let _ = writeln!(std::io::stderr(), "optape: {estimate}");
        }
        options.yes || !estimate.is_large()
    })?;
    let mut text = Vec::new();
    report.write(options.format.format(), &mut text)?;
    options.output.write_all(&text)?;
    if !global.quiet && options.format != ReportFormat::Table {
        for (what, why) in &report.skipped {
            tracing::warn!("left out: {what}: {why}");
        }
        for note in &report.notes {
            tracing::warn!("{note}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
