"""gather_rows: the rows of a plan's slots, one beside the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncore.ops.autograd import first_derivative_only, wants_grad
from dyncore.ops.checks import expect_plan, expect_rows, expect_tensor
from dyncore.plan import Plan
from dyncore.transforms import apply

_gather = torch.ops.dyncore.gather_rows.default
_scatter = torch.ops.dyncore.scatter_rows.default


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, offsets: Tensor, row_offsets: Tensor, row_slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows, offsets, row_offsets, row_slots)
        return _gather(x, rows, offsets)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, offsets, row_offsets, row_slots = ctx.saved_tensors
        return _scatter(grad, None, rows, offsets, None, row_offsets, row_slots), None, None, None, None


def gather_rows(x: Tensor, plan: Plan) -> Tensor:
    """The source row of each slot: [A, D] from `x` [T, D] (or [..., D], whose leading dimensions are the rows).

    Padding slots give 0. Raises TypeError on what is no floating tensor or no plan, ValueError on a wrong number of
    rows or a plan on another device, IndexError on a plan whose rows lie outside x.
    """
    expect_plan(plan)
    x = expect_rows("x", expect_tensor("x", x), plan)
    if wants_grad(x):
        return apply(_GatherRows, x, plan.rows, plan.offsets, plan.row_offsets, plan.row_slots)
    return _gather(x, plan.rows, plan.offsets)
