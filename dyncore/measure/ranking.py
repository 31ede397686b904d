"""ranking: which examples cost most, and whether methods agree on it.

Dynamic networks spend more on some examples than on others. Whether that is a property of the example or an accident
of the method (or of its seed) shows in how alike the rankings are. Needs scipy; plots need matplotlib.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyncore.measure import ranking_statistics as statistics
from dyncore.measure.records import new_results, write_results

SCHEMA = "dyncore.ranking/1"
_LEGEND = (
    "of ceiling: tau-b over that of each method's own seeds; overlap: of the most expensive examples; tail: a tau that "
    "weighs these most; p: by permutation"
)
_MATRICES = ("tau", "rho", "overlap", "tail", "p_value", "corrected")
_RECORDED = 2000  # examples whose ranks a document holds: of more every second, every third, ...
_PICTURES = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """How alike methods rank examples by compute. print() makes a table of it.

    Off the diagonal of a matrix stands the agreement of two methods, the mean over their seeds; on it that of a
    method's own seeds, which is the noise ceiling: other methods can hardly agree better with it than it does with
    itself. NaN where there is one seed, or where a method spends the same on all.

    Attributes:
        methods: names, M of them; the last ones may be references.
        references: names of those that are no methods, but what methods are compared with.
        seeds: how many rankings each brought.
        distinct: of each method, how many different values of compute a seed has, the fewest over seeds. A ranking
            with few is mostly ties.
        examples: N.
        q: the share of examples that overlap looks at.
        tau: float64 [M, M], Kendall's tau-b: (concordant - discordant pairs) / pairs, corrected for ties.
        rho: float64 [M, M], Spearman's rank correlation.
        overlap: float64 [M, M], share of the q most expensive examples of one method that are among those of the other;
            ties at the cut are counted as drawn at random. q itself is chance.
        tail: float64 [M, M], Kendall's tau with more weight on the most expensive examples: an example of rank r, from
            0 for the most expensive, weighs 1 / (1 + r) (Vigna 2015).
        p_value: float64 [M, M], of a permutation test on rho, two-sided; NaN on the diagonal.
        intervals: by "tau", "rho", "overlap" and "corrected" float64 [2, M, M]: limits of 95% of a bootstrap over the
            examples, the seeds being held. Empty without a bootstrap.
        mean_ranks: float64 [M, N], each example's rank from 0 (least compute) to 1, mean over seeds.
    """

    methods: tuple[str, ...]
    references: tuple[str, ...]
    seeds: tuple[int, ...]
    distinct: tuple[int, ...]
    examples: int
    q: float
    tau: Tensor
    rho: Tensor
    overlap: Tensor
    tail: Tensor
    p_value: Tensor
    intervals: dict[str, Tensor]
    mean_ranks: Tensor

    @property
    def corrected(self) -> Tensor:
        """float64 [M, M]: tau over the geometric mean of both noise ceilings: 1 where two methods agree as well as
        their own seeds allow. NaN without seeds, and for a method that is not `repeatable`."""
        return statistics.corrected(self.tau, self.repeatable)

    @property
    def repeatable(self) -> Tensor:
        """bool [M]: whether a method's own seeds agree, so that it has a ranking which is not that of a seed: its noise
        ceiling is above 0, by the interval where there is one."""
        limits = self.intervals.get("tau")
        return (self.tau if limits is None else limits[0]).diagonal() > 0

    def given(self, reference: str) -> Tensor:
        """float64 [M, M]: Spearman's correlation of mean ranks that is left when that with a method or reference is
        held (partial correlation): about 0 where it explains all that two methods agree on. NaN in its own row."""
        number = self._index("reference", reference)
        unit = statistics.centred(self.mean_ranks)
        return statistics.partial(unit @ unit.t(), number)

    def disputed(self, count: int = 8) -> Tensor:
        """int64 [count]: the examples whose mean ranks by the methods (not the references) lie farthest apart, the most
        disputed first; all where there are fewer. Raises ValueError where `count` < 1."""
        if count < 1:
            raise ValueError(f"count: expected a number >= 1, got {count}")
        of = self.mean_ranks[: len(self.methods) - len(self.references)]
        return (of.amax(0) - of.amin(0)).argsort(descending=True, stable=True)[:count]

    def record(self, images: Tensor | None = None, labels: Sequence[object] | None = None) -> dict[str, Any]:
        """A document of schema dyncore.ranking/1; matrices as lists, None for NaN.

        Args:
            images: [N, H, W], [N, 1, H, W] or [N, 3, H, W] in 0..1: the document then has, as `pictures`, those of the
                most disputed examples as PNG in base64, with their ranks by each method.
            labels: N names of the examples, for the pictures.

        Raises ValueError where these do not fit. Pictures need matplotlib.
        """
        results = new_results("measure.ranking")
        step = -(-self.examples // _RECORDED)
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "created": results["created"],
            "environment": results["environment"],
            "methods": list(self.methods),
            "references": list(self.references),
            "seeds": list(self.seeds),
            "distinct": list(self.distinct),
            "examples": self.examples,
            "q": self.q,
            **{name: _numbers(getattr(self, name)) for name in _MATRICES},
            "intervals": {name: _numbers(limits) for name, limits in self.intervals.items()},
            "repeatable": self.repeatable.tolist(),
            "mean_ranks": [[round(v, 4) for v in row] for row in self.mean_ranks[:, ::step].tolist()],
        }
        if images is not None:
            count = len(self.methods) - len(self.references)
            document["pictures"] = [
                {
                    "example": index,
                    "label": label,
                    "png": _plots().png(image),
                    "ranks": dict(zip(self.methods[:count], self.mean_ranks[:count, index].tolist(), strict=True)),
                }
                for index, image, label in self._shown(images, labels, _PICTURES)
            ]
        return document

    def to_json(
        self, path: str | os.PathLike[str], images: Tensor | None = None, labels: Sequence[object] | None = None
    ) -> None:
        """Write `record(images, labels)` as JSON."""
        write_results(path, self.record(images, labels))

    def plot(self, path: str | os.PathLike[str], *, dark: bool = False) -> None:
        """Write a picture (PNG, or what the name says): a heat map of tau, the noise ceiling on its diagonal."""
        drawn = len(self.methods) - len(self.references)
        _save(_plots().heat_map(self.methods, self.tau, drawn, _theme(dark)), path)

    def plot_ranks(
        self,
        path: str | os.PathLike[str],
        first: str | None = None,
        second: str | None = None,
        *,
        dark: bool = False,
    ) -> None:
        """Write a picture: every example at its mean ranks by two methods, or a panel for every pair of methods
        (references not among them) where no names are given. ValueError on a name that is not there, or on one alone.
        """
        if first is None and second is None:
            count = len(self.methods) - len(self.references)
            pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
            if not pairs:
                raise ValueError(f"first: expected two methods to draw, got {count} in the ranking")
        else:
            pairs = [(self._index("first", first), self._index("second", second))]
        panels = [
            (
                (self.methods[a], self.methods[b]),
                (self.mean_ranks[a], self.mean_ranks[b]),
                f"tau {self.tau[a, b]:.2f}, rho {self.rho[a, b]:.2f}",
            )
            for a, b in pairs
        ]
        _save(_plots().rank_rank(panels, _theme(dark)), path)

    def plot_disputed(
        self,
        path: str | os.PathLike[str],
        images: Tensor,
        labels: Sequence[object] | None = None,
        *,
        count: int = 8,
        dark: bool = False,
    ) -> None:
        """Write a picture: the most disputed examples, each above a bar a method that says how far up it ranks it.
        `images` and `labels` as in `record`."""
        shown = self._shown(images, labels, count)
        methods = self.methods[: len(self.methods) - len(self.references)]
        panels = [
            (
                image,
                f"no. {index}" if label is None else f"{label}, no. {index}",
                self.mean_ranks[: len(methods), index],
            )
            for index, image, label in shown
        ]
        _save(_plots().disputed(methods, panels, _theme(dark)), path)

    def _index(self, argument: str, name: str | None) -> int:
        if name not in self.methods:
            raise ValueError(f"{argument}: expected one of {', '.join(self.methods)}, got {name!r}")
        return self.methods.index(name)

    def _shown(
        self, images: Tensor, labels: Sequence[object] | None, count: int
    ) -> list[tuple[int, Tensor, str | None]]:
        """(number, image [H, W] or [H, W, 3] in 0..1, label) of the most disputed examples."""
        drawable = images.dim() == 3 or (images.dim() == 4 and images.shape[1] in (1, 3))
        if not drawable or len(images) != self.examples:
            expected = f"images of the {self.examples} examples, [N, H, W], [N, 1, H, W] or [N, 3, H, W]"
            raise ValueError(f"images: expected {expected}, got shape {list(images.shape)}")
        if labels is not None and len(labels) != self.examples:
            raise ValueError(f"labels: expected {self.examples} of them, one an example, got {len(labels)}")
        found: list[tuple[int, Tensor, str | None]] = []
        for index in self.disputed(count).tolist():
            image = images[index].detach().float().cpu().clamp(0, 1)
            if image.dim() == 3:
                image = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            found.append((index, image, None if labels is None else str(labels[index])))
        return found

    def __str__(self) -> str:
        values = {"tau-b": self.tau, "of ceiling": self.corrected, "rho": self.rho, f"overlap@{self.q:g}": self.overlap}
        values["tail"] = self.tail
        limits = self.intervals.get("tau")
        rows = [["", "", *values, "p"]]
        if limits is not None:
            rows[0].insert(3, "95% of tau-b")
        methods = len(self.methods) - len(self.references)
        for a, first in enumerate(self.methods):
            for b in range(a, len(self.methods)):
                if a != b and a >= methods:
                    continue  # how two references agree is nobody's question
                numbers = [_shown_number(m[a, b]) for m in values.values()]
                numbers[1] = "-" if a == b else numbers[1]
                if limits is not None:
                    low, high = (_shown_number(limit[a, b]) for limit in limits)
                    numbers.insert(1, "-" if low == "-" else f"{low} .. {high}")
                second = "its own seeds" if a == b else self.methods[b]
                rows.append([first, second, *numbers, _shown_number(self.p_value[a, b], 3)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        few = [f"{name} {n}" for name, n in zip(self.methods, self.distinct, strict=True) if n < self.examples / 2]
        if few:
            lines.append(f"mostly ties, with so many different values: {', '.join(few)}")
        return "\n".join([*lines, f"{self.examples} examples; overlap by chance {self.q:g}", _LEGEND])


def _shown_number(value: Tensor, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{float(value):.{digits}f}"


def _theme(dark: bool) -> str:
    return "-dark" if dark else ""


def _plots() -> Any:
    statistics.library("matplotlib")
    return importlib.import_module("dyncore.measure.ranking_plots")


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    figure.savefig(path, facecolor=figure.get_facecolor())


def _numbers(values: Tensor) -> list[Any]:
    """As nested lists, None for NaN."""
    if values.dim() > 1:
        return [_numbers(v) for v in values]
    return [None if math.isnan(v) else v for v in values.tolist()]


def _expect_compute(argument: str, compute: object, examples: int | None = None) -> dict[str, Tensor]:
    """float64 [R, N] by method."""
    if not isinstance(compute, Mapping):
        raise TypeError(f"{argument}: expected a dict of tensors by method, got {type(compute).__name__}")
    found: dict[str, Tensor] = {}
    for name, values in compute.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{argument}: expected tensors, got {type(values).__name__} for {name!r}")
        if values.dim() not in (1, 2) or not values.shape[0]:
            raise ValueError(f"{argument}: expected shape [N] or [seeds, N], got {list(values.shape)} for {name!r}")
        rows = values.detach().double().cpu().reshape(-1, values.shape[-1])
        examples = rows.shape[1] if examples is None else examples
        if rows.shape[1] != examples or examples < 2:
            raise ValueError(f"{argument}: expected the same examples, at least 2, got {rows.shape[1]} for {name!r}")
        if rows.isnan().any():
            raise ValueError(f"{argument}: expected numbers, got NaN for {name!r}")
        found[str(name)] = rows
    return found


def ranking(
    compute: Mapping[str, Tensor],
    *,
    references: Mapping[str, Tensor] | None = None,
    q: float = 0.1,
    shared_seeds: bool = False,
    permutations: int = 1000,
    bootstrap: int = 200,
    seed: int = 0,
) -> Ranking:
    """Whether methods agree on which examples need most compute.

    Args:
        compute: by method, what it spent on each of the same N examples, [N] or [seeds, N]: FLOPs
            (`flops(..., per_row=True)`), the exit taken, halting steps, `last_cost` by sample; any number of which more
            means more.
        references: likewise what the methods are to be compared with, such as how unsure a dense network is.
        q: share of the most expensive examples to compare.
        shared_seeds: seed i of all methods has something in common (all were made of one dense network, say), which
            they might agree by: pairs of one seed are left out between methods, too. A method or reference of shape [N]
            has no seed.
        permutations: of the permutation test, whose smallest p-value is 1 / (permutations + 1); 0: no test.
        bootstrap: draws of the examples for the intervals; 0: none. Of more than 1000 examples each draw has 1000.
        seed: of the permutations and the bootstrap.

    Returns a `Ranking`: Kendall's tau-b, Spearman's rho, overlap of the q most expensive, agreement weighted towards
    these, each between methods and, as noise ceiling, between seeds of one; p-values and intervals; tables and plots.
    Needs scipy. Raises TypeError or ValueError on arguments that do not fit.
    """
    found = _expect_compute("compute", compute)
    if not found:
        raise ValueError("compute: expected at least one method, got none")
    examples = next(iter(found.values())).shape[1]
    others = {} if references is None else _expect_compute("references", references, examples)
    for name in others:
        if name in found:
            raise ValueError(f"references: expected other names than those of compute, got {name!r}")
    if not 0 < q <= 1:
        raise ValueError(f"q: expected a share in 0..1, got {q}")
    for argument, number in (("permutations", permutations), ("bootstrap", bootstrap)):
        if number < 0:
            raise ValueError(f"{argument}: expected a number >= 0, got {number}")
    values = [*found.values(), *others.values()]
    seeds = tuple(len(v) for v in values)
    pairs, rows = statistics.Pairs(seeds, shared=shared_seeds), torch.cat(values)
    one_way = statistics.Pairs(seeds, shared=shared_seeds, one_way=True)
    return Ranking(
        methods=(*found, *others),
        references=tuple(others),
        seeds=seeds,
        distinct=tuple(min(len(row.unique()) for row in v) for v in values),
        examples=examples,
        q=q,
        tau=pairs.mean(statistics.tau(rows)),
        rho=pairs.mean(statistics.rho(rows)),
        overlap=pairs.mean(statistics.overlap(rows, q)),
        tail=pairs.mean(statistics.tail(rows)),
        p_value=statistics.permutation_test(rows, one_way, permutations, seed),
        intervals=statistics.bootstrap(rows, pairs, q, bootstrap, seed),
        mean_ranks=torch.stack([(statistics.ranks(v).mean(0) - 1) / (examples - 1) for v in values]),
    )
