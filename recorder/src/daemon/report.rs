//! What a recording came to.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::monitor::SourceState;

/// The result of a recording.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// The file; `None` where nothing was recorded, and none was left behind.
    pub path: Option<PathBuf>,
    /// Its size.
    pub bytes: u64,
    /// From the first process's beginning until the last one's end.
    pub duration: Duration,
    /// One per recorded process.
    pub streams: Vec<StreamReport>,
    /// Why writing ended early: disk full, directory gone.
    pub failure: Option<String>,
    /// Records that arrived but are not in the file, because writing ended early.
    pub unwritten_records: u64,
    /// Ring files that were none, and why.
    pub bad_rings: Vec<String>,
    /// What processes said that could not attach, and how many said so.
    pub attach_errors: BTreeMap<String, usize>,
    /// Processes that attached; those that ran no op have no stream.
    pub attached: usize,
    /// Recorded processes that still ran when the recording ended.
    pub still_running: usize,
    /// The monitors that were asked for, and whether each was there.
    pub monitors: Vec<SourceState>,
    /// Samples of theirs in the file.
    pub samples: u64,
    /// The daemon's own processor time.
    pub daemon_cpu_ns: u64,
    /// The daemon's peak resident memory; 0 where it shares a process with the program.
    pub daemon_peak_bytes: u64,
}

/// What one process came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StreamReport {
    /// Process id.
    pub process_id: u32,
    /// Its command line.
    pub command: Vec<String>,
    /// Records of all kinds, as they arrived.
    pub records: u64,
    /// Op calls among them.
    pub op_calls: u64,
    /// Op calls whose module was not found.
    pub unattributed: u64,
    /// Records lost on the way.
    pub dropped_records: u64,
    /// Wall time from its first record to its last.
    pub active: Duration,
    /// It said goodbye; else it was killed, forked away, or still ran.
    pub clean: bool,
    /// Why its recording ended early.
    pub disabled: Option<String>,
    /// Records that were older than what was to be kept (`--ring`).
    pub expired_records: u64,
    /// How often recording was paused, and for how long in all.
    pub pauses: u64,
    /// See `pauses`.
    pub paused_ns: u64,
    /// Steps that ended, recorded or not: of the optimizer, root-module calls, those that the program marked, root-module calls
    /// that did not train.
    pub steps: [u64; 4],
    /// Capture's own cost, by name.
    pub costs: BTreeMap<String, u64>,
}

/// Processes whose pauses are told one by one.
const MOST_PAUSE_LINES: usize = 4;

impl StreamReport {
    /// How many steps ended, in words.
    #[must_use]
    pub fn steps_text(&self) -> String {
        let [optimizer, root_calls, program, _] = self.steps;
        let mut parts = Vec::new();
        for (count, what) in [
            (program, "steps that the program marked"),
            (optimizer, "optimizer steps"),
            (root_calls, "calls of the root module"),
        ] {
            if count > 0 {
                parts.push(format!("{} {what}", grouped(count)));
            }
        }
        match parts.is_empty() {
            true => "it made no step".to_owned(),
            false => format!("it made {}", parts.join(", ")),
        }
    }
}

impl Report {
    /// Op calls of all streams.
    #[must_use]
    pub fn op_calls(&self) -> u64 {
        self.streams.iter().map(|s| s.op_calls).sum()
    }

    /// Records of all streams that were lost before they reached the daemon.
    #[must_use]
    pub fn dropped_records(&self) -> u64 {
        self.streams.iter().map(|s| s.dropped_records).sum()
    }

