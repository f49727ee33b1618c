//! Which op calls a replay looks at.
//!
//! Ranges, steps and ranks say which records of a stream count (pieces: intervals of ordinals); stages, scopes, ops and
//! excluded modules say which signatures. The first are cut out of the stream, the second filter rows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use optape_trace::{Dictionary, ModuleId, OpDef, SignatureDef};

use crate::error::ReplayError;
use crate::load::{StreamRef, Traces, stack, text};
use crate::timeline::Timeline;

/// Matches names with `*` (anything) and `?` (one character).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    /// A pattern.
    #[must_use]
    pub fn new(pattern: &str) -> Self {
        Self(pattern.to_owned())
    }

    /// Whether the pattern is a plain name.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        !self.0.contains(['*', '?'])
    }

    /// Whether a name matches as a whole.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) =
            (self.0.chars().collect(), name.chars().collect());
        let (mut p, mut n) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while n < name.len() {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(c) if *c == '?' || *c == name[n] => {
                    p += 1;
                    n += 1;
                }
                _ => match star {
                    Some((at, taken)) => {
                        star = Some((at, taken + 1));
                        p = at + 1;
                        n = taken + 1;
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|c| *c == '*')
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What to look at. Empty lists select everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// Ops strictly between the begin and the end of ranges with these names, on whatever thread.
    pub ranges: Vec<String>,
    /// Steps, half-open.
    pub steps: Vec<Range<u64>>,
    /// Stages by name, the program's own names included.
    pub stages: Vec<String>,
    /// Modules: calls inside of one that matches.
    pub scopes: Vec<Glob>,
    /// Overloads: `aten::add.Tensor`, `aten.add.Tensor`, `aten::add` (all overloads).
    pub ops: Vec<Glob>,
    /// Ranks.
    pub ranks: Vec<u32>,
    /// Classes or scopes of modules whose calls are left out.
    pub exclude: Vec<Glob>,
}

/// `5`, `5..10` (without 10), `5..=10`, `5..`, `..10`.
///
/// # Errors
/// Where the text is none of these, or the interval is empty.
pub fn parse_steps(given: &str) -> Result<Range<u64>, String> {
    let number = |t: &str| {
        t.trim().parse::<u64>().map_err(|_| {
            format!("'{given}' is not a step: write 5, 5..10 (without 10), 5..=10, 5.. or ..10")
        })
    };
    let steps = if let Some((from, to)) = given.split_once("..") {
        let start = if from.trim().is_empty() {
            0
        } else {
            number(from)?
        };
        let end = match to.strip_prefix('=') {
            Some(last) => number(last)?.saturating_add(1),
            None if to.trim().is_empty() => u64::MAX,
            None => number(to)?,
        };
        start..end
    } else {
        let step = number(given)?;
        step..step.saturating_add(1)
    };
    if steps.is_empty() {
        Err(format!(
            "'{given}' selects no step: the end is not behind the start"
        ))
    } else {
        Ok(steps)
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.ranges.iter().map(|r| format!("--range {r}")));
        parts.extend(
            self.steps
                .iter()
                .map(|s| format!("--step {}", steps_text(s))),
        );
        parts.extend(self.stages.iter().map(|s| format!("--stage {s}")));
        parts.extend(self.scopes.iter().map(|s| format!("--scope {s}")));
        parts.extend(self.ops.iter().map(|s| format!("--op {s}")));
        parts.extend(self.ranks.iter().map(|s| format!("--rank {s}")));
        parts.extend(self.exclude.iter().map(|s| format!("--exclude {s}")));
        if parts.is_empty() {
            f.write_str("everything")
        } else {
            f.write_str(&parts.join(" "))
        }
    }
}

/// Steps as the command line takes them.
#[must_use]
pub(crate) fn steps_text(steps: &Range<u64>) -> String {
    if steps.end == steps.start.saturating_add(1) {
        steps.start.to_string()
    } else if steps.end == u64::MAX {
        format!("{}..", steps.start)
    } else {
        format!("{}..{}", steps.start, steps.end)
    }
}

/// An interval of a stream's records, and the step that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) ordinals: Range<u64>,
    /// `None`: behind the last mark, or steps are not told apart.
    pub(crate) step: Option<u64>,
}

