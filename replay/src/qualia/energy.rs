//! Energies: how often memories are accessed and what is calculated, times what each costs.
//!
//! Numbers of equations are those of the paper. Where a formula of the original is not the paper's, or strange, a comment says so.

use super::convert::{Kind, Layer, Size};
use super::{How, Quantities, Spikes, Spiking, failed};
use crate::energy::CostFile;
use crate::rules::RuleError;

/// What an operation and an access cost.
#[derive(Clone, Debug)]
pub(super) struct Costs {
    add: f64,
    mul: f64,
    fifo: f64,
    sram: Sram,
}

/// What an access costs by the number of elements of the memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sram {
    /// On a line through SRAMs of 8 KiB, 32 KiB and 1 MiB.
    BySize { slope: f64, access: f64 },
    /// Always the same: so many elements share an access of the bus.
    ByBus { access: f64 },
}

impl Sram {
    fn access(self, elements: f64) -> f64 {
        match self {
            Self::BySize { slope, access } => slope * elements + access,
            Self::ByBus { access } => access,
        }
    }
}

impl Costs {
    pub(super) fn of(file: &CostFile) -> Result<Self, RuleError> {
        let bits = file.number("mem_width_bits");
        let operation = |kind: &str| -> Result<f64, RuleError> {
            let (low, high) = (
                file.cost(&format!("e_{kind}_8bit_pj")),
                file.cost(&format!("e_{kind}_32bit_pj")),
            );
            estimated(file.choice(&format!("op_estimation_{kind}")), bits, low, high)
        };
        let tables = ["add", "mul"].map(|kind| file.choice(&format!("op_estimation_{kind}")) == "table");
        if tables[0] != tables[1] {
            return Err(failed(
                "op_estimation_add and op_estimation_mul are both 'table', or neither is",
            ));
        }
        let sram = if file.choice("sram_estimation") == "new" {
            let packed = (file.number("sram_bus_bits") / bits).floor();
            if packed < 1.0 {
                return Err(failed(format!(
                    "ZeroDivisionError: no element of {bits} bits fits into the bus of {} bits",
                    file.number("sram_bus_bits")
                )));
            }
            Sram::ByBus {
                access: file.cost("sram_bus_pj") / packed,
            }
        } else {
            Sram::BySize {
                slope: file.cost("sram_pj_per_bit") * bits,
                access: file.cost("sram_access_pj"),
            }
        };
        Ok(Self {
            add: operation("add")?,
            mul: operation("mul")?,
            fifo: file.number("fifo_size"),
            sram,
        })
    }

    fn mac(&self) -> f64 {
        self.mul + self.add
    }

    /// The energies of a layer; none where no formula is for it.
    pub(super) fn row(&self, layer: &Layer, how: How<'_>) -> Quantities {
        let counts = Counts::of(layer, how)?;
        let sizes = Sizes::of(layer);
        let at = |elements: f64| self.sram.access(elements);
        let bias = layer
            .bias_elements
            .map_or(0.0, |elements| counts.bias_reads * at(elements));
        // Queues between layers of a spiking network, the whole input and output of another.
        let (input, output) = match how {
            How::Spiking(_) => (at(self.fifo), at(self.fifo)),
            How::Formal | How::Beside => (at(sizes.input.elements), at(sizes.output.elements)),
        };
        let ops = counts.mac * self.mac() + counts.acc * self.add + counts.leak_mul * self.mul;
        let addr = counts.addr_mac * self.mac() + counts.addr_acc * self.add;
        let quantities = vec![
            ("mem_pot", 2.0 * counts.potential_accesses * at(sizes.output.elements)),
            ("mem_weights", counts.weight_reads * at(layer.weight_elements)),
            ("mem_bias", bias),
            ("mem_io", counts.input_reads * input + counts.output_writes * output),
            ("ops", ops),
            ("addr", addr),
        ];
        Some((quantities, counts.spiking))
    }
}

