//! A long trace out of a short one: the steps of a recorded run, one after another again and again, with their real spread of times
//! and statistics.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, ensure};
use optape_trace::{
    CallId, Event, Moment, OpCall, OpCallRef, Record, RunEnd, StorageId, StreamEnd, StreamId,
    TensorId, Trace, TraceWriter,
};

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Repeated {
    pub(super) op_calls: u64,
    pub(super) bytes: u64,
}

/// Writes a trace of at least `op_calls` op calls that repeats the later half of what `source` recorded.
pub(super) fn repeat(source: &Path, destination: &Path, op_calls: u64) -> anyhow::Result<Repeated> {
    let trace = Trace::open(source).with_context(|| format!("cannot open {}", source.display()))?;
    let stream = trace
        .streams()
        .iter()
        .max_by_key(|stream| stream.op_calls())
        .with_context(|| format!("{} holds no stream", source.display()))?;
    let window = Window::read(&trace, stream.id())?;

    let file = File::create(destination)
        .with_context(|| format!("cannot create {}", destination.display()))?;
    let mut writer = TraceWriter::create(BufWriter::new(file), trace.run())?;
    let to = writer.begin_stream(stream.info())?;
    for definition in stream.dictionary().definitions() {
        writer.define(to, &definition)?;
    }
    let (mut written, mut records, mut round) = (0, 0, 0);
    // What modules are is said once, before all.
    for fact in &window.facts {
        writer.moment(to, fact)?;
        records += 1;
    }
    let mut ids = Ids::default();
    while written < op_calls {
        for record in &window.records {
            match record {
                Record::OpCall(call) => {
                    writer.op_call(to, window.call(call, round, &mut ids))?;
                    written += 1;
                }
                Record::Other(moment) => {
                    writer.moment(to, &window.moment(moment, round))?;
                }
                _ => continue,
            }
            records += 1;
        }
        round += 1;
    }
    let ended_ns = window.start_ns + round * window.length_ns;
    writer.end_stream(
        to,
        &StreamEnd {
            records,
            ended_ns,
            clean: true,
            ..StreamEnd::default()
        },
    )?;
    let ended_unix_ns = trace.run().started_unix_ns + ended_ns;
    let sink = writer.finish(&RunEnd {
        ended_unix_ns,
        exit_code: Some(0),
        ..RunEnd::default()
    })?;
    let bytes = sink
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error)?
        .metadata()?
        .len();
    Ok(Repeated {
        op_calls: written,
        bytes,
    })
}

/// Room for the ids of one call.
#[derive(Debug, Default)]
struct Ids {
    storages: Vec<u64>,
    tensors: Vec<u64>,
}

/// The records that are repeated, and by how much each repetition moves what must not occur twice.
struct Window {
    /// What was said before it, and holds in it.
    facts: Vec<Moment>,
    records: Vec<Record>,
    start_ns: u64,
    length_ns: u64,
    storages: Moving,
    tensors: Moving,
    calls: Moving,
    nodes: Moving,
    steps: u64,
}

/// Ids up to `from` were there before the window (weights) and stay what they are; later ones move.
#[derive(Clone, Copy, Debug, Default)]
struct Moving {
    from: u64,
    to: u64,
}

impl Moving {
    fn before(&mut self, id: u64) {
        self.from = self.from.max(id);
        self.to = self.to.max(id);
    }

    fn inside(&mut self, id: u64) {
        self.to = self.to.max(id);
    }

    fn shift(self, id: u64, round: u64) -> u64 {
        if id <= self.from {
            id
        } else {
            id + round * (self.to - self.from)
        }
    }
}

impl Window {
    fn read(trace: &Trace, stream: StreamId) -> anyhow::Result<Self> {
        let half = trace.stream(stream)?.records() / 2;
        let mut window = Self {
            facts: Vec::new(),
            records: Vec::new(),
            start_ns: 0,
            length_ns: 0,
            storages: Moving::default(),
            tensors: Moving::default(),
            calls: Moving::default(),
            nodes: Moving::default(),
            steps: 0,
        };
        let mut inside = false;
        for record in trace.records(stream) {
            let (ordinal, record) = record?;
            window.note(&record, inside);
            if let Record::Other(moment) = &record
                && matches!(moment.event, Event::Fact { .. })
                && !inside
            {
                window.facts.push(Moment {
                    time_ns: 0,
                    ..moment.clone()
                });
            }
            if inside && kept(&record) {
                window.records.push(record);
            } else if ordinal.0 >= half && is_step(&record) {
                inside = true;
                window.start_ns = time_of(&record);
            }
        }
        // It begins behind a step's end, and ends with one.
        let last = window
            .records
            .iter()
            .rposition(is_step)
            .context("the trace has too few steps to repeat")?;
        window.records.truncate(last + 1);
        window.length_ns = time_of(&window.records[last])
            .saturating_sub(window.start_ns)
            .max(1);
        window.steps = window
            .records
            .iter()
            .filter(|record| is_step(record))
            .count() as u64;
        ensure!(
            window
                .records
                .iter()
                .any(|record| matches!(record, Record::OpCall(_))),
            "the trace has no op calls to repeat"
        );
        Ok(window)
    }

