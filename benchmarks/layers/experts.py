"""Width and experts: blocks of an MLP's neurons, ordered learners, experts and leaves, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.layers import GOLDEN, Forced, Mechanism
from dyncore.nn import (
    ACM,
    MLP,
    ACMLinear,
    BlockGate,
    CountGate,
    DynamicKMoE,
    DynamicWidthMLP,
    MoE,
    NormRouter,
    SoftMoE,
    TreeMLP,
)

TOKENS, WIDTH, HIDDEN = 2048, 512, 2048
WIDE = 1024  # of the projections to Q, K and V at once
BLOCKS, LEARNERS, EXPERTS = 8, 4, 16


class Blocks(Forced):
    """Any blocks of each row, behind the gate that would choose them."""

    def __init__(self, keep: float) -> None:
        super().__init__(keep)
        self.gate = BlockGate(WIDTH, BLOCKS)

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        return self.draw(torch.Size([*x.shape[:-1], BLOCKS])) < self.keep


class Counts(Forced):
    """The first few of each row's learners, behind the gate that would count them: `keep` of them on average.

    Counts are three numbers in turn, equally often, the mean and its neighbours; two where there is no room for these.
    """

    def __init__(self, keep: float, width: int = WIDTH) -> None:
        super().__init__(keep)
        self.gate = CountGate(width, LEARNERS).eval()

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        mean = self.keep * LEARNERS
        apart = 1 if 1 <= mean <= LEARNERS - 1 else 0
        counts = (mean - apart + (2 * apart + 1) * self.draw(x.shape[:-1])).floor()
        return torch.arange(LEARNERS) < counts[..., None]


class Norms(Forced):
    """Norms of 1 for `keep` of the experts, one at least, and else 0, behind the router that would predict them."""

    def __init__(self, keep: float) -> None:
        super().__init__(keep)
        self.router = NormRouter(WIDTH, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        self.router(x)
        counts = (self.keep * EXPERTS + self.draw(x.shape[:-1])).floor().clamp(min=1)
        place = torch.arange(EXPERTS) - (torch.arange(len(x)) * GOLDEN * EXPERTS).long()[:, None]
        return (place % EXPERTS < counts[..., None]).float()


def tokens(one: bool) -> tuple[Tensor, ...]:
    return (torch.randn(1, 1 if one else TOKENS, WIDTH),)


def wide_tokens(one: bool) -> tuple[Tensor, ...]:
    return (torch.randn(1, 1 if one else TOKENS, WIDE),)


def dense() -> nn.Module:
    return MLP(WIDTH, HIDDEN)


MECHANISMS = (
    Mechanism("DynamicWidthMLP", dense, lambda keep: DynamicWidthMLP(WIDTH, HIDDEN, BLOCKS, Blocks(keep)), tokens),
    Mechanism("ACM", dense, lambda keep: ACM(WIDTH, LEARNERS, HIDDEN // LEARNERS, Counts(keep)), tokens),
    Mechanism(
        "ACMLinear",
        lambda: nn.Linear(WIDE, 3 * WIDE),
        lambda keep: ACMLinear(WIDE, 3 * WIDE, LEARNERS, Counts(keep, WIDE)),
        wide_tokens,
    ),
    Mechanism(
        "ACMLinear (narrow)",  # where its gate takes as long as a quarter of the layer
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda keep: ACMLinear(WIDTH, WIDTH, LEARNERS, Counts(keep)),
        tokens,
    ),
    Mechanism(
        "DynamicKMoE",
        dense,
        lambda keep: DynamicKMoE(WIDTH, HIDDEN // EXPERTS, EXPERTS, router=Norms(keep)),
        tokens,
        keeps=(1.0, 0.75, 0.5, 0.25, 0.1),  # one expert at least always runs
    ),
    Mechanism(
        "TreeMLP",
        dense,
        lambda keep: TreeMLP(WIDTH, 2, round(HIDDEN * keep)).eval(),  # each of its 4 leaves is so much narrower
        tokens,
        keeps=(1.0, 0.75, 0.5, 0.25, 0.1),
    ),
    Mechanism(
        "MoE",
        lambda: MLP(WIDTH, HIDDEN, activation="swiglu", bias=False),
        lambda keep: MoE(WIDTH, HIDDEN // 8, 8, round(8 * keep)),
        tokens,
        keeps=(1.0, 0.75, 0.5, 0.25, 0.125),  # top-k of 8
    ),
    Mechanism(
        "SoftMoE",
        dense,
        lambda keep: SoftMoE(WIDTH, HIDDEN, 8, TOKENS // 64),
        tokens,
        saves=False,
        keeps=(1.0,),
    ),
)
