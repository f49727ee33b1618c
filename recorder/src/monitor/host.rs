//! The machine: processors and memory.

use optape_trace::series::{CPU_USED, MEMORY_AVAILABLE, MEMORY_USED};

use super::proc_file::{ProcFile, line, numbers};
use super::{Absence, Samples, Source, SourceKind};

struct Host {
    processors: ProcFile,
    memory: ProcFile,
    /// Ticks at the round before: working, and all.
    before: Option<(u64, u64)>,
}

pub(super) fn open() -> Result<Box<dyn Source>, Absence> {
    let opened = ProcFile::open("/proc/stat").and_then(|processors| {
        let memory = ProcFile::open("/proc/meminfo")?;
        Ok((processors, memory))
    });
    match opened {
        Ok((mut processors, memory)) => Ok(Box::new(Host {
            before: ticks(&mut processors),
            processors,
            memory,
        })),
        Err(error) => Err(Absence {
            what: format!("/proc cannot be read: {error}"),
            hint: None,
        }),
    }
}

/// Of all processors, since boot: working, and all. proc_stat(5) has the order; time spent as a guest is in `user` already.
fn ticks(processors: &mut ProcFile) -> Option<(u64, u64)> {
    let mut ticks = [0; 8];
    let mut found = 0;
    for (place, number) in ticks
        .iter_mut()
        .zip(numbers(line(processors.read().ok()?, "cpu ")?))
    {
        *place = number;
        found += 1;
    }
    let [user, nice, system, idle, iowait, irq, softirq, steal] = ticks;
    let busy = user + nice + system + irq + softirq + steal;
    (found >= 4).then_some((busy, busy + idle + iowait))
}

/// In bytes: all, and what programs could have without swapping.
fn memory(file: &mut ProcFile) -> Option<(u64, u64)> {
    let text = file.read().ok()?;
    let bytes = |key| Some(numbers(line(text, key)?).next()?.saturating_mul(1024));
    let available = bytes("MemAvailable:").or_else(|| bytes("MemFree:"))?;
    Some((bytes("MemTotal:")?, available))
}

impl Source for Host {
    fn kind(&self) -> SourceKind {
        SourceKind::Host
    }

    fn what(&self) -> String {
        "processors and memory".to_owned()
    }

    fn sample(&mut self, into: &mut Samples) {
        let now = ticks(&mut self.processors);
        if let (Some((busy, all)), Some((busy_before, all_before))) = (now, self.before)
            && all > all_before
        {
            let share = busy.saturating_sub(busy_before) as f64 / (all - all_before) as f64;
            let series = into.series("host", &CPU_USED);
            into.add(series, 100.0 * share.min(1.0));
            self.before = now;
        } else if self.before.is_none() {
            self.before = now;
        }
        if let Some((total, available)) = memory(&mut self.memory) {
            let series = into.series("host", &MEMORY_USED);
            into.add(series, total.saturating_sub(available) as f64);
            let series = into.series("host", &MEMORY_AVAILABLE);
            into.add(series, available as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_sampled() {
        let mut host = open().unwrap();
        let mut samples = Samples::default();
        // The kernel counts in hundredths of a second.
        std::thread::sleep(std::time::Duration::from_millis(60));
        host.sample(&mut samples);
        assert_eq!(
            samples.names(),
            [
                "host/cpu_percent",
                "host/memory_used_bytes",
                "host/memory_available_bytes"
            ]
        );
        let values: Vec<f64> = samples.readings().iter().map(|r| r.value).collect();
        assert!((0.0..=100.0).contains(&values[0]), "{values:?}");
        assert!(values[1] > 1e6 && values[2] > 1e6, "{values:?}");
    }
}
