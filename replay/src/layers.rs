//! Estimators of layers and models (sinabs, Qualia): which are asked for, and their reports.
//!
//! They are functions of one [`Network`], which one pass over the stream gives, so that further costs and settings cost next to nothing.

use std::collections::BTreeMap;

use optape_trace::ModuleId;

use crate::energy::{CostFile, Figure, PRESETS, Section};
use crate::error::ReplayError;
use crate::evaluate::{Extra, Followed, Refusal, Request, UNGROUPED, Wanted, follow};
use crate::load::Traces;
use crate::network::{Following, GraphOptions, GraphReport, Network};
use crate::ordered::Simulation;
use crate::report::Ordered;
use crate::report::layers::{About, LayerReport, LayerSection};
use crate::report::{SelectionInfo, SourceInfo};
use crate::rules::{RULE_SETS, RuleError, RuleSet};
use crate::selection::Selection;
use crate::{qualia, sinabs};

/// An estimator, and whether it was asked for by name.
pub(crate) struct Asked {
    pub(crate) file: CostFile,
    pub(crate) by_name: bool,
}

impl Asked {
    /// As `skipped` names it.
    pub(crate) fn label(&self) -> String {
        let (section, name) = self.file.place();
        format!("{}/{name}", section.label())
    }
}

impl Asked {
    /// What it is a configuration of: `qualia/energy`, `sinabs/analyzer`.
    pub(crate) fn kind(&self) -> String {
        match self.file.place().0 {
            section @ (Section::QualiaEnergy | Section::QualiaOperations) => {
                section.label().to_owned()
            }
            _ => self.label(),
        }
    }
}

/// What follows a stream for them.
pub(crate) fn simulation(rank: Option<u32>) -> Box<dyn Simulation> {
    Box::new(Following::of_rank(rank))
}

/// What a request asks for.
///
/// # Errors
/// Where a name is not known, or given twice.
pub(crate) fn asked(rules: &RuleSet, request: &Request) -> Result<Vec<Asked>, ReplayError> {
    let mut all: Vec<Asked> = Vec::new();
    for (set, wanted) in [
        (sinabs::RULES, &request.sinabs),
        (qualia::RULES, &request.qualia),
    ] {
        let presets = || PRESETS.iter().filter(move |preset| preset.rules == Some(set));
        let own = rules.name == set;
        // Rule sets of SpikingJelly and of optape say nothing of them.
        let others = !own && rules.counters.is_empty();
        match wanted {
            Wanted::Usual if own => {
                for preset in presets() {
                    all.push(Asked {
                        file: preset.costs()?,
                        by_name: false,
                    });
                }
            }
            Wanted::All if !others => {
                for preset in presets() {
                    all.push(Asked {
                        file: preset.costs()?,
                        by_name: false,
                    });
                }
            }
            Wanted::Usual | Wanted::All => {}
            Wanted::Named(names) => {
                for name in names {
                    let preset = presets().find(|preset| preset.name == name).ok_or_else(|| {
                        ReplayError::unknown_name(
                            "estimator",
                            name,
                            presets().map(|preset| preset.name),
                        )
                    })?;
                    all.push(Asked {
                        file: preset.costs()?,
                        by_name: true,
                    });
                }
            }
        }
    }
    for file in &request.costs {
        if file.place().0 != Section::Energy {
            all.push(Asked {
                file: file.clone(),
                by_name: true,
            });
        }
    }
    for (at, one) in all.iter().enumerate() {
        if all.iter().skip(at + 1).any(|other| other.label() == one.label()) {
            return Err(ReplayError::Selection(format!(
                "two estimators are named '{}'; give the cost file another `name`",
                one.label()
            )));
        }
    }
    Ok(all)
}

/// The network that estimators are about, and its root.
///
/// # Errors
/// Where there is none, or several.
pub(crate) fn network(followed: &Followed) -> Result<(&Network, ModuleId), RuleError> {
    let mut networks = followed.networks();
    let Some(network) = networks.next() else {
        return Err(RuleError::Failed(
            "the selection holds no call of a module".to_owned(),
        ));
    };
    let others = networks.count();
    if others > 0 {
        return Err(RuleError::Failed(format!(
            "{} processes call modules; choose one with --rank",
            others + 1
        )));
    }
    let root = network
        .root()
        .ok_or_else(|| RuleError::Failed("the selection holds no call of a module".to_owned()))?;
    Ok((network, root))
}