    /// What the recording came to, line by line, for the user's eyes.
    #[must_use]
    pub fn summary(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(path) = &self.path {
            let calls = self.op_calls();
            let processes = match self.streams.len() {
                1 => "1 process".to_owned(),
                n => format!("{n} processes"),
            };
            let seconds = self.duration.as_secs_f64();
            lines.push(format!(
                "recorded {} op calls of {processes} in {seconds:.1} s ({} op calls/s)",
                grouped(calls),
                grouped(rate(calls, seconds))
            ));
            let per_call = if calls == 0 {
                String::new()
            } else {
                format!(
                    ", {:.2} bytes per op call",
                    self.bytes as f64 / calls as f64
                )
            };
            lines.push(format!(
                "{}: {}{per_call}",
                path.display(),
                bytes(self.bytes)
            ));
            lines.push(self.cost_line());
            lines.push(self.losses_line());
            lines.extend(self.monitors_line());
        }
        lines.extend(self.complaints());
        lines.extend(self.remarks());
        if let Some(path) = &self.path {
            lines.push(format!(
                "next: optape replay {}",
                quoted(&path.to_string_lossy())
            ));
        }
        lines
    }

    fn cost_line(&self) -> String {
        let mut costs: BTreeMap<&str, u64> = BTreeMap::new();
        for (key, value) in self.streams.iter().flat_map(|s| &s.costs) {
            *costs.entry(key).or_default() += value;
        }
        let daemon = format!("{} in the daemon", time(self.daemon_cpu_ns));
        let Some(capture) = costs.get("capture.time_ns") else {
            return format!(
                "own cost: {daemon}; the program told none of its own (it was killed, or still ran)"
            );
        };
        let active: f64 = self
            .streams
            .iter()
            .filter(|s| s.costs.contains_key("capture.time_ns"))
            .map(|s| s.active.as_secs_f64())
            .sum();
        let share = if active > 0.0 {
            format!(" ({:.1} %)", 100.0 * *capture as f64 / 1e9 / active)
        } else {
            String::new()
        };
        let statistics = costs
            .get("capture.statistics_ns")
            // Capture measures samples: of a few calls, the parts may exceed the whole.
            .filter(|statistics| *statistics <= capture)
            .map_or_else(String::new, |ns| {
                format!(", of it {} for statistics", time(*ns))
            });
        format!(
            "own cost: {}{share} in the program{statistics}; {daemon}",
            time(*capture)
        )
    }

    fn losses_line(&self) -> String {
        let dropped = match self.dropped_records() {
            0 => "nothing dropped".to_owned(),
            n => format!(
                "{} records DROPPED (a ring was full; a larger --ring-size helps)",
                grouped(n)
            ),
        };
        let (calls, unattributed) = (
            self.op_calls(),
            self.streams.iter().map(|s| s.unattributed).sum::<u64>(),
        );
        let share = if calls == 0 {
            0.0
        } else {
            100.0 * unattributed as f64 / calls as f64
        };
        format!(
            "{dropped}; {} op calls ({share:.1} %) of unknown module",
            grouped(unattributed)
        )
    }

    /// What was sampled; `optape info` says why a source is missing.
    fn monitors_line(&self) -> Option<String> {
        let names = |there: bool| {
            let names = self
                .monitors
                .iter()
                .filter(|monitor| monitor.state.is_ok() == there)
                .map(|monitor| monitor.source.name());
            names.collect::<Vec<_>>().join(", ")
        };
        (self.samples > 0).then(|| {
            let absent = match names(false) {
                absent if absent.is_empty() => String::new(),
                absent => format!("; not there: {absent} (optape info says why)"),
            };
            format!(
                "{} samples of {}{absent}",
                grouped(self.samples),
                names(true)
            )
        })
    }

    /// What is worth knowing though nothing went wrong, line by line.
    fn remarks(&self) -> Vec<String> {
        let mut lines = self.pause_lines();
        let expired: u64 = self.streams.iter().map(|s| s.expired_records).sum();
        if expired > 0 {
            lines.push(format!(
                "{} records were older than --ring keeps; they are not in the file",
                grouped(expired)
            ));
        }
        lines.extend(self.gpu_time_line());
        let unclean = self
            .streams
            .iter()
            .filter(|s| !s.clean && s.disabled.is_none())
            .count()
            .saturating_sub(self.still_running);
        if unclean > 0 {
            lines.push(format!("{unclean} recorded process(es) ended without a goodbye (killed, or forked workers); what they committed is in the file"));
        }
        if self.still_running > 0 {
            lines.push(format!(
                "{} recorded process(es) still run; their recording ended with the command",
                self.still_running
            ));
        }
        lines
    }

