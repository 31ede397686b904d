"""Layers that compute every row and whose outputs are then multiplied by a mask of rows: what looks dynamic and saves
nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dyncore.measure.calls import Call, first_tensor, hooked, seeded

_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__", "mul_", "multiply_", "__imul__"}
_FILLS = {"masked_fill", "masked_fill_"}


@dataclasses.dataclass(frozen=True)
class Masked:
    """A layer whose output was multiplied, or replaced in part, by mask and scale of its rows.

    mask: bool, the leading dimensions of the output: rows that are not 0 afterwards.
    """

    layer: str
    mask: Tensor


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


class RowMasks(TorchFunctionMode):
    """Sees products of layers' outputs with masks of rows.

    Attributes:
        made_by: tensor -> the name of the outermost layer that returned it, for its user to fill.
        found: by layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made_by: Any = WeakTensorKeyDictionary()
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


def masked_layers(call: Call) -> list[Masked]:
    """The layers whose outputs a mask of rows multiplies in one call."""
    if not isinstance(call.module, nn.Module):
        return []
    masks = RowMasks()

    def after(name: str, layer: nn.Module, output: Any) -> None:
        y = first_tensor(output)
        if y is not None and name:
            masks.made_by[y] = name

    with hooked(call.module.named_modules(), after=after), masks:
        seeded(call.run)
    return list(masks.found.values())
