//! What of a cost file, or of a counter, is changed from outside: `--set KEY=VALUE` and `--sweep KEY=VALUES`.
//!
//! A key is that of the file: `e_mac_pj`, `xbar_size`, a number of a memory `dram.read_pj`, a parameter `bits`. With the name of a model or a counter in front
//! it means that one alone: `lemaire.e_add_pj`. Values may have a unit, which is converted.

use serde::Serialize;
use toml::de::{DeTable, DeValue};

use super::costs::{Kind, MEMORY, MODELS, Model, setting};
use super::{CostFile, Setting};
use crate::error::{ReplayError, nearest};
use crate::rules::Counter;

/// `KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The key, perhaps behind the name of a model or a counter and a dot.
    pub key: String,
    /// The value, as it was written.
    pub value: String,
}

impl Assignment {
    /// Parses `KEY=VALUE`.
    ///
    /// # Errors
    /// Where there is no `=`, or nothing on one side of it.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() && !value.trim().is_empty() => Ok(Self {
                key: key.trim().to_owned(),
                value: value.trim().to_owned(),
            }),
            _ => Err(format!("'{text}' is no KEY=VALUE: write e_mac_pj=4.6")),
        }
    }

    /// The key, for an estimator of this name.
    #[must_use]
    pub fn key_of<'a>(&'a self, estimator: &str) -> &'a str {
        self.key
            .strip_prefix(estimator)
            .and_then(|rest| rest.strip_prefix('.'))
            .unwrap_or(&self.key)
    }
}

impl std::fmt::Display for Assignment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

/// Something that can be set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Key {
    /// As `--set` takes it.
    pub key: String,
    /// Its value now.
    pub value: String,
    /// Its unit, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<&'static str>,
    /// What it has to be.
    pub kind: String,
    /// Another value needs another pass over the events; else any number of values are computed from one pass.
    pub structural: bool,
}

/// A unit and how much of the key's own it is.
type Unit = (&'static str, f64);

const ENERGY: [Unit; 9] = [
    ("pJ", 1.0),
    ("aJ", 1e-6),
    ("fJ", 1e-3),
    ("nJ", 1e3),
    ("uJ", 1e6),
    ("µJ", 1e6),
    ("mJ", 1e9),
    ("J", 1e12),
    ("pj", 1.0),
];
const ENERGY_PER_BYTE: [Unit; 8] = [
    ("pJ/byte", 1.0),
    ("pJ/B", 1.0),
    ("fJ/byte", 1e-3),
    ("fJ/B", 1e-3),
    ("nJ/byte", 1e3),
    ("nJ/B", 1e3),
    ("pJ/bit", 8.0),
    ("fJ/bit", 8e-3),
];
const SIZE: [Unit; 7] = [
    ("KiB", 1.0),
    ("B", 1.0 / 1024.0),
    ("MiB", 1024.0),
    ("GiB", 1_048_576.0),
    ("kB", 1000.0 / 1024.0),
    ("MB", 1e6 / 1024.0),
    ("GB", 1e9 / 1024.0),
];
const BITS: [Unit; 2] = [("bit", 1.0), ("B", 8.0)];

/// The units of a key; the first is its own.
fn units(key: &str) -> &'static [Unit] {
    if key.ends_with("_pj_per_byte") {
        &ENERGY_PER_BYTE
    } else if key.ends_with("_pj") {
        &ENERGY
    } else if key.ends_with("_kib") {
        &SIZE
    } else if key.ends_with("_bits") {
        &BITS
    } else {
        &[]
    }
}

fn unit(key: &str) -> Option<&'static str> {
    units(key).first().map(|(name, _)| *name)
}

