//! What counters add up beside one number per op: metrics by scope, bits by level, operations by stage.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use optape_trace::{PatternId, SignatureId};
use serde::Serialize;

/// Numbers by name, in as many levels as a counter has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Tree {
    /// A number.
    Amount(i128),
    /// Numbers by name.
    Branch(BTreeMap<String, Tree>),
}

impl Tree {
    fn empty() -> Self {
        Self::Branch(BTreeMap::new())
    }

    fn leaf(&mut self, path: &[&str]) -> &mut i128 {
        match path {
            [] => {
                if !matches!(self, Self::Amount(_)) {
                    *self = Self::Amount(0);
                }
                match self {
                    Self::Amount(amount) => amount,
                    Self::Branch(_) => unreachable!("it was made an amount"),
                }
            }
            [first, rest @ ..] => {
                if matches!(self, Self::Amount(_)) {
                    *self = Self::empty();
                }
                match self {
                    Self::Branch(branch) => branch
                        .entry((*first).to_owned())
                        .or_insert_with(|| {
                            if rest.is_empty() {
                                Self::Amount(0)
                            } else {
                                Self::empty()
                            }
                        })
                        .leaf(rest),
                    Self::Amount(_) => unreachable!("it was made a branch"),
                }
            }
        }
    }

    /// The number at a path; 0 where there is none.
    #[must_use]
    pub fn at(&self, path: &[&str]) -> i128 {
        match (self, path) {
            (Self::Amount(amount), []) => *amount,
            (Self::Branch(branch), [first, rest @ ..]) => {
                branch.get(*first).map_or(0, |tree| tree.at(rest))
            }
            _ => 0,
        }
    }
}

/// Calls that groups cannot tell apart.
pub(crate) type RowKey = (usize, usize, Option<u64>, SignatureId, PatternId);

/// Where the amounts of a call go.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place {
    /// Scopes on the stack, `Global` among them.
    pub(crate) scopes: Arc<[String]>,
    /// The op, as the report names it.
    pub(crate) op: Arc<str>,
    /// The row that the call belongs to.
    pub(crate) row: Option<RowKey>,
}

/// What calls of one place have added, before it is spread over their scopes.
#[derive(Clone, Debug)]
struct Pending {
    place: Place,
    count: i128,
    counted: bool,
    by_scope: Vec<(&'static str, &'static str, Sum)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sum {
    Added(i128),
    Greatest(i128),
}

/// Whose amounts come next.
#[derive(Clone, Debug)]
enum At {
    /// Those of calls that are alike: index into the pending ones.
    Alike(usize),
    /// Those of a call of its own.
    Own(Place),
}

impl Default for At {
    fn default() -> Self {
        Self::Own(Place::default())
    }
}

/// Sums of a counter or of what an energy model follows.
#[derive(Clone, Debug, Default)]
pub struct Amounts {
    /// By section of the report.
    pub(crate) sections: BTreeMap<&'static str, Tree>,
    /// Scope, op, number.
    pub(crate) scopes: BTreeMap<String, BTreeMap<String, i128>>,
    /// Sum of everything counted.
    pub(crate) total: i128,
    /// By row of op calls.
    pub(crate) rows: HashMap<RowKey, i128>,
    at: At,
    pending: Vec<Pending>,
    /// Where in the list of the pending place's sums the last addition was: calls that are alike add in the same order.
    cursor: usize,
    explained: Option<Vec<String>>,
    kept: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Amounts {
    /// Sums that take down what is said about them ([`Self::explain`]).
    pub(crate) fn explaining(place: Place) -> Self {
        Self {
            at: At::Own(place),
            explained: Some(Vec::new()),
            ..Self::default()
        }
    }

    /// What was said about the sums.
    pub(crate) fn explanations(&mut self) -> Vec<String> {
        self.explained.take().unwrap_or_default()
    }

    /// Says how the numbers of the present call come about, where somebody asks (`--explain`).
    pub fn explain(&mut self, text: impl FnOnce() -> String) {
        if let Some(explained) = &mut self.explained {
            explained.push(text());
        }
    }

    /// Whether somebody asks.
    #[must_use]
    pub const fn is_explaining(&self) -> bool {
        self.explained.is_some()
    }

    /// The next amounts are those of a call like others: its number among `places`.
    #[inline]
    pub(crate) fn stand_alike(&mut self, number: usize, places: &[Place]) {
        if self.pending.len() <= number {
            let known = self.pending.len();
            self.pending.extend(places.iter().skip(known).map(|place| Pending {
                place: place.clone(),
                count: 0,
                counted: false,
                by_scope: Vec::new(),
            }));
        }
        self.at = At::Alike(number);
        self.cursor = 0;
    }

    /// The next amounts are those of a call of its own.
    pub(crate) fn stand_at(&mut self, place: Place) {
        self.at = At::Own(place);
    }

    /// Spreads what is pending over scopes and rows. Numbers of places mean nothing afterwards.
    pub(crate) fn settle(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            let place = pending.place;
            if pending.counted {
                self.count_in(&place.scopes, &place.op, pending.count);
                if let Some(row) = place.row {
                    let sum = self.rows.entry(row).or_default();
                    *sum = sum.saturating_add(pending.count);
                }
            }
            for (section, name, sum) in pending.by_scope {
                for scope in place.scopes.iter() {
                    match sum {
                        Sum::Added(amount) => self.add(section, &[scope, name], amount),
                        Sum::Greatest(amount) => self.raise(section, &[scope, name], amount),
                    }
                }
            }
        }
        self.at = At::default();
    }

