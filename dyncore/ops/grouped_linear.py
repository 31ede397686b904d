"""grouped_linear: each slot's row times the weight of its group, with gather and scatter fused in or left out."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyncore import activations
from dyncore.backends import one_group
from dyncore.ops.autograd import first_derivative_only, wants_grad
from dyncore.ops.checks import (
    autocast,
    expect_activation,
    expect_plan,
    expect_rows,
    expect_shape,
    expect_slots,
    expect_tensor,
)
from dyncore.ops.executors import by_cublas
from dyncore.ops.flops import live_slots
from dyncore.ops.masked import compute_masked, only, selection, weighted
from dyncore.ops.scatter_rows import scatter_rows
from dyncore.plan import Plan
from dyncore.transforms import apply

_forward = torch.ops.dyncore.grouped_linear.default
_backward = torch.ops.dyncore.grouped_linear_backward.default


@register_flop_formula(torch.ops.dyncore.grouped_linear, get_raw=True)
def _forward_flops(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, offsets: Tensor, *args: Any, **kwargs: Any
) -> int:
    return 2 * live_slots(rows, offsets) * weight.shape[1] * weight.shape[2]


@register_flop_formula(torch.ops.dyncore.grouped_linear_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    *_, activation, _, scatter, (need_x, need_weight, _, need_scale) = args
    back = need_x or (need_scale and scatter and activation == "none")  # the product with the weight gives both
    return 2 * live_slots(rows, offsets) * weight.shape[1] * weight.shape[2] * (int(back) + int(need_weight))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        rows: Tensor,
        offsets: Tensor,
        row_offsets: Tensor,
        row_slots: Tensor,
        activation: str,
        gather: bool,
        scatter: bool,
        cublas: bool,
        full: bool,
    ) -> Tensor:
        plan = (rows, offsets, scale, row_offsets, row_slots)
        forward = functools.partial(one_group.grouped_linear, full=full) if cublas else _forward
        out, pre = forward(x, weight, bias, *plan, activation, gather, scatter, True)
        ctx.save_for_backward(x, weight, bias, pre, *plan)
        ctx.form = (activation, gather, scatter)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, pre, *plan = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        grads = _backward(grad, x, weight, bias, pre, *plan, *ctx.form, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9


def _masked(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, activation: str, gather: bool, scatter: bool
) -> Tensor:
    biases = bias.unbind(0) if bias is not None else (None,) * weight.shape[0]
    groups = plan.groups()
    selected, scale = selection(plan, x.dtype)
    rows = torch.where(groups < plan.num_groups, plan.rows, plan.num_rows)  # padding reads one row past the end
    total = None
    for g, (w, b) in enumerate(zip(weight.unbind(0), biases, strict=True)):  # unbind: W[g] would zero-fill a gradient
        chosen = selected[:, g] if gather else groups == g
        # the pre-activation is zeroed too: a NaN in the weights of a group without rows must not reach its gradient
        y = activations.value(only(chosen, F.linear(only(chosen, x), w, b)), activation)
        if gather and scatter:
            y = weighted(chosen, scale[:, g], y)
        elif gather:
            y = only(groups == g, F.pad(y, (0, 0, 0, 1))[rows])
        else:
            y = only(chosen, y)
        total = y if total is None else total + y
    assert total is not None
    return scatter_rows(total, plan) if scatter and not gather else total.to(x.dtype)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plan: Plan,
    activation: str | None = None,
    gather: bool = True,
    scatter: bool = True,
) -> Tensor:
    """act(weight[g] x + bias[g]) for each slot (row, g) of the plan.

    Args:
        x: rows [T, K] (or [..., K]) if `gather`, else slots [A, K].
        weight: [G, N, K]; bias: [G, N] or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu"; gated ones belong to grouped_mlp.
        scatter: the result is rows [T, N] (or [..., N]), scaled by plan.scale and summed over a row's slots, exactly 0
            where a row has none; else slots [A, N], not scaled, 0 in padding.

    Products accumulate in float32 (float64 for float64). Raises TypeError on dtypes and on what is no tensor or plan,
    ValueError on shapes, devices or activation names, IndexError on plan rows outside x.
    """
    expect_plan(plan)
    expect_tensor("x", x)
    leading = x.shape[:-1]
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    x = expect_rows("x", x, plan) if gather else expect_slots("x", x, plan)
    expect_tensor("weight", weight, like=x)
    expect_shape("weight", weight, "G N K", (plan.num_groups, None, x.shape[1]), matrix=True)
    if bias is not None:
        expect_tensor("bias", bias, like=x)
        expect_shape("bias", bias, "G N", (plan.num_groups, weight.shape[1]))
    if activation is not None:
        expect_activation(activation, gated=False)
    name = activation or "none"
    cublas = by_cublas(plan, x, weight)
    if not cublas and compute_masked(plan, "grouped_linear", weight):
        out = _masked(x, weight, bias, plan, name, gather, scatter)
    elif wants_grad(x, weight, bias, plan.scale if scatter else None):
        tensors = (plan.rows, plan.offsets, plan.row_offsets, plan.row_slots)
        form = (name, gather, scatter, cublas, plan.full)
        out = apply(_GroupedLinear, x, weight, bias, plan.scale if scatter else None, *tensors, *form)
    else:
        tensors = (plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots)
        forward = functools.partial(one_group.grouped_linear, full=plan.full) if cublas else _forward
        out = forward(x, weight, bias, *tensors, name, gather, scatter, False)[0]
    return out.view(*leading, out.shape[1]) if gather and scatter and len(leading) > 1 else out
