//! The names of monitors' series: what the recorder's monitors write and replay and the dashboard read.
//!
//! A series is named `DEVICE/QUANTITY`, the quantity with its unit as its last part: `gpu0/power_mw`,
//! `rapl/package-0/dram/energy_j`, `process/4711/rss_bytes`. Devices are:
//!
//! | device | what |
//! |---|---|
//! | `gpuN` | GPU number N as NVML counts (by PCI bus; not always as CUDA counts) |
//! | `gpuN/process/PID` | a process's share of it |
//! | `rapl/ZONE`, `rapl/ZONE/SUBZONE` | a power domain of the processor, as Linux names it: `package-0`, `dram`, `core`, `psys` |
//! | `host` | the machine |
//! | `process/PID` | a recorded process |
//!
//! Cumulative quantities count from 0 at the start of the monitoring. Readers show a series of an unknown quantity as it is.

/// A quantity that monitors sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantity {
    /// The last part of a series' name.
    pub name: &'static str,
    /// Its unit, as tables print it; empty for a pure number.
    pub unit: &'static str,
    /// It counts from the start of the monitoring and never falls; else it is a state at the time of the sample.
    pub cumulative: bool,
    /// What it is.
    pub meaning: &'static str,
}

macro_rules! quantities {
    ($($(#[$doc:meta])* $constant:ident = $name:literal, $unit:literal, $cumulative:literal, $meaning:literal;)*) => {
        $(
            #[doc = $meaning]
            pub const $constant: Quantity = Quantity {
                name: $name,
                unit: $unit,
                cumulative: $cumulative,
                meaning: $meaning,
            };
        )*

        /// All quantities that this version knows.
        pub const QUANTITIES: &[Quantity] = &[$($constant),*];
    };
}

quantities! {
    ENERGY = "energy_j", "J", true, "Energy used, from a hardware counter.";
    POWER = "power_mw", "mW", false, "Power, as the device reports it (often a mean over the last second).";
    UTILIZATION = "utilization_percent", "%", false, "Share of the device's last sampling period in which a kernel ran.";
    MEMORY_UTILIZATION = "memory_utilization_percent", "%", false, "Share of the device's last sampling period in which its memory was read or written.";
    MEMORY_USED = "memory_used_bytes", "byte", false, "Memory in use.";
    MEMORY_AVAILABLE = "memory_available_bytes", "byte", false, "Memory that programs could still get without swapping.";
    TEMPERATURE = "temperature_c", "°C", false, "Temperature of the chip.";
    SM_CLOCK = "sm_clock_mhz", "MHz", false, "Clock of the streaming multiprocessors.";
    MEMORY_CLOCK = "memory_clock_mhz", "MHz", false, "Clock of the memory.";
    CPU_USED = "cpu_percent", "%", false, "Processor time used since the sample before: 100 % is all processors of the machine.";
    CPU_TIME = "cpu_time_s", "s", true, "Processor time of all threads.";
    RESIDENT = "rss_bytes", "byte", false, "Resident memory.";
    THREADS = "threads", "", false, "Threads.";
}

/// A series' name, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeriesName<'a> {
    /// `gpu0`, `rapl/package-0`; empty where the name has one part.
    pub device: &'a str,
    /// `power_mw`.
    pub quantity: &'a str,
}

impl<'a> SeriesName<'a> {
    /// Any text is a name.
    #[must_use]
    pub fn parse(name: &'a str) -> Self {
        let (device, quantity) = name.rsplit_once('/').unwrap_or(("", name));
        Self { device, quantity }
    }

    /// The quantity, if this version knows it.
    #[must_use]
    pub fn known(&self) -> Option<&'static Quantity> {
        QUANTITIES.iter().find(|q| q.name == self.quantity)
    }

    /// The device whose energy holds this one's: a RAPL zone's `core` and `uncore` are parts of their package, whose counter counts
    /// them too. Memory (`dram`) is counted beside the package.
    #[must_use]
    pub fn energy_is_part_of(&self) -> Option<&'a str> {
        let (zone, part) = self.device.strip_prefix("rapl/")?.rsplit_once('/')?;
        let zone_length = "rapl/".len() + zone.len();
        matches!(part, "core" | "uncore")
            .then(|| self.device.get(..zone_length))
            .flatten()
    }
}

/// The name of a series.
#[must_use]
pub fn series_name(device: &str, quantity: &Quantity) -> String {
    format!("{device}/{}", quantity.name)
}

/// Keys of the facts ([`crate::Event::Fact`]) in a monitors' stream. Their values are JSON.
pub mod facts {
    /// `monitor.gpu`: the state of a source, `{"state": "running" | "absent", "what": ..., "hint": ...}`.
    pub const SOURCE_PREFIX: &str = "monitor.";
    /// Seconds between two samples.
    pub const INTERVAL: &str = "monitors.interval_s";
    /// Sampled values are made up: what by.
    pub const SIMULATED: &str = "monitors.simulated";
    /// `device.gpu0`: what a device is (name, memory).
    pub const DEVICE_PREFIX: &str = "device.";
    /// `note.gpu0`: why something of a device is missing.
    pub const NOTE_PREFIX: &str = "note.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_put_together_and_taken_apart() {
        let name = series_name("rapl/package-0/core", &ENERGY);
        assert_eq!(name, "rapl/package-0/core/energy_j");
        let parsed = SeriesName::parse(&name);
        assert_eq!(
            (parsed.device, parsed.known()),
            ("rapl/package-0/core", Some(&ENERGY))
        );
        assert_eq!(parsed.energy_is_part_of(), Some("rapl/package-0"));
        let part_of = |name| SeriesName::parse(name).energy_is_part_of();
        for alone in [
            "rapl/package-0/energy_j",
            "rapl/package-0/dram/energy_j",
            "gpu0/energy_j",
            "energy_j",
        ] {
            assert_eq!(part_of(alone), None, "{alone}");
        }
        assert_eq!(SeriesName::parse("x").known(), None);
    }

    #[test]
    fn every_quantity_has_one_name_that_says_its_unit() {
        for (at, quantity) in QUANTITIES.iter().enumerate() {
            assert!(
                QUANTITIES
                    .iter()
                    .skip(at + 1)
                    .all(|q| q.name != quantity.name)
            );
            let suffix = match quantity.unit {
                "" => "",
                "%" => "_percent",
                "°C" => "_c",
                "byte" => "_bytes",
                unit => &format!("_{}", unit.to_lowercase()),
            };
            assert!(quantity.name.ends_with(suffix), "{}", quantity.name);
        }
    }
}
