"""The statistics of `measure.ranking`: how alike rows of compute [Q, N] rank N examples, seed by seed. Needs scipy.

Each measure gives a matrix [Q, Q] over rows, one row a seed of a method; `Pairs` makes of it one [M, M] over methods.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INSTALL = 'pip install "dyncore[bench]"'
# A bootstrap draws no more examples than these, whose signs of all pairs take 4 MB a row; of more examples it draws
# fewer than there are ("m out of n"), and its deviations are scaled to match.
MOST_DRAWN = 1000


def library(name: str) -> Any:
    """The module `name`, or an ImportError that says what installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"measure.ranking needs {name.partition('.')[0]}: {INSTALL}") from error


class Pairs:
    """Which pairs of rows count for two methods: all for different methods, of two different seeds within one.

    Args:
        seeds: rows of each method, in the order of the rows.
        shared: whether seed i of all methods has something in common: then its pairs count nowhere. A method of one
            row has no seed.
        one_way: of what is shared, only pairs of an earlier seed of the first method with a later one of the second:
            what seeds i and j share else counts twice, which a permutation of one method's examples does not repeat.
    """

    def __init__(self, seeds: Sequence[int], *, shared: bool = False, one_way: bool = False) -> None:
        owner = torch.arange(len(seeds)).repeat_interleave(torch.tensor(seeds))
        number = torch.cat([torch.arange(n) for n in seeds])
        counted = ~torch.eye(len(owner), dtype=torch.bool)
        if shared:
            several = torch.tensor(seeds)[owner] > 1
            apart = number[:, None] < number if one_way else number[:, None] != number
            counted &= apart | ~(several[:, None] & several)
        self._counted = counted
        self._member = torch.nn.functional.one_hot(owner, len(seeds)).double().t()
        self._pairs = self._summed(counted.double())

    def _summed(self, of_rows: Tensor) -> Tensor:
        return self._member @ of_rows @ self._member.t()

    def mean(self, of_rows: Tensor) -> Tensor:
        """[..., Q, Q] to the mean over pairs [..., M, M]; NaN where there is none, or one of them is NaN."""
        values = torch.where(self._counted, of_rows, 0.0)
        result = self._summed(values.nan_to_num(0.0)) / self._pairs
        return torch.where(self._summed(values.isnan().double()) > 0, math.nan, result)


def ranks(rows: Tensor) -> Tensor:
    """1 for the least compute; equal values have the mean of their ranks."""
    return torch.from_numpy(library("scipy.stats").rankdata(rows.numpy(), axis=-1))


def centred(ranks: Tensor) -> Tensor:
    """Of unit length around their mean: products are correlations. NaN where all ranks are equal."""
    away = ranks - ranks.mean(-1, keepdim=True)
    length = away.square().sum(-1, keepdim=True).sqrt()
    return torch.where(length > 0, away / length, torch.nan)


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.t()


def rho(rows: Tensor) -> Tensor:
    """Spearman's rank correlations [Q, Q]."""
    return _gram(centred(ranks(rows)))


def _by_pair(rows: Tensor, statistic: Any) -> Tensor:
    """Symmetric [Q, Q] of what scipy says of two rows; NaN with one whose values are all equal."""
    result = torch.full((len(rows), len(rows)), math.nan, dtype=torch.float64)
    varied = [i for i, row in enumerate(rows) if row.min() < row.max()]
    arrays = rows.numpy()
    for place, i in enumerate(varied):
        for j in varied[place:]:
            result[i, j] = result[j, i] = float(statistic(arrays[i], arrays[j]).statistic)
    return result


def tau(rows: Tensor) -> Tensor:
    """Kendall's tau-b [Q, Q], in N log N."""
    return _by_pair(rows, library("scipy.stats").kendalltau)


def tail(rows: Tensor) -> Tensor:
    """Kendall's tau [Q, Q] with a pair weighing 1 / (1 + rank) for each of its two, the most expensive example having
    rank 0: the additive hyperbolic weighting of Vigna (2015), the mean over both rankings; ties weigh as he says."""
    return _by_pair(rows, library("scipy.stats").weightedtau)


