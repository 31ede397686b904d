"""grouped_mlp: y[a] = w_out[g(a)] act(w_in[g(a)] x[rows[a]] + b_in[g(a)]) + b_out[g(a)] for the live slots a, scaled
and summed to rows with the residual; and its gradients. Floor 0: launchers; the kernels are common's.

Three kernels forward: up product with the activation, down product with the scale, combine.
"""

import torch

from .common.combine import combine
from .common.configs import Target
from .common.product import product, slot_buffer

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
    """(out, pre) as the op's backends return them, the padding of pre unwritten; all of one dtype: float32, bfloat16 or
    float16. The hidden activation is rounded to it."""
    num_slots, inner = rows.shape[0], w_out.shape[2]
    pre = x.new_empty(num_slots, w_in.shape[1]) if save else x.new_empty(0)
    hidden = x.new_empty(num_slots, inner)
    product(
        x, w_in, b_in, None, rows, offsets, hidden, pre if save else None,
        activation=GATES.get(activation, activation), gated=activation in GATES, target=target,
    )  # fmt: skip
    slots = slot_buffer(x, num_slots, w_out.shape[1])
    product(hidden, w_out, b_out, scale, None, offsets, slots, target=target)
    out = x.new_empty(row_offsets.shape[0] - 1, w_out.shape[1])
    combine(slots, residual, None, row_offsets, row_slots, out)
    return out, pre
