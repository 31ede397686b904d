"""A small residual network on digits of 16 x 16 pixels: what the examples that skip blocks share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from examples import common
from examples.common import Split

SIZE, WIDTH, DEPTH = 16, 64, 6
EPOCHS, BATCH = 8, 32


def images(quick: bool) -> tuple[Split, int]:
    """(the digits, for how many epochs to train)."""
    return common.images(quick, SIZE, EPOCHS)


def block() -> nn.Module:
    """The residual F(x) of a block [B, WIDTH, H, W]; whoever uses it adds x."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)]
    nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]  # it begins as the identity
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """x + F(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Classifier(nn.Module):
    """Logits [B, classes] from the features [B, WIDTH, H, W] of a chain of blocks: a linear head on their quarters."""

    def __init__(self, chain: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.chain = chain
        self.norm = nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(4 * WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.norm(self.chain(x)).relu(), 2).flatten(1))


class ResNet(Classifier):
    """Logits [B, 10] of images [B, 1, 16, 16]: a convolution to 8 x 8 positions, a chain of blocks, a head."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__(chain)
        self.stem = stem()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.stem(images))


def stem() -> nn.Module:
    return nn.Conv2d(1, WIDTH, 3, stride=2, padding=1)


def dense() -> ResNet:
    return ResNet(nn.Sequential(*(Residual() for _ in range(DEPTH))))
