//! The example of FORMAT.md: its bytes are what the writer writes, and they say what the page says.

use optape_trace::{
    Argument, ArgumentDef, CallId, Definition, Event, ModuleDef, ModuleId, Moment, OpCallRef,
    OpDef, OpId, Operand, Pattern, PatternEntry, PatternId, ReturnDef, RunEnd, RunInfo, ScopeDef,
    ScopeId, SignatureDef, SignatureId, Stage, State, StreamEnd, StreamInfo, TensorId, TensorMeta,
    ThreadDef, ThreadId, Trace, TraceWriter, When, dump, fields, verify_bytes,
};

const FORMAT: &str = include_str!("../../FORMAT.md");

/// The text between a heading and the end of the first code fence behind it.
fn fence(heading: &str) -> &str {
    let (_, rest) = FORMAT.split_once(heading).unwrap();
    let (_, rest) = rest.split_once("```text\n").unwrap();
    rest.split_once("```").unwrap().0
}

/// Offset, bytes, and what a `|` separates from them.
fn example_bytes() -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in fence("### The bytes")
        .lines()
        .filter(|l| !l.trim().is_empty())
    {
        let (offset, rest) = line.split_once(':').unwrap();
        assert_eq!(
            usize::from_str_radix(offset.trim(), 16).unwrap(),
            bytes.len(),
            "offset of line {line:?}"
        );
        let hex = rest.split('|').next().unwrap();
        bytes.extend(
            hex.split_whitespace()
                .map(|b| u8::from_str_radix(b, 16).unwrap()),
        );
    }
    bytes
}

fn write_example() -> Vec<u8> {
    let run = RunInfo {
        optape_version: "0.1.0".into(),
        command: vec!["a".into()],
        statistics: "rules".into(),
        needs_version: 1,
        ..RunInfo::default()
    };
    let mut writer = TraceWriter::create(Vec::new(), &run).unwrap();
    let stream = writer
        .begin_stream(&StreamInfo {
            process_id: 7,
            identities: true,
            ..StreamInfo::default()
        })
        .unwrap();
    let tensor = TensorMeta {
        shape: vec![2, 3],
        strides: vec![3, 1],
        ..TensorMeta::default()
    };
    let entry = PatternEntry {
        operand: Operand::Tensor(0),
        when: When::Before,
        state: State::Present,
        binary: Some(true),
        fields: fields::NONZEROS,
    };
    let definitions = [
        Definition::Thread(
            ThreadId(0),
            ThreadDef {
                native_id: 7,
                name: String::new(),
            },
        ),
        Definition::Module(
            ModuleId(0),
            ModuleDef {
                name: "N".into(),
                ..ModuleDef::default()
            },
        ),
        Definition::Scope(
            ScopeId(1),
            ScopeDef {
                parent: Some(ScopeId(0)),
                name: "N".into(),
                module: Some(ModuleId(0)),
            },
        ),
        Definition::Op(
            OpId(0),
            OpDef {
                name: "aten::f".into(),
                arguments: vec![
                    ArgumentDef {
                        name: "x".into(),
                        type_name: "Tensor".into(),
                        ..ArgumentDef::default()
                    },
                    ArgumentDef {
                        name: "p".into(),
                        type_name: "float".into(),
                        ..ArgumentDef::default()
                    },
                ],
                returns: vec![ReturnDef {
                    type_name: "Tensor".into(),
                    ..ReturnDef::default()
                }],
                ..OpDef::default()
            },
        ),
        Definition::Signature(
            SignatureId(0),
            SignatureDef {
                op: OpId(0),
                arguments: vec![Argument::Tensor(0), Argument::FloatPayload],
                outputs: vec![Argument::Tensor(1)],
                tensors: vec![tensor.clone(), tensor],
                inputs: 1,
                flags: 1,
                scope: ScopeId(1),
                stage: Stage::Forward,
                stage_name: None,
            },
        ),
        Definition::Pattern(
            PatternId(1),
            Pattern {
                entries: vec![entry],
            },
        ),
    ];
    for definition in definitions {
        writer.define(stream, &definition).unwrap();
    }
    let (call, module, thread) = (CallId(0), ModuleId(0), ThreadId(0));
    let enter = Event::ModuleEnter {
        call,
        module,
        arguments: vec![TensorId(1)],
    };
    writer
        .moment(
            stream,
            &Moment {
                time_ns: 1000,
                thread,
                event: enter,
            },
        )
        .unwrap();
    for (start_ns, duration_ns, sequence_number, ids, nonzeros) in
        [(1200, 500, 3, [1, 2], 4), (2000, 510, 4, [2, 3], 6)]
    {
        let call = OpCallRef {
            signature: SignatureId(0),
            pattern: PatternId(1),
            thread,
            start_ns,
            duration_ns,
            sequence_number,
            payload: &[0.5f64.to_bits()],
            storages: &ids,
            tensors: &ids,
            statistics: &[nonzeros],
        };
        writer.op_call(stream, call).unwrap();
    }
    let exit = Event::ModuleExit {
        call,
        module,
        results: vec![TensorId(3)],
    };
    writer
        .moment(
            stream,
            &Moment {
                time_ns: 2600,
                thread,
                event: exit,
            },
        )
        .unwrap();
    writer
        .end_stream(
            stream,
            &StreamEnd {
                ended_ns: 3000,
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

#[test]
fn the_example_says_what_the_page_says() {
    let bytes = example_bytes();
    assert_eq!(verify_bytes(bytes.clone()).unwrap().findings, []);
    let trace = Trace::from_bytes(bytes).unwrap();
    let stream = &trace.streams()[0];
    let definitions = stream
        .dictionary()
        .definitions()
        .map(|d| dump::definition_line(stream.id(), &d));
    let records = dump::record_lines(&trace, stream.id(), 0..u64::MAX).map(Result::unwrap);
    let lines: Vec<String> = definitions.chain(records).collect();
    assert_eq!(
        lines,
        fence("### What they say").lines().collect::<Vec<_>>()
    );
}

#[test]
fn the_example_is_what_the_writer_writes() {
    assert_eq!(write_example(), example_bytes());
}

/// Prints the example for FORMAT.md: `cargo test -p optape-trace print_the_example -- --ignored --nocapture`.
#[test]
#[ignore = "prints the example after a change of the format"]
fn print_the_example() {
    let bytes = write_example();
    let rows = |from: usize, to: usize| {
        for (i, row) in bytes[from..to].chunks(16).enumerate() {
            let hex: Vec<String> = row.iter().map(|b| format!("{b:02x}")).collect();
            println!("{:04x}: {}", from + 16 * i, hex.join(" "));
        }
    };
    rows(0, 24);
    let mut at = 24;
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        rows(at, at + 20);
        println!(
            "      | kind {} flags {} length {length}",
            bytes[at + 2],
            bytes[at + 3]
        );
        rows(at + 20, at + 20 + length);
        at += 20 + length;
    }
    let trace = Trace::from_bytes(bytes).unwrap();
    let stream = &trace.streams()[0];
    for definition in stream.dictionary().definitions() {
        println!("{}", dump::definition_line(stream.id(), &definition));
    }
    for line in dump::record_lines(&trace, stream.id(), 0..u64::MAX) {
        println!("{}", line.unwrap());
    }
}
