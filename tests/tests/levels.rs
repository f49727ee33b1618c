//! `--level full`: what a trace holds beside values is what plain Python finds.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::{BTreeMap, HashMap, HashSet};

use optape_tests::{Bench, Call, calls_of, parity_corpus};
use optape_trace::{
    Argument, CROSSBARS, Event, Operand, Record, StorageId, TensorId, Trace, When, call_flags,
    fields,
};
use serde_json::{Value, json};

/// The trace of `levels.py` at `--level full`, and what the program says.
fn recorded(bench: &Bench, what: &str) -> (Value, Trace) {
    let words = bench.words(&Bench::program("levels.py"), &[what]);
    let mut record = bench.optape(["-q", "record", "-o", "t.optape", "--level", "full", "--"]);
    let done = bench.run(record.args(words));
    done.expect_code(0);
    (done.report(), Trace::open(&bench.path("t.optape")).unwrap())
}

fn number(call: &Call, operand: Operand, field: u32) -> Option<u64> {
    call.statistics
        .iter()
        .find(|(entry, _)| entry.operand == operand && entry.when == When::Before)
        .and_then(|(_, numbers)| numbers.get(&field).copied())
}

/// The tensor of an argument, by its name in the table of needs.
fn factor(call: &Call, place: usize) -> Operand {
    // `addmm` has the bias first.
    let argument = if call.op == "aten::addmm" {
        place + 1
    } else {
        place
    };
    Operand::Tensor(call.tensor(argument).unwrap())
}

#[test]
fn what_is_not_empty_is_what_python_counts() {
    let Some(bench) = Bench::new() else { return };
    let (report, trace) = recorded(&bench, "occupancy");
    let expected = report.as_array().unwrap();
    let mut calls = calls_of(&trace, trace.streams()[0].id());
    calls.retain(|call| {
        ["aten::convolution", "aten::mm", "aten::addmm", "aten::bmm"].contains(&call.op.as_str())
    });
    assert_eq!(calls.len(), expected.len());
    assert!(calls.len() >= 19);
    for (call, expected) in calls.iter().zip(expected) {
        let what = format!("{} {}", call.op, expected["what"]);
        assert_eq!(call.op, expected["op"], "{what}");
        assert_eq!(
            json!(number(call, Operand::Product, fields::NONEMPTY_OUTPUTS)),
            expected["product"],
            "{what}"
        );
        let first = factor(call, 0);
        if call.op == "aten::convolution" {
            let one = |field| json!(number(call, first, field));
            assert_eq!(one(fields::NONEMPTY_OUTPUTS), expected["outputs"], "{what}");
            assert_eq!(one(fields::ACTIVE_SITES), expected["sites"], "{what}");
            let rows: Vec<u64> = (0..)
                .map_while(|block| number(call, Operand::Channels(block), fields::ACTIVE_ROWS))
                .collect();
            assert_eq!(json!(rows), expected["rows"], "{what}");
            for (size, field) in CROSSBARS {
                let patches: Vec<u64> = (0..rows.len() as u16)
                    .step_by(size / 4)
                    .map(|block| number(call, Operand::Channels(block), field).unwrap())
                    .collect();
                assert_eq!(
                    json!(patches),
                    expected["patches"][size.to_string()],
                    "{what}"
                );
            }
        } else {
            for (place, name) in ["first", "second"].iter().enumerate() {
                let lines = [fields::NONEMPTY_ROWS, fields::NONEMPTY_COLUMNS]
                    .map(|field| number(call, factor(call, place), field));
                let lines = lines[0].map(|rows| [Some(rows), lines[1]]);
                assert_eq!(json!(lines), expected[*name], "{name} of {what}");
            }
        }
    }
}

/// What is alive, record by record.
#[derive(Default)]
struct Alive {
    storages: HashMap<StorageId, u64>,
    bytes: u64,
    peak: u64,
    dead: HashSet<StorageId>,
    dead_tensors: HashSet<TensorId>,
}

