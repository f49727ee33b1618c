//! `--functions`: calls of torch's Python functions, with what they contain.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;

use optape_tests::{Bench, Call, calls_of};
use optape_trace::{Argument, Event, Record, Trace, call_flags};

/// The function's name, without the number of the form that it was called in.
fn function(call: &Call) -> Option<&str> {
    let name = call.op.strip_prefix("function::")?;
    let numbered = |end: &str| end.bytes().all(|b| b.is_ascii_digit());
    match name.rsplit_once('.') {
        Some((name, end)) if numbered(end) => Some(name),
        Some(_) => Some(name),
        None => None,
    }
}

fn nested(call: &Call) -> bool {
    call.signature.flags & call_flags::NESTED != 0
}

fn end(call: &Call) -> u64 {
    call.record.start_ns + call.record.duration_ns
}

/// The innermost function call that contains a call.
fn inside_of<'a>(calls: &'a [Call], inner: &Call) -> Option<&'a Call> {
    calls
        .iter()
        .filter(|outer| {
            function(outer).is_some()
                && outer.ordinal > inner.ordinal
                && outer.record.start_ns <= inner.record.start_ns
                && end(outer) >= end(inner)
        })
        .min_by_key(|outer| outer.record.duration_ns)
}

#[test]
fn function_calls_contain_what_they_call() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("functions.py"), &[]);
    let plain = bench.run(bench.command("python").args(&words[1..]));
    let plain = plain.expect_code(0).report();
    let mut record = bench.optape(["-q", "record", "--functions", "-o", "t.optape", "--"]);
    let done = bench.run(record.args(&words));
    done.expect_code(0);
    assert_eq!(done.stderr, "");
    let report = done.report();
    assert_eq!(report, plain, "the same run");

    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = trace.streams()[0].id();
    let dictionary = trace.streams()[0].dictionary();
    let calls = calls_of(&trace, stream);
    let find = |name: &str| {
        calls
            .iter()
            .find(|call| function(call) == Some(name))
            .unwrap_or_else(|| {
                let all: Vec<_> = calls.iter().filter_map(function).collect();
                panic!("no {name} among {all:?}")
            })
    };

    // What the mode of Python's own sees of a second run of the same work is what was recorded of the outermost calls of both.
    let mut outermost: BTreeMap<String, u64> = BTreeMap::new();
    for call in calls.iter().filter(|call| !nested(call)) {
        if function(call).is_some() {
            let name = &dictionary.op(call.signature.op).unwrap().name;
            *outermost.entry(name.clone()).or_default() += 1;
        }
    }
    let seen = report["seen"].as_object().unwrap();
    assert!(seen.len() > 15, "{seen:?}");
    for (name, count) in seen {
        let recorded = outermost.get(&format!("function::{name}")).copied();
        assert!(
            recorded >= Some(count.as_u64().unwrap()),
            "{name}: the mode saw {count}, recorded are {recorded:?}"
        );
    }

    let convolution = calls.iter().find(|c| c.op == "aten::convolution").unwrap();
    let outer = inside_of(&calls, convolution).unwrap();
    assert_eq!(function(outer), Some("torch.nn.functional.conv2d"));
    assert_eq!(outer.scope, "Net.conv");
    assert_eq!(outer.signature.tensors[0].shape, [2, 1, 4, 4]);
    assert_eq!(outer.signature.arguments[3], Argument::IntList(vec![1, 1]));
    let names: Vec<&str> = dictionary
        .op(outer.signature.op)
        .unwrap()
        .arguments
        .iter()
        .map(|a| a.name.as_str())
        .collect();
    assert_eq!(names[..3], ["input", "weight", "bias"]);

    // Identities of a function's results are those of the op that made them.
    let made = convolution.record.tensors.last().unwrap();
    assert_eq!(outer.record.tensors.last(), Some(made));

    // Composite functions of Python contain others.
    let attention = find("torch.nn.functional.multi_head_attention_forward");
    assert!(!nested(attention));
    let inner: Vec<&str> = calls
        .iter()
        .filter(|c| {
            nested(c) && inside_of(&calls, c).is_some_and(|o| o.ordinal == attention.ordinal)
        })
        .filter_map(function)
        .collect();
    assert!(
        inner.iter().any(|name| name.contains("linear")),
        "{inner:?}"
    );

    // Binary statistics of arguments.
    let spikes = calls
        .iter()
        .find(|c| function(c).is_some_and(|n| n.ends_with("linear")) && c.binary(0) == Some(true))
        .unwrap();
    assert!(spikes.nonzeros(0).unwrap() > 0);
    assert_eq!(spikes.binary(1), Some(true), "the weights are ones");

    // In place: what the argument was, and what it became.
    let add = calls
        .iter()
        .find(|c| {
            function(c) == Some("torch.Tensor.add_") && c.signature.tensors[0].shape == [2, 1, 4, 4]
        })
        .unwrap();
    let looks: Vec<_> = add
        .statistics
        .iter()
        .map(|(e, _)| (e.operand, e.when))
        .collect();
    assert_eq!(looks.len(), 3, "{looks:?}");
    let definition = dictionary.op(add.signature.op).unwrap();
    assert!(definition.arguments[0].written && !definition.arguments[1].written);
    assert!(definition.arguments[2].keyword_only && definition.arguments[2].name == "alpha");
    assert_eq!(add.signature.arguments[2], Argument::Int(2));

    // A failed call leaves no record, and the next one is in place.
    assert!(!calls.iter().any(|c| function(c) == Some("torch.mv")));
    let indexed = |c: &Call| function(c) == Some("torch.Tensor.__getitem__") && !nested(c);
    assert!(calls.iter().any(indexed));
    assert!(
        nested(find("torch.Tensor.mul")),
        "of Square's backward, inside Tensor.backward"
    );

    // No counter counts them.
    let with = bench.replay("t.optape", &[]);
    let mut record = bench.optape(["-q", "record", "-o", "u.optape", "--"]);
    bench.run(record.args(&words)).expect_code(0);
    let without = bench.replay("u.optape", &[]);
    assert_eq!(with["counters"], without["counters"]);
    assert_eq!(
        with["coverage"]["op_calls"],
        without["coverage"]["op_calls"]
    );
    let plain = Trace::open(&bench.path("u.optape")).unwrap();
    assert!(
        calls_of(&plain, plain.streams()[0].id())
            .iter()
            .all(|c| function(c).is_none())
    );
    let info = bench
        .run(&mut bench.optape(["info", "t.optape", "--format", "json"]))
        .json();
    let functions: u64 = calls.iter().filter(|c| function(c).is_some()).count() as u64;
    assert_eq!(info[0]["streams"][0]["function_calls"], functions);
}

