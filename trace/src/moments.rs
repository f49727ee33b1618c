//! The columns of moments: records that are not op calls. Module calls are a tenth to a fifth of all records, so they have a
//! column of their own in which what repeats from step to step repeats byte by byte.

use std::collections::HashMap;

use crate::bytes::{Cursor, add_difference, difference, len64, put_varint};
use crate::column::{predicted, put_predicted, put_small, small};
use crate::error::Corrupt;
use crate::ids::{CallId, ModuleId, Ordinal, StorageId, TensorId, TextId, ThreadId};
use crate::record::{DropReason, Event, LateStatistic, Moment, PauseReason, StepSource};
use crate::statistics::{Operand, When};

/// The columns, before compression.
#[derive(Clone, Debug, Default)]
pub(crate) struct MomentColumns {
    /// One byte per moment: the tag of its event.
    pub(crate) tags: Vec<u8>,
    /// Small numbers.
    pub(crate) threads: Vec<u8>,
    /// Predicted differences to the moment before; the key is the pair of tag and module.
    pub(crate) times: Vec<u8>,
    /// Of tags 0 and 1.
    pub(crate) modules: Vec<u8>,
    /// Of all other tags: a length, then as many bytes.
    pub(crate) others: Vec<u8>,
}

/// What encoder and decoder remember of the moments before, within one block.
#[derive(Debug, Default)]
struct State {
    next_call: u64,
    newest_tensor: u64,
    newest_storage: u64,
    late_call: u64,
    next_step: u64,
    /// The calls that are open, by thread.
    open: HashMap<u32, Vec<(u64, u32)>>,
}

impl State {
    fn enter(&mut self, thread: ThreadId, call: u64, module: u32) {
        self.next_call = self.next_call.max(call.wrapping_add(1));
        self.open.entry(thread.0).or_default().push((call, module));
    }

    fn exit(&mut self, thread: ThreadId) -> (u64, u32) {
        self.open
            .get_mut(&thread.0)
            .and_then(Vec::pop)
            .unwrap_or((0, 0))
    }

    fn put_tensor(&mut self, tensor: TensorId, out: &mut Vec<u8>) {
        put_varint(out, difference(self.newest_tensor, tensor.0));
        self.newest_tensor = self.newest_tensor.max(tensor.0);
    }

    fn tensor(&mut self, cursor: &mut Cursor<'_>) -> Result<TensorId, Corrupt> {
        let tensor = back(self.newest_tensor, cursor.varint()?);
        self.newest_tensor = self.newest_tensor.max(tensor);
        Ok(TensorId(tensor))
    }

    fn put_tensors(&mut self, tensors: &[TensorId], out: &mut Vec<u8>) {
        put_varint(out, len64(tensors.len()));
        for &tensor in tensors {
            self.put_tensor(tensor, out);
        }
    }

    fn tensors(&mut self, cursor: &mut Cursor<'_>) -> Result<Vec<TensorId>, Corrupt> {
        let count = cursor.count(1)?;
        (0..count).map(|_| self.tensor(cursor)).collect()
    }
}

/// The `b` that gave `difference(a, b)`.
const fn back(a: u64, difference: u64) -> u64 {
    a.wrapping_sub(crate::bytes::unzigzag(difference).cast_unsigned())
}

/// The tag of an event: its place in the enumeration.
pub(crate) const fn tag(event: &Event) -> u8 {
    match event {
        Event::ModuleEnter { .. } => 0,
        Event::ModuleExit { .. } => 1,
        Event::StateAssign { .. } => 2,
        Event::RangeEnter { .. } => 3,
        Event::RangeExit { .. } => 4,
        Event::StageChange { .. } => 5,
        Event::StepMark { .. } => 6,
        Event::Statistics { .. } => 7,
        Event::StorageBorn { .. } => 8,
        Event::StorageDied { .. } => 9,
        Event::TensorDied { .. } => 10,
        Event::Opaque { .. } => 11,
        Event::Drop { .. } => 12,
        Event::Fact { .. } => 13,
        Event::Sample { .. } => 14,
        Event::Samples { .. } => 15,
        Event::Disabled { .. } => 16,
        Event::Paused { .. } => 17,
        Event::Resumed => 18,
        Event::Mark { .. } => 19,
    }
}
/// First tag that this version does not know.
const UNKNOWN_TAG: u8 = 20;