def _tau_of_ranks(ranks: Tensor) -> Tensor:
    """Kendall's tau-b [Q, Q] by all pairs of examples: N * N, but all rows at once."""
    places = ranks.float()  # exact, in half the bytes
    signs = (places[:, :, None] - places[:, None, :]).sign_().flatten(1)
    products = _gram(signs).double()  # integers; float32 adds them exactly up to 2**24 pairs
    untied = products.diagonal()
    return products / (untied[:, None] * untied).sqrt()


def in_top(rows: Tensor, count: int) -> Tensor:
    """How likely each example is among the `count` of most compute of its row, equal ones being drawn at random."""
    least = rows.sort(-1, descending=True).values[:, count - 1 : count]
    above, equal = rows > least, rows == least
    left = count - above.sum(-1, keepdim=True)
    return above.double() + equal.double() * left / equal.sum(-1, keepdim=True)


def overlap(rows: Tensor, q: float) -> Tensor:
    """Share [Q, Q] of the q most expensive examples of one row that are among those of another."""
    count = max(1, round(q * rows.shape[1]))
    return _gram(in_top(rows, count)) / count


def corrected(tau: Tensor, repeatable: Tensor | None = None) -> Tensor:
    """tau [..., M, M] over the geometric mean of both noise ceilings, its diagonal; NaN where one is not above 0, or is
    of a method that is not `repeatable` (bool [M])."""
    ceiling = tau.diagonal(dim1=-2, dim2=-1)
    above = ceiling > 0 if repeatable is None else (ceiling > 0) & repeatable
    ceiling = torch.where(above, ceiling, math.nan)
    return tau / (ceiling[..., :, None] * ceiling[..., None, :]).sqrt()


def permutation_test(rows: Tensor, pairs: Pairs, permutations: int, seed: int) -> Tensor:
    """Two-sided p-values [M, M] of the mean rho over pairs of seeds, against examples in random order. With seeds that
    are shared `pairs` has to be one-way."""
    unit = centred(ranks(rows))
    signed = pairs.mean(_gram(unit))
    found = signed.abs()
    if not permutations:
        return torch.full_like(found, math.nan)
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(rows.shape[1], generator=generator) for _ in range(permutations))
    by_chance = pairs.mean(torch.stack([unit @ unit[:, order].t() for order in orders])).abs()
    reached = 1 + (by_chance >= found - 1e-12).sum(0)
    p = torch.where(found.isnan(), math.nan, reached / (permutations + 1))
    # either method may be permuted, or have the earlier seeds: both are as good, and have to say the same
    p = torch.where(signed * signed.t() < 0, 1.0, torch.maximum(p, p.t()))
    return p.fill_diagonal_(math.nan)


def bootstrap(rows: Tensor, pairs: Pairs, q: float, draws: int, seed: int) -> dict[str, Tensor]:
    """Limits [2, M, M] of 95% by percentiles over examples drawn with replacement, for tau, rho, overlap and the
    corrected tau; seeds are held. Empty without draws."""
    if not draws:
        return {}
    examples = rows.shape[1]
    drawn = min(examples, MOST_DRAWN)
    generator = torch.Generator().manual_seed(seed)
    by_draw: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(draws):
        places = ranks(rows[:, torch.randint(examples, (drawn,), generator=generator)])
        by_draw.append((_tau_of_ranks(places), _gram(centred(places)), overlap(places, q)))
    found = _of_methods(pairs, *map(torch.stack, zip(*by_draw, strict=True)))
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    limits = {name: values.nanquantile(levels, dim=0) for name, values in found.items()}
    if drawn == examples:
        return limits
    centres = _of_methods(pairs, tau(rows), rho(rows), overlap(rows, q))
    narrower = math.sqrt(drawn / examples)
    return {name: centres[name] + narrower * (limit - centres[name]) for name, limit in limits.items()}


def _of_methods(pairs: Pairs, tau: Tensor, rho: Tensor, overlap: Tensor) -> dict[str, Tensor]:
    agreement = pairs.mean(tau)
    return {
        "tau": agreement,
        "corrected": corrected(agreement),
        "rho": pairs.mean(rho),
        "overlap": pairs.mean(overlap),
    }


def partial(correlations: Tensor, of: int) -> Tensor:
    """Correlations [M, M] that are left when number `of` is held: 0 where it explains all that two have in common."""
    shared = correlations[:, of]
    rest = (1 - shared.square()).clamp(min=0).sqrt()
    result = (correlations - shared[:, None] * shared) / (rest[:, None] * rest)
    result[of], result[:, of] = math.nan, math.nan
    return result
