//! Reports about layers and models, which stand in sections of their own: sinabs, Qualia, monitors.

use std::collections::BTreeMap;

use optape_trace::ModuleId;
use serde::Serialize;

use super::table::{Rows, Section};
use super::{Ordered, Report, numbers};
use crate::energy::{CostFile, Figure, configuration};
use crate::network::{Form, Module, Network};

/// What an estimator says, in the shape of its original.
#[derive(Clone, Debug)]
pub struct LayerReport {
    /// The original's fields.
    pub value: Figure,
    /// What they are worth nothing without.
    pub about: About,
}

/// What stands beside a figure.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct About {
    /// Units of the figures.
    pub unit: &'static str,
    /// What is and is not in them.
    pub boundary: &'static str,
    /// Costs and settings.
    pub config: Ordered<Figure>,
    /// The rules that they follow.
    pub rules: &'static str,
    /// The root module that they are about; empty where they are about no single one.
    pub model: String,
    /// Layers (or records) that are in them.
    #[serde(rename = "coverage", serialize_with = "coverage")]
    pub counted: u64,
    /// Those that are not, and why.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub not_counted: BTreeMap<String, String>,
    /// What a reader should know.
    pub warnings: Vec<String>,
    /// Something is missing (`--lenient`).
    #[serde(skip_serializing_if = "is_false")]
    pub partial: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn coverage<S: serde::Serializer>(counted: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map([("counted", counted)])
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_false(value: &bool) -> bool {
    !*value
}

impl About {
    pub(crate) fn of(
        rules: &'static str,
        unit: &'static str,
        boundary: &'static str,
        network: &Network,
        root: ModuleId,
        file: &CostFile,
    ) -> Self {
        let mut about = Self {
            unit,
            boundary,
            rules,
            config: configuration(file).collect(),
            model: network.name(root).to_owned(),
            ..Self::default()
        };
        let others: Vec<&str> = network
            .roots
            .iter()
            .filter(|other| **other != root)
            .map(|other| network.name(*other))
            .collect();
        if !others.is_empty() {
            about.warnings.push(format!(
                "about {} alone, of the modules that the program calls the one with the most parameters; --scope chooses another of: {}",
                about.model,
                others.join(", ")
            ));
        }
        about
    }

    /// A layer is in no figure.
    pub(crate) fn leave_out(&mut self, path: &str, module: &Module, why: &str) {
        let class = module.short_class();
        self.not_counted
            .insert(path.to_owned(), format!("{class}: {why}"));
    }

    /// Something is missing, and that is allowed.
    pub(crate) fn partial(&mut self, what: String) {
        self.partial = true;
        self.warnings.push(format!("partial (--lenient): {what}"));
    }
}

/// What is known of a tensor, as the corpus of expected numbers writes it down. `spikes`: the nonzeros of one that is all 0 or 1.
pub(crate) fn tensor(form: &Form, sum: f64, nonzeros: Option<u64>, spikes: Option<u64>) -> Figure {
    #[expect(clippy::cast_precision_loss, reason = "means and rates are floats")]
    let float = |count: u64| count as f64;
    let elements = float(form.elements());
    let shape = form.shape.iter().map(|size| Figure::Integer(i128::from(*size)));
    let rate = spikes
        .map(|spikes| float(spikes) / elements)
        .filter(|rate| !rate.is_nan());
    Figure::from([
        ("shape", Figure::List(shape.collect())),
        ("dtype", Figure::from(form.dtype.name())),
        ("sum", Figure::Float(sum)),
        ("mean", Figure::Float(sum / elements)),
        ("nnz", Figure::from(nonzeros.map(i128::from))),
        ("firing_rate", Figure::from(rate)),
    ])
}

/// The reports of a section by name, and what stands beside them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LayerSection {
    /// In the shape of the originals.
    #[serde(flatten)]
    pub reports: Ordered<Figure>,
    /// By the same names.
    pub about: Ordered<About>,
}

