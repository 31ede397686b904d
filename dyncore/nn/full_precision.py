"""Scores in full precision: products that decide which rows are computed, and whose rounding must not. Floor 4."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_HALVES = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_level_of_functorch = torch._C._functorch.maybe_current_level  # pyright: ignore


def full_precision(layer: Callable[[Tensor], Tensor], x: Tensor, name: str = "score") -> Tensor:
    """layer(x) in at least float32 whatever autocast says: a score decides, so its rounding must not.

    Raises ValueError, about `name`, where the layer is a Linear, or a Sequential that begins with one, of another width
    or on another device than x.
    """
    first: object = layer
    if isinstance(layer, nn.Sequential) and layer.__class__ is nn.Sequential and len(layer):
        first = layer[0]
    if isinstance(first, nn.Linear) and first.__class__ is nn.Linear and x.shape[-1:] != (first.in_features,):
        raise ValueError(f"{name}: expected rows of its width {first.in_features}, got shape {list(x.shape)}")
    if isinstance(first, nn.Linear) and x.device != first.weight.device:
        raise ValueError(f"{name}: expected rows on its device {first.weight.device}, got some on {x.device}")
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(layer, nn.Linear) and not isinstance(layer, nn.LazyLinear):
            if _widens(x, layer.weight):
                return _widened(x, layer.weight, layer.bias)
            bias = None if layer.bias is None else layer.bias.to(wide)
            return F.linear(x.to(wide), layer.weight.to(wide), bias)
        parameter = next(layer.parameters(), None) if isinstance(layer, nn.Module) else None
        return layer(x if parameter is None else x.to(parameter.dtype)).to(wide)


# On a CUDA device one product of 16-bit operands has float32 results, which saves the casts of both operands, two
# kernels beside the six that a whole MoE layer takes. Products of halves are exact in float32: nothing is lost by it.


@functools.cache
def _device_widens(index: int | None) -> bool:
    """Whether cuBLAS multiplies halves to float32 there."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(index) >= (8, 0)


def _widens(x: Tensor, weight: Tensor) -> bool:
    if not x.is_cuda or x.dtype not in _HALVES or weight.dtype != x.dtype or torch.compiler.is_compiling():
        return False  # a compiler fuses casts into what comes before them
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:  # whoever wraps tensors knows linear
        return False
    if forward_ad._current_level >= 0 or _level_of_functorch() is not None:
        return False
    if x.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    return _device_widens(x.device.index)


class _Product(torch.autograd.Function):
    """x [T, D] weight [E, D]^T in float32. Gradients are those of float32 casts, which are made in the backward pass
    and not kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        dx = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, (grad.t() @ x.to(grad.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Product.apply(rows, weight)  # type: ignore[assignment]
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias
