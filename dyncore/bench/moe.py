"""Mixture of experts: SwiGLU, token choice, dropless. T rows, E experts H -> I -> H, K of them chosen by each row."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import dyncore as dc
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.bench.routing import recorded

NAME = "moe"
_ROUTINGS = 3


def _swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = F.linear(x, w_in).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w_out)


def ours(x: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    plan = dc.route(expert, weight, num_groups=w_in.shape[0])
    return dc.grouped_mlp(x, w_in, w_out, plan=plan, activation="swiglu")


def naive(x: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """A Python loop over the experts. unbind, since indexing w_in[e] zero-fills a whole gradient for each expert."""
    out = torch.zeros_like(x)
    for e, (wi, wo) in enumerate(zip(w_in.unbind(0), w_out.unbind(0), strict=True)):
        row, choice = (expert == e).nonzero(as_tuple=True)
        if row.numel():
            y = _swiglu(x.index_select(0, row), wi, wo)
            out = out.index_add_(0, row, y * weight[row, choice, None])
    return out


def grouped_mm(x: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """torch.nn.functional.grouped_mm on rows sorted by expert."""
    order = expert.reshape(-1).argsort(stable=True)
    rows = order // expert.shape[1]
    ends = torch.bincount(expert.reshape(-1), minlength=w_in.shape[0]).cumsum(0).int()
    gate, up = F.grouped_mm(x.index_select(0, rows), w_in.transpose(1, 2), offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, w_out.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, rows, y * weight.reshape(-1)[order, None])


def dense(x: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Every expert on every row, multiplied by its routing weight or 0."""
    shares = x.new_zeros(x.shape[0], w_in.shape[0]).scatter_add(1, expert, weight)
    out = torch.zeros_like(x)
    for share, wi, wo in zip(shares.unbind(1), w_in.unbind(0), w_out.unbind(0), strict=True):
        out = out + share[:, None] * _swiglu(x, wi, wo)
    return out


