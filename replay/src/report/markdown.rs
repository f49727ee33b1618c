//! The report as Markdown: the tables of the report for people, for documents.

use std::io::Write;

use super::Report;
use super::table::sections;
use crate::error::ReplayError;

pub(super) fn write(report: &Report, out: &mut dyn Write) -> Result<(), ReplayError> {
    for section in sections(report) {
        writeln!(out, "## {}\n", section.title)?;
        if let Some(rows) = &section.rows {
            writeln!(
                out,
                "| {} |",
                rows.head
                    .iter()
                    .map(|c| escaped(c))
                    .collect::<Vec<_>>()
                    .join(" | ")
            )?;
            let rules: Vec<&str> = (0..rows.head.len())
                .map(|at| {
                    if rows.texts.contains(&at) {
                        "---"
                    } else {
                        "---:"
                    }
                })
                .collect();
            writeln!(out, "| {} |", rules.join(" | "))?;
            for row in &rows.body {
                writeln!(
                    out,
                    "| {} |",
                    row.iter()
                        .map(|c| escaped(c))
                        .collect::<Vec<_>>()
                        .join(" | ")
                )?;
            }
            writeln!(out)?;
        }
        for line in &section.lines {
            writeln!(out, "- {}", escaped(line))?;
        }
        if !section.lines.is_empty() {
            writeln!(out)?;
        }
    }
    Ok(())
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}
