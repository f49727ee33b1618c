//! Rules on single calls, with numbers worked out by hand.

use optape_trace::{Argument, DType, SignatureDef, call_flags, tensor_flags};

use super::{CallRow, Counted, RuleSet};
use crate::testing::{Call, Statistic, Tape, op, schema, tensor};

/// What a counter of a rule set makes of `calls` equal calls.
fn counted(set: &str, counter: &str, call: &Call, calls: u64) -> Counted {
    let op = op(call.schema);
    let mut tape = Tape::new();
    for _ in 0..calls {
        tape.call(optape_trace::ScopeId::GLOBAL, call);
    }
    let trace = tape.trace();
    let stream = &trace.streams()[0];
    let rows = trace.summary(stream.id(), 0..stream.records()).unwrap();
    assert_eq!(rows.len(), 1);
    let signature: &SignatureDef = stream.dictionary().signature(rows[0].signature).unwrap();
    let set = RuleSet::named(set).unwrap();
    let row = set.seen(CallRow {
        op: &op,
        signature,
        pattern: stream.dictionary().pattern(rows[0].pattern).unwrap(),
        calls: rows[0].calls,
        integer_sums: &rows[0].integer_sums,
        float_sums: &rows[0].float_sums,
        values_before: false,
        dictionary: Some(stream.dictionary()),
        notes: None,
    });
    set.counter(counter).unwrap().count(&row)
}

const JUNE: &str = "spikingjelly-2026-06";
const RELEASE: &str = "spikingjelly-2.0.0";
const OWN: &str = "optape";

fn mm(first: Statistic, second: Statistic) -> Call {
    Call::new(
        schema::MM,
        vec![Argument::Tensor(0), Argument::Tensor(1)],
        vec![tensor(&[2, 3]), tensor(&[3, 4])],
        vec![tensor(&[2, 4])],
    )
    .with(vec![first, second])
}

#[test]
fn a_matrix_product_counts_2k_minus_1_or_2k_flops_per_output() {
    let call = mm(Statistic::analog(0), Statistic::analog(1));
    assert_eq!(counted(JUNE, "flop", &call, 3), Counted::Value(3 * 8 * 5));
    assert_eq!(
        counted(RELEASE, "flop", &call, 3),
        Counted::Value(3 * 8 * 6)
    );
    assert_eq!(counted(OWN, "flop", &call, 3), Counted::Value(3 * 8 * 6));
    assert_eq!(
        counted(RELEASE, "memory_access", &call, 1),
        Counted::Value(4 * (6 + 12 + 8))
    );
}

#[test]
fn spikes_turn_multiply_accumulates_into_accumulates() {
    for set in [JUNE, RELEASE, OWN] {
        let dense = mm(Statistic::analog(0), Statistic::analog(1));
        assert_eq!(counted(set, "mac", &dense, 2), Counted::Value(48));
        assert_eq!(counted(set, "synop", &dense, 2), Counted::Value(0));
        let left = mm(Statistic::spikes(0, 5), Statistic::analog(1));
        assert_eq!(counted(set, "mac", &left, 2), Counted::Value(0));
        assert_eq!(counted(set, "synop", &left, 2), Counted::Value(2 * 5 * 4));
        let right = mm(Statistic::analog(0), Statistic::spikes(1, 7));
        assert_eq!(counted(set, "ac", &right, 1), Counted::Value(7 * 2));
        let mut both = mm(Statistic::spikes(0, 5), Statistic::spikes(1, 7));
        both.statistics.push(Statistic::product(11));
        assert_eq!(counted(set, "ac", &both, 3), Counted::Value(33));
    }
}

#[test]
fn a_missing_level_is_named_and_not_counted_as_zero() {
    let mut call = mm(Statistic::analog(0), Statistic::analog(1));
    call.statistics.clear();
    for set in [JUNE, RELEASE, OWN] {
        let Counted::Missing(missing) = counted(set, "mac", &call, 1) else {
            panic!("{set}: a number without statistics")
        };
        assert_eq!(missing.level, "T1");
        assert_eq!(
            missing.to_string(),
            "the trace does not hold whether 'self' is binary of aten::mm (level T1); record with `optape record --stats rules`"
        );
    }
}

fn addmm(alpha: Argument, beta: Argument, spikes: bool) -> Call {
    let first = if spikes {
        Statistic::spikes(1, 3)
    } else {
        Statistic::analog(1)
    };
    Call::new(
        schema::ADDMM,
        vec![
            Argument::Tensor(0),
            Argument::Tensor(1),
            Argument::Tensor(2),
            beta,
            alpha,
        ],
        vec![tensor(&[4]), tensor(&[2, 3]), tensor(&[3, 4])],
        vec![tensor(&[2, 4])],
    )
    .with(vec![first, Statistic::analog(2)])
}

