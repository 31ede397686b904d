"""A small MLP-Mixer (Tolstikhin 2021) on digits of 16 x 16 pixels, nearly all of whose work is MLPs: what the examples
of width and experts share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dyncore.nn import MLP
from examples import common
from examples.common import Split

SIZE, PATCH = 16, 4
TOKENS = (SIZE // PATCH) ** 2
STEM, WIDTH, HIDDEN, DEPTH = 16, 256, 1024, 3
EPOCHS = 12


def images(quick: bool) -> tuple[Split, int]:
    """(the digits, for how many epochs to train)."""
    return common.images(quick, SIZE, EPOCHS)


def dense() -> nn.Module:
    """The MLP of the dense network."""
    return MLP(WIDTH, HIDDEN, activation="relu")


class Block(nn.Module):
    """Tokens are mixed by a Linear layer, then each goes through the MLP."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_mix, self.mix = nn.LayerNorm(WIDTH), nn.Linear(TOKENS, TOKENS)
        self.norm_mlp, self.mlp = nn.LayerNorm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm_mix(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm_mlp(x))


class Mixer(nn.Module):
    """Patches, `DEPTH` blocks with MLPs made by `mlp`, a linear head on the mean of the tokens."""

    def __init__(self, mlp: Callable[[], nn.Module] = dense) -> None:
        super().__init__()
        # Patches of a convolution's features: those of pixels came to 94% in as many epochs.
        features = nn.Sequential(nn.Conv2d(1, STEM, 3, padding=1), nn.BatchNorm2d(STEM), nn.ReLU())
        self.embed = nn.Sequential(features, nn.Conv2d(STEM, WIDTH, PATCH, PATCH))
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(mlp()) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 16, 16]."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches + self.position)).mean(1))