#[test]
fn what_is_alive_is_what_python_allocated() {
    let Some(bench) = Bench::new() else { return };
    let (report, trace) = recorded(&bench, "memory");
    let stream = trace.streams()[0].id();
    let dictionary = trace.stream(stream).unwrap().dictionary().clone();
    let mut alive = Alive::default();
    let mut marks = BTreeMap::new();
    let (mut before, mut ended) = (0, 0);
    let mut neurons = 0;
    for record in trace.records(stream) {
        match record.unwrap().1 {
            Record::OpCall(call) => {
                let signature = dictionary.signature(call.signature).unwrap();
                let inputs = usize::from(signature.inputs);
                for (index, storage) in call.storages.iter().enumerate() {
                    // An argument may have lost its memory to the op.
                    let known = alive.storages.contains_key(storage)
                        || (index < inputs && alive.dead.contains(storage));
                    let empty = signature.tensors[index].shape.contains(&0);
                    assert!(
                        known || storage.0 == 0 || empty,
                        "storage {storage:?} was never born: {signature:?}"
                    );
                }
                for tensor in &call.tensors {
                    assert!(
                        !alive.dead_tensors.contains(tensor),
                        "{tensor:?} lives again"
                    );
                }
                let pattern = dictionary.pattern(call.pattern).unwrap();
                let op = dictionary.op(signature.op).unwrap().qualified_name();
                let scope = dictionary.scope(signature.scope).unwrap();
                // In neurons, all operands are counted.
                if scope.name.ends_with("fire")
                    && signature.stage == optape_trace::Stage::Forward
                    && ["aten::sub.Tensor", "aten::add.Tensor"].contains(&op.as_str())
                {
                    let has = |e: &optape_trace::PatternEntry| e.fields & fields::NONZEROS != 0;
                    assert!(pattern.entries.iter().all(has), "{op}: {pattern:?}");
                    neurons += 1;
                }
            }
            Record::Other(moment) => match moment.event {
                Event::StorageBorn { storage, bytes } => {
                    assert!(!alive.dead.contains(&storage), "{storage:?} lives again");
                    assert!(alive.storages.insert(storage, bytes).is_none());
                    alive.bytes += bytes;
                    alive.peak = alive.peak.max(alive.bytes);
                }
                Event::StorageDied { storage } => {
                    alive.bytes -= alive.storages.remove(&storage).unwrap();
                    alive.dead.insert(storage);
                }
                Event::TensorDied { tensor } => {
                    assert!(alive.dead_tensors.insert(tensor), "{tensor:?} died twice");
                }
                Event::RangeEnter { name } => {
                    let name = dictionary.text(name).unwrap();
                    if let Some(name) = name.strip_prefix("mark ") {
                        marks.insert(name.to_owned(), alive.bytes);
                    }
                    if name == "allocations" {
                        before = alive.bytes;
                        alive.peak = alive.bytes;
                    }
                }
                Event::RangeExit { name } if dictionary.text(name).unwrap() == "allocations" => {
                    assert_eq!(json!(alive.peak - before), report["peak"]);
                    ended = alive.bytes - before;
                }
                _ => {}
            },
            _ => {}
        }
    }
    assert_eq!(json!(ended), report["left"]);
    for mark in report["marks"].as_array().unwrap() {
        let name = mark["name"].as_str().unwrap();
        assert_eq!(json!(marks.get(name)), mark["alive"], "{name}");
    }
    assert!(!alive.dead_tensors.is_empty());
    assert!(neurons > 0);
}

/// The shape of a tensor of a call.
fn shape(call: &Call, operand: Operand) -> Vec<u64> {
    let Operand::Tensor(index) = operand else {
        panic!("{operand:?}")
    };
    let shape = &call.signature.tensors[usize::from(index)].shape;
    shape.iter().map(|&size| size.try_into().unwrap()).collect()
}

fn is_spikes(call: &Call, operand: Operand) -> bool {
    let entry = call
        .statistics
        .iter()
        .find(|(e, _)| e.operand == operand && e.when == When::Before);
    // For NeuroMC, nothing is no spikes.
    entry.is_some_and(|(e, _)| e.binary == Some(true)) && !shape(call, operand).contains(&0)
}

