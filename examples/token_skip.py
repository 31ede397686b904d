"""TokenSkip (D-LLM, Jiang 2024) in a vision transformer: a gate for each token and block, any number of tokens.

The trained dense network is trained on with a target for the mean cost; then the gates' threshold is moved.

    python -m examples.token_skip
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import GumbelGate, TokenSkip, collect_costs
from dyncore.nn.losses import compute_target
from examples import vit
from examples.common import Result, clock, curve, main, mover

TARGET = 0.25  # of the tokens, in the blocks that have gates
THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)

move = mover(GumbelGate, "threshold")  # from which probability on a token goes through a block


def layer(index: int, block: nn.Module) -> nn.Module:
    return TokenSkip(block, GumbelGate(vit.WIDTH)) if index else block


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, and the distance of the mean cost from its target."""
    return F.cross_entropy(model(x), y) + compute_target(collect_costs(model).values(), TARGET)


def run(quick: bool) -> Result:
    """The curve over thresholds of one trained model, beside the dense network that it started from."""
    data, dense = vit.dense(quick)
    model = vit.train_on(vit.started(dense, layer), data, loss, quick)
    points = curve(dense, model, move, THRESHOLDS, data.test, **clock(quick))
    note = "counts differ between the images of a batch, which are padded to the longest: FLOPs count the padding, too"
    return Result("TokenSkip", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
