//! A simulated recording: a training loop of a small network, with what real ones have: noisy times, statistics that change, parameters that
//! stay and tensors that are new in every step, module calls, backward on the same or another thread.

use optape_trace::{
    Argument, ArgumentDef, CallId, Definition, Event, ModuleDef, ModuleId, Moment, NotTaken,
    OpCall, OpCallRef, OpDef, OpId, Operand, Pattern, PatternEntry, PatternId, Record, RunEnd,
    RunInfo, ScopeDef, ScopeId, SignatureDef, SignatureId, Stage, State, StepSource, StorageId,
    StreamEnd, StreamInfo, TensorId, TensorMeta, TextId, ThreadDef, ThreadId, TraceWriter, When,
    fields,
};

/// A small generator of numbers; the same seed gives the same run everywhere.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Roughly normal, mean 0 and variance 1.
    pub(crate) fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

/// One op call with lists of its own.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Call {
    pub(crate) signature: u32,
    pub(crate) pattern: u32,
    pub(crate) thread: u32,
    pub(crate) start_ns: u64,
    pub(crate) duration_ns: u64,
    pub(crate) sequence_number: i64,
    pub(crate) payload: Vec<u64>,
    pub(crate) storages: Vec<u64>,
    pub(crate) tensors: Vec<u64>,
    pub(crate) statistics: Vec<u64>,
}

impl Call {
    pub(crate) fn view(&self) -> OpCallRef<'_> {
        OpCallRef {
            signature: SignatureId(self.signature),
            pattern: PatternId(self.pattern),
            thread: ThreadId(self.thread),
            start_ns: self.start_ns,
            duration_ns: self.duration_ns,
            sequence_number: self.sequence_number,
            payload: &self.payload,
            storages: &self.storages,
            tensors: &self.tensors,
            statistics: &self.statistics,
        }
    }
}

/// A record of either kind.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Entry {
    Call(Call),
    Moment(Moment),
}

/// One op of the simulated step.
#[derive(Clone)]
struct Op {
    signature: u32,
    duration: f64,
    gap: f64,
    /// Ids by place: a parameter, or how far behind the newest.
    places: Vec<Place>,
    new_outputs: u64,
    /// (binary pattern, other pattern, mean nonzeros)
    statistics: Option<(u32, u32, u64, f64)>,
    payload: usize,
    backward: bool,
    module: Option<u32>,
}

#[derive(Clone, Copy)]
enum Place {
    Parameter(u64),
    Behind(u64),
}

/// The simulated program.
pub(crate) struct Loop {
    pub(crate) random: Random,
    pub(crate) identities: bool,
    ops: Vec<Op>,
    time: u64,
    newest: u64,
    sequence: i64,
    call: u64,
    step: u64,
    pub(crate) noise: f64,
}

pub(crate) const PARAMETERS: u64 = 40;

impl Loop {
    /// A step of so many ops.
    pub(crate) fn new(seed: u64, ops: usize) -> Self {
        let mut random = Random::new(seed);
        let ops = (0..ops)
            .map(|i| {
                let kind = random.below(10);
                let backward = i * 10 > ops * 4 && i * 10 < ops * 8;
                let inputs = 1 + random.below(2) as usize;
                let places = (0..inputs)
                    .map(|_| match random.below(3) {
                        0 => Place::Parameter(1 + random.below(PARAMETERS)),
                        _ => Place::Behind(random.below(30)),
                    })
                    .collect();
                Op {
                    signature: i as u32,
                    duration: 800.0 + random.unit().powi(4) * 60_000.0,
                    gap: 500.0 + random.unit() * 2_000.0,
                    places,
                    new_outputs: u64::from(random.below(10) < 8),
                    statistics: match kind {
                        0..3 => {
                            Some((1, 2, 100 + random.below(20_000), 0.02 + random.unit() * 0.1))
                        }
                        3 => Some((3, 3, 4_000, 0.0)),
                        _ => None,
                    },
                    payload: usize::from(kind == 9),
                    backward,
                    module: (kind == 5).then_some(i as u32 % 8),
                }
            })
            .collect();
        Self {
            random,
            identities: true,
            ops,
            time: 1_000_000,
            newest: PARAMETERS,
            sequence: 0,
            call: 0,
            step: 0,
            noise: 0.12,
        }
    }

    pub(crate) fn stream_info(&self) -> StreamInfo {
        StreamInfo {
            process_id: 4711,
            command: vec!["python".into(), "train.py".into()],
            identities: self.identities,
            ..StreamInfo::default()
        }
    }