/// What the times of moments are predicted by.
#[derive(Default)]
struct Keys {
    keys: HashMap<(u8, u32), usize>,
}

impl Keys {
    fn of(&mut self, tag: u8, event: Option<&Event>) -> usize {
        let module = match event {
            Some(Event::ModuleEnter { module, .. } | Event::ModuleExit { module, .. }) => module.0,
            _ => 0,
        };
        let next = self.keys.len();
        *self.keys.entry((tag, module)).or_insert(next)
    }
}

/// Encodes moments; `base_ns` is the block's first time.
pub(crate) fn encode(moments: &[Moment], base_ns: u64) -> MomentColumns {
    let mut columns = MomentColumns::default();
    let mut state = State::default();
    let mut keys = Keys::default();
    let mut scratch = Vec::new();
    let mut key_of = Vec::with_capacity(moments.len());
    let mut steps = Vec::with_capacity(moments.len());
    let mut before = base_ns;
    for moment in moments {
        let tag = tag(&moment.event);
        columns.tags.push(tag);
        key_of.push(keys.of(tag, Some(&moment.event)));
        steps.push(moment.time_ns.wrapping_sub(before).cast_signed());
        before = moment.time_ns;
        if tag <= 1 {
            put_event(
                &moment.event,
                moment.thread,
                &mut state,
                &mut columns.modules,
            );
        } else {
            scratch.clear();
            put_event(&moment.event, moment.thread, &mut state, &mut scratch);
            put_varint(&mut columns.others, len64(scratch.len()));
            columns.others.extend(&scratch);
        }
    }
    let threads: Vec<u32> = moments.iter().map(|m| m.thread.0).collect();
    put_small(&threads, &mut columns.threads);
    put_predicted(
        key_of.into_iter(),
        &steps,
        keys.keys.len(),
        &mut columns.times,
    );
    columns
}

/// Decodes as many moments as there are tags. `None` stands for one of a kind that a later minor version has added.
pub(crate) fn decode(
    columns: &MomentColumns,
    base_ns: u64,
) -> Result<Vec<Option<Moment>>, Corrupt> {
    let count = columns.tags.len();
    let threads = small(&columns.threads, count)?;
    let mut modules = Cursor::new(&columns.modules);
    let mut others = Cursor::new(&columns.others);
    let mut state = State::default();
    let mut keys = Keys::default();
    let mut key_of = Vec::with_capacity(count);
    let mut events = Vec::with_capacity(count);
    for (&tag, &thread) in columns.tags.iter().zip(&threads) {
        let event = if tag <= 1 {
            Some(event(tag, ThreadId(thread), &mut state, &mut modules)?)
        } else {
            let length = others.count(1)?;
            let mut cursor = Cursor::new(others.take(length)?);
            // A later minor version may have added fields behind those that are known, as well as tags.
            if tag < UNKNOWN_TAG {
                Some(event(tag, ThreadId(thread), &mut state, &mut cursor)?)
            } else {
                None
            }
        };
        key_of.push(keys.of(tag, event.as_ref()));
        events.push(event);
    }
    if !modules.is_empty() || !others.is_empty() {
        return Err(Corrupt::from("the columns of moments have bytes left over"));
    }
    let steps = predicted(&columns.times, key_of.into_iter(), count, keys.keys.len())?;
    let mut time_ns = base_ns;
    Ok(events
        .into_iter()
        .zip(threads)
        .zip(steps)
        .map(|((event, thread), step)| {
            time_ns = time_ns.wrapping_add(step.cast_unsigned());
            event.map(|event| Moment {
                time_ns,
                thread: ThreadId(thread),
                event,
            })
        })
        .collect())
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    put_varint(out, len64(text.len()));
    out.extend(text.as_bytes());
}

fn text(cursor: &mut Cursor<'_>) -> Result<String, Corrupt> {
    let length = cursor.count(1)?;
    let bytes = cursor.take(length)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| Corrupt::from("a text is not UTF-8"))
}

