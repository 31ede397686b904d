"""The reference backend's plans: slots sorted by group, and the inverse map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dyncore.backends.reference.common import check_on, check_plan, is_live


def plan_inverse(rows: Tensor, offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    check_plan(rows, offsets, num_rows)
    key = torch.where(is_live(rows, offsets), rows, num_rows)
    key, order = torch.sort(key, stable=True)
    row_offsets = torch.searchsorted(key, torch.arange(num_rows + 1, device=rows.device, dtype=key.dtype))
    return row_offsets.int(), torch.where(key < num_rows, order, 0).int()


def check_capacity(mask: Tensor, capacity: int) -> None:
    """Raise unless the mask has at most `capacity` slots."""
    if check_on(mask.device) and int(mask.sum()) > capacity:
        raise ValueError(f"max_slots: the mask has {int(mask.sum())} slots, more than the capacity of {capacity}")


def check_experts(expert: Tensor, num_groups: int) -> None:
    """Raise unless every index lies below `num_groups`."""
    if check_on(expert.device) and expert.numel() and int(expert.max()) >= num_groups:
        raise IndexError(f"expert: expected indices below num_groups={num_groups}, got {int(expert.max())}")


def plan_mask(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_groups = mask.shape if mask.dim() == 2 else (mask.shape[0], 1)
    by_group = mask.t().reshape(-1)
    check_capacity(mask, capacity)
    position = by_group.long().cumsum(0) - 1
    kept = by_group & (position < capacity)
    row = torch.arange(num_rows, device=mask.device, dtype=torch.int32).repeat(num_groups)
    target = torch.where(kept, position, capacity)  # one place past the end takes what is not selected
    rows = row.new_zeros(capacity + 1).scatter_(0, target, torch.where(kept, row, 0))[:capacity]
    counts = kept.view(num_groups, num_rows).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return rows, offsets, *plan_inverse(rows, offsets, num_rows)


def plan_mask_sources(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_groups = mask.shape[1] if mask.dim() == 2 else 1
    rows, offsets, row_offsets, row_slots = plan_mask(mask, capacity)
    slots = torch.arange(capacity, device=mask.device, dtype=torch.int32)
    groups = torch.searchsorted(offsets[1:], slots, right=True)
    sources = torch.where(is_live(rows, offsets), rows * num_groups + groups, 0).int()
    return rows, offsets, row_offsets, row_slots, sources


def plan_route(expert: Tensor, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, k = expert.shape
    flat = expert.reshape(-1)
    check_experts(expert, num_groups)
    key, order = torch.sort(torch.where(flat < 0, num_groups, flat.clamp(max=num_groups)), stable=True)
    offsets = torch.searchsorted(key, torch.arange(num_groups + 1, device=key.device, dtype=key.dtype))
    offsets = offsets.clamp(max=capacity).int()
    sources = torch.where(key < num_groups, order, 0)[:capacity].int()
    sources = torch.nn.functional.pad(sources, (0, capacity - sources.shape[0]))
    rows = sources // max(k, 1)
    return rows, offsets, *plan_inverse(rows, offsets, num_rows), sources


def plan_route_topk(
    logits: Tensor, k: int, normalize: bool, make_route: Callable[..., tuple[Tensor, ...]] = plan_route
) -> tuple[Tensor, ...]:
    highest, expert = torch.sort(logits, dim=1, descending=True, stable=True)
    expert = expert[:, :k]
    weight = highest[:, :k].softmax(1) if normalize else logits.softmax(1).gather(1, expert)
    *plan, sources = make_route(expert, logits.shape[1], expert.numel())
    return *plan, sources, weight.reshape(-1).index_select(0, sources), expert.int()


def plan_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seq = scores.shape
    if not 0 <= k <= seq:  # a graph for any length could not know
        raise ValueError(f"k: expected 0..{seq}, got {k}")
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    rows = (best + seq * torch.arange(batch, device=scores.device)[:, None]).reshape(-1).int()
    # made on the device: torch.tensor would copy from the host, and wait for it
    offsets = torch.arange(2, dtype=torch.int32, device=scores.device) * (batch * k)
    return rows, offsets, *plan_inverse(rows, offsets, batch * seq)
