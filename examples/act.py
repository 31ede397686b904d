"""Adaptive computation time (Graves 2016; in residual networks Figurnov 2017): an image halts when its score says so.

Trained once with the ponder cost, at any epsilon; then epsilon is moved: an image halts where its halting scores
add up to 1 - epsilon.

    python -m examples.act
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import AdaptiveDepth
from dyncore.nn.gates import pool_spatial
from examples import resnet
from examples.common import Result, clock, curve, main, train

PRICE = 0.02  # of one step
EPSILONS = (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def loss(model: resnet.ResNet, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy and the price of the steps, at an epsilon drawn anew for every batch: the state after each step is
    to be readable. (With one epsilon all images learned to halt after the same step, and fewer steps were chance.)"""
    move(model, float(torch.rand(())))
    return F.cross_entropy(model(x), y) + PRICE * model.chain.losses()["ponder"]


def move(model: resnet.ResNet, epsilon: float) -> None:
    """Set how much of the halting probability may be missing."""
    model.chain.epsilon = epsilon


def run(quick: bool) -> Result:
    """The curve over epsilon of one trained model, beside the dense network trained alike."""
    data, epochs = resnet.images(quick)
    dense = train(resnet.dense(), data.train, epochs=epochs, batch=resnet.BATCH)
    steps = [resnet.Residual() for _ in range(resnet.DEPTH)]
    depth = AdaptiveDepth(steps, [halt() for _ in steps[1:]], pool=pool_spatial)
    model = train(resnet.ResNet(depth), data.train, epochs=epochs, batch=resnet.BATCH, loss=loss)
    note = "the first block is always computed; images that never halt pay for the scores and the mean of the states"
    points = curve(dense, model, move, EPSILONS, data.test, **clock(quick))
    return Result("Adaptive computation time", *points, note=note)


def halt() -> nn.Linear:
    """A score for each step, that begins by halting late."""
    score = nn.Linear(resnet.WIDTH, 1)
    nn.init.constant_(score.bias, -2.0)
    return score


if __name__ == "__main__":
    main(run, __doc__)
