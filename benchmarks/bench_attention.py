"""attention of selected tokens, against torch's scaled_dot_product_attention with a mask, or causal where that says it.

B=1, 8 heads of width 64, of which the heads of a token lie side by side, as projections leave them. keep: the share of
a sequence's tokens that ask, at random positions; they attend to all tokens up to their own, or to one another.
"""

import pytest
import torch
import torch.nn.functional as F

import dyncore as dc
from dyncore.bench import Contest, Point, Variant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HEADS, WIDTH = 8, 64


def ours(q, k, v, at, places):
    return dc.attention(q, k, v, q_positions=at, k_positions=places)


def masked(q, k, v, at, places):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(places[:, None] <= at[:, :, None])[:, None])


def causal(q, k, v, at, places):
    """The same where queries and keys are of one selection in ascending order."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def problem(length, queries, keys, dtype, backward):
    generator = torch.Generator().manual_seed(queries)
    inputs = []
    for _ in range(3):
        at = torch.randperm(length, generator=generator)[:queries].sort().values[None].int()
        places = torch.arange(length)[None].int() if keys == length else at
        heads = (torch.randn(1, n, HEADS, WIDTH, generator=generator).to(dtype) for n in (queries, keys, keys))
        inputs.append((*(t.transpose(1, 2) for t in heads), at, places))
    variants = {"dyncore": Variant(ours, masked), "mask": Variant(masked, masked)}
    if queries == keys:
        variants["causal"] = Variant(causal, masked)
    return Contest(variants, inputs, backward, cold=False)


def point(queries, keys, dtype, backward, length=2048):
    shape = {"S": length, "N": queries, "M": keys, "heads": HEADS, "D": WIDTH}
    return Point(
        "attention",
        "all" if queries == length else "all keys" if keys == length else "selected",
        shape,
        dtype,
        queries / length,
        lambda: problem(length, queries, keys, dtype, backward),
        backward,
    )


SIZES = [(2048, 2048), (512, 2048), (512, 512), (128, 2048), (128, 128)]
POINTS = [
    *(point(*sizes, F32, backward) for sizes in SIZES for backward in (False, True)),
    *(point(*sizes, BF16, backward) for sizes in SIZES[:4] for backward in (False, True)),
    point(512, 2048, F16, False),
    *(point(queries, 2048, F32, False) for queries in (32, 8)),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_attention(contest, point):
    contest(point)
