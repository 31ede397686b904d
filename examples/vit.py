"""A small vision transformer on digits of 32 x 32 pixels (64 patches, a class token): what the token examples share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dyncore.nn import TransformerBlock
from examples.common import Split, digits

SIZE, PATCH = 32, 4
WIDTH, HEADS, DEPTH = 96, 4, 4
EPOCHS = 16


def images(quick: bool) -> tuple[Split, int]:
    """(the digits, for how many epochs to train); a few of them for one where it has to be quick."""
    data = digits(size=SIZE)
    if not quick:
        return data, EPOCHS
    parts = ((x[:64], y[:64]) for x, y in (data.train, data.valid, data.test))
    return Split(*parts), 1


def block(index: int = 0) -> TransformerBlock:
    """A block of the dense network, of any index."""
    return TransformerBlock(WIDTH, HEADS, causal=False, rotary=False)


class Vit(nn.Module):
    """Patches by two convolutions, `DEPTH` blocks made by `layer`, a linear head on the mean of the tokens left."""

    def __init__(self, layer: Callable[[int], nn.Module] = block) -> None:
        super().__init__()
        half = nn.Conv2d(1, WIDTH // 4, 3, stride=2, padding=1)
        self.embed = nn.Sequential(half, nn.GELU(), nn.Conv2d(WIDTH // 4, WIDTH, 3, stride=2, padding=1))
        self.first = nn.Parameter(torch.randn(WIDTH) * 0.3)
        self.position = nn.Parameter(torch.randn((SIZE // PATCH) ** 2, WIDTH) * 0.3)  # as large as what is seen
        self.blocks = nn.ModuleList(layer(i) for i in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def tokens(self, images: Tensor) -> Tensor:
        """[B, 1 + 64, WIDTH] of images [B, 1, 32, 32]."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return torch.cat([self.first.expand(len(x), 1, WIDTH), x], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10]."""
        x = self.tokens(images)
        for layer in self.blocks:
            x = layer(x)
        return self.read(x)

    def read(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Logits [B, 10] of tokens [B, N, WIDTH], which stand for `sizes` [B, N] tokens each (1 if None)."""
        x = self.norm(x)
        return self.head(x.mean(1) if sizes is None else (x * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True))
