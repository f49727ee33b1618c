//! Rooflines of made-up traces.

use super::{Limit, Peaks, Roof, Roofline, RooflineFormat, roofline};
use crate::rules::RuleSet;
use crate::selection::Selection;
use crate::testing;
use crate::{By, ReplayError, Request, Traces};

/// A machine as small as the network: the ridge stands between its modules.
fn peaks() -> Peaks {
    let roof = |name: &str, flop_per_s, bytes_per_s| Roof {
        name: name.to_owned(),
        flop_per_s,
        bytes_per_s,
    };
    Peaks {
        machine: "a <small> machine".to_owned(),
        source: Some("made up".to_owned()),
        roofs: vec![
            roof("2 cores, float32", 2e9, 8e9),
            roof("1 core, float32", 1e9, 5e9),
        ],
    }
}

fn of(
    request: &Request,
    peaks: Option<&Peaks>,
    roof: Option<&str>,
) -> Result<Roofline, ReplayError> {
    let traces = Traces::of("spiking.optape", testing::spiking_tape().trace());
    roofline(
        &traces,
        &RuleSet::named("optape").unwrap(),
        request,
        peaks,
        roof,
    )
}

fn text(roofline: &Roofline, format: RooflineFormat) -> String {
    let mut bytes = Vec::new();
    roofline.write(format, &mut bytes).unwrap();
    String::from_utf8(bytes)
        .unwrap()
        .replace(env!("CARGO_PKG_VERSION"), "VERSION")
}

#[test]
fn a_small_network_in_all_formats() {
    let request = Request {
        by: Some(By::Module),
        ..Request::default()
    };
    let roofline = of(&request, Some(&peaks()), None).unwrap();
    insta::assert_snapshot!("table", text(&roofline, RooflineFormat::Table));
    insta::assert_snapshot!("markdown", text(&roofline, RooflineFormat::Markdown));
    insta::assert_snapshot!("csv", text(&roofline, RooflineFormat::Csv));
    insta::assert_snapshot!("json", text(&roofline, RooflineFormat::Json));
    insta::assert_snapshot!("svg", text(&roofline, RooflineFormat::Svg));
}

#[test]
fn numbers_are_those_of_the_counters_and_the_clock() {
    let request = Request {
        by: Some(By::Module),
        ..Request::default()
    };
    let roofline = of(&request, Some(&peaks()), None).unwrap();
    let fc = roofline.points.iter().find(|p| p.key == "Net.fc").unwrap();
    // Six calls of 50 ns: four linear ones of 2 * 24 + 8, two products of 2 * 24.
    assert_eq!((fc.calls, fc.flop, fc.time_ns), (6, 320, Some(300)));
    // 16 + 24 + 48 read and 32 written; 24 + 32 read and 48 written.
    assert_eq!(fc.bytes, 4 * 120 + 2 * 104);
    let close = |a: Option<f64>, b: f64| (a.unwrap() - b).abs() < 1e-9 * b;
    assert!(close(fc.flop_per_byte, 320.0 / 688.0));
    assert!(close(fc.flop_per_s, 320.0 / 300e-9));
    assert!(close(fc.attainable_flop_per_s, 2e9));
    assert!(close(fc.share_of_roof, 320.0 / 300e-9 / 2e9));
    assert_eq!(fc.limit, Some(Limit::Compute));
    let lif = roofline.points.iter().find(|p| p.key == "Net.lif").unwrap();
    assert_eq!(lif.limit, Some(Limit::Memory));
    // What has no rule is in no point, and that is said.
    let calls: u64 = roofline.points.iter().map(|p| p.calls).sum();
    assert_eq!(calls, roofline.total.calls);
    assert!(
        roofline
            .notes
            .iter()
            .any(|n| n.starts_with("2 of 17 op calls have no rule")),
        "{:?}",
        roofline.notes
    );
}

#[test]
fn times_do_not_depend_on_how_the_trace_is_read() {
    let with = |from_events, steps: &[std::ops::Range<u64>]| {
        let request = Request {
            by: Some(By::Module),
            from_events,
            selection: Selection {
                steps: steps.to_vec(),
                ..Selection::default()
            },
            ..Request::default()
        };
        of(&request, None, None).unwrap()
    };
    for steps in [&[][..], &[1..2]] {
        assert_eq!(with(false, steps).points, with(true, steps).points);
    }
    assert_eq!(with(false, &[1..2]).total.time_ns, Some(350));
}

#[test]
fn without_peaks_there_are_intensities() {
    let roofline = of(&Request::default(), None, None).unwrap();
    assert!(roofline.roof.is_none());
    let all = roofline.points.first().unwrap();
    assert_eq!((all.key.as_str(), all.limit), ("Global", None));
    assert!(all.flop_per_byte.is_some() && all.flop_per_s.is_some());
    let svg = text(&roofline, RooflineFormat::Svg);
    assert!(svg.contains("Net.fc") && !svg.contains("polyline"));
}

#[test]
fn roofs_are_chosen_by_name() {
    let one = of(&Request::default(), Some(&peaks()), Some("1 core, float32")).unwrap();
    assert_eq!(one.roof.unwrap().name, "1 core, float32");
    let error = of(&Request::default(), Some(&peaks()), Some("1 core")).unwrap_err();
    assert!(
        error.to_string().contains("there is no roof '1 core'"),
        "{error}"
    );
    assert!(of(&Request::default(), None, Some("x")).is_err());
}

#[test]
fn calls_on_a_device_have_no_time() {
    use optape_trace::{Argument, Device, ScopeId};

    use crate::testing::{Call, Tape, schema, tensor};

    let mut tape = Tape::new();
    let on_gpu = |shape: &[i64]| optape_trace::TensorMeta {
        device: Device { kind: 1, index: 0 },
        ..tensor(shape)
    };
    tape.call(
        ScopeId::GLOBAL,
        &Call::new(
            schema::MM,
            vec![Argument::Tensor(0), Argument::Tensor(1)],
            vec![on_gpu(&[4, 4]), on_gpu(&[4, 4])],
            vec![on_gpu(&[4, 4])],
        ),
    );
    let traces = Traces::of("gpu.optape", tape.trace());
    let found = roofline(
        &traces,
        &RuleSet::named("optape").unwrap(),
        &Request::default(),
        Some(&peaks()),
        None,
    )
    .unwrap();
    assert_eq!((found.total.flop, found.total.time_ns), (128, None));
    assert!(found.total.attainable_flop_per_s.is_some());
    assert!(found.notes.iter().any(|n| n.contains("GPU")));
    // Drawn where it could be at most.
    assert!(text(&found, RooflineFormat::Svg).contains("fill=\"none\" fill-opacity"));
}
