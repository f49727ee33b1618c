//! The compute-only model: multiply-accumulates and accumulates times a cost each.
//!
//! It leaves out memory, addressing, state and idle energy, and takes no account of the element type that really
//! ran: it is a way to compare networks under one set of costs.

use super::{CostFile, EnergyModel, EnergyReport, Given, Input, float};
use crate::rules::RuleError;

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct ComputeModel {
    file: CostFile,
}

impl ComputeModel {
    /// The model with the costs of a file.
    #[must_use]
    pub fn new(file: &CostFile) -> Self {
        Self { file: file.clone() }
    }
}

impl EnergyModel for ComputeModel {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn inputs(&self) -> Vec<Input> {
        ["mac", "ac", "synop", "flop"].map(Input::all).to_vec()
    }

    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
        let count = |name| given.total(name);
        let energy_mac_pj = float(count("mac")) * self.file.cost("e_mac_pj");
        let energy_ac_pj = float(count("ac")) * self.file.cost("e_ac_pj");
        let mut report = EnergyReport::new(energy_mac_pj + energy_ac_pj, given);
        report.field("energy_total_pj", report.total_pj);
        report.field("energy_mac_pj", energy_mac_pj);
        report.field("energy_ac_pj", energy_ac_pj);
        report.field(
            "breakdown_pj",
            [("ac_pj", energy_ac_pj), ("mac_pj", energy_mac_pj)],
        );
        report.field(
            "counts",
            ["ac", "flop", "mac", "synop"].map(|name| (name, count(name))),
        );
        if !given.matched {
            report.warnings.push(
                "none of the selected ops has a rule in mac, ac, synop or flop, so the energy is zero for want of rules, not \
                 of work"
                    .to_owned(),
            );
        }
        report.boundary = "arithmetic only: multiply-accumulates and accumulates of the selected ops; no memory, addressing, state \
                           or idle energy";
        report.configure(&self.file);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy::{given, presets};

    fn fp32() -> ComputeModel {
        ComputeModel::new(&presets("compute_fp32").next().unwrap().costs().unwrap())
    }

    #[test]
    fn energy_is_counts_times_costs() {
        let counts = given(&[("mac", 10), ("ac", 100), ("synop", 50), ("flop", 1000)]);
        let report = fp32().report(&counts).unwrap();
        assert!(
            (report.total_pj - 136.0).abs() < 1e-9,
            "{}",
            report.total_pj
        );
        assert!(report.warnings.is_empty());
    }

    #[test]
    fn nothing_matched_is_said() {
        let mut nothing = given(&[]);
        nothing.matched = false;
        assert_eq!(fp32().report(&nothing).unwrap().warnings.len(), 1);
    }
}