/// The sections for people.
pub(super) fn sections(report: &Report) -> Vec<Section> {
    let mut sections = Vec::new();
    if let Some(monitors) = &report.monitors {
        for (name, rates) in monitors.rates.iter() {
            let Figure::Map(rates) = rates else { continue };
            let body = rates
                .iter()
                .map(|(module, of)| {
                    let rate = match of.get("firing_rate") {
                        Some(Figure::Float(rate)) => format!("{rate:.4}"),
                        _ => "not binary".to_owned(),
                    };
                    let shown = if module.is_empty() { "(root)" } else { module };
                    let mut row = vec![shown.to_owned()];
                    row.extend(["calls", "elements", "nonzeros"].map(|key| cell(of.get(key))));
                    row.push(rate);
                    row
                })
                .collect();
            let head = ["module", "calls", "elements", "nonzeros", "rate"];
            let mut section = titled(format!("Monitor {name}"), &head, body, &[0]);
            section.lines = remarks(monitors.about.get(name));
            section
                .lines
                .push("one record for each call: in --format json".to_owned());
            sections.push(section);
        }
    }
    if let Some(sinabs) = &report.sinabs {
        for (name, value) in sinabs.reports.iter() {
            let lines = remarks(sinabs.about.get(name));
            sections.extend(sinabs_sections(name, value, lines));
        }
    }
    if let Some(qualia) = &report.qualia {
        for (part, values) in qualia.reports.iter() {
            let Figure::Map(values) = values else { continue };
            for (name, rows) in values.iter() {
                let about = qualia.about.get(&format!("{part}/{name}"));
                sections.push(qualia_section(part, name, rows, remarks(about)));
            }
        }
    }
    sections
}

fn remarks(about: Option<&About>) -> Vec<String> {
    let Some(about) = about else {
        return Vec::new();
    };
    let settings: Vec<String> = about
        .config
        .iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    let mut lines = vec![
        format!("{}; of {}, rules {}", about.unit, about.model, about.rules),
        about.boundary.to_owned(),
    ];
    if !settings.is_empty() {
        lines.push(settings.join(", "));
    }
    let left_out: Vec<String> = about
        .not_counted
        .iter()
        .map(|(name, why)| format!("{name} ({why})"))
        .collect();
    if !left_out.is_empty() {
        lines.push(format!("not counted: {}", left_out.join(", ")));
    }
    lines.extend(about.warnings.iter().cloned());
    lines
}

fn cell(figure: Option<&Figure>) -> String {
    match figure {
        None | Some(Figure::None) => "-".to_owned(),
        Some(Figure::Float(value)) if !value.is_finite() => "-".to_owned(),
        Some(Figure::Float(value)) => numbers::mean(*value),
        Some(Figure::Integer(value)) => numbers::grouped(*value),
        Some(other) => other.to_string(),
    }
}

fn titled(title: String, head: &[&str], body: Vec<Vec<String>>, texts: &'static [usize]) -> Section {
    Section {
        title,
        rows: (!body.is_empty()).then(|| Rows {
            head: head.iter().map(|name| (*name).to_owned()).collect(),
            body,
            texts,
        }),
        lines: Vec::new(),
    }
}

