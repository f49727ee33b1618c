//! SpikeSim's crossbar arrays, as SpikingJelly has them: the forward of 2-dimensional convolutions, dense or by events.
//!
//! A convolution's input channels are cut into tiles of as many as a crossbar array has rows, its output channels likewise. *Dense*,
//! every output position costs one cycle of every pair of tiles. By *events*, only patches with a spike are fetched, only rows with a
//! spike are driven, and only positions that a spike reaches update neurons.

use std::collections::BTreeMap;

use optape_trace::{CROSSBARS, ModuleId, Operand, Stage, When, call_flags, fields};

use super::lemaire::class_name;
use super::{CostFile, EnergyModel, EnergyReport, Figure, Given, Input, float};
use crate::ordered::{Amounts, OrderedCall, Simulation, World};
use crate::report::Ordered;
use crate::rules::{CallRow, MissingLevel, RuleError, WayOut, integer_position};

const CONV2D: &str = "torch.nn.modules.conv.Conv2d";
const NEURONS: [&str; 2] = [
    "spikingjelly.activation_based.neuron.base_node.BaseNode",
    "spikingjelly.activation_based.neuron.base_node.SimpleBaseNode",
];
const SUPPORTED: [&str; 4] = [
    "spikingjelly.activation_based.neuron.integrate_and_fire.IFNode",
    "spikingjelly.activation_based.neuron.lif.LIFNode",
    "spikingjelly.activation_based.neuron.integrate_and_fire.SimpleIFNode",
    "spikingjelly.activation_based.neuron.lif.SimpleLIFNode",
];

/// Rows of an array that share periphery.
const ROWS_TOGETHER: f64 = 8.0;

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct SpikeSim {
    file: CostFile,
}

impl SpikeSim {
    /// The model with the costs of a file.
    #[must_use]
    pub fn new(file: &CostFile) -> Self {
        Self { file: file.clone() }
    }

    fn is_by_events(&self) -> bool {
        self.file.choice("activity_mode") == "event"
    }

    /// To fetch a patch and to read what an array gives.
    fn patch_control_pj(&self) -> f64 {
        let cost = |key| self.file.cost(key);
        let eighth = self.file.number("xbar_size") / ROWS_TOGETHER;
        cost("htree_pj")
            + cost("mem_fetch_pj")
            + cost("tile_buffer_pj")
            + eighth * 16.0 * cost("sub_pj")
            + eighth * cost("temp_buffer_pj")
            + eighth * eighth * (cost("adc_pj") + cost("mux_pj"))
    }

    fn array_pj(&self) -> f64 {
        let device = self.file.choice("device");
        self.file.cost(&format!("{device}_xbar_pj"))
    }

    /// Parts of a stage's energy.
    fn parts(&self, stage: &StageSums) -> Vec<(&'static str, f64)> {
        let size = self.file.number("xbar_size");
        if !self.is_by_events() {
            let kernel = float(stage.shape.kernel.iter().product());
            let cycle = self.patch_control_pj()
                + self.file.cost("neuron_pj")
                + size / ROWS_TOGETHER * kernel * self.array_pj();
            return vec![("pe_cycle_pj", float(stage.cycles) * cycle)];
        }
        let outputs = float(stage.output_tiles);
        // A tile that is not full drives rows that hold nothing.
        let row_pj = |channels: i128| {
            let full = (float(channels) / size).ceil() * size / float(channels);
            self.array_pj() / ROWS_TOGETHER * full
        };
        let rows: f64 = match &stage.rows_by_tile {
            Some([active, _]) => active
                .iter()
                .zip(&stage.tiles)
                .map(|(rows, channels)| float(*rows) * row_pj(*channels))
                .sum(),
            None => float(stage.active.rows) * row_pj(stage.shape.channels),
        };
        let tiles = (float(stage.shape.channels) / size).ceil();
        vec![
            (
                "patch_control_pj",
                outputs * float(stage.active.patches) * self.patch_control_pj(),
            ),
            ("xbar_pj", outputs * rows),
            (
                "neuron_pj",
                tiles * float(stage.active.sites) * self.file.cost("neuron_pj"),
            ),
        ]
    }
}

/// What crossbar arrays have to do.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    patches: i128,
    rows: i128,
    sites: i128,
}