    /// What came of `--gpu-time`, where it was not what one expects of it.
    fn gpu_time_line(&self) -> Option<String> {
        let count = |name: &str| -> Option<u64> {
            self.streams
                .iter()
                .filter_map(|s| s.costs.get(&format!("gpu_time.{name}")))
                .copied()
                .reduce(|a, b| a + b)
        };
        let (calls, read) = (count("calls")?, count("read")?);
        if calls == 0 {
            return Some(
                "--gpu-time: no op had work for a GPU (is the model on one, and does torch.cuda.is_available() say that there is one?)"
                    .to_owned(),
            );
        }
        (read < calls).then(|| {
            format!(
                "--gpu-time: {} of {} times are missing ({} lost, {} while a graph was captured, {} because too many were on their way, {} refused; optape info says why)",
                grouped(calls - read),
                grouped(calls),
                grouped(count("lost").unwrap_or(0)),
                grouped(count("not_taken.capturing").unwrap_or(0)),
                grouped(count("not_taken.full").unwrap_or(0)),
                grouped(count("not_taken.refused").unwrap_or(0)),
            )
        })
    }

    /// That what was recorded is not the whole run.
    fn pause_lines(&self) -> Vec<String> {
        let paused: Vec<&StreamReport> = self.streams.iter().filter(|s| s.pauses > 0).collect();
        let mut lines = Vec::new();
        for stream in paused.iter().take(MOST_PAUSE_LINES) {
            let steps = stream.steps_text();
            let times = match stream.pauses {
                1 => "once".to_owned(),
                n => format!("{} times", grouped(n)),
            };
            let recorded = if stream.op_calls == 0 {
                "NOTHING was recorded: "
            } else {
                ""
            };
            lines.push(format!(
                "process {}: {recorded}paused {times}, {} in all; {steps}",
                stream.process_id,
                time(stream.paused_ns)
            ));
        }
        if paused.len() > MOST_PAUSE_LINES {
            lines.push(format!(
                "and {} more processes were paused",
                paused.len() - MOST_PAUSE_LINES
            ));
        }
        lines
    }

    /// What went wrong, line by line.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for stream in &self.streams {
            if let Some(why) = &stream.disabled {
                lines.push(format!(
                    "recording of process {} ended early: {why}",
                    stream.process_id
                ));
            }
        }
        let lost_values: u64 = self
            .streams
            .iter()
            .filter_map(|s| s.costs.get("capture.dropped_values"))
            .sum();
        if lost_values > 0 {
            lines.push(format!(
                "{} values that --keep asked for are lost: the ring was full, or they are longer than 32 MiB (a larger ring: --ring-size)",
                grouped(lost_values)
            ));
        }
        if let Some(failure) = &self.failure {
            lines.push(format!(
                "writing ended early: {failure}; {} records are lost, what was written before is whole",
                grouped(self.unwritten_records)
            ));
        }
        lines.extend(self.bad_rings.iter().cloned());
        if self.path.is_some() {
            lines.extend(self.attach_error_lines());
        }
        lines
    }

    /// What processes said that could not attach.
    #[must_use]
    pub fn attach_error_lines(&self) -> Vec<String> {
        let lines = self
            .attach_errors
            .iter()
            .map(|(text, &processes)| match processes {
                1 => format!("a process could not be recorded: {text}"),
                n => format!("{n} processes could not be recorded: {text}"),
            });
        lines.collect()
    }
}

fn rate(count: u64, seconds: f64) -> u64 {
    if seconds > 0.0 {
        (count as f64 / seconds) as u64
    } else {
        0
    }
}

/// `1 234 567`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