    fn note(&mut self, record: &Record, inside: bool) {
        let note = if inside {
            Moving::inside
        } else {
            Moving::before
        };
        match record {
            Record::OpCall(call) => {
                call.storages
                    .iter()
                    .for_each(|id| note(&mut self.storages, id.0));
                call.tensors
                    .iter()
                    .for_each(|id| note(&mut self.tensors, id.0));
                note(
                    &mut self.nodes,
                    u64::try_from(call.sequence_number).unwrap_or(0),
                );
            }
            Record::Other(Moment { event, .. }) => match event {
                Event::ModuleEnter {
                    call,
                    arguments: tensors,
                    ..
                }
                | Event::ModuleExit {
                    call,
                    results: tensors,
                    ..
                } => {
                    note(&mut self.calls, call.0);
                    tensors.iter().for_each(|id| note(&mut self.tensors, id.0));
                }
                Event::StateAssign { tensor, .. } | Event::TensorDied { tensor } => {
                    note(&mut self.tensors, tensor.0)
                }
                Event::StorageBorn { storage, .. } | Event::StorageDied { storage } => {
                    note(&mut self.storages, storage.0)
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn call<'a>(&self, call: &'a OpCall, round: u64, ids: &'a mut Ids) -> OpCallRef<'a> {
        ids.storages.clear();
        ids.storages.extend(
            call.storages
                .iter()
                .map(|id| self.storages.shift(id.0, round)),
        );
        ids.tensors.clear();
        ids.tensors.extend(
            call.tensors
                .iter()
                .map(|id| self.tensors.shift(id.0, round)),
        );
        OpCallRef {
            signature: call.signature,
            pattern: call.pattern,
            thread: call.thread,
            start_ns: call.start_ns + round * self.length_ns,
            duration_ns: call.duration_ns,
            sequence_number: match u64::try_from(call.sequence_number) {
                Ok(node) => i64::try_from(self.nodes.shift(node, round)).unwrap_or(i64::MAX),
                Err(_) => call.sequence_number,
            },
            payload: &call.payload,
            storages: &ids.storages,
            tensors: &ids.tensors,
            statistics: &call.statistics,
        }
    }

    fn moment(&self, moment: &Moment, round: u64) -> Moment {
        let mut moment = moment.clone();
        moment.time_ns += round * self.length_ns;
        match &mut moment.event {
            Event::ModuleEnter {
                call,
                arguments: tensors,
                ..
            }
            | Event::ModuleExit {
                call,
                results: tensors,
                ..
            } => {
                *call = CallId(self.calls.shift(call.0, round));
                tensors
                    .iter_mut()
                    .for_each(|id| *id = self.tensor(*id, round));
            }
            Event::StateAssign { tensor, .. } | Event::TensorDied { tensor } => {
                *tensor = self.tensor(*tensor, round)
            }
            Event::StorageBorn { storage, .. } | Event::StorageDied { storage } => {
                *storage = self.storage(*storage, round)
            }
            Event::StepMark { step, .. } => *step += round * self.steps,
            _ => {}
        }
        moment
    }

    fn storage(&self, id: StorageId, round: u64) -> StorageId {
        StorageId(self.storages.shift(id.0, round))
    }

    fn tensor(&self, id: TensorId, round: u64) -> TensorId {
        TensorId(self.tensors.shift(id.0, round))
    }
}

fn is_step(record: &Record) -> bool {
    matches!(
        record,
        Record::Other(Moment {
            event: Event::StepMark { .. },
            ..
        })
    )
}

/// What a repetition holds: not what is said once (facts), nor what speaks of records by number.
fn kept(record: &Record) -> bool {
    match record {
        Record::OpCall(_) => true,
        Record::Other(moment) => !matches!(
            moment.event,
            Event::Fact { .. }
                | Event::Sample { .. }
                | Event::Drop { .. }
                | Event::Statistics { .. }
                | Event::Disabled { .. }
                | Event::Paused { .. }
                | Event::Resumed
                | Event::Mark { .. }
        ),
        _ => false,
    }
}

fn time_of(record: &Record) -> u64 {
    match record {
        Record::OpCall(call) => call.start_ns,
        Record::Other(moment) => moment.time_ns,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use optape_trace::{
        Definition, OpDef, OpId, PatternId, RunInfo, ScopeId, SignatureDef, SignatureId,
        StepSource, StreamInfo, ThreadDef, ThreadId,
    };

    use super::*;

    /// Four steps of one op call each; tensor 1 is a weight, the other one is new in every step.
    fn recorded(path: &Path) {
        let mut writer =
            TraceWriter::create(File::create(path).unwrap(), &RunInfo::default()).unwrap();
        let stream = writer
            .begin_stream(&StreamInfo {
                identities: true,
                ..StreamInfo::default()
            })
            .unwrap();
        let tensors = vec![optape_trace::TensorMeta::default(); 2];
        let signature = SignatureDef {
            op: OpId(0),
            arguments: vec![],
            outputs: vec![],
            tensors,
            inputs: 2,
            flags: 0,
            scope: ScopeId::GLOBAL,
            stage: optape_trace::Stage::Other,
            stage_name: None,
        };
        for definition in [
            Definition::Op(
                OpId(0),
                OpDef {
                    name: "aten::add".to_owned(),
                    ..OpDef::default()
                },
            ),
            Definition::Thread(ThreadId(0), ThreadDef::default()),
            Definition::Signature(SignatureId(0), signature),
        ] {
            writer.define(stream, &definition).unwrap();
        }
        for step in 0..4 {
            let call = OpCallRef {
                signature: SignatureId(0),
                pattern: PatternId(0),
                thread: ThreadId(0),
                start_ns: 1000 * step + 100,
                duration_ns: 10 + step,
                sequence_number: i64::try_from(step).unwrap(),
                payload: &[],
                storages: &[1, 2 + step],
                tensors: &[1, 2 + step],
                statistics: &[],
            };
            writer.op_call(stream, call).unwrap();
            let event = Event::StepMark {
                step,
                source: StepSource::Optimizer,
            };
            writer
                .moment(
                    stream,
                    &Moment {
                        time_ns: 1000 * step + 900,
                        thread: ThreadId(0),
                        event,
                    },
                )
                .unwrap();
        }
        writer.end_stream(stream, &StreamEnd::default()).unwrap();
        writer.finish(&RunEnd::default()).unwrap();
    }

    #[test]
    fn repetitions_move_times_and_new_ids_and_keep_the_rest() {
        let directory = tempfile::tempdir().unwrap();
        let (short, long) = (
            directory.path().join("short"),
            directory.path().join("long"),
        );
        recorded(&short);
        let repeated = repeat(&short, &long, 5).unwrap();
        assert_eq!(repeated.op_calls, 5);
        assert_eq!(repeated.bytes, std::fs::metadata(&long).unwrap().len());

        let trace = Trace::open(&long).unwrap();
        let stream = trace.streams()[0].id();
        let records: Vec<Record> = trace
            .records(stream)
            .map(|record| record.unwrap().1)
            .collect();
        let calls: Vec<&OpCall> = records
            .iter()
            .filter_map(|record| {
                if let Record::OpCall(call) = record {
                    Some(call)
                } else {
                    None
                }
            })
            .collect();
        // The window is the step after the one that crosses the middle.
        assert!(
            calls
                .iter()
                .all(|call| call.duration_ns == calls[0].duration_ns
                    && call.tensors[0] == TensorId(1))
        );
        let mut fresh: Vec<u64> = calls.iter().map(|call| call.tensors[1].0).collect();
        let starts: Vec<u64> = calls.iter().map(|call| call.start_ns).collect();
        assert!(starts.is_sorted_by(|a, b| b - a == 1000), "{starts:?}");
        fresh.dedup();
        assert_eq!(fresh.len(), 5, "new tensors are new every time: {fresh:?}");
        let steps = records.iter().filter(|record| is_step(record)).count();
        assert_eq!(steps, 5);
    }

    #[test]
    fn a_trace_without_steps_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("empty");
        let writer =
            TraceWriter::create(File::create(&path).unwrap(), &RunInfo::default()).unwrap();
        writer.finish(&RunEnd::default()).unwrap();
        let error = repeat(&path, &directory.path().join("long"), 5)
            .unwrap_err()
            .to_string();
        assert!(error.contains("holds no stream"), "{error}");
    }
}
