//! SpikingJelly 2.0.0's simple model: multiply-accumulates and accumulates, and bytes of parameters and neuron states, times a cost each.
//!
//! The live tool counts one of its own operations: see [`neuromorphic_memory_access::Following`]. It is in the figure here,
//! too.

use super::{CostFile, EnergyModel, EnergyReport, Figure, Given, Input, float};
use crate::ordered::Simulation;
use crate::rules::RuleError;
use crate::rules::spikingjelly::neuromorphic_memory_access::{self, METRICS, OWN_ADDITIONS};

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Simple {
    file: CostFile,
}

impl Simple {
    /// The model with the costs of a file.
    #[must_use]
    pub fn new(file: &CostFile) -> Self {
        Self { file: file.clone() }
    }
}

impl EnergyModel for Simple {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn inputs(&self) -> Vec<Input> {
        ["mac", "ac", "synop"].map(Input::all).to_vec()
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        Some(Box::new(neuromorphic_memory_access::Following::default()))
    }

    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
        let own = given.followed(OWN_ADDITIONS, &["ac"]);
        let (mac, ac) = (given.total("mac"), given.total("ac") + own);
        let bytes = METRICS.map(|name| {
            given
                .followed
                .and_then(|followed| followed.scopes.get("Global")?.get(name))
                .copied()
                .unwrap_or(0)
        });
        let [weights, biases, reads, writes] = bytes;
        let (parameters, states) = (weights + biases, reads + writes);
        let cost = |key| self.file.cost(key);
        let energy_mac_pj = float(mac) * cost("e_mac_pj");
        let energy_ac_pj = float(ac) * cost("e_ac_pj");
        let parameter_memory_pj = float(parameters) * cost("e_memory_pj_per_byte");
        let neuron_state_memory_pj = float(states) * cost("e_memory_pj_per_byte");
        let energy_compute_pj = energy_mac_pj + energy_ac_pj;
        let energy_memory_pj = parameter_memory_pj + neuron_state_memory_pj;
        let mut report = EnergyReport::new(energy_compute_pj + energy_memory_pj, given);
        report.field("energy_total_pj", report.total_pj);
        report.field("energy_compute_pj", energy_compute_pj);
        report.field("energy_mac_pj", energy_mac_pj);
        report.field("energy_ac_pj", energy_ac_pj);
        report.field("energy_memory_pj", energy_memory_pj);
        report.field(
            "breakdown_pj",
            [
                ("mac_pj", energy_mac_pj),
                ("ac_pj", energy_ac_pj),
                ("parameter_memory_pj", parameter_memory_pj),
                ("neuron_state_memory_pj", neuron_state_memory_pj),
                ("memory_pj", energy_memory_pj),
            ],
        );
        let mut counts = vec![("mac", mac), ("ac", ac), ("synop", given.total("synop"))];
        counts.extend(METRICS.into_iter().zip(bytes));
        counts.push(("memory_access_bytes", parameters + states));
        report.field(
            "counts",
            Figure::Map(
                counts
                    .into_iter()
                    .map(|(name, count)| (name.to_owned(), Figure::Integer(count)))
                    .collect(),
            ),
        );
        if own > 0 {
            report.warnings.push(format!(
                "{own} of the accumulates are those of the live tool itself, which sums the spikes that reach convolutions"
            ));
        }
        if !given.matched && bytes == [0; 4] {
            report.warnings.push(
                "no selected op has a rule, and no selected module is a layer or a neuron"
                    .to_owned(),
            );
        }
        report.boundary = "arithmetic of the selected ops, and reads of parameters and accesses to neuron states by linear and \
                           convolution layers and neurons; no activations, addressing or idle energy";
        report.configure(&self.file);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy::{given, presets};
    use crate::ordered::Amounts;

    #[test]
    fn energy_is_arithmetic_and_bytes() {
        let mut followed = Amounts::default();
        followed.set_scopes(["Global".to_owned()]);
        followed.count_as(METRICS[0], 100);
        followed.count_as(METRICS[3], 10);
        followed.add(OWN_ADDITIONS, &["ac"], 5);
        let mut counts = given(&[("mac", 10), ("ac", 95), ("synop", 1)]);
        counts.followed = Some(&followed);
        let file = presets("simple_fp32").next().unwrap().costs().unwrap();
        let report = Simple::new(&file).report(&counts).unwrap();
        let wanted = 46.0 + 90.0 + 110.0 * 24.96;
        assert!((report.total_pj - wanted).abs() < 1e-9);
        assert_eq!(report.warnings.len(), 1);
    }
}
