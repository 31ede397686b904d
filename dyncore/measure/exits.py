"""exits: how each exit of a network does on the samples that come to it, and on those that leave there.

Early exits keep the easy samples, so a later one meets a harder mix than it was trained on: its accuracy on what
reaches it lies below that on everything, and its confidence may promise more than it holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from dyncore.execution import execution
from dyncore.measure.flops import flops
from dyncore.nn import exits as criteria
from dyncore.nn.early_exit import ExitLayer

BINS = 15


@dataclasses.dataclass(frozen=True)
class On:
    """An exit on some of the samples.

    Attributes:
        samples: how many they are. With none the rest is NaN.
        accuracy: share that the exit gets right.
        confidence: mean of its largest probability.
        calibration_error: expected calibration error (Guo 2017), 15 bins of equal width: the mean distance of
            confidence and accuracy; 0 where confidence means what it says.
    """

    samples: int
    accuracy: float
    confidence: float
    calibration_error: float


@dataclasses.dataclass(frozen=True)
class ExitStatistics:
    """One exit: its number, what it costs to get there (a share of everything), and how it does on `everything`, on
    the samples that `reached` it, and on those that `left` there."""

    exit: int
    cost: float
    everything: On
    reached: On
    left: On


@dataclasses.dataclass(frozen=True, repr=False)
class Exits:
    """What `measure.exits` found; its repr is a table.

    Attributes:
        exits: the statistics of each.
        accuracy: of the answers given, each from its sample's exit.
        cost: mean cost of a sample, as a share of running everything.
        agreement: share of samples whose answer is the last exit's.
        rescued: share that their exit gets right and the last exit wrong ("overthinking"); lost: the reverse.
    """

    exits: tuple[ExitStatistics, ...]
    accuracy: float
    cost: float
    agreement: float
    rescued: float
    lost: float

    def __repr__(self) -> str:
        lines = [
            f"{self.exits[0].everything.samples} samples: accuracy {self.accuracy:.1%} at {self.cost:.1%} of the cost, "
            f"{self.exits[-1].everything.accuracy:.1%} at all of it",
            f"{self.agreement:.1%} answered as by the last exit, {self.rescued:.1%} right where that is wrong, "
            f"{self.lost:.1%} wrong where that is right",
            f"{'':>4}{'':>7}{'samples':>18}{'accuracy on':>24}{'calibration error on':>27}",
            f"{'exit':>4}{'cost':>7}{'reach':>9}{'leave':>9}" + f"{'all':>10}{'reach':>7}{'leave':>7}" * 2,
        ]
        for e in self.exits:
            parts = (e.everything, e.reached, e.left)
            accuracy, error = ([getattr(p, name) for p in parts] for name in ("accuracy", "calibration_error"))
            lines.append(
                f"{e.exit:>4}{e.cost:>7.0%}{e.reached.samples:>9}{e.left.samples:>9}"
                f"{_share(accuracy[0], 10)}{_share(accuracy[1], 7)}{_share(accuracy[2], 7)}"
                f"{_share(error[0], 10)}{_share(error[1], 7)}{_share(error[2], 7)}"
            )
        return "\n".join(lines)


def _share(value: float, width: int) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.1%}':>{width}}"


@torch.no_grad()
def exits(model: ExitLayer, x: object, y: Tensor, *, batch: int = 256) -> Exits:
    """How each exit of a network does on the samples that reach it, and on those that leave there.

    Args:
        model: an `nn.EarlyExit`, an `nn.Cascade` or a model with exits by `convert.add_early_exits`. It runs in
            evaluation, all its exits on all samples, and is left as it was.
        x: samples: a tensor [N, ...], or what the model takes as a tuple of arguments or a mapping of keyword
            arguments, whose tensors are [N, ...].
        y: classes, int [N].
        batch: samples of one forward.

    Raises TypeError on another model or a y of no integers, IndexError on a class that the model does not have,
    ValueError where x and y do not fit, or where there are no samples.
    """
    if not isinstance(model, ExitLayer):
        raise TypeError(f"model: expected an EarlyExit, a Cascade or another ExitLayer, got {type(model).__name__}")
    if not isinstance(y, Tensor) or y.dim() != 1 or not len(y):
        raise ValueError(f"y: expected classes [N] of at least one sample, got {_shown(y)}")
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise TypeError(f"y: expected classes as integers, got {y.dtype}")
    x = _plain(x)
    for t in pytree.tree_leaves(x):
        if isinstance(t, Tensor) and (t.dim() == 0 or len(t) != len(y)):
            raise ValueError(f"x: expected tensors of {len(y)} samples, as many as in y, got shape {list(t.shape)}")
    logits = _every_exit(model, x, len(y), batch)
    classes, (low, high) = logits[-1].shape[1], (int(y.min()), int(y.max()))
    if low < 0 or high >= classes:
        raise IndexError(f"y: expected classes in 0..{classes - 1}, got {low}..{high}")
    taken = criteria.simulate(logits, model.criterion, model.costs)
    right = torch.stack([z.argmax(1) == y for z in logits])
    total = sum(model.costs)
    found = []
    for k, z in enumerate(logits):
        sure = torch.softmax(z.float(), 1).amax(1)
        parts = (torch.ones_like(taken.exit, dtype=torch.bool), taken.exit >= k, taken.exit == k)
        found.append(ExitStatistics(k, sum(model.costs[: k + 1]) / total, *(_on(sure[m], right[k][m]) for m in parts)))
    own = right[taken.exit, torch.arange(len(y), device=y.device)]
    same = taken.logits.argmax(1) == logits[-1].argmax(1)
    return Exits(
        tuple(found),
        accuracy=_mean(own),
        cost=_mean(taken.cost) / total,
        agreement=_mean(same),
        rescued=_mean(own & ~right[-1]),
        lost=_mean(~own & right[-1]),
    )


@torch.no_grad()
def exit_costs(model: ExitLayer, x: object) -> list[float]:
    """FLOPs that each stage of a network adds for one sample, with its exit: for `model.set_costs`.

    Args:
        model: as for `exits`. It is run on the first sample, once for each exit, in evaluation.
        x: samples, as for `exits`.
    """
    if not isinstance(model, ExitLayer):
        raise TypeError(f"model: expected an EarlyExit, a Cascade or another ExitLayer, got {type(model).__name__}")
    one = pytree.tree_map_only(Tensor, lambda t: t[:1], _plain(x))
    kept, reached = model.criterion, [0.0]
    with _in_evaluation(model), execution("sparse"):
        try:
            for k in range(model.num_exits):
                ends = [math.inf] * k + [-math.inf] * (model.num_exits - 1 - k)
                model.criterion = criteria.MaxProbability(ends or 0.0)  # a network of one exit asks none
                reached.append(float(flops(lambda: _call(model, one))))
        finally:
            model.criterion = kept
    return [b - a for a, b in itertools.pairwise(reached)]


@contextmanager
def _in_evaluation(model: torch.nn.Module) -> Generator[None, None, None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _plain(x: Any) -> Any:
    """A mapping as a dict, which pytrees know, such as a tokenizer's output is not."""
    return dict(cast("Mapping[str, Any]", x)) if isinstance(x, Mapping) else x


def _call(function: Callable[..., Any], x: Any) -> Any:
    if isinstance(x, tuple):
        return function(*x)
    return function(**x) if isinstance(x, dict) else function(x)


def _every_exit(model: ExitLayer, x: object, samples: int, batch: int) -> Sequence[Tensor]:
    parts: list[list[Tensor]] = []
    with _in_evaluation(model):
        for start in range(0, samples, batch):
            part = pytree.tree_map_only(Tensor, lambda t, s=start: t[s : s + batch], x)
            parts.append(_call(model.every_exit, part))
    return [torch.cat(z) for z in zip(*parts, strict=True)]


def _on(sure: Tensor, right: Tensor) -> On:
    samples = len(sure)
    if not samples:
        return On(0, math.nan, math.nan, math.nan)
    bins = (sure * BINS).long().clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=sure.device)
    gaps.index_add_(0, bins, sure.double() - right.double())
    return On(samples, _mean(right), _mean(sure), float(gaps.abs().sum()) / samples)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _shown(y: object) -> str:
    return f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
