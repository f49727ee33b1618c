//! Small made-up traces for tests: what a training step of a spiking network looks like, without running one.

use optape_trace::{
    Argument, ArgumentDef, CallId, DType, Definition, Event, ModuleDef, ModuleId, Moment,
    OpCallRef, OpDef, OpId, Operand, Pattern, PatternEntry, PatternId, ReturnDef, Role, RunEnd,
    RunInfo, ScopeDef, ScopeId, SignatureDef, SignatureId, Stage, State, StepSource, StreamEnd,
    StreamId, StreamInfo, TensorId, TensorMeta, TextId, ThreadDef, ThreadId, Trace, TraceWriter,
    WatchDef, WatchId, When, call_flags, fields,
};

/// Writes a trace in memory, handing out ids as capture does.
pub struct Tape {
    writer: TraceWriter<Vec<u8>>,
    stream: StreamId,
    ops: Vec<OpDef>,
    signatures: Vec<SignatureDef>,
    patterns: Vec<Pattern>,
    scopes: Vec<ScopeDef>,
    modules: Vec<ModuleDef>,
    texts: Vec<String>,
    time_ns: u64,
    identities: bool,
}

/// When and where a made-up stream began.
#[derive(Clone, Debug)]
pub struct Started {
    /// Name of the host.
    pub host: String,
    /// Its boot.
    pub boot_id: Option<String>,
    /// How far its wall clock may be off.
    pub clock_error_ns: Option<u64>,
    /// What the wall clock showed.
    pub unix_ns: u64,
    /// What the monotonic clock showed.
    pub monotonic_ns: Option<u64>,
}

impl Default for Started {
    fn default() -> Self {
        Self {
            host: "testhost".to_owned(),
            boot_id: None,
            clock_error_ns: None,
            unix_ns: 0,
            monotonic_ns: None,
        }
    }
}

/// One operand's statistics: whose, when, binary or not, and the fields with their numbers, lowest field first.
#[derive(Clone, Debug)]
pub struct Statistic {
    /// Whose.
    pub operand: Operand,
    /// When.
    pub when: When,
    /// All elements 0 or 1.
    pub binary: Option<bool>,
    /// Fields and numbers.
    pub numbers: Vec<(u32, u64)>,
}

impl Statistic {
    /// A binary tensor with so many nonzeros, before the op.
    #[must_use]
    pub fn spikes(tensor: u16, nonzeros: u64) -> Self {
        Self {
            operand: Operand::Tensor(tensor),
            when: When::Before,
            binary: Some(true),
            numbers: vec![(fields::NONZEROS, nonzeros)],
        }
    }

    /// A tensor that is not binary, before the op.
    #[must_use]
    pub fn analog(tensor: u16) -> Self {
        Self {
            operand: Operand::Tensor(tensor),
            when: When::Before,
            binary: Some(false),
            numbers: Vec::new(),
        }
    }

    /// The sum over the product of two binary factors.
    #[must_use]
    pub fn product(sum: u64) -> Self {
        Self {
            operand: Operand::Product,
            when: When::Before,
            binary: None,
            numbers: vec![(fields::PRODUCT_SUM, sum)],
        }
    }

    /// The same, looked at after the op.
    #[must_use]
    pub fn after(self) -> Self {
        Self {
            when: When::After,
            ..self
        }
    }
}

/// A float32 tensor.
#[must_use]
pub fn tensor(shape: &[i64]) -> TensorMeta {
    let mut strides = vec![1; shape.len()];
    for at in (1..shape.len()).rev() {
        strides[at - 1] = strides[at] * shape[at];
    }
    TensorMeta {
        shape: shape.to_vec(),
        strides,
        dtype: DType::F32,
        ..TensorMeta::default()
    }
}