/// The layer graph of the model in a selection: which layers feed which, with shapes, parameters and rates.
///
/// # Errors
/// Where the trace cannot be read or lacks a level, or the selection holds no whole call of a module.
pub fn graph(
    traces: &Traces,
    selection: &Selection,
    options: GraphOptions,
) -> Result<GraphReport, ReplayError> {
    let needed = !selection.is_whole_run();
    let timelines = traces.timelines(needed, &selection.ranges)?;
    selection.check(traces, &timelines)?;
    let request = Request {
        selection: selection.clone(),
        ..Request::default()
    };
    // Which rules name the ops plays no part.
    let rules = RuleSet::named(RULE_SETS[0])?;
    let mut extras = [Extra::modules()];
    follow(traces, &rules, &request, &timelines, &[], &[], &mut extras)?;
    let [Extra { followed, .. }] = &extras;
    let refuse = |error: RuleError| Refusal::of(&error).error("the layer graph");
    if let Some(error) = followed.errors.first() {
        return Err(refuse(error.clone()));
    }
    let (network, root) = network(followed).map_err(refuse)?;
    GraphReport::of(
        network,
        root,
        options,
        traces.sources.iter().map(SourceInfo::of).collect(),
        SelectionInfo::of(selection),
    )
    .map_err(refuse)
}

/// A report, or why there is none.
///
/// # Errors
/// As the original fails, or where the trace lacks a level.
pub(crate) fn report(
    file: &CostFile,
    followed: &Followed,
    lenient: bool,
) -> Result<LayerReport, RuleError> {
    if let Some(error) = followed.errors.first() {
        return Err(error.clone());
    }
    let (network, root) = network(followed)?;
    match file.place().0 {
        Section::Sinabs => sinabs::report(network, root, file, lenient),
        Section::QualiaEnergy | Section::QualiaOperations => qualia::report(network, root, file),
        Section::Energy => Err(RuleError::Failed("no estimator of layers".to_owned())),
    }
}

/// All reports by section.
#[derive(Debug, Default)]
pub(crate) struct Sections {
    pub(crate) sinabs: Option<LayerSection>,
    pub(crate) qualia: Option<LayerSection>,
    pub(crate) skipped: BTreeMap<String, String>,
}

/// Evaluates what is asked.
///
/// # Errors
/// Where one that was asked for by name cannot be computed.
pub(crate) fn evaluate(
    asked: &[Asked],
    followed: Option<&Followed>,
    request: &Request,
) -> Result<Sections, ReplayError> {
    let mut sections = Sections::default();
    let Some(followed) = followed else {
        return Ok(sections);
    };
    let unsuited = if request.by.is_some() {
        Some(UNGROUPED)
    } else if request.selection.ops.is_empty() {
        None
    } else {
        Some("it is about layers, which --op does not select; leave it away, or select with --scope")
    };
    let mut done: Vec<(Section, String, LayerReport)> = Vec::new();
    let mut refused: Vec<(Section, String, String)> = Vec::new();
    for one in asked {
        let (section, name) = one.file.place();
        let report = match unsuited {
            Some(why) => Err(RuleError::Failed(why.to_owned())),
            None => report(&one.file, followed, request.lenient),
        };
        match report {
            Ok(report) => done.push((section, name.to_owned(), report)),
            Err(error) if one.by_name => return Err(Refusal::of(&error).error(&one.label())),
            Err(error) => refused.push((section, name.to_owned(), error.to_string())),
        }
    }
    for (section, name, why) in &refused {
        // What is refused in all its configurations, and for one reason, is said once.
        let whole = matches!(section, Section::QualiaEnergy | Section::QualiaOperations)
            && !done.iter().any(|(of, _, _)| of == section)
            && refused.iter().filter(|(of, _, _)| of == section).all(|(_, _, other)| other == why);
        let label = if whole {
            section.label().to_owned()
        } else {
            format!("{}/{name}", section.label())
        };
        sections.skipped.insert(label, why.clone());
    }
    let (mut energy, mut operations) = (Ordered::default(), Ordered::default());
    for (section, name, LayerReport { value, about }) in done {
        match section {
            Section::Sinabs => {
                let of = sections.sinabs.get_or_insert_default();
                of.reports.push(&name, value);
                of.about.push(&name, about);
            }
            Section::QualiaEnergy | Section::QualiaOperations => {
                let (part, values) = if section == Section::QualiaEnergy {
                    ("energy", &mut energy)
                } else {
                    ("operations", &mut operations)
                };
                values.push(&name, value);
                let of: &mut Ordered<About> = &mut sections.qualia.get_or_insert_default().about;
                of.push(&format!("{part}/{name}"), about);
            }
            Section::Energy => {}
        }
    }
    if let Some(qualia) = &mut sections.qualia {
        for (part, values) in [("energy", energy), ("operations", operations)] {
            if !values.is_empty() {
                qualia.reports.push(part, Figure::Map(values));
            }
        }
    }
    Ok(sections)
}
