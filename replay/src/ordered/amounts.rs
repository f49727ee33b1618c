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
    pub(crate) place: Place,
    kept: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Amounts {
    /// Counts the present call under its op, in each of its scopes.
    pub fn count(&mut self, value: i128) {
        let op = Arc::clone(&self.place.op);
        self.count_as(&op, value);
        if let Some(row) = self.place.row {
            let sum = self.rows.entry(row).or_default();
            *sum = sum.saturating_add(value);
        }
    }

    /// Counts under another name than that of an op.
    pub fn count_as(&mut self, name: &str, value: i128) {
        self.total = self.total.saturating_add(value);
        if value == 0 {
            return;
        }
        let scopes = Arc::clone(&self.place.scopes);
        for scope in scopes.iter() {
            let ops = self.scopes.entry(scope.clone()).or_default();
            let sum = ops.entry(name.to_owned()).or_default();
            *sum = sum.saturating_add(value);
        }
    }

    /// Sets the scopes that [`Self::count`] and [`Self::add_by_scope`] count in, for calls of modules that are named otherwise than by the
    /// stack.
    pub fn set_scopes(&mut self, scopes: impl Into<Arc<[String]>>) {
        self.place.scopes = scopes.into();
    }

    /// The scopes of the present call, `Global` among them.
    #[must_use]
    pub fn scopes(&self) -> Arc<[String]> {
        Arc::clone(&self.place.scopes)
    }

    /// The op of the present call, as reports name it.
    #[must_use]
    pub fn op(&self) -> Arc<str> {
        Arc::clone(&self.place.op)
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
    pub fn add_by_scope(&mut self, section: &'static str, name: &str, amount: i128) {
        let scopes = Arc::clone(&self.place.scopes);
        for scope in scopes.iter() {
            self.add(section, &[scope, name], amount);
        }
    }

    /// Raises a number in each scope of the present call.
    pub fn raise_by_scope(&mut self, section: &'static str, name: &str, amount: i128) {
        let scopes = Arc::clone(&self.place.scopes);
        for scope in scopes.iter() {
            self.raise(section, &[scope, name], amount);
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
        amounts.place.op = "aten.mm.default".into();
        amounts.set_scopes(["Global".to_owned(), "Net".to_owned()]);
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
}
