"""The reference backend's ops on a plan: rows moved, grouped products and MLPs, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore import activations
from dyncore.backends.reference.common import check_plan, groups_of, is_live, or_empty, wide

# Moving rows ---------------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    check_plan(rows, offsets, x.shape[0])
    if x.shape[0] == 0:
        return x.new_zeros(rows.shape[0], x.shape[1])
    live = is_live(rows, offsets)
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
    values = wide(y)
    if scale is not None:
        values = values * scale[:, None].to(values.dtype)
    live = is_live(rows, offsets)
    values = torch.where(live[:, None], values, 0)  # padding may hold anything
    total = values.new_zeros(num_rows, y.shape[1])
    if num_rows:
        total.index_add_(0, torch.where(live, rows, 0), values)
    if base is not None:
        has_slot = (row_offsets[1:] > row_offsets[:-1])[:, None]
        total = torch.where(has_slot, wide(base) + total, wide(base))
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
    dslot = wide(gather_rows(grad, rows, offsets))
    dy = dscale = y.new_empty(0)
    if needs[0]:
        dy = dslot if scale is None else dslot * scale[:, None].to(dslot.dtype)
        dy = torch.where(is_live(rows, offsets)[:, None], dy, 0).to(y.dtype)
    if needs[1] and scale is not None:
        products = torch.where(is_live(rows, offsets)[:, None], dslot * wide(y), 0)
        dscale = products.sum(1).to(scale.dtype)
    return dy, dscale


# Grouped products ----------------------------------------------------------------------------------------------------


def _product(slots: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """y[a] = weight[g(a)] slots[a] + bias[g(a)]: [A, K] -> [A, N]; padding gives 0."""
    y = slots.new_zeros(slots.shape[0], weight.shape[1])
    with torch.autocast(slots.device.type, enabled=False):
        for g, s, e in groups_of(offsets):
            y[s:e] = slots[s:e] @ wide(weight[g]).t()
            if bias is not None:
                y[s:e] += wide(bias[g])
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
                dslots[s:e] = dy[s:e] @ wide(weight[g])
            if dweight is not None:
                dweight[g] = dy[s:e].t() @ slots[s:e]
            if dbias is not None:
                dbias[g] = dy[s:e].sum(0)
    return dslots, dweight, dbias


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
    slots = wide(gather_rows(x, rows, offsets) if gather else x)
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
    live = is_live(rows, offsets)[:, None]
    slots = wide(gather_rows(x, rows, offsets) if gather else x)
    dy = wide(gather_rows(grad, rows, offsets) if scatter else torch.where(live, grad, 0))
    dscale = None
    if scatter and scale is not None:
        if needs[3]:
            y = (
                activations.value(wide(pre), activation)
                if activation != "none"
                else _product(slots, weight, bias, offsets)
            )
            dscale = torch.where(live, dy * y, 0).sum(1)
        dy = torch.where(live, dy * scale[:, None].to(dy.dtype), 0)
    if activation != "none":
        dy = torch.where(live, dy * activations.derivative(wide(pre), activation), 0)
    dx, dweight, dbias = _product_backward(dy, slots, weight, offsets, (needs[0], needs[1], needs[2]))
    if dx is not None and gather:
        dx = scatter_rows(dx, None, rows, offsets, None, row_offsets, row_slots)
    return (
        or_empty(dx, x),
        or_empty(dweight, x),
        or_empty(dbias, x),
        or_empty(dscale, x if scale is None else scale),
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
    pre = _product(wide(gather_rows(x, rows, offsets)), w_in, b_in, offsets)
    y = _product(activations.hidden(pre, activation), w_out, b_out, offsets)
    base = None if residual is None else wide(residual)
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
    live = is_live(rows, offsets)[:, None]
    pre = torch.where(live, wide(pre), 0)
    dy = wide(gather_rows(grad, rows, offsets))
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
        slots = wide(gather_rows(x, rows, offsets))
        dx, dw_in, db_in = _product_backward(dpre, slots, w_in, offsets, (needs[0], needs[1], needs[3]))
        if dx is not None:
            dx = scatter_rows(dx, None, rows, offsets, None, row_offsets, row_slots)
    grads = [or_empty(g, x) for g in (dx, dw_in, dw_out, db_in, db_out)]
    return grads[0], grads[1], grads[2], grads[3], grads[4], or_empty(dscale, x if scale is None else scale)
