"""Which execution of a layer with zeros pays, and how much: an estimate from its density and measured break-evens.

A product that skips zeros is taken to cost density / break-even of the dense one, since the two are equal at the
break-even; with few rows at least the share of weights that some row needs, because reading them is the time there.
That share times the products that skip, plus the dense product that finds the zeros, makes the layer's time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from dyncore import break_even

FLOOR = 0.01  # no product is taken to be more than 100 times faster: its fixed costs stay
PAYS = 1.05  # from this speed-up on a verdict says "skip"
MANY_ROWS = 1024
PHASES = ("decode, 1 row", "decode, 8 rows", "forward", "training")
_ROWS = {"decode, 1 row": 1, "decode, 8 rows": 8}


@dataclasses.dataclass(frozen=True)
class Products:
    """The matrix products around I activations with zeros.

    Attributes:
        kind: "mlp": one product makes the activations, one takes them; "gated": gate and up make them; "linear": only
            the product that takes them is known to skip.
        inputs, neurons, outputs: H, I and N of [T, H] -> [T, I] -> [T, N]; inputs is 0 for "linear".
    """

    kind: str
    inputs: int
    neurons: int
    outputs: int
    dtype: torch.dtype
    device: str

    def cost(self, share: float, training: bool) -> float:
        """Time, in columns of a dense product with I on one side, where the products that may skip take `share` of it.

        Training: forward, and the gradients of activations, inputs and weights; of a lone linear layer the gradient
        of its input is dense.
        """
        h, n = self.inputs, self.outputs
        if self.kind == "linear":
            return n * (1 + 2 * share) if training else n * share
        made, skipping = h, (h if self.kind == "gated" else 0) + n  # of the forward
        if training:
            skipping += 2 * (2 * h if self.kind == "gated" else h) + 2 * n
        return made + share * skipping

    def dense_from(self, rows: int) -> float:
        """Density from which the dense product is faster, by the tables in force."""

        def weight(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device="meta")

        if self.kind == "linear":
            op, weights = "sparse_linear", [weight(self.neurons, self.outputs).t()]
        else:
            halves = 2 if self.kind == "gated" else 1
            op = "sparse_mlp"
            weights = [weight(halves * self.neurons, self.inputs), weight(self.neurons, self.outputs).t()]
        edge = break_even.dense_from(self.device, op, rows, weights)
        return 0.0 if edge is None else edge

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Estimated speed-ups over dense execution by phase (`PHASES`): of the MLP, or of the linear layer alone."""

    speedups: dict[str, float]

    def execution(self, phase: str) -> str:
        return "skip" if self.speedups[phase] >= PAYS else "dense"

    def record(self) -> dict[str, Any]:
        return {p: {"execution": self.execution(p), "speedup": s} for p, s in self.speedups.items()}

    def __str__(self) -> str:
        worth = [f"{phase} {s:.2f}x" for phase, s in self.speedups.items() if self.execution(phase) == "skip"]
        if not worth:
            return "dense: skipping pays nowhere"
        others = [phase for phase in self.speedups if self.execution(phase) == "dense"]
        return f"skip: {'; '.join(worth)}" + (f"; dense: {', '.join(others)}" if others else "")


def _share(density: float, read: float, edge: float) -> float:
    """Time of a product that may skip, over the dense one's."""
    if density >= edge:
        return 1.0
    if edge == math.inf:
        edge = 1.0
    return min(1.0, max(FLOOR, density / edge, read))


def judge(products: Products, density: float, union: Callable[[int], float]) -> Verdict:
    """`union`: the share of neurons that some of so many rows need."""
    speedups: dict[str, float] = {}
    for phase in PHASES:
        rows = _ROWS.get(phase, MANY_ROWS)
        read = union(rows) if phase in _ROWS else 0.0
        share = _share(density, read, products.dense_from(rows))
        training = phase == "training"
        speedups[phase] = products.cost(1.0, training) / products.cost(share, training)
    return Verdict(speedups)
