"""PolicySkip: a chain of residual blocks of a network of images, of which a policy picks some for each image."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.layers import Forced, Mechanism
from benchmarks.layers.depth import CHANNELS, Residual, images
from dyncore.nn import PolicySkip
from dyncore.nn.gates import pool_spatial

BLOCKS = 8


class Policy(Forced):
    """The logits of a linear policy, computed, then overruled: of the pairs (image, block) a share `keep` is taken."""

    def __init__(self, keep: float) -> None:
        super().__init__(keep)
        self.score = nn.Linear(CHANNELS, BLOCKS)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.score(pool_spatial(x)).clamp(0, 0)
        return self.draw(logits.shape) + logits < self.keep


MECHANISMS = (
    Mechanism(
        "PolicySkip",
        lambda: nn.Sequential(*(Residual() for _ in range(BLOCKS))),
        lambda keep: PolicySkip([Residual() for _ in range(BLOCKS)], Policy(keep), returns="output"),
        images,
    ),
)
