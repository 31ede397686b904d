"""What is known of one layer's zeros without keeping them: counts that grow with its width, never with the batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyncore.measure.sparsity_verdict import Products, Verdict, judge

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class _Mean:
    def __init__(self) -> None:
        self.sum: float = 0.0
        self.count: int = 0

    def add(self, values: Tensor) -> None:
        if values.numel():
            self.sum += float(values.double().sum())
            self.count += values.numel()

    @property
    def value(self) -> float | None:
        return self.sum / self.count if self.count else None


class _Union:
    """Mean share of neurons that fire in some row of a tile of consecutive rows, the rows of all batches in a line."""

    def __init__(self, size: int, neurons: int, device: torch.device) -> None:
        self.size, self.mean = size, _Mean()
        self._begun = torch.zeros(neurons, dtype=torch.bool, device=device)
        self._rows = 0  # of the tile begun

    def add(self, mask: Tensor) -> None:
        if self._rows:
            head, mask = mask[: self.size - self._rows], mask[self.size - self._rows :]
            self._begun |= head.any(0)
            self._rows += head.shape[0]
            if self._rows < self.size:
                return
            self.mean.add(self._begun[None].double().mean(1))
        whole = mask.shape[0] // self.size * self.size
        if whole:
            self.mean.add(mask[:whole].unflatten(0, (-1, self.size)).any(1).double().mean(1))
        self._begun = mask[whole:].any(0)
        self._rows = mask.shape[0] - whole


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of rows of a, b [P, I], shared over all active neurons; pairs without an active one are left out."""
    shared = (a & b).sum(1)
    both = (a | b).sum(1)
    return (shared / both)[both > 0]


class Accumulator:
    """Takes the mask of each call of a layer: True where its activation is not zero."""

    def __init__(self, neurons: int, tiles: Sequence[int], recorded: int, device: torch.device) -> None:
        self.rows: int = 0
        self.fired: Tensor = torch.zeros(neurons, dtype=torch.int64, device=device)
        self.tokens: Tensor = torch.zeros(neurons + 1, dtype=torch.int64, device=device)
        self.neighbours: _Mean = _Mean()
        self.strangers: _Mean = _Mean()
        self.unions: dict[int, _Union] = {size: _Union(size, neurons, device) for size in tiles}
        self.recorded: Tensor = torch.zeros(0, neurons, dtype=torch.bool)
        self._to_record = recorded
        self._generator = torch.Generator().manual_seed(0)

    def add(self, mask: Tensor, valid: Tensor) -> None:
        """mask [..., S, I]; valid bool [..., S]: the rows that count."""
        near = valid[..., 1:] & valid[..., :-1]
        self.neighbours.add(_jaccard(mask[..., 1:, :][near], mask[..., :-1, :][near]))
        mask = mask[valid]  # [R, I]
        rows, neurons = mask.shape
        self.rows += rows
        self.fired += mask.sum(0)
        self.tokens += torch.bincount(mask.sum(1), minlength=neurons + 1)
        order = torch.randperm(rows, generator=self._generator).to(mask.device)
        self.strangers.add(_jaccard(mask[order[1:]], mask[order[:-1]]))
        for union in self.unions.values():
            union.add(mask)
        missing = self._to_record - self.recorded.shape[0]
        if missing > 0:
            self.recorded: Tensor = torch.cat([self.recorded, mask[:missing].cpu()])


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """The zeros of one layer's activations, as counted over `rows` tokens of `neurons` neurons. NaN is not zero.

    Attributes:
        fired: int64 [I]: on how many tokens each neuron was not zero.
        tokens: int64 [I + 1]: how many tokens had that many active neurons.
        jaccard_neighbours, jaccard_random: mean similarity of the active sets, shared over all, of consecutive tokens
            of a sequence and of random pairs within a batch; None where there was no pair with an active neuron.
        union: by rows of a tile: mean share of neurons that fire somewhere in so many consecutive rows; None where
            there were fewer rows.
        hot_rate: a neuron is hot that fires on at least this share of tokens.
        products: the matrix products that the zeros stand between.
    """

    name: str
    rows: int
    neurons: int
    fired: Tensor
    tokens: Tensor
    jaccard_neighbours: float | None
    jaccard_random: float | None
    union: dict[int, float | None]
    hot_rate: float
    products: Products

    @property
    def density(self) -> float:
        """Share of activations that are not zero."""
        return int(self.fired.sum()) / (self.rows * self.neurons)

    @property
    def zero_fraction(self) -> float:
        """Share of zeros among all neurons on all tokens."""
        return 1 - self.density

    @property
    def rates(self) -> Tensor:
        """float64 [I]: share of tokens on which each neuron fires."""
        return self.fired.double() / self.rows

    @property
    def dead(self) -> float:
        """Share of neurons that never fired."""
        return float((self.fired == 0).double().mean())

    @property
    def hot(self) -> float:
        """Share of neurons that fire on at least `hot_rate` of the tokens."""
        return float((self.rates >= self.hot_rate).double().mean())

    @property
    def gini(self) -> float:
        """Gini coefficient of the neurons' rates: 0 where all fire equally often, near 1 where few fire alone."""
        counts = self.fired.double().sort().values
        total = float(counts.sum())
        if not total:
            return 0.0
        n = counts.numel()
        weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
        return float((weights * counts).sum()) / (n * total)

    def token_quantile(self, q: float) -> float:
        """The zero fraction that a share q of tokens does not exceed: the smallest one of which that is true."""
        if not 0 <= q <= 1:
            raise ValueError(f"q: expected a number from 0 to 1, got {q}")
        zeros = self.tokens.flip(0).cumsum(0)  # tokens with up to k zeros
        needed = max(1, math.ceil(q * self.rows))
        return int((zeros < needed).sum()) / self.neurons

    def independent_union(self, rows: int) -> float:
        """Share of neurons that some token of `rows` needs, tokens that are independent, as of a batch in decoding."""
        return float((1 - (1 - self.rates) ** rows).mean())

    @property
    def verdict(self) -> Verdict:
        """Which execution pays, by this machine's break-evens as they stand now."""
        return judge(self.products, self.density, self.independent_union)

    def record(self) -> dict[str, Any]:
        """As a plain dict; of the neurons' rates 101 quantiles, ascending."""
        grid = torch.linspace(0, 1, 101, dtype=torch.float64)
        return {
            "layer": self.name,
            "rows": self.rows,
            "neurons": self.neurons,
            "zero_fraction": self.zero_fraction,
            "zero_fraction_by_token": {str(q): self.token_quantile(q) for q in QUANTILES},
            "neuron_rate_quantiles": self.rates.quantile(grid).tolist(),
            "dead": self.dead,
            "hot": self.hot,
            "hot_rate": self.hot_rate,
            "gini": self.gini,
            "jaccard_neighbours": self.jaccard_neighbours,
            "jaccard_random": self.jaccard_random,
            "union": {str(size): share for size, share in self.union.items()},
            "products": self.products.record(),
            "verdict": self.verdict.record(),
        }
