//! Costs come from TOML: shipped presets, or a file of the user's. Mistakes are reported with line and column.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;

use toml::de::{DeTable, DeValue};

use super::neuromc::MEMORIES;

use crate::error::{ReplayError, nearest, position};

/// A cost file that is shipped.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Under which its report appears.
    pub name: &'static str,
    /// The rule set that it belongs to; `None`: every one that has the model.
    pub rules: Option<&'static str>,
    /// The file.
    pub text: &'static str,
}

macro_rules! presets {
    ($($rules:expr, $name:literal, $path:literal;)*) => {
        &[$(Preset { name: $name, rules: $rules, text: include_str!(concat!("../../presets/", $path)) }),*]
    };
}

const JUNE: Option<&str> = Some("spikingjelly-2026-06");
const RELEASE: Option<&str> = Some("spikingjelly-2.0.0");

/// Presets that are shipped.
pub const PRESETS: &[Preset] = presets! {
    None, "compute_fp32", "compute_fp32.toml";
    None, "compute_fp16", "compute_fp16.toml";
    None, "compute_int8", "compute_int8.toml";
    RELEASE, "simple_fp32", "simple_fp32.toml";
    RELEASE, "simple_fp16", "simple_fp16.toml";
    RELEASE, "simple_int8", "simple_int8.toml";
    JUNE, "lemaire", "lemaire_2026_06.toml";
    JUNE, "lemaire_no_sparse", "lemaire_2026_06_no_sparse.toml";
    JUNE, "spikesim_dense", "spikesim_dense_2026_06.toml";
    JUNE, "spikesim_event", "spikesim_event_2026_06.toml";
    JUNE, "spikesim_event_xbar4_sram", "spikesim_event_xbar4_sram_2026_06.toml";
    RELEASE, "spikesim_dense", "spikesim_dense_2_0_0.toml";
    RELEASE, "spikesim_event", "spikesim_event_2_0_0.toml";
    RELEASE, "spikesim_event_xbar4_sram", "spikesim_event_xbar4_sram_2_0_0.toml";
    RELEASE, "spikesim_dense_nonstrict", "spikesim_dense_nonstrict.toml";
    RELEASE, "spikesim_event_nonstrict", "spikesim_event_nonstrict.toml";
    JUNE, "neuromc", "neuromc_2026_06.toml";
    RELEASE, "neuromc", "neuromc_2_0_0.toml";
    RELEASE, "lemaire", "lemaire_2_0_0.toml";
    RELEASE, "lemaire_nonstrict", "lemaire_2_0_0_nonstrict.toml";
};

/// The presets of a name: several where rule sets have one each.
pub fn presets(name: &str) -> impl Iterator<Item = &'static Preset> {
    PRESETS.iter().filter(move |preset| preset.name == name)
}

/// The presets that a rule set with these models has.
pub fn presets_of<'r>(
    rules: &'r str,
    models: &'r [&'static str],
) -> impl Iterator<Item = &'static Preset> + 'r {
    PRESETS.iter().filter(move |preset| {
        preset.rules.is_none_or(|of| of == rules)
            && preset
                .model()
                .is_some_and(|model| models.contains(&model.as_str()))
    })
}

impl Preset {
    /// The model that it is for.
    #[must_use]
    pub fn model(&self) -> Option<String> {
        self.costs().ok().map(|file| file.model)
    }

    /// Its numbers.
    ///
    /// # Errors
    /// None, as a test shows: shipped files parse.
    pub fn costs(&self) -> Result<CostFile, ReplayError> {
        CostFile::parse(self.text, self.name, self.name)
    }
}

/// A setting of a model that is no cost.
#[derive(Clone, Debug, PartialEq)]
pub enum Setting {
    /// Yes or no.
    Flag(bool),
    /// A number.
    Number(f64),
    /// One of several words.
    Choice(String),
    /// Pairs, the first numbers rising.
    Points(Vec<[f64; 2]>),
    /// Numbers by name.
    Table(BTreeMap<String, f64>),
}

/// What a setting has to be.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Flag,
    /// A whole number of at least one.
    Count,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// From 0 to 1.
    Share,
    /// So many pairs, finite and not negative, the first numbers rising.
    Points(usize),
    /// A memory: [`MEMORY`].
    Memory,
}

/// What there is to say of a memory: how many bits an access has, and what it costs.
const MEMORY: [&str; 4] = ["read_bits", "write_bits", "read_pj", "write_pj"];

/// A cost file: which model it is for, and its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct CostFile {
    /// Under which the report appears.
    pub name: String,
    /// `compute`.
    pub model: String,
    /// What costs these are, in words: technology and number format.
    pub regime: Option<String>,
    /// By key.
    pub costs: BTreeMap<String, f64>,
    /// What is no cost, by key.
    pub settings: BTreeMap<String, Setting>,
}