/// The energy of an operation at a width, from those at 8 and 32 bits.
fn estimated(way: &str, bits: f64, low: f64, high: f64) -> Result<f64, RuleError> {
    Ok(match way {
        "iconip" => high,
        "saturation" if bits <= 8.0 => low,
        "saturation" if bits <= 32.0 => high,
        "saturation" => {
            return Err(failed(
                "ValueError: Bit width out of supported range (1-32) for saturation estimation.",
            ));
        }
        "linear" => low + (high - low) / 24.0 * (bits - 8.0),
        // Through 0 at 0 bits: a x^2 + b x.
        "quadratic" => {
            let a = (high / 32.0 - low / 8.0) / 24.0;
            let b = low / 8.0 - 8.0 * a;
            a * bits * bits + b * bits
        }
        _ if bits == 8.0 => low,
        _ => high,
    })
}

/// The sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) input: Size,
    pub(super) output: Size,
    /// Positions of the kernel.
    pub(super) kernel: f64,
    /// Outputs of a channel that a spike reaches, as the original estimates them.
    pub(super) reached: f64,
}

impl Sizes {
    pub(super) fn of(layer: &Layer) -> Self {
        let none = Size {
            channels: 0.0,
            elements: 0.0,
            sum: 0.0,
        };
        Self {
            input: layer.input.first().copied().unwrap_or(none),
            output: layer.output,
            kernel: layer.kernel.iter().product(),
            reached: layer
                .kernel
                .iter()
                .zip(&layer.stride)
                .map(|(kernel, stride)| (kernel / stride).ceil())
                .product(),
        }
    }
}

/// How often something happens in a layer for one inference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    /// Reads of the potentials, and as many writes.
    pub(super) potential_accesses: f64,
    pub(super) weight_reads: f64,
    /// As [`Self::weight_reads`], as the counter of operations has it.
    pub(super) weight_reads_counted: f64,
    /// Whether there is a bias or not.
    pub(super) bias_reads: f64,
    pub(super) input_reads: f64,
    pub(super) output_writes: f64,
    pub(super) mac: f64,
    pub(super) acc: f64,
    /// Multiplications that leak does where it is no multiply-accumulate.
    pub(super) leak_mul: f64,
    pub(super) addr_mac: f64,
    pub(super) addr_acc: f64,
    pub(super) spiking: Spiking,
}

impl Counts {
    /// Of a layer; `None` where no formula is for it.
    pub(super) fn of(layer: &Layer, how: How<'_>) -> Option<Self> {
        match (layer.kind, how) {
            (Kind::Convolution | Kind::Dense, How::Spiking(spikes)) => {
                Some(Self::spiking(layer, spikes))
            }
            (Kind::Convolution | Kind::Dense | Kind::Add, How::Formal | How::Beside) => {
                Some(Self::formal(layer))
            }
            _ => None,
        }
    }

    /// A layer without spikes.
    fn formal(layer: &Layer) -> Self {
        let Sizes {
            input,
            output,
            kernel,
            ..
        } = Sizes::of(layer);
        let mut counts = Self {
            potential_accesses: 0.0,
            weight_reads: 0.0,
            weight_reads_counted: 0.0,
            bias_reads: 0.0,
            input_reads: 0.0,
            output_writes: 0.0,
            mac: 0.0,
            acc: 0.0,
            leak_mul: 0.0,
            addr_mac: 0.0,
            addr_acc: 0.0,
            spiking: Spiking::No,
        };
        match layer.kind {
            Kind::Convolution => {
                // Equations 1.1, 3 and 6.1; groups are not divided by.
                let products = input.channels * output.elements * kernel;
                counts.input_reads = products;
                counts.weight_reads = products;
                counts.bias_reads = output.elements;
                counts.output_writes = output.elements;
                counts.mac = products;
                counts.acc = output.elements;
                counts.addr_acc = input.elements + output.elements + output.channels * kernel;
            }
            Kind::Dense => {
                // Equations 2.1, 4 and 6.2.
                let products = input.channels * output.channels;
                counts.input_reads = input.channels;
                counts.weight_reads = products;
                counts.bias_reads = output.channels;
                counts.output_writes = output.channels;
                counts.mac = products;
                counts.acc = output.channels;
                counts.addr_acc = products;
            }
            _ => {
                // The original adds up sizes where their product is meant, and writes channels for elements.
                let sums = || layer.input.iter().map(|size| size.sum);
                let least = sums().fold(f64::INFINITY, f64::min);
                let least = if least.is_finite() { least } else { 0.0 };
                counts.input_reads = sums().sum();
                counts.output_writes = output.channels;
                counts.acc = least * (layer.input.len() as f64 - 1.0).max(0.0);
                counts.addr_acc = least;
            }
        }
        counts.weight_reads_counted = counts.weight_reads;
        counts
    }