fn sinabs_sections(name: &str, value: &Figure, lines: Vec<String>) -> Vec<Section> {
    let mut sections = Vec::new();
    let layers = value.get("layer_statistics");
    if let Some(layers) = layers {
        let part = |name: &str| match layers.get(name) {
            Some(Figure::Map(map)) => map.iter().collect(),
            _ => Vec::new(),
        };
        let spiking = part("spiking")
            .into_iter()
            .map(|(layer, of)| {
                let neurons = of.get("firing_rate_per_neuron");
                vec![
                    layer.to_owned(),
                    cell(of.get("n_neurons")),
                    cell(of.get("firing_rate")),
                    cell(neurons.and_then(|of| of.get("nnz"))),
                    cell(of.get("output").and_then(|of| of.get("sum"))),
                ]
            })
            .collect();
        let head = ["layer", "neurons", "firing rate", "neurons that fire", "spikes"];
        sections.push(titled(format!("sinabs {name}: spiking layers"), &head, spiking, &[0]));
        let parameter = part("parameter")
            .into_iter()
            .map(|(layer, of)| {
                let mut row = vec![layer.to_owned()];
                row.extend(["synops", "num_timesteps", "synops/s"].map(|key| cell(of.get(key))));
                row
            })
            .collect();
        let head = ["layer", "SynOps", "time steps", "SynOps/s"];
        sections.push(titled(
            format!("sinabs {name}: layers with parameters"),
            &head,
            parameter,
            &[0],
        ));
    }
    let model = value.get("model_statistics").unwrap_or(value);
    let mut rows = Vec::new();
    match model {
        Figure::Map(map) => {
            for (key, figure) in map.iter() {
                match figure {
                    Figure::Map(inner) => rows.extend(
                        inner.iter().map(|(layer, of)| vec![format!("{key}/{layer}"), cell(Some(of))]),
                    ),
                    _ => rows.push(vec![key.to_owned(), cell(Some(figure))]),
                }
            }
        }
        Figure::List(list) => rows.extend(
            list.iter()
                .enumerate()
                .map(|(at, of)| vec![format!("layer {at}"), cell(Some(of))]),
        ),
        other => rows.push(vec!["SynOps".to_owned(), cell(Some(other))]),
    }
    sections.push(titled(format!("sinabs {name}: model"), &["figure", "value"], rows, &[0]));
    sections.retain(|section| section.rows.is_some());
    if let Some(last) = sections.last_mut() {
        last.lines = lines;
    }
    sections
}

fn qualia_section(part: &str, name: &str, rows: &Figure, lines: Vec<String>) -> Section {
    let energy = part == "energy";
    let columns: &[(&str, &str)] = if energy {
        &[
            ("potentials", "mem_pot"),
            ("weights", "mem_weights"),
            ("bias", "mem_bias"),
            ("in/out", "mem_io"),
            ("ops", "ops"),
            ("addr", "addr"),
            ("total", "total"),
        ]
    } else {
        &[
            ("acc", "syn_acc"),
            ("mac", "syn_mac"),
            ("addr acc", "addr_acc"),
            ("addr mac", "addr_mac"),
            ("writes", "mem_write"),
            ("reads", "mem_read"),
        ]
    };
    let Figure::List(rows) = rows else {
        return titled(String::new(), &[], Vec::new(), &[]);
    };
    let body = rows
        .iter()
        .map(|row| {
            let mut line = vec![row.get("name").map(ToString::to_string).unwrap_or_default()];
            line.extend(columns.iter().map(|(_, key)| match row.get(key) {
                Some(Figure::Float(pj)) if energy => numbers::energy(*pj),
                other => cell(other),
            }));
            line.push(cell(row.get("input_spikerate")));
            line.push(match row.get("is_sj") {
                Some(Figure::Flag(true)) => "yes".to_owned(),
                Some(Figure::Flag(false)) => "no".to_owned(),
                other => cell(other).to_lowercase(),
            });
            line
        })
        .collect();
    let mut head = vec!["layer"];
    head.extend(columns.iter().map(|(title, _)| *title));
    head.extend(["rate in", "spiking"]);
    let mut section = titled(format!("Qualia {part}: {name}"), &head, body, &[0]);
    section.lines = lines;
    section
}

/// Every number of a report with the names that lead to it.
pub(super) fn numbers_of(figure: &Figure, path: &mut Vec<String>, out: &mut dyn FnMut(&[String], String)) {
    let mut into = |name: String, figure: &Figure, path: &mut Vec<String>| {
        path.push(name);
        numbers_of(figure, path, out);
        path.pop();
    };
    match figure {
        Figure::Map(map) => {
            for (name, figure) in map.iter() {
                into(name.to_owned(), figure, path);
            }
        }
        // Sizes are one text.
        Figure::List(list) if list.iter().all(|of| matches!(of, Figure::Integer(_))) => {
            let sizes: Vec<String> = list.iter().map(ToString::to_string).collect();
            out(path, sizes.join("x"));
        }
        Figure::List(list) => {
            for (at, figure) in list.iter().enumerate() {
                // Rows of tables are known by their name.
                let name = figure
                    .get("name")
                    .map_or_else(|| at.to_string(), ToString::to_string);
                into(name, figure, path);
            }
        }
        Figure::None => {}
        value => out(path, value.to_string()),
    }
}
