"""The class of operators, in place and backwards too, of autograd's nodes and of what torch.compile makes."""

import pytest

from graf.runtime import operator_classes as classes
from graf.runtime.operator_classes import classify


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            classes.MATRIX_PRODUCT,
            "mm addmm baddbmm bmm linear mkldnn_convolution convolution_backward cudnn_convolution",
        ),
        (classes.MATRIX_PRODUCT, "_slow_conv2d_forward conv2d"),
        (classes.GATHER, "grid_sampler_2d grid_sampler_2d_backward index _index_put_impl_ gather scatter_add_ sort"),
        (classes.GATHER, "embedding_dense_backward upsample_bilinear2d upsample_nearest2d_backward searchsorted"),
        (classes.GATHER, "embedding_bag _embedding_bag _embedding_bag_forward_only"),
        (classes.ELEMENTWISE, "add add_ mul threshold_backward relu_ leaky_relu leaky_relu_backward tanh exp softplus"),
        (classes.ELEMENTWISE, "softplus_backward where lerp_ _foreach_add_ _foreach_lerp_ erfinv_ clamp_min pow"),
        (
            classes.REDUCTION,
            "sum mean cumsum linalg_vector_norm _softmax native_batch_norm_backward avg_pool2d_backward",
        ),
        (classes.COPY, "copy_ _to_copy cat fill_ zero_ clone constant_pad_nd select_backward slice_backward"),
        (classes.OVERHEAD, "empty empty_strided as_strided view select slice expand detach_ result_type t"),
        (classes.RANDOM, "randn uniform_ normal_ bernoulli_"),
        (classes.WAIT, "item _local_scalar_dense"),
        (classes.OPTIMISER, "_fused_adam_"),
    ],
)
def test_an_operator_is_of_its_class(kind, names):
    assert {name: classify(f"aten::{name}") for name in names.split()} == dict.fromkeys(names.split(), kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (classes.MATRIX_PRODUCT, "mkldnn::_linear_pointwise"),
        (classes.OVERHEAD, "autograd::engine::evaluate_function: MulBackward0"),
        (classes.OVERHEAD, "AddmmBackward0"),
        (classes.OVERHEAD, "torch::autograd::AccumulateGrad"),
        (classes.OVERHEAD, "RecomputedChunk"),
        (classes.COMPILED, "Torch-Compiled Region: 0/0"),
        (classes.COMPILED, "triton_poi_fused_add_relu_0"),
        (classes.DATA, "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"),
        (classes.UNKNOWN, "aten::an_operator_of_next_year"),
        (classes.UNKNOWN, "other::mm_like"),
    ],
)
def test_an_event_that_is_no_operator_has_a_class_and_what_nobody_knows_says_so(kind, name):
    assert classify(name) == kind


def test_every_class_is_listed_once():
    assert len(set(classes.CLASSES)) == len(classes.CLASSES)
    named = {value for name, value in vars(classes).items() if name.isupper() and isinstance(value, str)}
    assert set(classes.CLASSES) == named