/// Shape of a convolution's call.
#[derive(Clone, Debug, Default, PartialEq)]
struct Shape {
    channels: i128,
    outputs: i128,
    kernel: Vec<i128>,
    stride: Vec<i128>,
    padding: Vec<i128>,
    dilation: Vec<i128>,
    input: Vec<i128>,
    output: Vec<i128>,
}

/// All calls of a convolution.
#[derive(Clone, Debug, Default)]
struct StageSums {
    /// Of the first call.
    shape: Shape,
    output_tiles: i128,
    /// Channels of each tile.
    tiles: Vec<i128>,
    cycles: i128,
    active: Work,
    dense: Work,
    /// Active and dense rows of each tile; `None` where calls have not the same tiles.
    rows_by_tile: Option<[Vec<i128>; 2]>,
    calls: i128,
    by_events: i128,
    shapes_differ: bool,
}

/// What a stream has.
#[derive(Clone, Debug, Default)]
struct Collected {
    stages: BTreeMap<String, StageSums>,
    warnings: Vec<String>,
}

fn list(values: &[i128]) -> Figure {
    Figure::List(values.iter().map(|v| Figure::Integer(*v)).collect())
}

impl StageSums {
    fn statistics(&self) -> Figure {
        let mut figures: Ordered<Figure> = Ordered::default();
        let mut push = |name: &str, value: Figure| figures.push(name, value);
        push("dense_pe_cycle_count", self.cycles.into());
        for (kind, work, at) in [("active", self.active, 0), ("dense", self.dense, 1)] {
            push(&format!("{kind}_patch_tile_count"), work.patches.into());
            push(&format!("{kind}_row_count"), work.rows.into());
            if let Some(rows) = &self.rows_by_tile {
                push(&format!("{kind}_row_count_by_tile"), list(&rows[at]));
            }
            push(&format!("{kind}_output_tile_site_count"), work.sites.into());
        }
        Figure::Map(figures)
    }

    fn metadata(&self, scope: &str) -> Figure {
        let shape = &self.shape;
        Figure::from([
            ("scope", Figure::from(scope)),
            ("in_channels", shape.channels.into()),
            ("out_channels", shape.outputs.into()),
            ("kernel_size", list(&shape.kernel)),
            ("stride", list(&shape.stride)),
            ("padding", list(&shape.padding)),
            ("dilation", list(&shape.dilation)),
            ("input_shape", list(&shape.input)),
            ("output_shape", list(&shape.output)),
            ("out_channel_tiles", self.output_tiles.into()),
            ("input_tile_channels", list(&self.tiles)),
            ("total_calls", self.calls.into()),
            ("event_driven_calls", self.by_events.into()),
            ("dense_fallback_calls", (self.calls - self.by_events).into()),
            ("shape_mismatch_detected", self.shapes_differ.into()),
        ])
    }
}