/// A number with or without a unit, in the key's own unit.
pub(crate) fn quantity(key: &str, text: &str) -> Result<f64, String> {
    let text = text.trim();
    let ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    let number = ends
        .filter_map(|end| Some((end, text.get(..end)?.trim_end().parse::<f64>().ok()?)))
        .last();
    let Some((end, number)) = number else {
        return Err(match unit(key) {
            Some(unit) => format!("'{text}' is no number of {unit}"),
            None => format!("'{text}' is no number"),
        });
    };
    let given = text.get(end..).unwrap_or("").trim();
    let units = units(key);
    let factor = match units.iter().find(|(name, _)| *name == given) {
        _ if given.is_empty() => 1.0,
        Some((_, factor)) => *factor,
        None => {
            return Err(match unit(key) {
                Some(own) => {
                    let known: Vec<&str> = units.iter().map(|(name, _)| *name).collect();
                    format!("'{key}' is in {own}, and '{given}' is none of {}", known.join(", "))
                }
                None => format!("'{key}' has no unit, and '{given}' stands behind its number"),
            });
        }
    };
    let value = number * factor;
    if value.is_finite() {
        Ok(value)
    } else {
        Err(format!("'{key}' is {number}; it has to be a finite number"))
    }
}

/// Settings that a model looks at only when it makes its report. All others change what it follows.
const OF_THE_REPORT: [(&str, &[&str]); 6] = [
    ("lemaire-2026-06", &["memory_breakpoints"]),
    ("lemaire-2.0.0", &["memory_breakpoints"]),
    ("neuromc-2026-06", &[]),
    ("neuromc-2.0.0", &[]),
    ("spikesim", &["device"]),
    ("residency", &["memory_breakpoints"]),
];

/// Whether another value of a key changes what a model follows, and so needs another pass.
pub(crate) fn is_structural(file: &CostFile, key: &str) -> bool {
    let first = key.split('.').next().unwrap_or(key);
    if !file.settings.contains_key(first) || super::model(file).simulation().is_none() {
        return false;
    }
    match OF_THE_REPORT.iter().find(|(model, _)| *model == file.model) {
        // Nothing of what NeuroMC follows depends on its costs and memories.
        Some((_, [])) => false,
        Some((_, keys)) => !keys.contains(&first),
        None => true,
    }
}

fn model_of(file: &CostFile) -> Option<&'static Model> {
    MODELS.iter().find(|model| model.name == file.model)
}

fn kind_of(file: &CostFile, key: &str) -> Option<Kind> {
    let (_, kind) = model_of(file)?.settings.iter().find(|(known, _)| *known == key)?;
    Some(*kind)
}

/// A setting as `--set` takes it.
fn text(setting: &Setting) -> String {
    match setting {
        Setting::Flag(flag) => flag.to_string(),
        Setting::Number(number) => number.to_string(),
        Setting::Choice(word) => word.clone(),
        Setting::Points(points) => {
            let points: Vec<String> = points.iter().map(|[x, y]| format!("[{x}, {y}]")).collect();
            format!("[{}]", points.join(", "))
        }
        Setting::Table(table) => {
            let numbers: Vec<String> = table.iter().map(|(k, v)| format!("{k} = {v}")).collect();
            format!("{{ {} }}", numbers.join(", "))
        }
        Setting::Words(words) => {
            let words: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
            format!("[{}]", words.join(", "))
        }
    }
}

impl CostFile {
    /// All that can be set in it: parameters, costs, settings.
    #[must_use]
    pub fn keys(&self) -> Vec<Key> {
        let key = |key: String, value: String, kind: String| Key {
            unit: unit(&key),
            structural: is_structural(self, &key),
            key,
            value,
            kind,
        };
        let mut all: Vec<Key> = self
            .parameters
            .iter()
            .map(|(name, value)| key(name.clone(), value.to_string(), "a finite number".to_owned()))
            .collect();
        // In the order of the model's table, which is that of its original.
        let model = model_of(self);
        for name in model.iter().flat_map(|model| model.costs) {
            let kind = match self.formulas.get(*name) {
                Some(formula) => format!("a number of at least 0; it follows from {}", formula.text),
                None => "a number of at least 0".to_owned(),
            };
            all.push(key((*name).to_owned(), self.cost(name).to_string(), kind));
        }
        for (name, kind) in model.iter().flat_map(|model| model.settings) {
            match (kind, self.settings.get(*name)) {
                (Kind::Memory, Some(Setting::Table(numbers))) => {
                    for part in MEMORY {
                        let value = numbers.get(part).copied().unwrap_or_default();
                        let kind = "a number of at least 0".to_owned();
                        all.push(key(format!("{name}.{part}"), value.to_string(), kind));
                    }
                }
                (_, Some(setting)) => {
                    all.push(key((*name).to_owned(), text(setting), kind.wanted()));
                }
                (_, None) => {}
            }
        }
        all
    }