/// 0 for `None`, else one more than the number.
fn put_option(value: Option<u32>, out: &mut Vec<u8>) {
    put_varint(out, value.map_or(0, |v| u64::from(v) + 1));
}

fn option(cursor: &mut Cursor<'_>) -> Result<Option<u32>, Corrupt> {
    match cursor.varint()?.checked_sub(1) {
        None => Ok(None),
        Some(v) => u32::try_from(v)
            .map(Some)
            .map_err(|_| Corrupt::from("an id is larger than 32 bits")),
    }
}

fn put_event(event: &Event, thread: ThreadId, state: &mut State, out: &mut Vec<u8>) {
    match event {
        Event::ModuleEnter {
            call,
            module,
            arguments,
        } => {
            put_varint(out, difference(call.0, state.next_call));
            put_varint(out, u64::from(module.0));
            state.put_tensors(arguments, out);
            state.enter(thread, call.0, module.0);
        }
        Event::ModuleExit {
            call,
            module,
            results,
        } => {
            let (open_call, open_module) = state.exit(thread);
            put_varint(out, difference(call.0, open_call));
            put_varint(out, difference(u64::from(module.0), u64::from(open_module)));
            state.put_tensors(results, out);
        }
        Event::StateAssign {
            module,
            attribute,
            tensor,
        } => {
            put_varint(out, u64::from(module.0));
            put_varint(out, u64::from(attribute.0));
            state.put_tensor(*tensor, out);
        }
        Event::RangeEnter { name } | Event::RangeExit { name } => {
            put_varint(out, u64::from(name.0))
        }
        Event::StageChange { name } => put_option(name.map(|n| n.0), out),
        Event::StepMark { step, source } => {
            put_varint(out, difference(*step, state.next_step));
            state.next_step = step.wrapping_add(1);
            out.push(match source {
                StepSource::Optimizer => 0,
                StepSource::RootCall => 1,
                StepSource::Program => 2,
            });
        }
        Event::Statistics { call, values } => {
            put_varint(out, difference(call.0, state.late_call));
            state.late_call = call.0;
            put_varint(out, len64(values.len()));
            for late in values {
                put_late(late, out);
            }
        }
        Event::StorageBorn { storage, bytes } => {
            put_varint(out, difference(storage.0, state.newest_storage));
            put_varint(out, *bytes);
            state.newest_storage = state.newest_storage.max(storage.0);
        }
        Event::StorageDied { storage } => {
            put_varint(out, difference(state.newest_storage, storage.0))
        }
        Event::TensorDied { tensor } => state.put_tensor(*tensor, out),
        Event::Opaque { name, duration_ns } => {
            put_varint(out, u64::from(name.0));
            put_varint(out, *duration_ns);
        }
        Event::Drop {
            records,
            from_ns,
            until_ns,
            reason,
        } => {
            put_varint(out, *records);
            put_varint(out, *from_ns);
            put_varint(out, difference(*until_ns, *from_ns));
            out.push(match reason {
                DropReason::RingFull => 0,
                DropReason::DaemonGone => 1,
                DropReason::WriteFailed => 2,
            });
        }
        Event::Fact { module, key, value } => {
            put_option(module.map(|m| m.0), out);
            put_varint(out, u64::from(key.0));
            put_text(value, out);
        }
        Event::Sample { series, value } => {
            put_varint(out, u64::from(series.0));
            out.extend(value.to_bits().to_le_bytes());
        }
        Event::Samples { count } => put_varint(out, *count),
        Event::Disabled { reason } => put_text(reason, out),
        Event::Paused { reason } => out.push(match reason {
            PauseReason::Asked => 0,
            PauseReason::Schedule => 1,
            PauseReason::Expired => 2,
        }),
        Event::Resumed => {}
        Event::Mark { text } => put_text(text, out),
    }
}