impl EnergyModel for SpikeSim {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn inputs(&self) -> Vec<Input> {
        Vec::new()
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a whole number, as the cost file was checked for"
        )]
        let size = self.file.number("xbar_size") as i128;
        Some(Box::new(Following {
            size,
            by_events: self.is_by_events(),
            strict: self.file.flag("strict"),
            wants_known_neurons: self.file.flag("require_if_lif_neurons"),
            collected: Collected::default(),
            looked: false,
        }))
    }

    fn stages(&self) -> Option<&'static [&'static str]> {
        Some(&["forward"])
    }

    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
        let collected = given
            .followed
            .into_iter()
            .flat_map(|followed| followed.kept::<Collected>());
        let mut warnings = Vec::new();
        let mut by_stage: Ordered<Figure> = Ordered::default();
        let mut parts_by_stage: Ordered<Figure> = Ordered::default();
        let mut statistics: Ordered<Figure> = Ordered::default();
        let mut metadata: Ordered<Figure> = Ordered::default();
        let mut totals: BTreeMap<&str, f64> = BTreeMap::new();
        let (mut energy_pj, mut cycles, mut stages) = (0.0, 0, 0);
        for collected in collected {
            warnings.extend(collected.warnings.iter().cloned());
            for (scope, sums) in &collected.stages {
                let parts = self.parts(sums);
                let total: f64 = parts.iter().map(|(_, energy)| energy).sum();
                energy_pj += total;
                cycles += sums.cycles;
                stages += 1;
                by_stage.push(scope, total.into());
                let mut named: Ordered<Figure> = Ordered::default();
                for (name, energy) in parts {
                    *totals.entry(name).or_default() += energy;
                    named.push(name, energy.into());
                }
                named.push("total_pj", total.into());
                parts_by_stage.push(scope, Figure::Map(named));
                statistics.push(scope, sums.statistics());
                metadata.push(scope, sums.metadata(scope));
            }
        }
        if stages == 0 {
            let text =
                "No supported Conv2d forward inference stages were profiled by SpikeSim energy.";
            if self.file.flag("strict") {
                return Err(RuleError::Failed(format!("ValueError: {text}")));
            }
            warnings.push(text.to_owned());
        }
        let breakdown: Ordered<Figure> = totals
            .iter()
            .map(|(name, energy)| ((*name).to_owned(), Figure::Float(*energy)))
            .collect();
        let mut with_total = breakdown.clone();
        with_total.push("total_pj", energy_pj.into());
        let mut report = EnergyReport::new(energy_pj, given);
        report.field("energy_total_pj", energy_pj);
        report.field("energy_by_stage", by_stage);
        report.field(
            "energy_by_component",
            [
                ("totals", Figure::Map(with_total)),
                ("by_stage", Figure::Map(parts_by_stage)),
            ],
        );
        report.field("event_stats_by_stage", statistics);
        report.field("stage_metadata", metadata);
        report.field("breakdown_pj", breakdown);
        report.field(
            "counts",
            [("dense_pe_cycle_count", cycles), ("stage_count", stages)],
        );
        report.warnings.extend(warnings);
        report.boundary = "crossbar arrays, their periphery and neurons of the forward of 2-dimensional convolutions without groups, at \
                           evaluation; no linear layers";
        report.configure(&self.file);
        Ok(report)
    }
}

/// Follows the convolutions of a stream.
struct Following {
    size: i128,
    by_events: bool,
    strict: bool,
    wants_known_neurons: bool,
    collected: Collected,
    /// The network has been looked at.
    looked: bool,
}

impl Following {
    fn warn(&mut self, kind: &str, text: String) -> Result<(), RuleError> {
        if self.strict {
            return Err(RuleError::Failed(format!("{kind}: {text}")));
        }
        if !self.collected.warnings.contains(&text) {
            self.collected.warnings.push(text);
        }
        Ok(())
    }

    /// What upstream asks of the network before it runs.
    fn look(&mut self, world: &World<'_>, training: bool) -> Result<(), RuleError> {
        if training {
            let text = "SpikeSim energy only covers forward inference; call model.eval() before profiling.";
            self.warn("ValueError", text.to_owned())?;
        }
        let mut unknown = Vec::new();
        for &root in world.roots() {
            for (path, module) in world.named_modules(root) {
                let is = |class: &&str| world.is(module, class);
                if NEURONS.iter().any(is) && !SUPPORTED.iter().any(is) {
                    let class = class_name(world, module);
                    let name = if path.is_empty() { class.clone() } else { path };
                    unknown.push(format!("{name} ({class})"));
                }
            }
        }
        if self.wants_known_neurons && !unknown.is_empty() {
            let list = unknown.join(", ");
            let text = format!(
                "SpikeSim assumes IF/LIF neuronal modules. Unsupported neuron modules found: {list}."
            );
            self.warn("ValueError", text)?;
        }
        Ok(())
    }
}

