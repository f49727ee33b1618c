//! Costs come from TOML: shipped presets, or a file of the user's. Mistakes are reported with line and column.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::error::{ReplayError, nearest, position};

/// Presets that are shipped: name and text.
pub const PRESETS: [(&str, &str); 3] = [
    (
        "compute_fp32",
        include_str!("../../presets/compute_fp32.toml"),
    ),
    (
        "compute_fp16",
        include_str!("../../presets/compute_fp16.toml"),
    ),
    (
        "compute_int8",
        include_str!("../../presets/compute_int8.toml"),
    ),
];

/// The text of a preset, to be copied and edited.
#[must_use]
pub fn preset_text(name: &str) -> Option<&'static str> {
    PRESETS
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, text)| *text)
}

/// A cost file: which model it is for, and its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct CostFile {
    /// Under which the report appears.
    pub name: String,
    /// `compute`.
    pub model: String,
    /// By key.
    pub costs: BTreeMap<String, f64>,
}

/// The models and their keys.
const MODELS: [(&str, &[&str]); 1] = [("compute", &["e_mac_pj", "e_ac_pj"])];

impl CostFile {
    /// Reads a file. Its name is the report's, unless the file gives one.
    ///
    /// # Errors
    /// [`ReplayError::Costs`] with line and column of the first mistake.
    pub fn read(path: &Path) -> Result<Self, ReplayError> {
        let text = std::fs::read_to_string(path).map_err(|source| ReplayError::Io {
            path: path.to_path_buf(),
            source,
        })?;
        let stem = path
            .file_stem()
            .map_or_else(|| "costs".to_owned(), |s| s.to_string_lossy().into_owned());
        Self::parse(&text, &path.display().to_string(), &stem)
    }

    /// Parses a file's text; `path` is for messages, `name` for the report where the file gives none.
    ///
    /// # Errors
    /// [`ReplayError::Costs`] with line and column of the first mistake.
    pub fn parse(text: &str, path: &str, name: &str) -> Result<Self, ReplayError> {
        let at = |span: Range<usize>, message: String| {
            let (line, column) = position(text, span.start);
            ReplayError::Costs {
                path: path.to_owned(),
                line,
                column,
                message,
            }
        };
        let table = DeTable::parse(text)
            .map_err(|e| at(e.span().unwrap_or(0..0), e.message().to_owned()))?;
        let whole = table.span();
        let mut file = Self {
            name: name.to_owned(),
            model: "compute".to_owned(),
            costs: BTreeMap::new(),
        };
        let mut costs = None;
        for (key, value) in table.get_ref() {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("name", DeValue::String(text)) => file.name = text.to_string(),
                ("model", DeValue::String(text)) => {
                    file.model = text.to_string();
                    if !MODELS.iter().any(|(model, _)| *model == file.model) {
                        let models = MODELS.map(|(model, _)| model);
                        return Err(at(
                            value.span(),
                            format!(
                                "there is no energy model '{text}'; known: {}",
                                models.join(", ")
                            ),
                        ));
                    }
                }
                ("name" | "model", _) => {
                    return Err(at(value.span(), format!("'{}' is a text", key.get_ref())));
                }
                ("costs", DeValue::Table(table)) => costs = Some(table),
                ("costs", _) => {
                    return Err(at(
                        value.span(),
                        "'costs' is a table: write [costs]".to_owned(),
                    ));
                }
                (other, _) => {
                    return Err(at(
                        key.span(),
                        unknown_key(other, &["name", "model", "costs"]),
                    ));
                }
            }
        }
        let Some(costs) = costs else {
            return Err(at(whole, "the table [costs] is missing".to_owned()));
        };
        let keys = MODELS
            .iter()
            .find(|(model, _)| *model == file.model)
            .map_or(&[][..], |(_, keys)| keys);
        for (key, value) in costs {
            let name = key.get_ref().as_ref();
            if !keys.contains(&name) {
                return Err(at(key.span(), unknown_key(name, keys)));
            }
            let cost = match value.get_ref() {
                DeValue::Float(number) => number.as_str().replace('_', "").parse::<f64>().ok(),
                DeValue::Integer(number) => {
                    i64::from_str_radix(&number.as_str().replace('_', ""), number.radix())
                        .ok()
                        .map(|n| n as f64)
                }
                _ => None,
            };
            let cost = cost
                .ok_or_else(|| at(value.span(), format!("'{name}' is a number of picojoules")))?;
            if !cost.is_finite() {
                return Err(at(
                    value.span(),
                    format!("'{name}' is {cost}; a cost is a finite number"),
                ));
            }
            if cost < 0.0 {
                return Err(at(
                    value.span(),
                    format!("'{name}' is negative; a cost is at least 0"),
                ));
            }
            file.costs.insert(name.to_owned(), cost);
        }
        if let Some(missing) = keys.iter().find(|key| !file.costs.contains_key(**key)) {
            return Err(at(whole, format!("'{missing}' is missing in [costs]")));
        }
        Ok(file)
    }

    /// A shipped preset.
    ///
    /// # Errors
    /// Where there is none of that name; the error names the nearest.
    pub fn preset(name: &str) -> Result<Self, ReplayError> {
        let text = preset_text(name).ok_or_else(|| {
            ReplayError::unknown_name("energy preset", name, PRESETS.iter().map(|(name, _)| *name))
        })?;
        Self::parse(text, name, name)
    }
}