fn event(
    tag: u8,
    thread: ThreadId,
    state: &mut State,
    cursor: &mut Cursor<'_>,
) -> Result<Event, Corrupt> {
    Ok(match tag {
        0 => {
            let call = add_difference(state.next_call, cursor.varint()?);
            let module = cursor.varint_u32()?;
            let arguments = state.tensors(cursor)?;
            state.enter(thread, call, module);
            Event::ModuleEnter {
                call: CallId(call),
                module: ModuleId(module),
                arguments,
            }
        }
        1 => {
            let (open_call, open_module) = state.exit(thread);
            let call = CallId(add_difference(open_call, cursor.varint()?));
            let module = u32::try_from(add_difference(u64::from(open_module), cursor.varint()?))
                .map_err(|_| Corrupt::from("a module id is larger than 32 bits"))?;
            Event::ModuleExit {
                call,
                module: ModuleId(module),
                results: state.tensors(cursor)?,
            }
        }
        2 => Event::StateAssign {
            module: ModuleId(cursor.varint_u32()?),
            attribute: TextId(cursor.varint_u32()?),
            tensor: state.tensor(cursor)?,
        },
        3 => Event::RangeEnter {
            name: TextId(cursor.varint_u32()?),
        },
        4 => Event::RangeExit {
            name: TextId(cursor.varint_u32()?),
        },
        5 => Event::StageChange {
            name: option(cursor)?.map(TextId),
        },
        6 => {
            let step = add_difference(state.next_step, cursor.varint()?);
            state.next_step = step.wrapping_add(1);
            let source = match cursor.u8()? {
                0 => StepSource::Optimizer,
                1 => StepSource::RootCall,
                2 => StepSource::Program,
                other => {
                    return Err(Corrupt::from(format!(
                        "a step mark has the unknown source {other}"
                    )));
                }
            };
            Event::StepMark { step, source }
        }
        7 => {
            let call = add_difference(state.late_call, cursor.varint()?);
            state.late_call = call;
            let count = cursor.count(3)?;
            let values = (0..count).map(|_| late(cursor)).collect::<Result<_, _>>()?;
            Event::Statistics {
                call: Ordinal(call),
                values,
            }
        }
        8 => {
            let storage = add_difference(state.newest_storage, cursor.varint()?);
            state.newest_storage = state.newest_storage.max(storage);
            Event::StorageBorn {
                storage: StorageId(storage),
                bytes: cursor.varint()?,
            }
        }
        9 => Event::StorageDied {
            storage: StorageId(back(state.newest_storage, cursor.varint()?)),
        },
        10 => Event::TensorDied {
            tensor: state.tensor(cursor)?,
        },
        11 => Event::Opaque {
            name: TextId(cursor.varint_u32()?),
            duration_ns: cursor.varint()?,
        },
        12 => {
            let records = cursor.varint()?;
            let from_ns = cursor.varint()?;
            let until_ns = add_difference(from_ns, cursor.varint()?);
            let reason = match cursor.u8()? {
                0 => DropReason::RingFull,
                1 => DropReason::DaemonGone,
                2 => DropReason::WriteFailed,
                other => {
                    return Err(Corrupt::from(format!(
                        "a drop has the unknown reason {other}"
                    )));
                }
            };
            Event::Drop {
                records,
                from_ns,
                until_ns,
                reason,
            }
        }
        13 => Event::Fact {
            module: option(cursor)?.map(ModuleId),
            key: TextId(cursor.varint_u32()?),
            value: text(cursor)?,
        },
        14 => Event::Sample {
            series: TextId(cursor.varint_u32()?),
            value: f64::from_bits(cursor.u64()?),
        },
        15 => Event::Samples {
            count: cursor.varint()?,
        },
        16 => Event::Disabled {
            reason: text(cursor)?,
        },
        17 => Event::Paused {
            reason: match cursor.u8()? {
                0 => PauseReason::Asked,
                1 => PauseReason::Schedule,
                2 => PauseReason::Expired,
                other => {
                    return Err(Corrupt::from(format!(
                        "a pause has the unknown reason {other}"
                    )));
                }
            },
        },
        18 => Event::Resumed,
        19 => Event::Mark {
            text: text(cursor)?,
        },
        other => {
            return Err(Corrupt::from(format!(
                "a moment has the unknown tag {other}"
            )));
        }
    })
}

/// The code of the first block of channels among the operands of late statistics: behind those of all tensors.
const CHANNELS: u64 = 1 + (1 << 16);
/// The code of the call itself: behind those of all blocks of channels.
const CALL: u64 = CHANNELS + (1 << 16);