/// A model's keys.
struct Model {
    name: &'static str,
    costs: &'static [&'static str],
    settings: &'static [(&'static str, Kind)],
}

const NEUROMC_COSTS: &[&str] = &[
    "e_mux_pj",
    "e_add_pj",
    "e_mul_pj",
    "e_comp_pj",
    "e_sqrt_pj",
    "e_mac_fp_soma_pj",
    "e_mac_bp_grad_pj",
    "e_mac_wg_pj",
    "e_mac_ann_fe_pj",
    "e_mac_ann_be_pj",
    "e_mac_ann_we_pj",
];

const NEUROMC_SETTINGS: &[(&str, Kind)] = &{
    let mut settings = [("", Kind::Memory); MEMORIES.len() + 2];
    let mut at = 0;
    while at < MEMORIES.len() {
        settings[at] = (MEMORIES[at], Kind::Memory);
        at += 1;
    }
    settings[at] = ("zero_dram_in_paper_energy", Kind::Flag);
    settings[at + 1] = ("zero_sram_high_directions", Kind::Flag);
    settings
};

/// The models.
const MODELS: &[Model] = &[
    Model {
        name: "compute",
        costs: &["e_mac_pj", "e_ac_pj"],
        settings: &[],
    },
    Model {
        name: "simple",
        costs: &["e_mac_pj", "e_ac_pj", "e_memory_pj_per_byte"],
        settings: &[],
    },
    Model {
        name: "lemaire-2026-06",
        costs: &["e_add_pj", "e_mul_pj"],
        settings: &[
            ("memory_breakpoints", Kind::Points(4)),
            ("sparse_zero_ratio_threshold", Kind::Share),
            ("enable_sparse_memory_estimation", Kind::Flag),
            ("strict", Kind::Flag),
        ],
    },
    Model {
        name: "neuromc-2026-06",
        costs: NEUROMC_COSTS,
        settings: NEUROMC_SETTINGS,
    },
    Model {
        name: "neuromc-2.0.0",
        costs: NEUROMC_COSTS,
        settings: NEUROMC_SETTINGS,
    },
    Model {
        name: "spikesim",
        costs: &[
            "tile_buffer_pj",
            "temp_buffer_pj",
            "sub_pj",
            "adc_pj",
            "htree_pj",
            "mux_pj",
            "mem_fetch_pj",
            "neuron_pj",
            "rram_xbar_pj",
            "sram_xbar_pj",
        ],
        settings: &[
            ("xbar_size", Kind::Count),
            ("device", Kind::Choice(&["rram", "sram"])),
            ("activity_mode", Kind::Choice(&["dense", "event"])),
            ("require_if_lif_neurons", Kind::Flag),
            ("strict", Kind::Flag),
        ],
    },
    Model {
        name: "lemaire-2.0.0",
        costs: &["e_add_pj", "e_mul_pj"],
        settings: &[
            ("memory_breakpoints", Kind::Points(4)),
            ("snn_fifo_capacity_elements", Kind::Count),
            ("strict", Kind::Flag),
        ],
    },
];

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
            regime: None,
            costs: BTreeMap::new(),
            settings: BTreeMap::new(),
        };
        let (mut costs, mut settings) = (None, None);
        for (key, value) in table.get_ref() {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("name", DeValue::String(text)) => file.name = text.to_string(),
                ("regime", DeValue::String(text)) => file.regime = Some(text.to_string()),
                ("model", DeValue::String(text)) => {
                    file.model = text.to_string();
                    if !MODELS.iter().any(|model| model.name == file.model) {
                        let models: Vec<&str> = MODELS.iter().map(|model| model.name).collect();
                        return Err(at(
                            value.span(),
                            format!(
                                "there is no energy model '{text}'; known: {}",
                                models.join(", ")
                            ),
                        ));
                    }
                }
                ("name" | "model" | "regime", _) => {
                    return Err(at(value.span(), format!("'{}' is a text", key.get_ref())));
                }
                ("costs", DeValue::Table(table)) => costs = Some(table),
                ("costs", _) => {
                    return Err(at(
                        value.span(),
                        "'costs' is a table: write [costs]".to_owned(),
                    ));
                }
                ("settings", DeValue::Table(table)) => settings = Some((value.span(), table)),
                ("settings", _) => {
                    return Err(at(
                        value.span(),
                        "'settings' is a table: write [settings]".to_owned(),
                    ));
                }
                (other, _) => {
                    return Err(at(
                        key.span(),
                        unknown_key(other, &["name", "model", "regime", "costs", "settings"]),
                    ));
                }
            }
        }
        let Some(costs) = costs else {
            return Err(at(whole, "the table [costs] is missing".to_owned()));
        };
        let Some(model) = MODELS.iter().find(|model| model.name == file.model) else {
            return Err(at(
                whole,
                format!("there is no energy model '{}'", file.model),
            ));
        };
        let keys = model.costs;
        for (key, value) in costs {
            let name = key.get_ref().as_ref();
            if !keys.contains(&name) {
                return Err(at(key.span(), unknown_key(name, keys)));
            }
            let cost = number(value.get_ref());
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
        let known: Vec<&str> = model.settings.iter().map(|(key, _)| *key).collect();
        for (key, value) in settings.iter().flat_map(|(_, table)| table.iter()) {
            let name = key.get_ref().as_ref();
            let Some((_, kind)) = model.settings.iter().find(|(known, _)| *known == name) else {
                return Err(at(key.span(), unknown_key(name, &known)));
            };
            let setting = setting(*kind, value.get_ref())
                .map_err(|wanted| at(value.span(), format!("'{name}' is {wanted}")))?;
            file.settings.insert(name.to_owned(), setting);
        }
        if let Some(missing) = known.iter().find(|key| !file.settings.contains_key(**key)) {
            let span = settings.map_or(whole, |(span, _)| span);
            return Err(at(span, format!("'{missing}' is missing in [settings]")));
        }
        Ok(file)
    }

    /// A shipped preset of a rule set.
    ///
    /// # Errors
    /// Where there is none of that name; the error names the nearest.
    pub fn preset(name: &str, rules: &str, models: &[&'static str]) -> Result<Self, ReplayError> {
        presets_of(rules, models)
            .find(|preset| preset.name == name)
            .ok_or_else(|| {
                ReplayError::unknown_name(
                    "energy preset",
                    name,
                    presets_of(rules, models).map(|preset| preset.name),
                )
            })?
            .costs()
    }

    /// What costs these are, in words, and which differ from the shipped preset that the words are from.
    pub(crate) fn regime_text(&self) -> Option<String> {
        let regime = self.regime.as_ref()?;
        /// Reports ask once for each group and configuration.
        static SHIPPED: LazyLock<Vec<CostFile>> = LazyLock::new(|| {
            let files = PRESETS.iter().filter_map(|preset| preset.costs().ok());
            files.collect()
        });
        let of_preset = SHIPPED
            .iter()
            .filter(|preset| preset.model == self.model && preset.regime.as_ref() == Some(regime));
        // Of several presets with the same words, the one that is nearest.
        let changed = of_preset
            .map(|preset| {
                let costs = self.costs.iter();
                let costs = costs.filter(|(key, cost)| preset.costs.get(*key) != Some(*cost));
                let settings = self.settings.iter();
                let settings =
                    settings.filter(|(key, value)| preset.settings.get(*key) != Some(*value));
                costs
                    .map(|(key, _)| key.as_str())
                    .chain(settings.map(|(key, _)| key.as_str()))
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .min_by_key(Vec::len)
            .unwrap_or_default();
        Some(if changed.is_empty() {
            regime.clone()
        } else {
            format!("{regime}, with other {}", changed.join(", "))
        })
    }

    /// A cost that the model has.
    pub(crate) fn cost(&self, key: &str) -> f64 {
        self.costs.get(key).copied().unwrap_or_default()
    }

    /// A setting that is yes or no.
    pub(crate) fn flag(&self, key: &str) -> bool {
        matches!(self.settings.get(key), Some(Setting::Flag(true)))
    }

    /// A setting that is a number.
    pub(crate) fn number(&self, key: &str) -> f64 {
        match self.settings.get(key) {
            Some(Setting::Number(number)) => *number,
            _ => 0.0,
        }
    }

    /// A setting that is a word.
    pub(crate) fn choice(&self, key: &str) -> &str {
        match self.settings.get(key) {
            Some(Setting::Choice(word)) => word,
            _ => "",
        }
    }

    /// A setting that is pairs.
    pub(crate) fn points(&self, key: &str) -> &[[f64; 2]] {
        match self.settings.get(key) {
            Some(Setting::Points(points)) => points,
            _ => &[],
        }
    }
}

fn number(value: &DeValue<'_>) -> Option<f64> {
    match value {
        DeValue::Float(number) => number.as_str().replace('_', "").parse::<f64>().ok(),
        DeValue::Integer(number) => {
            i64::from_str_radix(&number.as_str().replace('_', ""), number.radix())
                .ok()
                .map(|n| n as f64)
        }
        _ => None,
    }
}

/// A setting, or what it should be.
fn setting(kind: Kind, value: &DeValue<'_>) -> Result<Setting, String> {
    let plain = |number: f64| number.is_finite() && number >= 0.0;
    match (kind, value) {
        (Kind::Flag, DeValue::Boolean(flag)) => Ok(Setting::Flag(*flag)),
        (Kind::Flag, _) => Err("true or false".to_owned()),
        (Kind::Count, value) => number(value)
            .filter(|n| plain(*n) && *n >= 1.0 && n.fract() == 0.0)
            .map(Setting::Number)
            .ok_or_else(|| "a whole number of at least 1".to_owned()),
        (Kind::Choice(words), DeValue::String(word)) if words.contains(&word.as_ref()) => {
            Ok(Setting::Choice(word.to_string()))
        }
        (Kind::Choice(words), _) => Err(format!("one of '{}'", words.join("', '"))),
        (Kind::Share, value) => number(value)
            .filter(|n| plain(*n) && *n <= 1.0)
            .map(Setting::Number)
            .ok_or_else(|| "a number from 0 to 1".to_owned()),
        (Kind::Memory, value) => {
            let wanted = || format!("a table of {}, none negative", MEMORY.join(", "));
            let DeValue::Table(table) = value else {
                return Err(wanted());
            };
            let numbers: Option<BTreeMap<String, f64>> = table
                .iter()
                .map(|(key, value)| {
                    let key = key.get_ref().as_ref();
                    let number = number(value.get_ref()).filter(|n| plain(*n))?;
                    MEMORY.contains(&key).then(|| (key.to_owned(), number))
                })
                .collect();
            numbers
                .filter(|numbers| numbers.len() == MEMORY.len())
                .map(Setting::Table)
                .ok_or_else(wanted)
        }
        (Kind::Points(count), value) => {
            let wanted = || {
                format!("{count} pairs of numbers that are not negative, the first numbers rising")
            };
            let DeValue::Array(list) = value else {
                return Err(wanted());
            };
            let pair = |value: &DeValue<'_>| match value {
                DeValue::Array(pair) if pair.len() == 2 => {
                    let both = [0, 1].map(|at| {
                        pair.get(at)
                            .and_then(|v| number(v.get_ref()))
                            .filter(|n| plain(*n))
                    });
                    Some([both[0]?, both[1]?])
                }
                _ => None,
            };
            let points: Option<Vec<[f64; 2]>> = list.iter().map(|v| pair(v.get_ref())).collect();
            points
                .filter(|points| points.len() == count)
                .filter(|points| points.windows(2).all(|w| w[0][0] < w[1][0]))
                .map(Setting::Points)
                .ok_or_else(wanted)
        }
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
        for preset in PRESETS {
            assert_eq!(preset.costs().unwrap().name, preset.name);
        }
        let fp32 = presets("compute_fp32").next().unwrap().costs().unwrap();
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
    fn wrong_settings_are_reported_with_line_and_column() {
        let lemaire = presets("lemaire_nonstrict").next().unwrap().text;
        let with = |from: &str, to: &str| message(&lemaire.replace(from, to));
        assert!(with("strict = false", "strict = 0").ends_with("'strict' is true or false"));
        assert!(
            with(
                "snn_fifo_capacity_elements = 1000",
                "snn_fifo_capacity_elements = 0"
            )
            .ends_with("is a whole number of at least 1")
        );
        assert!(with("[1048576, 25.0]", "[32768, 25.0]").contains("the first numbers rising"));
        assert!(with("strict = false", "").ends_with("'strict' is missing in [settings]"));
        assert!(with("strict = false", "strickt = false").contains("did you mean 'strict'?"));
        assert_eq!(
            message("[costs]\ne_mac_pj = 1\ne_ac_pj = 1\n[settings]\nx = 1\n"),
            "my.toml:5:1: there is no key 'x'; known: "
        );
    }

    #[test]
    fn a_regime_says_what_was_changed() {
        let preset = presets("compute_fp32").next().unwrap();
        assert_eq!(
            preset.costs().unwrap().regime_text().unwrap(),
            "fp32 arithmetic at 45 nm"
        );
        let edited = preset.text.replace("e_ac_pj = 0.9", "e_ac_pj = 1.0");
        let edited = CostFile::parse(&edited, "my.toml", "my").unwrap();
        assert_eq!(
            edited.regime_text().unwrap(),
            "fp32 arithmetic at 45 nm, with other e_ac_pj"
        );
        for preset in PRESETS {
            let file = preset.costs().unwrap();
            assert_eq!(file.regime_text(), file.regime, "{}", preset.name);
            assert!(file.regime.is_some(), "{}", preset.name);
        }
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
