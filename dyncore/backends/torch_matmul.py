"""Another executor of the cpu backend: torch's own matmul on gathered rows, group by group (forward only).

Taken where a measured table, or the default on CPUs with matrix units, says that it is faster (dyncore.break_even).
The contract of the kernels holds, but in 16 bits a slot's result is rounded before a row's slots are summed, and
that bits do not depend on the thread count is torch's to keep. Shapes as in dyncore.backends.reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore import activations
from dyncore.backends.reference import check_plan, groups_of


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, of one group."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


@torch.no_grad()
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
    pre = x.new_empty(rows.shape[0], weight.shape[1])
    live = 0
    with torch.autocast("cpu", enabled=False):
        for g, s, live in groups_of(offsets):
            part = x.index_select(0, rows[s:live]) if gather else x[s:live]
            _product(part, weight[g], None if bias is None else bias[g], pre[s:live])
    pre[live:] = 0
    y = activations.value(pre, activation)
    if scatter:
        y = torch.ops.dyncore.scatter_rows(y, None, rows, offsets, scale, row_offsets, row_slots)
    return y, pre if save and activation != "none" else x.new_empty(0)


@torch.no_grad()
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
    groups = groups_of(offsets)
    y = x.new_empty(rows.shape[0], w_out.shape[1])
    # without a backward to come, one buffer serves all groups
    pre = x.new_empty(rows.shape[0] if save else max((e - s for _, s, e in groups), default=0), w_in.shape[1])
    with torch.autocast("cpu", enabled=False):
        for g, s, e in groups:
            hidden = pre[s:e] if save else pre[: e - s]
            _product(x.index_select(0, rows[s:e]), w_in[g], None if b_in is None else b_in[g], hidden)
            hidden = activations.hidden(hidden, activation)
            _product(hidden, w_out[g], None if b_out is None else b_out[g], y[s:e])
    if save:
        pre[groups[-1][2] if groups else 0 :] = 0
    out = torch.ops.dyncore.scatter_rows(y, residual, rows, offsets, scale, row_offsets, row_slots)
    return out, pre if save else x.new_empty(0)
