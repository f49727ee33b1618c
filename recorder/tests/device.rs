//! Calls with operands on a device, from the hook's table to the file: pending records, late statistics, what is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use optape_recorder::abi::{
    self, ABI_VERSION, Call, NO_NODE, Operator, OperatorArgument, Plan, Tensor, word,
};
use optape_recorder::capture::{Capture, Preset, Settings, install_clock, install_device, table};
use optape_recorder::daemon::{InProcess, Recording, Settings as Daemon};
use optape_recorder::device::simulated::{Script, Simulated, SimulatedClock};
use optape_recorder::device::{CUDA, Found};
use optape_trace::{
    DType, Event, NotTaken, OpCall, Operand, Pattern, Record, State, StreamId, Trace, When, fields,
    verify,
};
use parking_lot::Mutex;

/// A device that counts zeros and ones of `f32` in host memory, with room for `places` answers.
fn device(places: usize) -> Arc<Mutex<Script>> {
    let script = Arc::new(Mutex::new(Script::default()));
    let simulated = Simulated::new(Arc::clone(&script), |job| {
        let mut found = Found::default();
        for (tally, item) in found
            .items
            .iter_mut()
            .zip(&job.items)
            .take(job.count as usize)
        {
            // SAFETY: the tests below hand over addresses of as many floats, which live until the call is over.
            let data = unsafe {
                std::slice::from_raw_parts(item.data as *const f32, item.elements as usize)
            };
            tally.nonzeros = data.iter().filter(|v| **v != 0.0).count() as u64;
            tally.other = u32::from(data.iter().any(|v| *v != 0.0 && *v != 1.0));
        }
        found.product = 77;
        found
    });
    install_device(0, Box::new(simulated), places);
    script
}

fn define(
    name: &std::ffi::CStr,
    overload: &std::ffi::CStr,
    arguments: &[(&std::ffi::CStr, bool)],
) -> Plan {
    define_op(name, overload, arguments, false)
}

/// `is_view`: what it returns is a view of its arguments.
fn define_op(
    name: &std::ffi::CStr,
    overload: &std::ffi::CStr,
    arguments: &[(&std::ffi::CStr, bool)],
    is_view: bool,
) -> Plan {
    let describe = |name: &std::ffi::CStr, written: bool| OperatorArgument {
        name: name.as_ptr(),
        type_name: c"Tensor".as_ptr(),
        default_value: ptr::null(),
        alias: if written || is_view { c"a" } else { c"" }.as_ptr(),
        keyword_only: 0,
        written: written.into(),
        reserved: [0; 6],
    };
    let described: Vec<_> = arguments.iter().map(|(n, w)| describe(n, *w)).collect();
    let returns = [describe(c"", false)];
    let operator = Operator {
        name: name.as_ptr(),
        overload: overload.as_ptr(),
        arguments: described.as_ptr(),
        argument_count: described.len() as u32,
        return_count: 1,
        returns: returns.as_ptr(),
    };
    let mut plan = Plan {
        op: 0,
        flags: 0,
        wild: ptr::null(),
    };
    // SAFETY: all texts and arrays live until the call is over.
    let code = unsafe { (table().define_op)(&raw const operator, &raw mut plan) };
    assert_eq!((code, table().abi_version), (0, ABI_VERSION));
    plan
}

fn tensor(data: &[f32], sizes: &'static [i64; 2], argument: u32) -> Tensor {
    static STRIDES: [i64; 2] = [2, 1];
    Tensor {
        implementation: data.as_ptr().cast(),
        storage: data.as_ptr().cast(),
        storage_base: data.as_ptr().cast(),
        data: ptr::null(),
        sizes: sizes.as_ptr(),
        strides: STRIDES.as_ptr(),
        storage_bytes: 4 * data.len() as u64,
        device_data: data.as_ptr() as u64,
        version: 0,
        flags: 0,
        dtype: DType::F32.0,
        device_kind: CUDA,
        device_index: 0,
        dim: 2,
        argument,
    }
}

fn words(tensors: &[Tensor]) -> Vec<u64> {
    let mut words = Vec::new();
    for tensor in tensors {
        let aux = tensor.dtype as u64 | u64::from(tensor.device_kind) << 8 | 2 << 24;
        words.extend([u64::from(word::TENSOR) | aux << 8, 2, 2, 2, 1]);
    }
    words
}

