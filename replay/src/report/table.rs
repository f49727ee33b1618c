//! The report for people: a few tables, in the order of the questions that they answer.

use std::collections::BTreeMap;
use std::io::Write;

use super::section::{Rows, Section, write_text};
use super::{Measured, Report, numbers};
use crate::energy::EnergyReport;
use crate::error::ReplayError;

pub(super) fn write(report: &Report, out: &mut dyn Write) -> Result<(), ReplayError> {
    Ok(write_text(&sections(report), out)?)
}

pub(super) fn sections(report: &Report) -> Vec<Section> {
    let mut sections = vec![head(report)];
    sections.push(coverage(report));
    match &report.groups {
        Some(_) => sections.extend(groups(report)),
        None => {
            if !report.counters.is_empty() {
                sections.push(counters(report));
            }
            if !report.energy.is_empty() {
                sections.push(energy(report));
            }
        }
    }
    sections.extend(basis(report));
    sections.extend(measured(report));
    if !report.firing_rates.is_empty() {
        sections.push(firing(report));
    }
    if !report.skipped.is_empty() {
        sections.push(Section {
            title: "Not computed".to_owned(),
            rows: None,
            lines: report
                .skipped
                .iter()
                .map(|(name, why)| format!("{name}: {why}"))
                .collect(),
        });
    }
    sections
}

fn head(report: &Report) -> Section {
    let mut lines = Vec::new();
    for source in &report.trace {
        lines.push(format!("trace      {}", source.path));
        if !source.command.is_empty() {
            lines.push(format!("command    {}", source.command.join(" ")));
        }
        if source.end != "clean" {
            lines.push(format!("end        {}", source.end));
        }
    }
    let records: u64 = report.streams.iter().map(|s| s.op_calls).sum();
    lines.push(format!(
        "processes  {} with {} op calls",
        report.streams.len(),
        numbers::grouped(i128::from(records))
    ));
    lines.push(format!(
        "rules      {} (version {})",
        report.rules.name, report.rules.version
    ));
    let selection = report.selection.text();
    lines.push(format!(
        "selection  {}",
        if selection.is_empty() {
            "everything"
        } else {
            &selection
        }
    ));
    if let Some(per) = &report.per {
        lines.push(format!(
            "per        {} ({} of them)",
            per.unit,
            numbers::grouped(i128::from(per.divisor))
        ));
    }
    if let Some(per) = &report.per_sample {
        let samples = numbers::grouped(i128::from(per.divisor));
        lines.push(format!("samples    {samples}"));
    }
    lines.extend(report.notes.iter().map(|note| format!("note       {note}")));
    Section {
        title: "Replay".to_owned(),
        rows: None,
        lines,
    }
}

fn coverage(report: &Report) -> Section {
    let coverage = &report.coverage;
    let head = [
        "counter",
        "counted",
        "zero by rule",
        "unknown",
        "no statistics",
        "covered",
    ]
    .map(str::to_owned)
    .to_vec();
    let calls = |n: u64| numbers::grouped(i128::from(n));
    let body = coverage
        .counters
        .iter()
        .map(|(name, c)| {
            vec![
                name.to_owned(),
                calls(c.counted),
                calls(c.zero_by_rule),
                calls(c.unknown),
                calls(c.without_statistics + c.failed),
                numbers::percent(c.share),
            ]
        })
        .collect();
    let mut lines = vec![format!(
        "{} op calls selected; {} without a module, {} not executed, {} records lost",
        calls(coverage.op_calls),
        calls(coverage.unattributed),
        calls(coverage.not_executed),
        calls(coverage.dropped_records)
    )];
    let mut unknown: Vec<(Vec<&str>, &BTreeMap<String, u64>)> = Vec::new();
    for (name, c) in coverage
        .counters
        .iter()
        .filter(|(_, c)| !c.unknown_ops.is_empty())
    {
        match unknown.iter_mut().find(|(_, ops)| **ops == c.unknown_ops) {
            Some((names, _)) => names.push(name),
            None => unknown.push((vec![name], &c.unknown_ops)),
        }
    }
    for (names, ops) in unknown {
        lines.push(format!(
            "no rule in {} for {}",
            names.join(", "),
            numbers::frequent(ops)
        ));
    }
    if let Some(regions) = coverage.opaque_regions.filter(|regions| *regions > 0) {
        lines.push(format!(
            "{} regions ran outside of the dispatcher (compiled code, CUDA graphs): their work is in no figure",
            calls(regions)
        ));
    }
    let rows = (!coverage.counters.is_empty()).then_some(Rows {
        head,
        body,
        texts: &[0],
    });
    Section {
        title: "Coverage, in op calls".to_owned(),
        rows,
        lines,
    }
}

