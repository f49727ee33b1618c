//! Ops that move, fill, view or allocate, and the few of them that add on the way.

use super::amount::Quantity::Input;
use super::amount::{insert_all, work};
use super::{
    NO_ADDITIONS, NO_PRODUCTS, NO_SYNAPSES, Tables, Work, per_call, results_only, traffic,
    traffic_without, zero,
};
use crate::rules::{CallRow, Rule, RuleError, TensorView};

/// No bytes are touched: the result is a view, or nothing but metadata.
const VIEWS: &[&str] = &[
    "aten::view",
    "aten::view.dtype",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::_reshape_alias",
    "aten::view_as",
    "aten::reshape_as",
    "aten::alias",
    "aten::detach",
    "aten::detach_",
    "aten::t",
    "aten::t_",
    "aten::transpose.int",
    "aten::transpose_",
    "aten::permute",
    "aten::expand",
    "aten::expand_as",
    "aten::squeeze",
    "aten::squeeze_",
    "aten::squeeze.dim",
    "aten::squeeze_.dim",
    "aten::squeeze.dims",
    "aten::squeeze_.dims",
    "aten::unsqueeze",
    "aten::unsqueeze_",
    "aten::select.int",
    "aten::slice.Tensor",
    "aten::narrow",
    "aten::unbind.int",
    "aten::split.Tensor",
    "aten::split.sizes",
    "aten::split_with_sizes",
    "aten::chunk",
    "aten::unsafe_split.Tensor",
    "aten::unsafe_split_with_sizes",
    "aten::unsafe_chunk",
    "aten::tensor_split.sections",
    "aten::tensor_split.indices",
    "aten::unfold",
    "aten::diagonal",
    "aten::as_strided",
    "aten::as_strided_",
    "aten::flatten.using_ints",
    "aten::unflatten.int",
    "aten::movedim.int",
    "aten::movedim.intlist",
    "aten::moveaxis.int",
    "aten::swapaxes",
    "aten::swapdims",
    "aten::ravel",
    "aten::numpy_T",
    "aten::mT",
    "aten::mH",
    "aten::adjoint",
    "aten::matrix_H",
    "aten::view_as_real",
    "aten::view_as_complex",
    "aten::_conj",
    "aten::conj",
    "aten::_neg_view",
    "aten::real",
    "aten::imag",
    "aten::lift",
    "aten::lift_fresh",
    "aten::set_.source_Storage",
    "aten::set_.source_Tensor",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_",
    "aten::set_data",
    "aten::resize_",
    "aten::resize_as_",
    "aten::requires_grad_",
    "aten::record_stream",
    "aten::retain_grad",
    "aten::broadcast_tensors",
    "aten::broadcast_to",
    "aten::atleast_1d",
    "aten::atleast_2d",
    "aten::is_pinned",
    "aten::size.int",
    "aten::stride.int",
    "aten::sym_size.int",
    "aten::dense_dim",
    "aten::_has_compatible_shallow_copy_type",
    "aten::is_same_size",
    "aten::_version",
    "aten::result_type.Tensor",
    "aten::result_type.Scalar",
    "aten::_assert_async",
    "aten::_assert_async.msg",
    "aten::_assert_tensor_metadata",
    "aten::values",
    "aten::data",
    "aten::slice_inverse",
    "aten::unsqueeze_copy",
    "aten::meshgrid",
    "aten::meshgrid.indexing",
    // Asked for whenever a model of torchvision is made: a number that was compiled in.
    "torchvision::_cuda_version",
];

/// Memory is allocated and not touched.
const ALLOCATIONS: &[&str] = &[
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_efficientzerotensor",
    "aten::empty_permuted",
    "aten::empty.out",
];

/// Results are filled with constants, indices or random numbers.
const FACTORIES: &[&str] = &[
    "aten::zeros",
    "aten::zeros_like",
    "aten::ones",
    "aten::ones_like",
    "aten::full",
    "aten::full_like",
    "aten::new_zeros",
    "aten::new_ones",
    "aten::new_full",
    "aten::scalar_tensor",
    "aten::eye",
    "aten::eye.m",
    "aten::eye.m_out",
    "aten::eye.out",
    "aten::tril_indices",
    "aten::triu_indices",
    "aten::zeros.out",
    "aten::ones.out",
    "aten::full.out",
];

/// Random numbers: generating them is no arithmetic on data.
const RANDOM: &[&str] = &[
    "aten::rand",
    "aten::rand.generator",
    "aten::rand_like",
    "aten::randn",
    "aten::randn.generator",
    "aten::randn_like",
    "aten::randint",
    "aten::randint.low",
    "aten::randint.generator",
    "aten::randint.low_generator",
    "aten::randint_like",
    "aten::randint_like.low_dtype",
    "aten::randperm",
    "aten::randperm.generator",
    "aten::normal.Tensor_float",
    "aten::normal.float_Tensor",
    "aten::normal.Tensor_Tensor",
    "aten::normal.float_float",
    "aten::normal_functional",
];

/// Random numbers whose distribution tensors say.
const RANDOM_BY_VALUES: &[&str] = &[
    "aten::poisson",
    "aten::binomial",
    "aten::_standard_gamma",
    "aten::_sample_dirichlet",
];

/// The tensor is overwritten without being read.
const FILLS: &[&str] = &[
    "aten::zero_",
    "aten::fill_.Scalar",
    "aten::fill_.Tensor",
    "aten::copy_",
    "aten::normal_",
    "aten::uniform_",
    "aten::exponential_",
    "aten::random_",
    "aten::random_.from",
    "aten::random_.to",
    "aten::log_normal_",
    "aten::geometric_",
    "aten::cauchy_",
    "aten::fill.Scalar",
    "aten::fill.Tensor",
    "aten::zero",
];

/// Values are moved or chosen, not computed.
const MOVES: &[&str] = &[
    "aten::clone",
    "aten::contiguous",
    "aten::_to_copy",
    "aten::to.dtype",
    "aten::to.device",
    "aten::to.other",
    "aten::to.dtype_layout",
    "aten::type_as",
    "aten::cat",
    "aten::cat.out",
    "aten::concat",
    "aten::concatenate",
    "aten::stack",
    "aten::stack.out",
    "aten::hstack",
    "aten::vstack",
    "aten::dstack",
    "aten::column_stack",
    "aten::flip",
    "aten::roll",
    "aten::rot90",
    "aten::repeat",
    "aten::tile",
    "aten::repeat_interleave.Tensor",
    "aten::repeat_interleave.self_int",
    "aten::repeat_interleave.self_Tensor",
    "aten::constant_pad_nd",
    "aten::pad",
    "aten::_pad_circular",
    "aten::_pad_enum",
    "aten::reflection_pad1d",
    "aten::reflection_pad2d",
    "aten::reflection_pad3d",
    "aten::replication_pad1d",
    "aten::replication_pad2d",
    "aten::replication_pad3d",
    "aten::pixel_shuffle",
    "aten::pixel_unshuffle",
    "aten::channel_shuffle",
    "aten::tril",
    "aten::tril_",
    "aten::triu",
    "aten::triu_",
    "aten::where.self",
    "aten::where.ScalarSelf",
    "aten::where.ScalarOther",
    "aten::where.Scalar",
    "aten::where.self_out",
    "aten::where",
    "aten::masked_fill.Scalar",
    "aten::masked_fill.Tensor",
    "aten::masked_fill_.Scalar",
    "aten::masked_fill_.Tensor",
    "aten::masked_scatter",
    "aten::masked_scatter_",
    "aten::scatter.src",
    "aten::scatter.value",
    "aten::scatter_.src",
    "aten::scatter_.value",
    "aten::index_copy",
    "aten::index_copy_",
    "aten::index_fill.int_Scalar",
    "aten::index_fill_.int_Scalar",
    "aten::slice_scatter",
    "aten::select_scatter",
    "aten::as_strided_scatter",
    "aten::diagonal_scatter",
    "aten::select_backward",
    "aten::slice_backward",
    "aten::diagonal_backward",
    "aten::diag_embed",
    "aten::diag",
    "aten::im2col",
    "aten::unfold_copy",
    "aten::narrow_copy",
    "aten::view_copy",
    "aten::split_with_sizes_copy",
    "aten::split_copy.Tensor",
    "aten::permute_copy",
    "aten::transpose_copy.int",
    "aten::expand_copy",
    "aten::select_copy.int",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::one_hot",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::pin_memory",
    "aten::_pin_memory",
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::complex",
    "aten::_copy_from",
    "aten::_copy_from_and_resize",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::searchsorted.Tensor",
    "aten::bucketize.Tensor",
    "aten::block_diag",
    "aten::cartesian_prod",
    "aten::multinomial",
    "aten::_pack_padded_sequence",
    "aten::_pack_padded_sequence_backward",
    "aten::_pad_packed_sequence",
    "aten::_nested_tensor_from_mask",
    "aten::_nested_from_padded",
    "aten::_nested_tensor_from_tensor_list",
    "aten::to_padded_tensor",
    "aten::_upsample_nearest_exact1d",
    "aten::_upsample_nearest_exact1d.vec",
    "aten::_upsample_nearest_exact2d.vec",
    "aten::_upsample_nearest_exact3d",
    "aten::_upsample_nearest_exact3d.vec",
    "aten::upsample_nearest1d.vec",
];

