"""grouped_linear: one product, gathered and scattered, against torch's loop, grouped_mm and everything-dense."""

import pytest
import torch
import torch.nn.functional as F

import dyncore as dc
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.bench.moe import random_experts


def ours(x, expert, weight, w):
    return dc.grouped_linear(x, w, plan=dc.route(expert, weight, num_groups=w.shape[0]))


def loop(x, expert, weight, w):
    out = x.new_zeros(x.shape[0], w.shape[1])
    for e, w_e in enumerate(w.unbind(0)):
        row, choice = (expert == e).nonzero(as_tuple=True)
        if row.numel():
            out = out.index_add_(0, row, F.linear(x.index_select(0, row), w_e) * weight[row, choice, None])
    return out


def grouped_mm(x, expert, weight, w):
    order = expert.reshape(-1).argsort(stable=True)
    rows = order // expert.shape[1]
    ends = torch.bincount(expert.reshape(-1), minlength=w.shape[0]).cumsum(0).int()
    y = F.grouped_mm(x.index_select(0, rows), w.transpose(1, 2), offs=ends)
    out = x.new_zeros(x.shape[0], w.shape[1])
    return out.index_add(0, rows, y * weight.reshape(-1)[order, None])


def dense(x, expert, weight, w):
    shares = x.new_zeros(x.shape[0], w.shape[0]).scatter_add(1, expert, weight)
    out = x.new_zeros(x.shape[0], w.shape[1])
    for share, w_e in zip(shares.unbind(1), w.unbind(0), strict=True):
        out = out + share[:, None] * F.linear(x, w_e)
    return out


def build(rows, groups, top_k, width, dtype, backward):
    torch.manual_seed(0)
    weights = ((torch.randn(groups, width, width) / width**0.5).to(dtype),)
    inputs = []
    for expert in random_experts(rows, groups, top_k):
        x, weight = torch.randn(rows, width).to(dtype), torch.rand(rows, top_k).to(dtype)
        inputs.append((x, expert, weight))
    functions = {"dyncore": ours, "dense": dense, "naive": loop, "grouped_mm": grouped_mm}
    return Contest({name: Variant(fn, loop, weights) for name, fn in functions.items()}, inputs, backward)


def point(rows, groups, top_k, width, dtype=torch.float32, backward=False):
    return Point(
        "grouped_linear",
        "random",
        {"T": rows, "G": groups, "K": top_k, "N": width},
        dtype,
        top_k / groups,
        lambda: build(rows, groups, top_k, width, dtype, backward),
        backward,
    )


POINTS = [
    point(4096, 8, 1, 1024),
    point(512, 64, 2, 512),
    point(512, 64, 2, 512, torch.bfloat16),
    point(16, 8, 2, 512),
    point(512, 8, 2, 512, backward=True),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_grouped_linear(contest, point):
    contest(point)