    /// Whether there is such a key.
    #[must_use]
    pub fn has_key(&self, key: &str) -> bool {
        match key.split_once('.') {
            Some((memory, part)) => {
                matches!(self.settings.get(memory), Some(Setting::Table(_)))
                    && MEMORY.contains(&part)
            }
            None => {
                self.parameters.contains_key(key)
                    || self.costs.contains_key(key)
                    || self.settings.contains_key(key)
            }
        }
    }

    /// Sets a key that there is; gives the value that it had.
    ///
    /// # Errors
    /// Where the value is not what the key has to be: negative, no number, of another unit.
    pub fn set(&mut self, key: &str, value: &str) -> Result<String, ReplayError> {
        let wrong = |message: String| ReplayError::Setting(format!("{key}={value}: {message}"));
        let negative = |number: f64| {
            if number < 0.0 {
                Err(wrong(format!("'{key}' is negative; it is at least 0")))
            } else {
                Ok(number)
            }
        };
        if let Some(parameter) = self.parameters.get_mut(key) {
            let old = *parameter;
            *parameter = quantity(key, value).map_err(wrong)?;
            return match self.compute() {
                Ok(()) => Ok(old.to_string()),
                Err(error) => Err(wrong(format!("with it, {error}"))),
            };
        }
        if let Some(cost) = self.costs.get_mut(key) {
            let number = negative(quantity(key, value).map_err(wrong)?)?;
            // What is set follows from nothing any more.
            self.formulas.remove(key);
            return Ok(std::mem::replace(cost, number).to_string());
        }
        if let Some((memory, part)) = key.split_once('.')
            && let Some(Setting::Table(numbers)) = self.settings.get_mut(memory)
            && let Some(old) = numbers.get_mut(part)
        {
            let number = negative(quantity(part, value).map_err(wrong)?)?;
            return Ok(std::mem::replace(old, number).to_string());
        }
        let (Some(kind), Some(old)) = (kind_of(self, key), self.settings.get_mut(key)) else {
            return Err(wrong(format!("there is no key '{key}'")));
        };
        let given = match kind {
            Kind::Choice(words) if words.contains(&value) => {
                Some(Setting::Choice(value.to_owned()))
            }
            Kind::Count | Kind::Size | Kind::Share => {
                let number = quantity(key, value).map_err(wrong)?;
                let fits = match kind {
                    Kind::Count => number >= 1.0 && number.fract() == 0.0,
                    Kind::Share => (0.0..=1.0).contains(&number),
                    _ => number >= 0.0,
                };
                fits.then_some(Setting::Number(number))
            }
            _ => {
                let file = format!("x = {value}");
                DeTable::parse(&file)
                    .ok()
                    .filter(|table| table.get_ref().len() == 1)
                    .and_then(|table| {
                        let (_, value) = table.get_ref().iter().next()?;
                        let value: &DeValue<'_> = value.get_ref();
                        setting(kind, value).ok()
                    })
            }
        };
        let given = given.ok_or_else(|| wrong(format!("'{key}' is {}", kind.wanted())))?;
        Ok(text(&std::mem::replace(old, given)))
    }
}

