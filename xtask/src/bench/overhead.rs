//! What a tool costs per step: rows measured side by side, in turn, in one run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use crate::bench::worker::Worker;
use crate::process;
use crate::progress::Progress;
use crate::python::Python;
use crate::workspace::Workspace;

/// A row of the table: how its process is started.
#[derive(Clone, Copy, Debug)]
struct Row {
    name: &'static str,
    /// `--tool` of `bench/worker.py`.
    tool: &'static str,
    /// `--stats` of `optape record`; without it the row is not recorded.
    statistics: Option<&'static str>,
    /// Each step takes many times the bare one; fewer steps do.
    slow: bool,
}

impl Row {
    const fn plain(name: &'static str, tool: &'static str, slow: bool) -> Self {
        Self {
            name,
            tool,
            statistics: None,
            slow,
        }
    }

    const fn recorded(name: &'static str, statistics: &'static str) -> Self {
        Self {
            name,
            tool: "bare",
            statistics: Some(statistics),
            slow: false,
        }
    }
}

const BARE: Row = Row::plain("bare step", "bare", false);
/// The same once more, in a process of its own: what the measurement itself is worth.
const AGAIN: Row = Row::plain("bare step, another process", "bare", false);
const RULES: Row = Row::recorded("optape record --stats rules", "rules");
const FULL: Row = Row::recorded("optape record --level full", "full");

/// The rows of the table; the first is what the others are held against.
const ROWS: [Row; 12] = [
    BARE,
    AGAIN,
    Row::recorded("the hook alone", "hook"),
    Row::recorded("optape record --stats none", "none"),
    RULES,
    Row::recorded("optape record --stats all", "all"),
    FULL,
    Row::plain(
        "a TorchDispatchMode that does nothing",
        "dispatch-mode",
        false,
    ),
    Row::plain("torch.profiler with shapes", "profiler", true),
    Row::plain("torch.utils.flop_counter", "flop-counter", true),
    Row::plain("ExecutionTraceObserver", "execution-trace", true),
    Row::plain("SpikingJelly, five counters", "spikingjelly", true),
];

/// The rows on a GPU.
const GPU_ROWS: [Row; 6] = [
    BARE,
    AGAIN,
    Row::recorded("the hook alone", "hook"),
    Row::recorded("optape record --stats none", "none"),
    RULES,
    Row::recorded("optape record --stats all", "all"),
];

/// One workload and how it is run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    pub(super) batch: u32,
    /// All cores, no pinning.
    pub(super) all_cores: bool,
    /// On the first GPU.
    pub(super) gpu: bool,
    /// Steps of a block of a fast row; slow rows run a quarter.
    pub(super) steps: u32,
    /// How often every row gets its turn, in each generation of processes.
    pub(super) repetitions: u32,
    /// How often all processes are started anew: what two processes do not share (memory layout) is a part of the noise.
    pub(super) generations: u32,
}

impl Setting {
    /// What tells its files from those of the same batch otherwise.
    pub(super) const fn suffix(self) -> &'static str {
        match (self.gpu, self.all_cores) {
            (true, _) => "-gpu",
            (false, true) => "-all-cores",
            (false, false) => "",
        }
    }
}

/// Everything measured of one row.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) name: &'static str,
    /// Seconds per step, one for every repetition.
    pub(super) seconds: Vec<f64>,
    /// Why there is nothing.
    pub(super) failed: Option<String>,
}

/// Everything measured in one setting.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Overhead {
    pub(super) batch: u32,
    pub(super) threads: u64,
    pub(super) torch: String,
    pub(super) pinned: bool,
    pub(super) gpu: bool,
    pub(super) ops_per_step: u64,
    pub(super) rows: Vec<Measured>,
}

/// What a setting is run with.
pub(super) struct Bench<'a> {
    pub(super) workspace: &'a Workspace,
    pub(super) python: &'a Python,
    pub(super) optape: &'a Path,
    pub(super) output: &'a Path,
    pub(super) cores: Cores,
}

/// Which core trains, and which ones the recorder has for itself.
#[derive(Clone, Debug)]
pub(super) struct Cores {
    training: usize,
    /// As `taskset` takes them; `None` where there is only one core, or no `taskset`.
    others: Option<String>,
    pub(super) count: usize,
}

impl Cores {
    pub(super) fn find() -> Self {
        let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let training = count - 1;
        let taskset = process::succeeds(Command::new("taskset").args(["-c", "0", "true"]));
        let others = (count > 1 && taskset).then(|| {
            if count == 2 {
                "0".to_owned()
            } else {
                format!("0-{}", count - 2)
            }
        });
        Self {
            training,
            others,
            count,
        }
    }

    /// A command that runs the program on the training core, where it can be held there.
    pub(super) fn on_training_core(&self, program: &Path) -> Command {
        if self.others.is_none() {
            return Command::new(program);
        }
        let mut command = Command::new("taskset");
        command
            .args(["-c", &self.training.to_string()])
            .arg(program);
        command
    }
}

