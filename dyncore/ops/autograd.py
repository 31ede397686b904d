"""What the ops' autograd functions share: when they are needed, and that they have first derivatives only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dyncore.transforms import apply


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a call is to be differentiated: backward, or forward (which an autograd function refuses in words)."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        if torch._C._are_functorch_transforms_active():  # under vmap a tensor does not say what it is made from
            return True
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError("dyncore's ops have first derivatives only: this asks for the derivative of a gradient")


class _Unpacked:
    """A context whose saved tensors have been unpacked, which checkpointing allows once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors: tuple[Tensor | None, ...] = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_derivative_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Decorates a backward whose result may be asked for with create_graph=True, but not differentiated again.

    torch's once_differentiable lets a gradient through as a constant where the incoming gradient is one.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(ctx, *grads)
        # all that the gradients depend on: by whichever of it a second derivative asks, it comes upon the refusal
        sources: list[Tensor] = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(None if g is None else apply(_Refuse, g, *sources) for g in results)

    return run
