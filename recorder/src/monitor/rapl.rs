//! RAPL: the processor's own energy counters, as Linux shows them under `/sys/class/powercap`
//! (Documentation/power/powercap/powercap.rst). Zones `intel-rapl:N` are packages (or `psys`, the whole platform), zones
//! `intel-rapl:N:M` their parts. AMD's processors are shown under the same names. `intel-rapl-mmio` shows a package a second time and is
//! left alone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use optape_trace::series::{self, ENERGY};
use serde_json::json;

use super::{Absence, Samples, Source, SourceKind};

/// Where Linux shows the counters.
pub const POWERCAP_DIRECTORY: &str = "/sys/class/powercap";
const CONTROL_TYPE: &str = "intel-rapl:";

/// One power domain.
struct Zone {
    device: String,
    /// `energy_uj`: opened once, read at its beginning each time, which is how sysfs files are read again.
    counter: File,
    /// The counter runs from 0 to this, and starts again.
    range_uj: u64,
    last_uj: u64,
    /// Since it was opened.
    total_uj: u64,
}

impl Zone {
    fn read(&mut self) -> io::Result<()> {
        let now = read_counter(&self.counter)?;
        self.total_uj += advance(self.last_uj, now, self.range_uj);
        self.last_uj = now;
        Ok(())
    }
}

/// How far a counter went that may have wrapped around once.
fn advance(before: u64, now: u64, range: u64) -> u64 {
    if now >= before {
        now - before
    } else {
        // A range that is too small would make energy out of nothing.
        range.saturating_sub(before) + now
    }
}

fn read_counter(file: &File) -> io::Result<u64> {
    let mut text = [0; 32];
    let length = file.read_at(&mut text, 0)?;
    std::str::from_utf8(text.get(..length).unwrap_or_default())
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

struct Rapl {
    zones: Vec<Zone>,
}

pub(super) fn open(directory: &Path, into: &mut Samples) -> Result<Box<dyn Source>, Absence> {
    let mut found = zones(directory);
    found.sort();
    if found.is_empty() {
        return Err(Absence {
            what: format!("no RAPL counters in {}", directory.display()),
            hint: Some(
                "processors without them, other architectures and most virtual machines and containers have none".to_owned(),
            ),
        });
    }
    let mut zones: Vec<Zone> = Vec::new();
    let mut refused: Option<(PathBuf, io::Error)> = None;
    for (_, path) in &found {
        match open_zone(path, directory) {
            Ok(zone) if zones.iter().all(|other| other.device != zone.device) => {
                let value = json!({"path": path.display().to_string(), "range_j": zone.range_uj as f64 / 1e6});
                into.fact(
                    format!("{}{}", series::facts::DEVICE_PREFIX, zone.device),
                    value,
                );
                zones.push(zone);
            }
            Ok(_) => {}
            Err(error) => {
                refused.get_or_insert((path.join("energy_uj"), error));
            }
        }
    }
    match refused {
        Some((path, error)) if zones.is_empty() => Err(Absence {
            what: format!("cannot read {}: {error}", path.display()),
            hint: (error.kind() == io::ErrorKind::PermissionDenied).then(|| {
                "Linux shows energy counters to root alone (CVE-2020-8694); `sudo chmod a+r \
                 /sys/class/powercap/intel-rapl*/energy_uj` lets everybody read them until the next boot"
                    .to_owned()
            }),
        }),
        refused => {
            if let Some((path, error)) = refused {
                into.note("rapl", format!("cannot read {}: {error}", path.display()));
            }
            Ok(Box::new(Rapl { zones }))
        }
    }
}

/// Zones by their numbers, packages before their parts.
fn zones(directory: &Path) -> Vec<(Vec<u32>, PathBuf)> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let numbers = name.to_str()?.strip_prefix(CONTROL_TYPE)?;
            let numbers = numbers.split(':').map(|n| n.parse().ok());
            Some((numbers.collect::<Option<Vec<u32>>>()?, entry.path()))
        })
        .collect()
}

fn open_zone(path: &Path, directory: &Path) -> io::Result<Zone> {
    let text = |path: PathBuf| std::fs::read_to_string(path).map(|t| t.trim().to_owned());
    let name = text(path.join("name"))?;
    // `intel-rapl:0:1` is a part of `intel-rapl:0`.
    let parent = path
        .file_name()
        .and_then(|n| n.to_str())
        .and_then(|n| n.rsplit_once(':'))
        .map(|(parent, _)| parent)
        .filter(|parent| parent.contains(':'));
    let device = match parent {
        Some(parent) => format!("rapl/{}/{name}", text(directory.join(parent).join("name"))?),
        None => format!("rapl/{name}"),
    };
    let counter = File::open(path.join("energy_uj"))?;
    let range_uj = text(path.join("max_energy_range_uj"))?
        .parse()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let last_uj = read_counter(&counter)?;
    Ok(Zone {
        device,
        counter,
        range_uj,
        last_uj,
        total_uj: 0,
    })
}