/// Only what is chosen is read: the indices, and as many elements as are written.
const GATHERS: &[&str] = &[
    "aten::index.Tensor",
    "aten::_unsafe_index.Tensor",
    "aten::index_select",
    "aten::gather",
    "aten::take",
    "aten::take_along_dim",
    "aten::masked_select",
    "aten::embedding",
];

pub(super) fn fill(tables: &mut Tables) {
    for &op in VIEWS {
        tables.insert(
            op,
            still(
                "a view or metadata: nothing is computed",
                zero("a view or metadata: no bytes are touched"),
            ),
        );
    }
    for &op in ALLOCATIONS {
        tables.insert(
            op,
            still(
                "allocates, computes nothing",
                zero("allocates, touches no bytes"),
            ),
        );
    }
    for &op in FACTORIES {
        tables.insert(op, still("fills with constants or indices", results_only()));
    }
    for &op in RANDOM {
        tables.insert(
            op,
            still("random numbers: no arithmetic on data", results_only()),
        );
    }
    for &op in RANDOM_BY_VALUES {
        tables.insert(
            op,
            still("random numbers: no arithmetic on data", traffic()),
        );
    }
    // Whether the mask leaves out ends of rows alone: a comparison of each of its elements.
    tables.insert(
        "aten::_nested_tensor_from_mask_left_aligned",
        Work {
            flop: per_call("elements(mask)", |row| {
                Ok(row.note("elements(mask)", row.tensor("mask")?.elements()))
            }),
            memory_access: per_call("bytes(mask)", |row| {
                Ok(row.note("bytes(mask)", row.tensor("mask")?.bytes()))
            }),
            mac: zero(NO_PRODUCTS),
            ac: zero(NO_ADDITIONS),
            synop: zero(NO_SYNAPSES),
        },
    );
    for &op in FILLS {
        tables.insert(
            op,
            still("fills or copies, no arithmetic", traffic_without("self")),
        );
    }
    for &op in MOVES {
        tables.insert(
            op,
            still("moves or selects values, no arithmetic", traffic()),
        );
    }
    for &op in GATHERS {
        tables.insert(
            op,
            still("moves or selects values, no arithmetic", gathered()),
        );
    }

    // Moves that add: values meet at the same place.
    insert_all(
        tables,
        &[
            "aten::embedding_dense_backward",
            "aten::embedding_backward",
            "aten::col2im",
            "aten::unfold_backward",
            "aten::reflection_pad1d_backward",
            "aten::reflection_pad2d_backward",
            "aten::reflection_pad3d_backward",
            "aten::replication_pad1d_backward",
            "aten::replication_pad2d_backward",
            "aten::replication_pad3d_backward",
        ],
        &[(1, Input)],
        &[(1, Input)],
    );
    for (op, source) in [
        ("aten::index_add", "source"),
        ("aten::index_add_", "source"),
        ("aten::scatter_add", "src"),
        ("aten::scatter_add_", "src"),
        ("aten::scatter_reduce.two", "src"),
        ("aten::scatter_reduce_.two", "src"),
    ] {
        tables.insert(op, added(source));
    }
    for op in [
        "aten::index_put",
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::_unsafe_index_put",
    ] {
        tables.insert(op, index_put());
    }
    tables.insert(
        "aten::index_select_backward",
        work(&[(1, Input)], &[(1, Input)]),
    );
    for op in [
        "aten::embedding_bag",
        "aten::_embedding_bag",
        "aten::_embedding_bag_forward_only",
    ] {
        tables.insert(op, embedding_bag());
    }
}

