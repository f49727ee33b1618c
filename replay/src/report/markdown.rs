//! The report as Markdown: the tables of the report for people, for documents.

use std::io::Write;

use super::Report;
use super::section::write_markdown;
use super::table::sections;
use crate::error::ReplayError;

pub(super) fn write(report: &Report, out: &mut dyn Write) -> Result<(), ReplayError> {
    Ok(write_markdown(&sections(report), out)?)
}