    /// A layer of a spiking network. An input that is not binary is presented once and multiplied; spikes come in every time step and are added.
    fn spiking(layer: &Layer, spikes: &Spikes) -> Self {
        let sizes = Sizes::of(layer);
        let Sizes {
            input,
            output,
            kernel,
            reached,
        } = sizes;
        let convolution = layer.kind == Kind::Convolution;
        let steps = spikes.time_steps;
        // Per inference: what comes in, of all time steps or of one.
        let all_steps = spikes.input_rate * steps * input.elements;
        let one_step = spikes.input_rate * input.elements;
        let came = if spikes.input_is_binary {
            all_steps
        } else {
            one_step
        };
        let went = spikes.output * output.elements;
        // What one spike reads of the weights, and which potentials it changes (equations 7 to 10, 14, 15).
        let (fan_out, units) = if convolution {
            (output.channels * kernel, output.elements)
        } else {
            (output.channels, output.channels)
        };
        let mut counts = Self {
            potential_accesses: all_steps * fan_out + units * steps,
            weight_reads: came * fan_out,
            // Of an input that is not binary the counter takes all time steps.
            weight_reads_counted: all_steps * fan_out,
            bias_reads: units * steps,
            input_reads: came,
            output_writes: went,
            leak_mul: 0.0,
            spiking: Spiking::Yes,
            ..Self::formal(layer)
        };
        (counts.addr_mac, counts.addr_acc) = if convolution {
            (2.0 * came, came * kernel)
        } else {
            // The rate alone, not the number of spikes: equation 17.2 has that.
            let rate = if spikes.input_is_binary {
                spikes.input_rate * steps
            } else {
                spikes.input_rate
            };
            (0.0, rate * output.channels)
        };
        if spikes.input_is_binary {
            // Equations 1.3, 1.4, 2.3 and 2.4, with a reset for every spike that goes out.
            counts.mac = if spikes.leak { steps * units } else { 0.0 };
            let each = if convolution {
                reached * output.channels
            } else {
                output.channels
            };
            counts.acc = came * each + steps * units + went;
        } else {
            counts.spiking = Spiking::Hybrid;
            counts.mac *= spikes.input_rate;
            counts.acc += went;
            if spikes.leak {
                counts.leak_mul = output.elements;
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energies_between_8_and_32_bits() {
        let of = |way: &str, bits: f64| estimated(way, bits, 0.2, 3.1).unwrap();
        for way in ["saturation", "linear", "quadratic", "table"] {
            assert!((of(way, 8.0) - 0.2).abs() < 1e-12, "{way}");
            assert!((of(way, 32.0) - 3.1).abs() < 1e-12, "{way}");
        }
        assert_eq!(of("iconip", 8.0), 3.1);
        assert_eq!((of("saturation", 4.0), of("saturation", 9.0)), (0.2, 3.1));
        assert_eq!((of("table", 4.0), of("table", 16.0)), (3.1, 3.1));
        assert!((of("linear", 16.0) - (0.2 + 2.9 / 3.0)).abs() < 1e-12);
        assert!(of("quadratic", 0.0).abs() < 1e-12);
        assert!(estimated("saturation", 33.0, 0.2, 3.1).is_err());
    }

    #[test]
    fn a_bus_packs_whole_elements() {
        let preset = crate::energy::presets("mem16_sram_new").next().unwrap();
        let mut file = preset.costs().unwrap();
        let set = |file: &mut CostFile, bits: f64| {
            file.settings.insert(
                "mem_width_bits".to_owned(),
                crate::energy::Setting::Number(bits),
            );
        };
        assert_eq!(Costs::of(&file).unwrap().sram, Sram::ByBus { access: 2.5 });
        set(&mut file, 24.0);
        assert_eq!(Costs::of(&file).unwrap().sram, Sram::ByBus { access: 5.0 });
        set(&mut file, 65.0);
        assert!(Costs::of(&file).is_err());
    }
}
