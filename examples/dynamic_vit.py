"""The Dynamic Vision Transformer in small (Wang 2021): few large patches first, more and smaller ones where needed.

Three vision transformers of 2 x 2, 4 x 4 and 8 x 8 tokens. Where the first is not sure the second takes over, and so
on; each uses the features of the one before again: these are enlarged to its grid of tokens and added to its own.

    python -m examples.dynamic_vit
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import EarlyExit, TransformerBlock
from examples.common import CLASSES, Result, main, train
from examples.exiting import LastExit, State, conv, exit_loss, images, result

SIZE, STEM, WIDTH, HEADS, DEPTH = 16, 24, 96, 4, 2
GRIDS = (2, 4, 8)  # tokens a side
THRESHOLDS = (1.01, 0.99, 0.95, 0.9, 0.8, 0.6, 0.0)


class Transformer(nn.Module):
    """A vision transformer of grid x grid tokens; features [B, WIDTH, grid, grid]."""

    def __init__(self, grid: int, reuses: bool) -> None:
        super().__init__()
        patch = SIZE // 2 // grid
        self.embed = nn.Sequential(conv(1, STEM, 2), nn.Conv2d(STEM, WIDTH, patch, patch), nn.BatchNorm2d(WIDTH))
        self.position = nn.Parameter(0.1 * torch.randn(WIDTH, grid, grid))
        mixed = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 1))
        self.reuse = mixed if reuses else None
        self.blocks = nn.Sequential(
            *(TransformerBlock(WIDTH, HEADS, causal=False, rotary=False) for _ in range(DEPTH)), nn.LayerNorm(WIDTH)
        )

    def forward(self, state: Tensor | State) -> State:
        image, features = (state, None) if isinstance(state, Tensor) else state
        x = self.embed(image) + self.position
        if self.reuse is not None and features is not None:
            x = x + F.interpolate(self.reuse(features), size=x.shape[2:], mode="nearest")
        tokens = self.blocks(x.flatten(2).transpose(1, 2))
        return image, tokens.transpose(1, 2).reshape(x.shape)


class Head(nn.Module):
    """Logits of the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, state: State) -> Tensor:
        return self.linear(state[1].mean((2, 3)))


def build() -> EarlyExit:
    return EarlyExit([Transformer(grid, number > 0) for number, grid in enumerate(GRIDS)], [Head() for _ in GRIDS])


def run(quick: bool) -> Result:
    data = images(quick, SIZE)
    model = build()
    train(model, data.train, epochs=1 if quick else 20, loss=exit_loss, batch=32, rate=1.5e-3)
    return result("Dynamic Vision Transformer", LastExit(model), model, THRESHOLDS, data, quick)


if __name__ == "__main__":
    main(run, __doc__)
