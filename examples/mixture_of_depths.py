"""Mixture-of-Depths (Raposo 2024) in a vision transformer: three of four blocks take the best tokens alone.

Trained once, with a capacity drawn anew for every batch; then the capacity is moved.

    python -m examples.mixture_of_depths
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import MixtureOfDepths
from examples.common import Result, curve, main, train
from examples.vit import Vit, block, images

CAPACITIES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.05)


def layer(index: int) -> nn.Module:
    return MixtureOfDepths(block(), 1.0, weight="hard") if index else block()


def move(model: nn.Module, capacity: float) -> None:
    """Set the share of the tokens that every block after the first computes."""
    for module in model.modules():
        if isinstance(module, MixtureOfDepths):
            module.capacity = capacity


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at a capacity between 0.05 and 1."""
    move(model, float(torch.empty(()).uniform_(0.05, 1.0)))
    return F.cross_entropy(model(x), y)


def run(quick: bool) -> Result:
    """The curve over capacities of one trained model, beside the dense network trained alike."""
    data, epochs = images(quick)
    dense = train(Vit(), data.train, epochs=epochs)
    model = train(Vit(layer), data.train, epochs=epochs, loss=loss)
    points = curve(dense, model, move, CAPACITIES, data.test, seconds=0.2 if quick else 8.0)
    note = "threshold: the capacity; the first block is dense, and the class token competes like any other"
    return Result("Mixture-of-Depths", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