    /// Everything that the loop's records use.
    pub(crate) fn definitions(&self) -> Vec<Definition> {
        let entry = |operand, binary, fields| PatternEntry {
            operand,
            when: When::Before,
            state: State::Present,
            binary,
            fields,
        };
        let first = Operand::Tensor(0);
        let patterns = [
            vec![entry(
                first,
                Some(true),
                fields::NONZEROS | fields::FAN_OUT_NONZEROS,
            )],
            vec![entry(first, Some(false), 0)],
            vec![entry(
                first,
                None,
                fields::NONZEROS | fields::SUM | fields::MINIMUM,
            )],
            vec![PatternEntry {
                state: State::Pending,
                ..entry(first, None, 0)
            }],
            vec![PatternEntry {
                state: State::NotTaken(NotTaken::Layout),
                ..entry(first, None, 0)
            }],
        ];
        let mut all = vec![
            Definition::Text(TextId(0), "Optimizer.step#Adam.step".into()),
            Definition::Text(TextId(1), "note".into()),
            Definition::Module(
                ModuleId(0),
                ModuleDef {
                    name: "Net".into(),
                    classes: vec!["train.Net".into()],
                    spiking: false,
                },
            ),
            Definition::Scope(
                ScopeId(1),
                ScopeDef {
                    parent: Some(ScopeId(0)),
                    name: "Net".into(),
                    module: Some(ModuleId(0)),
                },
            ),
            Definition::Thread(
                ThreadId(0),
                ThreadDef {
                    native_id: 4711,
                    name: "python".into(),
                },
            ),
            Definition::Thread(
                ThreadId(1),
                ThreadDef {
                    native_id: 4712,
                    name: "pt_autograd_0".into(),
                },
            ),
        ];
        all.extend((1..8).map(|i| {
            Definition::Module(
                ModuleId(i),
                ModuleDef {
                    name: format!("Net.layer.{i}"),
                    classes: vec!["torch.nn.Linear".into()],
                    spiking: false,
                },
            )
        }));
        all.extend(
            (1u32..)
                .zip(patterns)
                .map(|(i, entries)| Definition::Pattern(PatternId(i), Pattern { entries })),
        );
        for op in &self.ops {
            let id = OpId(op.signature);
            let argument = |name: &str| ArgumentDef {
                name: name.into(),
                type_name: "Tensor".into(),
                ..ArgumentDef::default()
            };
            all.push(Definition::Op(
                id,
                OpDef {
                    name: format!("aten::op{}", op.signature),
                    arguments: vec![argument("self"), argument("other")],
                    ..OpDef::default()
                },
            ));
            let tensors = op.places.len() + op.new_outputs as usize;
            let mut arguments: Vec<Argument> = (0..op.places.len())
                .map(|i| Argument::Tensor(i as u16))
                .collect();
            arguments.extend((0..op.payload).map(|_| Argument::FloatPayload));
            all.push(Definition::Signature(
                SignatureId(op.signature),
                SignatureDef {
                    op: id,
                    arguments,
                    outputs: (op.places.len()..tensors)
                        .map(|i| Argument::Tensor(i as u16))
                        .collect(),
                    tensors: vec![
                        TensorMeta {
                            shape: vec![8, 32, 28, 28],
                            strides: vec![25_088, 784, 28, 1],
                            ..TensorMeta::default()
                        };
                        tensors
                    ],
                    inputs: op.places.len() as u16,
                    flags: 0,
                    scope: ScopeId(1),
                    stage: if op.backward {
                        Stage::Backward
                    } else {
                        Stage::Forward
                    },
                    stage_name: None,
                },
            ));
        }
        all
    }

    fn noisy(&mut self, mean: f64) -> u64 {
        let outlier = if self.random.below(500) == 0 {
            20.0
        } else {
            1.0
        };
        (mean * (1.0 + self.noise * self.random.normal().abs()) * outlier) as u64
    }

