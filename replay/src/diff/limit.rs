//! How much two replays may differ: `5%`, `flop=0`, `compute_fp32=+2.5%`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::{COUNTERS, Change, ENERGY, MEASURED};
use crate::error::ReplayError;

/// Which changes count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Both.
    Either,
    /// More.
    Up,
    /// Less.
    Down,
}

/// How much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// In the metric's unit.
    Absolute(f64),
    /// In percent of the first.
    Percent(f64),
}

/// A limit: all totals, or one, may differ so much.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    /// Of one metric alone: `flop`, `counters/flop`, `compute_fp32`.
    pub of: Option<String>,
    /// Which changes count.
    pub direction: Direction,
    /// How much.
    pub bound: Bound,
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |why: &str| {
            format!(
                "'{text}' is no limit: {why}; write 5%, +5% (more alone), -5% (less alone), 1e6 (in the unit), or one of these for \
                 one counter or model: compute_fp32=+5%"
            )
        };
        let (of, rest) = match text.rsplit_once('=') {
            Some((name, _)) if name.trim().is_empty() => {
                return Err(bad("no name stands before '='"));
            }
            Some((name, rest)) => (Some(name.trim().to_owned()), rest.trim()),
            None => (None, text.trim()),
        };
        let (direction, rest) = match (rest.strip_prefix('+'), rest.strip_prefix('-')) {
            (Some(rest), _) => (Direction::Up, rest),
            (_, Some(rest)) => (Direction::Down, rest),
            _ => (Direction::Either, rest),
        };
        let (number, relative) = match rest.strip_suffix('%') {
            Some(number) => (number.trim(), true),
            None => (rest, false),
        };
        let number: f64 = number
            .parse()
            .map_err(|_| bad(&format!("'{number}' is no number")))?;
        if !number.is_finite() || number < 0.0 {
            return Err(bad("a limit is a finite number of at least 0"));
        }
        let bound = if relative {
            Bound::Percent(number)
        } else {
            Bound::Absolute(number)
        };
        Ok(Self {
            of,
            direction,
            bound,
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(of) = &self.of {
            write!(f, "{of}=")?;
        }
        f.write_str(match self.direction {
            Direction::Either => "",
            Direction::Up => "+",
            Direction::Down => "-",
        })?;
        match self.bound {
            Bound::Absolute(number) => write!(f, "{number}"),
            Bound::Percent(number) => write!(f, "{number}%"),
        }
    }
}

impl Limit {
    /// The metric that it is of, by its whole name.
    ///
    /// # Errors
    /// Where nothing of that name was compared.
    pub(super) fn metric<'c>(
        &self,
        totals: &'c [Change],
        not_compared: &BTreeMap<String, String>,
    ) -> Result<Option<&'c str>, ReplayError> {
        let Some(of) = &self.of else {
            return Ok(None);
        };
        let is_meant = |metric: &str| {
            let short = [COUNTERS, ENERGY, MEASURED]
                .iter()
                .find_map(|section| metric.strip_prefix(section));
            metric == of || short == Some(of)
        };
        if let Some(change) = totals.iter().find(|change| is_meant(&change.metric)) {
            return Ok(Some(&change.metric));
        }
        if let Some((name, why)) = not_compared.iter().find(|(name, _)| is_meant(name)) {
            return Err(ReplayError::Refused {
                estimator: format!("the difference of {name}, which the limit {self} is of,"),
                reason: why.clone(),
            });
        }
        Err(ReplayError::unknown_name(
            "counter or model",
            of,
            totals.iter().map(|change| change.metric.as_str()),
        ))
    }

    /// Whether a change passes it. What only one side has is no change.
    pub(super) fn is_passed_by(&self, change: &Change) -> bool {
        let (Some(difference), Some(a)) = (change.difference, change.a) else {
            return false;
        };
        let (difference, a) = (difference.value(), a.value());
        let counts = match self.direction {
            Direction::Either => true,
            Direction::Up => difference > 0.0,
            Direction::Down => difference < 0.0,
        };
        counts
            && match self.bound {
                Bound::Absolute(most) => difference.abs() > most,
                // Not divided: something where there was nothing is more than any share.
                Bound::Percent(most) => difference.abs() * 100.0 > most * a.abs(),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::{Amount, Metric};

    fn change(a: f64, b: f64) -> Change {
        let metric = Metric {
            name: "energy/compute_fp32".to_owned(),
            unit: "pJ".to_owned(),
        };
        Change::of(&metric, Some(Amount::Float(a)), Some(Amount::Float(b)))
    }

    fn passes(limit: &str, a: f64, b: f64) -> bool {
        limit.parse::<Limit>().unwrap().is_passed_by(&change(a, b))
    }

    #[test]
    fn limits_are_read_as_they_are_written() {
        for text in [
            "5%",
            "+5%",
            "-2.5%",
            "1000",
            "flop=0",
            "energy/compute_fp32=+5%",
        ] {
            assert_eq!(text.parse::<Limit>().unwrap().to_string(), text);
        }
        for wrong in [
            "", "%", "5%%", "=5%", "flop=", "-", "nan", "inf%", "5 pJ", "--5%",
        ] {
            let error = wrong.parse::<Limit>().unwrap_err();
            assert!(error.contains("is no limit"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_limit_is_passed_by_more_than_it_says_and_not_by_as_much() {
        assert!(!passes("5%", 100.0, 105.0));
        assert!(passes("5%", 100.0, 106.0));
        assert!(passes("5%", 100.0, 94.0));
        assert!(!passes("+5%", 100.0, 94.0));
        assert!(passes("-5%", 100.0, 94.0));
        assert!(!passes("10", 100.0, 110.0));
        assert!(passes("0", 100.0, 100.5));
        assert!(!passes("0", 100.0, 100.0));
        assert!(!passes("7%", 100.0, 107.0), "7 % is not past 7 %");
        assert!(passes("1000%", 0.0, 1.0), "something from nothing");
        assert!(!passes("0%", 0.0, 0.0));
    }

    #[test]
    fn names_are_found_with_and_without_their_section() {
        let totals = [change(1.0, 2.0)];
        let refused = BTreeMap::from([("counters/neuron_state".to_owned(), "no T7".to_owned())]);
        let metric = |text: &str| {
            let limit: Limit = text.parse().unwrap();
            limit
                .metric(&totals, &refused)
                .map(|name| name.map(str::to_owned))
                .map_err(|e| e.to_string())
        };
        assert_eq!(metric("5%"), Ok(None));
        let whole = Ok(Some("energy/compute_fp32".to_owned()));
        assert_eq!(metric("compute_fp32=5%"), whole);
        assert_eq!(metric("energy/compute_fp32=5%"), whole);
        assert!(metric("neuron_state=5%").unwrap_err().contains("no T7"));
        let error = metric("energy/compute_fp16=5%").unwrap_err();
        assert!(error.contains("did you mean"), "{error}");
    }
}