#[test]
fn alpha_and_beta_are_seen_as_structure_or_as_varying() {
    let one = || Argument::Int(1);
    let cases = [
        (one(), one(), 40 + 8, 208 + 16),
        (one(), Argument::Float(0.0), 40, 104),
        (Argument::FloatPayload, one(), 40 + 8 + 8, 0),
        (one(), Argument::FloatPayload, 40 + 4 + 8, 0),
    ];
    for (alpha, beta, flops, _) in cases {
        assert_eq!(
            counted(JUNE, "flop", &addmm(alpha, beta, false), 1),
            Counted::Value(flops)
        );
    }
    let unread = counted(
        JUNE,
        "memory_access",
        &addmm(one(), Argument::Float(0.0), false),
        1,
    );
    let read = counted(JUNE, "memory_access", &addmm(one(), one(), false), 1);
    assert_eq!(
        (unread, read),
        (Counted::Value(4 * 26), Counted::Value(4 * 30))
    );
}

#[test]
fn a_scaled_product_with_spikes_is_zero_upstream_and_counted_by_optape() {
    let call = addmm(Argument::FloatPayload, Argument::Int(1), true);
    assert_eq!(counted(JUNE, "synop", &call, 1), Counted::Value(0));
    assert_eq!(counted(RELEASE, "ac", &call, 1), Counted::Value(0));
    assert_eq!(counted(OWN, "synop", &call, 1), Counted::Value(12));
}

fn add(schema: &'static str, statistics: Vec<Statistic>) -> Call {
    Call::new(
        schema,
        vec![Argument::Tensor(0), Argument::Tensor(1), Argument::Int(1)],
        vec![tensor(&[2, 3]), tensor(&[2, 3])],
        vec![tensor(&[2, 3])],
    )
    .with(statistics)
}

#[test]
fn upstream_sees_in_place_operands_after_the_op() {
    // Before: both binary. After: the first is the sum, and not binary any more.
    let call = add(
        schema::ADD_,
        vec![
            Statistic::spikes(0, 2),
            Statistic {
                binary: Some(false),
                numbers: Vec::new(),
                ..Statistic::spikes(0, 0)
            }
            .after(),
            Statistic::spikes(1, 3),
        ],
    );
    assert_eq!(counted(JUNE, "ac", &call, 1), Counted::Value(6));
    assert_eq!(counted(OWN, "ac", &call, 1), Counted::Value(5));
    // Autograd's accumulation is `add` to a Python mode: a fresh tensor, values before.
    let accumulation = call.flagged(call_flags::ACCUMULATION);
    assert_eq!(counted(JUNE, "ac", &accumulation, 1), Counted::Value(5));
    assert_eq!(counted(RELEASE, "ac", &accumulation, 1), Counted::Value(5));
}

#[test]
fn numbers_are_no_tensors() {
    let mut call = add(schema::ADD, vec![Statistic::spikes(0, 2)]);
    call.inputs[1] = tensor(&[]);
    call.inputs[1].flags = tensor_flags::WRAPPED_NUMBER;
    call.inputs[1].dtype = DType::F64;
    for set in [JUNE, RELEASE, OWN] {
        assert_eq!(counted(set, "ac", &call, 1), Counted::Value(6));
        assert_eq!(counted(set, "memory_access", &call, 1), Counted::Value(48));
    }
}

#[test]
fn upstream_looks_for_alpha_among_keyword_arguments_alone() {
    let call = Call::new(
        schema::RSUB,
        vec![
            Argument::Tensor(0),
            Argument::Int(1),
            Argument::FloatPayload,
        ],
        vec![tensor(&[2, 3])],
        vec![tensor(&[2, 3])],
    );
    assert_eq!(counted(JUNE, "flop", &call, 1), Counted::Value(6));
    assert_eq!(counted(OWN, "flop", &call, 1), Counted::Value(7));
}

#[test]
fn logical_not_breaks_upstream_memory_access_and_not_ours() {
    let call = Call::new(
        schema::LOGICAL_NOT,
        vec![Argument::Tensor(0)],
        vec![tensor(&[6])],
        vec![tensor(&[6])],
    );
    for set in [JUNE, RELEASE] {
        let Counted::Failed(text) = counted(set, "memory_access", &call, 1) else {
            panic!("{set} does not fail")
        };
        assert_eq!(
            text,
            "ValueError: not enough values to unpack (expected 2, got 1)"
        );
    }
    assert_eq!(counted(OWN, "memory_access", &call, 1), Counted::Value(48));
}

const CONVOLUTION: &str = "aten::convolution(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups) -> Tensor";