fn still(reason: &'static str, memory_access: Rule) -> Work {
    Work {
        flop: zero(reason),
        memory_access,
        mac: zero(NO_PRODUCTS),
        ac: zero(NO_ADDITIONS),
        synop: zero(NO_SYNAPSES),
    }
}

/// Integer and bool operands that say which elements are meant.
fn indices(row: &CallRow<'_>) -> i128 {
    ["index", "indices", "mask"]
        .iter()
        .map(|name| super::bytes(&row.tensors(name)))
        .sum()
}

fn gathered() -> Rule {
    per_call("bytes(indices) + 2 * bytes(out)", |row| {
        Ok(row.note("bytes(indices)", indices(row))
            + 2 * row.note("bytes(out)", super::written(row)))
    })
}

fn added(source: &'static str) -> Work {
    let elements = move |row: &CallRow<'_>| {
        Ok::<i128, RuleError>(row.note(
            &format!("elements({source})"),
            row.tensor(source)?.elements(),
        ))
    };
    Work {
        flop: per_call(format!("elements({source})"), elements),
        memory_access: traffic(),
        mac: zero(NO_PRODUCTS),
        ac: per_call(format!("elements({source})"), elements),
        synop: zero(NO_SYNAPSES),
    }
}

fn index_put() -> Work {
    /// Elements that are added: all values where the op accumulates.
    fn accumulated(row: &CallRow<'_>) -> Result<i128, RuleError> {
        let values = row.note("elements(values)", row.tensor("values")?.elements());
        Ok(if row.boolean("accumulate")? {
            values
        } else {
            0
        })
    }
    Work {
        flop: per_call("[accumulate] elements(values)", accumulated),
        memory_access: per_call(
            "bytes(indices) + 2 * bytes(values) + [accumulate] bytes(values)",
            |row| {
                let values = row.note("bytes(values)", row.tensor("values")?.bytes());
                let again = if row.boolean("accumulate")? {
                    values
                } else {
                    0
                };
                Ok(row.note("bytes(indices)", indices(row)) + 2 * values + again)
            },
        ),
        mac: zero(NO_PRODUCTS),
        ac: per_call("[accumulate] elements(values)", accumulated),
        synop: zero(NO_SYNAPSES),
    }
}

/// Sums the rows of each bag.
fn embedding_bag() -> Work {
    fn sums(row: &CallRow<'_>) -> Result<i128, RuleError> {
        let (weight, indices) = (row.tensor("weight")?, row.tensor("indices")?);
        let rows = indices.elements() * weight.size(1)?;
        Ok((rows - row.output(0)?.elements()).max(0))
    }
    Work {
        flop: per_call("elements(indices) * features - elements(out)", sums),
        memory_access: per_call(
            "bytes(indices) + bytes(rows read) + bytes(results)",
            |row| {
                let (weight, indices) = (row.tensor("weight")?, row.tensor("indices")?);
                let read =
                    indices.elements() * weight.size(1)? * i128::from(weight.meta.dtype.bytes());
                Ok(indices.bytes()
                    + read
                    + row.outputs().iter().map(TensorView::bytes).sum::<i128>())
            },
        ),
        mac: zero(NO_PRODUCTS),
        ac: per_call("elements(indices) * features - elements(out)", sums),
        synop: zero(NO_SYNAPSES),
    }
}
