"""EarlyExit: a residual network of images, a head after every stage. Cascade: a small network before a large one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers import Forced, Mechanism
from benchmarks.layers.depth import CHANNELS, Residual, images
from dyncore.nn import Cascade, EarlyExit
from dyncore.nn.exits import Margin, MaxProbability

STAGES, CLASSES = 5, 10
LITTLE = 16  # channels of the small network


class Head(nn.Module):
    """Logits [B, C] of the mean over positions."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class ForcedProbability(MaxProbability):
    """Computes the confidence, then lets the share `passes` of the samples of every exit go on to the next."""

    def __init__(self, passes: float, num_exits: int) -> None:
        super().__init__([passes**k if passes < 1 else math.inf for k in range(1, num_exits)])
        self.forced = Forced(passes)

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        surest, _ = super().confidence(logits, state)
        drawn = self.forced.draw(surest.shape) if state is None else state
        return drawn, drawn


class ForcedMargin(Margin):
    """Computes the margin, then sends the share `keep` of the samples on."""

    def __init__(self, keep: float) -> None:
        super().__init__(keep if keep < 1 else math.inf)
        self.forced = Forced(keep)

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        margin, _ = super().confidence(logits, state)
        return self.forced.draw(margin.shape), state


def passing(keep: float) -> float:
    """The share r that passes every exit where a share `keep` of the later stages runs: r + r^2 + ... = keep (K-1)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(1, STAGES)) < keep * (STAGES - 1) else (low, middle)
    return high if keep else 0.0


def early_exit(keep: float) -> nn.Module:
    stages, heads = [Residual() for _ in range(STAGES)], [Head() for _ in range(STAGES)]
    return EarlyExit(stages, heads, ForcedProbability(passing(keep), STAGES))


def little() -> nn.Module:
    narrow = nn.Conv2d(CHANNELS, LITTLE, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(narrow, Residual(LITTLE), Residual(LITTLE), Head(LITTLE))


def big() -> nn.Module:
    return nn.Sequential(*(Residual() for _ in range(STAGES - 1)), Head())


class Both(nn.Module):
    """A cascade as it is without compaction: both networks on all samples, and a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.little, self.big = little(), big()

    def forward(self, x: Tensor) -> Tensor:
        first = self.little(x)
        margin = torch.softmax(first, 1).topk(2).values.diff(dim=1).neg()
        return torch.where(margin < 0.5, self.big(x), first)


MECHANISMS = (
    Mechanism(
        "EarlyExit",
        lambda: nn.Sequential(*(Residual() for _ in range(STAGES)), Head()),
        early_exit,
        images,
    ),
    Mechanism(
        "Cascade",
        Both,
        lambda keep: Cascade([little(), big()], ForcedMargin(keep)),
        images,
    ),
)
