//! What the traffic between registers, SRAM and DRAM costs: the counter `memory_residency` times a cost per byte by the size of the memory.
//!
//! optape's own model; no live tool has it. Where operands lie is simulated with the capacities of the cost file, so a sweep over a capacity is a
//! simulation for each. What a byte costs in registers and SRAM follows from their sizes, what it costs in DRAM is a number.

use super::{CostFile, EnergyModel, EnergyReport, Figure, Given, Input, float, memory_cost_pj};
use crate::ordered::Simulation;
use crate::report::Ordered;
use crate::rules::spikingjelly::{Capacities, MemoryResidency};
use crate::rules::{Counter, RuleError};

const BITS_PER_BYTE: f64 = 8.0;
const BYTES_PER_KIB: f64 = 1024.0;

/// The model with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Residency {
    file: CostFile,
}

impl Residency {
    /// The model with the costs of a file.
    #[must_use]
    pub fn new(file: &CostFile) -> Self {
        Self { file: file.clone() }
    }
}

impl EnergyModel for Residency {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn inputs(&self) -> Vec<Input> {
        Vec::new()
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        let capacities = Capacities::of_kib(
            self.file.number("registers_kib"),
            self.file.number("sram_kib"),
        );
        MemoryResidency::new("memory_residency", capacities).simulation()
    }

    fn report(&self, given: &Given<'_>) -> Result<EnergyReport, RuleError> {
        let points = self.file.points("memory_breakpoints");
        let by_size = |key| memory_cost_pj(points, self.file.number(key) * BYTES_PER_KIB);
        let levels = [
            ("reg", by_size("registers_kib")),
            ("sram", by_size("sram_kib")),
            ("dram", self.file.cost("e_dram_pj_per_byte")),
        ];
        let bits = |level, what| given.followed("level_rw_bits", &[level, what]);
        let mut energies: Ordered<Figure> = Ordered::default();
        let mut costs: Ordered<Figure> = Ordered::default();
        let mut accesses: Ordered<Figure> = Ordered::default();
        let mut total_pj = 0.0;
        for (level, pj_per_byte) in levels {
            let [read, written] = ["read_bits", "write_bits"].map(|what| bits(level, what));
            let energy_pj = float(read + written) / BITS_PER_BYTE * pj_per_byte;
            total_pj += energy_pj;
            energies.push(&format!("{level}_pj"), energy_pj.into());
            costs.push(level, pj_per_byte.into());
            accesses.push(&format!("{level}_read_bits"), read.into());
            accesses.push(&format!("{level}_write_bits"), written.into());
        }
        let mut report = EnergyReport::new(total_pj, given);
        report.field("energy_total_pj", total_pj);
        report.field("breakdown_pj", energies);
        report.field("pj_per_byte", costs);
        report.field("counts", accesses);
        report.boundary = "reads and writes of operands and results at each level, whole tensors at once; no arithmetic, no addressing, no \
                           idle energy";
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
    fn bytes_cost_by_the_size_of_their_memory() {
        let mut file = presets("residency").next().unwrap().costs().unwrap();
        file.set("sram_kib", "20").unwrap();
        file.set("registers_kib", "4").unwrap();
        let mut followed = Amounts::default();
        for (level, read, written) in [("reg", 8, 8), ("sram", 16, 0), ("dram", 0, 8)] {
            followed.add("level_rw_bits", &[level, "read_bits"], read);
            followed.add("level_rw_bits", &[level, "write_bits"], written);
        }
        let mut counts = given(&[]);
        counts.followed = Some(&followed);
        let report = Residency::new(&file).report(&counts).unwrap();
        // Half way to 8 KiB, half way from 8 to 32 KiB.
        let wanted = 2.0 * 0.625 + 2.0 * 1.875 + 162.5;
        assert!((report.total_pj - wanted).abs() < 1e-9, "{}", report.total_pj);
    }
}
