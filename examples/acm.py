"""Adaptive computation modules (Wojcik 2023): a trained network's MLPs as four ordered learners each, of which every
token takes as many as its gate says.

Trained densely; `convert.acmize` cuts each MLP into learners, the most important neurons first; then all of it is
trained on with a target for the learners taken. Then the gates' threshold is moved.

    python -m examples.acm
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

import dyncore as dc
from dyncore.nn import CountGate, collect_costs, losses
from examples.common import Result, clock, curve, main, mover, train
from examples.mixer import Mixer, images

LEARNERS, TARGET, WEIGHT = 4, 0.3, 2.0
THRESHOLDS = (-0.1, 0.05, 0.2, 0.5, 0.8, 0.99)

move = mover(CountGate, "threshold")


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, and how far the share of the learners taken is from its target."""
    logits = model(x)
    return F.cross_entropy(logits, y) + WEIGHT * losses.compute_target(collect_costs(model).values(), TARGET)


def run(quick: bool) -> Result:
    """The curve over thresholds of one converted model, beside the dense network that it was made of."""
    data, epochs = images(quick)
    model = train(Mixer(), data.train, epochs=epochs)
    dense = copy.deepcopy(model)
    dc.convert.acmize(model, LEARNERS, data=data.train[0])
    train(model, data.train, epochs=epochs, loss=loss, rate=2e-3)
    points = curve(dense, model, move, THRESHOLDS, data.test, **clock(quick))
    return Result(
        "Adaptive computation modules", *points, note="threshold: of the gates; below 0 all learners are taken"
    )


if __name__ == "__main__":
    main(run, __doc__)