fn put_late(late: &LateStatistic, out: &mut Vec<u8>) {
    put_varint(
        out,
        match late.operand {
            Operand::Product => 0,
            Operand::Tensor(i) => u64::from(i) + 1,
            Operand::Channels(block) => CHANNELS + u64::from(block),
            Operand::Call => CALL,
        },
    );
    let when = u8::from(late.when == When::After);
    let binary = late.binary.map_or(0, |b| 1 + u8::from(b));
    out.push(when | binary << 1 | u8::from(late.lost) << 3);
    put_varint(out, u64::from(late.fields));
    put_varint(out, len64(late.values.len()));
    for &value in &late.values {
        put_varint(out, value);
    }
}

fn late(cursor: &mut Cursor<'_>) -> Result<LateStatistic, Corrupt> {
    let narrow = |code: u64| {
        u16::try_from(code)
            .map_err(|_| Corrupt::from("an operand of late statistics is none that there is"))
    };
    let operand = match cursor.varint()? {
        0 => Operand::Product,
        CALL => Operand::Call,
        code @ 1..CHANNELS => Operand::Tensor(narrow(code - 1)?),
        code => Operand::Channels(narrow(code - CHANNELS)?),
    };
    let bits = cursor.u8()?;
    let fields = cursor.varint_u32()?;
    let count = cursor.count(1)?;
    if count != fields.count_ones() as usize {
        return Err(Corrupt::from(
            "late statistics have another number of values than fields",
        ));
    }
    Ok(LateStatistic {
        operand,
        when: if bits & 1 == 0 {
            When::Before
        } else {
            When::After
        },
        binary: match bits >> 1 & 3 {
            0 => None,
            1 => Some(false),
            2 => Some(true),
            _ => return Err(Corrupt::from("late statistics have an unknown binariness")),
        },
        fields,
        values: (0..count)
            .map(|_| cursor.varint())
            .collect::<Result<_, _>>()?,
        lost: bits & 8 != 0,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number() -> impl Strategy<Value = u64> + Clone {
        (any::<u64>(), 0..64u32).prop_map(|(v, shift)| v >> shift)
    }

    fn tensors() -> impl Strategy<Value = Vec<TensorId>> {
        prop::collection::vec(number().prop_map(TensorId), 0..4)
    }

    fn late_statistic() -> impl Strategy<Value = LateStatistic> {
        let operand = prop_oneof![
            Just(Operand::Product),
            Just(Operand::Call),
            any::<u16>().prop_map(Operand::Tensor),
            any::<u16>().prop_map(Operand::Channels)
        ];
        (
            operand,
            any::<bool>(),
            any::<Option<bool>>(),
            any::<u32>(),
            any::<bool>(),
            prop::collection::vec(number(), 32),
        )
            .prop_map(|(operand, after, binary, fields, lost, mut values)| {
                values.truncate(fields.count_ones() as usize);
                LateStatistic {
                    operand,
                    when: if after { When::After } else { When::Before },
                    binary,
                    fields,
                    values,
                    lost,
                }
            })
    }

    pub(crate) fn any_event() -> impl Strategy<Value = Event> {
        let id = any::<u32>;
        prop_oneof![
            (number(), id(), tensors()).prop_map(|(c, m, arguments)| Event::ModuleEnter {
                call: CallId(c),
                module: ModuleId(m),
                arguments
            }),
            (number(), id(), tensors()).prop_map(|(c, m, results)| Event::ModuleExit {
                call: CallId(c),
                module: ModuleId(m),
                results
            }),
            (id(), id(), number()).prop_map(|(m, a, t)| Event::StateAssign {
                module: ModuleId(m),
                attribute: TextId(a),
                tensor: TensorId(t)
            }),
            id().prop_map(|n| Event::RangeEnter { name: TextId(n) }),
            id().prop_map(|n| Event::RangeExit { name: TextId(n) }),
            any::<Option<u32>>().prop_map(|n| Event::StageChange {
                name: n.map(TextId)
            }),
            (
                number(),
                prop::sample::select(vec![
                    StepSource::Optimizer,
                    StepSource::RootCall,
                    StepSource::Program
                ])
            )
                .prop_map(|(step, source)| Event::StepMark { step, source }),
            (number(), prop::collection::vec(late_statistic(), 0..3)).prop_map(|(call, values)| {
                Event::Statistics {
                    call: Ordinal(call),
                    values,
                }
            }),
            (number(), number()).prop_map(|(s, bytes)| Event::StorageBorn {
                storage: StorageId(s),
                bytes
            }),
            number().prop_map(|s| Event::StorageDied {
                storage: StorageId(s)
            }),
            number().prop_map(|t| Event::TensorDied {
                tensor: TensorId(t)
            }),
            (id(), number()).prop_map(|(n, duration_ns)| Event::Opaque {
                name: TextId(n),
                duration_ns
            }),
            (
                number(),
                number(),
                number(),
                prop::sample::select(vec![
                    DropReason::RingFull,
                    DropReason::DaemonGone,
                    DropReason::WriteFailed
                ])
            )
                .prop_map(|(records, from_ns, until_ns, reason)| Event::Drop {
                    records,
                    from_ns,
                    until_ns,
                    reason
                }),
            (any::<Option<u32>>(), id(), ".{0,20}").prop_map(|(m, k, value)| Event::Fact {
                module: m.map(ModuleId),
                key: TextId(k),
                value
            }),
            (id(), -1e300..1e300f64).prop_map(|(s, value)| Event::Sample {
                series: TextId(s),
                value
            }),
            number().prop_map(|count| Event::Samples { count }),
            ".{0,20}".prop_map(|reason| Event::Disabled { reason }),
            prop::sample::select(vec![
                PauseReason::Asked,
                PauseReason::Schedule,
                PauseReason::Expired
            ])
            .prop_map(|reason| Event::Paused { reason }),
            Just(Event::Resumed),
            ".{0,20}".prop_map(|text| Event::Mark { text }),
        ]
    }

    proptest! {
        #[test]
        fn moments_come_back(events in prop::collection::vec((number(), 0..3u32, any_event()), 0..60), base in number()) {
            let moments: Vec<Moment> =
                events.into_iter().map(|(time_ns, thread, event)| Moment { time_ns, thread: ThreadId(thread), event }).collect();
            let columns = encode(&moments, base);
            let decoded: Vec<Moment> = decode(&columns, base).unwrap().into_iter().flatten().collect();
            prop_assert_eq!(decoded, moments);
        }

        #[test]
        fn decoding_survives_anything(
            tags in prop::collection::vec(0..23u8, 0..30),
            threads in prop::collection::vec(any::<u8>(), 0..40),
            times in prop::collection::vec(any::<u8>(), 0..40),
            modules in prop::collection::vec(any::<u8>(), 0..100),
            others in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let count = tags.len();
            let decoded = decode(&MomentColumns { tags, threads, times, modules, others }, 0);
            prop_assert!(decoded.is_err() || decoded.unwrap().len() == count);
        }
    }

    #[test]
    fn moments_of_later_versions_are_left_out() {
        let known = Moment {
            time_ns: 7,
            thread: ThreadId(0),
            event: Event::Samples { count: 3 },
        };
        let mut columns = encode(&[known.clone(), known.clone()], 5);
        columns.tags[0] = 200;
        // The time of the second is predicted by its own tag, which is now another one than the first's.
        columns.times = vec![1, 4, 0];
        assert_eq!(decode(&columns, 5).unwrap(), [None, Some(known)]);
    }

    #[test]
    fn a_module_call_that_repeats_costs_the_same_bytes() {
        let step = |call: u64, time_ns: u64| {
            let (call, module, thread) = (CallId(call), ModuleId(3), ThreadId(0));
            [
                Moment {
                    time_ns,
                    thread,
                    event: Event::ModuleEnter {
                        call,
                        module,
                        arguments: vec![],
                    },
                },
                Moment {
                    time_ns: time_ns + 9,
                    thread,
                    event: Event::ModuleExit {
                        call,
                        module,
                        results: vec![],
                    },
                },
            ]
        };
        let moments: Vec<Moment> = (0..3).flat_map(|i| step(i, 100 * i)).collect();
        assert_eq!(encode(&moments, 0).modules, [0, 3, 0, 0, 0, 0].repeat(3));
    }
}
