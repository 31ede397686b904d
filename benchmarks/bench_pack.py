"""What `MoE.pack()` saves: grouped_mlp on panels that were packed once against packing the same weights in every call.

"dyncore" computes with panels, "unpacked" without.
"""

import functools

import pytest
import torch

import dyncore as dc
from dyncore.bench import moe
from dyncore.bench.contest import Contest, Point, Variant, dtype_name
from dyncore.ops.packed import PackedMLP, grouped_mlp_packed

GROUPS, WIDTH, HIDDEN, TOP_K = 8, 512, 1024, 2


def contest_of(rows, dtype):
    base = moe.contest(moe.random_experts(rows, GROUPS, TOP_K), GROUPS, WIDTH, HIDDEN, dtype, rivals=["naive"])
    unpacked = base.variants["dyncore"]
    packed = functools.cache(lambda w_in, w_out: PackedMLP(w_in, w_out, "swiglu"))  # the first rounds pack the copies

    def run(x, expert, weight, w_in, w_out):
        plan = dc.route(expert, weight, num_groups=GROUPS)
        return grouped_mlp_packed(x, w_in, w_out, packed(w_in, w_out), plan=plan)

    ours = Variant(run, unpacked.truth, unpacked.weights)
    return Contest(base.variants | {"dyncore": ours, "unpacked": unpacked}, base.inputs)


def point(rows, dtype):
    shape = {"T": rows, "E": GROUPS, "K": TOP_K, "H": WIDTH, "I": HIDDEN}
    return Point("pack", "random", shape, dtype, TOP_K / GROUPS, lambda: contest_of(rows, dtype))


POINTS = [point(rows, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16) for rows in (8, 64, 512, 4096)]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p.shape['T']}-{dtype_name(p.dtype)}")
def test_pack(contest, point):
    contest(point)
