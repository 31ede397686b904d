"""grouped_mlp: each slot's row through the two-layer MLP of its group, gathered, scaled and scattered in one op."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyncore import activations
from dyncore.backends import cpu, one_group
from dyncore.ops.autograd import first_derivative_only, wants_grad
from dyncore.ops.checks import (
    any_autocast,
    autocast,
    autocast_on,
    expect_activation,
    expect_plan,
    expect_rows,
    expect_shape,
    expect_tensor,
)
from dyncore.ops.executors import by_cublas
from dyncore.ops.flops import live_slots
from dyncore.ops.masked import compute_masked, only, selection, weighted
from dyncore.plan import Plan
from dyncore.transforms import apply

_forward = torch.ops.dyncore.grouped_mlp.default
_backward = torch.ops.dyncore.grouped_mlp_backward.default


@register_flop_formula([torch.ops.dyncore.grouped_mlp, torch.ops.dyncore.grouped_mlp_packed], get_raw=True)
def _forward_flops(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * live_slots(rows, offsets) * (w_in[0].numel() + w_out[0].numel())


@register_flop_formula(torch.ops.dyncore.grouped_mlp_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    need_x, need_w_in, need_w_out, need_b_in, _, need_scale = args[-1]
    hidden = need_x or need_w_in or need_b_in or need_scale  # the product that gives the gradient of the hidden layer
    per_slot = (int(need_x) + int(need_w_in)) * w_in[0].numel() + (int(hidden) + int(need_w_out)) * w_out[0].numel()
    return 2 * live_slots(rows, offsets) * per_slot


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        rows: Tensor,
        offsets: Tensor,
        row_offsets: Tensor,
        row_slots: Tensor,
        activation: str,
        cublas: bool,
        full: bool,
    ) -> Tensor:
        plan = (rows, offsets, scale, row_offsets, row_slots)
        forward = functools.partial(one_group.grouped_mlp, full=full) if cublas else _forward
        out, pre = forward(x, w_in, w_out, b_in, b_out, residual, *plan, activation, True)
        ctx.save_for_backward(x, w_in, w_out, b_in, b_out, pre, *plan)
        ctx.activation = activation
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, b_in, b_out, pre, *plan = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        dresidual = grad if ctx.needs_input_grad[6] else None
        if not any(needs):
            return *(None,) * 6, dresidual, *(None,) * 7
        grads = _backward(grad, x, w_in, w_out, b_in, b_out, pre, *plan, ctx.activation, needs)
        return (
            *(g if need else None for g, need in zip(grads, needs, strict=True)),
            dresidual,
            *(None,) * 7,
        )


def _masked(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    activation: str,
) -> Tensor:
    absent = (None,) * w_in.shape[0]
    selected, scale = selection(plan, x.dtype)
    total = None
    for g, (wi, wo, bi, bo) in enumerate(  # unbind: W[g] would zero-fill a whole gradient for each group
        zip(
            w_in.unbind(0),
            w_out.unbind(0),
            absent if b_in is None else b_in.unbind(0),
            absent if b_out is None else b_out.unbind(0),
            strict=True,
        )
    ):
        # the pre-activation is zeroed too: a NaN in the weights of a group without rows must not reach its gradient
        pre = only(selected[:, g], F.linear(only(selected[:, g], x), wi, bi))
        u = activations.hidden(pre, activation)
        y = weighted(selected[:, g], scale[:, g], F.linear(u, wo, bo))
        total = y if total is None else total + y
    assert total is not None
    if residual is not None:
        total = torch.where(selected.any(1, keepdim=True), total + residual, residual.to(total.dtype))
    return total.to(x.dtype)


def _check(
    x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, plan: Plan, gated: bool
) -> None:
    groups, width = plan.num_groups, expect_rows("x", x, plan).shape[1]
    expect_tensor("w_out", w_out, like=x)
    expect_shape("w_out", w_out, "G H I", (groups, width, None), matrix=True)
    inner = w_out.shape[2] * 2 if gated else w_out.shape[2]
    expect_tensor("w_in", w_in, like=x)
    expect_shape("w_in", w_in, "G 2I H" if gated else "G I H", (groups, inner, width), matrix=True)
    if b_in is not None:
        expect_shape("b_in", expect_tensor("b_in", b_in, like=x), "G I", (groups, inner))
    if b_out is not None:
        expect_shape("b_out", expect_tensor("b_out", b_out, like=x), "G H", (groups, width))


def grouped_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    plan: Plan,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """residual + sum over a row's slots (row, g) of plan.scale * (w_out[g] act(w_in[g] x + b_in[g]) + b_out[g]).

    Args:
        x: rows [T, H] (or [..., H]).
        w_in: [G, I, H]; for gated activations [G, 2I, H], gate half first. w_out: [G, H, I].
        b_in: [G, I] (gated [G, 2I]) or None; b_out: [G, H] or None.
        activation: "relu", "relu2", "gelu", "gelu_tanh", "silu", or gated: "swiglu", "geglu", "reglu"
            (act(gate) * up; Shazeer 2020).
        residual: of x's shape and dtype, or None for 0. Under autocast it keeps its own dtype, as in `x + linear(x)`.

    Returns [T, H] in x's shape. A row with no slot gives exactly 0, or exactly its residual, whatever it holds.
    Products accumulate in float32 (float64 for float64). Saved for backward: the inputs, the plan and the hidden
    pre-activation of the slots. Raises TypeError on dtypes and on what is no tensor or plan, ValueError on shapes,
    devices or activation names, IndexError on plan rows outside x.
    """
    expect_plan(plan)
    expect_activation(activation, gated=True)
    gated = activation in activations.GATED
    if (
        torch.compiler.is_compiling()
        or any_autocast()
        or not cpu.grouped_mlp_fits(
            x, w_in, w_out, b_in, b_out, residual, plan.rows, plan.offsets, plan.num_rows, gated
        )
    ):
        expect_tensor("x", x)
        if residual is not None and expect_tensor("residual", residual).shape != x.shape:
            raise ValueError(f"residual: expected the shape of x, {list(x.shape)}, got {list(residual.shape)}")
        leading = x.shape[:-1]
        x, w_in, w_out, b_in, b_out = autocast(x, w_in, w_out, b_in, b_out)  # type: ignore[assignment]
        if residual is not None and residual.dtype != x.dtype and autocast_on(x):
            y = grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan, activation=activation)
            has_slot = (plan.row_offsets.diff() > 0).view(*leading, 1)
            return torch.where(has_slot, residual + y, residual)
        _check(x, w_in, w_out, b_in, b_out, plan, gated)
        if residual is not None:
            expect_tensor("residual", residual, like=x)
    shape = x.shape
    if len(shape) != 2:
        x = x.reshape(plan.num_rows, shape[-1])
        residual = None if residual is None else residual.reshape(plan.num_rows, shape[-1])
    if residual is x and torch.compiler.is_compiling():  # Dynamo refuses one tensor as two inputs of a Function
        residual = x.view_as(x)
    cublas = by_cublas(plan, x, w_in, w_out)
    if not cublas and compute_masked(plan, "grouped_mlp", w_in, w_out):
        out = _masked(x, w_in, w_out, b_in, b_out, residual, plan, activation)
    elif wants_grad(x, w_in, w_out, b_in, b_out, residual, plan.scale):
        tensors = (plan.rows, plan.offsets, plan.row_offsets, plan.row_slots)
        form = (activation, cublas, plan.full)
        out = apply(_GroupedMLP, x, w_in, w_out, b_in, b_out, plan.scale, residual, *tensors, *form)
    else:
        tensors = (plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots)
        forward = functools.partial(one_group.grouped_mlp, full=plan.full) if cublas else _forward
        out = forward(x, w_in, w_out, b_in, b_out, residual, *tensors, activation, False)[0]
    return out if len(shape) == 2 else out.view(shape)
