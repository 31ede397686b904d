"""What the examples of early exits share: convolutions, a state that keeps the image, losses, the curve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import dyncore as dc
from dyncore.nn import Cascade, EarlyExit
from dyncore.nn.losses import exit_distillation, multi_exit
from examples import common
from examples.common import Move, Result, Split, clock, curve

BATCH = 180  # images at a time in the tables: few of them are left for the last stages

State = tuple[Tensor, Tensor]  # the image, and features [B, C, H, W] of the network before


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def images(quick: bool, size: int) -> Split:
    """The digits; few of them if quick."""
    return common.images(quick, size, 1)[0]


def exit_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every exit's cross-entropy, and earlier exits learn from the last."""
    logits = model(x)
    return multi_exit(logits, y) + 0.5 * exit_distillation(logits)


class LastExit(nn.Module):
    """The same network without exits: all stages and the last head."""

    def __init__(self, model: EarlyExit) -> None:
        super().__init__()
        self.layers = nn.Sequential(*model.stages, model.heads[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def move(model: nn.Module, threshold: float) -> None:
    model.threshold = threshold


def result(
    name: str,
    dense: nn.Module,
    model: EarlyExit | Cascade,
    thresholds: Sequence[float],
    data: Split,
    quick: bool,
    *,
    move: Move = move,
    note: str = "",
) -> Result:
    """The curve over thresholds; prints how each exit does at the middle one."""
    model.set_costs(dc.measure.exit_costs(model, data.valid[0]))
    points = curve(dense, model, move, thresholds, data.test, batch=BATCH, **clock(quick))
    move(model, thresholds[len(thresholds) // 2])
    print(dc.measure.exits(model, *data.test))
    return Result(name, *points, note=note)
