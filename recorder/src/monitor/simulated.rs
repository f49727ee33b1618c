//! Made-up GPUs, for tests and for trying the dashboard on a machine that has none. Only where somebody asks for them by name;
//! said aloud and recorded.

use std::f64::consts::TAU;

use optape_trace::series::{
    self, ENERGY, MEMORY_CLOCK, MEMORY_USED, MEMORY_UTILIZATION, POWER, SM_CLOCK, TEMPERATURE,
    UTILIZATION,
};
use serde_json::json;

use super::{Samples, Source, SourceKind};
use crate::clock::monotonic_ns;

const MEMORY_BYTES: f64 = 16e9;

struct Simulated {
    gpus: Vec<u32>,
    start_ns: u64,
}

pub(super) fn open(count: u32, wanted: Option<&[u32]>, into: &mut Samples) -> Box<dyn Source> {
    into.fact(
        series::facts::SIMULATED.to_owned(),
        json!("values of GPUs are made up (OPTAPE_SIMULATED_GPUS)"),
    );
    let gpus: Vec<u32> = (0..count)
        .filter(|gpu| wanted.is_none_or(|wanted| wanted.contains(gpu)))
        .collect();
    for gpu in &gpus {
        let value = json!({"name": "simulated", "memory_total_bytes": MEMORY_BYTES as u64});
        into.fact(format!("{}gpu{gpu}", series::facts::DEVICE_PREFIX), value);
    }
    for gpu in wanted
        .unwrap_or_default()
        .iter()
        .filter(|gpu| **gpu >= count)
    {
        into.note(
            &format!("gpu{gpu}"),
            format!("there is no such GPU: there are {count}"),
        );
    }
    Box::new(Simulated {
        gpus,
        start_ns: monotonic_ns(),
    })
}

/// Load of a GPU after so many seconds, from 0 to 1: a wave with a period of its own. And its integral over time, in seconds.
fn load(gpu: u32, seconds: f64) -> (f64, f64) {
    let period = 4.0 + f64::from(gpu);
    let phase = TAU * seconds / period;
    (
        0.5 - 0.5 * phase.cos(),
        0.5 * seconds - 0.5 * phase.sin() * period / TAU,
    )
}

impl Source for Simulated {
    fn kind(&self) -> SourceKind {
        SourceKind::Gpu
    }

    fn what(&self) -> String {
        format!(
            "{} SIMULATED GPUs: all their values are made up",
            self.gpus.len()
        )
    }

    fn sample(&mut self, into: &mut Samples) {
        into.now();
        let seconds = into.time_ns.saturating_sub(self.start_ns) as f64 / 1e9;
        for &gpu in &self.gpus {
            let device = format!("gpu{gpu}");
            let (load, integral) = load(gpu, seconds);
            // From 50 W to 250 W; the energy is exactly its integral.
            for (quantity, value) in [
                (&UTILIZATION, (100.0 * load).round()),
                (&MEMORY_UTILIZATION, (40.0 * load).round()),
                (
                    &MEMORY_USED,
                    (MEMORY_BYTES * (0.25 + 0.05 * f64::from(gpu % 8))).round(),
                ),
                (&POWER, 1e3 * (50.0 + 200.0 * load)),
                (&ENERGY, 50.0 * seconds + 200.0 * integral),
                (&TEMPERATURE, (35.0 + 40.0 * load).round()),
                (&SM_CLOCK, (600.0 + 1200.0 * load).round()),
                (&MEMORY_CLOCK, 2600.0),
            ] {
                let series = into.series(&device, quantity);
                into.add(series, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_is_the_integral_of_power() {
        for gpu in [0, 7] {
            let (mut sum, step) = (0.0, 1e-3);
            for at in 0..10_000 {
                sum += step * load(gpu, (f64::from(at) + 0.5) * step).0;
            }
            assert!((sum - load(gpu, 10.0).1).abs() < 1e-4);
        }
    }

    #[test]
    fn eight_gpus_have_eight_series_each() {
        let mut samples = Samples::default();
        open(8, None, &mut samples).sample(&mut samples);
        assert_eq!(samples.readings().len(), 64);
        let mut samples = Samples::default();
        open(8, Some(&[1, 9]), &mut samples).sample(&mut samples);
        assert!(samples.names().iter().all(|name| name.starts_with("gpu1/")));
        assert!(
            samples
                .take_facts()
                .iter()
                .any(|(key, _)| key == "note.gpu9")
        );
    }
}