/// What of a stream is selected.
#[derive(Clone, Debug)]
pub(crate) struct Pieces {
    /// In order, without overlap.
    pub(crate) pieces: Vec<Piece>,
    /// What totals can be divided by, for all pieces together.
    pub(crate) divisors: Divisors,
    /// The same for each step, where steps are told apart.
    pub(crate) by_step: BTreeMap<Option<u64>, Divisors>,
    /// Calls by module name.
    pub(crate) module_calls: BTreeMap<String, u64>,
    /// Regions that ran outside of the dispatcher.
    pub(crate) opaque_regions: u64,
}

/// What totals can be divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Divisors {
    /// Whole steps (of ranks that ran side by side, the most that one has).
    pub steps: u64,
    /// Samples that the program reported; `None` where it reported none.
    pub samples: Option<u64>,
    /// Calls of root modules.
    pub root_calls: u64,
}

impl Divisors {
    /// Takes another stream's in.
    pub(crate) fn add(&mut self, other: Self) {
        self.steps = self.steps.max(other.steps);
        self.root_calls = self.root_calls.saturating_add(other.root_calls);
        if let Some(samples) = other.samples {
            self.samples = Some(self.samples.unwrap_or(0).saturating_add(samples));
        }
    }
}

impl Selection {
    /// Whether whole streams are selected, so that summaries of the whole run answer.
    #[must_use]
    pub fn is_whole_run(&self) -> bool {
        self.ranges.is_empty() && self.steps.is_empty()
    }

    /// Whether a stream's rank is selected.
    pub(crate) fn takes(&self, at: StreamRef<'_>) -> bool {
        self.ranks.is_empty()
            || at
                .stream
                .info()
                .rank
                .is_some_and(|rank| self.ranks.contains(&rank))
    }

    /// Checks names against what the traces hold, so that a typing error is told from an empty result.
    ///
    /// # Errors
    /// [`ReplayError::UnknownName`] with the nearest name.
    pub(crate) fn check(&self, traces: &Traces, timelines: &[Timeline]) -> Result<(), ReplayError> {
        let plain = |globs: &[Glob]| globs.iter().any(Glob::is_plain);
        if !self.stages.is_empty() {
            let mut names: BTreeSet<String> = optape_trace::Stage::ALL
                .iter()
                .map(|stage| stage.name().to_owned())
                .collect();
            for at in traces.streams() {
                let dictionary = at.stream.dictionary();
                names.extend(
                    dictionary
                        .signatures()
                        .filter_map(|(_, s)| s.stage_name)
                        .map(|id| text(dictionary, id)),
                );
            }
            known("stage", &self.stages, &names)?;
        }
        if plain(&self.scopes) {
            let mut names = BTreeSet::from(["Global".to_owned()]);
            for at in traces.streams() {
                names.extend(
                    at.stream
                        .dictionary()
                        .scopes()
                        .map(|(_, scope)| scope.name.clone()),
                );
            }
            known("scope", &plain_texts(&self.scopes), &names)?;
        }
        if plain(&self.ops) {
            let mut names = BTreeSet::new();
            for at in traces.streams() {
                for (_, op) in at.stream.dictionary().ops() {
                    names.extend([
                        op.qualified_name(),
                        op.python_name(),
                        op.name.clone(),
                        op.name.replacen("::", ".", 1),
                    ]);
                }
            }
            known("op", &plain_texts(&self.ops), &names)?;
        }
        if plain(&self.exclude) {
            let mut names = BTreeSet::new();
            for at in traces.streams() {
                let dictionary = at.stream.dictionary();
                names.extend(dictionary.scopes().map(|(_, scope)| scope.name.clone()));
                for (_, module) in dictionary.modules() {
                    names.extend(module.classes.iter().cloned());
                    names.extend(module.classes.iter().map(|c| last_part(c).to_owned()));
                }
            }
            known("class or scope", &plain_texts(&self.exclude), &names)?;
        }
        if !self.ranks.is_empty() {
            let ranks: BTreeSet<String> = traces
                .streams()
                .filter_map(|at| at.stream.info().rank)
                .map(|r| r.to_string())
                .collect();
            let asked: Vec<String> = self.ranks.iter().map(ToString::to_string).collect();
            known("rank", &asked, &ranks)?;
        }
        if !self.ranges.is_empty() {
            let names = timelines
                .iter()
                .flat_map(|timeline| timeline.range_names.iter().cloned())
                .collect();
            known("range", &self.ranges, &names)?;
        }
        Ok(())
    }

