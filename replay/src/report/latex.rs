//! The report as LaTeX: the tables of the report for people, for papers.

use std::io::Write;

use super::Report;
use super::section::write_latex;
use super::table::sections;
use crate::error::ReplayError;

pub(super) fn write(report: &Report, out: &mut dyn Write) -> Result<(), ReplayError> {
    Ok(write_latex(&sections(report), out)?)
}
