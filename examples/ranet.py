"""RANet in small (Yang 2020): a small image first; only where that is not enough a larger one, features used again.

The state that goes from stage to stage holds the image for the sub-networks to come and the features of those before:
the second sub-network starts from its own image and from the enlarged features of the first.

    python -m examples.ranet
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import EarlyExit
from examples.common import CLASSES, Result, main, train
from examples.exiting import LastExit, State, conv, exit_loss, images, result

SIZE = 16
SUBNETS = ((4, 32), (8, 48), (16, 48))  # image size, channels
THRESHOLDS = (1.01, 0.999, 0.99, 0.97, 0.9, 0.7, 0.0)


class Start(nn.Module):
    """A sub-network's first layers, on its size of the image and on the features of the one before."""

    def __init__(self, size: int, channels: int, before: int) -> None:
        super().__init__()
        self.size = size
        self.image = conv(1, channels)
        self.before = conv(before, channels) if before else None
        self.first = conv(channels * (2 if before else 1), channels)

    def forward(self, state: Tensor | State) -> State:
        image, features = (state, None) if isinstance(state, Tensor) else state
        x = self.image(F.adaptive_avg_pool2d(image, self.size))
        if self.before is not None and features is not None:
            x = torch.cat([x, F.interpolate(self.before(features), size=x.shape[2:], mode="nearest")], 1)
        return image, self.first(x)


class More(nn.Module):
    """Residual layers of a sub-network."""

    def __init__(self, channels: int, layers: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.shrink = conv(channels, channels, 2) if stride == 2 else nn.Identity()
        parts = (nn.Sequential(conv(channels, channels), conv(channels, channels)) for _ in range(layers))
        self.layers = nn.ModuleList(parts)

    def forward(self, state: State) -> State:
        image, x = state[0], self.shrink(state[1])
        for layer in self.layers:
            x = x + layer(x)
        return image, x


class Head(nn.Module):
    """Logits of the features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, 64, stride=2)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, state: State) -> Tensor:
        return self.linear(self.conv(state[1]).mean((2, 3)))


def build() -> EarlyExit:
    """Three sub-networks of two stages each, with an exit after every stage."""
    stages: list[nn.Module] = []
    heads: list[nn.Module] = []
    before = 0
    for size, channels in SUBNETS:
        stages += [nn.Sequential(Start(size, channels, before), More(channels)), More(channels, stride=2)]
        heads += [Head(channels), Head(channels)]
        before = channels
    return EarlyExit(stages, heads)


def run(quick: bool) -> Result:
    data = images(quick, SIZE)
    model = build()
    train(model, data.train, epochs=1 if quick else 16, loss=exit_loss)
    return result("RANet", LastExit(model), model, THRESHOLDS, data, quick)


if __name__ == "__main__":
    main(run, __doc__)