/// An op from a schema in torch's own notation: `aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor`.
///
/// # Panics
/// Where the text is no schema.
#[must_use]
pub fn op(schema: &str) -> OpDef {
    let (head, returns) = schema.split_once(" -> ").expect("a schema has returns");
    let (name, arguments) = head.split_once('(').expect("a schema has arguments");
    let arguments = arguments
        .strip_suffix(')')
        .expect("arguments end with a parenthesis");
    let (name, overload) = name.split_once('.').unwrap_or((name, ""));
    let mut keyword_only = false;
    let mut defined = Vec::new();
    for argument in arguments.split(", ").filter(|a| !a.is_empty()) {
        if argument == "*" {
            keyword_only = true;
            continue;
        }
        let (type_name, rest) = argument.rsplit_once(' ').expect("an argument has a type");
        let (argument_name, default) = match rest.split_once('=') {
            Some((name, default)) => (name, Some(default.to_owned())),
            None => (rest, None),
        };
        let (type_name, alias, written) = aliased(type_name);
        defined.push(ArgumentDef {
            name: argument_name.to_owned(),
            type_name,
            keyword_only,
            default,
            written,
            alias,
        });
    }
    let returns = returns
        .trim_matches(['(', ')'].as_slice())
        .split(", ")
        .filter(|r| !r.is_empty())
        .map(|r| {
            // `Tensor(a!)` may have lost its last parenthesis to the trimming above.
            let whole = if r.contains('(') && !r.contains(')') {
                format!("{r})")
            } else {
                r.to_owned()
            };
            let (type_name, alias, written) = aliased(whole.split(' ').next().unwrap_or(&whole));
            ReturnDef {
                type_name,
                alias,
                written,
            }
        })
        .collect();
    OpDef {
        name: name.to_owned(),
        overload: overload.to_owned(),
        arguments: defined,
        returns,
    }
}

fn aliased(type_name: &str) -> (String, String, bool) {
    match type_name.split_once('(') {
        Some((plain, rest)) => {
            let (alias, suffix) = rest.split_once(')').unwrap_or((rest, ""));
            (
                format!("{plain}{suffix}"),
                alias.trim_end_matches('!').to_owned(),
                alias.ends_with('!'),
            )
        }
        None => (type_name.to_owned(), String::new(), false),
    }
}

/// A call to be written.
#[derive(Clone, Debug)]
pub struct Call {
    /// Schema.
    pub schema: &'static str,
    /// Arguments; tensors are indices into `inputs`.
    pub arguments: Vec<Argument>,
    /// Tensors of the arguments.
    pub inputs: Vec<TensorMeta>,
    /// Tensors of the results: one result each.
    pub outputs: Vec<TensorMeta>,
    /// Statistics.
    pub statistics: Vec<Statistic>,
    /// Flags.
    pub flags: u32,
    /// Stage.
    pub stage: Stage,
}

impl Call {
    /// A forward call without statistics.
    #[must_use]
    pub fn new(
        schema: &'static str,
        arguments: Vec<Argument>,
        inputs: Vec<TensorMeta>,
        outputs: Vec<TensorMeta>,
    ) -> Self {
        Self {
            schema,
            arguments,
            inputs,
            outputs,
            statistics: Vec::new(),
            flags: call_flags::GRAD_MODE,
            stage: Stage::Forward,
        }
    }

    /// With statistics, sorted by operand and time.
    #[must_use]
    pub fn with(mut self, statistics: Vec<Statistic>) -> Self {
        self.statistics = statistics;
        self
    }

    /// With more flags.
    #[must_use]
    pub fn flagged(mut self, flags: u32) -> Self {
        self.flags |= flags;
        self
    }

    /// In a stage.
    #[must_use]
    pub fn in_stage(mut self, stage: Stage) -> Self {
        self.stage = stage;
        self
    }

    /// The structure; the op and the scope are filled in by the tape.
    fn signature(&self, op: OpId, scope: ScopeId) -> SignatureDef {
        let inputs = u16::try_from(self.inputs.len()).unwrap_or(u16::MAX);
        let outputs = (inputs..)
            .take(self.outputs.len())
            .map(Argument::Tensor)
            .collect();
        SignatureDef {
            op,
            arguments: self.arguments.clone(),
            outputs,
            tensors: self.inputs.iter().chain(&self.outputs).cloned().collect(),
            inputs,
            flags: self.flags,
            scope,
            stage: self.stage,
            stage_name: None,
        }
    }
}

