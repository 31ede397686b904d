"""scatter_rows: slots summed into their rows, against index_add, for token skipping (one slot a row) and top-2 routing.

The plan is made beforehand: what is measured is bytes moved. "dense" adds one slot to each row without any index.
"""

import pytest
import torch

import dyncore as dc
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.bench.moe import random_experts
from dyncore.bench.token_skipping import random_masks


def build(rows, width, plan, dtype, backward):
    torch.manual_seed(0)
    index = plan.rows.long()
    add = lambda y, base, all_rows: base.index_add(0, index, y)  # noqa: E731
    everywhere = lambda y, base, all_rows: base + all_rows  # noqa: E731
    variants = {
        "dyncore": Variant(lambda y, base, all_rows: dc.scatter_rows(y, plan, base), add),
        "dense": Variant(everywhere, everywhere),
        "naive": Variant(add, add),
    }
    inputs = [tuple(torch.randn(n, width).to(dtype) for n in (plan.num_slots, rows, rows)) for _ in range(3)]
    return Contest(variants, inputs, backward)


def one_slot(rows, width, keep, dtype=torch.float32):
    plan = dc.select(random_masks(rows, keep)[0])
    shape = {"T": rows, "D": width}
    return Point("scatter_rows", "one slot", shape, dtype, keep, lambda: build(rows, width, plan, dtype, False))


def two_slots(rows, width, groups, dtype=torch.float32):
    plan = dc.route(random_experts(rows, groups, 2)[0], num_groups=groups)
    shape = {"T": rows, "G": groups, "D": width}
    return Point("scatter_rows", "top-2", shape, dtype, 2 / groups, lambda: build(rows, width, plan, dtype, False))


POINTS = [
    *(one_slot(4096, 1024, keep) for keep in (0.125, 0.5)),
    one_slot(4096, 1024, 0.5, torch.bfloat16),
    one_slot(512, 256, 0.25),
    two_slots(4096, 1024, 8),
    two_slots(512, 512, 64),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_scatter_rows(contest, point):
    contest(point)
