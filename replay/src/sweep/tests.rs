//! A configuration of a sweep is what a replay with `--set` gives, whatever the number of threads.

use super::*;
use crate::energy::presets_of;
use crate::evaluate;
use crate::ordered::tests::full_trace;
use crate::report::Format;

fn traces() -> Traces {
    Traces::of("full", full_trace())
}

fn rules(name: &str) -> RuleSet {
    RuleSet::named(name).unwrap()
}

fn axes(texts: &[&str]) -> Sweep {
    Sweep {
        axes: texts.iter().map(|text| Axis::parse(text).unwrap()).collect(),
        columns: Vec::new(),
    }
}

fn energy(names: &[&str]) -> Request {
    Request {
        energy: Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect()),
        counters: Wanted::Named(Vec::new()),
        ..Request::default()
    }
}

fn run(rules: &RuleSet, request: &Request, of: &Sweep) -> SweepReport {
    sweep(&traces(), rules, request, of, &mut |_| true).unwrap()
}

fn refused(name: &str, request: &Request, texts: &[&str]) -> String {
    sweep(&traces(), &rules(name), request, &axes(texts), &mut |estimate| {
        !estimate.is_large()
    })
    .unwrap_err()
    .to_string()
}

fn cell(report: &SweepReport, configuration: usize, column: &str) -> Cell {
    let at = report.columns.iter().position(|c| c.name == column);
    let at = at.unwrap_or_else(|| panic!("there is no column {column}: {:?}", report.columns));
    report.figures(configuration)[at].clone()
}

#[test]
fn the_first_key_changes_slowest() {
    let report = run(
        &rules("optape"),
        &energy(&["compute_fp32"]),
        &axes(&["e_mac_pj=1,2", "e_ac_pj=0,10,20"]),
    );
    assert_eq!(report.configurations(), 6);
    assert_eq!(report.values(0), ["1", "0"]);
    assert_eq!(report.values(2), ["1", "20"]);
    assert_eq!(report.values(3), ["2", "0"]);
    let ac = |at| match cell(&report, at, "compute_fp32.energy_ac_pj") {
        Cell::Float(energy) => energy,
        other => panic!("{other:?}"),
    };
    assert_eq!((ac(0), ac(2)), (0.0, 2.0 * ac(1)));
    assert!(ac(1) > 0.0);
}

/// Every number that can be set, in every model: what a sweep takes for a coefficient is one.
#[test]
fn every_configuration_is_what_a_replay_with_set_gives() {
    let mut compared = 0;
    for name in ["optape", "spikingjelly-2026-06", "spikingjelly-2.0.0"] {
        let rules = rules(name);
        for preset in presets_of(rules.presets(), rules.models) {
            let file = preset.costs().unwrap();
            let one = energy(&[preset.name]);
            if evaluate(&traces(), &rules, &one).is_err() {
                continue;
            }
            for key in file.keys() {
                let Ok(value) = key.value.parse::<f64>() else {
                    continue;
                };
                // Shares stay below one, sizes of crossbars what they may be.
                let other = if key.kind.contains("from 0 to 1") {
                    value / 2.0
                } else {
                    value * 2.0
                };
                if other == value {
                    continue;
                }
                let mut of = axes(&[&format!("{}={value},{other}", key.key)]);
                of.columns = vec![Glob::new("*")];
                let swept = run(&rules, &one, &of);
                for (configuration, value) in [value, other].into_iter().enumerate() {
                    let set = Request {
                        settings: vec![Assignment {
                            key: key.key.clone(),
                            value: value.to_string(),
                        }],
                        ..one.clone()
                    };
                    let report = evaluate(&traces(), &rules, &set).unwrap();
                    let report = report.energy.get(preset.name).unwrap();
                    for (field, figure) in report.fields.iter() {
                        let wanted = match figure {
                            Figure::Float(value) => Cell::Float(*value),
                            Figure::Integer(value) => Cell::from(*value),
                            _ => continue,
                        };
                        let column = format!("{}.{field}", preset.name);
                        let found = cell(&swept, configuration, &column);
                        assert_eq!(found, wanted, "{name}: {column} with {}={value}", key.key);
                        compared += 1;
                    }
                }
            }
        }
    }
    assert!(compared > 500, "{compared}");
}