/// The run that made-up traces are of.
const RUN: [u8; 16] = *b"optape test run.";

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

#[expect(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a helper of tests: a fault in it is a fault of the test"
)]
impl Tape {
    /// An empty trace with one stream, recorded by the default preset.
    #[must_use]
    pub fn new() -> Self {
        Self::recorded(&Started::default(), "rules", false, RUN)
    }

    /// An empty trace with one stream, of a run of its own.
    #[must_use]
    pub fn of_run(run_uuid: [u8; 16]) -> Self {
        Self::recorded(&Started::default(), "rules", false, run_uuid)
    }

    /// An empty trace with one stream, recorded with `--level full`: calls have identities ([`Self::call_on`]).
    #[must_use]
    pub fn full() -> Self {
        Self::recorded(&Started::default(), "full", true, RUN)
    }

    /// An empty trace with one stream, of some host and clock.
    #[must_use]
    pub fn on(started: &Started) -> Self {
        Self::recorded(started, "rules", false, RUN)
    }

    fn recorded(started: &Started, statistics: &str, identities: bool, run_uuid: [u8; 16]) -> Self {
        let mut facts = std::collections::BTreeMap::new();
        if let Some(boot_id) = &started.boot_id {
            facts.insert(optape_trace::facts::BOOT_ID.to_owned(), boot_id.clone());
        }
        if let Some(error) = started.clock_error_ns {
            let key = optape_trace::facts::CLOCK_ERROR.to_owned();
            facts.insert(key, error.to_string());
        }
        let run = RunInfo {
            run_uuid,
            optape_version: "0.1.0".to_owned(),
            command: vec!["python".to_owned(), "train.py".to_owned()],
            host: started.host.clone(),
            facts,
            statistics: statistics.to_owned(),
            needs_version: optape_trace::needs::NEEDS_VERSION,
            ..RunInfo::default()
        };
        let mut writer = TraceWriter::create(Vec::new(), &run).unwrap();
        let info = StreamInfo {
            process_id: 100,
            identities,
            epoch_unix_ns: started.unix_ns,
            epoch_monotonic_ns: started.monotonic_ns,
            ..StreamInfo::default()
        };
        let stream = writer.begin_stream(&info).unwrap();
        writer
            .define(
                stream,
                &Definition::Thread(
                    ThreadId(0),
                    ThreadDef {
                        native_id: 100,
                        name: "python".to_owned(),
                    },
                ),
            )
            .unwrap();
        let global = ScopeDef {
            parent: None,
            name: "Global".to_owned(),
            module: None,
        };
        writer
            .define(stream, &Definition::Scope(ScopeId(0), global.clone()))
            .unwrap();
        writer
            .define(
                stream,
                &Definition::Pattern(PatternId(0), Pattern::default()),
            )
            .unwrap();
        Self {
            writer,
            stream,
            ops: Vec::new(),
            signatures: Vec::new(),
            patterns: vec![Pattern::default()],
            scopes: vec![global],
            modules: Vec::new(),
            texts: Vec::new(),
            time_ns: 0,
            identities,
        }
    }

    /// The number of a text.
    pub fn text(&mut self, text: &str) -> TextId {
        if let Some(at) = self.texts.iter().position(|t| t == text) {
            return TextId(at as u32);
        }
        let id = TextId(self.texts.len() as u32);
        self.texts.push(text.to_owned());
        self.writer
            .define(self.stream, &Definition::Text(id, text.to_owned()))
            .unwrap();
        id
    }

