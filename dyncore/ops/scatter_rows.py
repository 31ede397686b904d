"""scatter_rows: slots back to their rows, scaled, summed over a row's slots and added to a base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncore.ops.autograd import first_derivative_only, wants_grad
from dyncore.ops.checks import expect_plan, expect_rows, expect_shape, expect_slots, expect_tensor
from dyncore.plan import Plan
from dyncore.transforms import apply

_gather = torch.ops.dyncore.gather_rows.default
_scatter = torch.ops.dyncore.scatter_rows.default
_scatter_backward = torch.ops.dyncore.scatter_rows_backward.default


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        base: Tensor | None,
        scale: Tensor | None,
        rows: Tensor,
        offsets: Tensor,
        row_offsets: Tensor,
        row_slots: Tensor,
    ) -> Tensor:
        # y is needed for the gradient of scale alone
        ctx.save_for_backward(y if scale is not None else None, scale, rows, offsets, row_offsets, row_slots)
        return _scatter(y, base, rows, offsets, scale, row_offsets, row_slots)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, rows, offsets, row_offsets, row_slots = ctx.saved_tensors
        need_y, need_base, need_scale = ctx.needs_input_grad[:3]
        dy = dscale = None
        if scale is not None:
            needs = [need_y, need_scale]
            dy, dscale = _scatter_backward(grad, y, rows, offsets, scale, row_offsets, row_slots, needs)
        elif need_y:
            dy = _gather(grad, rows, offsets)
        return dy if need_y else None, grad if need_base else None, dscale if need_scale else None, *(None,) * 4


def scatter_rows(y: Tensor, plan: Plan, base: Tensor | None = None) -> Tensor:
    """base + sum over a row's slots of plan.scale * y: [T, D] from `y` [A, D].

    Args:
        y: [A, D] slots; padding is never read.
        base: [T, D] (or [..., D]: the result then has its shape) or None for 0. A row with no slot gives exactly base.

    Sums are made in float32 (float64 for float64) in the order of the slots, and rounded once. Raises TypeError on
    dtypes, ValueError on shapes or devices that do not match the plan, IndexError on rows outside the result.
    """
    expect_plan(plan)
    y = expect_slots("y", expect_tensor("y", y), plan)
    shape = None
    if base is not None:
        shape = expect_tensor("base", base, like=y).shape
        base = expect_rows("base", base, plan)
        expect_shape("base", base, "T D", (plan.num_rows, y.shape[1]))
        if base is y and torch.compiler.is_compiling():  # Dynamo refuses one tensor as two inputs of a Function
            base = base.view_as(base)
    if wants_grad(y, base, plan.scale):
        out = apply(_ScatterRows, y, base, plan.scale, plan.rows, plan.offsets, plan.row_offsets, plan.row_slots)
    else:
        out = _scatter(y, base, plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots)
    return out if shape is None or len(shape) == 2 else out.view(shape)
