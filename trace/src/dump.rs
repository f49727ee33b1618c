//! A trace as text: one line per record. The lines are for reading and for tests; they are no format to parse.
//!
//! ```text
//! 0 17 0.001234567 t0 call aten::mm self=float32[8,16]@s3#5 mat2=float32[16,4]@s1#2 -> float32[8,4]@s9#12 scope=Net.fc stage=forward
//!     duration=4210ns seq=7 stats=0:binary,nonzeros=31
//! ```
//! (one line): stream, ordinal, seconds since the stream's start, thread, kind, and what belongs to the kind. `@s` is a storage,
//! `#` a tensor.

use std::fmt::{self, Write as _};
use std::ops::Range;

use crate::dictionary::{Argument, Definition, SignatureDef, TensorMeta, call_flags, tensor_flags};
use crate::error::TraceError;
use crate::ids::{ModuleId, Ordinal, PatternId, ScopeId, SignatureId, StreamId, TensorId, TextId};
use crate::reader::{Stream, Trace};
use crate::record::{DropReason, Event, LateStatistic, OpCall, Record, StepSource};
use crate::statistics::{NotTaken, Operand, Pattern, State, When, fields};
use crate::table::Dictionary;
use crate::values::{Elements, Value};

/// The lines of a stream's records among `range`.
///
/// # Errors
/// The lines end with an error where a block cannot be read.
pub fn record_lines(
    trace: &Trace,
    stream: StreamId,
    range: Range<u64>,
) -> impl Iterator<Item = Result<String, TraceError>> + '_ {
    let state = trace.streams().get(stream.index());
    let first = state.and_then(|s| s.block_of(Ordinal(range.start)));
    let blocks = match (state, first) {
        (Some(state), Some(first)) => first..state.blocks().len(),
        _ => 0..0,
    };
    let missing = state
        .is_none()
        .then_some(Err(TraceError::NoSuchStream(stream)));
    let end = range.end;
    let blocks = blocks.take_while(move |&index| {
        state
            .and_then(|s| s.blocks().get(index))
            .is_some_and(|b| b.first_ordinal < end)
    });
    let mut failed = false;
    let lines = blocks.map_while(move |index| {
        if failed {
            return None;
        }
        match trace.block(stream, index, crate::Columns::ALL) {
            Ok(block) => {
                let wanted = block
                    .records()
                    .filter(|(ordinal, _)| range.contains(&ordinal.0));
                Some(
                    wanted
                        .filter_map(|(o, r)| Some(Ok(record_line(state?, o, &r))))
                        .collect::<Vec<_>>(),
                )
            }
            Err(error) => {
                failed = true;
                Some(vec![Err(error)])
            }
        }
    });
    missing.into_iter().chain(lines.flatten())
}

/// The line of one record.
#[must_use]
pub fn record_line(stream: &Stream, ordinal: Ordinal, record: &Record) -> String {
    let mut line = String::with_capacity(160);
    let (time_ns, thread) = match record {
        Record::OpCall(call) => (call.start_ns, call.thread),
        Record::Other(moment) => (moment.time_ns, moment.thread),
    };
    let (seconds, nanoseconds) = (time_ns / 1_000_000_000, time_ns % 1_000_000_000);
    let written = write!(
        line,
        "{} {ordinal} {seconds}.{nanoseconds:09} t{thread} ",
        stream.id()
    )
    .and_then(|()| match record {
        Record::OpCall(call) => call_text(&mut line, stream.dictionary(), call),
        Record::Other(moment) => event_text(&mut line, stream.dictionary(), &moment.event),
    });
    debug_assert!(written.is_ok(), "writing to a string cannot fail");
    line
}

/// Elements of a value that are shown.
const SHOWN_ELEMENTS: usize = 16;