#[test]
fn a_capacity_is_a_simulation_for_each_value() {
    let rules = rules("spikingjelly-2026-06");
    let request = Request {
        counters: Wanted::Named(vec!["memory_residency".to_owned()]),
        energy: Wanted::Named(vec!["residency".to_owned()]),
        ..Request::default()
    };
    let of = axes(&["sram_kib=0,0.03125,64", "registers_kib=0,1", "e_dram_pj_per_byte=1,2"]);
    let mut told = Vec::new();
    let report = sweep(&traces(), &rules, &request, &of, &mut |estimate| {
        told.push(*estimate);
        true
    })
    .unwrap();
    // Three by two for the counter, and as many for the model.
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].configurations, told[0].simulations), (12, 12));
    assert!(report.axes[0].structural && report.axes[1].structural && !report.axes[2].structural);
    assert_eq!(report.axes[0].sets, ["residency", "memory_residency"]);
    for configuration in 0..report.configurations() {
        let values = report.values(configuration);
        let settings = report
            .axes
            .iter()
            .zip(&values)
            .map(|(axis, value)| Assignment {
                key: axis.key.clone(),
                value: (*value).to_owned(),
            });
        let set = Request {
            settings: settings.collect(),
            ..request.clone()
        };
        let alone = evaluate(&traces(), &rules, &set).unwrap();
        let counter = alone.counters.get("memory_residency").unwrap();
        let dram = counter.details["level_bits"].at(&["dram"]);
        let nothing = cell(&report, configuration, "memory_residency.level_bits.dram");
        assert_eq!(nothing, if dram == 0 { Cell::Nothing } else { dram.into() }, "{values:?}");
        let total = alone.energy.get("residency").unwrap().total_pj;
        let swept = cell(&report, configuration, "residency.energy_total_pj");
        assert_eq!(swept, Cell::Float(total), "{values:?}");
    }
}

#[test]
fn the_same_bytes_on_one_thread_and_on_sixteen() {
    let rules = rules("spikingjelly-2026-06");
    let of = axes(&["sram_kib=0.01..64:log:20", "memory_breakpoints=[[0, 0], [1, 1], [2, 2], [3, 3]]", "e_dram_pj_per_byte=1..100:lin:40"]);
    let text = |threads, format| {
        let request = Request {
            threads,
            ..energy(&["residency"])
        };
        let mut text = Vec::new();
        run(&rules, &request, &of).write(format, &mut text).unwrap();
        String::from_utf8(text).unwrap()
    };
    for format in [Format::Csv, Format::Json] {
        assert!(text(1, format) == text(16, format));
    }
    assert_eq!(text(3, Format::Csv).lines().count(), 1 + 20 * 40);
}

#[test]
fn what_has_none_of_the_keys_is_left_out_unless_it_is_asked_for() {
    let rules = rules("spikingjelly-2.0.0");
    let all = Request {
        energy: Wanted::All,
        counters: Wanted::All,
        ..Request::default()
    };
    let report = run(&rules, &all, &axes(&["simple_fp32.e_mac_pj=1,2"]));
    let columns: Vec<&str> = report.columns.iter().map(|c| c.name.as_str()).collect();
    assert!(columns.iter().all(|c| c.starts_with("simple_fp32.")), "{columns:?}");
    assert_eq!(report.axes[0].sets, ["simple_fp32"]);
    let named = Request {
        counters: Wanted::Named(vec!["mac".to_owned()]),
        ..energy(&["simple_fp32"])
    };
    let report = run(&rules, &named, &axes(&["e_mac_pj=1,2"]));
    assert_eq!(report.columns[0].name, "mac.total");
    assert_eq!(report.columns[0].unit.as_deref(), Some("MAC"));
}

