"""Autograd functions under the transforms of torch.func (grad, vjp, vmap), which take another form of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_is_batched = torch._C._functorch.is_batchedtensor  # pyright: ignore


class _Context:
    """What a forward leaves for its backward, where torch gives it no context: the tensors by their places among inputs
    and outputs."""

    def __init__(self) -> None:
        self.saved: list[int | None] = []
        self.constant: list[int] = []  # outputs without a gradient
        self.num_outputs = 0

    def run(self, function: type[torch.autograd.Function], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The outputs of function's forward, then whatever else it saved."""
        saved: list[Tensor | None] = []
        constant: list[Tensor] = []

        def save_for_backward(*tensors: Tensor | None) -> None:
            saved.extend(tensors)

        def mark_non_differentiable(*tensors: Tensor) -> None:
            constant.extend(tensors)

        self.save_for_backward, self.mark_non_differentiable = save_for_backward, mark_non_differentiable
        result: Tensor | tuple[Tensor, ...] = function.forward(self, *inputs)
        del self.save_for_backward, self.mark_non_differentiable
        outputs = [result] if isinstance(result, Tensor) else list(result)
        self.num_outputs = len(outputs)
        for t in saved:
            if t is not None and all(t is not known for known in (*inputs, *outputs)):
                outputs.append(t)
        place = {id(t): i for i, t in enumerate((*inputs, *outputs)) if t is not None}
        self.saved = [None if t is None else place[id(t)] for t in saved]
        self.constant = [place[id(t)] - len(inputs) for t in constant] + [*range(self.num_outputs, len(outputs))]
        return tuple(outputs)


@functools.cache
def _transformable(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function in the form that torch.func takes: a forward without a context (its last argument is ours), which
    returns what it saves. Not for every call: torch binds the arguments by the signature, which takes 10 us."""

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return args[-1].run(function, args[:-1])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            context: _Context = inputs[-1]
            tensors = (*inputs[:-1], *output)
            for name, value in vars(context).items():  # under vmap ctx is a wrapper, which passes them on
                setattr(ctx, name, value)
            ctx.save_for_backward(*(None if i is None else tensors[i] for i in context.saved))
            ctx.mark_non_differentiable(*(output[i] for i in context.constant))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError('dyncore\'s ops have no forward derivatives (jvp) but in "masked" execution')

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            results: Tensor | tuple[Tensor | None, ...] = function.backward(ctx, *grads[: ctx.num_outputs])
            return *(results if isinstance(results, tuple) else (results,)), None

    return Transformable


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), under the transforms of torch.func, too."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if torch.compiler.is_compiling():
        if any(isinstance(a, Tensor) and _is_batched(a) for a in args):  # Dynamo would leave the gradients out, unsaid
            raise RuntimeError(
                "torch.compile of torch.vmap over dyncore's ops has no gradients: leave out torch.compile, or call it "
                "in torch.no_grad()"
            )
        # Dynamo takes what a transform wraps for constant, but nothing computed from it
        return function.apply(*(a.view_as(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    context = _Context()
    outputs = _transformable(function).apply(*args, context)[: context.num_outputs]
    return outputs if len(outputs) > 1 else outputs[0]