fn counters(report: &Report) -> Section {
    let mut head = vec![
        "counter".to_owned(),
        "total".to_owned(),
        "unit".to_owned(),
        "about".to_owned(),
    ];
    if let Some(per) = &report.per {
        head.push(format!("per {}", per.unit));
    }
    let body = report
        .counters
        .iter()
        .map(|(name, c)| {
            #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
            let about = numbers::scaled(c.total as f64, "");
            let total = format!(
                "{}{}",
                numbers::grouped(c.total),
                if c.partial { " (partial)" } else { "" }
            );
            let mut row = vec![name.to_owned(), total, c.unit.clone(), about];
            if let Some(per) = &report.per {
                row.push(
                    per.counters
                        .get(name)
                        .copied()
                        .map(numbers::mean)
                        .unwrap_or_default(),
                );
            }
            row
        })
        .collect();
    Section {
        title: "Counters".to_owned(),
        rows: Some(Rows {
            head,
            body,
            texts: &[0, 2],
        }),
        lines: Vec::new(),
    }
}

/// So many costs fit into a line.
const FEW_COSTS: usize = 4;

fn energy(report: &Report) -> Section {
    let mut head = ["model", "total", "mac", "ac", "costs"]
        .map(str::to_owned)
        .to_vec();
    let divided = report.per.as_ref().or(report.per_sample.as_ref());
    if let Some(per) = divided {
        head.insert(2, format!("per {}", per.unit));
    }
    let mut lines = Vec::new();
    let body = report
        .energy
        .iter()
        .map(|(name, e)| {
            let costs: Vec<String> = e
                .config
                .iter()
                .map(|(key, cost)| format!("{key} {cost}"))
                .collect();
            let part = |name| e.quantity(name).map(numbers::energy).unwrap_or_default();
            let mut row = vec![
                name.to_owned(),
                numbers::energy(e.total_pj),
                part("energy_mac_pj"),
                part("energy_ac_pj"),
                if costs.len() <= FEW_COSTS {
                    costs.join(", ")
                } else {
                    format!("{} costs and settings, in the JSON", costs.len())
                },
            ];
            if let Some(per) = divided {
                row.insert(
                    2,
                    per.energy_total_pj
                        .get(name)
                        .copied()
                        .map(numbers::energy)
                        .unwrap_or_default(),
                );
            }
            lines.extend(e.warnings.iter().map(|w| format!("{name}: {w}")));
            row
        })
        .collect();
    if let Some(first) = report.energy.values().next() {
        lines.insert(0, format!("modelled, not measured; {}", first.boundary));
    }
    let texts: &[usize] = if divided.is_some() { &[0, 5] } else { &[0, 4] };
    Section {
        title: "Energy".to_owned(),
        rows: Some(Rows { head, body, texts }),
        lines,
    }
}

/// Counters and energies stand in tables of their own: together they do not fit into 80 columns.
/// What a figure is worth nothing without: which estimator, which stages, which costs, and how sparse the input was.
fn basis(report: &Report) -> Option<Section> {
    let basis = &report.basis;
    let mut body = Vec::new();
    if !report.counters.is_empty() {
        body.push(vec![
            "counters".to_owned(),
            format!("{} (version {})", report.rules.name, report.rules.version),
            basis.extent.clone(),
            "-".to_owned(),
        ]);
    }
    for (name, figure) in basis.figures.iter() {
        if let Some(name) = name.strip_prefix("energy/") {
            body.push(vec![
                name.to_owned(),
                figure.estimator.clone(),
                figure.stages.clone(),
                figure.regime.clone().unwrap_or_else(|| "-".to_owned()),
            ]);
        }
    }
    let lines = basis.input_lines();
    (!body.is_empty() || !lines.is_empty()).then(|| Section {
        title: "What the figures are".to_owned(),
        rows: (!body.is_empty()).then(|| Rows {
            head: ["figure", "estimator", "stages", "costs"]
                .map(str::to_owned)
                .to_vec(),
            body,
            texts: &[0, 1, 2, 3],
        }),
        lines,
    })
}