/// NeuroMC's additions of a product or convolution, by the formulas in `docs/levels.md`.
fn additions(call: &Call) -> u64 {
    let (x, y) = match call.op.as_str() {
        "aten::baddbmm" | "aten::addmm" => (1, 2),
        _ => (0, 1),
    };
    let [x, y] = [x, y].map(|argument| Operand::Tensor(call.tensor(argument).unwrap()));
    let need = |operand, field| {
        number(call, operand, field).unwrap_or_else(|| panic!("{}: no field {field:#x}", call.op))
    };
    let both = || {
        need(Operand::Product, fields::PRODUCT_SUM)
            - need(Operand::Product, fields::NONEMPTY_OUTPUTS)
    };
    let (of_x, of_y) = (shape(call, x), shape(call, y));
    let outputs = shape(call, Operand::Tensor(call.signature.inputs));
    let numel = outputs.iter().product::<u64>();
    let spikes = (is_spikes(call, x), is_spikes(call, y));
    if call.op == "aten::convolution" {
        let transposed = call.signature.arguments[6] == Argument::Bool(true);
        let Argument::Int(groups) = call.signature.arguments[8] else {
            panic!("groups")
        };
        return match spikes {
            (true, true) => both(),
            (true, false) => need(x, fields::FAN_OUT_NONZEROS) - need(x, fields::NONEMPTY_OUTPUTS),
            (false, true) => {
                let of = if transposed { &of_x } else { &outputs };
                need(y, fields::NONZEROS) * of[0] * of[2..].iter().product::<u64>()
            }
            (false, false) => {
                let terms = of_x[1] / groups as u64 * of_y[2..].iter().product::<u64>();
                let bias = call.signature.arguments[2] != Argument::None;
                numel * terms.saturating_sub(1) + if bias { numel } else { 0 }
            }
        };
    }
    let (m, k, n) = (
        of_x[of_x.len() - 2],
        of_x[of_x.len() - 1],
        of_y[of_y.len() - 1],
    );
    let product = match spikes {
        (true, true) => both(),
        (true, false) => (need(x, fields::NONZEROS) - need(x, fields::NONEMPTY_ROWS)) * n,
        (false, true) => (need(y, fields::NONZEROS) - need(y, fields::NONEMPTY_COLUMNS)) * m,
        (false, false) => numel * k.saturating_sub(1),
    };
    let adds = match call.signature.arguments.get(3) {
        None | Some(Argument::Int(0)) => false,
        Some(Argument::Float(beta)) => *beta != 0.0,
        Some(_) => true,
    };
    product + if adds { numel } else { 0 }
}

/// What SpikeSim counts of a convolution in event mode: patches, rows by block, sites times blocks of output channels.
fn events(call: &Call, size: usize) -> (u64, Vec<u64>, u64) {
    let [x, w] = [0, 1].map(|argument| Operand::Tensor(call.tensor(argument).unwrap()));
    let (channels, weight) = (shape(call, x)[1] as usize, shape(call, w));
    let tiles = channels.div_ceil(size);
    let output_tiles = weight[0].div_ceil(size as u64);
    let out = shape(call, Operand::Tensor(call.signature.inputs));
    let all_sites = out[0] * out[2] * out[3];
    if call.binary(0) != Some(true) {
        let rows = (0..tiles).map(|tile| {
            size.min(channels - tile * size) as u64 * weight[2] * weight[3] * all_sites
        });
        return (
            all_sites * tiles as u64,
            rows.collect(),
            output_tiles * all_sites,
        );
    }
    let field = CROSSBARS.iter().find(|c| c.0 == size).unwrap().1;
    let blocks = |tile: usize| (tile * size / 4) as u16..((tile + 1) * size / 4) as u16;
    let rows = (0..tiles).map(|tile| {
        blocks(tile)
            .filter_map(|block| number(call, Operand::Channels(block), fields::ACTIVE_ROWS))
            .sum()
    });
    let patches = (0..tiles)
        .map(|tile| number(call, Operand::Channels(blocks(tile).start), field).unwrap())
        .sum();
    let sites = number(call, x, fields::ACTIVE_SITES).unwrap();
    (patches, rows.collect(), output_tiles * sites)
}

