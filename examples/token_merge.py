"""TokenMerge (ToMe, Bolya 2023): a trained vision transformer, not trained for it, merges tokens behind its blocks.

python -m examples.token_merge
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from dyncore.nn import TokenMerge
from examples import vit
from examples.common import Result, clock, curve, main, mover

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


move = mover(TokenMerge, "r")


class Merging(nn.Module):
    """The blocks of a trained Vit with a merge behind each but the last."""

    def __init__(self, trained: vit.Vit) -> None:
        super().__init__()
        self.vit = copy.deepcopy(trained)
        self.merges = nn.ModuleList(TokenMerge(0.0) for _ in range(vit.DEPTH - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10]."""
        x, sizes = self.vit.tokens(images), None
        for i, layer in enumerate(self.vit.blocks):
            x = layer(x, sizes=sizes)
            if i < vit.DEPTH - 1:
                x, sizes, _ = self.merges[i].merge(x, sizes)  # type: ignore[operator]
        return self.vit.read(x, sizes)


def run(quick: bool) -> Result:
    """The curve over shares: the dense network and the same one with merges."""
    data, dense = vit.dense(quick)
    points = curve(dense, Merging(dense).eval(), move, SHARES, data.test, **clock(quick))
    note = "threshold: the share merged at each of three places, no training for it; the first block is dense"
    return Result("TokenMerge", *points, note=note)


if __name__ == "__main__":
    main(run, __doc__)
