//! What can go wrong in a replay.

use std::path::PathBuf;

use optape_trace::TraceError;

use crate::rules::MissingLevel;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// A file could not be read as a trace.
    #[error("{}", about(path, source))]
    Trace {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: TraceError,
    },
    /// A name that does not exist: of a counter, rule set, preset, scope, op.
    #[error("there is no {kind} '{name}'{}{}", suggestion.as_ref().map(|s| format!("; did you mean '{s}'?")).unwrap_or_default(),
        if known.is_empty() { String::new() } else { format!("\n  known: {}", known.join(", ")) })]
    UnknownName {
        /// What the name was to be.
        kind: &'static str,
        /// The name.
        name: String,
        /// The nearest one that exists.
        suggestion: Option<String>,
        /// All that exist, where they are few.
        known: Vec<String>,
    },
    /// Files that cannot be added up.
    #[error("{0}")]
    Together(String),
    /// A selection that selects nothing.
    #[error("the selection {selection} selects no op call{hint}")]
    NothingSelected {
        /// The selection as text.
        selection: String,
        /// What there is instead.
        hint: String,
    },
    /// A selection that cannot be understood.
    #[error("{0}")]
    Selection(String),
    /// An estimator that was asked for by name needs what the trace does not hold.
    #[error("{estimator} cannot be computed: {missing}")]
    MissingLevel {
        /// The counter or model.
        estimator: String,
        /// What is missing.
        missing: Box<MissingLevel>,
    },
    /// An estimator that was asked for by name is refused by its own rules.
    #[error("{estimator} cannot be computed: {reason}")]
    Refused {
        /// The counter or model.
        estimator: String,
        /// Why.
        reason: String,
    },
    /// A total was to be divided by something that the trace does not hold.
    #[error("{0}")]
    Normalisation(String),
    /// A file of costs or of peaks is wrong.
    #[error("{path}:{line}:{column}: {message}")]
    Costs {
        /// The file, or the preset's name.
        path: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong, and the way out.
        message: String,
    },
    /// A file other than a trace could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A report could not be written.
    #[error("cannot write the report: {0}")]
    Write(#[from] std::io::Error),
}

impl ReplayError {
    /// An unknown name, with the nearest of those that exist. All of them are listed if they are at most twelve.
    #[must_use]
    pub fn unknown_name<'a>(
        kind: &'static str,
        name: &str,
        known: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let mut known: Vec<&str> = known.into_iter().collect();
        known.sort_unstable();
        known.dedup();
        let suggestion = nearest(name, known.iter().copied()).map(str::to_owned);
        let known = if known.len() <= 12 {
            known.into_iter().map(str::to_owned).collect()
        } else {
            Vec::new()
        };
        Self::UnknownName {
            kind,
            name: name.to_owned(),
            suggestion,
            known,
        }
    }
}

/// The most similar of some names, if any is similar at all.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    known
        .into_iter()
        .map(|k| {
            let other = k.to_lowercase();
            // Whole names that were mistyped, and beginnings of names.
            let (typed, begun) = (
                strsim::normalized_damerau_levenshtein(&lower, &other),
                strsim::jaro_winkler(&lower, &other),
            );
            (typed, begun, k)
        })
        .filter(|(typed, begun, _)| *typed > 0.6 || *begun > 0.8)
        .map(|(typed, begun, k)| (typed + begun / 10.0, k))
        .max_by(|a, b| a.0.total_cmp(&b.0).then_with(|| b.1.cmp(a.1)))
        .map(|(_, k)| k)
}

/// Line and column of a byte of a text, both from 1; columns count characters.
#[must_use]
pub fn position(text: &str, byte: usize) -> (usize, usize) {
    let before = text.get(..byte.min(text.len())).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    (line, column)
}

/// The error with the file's name, which errors of reading have already.
fn about(path: &std::path::Path, source: &TraceError) -> String {
    let (path, text) = (path.display().to_string(), source.to_string());
    if text.starts_with(&path) {
        text
    } else {
        format!("{path}: {text}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_offered_and_far_ones_are_not() {
        assert_eq!(nearest("flops", ["flop", "mac", "synop"]), Some("flop"));
        assert_eq!(nearest("synops", ["flop", "mac", "synop"]), Some("synop"));
        assert_eq!(nearest("zzzz", ["flop", "mac", "synop"]), None);
    }

    #[test]
    fn the_message_names_kind_suggestion_and_choices() {
        let text = ReplayError::unknown_name("counter", "flopp", ["flop", "mac"]).to_string();
        assert_eq!(
            text,
            "there is no counter 'flopp'; did you mean 'flop'?\n  known: flop, mac"
        );
    }
}
