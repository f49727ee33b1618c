//! Recorded processes: memory, processor time, threads.

use optape_trace::series::{CPU_TIME, RESIDENT, THREADS};
use rustix::param::{clock_ticks_per_second, page_size};

use super::proc_file::{ProcFile, numbers};
use super::{Samples, Source, SourceKind};

struct Processes {
    /// Held open, so that another process that gets the number later is not taken for one of them.
    watched: Vec<Watched>,
}

struct Watched {
    stat: ProcFile,
    device: String,
    /// Ticks of processor time at the first sample.
    first_ticks: Option<u64>,
}

/// What is looked at of proc_pid_stat(5).
struct Stat {
    /// Of processor time, of the process and the kernel for it.
    ticks: u64,
    threads: u64,
    resident_pages: u64,
}

impl Stat {
    /// The name, the second field, may hold anything, also blanks and parentheses: fields count from its end.
    fn of(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let fields = text.get(end + 1..)?.split(|byte| *byte == b' ');
        // The first piece is empty, the second the state: the third field.
        let field = |number: usize| {
            let text = fields.clone().nth(number - 2)?;
            numbers(text).next()
        };
        Some(Self {
            ticks: field(14)?.saturating_add(field(15)?),
            threads: field(20)?,
            resident_pages: field(24)?,
        })
    }
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
        let ticks_per_second = clock_ticks_per_second().max(1) as f64;
        let page_bytes = page_size() as f64;
        self.watched.retain_mut(|watched| {
            // Gone.
            let Some(stat) = watched.stat.read().ok().and_then(Stat::of) else {
                return false;
            };
            let ticks = stat.ticks;
            let first = *watched.first_ticks.get_or_insert(ticks);
            let series = into.series(&watched.device, &RESIDENT);
            into.add(series, stat.resident_pages as f64 * page_bytes);
            let series = into.series(&watched.device, &CPU_TIME);
            into.add(
                series,
                ticks.saturating_sub(first) as f64 / ticks_per_second,
            );
            let series = into.series(&watched.device, &THREADS);
            into.add(series, stat.threads as f64);
            true
        });
    }

    fn watch(&mut self, process_id: u32) {
        let device = format!("process/{process_id}");
        if let Ok(stat) = ProcFile::open(format!("/proc/{process_id}/stat"))
            && self.watched.iter().all(|other| other.device != device)
        {
            self.watched.push(Watched {
                stat,
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
    fn a_name_may_hold_anything() {
        let fields: Vec<String> = (4..=52).map(|field| field.to_string()).collect();
        let text = format!("7 (a) S 1) S {}\n", fields.join(" "));
        let stat = Stat::of(text.as_bytes()).unwrap();
        assert_eq!(stat.ticks, 14 + 15);
        assert_eq!((stat.threads, stat.resident_pages), (20, 24));
        assert!(Stat::of(b"7 (sh) S 1 2 3").is_none());
    }

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
