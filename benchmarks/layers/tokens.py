"""Tokens that pass a block by (MixtureOfDepths, TokenSkip), and sequences made shorter (TokenDrop, TokenMerge)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.layers import Forced, Mechanism
from dyncore.nn import MixtureOfDepths, TokenDrop, TokenMerge, TokenSkip, TransformerBlock

BATCH, LENGTH, WIDTH, HEADS = 4, 512, 512, 8
DEPTH = 2  # blocks behind what drops or merges


def block(causal: bool = True) -> TransformerBlock:
    return TransformerBlock(WIDTH, HEADS, causal=causal)


def blocks() -> nn.Sequential:
    return nn.Sequential(*(block(causal=False) for _ in range(DEPTH)))


def tokens(one: bool) -> tuple[Tensor, ...]:
    return (torch.randn(1 if one else BATCH, LENGTH, WIDTH),)


class Merged(nn.Module):
    """Blocks on a share `keep` of the tokens: a merge halves them at most, so there are as many as it takes."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.merges = nn.ModuleList()
        left, last = LENGTH, round(keep * LENGTH)
        while left > max(last, 1):
            r = min(left - max(last, 1), left // 2)
            self.merges.append(TokenMerge(r, keep_first=0))
            left -= r
        self.blocks = blocks()

    def forward(self, x: Tensor) -> Tensor:
        sizes = None
        for merge in self.merges:
            x, sizes, _ = merge.merge(x, sizes)  # type: ignore[operator]
        for part in self.blocks:
            x = part(x, sizes=sizes)
        return x


MECHANISMS = (
    Mechanism("MixtureOfDepths", block, lambda keep: MixtureOfDepths(block(), keep), tokens),
    Mechanism("TokenSkip, selected", block, lambda keep: TokenSkip(block(), Forced(keep, dims=2)), tokens),
    Mechanism("TokenSkip, all_keys", block, lambda keep: TokenSkip(block(), Forced(keep, dims=2), "all_keys"), tokens),
    Mechanism("TokenDrop", blocks, lambda keep: nn.Sequential(TokenDrop(keep, WIDTH, keep_first=0), blocks()), tokens),
    Mechanism("TokenMerge", blocks, Merged, tokens),
)