    /// Defines a module and the scope inside of it.
    pub fn module(
        &mut self,
        parent: ScopeId,
        name: &str,
        class: &str,
        spiking: bool,
    ) -> (ModuleId, ScopeId) {
        let module = ModuleId(self.modules.len() as u32);
        let definition = ModuleDef {
            name: name.to_owned(),
            classes: vec![class.to_owned()],
            spiking,
        };
        self.modules.push(definition.clone());
        self.writer
            .define(self.stream, &Definition::Module(module, definition))
            .unwrap();
        let scope = ScopeId(self.scopes.len() as u32);
        let definition = ScopeDef {
            parent: Some(parent),
            name: name.to_owned(),
            module: Some(module),
        };
        self.scopes.push(definition.clone());
        self.writer
            .define(self.stream, &Definition::Scope(scope, definition))
            .unwrap();
        (module, scope)
    }

    /// Defines a watch of a module's output.
    pub fn watch(&mut self, id: u32, module: ModuleId) {
        let definition = WatchDef {
            module: Some(module),
            what: "output".to_owned(),
        };
        self.writer
            .define(self.stream, &Definition::Watch(WatchId(id), definition))
            .unwrap();
    }

    /// Writes a record that is no call.
    pub fn moment(&mut self, event: Event) {
        self.time_ns += 10;
        let moment = Moment {
            time_ns: self.time_ns,
            thread: ThreadId(0),
            event,
        };
        self.writer.moment(self.stream, &moment).unwrap();
    }

    /// Begins a range.
    pub fn enter_range(&mut self, name: &str) {
        let name = self.text(name);
        self.moment(Event::RangeEnter { name });
    }

    /// Ends a range.
    pub fn exit_range(&mut self, name: &str) {
        let name = self.text(name);
        self.moment(Event::RangeExit { name });
    }

    /// Ends a step.
    pub fn step(&mut self, step: u64) {
        self.moment(Event::StepMark {
            step,
            source: StepSource::Program,
        });
    }

    /// Begins a module's call.
    pub fn enter(&mut self, call: u64, module: ModuleId) {
        self.moment(Event::ModuleEnter {
            call: CallId(call),
            module,
            arguments: Vec::new(),
        });
    }

    /// Ends a module's call.
    pub fn exit(&mut self, call: u64, module: ModuleId) {
        self.moment(Event::ModuleExit {
            call: CallId(call),
            module,
            results: Vec::new(),
        });
    }

    /// A fact about a module; `value` is JSON.
    pub fn fact(&mut self, module: ModuleId, key: &str, value: &str) {
        let key = self.text(key);
        self.moment(Event::Fact {
            module: Some(module),
            key,
            value: value.to_owned(),
        });
    }

    /// Begins a module's call with tensors.
    pub fn enter_with(&mut self, call: u64, module: ModuleId, tensors: &[u64]) {
        self.moment(Event::ModuleEnter {
            call: CallId(call),
            module,
            arguments: tensors.iter().map(|t| TensorId(*t)).collect(),
        });
    }

    /// Ends a module's call with tensors.
    pub fn exit_with(&mut self, call: u64, module: ModuleId, tensors: &[u64]) {
        self.moment(Event::ModuleExit {
            call: CallId(call),
            module,
            results: tensors.iter().map(|t| TensorId(*t)).collect(),
        });
    }

    /// A neuron's state becomes a tensor.
    pub fn assign(&mut self, module: ModuleId, attribute: &str, tensor: u64) {
        let attribute = self.text(attribute);
        self.moment(Event::StateAssign {
            module,
            attribute,
            tensor: TensorId(tensor),
        });
    }

    /// Writes a call without identities.
    pub fn call(&mut self, scope: ScopeId, call: &Call) {
        assert!(!self.identities, "a full recording has identities");
        self.write(scope, call, &[]);
    }

    /// Writes a call whose tensors, those of the results among them, have these identities: each tensor object's own, in memory of the same
    /// number.
    pub fn call_on(&mut self, scope: ScopeId, call: &Call, tensors: &[u64]) {
        self.write(scope, call, tensors);
    }

