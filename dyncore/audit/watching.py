"""One forward of a model, watched: what the chosen layers were called with, and whose outputs a mask multiplies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dyncore.audit.loading import Failed, Inputs, place_of

_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__", "mul_", "multiply_", "__imul__"}
_FILLS = {"masked_fill", "masked_fill_"}


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


@dataclasses.dataclass(frozen=True)
class Masked:
    """A layer whose output was multiplied, or replaced in part, by mask and scale of its rows.

    mask: bool, the leading dimensions of the output: rows that are not 0 afterwards.
    """

    layer: str
    mask: Tensor


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of an output: of a tensor, of tuples, lists and mappings, and of dataclasses that are no mappings."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def first_tensor(tree: Any) -> Tensor | None:
    return next(iter(tensors(tree)), None)


def row_mask(m: Tensor, y: Tensor) -> Tensor | None:
    """bool, of y's leading dimensions: where the factor m, broadcast to y, is not 0; None where it is no factor of
    whole rows, or is 0 nowhere."""
    if m.dim() > y.dim() or not m.dim() or m.is_meta or m.is_complex():
        return None
    shape = [1] * (y.dim() - m.dim()) + list(m.shape)
    last = max((i for i, size in enumerate(shape) if size > 1), default=-1)
    if last < 0 or last == y.dim() - 1 or any(s not in (1, n) for s, n in zip(shape, y.shape, strict=True)):
        return None
    lead = y.shape[: last + 1]
    mask = (m != 0).reshape(shape).expand(*lead, *[1] * (y.dim() - last - 1)).reshape(lead)
    return None if bool(mask.all()) else mask


class _Masks(TorchFunctionMode):
    """Sees products of layers' outputs with masks of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by: Any = WeakTensorKeyDictionary()  # the outermost layer that returned a tensor
        self.found: dict[str, Masked] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS or name in _FILLS or name == "where":
            self._see(name, [a for a in args if isinstance(a, Tensor)])
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, operands: list[Tensor]) -> None:
        if name in _PRODUCTS and len(operands) == 2:
            for y, m in (operands, operands[::-1]):
                self._note(y, m)
        elif name in _FILLS and len(operands) >= 2:
            self._note(operands[0], ~operands[1])
        elif name == "where" and len(operands) >= 2:
            condition, *values = operands
            self._note(values[0], condition)
            if len(values) > 1:
                self._note(values[1], ~condition)

    def _note(self, y: Tensor, m: Tensor) -> None:
        layer = self.made_by.get(y)
        if layer is not None and layer not in self.found:
            mask = row_mask(m.detach(), y.detach())
            if mask is not None:
                self.found[layer] = Masked(layer, mask.clone())


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
    masks = _Masks()
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
            y = first_tensor(output)
            if y is not None and name:
                masks.made_by[y] = name
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
