"""Mixture-of-Depths (Raposo 2024) in a vision transformer: three of four blocks take the best tokens alone.

The trained dense network is trained on, with a capacity drawn anew for every batch; then the capacity is moved.

    python -m examples.mixture_of_depths
"""

from __future__ import annotations

from torch import nn

from dyncore.nn import MixtureOfDepths
from examples import vit
from examples.common import Result, clock, curve, main, mover

CAPACITIES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.05)

move = mover(MixtureOfDepths, "capacity")


def layer(index: int, block: nn.Module) -> nn.Module:
    return MixtureOfDepths(block, 1.0, weight="hard") if index else block


def run(quick: bool) -> Result:
    """The curve over capacities of one trained model, beside the dense network that it started from."""
    data, dense = vit.dense(quick)
    model = vit.train_on(vit.started(dense, layer), data, vit.any_share(move), quick)
    points = curve(dense, model, move, CAPACITIES, data.test, **clock(quick))
    note = "threshold: the capacity; the first block is dense, and the class token competes like any other"
    return Result("Mixture-of-Depths", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