    fn write(&mut self, scope: ScopeId, call: &Call, identities: &[u64]) {
        let definition = op(call.schema);
        let op = match self.ops.iter().position(|o| *o == definition) {
            Some(at) => OpId(at as u32),
            None => {
                let id = OpId(self.ops.len() as u32);
                self.ops.push(definition.clone());
                self.writer
                    .define(self.stream, &Definition::Op(id, definition))
                    .unwrap();
                id
            }
        };
        let definition = call.signature(op, scope);
        let signature = match self.signatures.iter().position(|s| *s == definition) {
            Some(at) => SignatureId(at as u32),
            None => {
                let id = SignatureId(self.signatures.len() as u32);
                self.signatures.push(definition.clone());
                self.writer
                    .define(self.stream, &Definition::Signature(id, definition.clone()))
                    .unwrap();
                id
            }
        };
        let entries = call.statistics.iter().map(|s| PatternEntry {
            operand: s.operand,
            when: s.when,
            state: State::Present,
            binary: s.binary,
            fields: s.numbers.iter().fold(0, |mask, (field, _)| mask | field),
        });
        let definition = Pattern {
            entries: entries.collect(),
        };
        let pattern = match self.patterns.iter().position(|p| *p == definition) {
            Some(at) => PatternId(at as u32),
            None => {
                let id = PatternId(self.patterns.len() as u32);
                self.patterns.push(definition.clone());
                self.writer
                    .define(self.stream, &Definition::Pattern(id, definition))
                    .unwrap();
                id
            }
        };
        let statistics: Vec<u64> = call
            .statistics
            .iter()
            .flat_map(|s| s.numbers.iter().map(|(_, n)| *n))
            .collect();
        let payload = vec![0; self.signatures[signature.index()].payload_words()];
        self.time_ns += 100;
        self.writer
            .op_call(
                self.stream,
                OpCallRef {
                    signature,
                    pattern,
                    thread: ThreadId(0),
                    start_ns: self.time_ns,
                    duration_ns: 50,
                    sequence_number: -1,
                    payload: &payload,
                    storages: identities,
                    tensors: identities,
                    statistics: &statistics,
                },
            )
            .unwrap();
    }

    /// Adds a stream of monitors: facts, and samples (series, nanoseconds, value).
    pub fn monitors(
        &mut self,
        started: &Started,
        facts: &[(&str, &str)],
        samples: &[(&str, u64, f64)],
    ) {
        let info = StreamInfo {
            process_id: 99,
            role: Role::Monitor,
            epoch_unix_ns: started.unix_ns,
            epoch_monotonic_ns: started.monotonic_ns,
            ..StreamInfo::default()
        };
        let stream = self.writer.begin_stream(&info).unwrap();
        let thread = Definition::Thread(ThreadId(0), ThreadDef::default());
        self.writer.define(stream, &thread).unwrap();
        let mut texts: Vec<&str> = Vec::new();
        let events = facts
            .iter()
            .map(|(key, value)| (*key, 0, Some(*value), 0.0));
        let samples = samples
            .iter()
            .map(|(name, time, value)| (*name, *time, None, *value));
        for (name, time_ns, fact, value) in events.chain(samples) {
            let id = match texts.iter().position(|text| *text == name) {
                Some(at) => TextId(at as u32),
                None => {
                    let id = TextId(texts.len() as u32);
                    texts.push(name);
                    let definition = Definition::Text(id, name.to_owned());
                    self.writer.define(stream, &definition).unwrap();
                    id
                }
            };
            let event = match fact {
                Some(fact) => Event::Fact {
                    module: None,
                    key: id,
                    value: fact.to_owned(),
                },
                None => Event::Sample { series: id, value },
            };
            let moment = Moment {
                time_ns,
                thread: ThreadId(0),
                event,
            };
            self.writer.moment(stream, &moment).unwrap();
        }
        let end = StreamEnd {
            clean: true,
            ..StreamEnd::default()
        };
        self.writer.end_stream(stream, &end).unwrap();
    }

