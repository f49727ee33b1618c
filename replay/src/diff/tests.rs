//! Comparisons of made-up traces.

use optape_trace::{Argument, Event, ScopeId};

use super::{Diff, DiffOptions, Side, diff};
use crate::report::Per;
use crate::rules::RuleSet;
use crate::selection::Selection;
use crate::testing::{self, Call, Statistic, Tape, schema, tensor};
use crate::{By, Format, ReplayError, Request, Traces, Wanted};

fn spiking() -> Traces {
    Traces::of("snn.optape", testing::spiking_tape().trace())
}

/// The same network without spikes, of another class, with an activation in the place of the neuron, one step of two images.
fn analog() -> Traces {
    let mut tape = Tape::of_run(*b"another test run");
    let (net, root) = tape.module(ScopeId::GLOBAL, "Ann", "app.Ann", false);
    let (fc, fc_scope) = tape.module(root, "Ann.fc", "torch.nn.modules.linear.Linear", false);
    let (act, act_scope) = tape.module(root, "Ann.act", "app.Act", false);
    tape.enter_range("measure");
    tape.enter(0, net);
    tape.enter(1, fc);
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
    );
    tape.call(
        fc_scope,
        &linear.with(vec![Statistic::analog(1), Statistic::analog(2)]),
    );
    tape.exit(1, fc);
    tape.enter(2, act);
    let relu = Call::new(
        "aten::relu(Tensor self) -> Tensor",
        vec![Argument::Tensor(0)],
        vec![tensor(&[2, 4])],
        vec![tensor(&[2, 4])],
    );
    tape.call(act_scope, &relu);
    tape.exit(2, act);
    tape.exit(0, net);
    tape.moment(Event::Samples { count: 2 });
    tape.step(0);
    tape.exit_range("measure");
    Traces::of("ann.optape", tape.trace())
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

fn rules(name: &str) -> RuleSet {
    RuleSet::named(name).unwrap()
}

fn text(diff: &Diff, format: Format) -> String {
    let mut bytes = Vec::new();
    diff.write(format, &mut bytes).unwrap();
    String::from_utf8(bytes)
        .unwrap()
        .replace(env!("CARGO_PKG_VERSION"), "VERSION")
}

fn with_limits(limits: &[&str], rows: bool) -> DiffOptions {
    DiffOptions {
        limits: limits.iter().map(|text| text.parse().unwrap()).collect(),
        limit_rows: rows,
        ..DiffOptions::default()
    }
}

/// The spiking network against the other one.
fn networks(request: &Request, options: &DiffOptions) -> Result<Diff, ReplayError> {
    let (snn, ann, rules) = (spiking(), analog(), rules("optape"));
    let side = |traces| Side {
        traces,
        rules: &rules,
        request,
    };
    diff(side(&snn), side(&ann), options)
}

#[test]
fn two_networks_in_all_formats() {
    let request = Request {
        per: Per::Sample,
        ..measured()
    };
    let diff = networks(&request, &with_limits(&["compute_fp32=-10%"], false)).unwrap();
    insta::assert_snapshot!("networks", text(&diff, Format::Table));
    insta::assert_snapshot!("networks_markdown", text(&diff, Format::Markdown));
    insta::assert_snapshot!("networks_latex", text(&diff, Format::Latex));
    insta::assert_snapshot!("networks_csv", text(&diff, Format::Csv));
    insta::assert_snapshot!("networks_json", text(&diff, Format::Json));
}

#[test]
fn modules_are_what_they_are_said_to_be() {
    let options = DiffOptions {
        map: vec![("Net.lif".to_owned(), "Ann.act".to_owned())],
        ..DiffOptions::default()
    };
    let diff = networks(&measured(), &options).unwrap();
    let row = |name: &str| {
        let named = |row: &&super::DiffRow| row.a.as_deref() == Some(name);
        diff.rows.iter().find(named).unwrap()
    };
    assert_eq!(row("Net.lif").b.as_deref(), Some("Ann.act"));
    assert_eq!(row("Net.lif").name(diff.root.as_ref()), "Net.lif = Ann.act");
    assert_eq!(row("Net.fc").name(diff.root.as_ref()), "Net.fc");
    assert!(diff.rows.iter().all(|row| row.b.is_some()));
    // Every row adds up to what its sides say.
    let macs = row("Net.fc")
        .changes
        .iter()
        .find(|c| c.metric == "counters/mac")
        .unwrap();
    assert_eq!(
        (macs.a, macs.b, macs.relative),
        (
            Some(super::Amount::Integer(48)),
            Some(super::Amount::Integer(24)),
            Some(-0.5)
        )
    );
}