/// The line of a kept value: stream, `value`, ordinal of its call, what it is of, dtype and shape, and its first elements.
#[must_use]
pub fn value_line(stream: &Stream, value: &Value) -> String {
    let dictionary = stream.dictionary();
    let watch = dictionary.watch(value.watch);
    let module = watch
        .and_then(|w| w.module)
        .and_then(|m| dictionary.module(m))
        .map_or("", |m| m.name.as_str());
    let what = watch.map_or("", |w| w.what.as_str());
    let shape: Vec<String> = value.shape.iter().map(u64::to_string).collect();
    let about = format!(
        "{} value {} {module} {what:?} {}[{}]",
        stream.id(),
        value.ordinal,
        value.dtype.name(),
        shape.join(",")
    );
    let numbers = |numbers: Vec<f64>| {
        let shown: Vec<String> = numbers
            .iter()
            .take(SHOWN_ELEMENTS)
            .map(f64::to_string)
            .collect();
        let more = if numbers.len() > SHOWN_ELEMENTS {
            " ..."
        } else {
            ""
        };
        format!("{}{more}", shown.join(" "))
    };
    match (&value.elements, value.to_f64()) {
        (Elements::Lost, _) => format!("{about} lost"),
        (Elements::Bits(_), Some(all)) => format!("{about} bits {}", numbers(all)),
        (_, Some(all)) => format!("{about} raw {}", numbers(all)),
        (Elements::Raw(bytes) | Elements::Bits(bytes), None) => {
            format!("{about} raw {} bytes", bytes.len())
        }
    }
}

/// The line of a definition.
#[must_use]
pub fn definition_line(stream: StreamId, definition: &Definition) -> String {
    match definition {
        Definition::Text(id, def) => format!("{stream} text {id} {def:?}"),
        Definition::Op(id, def) => {
            let arguments: Vec<String> = def
                .arguments
                .iter()
                .map(|a| {
                    format!(
                        "{}{} {}{}",
                        if a.keyword_only { "*" } else { "" },
                        a.type_name,
                        a.name,
                        a.default
                            .as_ref()
                            .map_or(String::new(), |d| format!("={d}"))
                    )
                })
                .collect();
            let returns: Vec<&str> = def.returns.iter().map(|r| r.type_name.as_str()).collect();
            format!(
                "{stream} op {id} {}({}) -> ({})",
                def.qualified_name(),
                arguments.join(", "),
                returns.join(", ")
            )
        }
        Definition::Signature(id, def) => {
            let tensors: Vec<String> = def.tensors.iter().map(tensor_text).collect();
            format!(
                "{stream} signature {id} op={} scope={} stage={} flags={} inputs={} tensors=[{}] arguments={:?} outputs={:?}",
                def.op,
                def.scope,
                def.stage.name(),
                flags_text(def.flags),
                def.inputs,
                tensors.join(" "),
                def.arguments,
                def.outputs
            )
        }
        Definition::Scope(id, def) => {
            let parent = def.parent.map_or("none".to_owned(), |p| p.to_string());
            format!(
                "{stream} scope {id} {} parent={parent} module={}",
                def.name,
                option(def.module)
            )
        }
        Definition::Module(id, def) => {
            let spiking = if def.spiking { " spiking" } else { "" };
            format!(
                "{stream} module {id} {} classes={}{spiking}",
                def.name,
                def.classes.join(",")
            )
        }
        Definition::Thread(id, def) => format!(
            "{stream} thread {id} native={} name={:?}",
            def.native_id, def.name
        ),
        Definition::Pattern(id, def) => format!("{stream} pattern {id} {}", pattern_text(def, &[])),
        Definition::Watch(id, def) => format!(
            "{stream} watch {id} {:?} module={}",
            def.what,
            option(def.module)
        ),
    }
}

fn option<T: fmt::Display>(value: Option<T>) -> String {
    value.map_or("none".to_owned(), |v| v.to_string())
}

fn flags_text(flags: u32) -> String {
    const NAMES: [(u32, &str); 8] = [
        (call_flags::GRAD_MODE, "grad"),
        (call_flags::INFERENCE_MODE, "inference"),
        (call_flags::NOT_EXECUTED, "not_executed"),
        (call_flags::ACCUMULATION, "accumulation"),
        (call_flags::TRAINING, "training"),
        (call_flags::UNATTRIBUTED, "unattributed"),
        (call_flags::STRUCTURE_LOST, "structure_lost"),
        (call_flags::NESTED, "nested"),
    ];
    let names: Vec<&str> = NAMES
        .iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, name)| *name)
        .collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(",")
    }
}

/// `float32[8,16]`, with the device where it is not the CPU.
fn tensor_text(tensor: &TensorMeta) -> String {
    let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
    let device = if tensor.device.kind == 0 {
        String::new()
    } else {
        format!("@{}", tensor.device.name())
    };
    format!("{}[{}]{device}", tensor.dtype.name(), shape.join(","))
}