/// The op calls of the corpus's measured range.
fn measured(trace: &Trace) -> Vec<Call> {
    let stream = trace.streams()[0].id();
    let dictionary = trace.stream(stream).unwrap().dictionary();
    let mut range = (None, None);
    for record in trace.records(stream) {
        let (ordinal, record) = record.unwrap();
        if let Record::Other(moment) = record {
            match moment.event {
                Event::RangeEnter { name } if dictionary.text(name).unwrap() == "measure" => {
                    range.0 = Some(ordinal);
                }
                Event::RangeExit { name } if dictionary.text(name).unwrap() == "measure" => {
                    range.1 = Some(ordinal);
                }
                _ => {}
            }
        }
    }
    let (from, to) = (range.0.unwrap(), range.1.unwrap());
    let mut calls = calls_of(trace, stream);
    calls.retain(|call| from < call.ordinal && call.ordinal < to);
    calls
}

/// The levels suffice for the numbers that live tools give: NeuroMC's additions in products, and SpikeSim's events.
#[test]
fn levels_suffice_for_neuromc_and_spikesim() {
    const PRODUCTS: [&str; 5] = ["mm", "addmm", "bmm", "baddbmm", "convolution"];
    let (Some(corpus), Some(bench)) = (parity_corpus(), Bench::new()) else {
        return;
    };
    let (mut compared, mut faults) = (0, Vec::new());
    for case in [
        "p01_mlp_if",
        "p03_conv_lif_multi",
        "p04_conv_geometry",
        "p05_grouped_conv",
        "p06_train_sgd_momentum",
        "p07_train_conv_adam",
        "p09_sew_add",
        "p10_bool_spikes",
        "p11_attention_bmm",
    ] {
        let program = corpus.join("cases").join(format!("{case}.py"));
        let name = format!("{case}.optape");
        let mut record =
            bench.optape(["-q", "record", "-o", name.as_str(), "--level", "full", "--"]);
        bench
            .run(record.args(bench.words(&program, &[])))
            .expect_code(0);
        let calls = measured(&Trace::open(&bench.path(&name)).unwrap());
        let path = corpus.join("expected").join(format!("{case}.json"));
        let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let expected = &expected["rules"]["spikingjelly-2026-06"];

        let added = &expected["counters"]["neuromc_add"]["scopes"]["Global"];
        for op in PRODUCTS {
            let ours: u64 = calls
                .iter()
                .filter(|call| call.op == format!("aten::{op}"))
                .map(additions)
                .sum();
            let theirs = added[format!("aten.{op}.default")].as_u64().unwrap_or(0);
            if ours != theirs {
                faults.push(format!("{case}: {op} adds {ours}, live {theirs}"));
            }
            compared += u64::from(theirs > 0);
        }
        for (report, size) in [("spikesim_event", 64), ("spikesim_event_xbar4_sram", 4)] {
            let stages = &expected["energy"][report]["event_stats_by_stage"];
            for (scope, theirs) in stages.as_object().into_iter().flatten() {
                let mut sum = (0, Vec::new(), 0);
                for call in &calls {
                    let flags = call.signature.flags;
                    let live = flags & (call_flags::TRAINING | call_flags::GRAD_MODE) == 0;
                    if call.op == "aten::convolution" && call.scope == *scope && live {
                        let (patches, rows, sites) = events(call, size);
                        sum.0 += patches;
                        sum.2 += sites;
                        sum.1.resize(rows.len(), 0);
                        sum.1
                            .iter_mut()
                            .zip(rows)
                            .for_each(|(sum, rows)| *sum += rows);
                    }
                }
                let ours = json!([sum.0, sum.1.iter().sum::<u64>(), sum.1, sum.2]);
                let theirs = json!([
                    theirs["active_patch_tile_count"],
                    theirs["active_row_count"],
                    theirs["active_row_count_by_tile"],
                    theirs["active_output_tile_site_count"],
                ]);
                if ours != theirs {
                    faults.push(format!("{case}: {report} {scope}: {ours}, live {theirs}"));
                }
                compared += 4;
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(compared > 60, "only {compared} numbers were compared");
}
