"""MSDNet in small (Huang 2018): features at three scales, densely connected; exits after the stem and each stage.

The state that goes from stage to stage is three tensors, one a scale, each growing by concatenation; later stages drop
the finest. Thresholds are calibrated on the validation images for a budget, a share of the FLOPs of everything.

    python -m examples.early_exit_msdnet
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dyncore as dc
from dyncore.nn import EarlyExit, exits
from examples.common import CLASSES, Result, Split, main, train
from examples.exiting import LastExit, conv, exit_loss, images, result

SIZE = 16
GROWTH = (16, 24, 48)  # channels that a layer adds at each scale, the finest first
WIDTHS = (8, 12, 16)  # after the stem, which has an exit of its own
STAGES = ((0, 0), (0, 1), (0, 2), (1, 2), (1, 2))  # finest scale, layers
BUDGETS = (1.0, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02)  # shares of the FLOPs


class Stem(nn.Module):
    """The image at three scales."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(conv(i, o, 1 + (i > 1)) for i, o in zip((1, *WIDTHS[:-1]), WIDTHS, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for scale in self.scales:
            x = scale(x)
            found.append(x)
        return tuple(found)


class Layer(nn.Module):
    """Adds features to each scale, made of those there and of those of the next finer one."""

    def __init__(self, widths: list[int], finest: int) -> None:
        super().__init__()
        self.same, self.finer = nn.ModuleDict(), nn.ModuleDict()
        for s in range(finest, len(widths)):
            half = s > finest
            self.same[str(s)] = conv(widths[s], GROWTH[s] // 2 if half else GROWTH[s])
            if half:
                self.finer[str(s)] = conv(widths[s - 1], GROWTH[s] // 2, stride=2)

    def forward(self, scales: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first = len(GROWTH) - len(scales)
        finest = len(GROWTH) - len(self.same)
        found: list[Tensor] = []
        for s in range(finest, len(GROWTH)):
            here, new = scales[s - first], [self.same[str(s)](scales[s - first])]
            if str(s) in self.finer:
                new.append(self.finer[str(s)](scales[s - first - 1]))
            found.append(torch.cat([here, *new], 1))
        return tuple(found)


class Head(nn.Module):
    """Logits of the coarsest scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, 64, stride=2)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, scales: tuple[Tensor, ...]) -> Tensor:
        return self.linear(self.conv(scales[-1]).mean((2, 3)))


def build() -> EarlyExit:
    stages: list[nn.Module] = []
    heads: list[nn.Module] = []
    widths = list(WIDTHS)
    for number, (finest, layers) in enumerate(STAGES):
        parts: list[nn.Module] = [Stem()] if number == 0 else []
        for _ in range(layers):
            parts.append(Layer(widths, finest))
            widths = [w + g if s >= finest else w for s, (w, g) in enumerate(zip(widths, GROWTH, strict=True))]
        stages.append(nn.Sequential(*parts))
        heads.append(Head(widths[-1]))
    return EarlyExit(stages, heads)


def calibrated(model: EarlyExit, data: Split) -> dict[float, Tensor]:
    """Thresholds for each budget, from the validation images."""
    x, _ = data.valid
    model.set_costs(dc.measure.exit_costs(model, x))
    with torch.no_grad():
        surest = exits.confidences(model.every_exit(x), model.criterion)
    total = sum(model.costs)
    return {budget: exits.calibrate(surest, model.costs, budget * total) for budget in BUDGETS}


def run(quick: bool) -> Result:
    data = images(quick, SIZE)
    model = build()
    train(model, data.train, epochs=1 if quick else 12, loss=exit_loss)
    thresholds = calibrated(model, data)

    def move(model: nn.Module, budget: float) -> None:
        assert isinstance(model, EarlyExit)
        model.threshold = thresholds[budget]

    note = "The threshold is the budget asked for, as a share of all FLOPs; the images it was set on are others."
    return result("MSDNet", LastExit(model), model, BUDGETS, data, quick, move=move, note=note)


if __name__ == "__main__":
    main(run, __doc__)
