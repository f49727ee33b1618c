//! Bytes that an op reads and writes at least: its operands once, its results once.

use super::{
    ADD_SCALAR, ADD_TENSOR, ATTENTION, ATTENTION_BACKWARD, BINARY, VIEWS, VIEWS_OF_2_0_0, Version,
    add_all,
};
use crate::rules::{CallRow, Rule, RuleError, TableCounter, TensorView};

/// The table of a version.
pub(super) fn table(version: Version) -> TableCounter {
    let source = match version {
        Version::June2026 => "SpikingJelly db3b6df0, op_counter/memory_access.py",
        Version::V2_0_0 => "SpikingJelly 2.0.0, op_counter/memory_access.py",
    };
    let mut table = TableCounter::new("memory_access", "byte");

    let product = Rule::per_call("bytes(x) + bytes(y) + bytes(out)", source, |row| {
        operands(row, &[0, 1])
    });
    add_all(&mut table, &["aten::mm", "aten::bmm"], &product);
    let added = Rule::per_call(
        "bytes(x) + bytes(y) + bytes(out) + [beta != 0] bytes(self)",
        source,
        |row| {
            let bias = if row.keyword_number("beta", 1.0).is_zero() {
                0
            } else {
                bytes(row, "self", row.optional_tensor_at(0))
            };
            Ok(operands(row, &[1, 2])? + bias)
        },
    );
    add_all(&mut table, &["aten::addmm", "aten::baddbmm"], &added);

    table.insert(
        "aten::convolution",
        Rule::per_call(
            "bytes(input) + bytes(weight) + bytes(bias) + bytes(out)",
            source,
            |row| operands(row, &[0, 1, 2]),
        ),
    );
    table.insert(
        "aten::convolution_backward",
        Rule::per_call(
            "bytes(grad) + [mask 0] (bytes(weight) + bytes(input gradient)) + [mask 1] (bytes(input) + bytes(weight \
             gradient)) + [mask 2] bytes(bias gradient)",
            source,
            convolution_backward,
        ),
    );

    table.insert(
        "aten::native_batch_norm",
        Rule::per_call(
            "bytes(input) + bytes(weight) + bytes(bias) + bytes(running statistics) + bytes(out) + [training] \
             bytes(saved statistics)",
            source,
            |row| {
                let read: i128 = (0..5).map(|i| bytes(row, "", row.optional_tensor_at(i))).sum();
                let outputs = if row.boolean("training")? { 3 } else { 1 };
                Ok(read + (0..outputs).map(|i| bytes(row, "", row.optional_output(i))).sum::<i128>())
            },
        ),
    );
    table.insert(
        "aten::native_batch_norm_backward",
        Rule::per_call(
            "what the gradients asked for read, once; nothing that is written",
            source,
            batch_norm_backward,
        ),
    );

    table.insert(
        "aten::max_pool2d_with_indices",
        Rule::per_call("bytes(self) + bytes(out) + bytes(indices)", source, |row| {
            Ok(operands(row, &[0])? + bytes(row, "indices", row.optional_output(1)))
        }),
    );
    // Argument 1 of the operator is `self`; upstream takes it for the indices.
    table.insert(
        "aten::max_pool2d_with_indices_backward",
        Rule::per_call("bytes(grad) + bytes(self) + bytes(out)", source, |row| {
            operands(row, &[0, 1])
        }),
    );

    let unary = Rule::per_call("bytes(self) + bytes(out)", source, |row| {
        operands(row, &[0])
    });
    add_all(
        &mut table,
        &[
            "aten::avg_pool2d",
            "aten::sum",
            "aten::sum.dim_IntList",
            "aten::mean.dim",
            "aten::neg",
            "aten::neg_",
            "aten::sigmoid_",
            "aten::clone",
            "aten::_to_copy",
            "aten::select_backward",
        ],
        &unary,
    );
    let binary = Rule::per_call("bytes(self) + bytes(other) + bytes(out)", source, |row| {
        operands(row, &[0, 1])
    });
    add_all(&mut table, &ADD_TENSOR, &binary);
    add_all(&mut table, &ADD_SCALAR, &binary);
    add_all(&mut table, &BINARY, &binary);
    table.insert(
        "aten::logical_not",
        Rule::per_call("fails: the rule is for two operands", source, |_| {
            Err(RuleError::Failed(
                "ValueError: not enough values to unpack (expected 2, got 1)".to_owned(),
            ))
        }),
    );

    table.insert(
        "aten::stack",
        Rule::per_call("sum of bytes(tensors) + bytes(out)", source, |row| {
            let read: i128 = row.tensors_at(0).iter().map(TensorView::bytes).sum();
            Ok(row.note("bytes(tensors)", read) + bytes(row, "out", row.optional_output(0)))
        }),
    );
    let fill = Rule::per_call("bytes(out)", source, |row| operands(row, &[]));
    add_all(&mut table, &["aten::full_like", "aten::ones_like"], &fill);
    let view = Rule::zero("a view or an allocation", source);
    add_all(&mut table, &VIEWS, &view);

    if version >= Version::V2_0_0 {
        table.insert("aten::sigmoid", unary);
        add_all(&mut table, &VIEWS_OF_2_0_0, &view);
        let forward = Rule::per_call(
            "bytes(q) + bytes(k) + bytes(v) + bytes(bias) + bytes(out)",
            source,
            |row| Ok(operands(row, &[0, 1, 2])? + attention_bias(row)),
        );
        add_all(&mut table, &ATTENTION, &forward);
        let backward = Rule::per_call(
            "bytes(grad) + bytes(q) + bytes(k) + bytes(v) + bytes(bias) + bytes(outputs)",
            source,
            |row| {
                let read: i128 = (0..4)
                    .map(|i| bytes(row, "", row.optional_tensor_at(i)))
                    .sum();
                Ok(read
                    + attention_bias(row)
                    + row.outputs().iter().map(TensorView::bytes).sum::<i128>())
            },
        );
        add_all(&mut table, &ATTENTION_BACKWARD, &backward);
    }
    table
}