fn convolution(transposed: bool, shapes: [&[i64]; 3], groups: i64) -> Call {
    let list = |v: i64| Argument::IntList(vec![v, v]);
    Call::new(
        CONVOLUTION,
        vec![
            Argument::Tensor(0),
            Argument::Tensor(1),
            Argument::None,
            list(1),
            list(0),
            list(1),
            Argument::Bool(transposed),
            list(0),
            Argument::Int(groups),
        ],
        vec![tensor(shapes[0]), tensor(shapes[1])],
        vec![tensor(shapes[2])],
    )
    .with(vec![Statistic::analog(0), Statistic::analog(1)])
}

#[test]
fn convolutions_count_kernel_times_positions_groups_and_transposition_included() {
    let plain = convolution(false, [&[2, 3, 5, 5], &[4, 3, 3, 3], &[2, 4, 3, 3]], 1);
    let products = 2 * 4 * 9 * 27;
    assert_eq!(
        counted(RELEASE, "flop", &plain, 1),
        Counted::Value(2 * products)
    );
    assert_eq!(
        counted(JUNE, "flop", &plain, 1),
        Counted::Value(2 * products - 72)
    );
    let grouped = convolution(false, [&[2, 4, 5, 5], &[4, 2, 3, 3], &[2, 4, 3, 3]], 2);
    let transposed = convolution(true, [&[2, 3, 3, 3], &[3, 4, 3, 3], &[2, 4, 5, 5]], 1);
    for set in [JUNE, RELEASE, OWN] {
        assert_eq!(counted(set, "mac", &plain, 1), Counted::Value(products));
        assert_eq!(
            counted(set, "mac", &grouped, 1),
            Counted::Value(2 * 4 * 9 * 18)
        );
        assert_eq!(
            counted(set, "mac", &transposed, 1),
            Counted::Value(2 * 3 * 9 * 36)
        );
    }
}

#[test]
fn the_gradient_of_a_grouped_convolution_is_mended() {
    const BACKWARD: &str = "aten::convolution_backward(Tensor grad_output, Tensor input, Tensor weight, int[]? bias_sizes, int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)";
    let list = |v: i64| Argument::IntList(vec![v, v]);
    let call = |groups: i64, c_in: i64| {
        Call::new(
            BACKWARD,
            vec![
                Argument::Tensor(0),
                Argument::Tensor(1),
                Argument::Tensor(2),
                Argument::IntList(vec![4]),
                list(1),
                list(0),
                list(1),
                Argument::Bool(false),
                list(0),
                Argument::Int(groups),
                Argument::BoolList(vec![true, true, true]),
            ],
            vec![
                tensor(&[2, 4, 3, 3]),
                tensor(&[2, c_in, 5, 5]),
                tensor(&[4, c_in / groups, 3, 3]),
            ],
            vec![
                tensor(&[2, c_in, 5, 5]),
                tensor(&[4, c_in / groups, 3, 3]),
                tensor(&[4]),
            ],
        )
    };
    let bias = 4 * (2 * 9 - 1);
    let products = |depth: i128| 2 * 4 * 9 * depth * 9;
    assert_eq!(
        counted(OWN, "flop", &call(1, 4), 1),
        Counted::Value(4 * products(4) + bias)
    );
    assert_eq!(
        counted(RELEASE, "flop", &call(1, 4), 1),
        Counted::Value(4 * products(4) + bias)
    );
    assert_eq!(
        counted(OWN, "flop", &call(2, 4), 1),
        Counted::Value(4 * products(2) + bias)
    );
    // Upstream takes the weight's gradient for that of an ungrouped convolution.
    assert_eq!(
        counted(RELEASE, "flop", &call(2, 4), 1),
        Counted::Value(2 * products(2) + 2 * products(4) + bias)
    );
}

#[test]
fn hostile_sizes_are_no_numbers() {
    let huge = mm_of(&[1 << 40, 1 << 20], &[1 << 20, 4]);
    for set in [JUNE, RELEASE, OWN] {
        assert!(
            matches!(counted(set, "flop", &huge, 1), Counted::Unknown(Some(_))),
            "{set}"
        );
        assert!(
            matches!(
                counted(set, "flop", &mm_of(&[2, -3], &[3, 4]), 1),
                Counted::Unknown(Some(_))
            ),
            "{set}"
        );
    }
    assert!(matches!(
        counted(OWN, "flop", &mm_of(&[2, 3], &[5, 4]), 1),
        Counted::Unknown(Some(_))
    ));
}

fn mm_of(a: &[i64], b: &[i64]) -> Call {
    let meta = |shape: &[i64]| optape_trace::TensorMeta {
        shape: shape.to_vec(),
        ..tensor(&[])
    };
    Call::new(
        schema::MM,
        vec![Argument::Tensor(0), Argument::Tensor(1)],
        vec![meta(a), meta(b)],
        vec![tensor(&[2, 4])],
    )
}
