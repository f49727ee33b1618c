//! The rules of SpikingJelly's `op_counter` package, in two versions. They are mirrored, peculiarities included:
//!
//! * Tools look at tensors after the op ran, so the first operand of an in-place op is already the result.
//! * They run as a Python mode, where autograd sums gradients with `add`.
//! * `alpha` and `beta` are looked for among the keyword arguments alone.
//! * Numbers in tensor arithmetic are no tensors and have no bytes.
//!
//! What they do not know counts nothing; the report lists it.

mod ac;
mod flop;
mod lemaire_addressing;
mod mac;
mod memory_access;
mod memory_residency;
mod neuromc;
pub(crate) mod neuromorphic_memory_access;
pub(crate) mod neuron_state;
mod synop;

pub use memory_residency::{Capacities, MemoryResidency};
pub use neuromorphic_memory_access::NeuromorphicMemoryAccess;
pub use neuron_state::{NeuronState, Settings as NeuronStateSettings};

use super::{Counter, Rule, RuleSet, TableCounter};

/// Which version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// The repository at commit db3b6df0 of 2026-06-22.
    June2026,
    /// The released package 2.0.0.
    V2_0_0,
}

impl Version {
    /// The name of the rule set.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::June2026 => "spikingjelly-2026-06",
            Self::V2_0_0 => "spikingjelly-2.0.0",
        }
    }
}

/// The rule set of a version.
#[must_use]
pub fn rule_set(version: Version) -> RuleSet {
    let mut counters: Vec<Box<dyn Counter>> = vec![
        Box::new(flop::table(version)),
        Box::new(memory_access::table(version)),
        Box::new(mac::table(version)),
        Box::new(ac::table(version)),
        Box::new(synop::table(version)),
        Box::new(NeuronState::new(version)),
    ];
    if version == Version::June2026 {
        let small = Capacities::SMALL;
        counters.push(Box::new(lemaire_addressing::LemaireAddressing::new()));
        counters.push(Box::new(MemoryResidency::new(
            "memory_residency",
            Capacities::DEFAULT,
        )));
        counters.push(Box::new(MemoryResidency::new(
            "memory_residency_small",
            small,
        )));
        for counter in neuromc::counters() {
            counters.push(Box::new(counter));
        }
    } else {
        counters.push(Box::new(NeuromorphicMemoryAccess));
    }
    RuleSet {
        name: version.name().into(),
        extends: None,
        version: 1,
        description: match version {
            Version::June2026 => "SpikingJelly's op_counter at commit db3b6df0 (2026-06-22)",
            Version::V2_0_0 => "SpikingJelly's op_counter as released in 2.0.0",
        }
        .into(),
        counters,
        accumulations_are_add: true,
        lists_unsupported: version >= Version::V2_0_0,
        models: match version {
            Version::June2026 => &[
                "compute",
                "lemaire-2026-06",
                "neuromc-2026-06",
                "spikesim",
                "residency",
            ],
            Version::V2_0_0 => &["simple", "lemaire-2.0.0", "neuromc-2.0.0", "spikesim"],
        },
    }
}

fn add_all(table: &mut TableCounter, ops: &[&'static str], rule: &Rule) {
    for &op in ops {
        table.insert(op, rule.clone());
    }
}

const ADD_TENSOR: [&str; 5] = [
    "aten::add.Tensor",
    "aten::add_.Tensor",
    "aten::sub.Tensor",
    "aten::sub_.Tensor",
    "aten::rsub.Tensor",
];

const ADD_SCALAR: [&str; 5] = [
    "aten::add.Scalar",
    "aten::add_.Scalar",
    "aten::sub.Scalar",
    "aten::sub_.Scalar",
    "aten::rsub.Scalar",
];

const BINARY: [&str; 23] = [
    "aten::mul.Tensor",
    "aten::mul_.Tensor",
    "aten::mul.Scalar",
    "aten::mul_.Scalar",
    "aten::div.Tensor",
    "aten::div_.Tensor",
    "aten::div.Scalar",
    "aten::div_.Scalar",
    "aten::eq.Tensor",
    "aten::eq.Scalar",
    "aten::ne.Tensor",
    "aten::ne.Scalar",
    "aten::lt.Tensor",
    "aten::lt.Scalar",
    "aten::le.Tensor",
    "aten::le.Scalar",
    "aten::gt.Tensor",
    "aten::gt.Scalar",
    "aten::ge.Tensor",
    "aten::ge.Scalar",
    "aten::logical_and",
    "aten::logical_or",
    "aten::logical_xor",
];

const ATTENTION: [&str; 4] = [
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
];

const ATTENTION_BACKWARD: [&str; 4] = [
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention_backward",
];

/// Zero in both versions, for flop and (but for those that flop alone has) memory_access.
const VIEWS: [&str; 6] = [
    "aten::view",
    "aten::empty.memory_format",
    "aten::select.int",
    "aten::detach",
    "aten::t",
    "aten::expand",
];

/// Zero since 2.0.0.
const VIEWS_OF_2_0_0: [&str; 3] = ["aten::unsqueeze", "aten::squeeze.dim", "aten::unbind.int"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_release_knows_attention_and_sigmoid() {
        for name in ["flop", "memory_access"] {
            for op in [
                "aten::sigmoid",
                ATTENTION[0],
                ATTENTION_BACKWARD[3],
                VIEWS_OF_2_0_0[2],
            ] {
                let june = rule_set(Version::June2026);
                let release = rule_set(Version::V2_0_0);
                assert!(
                    june.counter(name).and_then(|c| c.rule(op)).is_none(),
                    "{name} {op}"
                );
                assert!(
                    release.counter(name).and_then(|c| c.rule(op)).is_some(),
                    "{name} {op}"
                );
            }
        }
    }

    #[test]
    fn tables_have_the_size_that_upstream_has() {
        let rules = |version| {
            [
                flop::table(version).rules().count(),
                memory_access::table(version).rules().count(),
                mac::table(version).rules().count(),
                ac::table(version).rules().count(),
                synop::table(version).rules().count(),
            ]
        };
        assert_eq!(rules(Version::June2026), [63, 63, 6, 21, 5]);
        assert_eq!(rules(Version::V2_0_0), [75, 75, 6, 21, 5]);
        assert_eq!(mac::table(Version::V2_0_0).unit(), "MAC");
    }
}