#[test]
fn the_same_run_twice_is_equal() {
    let (traces, rules, request) = (spiking(), rules("optape"), measured());
    let side = Side {
        traces: &traces,
        rules: &rules,
        request: &request,
    };
    let diff = diff(side, side, &with_limits(&["0", "0%"], true)).unwrap();
    assert!(diff.is_equal() && diff.exceeded.is_empty());
    insta::assert_snapshot!("equal", text(&diff, Format::Table));
}

#[test]
fn two_rule_sets_over_one_run() {
    let traces = spiking();
    let (old, new, request) = (rules("spikingjelly-2026-06"), rules("optape"), measured());
    let side = |rules| Side {
        traces: &traces,
        rules,
        request: &request,
    };
    let options = DiffOptions {
        by: By::Op,
        ..DiffOptions::default()
    };
    let diff = diff(side(&old), side(&new), &options).unwrap();
    insta::assert_snapshot!("rule_sets", text(&diff, Format::Table));
}

#[test]
fn other_selections_are_said() {
    let (traces, rules) = (spiking(), rules("optape"));
    let of = |stage: &str| Request {
        selection: Selection {
            stages: vec![stage.to_owned()],
            ..Selection::default()
        },
        counters: Wanted::Named(vec!["flop".to_owned()]),
        energy: Wanted::Named(Vec::new()),
        ..Request::default()
    };
    let (forward, backward) = (of("forward"), of("backward"));
    let side = |request| Side {
        traces: &traces,
        rules: &rules,
        request,
    };
    let diff = diff(
        side(&forward),
        side(&backward),
        &with_limits(&["flop=1000%"], false),
    )
    .unwrap();
    assert!(
        diff.setup
            .iter()
            .any(|note| note == "other selections: --stage forward in A, --stage backward in B"),
        "{:?}",
        diff.setup
    );
    assert_eq!(diff.totals.len(), 2, "op calls and flop: {:?}", diff.totals);
    assert!(diff.exceeded.is_empty());
}

#[test]
fn limits_that_are_passed_are_listed() {
    let diff = networks(&measured(), &with_limits(&["mac=0", "+10%"], true)).unwrap();
    let texts: Vec<String> = diff.exceeded.iter().map(super::Exceeded::text).collect();
    assert!(
        texts.contains(&"counters/mac is past mac=0: 48 -> 24 (-50.0 %)".to_owned()),
        "{texts:?}"
    );
    assert!(
        texts.contains(&"counters/mac of Net.fc is past mac=0: 48 -> 24 (-50.0 %)".to_owned()),
        "{texts:?}"
    );
    assert!(
        texts.iter().all(|t| !t.contains("+10%")),
        "nothing grew: {texts:?}"
    );
}

#[test]
fn what_is_not_there_is_an_error_with_a_way_out() {
    let error = |request: &Request, options: &DiffOptions| {
        networks(request, options).unwrap_err().to_string()
    };
    let text = error(&measured(), &with_limits(&["flopp=5%"], false));
    assert!(
        text.contains("there is no counter or model 'flopp'"),
        "{text}"
    );
    let map = |a: &str, b: &str| DiffOptions {
        map: vec![(a.to_owned(), b.to_owned())],
        ..DiffOptions::default()
    };
    let text = error(&measured(), &map("Net.lfi", "Ann.act"));
    assert!(text.contains("did you mean 'Net.lif'?"), "{text}");
    let text = error(&measured(), &map("Net.lif", "Net.act"));
    assert!(text.contains("did you mean 'Ann.act'?"), "{text}");
    // Two rule sets without any estimator in common.
    let (traces, june, release) = (
        spiking(),
        rules("spikingjelly-2026-06"),
        rules("spikingjelly-2.0.0"),
    );
    let asked = |counters: &[&str], energy: &[&str]| {
        let names = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect();
        Request {
            counters: Wanted::Named(names(counters)),
            energy: Wanted::Named(names(energy)),
            ..measured()
        }
    };
    let (a, b) = (asked(&["flop"], &[]), asked(&["mac"], &[]));
    let side = |rules, request| Side {
        traces: &traces,
        rules,
        request,
    };
    let error = diff(side(&june, &a), side(&release, &b), &DiffOptions::default()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no counter and no energy model in common"),
        "{error}"
    );
}
