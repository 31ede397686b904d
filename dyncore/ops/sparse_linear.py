"""sparse_linear: a product that skips the zeros of its input, as ReLU leaves them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils.flop_counter import register_flop_formula

from dyncore.backends import cpu_sparse
from dyncore.break_even import NEVER
from dyncore.execution import mode
from dyncore.ops.autograd import first_derivative_only, wants_grad
from dyncore.ops.checks import any_autocast, autocast, expect_dims, expect_shape, expect_tensor, flattened
from dyncore.ops.dispatch import unseen
from dyncore.ops.flops import holds_no_data
from dyncore.ops.masked import dense_from
from dyncore.transforms import apply

_forward = torch.ops.dyncore.sparse_linear.default
_backward = torch.ops.dyncore.sparse_linear_backward.default


def _nonzeros(h: Tensor) -> int:
    return h.numel() if holds_no_data(h) else int(h.count_nonzero())


@register_flop_formula(torch.ops.dyncore.sparse_linear, get_raw=True)
def _forward_flops(h: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _nonzeros(h) * weight.shape[0]


@register_flop_formula(torch.ops.dyncore.sparse_linear_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, h: Tensor, weight: Tensor, dense_from: float, needs: list[bool], *args: Any, **kwargs: Any
) -> int:
    products = (h.numel() if needs[0] else 0) + (_nonzeros(h) if needs[1] else 0)
    return 2 * products * weight.shape[0]


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, dense_from: float) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.dense_from = dense_from
        return _forward(h, weight, bias, dense_from)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads = _backward(grad, h, weight, ctx.dense_from, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def _check(h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expect_dims("h", h)
    expect_tensor("weight", weight, like=h, of="h")
    expect_shape("weight", weight, "N I", (None, h.shape[-1]), matrix=True)
    if bias is not None:
        expect_tensor("bias", bias, like=h, of="h")
        expect_shape("bias", bias, "N", (weight.shape[0],))


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight h + bias, skipping the zeros of h: exact at any sparsity, for h of any origin and sign.

    Args:
        h: hidden activations [T, I] (or [..., I]), of which many are exactly 0, as after a ReLU (Mirzadeh et al. 2023,
            "ReLU strikes back"). A NaN is no zero.
        weight: [N, I]. Stored neuron-major (strides (1, N)) it is read where a neuron is not 0, alone: that pays most
            on few rows. Any other strides serve, too.
        bias: [N] or None.

    Returns [T, N] in h's leading shape. The gradient of h is the whole, dense one: that of its zeros is not 0. That of
    weight skips the zeros, and is stored as weight is. Zeros do not meet the weights: 0 times an infinity does not
    become NaN, except where "auto" execution finds a dense product faster. Where no kernel skips (float64, other
    devices than CPUs), "auto" is torch's linear. Products accumulate in float32 (float64 for float64). Raises TypeError
    on dtypes and on what is no tensor, ValueError on shapes or devices.
    """
    # what else than Dynamo compiles has tensors without data, which do not fit
    fit = 0 if is_dynamo_compiling() or any_autocast() else cpu_sparse.sparse_linear_fits(h, weight, bias)
    if not fit:
        expect_tensor("h", h)
        h, weight, bias = autocast(h, weight, bias)  # type: ignore[assignment]
        _check(h, weight, bias)
    shape = h.shape
    if len(shape) != 2:
        h = flattened(h)
    skip = NEVER if fit == cpu_sparse.STREAMS and mode() != "masked" else dense_from("sparse_linear", h, weight)
    if skip is None:
        out = F.linear(h, weight, bias)
    elif wants_grad(h, weight, bias):
        out = apply(_SparseLinear, h, weight, bias, skip)
    else:
        forward = cpu_sparse.sparse_linear if fit and unseen(h, weight, bias) else _forward
        out = forward(h, weight, bias, skip)
    return out if len(shape) == 2 else out.view(*shape[:-1], weight.shape[0])