impl Key {
    /// What a counter can be told: its [`settings`](Counter::settings).
    #[must_use]
    pub fn of_counter(counter: &dyn Counter) -> Vec<Self> {
        counter
            .settings()
            .iter()
            .map(|(name, value)| Self {
                key: (*name).to_owned(),
                value: value.to_string(),
                unit: unit(name),
                kind: "a number of at least 0".to_owned(),
                structural: true,
            })
            .collect()
    }
}

/// Why a key is in none of the estimators: the nearest that is, or where it can be found.
pub(crate) fn nowhere(
    flag: &str,
    key: &str,
    asked: &[(String, Vec<Key>)],
    others: &[(String, Vec<Key>)],
) -> ReplayError {
    let plain = |estimator: &str| {
        key.strip_prefix(estimator)
            .and_then(|rest| rest.strip_prefix('.'))
            .unwrap_or(key)
            .to_owned()
    };
    let holders: Vec<&str> = others
        .iter()
        .filter(|(name, keys)| keys.iter().any(|k| k.key == plain(name)))
        .map(|(name, _)| name.as_str())
        .collect();
    if !holders.is_empty() {
        let list = holders.join(", ");
        return ReplayError::Setting(format!(
            "{flag}: nothing that is computed here has '{key}'; {list} would have it: ask for one with --energy or --counters"
        ));
    }
    if let Some((estimator, keys)) = asked
        .iter()
        .find(|(name, _)| plain(name) != key)
    {
        let own = plain(estimator);
        let nearest = nearest(&own, keys.iter().map(|k| k.key.as_str()));
        return ReplayError::Setting(match nearest {
            Some(nearest) => {
                format!("{flag}: {estimator} has no key '{own}'; did you mean '{nearest}'?")
            }
            None => format!(
                "{flag}: {estimator} has no key '{own}'; `optape presets --keys` lists what can be set"
            ),
        });
    }
    let known = asked.iter().chain(others).flat_map(|(_, keys)| keys);
    ReplayError::Setting(match nearest(key, known.map(|k| k.key.as_str())) {
        Some(nearest) => format!("{flag}: there is no key '{key}'; did you mean '{nearest}'?"),
        None => format!(
            "{flag}: there is no key '{key}'; `optape presets --keys` lists what can be set"
        ),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{PRESETS, presets};
    use super::*;

    fn preset(name: &str) -> CostFile {
        presets(name).next().unwrap().costs().unwrap()
    }

    fn refused(file: &str, key: &str, value: &str) -> String {
        preset(file).set(key, value).unwrap_err().to_string()
    }

    #[test]
    fn costs_are_set_in_any_unit_of_energy() {
        let mut file = preset("compute_fp32");
        assert_eq!(file.set("e_mac_pj", "5").unwrap(), "4.6");
        assert_eq!(file.set("e_mac_pj", "2e-3 nJ").unwrap(), "5");
        assert_eq!(file.set("e_ac_pj", "500fJ").unwrap(), "0.9");
        assert_eq!((file.costs["e_mac_pj"], file.costs["e_ac_pj"]), (2.0, 0.5));
    }

    #[test]
    fn wrong_costs_are_refused() {
        let of = |value| refused("compute_fp32", "e_mac_pj", value);
        assert_eq!(of("-1"), "e_mac_pj=-1: 'e_mac_pj' is negative; it is at least 0");
        assert_eq!(of("nan"), "e_mac_pj=nan: 'e_mac_pj' is NaN; it has to be a finite number");
        assert!(of("inf").contains("finite number"));
        assert_eq!(of("x"), "e_mac_pj=x: 'x' is no number of pJ");
        assert!(of("4 ns").contains("'e_mac_pj' is in pJ, and 'ns' is none of pJ, aJ"));
        assert!(of("4 KiB").contains("is in pJ"));
        assert!(refused("compute_bits", "bits", "8 pJ").contains("has no unit"));
    }

    #[test]
    fn parameters_move_the_costs_that_follow_from_them() {
        let mut file = preset("compute_bits");
        let before = file.costs.clone();
        file.set("bits", "32").unwrap();
        assert!(file.costs["e_mac_pj"] > before["e_mac_pj"]);
        // A cost that is set stays as it is.
        file.set("e_mac_pj", "1").unwrap();
        file.set("bits", "8").unwrap();
        assert_eq!(file.costs["e_mac_pj"], 1.0);
        assert_eq!(file.costs["e_ac_pj"], before["e_ac_pj"]);
    }

    #[test]
    fn settings_are_what_they_have_to_be() {
        let mut file = preset("spikesim_event");
        file.set("device", "sram").unwrap();
        file.set("strict", "true").unwrap();
        file.set("xbar_size", "16").unwrap();
        assert_eq!((file.choice("device"), file.number("xbar_size")), ("sram", 16.0));
        assert_eq!(
            refused("spikesim_event", "device", "dram"),
            "device=dram: 'device' is one of 'rram', 'sram'"
        );
        assert!(refused("spikesim_event", "strict", "yes").ends_with("'strict' is true or false"));
        assert!(refused("spikesim_event", "xbar_size", "0").contains("at least 1"));
        assert!(refused("spikesim_event", "xbar_size", "2.5").contains("whole number"));
        let mut file = preset("neuromc");
        file.set("dram.read_pj", "1nJ").unwrap();
        let Some(Setting::Table(dram)) = file.settings.get("dram") else {
            panic!("it has a dram");
        };
        assert_eq!(dram["read_pj"], 1000.0);
        assert!(refused("neuromc", "dram.read_pj", "-1").contains("negative"));
        assert!(refused("neuromc", "process_keys", "['with_x']").contains("'with_sg'"));
        let points = "[[0, 0], [1, 1], [2, 2], [3, 3]]";
        let mut file = preset("lemaire_no_sparse");
        file.set("memory_breakpoints", points).unwrap();
        assert_eq!(file.points("memory_breakpoints")[3], [3.0, 3.0]);
        assert!(refused("lemaire_no_sparse", "memory_breakpoints", "[[1, 1]]").contains("4 pairs"));
        assert!(refused("lemaire_no_sparse", "memory_breakpoints", "1\ny = 2").contains("4 pairs"));
    }

    #[test]
    fn every_key_can_be_set_to_the_value_that_it_has() {
        for shipped in PRESETS {
            let file = shipped.costs().unwrap();
            let keys = file.keys();
            assert!(!keys.is_empty());
            for key in keys {
                assert!(file.has_key(&key.key), "{}", key.key);
                let mut same = file.clone();
                assert_eq!(same.set(&key.key, &key.value).unwrap(), key.value, "{}", key.key);
                assert_eq!((&same.costs, &same.settings), (&file.costs, &file.settings));
            }
        }
    }

    #[test]
    fn assignments_may_name_an_estimator() {
        let one = Assignment::parse(" lemaire.e_add_pj = 0.2 ").unwrap();
        assert_eq!((one.key_of("lemaire"), one.key_of("simple")), ("e_add_pj", "lemaire.e_add_pj"));
        assert_eq!(one.to_string(), "lemaire.e_add_pj=0.2");
        for wrong in ["", "x", "=1", "x="] {
            assert!(Assignment::parse(wrong).unwrap_err().contains("KEY=VALUE"));
        }
    }

    proptest! {
        #[test]
        fn any_value_is_taken_or_refused(value in "\\PC{0,20}", at in 0usize..64) {
            for name in ["compute_bits", "lemaire_no_sparse", "neuromc", "spikesim_event", "residency"] {
                let mut file = preset(name);
                let keys = file.keys();
                let key = &keys[at % keys.len()].key;
                if file.set(key, &value).is_ok() {
                    prop_assert!(file.costs.values().all(|cost| cost.is_finite() && *cost >= 0.0));
                }
            }
        }

        #[test]
        fn numbers_come_back(number in 0.0f64..1e12) {
            prop_assert_eq!(quantity("e_mac_pj", &number.to_string()), Ok(number));
            prop_assert_eq!(quantity("sram_kib", &format!("{number} KiB")), Ok(number));
        }
    }
}