/// One call on this thread, as the hook makes it. `fails`: the kernel throws.
fn call(plan: &Plan, inputs: &[Tensor], outputs: &[Tensor], fails: bool) {
    call_running(plan, inputs, &[], outputs, || !fails);
}

/// The same, with `kernel`, which says whether it does not throw. `more`: words of arguments behind the tensors.
fn call_running(
    plan: &Plan,
    inputs: &[Tensor],
    more: &[u64],
    outputs: &[Tensor],
    kernel: impl FnOnce() -> bool,
) {
    let mut tensors = inputs.to_vec();
    let mut of_inputs = words(&tensors);
    of_inputs.extend_from_slice(more);
    let mut call = Call {
        op: plan.op,
        flags: 0,
        words: ptr::null(),
        word_count: 0,
        argument_words: of_inputs.len() as u32,
        payload: ptr::null(),
        payload_count: 0,
        tensor_count: inputs.len() as u32,
        tensors: tensors.as_ptr(),
        input_count: inputs.len() as u32,
        graph_task: 0,
        peek: 0,
        node: NO_NODE,
        node_thread: 0,
        accumulate: ptr::null(),
        thread: 1,
        start_ns: optape_recorder::clock::monotonic_ns(),
        end_ns: 0,
        capture: [0; 48],
    };
    call.words = of_inputs.as_ptr();
    call.word_count = of_inputs.len() as u32;
    // SAFETY: the call and all that it names live until here; the calls come in the hook's order.
    unsafe {
        if plan.flags & abi::plan::BEGIN != 0 {
            (table().begin)(&raw mut call);
        }
        if !kernel() {
            (table().abort)(&raw mut call);
            return;
        }
    }
    tensors.extend_from_slice(outputs);
    let mut all = of_inputs;
    all.extend(words(outputs));
    call.words = all.as_ptr();
    call.word_count = all.len() as u32;
    call.tensors = tensors.as_ptr();
    call.tensor_count = tensors.len() as u32;
    call.end_ns = optape_recorder::clock::monotonic_ns();
    // SAFETY: as above.
    unsafe { (table().end)(&raw mut call) };
}

/// A recording of `program` with these statistics.
fn record(
    directory: &Path,
    statistics: Preset,
    window: bool,
    program: impl FnOnce(),
) -> (PathBuf, Trace) {
    record_with(directory, statistics, window, false, program)
}

/// The same, with times of GPUs or not.
fn record_with(
    directory: &Path,
    statistics: Preset,
    window: bool,
    gpu_time: bool,
    program: impl FnOnce(),
) -> (PathBuf, Trace) {
    let path = directory.join(format!("{}-{window}.optape", statistics.name()));
    let recording = Recording::in_process(
        &path,
        InProcess {
            settings: Daemon {
                statistics,
                window: window.then(|| std::time::Duration::from_secs(600)),
                gpu_time,
                ..Daemon::default()
            },
            force: true,
            notice: Box::new(|text| panic!("{text}")),
        },
    )
    .unwrap();
    Capture::get()
        .start(Settings {
            run_directory: recording.directory().to_owned(),
            statistics,
            gpu_time,
            ..Settings::default()
        })
        .unwrap();
    program();
    Capture::get().stop();
    let report = recording.finish();
    assert_eq!(report.failure, None);
    let found = verify(&path).unwrap();
    assert_eq!(found.findings, []);
    let trace = Trace::open(&path).unwrap();
    (path, trace)
}

/// The calls, with their patterns as they are in the end.
fn calls(trace: &Trace) -> Vec<(OpCall, Pattern)> {
    let dictionary = trace.streams()[0].dictionary();
    trace
        .records(StreamId(0))
        .filter_map(|record| match record.unwrap().1 {
            Record::OpCall(call) => {
                let pattern = dictionary.pattern(call.pattern).unwrap().clone();
                Some((call, pattern))
            }
            _ => None,
        })
        .collect()
}

fn states(pattern: &Pattern) -> Vec<(Operand, When, State, Option<bool>, u32)> {
    let entries = pattern.entries.iter();
    entries
        .map(|e| (e.operand, e.when, e.state, e.binary, e.fields))
        .collect()
}

fn costs(trace: &Trace) -> std::collections::BTreeMap<String, u64> {
    trace.streams()[0].end().unwrap().costs.clone()
}

const SHAPE: &[i64; 2] = &[2, 2];