fn groups(report: &Report) -> Vec<Section> {
    let by = report.by.as_deref().unwrap_or("group");
    let groups = report.groups.as_deref().unwrap_or_default();
    let adds_up = by != "scope";
    let divided = groups.iter().any(|g| g.per.is_some());
    let unit = report
        .per
        .as_ref()
        .filter(|_| divided)
        .map(|per| format!(", per {}", per.unit))
        .unwrap_or_default();
    let total = [
        "total".to_owned(),
        numbers::grouped(i128::from(report.coverage.op_calls)),
    ];
    let section = |what: &str, names: Vec<String>, cells: &dyn Fn(Option<usize>) -> Vec<String>| {
        let mut body: Vec<Vec<String>> = groups
            .iter()
            .enumerate()
            .map(|(at, group)| {
                let mut row = vec![group.key.clone(), numbers::grouped(i128::from(group.calls))];
                row.extend(cells(Some(at)));
                row
            })
            .collect();
        if adds_up {
            body.push(total.iter().cloned().chain(cells(None)).collect());
        }
        Section {
            title: format!("{what} by {by}{unit}"),
            rows: Some(Rows {
                head: [by.to_owned(), "calls".to_owned()]
                    .into_iter()
                    .chain(names)
                    .collect(),
                body,
                texts: &[0],
            }),
            lines: Vec::new(),
        }
    };
    let mut sections = Vec::new();
    if !report.counters.is_empty() {
        let names = report
            .counters
            .iter()
            .map(|(name, _)| name.to_owned())
            .collect();
        // The cells of a group, or of the total.
        let cells = |at: Option<usize>| -> Vec<String> {
            let group = at.and_then(|at| groups.get(at));
            let per = group.map_or(&report.per, |group| &group.per);
            match (per, group) {
                (Some(per), _) => per.counters.values().map(|v| numbers::mean(*v)).collect(),
                (None, Some(group)) => group
                    .counters
                    .values()
                    .map(|c| numbers::grouped(c.total))
                    .collect(),
                (None, None) => report
                    .counters
                    .values()
                    .map(|c| numbers::grouped(c.total))
                    .collect(),
            }
        };
        let mut counters = section("Counters", names, &cells);
        let units = report
            .counters
            .iter()
            .map(|(name, c)| format!("{name} in {}", c.unit));
        counters.lines.push(units.collect::<Vec<_>>().join(", "));
        sections.push(counters);
    }
    if !report.energy.is_empty() {
        let names = report
            .energy
            .iter()
            .map(|(name, _)| name.to_owned())
            .collect();
        let cells = |at: Option<usize>| -> Vec<String> {
            let group = at.and_then(|at| groups.get(at));
            let per = group.map_or(&report.per, |group| &group.per);
            let total = |e: &EnergyReport| numbers::energy(e.total_pj);
            match (per, group) {
                (Some(per), _) => per
                    .energy_total_pj
                    .values()
                    .map(|v| numbers::energy(*v))
                    .collect(),
                (None, Some(group)) => group.energy.values().map(total).collect(),
                (None, None) => report.energy.values().map(total).collect(),
            }
        };
        let mut energy = section("Energy", names, &cells);
        energy
            .lines
            .push("energies are modelled, not measured".to_owned());
        sections.push(energy);
    }
    if !adds_up && let Some(last) = sections.last_mut() {
        last.lines
            .push("a call counts in every module on its stack; the rows do not add up".to_owned());
    }
    sections
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 || s <= 0.0 => numbers::scaled(s, "s"),
        s if s >= 1e-3 => numbers::scaled(s * 1e3, "ms"),
        s => numbers::scaled(s * 1e6, "us"),
    }
}

fn joules(value: Option<&f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(joules) if joules.abs() >= 1.0 => numbers::scaled(*joules, "J"),
        Some(joules) => numbers::energy(joules * 1e12),
    }
}