#[test]
fn compiled_code_is_left_as_it_is() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("compiled_functions.py"), &[]);
    let plain = bench.run(bench.command("python").args(&words[1..]));
    let plain = plain.expect_code(0).report();
    let mut record = bench.optape(["-q", "record", "--functions", "-o", "t.optape", "--"]);
    let done = bench.run(record.args(&words));
    assert_eq!(done.expect_code(0).report(), plain);

    let trace = Trace::open(&bench.path("t.optape")).unwrap();
    let stream = trace.streams()[0].id();
    let calls = calls_of(&trace, stream);
    let names: Vec<&str> = calls.iter().filter_map(function).collect();
    for outside in ["softmax", "softplus", "relu"] {
        assert!(
            names.iter().any(|n| n.ends_with(outside)),
            "{outside}: {names:?}"
        );
    }
    let relus = names.iter().filter(|n| n.ends_with("relu")).count();
    assert_eq!(
        relus,
        1 + usize::from(names.contains(&"torch.relu")),
        "compiled ones are not seen: {names:?}"
    );
    let said = trace.records(stream).any(|record| match record.unwrap().1 {
        Record::Other(moment) => {
            matches!(moment.event, Event::Fact { value, .. } if value.contains("compiled code ran"))
        }
        _ => false,
    });
    assert!(said, "that it is inert is said");
}
