"""What the dynamic layers of dyncore.nn save: each mechanism beside its dense network, over the share that is executed.

`python -m benchmarks.layers` measures every mechanism; a file here is a family of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

GOLDEN = 0.6180339887498949


class Forced(nn.Module):
    """Decides for rows without looking at them: of the rows it has seen so far, a share `keep` is live.

    Row i, counted over all calls, is live where the fractional part of i times the golden ratio is below `keep`: evenly
    spread, and right on average for calls with a single row, too.
    """

    def __init__(self, keep: float, dims: int = 1) -> None:
        super().__init__()
        self.keep = keep
        self.dims = dims
        self.restart()

    def restart(self) -> None:
        """Decide from now on as after construction."""
        self._seen = 0

    def draw(self, shape: torch.Size) -> Tensor:
        """float [shape] in 0..1, evenly spread."""
        rows = torch.arange(self._seen, self._seen + shape.numel(), dtype=torch.float64)
        self._seen += shape.numel()
        return (rows * GOLDEN).frac().float().view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Mask over the first `dims` dimensions of x."""
        return self.draw(x.shape[: self.dims]) < self.keep


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """A dynamic network and the dense one that it is to save from.

    Attributes:
        name: of the layer, such as "EarlyExit".
        dense: makes the dense network.
        at: makes the dynamic network that executes a share `keep` of what may be skipped, deciding included; what is
            forced comes from `Forced` modules in it, or subclasses, so that a call can be repeated.
        inputs: makes fresh arguments for both: of a batch of realistic size, or of batch 1 if asked for.
        saves: False where a mechanism cannot (it is reported and not judged).
        keeps: shares to measure, from 1 down.
    """

    name: str
    dense: Callable[[], nn.Module]
    at: Callable[[float], nn.Module]
    inputs: Callable[[bool], tuple[Tensor, ...]]
    saves: bool = True
    keeps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
