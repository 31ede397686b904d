"""Losses that keep conditional computation useful: balance between experts, calm routers, a target for compute.

Functions of tensors; layers offer theirs by `layer.losses()` and `collect_losses(model)`, unweighted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def load_balance(probabilities: Tensor, counts: Tensor) -> Tensor:
    """G * sum over groups of (share of slots) * (mean probability): 1 when balanced (Switch, Fedus 2021).

    Args:
        probabilities: float [T, G], the router's softmax.
        counts: [G], slots each group received; no gradient.

    A scalar; 0 where there are no rows.
    """
    if probabilities.dim() != 2 or counts.shape != probabilities.shape[1:]:
        columns = list(probabilities.shape)
        raise ValueError(f"counts: expected one for each column of probabilities {columns}, got {list(counts.shape)}")
    num_rows, num_groups = probabilities.shape
    share = counts.to(probabilities.dtype) / counts.sum().clamp(min=1)
    return num_groups * (share * probabilities.sum(0)).sum() / max(num_rows, 1)


def router_z(logits: Tensor) -> Tensor:
    """Mean of logsumexp(logits [..., G])^2, which keeps logits small (ST-MoE, Zoph 2022). A scalar; 0 for no rows."""
    z = torch.logsumexp(logits, dim=-1)
    return z.square().sum() / max(z.numel(), 1)


def compute_target(costs: Tensor | Iterable[Tensor], target: float, weights: Iterable[float] | None = None) -> Tensor:
    """(mean cost - target)^2 (as in D-LLM and dynamic convolutions, Verelst 2020).

    Args:
        costs: executed cost per row of a layer (`layer.last_cost`), or of several (`collect_costs(model).values()`).
        target: the share of compute wanted, in the units of the costs.
        weights: what a full row of each layer costs, such as its FLOPs; equal if None.

    A scalar. Raises TypeError on what are no costs, such as those of a layer that has not run, ValueError where there
    are none or the number of weights differs.
    """
    if isinstance(costs, Mapping) or not isinstance(costs, Iterable):
        raise TypeError(f"costs: expected a Tensor or an iterable of them, got {type(costs).__name__}")
    layers = [costs] if isinstance(costs, Tensor) else list(costs)
    shares = [1.0] * len(layers) if weights is None else list(weights)
    if not layers:
        raise ValueError("costs: expected the cost of at least one layer, got none")
    if len(shares) != len(layers):
        raise ValueError(f"weights: expected {len(layers)} of them, one a layer, got {len(shares)}")
    for cost in layers:
        if not isinstance(cost, Tensor):
            raise TypeError(f"costs: expected a Tensor or an iterable of them, got one of {type(cost).__name__}")
    means = torch.stack([w * c.sum() / max(c.numel(), 1) for w, c in zip(shares, layers, strict=True)])
    return (means.sum() / sum(shares) - target).square()
