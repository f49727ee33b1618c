//! Which scope of the second is which of the first.
//!
//! Equal names are the same scope. Where each side has one root module that the other lacks (the class of the network differs), the two
//! are taken for each other, with everything inside. The rest is said by the user.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::error::ReplayError;

/// Names of the first, as the second has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Names {
    /// From, to; the user's.
    map: Vec<(String, String)>,
    /// The root that is another one's.
    pub(super) root: Option<(String, String)>,
}

/// A name of each side, or of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) a: Option<String>,
    pub(super) b: Option<String>,
}

impl Names {
    pub(super) fn of(
        a: BTreeSet<String>,
        b: BTreeSet<String>,
        map: &[(String, String)],
    ) -> Result<Self, ReplayError> {
        for (from, to) in map {
            for (name, scopes) in [(from, &a), (to, &b)] {
                if !scopes.iter().any(|scope| moved(scope, name, "").is_some()) {
                    return Err(ReplayError::unknown_name(
                        "scope",
                        name,
                        scopes.iter().map(String::as_str),
                    ));
                }
            }
        }
        let roots = |scopes: &BTreeSet<String>| -> BTreeSet<String> {
            let roots = scopes.iter().filter_map(|scope| scope.split('.').next());
            roots
                .filter(|root| *root != "Global")
                .map(str::to_owned)
                .collect()
        };
        let (roots_a, roots_b) = (roots(&a), roots(&b));
        let alone = |these: &BTreeSet<String>, others: &BTreeSet<String>| {
            let mut alone = these.difference(others);
            match (alone.next(), alone.next()) {
                (Some(only), None) => Some(only.clone()),
                _ => None,
            }
        };
        let root = alone(&roots_a, &roots_b).zip(alone(&roots_b, &roots_a));
        // What the user says of a root holds.
        let root = root.filter(|(from, _)| !map.iter().any(|(known, _)| known == from));
        Ok(Self {
            map: map.to_vec(),
            root,
        })
    }

    /// What a name of the first is called in the second. The longest of several that are said wins.
    fn in_second(&self, name: &str) -> String {
        let said = self
            .map
            .iter()
            .filter_map(|(from, to)| Some((from.len(), moved(name, from, to)?)))
            .max_by_key(|(length, _)| *length);
        let root = || {
            let (from, to) = self.root.as_ref()?;
            moved(name, from, to)
        };
        said.map(|(_, name)| name)
            .or_else(root)
            .unwrap_or_else(|| name.to_owned())
    }
}

/// A name inside of `from` (or that itself), inside of `to`.
pub(super) fn moved(name: &str, from: &str, to: &str) -> Option<String> {
    let below = name.strip_prefix(from)?;
    (below.is_empty() || below.starts_with('.')).then(|| format!("{to}{below}"))
}

/// Pairs the names of both sides. What only one has stands where it stands there: behind what it comes after.
pub(super) fn pairs(a: &[String], b: &[String], names: &Names) -> Vec<Pair> {
    let places: HashMap<&str, usize> = b
        .iter()
        .enumerate()
        .map(|(at, name)| (name.as_str(), at))
        .collect();
    let mut taken: HashSet<usize> = HashSet::new();
    let of_a: Vec<(&String, Option<usize>)> = a
        .iter()
        .map(|name| {
            let place = places.get(names.in_second(name).as_str()).copied();
            (name, place.filter(|place| taken.insert(*place)))
        })
        .collect();
    let mut pairs = Vec::with_capacity(a.len() + b.len() - taken.len());
    let mut next = 0;
    let mut only_b = |until: usize, pairs: &mut Vec<Pair>| {
        while next < until {
            if let Some(name) = b.get(next).filter(|_| !taken.contains(&next)) {
                pairs.push(Pair {
                    a: None,
                    b: Some(name.clone()),
                });
            }
            next += 1;
        }
    };
    for (name, place) in of_a {
        if let Some(place) = place {
            only_b(place, &mut pairs);
        }
        pairs.push(Pair {
            a: Some(name.clone()),
            b: place.and_then(|place| b.get(place)).cloned(),
        });
    }
    only_b(b.len(), &mut pairs);
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn shown(pairs: &[Pair]) -> String {
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "-".to_owned());
        let pairs = pairs
            .iter()
            .map(|pair| format!("{}:{}", name(&pair.a), name(&pair.b)));
        pairs.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn roots_of_other_classes_are_one_and_the_rest_stands_where_it_belongs() {
        let a = ["Global", "Snn", "Snn.conv", "Snn.lif", "Snn.fc"];
        let b = ["Global", "Ann", "Ann.conv", "Ann.relu", "Ann.fc", "Ann.out"];
        let names = Names::of(set(&a), set(&b), &[]).unwrap();
        assert_eq!(names.root, Some(("Snn".to_owned(), "Ann".to_owned())));
        assert_eq!(
            shown(&pairs(&list(&a), &list(&b), &names)),
            "Global:Global Snn:Ann Snn.conv:Ann.conv Snn.lif:- -:Ann.relu Snn.fc:Ann.fc -:Ann.out"
        );
    }

    #[test]
    fn what_the_user_says_wins_and_has_to_exist() {
        let (a, b) = (["Net.lif", "Net.lif.act"], ["Net.relu", "Net.relu.act"]);
        let map = [("Net.lif".to_owned(), "Net.relu".to_owned())];
        let names = Names::of(set(&a), set(&b), &map).unwrap();
        assert_eq!(
            shown(&pairs(&list(&a), &list(&b), &names)),
            "Net.lif:Net.relu Net.lif.act:Net.relu.act"
        );
        let wrong = [("Net.lfi".to_owned(), "Net.relu".to_owned())];
        let error = Names::of(set(&a), set(&b), &wrong).unwrap_err().to_string();
        assert!(error.contains("did you mean 'Net.lif'?"), "{error}");
    }

    #[test]
    fn several_new_roots_are_left_alone() {
        let names = Names::of(set(&["A", "B"]), set(&["C"]), &[]).unwrap();
        assert_eq!(names.root, None);
        // A name that is the beginning of another is not inside of it.
        assert_eq!(moved("Net.fc10", "Net.fc1", "x"), None);
    }

    #[test]
    fn nothing_is_paired_twice_and_nothing_gets_lost() {
        // Two of the first have one name in the second.
        let map = [
            ("x".to_owned(), "z".to_owned()),
            ("y".to_owned(), "z".to_owned()),
        ];
        let names = Names::of(set(&["x", "y"]), set(&["z"]), &map).unwrap();
        assert_eq!(
            shown(&pairs(&list(&["x", "y"]), &list(&["z"]), &names)),
            "x:z y:-"
        );
        let same = Names::default();
        assert_eq!(
            shown(&pairs(&list(&["c", "a"]), &list(&["a", "b", "c"]), &same)),
            "-:b c:c a:a"
        );
    }
}