    /// The records of one step.
    pub(crate) fn step(&mut self) -> Vec<Entry> {
        let mut all = Vec::new();
        let mut gradient = 0;
        for op in self.ops.clone() {
            if let Some(module) = op.module {
                let time_ns = self.time + 300 + self.random.below(100);
                let (call, module) = (CallId(self.call), ModuleId(module));
                let event = Event::ModuleEnter {
                    call,
                    module,
                    arguments: vec![TensorId(self.newest)],
                };
                all.push(Entry::Moment(Moment {
                    time_ns,
                    thread: ThreadId(0),
                    event,
                }));
                self.call += 1;
            }
            let gap = self.noisy(op.gap);
            let duration_ns = self.noisy(op.duration);
            let start_ns = self.time + gap;
            self.time = start_ns + duration_ns;
            let mut ids: Vec<u64> = op
                .places
                .iter()
                .map(|p| match p {
                    Place::Parameter(id) => *id,
                    Place::Behind(n) => self.newest.saturating_sub(*n).max(1),
                })
                .collect();
            for _ in 0..op.new_outputs {
                self.newest += 1;
                ids.push(self.newest);
            }
            let sequence_number = if op.backward {
                gradient += 1;
                self.sequence - gradient
            } else {
                self.sequence += 1;
                self.sequence
            };
            let (pattern, statistics) = match op.statistics {
                None => (0, vec![]),
                Some((1, other, mean, _)) => {
                    if self.random.below(50) == 0 {
                        (other, vec![])
                    } else {
                        let nonzeros = mean + self.random.below(mean / 16 + 1);
                        (
                            1,
                            vec![
                                nonzeros,
                                nonzeros * 9 - self.random.below(nonzeros / 10 + 1),
                            ],
                        )
                    }
                }
                Some((pattern, _, nonzeros, minimum)) => (
                    pattern,
                    vec![
                        nonzeros,
                        (nonzeros as f64 * 0.5).to_bits(),
                        minimum.to_bits(),
                    ],
                ),
            };
            let learning_rate = 0.001 * 0.999f64.powi(self.step as i32);
            let identities = if self.identities { ids } else { vec![] };
            all.push(Entry::Call(Call {
                signature: op.signature,
                pattern,
                thread: u32::from(op.backward),
                start_ns,
                duration_ns,
                sequence_number,
                payload: vec![learning_rate.to_bits(); op.payload],
                storages: identities.clone(),
                tensors: identities,
                statistics,
            }));
            if let Some(module) = op.module {
                let time_ns = self.time + 200 + self.random.below(100);
                let event = Event::ModuleExit {
                    call: CallId(self.call - 1),
                    module: ModuleId(module),
                    results: vec![TensorId(self.newest)],
                };
                all.push(Entry::Moment(Moment {
                    time_ns,
                    thread: ThreadId(0),
                    event,
                }));
            }
        }
        let event = Event::StepMark {
            step: self.step,
            source: StepSource::Optimizer,
        };
        all.push(Entry::Moment(Moment {
            time_ns: self.time,
            thread: ThreadId(0),
            event,
        }));
        self.step += 1;
        all
    }
}

pub(crate) fn run_info() -> RunInfo {
    RunInfo {
        run_uuid: *b"0123456789abcdef",
        optape_version: "0.1.0".into(),
        command: vec!["python".into(), "train.py".into()],
        statistics: "rules".into(),
        ..RunInfo::default()
    }
}

pub(crate) fn owned(call: &Call) -> OpCall {
    let view = call.view();
    OpCall {
        signature: view.signature,
        pattern: view.pattern,
        thread: view.thread,
        start_ns: view.start_ns,
        duration_ns: view.duration_ns,
        sequence_number: view.sequence_number,
        payload: call.payload.clone(),
        storages: call.storages.iter().map(|&i| StorageId(i)).collect(),
        tensors: call.tensors.iter().map(|&i| TensorId(i)).collect(),
        statistics: call.statistics.clone(),
    }
}

pub(crate) fn record(entry: &Entry) -> Record {
    match entry {
        Entry::Call(call) => Record::OpCall(owned(call)),
        Entry::Moment(moment) => Record::Other(moment.clone()),
    }
}

pub(crate) fn write(entries: &[Entry], program: &Loop, flush_every: usize) -> Vec<u8> {
    let mut writer = TraceWriter::create(Vec::new(), &run_info()).unwrap();
    let stream = writer.begin_stream(&program.stream_info()).unwrap();
    for definition in program.definitions() {
        writer.define(stream, &definition).unwrap();
    }
    for (i, entry) in entries.iter().enumerate() {
        let ordinal = match entry {
            Entry::Call(call) => writer.op_call(stream, call.view()).unwrap(),
            Entry::Moment(moment) => writer.moment(stream, moment).unwrap(),
        };
        assert_eq!(ordinal.0, i as u64);
        if (i + 1) % flush_every == 0 {
            writer.flush().unwrap();
        }
    }
    writer
        .end_stream(
            stream,
            &StreamEnd {
                clean: true,
                ..StreamEnd::default()
            },
        )
        .unwrap();
    writer
        .finish(&RunEnd {
            exit_code: Some(0),
            ..RunEnd::default()
        })
        .unwrap()
}
