"""A-ViT (Yin 2022): the tokens of a vision transformer halt one by one, and are no longer attended to.

The trained dense network is trained on with the ponder cost, at any epsilon; then epsilon is moved: a token halts where
its halting scores add up to 1 - epsilon.

    python -m examples.a_vit
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import AdaptiveDepth, FeatureScore
from examples import vit
from examples.common import Result, clock, curve, main

PRICE = 0.02  # of one step of one token
EPSILONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy and the price of the steps, at an epsilon drawn anew for every batch."""
    move(model, float(torch.rand(())))
    return F.cross_entropy(model(x), y) + PRICE * model.blocks[0].losses()["ponder"]


def move(model: nn.Module, epsilon: float) -> None:
    """Set how much of a token's halting probability may be missing."""
    model.blocks[0].epsilon = epsilon


def run(quick: bool) -> Result:
    """The curve over epsilon of one trained model, beside the dense network that it started from."""
    data, dense = vit.dense(quick)
    model = copy.deepcopy(dense)
    model.blocks = nn.ModuleList([AdaptiveDepth(list(model.blocks), FeatureScore(0, 2.0, -2.0), tokens=True)])
    vit.train_on(model, data, loss, quick)
    note = "the first block is always computed; counts differ between the images of a batch, which are padded"
    points = curve(dense, model, move, EPSILONS, data.test, **clock(quick))
    return Result("A-ViT", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
