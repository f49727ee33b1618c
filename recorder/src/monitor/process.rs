//! Recorded processes: memory, processor time, threads.

use optape_trace::series::{CPU_TIME, RESIDENT, THREADS};
use procfs::process::Process;

use super::{Samples, Source, SourceKind};

struct Processes {
    /// Held open, so that another process that gets the number later is not taken for one of them.
    watched: Vec<Watched>,
}

struct Watched {
    process: Process,
    device: String,
    /// Ticks of processor time at the first sample.
    first_ticks: Option<u64>,
}

pub(super) fn open() -> Box<dyn Source> {
    Box::new(Processes {
        watched: Vec::new(),
    })
}

impl Source for Processes {
    fn kind(&self) -> SourceKind {
        SourceKind::Process
    }

    fn what(&self) -> String {
        "memory, processor time and threads of the recorded processes".to_owned()
    }

    fn sample(&mut self, into: &mut Samples) {
        let ticks_per_second = procfs::ticks_per_second().max(1) as f64;
        let page_bytes = procfs::page_size() as f64;
        self.watched.retain_mut(|watched| {
            // Gone.
            let Ok(stat) = watched.process.stat() else {
                return false;
            };
            let ticks = stat.utime + stat.stime;
            let first = *watched.first_ticks.get_or_insert(ticks);
            let series = into.series(&watched.device, &RESIDENT);
            into.add(series, stat.rss as f64 * page_bytes);
            let series = into.series(&watched.device, &CPU_TIME);
            into.add(
                series,
                ticks.saturating_sub(first) as f64 / ticks_per_second,
            );
            let series = into.series(&watched.device, &THREADS);
            into.add(series, stat.num_threads as f64);
            true
        });
    }

    fn watch(&mut self, process_id: u32) {
        let device = format!("process/{process_id}");
        if let Ok(process) = i32::try_from(process_id)
            .map_err(drop)
            .and_then(|pid| Process::new(pid).map_err(drop))
            && self.watched.iter().all(|other| other.device != device)
        {
            self.watched.push(Watched {
                process,
                device,
                first_ticks: None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_sampled_until_it_ends() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let mut source = open();
        source.watch(std::process::id());
        source.watch(child.id());
        source.watch(child.id());
        source.watch(u32::MAX);
        let mut samples = Samples::default();
        source.sample(&mut samples);
        let own = format!("process/{}/rss_bytes", std::process::id());
        assert_eq!(samples.names()[0], own);
        assert_eq!(samples.readings().len(), 6);
        assert!(samples.readings()[0].value > 1e5);
        assert_eq!(
            samples.readings()[1].value,
            0.0,
            "processor time counts from here"
        );
        assert!(samples.readings()[2].value >= 1.0);
        child.kill().unwrap();
        child.wait().unwrap();
        let mut samples = Samples::default();
        source.sample(&mut samples);
        assert_eq!(samples.readings().len(), 3);
    }
}
