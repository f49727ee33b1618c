//! The compute-only model: multiply-accumulates and accumulates times a cost each.
//!
//! It leaves out memory, addressing, state and idle energy, and takes no account of the element type that really
//! ran: it is a way to compare networks under one set of costs.

use std::collections::BTreeMap;

use serde::Serialize;

use super::CostFile;

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct ComputeModel {
    /// Under which its report appears.
    pub name: String,
    /// Of a multiply-accumulate.
    pub e_mac_pj: f64,
    /// Of an accumulate.
    pub e_ac_pj: f64,
}

/// What the model says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComputeReport {
    /// Sum of the parts.
    pub energy_total_pj: f64,
    /// Of multiply-accumulates.
    pub energy_mac_pj: f64,
    /// Of accumulates.
    pub energy_ac_pj: f64,
    /// The parts by name.
    pub breakdown_pj: BTreeMap<&'static str, f64>,
    /// The counts that went in (`mac`, `ac`) and those that are shown beside them (`synop`, `flop`).
    pub counts: BTreeMap<&'static str, i128>,
    /// What a reader should know.
    pub warnings: Vec<String>,
    /// `pJ`.
    pub unit: &'static str,
    /// What is and is not in the figure.
    pub boundary: &'static str,
    /// The costs.
    pub config: BTreeMap<&'static str, f64>,
    /// Name of the rule set that counted.
    pub rules: String,
}

impl ComputeModel {
    /// The counters that the model reads or shows.
    pub const COUNTERS: [&'static str; 4] = ["mac", "ac", "synop", "flop"];

    /// The model with the costs of a file.
    #[must_use]
    pub fn new(costs: &CostFile) -> Self {
        let cost = |key| costs.costs.get(key).copied().unwrap_or_default();
        Self {
            name: costs.name.clone(),
            e_mac_pj: cost("e_mac_pj"),
            e_ac_pj: cost("e_ac_pj"),
        }
    }

    /// Applies the model to the totals of [`Self::COUNTERS`], in that order. `matched`: any op has a rule in any of them.
    #[must_use]
    pub fn report(&self, rules: &str, totals: [i128; 4], matched: bool) -> ComputeReport {
        let [mac, ac, synop, flop] = totals;
        #[expect(
            clippy::cast_precision_loss,
            reason = "energies are floats; counts beyond 2^53 keep 53 bits"
        )]
        let (energy_mac_pj, energy_ac_pj) = (mac as f64 * self.e_mac_pj, ac as f64 * self.e_ac_pj);
        let mut warnings = Vec::new();
        if !matched {
            warnings.push(
                "none of the selected ops has a rule in mac, ac, synop or flop, so the energy is zero for want of rules, not \
                 of work"
                    .to_owned(),
            );
        }
        ComputeReport {
            energy_total_pj: energy_mac_pj + energy_ac_pj,
            energy_mac_pj,
            energy_ac_pj,
            breakdown_pj: BTreeMap::from([("mac_pj", energy_mac_pj), ("ac_pj", energy_ac_pj)]),
            counts: BTreeMap::from([("mac", mac), ("ac", ac), ("synop", synop), ("flop", flop)]),
            warnings,
            unit: "pJ",
            boundary: "arithmetic only: multiply-accumulates and accumulates of the selected ops; no memory, addressing, state \
                       or idle energy",
            config: BTreeMap::from([("e_mac_pj", self.e_mac_pj), ("e_ac_pj", self.e_ac_pj)]),
            rules: rules.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_is_counts_times_costs() {
        let model = ComputeModel::new(&CostFile::preset("compute_fp32").unwrap());
        let report = model.report("optape", [10, 100, 50, 1000], true);
        assert!(
            (report.energy_total_pj - 136.0).abs() < 1e-9,
            "{}",
            report.energy_total_pj
        );
        assert!(report.warnings.is_empty());
        assert_eq!(report.counts["flop"], 1000);
    }

    #[test]
    fn nothing_matched_is_said() {
        let model = ComputeModel {
            name: "x".into(),
            e_mac_pj: 1.0,
            e_ac_pj: 1.0,
        };
        assert_eq!(model.report("optape", [0; 4], false).warnings.len(), 1);
    }
}
