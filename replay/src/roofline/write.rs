//! A roofline for people, programs and papers.

use std::io::Write;

use super::{Point, Roofline, plot};
use crate::error::ReplayError;
use crate::report::numbers;
use crate::report::section::{Rows, Section, write_latex, write_markdown, write_text};

/// How a roofline is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RooflineFormat {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For spreadsheets.
    Csv,
    /// For documents.
    Markdown,
    /// For papers.
    Latex,
    /// The picture.
    Svg,
}

impl Roofline {
    /// Writes it.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub fn write(&self, format: RooflineFormat, out: &mut dyn Write) -> Result<(), ReplayError> {
        match format {
            RooflineFormat::Table => Ok(write_text(&self.sections(), out)?),
            RooflineFormat::Markdown => Ok(write_markdown(&self.sections(), out)?),
            RooflineFormat::Latex => Ok(write_latex(&self.sections(), out)?),
            RooflineFormat::Svg => Ok(plot::write(self, out)?),
            RooflineFormat::Csv => self.write_csv(out),
            RooflineFormat::Json => {
                serde_json::to_writer_pretty(&mut *out, self).map_err(std::io::Error::from)?;
                Ok(out.write_all(b"\n")?)
            }
        }
    }

    fn sections(&self) -> Vec<Section> {
        vec![self.head(), self.table()]
    }

    fn head(&self) -> Section {
        let mut lines: Vec<String> = self
            .trace
            .iter()
            .map(|source| format!("trace      {}", source.path))
            .collect();
        lines.push(format!(
            "rules      {} (version {})",
            self.rules.name, self.rules.version
        ));
        let selection = match self.selection.text() {
            text if text.is_empty() => "everything".to_owned(),
            text => text,
        };
        lines.push(format!("selection  {selection}"));
        match (&self.peaks, &self.roof) {
            (Some(peaks), Some(roof)) => {
                lines.push(format!("machine    {}", peaks.machine));
                lines.extend(peaks.source.iter().map(|s| format!("peaks      {s}")));
                lines.push(format!(
                    "roof       {}: {}, {}, ridge at {} FLOP per byte",
                    roof.name,
                    numbers::scaled(roof.flop_per_s, "FLOP/s"),
                    numbers::scaled(roof.bytes_per_s, "B/s"),
                    intensity(Some(roof.ridge_flop_per_byte()))
                ));
            }
            _ => lines.push(
                "roof       none given: `optape peak` measures this machine, --peaks takes what it wrote".to_owned(),
            ),
        }
        lines.extend(self.notes.iter().map(|note| format!("note       {note}")));
        Section::of_lines("Roofline", lines)
    }

    fn table(&self) -> Section {
        let held = self.roof.is_some();
        let mut head = vec![
            self.by.clone(),
            "FLOP".to_owned(),
            "bytes".to_owned(),
            "FLOP/byte".to_owned(),
            "time".to_owned(),
            "FLOP/s".to_owned(),
        ];
        if held {
            head.extend(["roof", "reached", "limit"].map(str::to_owned));
        }
        let rate = |rate: Option<f64>| {
            rate.map_or_else(|| "-".to_owned(), |rate| numbers::scaled(rate, ""))
        };
        let row = |point: &Point| {
            #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
            let (flop, bytes) = (point.flop as f64, point.bytes as f64);
            let mut row = vec![
                point.key.clone(),
                numbers::scaled(flop, ""),
                numbers::scaled(bytes, ""),
                intensity(point.flop_per_byte),
                point.time_ns.map_or_else(|| "-".to_owned(), time),
                rate(point.flop_per_s),
            ];
            if held {
                row.push(rate(point.attainable_flop_per_s));
                let share = point.share_of_roof;
                row.push(share.map_or_else(|| "-".to_owned(), |s| format!("{:.1} %", 100.0 * s)));
                row.push(point.limit.map_or("-", super::Limit::name).to_owned());
            }
            row
        };
        let mut body: Vec<Vec<String>> = self.points.iter().map(row).collect();
        let mut lines = vec![
            "bytes are those of operands and results, op by op, as if no cache kept any".to_owned(),
        ];
        if self.by == "scope" {
            lines.push(
                "a call counts in every module on its stack; the rows do not add up".to_owned(),
            );
        } else {
            body.push(row(&self.total));
        }
        Section {
            title: format!("Operations per byte, by {}", self.by),
            rows: Some(Rows {
                head,
                body,
                texts: if held { &[0, 8] } else { &[0] },
            }),
            lines,
        }
    }

    fn write_csv(&self, out: &mut dyn Write) -> Result<(), ReplayError> {
        let mut csv = csv::Writer::from_writer(out);
        let mut line = |row: &[String]| {
            csv.write_record(row)
                .map_err(|error| match error.into_kind() {
                    // As it came, so that a closed pipe is still seen as one.
                    csv::ErrorKind::Io(error) => ReplayError::Write(error),
                    other => ReplayError::Write(std::io::Error::other(format!("{other:?}"))),
                })
        };
        let head = [
            "kind",
            "name",
            "calls",
            "flop",
            "bytes",
            "flop_per_byte",
            "time_ns",
            "flop_per_s",
            "bytes_per_s",
            "attainable_flop_per_s",
            "share_of_roof",
            "limit",
        ];
        line(&head.map(str::to_owned))?;
        let number = |value: Option<f64>| value.map(|v| v.to_string()).unwrap_or_default();
        for (kind, point) in std::iter::once(("total", &self.total))
            .chain(self.points.iter().map(|point| (self.by.as_str(), point)))
        {
            line(&[
                kind.to_owned(),
                point.key.clone(),
                point.calls.to_string(),
                point.flop.to_string(),
                point.bytes.to_string(),
                number(point.flop_per_byte),
                point.time_ns.map(|ns| ns.to_string()).unwrap_or_default(),
                number(point.flop_per_s),
                number(point.bytes_per_s),
                number(point.attainable_flop_per_s),
                number(point.share_of_roof),
                point.limit.map_or("", super::Limit::name).to_owned(),
            ])?;
        }
        for roof in self.peaks.iter().flat_map(|peaks| &peaks.roofs) {
            let mut row = vec![String::new(); head.len()];
            row[0] = "roof".to_owned();
            row[1].clone_from(&roof.name);
            row[5] = roof.ridge_flop_per_byte().to_string();
            row[7] = roof.flop_per_s.to_string();
            row[8] = roof.bytes_per_s.to_string();
            line(&row)?;
        }
        csv.flush()?;
        Ok(())
    }
}

/// Three digits.
pub(super) fn intensity(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(0.0) => "0".to_owned(),
        Some(v) if v >= 100.0 => format!("{v:.0}"),
        Some(v) if v >= 10.0 => format!("{v:.1}"),
        Some(v) if v >= 0.01 => format!("{v:.3}"),
        Some(v) => format!("{v:.1e}"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "rounded for people")]
fn time(ns: u64) -> String {
    match ns as f64 {
        ns if ns >= 1e9 => numbers::scaled(ns / 1e9, "s"),
        ns if ns >= 1e6 => numbers::scaled(ns / 1e6, "ms"),
        ns => numbers::scaled(ns / 1e3, "us"),
    }
}
