//! Counters and models that follow a stream, over a made-up recording of one linear layer and one neuron.

use optape_trace::{Argument, ScopeId, Trace, fields};

use crate::rules::RuleSet;
use crate::rules::spikingjelly::neuron_state::BASE_NODE;
use crate::testing::{Call, Statistic, Tape, schema, tensor};
use crate::{By, ReplayError, Report, Request, Traces, Wanted, evaluate};

/// Spikes into a layer of 3 x 4 weights, its currents into a neuron that adds them to its state, twice. The state is known from the
/// second time on.
fn tape(mut tape: Tape) -> Trace {
    let (net, root) = tape.module(ScopeId::GLOBAL, "Net", "app.Net", false);
    let (fc, fc_scope) = tape.module(root, "Net.fc", "torch.nn.modules.linear.Linear", false);
    let (neuron, neuron_scope) = tape.module(root, "Net.lif", BASE_NODE, true);
    tape.fact(net, "children", r#"[["fc",1],["lif",2]]"#);
    tape.fact(fc, "attributes", r#"{"in_features":3,"out_features":4}"#);
    tape.fact(
        fc,
        "parameters",
        r#"[{"name":"weight","dtype":"float32","shape":[4,3],"requires_grad":true},
            {"name":"bias","dtype":"float32","shape":[4],"requires_grad":true}]"#,
    );
    let counted = |tensor: u16, nonzeros: u64| Statistic {
        numbers: vec![(fields::NONZEROS, nonzeros)],
        ..Statistic::analog(tensor)
    };
    let linear = Call::new(
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
    .with(vec![
        Statistic::spikes(1, 5),
        Statistic::analog(2),
        counted(3, 8).after(),
    ]);
    let add = Call::new(
        schema::ADD,
        vec![Argument::Tensor(0), Argument::Tensor(1), Argument::Int(1)],
        vec![tensor(&[2, 4]), tensor(&[2, 4])],
        vec![tensor(&[2, 4])],
    )
    .with(vec![counted(0, 8), counted(1, 8)]);
    let spikes = |nonzeros| {
        Call::new(
            schema::ADD,
            vec![Argument::Tensor(0), Argument::Tensor(1), Argument::Int(1)],
            vec![tensor(&[2, 4]), tensor(&[2, 4])],
            vec![tensor(&[2, 4])],
        )
        .with(vec![counted(0, 8), Statistic::spikes(1, nonzeros)])
    };
    for (time, first) in [10, 30].into_iter().enumerate() {
        let call = time as u64 * 3;
        let [input, current, state, driven, reset] = [0, 1, 2, 3, 4].map(|at| first + at);
        tape.enter_with(call, net, &[input]);
        tape.enter_with(call + 1, fc, &[input]);
        tape.call_on(fc_scope, &linear, &[1, input, 2, current]);
        tape.exit_with(call + 1, fc, &[current]);
        tape.enter_with(call + 2, neuron, &[current]);
        let before = if time == 0 { 5 } else { 13 };
        tape.call_on(neuron_scope, &add, &[before, current, state]);
        // What the state is driven by is mostly zero.
        tape.call_on(neuron_scope, &spikes(2), &[before, driven, reset]);
        tape.assign(neuron, "v", 13);
        tape.exit_with(call + 2, neuron, &[state]);
        tape.exit_with(call, net, &[state]);
    }
    tape.trace()
}

fn replay(rules: &str, request: &Request) -> Result<Report, ReplayError> {
    let traces = Traces::of("ordered", tape(Tape::full()));
    evaluate(&traces, &RuleSet::named(rules)?, request)
}

fn all() -> Request {
    Request {
        counters: Wanted::All,
        energy: Wanted::All,
        ..Request::default()
    }
}

#[test]
fn a_state_counts_from_its_first_assignment_on() {
    let report = replay("spikingjelly-2026-06", &all()).unwrap();
    let counter = report.counters.get("neuron_state").unwrap();
    let metric = |name: &str| counter.details["metrics"].at(&["Net.lif", name]);
    // Only the second step: one addition of currents (dense, 8 elements), one of two spikes.
    assert_eq!(metric("state_adds"), 16);
    assert_eq!(metric("state_reads"), 32 + 2 * 4);
    assert_eq!(metric("state_writes"), 32 + 2 * 4);
    assert_eq!(metric("timestep_dense_ops"), 8);
    assert_eq!(metric("spike_triggered_ops"), 8);
    let buffer = counter.details["projections"].at(&["Global", "potential_buffer_bytes"]);
    assert_eq!(buffer, 32);
}

#[test]
fn spikes_read_the_weights_that_they_meet() {
    let report = replay("spikingjelly-2.0.0", &all()).unwrap();
    let counter = report.counters.get("neuromorphic_memory_access").unwrap();
    let fc = &counter.scopes["Net.fc"];
    assert_eq!(fc["weight_read_bytes"], 2 * 5 * 4 * 4);
    assert_eq!(fc["bias_read_bytes"], 2 * 8 * 4);
    let energy = report.energy.get("simple_fp32").unwrap();
    assert_eq!(energy.unit, "pJ");
    assert!(energy.quantity("energy_memory_pj").unwrap() > 0.0);
}

#[test]
fn lemaire_reads_sparse_inputs_by_their_spikes() {
    let report = replay("spikingjelly-2026-06", &all()).unwrap();
    let text = serde_json::to_value(report.energy.get("lemaire").unwrap()).unwrap();
    let counts = &text["counts"];
    assert_eq!(counts["read_in_bytes"], 2 * 5 * 4);
    assert_eq!(counts["write_out_bytes"], 2 * 8 * 4);
    assert_eq!(counts["read_params_bytes"], 2 * (5 * 4 * 4 + 8 * 4));
    assert_eq!(
        text["buffer_sizes_bytes"]["params_buffer_bytes"],
        5 * 4 * 4 + 8 * 4
    );
    let dense = serde_json::to_value(report.energy.get("lemaire_no_sparse").unwrap()).unwrap();
    assert_eq!(dense["counts"]["read_in_bytes"], 2 * 6 * 4);
    assert_eq!(dense["counts"]["read_params_bytes"], 2 * 16 * 4);
}

#[test]
fn strict_formulas_refuse_other_neurons_and_lenient_ones_say_so() {
    let report = replay("spikingjelly-2.0.0", &all()).unwrap();
    let refused = &report.skipped["energy/lemaire"];
    assert!(refused.contains("do not support BaseNode"), "{refused}");
    let lenient = report.energy.get("lemaire_nonstrict").unwrap();
    assert_eq!(lenient.warnings.len(), 1);
}

#[test]
fn residency_follows_storages() {
    let report = replay("spikingjelly-2026-06", &all()).unwrap();
    let counter = report.counters.get("memory_residency").unwrap();
    let moved = counter.details["move_bits_by_edge"].at(&["dram->sram"]);
    // Weights, bias, both inputs, both drivers and the state before the first step come from DRAM once; the second state is the first
    // driver, currents and results are written where they are used.
    assert_eq!(moved, (12 + 4 + 2 * 6 + 2 * 8 + 8) * 32);
}

#[test]
fn a_fragment_for_every_call_of_a_layer_and_a_neuron() {
    let report = replay("spikingjelly-2.0.0", &all()).unwrap();
    let text = serde_json::to_value(report.energy.get("neuromc").unwrap()).unwrap();
    let counts = &text["counts_by_core_type"]["fp_soma"];
    assert_eq!(counts["fragments"], 4);
    assert_eq!(counts["mac"], 2 * 2 * 3 * 4);
    assert_eq!(counts["comp"], 2 * 3 * 8);
    assert!(text["energy_by_stage"]["backward"].is_null());
}

#[test]
fn a_recording_without_the_level_is_refused() {
    let traces = Traces::of("rules", crate::testing::spiking_tape().trace());
    let rules = RuleSet::named("spikingjelly-2026-06").unwrap();
    let report = evaluate(&traces, &rules, &all()).unwrap();
    for label in [
        "counters/neuron_state",
        "counters/memory_residency",
        "energy/lemaire",
    ] {
        assert!(report.skipped[label].contains("--level full"), "{label}");
    }
    let named = Request {
        counters: Wanted::Named(vec!["neuron_state".to_owned()]),
        energy: Wanted::Named(Vec::new()),
        ..Request::default()
    };
    assert!(matches!(
        evaluate(&traces, &rules, &named),
        Err(ReplayError::MissingLevel { .. })
    ));
}

#[test]
fn what_counts_module_calls_is_not_grouped() {
    let request = Request {
        by: Some(By::Module),
        ..all()
    };
    let report = replay("spikingjelly-2.0.0", &request).unwrap();
    assert!(report.skipped["counters/neuromorphic_memory_access"].contains("--by"));
    assert!(report.skipped["energy/simple_fp32"].contains("--by"));
    let groups = report.groups.unwrap();
    let lif = groups.iter().find(|g| g.key == "Net.lif").unwrap();
    assert!(lif.counters.get("neuron_state").unwrap().total > 0);
}

#[test]
fn nothing_asked_for_is_answered_from_summaries() {
    let report = replay("spikingjelly-2026-06", &Request::default()).unwrap();
    let names: Vec<&str> = report.counters.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["flop", "memory_access", "mac", "ac", "synop"]);
    assert!(report.energy.get("lemaire").is_none());
    assert!(report.energy.get("compute_fp32").is_some());
}
