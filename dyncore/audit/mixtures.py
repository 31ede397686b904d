"""A loop over experts in Python as one nn.MoE: its routing is found by trying which one gives the block's numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dyncore import break_even
from dyncore.audit.candidates import Candidate, expression
from dyncore.audit.watching import Call
from dyncore.measure.agreement import disagreement
from dyncore.nn.moe import MoE

_MOST = 8  # experts of a token that are tried


def _moes(block: nn.Module, found: Candidate) -> Iterator[tuple[MoE, str]]:
    """MoE layers of the block's weights, and the options that make them."""
    experts: Any = block.get_submodule(found.experts)
    router = block.get_submodule(found.router)
    for top_k, normalize in itertools.product(range(1, min(_MOST, len(experts)) + 1), (True, False)):
        moe = MoE.from_experts(list(experts), router, top_k=top_k, normalize=normalize).eval()
        yield moe, f"top_k={top_k}, normalize={normalize}"


def moe_run(found: Candidate, block: nn.Module, twin: nn.Module, call: Call) -> Callable[[], Any] | None:
    """How the block runs as a MoE; None, with the reason in the finding, where no routing that is known fits.

    Where the block returns a tensor alone the MoE stands in the twin, too.
    """
    layer, x, y = found.layer, call.x, call.y
    if x is None or y is None or x.shape != y.shape:
        layer.why_not = "it does not map rows [..., H] to rows of the same shape"
        return None
    try:
        match = next(((moe, options) for moe, options in _moes(block, found) if _same(moe, x, y)), None)
    except (TypeError, ValueError) as error:
        layer.why_not = str(error)
        return None
    place = expression(found.path)
    if match is None:
        layer.why_not = (
            "no softmax over experts of which a token takes the best gives its numbers: with the block's own choice, "
            f"plan = dyncore.route(expert, weight, num_groups={len(block.get_submodule(found.experts)._modules)}) and "
            "dyncore.grouped_mlp(x, w_in, w_out, plan=plan) compute the chosen experts alone"
        )
        return None
    moe, options = match
    layer.density = moe.top_k / moe.num_experts
    rows = x.numel() // x.shape[-1]
    layer.break_even = min(1.0, break_even.masked_from(x.device.type, "grouped_mlp", rows, [moe.w_in, moe.w_out]))
    layer.how = (
        f"{place} = dyncore.nn.MoE.from_experts(list({place}.{found.experts}), {place}.{found.router}, {options})"
    )
    if not isinstance(call.output, Tensor):
        layer.how += "; it gives the output alone, where the block returns more"
    elif found.path:
        twin.set_submodule(found.path, moe)
    return lambda: moe(x)


@torch.no_grad()
def _same(moe: MoE, x: Tensor, y: Tensor) -> bool:
    return disagreement(moe(x), y) is None
