//! `optape peak`: what this machine can do, for `optape roofline --peaks`.

mod arithmetic;
mod bandwidth;

use std::process::ExitCode;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use clap::Args;
use optape_replay::roofline::{Peaks, Roof};

use crate::exit::Failure;
use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape peak`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Measures fused multiply-adds in registers, and the triad a = b + s * c over arrays that no cache holds (J. McCalpin's STREAM: two reads and a write \
count, the reading of what is overwritten does not), with all cores and with one, and writes the best of several tries as TOML. Let nothing else \
run meanwhile. Peaks of a GPU come from its data sheet: copy the file and add a [[roof]].")]
pub struct Options {
    /// How long each of the six measurements takes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    pub seconds: f64,
    /// Size of each of the three arrays in MiB [default: four times the largest cache, at least 64]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub array: Option<u64>,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.01..=60.0).contains(seconds))
        .ok_or_else(|| "from 0.01 to 60 seconds".to_owned())
}

/// Measures.
///
/// # Errors
/// Where there is not enough memory for the arrays, or the result cannot be written.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let array_mib = options.array.unwrap_or_else(usual_array_mib);
    check_memory(array_mib)?;
    let time = Duration::from_secs_f64(options.seconds);
    let mut groups = vec![cores];
    if cores > 1 {
        groups.push(1);
    }
    let mut roofs = Vec::new();
    for threads in groups {
        let say = |what: &str| {
            if !global.quiet {
                tracing::info!("measuring {what} with {threads} threads");
            }
        };
        say("memory");
        let bytes_per_s = bandwidth::measure(threads, array_mib, time)?;
        for (name, flop_per_s) in [
            ("float32", {
                say("float32");
                arithmetic::measure(threads, time, arithmetic::float32)
            }),
            ("float64", {
                say("float64");
                arithmetic::measure(threads, time, arithmetic::float64)
            }),
        ] {
            let plural = if threads == 1 { "core" } else { "cores" };
            roofs.push(Roof {
                name: format!("{threads} {plural}, {name}"),
                flop_per_s: flop_per_s.round(),
                bytes_per_s: bytes_per_s.round(),
            });
        }
    }
    // float32 with all cores is what most networks are held against.
    let peaks = Peaks {
        machine: machine(cores),
        source: Some(format!(
            "measured by optape peak {} ({}; triad over 3 x {array_mib} MiB)",
            env!("CARGO_PKG_VERSION"),
            arithmetic::instructions()
        )),
        roofs,
    };
    options.output.write_all(peaks.to_toml()?.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// The best of several tries, in units of work per second: `work` does some on each thread and says how much.
fn best(threads: usize, time: Duration, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let started = Instant::now();
    let mut best: f64 = 0.0;
    // The first try also fetches memory and wakes the processor up.
    for tries in 1.. {
        let barrier = Barrier::new(threads);
        let rate = |thread: usize| {
            barrier.wait();
            let from = Instant::now();
            let done = work(thread);
            (done, from.elapsed())
        };
        let results: Vec<(f64, Duration)> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads)
                .map(|thread| scope.spawn(move || rate(thread)))
                .collect();
            let own = rate(0);
            // A thread that panicked has done nothing.
            let others = others.into_iter().filter_map(|other| other.join().ok());
            std::iter::once(own).chain(others).collect()
        });
        let done: f64 = results.iter().map(|(done, _)| done).sum();
        let longest = results.iter().map(|(_, time)| time.as_secs_f64());
        let longest = longest.fold(0.0, f64::max);
        if longest > 0.0 {
            best = best.max(done / longest);
        }
        if tries > 1 && started.elapsed() >= time {
            break;
        }
    }
    best
}

/// The processor's name where the system tells it.
fn machine(cores: usize) -> String {
    let name = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let plural = if cores == 1 { "core" } else { "cores" };
    format!("{name}, {cores} {plural}")
}

/// Four times the largest cache, as STREAM asks for.
fn usual_array_mib() -> u64 {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache");
    let sizes = caches.into_iter().flatten().flatten().filter_map(|entry| {
        let size = std::fs::read_to_string(entry.path().join("size")).ok()?;
        let size = size.trim();
        match size.strip_suffix('K') {
            Some(kib) => kib.parse::<u64>().ok().map(|kib| kib / 1024),
            None => size.strip_suffix('M')?.parse().ok(),
        }
    });
    (4 * sizes.max().unwrap_or(0)).clamp(64, 4096)
}

/// Refuses before the system starts to swap, or kills us.
fn check_memory(array_mib: u64) -> anyhow::Result<()> {
    let available = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find(|line| line.starts_with("MemAvailable:"))?;
            let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
            Some(kib / 1024)
        });
    match available {
        Some(available) if available < 3 * array_mib => Err(Failure::usage(format!(
            "three arrays of {array_mib} MiB do not fit into the {available} MiB of memory that are available; choose a smaller --array"
        ))
        .into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_more_than_nothing() {
        let time = Duration::from_millis(10);
        for threads in [1, 2] {
            assert!(arithmetic::measure(threads, time, arithmetic::float32) > 0.0);
            assert!(arithmetic::measure(threads, time, arithmetic::float64) > 0.0);
            assert!(bandwidth::measure(threads, 1, time).unwrap() > 0.0);
        }
        assert!((64..=4096).contains(&usual_array_mib()));
    }
}
