"""The reference backend: every op in plain PyTorch, on any device and in any dtype.

This is the specification. The other backends are tested against it, and it serves wherever they have no kernel.
float16 and bfloat16 are computed in float32 and rounded once. Shapes: T rows, A slots, G groups; the plan comes as
`rows` [A], `offsets` [G+1], `scale` [A] or None, `row_offsets` [T+1], `row_slots` [A].
"""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor

from dyncore import activations


def _wide(t: Tensor) -> Tensor:
    """`t` in the dtype that products and sums are made in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _live(rows: Tensor, offsets: Tensor) -> Tensor:
    """bool [A]: which slots are not padding."""
    return torch.arange(rows.shape[0], device=rows.device) < offsets[-1]


def _check_on(device: torch.device) -> bool:
    """Whether index checks run: always on a CPU; elsewhere they wait for the device, so only under DYNCORE_CHECK=1."""
    return device.type == "cpu" or os.environ.get("DYNCORE_CHECK") == "1"


def check_plan(rows: Tensor, offsets: Tensor, num_rows: int) -> None:
    """Raise unless offsets rise from 0 to at most A and every live row lies in [0, num_rows)."""
    if not _check_on(rows.device):
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


# Plans ---------------------------------------------------------------------------------------------------------------


def plan_inverse(rows: Tensor, offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    check_plan(rows, offsets, num_rows)
    key = torch.where(_live(rows, offsets), rows, num_rows)
    key, order = torch.sort(key, stable=True)
    row_offsets = torch.searchsorted(key, torch.arange(num_rows + 1, device=rows.device, dtype=key.dtype))
    return row_offsets.int(), torch.where(key < num_rows, order, 0).int()


def plan_mask(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_groups = mask.shape if mask.dim() == 2 else (mask.shape[0], 1)
    by_group = mask.t().reshape(-1)
    if _check_on(mask.device) and int(by_group.sum()) > capacity:
        raise ValueError(f"max_slots: the mask has {int(by_group.sum())} slots, more than the capacity of {capacity}")
    position = by_group.long().cumsum(0) - 1
    kept = by_group & (position < capacity)
    row = torch.arange(num_rows, device=mask.device, dtype=torch.int32).repeat(num_groups)
    target = torch.where(kept, position, capacity)  # one place past the end takes what is not selected
    rows = row.new_zeros(capacity + 1).scatter_(0, target, torch.where(kept, row, 0))[:capacity]
    counts = kept.view(num_groups, num_rows).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return rows, offsets, *plan_inverse(rows, offsets, num_rows)


def plan_route(expert: Tensor, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, k = expert.shape
    flat = expert.reshape(-1)
    if _check_on(expert.device) and flat.numel() and int(flat.max()) >= num_groups:
        raise IndexError(f"expert: expected indices below num_groups={num_groups}, got {int(flat.max())}")
    key, order = torch.sort(torch.where(flat < 0, num_groups, flat.clamp(max=num_groups)), stable=True)
    offsets = torch.searchsorted(key, torch.arange(num_groups + 1, device=key.device, dtype=key.dtype))
    offsets = offsets.clamp(max=capacity).int()
    sources = torch.where(key < num_groups, order, 0)[:capacity].int()
    sources = torch.nn.functional.pad(sources, (0, capacity - sources.shape[0]))
    rows = sources // max(k, 1)
    return rows, offsets, *plan_inverse(rows, offsets, num_rows), sources


def plan_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seq = scores.shape
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    rows = (best + seq * torch.arange(batch, device=scores.device)[:, None]).reshape(-1).int()
    # made on the device: torch.tensor would copy from the host, and wait for it
    offsets = torch.arange(2, dtype=torch.int32, device=scores.device) * (batch * k)
    return rows, offsets, *plan_inverse(rows, offsets, batch * seq)


# Moving rows ---------------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    check_plan(rows, offsets, x.shape[0])
    if x.shape[0] == 0:
        return x.new_zeros(rows.shape[0], x.shape[1])
    live = _live(rows, offsets)
    return torch.where(live[:, None], x.index_select(0, torch.where(live, rows, 0)), 0)


def scatter_rows(
    y: Tensor,
    base: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
) -> Tensor:
    num_rows = row_offsets.shape[0] - 1
    check_plan(rows, offsets, num_rows)
    values = _wide(y)
    if scale is not None:
        values = values * scale[:, None].to(values.dtype)
    live = _live(rows, offsets)
    values = torch.where(live[:, None], values, 0)  # padding may hold anything
    total = values.new_zeros(num_rows, y.shape[1])
    if num_rows:
        total.index_add_(0, torch.where(live, rows, 0), values)
    if base is not None:
        has_slot = (row_offsets[1:] > row_offsets[:-1])[:, None]
        total = torch.where(has_slot, _wide(base) + total, _wide(base))
    return total.to(y.dtype)


def scatter_rows_backward(
    grad: Tensor,
    y: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    dslot = _wide(gather_rows(grad, rows, offsets))
    dy = dscale = y.new_empty(0)
    if needs[0]:
        dy = dslot if scale is None else dslot * scale[:, None].to(dslot.dtype)
        dy = torch.where(_live(rows, offsets)[:, None], dy, 0).to(y.dtype)
    if needs[1] and scale is not None:
        products = torch.where(_live(rows, offsets)[:, None], dslot * _wide(y), 0)
        dscale = products.sum(1).to(scale.dtype)
    return dy, dscale


# Grouped products ----------------------------------------------------------------------------------------------------


def _product(slots: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """y[a] = weight[g(a)] slots[a] + bias[g(a)]: [A, K] -> [A, N]; padding gives 0."""
    y = slots.new_zeros(slots.shape[0], weight.shape[1])
    with torch.autocast(slots.device.type, enabled=False):
        for g, s, e in groups_of(offsets):
            y[s:e] = slots[s:e] @ _wide(weight[g]).t()
            if bias is not None:
                y[s:e] += _wide(bias[g])
    return y


def _product_backward(
    dy: Tensor, slots: Tensor, weight: Tensor, offsets: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of slots, weight and bias from dy [A, N]."""
    dslots = torch.zeros_like(slots) if needs[0] else None
    dweight = slots.new_zeros(weight.shape) if needs[1] else None
    dbias = slots.new_zeros(weight.shape[:2]) if needs[2] else None
    with torch.autocast(slots.device.type, enabled=False):
        for g, s, e in groups_of(offsets):
            if dslots is not None:
                dslots[s:e] = dy[s:e] @ _wide(weight[g])
            if dweight is not None:
                dweight[g] = dy[s:e].t() @ slots[s:e]
            if dbias is not None:
                dbias[g] = dy[s:e].sum(0)
    return dslots, dweight, dbias


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t.to(like.dtype)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_plan(rows, offsets, row_offsets.shape[0] - 1)
    slots = _wide(gather_rows(x, rows, offsets) if gather else x)
    pre = _product(slots, weight, bias, offsets)
    y = activations.value(pre, activation)
    if scatter:
        y = scatter_rows(y, None, rows, offsets, scale, row_offsets, row_slots)
    saved = pre.to(x.dtype) if save and activation != "none" else x.new_empty(0)
    return y.to(x.dtype), saved


