"""The class of work that an operator of torch belongs to: what times of operators are summed under."""

from __future__ import annotations

from functools import cache

import torch

MATRIX_PRODUCT = "matrix product"  # and convolution
GATHER = "gather, scatter, sort"
ELEMENTWISE = "elementwise"
REDUCTION = "reduction"  # and pooling
COPY = "copy"
COMPILED = "compiled"  # whatever torch.compile has fused
RANDOM = "random numbers"
OPTIMISER = "optimiser"
AVERAGE = "EMA"
DATA = "data"
LOGGING = "logging"
WAIT = "host waits"
OVERHEAD = "between operators"  # Python, autograd, views, allocation
UNKNOWN = "not classified"
IDLE = "device idle"  # a GPU that waits for the host
CLASSES = (
    *(MATRIX_PRODUCT, GATHER, ELEMENTWISE, REDUCTION, COPY, COMPILED, RANDOM),
    *(OPTIMISER, AVERAGE, DATA, LOGGING, WAIT, OVERHEAD, IDLE, UNKNOWN),
)

#: operators that torch does not call pointwise, without the "_" of those in place and the "_backward" of gradients
_NAMES = {
    MATRIX_PRODUCT: "mm addmm bmm baddbmm addbmm matmul linear _linear_pointwise dot mv addmv ger outer _scaled_mm",
    GATHER: """grid_sampler grid_sampler_2d grid_sampler_3d cudnn_grid_sampler index _unsafe_index index_put
        _index_put_impl index_add index_select index_copy index_fill gather scatter scatter_add take take_along_dim
        embedding embedding_dense embedding_bag _embedding_bag _embedding_bag_forward_only
        sort argsort topk searchsorted bucketize nonzero masked_select unique2 roll flip""",
    REDUCTION: """sum mean prod max min amax amin argmax argmin any all cumsum cumprod norm linalg_vector_norm equal
        logsumexp softmax _softmax _softmax_backward_data log_softmax _log_softmax _log_softmax_backward_data nll_loss
        nll_loss_nd nll_loss_forward std var var_mean std_mean batch_norm instance_norm layer_norm
        group_norm _batch_norm_impl_index native_batch_norm native_layer_norm native_group_norm""",
    COPY: """copy _to_copy to cat stack clone contiguous fill zero zeros zeros_like ones ones_like full full_like
        new_zeros new_ones new_full constant_pad_nd pad reflection_pad2d replication_pad2d repeat repeat_interleave
        arange linspace eye tril triu pin_memory _pin_memory select slice select_scatter slice_scatter pixel_shuffle
        pixel_unshuffle scalar_tensor _reorder_linear_weight""",
    RANDOM: """randn rand randint randperm normal uniform bernoulli random exponential randn_like rand_like
        multinomial native_dropout""",
    WAIT: "item _local_scalar_dense is_nonzero",
    OVERHEAD: """empty empty_like empty_strided new_empty new_empty_strided as_strided view _unsafe_view reshape
        _reshape_alias view_as expand expand_as transpose t numpy_T mT permute movedim squeeze unsqueeze detach alias
        narrow split split_with_sizes chunk unbind unsafe_split unsafe_chunk flatten unflatten diagonal real resize
        resize_as set promote_types lift_fresh resolve_conj resolve_neg result_type requires_grad
        _has_compatible_shallow_copy_type""",
    ELEMENTWISE: """lerp leaky_relu softplus isfinite mse_loss smooth_l1_loss l1_loss binary_cross_entropy
        floor_divide linalg_cross""",
}
#: these are views forwards, and fill a tensor of zeros backwards
_VIEWS = {"select": OVERHEAD, "slice": OVERHEAD}
_CLASS_OF = {name: kind for kind, names in _NAMES.items() for name in names.split()}
#: the first letters of events that have no operator's name
_BEGINNINGS = {
    COMPILED: ("Torch-Compiled Region", "CompiledFunction", "## Call CompiledFxGraph", "triton_", "cpp_fused"),
    OVERHEAD: ("autograd::", "torch::autograd::"),
    DATA: ("enumerate(DataLoader)",),
}
#: and those of operators, of which there are many kinds
_FAMILIES = {
    OPTIMISER: ("_fused_",),
    REDUCTION: ("avg_pool", "max_pool", "adaptive_"),
    GATHER: ("upsample",),
    MATRIX_PRODUCT: ("mkldnn_linear", "mkldnn_rnn"),
}


@cache
def classify(name: str) -> str:
    """The class of a profiled event by its name: an operator ("aten::mm"), a node of autograd, a compiled kernel.

    What tables do not name is elementwise where torch says so of it, and else UNKNOWN.
    """
    for kind, beginnings in _BEGINNINGS.items():
        if name.startswith(beginnings):
            return kind
    if "Backward" in name or "::" not in name:  # of autograd, or written in Python: it calls operators, which follow
        return OVERHEAD
    space, _, operator = name.rpartition("::")
    operator = operator.removeprefix("_foreach_")
    if "conv" in operator:
        return MATRIX_PRODUCT
    for kind, beginnings in _FAMILIES.items():
        if operator.startswith(beginnings):
            return kind
    if operator in _VIEWS:
        return _VIEWS[operator]
    for known in (operator, operator.removesuffix("_"), operator.removesuffix("_backward")):
        if known in _CLASS_OF:
            return _CLASS_OF[known]
        if space == "aten" and _is_pointwise(known):
            return ELEMENTWISE
    return UNKNOWN


def _is_pointwise(operator: str) -> bool:
    packet = getattr(torch.ops.aten, operator, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
