"""TokenSkip (D-LLM, Jiang 2024) in a vision transformer: a gate for each token and block, any number of tokens.

Trained once with a target for the mean cost; then the gates' threshold is moved.

    python -m examples.token_skip
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import GumbelGate, TokenSkip, collect_costs
from dyncore.nn.losses import compute_target
from examples.common import Result, curve, main, train
from examples.vit import WIDTH, Vit, block, images

TARGET = 0.25  # of the tokens, in the blocks that have gates
THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def layer(index: int) -> nn.Module:
    return TokenSkip(block(), GumbelGate(WIDTH)) if index else block()


def move(model: nn.Module, threshold: float) -> None:
    """Set from which probability on a token goes through a block."""
    for module in model.modules():
        if isinstance(module, GumbelGate):
            module.threshold = threshold


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, and the distance of the mean cost from its target."""
    return F.cross_entropy(model(x), y) + compute_target(collect_costs(model).values(), TARGET)


def run(quick: bool) -> Result:
    """The curve over thresholds of one trained model, beside the dense network trained alike."""
    data, epochs = images(quick)
    dense = train(Vit(), data.train, epochs=epochs)
    model = train(Vit(layer), data.train, epochs=epochs, loss=loss)
    points = curve(dense, model, move, THRESHOLDS, data.test, seconds=0.2 if quick else 8.0)
    note = "counts differ between the images of a batch, which are padded to the longest: FLOPs count the padding, too"
    return Result("TokenSkip", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