def grouped_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_plan(rows, offsets, row_offsets.shape[0] - 1)
    live = _live(rows, offsets)[:, None]
    slots = _wide(gather_rows(x, rows, offsets) if gather else x)
    dy = _wide(gather_rows(grad, rows, offsets) if scatter else torch.where(live, grad, 0))
    dscale = None
    if scatter and scale is not None:
        if needs[3]:
            y = (
                activations.value(_wide(pre), activation)
                if activation != "none"
                else _product(slots, weight, bias, offsets)
            )
            dscale = torch.where(live, dy * y, 0).sum(1)
        dy = torch.where(live, dy * scale[:, None].to(dy.dtype), 0)
    if activation != "none":
        dy = torch.where(live, dy * activations.derivative(_wide(pre), activation), 0)
    dx, dweight, dbias = _product_backward(dy, slots, weight, offsets, (needs[0], needs[1], needs[2]))
    if dx is not None and gather:
        dx = scatter_rows(dx, None, rows, offsets, None, row_offsets, row_slots)
    return (
        _or_empty(dx, x),
        _or_empty(dweight, x),
        _or_empty(dbias, x),
        _or_empty(dscale, x if scale is None else scale),
    )


def grouped_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_plan(rows, offsets, row_offsets.shape[0] - 1)
    pre = _product(_wide(gather_rows(x, rows, offsets)), w_in, b_in, offsets)
    y = _product(activations.hidden(pre, activation), w_out, b_out, offsets)
    base = None if residual is None else _wide(residual)
    out = scatter_rows(y, base, rows, offsets, scale, row_offsets, row_slots)
    return out.to(x.dtype), pre.to(x.dtype) if save else x.new_empty(0)


def pack_weight(weight: Tensor, parts: int) -> Tensor:
    """No panels: of use to the C++ kernels alone."""
    return weight.new_empty(0, dtype=torch.float32)


def grouped_mlp_packed(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    in_panels: Tensor,
    out_panels: Tensor,
    packed_isa: str,
) -> Tensor:
    plan = (rows, offsets, scale, row_offsets, row_slots)
    return grouped_mlp(x, w_in, w_out, b_in, b_out, residual, *plan, activation, False)[0]


def grouped_mlp_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    live = _live(rows, offsets)[:, None]
    pre = torch.where(live, _wide(pre), 0)
    dy = _wide(gather_rows(grad, rows, offsets))
    u = activations.hidden(pre, activation)
    dscale = None
    if scale is not None:
        if needs[5]:
            dscale = torch.where(live, dy * _product(u, w_out, b_out, offsets), 0).sum(1)
        dy = torch.where(live, dy * scale[:, None].to(dy.dtype), 0)
    need_pre = needs[0] or needs[1] or needs[3]
    du, dw_out, db_out = _product_backward(dy, u, w_out, offsets, (need_pre, needs[2], needs[4]))
    dx = dw_in = db_in = None
    if du is not None:
        dpre = activations.hidden_backward(du, pre, activation)
        slots = _wide(gather_rows(x, rows, offsets))
        dx, dw_in, db_in = _product_backward(dpre, slots, w_in, offsets, (needs[0], needs[1], needs[3]))
        if dx is not None:
            dx = scatter_rows(dx, None, rows, offsets, None, row_offsets, row_slots)
    grads = [_or_empty(g, x) for g in (dx, dw_in, dw_out, db_in, db_out)]
    return grads[0], grads[1], grads[2], grads[3], grads[4], _or_empty(dscale, x if scale is None else scale)