/// One test: there is one capture in a process.
#[test]
fn calls_on_a_device() {
    statistics_of_operands();
    times_of_calls();
}

/// What the facts of the program say.
fn facts(trace: &Trace) -> Vec<(String, String)> {
    let dictionary = trace.streams()[0].dictionary();
    let moments = trace.moments(StreamId(0)).unwrap();
    let facts = moments.into_iter().filter_map(|(_, moment)| {
        let Event::Fact { key, value, .. } = moment.event else {
            return None;
        };
        Some((dictionary.text(key)?.clone(), value))
    });
    facts.collect()
}

/// The entry of the call itself, with its number.
fn time_of((call, pattern): &(OpCall, Pattern)) -> Option<(State, Option<u64>)> {
    let entry = pattern.entry(Operand::Call, When::After)?;
    let at = pattern.position(Operand::Call, When::After, fields::DEVICE_TIME);
    Some((entry.state, at.map(|at| call.statistics[at])))
}

fn times_of_calls() {
    let directory = tempfile::tempdir().unwrap();
    let spikes = [0.0f32, 1.0, 1.0, 0.0];
    let on_gpu = tensor(&spikes, SHAPE, 0);
    let on_host = Tensor {
        device_kind: 0,
        device_index: -1,
        device_data: 0,
        data: spikes.as_ptr().cast(),
        ..on_gpu
    };
    let script = device(64);
    let clock = SimulatedClock::new(Arc::clone(&script));
    install_clock(0, Box::new(clock), 4);
    let works = |ns: u64| {
        script.lock().device_ns += ns;
        true
    };
    let ops = std::cell::OnceCell::new();
    let present = |ns| Some((State::Present, Some(ns)));

    for (statistics, window) in [
        (Preset::None, false),
        (Preset::Rules, false),
        (Preset::Rules, true),
    ] {
        let (_, trace) = record_with(directory.path(), statistics, window, true, || {
            let [relu, view, zeros, add] = ops.get_or_init(|| {
                [
                    define(c"aten::relu_like", c"", &[(c"self", false)]),
                    define_op(c"aten::view", c"", &[(c"self", false)], true),
                    define(c"aten::zeros", c"", &[(c"size", false), (c"device", false)]),
                    define(c"aten::add_", c"Tensor", &[(c"self", true)]),
                ]
            });
            script.lock().delay = 1;
            call_running(relu, &[on_gpu], &[], &[on_gpu], || works(1000));
            // Nothing of it is on a GPU; a view has no work.
            call_running(relu, &[on_host], &[], &[on_host], || works(1));
            call_running(view, &[on_gpu], &[], &[on_gpu], || works(2));
            // A call that throws, and one within another.
            call_running(relu, &[on_gpu], &[], &[on_gpu], || false);
            call_running(add, &[on_gpu], &[], &[on_gpu], || {
                call_running(relu, &[on_gpu], &[], &[on_gpu], || works(300));
                works(50)
            });
            // It makes its result on the GPU: cuda:0, a word of the argument `device`.
            let more = [
                u64::from(word::INT_LIST) | 2 << 8,
                2,
                2,
                u64::from(word::DEVICE) | u64::from(CUDA) << 8,
            ];
            call_running(zeros, &[], &more, &[on_gpu], || works(70));
            script.lock().now += 1;
            script.lock().capturing.push(0);
            call_running(relu, &[on_gpu], &[], &[on_gpu], || works(5));
            script.lock().capturing.clear();
        });
        let calls = calls(&trace);
        let times: Vec<_> = calls.iter().map(time_of).collect();
        let capturing = Some((State::NotTaken(NotTaken::Capturing), None));
        let expected = [
            present(1000),
            None,
            None,
            None,
            present(350),
            present(70),
            capturing,
        ];
        assert_eq!(times, expected, "{statistics:?} {window}");
        let costs = costs(&trace);
        let count = |name: &str| costs[&format!("gpu_time.{name}")];
        assert_eq!((count("calls"), count("read"), count("lost")), (4, 3, 0));
        assert_eq!(count("not_taken.capturing"), 1);
        let about = facts(&trace);
        let about = about.iter().find(|(key, _)| key == "gpu_time.cuda:0");
        assert!(about.unwrap().1.contains(r#""pairs":4"#), "{about:?}");
        // Summaries hold the sums.
        let rows = trace.summary(StreamId(0), 0..u64::MAX).unwrap();
        let dictionary = trace.streams()[0].dictionary();
        let total: u128 = rows
            .iter()
            .filter_map(|row| {
                let pattern = dictionary.pattern(row.pattern)?;
                pattern.entry(Operand::Call, When::After)?;
                row.integer_sums.last().copied()
            })
            .sum();
        assert_eq!(total, 1420);
    }

    // More than there are pairs, and a device that never comes so far.
    let [relu, ..] = ops.get().unwrap();
    let (_, trace) = record_with(directory.path(), Preset::None, false, true, || {
        script.lock().stuck.push(0);
        for _ in 0..6 {
            call_running(relu, &[on_gpu], &[], &[on_gpu], || works(1));
        }
    });
    let full = (State::NotTaken(NotTaken::DeviceFull), None);
    let times: Vec<_> = calls(&trace).iter().filter_map(time_of).collect();
    assert_eq!(times[..4], [(State::Lost, None); 4]);
    assert_eq!(times[4..], [full; 2]);
    let costs_then = costs(&trace);
    assert_eq!(
        (
            costs_then["gpu_time.lost"],
            costs_then["gpu_time.not_taken.full"]
        ),
        (4, 2)
    );

    // A device that is not there; and a recording that does not ask.
    let (_, trace) = record_with(directory.path(), Preset::None, false, true, || {
        script.lock().stuck.clear();
        let elsewhere = Tensor {
            device_index: 5,
            ..on_gpu
        };
        call_running(relu, &[elsewhere], &[], &[elsewhere], || works(1));
    });
    let missing = (State::NotTaken(NotTaken::Device), None);
    assert_eq!(time_of(&calls(&trace)[0]), Some(missing));
    assert_eq!(costs(&trace)["gpu_time.not_taken.refused"], 1);
    assert!(
        facts(&trace)
            .iter()
            .any(|(key, value)| key == "gpu_time.cuda:5" && value.contains("not_taken"))
    );
    let (_, trace) = record(directory.path(), Preset::None, false, || {
        call_running(relu, &[on_gpu], &[], &[on_gpu], || works(1));
    });
    assert_eq!(time_of(&calls(&trace)[0]), None);
    assert!(!costs(&trace).keys().any(|key| key.starts_with("gpu_time")));
}

fn statistics_of_operands() {
    let directory = tempfile::tempdir().unwrap();
    let (spikes, weights) = ([0.0f32, 1.0, 1.0, 0.0], [0.5f32, 0.0, 2.0, 0.0]);
    let script = device(8);

    let mm = std::cell::OnceCell::new();
    let add = std::cell::OnceCell::new();
    for window in [false, true] {
        // An answer that comes late, out of order with another stream's, and of a call whose kernel throws.
        let (_, trace) = record(directory.path(), Preset::Rules, window, || {
            let mm =
                mm.get_or_init(|| define(c"aten::mm", c"", &[(c"self", false), (c"mat2", false)]));
            let add = add.get_or_init(|| {
                define(
                    c"aten::add_",
                    c"Tensor",
                    &[(c"self", true), (c"other", false)],
                )
            });
            script.lock().delay = 2;
            let before = script.lock().launches;
            let (a, b) = (tensor(&spikes, SHAPE, 0), tensor(&weights, SHAPE, 1));
            let both = tensor(&spikes, SHAPE, 1);
            let out = tensor(&weights, SHAPE, 0);
            call(mm, &[a, b], &[out], false);
            assert_eq!(
                script.lock().launches - before,
                1,
                "one launch for all operands"
            );
            call(mm, &[a, b], &[], true);
            script.lock().now += 1;
            call(mm, &[a, both], &[out], false);
            // Written in place: once before, once behind.
            call(add, &[a, b], &[a], false);
            assert_eq!(script.lock().launches - before, 5);
            script.lock().now += 5;
            script.lock().capturing.push(0);
            call(mm, &[a, b], &[out], false);
            script.lock().capturing.clear();
        });
        let calls = calls(&trace);
        let patterns: Vec<_> = calls.iter().map(|(_, pattern)| states(pattern)).collect();
        let (zero, one) = (Operand::Tensor(0), Operand::Tensor(1));
        let (before, present) = (When::Before, State::Present);
        let nonzeros = fields::NONZEROS;
        assert_eq!(
            patterns[0],
            [
                (zero, before, present, Some(true), nonzeros),
                (one, before, present, Some(false), 0),
                (Operand::Product, before, present, None, 0),
            ]
        );
        assert_eq!(calls[0].0.statistics, [2]);
        assert_eq!(
            patterns[1],
            [
                (zero, before, present, Some(true), nonzeros),
                (one, before, present, Some(true), nonzeros),
                (Operand::Product, before, present, None, fields::PRODUCT_SUM),
            ]
        );
        assert_eq!(calls[1].0.statistics, [2, 2, 77]);
        assert_eq!(
            patterns[2],
            [
                (zero, before, present, Some(true), nonzeros),
                (zero, When::After, present, Some(true), nonzeros),
                (one, before, present, Some(false), 0),
            ]
        );
        let capturing = State::NotTaken(NotTaken::Capturing);
        assert!(patterns[3].iter().all(|entry| entry.2 == capturing));
        let costs = costs(&trace);
        assert_eq!(costs["device.launches"], 5);
        assert_eq!(costs["device.answers"], 5);
        assert_eq!(costs["device.lost"], 0);
        assert_eq!(costs["device.not_taken.capturing"], 1);
        // What devices take and what not stands in the trace.
        let facts: Vec<_> = trace
            .moments(StreamId(0))
            .unwrap()
            .into_iter()
            .filter_map(|(_, moment)| match moment.event {
                Event::Fact { key, value, .. } => Some((key, value)),
                _ => None,
            })
            .collect();
        let dictionary = trace.streams()[0].dictionary();
        let about = facts.iter().find(|(key, _)| {
            dictionary
                .text(*key)
                .is_some_and(|k| k == "statistics.cuda:0")
        });
        assert!(about.unwrap().1.contains("\"not_taken\":{\"T3\""));
    }

    // Everything in one launch behind the op, where it writes nothing.
    let (_, trace) = record(directory.path(), Preset::All, false, || {
        let mm = mm.get().unwrap();
        let before = script.lock().launches;
        let (a, b) = (tensor(&spikes, SHAPE, 0), tensor(&weights, SHAPE, 1));
        call(mm, &[a, b], &[tensor(&weights, SHAPE, 0)], false);
        assert_eq!(script.lock().launches - before, 1);
        script.lock().now += 10;
    });
    let all = calls(&trace);
    let entries = states(&all[0].1);
    let full = fields::NONZEROS | fields::SUM | fields::MINIMUM | fields::MAXIMUM;
    assert_eq!(entries.len(), 4);
    assert_eq!(
        entries[0],
        (
            Operand::Tensor(0),
            When::Before,
            State::Present,
            Some(true),
            full
        )
    );
    assert_eq!(
        entries[2],
        (
            Operand::Tensor(2),
            When::After,
            State::Present,
            Some(false),
            full
        )
    );

    // More than the ring holds, and a device that never answers again.
    let (_, trace) = record(directory.path(), Preset::Rules, false, || {
        script.lock().stuck.push(0);
        let (a, b) = (tensor(&spikes, SHAPE, 0), tensor(&weights, SHAPE, 1));
        for _ in 0..10 {
            call(
                mm.get().unwrap(),
                &[a, b],
                &[tensor(&weights, SHAPE, 0)],
                false,
            );
        }
    });
    let stuck = calls(&trace);
    for (at, (_, pattern)) in stuck.iter().enumerate() {
        let expected = if at < 8 {
            State::Lost
        } else {
            State::NotTaken(NotTaken::DeviceFull)
        };
        assert!(
            pattern.entries.iter().all(|e| e.state == expected),
            "{at}: {pattern:?}"
        );
    }
    assert_eq!(costs(&trace)["device.lost"], 8);
    assert_eq!(costs(&trace)["device.not_taken.full"], 2);

    // A device that is not there: the reason, and nothing else changes.
    let (_, trace) = record(directory.path(), Preset::Rules, false, || {
        let (mut a, b) = (tensor(&spikes, SHAPE, 0), tensor(&weights, SHAPE, 1));
        a.device_index = 3;
        call(
            mm.get().unwrap(),
            &[a, b],
            &[tensor(&weights, SHAPE, 0)],
            false,
        );
    });
    let missing = State::NotTaken(NotTaken::Device);
    assert!(
        calls(&trace)[0]
            .1
            .entries
            .iter()
            .all(|e| e.state == missing)
    );
}