impl Simulation for Following {
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let row = &call.row;
        let flags = row.signature.flags;
        if !self.looked && row.signature.stage == Stage::Forward {
            self.looked = true;
            self.look(world, flags & call_flags::TRAINING != 0)?;
        }
        if row.op.qualified_name() != "aten::convolution" {
            return Ok(());
        }
        let scope = innermost(&out.scopes());
        let refusal = if row.boolean("transposed")? {
            Some(format!(
                "SpikeSim energy only covers original SpikeSim Conv2d inference stages; transposed convolutions are outside \
                 scope: {scope}."
            ))
        } else if !is_inference(world, call.modules, flags) {
            Some(format!(
                "SpikeSim energy only covers Conv2d forward inference stages from nn.Conv2d modules: {scope}."
            ))
        } else if row.integer("groups")? != 1 {
            Some(format!(
                "SpikeSim event energy does not support grouped/depthwise convolutions: {scope}."
            ))
        } else {
            None
        };
        if let Some(text) = refusal {
            return self.warn("NotImplementedError", text);
        }
        let (x, w, y) = (row.tensor("input")?, row.tensor("weight")?, row.output(0)?);
        let sizes = |t: &crate::rules::TensorView<'_>| -> Vec<i128> {
            t.meta.shape.iter().map(|&s| i128::from(s)).collect()
        };
        if [x, w, y].iter().any(|t| t.dimensions() != 4) {
            let text = format!(
                "SpikeSim event energy only supports Conv2d-like calls, but got x.shape={:?}, w.shape={:?}, out.shape={:?}.",
                sizes(&x),
                sizes(&w),
                sizes(&y)
            );
            return self.warn("NotImplementedError", text);
        }
        let shape = Shape {
            channels: w.size(1)?,
            outputs: w.size(0)?,
            kernel: vec![w.size(2)?, w.size(3)?],
            stride: row.integers("stride")?,
            padding: row.integers("padding")?,
            dilation: row.integers("dilation")?,
            input: sizes(&x),
            output: sizes(&y),
        };
        let size = self.size;
        let tiles: Vec<i128> = (0..(shape.channels + size - 1) / size)
            .map(|tile| size.min(shape.channels - tile * size))
            .collect();
        let output_tiles = (shape.outputs + size - 1) / size;
        let sites = y.size(0)? * y.elements_from(2);
        let kernel: i128 = shape.kernel.iter().product();
        let dense_rows: Vec<i128> = tiles.iter().map(|n| sites * n * kernel).collect();
        let dense = Work {
            patches: sites * tiles.len() as i128,
            rows: dense_rows.iter().sum(),
            sites: output_tiles * sites,
        };
        let events = self.by_events && row.binary("input", row.seen_after("input"))?;
        let (active, active_rows) = if events {
            let counts = crossbar_counts(row, x.index, size, tiles.len())?;
            let work = Work {
                patches: counts.patches,
                rows: counts.rows.iter().sum(),
                sites: output_tiles * counts.sites,
            };
            (work, counts.rows)
        } else {
            (dense, dense_rows.clone())
        };
        let mut differs = false;
        let stage = self.collected.stages.entry(scope.clone()).or_default();
        if stage.calls == 0 {
            let nothing = vec![0; tiles.len()];
            stage.rows_by_tile = Some([nothing.clone(), nothing]);
            stage.output_tiles = output_tiles;
            stage.tiles = tiles.clone();
            stage.shape = shape.clone();
        } else if stage.shape != shape {
            stage.shapes_differ = true;
            differs = true;
        }
        stage.calls += 1;
        stage.by_events += i128::from(events);
        stage.cycles += tiles.len() as i128 * output_tiles * sites;
        for (sum, more) in [(&mut stage.active, active), (&mut stage.dense, dense)] {
            sum.patches += more.patches;
            sum.rows += more.rows;
            sum.sites += more.sites;
        }
        if stage.tiles.len() != tiles.len() {
            stage.rows_by_tile = None;
        }
        if let Some(sums) = &mut stage.rows_by_tile {
            for (sums, more) in sums.iter_mut().zip([active_rows, dense_rows]) {
                for (sum, more) in sums.iter_mut().zip(more) {
                    *sum += more;
                }
            }
        }
        if differs {
            let text = format!(
                "SpikeSim stage '{scope}' was invoked with inconsistent shapes; runtime energy is accumulated across calls anyway."
            );
            self.warn("NotImplementedError", text)?;
        }
        Ok(())
    }

    fn finish(&mut self, _world: &World<'_>, out: &mut Amounts) -> Result<(), RuleError> {
        out.keep(std::mem::take(&mut self.collected));
        Ok(())
    }
}

/// The scope with the most parts, of these the longest.
fn innermost(scopes: &[String]) -> String {
    scopes
        .iter()
        .filter(|name| *name != "Global")
        .max_by_key(|name| (name.matches('.').count(), name.len()))
        .cloned()
        .unwrap_or_else(|| "Global".to_owned())
}

/// Inside of one 2-dimensional convolution that is not being trained.
fn is_inference(world: &World<'_>, modules: &[ModuleId], flags: u32) -> bool {
    let mut layers = modules.iter().filter(|module| world.is(**module, CONV2D));
    let (Some(layer), None) = (layers.next(), layers.next()) else {
        return false;
    };
    let training = world
        .module(*layer)
        .and_then(|state| state.facts.get("training")?.as_bool())
        .unwrap_or(false);
    !training && flags & call_flags::GRAD_MODE == 0
}

