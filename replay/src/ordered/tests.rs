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

/// The recording, at the level that simulations need.
pub(crate) fn full_trace() -> Trace {
    tape(Tape::full())
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

fn explained(rules: &str, counters: &[&str], target: &str) -> String {
    let traces = Traces::of("ordered", full_trace());
    let request = Request {
        counters: Wanted::Named(counters.iter().map(|name| (*name).to_owned()).collect()),
        ..Request::default()
    };
    let rules = RuleSet::named(rules).unwrap();
    let explanation = crate::explain(&traces, &rules, &request, target).unwrap();
    // Every number that is explained is in the total, and the other way round.
    let report = evaluate(
        &traces,
        &rules,
        &Request {
            energy: Wanted::Named(Vec::new()),
            ..request
        },
    )
    .unwrap();
    for followed in &explanation.followed {
        let total: i128 = followed
            .calls
            .iter()
            .map(|call| call.count * i128::from(call.calls))
            .sum();
        if target == "Net*" {
            assert_eq!(total, report.counters.get(&followed.counter).unwrap().total);
        }
    }
    let mut text = Vec::new();
    explanation.write_text(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn counters_that_follow_are_explained_call_by_call() {
    let both = ["neuron_state", "memory_residency_small"];
    insta::assert_snapshot!(explained("spikingjelly-2026-06", &both, "Net*"));
    insta::assert_snapshot!(explained("spikingjelly-2.0.0", &["neuromorphic_memory_access"], "Net*"));
    insta::assert_snapshot!(explained("spikingjelly-2026-06", &["neuron_state"], "aten::add.Tensor"));
}

#[test]
fn what_lacks_the_level_is_not_explained() {
    let traces = Traces::of("rules", crate::testing::spiking_tape().trace());
    let rules = RuleSet::named("spikingjelly-2026-06").unwrap();
    let named = Request {
        counters: Wanted::Named(vec!["neuron_state".to_owned()]),
        ..Request::default()
    };
    assert!(matches!(
        crate::explain(&traces, &rules, &named, "aten::addmm"),
        Err(ReplayError::MissingLevel { .. })
    ));
    let all = crate::explain(&traces, &rules, &all(), "aten::addmm").unwrap();
    assert!(all.followed.iter().all(|f| f.missing.as_ref().unwrap().contains("--level full")));
}

/// What NeuroMC makes of a stage that the program has named.
#[test]
fn stages_of_the_programs_own_stand_under_their_names() {
    let text = crate::energy::presets("neuromc").nth(1).unwrap().text;
    let traces = |named: bool| {
        let mut tape = Tape::full();
        if named {
            tape.stage(Some("online"));
        }
        Traces::of("ordered", self::tape(tape))
    };
    let report = |text: &str, named: bool| {
        let file = crate::energy::CostFile::parse(text, "my.toml", "my").unwrap();
        let request = Request {
            energy: Wanted::Named(Vec::new()),
            counters: Wanted::Named(Vec::new()),
            costs: vec![file],
            ..Request::default()
        };
        let rules = RuleSet::named("spikingjelly-2.0.0").unwrap();
        let report = evaluate(&traces(named), &rules, &request).unwrap();
        serde_json::to_value(report.energy.get("neuromc").unwrap()).unwrap()
    };
    let with = |options: &str| format!("{text}\n[stages.online]\n{options}");
    let plain = report(text, true);
    assert!(plain["energy_by_stage"]["forward"].is_f64());
    let online = report(&with("phase = 'forward'"), true);
    assert_eq!(online["energy_by_stage"]["online"], plain["energy_by_stage"]["forward"]);
    assert!(online["energy_by_stage"]["forward"].is_null());
    assert_eq!(online["config"]["stages.online"]["phase"], "forward");
    // Weights that are there already are not read again: 12 of 16 bits, twice, from SRAM and registers.
    let reused = report(&with("phase = 'forward'\nreuse_weights = true"), true);
    let bits = |report: &serde_json::Value, level: &str, direction: &str| {
        report["memory_bits_by_level"]["by_level_dir"][level][direction].as_i64().unwrap()
    };
    assert_eq!(bits(&online, "sram", "rh2l") - bits(&reused, "sram", "rh2l"), 2 * 12 * 16);
    assert_eq!(bits(&online, "reg", "rh2l") - bits(&reused, "reg", "rh2l"), 2 * 12 * 16);
    // A stage that the program did not name changes nothing.
    assert_eq!(report(&with("phase = 'forward'"), false)["energy_by_stage"], plain["energy_by_stage"]);
    for (options, message) in [
        ("phase = 'sideways'", "'phase' is one of 'forward', 'backward', 'optimizer'"),
        ("reuse_weights = true", "'phase' is missing"),
        ("phase = 'forward'\nreuse_weights = 1", "'reuse_weights' is true or false"),
        ("phase = 'forward'\nreuse = true", "did you mean 'reuse_weights'?"),
        ("phase = 1", "'phase' is a text"),
    ] {
        let error = crate::energy::CostFile::parse(&with(options), "my.toml", "my").unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn core_types_and_process_keys_leave_fragments_out_and_say_so() {
    let total = |settings: &[&str]| {
        let request = Request {
            energy: Wanted::Named(vec!["neuromc".to_owned()]),
            settings: settings
                .iter()
                .map(|text| crate::energy::Assignment::parse(text).unwrap())
                .collect(),
            ..Request::default()
        };
        let report = replay("spikingjelly-2.0.0", &request).unwrap();
        report.energy.get("neuromc").unwrap().clone()
    };
    let all = total(&[]);
    assert!(all.warnings.is_empty());
    let neurons = total(&["process_keys=['with_sg']"]);
    let products = total(&["process_keys=['with_nothing', 'with_bn', 'with_opt']"]);
    assert!((neurons.total_pj + products.total_pj - all.total_pj).abs() < 1e-9 * all.total_pj);
    assert!(neurons.total_pj > 0.0 && products.total_pj > 0.0);
    assert!(neurons.warnings.iter().any(|w| w.contains("leave out: fp_soma with_nothing (2)")), "{:?}", neurons.warnings);
    let nothing = total(&["core_types=['wg']"]);
    assert_eq!(nothing.total_pj, 0.0);
}