fn text(dictionary: &Dictionary, id: TextId) -> String {
    dictionary
        .text(id)
        .map_or_else(|| format!("text {id}"), |t| format!("{t:?}"))
}

fn module(dictionary: &Dictionary, id: ModuleId) -> String {
    dictionary
        .module(id)
        .map_or_else(|| format!("module {id}"), |m| m.name.clone())
}

fn scope(dictionary: &Dictionary, id: ScopeId) -> String {
    dictionary
        .scope(id)
        .map_or_else(|| format!("scope {id}"), |s| s.name.clone())
}

fn tensor_list(tensors: &[TensorId]) -> String {
    let ids: Vec<String> = tensors.iter().map(|t| format!("#{t}")).collect();
    ids.join(",")
}

/// Prints a call's arguments, taking payload words as it goes.
struct Arguments<'a> {
    dictionary: &'a Dictionary,
    signature: &'a SignatureDef,
    call: &'a OpCall,
    payload: std::slice::Iter<'a, u64>,
}

impl Arguments<'_> {
    fn word(&mut self) -> u64 {
        self.payload.next().copied().unwrap_or(0)
    }

    fn float(&mut self) -> String {
        format!("{:?}", f64::from_bits(self.word()))
    }

    fn tensor(&mut self, index: u16) -> String {
        let place = usize::from(index);
        let Some(meta) = self.signature.tensors.get(place) else {
            return format!("tensor {index}");
        };
        if meta.is(tensor_flags::WRAPPED_NUMBER) {
            let value = match (meta.dtype.is_complex(), meta.dtype.is_float()) {
                (true, _) => format!("{}+{}j", self.float(), self.float()),
                (_, true) => self.float(),
                _ => self.word().cast_signed().to_string(),
            };
            return format!("{value}({})", meta.dtype.name());
        }
        let storage = self
            .call
            .storages
            .get(place)
            .map_or(String::new(), |s| format!("@s{s}"));
        let tensor = self
            .call
            .tensors
            .get(place)
            .map_or(String::new(), |t| format!("#{t}"));
        format!("{}{storage}{tensor}", tensor_text(meta))
    }

    fn argument(&mut self, argument: &Argument) -> String {
        match argument {
            Argument::None => "None".to_owned(),
            Argument::Tensor(i) => self.tensor(*i),
            Argument::TensorList(list) => {
                let items: Vec<String> = list
                    .iter()
                    .map(|i| i.map_or("None".to_owned(), |i| self.tensor(i)))
                    .collect();
                format!("[{}]", items.join(" "))
            }
            Argument::Int(v) => v.to_string(),
            Argument::IntPayload => self.word().cast_signed().to_string(),
            Argument::IntList(v) => format!("{v:?}").replace(' ', ""),
            Argument::Float(v) => format!("{v:?}"),
            Argument::FloatPayload => self.float(),
            Argument::FloatListPayload(n) => {
                let items: Vec<String> = (0..*n).map(|_| self.float()).collect();
                format!("[{}]", items.join(","))
            }
            Argument::ComplexPayload => format!("{}+{}j", self.float(), self.float()),
            Argument::Bool(v) => v.to_string(),
            Argument::BoolList(v) => format!("{v:?}").replace(' ', ""),
            Argument::Text(id) => text(self.dictionary, *id),
            Argument::TextPayload => {
                let id = TextId(u32::try_from(self.word()).unwrap_or(u32::MAX));
                text(self.dictionary, id)
            }
            Argument::DType(d) => d.name().to_owned(),
            Argument::Device(d) => d.name(),
            Argument::Enumerator(v) => format!("enum:{v}"),
            Argument::Opaque(id) => format!("<{}>", text(self.dictionary, *id)),
        }
    }
}

fn call_text(out: &mut String, dictionary: &Dictionary, call: &OpCall) -> fmt::Result {
    match dictionary.signature(call.signature) {
        Some(signature) => signature_text(out, dictionary, signature, call)?,
        None => write!(out, "call signature {}", SignatureId(call.signature.0))?,
    }
    write!(out, " duration={}ns", call.duration_ns)?;
    if call.sequence_number >= 0 {
        write!(out, " seq={}", call.sequence_number)?;
    }
    match dictionary.pattern(call.pattern) {
        Some(pattern) if pattern.entries.is_empty() => Ok(()),
        Some(pattern) => write!(out, " stats={}", pattern_text(pattern, &call.statistics)),
        None => write!(out, " stats=pattern {}", PatternId(call.pattern.0)),
    }
}

