"""Which rows a gate keeps: masks of tokens of exactly a given share, in the patterns that decide what skipping gains.

A pattern gives every unit (a token, a tile of tokens, a sample) a score, and the units of the highest scores are kept;
so patterns differ in which rows they keep, never in how many.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

ROW_PATTERNS = ("iid", "clustered", "correlated", "adversarial")

_NEIGHBOURS = 0.95  # correlation of neighbouring units' scores where rows come in clusters: runs of about ten
_SAMPLES = 0.9  # share of a score's variance that is its sample's


def row_mask(
    pattern: str, batch: int, rows: int, keep: float, *, tile: int = 1, generator: Generator | None = None
) -> Tensor:
    """bool [batch, rows]: the rows that are kept, `keep` of all of them (rounded to whole tiles, at least one).

    Args:
        pattern: "iid": each as likely as any other. "clustered": in runs, as rows of an object or a phrase are.
            "correlated": by sample, some of which keep nearly all their rows and others nearly none. "adversarial": as
            far from one another as can be, so that no tile of rows, page or cache line is free of them.
        batch, rows: B samples of S rows.
        keep: the share, 0 to 1; 0 keeps none.
        tile: consecutive rows that are kept or skipped together; `rows` of them or more: samples as a whole.
        generator: of a CPU; the same one in the same state gives the same mask.

    Raises ValueError on another pattern, on sizes below 0, a tile below 1 and a share out of range.
    """
    if pattern not in ROW_PATTERNS:
        raise ValueError(f"pattern: expected one of {', '.join(ROW_PATTERNS)}, got {pattern!r}")
    for name, value, least in (("batch", batch, 0), ("rows", rows, 0), ("tile", tile, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: expected a number from 0 to 1, got {keep}")
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    tile = min(tile, max(1, rows))
    units = -(-rows // tile)
    total = batch * units
    kept = max(1, round(keep * total)) if keep and total else 0
    mask = torch.zeros(total, dtype=torch.bool)
    if pattern == "adversarial":
        phase = float(torch.rand((), generator=generator))
        mask[((torch.arange(kept) + phase) * total / max(1, kept)).long()] = True
    else:
        mask[_scores(pattern, batch, units, generator).flatten().topk(kept).indices] = True
    return mask.view(batch, units).repeat_interleave(tile, 1)[:, :rows]


def _scores(pattern: str, batch: int, units: int, generator: Generator | None) -> Tensor:
    """[B, U]"""
    noise = torch.empty(batch, units).normal_(generator=generator)
    if pattern == "clustered":
        for i in range(1, units):
            noise[:, i].mul_(math.sqrt(1 - _NEIGHBOURS**2)).add_(noise[:, i - 1], alpha=_NEIGHBOURS)
    elif pattern == "correlated":
        sample = torch.empty(batch, 1).normal_(generator=generator)
        noise = math.sqrt(1 - _SAMPLES) * noise + math.sqrt(_SAMPLES) * sample
    return noise