struct Counts {
    patches: i128,
    rows: Vec<i128>,
    sites: i128,
}

/// What the arrays see of a binary input (T5), by tiles of `size` channels.
fn crossbar_counts(
    row: &CallRow<'_>,
    input: u16,
    size: i128,
    tiles: usize,
) -> Result<Counts, RuleError> {
    let missing = |what: &str, way_out: WayOut| {
        RuleError::Missing(Box::new(MissingLevel {
            level: "T5",
            what: format!("{what} of a convolution's input"),
            way_out,
        }))
    };
    let Some((block, field)) = CROSSBARS
        .into_iter()
        .find(|(channels, _)| *channels as i128 == size)
    else {
        return Err(missing(
            &format!("what arrays of {size} rows see"),
            WayOut::Other(
                "it holds that of 4, 16, 32, 64, 128 and 256 rows: set xbar_size to one of them"
                    .to_owned(),
            ),
        ));
    };
    let number = |operand: Operand, field: u32| {
        integer_position(row.pattern, operand, When::Before, field)
            .and_then(|at| row.integer_sums.get(at))
            .and_then(|n| i128::try_from(*n).ok())
    };
    let full = || WayOut::Record(optape_trace::needs::FULL_FLAG);
    let sites = number(Operand::Tensor(input), fields::ACTIVE_SITES)
        .ok_or_else(|| missing("the positions that spikes reach", full()))?;
    let fours = block / optape_trace::CHANNELS_PER_BLOCK;
    let mut counts = Counts {
        patches: 0,
        rows: vec![0; tiles],
        sites,
    };
    for (tile, rows) in counts.rows.iter_mut().enumerate() {
        for four in 0..fours {
            let Ok(at) = u16::try_from(tile * fours + four) else {
                continue;
            };
            let block = Operand::Channels(at);
            if four == 0 {
                counts.patches +=
                    number(block, field).ok_or_else(|| missing("the active patches", full()))?;
            }
            // The last tile may have fewer channels.
            match number(block, fields::ACTIVE_ROWS) {
                Some(more) => *rows += more,
                None if four == 0 => return Err(missing("the active rows", full())),
                None => {}
            }
        }
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy::presets;

    fn model(name: &str) -> SpikeSim {
        SpikeSim::new(&presets(name).next().unwrap().costs().unwrap())
    }

    #[test]
    fn dense_cycles_cost_control_neurons_and_arrays() {
        let stage = StageSums {
            shape: Shape {
                channels: 2,
                kernel: vec![3, 3],
                ..Shape::default()
            },
            cycles: 10,
            ..StageSums::default()
        };
        let [(name, energy)] = model("spikesim_dense").parts(&stage)[..] else {
            panic!("dense energy has one part");
        };
        assert_eq!(name, "pe_cycle_pj");
        let control =
            157.12 + 4.64 + 397.0 + 8.0 * 16.0 * 1.15e-6 + 8.0 * 0.2 + 64.0 * (2.03084 + 0.094_245);
        let cycle = control + 5.096 + 8.0 * 9.0 * 1.76423;
        assert!((energy - 10.0 * cycle).abs() < 1e-6, "{energy}");
    }

    #[test]
    fn events_cost_what_spikes_reach() {
        let stage = StageSums {
            shape: Shape {
                channels: 6,
                ..Shape::default()
            },
            output_tiles: 2,
            tiles: vec![4, 2],
            active: Work {
                patches: 3,
                rows: 12,
                sites: 5,
            },
            rows_by_tile: Some([vec![8, 4], vec![0, 0]]),
            ..StageSums::default()
        };
        let parts = model("spikesim_event_xbar4_sram").parts(&stage);
        let row = 671.089 / 8.0;
        assert!((parts[1].1 - 2.0 * (8.0 * row + 4.0 * row * 2.0)).abs() < 1e-6);
        assert!((parts[2].1 - 2.0 * 5.0 * 5.096).abs() < 1e-6);
    }

    #[test]
    fn the_innermost_scope_has_the_most_parts() {
        let scopes = ["Global", "Net", "Net.a.b", "Net.long_name"].map(str::to_owned);
        assert_eq!(innermost(&scopes), "Net.a.b");
        assert_eq!(innermost(&["Global".to_owned()]), "Global");
    }
}
