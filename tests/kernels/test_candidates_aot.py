"""Tilings that `dyncore tune` may choose, compiled ahead of time: they fit their architecture without spills. A sample;
all of them were compiled when the list was made."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs without TRITON_INTERPRET, in a process of its own", allow_module_level=True)


from dyncore import tune_cuda
from dyncore.kernels.common import candidates, configs
from dyncore.kernels.common.product import product
from tests.kernels.aot import check_fits, check_tensor_cores, compile_for, target

# Least rows and depth of a bucket -> what stands for it here: smaller than what is timed, of the same specialisation
SIZES = tune_cuda.Effort(
    configs.ARITHMETICS, {1: (2, 8), 17: (2, 64), 97: (2, 128), 513: (2, 1024)}, {1: 256, 513: 768, 1536: 2048}, 512
)


def binary(arch, key, config):
    """The kernel of a bucket in this tiling, with the longest epilogue that it has."""
    chosen = target(arch, key.arithmetic)._replace(tuned={key: config})
    made = tune_cuda.problem(key, SIZES, torch.device("cpu"))
    (binary,) = compile_for(
        arch, lambda: longest(key, made, chosen), ("product", "product_backward", "weight_gradient")
    )
    assert [binary.constants[name] for name in ("BM", "BN", "BK")] == list(config[:3])
    assert binary.warps == config.num_warps
    return binary


def longest(key, made, chosen):
    gated = key.kernel == "product_gated"
    if key.kernel not in ("product", "product_gated"):
        return made.call(chosen, *made.tensors)
    (groups, rows), (x, weight) = SIZES.rows[key.rows], made.tensors
    rows_of = torch.zeros(groups * rows, dtype=torch.int32)
    out, pre = x.new_empty(len(rows_of), SIZES.columns), x.new_empty(len(rows_of), weight.shape[1])
    return product(
        x, weight, x.new_empty(groups, weight.shape[1]), None, rows_of, torch.zeros(groups + 1, dtype=torch.int32), out,
        pre, activation="silu" if gated else "gelu", gated=gated, target=chosen,
    )  # fmt: skip


def rivals(arch, key):
    return candidates.candidates(target(arch, key.arithmetic), key)[1:]


@pytest.mark.parametrize(
    ("arch", "kernel", "arithmetic", "rows"),
    [
        (80, "product_gated", "half", 17),
        (90, "product_backward", "half", 513),
        (90, "weight_gradient", "half", 513),
        (100, "product_transposed", "tf32", 1),
    ],
)
def test_a_rival_of_the_built_in_tiling_fits(arch, kernel, arithmetic, rows):
    key = configs.Key(kernel, arithmetic, rows, 1)
    config = rivals(arch, key)[-1]
    made = binary(arch, key, config)
    check_fits(arch, made, config.resident)
    check_tensor_cores(arch, arithmetic, made)
