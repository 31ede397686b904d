"""sparse_mlp: an MLP around a ReLU whose zeros cost neither time nor, until the backward, memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils.flop_counter import register_flop_formula

from dyncore import activations
from dyncore.backends import cpu_sparse
from dyncore.ops.autograd import first_derivative_only, wants_grad
from dyncore.ops.checks import any_autocast, autocast, expect_dims, expect_shape, expect_tensor, flattened
from dyncore.ops.dispatch import unseen
from dyncore.ops.flops import holds_no_data
from dyncore.ops.masked import dense_from
from dyncore.plan import is_eager_cpu
from dyncore.transforms import apply

ACTIVATIONS = ("relu", "relu2", "reglu")
SAVE = ("compressed", "dense", "recompute")

_forward = torch.ops.dyncore.sparse_mlp.default
_hidden = torch.ops.dyncore.sparse_hidden.default
_backward = torch.ops.dyncore.sparse_mlp_backward.default


def _nonzeros(x: Tensor, w_in: Tensor, b_in: Tensor | None, activation: str) -> int:
    """How many neurons are on, found as the op finds them, which does not say it."""
    if holds_no_data(x):
        return x.shape[0] * (w_in.shape[0] // (2 if activation in activations.GATED else 1))
    return int(_hidden(x, w_in, b_in, activation, float("inf"), -1)[2][-1])


def _hidden_products(x: Tensor, w_in: Tensor, activation: str, nonzeros: int) -> int:
    """Multiply-adds that make the hidden activations: the gate for all neurons, up for those that are on."""
    gated = activation in activations.GATED
    gate = x.shape[0] * (w_in.shape[0] // (2 if gated else 1))
    return (gate + (nonzeros if gated else 0)) * w_in.shape[1]


@register_flop_formula(torch.ops.dyncore.sparse_mlp, get_raw=True)
def _forward_flops(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    nonzeros = _nonzeros(x, w_in, b_in, activation)
    return 2 * (_hidden_products(x, w_in, activation, nonzeros) + nonzeros * w_out.shape[0])


@register_flop_formula(torch.ops.dyncore.sparse_hidden, get_raw=True)
def _hidden_flops(x: Tensor, w_in: Tensor, b_in: Tensor | None, activation: str, *args: Any, **kwargs: Any) -> int:
    gated = activation in activations.GATED
    return 2 * _hidden_products(x, w_in, activation, _nonzeros(x, w_in, b_in, activation) if gated else 0)


@register_flop_formula(torch.ops.dyncore.sparse_mlp_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    mask: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    pre: Tensor,
    activation: str,
    dense_from: float,
    needs: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    width, inner = w_out.shape
    if holds_no_data(x):
        nonzeros = x.shape[0] * inner
    elif row_offsets.numel():
        nonzeros = int(row_offsets[-1])
    else:
        nonzeros = int(pre[:, :inner].count_nonzero())
    need_x, need_w_in, need_w_out, need_b_in, _ = needs
    halves = 2 if activation in activations.GATED else 1
    hidden = need_x or need_w_in or need_b_in
    products = int(hidden) + int(need_w_out) + halves * (int(need_x) + int(need_w_in))
    return 2 * nonzeros * width * products


class _SparseMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        activation: str,
        dense_from: float,
        save: str,
        capacity: int,
    ) -> Tensor:
        what = "none" if save == "recompute" else save
        out, *hidden = _forward(x, w_in, w_out, b_in, b_out, activation, dense_from, what, capacity)
        if save == "recompute":
            ctx.save_for_backward(x, w_in, w_out, b_in)
        else:
            ctx.save_for_backward(x, w_in, w_out, None, *hidden)
        ctx.form = (activation, dense_from, capacity)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, b_in, *hidden = ctx.saved_tensors
        activation, dense_from, capacity = ctx.form
        if not hidden:  # to be computed again
            hidden = [*_hidden(x, w_in, b_in, activation, dense_from, capacity), x.new_empty(0)]
        needs = list(ctx.needs_input_grad[:5])
        grads = _backward(grad, x, w_in, w_out, *hidden, activation, dense_from, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 4


def _check(x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, gated: bool) -> None:
    expect_dims("x", x)
    width = x.shape[-1]
    expect_tensor("w_out", w_out, like=x)
    expect_shape("w_out", w_out, "H I", (width, None), matrix=True)
    inner = w_out.shape[1] * 2 if gated else w_out.shape[1]
    name = "2I" if gated else "I"
    expect_tensor("w_in", w_in, like=x)
    expect_shape("w_in", w_in, f"{name} H", (inner, width), matrix=True)
    if b_in is not None:
        expect_tensor("b_in", b_in, like=x)
        expect_shape("b_in", b_in, name, (inner,))
    if b_out is not None:
        expect_tensor("b_out", b_out, like=x)
        expect_shape("b_out", b_out, "H", (width,))


def sparse_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str = "relu",
    save: str = "compressed",
) -> Tensor:
    """w_out act(w_in x + b_in) + b_out, skipping the neurons that a ReLU shuts: exact at any sparsity.

    Args:
        x: rows [T, H] (or [..., H]).
        w_in: [I, H]; for reglu [2I, H], gate half first. b_in: [I] (reglu [2I]) or None.
        w_out: [H, I]. Stored neuron-major (strides (1, H)) it is read for neurons that are on, alone: that pays most on
            few rows. Any other strides serve, too. b_out: [H] or None.
        activation: "relu" (Mirzadeh et al. 2023, "ReLU strikes back"), "relu2", its square (So et al. 2021), or
            "reglu", relu(gate) * up (Shazeer 2020), whose up half is computed where the gate is open.
        save: what of the hidden layer is kept for the backward, besides x. "compressed": a bit for each neuron and the
            values of those that are on (up's too, where gated); under torch.compile and on accelerators in a buffer of
            the full size, so that no shape depends on data. "dense": one tensor [T, I], gated [T, 2I]. "recompute":
            nothing.

    Returns [T, H] in x's shape. Gradients of weights are stored as the weights are. A neuron is off where its
    pre-activation, rounded to x's dtype, is <= 0; a NaN is on and goes on, as through torch.relu. Neurons that are off
    do not meet the weights: 0 times an infinity does not become NaN, except where "auto" execution finds a dense
    product faster. Where no kernel skips (float64, other devices than CPUs), "auto" is PyTorch's own operations, which
    keep for the backward what they keep. Products accumulate in float32 (float64 for float64). Raises TypeError on
    dtypes and on what is no tensor, ValueError on shapes, devices, or names of activations and of `save`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if save not in SAVE:
        raise ValueError(f"save: expected one of {', '.join(SAVE)}, got {save!r}")
    gated = activation == "reglu"
    # what else than Dynamo compiles has tensors without data, which do not fit
    plain = not (is_dynamo_compiling() or any_autocast())
    fit = plain and cpu_sparse.sparse_mlp_fits(x, w_in, w_out, b_in, b_out, gated)
    if not fit:
        expect_tensor("x", x)
        x, w_in, w_out, b_in, b_out = autocast(x, w_in, w_out, b_in, b_out)  # type: ignore[assignment]
        _check(x, w_in, w_out, b_in, b_out, gated)
    shape = x.shape
    if len(shape) != 2:
        x = flattened(x)
    skip = dense_from("sparse_mlp", x, w_in, w_out)
    if skip is None:
        out = F.linear(activations.hidden(F.linear(x, w_in, b_in), activation), w_out, b_out)
    elif wants_grad(x, w_in, w_out, b_in, b_out):
        capacity = -1 if is_eager_cpu(x) else x.shape[0] * w_out.shape[1]
        out = apply(_SparseMLP, x, w_in, w_out, b_in, b_out, activation, skip, save, capacity)
    else:
        forward = cpu_sparse.sparse_mlp if fit and unseen(x, w_in, w_out, b_in, b_out) else _forward
        out = forward(x, w_in, w_out, b_in, b_out, activation, skip, "none", 0)[0]
    return out if len(shape) == 2 else out.view(shape)
