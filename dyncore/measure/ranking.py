"""ranking: which examples cost most, and whether methods agree on it.

Dynamic networks spend more on some examples than on others. Whether that is a property of the example or an accident
of the method (or of its seed) shows in how alike the rankings are. Needs scipy; plots need matplotlib.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dyncore.measure.records import new_results, write_results

SCHEMA = "dyncore.ranking/1"
_INSTALL = 'pip install "dyncore[bench]"'


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"measure.ranking needs {name.partition('.')[0]}: {_INSTALL}") from error


def _ranks(values: Tensor) -> Tensor:
    """1 for the least compute; equal values have the mean of their ranks."""
    return torch.from_numpy(_library("scipy.stats").rankdata(values.numpy(), axis=-1))


def _centred(ranks: Tensor) -> Tensor:
    """Of unit length around their mean: products are correlations. NaN where all ranks are equal."""
    away = ranks - ranks.mean(-1, keepdim=True)
    length = away.square().sum(-1, keepdim=True).sqrt()
    return torch.where(length > 0, away / length, torch.nan)


def _tau(a: Tensor, b: Tensor) -> float:
    return float(_library("scipy.stats").kendalltau(a.numpy(), b.numpy(), variant="b").statistic)


def _rho(a: Tensor, b: Tensor) -> float:
    return float(_centred(_ranks(a)) @ _centred(_ranks(b)))


def _in_top(values: Tensor, count: int) -> Tensor:
    """How likely each example is among the `count` of most compute, equal ones being drawn at random."""
    least = values.sort(descending=True).values[count - 1]
    above, equal = values > least, values == least
    return above.double() + equal.double() * (count - int(above.sum())) / int(equal.sum())


def _overlap(a: Tensor, b: Tensor, count: int) -> float:
    return float(_in_top(a, count) @ _in_top(b, count)) / count


def _between(a: Tensor, b: Tensor, same: bool, statistic: Callable[[Tensor, Tensor], float]) -> float:
    """Mean over pairs of seeds of a [R, N] and b, of two different ones within one method; NaN where there are none."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not same or i < j]
    return sum(statistic(a[i], b[j]) for i, j in pairs) / len(pairs) if pairs else math.nan


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """How alike methods rank examples by compute. print() makes a table of it.

    Off the diagonal of a matrix stands the agreement of two methods, the mean over their seeds; on it that of a
    method's own seeds, which is the noise ceiling: other methods can hardly agree better with it than it does with
    itself. NaN where there is one seed, or where a method spends the same on all.

    Attributes:
        methods: names, M of them.
        seeds: how many rankings each brought.
        examples: N.
        q: the share of examples that overlap looks at.
        tau: float64 [M, M], Kendall's tau-b: (concordant - discordant pairs) / pairs, corrected for ties.
        rho: float64 [M, M], Spearman's rank correlation.
        overlap: float64 [M, M], share of the q most expensive examples of one method that are among those of the other;
            ties at the cut are counted as drawn at random. q itself is chance.
        p_value: float64 [M, M], of a permutation test on the correlation of mean ranks, two-sided; NaN on the diagonal.
        mean_ranks: float64 [M, N], each example's rank from 0 (least compute) to 1, mean over seeds.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    examples: int
    q: float
    tau: Tensor
    rho: Tensor
    overlap: Tensor
    p_value: Tensor
    mean_ranks: Tensor

    @property
    def corrected(self) -> Tensor:
        """float64 [M, M]: tau over the geometric mean of both noise ceilings: 1 where two methods agree as well as
        their own seeds allow. NaN without seeds, and where a ceiling is not above 0."""
        ceiling = self.tau.diagonal().clone()
        ceiling[ceiling <= 0] = math.nan
        return self.tau / (ceiling[:, None] * ceiling[None, :]).sqrt()

    def record(self) -> dict[str, Any]:
        """A document of schema dyncore.ranking/1; matrices as lists, None for NaN."""
        results = new_results("measure.ranking")
        matrices = {name: getattr(self, name) for name in ("tau", "rho", "overlap", "p_value", "corrected")}
        return {
            "schema": SCHEMA,
            "created": results["created"],
            "environment": results["environment"],
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "examples": self.examples,
            "q": self.q,
            **{name: [[_number(v) for v in row] for row in m.tolist()] for name, m in matrices.items()},
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `record()` as JSON."""
        write_results(path, self.record())

    def plot(self, path: str | os.PathLike[str], *, dark: bool = False) -> None:
        """Write a picture (PNG, or what the name says): a heat map of tau, the noise ceiling on its diagonal."""
        _library("matplotlib")
        plots = importlib.import_module("dyncore.measure.ranking_plots")
        figure = plots.heat_map(self.methods, self.tau, "-dark" if dark else "")
        figure.savefig(path, facecolor=figure.get_facecolor())

    def plot_ranks(self, path: str | os.PathLike[str], first: str, second: str, *, dark: bool = False) -> None:
        """Write a picture: every example at its mean ranks by two methods. ValueError on a name that is not there."""
        for name, method in (("first", first), ("second", second)):
            if method not in self.methods:
                raise ValueError(f"{name}: expected one of {', '.join(self.methods)}, got {method!r}")
        _library("matplotlib")
        plots = importlib.import_module("dyncore.measure.ranking_plots")
        a, b = self.methods.index(first), self.methods.index(second)
        title = f"tau {self.tau[a, b]:.2f}, rho {self.rho[a, b]:.2f}"
        figure = plots.rank_rank(
            (first, second), (self.mean_ranks[a], self.mean_ranks[b]), title, "-dark" if dark else ""
        )
        figure.savefig(path, facecolor=figure.get_facecolor())

    def __str__(self) -> str:
        head = ["", "", "tau-b", "of ceiling", "rho", f"overlap@{self.q:g}", "p"]
        rows = [head]
        for a, first in enumerate(self.methods):
            for b in range(a, len(self.methods)):
                values = [self.tau, self.corrected, self.rho, self.overlap, self.p_value]
                numbers = ["-" if math.isnan(m[a, b]) else f"{m[a, b]:.2f}" for m in values[:4]]
                p = float(self.p_value[a, b])
                numbers[1] = "-" if a == b else numbers[1]
                second = "its own seeds" if a == b else self.methods[b]
                rows.append([first, second, *numbers, "-" if math.isnan(p) else f"{p:.3f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*lines, f"{self.examples} examples; overlap by chance {self.q:g}"])


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _expect_compute(compute: object) -> dict[str, Tensor]:
    """float64 [R, N] by method."""
    if not isinstance(compute, Mapping):
        raise TypeError(f"compute: expected a dict of tensors by method, got {type(compute).__name__}")
    if not compute:
        raise ValueError("compute: expected at least one method, got none")
    found: dict[str, Tensor] = {}
    examples = None
    for name, values in compute.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"compute: expected tensors, got {type(values).__name__} for {name!r}")
        if values.dim() not in (1, 2) or not values.shape[0]:
            raise ValueError(f"compute: expected shape [N] or [seeds, N], got {list(values.shape)} for {name!r}")
        rows = values.detach().double().cpu().reshape(-1, values.shape[-1])
        examples = rows.shape[1] if examples is None else examples
        if rows.shape[1] != examples or examples < 2:
            raise ValueError(f"compute: expected the same examples, at least 2, got {rows.shape[1]} for {name!r}")
        if rows.isnan().any():
            raise ValueError(f"compute: expected numbers, got NaN for {name!r}")
        found[str(name)] = rows
    return found


def ranking(compute: Mapping[str, Tensor], *, q: float = 0.1, permutations: int = 1000, seed: int = 0) -> Ranking:
    """Whether methods agree on which examples need most compute.

    Args:
        compute: by method, what it spent on each of the same N examples, [N] or [seeds, N]: FLOPs, the exit taken,
            halting steps, `last_cost` by sample; any number of which more means more.
        q: share of the most expensive examples to compare.
        permutations: of the permutation test, whose smallest p-value is 1 / (permutations + 1); 0: no test.
        seed: of the permutations.

    Returns a `Ranking`: Kendall's tau-b, Spearman's rho, overlap of the q most expensive, each between methods and, as
    noise ceiling, between seeds of one; p-values; tables and plots. Needs scipy. Raises TypeError or ValueError on
    arguments that do not fit.
    """
    rows = _expect_compute(compute)
    if not 0 < q <= 1:
        raise ValueError(f"q: expected a share in 0..1, got {q}")
    if permutations < 0:
        raise ValueError(f"permutations: expected a number >= 0, got {permutations}")
    names, values = tuple(rows), list(rows.values())
    examples = values[0].shape[1]
    count = max(1, round(q * examples))

    def matrix(statistic: Callable[[Tensor, Tensor], float]) -> Tensor:
        result = torch.empty(len(names), len(names), dtype=torch.float64)
        for a in range(len(names)):
            for b in range(a, len(names)):
                result[a, b] = result[b, a] = _between(values[a], values[b], a == b, statistic)
        return result

    tau, rho, overlap = matrix(_tau), matrix(_rho), matrix(lambda a, b: _overlap(a, b, count))
    mean_ranks = torch.stack([_ranks(v).mean(0) for v in values])
    p_value = _permutation_test(_centred(mean_ranks), permutations, seed)
    scaled = (mean_ranks - 1) / (examples - 1)
    seeds = tuple(len(v) for v in values)
    return Ranking(names, seeds, examples, q, tau, rho, overlap, p_value, scaled)


def _permutation_test(centred: Tensor, permutations: int, seed: int) -> Tensor:
    """Two-sided p-values [M, M] of the correlations of rows [M, N], against examples in random order."""
    methods, examples = centred.shape
    if not permutations:
        return torch.full((methods, methods), math.nan, dtype=torch.float64)
    found = (centred @ centred.t()).abs()
    generator = torch.Generator().manual_seed(seed)
    reached = torch.ones_like(found)
    for _ in range(permutations):
        order = torch.randperm(examples, generator=generator)
        reached += (centred @ centred[:, order].t()).abs() >= found - 1e-12
    p = torch.where(found.isnan(), math.nan, reached / (permutations + 1))
    p = torch.maximum(p, p.t())  # a permutation and its inverse tell the same: both are as good
    return p.fill_diagonal_(math.nan)
