//! GPUs by NVML, NVIDIA's management library. It comes with the driver and is loaded when it is asked for, so nothing here needs it
//! to build or to start.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use optape_trace::series::{
    self, ENERGY, MEMORY_CLOCK, MEMORY_USED, MEMORY_UTILIZATION, POWER, Quantity, SM_CLOCK,
    TEMPERATURE, UTILIZATION,
};
use serde_json::json;

use super::{Absence, Samples, Source, SourceKind};

/// Processes are asked for less often than the rest: it costs the driver more, and they change less.
const PROCESS_INTERVAL: Duration = Duration::from_secs(1);

struct Gpus {
    nvml: Nvml,
    gpus: Vec<Gpu>,
    driver: String,
}

struct Gpu {
    index: u32,
    device: String,
    /// Of the energy counter, which counts since the driver was loaded.
    first_energy_mj: Option<u64>,
    /// Quantities that this GPU does not have, or that were refused once: each is noted once, the former are not asked for again.
    faults: HashMap<&'static str, bool>,
    processes_asked: Option<Instant>,
    /// The driver's time stamp of the newest utilization of processes.
    processes_seen_us: u64,
}

pub(super) fn open(wanted: Option<&[u32]>, into: &mut Samples) -> Result<Box<dyn Source>, Absence> {
    let nvml = Nvml::init().map_err(absence)?;
    let count = nvml.device_count().map_err(absence)?;
    if count == 0 {
        return Err(Absence {
            what: "the NVIDIA driver knows no GPU".to_owned(),
            hint: Some(
                "a container sees those that it was given (docker run --gpus all)".to_owned(),
            ),
        });
    }
    let driver = nvml.sys_driver_version().unwrap_or_default();
    let all: Vec<u32> = (0..count).collect();
    let mut gpus = Vec::new();
    for &index in wanted.unwrap_or(&all) {
        let device = format!("gpu{index}");
        match nvml.device_by_index(index) {
            Ok(gpu) => {
                let value = json!({
                    "name": gpu.name().ok(),
                    "uuid": gpu.uuid().ok(),
                    "pci_bus_id": gpu.pci_info().ok().map(|pci| pci.bus_id),
                    "memory_total_bytes": gpu.memory_info().ok().map(|memory| memory.total),
                    "driver": driver,
                });
                into.fact(format!("{}{device}", series::facts::DEVICE_PREFIX), value);
                gpus.push(Gpu {
                    index,
                    device,
                    first_energy_mj: None,
                    faults: HashMap::new(),
                    processes_asked: None,
                    processes_seen_us: 0,
                });
            }
            Err(NvmlError::InvalidArg) => {
                into.note(
                    &device,
                    format!("there is no such GPU: there are {count}, counted from 0"),
                );
            }
            Err(error) => into.note(&device, error.to_string()),
        }
    }
    if gpus.is_empty() {
        return Err(Absence {
            what: format!(
                "none of the GPUs that were asked for is there: there are {count}, counted from 0"
            ),
            hint: Some("`nvidia-smi -L` lists them".to_owned()),
        });
    }
    Ok(Box::new(Gpus { nvml, gpus, driver }))
}

/// What is missing, and what helps.
fn absence(error: NvmlError) -> Absence {
    let (what, hint) = match &error {
        NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => (
            "no NVIDIA driver (libnvidia-ml.so.1 is not there)".to_owned(),
            "on a machine with an NVIDIA GPU, install its driver; in a container, run it with --gpus all",
        ),
        NvmlError::DriverNotLoaded => (
            "the NVIDIA driver is not loaded".to_owned(),
            "load it (modprobe nvidia), or see dmesg for why it did not start",
        ),
        NvmlError::LibRmVersionMismatch => (
            "the NVIDIA driver and its library have different versions".to_owned(),
            "the driver was updated: reboot",
        ),
        NvmlError::NoPermission => (
            "NVML: no permission".to_owned(),
            "/dev/nvidiactl must be readable and writable",
        ),
        _ => (format!("NVML: {error}"), "`nvidia-smi` may say more"),
    };
    Absence {
        what,
        hint: Some(hint.to_owned()),
    }
}

