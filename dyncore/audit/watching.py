"""One forward of a model, watched: what the chosen layers were called with, and whose outputs a mask multiplies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.audit.loading import Failed, Inputs, place_of
from dyncore.measure.calls import first_tensor
from dyncore.measure.masked_layers import Masked, RowMasks


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer's first call: its arguments, copied before it ran, the first tensor that it returned, and how many calls
    there were."""

    inputs: Inputs
    output: Any
    count: int

    @property
    def x(self) -> Tensor | None:
        """The first tensor among the arguments."""
        leaves = pytree.tree_leaves((self.inputs.args, self.inputs.kwargs))
        return next((t for t in leaves if isinstance(t, Tensor)), None)

    @property
    def y(self) -> Tensor | None:
        """The first tensor of the output."""
        return first_tensor(self.output)


def _copied(tree: Any) -> Any:
    def copy(t: Tensor) -> Tensor:
        return t.detach().clone()

    return pytree.tree_map_only(Tensor, copy, tree)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """`model` in evaluation, without gradients; left as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def watch(model: nn.Module, inputs: Inputs, chosen: Collection[str]) -> tuple[dict[str, Call], list[Masked], Any]:
    """(calls of the chosen layers by name, layers that a mask multiplies, the output) of one forward.

    Raises Failed where the forward does, with the innermost layer that failed.
    """
    calls: dict[str, Call] = {}
    masks = RowMasks()
    inside: list[str] = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside.append(name)
            if name in chosen and name not in calls:
                calls[name] = Call(Inputs(_copied(args), _copied(kwargs)), None, 0)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inside.pop()
            masks.returned(name, module, output)
            if name in calls:
                call = calls[name]
                calls[name] = Call(call.inputs, output if call.count == 0 else call.output, call.count + 1)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
        try:
            with masks:
                output = inputs.call(model)
        except Exception as error:
            where = f" in {inside[-1]} ({type(model.get_submodule(inside[-1])).__name__})" if inside[1:] else ""
            raise Failed(f"model: forward on {inputs} failed{where}: {place_of(error)}") from error
    return calls, list(masks.found.values()), output