    /// Writes pending records as a block of their own.
    pub fn flush(&mut self) {
        self.writer.flush().unwrap();
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(mut self) -> Vec<u8> {
        let end = StreamEnd {
            ended_ns: self.time_ns,
            clean: true,
            ..StreamEnd::default()
        };
        self.writer.end_stream(self.stream, &end).unwrap();
        self.writer
            .finish(&RunEnd {
                exit_code: Some(0),
                ..RunEnd::default()
            })
            .unwrap()
    }

    /// The trace.
    #[must_use]
    pub fn trace(self) -> Trace {
        Trace::from_bytes(self.bytes()).unwrap()
    }
}

/// The small network's run with a GPU of 10 W per microsecond beside it, whose counter was sampled from the beginning until long after the
/// end, and a processor with two energy domains that was sampled in the middle only.
#[must_use]
pub fn monitored_tape() -> Tape {
    let started = Started {
        host: "testhost".to_owned(),
        ..Started::default()
    };
    monitored_tape_on(&started, &started)
}

/// The same with clocks: of the process, and of the monitors.
#[must_use]
pub fn monitored_tape_on(process: &Started, monitors: &Started) -> Tape {
    let mut tape = spiking_tape_on(process);
    tape.monitors(
        monitors,
        &[
            ("monitor.gpu", r#"{"state":"running","what":"1 GPU(s)"}"#),
            (
                "monitor.rapl",
                r#"{"state":"absent","what":"no permission","hint":"ask for it"}"#,
            ),
            ("monitors.interval_s", "1.0"),
        ],
        &[
            ("gpu0/energy_j", 0, 0.0),
            ("gpu0/power_mw", 0, 9e9),
            ("gpu0/memory_used_bytes", 500, 1e9),
            ("gpu0/memory_used_bytes", 900, 3e9),
            ("rapl/package-0/energy_j", 800, 0.0),
            ("rapl/package-0/core/energy_j", 800, 0.0),
            ("rapl/package-0/energy_j", 1000, 2.0),
            ("rapl/package-0/core/energy_j", 1000, 1.0),
            ("gpu0/energy_j", 100_000, 1000.0),
            ("gpu0/memory_used_bytes", 100_000, 9e9),
        ],
    );
    tape
}

/// A trace with the text `measure` and nothing else to speak of.
#[must_use]
pub fn tiny_trace() -> Trace {
    let mut tape = Tape::new();
    tape.enter_range("measure");
    tape.exit_range("measure");
    tape.trace()
}

/// Schemas that tests use.
pub mod schema {
    /// Matrix product.
    pub const MM: &str = "aten::mm(Tensor self, Tensor mat2) -> Tensor";
    /// Matrix product with bias.
    pub const ADDMM: &str = "aten::addmm(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor";
    /// Addition.
    pub const ADD: &str =
        "aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor";
    /// Addition in place.
    pub const ADD_: &str =
        "aten::add_.Tensor(Tensor(a!) self, Tensor other, *, Scalar alpha=1) -> Tensor(a!)";
    /// Subtraction from a number: `alpha` is positional.
    pub const RSUB: &str = "aten::rsub.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor";
    /// Comparison.
    pub const GE: &str = "aten::ge.Scalar(Tensor self, Scalar other) -> Tensor";
    /// Negation of truth values.
    pub const LOGICAL_NOT: &str = "aten::logical_not(Tensor self) -> Tensor";
    /// Transposition.
    pub const T: &str = "aten::t(Tensor(a) self) -> Tensor(a)";
    /// An op that nobody has a rule for.
    pub const UNHEARD: &str = "mylib::unheard(Tensor self) -> Tensor";
    /// A watched value.
    pub const WATCH: &str = "optape::watch(Tensor value, int id) -> ()";
    /// The begin of a range.
    pub const RANGE: &str =
        "profiler::_record_function_enter_new(str name, str? args=None) -> Tensor";
}

/// A two-layer spiking network, two steps of two time steps each: products with spikes and with currents, a neuron that is
/// watched, a backward product, an op without a rule, all inside a range of name `measure` but for one call before it.
#[must_use]
pub fn spiking_tape() -> Tape {
    spiking_tape_on(&Started {
        host: "testhost".to_owned(),
        ..Started::default()
    })
}

/// The same with a clock.
#[must_use]
pub fn spiking_tape_on(started: &Started) -> Tape {
    let mut tape = Tape::on(started);
    let (net, root) = tape.module(ScopeId::GLOBAL, "Net", "app.Net", false);
    let (fc, fc_scope) = tape.module(root, "Net.fc", "torch.nn.modules.linear.Linear", false);
    let (neuron, neuron_scope) = tape.module(root, "Net.lif", "spikingjelly.LIFNode", true);
    tape.watch(0, neuron);
    let linear = |spikes: Option<u64>| {
        let first = spikes.map_or_else(|| Statistic::analog(1), |n| Statistic::spikes(1, n));
        Call::new(
            schema::ADDMM,
            vec![
                Argument::Tensor(0),
                Argument::Tensor(1),
                Argument::Tensor(2),
                Argument::Int(1),
                Argument::Int(1),
            ],
            vec![tensor(&[4]), tensor(&[2, 3]), tensor(&[3, 4])],
            vec![tensor(&[2, 4])],
        )
        .with(vec![first, Statistic::analog(2)])
    };
    tape.call(
        ScopeId::GLOBAL,
        &Call::new(
            schema::GE,
            vec![Argument::Tensor(0), Argument::Int(1)],
            vec![tensor(&[2, 3])],
            vec![tensor(&[2, 3])],
        )
        .in_stage(Stage::Other),
    );
    tape.enter_range("measure");
    for step in 0..2u64 {
        for time in 0..2u64 {
            let call = step * 10 + time * 3;
            tape.enter(call, net);
            tape.enter(call + 1, fc);
            tape.call(fc_scope, &linear((time == 1).then_some(3 + step)));
            tape.exit(call + 1, fc);
            tape.enter(call + 2, neuron);
            tape.call(
                neuron_scope,
                &Call::new(
                    schema::ADD,
                    vec![Argument::Tensor(0), Argument::Tensor(1), Argument::Int(1)],
                    vec![tensor(&[2, 4]), tensor(&[2, 4])],
                    vec![tensor(&[2, 4])],
                )
                .with(vec![Statistic::analog(0), Statistic::analog(1)]),
            );
            tape.call(
                neuron_scope,
                &Call::new(
                    schema::GE,
                    vec![Argument::Tensor(0), Argument::Int(1)],
                    vec![tensor(&[2, 4])],
                    vec![tensor(&[2, 4])],
                ),
            );
            tape.exit(call + 2, neuron);
            tape.call(
                root,
                &Call::new(
                    schema::WATCH,
                    vec![Argument::Tensor(0), Argument::Int(0)],
                    vec![tensor(&[2, 4])],
                    vec![],
                )
                .with(vec![Statistic::spikes(0, 2 + time)]),
            );
            tape.exit(call, net);
        }
        tape.call(
            fc_scope,
            &Call::new(
                schema::MM,
                vec![Argument::Tensor(0), Argument::Tensor(1)],
                vec![tensor(&[3, 2]), tensor(&[2, 4])],
                vec![tensor(&[3, 4])],
            )
            .with(vec![
                Statistic::spikes(0, 3),
                Statistic::spikes(1, 4),
                Statistic::product(5),
            ])
            .in_stage(Stage::Backward),
        );
        tape.call(
            ScopeId::GLOBAL,
            &Call::new(
                schema::UNHEARD,
                vec![Argument::Tensor(0)],
                vec![tensor(&[4])],
                vec![tensor(&[4])],
            )
            .in_stage(Stage::Optimizer)
            .flagged(call_flags::UNATTRIBUTED),
        );
        tape.moment(Event::Samples { count: 2 });
        tape.step(step);
        tape.flush();
    }
    tape.exit_range("measure");
    tape
}