type Ask = fn(&Device<'_>) -> Result<f64, NvmlError>;

/// What has one number per GPU. Utilization and energy are asked for apart.
const QUANTITIES: [(Quantity, Ask); 5] = [
    (MEMORY_USED, |gpu| Ok(gpu.memory_info()?.used as f64)),
    (POWER, |gpu| Ok(f64::from(gpu.power_usage()?))),
    (TEMPERATURE, |gpu| {
        Ok(f64::from(gpu.temperature(TemperatureSensor::Gpu)?))
    }),
    (SM_CLOCK, |gpu| Ok(f64::from(gpu.clock_info(Clock::SM)?))),
    (MEMORY_CLOCK, |gpu| {
        Ok(f64::from(gpu.clock_info(Clock::Memory)?))
    }),
];

impl Source for Gpus {
    fn kind(&self) -> SourceKind {
        SourceKind::Gpu
    }

    fn what(&self) -> String {
        format!("{} GPU(s), driver {}", self.gpus.len(), self.driver)
    }

    fn sample(&mut self, into: &mut Samples) {
        for gpu in &mut self.gpus {
            into.now();
            match self.nvml.device_by_index(gpu.index) {
                Ok(device) => gpu.sample(&device, into),
                Err(error) => gpu.fault("handle", &error, into),
            }
        }
    }
}

impl Gpu {
    /// Notes what is refused, once.
    fn fault(&mut self, what: &'static str, error: &NvmlError, into: &mut Samples) {
        let forever = matches!(
            error,
            NvmlError::NotSupported
                | NvmlError::FailedToLoadSymbol(_)
                | NvmlError::FunctionNotFound
        );
        if self.faults.insert(what, forever).is_none() {
            into.note(&format!("{}/{what}", self.device), error.to_string());
        }
    }

    fn has(&self, what: &'static str) -> bool {
        self.faults.get(what) != Some(&true)
    }

    fn sample(&mut self, gpu: &Device<'_>, into: &mut Samples) {
        if self.has(UTILIZATION.name) {
            match gpu.utilization_rates() {
                Ok(rates) => {
                    let series = into.series(&self.device, &UTILIZATION);
                    into.add(series, f64::from(rates.gpu));
                    let series = into.series(&self.device, &MEMORY_UTILIZATION);
                    into.add(series, f64::from(rates.memory));
                }
                Err(error) => self.fault(UTILIZATION.name, &error, into),
            }
        }
        if self.has(ENERGY.name) {
            // In millijoules, since the driver was loaded; Volta and newer.
            match gpu.total_energy_consumption() {
                Ok(now_mj) => {
                    let first = *self.first_energy_mj.get_or_insert(now_mj);
                    let series = into.series(&self.device, &ENERGY);
                    into.add(series, now_mj.saturating_sub(first) as f64 / 1e3);
                }
                Err(error) => self.fault(ENERGY.name, &error, into),
            }
        }
        for (quantity, ask) in &QUANTITIES {
            if !self.has(quantity.name) {
                continue;
            }
            match ask(gpu) {
                Ok(value) => {
                    let series = into.series(&self.device, quantity);
                    into.add(series, value);
                }
                Err(error) => self.fault(quantity.name, &error, into),
            }
        }
        if self
            .processes_asked
            .is_none_or(|asked| asked.elapsed() >= PROCESS_INTERVAL)
        {
            self.processes_asked = Some(Instant::now());
            self.sample_processes(gpu, into);
        }
    }

    fn sample_processes(&mut self, gpu: &Device<'_>, into: &mut Samples) {
        const MEMORY: &str = "process/memory_used_bytes";
        const LOAD: &str = "process/utilization_percent";
        let device = |process_id: u32| format!("gpu{}/process/{process_id}", self.index);
        let mut faults = Vec::new();
        if self.has(MEMORY) {
            match gpu.running_compute_processes() {
                Ok(processes) => {
                    for process in processes {
                        if let UsedGpuMemory::Used(bytes) = process.used_gpu_memory {
                            let series = into.series(&device(process.pid), &MEMORY_USED);
                            into.add(series, bytes as f64);
                        }
                    }
                }
                Err(error) => faults.push((MEMORY, error)),
            }
        }
        let mut seen_us = self.processes_seen_us;
        if self.has(LOAD) {
            match gpu.process_utilization_stats(seen_us) {
                Ok(samples) => {
                    // Several per process since the last time: the newest counts.
                    let mut newest: HashMap<u32, (u64, u32)> = HashMap::new();
                    for sample in samples {
                        seen_us = seen_us.max(sample.timestamp);
                        let entry = newest.entry(sample.pid).or_default();
                        *entry = (*entry).max((sample.timestamp, sample.sm_util));
                    }
                    let mut newest: Vec<_> = newest.into_iter().collect();
                    newest.sort_unstable();
                    for (process_id, (_, percent)) in newest {
                        let series = into.series(&device(process_id), &UTILIZATION);
                        into.add(series, f64::from(percent));
                    }
                }
                // No process used the GPU since the last time.
                Err(NvmlError::NotFound) => {}
                Err(error) => faults.push((LOAD, error)),
            }
        }
        self.processes_seen_us = seen_us;
        for (what, error) in faults {
            self.fault(what, &error, into);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_a_hint() {
        let absence = absence(NvmlError::DriverNotLoaded);
        assert!(absence.what.contains("not loaded") && absence.hint.is_some());
        let mut samples = Samples::default();
        match open(None, &mut samples) {
            Ok(mut source) => {
                source.sample(&mut samples);
                assert!(
                    samples
                        .names()
                        .iter()
                        .any(|name| name == "gpu0/memory_used_bytes"),
                    "{:?}",
                    samples.names()
                );
            }
            Err(absence) => assert!(absence.hint.is_some(), "{absence:?}"),
        }
    }
}