    fn place(&self) -> Option<&Place> {
        match &self.at {
            At::Alike(number) => self.pending.get(*number).map(|pending| &pending.place),
            At::Own(place) => Some(place),
        }
    }

    /// Counts the present call under its op, in each of its scopes.
    pub fn count(&mut self, value: i128) {
        match &self.at {
            At::Alike(number) => {
                if let Some(pending) = self.pending.get_mut(*number) {
                    pending.count = pending.count.saturating_add(value);
                    pending.counted = true;
                }
            }
            At::Own(place) => {
                let place = place.clone();
                self.count_in(&place.scopes, &place.op, value);
                if let Some(row) = place.row {
                    let sum = self.rows.entry(row).or_default();
                    *sum = sum.saturating_add(value);
                }
            }
        }
    }

    /// Counts under another name than that of an op.
    pub fn count_as(&mut self, name: &str, value: i128) {
        let scopes = self.scopes();
        self.count_in(&scopes, name, value);
    }

    fn count_in(&mut self, scopes: &[String], name: &str, value: i128) {
        self.total = self.total.saturating_add(value);
        if value == 0 {
            return;
        }
        for scope in scopes {
            if !self.scopes.contains_key(scope) {
                self.scopes.insert(scope.clone(), BTreeMap::new());
            }
            let Some(ops) = self.scopes.get_mut(scope) else {
                continue;
            };
            match ops.get_mut(name) {
                Some(sum) => *sum = sum.saturating_add(value),
                None => {
                    ops.insert(name.to_owned(), value);
                }
            }
        }
    }

    /// Sets the scopes that [`Self::count`] and [`Self::add_by_scope`] count in, for calls of modules that are named otherwise than by the
    /// stack.
    pub fn set_scopes(&mut self, scopes: impl Into<Arc<[String]>>) {
        let place = self.place().cloned().unwrap_or_default();
        self.at = At::Own(Place {
            scopes: scopes.into(),
            ..place
        });
    }

    /// The scopes of the present call, `Global` among them.
    #[must_use]
    pub fn scopes(&self) -> Arc<[String]> {
        self.place().map(|p| Arc::clone(&p.scopes)).unwrap_or_default()
    }

    /// The op of the present call, as reports name it.
    #[must_use]
    pub fn op(&self) -> Arc<str> {
        self.place().map(|p| Arc::clone(&p.op)).unwrap_or_default()
    }

    /// Adds to a number of a section. Zeros are left out.
    pub fn add(&mut self, section: &'static str, path: &[&str], amount: i128) {
        if amount != 0 {
            let leaf = self.leaf(section, path);
            *leaf = leaf.saturating_add(amount);
        }
    }

    /// Raises a number of a section to at least `amount`.
    pub fn raise(&mut self, section: &'static str, path: &[&str], amount: i128) {
        if amount > 0 {
            let leaf = self.leaf(section, path);
            *leaf = (*leaf).max(amount);
        }
    }

    /// Adds to a number in each scope of the present call.
    pub fn add_by_scope(&mut self, section: &'static str, name: &'static str, amount: i128) {
        if amount != 0 {
            self.by_scope(section, name, Sum::Added(amount));
        }
    }

    /// Raises a number in each scope of the present call.
    pub fn raise_by_scope(&mut self, section: &'static str, name: &'static str, amount: i128) {
        if amount > 0 {
            self.by_scope(section, name, Sum::Greatest(amount));
        }
    }