fn signature_text(
    out: &mut String,
    dictionary: &Dictionary,
    signature: &SignatureDef,
    call: &OpCall,
) -> fmt::Result {
    let op = dictionary.op(signature.op);
    write!(
        out,
        "call {}",
        op.map_or_else(
            || format!("op {}", signature.op),
            crate::OpDef::qualified_name
        )
    )?;
    let mut printer = Arguments {
        dictionary,
        signature,
        call,
        payload: call.payload.iter(),
    };
    for (i, argument) in signature.arguments.iter().enumerate() {
        let value = printer.argument(argument);
        match op.and_then(|o| o.arguments.get(i)) {
            Some(def) => write!(out, " {}={value}", def.name)?,
            None => write!(out, " {value}")?,
        }
    }
    if !signature.outputs.is_empty() {
        out.push_str(" ->");
        for output in &signature.outputs {
            let value = printer.argument(output);
            write!(out, " {value}")?;
        }
    }
    write!(
        out,
        " scope={} stage={}",
        scope(dictionary, signature.scope),
        signature.stage.name()
    )?;
    if let Some(name) = signature.stage_name {
        write!(out, "({})", text(dictionary, name))?;
    }
    if signature.flags != 0 {
        write!(out, " flags={}", flags_text(signature.flags))?;
    }
    Ok(())
}

const fn field_name(field: u32) -> &'static str {
    match field {
        fields::NONZEROS => "nonzeros",
        fields::FAN_OUT_NONZEROS => "fan_out_nonzeros",
        fields::PRODUCT_SUM => "product_sum",
        fields::NONEMPTY_ROWS => "nonempty_rows",
        fields::NONEMPTY_COLUMNS => "nonempty_columns",
        fields::NONEMPTY_OUTPUTS => "nonempty_outputs",
        fields::ACTIVE_SITES => "active_sites",
        fields::ACTIVE_ROWS => "active_rows",
        fields::ACTIVE_PATCHES_4 => "active_patches_4",
        fields::ACTIVE_PATCHES_16 => "active_patches_16",
        fields::ACTIVE_PATCHES_32 => "active_patches_32",
        fields::ACTIVE_PATCHES_64 => "active_patches_64",
        fields::ACTIVE_PATCHES_128 => "active_patches_128",
        fields::ACTIVE_PATCHES_256 => "active_patches_256",
        fields::DEVICE_TIME => "device_time_ns",
        fields::SUM => "sum",
        fields::MINIMUM => "minimum",
        fields::MAXIMUM => "maximum",
        fields::FAN_OUT_SUM => "fan_out_sum",
        _ => "unknown",
    }
}

fn field_value(field: u32, word: u64) -> String {
    if fields::is_integer(field) {
        word.to_string()
    } else {
        format!("{:?}", f64::from_bits(word))
    }
}

fn operand_text(operand: Operand, when: When) -> String {
    let operand = match operand {
        Operand::Tensor(i) => i.to_string(),
        Operand::Product => "product".to_owned(),
        Operand::Channels(block) => format!("channels{}", u64::from(block) * 4),
        Operand::Call => "call".to_owned(),
    };
    if when == When::After {
        format!("{operand}'")
    } else {
        operand
    }
}

const fn binary_text(binary: Option<bool>) -> &'static str {
    match binary {
        Some(true) => ",binary",
        Some(false) => ",not_binary",
        None => "",
    }
}

/// `0:binary,nonzeros=31;1:not_taken(layout)`; a prime behind the operand says "after the op". Without words, only the names of the fields.
fn pattern_text(pattern: &Pattern, words: &[u64]) -> String {
    let mut words = words.iter();
    let entries = pattern.entries.iter().map(|e| {
        let state = match e.state {
            State::Present => "",
            State::Pending => ",pending",
            State::NotTaken(why) => match why {
                NotTaken::Layout => ",not_taken(layout)",
                NotTaken::LazyBit => ",not_taken(lazy_bit)",
                NotTaken::Subclass => ",not_taken(subclass)",
                NotTaken::Device => ",not_taken(device)",
                NotTaken::DType => ",not_taken(dtype)",
                NotTaken::NoData => ",not_taken(no_data)",
                NotTaken::Capturing => ",not_taken(capturing)",
                NotTaken::DeviceFull => ",not_taken(device_full)",
            },
            State::Lost => ",lost",
        };
        let numbers: String = fields::each(e.fields)
            .map(|field| match words.next() {
                Some(&word) => format!(",{}={}", field_name(field), field_value(field, word)),
                None => format!(",{}", field_name(field)),
            })
            .collect();
        format!(
            "{}:{}",
            operand_text(e.operand, e.when),
            format!("{state}{}{numbers}", binary_text(e.binary)).trim_start_matches(',')
        )
    });
    entries.collect::<Vec<_>>().join(";")
}

