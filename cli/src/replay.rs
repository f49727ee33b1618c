//! `optape replay TRACE...`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum, ValueHint};
use optape_replay::energy::CostFile;
use optape_replay::rules::RuleSet;
use optape_replay::{By, Format, Per, Request, Traces, Wanted, evaluate, explain};

use crate::exit;
use crate::options::GlobalOptions;
use crate::output::OutputOptions;
use crate::selection::SelectionOptions;

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
  optape replay train.optape --explain aten::convolution --scope Net.conv1
      Which rule gave which number, with the formula filled in.

Exit codes: 0 done, 2 usage, 3 ops without a rule under --strict, 4 the trace lacks a level that was asked for, \
5 no trace or a damaged one.")]
pub struct Options {
    /// Trace files; several of one run are replayed together
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub traces: Vec<PathBuf>,

    /// The rule set
    #[arg(
        long,
        value_name = "NAME",
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
    /// Everything that the rule set has; what the trace or the rules refuse is listed with the reason
    #[arg(long, conflicts_with_all = ["counters", "energy"], help_heading = "What to compute")]
    pub all: bool,
    /// Show op by op which rule gave which number, for an op or a scope
    #[arg(long, value_name = "OP|SCOPE", conflicts_with_all = ["by", "per", "energy", "costs"], help_heading = "What to compute")]
    pub explain: Option<String>,

    /// What to look at.
    #[command(flatten)]
    pub selection: SelectionOptions,

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
    /// Number of samples (images), where the program did not report it
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

impl Grouping {
    /// As replay calls it.
    pub(crate) const fn by(self) -> By {
        match self {
            Self::Scope => By::Scope,
            Self::Op => By::Op,
            Self::Stage => By::Stage,
            Self::Step => By::Step,
            Self::Module => By::Module,
        }
    }
}

/// Values of `--per`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Divisor {
    /// By nothing
    Run,
    /// By the selected steps
    Step,
    /// By the samples (images) that the program reported
    #[value(alias = "image")]
    Sample,
    /// By the calls of the root module, or of each group's module
    Call,
}

impl Divisor {
    /// As replay calls it.
    pub(crate) const fn per(self) -> Per {
        match self {
            Self::Run => Per::Run,
            Self::Step => Per::Step,
            Self::Sample => Per::Sample,
            Self::Call => Per::Call,
        }
    }
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
    /// For papers (needs the package booktabs)
    Latex,
}

impl ReportFormat {
    /// As replay calls it.
    pub(crate) const fn format(self) -> Format {
        match self {
            Self::Table => Format::Table,
            Self::Json => Format::Json,
            Self::Csv => Format::Csv,
            Self::Markdown => Format::Markdown,
            Self::Latex => Format::Latex,
        }
    }
}

/// Naming one kind of estimator (`others`) asks for that kind alone.
pub(crate) fn wanted(names: &[String], others: bool, all: bool) -> Wanted {
    match (names.is_empty(), others) {
        (true, false) if all => Wanted::All,
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
    }
}

impl Options {
    fn request(&self) -> anyhow::Result<Request> {
        let costs = self
            .costs
            .iter()
            .map(|path| CostFile::read(path))
            .collect::<Result<Vec<_>, _>>()?;
        let named = |names: &[String], others: bool| wanted(names, others, self.all);
        let asks_energy = !self.energy.is_empty() || (!costs.is_empty() && !self.all);
        Ok(Request {
            selection: self.selection.selection(),
            counters: named(&self.counters, asks_energy),
            energy: named(&self.energy, !self.counters.is_empty() || asks_energy),
            costs,
            by: self.by.map(Grouping::by),
            per: self.per.per(),
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
    let rules = RuleSet::named(&options.rules)?;
    let request = options.request()?;
    let traces = Traces::open(&options.traces)?;
    // The report is made before the output is touched: there are no half-written ones.
    let mut text = Vec::new();
    if let Some(target) = &options.explain {
        let explanation = explain(&traces, &rules, &request, target)?;
        match options.format {
            ReportFormat::Json => explanation.write_json(&mut text)?,
            ReportFormat::Table | ReportFormat::Markdown => explanation.write_text(&mut text)?,
            ReportFormat::Csv | ReportFormat::Latex => {
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
