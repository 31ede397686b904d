"""AdaptiveDepth: images, rows, tokens and positions of a feature map that take as many steps as they are told to.

The first step is taken by all; the share is that of the steps after it, which more rows take early than late.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.layers import Forced, Mechanism
from benchmarks.layers.depth import Residual, images, tokens
from dyncore.nn import MLP, AdaptiveDepth, TransformerBlock

STEPS = 5
WIDTH, HEADS, SEQUENCES, LENGTH = 512, 8, 8, 256
MAPS, CHANNELS, SIZE = 16, 128, 32


class Schedule(Forced):
    """After how many steps each row halts: step n leaves a share of them live that falls with n, `keep` in the mean."""

    def __init__(self, keep: float) -> None:
        super().__init__(keep)
        self.drawn = torch.empty(0)

    def live(self, n: int) -> float:
        """The share of the rows that goes on after step n = 1..STEPS-1."""
        place = 2 * (n - 0.5) / (STEPS - 1)  # 0..2, the mean of these being 1
        return min(self.keep * (2 - place), 1.0) if self.keep <= 0.5 else max(1 - (1 - self.keep) * place, 0.0)


class Halt(nn.Module):
    """A linear score, computed and then overruled by the schedule. It sees the live rows, or all of them."""

    def __init__(self, schedule: Schedule, n: int, width: int) -> None:
        super().__init__()
        self.schedule = schedule
        self.n = n
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        schedule = self.schedule
        if self.n == 1:
            schedule.drawn = schedule.draw(x.shape[:-1])
        drawn = schedule.drawn
        if drawn.shape != x.shape[:-1]:
            drawn = drawn[drawn < schedule.live(self.n - 1)]
        logits = torch.where(drawn < schedule.live(self.n), -6.0, 1e9)  # the mean of the states is really one
        return self.score(x).clamp(0, 0) + logits[..., None]


def halts(keep: float, width: int) -> list[nn.Module]:
    schedule = Schedule(keep)
    return [Halt(schedule, n, width) for n in range(1, STEPS)]


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def rows(keep: float) -> nn.Module:
    return AdaptiveDepth([MLP(WIDTH, 4 * WIDTH) for _ in range(STEPS)], halts(keep, WIDTH))


def samples(keep: float) -> nn.Module:
    return AdaptiveDepth([Residual() for _ in range(STEPS)], halts(keep, 64), pool=Pool())


def blocks() -> Sequence[nn.Module]:
    return [TransformerBlock(WIDTH, HEADS, causal=False) for _ in range(STEPS)]


def sequences(one: bool) -> tuple[Tensor, ...]:
    return (torch.randn(1 if one else SEQUENCES, LENGTH, WIDTH),)


def pointwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, 4 * CHANNELS, 1), nn.ReLU(), nn.Conv2d(4 * CHANNELS, CHANNELS, 1))


def maps(one: bool) -> tuple[Tensor, ...]:
    return (torch.randn(1 if one else MAPS, CHANNELS, SIZE, SIZE),)


MECHANISMS = (
    Mechanism(
        "AdaptiveDepth (samples)",
        lambda: nn.Sequential(*(Residual() for _ in range(STEPS))),
        samples,
        images,
    ),
    Mechanism(
        "AdaptiveDepth (rows)",
        lambda: nn.Sequential(*(MLP(WIDTH, 4 * WIDTH) for _ in range(STEPS))),
        rows,
        tokens,
    ),
    Mechanism(
        "AdaptiveDepth (tokens)",
        lambda: nn.Sequential(*blocks()),
        lambda keep: AdaptiveDepth(blocks(), halts(keep, WIDTH), tokens=True),
        sequences,
    ),
    Mechanism(
        "AdaptiveDepth (positions)",
        lambda: nn.Sequential(*(pointwise() for _ in range(STEPS))),
        lambda keep: AdaptiveDepth([pointwise() for _ in range(STEPS)], halts(keep, CHANNELS), spatial=True),
        maps,
    ),
)
