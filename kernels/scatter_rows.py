"""scatter_rows: out[t] = base[t] + the sum over row t's slots of scale * y; and its gradients. Floor 0: launchers; the
kernels are common's."""

import torch

from .common.combine import combine
from .common.configs import Target
from .common.slots import slots
from .common.sums import row_sums


def scatter_rows(
    y: torch.Tensor,
    base: torch.Tensor | None,
    scale: torch.Tensor | None,
    row_offsets: torch.Tensor,
    row_slots: torch.Tensor,
) -> torch.Tensor:
    """[T, D] as the op's backends return it."""
    out = y.new_empty(row_offsets.shape[0] - 1, y.shape[1])
    combine(y, base, scale, row_offsets, row_slots, out)
    return out


def scatter_rows_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    needs: list[bool],
    *,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of y and scale, of no elements where not needed."""
    num_slots, need_scale = rows.shape[0], needs[1] and scale is not None
    dy = y.new_empty(num_slots, grad.shape[1]) if needs[0] else None
    dscale = (y if scale is None else scale).new_empty(num_slots if need_scale else 0)
    pieces, _ = slots(
        grad, rows, offsets, num_slots, scale=scale, value=y if need_scale else None, out=dy,
        zero_padding=needs[0], sum_rows=need_scale, target=target,
    )  # fmt: skip
    if need_scale:
        row_sums([pieces], offsets, dscale)
    return y.new_empty(0) if dy is None else dy, dscale