fn unknown_key(key: &str, known: &[&str]) -> String {
    match nearest(key, known.iter().copied()) {
        Some(suggestion) => format!("there is no key '{key}'; did you mean '{suggestion}'?"),
        None => format!("there is no key '{key}'; known: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        CostFile::parse(text, "my.toml", "my")
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn presets_parse_and_are_named_after_themselves() {
        for (name, _) in PRESETS {
            let preset = CostFile::preset(name).unwrap();
            assert_eq!(
                (preset.name.as_str(), preset.model.as_str()),
                (name, "compute")
            );
        }
        let fp32 = CostFile::preset("compute_fp32").unwrap();
        assert_eq!((fp32.costs["e_mac_pj"], fp32.costs["e_ac_pj"]), (4.6, 0.9));
    }

    #[test]
    fn mistakes_are_reported_with_line_and_column() {
        assert_eq!(
            message("[costs]\ne_mac_pj = 4.6\ne_ac_jp = 0.9\n"),
            "my.toml:3:1: there is no key 'e_ac_jp'; did you mean 'e_ac_pj'?"
        );
        assert_eq!(
            message("[costs]\ne_mac_pj = -1\ne_ac_pj = 1"),
            "my.toml:2:12: 'e_mac_pj' is negative; a cost is at least 0"
        );
        assert_eq!(
            message("[costs]\n  e_mac_pj = nan"),
            "my.toml:2:14: 'e_mac_pj' is NaN; a cost is a finite number"
        );
        assert_eq!(
            message("[costs]\ne_mac_pj = inf"),
            "my.toml:2:12: 'e_mac_pj' is inf; a cost is a finite number"
        );
        assert_eq!(
            message("[costs]\ne_mac_pj = \"4\""),
            "my.toml:2:12: 'e_mac_pj' is a number of picojoules"
        );
        assert_eq!(
            message("[costs]\ne_mac_pj = 4"),
            "my.toml:1:1: 'e_ac_pj' is missing in [costs]"
        );
        assert_eq!(
            message("[cost]\n"),
            "my.toml:1:2: there is no key 'cost'; did you mean 'costs'?"
        );
        assert!(message("[costs\n").starts_with("my.toml:1:"));
        assert!(
            message("model = \"x\"\n[costs]\n")
                .starts_with("my.toml:1:9: there is no energy model 'x'")
        );
    }

    #[test]
    fn integers_are_costs_too() {
        let file =
            CostFile::parse("[costs]\ne_mac_pj = 5\ne_ac_pj = 0x1\n", "a/b.toml", "b").unwrap();
        assert_eq!(
            (
                file.name.as_str(),
                file.costs["e_mac_pj"],
                file.costs["e_ac_pj"]
            ),
            ("b", 5.0, 1.0)
        );
    }
}