/// What sensors measured: a row per device, or with groups by time a row per group and a column per device.
fn measured(report: &Report) -> Vec<Section> {
    let Some(hardware) = report.monitors.as_ref().map(|m| &m.hardware) else {
        return Vec::new();
    };
    let Some(total) = &hardware.measured else {
        return Vec::new();
    };
    let mut sections = Vec::new();
    let mut devices: Vec<&str> = Vec::new();
    for values in [
        &total.energy_j,
        &total.mean_power_w,
        &total.peak_memory_bytes,
    ] {
        for (device, _) in values.iter() {
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
    }
    if devices.is_empty() {
        return sections;
    }
    let cell = |value: Option<&f64>, unit| {
        value.map_or_else(|| "-".to_owned(), |v| numbers::scaled(*v, unit))
    };
    let mut lines = vec![format!(
        "{}; {} looked at",
        hardware.boundary,
        time(total.seconds)
    )];
    if total.uncovered_seconds > 0.0 {
        lines.push(format!(
            "{} of it without samples: what was used then is in no figure",
            time(total.uncovered_seconds)
        ));
    }
    for (part, whole) in hardware.part_of.iter() {
        lines.push(format!("{part} is a part of {whole}"));
    }
    if let Some(made_up) = hardware.facts.get(optape_trace::series::facts::SIMULATED) {
        lines.push(format!(
            "SIMULATED: {}",
            made_up.as_str().unwrap_or("made-up values")
        ));
    }
    let mut head = vec!["device", "energy", "mean power", "peak memory"]
        .into_iter()
        .map(str::to_owned)
        .collect::<Vec<_>>();
    if let Some(per) = &report.per {
        head.insert(2, format!("per {}", per.unit));
    }
    let body = devices
        .iter()
        .map(|device| {
            let mut row = vec![
                (*device).to_owned(),
                joules(total.energy_j.get(device)),
                cell(total.mean_power_w.get(device), "W"),
                cell(total.peak_memory_bytes.get(device), "B"),
            ];
            if let Some(per) = &report.per {
                row.insert(2, joules(per.measured_j.get(device)));
            }
            row
        })
        .collect();
    sections.push(Section {
        title: "Measured".to_owned(),
        rows: Some(Rows {
            head,
            body,
            texts: &[0],
        }),
        lines,
    });
    let groups = report.groups.as_deref().unwrap_or_default();
    let energies: Vec<&str> = total.energy_j.iter().map(|(device, _)| device).collect();
    if groups.iter().any(|g| g.measured.is_some()) && !energies.is_empty() {
        let by = report.by.as_deref().unwrap_or("group");
        let row = |key: &str, measured: &Measured| {
            let mut row = vec![key.to_owned(), time(measured.seconds)];
            row.extend(
                energies
                    .iter()
                    .map(|device| joules(measured.energy_j.get(device))),
            );
            row
        };
        let mut body: Vec<Vec<String>> = groups
            .iter()
            .filter_map(|group| Some(row(&group.key, group.measured.as_ref()?)))
            .collect();
        body.push(row("total", total));
        sections.push(Section {
            title: format!("Measured energy by {by}"),
            rows: Some(Rows {
                head: [by, "time"]
                    .iter()
                    .chain(&energies)
                    .map(|s| (*s).to_owned())
                    .collect(),
                body,
                texts: &[0],
            }),
            lines: Vec::new(),
        });
    }
    sections
}

fn firing(report: &Report) -> Section {
    // A column that says nothing of any layer only makes the table wider than a terminal.
    let timed = report
        .firing_rates
        .iter()
        .any(|layer| layer.time_steps.is_some());
    let mut head = vec![
        "layer", "class", "output", "calls", "spikes", "elements", "rate",
    ];
    if timed {
        head.insert(4, "steps");
    }
    let big = |n: u128| numbers::grouped(i128::try_from(n).unwrap_or(i128::MAX));
    let body = report
        .firing_rates
        .iter()
        .map(|layer| {
            let class = layer
                .class
                .rsplit('.')
                .next()
                .unwrap_or_default()
                .to_owned();
            let rate = match layer.rate {
                Some(rate) => format!("{rate:.4}"),
                None if layer.without_statistics > 0 => "no statistics".to_owned(),
                None => "not binary".to_owned(),
            };
            let mut row = vec![
                layer.module.clone(),
                class,
                format!("{:?}", layer.shape),
                numbers::grouped(i128::from(layer.calls)),
                big(layer.spikes),
                big(layer.elements),
                rate,
            ];
            if timed {
                let steps = layer.time_steps.map(|t| numbers::grouped(i128::from(t)));
                row.insert(4, steps.unwrap_or_else(|| "-".to_owned()));
            }
            row
        })
        .collect();
    let head = head.into_iter().map(str::to_owned).collect();
    Section {
        title: "Firing rates (spikes per neuron and time step)".to_owned(),
        rows: Some(Rows {
            head,
            body,
            texts: &[0, 1, 2],
        }),
        lines: Vec::new(),
    }
}
