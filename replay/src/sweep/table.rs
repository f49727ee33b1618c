//! What a sweep gives, and how it is written.

use std::io::Write;

use serde::Serialize;
use serde::ser::{SerializeMap, SerializeSeq, Serializer};

use super::axis::Axis;
use crate::error::ReplayError;
use crate::report::{Format, Ordered, RulesInfo, SelectionInfo, SourceInfo};

/// A number of a configuration; small, since there may be millions.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Cell {
    /// The configuration has no such figure.
    #[default]
    Nothing,
    /// A count.
    Integer(i64),
    /// A count beyond 64 bits.
    Large(Box<i128>),
    /// A quantity.
    Float(f64),
}

impl From<i128> for Cell {
    fn from(value: i128) -> Self {
        i64::try_from(value).map_or_else(|_| Self::Large(Box::new(value)), Self::Integer)
    }
}

impl From<f64> for Cell {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => Ok(()),
            Self::Integer(value) => value.fmt(f),
            Self::Large(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
        }
    }
}

impl Serialize for Cell {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nothing => serializer.serialize_none(),
            Self::Integer(value) => serializer.serialize_i64(*value),
            Self::Large(value) => serializer.serialize_i128(**value),
            Self::Float(value) => serializer.serialize_f64(*value),
        }
    }
}

/// A key of the sweep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AxisInfo {
    /// As it was given.
    pub key: String,
    /// How many values it goes through.
    pub values: usize,
    /// What it sets: the models and counters that have it.
    pub sets: Vec<String>,
    /// Each value was a simulation of its own in one of them.
    pub structural: bool,
}

/// A column of figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Column {
    /// `compute_fp32.energy_total_pj`.
    pub name: String,
    /// `pJ`; absent where it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
}

/// All configurations and their figures.
#[derive(Clone, Debug)]
pub struct SweepReport {
    /// The files.
    pub trace: Vec<SourceInfo>,
    /// Which rules.
    pub rules: RulesInfo,
    /// What was looked at.
    pub selection: SelectionInfo,
    /// The keys, the slowest first.
    pub axes: Vec<AxisInfo>,
    /// The figures' names.
    pub columns: Vec<Column>,
    /// What could not be computed, and why.
    pub skipped: std::collections::BTreeMap<String, String>,
    /// What a reader should know.
    pub notes: Vec<String>,
    pub(super) given: Vec<Axis>,
    /// By configuration, then by column.
    pub(super) cells: Vec<Cell>,
}

impl SweepReport {
    /// How many configurations there are.
    #[must_use]
    pub fn configurations(&self) -> usize {
        self.given.iter().map(|axis| axis.values.len()).product()
    }

    /// The values of a configuration, in the order of the axes.
    #[must_use]
    pub fn values(&self, configuration: usize) -> Vec<&str> {
        super::places(&self.given, configuration)
            .zip(&self.given)
            .map(|(at, axis)| axis.values.get(at).map_or("", String::as_str))
            .collect()
    }

    /// The figures of a configuration, in the order of the columns.
    #[must_use]
    pub fn figures(&self, configuration: usize) -> &[Cell] {
        let start = configuration * self.columns.len();
        self.cells
            .get(start..start + self.columns.len())
            .unwrap_or(&[])
    }

    fn header(&self) -> Vec<&str> {
        let axes = self.axes.iter().map(|axis| axis.key.as_str());
        axes.chain(self.columns.iter().map(|column| column.name.as_str()))
            .collect()
    }

    fn rows(&self) -> impl Iterator<Item = Vec<String>> + '_ {
        (0..self.configurations()).map(|configuration| {
            let values = self.values(configuration).into_iter().map(str::to_owned);
            let figures = self.figures(configuration).iter().map(Cell::to_string);
            values.chain(figures).collect()
        })
    }

    /// Writes all configurations, one row each.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write(&self, format: Format, out: &mut dyn Write) -> Result<(), ReplayError> {
        match format {
            Format::Csv => {
                let mut writer = csv::Writer::from_writer(out);
                writer.write_record(self.header()).map_err(of_csv)?;
                for row in self.rows() {
                    writer.write_record(&row).map_err(of_csv)?;
                }
                writer.flush()?;
            }
            Format::Json => {
                serde_json::to_writer_pretty(&mut *out, &Json(self))
                    .map_err(std::io::Error::from)?;
                writeln!(out)?;
            }
            Format::Table => {
                let mut table = comfy_table::Table::new();
                table.load_style(comfy_table::presets::NOTHING);
                table.set_header(self.header());
                for row in self.rows() {
                    table.add_row(row);
                }
                for line in table.lines() {
                    writeln!(out, "{}", line.trim_end())?;
                }
                for (what, why) in &self.skipped {
                    writeln!(out, "\nleft out: {what}: {why}")?;
                }
                for note in &self.notes {
                    writeln!(out, "\nnote: {note}")?;
                }
            }
            Format::Markdown => {
                let line = |cells: &[String]| {
                    let cells: Vec<String> = cells.iter().map(|c| c.replace('|', "\\|")).collect();
                    format!("| {} |", cells.join(" | "))
                };
                let header: Vec<String> = self.header().into_iter().map(str::to_owned).collect();
                writeln!(out, "{}", line(&header))?;
                writeln!(out, "|{}", "---:|".repeat(header.len()))?;
                for row in self.rows() {
                    writeln!(out, "{}", line(&row))?;
                }
            }
        }
        Ok(())
    }
}

fn of_csv(error: csv::Error) -> ReplayError {
    ReplayError::Write(std::io::Error::from(error))
}

/// The whole as JSON.
struct Json<'r>(&'r SweepReport);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let report = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("schema", &1)?;
        map.serialize_entry("optape", env!("CARGO_PKG_VERSION"))?;
        map.serialize_entry("trace", &report.trace)?;
        map.serialize_entry("rules", &report.rules)?;
        map.serialize_entry("selection", &report.selection)?;
        map.serialize_entry("axes", &report.axes)?;
        map.serialize_entry("columns", &report.columns)?;
        map.serialize_entry("configurations", &Points(report))?;
        map.serialize_entry("skipped", &report.skipped)?;
        map.serialize_entry("notes", &report.notes)?;
        map.end()
    }
}

struct Points<'r>(&'r SweepReport);

impl Serialize for Points<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let report = self.0;
        let mut list = serializer.serialize_seq(Some(report.configurations()))?;
        for at in 0..report.configurations() {
            let set: Ordered<serde_json::Value> = report
                .axes
                .iter()
                .zip(report.values(at))
                .map(|(axis, value)| (axis.key.clone(), parsed(value)))
                .collect();
            let figures: Ordered<&Cell> = report
                .columns
                .iter()
                .zip(report.figures(at))
                .filter(|(_, cell)| **cell != Cell::Nothing)
                .map(|(column, cell)| (column.name.clone(), cell))
                .collect();
            list.serialize_element(&Point { set, figures })?;
        }
        list.end()
    }
}

#[derive(Serialize)]
struct Point<'r> {
    set: Ordered<serde_json::Value>,
    figures: Ordered<&'r Cell>,
}

/// Numbers and flags as such.
fn parsed(value: &str) -> serde_json::Value {
    match serde_json::from_str(value) {
        Ok(parsed @ (serde_json::Value::Number(_) | serde_json::Value::Bool(_))) => parsed,
        _ => serde_json::Value::String(value.to_owned()),
    }
}