impl Bench<'_> {
    /// Runs one setting.
    pub(super) fn overhead(&self, setting: Setting) -> anyhow::Result<Overhead> {
        let rows: &[Row] = if setting.gpu {
            &GPU_ROWS
        } else if setting.all_cores {
            &[BARE, AGAIN, RULES]
        } else {
            &ROWS
        };
        let mut measured: Vec<Measured> = rows
            .iter()
            .map(|row| Measured {
                name: row.name,
                seconds: Vec::new(),
                failed: None,
            })
            .collect();
        let mut overhead = Overhead {
            batch: setting.batch,
            threads: 0,
            torch: String::new(),
            pinned: !setting.all_cores,
            gpu: setting.gpu,
            ops_per_step: 0,
            rows: Vec::new(),
        };
        let turns = setting.generations * setting.repetitions;
        let cores = if setting.gpu {
            "on the GPU"
        } else if setting.all_cores {
            "all cores"
        } else {
            "one thread"
        };
        let progress = Progress::start(format!(
            "batch {}, {cores}: {turns} turns of {} rows",
            setting.batch,
            rows.len()
        ));
        for generation in 0..setting.generations {
            progress.message("starting the processes");
            let mut workers = Vec::new();
            for (row, measured) in rows.iter().zip(&mut measured) {
                workers.push(
                    self.start(row, setting)
                        .map_err(|error| measured.failed = Some(format!("{error:#}")))
                        .ok(),
                );
            }
            for (worker, measured) in workers.iter_mut().zip(&mut measured) {
                let Some(ready) = worker.as_mut().map(Worker::ready) else {
                    continue;
                };
                match ready {
                    Ok(ready) => {
                        overhead.threads = ready["threads"].as_u64().unwrap_or(0);
                        ready["torch"]
                            .as_str()
                            .unwrap_or_default()
                            .clone_into(&mut overhead.torch);
                    }
                    Err(error) => {
                        measured.failed = Some(format!("{error:#}"));
                        *worker = None;
                    }
                }
            }
            let bare = workers[0]
                .as_mut()
                .with_context(|| format!("the bare step does not run: {:?}", measured[0].failed))?;
            overhead.ops_per_step = bare.count()?;
            for repetition in 0..setting.repetitions {
                progress.message(&format!(
                    "turn {} of {turns}",
                    generation * setting.repetitions + repetition + 1
                ));
                for turn in 0..rows.len() {
                    // Every row follows every other one: none has always the same before it.
                    let at = (turn + repetition as usize) % rows.len();
                    let Some(worker) = &mut workers[at] else {
                        continue;
                    };
                    let steps = if rows[at].slow {
                        setting.steps.div_ceil(4)
                    } else {
                        setting.steps
                    };
                    match worker.run(steps) {
                        Ok(seconds) => measured[at].seconds.push(seconds),
                        Err(error) => {
                            measured[at].failed = Some(format!("{error:#}"));
                            workers[at] = None;
                        }
                    }
                    // The daemon of the row before writes what it has left.
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            for (worker, measured) in workers.into_iter().zip(&mut measured) {
                if let Some(Err(error)) = worker.map(Worker::quit) {
                    measured.failed = Some(format!("{error:#}"));
                }
            }
        }
        progress.done();
        overhead.rows = measured;
        Ok(overhead)
    }

    fn start(&self, row: &Row, setting: Setting) -> anyhow::Result<Worker> {
        let interpreter = self.python.interpreter.as_os_str();
        let mut command = match row.statistics {
            None => Command::new(interpreter),
            Some(statistics) => {
                let mut command = match &self.cores.others {
                    Some(others) if !setting.all_cores => {
                        let mut command = Command::new("taskset");
                        command.args(["-c", others]).arg(self.optape);
                        command
                    }
                    _ => Command::new(self.optape),
                };
                command
                    .args(["record", "--force", "--output"])
                    .arg(self.trace_path(row, setting));
                command.args(["--stats", statistics, "--"]).arg(interpreter);
                command
            }
        };
        command
            .arg(self.workspace.root.join("bench/worker.py"))
            .args(["--tool", row.tool]);
        command.args(["--batch", &setting.batch.to_string()]);
        if setting.gpu {
            command.args(["--device", "cuda"]);
        }
        let threads = if setting.all_cores {
            self.cores.count
        } else {
            1
        };
        command.args(["--threads", &threads.to_string()]);
        if !setting.all_cores && self.cores.count > 1 {
            command.args(["--core", &self.cores.training.to_string()]);
        }
        let log = self.output.join(format!("{}.log", file_name(row, setting)));
        // Whether glibc gives the top of the heap back to the kernel depends on where it happens to lie: the same bare
        // step takes from 90 to 3 000 page faults, one process to the next. Nobody gives anything back here.
        for variable in ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"] {
            command.env(variable, "4294967296");
        }
        Worker::start(&mut command, &log)
    }

    /// The trace of the row `--stats rules`.
    pub(super) fn rules_trace(&self, setting: Setting) -> PathBuf {
        self.trace_path(&RULES, setting)
    }

    /// The trace of the row `--level full`.
    pub(super) fn full_trace(&self, setting: Setting) -> PathBuf {
        self.trace_path(&FULL, setting)
    }

    fn trace_path(&self, row: &Row, setting: Setting) -> PathBuf {
        self.output
            .join(format!("{}.optape", file_name(row, setting)))
    }
}

fn file_name(row: &Row, setting: Setting) -> String {
    let cores = setting.suffix();
    let words: Vec<&str> = row
        .name
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    format!(
        "batch{}{cores}-{}",
        setting.batch,
        words.join("-").to_lowercase()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_files_of_their_own() {
        let setting = Setting {
            batch: 8,
            all_cores: false,
            gpu: false,
            steps: 1,
            repetitions: 1,
            generations: 1,
        };
        let mut names: Vec<String> = ROWS.iter().map(|row| file_name(row, setting)).collect();
        names.extend(ROWS.iter().map(|row| {
            file_name(
                row,
                Setting {
                    all_cores: true,
                    ..setting
                },
            )
        }));
        names.extend(ROWS.iter().map(|row| {
            file_name(
                row,
                Setting {
                    all_cores: true,
                    gpu: true,
                    ..setting
                },
            )
        }));
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        assert_eq!(
            file_name(&RULES, setting),
            "batch8-optape-record-stats-rules"
        );
    }
}
