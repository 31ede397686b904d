"""What a call costs beside its kernel: a problem of 16 rows and 16 channels, without and with gradients.

A record's times are of CALLS calls. "naive" is what one writes in PyTorch instead; "dense" skips nothing.
"""

import pytest
import torch
import torch.nn.functional as F

import dyncore as dc
from dyncore.bench.contest import Contest, Point, Variant

ROWS, WIDTH, CALLS = 16, 16, 100


def repeated(fn):
    """`fn` CALLS times; the sum of its results, so that gradients flow through every call."""

    def run(*args):
        total = fn(*args)
        for _ in range(CALLS - 1):
            total = total + fn(*args) if total.requires_grad else fn(*args)
        return total

    return run


def dense(x, mask, w_in, w_out):
    return torch.where(mask[:, None], F.linear(F.gelu(F.linear(x, w_in[0])), w_out[0]), 0)


def naive(x, mask, w_in, w_out):
    rows = mask.nonzero().squeeze(1)
    y = F.linear(F.gelu(F.linear(x.index_select(0, rows), w_in[0])), w_out[0])
    return x.new_zeros(x.shape).index_add(0, rows, y)


def mask_of(rows):
    return torch.arange(rows) % 2 == 0


def select():
    places = lambda mask: mask.nonzero().squeeze(1)  # noqa: E731
    same = Variant(repeated(places), places)
    ours = Variant(repeated(lambda mask: dc.select(mask).rows), places)
    return Contest({"dyncore": ours, "dense": same, "naive": same}, [(mask_of(ROWS),)], cold=False)


def grouped_mlp(backward):
    torch.manual_seed(0)
    weights = tuple(torch.randn(1, WIDTH, WIDTH) / WIDTH**0.5 for _ in range(2))
    mask = mask_of(ROWS)
    plan = dc.select(mask)
    functions = {
        "dyncore": lambda x, mask, w_in, w_out: dc.grouped_mlp(x, w_in, w_out, plan=plan),
        "dense": dense,
        "naive": naive,
    }
    variants = {name: Variant(repeated(fn), repeated(naive), weights) for name, fn in functions.items()}
    return Contest(variants, [(torch.randn(ROWS, WIDTH), mask)], backward, cold=False)


def point(name, build, backward=False):
    shape = {"T": ROWS, "H": WIDTH, "I": WIDTH, "calls": CALLS}
    return Point("overhead", name, shape, torch.float32, 0.5, build, backward)


POINTS = [
    point("select", select),
    point("grouped_mlp", lambda: grouped_mlp(False)),
    point("grouped_mlp", lambda: grouped_mlp(True), backward=True),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_overhead(contest, point):
    contest(point)
