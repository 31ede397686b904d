"""tree_route: the leaf of each row, against the same walk in PyTorch level by level, and a dense layer of every node's
score alone, of which a row needs one a level.

Weights and rows are sums of few halves, so that every order of adding them up gives the same turns.
"""

import pytest
import torch
import torch.nn.functional as F

import dyncore as dc
from dyncore.backends import reference
from dyncore.bench.contest import Contest, Point, Variant


def build(rows, width, depth, dtype):
    torch.manual_seed(0)
    nodes = 2**depth - 1
    weight, bias = (torch.randint(-4, 5, shape).to(dtype) / 2 for shape in ((nodes, width), (nodes,)))
    walk = lambda x: reference.tree_route(x, weight.to(x), bias.to(x)).to(x)  # noqa: E731
    scores = lambda x: F.linear(x, weight.to(x), bias.to(x))  # noqa: E731
    variants = {
        "dyncore": Variant(lambda x: dc.tree_route(x, weight, bias).to(x), walk),
        "dense": Variant(scores, scores),
        "naive": Variant(walk, walk),
    }
    inputs = [((torch.randint(-4, 5, (rows, width)) / 2).to(dtype),) for _ in range(3)]
    return Contest(variants, inputs, False)


def point(rows, width, depth, dtype=torch.float32):
    make = lambda: build(rows, width, depth, dtype)  # noqa: E731
    sizes = {"T": rows, "D": width, "nodes": 2**depth - 1}
    return Point("tree_route", "random", sizes, dtype, depth / (2**depth - 1), make, False)


POINTS = [
    *(point(2048, 512, depth) for depth in (2, 4, 8)),
    point(2048, 512, 4, torch.bfloat16),
    point(16, 512, 4),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_tree_route(contest, point):
    contest(point)