impl Source for Rapl {
    fn kind(&self) -> SourceKind {
        SourceKind::Rapl
    }

    fn what(&self) -> String {
        let names = self
            .zones
            .iter()
            .map(|zone| zone.device.strip_prefix("rapl/").unwrap_or(&zone.device));
        format!("energy of {}", names.collect::<Vec<_>>().join(", "))
    }

    fn sample(&mut self, into: &mut Samples) {
        for zone in &mut self.zones {
            into.now();
            if zone.read().is_ok() {
                let series = into.series(&zone.device, &ENERGY);
                into.add(series, zone.total_uj as f64 / 1e6);
            }
        }
    }

    fn keep_up(&mut self) {
        for zone in &mut self.zones {
            // What cannot be read now is read at the next sample.
            let _ = zone.read();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(directory: &Path, zone: &str, name: &str, energy_uj: u64) {
        let path = directory.join(zone);
        std::fs::create_dir_all(&path).unwrap();
        for (file, text) in [
            ("name", name.to_owned()),
            ("energy_uj", energy_uj.to_string()),
            ("max_energy_range_uj", "262143328850".to_owned()),
        ] {
            std::fs::write(path.join(file), text + "\n").unwrap();
        }
    }

    fn values(source: &mut dyn Source) -> Vec<(String, f64)> {
        let mut samples = Samples::default();
        source.sample(&mut samples);
        let readings = samples.readings().iter();
        readings
            .map(|r| (samples.names()[r.series.index()].clone(), r.value))
            .collect()
    }

    #[test]
    fn zones_are_named_and_counted_from_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        zone(path, "intel-rapl:0", "package-0", 5_000_000);
        zone(path, "intel-rapl:0:0", "core", 1_000_000);
        zone(path, "intel-rapl:0:1", "dram", 7_000_000);
        zone(path, "intel-rapl:1", "package-1", 100);
        zone(path, "intel-rapl:1:0", "core", 100);
        zone(path, "intel-rapl:10", "psys", 0);
        zone(path, "intel-rapl-mmio:0", "package-0", 0);
        std::fs::create_dir(path.join("intel-rapl")).unwrap();
        let mut samples = Samples::default();
        let mut source = open(path, &mut samples).unwrap();
        assert_eq!(
            source.what(),
            "energy of package-0, package-0/core, package-0/dram, package-1, package-1/core, psys"
        );
        assert!(
            values(&mut *source)
                .iter()
                .all(|(_, joules)| *joules == 0.0)
        );
        zone(path, "intel-rapl:0", "package-0", 7_500_000);
        zone(path, "intel-rapl:0:1", "dram", 7_250_000);
        let now = values(&mut *source);
        assert_eq!(now[0], ("rapl/package-0/energy_j".into(), 2.5));
        assert_eq!(now[2], ("rapl/package-0/dram/energy_j".into(), 0.25));
        assert_eq!(now[5].0, "rapl/psys/energy_j");
    }

    #[test]
    fn counters_wrap_around() {
        let directory = tempfile::tempdir().unwrap();
        zone(
            directory.path(),
            "intel-rapl:0",
            "package-0",
            262_143_000_000,
        );
        let mut source = open(directory.path(), &mut Samples::default()).unwrap();
        zone(directory.path(), "intel-rapl:0", "package-0", 1_000_000);
        let expected = (262_143_328_850u64 - 262_143_000_000 + 1_000_000) as f64 / 1e6;
        assert_eq!(values(&mut *source)[0].1, expected);
        // A wrap that no sample saw, but `keep_up` did.
        zone(
            directory.path(),
            "intel-rapl:0",
            "package-0",
            262_143_000_000,
        );
        source.keep_up();
        zone(directory.path(), "intel-rapl:0", "package-0", 1_000_000);
        assert_eq!(values(&mut *source)[0].1, expected + 262_143.328_85);
        assert_eq!(advance(10, 5, 3), 5, "a range that is none");
    }

    #[test]
    fn what_cannot_be_read_has_a_hint() {
        let directory = tempfile::tempdir().unwrap();
        let absent = |path: &Path| match open(path, &mut Samples::default()) {
            Ok(source) => panic!("{}", source.what()),
            Err(absence) => absence,
        };
        assert!(absent(directory.path()).what.contains("no RAPL counters"));
        assert!(absent(&directory.path().join("x")).hint.is_some());
        zone(directory.path(), "intel-rapl:0", "package-0", 0);
        std::fs::write(directory.path().join("intel-rapl:0/energy_uj"), "nonsense").unwrap();
        assert!(absent(directory.path()).what.contains("energy_uj"));
        let counter = directory.path().join("intel-rapl:0/energy_uj");
        std::fs::set_permissions(&counter, std::os::unix::fs::PermissionsExt::from_mode(0o0))
            .unwrap();
        // Root may read everything.
        if File::open(&counter).is_err() {
            assert!(absent(directory.path()).hint.unwrap().contains("chmod"));
        }
    }
}
