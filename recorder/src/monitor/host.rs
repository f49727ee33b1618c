//! The machine: processors and memory.

use optape_trace::series::{CPU_USED, MEMORY_AVAILABLE, MEMORY_USED};
use procfs::{Current, CurrentSI, KernelStats, Meminfo};

use super::{Absence, Samples, Source, SourceKind};

struct Host {
    /// Ticks at the round before: working, and all.
    before: Option<(u64, u64)>,
}

pub(super) fn open() -> Result<Box<dyn Source>, Absence> {
    match Meminfo::current() {
        Ok(_) => Ok(Box::new(Host { before: ticks() })),
        Err(error) => Err(Absence {
            what: format!("/proc cannot be read: {error}"),
            hint: None,
        }),
    }
}

/// Of all processors, since boot: working, and all. Time spent as a guest is in `user` already.
fn ticks() -> Option<(u64, u64)> {
    let all = KernelStats::current().ok()?.total;
    let idle = all.idle + all.iowait.unwrap_or(0);
    let busy = all.user
        + all.nice
        + all.system
        + all.irq.unwrap_or(0)
        + all.softirq.unwrap_or(0)
        + all.steal.unwrap_or(0);
    Some((busy, busy + idle))
}

impl Source for Host {
    fn kind(&self) -> SourceKind {
        SourceKind::Host
    }

    fn what(&self) -> String {
        "processors and memory".to_owned()
    }

    fn sample(&mut self, into: &mut Samples) {
        let now = ticks();
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
        if let Ok(memory) = Meminfo::current() {
            let available = memory.mem_available.unwrap_or(memory.mem_free);
            let series = into.series("host", &MEMORY_USED);
            into.add(series, memory.mem_total.saturating_sub(available) as f64);
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
