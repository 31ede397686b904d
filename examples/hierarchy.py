"""Conditional sub-tasks: which group of digits it is comes first, then one classifier for that group alone.

Trained once, each image by the classifier of its own group; then the threshold is moved: at 0 every classifier runs, at
1 that of the most likely group, above 1 none, and the digits of a group share its probability.

    python -m examples.hierarchy
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import Hierarchy
from examples import resnet
from examples.common import Result, clock, curve, main, train

GROUPS = ((0, 6, 8, 9), (1, 4, 7), (2, 3, 5))  # with loops, of straight strokes, and the others
BLOCKS = 2  # of each classifier
THRESHOLDS = (0.0, 1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0)


def classifier(blocks: int, classes: int) -> nn.Module:
    return resnet.Classifier(nn.Sequential(*(resnet.Residual() for _ in range(blocks))), classes)


def network() -> nn.Sequential:
    """A convolution, and the hierarchy on its features."""
    fine = [classifier(BLOCKS, len(group)) for group in GROUPS]
    return nn.Sequential(resnet.stem(), Hierarchy(classifier(1, len(GROUPS)), fine, GROUPS))


def loss(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """That of the group and, within it, of the digit."""
    hierarchy = model[1]
    return F.nll_loss(hierarchy(model[0](x), hierarchy.group_of[y]), y)


def move(model: nn.Sequential, threshold: float) -> None:
    """Set which groups are likely enough."""
    model[1].threshold = threshold


def run(quick: bool) -> Result:
    """The curve over thresholds of one trained model, beside itself with every classifier."""
    data, epochs = resnet.images(quick)
    model = train(network(), data.train, epochs=epochs, batch=resnet.BATCH, loss=loss)
    dense = copy.deepcopy(model)
    move(dense, 0.0)
    note = "dense is the same network with every classifier on every image; above 1 only the group is known"
    points = curve(dense, model, move, THRESHOLDS, data.test, **clock(quick))
    return Result("Hierarchy", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
