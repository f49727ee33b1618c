//! The whole of a replay over made-up traces.

use proptest::prelude::*;

use optape_trace::Trace;

use crate::report::Per;
use crate::rules::RuleSet;
use crate::selection::{Glob, Selection};
use crate::testing::{self, Call, Statistic, Tape, schema, tensor};
use crate::{By, Format, ReplayError, Report, Request, Traces, Wanted, evaluate, explain};

fn traces() -> Traces {
    Traces::of("spiking.optape", testing::spiking_tape().trace())
}

fn report(set: &str, request: &Request) -> Report {
    evaluate(&traces(), &RuleSet::named(set).unwrap(), request).unwrap()
}

fn text(report: &Report, format: Format) -> String {
    let mut bytes = Vec::new();
    report.write(format, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn measured() -> Request {
    Request {
        selection: Selection {
            ranges: vec!["measure".to_owned()],
            ..Selection::default()
        },
        ..Request::default()
    }
}

#[test]
fn table_json_csv_and_markdown_of_a_small_run() {
    let report = report("optape", &measured());
    insta::assert_snapshot!("table", text(&report, Format::Table));
    insta::assert_snapshot!(
        "json",
        text(&report, Format::Json).replace(env!("CARGO_PKG_VERSION"), "VERSION")
    );
    insta::assert_snapshot!("csv", text(&report, Format::Csv));
    insta::assert_snapshot!("markdown", text(&report, Format::Markdown));
}

#[test]
fn groups_and_means_of_a_small_run() {
    let request = Request {
        by: Some(By::Module),
        per: Per::Sample,
        ..measured()
    };
    let report = report("spikingjelly-2026-06", &request);
    insta::assert_snapshot!("by_module_per_sample", text(&report, Format::Table));
    insta::assert_snapshot!("by_module_per_sample_csv", text(&report, Format::Csv));
}

#[test]
fn a_range_leaves_out_what_stands_outside() {
    let inside = report("spikingjelly-2.0.0", &measured());
    let all = report("spikingjelly-2.0.0", &Request::default());
    assert_eq!(all.coverage.op_calls, inside.coverage.op_calls + 1);
    assert_eq!(inside.coverage.op_calls, 16);
    assert_eq!(inside.coverage.unattributed, 2);
    let unsupported = inside
        .counters
        .get("flop")
        .unwrap()
        .unsupported
        .as_ref()
        .unwrap();
    assert_eq!(unsupported.get("mylib.unheard.default"), Some(&2));
    assert_eq!(unsupported.len(), 1, "watched values are in no figure");
}

#[test]
fn scopes_are_sets_with_everything_inside() {
    let report = report("spikingjelly-2.0.0", &measured());
    let mac = &report.counters.get("mac").unwrap().scopes;
    // Two analog steps of [2, 3] x [3, 4].
    assert_eq!(mac["Global"]["aten.addmm.default"], 48);
    assert_eq!(mac["Net"]["aten.addmm.default"], 48);
    assert_eq!(mac["Net.fc"]["aten.addmm.default"], 48);
    let synop = report.counters.get("synop").unwrap();
    assert_eq!(synop.scopes["Net.fc"]["aten.addmm.default"], (3 + 4) * 4);
    assert_eq!(synop.scopes["Net.fc"]["aten.mm.default"], 10);
    assert_eq!(synop.total, 38);
}

#[test]
fn selections_filter_by_stage_scope_op_step_and_module() {
    let with = |selection: Selection| {
        report(
            "spikingjelly-2.0.0",
            &Request {
                selection,
                ..Request::default()
            },
        )
        .coverage
        .op_calls
    };
    assert_eq!(
        with(Selection {
            stages: vec!["backward".to_owned()],
            ..Selection::default()
        }),
        2
    );
    assert_eq!(
        with(Selection {
            scopes: vec![Glob::new("Net.l*")],
            ..Selection::default()
        }),
        8
    );
    assert_eq!(
        with(Selection {
            ops: vec![Glob::new("aten.ge.Scalar")],
            ..Selection::default()
        }),
        5
    );
    assert_eq!(
        with(Selection {
            ops: vec![Glob::new("aten::mm")],
            ..Selection::default()
        }),
        2
    );
    assert_eq!(
        with(Selection {
            steps: std::iter::once(1..2).collect(),
            ..Selection::default()
        }),
        8
    );
    assert_eq!(
        with(Selection {
            exclude: vec![Glob::new("LIFNode")],
            ..Selection::default()
        }),
        9
    );
    assert_eq!(
        with(Selection {
            exclude: vec![Glob::new("Net")],
            ..Selection::default()
        }),
        3
    );
}

fn error(set: &str, request: &Request) -> String {
    evaluate(&traces(), &RuleSet::named(set).unwrap(), request)
        .unwrap_err()
        .to_string()
}

#[test]
fn wrong_names_are_told_with_the_nearest_right_one() {
    let select = |selection| Request {
        selection,
        ..Request::default()
    };
    assert_eq!(
        error(
            "optape",
            &select(Selection {
                scopes: vec![Glob::new("Net.fcc")],
                ..Selection::default()
            })
        ),
        "there is no scope 'Net.fcc'; did you mean 'Net.fc'?\n  known: Global, Net, Net.fc, Net.lif"
    );
    let wrong_op = error(
        "optape",
        &select(Selection {
            ops: vec![Glob::new("aten::addmn")],
            ..Selection::default()
        }),
    );
    assert!(
        wrong_op.starts_with("there is no op 'aten::addmn'; did you mean 'aten::addmm'?"),
        "{wrong_op}"
    );
    let wrong_stage = error(
        "optape",
        &select(Selection {
            stages: vec!["forwards".to_owned()],
            ..Selection::default()
        }),
    );
    assert!(
        wrong_stage.starts_with("there is no stage 'forwards'; did you mean 'forward'?"),
        "{wrong_stage}"
    );
    let wrong_range = error(
        "optape",
        &select(Selection {
            ranges: vec!["measur".to_owned()],
            ..Selection::default()
        }),
    );
    assert_eq!(
        wrong_range,
        "there is no range 'measur'; did you mean 'measure'?\n  known: measure"
    );
    let wrong_counter = error(
        "optape",
        &Request {
            counters: Wanted::Named(vec!["flops".to_owned()]),
            ..Request::default()
        },
    );
    assert!(
        wrong_counter.starts_with("there is no counter 'flops'; did you mean 'flop'?"),
        "{wrong_counter}"
    );
    let wrong_preset = error(
        "optape",
        &Request {
            energy: Wanted::Named(vec!["compute_fp31".to_owned()]),
            ..Request::default()
        },
    );
    assert!(
        wrong_preset.contains("did you mean 'compute_fp32'?"),
        "{wrong_preset}"
    );
    let wrong_set = RuleSet::named("spikingjelly").unwrap_err().to_string();
    assert!(
        wrong_set.contains("did you mean 'spikingjelly-2"),
        "{wrong_set}"
    );
}

#[test]
fn selecting_nothing_is_said() {
    let selection = Selection {
        scopes: vec![Glob::new("Other*")],
        ..Selection::default()
    };
    let result = evaluate(
        &traces(),
        &RuleSet::named("optape").unwrap(),
        &Request {
            selection,
            ..Request::default()
        },
    );
    assert!(matches!(result, Err(ReplayError::NothingSelected { .. })));
    let empty = Traces::of("empty", testing::tiny_trace());
    let result = evaluate(
        &empty,
        &RuleSet::named("optape").unwrap(),
        &Request::default(),
    );
    assert_eq!(
        result.unwrap_err().to_string(),
        "the selection everything selects no op call; the trace holds none at all"
    );
}

/// One product without statistics.
fn without_statistics() -> Traces {
    let mut tape = Tape::new();
    let product = Call::new(
        schema::MM,
        vec![
            optape_trace::Argument::Tensor(0),
            optape_trace::Argument::Tensor(1),
        ],
        vec![tensor(&[2, 3]), tensor(&[3, 4])],
        vec![tensor(&[2, 4])],
    );
    tape.call(optape_trace::ScopeId::GLOBAL, &product);
    tape.call(
        optape_trace::ScopeId::GLOBAL,
        &product.with(vec![Statistic::spikes(0, 1), Statistic::analog(1)]),
    );
    Traces::of("bare.optape", tape.trace())
}

fn needs_text(traces: &Traces) -> String {
    let mut bytes = Vec::new();
    crate::needs(traces)
        .unwrap()
        .write_text(&mut bytes)
        .unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn needs_of_a_whole_and_of_a_bare_trace() {
    insta::assert_snapshot!("needs_held", needs_text(&traces()));
    let bare = without_statistics();
    insta::assert_snapshot!("needs_lacking", needs_text(&bare));
    let needs = crate::needs(&bare).unwrap();
    insta::assert_snapshot!(
        "needs_json",
        serde_json::to_string_pretty(&needs.rules[0].estimators).unwrap()
    );
}

/// What `needs` lists is what a replay by name refuses, and nothing else.
#[test]
fn needs_and_refusals_are_one() {
    let (mut held, mut refused) = (0, 0);
    for traces in [traces(), without_statistics()] {
        for set in crate::needs(&traces).unwrap().rules {
            let rules = RuleSet::named(&set.name).unwrap();
            for estimator in set.estimators {
                let (section, name) = estimator.estimator.split_once('/').unwrap();
                let (one, none) = (Wanted::Named(vec![name.to_owned()]), Wanted::Named(vec![]));
                let (counters, energy) = match section {
                    "counters" => (one, none),
                    _ => (none, one),
                };
                let request = Request {
                    counters,
                    energy,
                    ..Request::default()
                };
                match (evaluate(&traces, &rules, &request), estimator.standing) {
                    (Ok(_), crate::Standing::Held) => held += 1,
                    (Err(ReplayError::MissingLevel { missing, .. }), crate::Standing::Lacks) => {
                        let listed = estimator.lacking.iter().any(|one| {
                            one.what == missing.what && one.flag == missing.way_out.flag()
                        });
                        assert!(listed, "{missing} in {:?}", estimator.lacking);
                        refused += 1;
                    }
                    (Err(ReplayError::Refused { .. }), crate::Standing::Refused { .. }) => {}
                    (result, standing) => {
                        panic!("{name}: {standing:?}, but {:?}", result.map(|_| ()));
                    }
                }
            }
        }
    }
    assert!(held > 10 && refused > 5, "{held}, {refused}");
}

#[test]
fn a_missing_level_is_an_error_by_name_and_skipped_otherwise() {
    let set = RuleSet::named("optape").unwrap();
    let all = evaluate(&without_statistics(), &set, &Request::default()).unwrap();
    assert!(all.counters.get("flop").is_some() && all.counters.get("mac").is_none());
    for name in [
        "counters/mac",
        "counters/ac",
        "counters/synop",
        "energy/compute_fp32",
    ] {
        assert!(
            all.skipped[name].contains("level T1"),
            "{name}: {:?}",
            all.skipped.get(name)
        );
    }
    let named = Request {
        counters: Wanted::Named(vec!["mac".to_owned()]),
        ..Request::default()
    };
    let error = evaluate(&without_statistics(), &set, &named).unwrap_err();
    assert!(matches!(error, ReplayError::MissingLevel { .. }), "{error}");
    let energy = Request {
        energy: Wanted::Named(vec!["compute_int8".to_owned()]),
        ..Request::default()
    };
    assert!(matches!(
        evaluate(&without_statistics(), &set, &energy),
        Err(ReplayError::MissingLevel { .. })
    ));
    let lenient = evaluate(
        &without_statistics(),
        &set,
        &Request {
            lenient: true,
            ..named
        },
    )
    .unwrap();
    let synop = lenient.coverage.counters.get("mac").unwrap();
    assert_eq!((synop.counted, synop.without_statistics), (1, 1));
    assert!(lenient.counters.get("mac").unwrap().partial);
}

#[test]
fn a_counter_that_upstream_breaks_is_refused() {
    let mut tape = Tape::new();
    let argument = optape_trace::Argument::Tensor(0);
    tape.call(
        optape_trace::ScopeId::GLOBAL,
        &Call::new(
            schema::LOGICAL_NOT,
            vec![argument],
            vec![tensor(&[6])],
            vec![tensor(&[6])],
        ),
    );
    let traces = Traces::of("not.optape", tape.trace());
    let set = RuleSet::named("spikingjelly-2026-06").unwrap();
    let all = evaluate(&traces, &set, &Request::default()).unwrap();
    assert_eq!(
        all.skipped["counters/memory_access"],
        "ValueError: not enough values to unpack (expected 2, got 1)"
    );
    assert!(
        all.energy.get("compute_fp32").is_some(),
        "the model does not read memory_access"
    );
    let named = Request {
        counters: Wanted::Named(vec!["memory_access".to_owned()]),
        ..Request::default()
    };
    assert!(matches!(
        evaluate(&traces, &set, &named),
        Err(ReplayError::Refused { .. })
    ));
}

#[test]
fn means_are_divided_by_what_the_trace_holds() {
    let divisor = |per, samples| {
        report(
            "optape",
            &Request {
                per,
                samples,
                ..measured()
            },
        )
        .per
        .map(|p| p.divisor)
    };
    assert_eq!(divisor(Per::Run, None), None);
    assert_eq!(divisor(Per::Step, None), Some(2));
    assert_eq!(divisor(Per::Sample, None), Some(4));
    assert_eq!(divisor(Per::Sample, Some(10)), Some(10));
    assert_eq!(divisor(Per::Call, None), Some(4));
    let no_samples = evaluate(
        &without_statistics(),
        &RuleSet::named("optape").unwrap(),
        &Request {
            per: Per::Sample,
            ..Request::default()
        },
    );
    assert!(matches!(no_samples, Err(ReplayError::Normalisation(_))));
}

#[test]
fn firing_rates_are_spikes_over_elements() {
    let report = report("optape", &measured());
    let [layer] = report.firing_rates.as_slice() else {
        panic!("one spiking layer")
    };
    assert_eq!(
        (
            layer.module.as_str(),
            layer.calls,
            layer.elements,
            layer.spikes
        ),
        ("Net.lif", 4, 32, 10)
    );
    assert_eq!(layer.rate, Some(10.0 / 32.0));
    assert_eq!(
        layer.time_steps, None,
        "the trace does not say whether a call has several"
    );
}

#[test]
fn explanations_fill_in_the_formula() {
    let set = RuleSet::named("spikingjelly-2.0.0").unwrap();
    let explanation = explain(&traces(), &set, &measured(), "aten::addmm").unwrap();
    let mut bytes = Vec::new();
    explanation.write_text(&mut bytes).unwrap();
    insta::assert_snapshot!("explain_addmm", String::from_utf8(bytes).unwrap());
    assert!(
        explain(&traces(), &set, &measured(), "Net.lif")
            .unwrap()
            .calls
            .iter()
            .all(|c| c.module == "Net.lif")
    );
    assert!(explain(&traces(), &set, &measured(), "nonsense").is_err());
}

/// A random run: calls with random statistics, ranges, steps and flushes at random places.
fn random_trace(choices: &[(u8, u64)]) -> Trace {
    let mut tape = Tape::new();
    let (_, scope) = tape.module(optape_trace::ScopeId::GLOBAL, "Net", "app.Net", false);
    let mut step = 0;
    let mut open = false;
    for &(kind, number) in choices {
        let product = |first, second| {
            Call::new(
                schema::MM,
                vec![
                    optape_trace::Argument::Tensor(0),
                    optape_trace::Argument::Tensor(1),
                ],
                vec![tensor(&[2, 3]), tensor(&[3, 4])],
                vec![tensor(&[2, 4])],
            )
            .with(vec![first, second])
        };
        match kind {
            0 => tape.call(
                scope,
                &product(Statistic::spikes(0, number % 7), Statistic::analog(1)),
            ),
            1 => tape.call(
                scope,
                &product(Statistic::analog(0), Statistic::spikes(1, number % 13)),
            ),
            2 => tape.call(scope, &product(Statistic::analog(0), Statistic::analog(1))),
            3 => {
                tape.step(step);
                step += 1;
            }
            4 if open => {
                tape.exit_range("measure");
                open = false;
            }
            4 => {
                tape.enter_range("measure");
                open = true;
            }
            _ => tape.flush(),
        }
    }
    tape.trace()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn summaries_and_events_give_the_same_bytes_with_any_number_of_threads(
        choices in proptest::collection::vec((0u8..6, any::<u64>()), 1..120),
        steps in proptest::option::of((0u64..5, 1u64..5)),
        by_step in any::<bool>(),
        ranged in any::<bool>(),
    ) {
        let has_range = choices.iter().any(|(kind, _)| *kind == 4);
        let traces = Traces::of("random", random_trace(&choices));
        let selection = Selection {
            ranges: if ranged && has_range { vec!["measure".to_owned()] } else { Vec::new() },
            steps: steps.map(|(from, length)| from..from + length).into_iter().collect(),
            ..Selection::default()
        };
        let set = RuleSet::named("spikingjelly-2026-06").unwrap();
        let bytes = |from_events, threads| {
            let request = Request {
                selection: selection.clone(),
                by: by_step.then_some(By::Step),
                from_events,
                threads,
                ..Request::default()
            };
            evaluate(&traces, &set, &request).map(|report| text(&report, Format::Json)).map_err(|e| e.to_string())
        };
        let expected = bytes(false, 1);
        prop_assert_eq!(&bytes(true, 1), &expected);
        prop_assert_eq!(&bytes(true, 3), &expected);
        prop_assert_eq!(&bytes(false, 3), &expected);
    }
}

fn monitored(request: &Request) -> Report {
    let traces = Traces::of("monitored.optape", testing::monitored_tape().trace());
    evaluate(&traces, &RuleSet::named("optape").unwrap(), request).unwrap()
}

#[test]
fn measured_joules_stand_beside_modelled_picojoules() {
    let request = Request {
        per: Per::Sample,
        ..measured()
    };
    let report = monitored(&request);
    insta::assert_snapshot!("monitored", text(&report, Format::Table));
    insta::assert_snapshot!(
        "monitored_csv",
        text(&report, Format::Csv)
            .lines()
            .filter(|l| l.starts_with("measured"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    let json: serde_json::Value = serde_json::from_str(&text(&report, Format::Json)).unwrap();
    insta::assert_snapshot!(
        "monitored_json",
        serde_json::to_string_pretty(&json["monitors"]).unwrap()
    );
    assert_eq!(report.streams.len(), 1, "monitors are no process");
    // Models know nothing of sensors.
    let without = self::report("optape", &request);
    let energies = |report: &Report| {
        report
            .energy
            .values()
            .map(|e| e.total_pj)
            .collect::<Vec<_>>()
    };
    assert_eq!(energies(&report), energies(&without));
}

#[test]
fn measured_joules_are_split_by_step_and_stage() {
    for by in [By::Step, By::Stage] {
        let report = monitored(&Request {
            by: Some(by),
            ..measured()
        });
        let joules = |m: &crate::report::Measured| *m.energy_j.get("gpu0").unwrap();
        let total = report
            .monitors
            .as_ref()
            .unwrap()
            .hardware
            .measured
            .as_ref()
            .unwrap();
        // The counter goes up by 0.01 J per nanosecond.
        assert!((joules(total) - total.seconds * 1e7).abs() < 1e-9 && joules(total) > 10.0);
        let groups = report.groups.as_ref().unwrap();
        let parts: Vec<f64> = groups
            .iter()
            .map(|g| joules(g.measured.as_ref().unwrap()))
            .collect();
        assert!(
            parts.len() > 1 && parts.iter().all(|j| *j > 0.0),
            "{parts:?}"
        );
        // The range begins in a stage, and ends behind a step, that none of its calls belongs to.
        let missing = joules(total) - parts.iter().sum::<f64>();
        assert!(
            (-1e-9..1.21).contains(&missing),
            "{by:?} {missing} {parts:?}"
        );
        insta::assert_snapshot!(
            format!("monitored_by_{}", by.name()),
            text(&report, Format::Table)
        );
    }
}

#[test]
fn sensors_know_stages_and_ranges_but_no_modules() {
    let of = |selection: Selection| {
        let report = monitored(&Request {
            selection,
            ..Request::default()
        });
        let hardware = report.monitors.unwrap().hardware;
        (
            hardware.measured,
            report.skipped.contains_key("monitors/hardware"),
        )
    };
    let (whole, _) = of(Selection::default());
    let (backward, _) = of(Selection {
        stages: vec!["backward".to_owned()],
        ..Selection::default()
    });
    let (whole, backward) = (whole.unwrap(), backward.unwrap());
    assert!(backward.seconds > 0.0 && backward.seconds < 0.5 * whole.seconds);
    let (scoped, skipped) = of(Selection {
        scopes: vec![Glob::new("Net.fc")],
        ..Selection::default()
    });
    assert!(scoped.is_none() && skipped);
}
