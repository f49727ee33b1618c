//! A comparison for people and programs.

use std::collections::BTreeMap;
use std::io::Write;

use super::{Amount, Change, Diff, ENERGY, MEASURED, SideInfo};
use crate::error::ReplayError;
use crate::report::Format;
use crate::report::numbers;
use crate::report::section::{Rows, Section, write_latex, write_markdown, write_text};

impl Diff {
    /// Writes it.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write(&self, format: Format, out: &mut dyn Write) -> Result<(), ReplayError> {
        match format {
            Format::Table => Ok(write_text(&self.sections(), out)?),
            Format::Markdown => Ok(write_markdown(&self.sections(), out)?),
            Format::Latex => Ok(write_latex(&self.sections(), out)?),
            Format::Csv => self.write_csv(out),
            Format::Json => {
                serde_json::to_writer_pretty(&mut *out, self).map_err(std::io::Error::from)?;
                Ok(out.write_all(b"\n")?)
            }
        }
    }

    fn sections(&self) -> Vec<Section> {
        let mut sections = vec![self.head(), self.totals()];
        for total in &self.totals {
            sections.extend(self.rows_of(total));
        }
        sections.extend(self.one_sided());
        sections.extend(self.rates());
        sections.extend(self.ops());
        if !self.not_compared.is_empty() {
            let lines = self.not_compared.iter();
            sections.push(Section::of_lines(
                "Not compared",
                lines.map(|(name, why)| format!("{name}: {why}")).collect(),
            ));
        }
        if !self.exceeded.is_empty() {
            let lines = self.exceeded.iter().map(super::Exceeded::text);
            sections.push(Section::of_lines("Past the limits", lines.collect()));
        }
        sections
    }

    fn head(&self) -> Section {
        let mut lines = Vec::new();
        for (name, side) in [("A", &self.a), ("B", &self.b)] {
            lines.extend(side_lines(name, side));
        }
        lines.extend(self.setup.iter().map(|note| format!("note  {note}")));
        Section::of_lines("Diff", lines)
    }

    fn totals(&self) -> Section {
        let mut head = ["what", "A", "B", "B - A", "change"]
            .map(str::to_owned)
            .to_vec();
        if let (Some((unit, _)), Some(_)) = (&self.a.per, &self.b.per) {
            head[0] = format!("per {unit}");
        }
        let body = self
            .totals
            .iter()
            .map(|total| {
                let mut row = vec![total.metric.clone()];
                row.extend(cells(total));
                row
            })
            .collect();
        let mut lines = Vec::new();
        if self.totals.iter().any(|t| t.metric.starts_with(ENERGY)) {
            lines.push("energies are modelled, not measured".to_owned());
        }
        if self.is_equal() {
            lines.push("everything that was compared is equal, row by row".to_owned());
        }
        Section {
            title: "Totals".to_owned(),
            rows: Some(Rows {
                head,
                body,
                texts: &[0],
            }),
            lines,
        }
    }

    /// The rows of a metric that differ; nothing where it has none.
    fn rows_of(&self, total: &Change) -> Option<Section> {
        let all: Vec<(String, &Change)> = self
            .rows
            .iter()
            .filter(|row| row.a.is_some() && row.b.is_some())
            .filter_map(|row| {
                let change = row.changes.iter().find(|c| c.metric == total.metric)?;
                Some((row.name(self.root.as_ref()), change))
            })
            .collect();
        let differing: Vec<&(String, &Change)> = all
            .iter()
            .filter(|(_, change)| !change.is_equal())
            .collect();
        if all.is_empty() || differing.is_empty() && total.is_equal() {
            return None;
        }
        let body: Vec<Vec<String>> = differing
            .iter()
            .map(|(name, change)| {
                let mut row = vec![name.clone()];
                row.extend(cells(change));
                row
            })
            .collect();
        let equal = all.len() - body.len();
        let mut lines = Vec::new();
        if equal > 0 {
            lines.push(format!("{equal} of {} are equal", all.len()));
        }
        Some(Section {
            title: match total.unit.as_str() {
                // Its numbers have units themselves.
                "pJ" | "J" => format!("{} by {}", total.metric, self.by),
                unit => format!("{} by {}, in {unit}", total.metric, self.by),
            },
            rows: (!body.is_empty()).then(|| Rows {
                head: [self.by.as_str(), "A", "B", "B - A", "change"]
                    .map(str::to_owned)
                    .to_vec(),
                body,
                texts: &[0],
            }),
            lines,
        })
    }

    /// Rows that only one side has, with what it has there.
    fn one_sided(&self) -> Vec<Section> {
        let section = |name: &str, of_a: bool, energies: bool| {
            let rows: Vec<_> = self
                .rows
                .iter()
                .filter(|row| row.a.is_some() == of_a && row.b.is_some() != of_a)
                .collect();
            let value = |change: &Change| {
                let side = if of_a { change.a } else { change.b };
                amount(side, &change.unit)
            };
            let metrics: Vec<&Change> = self
                .totals
                .iter()
                .filter(|total| is_energy(&total.metric) == energies)
                .filter(|total| {
                    rows.iter()
                        .any(|row| row.changes.iter().any(|c| c.metric == total.metric))
                })
                .collect();
            let what = if energies { "Energy" } else { "Counters" };
            (!metrics.is_empty()).then(|| Section {
                title: format!("{what} of what only {name} has, by {}", self.by),
                rows: Some(Rows {
                    head: std::iter::once(self.by.clone())
                        .chain(metrics.iter().map(|m| short(&m.metric).to_owned()))
                        .collect(),
                    body: rows
                        .iter()
                        .map(|row| {
                            let found = |metric: &&Change| {
                                let change = row.changes.iter().find(|c| c.metric == metric.metric);
                                change.map_or_else(|| "-".to_owned(), value)
                            };
                            std::iter::once(row.name(self.root.as_ref()))
                                .chain(metrics.iter().map(found))
                                .collect()
                        })
                        .collect(),
                    texts: &[0],
                }),
                lines: Vec::new(),
            })
        };
        // Together they do not fit into 80 columns.
        [
            section("A", true, false),
            section("A", true, true),
            section("B", false, false),
            section("B", false, true),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn rates(&self) -> Option<Section> {
        let rate = |name: &Option<String>, rate: Option<f64>| match (name, rate) {
            (None, _) => "no such layer".to_owned(),
            (Some(_), None) => "-".to_owned(),
            (Some(_), Some(rate)) => format!("{rate:.4}"),
        };
        let body: Vec<Vec<String>> = self
            .firing_rates
            .iter()
            .map(|row| {
                vec![
                    super::row_name(row.a.as_deref(), row.b.as_deref(), self.root.as_ref()),
                    rate(&row.a, row.rate_a),
                    rate(&row.b, row.rate_b),
                    row.difference
                        .map_or_else(|| "-".to_owned(), |d| format!("{d:+.4}")),
                ]
            })
            .collect();
        (!body.is_empty()).then(|| Section {
            title: "Firing rates (spikes per neuron and time step)".to_owned(),
            rows: Some(Rows {
                head: ["layer", "A", "B", "B - A"].map(str::to_owned).to_vec(),
                body,
                texts: &[0],
            }),
            lines: Vec::new(),
        })
    }

    fn ops(&self) -> Option<Section> {
        let mut lines = Vec::new();
        for (name, ops) in [("A", &self.ops.only_a), ("B", &self.ops.only_b)] {
            if !ops.is_empty() {
                lines.push(format!("only {name} runs {}", numbers::frequent(ops)));
            }
        }
        for (name, by_counter) in [("A", &self.ops.unknown_a), ("B", &self.ops.unknown_b)] {
            let mut alike: Vec<(Vec<&str>, &BTreeMap<String, u64>)> = Vec::new();
            for (counter, ops) in by_counter {
                match alike.iter_mut().find(|(_, known)| *known == ops) {
                    Some((counters, _)) => counters.push(counter),
                    None => alike.push((vec![counter], ops)),
                }
            }
            for (counters, ops) in alike {
                lines.push(format!(
                    "no rule in {} of {name} for {}",
                    counters.join(", "),
                    numbers::frequent(ops)
                ));
            }
        }
        (!lines.is_empty()).then(|| Section::of_lines("Ops that do not match", lines))
    }

    fn write_csv(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        let mut csv = csv::Writer::from_writer(out);
        let mut line = |row: &[&str]| {
            csv.write_record(row)
                .map_err(|error| match error.into_kind() {
                    // As it came, so that a closed pipe is still seen as one.
                    csv::ErrorKind::Io(error) => ReplayError::Write(error),
                    other => ReplayError::Write(std::io::Error::other(format!("{other:?}"))),
                })
        };
        line(&[
            "section",
            "name_a",
            "name_b",
            "metric",
            "unit",
            "a",
            "b",
            "difference",
            "relative",
        ])?;
        let plain = |amount: Option<Amount>| match amount {
            None => String::new(),
            Some(Amount::Integer(value)) => value.to_string(),
            Some(Amount::Float(value)) => value.to_string(),
        };
        let number = |value: Option<f64>| value.map(|v| v.to_string()).unwrap_or_default();
        let mut change = |section: &str, a: &str, b: &str, change: &Change| {
            line(&[
                section,
                a,
                b,
                &change.metric,
                &change.unit,
                &plain(change.a),
                &plain(change.b),
                &plain(change.difference),
                &number(change.relative),
            ])
        };
        for total in &self.totals {
            change("total", "", "", total)?;
        }
        for row in &self.rows {
            let (a, b) = (row.a.as_deref(), row.b.as_deref());
            for of_row in &row.changes {
                change(&self.by, a.unwrap_or(""), b.unwrap_or(""), of_row)?;
            }
        }
        for row in &self.firing_rates {
            let (a, b) = (row.a.as_deref(), row.b.as_deref());
            line(&[
                "layer",
                a.unwrap_or(""),
                b.unwrap_or(""),
                "firing_rate",
                "spikes per neuron and time step",
                &number(row.rate_a),
                &number(row.rate_b),
                &number(row.difference),
                "",
            ])?;
        }
        for (op, calls) in &self.ops.only_a {
            let calls = calls.to_string();
            line(&["op", op, "", "calls", "op call", &calls, "", "", ""])?;
        }
        for (op, calls) in &self.ops.only_b {
            let calls = calls.to_string();
            line(&["op", "", op, "calls", "op call", "", &calls, "", ""])?;
        }
        for (name, why) in &self.not_compared {
            line(&["not compared", "", "", name, why, "", "", "", ""])?;
        }
        csv.flush()?;
        Ok(())
    }
}

fn side_lines(name: &str, side: &SideInfo) -> Vec<String> {
    let mut lines = Vec::new();
    for source in &side.trace {
        let command = match source.command.as_slice() {
            [] => String::new(),
            words => format!(" ({})", words.join(" ")),
        };
        lines.push(format!("{name}     {}{command}", source.path));
    }
    let selection = match side.selection.text() {
        text if text.is_empty() => "everything".to_owned(),
        text => text,
    };
    lines.push(format!(
        "      {} op calls; selection {selection}; stages {}; rules {} (version {})",
        numbers::grouped(i128::from(side.op_calls)),
        side.stages,
        side.rules.name,
        side.rules.version
    ));
    if let Some((unit, divisor)) = &side.per {
        lines.push(format!(
            "      per {unit}, of which there are {}",
            numbers::grouped(i128::from(*divisor))
        ));
    }
    if let Some(sparsity) = side.input_sparsity {
        lines.push(format!(
            "      {:.1} % of the input are zeros",
            100.0 * sparsity
        ));
    }
    lines
}

/// A, B, difference, change.
fn cells(change: &Change) -> [String; 4] {
    let difference = match change.difference {
        None => "-".to_owned(),
        Some(d) => {
            let sign = if d.value() > 0.0 { "+" } else { "" };
            format!("{sign}{}", amount(Some(d), &change.unit))
        }
    };
    [
        amount(change.a, &change.unit),
        amount(change.b, &change.unit),
        difference,
        relative(change),
    ]
}

/// A number for people; energies with their unit.
pub(super) fn amount(amount: Option<Amount>, unit: &str) -> String {
    match (amount, unit) {
        (None, _) => "-".to_owned(),
        (Some(amount), "pJ") => numbers::energy(amount.value()),
        (Some(amount), "J") => numbers::energy(amount.value() * 1e12),
        (Some(Amount::Integer(value)), _) => numbers::grouped(value),
        (Some(Amount::Float(value)), _) => numbers::mean(value),
    }
}

/// The change in percent; never rounded to none.
pub(super) fn relative(change: &Change) -> String {
    match (change.difference, change.relative) {
        (None, _) => "-".to_owned(),
        (Some(_), None) => "from 0".to_owned(),
        (Some(_), Some(0.0)) => "=".to_owned(),
        (Some(_), Some(share)) if (share * 100.0).abs() < 0.0005 => {
            format!("{:+.0e} %", share * 100.0)
        }
        (Some(_), Some(share)) if (share * 100.0).abs() < 0.05 => {
            format!("{:+.3} %", share * 100.0)
        }
        (Some(_), Some(share)) => format!("{:+.1} %", share * 100.0),
    }
}

fn is_energy(metric: &str) -> bool {
    metric.starts_with(ENERGY) || metric.starts_with(MEASURED)
}

fn short(metric: &str) -> &str {
    metric.split_once('/').map_or(metric, |(_, name)| name)
}
