"""Making plans: select, select_topk, route and route_mask, against the index lists that PyTorch code makes instead.

"naive" gives the slots alone; a plan also holds the inverse map, so that results are combined without atomics. There is
no dense way to make a plan: "dense" is the naive one.
"""

import pytest
import torch

import dyncore as dc
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.bench.moe import random_experts
from dyncore.bench.token_skipping import random_masks


def build(ours, naive, inputs):
    same = Variant(naive, naive)
    return Contest({"dyncore": Variant(ours, naive), "dense": same, "naive": same}, inputs)


def nonzero(mask):
    return mask.nonzero().squeeze(1)


def best(scores, k):
    batch, seq = scores.shape
    places = scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return (places + seq * torch.arange(batch)[:, None]).reshape(-1)


def by_expert(expert, groups):
    flat = expert.reshape(-1)
    offsets = torch.bincount(flat, minlength=groups).cumsum(0)
    return torch.cat([flat.argsort(stable=True) // expert.shape[1], offsets])


def routed(expert, groups):
    plan = dc.route(expert, num_groups=groups)
    return torch.cat([plan.rows, plan.offsets[1:]])


def by_group(mask):
    group, row = mask.t().nonzero(as_tuple=True)
    return torch.cat([row, torch.bincount(group, minlength=mask.shape[1]).cumsum(0)])


def routed_by_mask(mask):
    plan = dc.route_mask(mask)
    return torch.cat([plan.rows, plan.offsets[1:]])


def select(rows, keep):
    make = lambda: build(lambda m: dc.select(m).rows, nonzero, [(m,) for m in random_masks(rows, keep)])  # noqa: E731
    return Point("select", "random", {"T": rows}, torch.float32, keep, make)


def select_topk(batch, seq, k):
    def make():
        torch.manual_seed(0)
        inputs = [(torch.randn(batch, seq),) for _ in range(3)]
        return build(lambda s: dc.select_topk(s, k).rows, lambda s: best(s, k), inputs)

    return Point("select_topk", "random", {"B": batch, "S": seq, "k": k}, torch.float32, k / seq, make)


def route(rows, groups, top_k):
    inputs = [(expert,) for expert in random_experts(rows, groups, top_k)]
    make = lambda: build(lambda e: routed(e, groups), lambda e: by_expert(e, groups), inputs)  # noqa: E731
    return Point("route", "random", {"T": rows, "G": groups, "K": top_k}, torch.float32, top_k / groups, make)


def route_mask(rows, groups, density):
    def make():
        generator = torch.Generator().manual_seed(rows)
        inputs = [(torch.rand(rows, groups, generator=generator) < density,) for _ in range(3)]
        return build(routed_by_mask, by_group, inputs)

    return Point("route_mask", "random", {"T": rows, "G": groups}, torch.float32, density, make)


POINTS = [
    select(4096, 0.25),
    select(65536, 0.25),
    select_topk(8, 512, 64),
    select_topk(4, 8192, 1024),
    route(512, 64, 2),
    route(4096, 64, 2),
    route(16384, 64, 8),
    route_mask(4096, 8, 0.25),
    route_mask(4096, 64, 2 / 64),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_plan(contest, point):
    contest(point)
