//! How the clocks of streams line up.
//!
//! Times of a stream count from its own zero. All processes of a machine share a monotonic clock, which nobody sets: their
//! streams are aligned by it, whatever was done to the wall clock between their starts. Two machines, or two boots of
//! one, have nothing in common but the wall clock, and a file says at most how far its own may have been off.

use std::collections::{BTreeMap, HashMap};

use optape_trace::{StreamId, facts};

use crate::load::Source;

/// The wall clock and the monotonic one are read one after the other, and a process may be interrupted between: less is no step.
const LEAST_STEP_NS: u64 = 10_000_000;

/// Which monotonic clock a file's streams count by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Machine {
    /// That of a boot.
    Boot(String),
    /// One that no other file is known to share.
    File(usize),
}

/// Zeros of all streams, on one line of time.
#[derive(Debug, Default)]
pub(crate) struct Clocks {
    /// By file and stream, nanoseconds since the Unix epoch as the machine's first stream saw it. Streams that do not
    /// tell their monotonic zero are not among them: they have their own word alone.
    epochs: HashMap<(usize, StreamId), u64>,
    /// What is known, and not known, about it.
    notes: Vec<String>,
}

impl Clocks {
    pub(crate) fn of(sources: &[Source]) -> Self {
        let mut machines: BTreeMap<Machine, Vec<usize>> = BTreeMap::new();
        for (at, source) in sources.iter().enumerate() {
            let boot = source.trace.run().facts.get(facts::BOOT_ID);
            let machine = boot.map_or(Machine::File(at), |id| Machine::Boot(id.clone()));
            machines.entry(machine).or_default().push(at);
        }
        let mut clocks = Self::default();
        for files in machines.values() {
            clocks.align(sources, files);
        }
        if machines.len() > 1 {
            clocks.notes.push(between(sources, machines.values()));
        }
        clocks
    }

    /// The files of one machine.
    fn align(&mut self, sources: &[Source], files: &[usize]) {
        let streams = || {
            files.iter().flat_map(|&at| {
                let streams = sources.get(at).map(|source| source.trace.streams());
                streams
                    .unwrap_or_default()
                    .iter()
                    .filter_map(move |stream| {
                        let info = stream.info();
                        Some((at, stream, info.epoch_monotonic_ns?, info.epoch_unix_ns))
                    })
            })
        };
        let Some((_, _, first_monotonic, first_unix)) =
            streams().min_by_key(|(at, stream, monotonic, _)| (*monotonic, *at, stream.id()))
        else {
            return;
        };
        let mut greatest: i128 = 0;
        for (at, stream, monotonic, unix) in streams() {
            let epoch = first_unix.saturating_add(monotonic - first_monotonic);
            let step = i128::from(unix) - i128::from(epoch);
            if step.unsigned_abs() > greatest.unsigned_abs() {
                greatest = step;
            }
            self.epochs.insert((at, stream.id()), epoch);
        }
        if greatest.unsigned_abs() >= u128::from(LEAST_STEP_NS) {
            let host = files.first().map_or("", |&at| host(sources, at));
            self.notes.push(format!(
                "the wall clock of {host} moved by {} while the monotonic one did not (it was set, or the machine slept); streams are \
                 aligned by the monotonic clock",
                seconds(greatest)
            ));
        }
    }

    /// Zero of a stream's clock, nanoseconds since the Unix epoch.
    pub(crate) fn epoch_ns(&self, source: usize, stream: &optape_trace::Stream) -> u64 {
        let aligned = self.epochs.get(&(source, stream.id())).copied();
        aligned.unwrap_or(stream.info().epoch_unix_ns)
    }

    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }
}

fn host(sources: &[Source], at: usize) -> &str {
    let host = sources
        .get(at)
        .map(|source| source.trace.run().host.as_str());
    host.filter(|host| !host.is_empty())
        .unwrap_or("an unnamed host")
}

#[expect(clippy::cast_precision_loss, reason = "rounded for people")]
fn seconds(ns: i128) -> String {
    format!("{:+.3} s", ns as f64 / 1e9)
}

