"""Another executor for CUDA devices: cuBLAS on the gathered rows of one group, where the host knows their number and so
no padding is computed. Forward only; backward passes are those of the grouped kernels. Floor 1.

The contract of the kernels holds, but in bfloat16 a slot's result is rounded before it is scaled and summed, as the
hidden pre-activation is before its activation. Shapes as in dyncore.backends.reference; `full`: slot a is row a.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore import activations
from dyncore.backends.reference import check_plan

# float16 stays with our kernels: their slots are float32, where a slot beyond 65504 may be scaled back
_DTYPES = (torch.bfloat16, torch.float32)
# Not timed. Gathered rows and a hidden layer that is read and written once more are 4 (H + I) bytes and more a row, in
# bfloat16 on an H200 (4.8 TB/s) as long as 15% of the products where H I / (H + I) is 1100: so much faster than our
# kernels cuBLAS can be, which wants many rows for it.
ROWS, WIDTH = 1024, 2048


def use_cublas(dtype: torch.dtype, num_slots: int, *weights: Tensor) -> bool:
    """Whether cuBLAS takes `num_slots` rows through these weights, of one group each [1, N, K]."""
    return dtype in _DTYPES and num_slots >= ROWS and all(min(w.shape[1], w.shape[2]) >= WIDTH for w in weights)


def _check(rows: Tensor, offsets: Tensor, row_offsets: Tensor) -> None:
    if not torch.compiler.is_compiling():
        check_plan(rows, offsets, row_offsets.shape[0] - 1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    transposed = weight.squeeze(0).t()
    return x @ transposed if bias is None else torch.addmm(bias.squeeze(0), x, transposed)


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
    *,
    full: bool,
) -> tuple[Tensor, Tensor]:
    _check(rows, offsets, row_offsets)
    with torch.autocast(x.device.type, enabled=False):
        slots = torch.ops.dyncore.gather_rows(x, rows, offsets) if gather and not full else x
        pre = _product(slots, weight, bias)
    out = activations.value(pre, activation)
    if scatter and not (full and scale is None):
        out = torch.ops.dyncore.scatter_rows(out, None, rows, offsets, scale, row_offsets, row_slots)
    return out, pre if save and activation != "none" else x.new_empty(0)


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
    *,
    full: bool,
) -> tuple[Tensor, Tensor]:
    _check(rows, offsets, row_offsets)
    with torch.autocast(x.device.type, enabled=False):
        slots = x if full else torch.ops.dyncore.gather_rows(x, rows, offsets)
        pre = _product(slots, w_in, b_in)
        out = _product(activations.hidden(pre, activation), w_out, b_out)
    if not (full and scale is None and residual is None):
        out = torch.ops.dyncore.scatter_rows(out, residual, rows, offsets, scale, row_offsets, row_slots)
    return out, pre if save else x.new_empty(0)
