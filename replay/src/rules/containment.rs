//! What the rules of mac, ac and synop read is in the table of needs that capture works by.

use optape_trace::needs::{self, Need as Taken, OpNeeds, Product};
use optape_trace::{
    Argument, OpDef, Operand, Pattern, PatternEntry, SignatureDef, Stage, State, TensorMeta, When,
    fields,
};

use super::{CallRow, Counted, Need, RULE_SETS, RuleSet};
use crate::testing::{op, tensor};

const COUNTERS: [&str; 3] = ["mac", "ac", "synop"];

fn sets() -> Vec<RuleSet> {
    RULE_SETS
        .iter()
        .map(|name| RuleSet::named(name).unwrap())
        .collect()
}

#[test]
fn every_need_that_a_rule_declares_is_in_the_table() {
    let mut checked = 0;
    for set in sets() {
        for counter in COUNTERS {
            let counter = set.counter(counter).unwrap();
            for name in counter.ops() {
                let rule = counter.rule(name).unwrap();
                for need in &rule.needs {
                    let line = needs::rules_need(name)
                        .unwrap_or_else(|| panic!("{}: {name} needs statistics", set.name));
                    let there = match need {
                        Need::Spikes(argument, after) => {
                            let written = name.contains("_.") || name.ends_with('_');
                            line.covers(argument, When::Before, false)
                                && (!*after || !written || line.covers(argument, When::After, true))
                        }
                        Need::FanOut(argument) => {
                            matches!(line.product, Some((first, _, Product::Convolution)) if first == *argument)
                        }
                        Need::Product => line.product.is_some(),
                    };
                    assert!(there, "{}: {name} needs {need:?}", set.name);
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 300, "only {checked} needs were looked at");
}

/// An op, its arguments, their tensors, its results.
type Tried = (OpDef, Vec<Argument>, Vec<TensorMeta>, Vec<TensorMeta>);

/// Calls of every op in the table, with tensors that fit.
fn calls() -> Vec<Tried> {
    use Argument::{Bool, Int, IntList, None, Tensor};
    let t = tensor;
    let mut calls = Vec::new();
    let mut add =
        |schema: &str, arguments: Vec<Argument>, inputs: Vec<TensorMeta>, output: TensorMeta| {
            calls.push((op(schema), arguments, inputs, vec![output]));
        };
    for (name, writes) in [
        ("add", false),
        ("add_", true),
        ("sub", false),
        ("sub_", true),
        ("rsub", false),
    ] {
        let kind = if writes { "Tensor(a!)" } else { "Tensor" };
        add(
            &format!("aten::{name}.Tensor({kind} self, Tensor other, *, Scalar alpha=1) -> {kind}"),
            vec![Tensor(0), Tensor(1), Int(1)],
            vec![t(&[2, 3]), t(&[2, 3])],
            t(&[2, 3]),
        );
        add(
            &format!("aten::{name}.Scalar({kind} self, Scalar other, Scalar alpha=1) -> {kind}"),
            vec![Tensor(0), Int(2), Int(1)],
            vec![t(&[2, 3])],
            t(&[2, 3]),
        );
    }
    add(
        "aten::mm(Tensor self, Tensor mat2) -> Tensor",
        vec![Tensor(0), Tensor(1)],
        vec![t(&[2, 3]), t(&[3, 4])],
        t(&[2, 4]),
    );
    for name in ["addmm", "addmm_"] {
        add(
            &format!(
                "aten::{name}(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor"
            ),
            vec![Tensor(0), Tensor(1), Tensor(2), Int(1), Int(1)],
            vec![t(&[2, 4]), t(&[2, 3]), t(&[3, 4])],
            t(&[2, 4]),
        );
    }
    add(
        "aten::bmm(Tensor self, Tensor mat2) -> Tensor",
        vec![Tensor(0), Tensor(1)],
        vec![t(&[5, 2, 3]), t(&[5, 3, 4])],
        t(&[5, 2, 4]),
    );
    for (name, out) in [
        ("baddbmm", vec![5, 2, 4]),
        ("baddbmm_", vec![5, 2, 4]),
        ("addbmm", vec![2, 4]),
    ] {
        add(
            &format!(
                "aten::{name}(Tensor self, Tensor batch1, Tensor batch2, *, Scalar beta=1, Scalar alpha=1) -> Tensor"
            ),
            vec![Tensor(0), Tensor(1), Tensor(2), Int(1), Int(1)],
            vec![t(&out), t(&[5, 2, 3]), t(&[5, 3, 4])],
            t(&out),
        );
    }
    add(
        "aten::matmul(Tensor self, Tensor other) -> Tensor",
        vec![Tensor(0), Tensor(1)],
        vec![t(&[5, 2, 3]), t(&[3, 4])],
        t(&[5, 2, 4]),
    );
    add(
        "aten::mv(Tensor self, Tensor vec) -> Tensor",
        vec![Tensor(0), Tensor(1)],
        vec![t(&[2, 3]), t(&[3])],
        t(&[2]),
    );
    add(
        "aten::dot(Tensor self, Tensor tensor) -> Tensor",
        vec![Tensor(0), Tensor(1)],
        vec![t(&[3]), t(&[3])],
        t(&[]),
    );
    add(
        "aten::addmv(Tensor self, Tensor mat, Tensor vec, *, Scalar beta=1, Scalar alpha=1) -> Tensor",
        vec![Tensor(0), Tensor(1), Tensor(2), Int(1), Int(1)],
        vec![t(&[2]), t(&[2, 3]), t(&[3])],
        t(&[2]),
    );
    add(
        "aten::linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        vec![Tensor(0), Tensor(1), None],
        vec![t(&[2, 3]), t(&[4, 3])],
        t(&[2, 4]),
    );
    add(
        "aten::convolution(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, bool transposed, \
         int[] output_padding, int groups) -> Tensor",
        vec![
            Tensor(0),
            Tensor(1),
            None,
            IntList(vec![1, 1]),
            IntList(vec![0, 0]),
            IntList(vec![1, 1]),
            Bool(false),
            IntList(vec![0, 0]),
            Int(1),
        ],
        vec![t(&[2, 3, 5, 5]), t(&[4, 3, 3, 3])],
        t(&[2, 4, 3, 3]),
    );
    for (dimensions, overload) in [
        (1, ""),
        (1, ".padding"),
        (2, ""),
        (2, ".padding"),
        (3, ""),
        (3, ".padding"),
    ] {
        let space = vec![5; dimensions];
        add(
            &format!(
                "aten::conv{dimensions}d{overload}(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor"
            ),
            vec![Tensor(0), Tensor(1), None],
            vec![
                t(&[&[2, 3], &space[..]].concat()),
                t(&[&[4, 3], &vec![1; dimensions][..]].concat()),
            ],
            t(&[&[2, 4], &space[..]].concat()),
        );
    }
    for (dimensions, overload) in [(1, ""), (2, ".input"), (3, ".input")] {
        let space = vec![5; dimensions];
        add(
            &format!(
                "aten::conv_transpose{dimensions}d{overload}(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor"
            ),
            vec![Tensor(0), Tensor(1), None],
            vec![
                t(&[&[2, 3], &space[..]].concat()),
                t(&[&[3, 4], &vec![1; dimensions][..]].concat()),
            ],
            t(&[&[2, 4], &space[..]].concat()),
        );
    }
    let others: Vec<Tried> = calls.iter().flat_map(other_overloads).collect();
    calls.extend(others);
    calls
}

/// The same call in place and into `out`, where the table has such an overload.
fn other_overloads((op, arguments, inputs, outputs): &Tried) -> Vec<Tried> {
    let variant = |name: String, overload: &str| OpDef {
        name,
        overload: overload.to_owned(),
        ..op.clone()
    };
    let mut found = Vec::new();
    let in_place = variant(format!("{}_", op.name), &op.overload);
    if op.overload.is_empty() && needs::rules_need(&in_place.qualified_name()).is_some() {
        found.push((in_place, arguments.clone(), inputs.clone(), outputs.clone()));
    }
    for overload in ["out".to_owned(), format!("{}_out", op.overload)] {
        let mut out = variant(op.name.clone(), &overload);
        let is_number = op.overload == "Scalar";
        if (is_number && overload == "out") || needs::rules_need(&out.qualified_name()).is_none() {
            continue;
        }
        out.arguments.push(optape_trace::ArgumentDef {
            name: "out".to_owned(),
            written: true,
            keyword_only: true,
            ..out.arguments.first().cloned().unwrap_or_default()
        });
        let mut arguments = arguments.clone();
        arguments.push(Argument::Tensor(inputs.len() as u16));
        found.push((out, arguments, inputs.clone(), outputs.clone()));
    }
    found
}

/// The statistics that capture takes of a call by the table alone, where its operands are binary or not as `binary` says.
fn taken(
    op: &OpDef,
    arguments: &[Argument],
    line: &OpNeeds,
    binary: &dyn Fn(usize) -> bool,
) -> Pattern {
    let place = |name: &str| op.arguments.iter().position(|a| a.name == name);
    let index = |name: &str| match place(name).and_then(|at| arguments.get(at)) {
        Some(Argument::Tensor(index)) => Some(*index),
        _ => None,
    };
    let mut entries = Vec::new();
    for (name, need) in line.arguments {
        let Some(tensor) = index(name) else { continue };
        let is_binary = binary(usize::from(tensor));
        let counted = is_binary || *need != Taken::Binary;
        let mut mask = if counted { fields::NONZEROS } else { 0 };
        if is_binary
            && matches!(line.product, Some((first, _, Product::Convolution)) if first == *name)
        {
            mask |= fields::FAN_OUT_NONZEROS;
        }
        let written = place(name)
            .and_then(|at| op.arguments.get(at))
            .is_some_and(|a| a.written);
        let times: &[When] = if written {
            &[When::Before, When::After]
        } else {
            &[When::Before]
        };
        entries.extend(times.iter().map(|when| PatternEntry {
            operand: Operand::Tensor(tensor),
            when: *when,
            state: State::Present,
            binary: Some(is_binary),
            fields: mask,
        }));
    }
    if let Some((a, b, _)) = line.product
        && [a, b]
            .iter()
            .all(|name| index(name).is_some_and(|tensor| binary(usize::from(tensor))))
    {
        entries.push(PatternEntry {
            operand: Operand::Product,
            when: When::Before,
            state: State::Present,
            binary: None,
            fields: fields::PRODUCT_SUM,
        });
    }
    entries.sort_by_key(|e| (e.operand, e.when));
    Pattern { entries }
}

#[test]
fn what_capture_takes_by_the_table_is_enough_for_every_rule() {
    let calls = calls();
    for line in needs::RULES
        .iter()
        // What an einsum is stands in a text, which these calls have not; it has tests of its own.
        .filter(|line| line.op.starts_with("aten::") && line.op != "aten::einsum")
    {
        assert!(
            calls.iter().any(|(op, ..)| op.qualified_name() == line.op),
            "no call of {} is tried",
            line.op
        );
    }
    for set in sets() {
        for (op, arguments, inputs, outputs) in &calls {
            let name = op.qualified_name();
            let line =
                needs::rules_need(&name).unwrap_or_else(|| panic!("{name} is not in the table"));
            for binary in 0..4u8 {
                // Factors stand in the last two tensors; a bias before them is asked by no rule.
                let first = inputs.len().saturating_sub(2);
                let is_binary = |at: usize| at >= first && binary >> (at - first) & 1 == 1;
                let pattern = taken(op, arguments, line, &is_binary);
                let signature = SignatureDef {
                    op: optape_trace::OpId(0),
                    arguments: arguments.clone(),
                    outputs: vec![Argument::Tensor(inputs.len() as u16)],
                    tensors: inputs.iter().chain(outputs).cloned().collect(),
                    inputs: inputs.len() as u16,
                    flags: 0,
                    scope: optape_trace::ScopeId::GLOBAL,
                    stage: Stage::Forward,
                    stage_name: None,
                };
                let integer_sums = vec![1; pattern.words()];
                let row = CallRow {
                    op,
                    signature: &signature,
                    pattern: &pattern,
                    calls: 1,
                    integer_sums: &integer_sums,
                    float_sums: &[],
                    values_before: false,
                    dictionary: None,
                    notes: None,
                };
                for counter in COUNTERS {
                    let counted = set.counter(counter).unwrap().count(&row);
                    let fits = match set.name.as_ref() {
                        super::optape::NAME => matches!(counted, Counted::Value(_) | Counted::Zero),
                        _ => matches!(
                            counted,
                            Counted::Value(_) | Counted::Zero | Counted::Unknown(None)
                        ),
                    };
                    assert!(
                        fits,
                        "{} {counter} of {name}, binary {binary:02b}: {counted:?}",
                        set.name
                    );
                }
            }
        }
    }
}
