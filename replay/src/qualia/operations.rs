//! Operations and accesses, counted.

use super::convert::Layer;
use super::energy::Counts;
use super::{How, Quantities};

/// The counts of a layer; none where no formula is for it.
pub(super) fn row(layer: &Layer, how: How<'_>) -> Quantities {
    let counts = Counts::of(layer, how)?;
    // In a network without spikes the original reads a bias whether there is one or not.
    let bias = if layer.bias_elements.is_some() || matches!(how, How::Formal) {
        counts.bias_reads
    } else {
        0.0
    };
    let reads = counts.input_reads + counts.weight_reads_counted + bias + counts.potential_accesses;
    let writes = counts.output_writes + counts.potential_accesses;
    let quantities = vec![
        ("syn_acc", counts.acc),
        ("syn_mac", counts.mac + counts.leak_mul),
        ("addr_acc", counts.addr_acc),
        ("addr_mac", counts.addr_mac),
        ("mem_write", writes),
        ("mem_read", reads),
    ];
    Some((quantities, counts.spiking))
}