fn late_text(late: &LateStatistic) -> String {
    let numbers: String = fields::each(late.fields)
        .zip(&late.values)
        .map(|(f, &w)| format!(",{}={}", field_name(f), field_value(f, w)))
        .collect();
    let lost = if late.lost { ",lost" } else { "" };
    let all = format!("{lost}{}{numbers}", binary_text(late.binary));
    format!(
        "{}:{}",
        operand_text(late.operand, late.when),
        all.trim_start_matches(',')
    )
}

fn event_text(out: &mut String, dictionary: &Dictionary, event: &Event) -> fmt::Result {
    match event {
        Event::ModuleEnter {
            call,
            module: id,
            arguments,
        } => {
            write!(
                out,
                "module_enter {} call={call} arguments=[{}]",
                module(dictionary, *id),
                tensor_list(arguments)
            )
        }
        Event::ModuleExit {
            call,
            module: id,
            results,
        } => {
            write!(
                out,
                "module_exit {} call={call} results=[{}]",
                module(dictionary, *id),
                tensor_list(results)
            )
        }
        Event::StateAssign {
            module: id,
            attribute,
            tensor,
        } => {
            write!(
                out,
                "state_assign {} {}=#{tensor}",
                module(dictionary, *id),
                text(dictionary, *attribute)
            )
        }
        Event::RangeEnter { name } => write!(out, "range_enter {}", text(dictionary, *name)),
        Event::RangeExit { name } => write!(out, "range_exit {}", text(dictionary, *name)),
        Event::StageChange { name } => {
            write!(
                out,
                "stage_change {}",
                name.map_or("none".to_owned(), |n| text(dictionary, n))
            )
        }
        Event::StepMark { step, source } => {
            let source = match source {
                StepSource::Optimizer => "optimizer",
                StepSource::RootCall => "root_call",
                StepSource::Program => "program",
            };
            write!(out, "step_mark {step} source={source}")
        }
        Event::Statistics { call, values } => {
            let values: Vec<String> = values.iter().map(late_text).collect();
            write!(out, "statistics call={call} {}", values.join(";"))
        }
        Event::StorageBorn { storage, bytes } => {
            write!(out, "storage_born s{storage} bytes={bytes}")
        }
        Event::StorageDied { storage } => write!(out, "storage_died s{storage}"),
        Event::TensorDied { tensor } => write!(out, "tensor_died #{tensor}"),
        Event::Opaque { name, duration_ns } => write!(
            out,
            "opaque {} duration={duration_ns}ns",
            text(dictionary, *name)
        ),
        Event::Drop {
            records,
            from_ns,
            until_ns,
            reason,
        } => {
            let reason = match reason {
                DropReason::RingFull => "ring_full",
                DropReason::DaemonGone => "daemon_gone",
                DropReason::WriteFailed => "write_failed",
            };
            write!(
                out,
                "drop records={records} from={from_ns}ns until={until_ns}ns reason={reason}"
            )
        }
        Event::Fact {
            module: id,
            key,
            value,
        } => {
            let about = id.map_or("program".to_owned(), |m| module(dictionary, m));
            // One line per record, whatever the value holds.
            write!(
                out,
                "fact {about} {}={}",
                text(dictionary, *key),
                value.escape_debug()
            )
        }
        Event::Sample { series, value } => {
            write!(out, "sample {}={value:?}", text(dictionary, *series))
        }
        Event::Samples { count } => write!(out, "samples {count}"),
        Event::Disabled { reason } => write!(out, "disabled {reason:?}"),
        Event::Paused { reason } => write!(out, "paused reason={}", reason.name()),
        Event::Resumed => write!(out, "resumed"),
        Event::Mark { text } => write!(out, "mark {text:?}"),
    }
}