fn bytes(n: u64) -> String {
    match n {
        0..10_000 => format!("{n} bytes"),
        10_000..10_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

fn time(ns: u64) -> String {
    if ns < 1_000_000_000 {
        format!("{:.1} ms", ns as f64 / 1e6)
    } else {
        format!("{:.2} s", ns as f64 / 1e9)
    }
}

/// As a shell wants it.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./+:=@%,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::{Absence, SourceKind};

    fn report() -> Report {
        let costs = BTreeMap::from([
            ("capture.time_ns".to_owned(), 500_000_000),
            ("capture.statistics_ns".to_owned(), 200_000_000),
        ]);
        let stream = StreamReport {
            process_id: 7,
            op_calls: 1_000_000,
            records: 1_100_000,
            active: Duration::from_secs(10),
            clean: true,
            costs,
            ..Default::default()
        };
        Report {
            path: Some("my run.optape".into()),
            bytes: 6_400_000,
            duration: Duration::from_secs(10),
            streams: vec![stream],
            daemon_cpu_ns: 300_000_000,
            ..Default::default()
        }
    }

    #[test]
    fn a_summary_of_a_good_run() {
        assert_eq!(
            report().summary(),
            [
                "recorded 1 000 000 op calls of 1 process in 10.0 s (100 000 op calls/s)",
                "my run.optape: 6400.0 kB, 6.40 bytes per op call",
                "own cost: 500.0 ms (5.0 %) in the program, of it 200.0 ms for statistics; 300.0 ms in the daemon",
                "nothing dropped; 0 op calls (0.0 %) of unknown module",
                "next: optape replay 'my run.optape'",
            ]
        );
    }

    #[test]
    fn what_came_of_gpu_time_is_told() {
        let mut report = report();
        let costs = &mut report.streams[0].costs;
        let mut set = |name: &str, n: u64| costs.insert(format!("gpu_time.{name}"), n);
        set("calls", 0);
        set("read", 0);
        assert!(
            report.remarks()[0].starts_with("--gpu-time: no op had work for a GPU"),
            "{:?}",
            report.remarks()
        );
        let costs = &mut report.streams[0].costs;
        let mut set = |name: &str, n: u64| costs.insert(format!("gpu_time.{name}"), n);
        set("calls", 5000);
        set("read", 5000);
        assert_eq!(report.gpu_time_line(), None);
        let costs = &mut report.streams[0].costs;
        costs.insert("gpu_time.read".to_owned(), 4000);
        costs.insert("gpu_time.lost".to_owned(), 990);
        costs.insert("gpu_time.not_taken.capturing".to_owned(), 10);
        assert_eq!(
            report.gpu_time_line().unwrap(),
            "--gpu-time: 1 000 of 5 000 times are missing (990 lost, 10 while a graph was captured, 0 because too many were on their way, 0 refused; \
             optape info says why)"
        );
    }

    #[test]
    fn monitors_are_summed_up() {
        let mut report = report();
        assert_eq!(report.monitors_line(), None);
        report.samples = 1200;
        report.monitors = vec![
            SourceState {
                source: SourceKind::Gpu,
                state: Err(Absence {
                    what: "no driver".into(),
                    hint: None,
                }),
            },
            SourceState {
                source: SourceKind::Host,
                state: Ok("memory".into()),
            },
        ];
        assert_eq!(
            report.monitors_line().unwrap(),
            "1 200 samples of host; not there: gpu (optape info says why)"
        );
    }

    #[test]
    fn losses_and_failures_are_told() {
        let mut report = report();
        report.streams[0].dropped_records = 12_345;
        report.streams[0].unattributed = 10_000;
        report.streams[0].disabled = Some("the ring is corrupt".into());
        report.streams[0].clean = false;
        report.failure = Some("No space left on device".into());
        report.unwritten_records = 99;
        report
            .attach_errors
            .insert("torch 1.0 is not supported".into(), 2);
        let text = report.summary().join("\n");
        for part in [
            "12 345 records DROPPED",
            "10 000 op calls (1.0 %)",
            "process 7 ended early: the ring is corrupt",
            "No space left",
            "99 records are lost",
            "2 processes could not be recorded: torch 1.0",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
    }

    #[test]
    fn words_for_a_shell() {
        assert_eq!(quoted("a/b-1.optape"), "a/b-1.optape");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(grouped(1), "1");
        assert_eq!(grouped(1234), "1 234");
    }
}
