"""Skip: a residual block of a network of images, left out sample by sample (SkipNet), and an MLP, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.layers import Forced, Mechanism
from dyncore.nn import MLP, Skip

BATCH, CHANNELS, SIZE, BLOCKS = 64, 64, 16, 4
TOKENS, WIDTH = 2048, 512


class Residual(nn.Module):
    """x + conv(relu(conv(x))), normalised, on [B, C, H, W]."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def images(one: bool) -> tuple[Tensor, ...]:
    return (torch.randn(1 if one else BATCH, CHANNELS, SIZE, SIZE),)


def tokens(one: bool) -> tuple[Tensor, ...]:
    return (torch.randn(1 if one else TOKENS, WIDTH),)


MECHANISMS = (
    Mechanism(
        "Skip (samples)",
        lambda: nn.Sequential(*(Residual() for _ in range(BLOCKS))),
        lambda keep: nn.Sequential(*(Skip(Residual(), Forced(keep)) for _ in range(BLOCKS))),
        images,
    ),
    Mechanism(
        "Skip (tokens)",
        lambda: MLP(WIDTH, 4 * WIDTH),
        lambda keep: Skip(MLP(WIDTH, 4 * WIDTH), Forced(keep)),
        tokens,
    ),
)