    /// Whether calls of a signature are selected.
    pub(crate) fn matches(
        &self,
        dictionary: &Dictionary,
        signature: &SignatureDef,
        op: &OpDef,
    ) -> bool {
        if !self.ops.is_empty() && !self.ops.iter().any(|glob| op_matches(glob, op)) {
            return false;
        }
        if !self.stages.is_empty() {
            let stage = stage_of(dictionary, signature);
            if !self
                .stages
                .iter()
                .any(|s| *s == stage || s == signature.stage.name())
            {
                return false;
            }
        }
        if self.scopes.is_empty() && self.exclude.is_empty() {
            return true;
        }
        let stack = stack(dictionary, signature.scope);
        if !self.scopes.is_empty()
            && !stack
                .iter()
                .any(|(name, _)| self.scopes.iter().any(|glob| glob.matches(name)))
        {
            return false;
        }
        !stack.iter().any(|(name, classes)| {
            self.exclude
                .iter()
                .any(|glob| module_matches(glob, name, classes))
        })
    }

    /// Whether a stage is selected.
    pub(crate) fn takes_stage(&self, stage: &str) -> bool {
        self.stages.is_empty() || self.stages.iter().any(|s| s == stage)
    }

    /// The names on a stack of modules that are called in one another (innermost first), sorted, if such a call is selected. Ops are not
    /// looked at, and a module's call counts as forward.
    pub(crate) fn takes_modules(
        &self,
        dictionary: &Dictionary,
        modules: &[ModuleId],
    ) -> Option<Vec<String>> {
        if !self.takes_stage("forward") {
            return None;
        }
        let definitions = || modules.iter().filter_map(|m| dictionary.module(*m));
        let mut names: Vec<String> = definitions().map(|def| def.name.clone()).collect();
        names.push("Global".to_owned());
        names.sort_unstable();
        names.dedup();
        let inside = self.scopes.is_empty()
            || names
                .iter()
                .any(|name| self.scopes.iter().any(|glob| glob.matches(name)));
        let left_out = definitions().any(|def| {
            self.exclude
                .iter()
                .any(|glob| module_matches(glob, &def.name, &def.classes))
        });
        (inside && !left_out).then_some(names)
    }

    /// The selected pieces of a stream. `by_step` cuts at every step mark.
    pub(crate) fn pieces(&self, at: StreamRef<'_>, timeline: &Timeline, by_step: bool) -> Pieces {
        let records = at.stream.records();
        let chosen = if self.ranges.is_empty() {
            std::iter::once(0..records).collect()
        } else {
            timeline.inside.clone()
        };
        let steps = timeline.step_intervals(records);
        let mut pieces = Vec::new();
        let mut whole_steps = 0;
        for (interval, step) in &steps {
            let taken = self.steps.is_empty()
                || step.is_some_and(|s| self.steps.iter().any(|range| range.contains(&s)));
            if !taken {
                continue;
            }
            let mut inside = false;
            // Both lists are in order, so only the neighbourhood of the step is looked at.
            let first = chosen.partition_point(|part| part.end <= interval.start);
            for part in chosen
                .iter()
                .skip(first)
                .take_while(|part| part.start < interval.end)
            {
                let ordinals = part.start.max(interval.start)..part.end.min(interval.end);
                if !ordinals.is_empty() {
                    pieces.push(Piece {
                        ordinals,
                        step: *step,
                    });
                    inside = true;
                }
            }
            whole_steps += u64::from(inside && step.is_some());
        }
        if !by_step {
            pieces = joined(pieces);
        }
        let divisors = Divisors {
            steps: whole_steps,
            ..Divisors::default()
        };
        let mut by_step: BTreeMap<Option<u64>, Divisors> = BTreeMap::new();
        for piece in &pieces {
            by_step.entry(piece.step).or_default().steps = u64::from(piece.step.is_some());
        }
        let mut selected = Pieces {
            pieces,
            divisors,
            by_step,
            module_calls: BTreeMap::new(),
            opaque_regions: 0,
        };
        selected.count(timeline, at.stream.dictionary());
        selected
    }
}

impl Pieces {
    /// The step of the piece that a record stands in, if it stands in one.
    pub(crate) fn step_of(&self, ordinal: u64) -> Option<Option<u64>> {
        let next = self
            .pieces
            .partition_point(|piece| piece.ordinals.end <= ordinal);
        self.pieces
            .get(next)
            .filter(|piece| piece.ordinals.contains(&ordinal))
            .map(|piece| piece.step)
    }

