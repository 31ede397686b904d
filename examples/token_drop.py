"""TokenDrop (DynamicViT, Rao 2021): behind each of the first three blocks of a vision transformer tokens are left out.

Trained once, with a share drawn anew for every batch; then the share is moved.

    python -m examples.token_drop
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import LocalGlobalScore, TokenDrop
from examples.common import Result, curve, main, train
from examples.vit import DEPTH, WIDTH, Vit, block, images

KEEPS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)


def layer(index: int) -> nn.Module:
    if index == DEPTH - 1:
        return block()
    return nn.Sequential(block(), TokenDrop(1.0, LocalGlobalScore(WIDTH)))


def move(model: nn.Module, keep: float) -> None:
    """Set the share of its tokens that every TokenDrop keeps."""
    for module in model.modules():
        if isinstance(module, TokenDrop):
            module.keep = keep


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at a share between 0.05 and 1."""
    move(model, float(torch.empty(()).uniform_(0.05, 1.0)))
    return F.cross_entropy(model(x), y)


def run(quick: bool) -> Result:
    """The curve over shares of one trained model, beside the dense network trained alike."""
    data, epochs = images(quick)
    dense = train(Vit(), data.train, epochs=epochs)
    model = train(Vit(layer), data.train, epochs=epochs, loss=loss)
    points = curve(dense, model, move, KEEPS, data.test, seconds=0.2 if quick else 8.0)
    return Result(
        "TokenDrop", *points, note="threshold: the share kept at each of three places; the first block is dense"
    )


if __name__ == "__main__":
    main(run, __doc__)