def indexed(x: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The loop as most code has it, by w_in[e]: its backward zero-fills the gradient of all experts for each one."""
    out = torch.zeros_like(x)
    for e in range(w_in.shape[0]):
        row, choice = (expert == e).nonzero(as_tuple=True)
        if row.numel():
            out = out.index_add_(0, row, _swiglu(x.index_select(0, row), w_in[e], w_out[e]) * weight[row, choice, None])
    return out


def smaller(x: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """A dense MLP of the FLOPs that the experts of a row have together: the static rival, another function."""
    return _swiglu(x, w_in, w_out)


def own_smaller(x: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """`smaller` by dyncore: every row, one group."""
    plan = dc.select(torch.ones(x.shape[0], dtype=torch.bool, device=x.device))
    return dc.grouped_mlp(x, w_in[None], w_out[None], plan=plan, activation="swiglu")


SAME = {"dense": dense, "naive": naive, "grouped_mm": grouped_mm, "indexed": indexed}  # what dyncore computes
EQUAL_FLOPS = {"equal_flops": smaller, "own_equal_flops": own_smaller}  # another function, of as many FLOPs
RIVALS = ("dense", "naive", "grouped_mm", "equal_flops")


@functools.lru_cache(maxsize=1)  # the largest take seconds to draw, and several points in a row have the same
def make_weights(groups: int, width: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _draw(groups, width, hidden, dtype)


def _draw(groups: int, width: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w_in [E, 2I, H], w_out [E, H, I]) that keep unit-scale inputs at unit scale."""
    torch.manual_seed(0)
    w_in = torch.randn(groups, 2 * hidden, width).div_(width**0.5)
    return w_in.to(dtype), torch.randn(groups, width, hidden).div_((hidden / 2) ** 0.5).to(dtype)


def contest(
    experts: list[Tensor],
    groups: int,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    cold: bool = True,
    rivals: Sequence[str] = RIVALS,
) -> Contest:
    top_k = experts[0].shape[1]
    weights = tuple(t.detach() for t in make_weights(groups, width, hidden, dtype))  # the cached stay as they are
    torch.manual_seed(0)
    inputs = []
    for expert in experts:
        x = torch.randn(expert.shape[0], width).to(dtype)
        inputs.append((x, expert, torch.randn(expert.shape).softmax(-1).to(dtype)))
    variants = {"dyncore": Variant(ours, naive, weights)}
    variants |= {name: Variant(SAME[name], naive, weights) for name in rivals if name in SAME}
    equal = [name for name in rivals if name in EQUAL_FLOPS and not backward]  # gradients of fewer tensors: another job
    if equal:
        small = _draw(1, width, top_k * hidden, dtype)
        small = small[0][0], small[1][0]
        variants |= {name: Variant(EQUAL_FLOPS[name], smaller, small) for name in equal}
    return Contest(variants, inputs, backward, cold)


def random_experts(rows: int, groups: int, top_k: int, skew: float = 0.0) -> list[Tensor]:
    """int64 [T, K] choices: the top-k of random logits; `skew` makes expert e less likely by skew * log(e + 1)."""
    generator = torch.Generator().manual_seed(rows * groups)
    bias = skew * torch.arange(1, groups + 1).log()
    gumbel = [-torch.empty(rows, groups).exponential_(generator=generator).log() for _ in range(_ROUTINGS)]
    return [(noise - bias).topk(top_k, dim=1).indices for noise in gumbel]


def _point(
    name: str,
    experts: list[Tensor],
    groups: int,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    cold: bool = True,
    rivals: Sequence[str] = RIVALS,
) -> Point:
    rows, top_k = experts[0].shape
    calls = (groups if "dense" in rivals else 0) + 4 * top_k  # of an expert on a row, in a round
    work = (3 if backward else 1) * calls * 6e-9 * rows * width * hidden
    return Point(
        NAME,
        name,
        {"T": rows, "E": groups, "K": top_k, "H": width, "I": hidden},
        dtype,
        top_k / groups,
        lambda: contest(experts, groups, width, hidden, dtype, backward=backward, cold=cold, rivals=rivals),
        backward,
        work,
    )


def synthetic(
    rows: int,
    groups: int,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    top_k: int = 2,
    skew: float = 0.0,
    backward: bool = False,
    rivals: Sequence[str] = RIVALS,
) -> Point:
    """Experts chosen at random; a skew of 1 gives Zipf's law."""
    experts = random_experts(rows, groups, top_k, skew)
    name = "zipf" if skew else "random"
    return _point(name, experts, groups, width, hidden, dtype, backward=backward, rivals=rivals)


def replayed(widths: tuple[int, int] | None, dtype: torch.dtype, *, backward: bool = False) -> Point:
    """The experts that the trained mixture of experts of examples/digits.py chose, at its (H, I) (None) or others.

    At its own widths the whole model fits in a cache, so weights are warm there.
    """
    routing = recorded()
    layers = [layer for layer in routing.layers if layer.expert is not None]
    experts = [layer.expert for layer in layers if layer.expert is not None]
    width, hidden = widths or (routing.width, routing.expert_width)
    groups = layers[0].num_groups
    return _point("digits", experts, groups, width, hidden, dtype, backward=backward, cold=widths is not None)


def points(size: str) -> Iterator[Point]:
    """The sweep of `size`: "tiny", "quick" or "full"."""
    f32, bf16 = torch.float32, torch.bfloat16
    if size == "tiny":
        yield synthetic(32, 4, 32, 48, f32)
        yield synthetic(32, 4, 32, 48, bf16)
        yield synthetic(32, 4, 32, 48, f32, backward=True)
        yield replayed((16, 16), f32)
        return
    for dtype in (f32, bf16):
        yield synthetic(512, 64, 512, 1024, dtype)
    yield synthetic(512, 8, 512, 1024, f32)
    for rows in (1, 16, 64):
        yield synthetic(rows, 8, 512, 1024, f32)
    yield synthetic(512, 8, 512, 1024, f32, backward=True)
    yield replayed(None, f32)
    yield replayed((512, 1024), f32)
    if size == "full":
        yield synthetic(4096, 8, 1024, 2048, f32)
        yield synthetic(4096, 8, 1024, 2048, bf16)
        for rows in (1, 16, 64):
            yield synthetic(rows, 64, 512, 1024, f32)
            yield synthetic(rows, 8, 512, 1024, bf16)
        yield synthetic(512, 64, 512, 1024, f32, skew=1.0)
        for dtype in (f32, bf16):
            yield synthetic(512, 64, 512, 1024, dtype, backward=True)
        yield replayed((512, 1024), bf16)
        yield replayed((512, 1024), f32, backward=True)