    /// Counts samples, module calls and opaque regions inside of the pieces.
    fn count(&mut self, timeline: &Timeline, dictionary: &Dictionary) {
        for &(ordinal, samples) in &timeline.samples {
            self.add(
                ordinal,
                Divisors {
                    samples: Some(samples),
                    ..Divisors::default()
                },
            );
        }
        for &(ordinal, module, root) in &timeline.module_calls {
            if self.add(
                ordinal,
                Divisors {
                    root_calls: u64::from(root),
                    ..Divisors::default()
                },
            ) && let Some(module) = dictionary.module(ModuleId(module))
            {
                match self.module_calls.get_mut(&module.name) {
                    Some(calls) => *calls += 1,
                    None => drop(self.module_calls.insert(module.name.clone(), 1)),
                }
            }
        }
        self.opaque_regions = timeline
            .opaque
            .iter()
            .filter(|ordinal| self.step_of(**ordinal).is_some())
            .count() as u64;
    }

    /// Takes something in that a record says, if the record is inside.
    fn add(&mut self, ordinal: u64, found: Divisors) -> bool {
        let Some(step) = self.step_of(ordinal) else {
            return false;
        };
        self.divisors.add(found);
        self.by_step.entry(step).or_default().add(found);
        true
    }
}

/// Joins neighbours and forgets steps.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut all: Vec<Piece> = Vec::with_capacity(pieces.len());
    let mut pieces = pieces;
    pieces.sort_by_key(|piece| piece.ordinals.start);
    for piece in pieces {
        match all.last_mut() {
            // A step mark between two pieces is no op call.
            Some(last) if piece.ordinals.start <= last.ordinals.end.saturating_add(1) => {
                last.ordinals.end = last.ordinals.end.max(piece.ordinals.end);
            }
            _ => all.push(Piece {
                ordinals: piece.ordinals,
                step: None,
            }),
        }
    }
    all
}

fn plain_texts(globs: &[Glob]) -> Vec<String> {
    globs
        .iter()
        .filter(|g| g.is_plain())
        .map(ToString::to_string)
        .collect()
}

fn known(
    kind: &'static str,
    asked: &[String],
    names: &BTreeSet<String>,
) -> Result<(), ReplayError> {
    match asked.iter().find(|name| !names.contains(*name)) {
        Some(name) => Err(ReplayError::unknown_name(
            kind,
            name,
            names.iter().map(String::as_str),
        )),
        None => Ok(()),
    }
}

/// Whether a pattern names an op: with its overload in either spelling, or without.
pub(crate) fn op_matches(glob: &Glob, op: &OpDef) -> bool {
    glob.matches(&op.qualified_name())
        || glob.matches(&op.python_name())
        || glob.matches(&op.name)
        || glob.matches(&op.name.replacen("::", ".", 1))
}

fn last_part(class: &str) -> &str {
    class.rsplit('.').next().unwrap_or(class)
}

pub(crate) fn module_matches(glob: &Glob, name: &str, classes: &[String]) -> bool {
    glob.matches(name)
        || classes
            .iter()
            .any(|class| glob.matches(class) || glob.matches(last_part(class)))
}

/// The stage's name: the program's own, where it gave one.
pub(crate) fn stage_of(dictionary: &Dictionary, signature: &SignatureDef) -> String {
    match signature.stage_name {
        Some(id) => text(dictionary, id),
        None => signature.stage.name().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_names() {
        let matches = |pattern: &str, name: &str| Glob::new(pattern).matches(name);
        assert!(matches("Net.*", "Net.conv1"));
        assert!(matches("*conv?", "Net.conv1"));
        assert!(matches("*", ""));
        assert!(matches("a*b*c", "a--b-b--c"));
        assert!(!matches("Net.*", "Net"));
        assert!(!matches("conv", "Net.conv"));
        assert!(!matches("a*b", "a-c"));
    }

    #[test]
    fn steps_are_parsed_and_wrong_ones_refused() {
        assert_eq!(parse_steps("5"), Ok(5..6));
        assert_eq!(parse_steps("5..10"), Ok(5..10));
        assert_eq!(parse_steps("5..=10"), Ok(5..11));
        assert_eq!(parse_steps("..3"), Ok(0..3));
        assert_eq!(parse_steps("7.."), Ok(7..u64::MAX));
        for wrong in ["", "a", "5..5", "9..3", "-1", "1..x"] {
            assert!(parse_steps(wrong).is_err(), "{wrong}");
        }
    }
}