#[test]
fn totals_are_divided_where_that_is_asked_for() {
    let request = Request {
        per: Per::Sample,
        samples: Some(4),
        ..energy(&["compute_fp32"])
    };
    let report = run(&rules("optape"), &request, &axes(&["e_mac_pj=1,2"]));
    let (Cell::Float(total), Cell::Float(per)) = (
        cell(&report, 1, "compute_fp32.energy_total_pj"),
        cell(&report, 1, "compute_fp32.energy_total_pj_per_sample"),
    ) else {
        panic!("both are energies");
    };
    assert!((total / 4.0 - per).abs() < 1e-12);
}

#[test]
fn tables_for_people_and_documents() {
    let report = run(
        &rules("optape"),
        &energy(&["compute_bits"]),
        &axes(&["bits=4,8,16"]),
    );
    let mut text = Vec::new();
    report.write(Format::Table, &mut text).unwrap();
    report.write(Format::Markdown, &mut text).unwrap();
    report.write(Format::Csv, &mut text).unwrap();
    insta::assert_snapshot!(String::from_utf8(text).unwrap());
}

#[test]
fn wrong_sweeps_are_refused() {
    let fp32 = energy(&["compute_fp32"]);
    let of = |texts: &[&str]| refused("spikingjelly-2026-06", &fp32, texts);
    assert_eq!(
        of(&["e_mac=1,2"]),
        "--sweep: there is no key 'e_mac'; did you mean 'e_mac_pj'?"
    );
    assert_eq!(
        of(&["e_mac_pj=1,-2"]),
        "--sweep e_mac_pj=-2: 'e_mac_pj' is negative; it is at least 0"
    );
    assert!(of(&["e_mac_pj=1,nan"]).contains("finite number"));
    assert!(of(&["e_mac_pj=1ns,2"]).contains("'ns' is none of"));
    assert!(of(&["e_mac_pj=1,2", "e_mac_pj=3"]).contains("stands there twice"));
    assert!(of(&["sram_kib=1,2"]).contains("memory_residency, memory_residency_small, residency would have it"));
    assert!(of(&["compute_fp32.e_mac=1"]).contains("compute_fp32 has no key 'e_mac'; did you mean 'e_mac_pj'?"));
    assert!(of(&["e_mac_pj=1..2:lin:4000", "e_ac_pj=1..2:lin:4000"]).contains("more than 10000000"));
    let large = of(&["e_mac_pj=1..2:lin:1000", "e_ac_pj=1..2:lin:1000"]);
    assert!(large.starts_with("the sweep is large: 1 000 000 configurations: "), "{large}");
    assert!(large.contains("add --yes"), "{large}");
    let grouped = Request {
        by: Some(crate::By::Module),
        ..fp32.clone()
    };
    assert!(refused("optape", &grouped, &["e_mac_pj=1,2"]).contains("leave --by away"));
    let mut nothing = axes(&["e_mac_pj=1,2"]);
    nothing.columns = vec![Glob::new("x*")];
    let error = sweep(&traces(), &rules("optape"), &fp32, &nothing, &mut |_| true);
    assert!(error.unwrap_err().to_string().contains("--columns x*"));
}

#[test]
fn refusals_are_those_of_a_replay() {
    let traces = Traces::of("rules", crate::testing::spiking_tape().trace());
    let rules = rules("spikingjelly-2026-06");
    let of = axes(&["e_add_pj=1,2"]);
    let named = sweep(&traces, &rules, &energy(&["lemaire"]), &of, &mut |_| true);
    assert!(matches!(named, Err(ReplayError::MissingLevel { .. })));
    let all = Request {
        energy: Wanted::All,
        ..Request::default()
    };
    let report = sweep(&traces, &rules, &all, &of, &mut |_| true).unwrap_err();
    assert!(report.to_string().contains("--level full"), "{report}");
}

#[test]
fn estimates_read_well() {
    let estimate = Estimate {
        configurations: 1_000_000,
        simulations: 64,
        records: 12_000,
        threads: 2,
        seconds: 200.0,
    };
    assert_eq!(
        estimate.to_string(),
        "1 000 000 configurations, 64 simulations of 12 000 records each: about 3 minutes on 2 thread(s)"
    );
    assert!(estimate.is_large() && estimate.is_worth_telling());
}