/// What the files of several machines say about the offsets of their clocks.
fn between<'m>(sources: &[Source], machines: impl Iterator<Item = &'m Vec<usize>>) -> String {
    let errors: Vec<String> = machines
        .filter_map(|files| {
            let at = *files.first()?;
            let run = sources.get(at)?.trace.run();
            let error = run.facts.get(facts::CLOCK_ERROR);
            let known = match error.and_then(|text| text.parse::<u64>().ok()) {
                #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
                Some(ns) => format!("right to within {:.3} s", ns as f64 / 1e9),
                None => "off by an unknown amount".to_owned(),
            };
            Some(format!("{} {known}", host(sources, at)))
        })
        .collect();
    format!(
        "the files are of {} machines (or boots), aligned by their wall clocks: {}",
        errors.len(),
        errors.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use crate::testing::{Started, Tape, monitored_tape_on};
    use crate::{Per, Request, Traces, evaluate, rules::RuleSet};

    const HOUR_NS: u64 = 3_600_000_000_000;

    fn started(boot: &str, unix_ns: u64, monotonic_ns: u64) -> Started {
        Started {
            host: format!("host-{boot}"),
            boot_id: Some(boot.to_owned()),
            clock_error_ns: None,
            unix_ns,
            monotonic_ns: Some(monotonic_ns),
        }
    }

    fn epochs(traces: &Traces) -> Vec<u64> {
        let all = traces.streams().chain(traces.monitors());
        all.map(|at| traces.epoch_unix_ns(at)).collect()
    }

    fn joules(traces: &Traces) -> Vec<(String, f64)> {
        let report = evaluate(
            traces,
            &RuleSet::named("optape").unwrap(),
            &Request {
                per: Per::Run,
                ..Request::default()
            },
        )
        .unwrap();
        let hardware = report.monitors.unwrap().hardware.unwrap();
        let energy = hardware.measured.unwrap().energy_j;
        energy
            .iter()
            .map(|(device, j)| (device.to_owned(), *j))
            .collect()
    }

    #[test]
    fn a_step_of_the_wall_clock_between_two_streams_of_a_machine_shifts_nothing() {
        let monitors = started("a", 10 * HOUR_NS, 1000);
        let still = Traces::of(
            "still",
            monitored_tape_on(&started("a", 10 * HOUR_NS, 1000), &monitors).trace(),
        );
        assert_eq!(still.clock_notes(), &[] as &[String]);
        let expected = joules(&still);
        assert!(expected.iter().any(|(_, joules)| *joules > 0.0));
        for step in [HOUR_NS as i64, -(HOUR_NS as i64)] {
            let unix = (10 * HOUR_NS).checked_add_signed(step).unwrap();
            let process = started("a", unix, 1000);
            let traces = Traces::of("stepped", monitored_tape_on(&process, &monitors).trace());
            assert_eq!(joules(&traces), expected);
            assert_eq!(epochs(&traces)[0], epochs(&traces)[1]);
            let note = traces.clock_notes().join("\n");
            assert!(
                note.contains("3600.000 s") && note.contains("host-a"),
                "{note}"
            );
        }
    }

    #[test]
    fn without_the_monotonic_zero_the_wall_clock_counts() {
        let of = |unix_ns| Started {
            monotonic_ns: None,
            ..started("a", unix_ns, 0)
        };
        let tape = monitored_tape_on(&of(HOUR_NS + 7), &of(HOUR_NS));
        assert_eq!(
            epochs(&Traces::of("old", tape.trace())),
            [HOUR_NS + 7, HOUR_NS]
        );
    }

    fn parts(parts: &[(&str, Started)]) -> Traces {
        let parts = parts.iter().map(|(name, started)| {
            let mut tape = Tape::on(started);
            tape.step(0);
            ((*name).to_owned(), tape.trace())
        });
        Traces::of_parts(parts.collect()).unwrap()
    }

    #[test]
    fn files_of_one_machine_are_aligned_by_its_monotonic_clock() {
        let traces = parts(&[
            ("one", started("a", HOUR_NS, 5_000)),
            ("two", started("a", 9 * HOUR_NS, 7_000)),
        ]);
        assert_eq!(epochs(&traces), [HOUR_NS, HOUR_NS + 2_000]);
        assert!(traces.clock_notes()[0].contains("wall clock of host-a moved"));
    }

    /// The second machine's monotonic clock has counted for longer, and says nothing.
    #[test]
    fn files_of_two_machines_are_aligned_by_their_wall_clocks_and_that_is_said() {
        let traces = parts(&[
            (
                "one",
                Started {
                    clock_error_ns: Some(12_000_000),
                    ..started("a", HOUR_NS, 5_000)
                },
            ),
            ("two", started("b", HOUR_NS + 3, 8 * HOUR_NS)),
        ]);
        assert_eq!(epochs(&traces), [HOUR_NS, HOUR_NS + 3]);
        assert_eq!(
            traces.clock_notes(),
            [
                "the files are of 2 machines (or boots), aligned by their wall clocks: host-a right to within 0.012 s, host-b off by an \
              unknown amount"
            ]
        );
        let report = evaluate(
            &Traces::of_parts(vec![
                (
                    "one".to_owned(),
                    monitored_tape_on(&started("a", 1, 1), &started("a", 1, 1)).trace(),
                ),
                (
                    "two".to_owned(),
                    monitored_tape_on(&started("b", 1, 1), &started("b", 1, 1)).trace(),
                ),
            ])
            .unwrap(),
            &RuleSet::named("optape").unwrap(),
            &Request::default(),
        )
        .unwrap();
        assert!(report.notes.iter().any(|note| note.contains("2 machines")));
    }
}
