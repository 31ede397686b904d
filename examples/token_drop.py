"""TokenDrop (DynamicViT, Rao 2021): behind each of the first three blocks of a vision transformer tokens are left out.

The trained dense network is trained on, with a share drawn anew for every batch; then the share is moved.

    python -m examples.token_drop
"""

from __future__ import annotations

from torch import nn

from dyncore.nn import LocalGlobalScore, TokenDrop
from examples import vit
from examples.common import Result, clock, curve, main, mover

KEEPS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)

move = mover(TokenDrop, "keep")


def layer(index: int, block: nn.Module) -> nn.Module:
    last = index == vit.DEPTH - 1
    return block if last else nn.Sequential(block, TokenDrop(1.0, LocalGlobalScore(vit.WIDTH)))


def run(quick: bool) -> Result:
    """The curve over shares of one trained model, beside the dense network that it started from."""
    data, dense = vit.dense(quick)
    model = vit.train_on(vit.started(dense, layer), data, vit.any_share(move), quick)
    points = curve(dense, model, move, KEEPS, data.test, **clock(quick))
    note = "threshold: the share kept at each of three places; the first block is dense"
    return Result("TokenDrop", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