    #[inline]
    fn by_scope(&mut self, section: &'static str, name: &'static str, sum: Sum) {
        let At::Alike(number) = &self.at else {
            for scope in self.scopes().iter() {
                match sum {
                    Sum::Added(amount) => self.add(section, &[scope, name], amount),
                    Sum::Greatest(amount) => self.raise(section, &[scope, name], amount),
                }
            }
            return;
        };
        let Some(pending) = self.pending.get_mut(*number) else {
            return;
        };
        let list = &mut pending.by_scope;
        let same = |(s, n, known): &(&'static str, &'static str, Sum)| {
            std::ptr::eq(*n, name)
                && std::ptr::eq(*s, section)
                && matches!(
                    (known, sum),
                    (Sum::Added(_), Sum::Added(_)) | (Sum::Greatest(_), Sum::Greatest(_))
                )
        };
        let place = match list.get(self.cursor) {
            Some(next) if same(next) => self.cursor,
            _ => match list.iter().position(same) {
                Some(place) => place,
                None => {
                    let start = match sum {
                        Sum::Added(_) => Sum::Added(0),
                        Sum::Greatest(_) => Sum::Greatest(0),
                    };
                    list.push((section, name, start));
                    list.len() - 1
                }
            },
        };
        self.cursor = place + 1;
        if let Some((_, _, known)) = list.get_mut(place) {
            match (known, sum) {
                (Sum::Added(known), Sum::Added(more)) => *known = known.saturating_add(more),
                (Sum::Greatest(known), Sum::Greatest(other)) => *known = (*known).max(other),
                _ => {}
            }
        }
    }

    /// A number of a section; 0 where there is none.
    #[must_use]
    pub fn get(&self, section: &str, path: &[&str]) -> i128 {
        self.sections.get(section).map_or(0, |tree| tree.at(path))
    }

    /// Keeps what cannot be told as numbers, for the model that follows the stream itself.
    pub fn keep<T: Any + Send + Sync>(&mut self, value: T) {
        self.kept.push(Arc::new(value));
    }

    /// What was kept: one value for each stream that kept one.
    pub fn kept<T: Any + Send + Sync>(&self) -> impl Iterator<Item = &T> {
        self.kept.iter().filter_map(|value| value.downcast_ref())
    }

    /// The names in a section.
    #[must_use]
    pub fn names(&self, section: &str) -> Vec<String> {
        match self.sections.get(section) {
            Some(Tree::Branch(branch)) => branch.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// Names and numbers of a part of a section.
    #[must_use]
    pub fn numbers(&self, section: &str, name: &str) -> Vec<(String, i128)> {
        let Some(Tree::Branch(branch)) = self.sections.get(section) else {
            return Vec::new();
        };
        let Some(Tree::Branch(part)) = branch.get(name) else {
            return Vec::new();
        };
        part.iter()
            .map(|(name, tree)| (name.clone(), tree.at(&[])))
            .collect()
    }

    fn leaf(&mut self, section: &'static str, path: &[&str]) -> &mut i128 {
        self.sections
            .entry(section)
            .or_insert_with(Tree::empty)
            .leaf(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_stand_in_every_scope_once() {
        let mut amounts = Amounts::default();
        let place = Place {
            scopes: ["Global".to_owned(), "Net".to_owned()].into(),
            op: "aten.mm.default".into(),
            row: None,
        };
        amounts.stand_at(place.clone());
        amounts.count(3);
        amounts.add_by_scope("metrics", "reads", 5);
        amounts.add_by_scope("metrics", "reads", 2);
        amounts.raise_by_scope("metrics", "most", 4);
        amounts.raise_by_scope("metrics", "most", 1);
        amounts.add("metrics", &["Global", "zero"], 0);
        assert_eq!(amounts.total, 3);
        assert_eq!(amounts.scopes["Net"]["aten.mm.default"], 3);
        assert_eq!(amounts.get("metrics", &["Net", "reads"]), 7);
        assert_eq!(amounts.get("metrics", &["Global", "most"]), 4);
        assert_eq!(
            serde_json::to_string(&amounts.sections["metrics"]).unwrap(),
            r#"{"Global":{"most":4,"reads":7},"Net":{"most":4,"reads":7}}"#
        );
        assert_eq!(amounts.get("metrics", &["Global"]), 0);
    }

    #[test]
    fn calls_that_are_alike_give_what_each_would_give_alone() {
        let place = |scopes: &[&str]| Place {
            scopes: scopes.iter().map(|s| (*s).to_owned()).collect(),
            op: "aten.mm.default".into(),
            row: Some((0, 0, None, SignatureId(1), PatternId(scopes.len() as u32))),
        };
        let places = [place(&["Global"]), place(&["Global", "Net"])];
        let (mut together, mut alone) = (Amounts::default(), Amounts::default());
        for (number, value) in [(1, 5), (0, 2), (1, 7), (1, 0)] {
            together.stand_alike(number, &places);
            alone.stand_at(places[number].clone());
            for amounts in [&mut together, &mut alone] {
                assert_eq!(amounts.scopes(), places[number].scopes);
                amounts.add_by_scope("metrics", "reads", value);
                amounts.raise_by_scope("metrics", "most", value);
                amounts.add_by_scope("metrics", "more", 1);
                amounts.count(value);
            }
        }
        together.settle();
        assert_eq!(together.sections, alone.sections);
        assert_eq!(together.scopes, alone.scopes);
        assert_eq!((together.total, &together.rows), (alone.total, &alone.rows));
        assert_eq!(together.get("metrics", &["Net", "most"]), 7);
    }
}
