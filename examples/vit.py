"""A small vision transformer on digits of 16 x 16 pixels (64 tokens and a class token): what the token examples share.

Its dynamic forms start from the trained dense network and are trained on, as most papers do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import TransformerBlock
from examples import common
from examples.common import Loss, Move, Split, train

SIZE, STRIDE = 16, 2
WIDTH, HEADS, DEPTH = 96, 4, 4
EPOCHS, BATCH, RATE = 20, 32, 1.5e-3
LEAST = 0.05  # share of the tokens in training


def images(quick: bool) -> tuple[Split, int]:
    """(the digits, for how many epochs to train)."""
    return common.images(quick, SIZE, EPOCHS)


def block(index: int = 0) -> TransformerBlock:
    """A block of the dense network, of any index."""
    return TransformerBlock(WIDTH, HEADS, causal=False, rotary=False)


class Vit(nn.Module):
    """Tokens by two convolutions, `DEPTH` blocks made by `layer`, a linear head on the mean of the tokens left."""

    def __init__(self, layer: Callable[[int], nn.Module] = block) -> None:
        super().__init__()
        # Convolutions with batch statistics: linear patches came to 64% in as many epochs, these to 95% and more.
        few, wide = nn.Conv2d(1, WIDTH // 4, 3, padding=1), nn.Conv2d(WIDTH // 4, WIDTH, 3, STRIDE, 1)
        self.embed = nn.Sequential(few, nn.BatchNorm2d(WIDTH // 4), nn.ReLU(), wide, nn.BatchNorm2d(WIDTH))
        self.first = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.position = nn.Parameter(torch.randn((SIZE // STRIDE) ** 2, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(layer(i) for i in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def tokens(self, images: Tensor) -> Tensor:
        """[B, 1 + 64, WIDTH] of images [B, 1, 16, 16]."""
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


def dense(quick: bool) -> tuple[Split, Vit]:
    """(the digits, the dense network trained on them)."""
    data, epochs = images(quick)
    model = Vit()
    train(model, data.train, epochs=epochs, batch=BATCH, rate=RATE)
    return data, model


def started(trained: Vit, layer: Callable[[int, nn.Module], nn.Module]) -> Vit:
    """A copy of a trained network whose blocks are `layer(index, block)` of those it had."""
    model = copy.deepcopy(trained)
    model.blocks = nn.ModuleList(layer(i, inner) for i, inner in enumerate(model.blocks))
    return model


def train_on(model: nn.Module, data: Split, loss: Loss, quick: bool) -> nn.Module:
    """Trains a network that started from a trained one, for half as many epochs."""
    return train(model, data.train, epochs=1 if quick else EPOCHS // 2, batch=BATCH, rate=RATE / 2, loss=loss)


def any_share(move: Move) -> Loss:
    """Cross-entropy at a share of the tokens drawn anew for every batch, which `move` sets."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        move(model, float(torch.empty(()).uniform_(LEAST, 1.0)))
        return F.cross_entropy(model(x), y)

    return loss
