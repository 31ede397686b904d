"""What the reference ops share: the dtype of sums, and the checks of a plan."""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """`t` in the dtype that products and sums are made in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def is_live(rows: Tensor, offsets: Tensor) -> Tensor:
    """bool [A]: which slots are not padding."""
    return torch.arange(rows.shape[0], device=rows.device) < offsets[-1]


def check_on(device: torch.device) -> bool:
    """Whether index checks run: always on a CPU; elsewhere they wait for the device, so only under DYNCORE_CHECK=1."""
    return device.type == "cpu" or os.environ.get("DYNCORE_CHECK") == "1"


def check_plan(rows: Tensor, offsets: Tensor, num_rows: int) -> None:
    """Raise unless offsets rise from 0 to at most A and every live row lies in [0, num_rows)."""
    if not check_on(rows.device):
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or any(b < a for a, b in itertools.pairwise(bounds)) or bounds[-1] > rows.shape[0]:
        raise ValueError(
            f"plan.offsets: expected non-decreasing offsets from 0 to at most {rows.shape[0]} slots, got {bounds}"
        )
    live = rows[: bounds[-1]]
    if live.numel() and (int(live.min()) < 0 or int(live.max()) >= num_rows):
        raise IndexError(
            f"plan.rows: expected rows in [0, {num_rows}), got values from {int(live.min())} to {int(live.max())}"
        )


def groups_of(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(group, first slot, end) of every group that has slots."""
    bounds = offsets.tolist()
    return [(g, s, e) for g, (s, e) in enumerate(itertools.pairwise(bounds)) if e > s]


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t.to(like.dtype)
