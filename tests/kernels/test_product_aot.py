"""The forward products compiled ahead of time, every tiling: resources and instructions asserted."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs without TRITON_INTERPRET, in a process of its own", allow_module_level=True)

from unittest import mock

from triton import knobs
from triton.runtime.driver import driver

from dyncore.kernels import grouped_linear as linear
from dyncore.kernels import grouped_mlp as mlp
from dyncore.kernels.common import configs
from dyncore.kernels.common import product as products
from dyncore.kernels.common.split import RESIDENT
from tests.kernels.aot import (
    COMBINATIONS,
    Driver,
    check_fits,
    check_tensor_cores,
    check_wide_copies,
    check_wide_stores,
    compile_for,
    target,
)

GROUPS = 8
ROWS_PER_GROUP = {"few": 16, "some": 64, "many": 512}


def plan_tensors(slots):
    index = torch.zeros(slots + 1, dtype=torch.int32)
    return index[:slots], index[: GROUPS + 1], torch.empty(slots), index, index[:slots]


def launch_linear(arch, arithmetic, rows_per_group, k=256, n=512, scatter=True, dtype=torch.bfloat16):
    """A call of the real launcher; without scatter the pre-activation is saved, which is the longest epilogue."""
    slots = GROUPS * rows_per_group
    dtype = dtype if arithmetic == "half" else torch.float32
    x, bias = torch.empty(slots, k, dtype=dtype), torch.empty(GROUPS, n, dtype=dtype)
    weight = torch.empty(GROUPS, n, k, dtype=dtype)
    form = ("gelu", True, scatter, not scatter)
    return lambda: linear.grouped_linear(
        x, weight, bias, *plan_tensors(slots), *form, target=target(arch, arithmetic)
    )  # fmt: skip


def launch_mlp(arch, arithmetic, rows_per_group, h=256, i=512, dtype=torch.bfloat16):
    """swiglu with biases, the pre-activation saved: up product, down product, combine."""
    slots = GROUPS * rows_per_group
    dtype = dtype if arithmetic == "half" else torch.float32
    x, w_in, w_out = (torch.empty(s, dtype=dtype) for s in ((slots, h), (GROUPS, 2 * i, h), (GROUPS, h, i)))
    b_in, b_out = torch.empty(GROUPS, 2 * i, dtype=dtype), torch.empty(GROUPS, h, dtype=dtype)
    return lambda: mlp.grouped_mlp(
        x, w_in, w_out, b_in, b_out, x, *plan_tensors(slots), "swiglu", True, target=target(arch, arithmetic)
    )


def check_product(arch, arithmetic, rows_per_group, depth, binary):
    """It has the tiling of its case, fits the device as often as it is launched, and works in whole 16 bytes."""
    key = configs.key_of("product", arithmetic, rows_per_group, 1, depth)
    config = configs.choose_config(target(arch), key, True)
    assert [binary.constants[name] for name in ("BM", "BN", "BK")] == list(config[:3])
    check_fits(arch, binary, config.resident)
    check_tensor_cores(arch, arithmetic, binary)
    check_wide_copies(binary)


@pytest.mark.parametrize("size", ROWS_PER_GROUP)
@pytest.mark.parametrize(("arch", "arithmetic"), COMBINATIONS)
def test_every_configuration(arch, arithmetic, size):
    rows = ROWS_PER_GROUP[size]
    up, *down = compile_for(arch, launch_mlp(arch, arithmetic, rows), ("product",), None if size == "many" else 1)
    check_product(arch, arithmetic, rows, 256, up)
    for product in down:
        check_product(arch, arithmetic, rows, 512, product)


@pytest.mark.parametrize("arch", configs.SPECIAL)
def test_the_large_tile_of_deep_products(arch):
    up, down = compile_for(arch, launch_mlp(arch, "half", 512, h=2048, i=configs.DEEP), ("product",))
    for product, depth in ((up, 2048), (down, configs.DEEP)):
        assert product.constants["BN"] == 256
        check_product(arch, "half", 512, depth, product)
        check_wide_stores(product)


@pytest.mark.parametrize("k", [256, 2048])
def test_the_longest_elementwise_epilogue(k):
    (product,) = compile_for(90, launch_linear(90, "half", 512, k=k, scatter=False))
    check_product(90, "half", 512, k, product)


@pytest.mark.parametrize("size", ["few", "many"])
@pytest.mark.parametrize("arithmetic", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("arch", [80, 100])  # 86 and 90 have the same tilings for them
def test_odd_sizes(arch, arithmetic, size):
    """Rows of 63 elements start anywhere: no wide loads, but neither spills, and tensor cores all the same."""
    rows = ROWS_PER_GROUP[size]
    (product,) = compile_for(arch, launch_linear(arch, arithmetic, rows, k=63, n=101, scatter=False))
    key = configs.key_of("product", arithmetic, GROUPS * rows, GROUPS, 63)
    config = configs.choose_config(target(arch), key, False)
    assert product.constants["BK"] == config.BK
    check_fits(arch, product, config.resident)
    check_tensor_cores(arch, arithmetic, product)


def test_float16():
    (product,) = compile_for(90, launch_linear(90, "half", 512, dtype=torch.float16), ("product",))
    check_product(90, "half", 512, 256, product)


@pytest.mark.parametrize("width", [4096, 63])
def test_combine(width):
    (combine,) = compile_for(90, launch_linear(90, "half", 512, n=width), ("combine",))
    check_fits(90, combine)
    wide = combine.has(r"LDG\.E(\.\w+)*\.128") and combine.has(r"STG\.E(\.\w+)*\.(128|64)")
    assert wide == (width == 4096)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_few_rows_of_one_narrow_group_in_pieces_of_their_depth(gated):
    slots, n, k = 16, 512, 16384
    width = 2 * n if gated else n
    x, weight, bias, out, pre = (
        torch.empty(s, dtype=torch.bfloat16)
        for s in ((slots, k), (1, width, k), (1, width), (slots, n), (slots, width))
    )
    rows, offsets = torch.zeros(slots, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    split, finish = compile_for(90, lambda: products.product(
        x, weight, bias, None, rows, offsets, out, pre, activation="silu", gated=gated, target=target(90),
    ))  # fmt: skip
    check_product(90, "half", slots, k, split)
    assert finish.name == "finish_pieces_kernel"
    check_fits(90, finish, RESIDENT)
    assert finish.has(r"LDG\.E\S*\.(64|128)")


def test_pieces_of_a_product_fill_the_device_but_stay_deep_enough_to_pay():
    config, device = configs.Config(16, 64, 128, 4, 4, 3), configs.Target(90, 132, False)
    assert products.num_pieces(device, config, 16384, 64) == 6
    assert products.num_pieces(device, config, 16384, 66) == 6
    assert products.num_pieces(device, config, 16384, 67) == 1
    assert products.num_pieces(device, config, 16384, 1) == 16
    assert products.num_pieces(device, config, 2048, 64) == 2
    assert products.num_pieces(device, config, 2047 - 128, 64) == 1
    assert products.num_pieces(device, config, 0, 64) == 1


def test_a_program_is_launched_for_each_place_on_the_device_but_no_more_than_there_can_be_tiles():
    config = configs.Config(128, 128, 64, 8, 3, 2)
    device = configs.Target(90, 132, False)
    assert configs.num_programs(device, config, 100_000, 8, 16) == 264
    assert configs.num_programs(device, config, 1000, 8, 3) == (1000 // 128 + 8) * 3
    assert configs.num_programs(device, config, 2, 128, 3) == 2 * 3


def test_another_number_of_rows_in_the_same_bucket_compiles_nothing_new():
    def keys(rows_per_group):
        launches = []

        def catch(*, key, **_):
            launches.append(key)
            return True

        with (
            mock.patch.object(driver, "_active", Driver(90)),
            mock.patch.object(knobs.runtime, "jit_cache_hook", catch),
        ):
            launch_mlp(90, "half", rows_per_group)()
        return launches

    assert len(keys(97)) == 3
    assert keys(97) == keys(301) == keys(512)
    assert keys(96) != keys(97)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 80),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 86),
    ],
)
def test_architecture_of_a_compute_capability(capability, arch):
    assert configs.architecture(capability) == arch


def test_aligned_tells_what_triton_will_see():
    aligned = configs.aligned
    x, weight = torch.empty(8, 64), torch.empty(2, 32, 64)
    assert aligned(x, weight)
    assert aligned(x, torch.empty(2, 64, 32).transpose(1, 2))
    assert aligned(x[::2], weight[:, ::2])
    assert not aligned(x[:, ::2], weight[:, :, :32])
    assert not aligned(torch.empty(8, 65)[:, :64], weight)
    assert not aligned(torch.empty(8 * 64 + 1)[1:].view(8, 64), weight)
    assert not aligned(x, torch.empty(2, 64, 33).transpose(1, 2)[:, :32])
    assert not aligned(x[:, :63], weight[:, :, :63])
