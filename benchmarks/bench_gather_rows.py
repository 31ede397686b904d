"""gather_rows: the live rows side by side, against index_select on the same rows and a copy of all of them.

The plan is made beforehand: what is measured is bytes moved.
"""

import pytest
import torch

import dyncore as dc
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.bench.token_skipping import random_masks


def build(rows, width, keep, dtype, backward):
    torch.manual_seed(0)
    plan = dc.select(random_masks(rows, keep)[0])
    index = plan.rows.long()
    select = lambda x: x.index_select(0, index)  # noqa: E731
    variants = {
        "dyncore": Variant(lambda x: dc.gather_rows(x, plan), select),
        "dense": Variant(torch.clone, torch.clone),
        "naive": Variant(select, select),
    }
    return Contest(variants, [(torch.randn(rows, width).to(dtype),) for _ in range(3)], backward)


def point(rows, width, keep, dtype=torch.float32, backward=False):
    make = lambda: build(rows, width, keep, dtype, backward)  # noqa: E731
    return Point("gather_rows", "random", {"T": rows, "D": width}, dtype, keep, make, backward)


POINTS = [
    *(point(4096, 1024, keep) for keep in (0.125, 0.5)),
    point(4096, 1024, 0.5, torch.bfloat16),
    point(512, 256, 0.25),
    point(4096, 1024, 0.5, backward=True),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_gather_rows(contest, point):
    contest(point)
