"""grouped_mlp: y[a] = w_out[g(a)] act(w_in[g(a)] x[rows[a]] + b_in[g(a)]) + b_out[g(a)] for the live slots a, scaled
and summed to rows with the residual; and its gradients. Floor 0: launchers; the kernels are common's.

Three kernels forward: up product with the activation, down product with the scale, combine. Five backward, besides the
sums for scale and biases: down product's gradient through the activation, up product's, combine, two weight gradients.
"""

import torch

from .common.combine import combine
from .common.configs import Target
from .common.product import product, slot_buffer
from .common.product_backward import product_backward
from .common.slots import BM, slots
from .common.sums import column_sums, row_sums
from .common.weight_gradient import weight_gradient

GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}  # gated activation -> activation of its gate


def grouped_mlp(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    row_offsets: torch.Tensor,
    row_slots: torch.Tensor,
    activation: str,
    save: bool,
    *,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, pre) as the op's backends return them; all of one dtype: float32, bfloat16 or float16, which the hidden
    activation is rounded to. The padding of pre is zeros: hooks that pack what is saved may look at all of it."""
    num_slots, inner = rows.shape[0], w_out.shape[2]
    pre = x.new_empty(num_slots, w_in.shape[1]) if save else x.new_empty(0)
    hidden = x.new_empty(num_slots, inner)
    product(
        x, w_in, b_in, None, rows, offsets, hidden, pre if save else None,
        activation=GATES.get(activation, activation), gated=activation in GATES, target=target,
    )  # fmt: skip
    y = slot_buffer(x, num_slots, w_out.shape[1])
    product(hidden, w_out, b_out, scale, None, offsets, y, target=target)
    out = x.new_empty(row_offsets.shape[0] - 1, w_out.shape[1])
    combine(y, residual, None, row_offsets, row_slots, out)
    return out, pre


def grouped_mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    pre: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    row_offsets: torch.Tensor,
    row_slots: torch.Tensor,
    activation: str,
    needs: list[bool],
    *,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, w_in, w_out, b_in, b_out and scale, of no elements where not needed."""
    num_slots = rows.shape[0]
    need_x, need_w_in, need_w_out = needs[:3]
    need_b_in, need_b_out = needs[3] and b_in is not None, needs[4] and b_out is not None
    need_scale = needs[5] and scale is not None
    row_pieces = []

    dbias_out = x.new_empty(w_out.shape[:2] if need_b_out else 0)
    if need_b_out or (need_scale and b_out is not None):
        pieces, columns = slots(
            grad, rows, offsets, num_slots, scale=scale, bias=b_out if need_scale else None, sum_rows=need_scale,
            sum_columns=need_b_out, target=target,
        )  # fmt: skip
        if need_scale:
            row_pieces.append(pieces)
        if need_b_out:
            column_sums(columns, BM, offsets, dbias_out)

    need_pre = need_x or need_w_in or need_b_in
    dpre = x.new_empty(num_slots, w_in.shape[1]) if need_pre else None
    hidden = x.new_empty(num_slots, w_out.shape[2]) if need_w_out else None  # scaled
    dbias_in = x.new_empty(w_in.shape[:2] if need_b_in else 0)
    if need_pre or need_w_out or need_scale:
        pieces = product_backward(
            grad, w_out.transpose(1, 2), pre, scale, rows, offsets, dpre, hidden,
            activation=GATES.get(activation, activation), gated=activation in GATES,
            multiplied=need_pre or need_scale, sum_rows=need_scale, target=target,
        )  # fmt: skip
        if need_scale:
            row_pieces.append(pieces)
    if need_b_in and dpre is not None:
        _, columns = slots(dpre, None, offsets, num_slots, sum_columns=True, target=target)
        column_sums(columns, BM, offsets, dbias_in)

    dw_out = x.new_empty(w_out.shape if need_w_out else 0)
    if hidden is not None:
        weight_gradient(grad, hidden, rows, offsets, dw_out, gather_left=True, gather_right=False, target=target)
        del hidden
    dw_in = x.new_empty(w_in.shape if need_w_in else 0)
    if need_w_in and dpre is not None:
        weight_gradient(dpre, x, rows, offsets, dw_in, gather_left=False, gather_right=True, target=target)
    dx = x.new_empty(x.shape if need_x else 0)
    if need_x and dpre is not None:
        dslots = slot_buffer(x, num_slots, x.shape[1])
        product(dpre, w_in.transpose(1, 2), None, None, None, offsets, dslots, target=target)
        combine(dslots, None, None, row_offsets, row_slots, dx)
    dscale = (x if scale is None else scale).new_empty(num_slots if need_scale else 0)
    if need_scale:
        row_sums(row_pieces, offsets, dscale)
    return dx, dw_in, dw_out, dbias_in, dbias_out, dscale
