"""The backward kernels compiled ahead of time: resources and instructions asserted."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs without TRITON_INTERPRET, in a process of its own", allow_module_level=True)

from dyncore.kernels import grouped_linear as linear
from dyncore.kernels import grouped_mlp as mlp
from dyncore.kernels.common import configs
from dyncore.kernels.common.weight_gradient import num_pieces
from tests.kernels.aot import (
    COMBINATIONS,
    TENSOR_CORES,
    check_fits,
    check_tensor_cores,
    check_wide_copies,
    check_wide_stores,
    compile_for,
    target,
)

GROUPS = 8
PRODUCTS = ("product", "product_backward", "weight_gradient")


def empty(dtype, *shapes):
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def plan_tensors(slots):
    index = torch.zeros(slots + 1, dtype=torch.int32)
    return index[:slots], index[: GROUPS + 1], torch.empty(slots), index, index[:slots]


def launch_mlp(arch, arithmetic, rows_per_group, h=256, i=512, activation="swiglu", biases=False):
    slots, dtype = GROUPS * rows_per_group, torch.bfloat16 if arithmetic == "half" else torch.float32
    width = 2 * i if activation == "swiglu" else i
    grad, x, w_in, w_out, pre = empty(dtype, (slots, h), (slots, h), (GROUPS, width, h), (GROUPS, h, i), (slots, width))
    b_in, b_out = empty(dtype, (GROUPS, width), (GROUPS, h)) if biases else (None, None)
    needs = [True, True, True, biases, biases, True]
    tensors = (grad, x, w_in, w_out, b_in, b_out, pre, *plan_tensors(slots))
    return lambda: mlp.grouped_mlp_backward(*tensors, activation, needs, target=target(arch, arithmetic))


def launch_linear(arch, rows_per_group, k=256, n=512, activation="gelu", gather=True):
    slots, dtype = GROUPS * rows_per_group, torch.bfloat16
    tensors = empty(dtype, (slots, n), (slots, k), (GROUPS, n, k), (GROUPS, n), (slots, n))
    form = (activation, gather, True, [True] * 4)
    return lambda: linear.grouped_linear_backward(*tensors, *plan_tensors(slots), *form, target=target(arch))


def named(binaries, name):
    return [b for b in binaries if b.name == f"{name}_kernel"]


def check_weight_gradient(arch, arithmetic, binary):
    check_fits(arch, binary)
    check_tensor_cores(arch, arithmetic, binary)
    if arithmetic == "half":
        check_wide_stores(binary)


@pytest.mark.parametrize(("arch", "arithmetic"), [c for c in COMBINATIONS if c not in ((86, "tf32"), (80, "ieee"))])
def test_many_rows(arch, arithmetic):
    binaries = compile_for(arch, launch_mlp(arch, arithmetic, 512), PRODUCTS)
    (through,) = named(binaries, "product_backward")
    check_fits(arch, through)
    check_tensor_cores(arch, arithmetic, through)
    if arithmetic == "half":
        check_wide_copies(through)
    gradients = named(binaries, "weight_gradient")
    assert len(gradients) == 2
    for binary in gradients:
        check_weight_gradient(arch, arithmetic, binary)
    (product,) = named(binaries, "product")
    check_fits(arch, product)
    check_tensor_cores(arch, arithmetic, product)
    if arithmetic == "half":
        check_wide_copies(product)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("arch", [80, 90])
def test_fewer_rows(arch, rows):
    (through,) = compile_for(arch, launch_mlp(arch, "half", rows), ("product_backward",))
    check_fits(arch, through)
    check_tensor_cores(arch, "half", through)


def test_the_sums_for_biases_and_scales():
    sums = {"slots": 2, "column_sums": 2, "row_sums": 1}
    binaries = compile_for(90, launch_mlp(90, "half", 64, activation="gelu", biases=True), tuple(sums))
    for name, count in sums.items():
        assert len(named(binaries, name)) == count
    for binary in binaries:
        check_fits(90, binary)


@pytest.mark.parametrize(
    ("activation", "kernels"), [("gelu", ["slots", "product"]), ("none", ["slots", "product_backward"])]
)
def test_linear(activation, kernels):
    binaries = compile_for(90, launch_linear(90, 512, activation=activation))
    kernels = [*kernels, "combine", "weight_gradient", "column_sums", "row_sums"]
    assert [b.name for b in binaries] == [f"{name}_kernel" for name in kernels]
    for binary in binaries:
        check_fits(90, binary)
    (copy,) = named(binaries, "slots")
    assert copy.has(r"LDG\.E\S*\.128")
    assert copy.has(r"STG\.E\S*\.128")
    check_weight_gradient(90, "half", binaries[3])


def test_pieces_of_a_weight_gradient_fill_the_device_but_stay_long_enough_to_pay():
    config, device = configs.Config(128, 256, 64, 8, 4, 1), configs.Target(90, 132, False)
    assert num_pieces(device, config, 16384, 1, 72) == 1
    assert num_pieces(device, config, 16384, 1, 8) == 16
    assert num_pieces(device, config, 2048, 1, 8) == 4
    assert num_pieces(device, config, 100, 1, 8) == 1
    assert num_pieces(device, config, 16384, 8, 8 * 8) == 2


@pytest.mark.parametrize("arch", [80, 90])
def test_odd_sizes(arch):
    for binary in compile_for(arch, launch_mlp(arch, "half", 512, h=63, i=101), PRODUCTS[1:]):
        check_fits(arch, binary)
        assert any(binary.has(name) for name in TENSOR_CORES.values())