fn bytes(row: &CallRow<'_>, name: &str, tensor: Option<TensorView<'_>>) -> i128 {
    let bytes = tensor.map_or(0, |t| t.bytes());
    if name.is_empty() {
        bytes
    } else {
        row.note(&format!("bytes({name})"), bytes)
    }
}

/// Bytes of the arguments at some places, and of the first output.
fn operands(row: &CallRow<'_>, places: &[usize]) -> Result<i128, RuleError> {
    let mut sum = 0;
    for &place in places {
        let name = row.op.arguments.get(place).map_or("", |a| a.name.as_str());
        sum += bytes(row, name, row.optional_tensor_at(place));
    }
    Ok(sum + bytes(row, "out", row.optional_output(0)))
}

fn convolution_backward(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let mask = row.booleans("output_mask")?;
    let asked = |i: usize| mask.get(i).copied().unwrap_or(false);
    let argument = |i| bytes(row, "", row.optional_tensor_at(i));
    let output = |i| bytes(row, "", row.optional_output(i));
    let mut sum = argument(0);
    if asked(0) {
        sum += argument(2) + output(0);
    }
    if asked(1) {
        sum += argument(1) + output(1);
    }
    if asked(2) {
        sum += output(2);
    }
    Ok(sum)
}

fn batch_norm_backward(row: &CallRow<'_>) -> Result<i128, RuleError> {
    let mask = row.booleans("output_mask")?;
    let asked = |i: usize| mask.get(i).copied().unwrap_or(false);
    let argument = |i| bytes(row, "", row.optional_tensor_at(i));
    let (grad, x, gamma) = (argument(0), argument(1), argument(2));
    let (saved_mean, saved_invstd) = (argument(5), argument(6));
    if row.boolean("train")? {
        return Ok(if asked(0) {
            grad + x + saved_mean + saved_invstd + gamma
        } else if asked(1) {
            grad + x + saved_mean + saved_invstd
        } else if asked(2) {
            grad
        } else {
            0
        });
    }
    let mut sum = 0;
    if asked(0) {
        sum += grad + saved_invstd + gamma;
    }
    if asked(1) {
        sum += x + saved_mean;
        if !asked(0) {
            sum += saved_invstd + grad;
        }
    }
    if asked(2) && !asked(0) && !asked(1) {
        sum += grad;
    }
    Ok(sum)
}

fn attention_bias(row: &CallRow<'_>) -> i128 {
    bytes(
        row,
        "bias",
        row.optional_tensor("attn_bias")
            .or_else(|| row.optional_tensor("attn_mask")),
    )
}
