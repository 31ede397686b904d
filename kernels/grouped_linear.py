"""grouped_linear: y[a] = act(x[rows[a]] @ weight[g(a)].T + bias[g(a)]) for the live slots a, by group, then summed to
rows; and its gradients. Floor 0: launchers; the kernels are common's.
"""

import torch

from .common.combine import combine
from .common.configs import Target
from .common.product import product, slot_buffer


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
    """(out, pre) as the op's backends return them, the padding of pre unwritten; x, weight and bias of one dtype:
    float32, bfloat16 or float16."""
    num_slots, num_rows, n = rows.shape[0], row_offsets.shape[0] - 1, weight.shape[1]
    save = save and activation != "none"
    slots = slot_buffer(x, num_slots, n) if scatter else x.new_empty(num_slots, n)
    pre = x.new_empty(num_slots, n) if save else x.new_empty(0)
    product(
        x, weight, bias, scale if scatter else None, rows if gather else None, offsets, slots, pre if save else None,
        activation=activation, zero_padding=not scatter, target=target,
    )  # fmt: skip
    if not scatter:
        return slots, pre
    out = x.new_empty(num_rows, n)
    combine(slots, None, None, row_offsets, row_slots, out)
    return out, pre
