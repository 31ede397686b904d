"""Branch: parallel modules, of which each row goes through some; the dense network adds up all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.layers import Forced, Mechanism
from benchmarks.layers.depth import CHANNELS, Residual, images, tokens
from dyncore.nn import MLP, Branch
from dyncore.nn.gates import pool_spatial

BRANCHES, WIDTH = 4, 512


class Sum(nn.Module):
    """All branches, weighted by soft gates."""

    def __init__(self, branches: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.score = nn.Linear(width, len(branches))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.score(pool_spatial(x) if x.dim() > 2 else x).sigmoid()
        weights = gate.view(*gate.shape, *(1,) * (x.dim() - 1)).unbind(1)
        return torch.stack([w * branch(x) for w, branch in zip(weights, self.branches, strict=True)]).sum(0)


class Router(Forced):
    """Soft gates, computed; of the pairs (row, branch) a share `keep` is not 0."""

    def __init__(self, keep: float, width: int) -> None:
        super().__init__(keep)
        self.score = nn.Linear(width, BRANCHES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.score(pool_spatial(x) if x.dim() > 2 else x).sigmoid()
        return self.draw(gate.shape) < self.keep, gate


MECHANISMS = (
    Mechanism(
        "Branch (samples)",
        lambda: Sum([Residual() for _ in range(BRANCHES)], CHANNELS),
        lambda keep: Branch([Residual() for _ in range(BRANCHES)], Router(keep, CHANNELS), exit="zero"),
        images,
    ),
    Mechanism(
        "Branch (rows)",
        lambda: Sum([MLP(WIDTH, 4 * WIDTH) for _ in range(BRANCHES)], WIDTH),
        lambda keep: Branch([MLP(WIDTH, 4 * WIDTH) for _ in range(BRANCHES)], Router(keep, WIDTH), exit="zero"),
        tokens,
    ),
)
