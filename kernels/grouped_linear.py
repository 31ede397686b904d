"""grouped_linear: y[a] = act(x[rows[a]] @ weight[g(a)].T + bias[g(a)]) for the live slots a, by group, then summed to
rows; and its gradients. Floor 0: launchers; the kernels are common's.
"""

import torch

from .common.combine import combine
from .common.configs import Target
from .common.product import product, slot_buffer
from .common.product_backward import product_backward
from .common.slots import BM, slots
from .common.sums import column_sums, row_sums
from .common.weight_gradient import weight_gradient


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    row_offsets: torch.Tensor,
    row_slots: torch.Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    save: bool,
    *,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, pre) as the op's backends return them, their padding zeros; x, weight and bias of one dtype: float32,
    bfloat16 or float16."""
    num_slots, num_rows, n = rows.shape[0], row_offsets.shape[0] - 1, weight.shape[1]
    save = save and activation != "none"
    y = slot_buffer(x, num_slots, n) if scatter else x.new_empty(num_slots, n)
    pre = x.new_empty(num_slots, n) if save else x.new_empty(0)
    product(
        x, weight, bias, scale if scatter else None, rows if gather else None, offsets, y, pre if save else None,
        activation=activation, zero_padding=not scatter, target=target,
    )  # fmt: skip
    if not scatter:
        return y, pre
    out = x.new_empty(num_rows, n)
    combine(y, None, None, row_offsets, row_slots, out)
    return out, pre


def grouped_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    row_offsets: torch.Tensor,
    row_slots: torch.Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    needs: list[bool],
    *,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight, bias and scale, of no elements where not needed.

    With an activation, dy = scale * grad * act'(pre) is written once for both products. Without one, grad is gathered
    by the products themselves; the scale is put to the result of one, and to a copy of grad for the other."""
    num_slots = rows.shape[0]
    factor = scale if scatter else None
    need_x, need_weight = needs[:2]
    need_bias, need_scale = needs[2] and bias is not None, needs[3] and factor is not None
    linear = activation == "none"
    row_pieces = []

    dy, gathered = grad, scatter
    copied = need_weight if linear and factor is not None else not linear and (need_x or need_weight)
    if copied or need_bias or (need_scale and (not linear or bias is not None)):
        copy = x.new_empty(num_slots, weight.shape[1]) if copied else None
        sums = need_scale and (not linear or bias is not None)
        pieces, columns = slots(
            grad, rows if scatter else None, offsets, num_slots, scale=factor, value=None if linear else pre,
            bias=bias if linear and sums else None, activation=activation, out=copy, sum_rows=sums,
            sum_columns=need_bias, target=target,
        )  # fmt: skip
        if sums:
            row_pieces.append(pieces)
        if copy is not None:
            dy, gathered = copy, False

    dx = x.new_empty(0)
    if need_x or (need_scale and linear):
        source, source_rows = (grad, rows if scatter else None) if linear else (dy, None)
        dslots = None
        if need_x:
            dslots = slot_buffer(x, num_slots, x.shape[1]) if gather else x.new_empty(num_slots, x.shape[1])
        if need_scale and linear:  # which implies scatter
            pieces = product_backward(
                source, weight.transpose(1, 2), x, factor, rows, offsets, dslots, gather_value=gather,
                zero_padding=need_x and not gather, sum_rows=True, target=target,
            )  # fmt: skip
            row_pieces.append(pieces)
        elif dslots is not None:
            product(
                source, weight.transpose(1, 2), None, factor if linear else None, source_rows, offsets, dslots,
                zero_padding=not gather, target=target,
            )  # fmt: skip
        if dslots is not None and gather:
            dx = x.new_empty(x.shape)
            combine(dslots, None, None, row_offsets, row_slots, dx)
        elif dslots is not None:
            dx = dslots

    dweight = x.new_empty(weight.shape if need_weight else 0)
    if need_weight:
        weight_gradient(dy, x, rows, offsets, dweight, gather_left=gathered, gather_right=gather, target=target)
    dbias = x.new_empty(weight.shape[:2] if need_bias else 0)
    if need_bias:
        column_sums(columns, BM, offsets, dbias)
    dscale = (x if scale is None else scale).new_empty(num_slots if need_scale else 0)
    if need_scale:
        row_sums(row_pieces, offsets, dscale)
    return dx, dweight, dbias, dscale
