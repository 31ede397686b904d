"""Layers that compute everything and whose outputs are then multiplied by a mask of rows, places or channels: what
looks dynamic and saves nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dyncore.measure.calls import Call, first_tensor, hooked, seeded

_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__", "mul_", "multiply_", "__imul__"}
_FILLS = {"masked_fill", "masked_fill_"}
_SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "subtract", "__sub__", "__rsub__", "rsub", "neg"}
_ELEMENTWISE = {
    *(
        "relu",
        "relu_",
        "relu6",
        "gelu",
        "silu",
        "sigmoid",
        "tanh",
        "elu",
        "leaky_relu",
        "hardtanh",
        "hardswish",
        "mish",
    ),
    *("hardswish", "softplus", "dropout", "batch_norm", "layer_norm", "group_norm", "rms_norm", "div", "__truediv__"),
    *("to", "float", "half", "bfloat16", "type_as", "contiguous", "clone", "detach"),
}
_VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "transpose", "permute"}
# after which what was made by a layer still is: each number comes from one of the layer's
_KEEPS = _PRODUCTS | _SUMS | _ELEMENTWISE | _VIEWS


@dataclasses.dataclass(frozen=True)
class Masked:
    """A layer whose output was multiplied, or replaced in part, by mask and scale.

    mask: bool: what is not 0 afterwards; of "rows", the leading dimensions of the output; of "places" or "channels",
    which broadcast to it. what: one of these.
    """

    layer: str
    mask: Tensor
    what: str = "rows"


def _aligned(m: Tensor, y: Tensor) -> list[int] | None:
    """The shape of a factor with y's dimensions; None where it is of no shape that is broadcast to y's."""
    if m.dim() > y.dim() or not m.dim() or m.is_meta or m.is_complex():
        return None
    shape = [1] * (y.dim() - m.dim()) + list(m.shape)
    return shape if all(s in (1, n) for s, n in zip(shape, y.shape, strict=True)) else None


def mask_of(m: Tensor, y: Tensor) -> Tensor | None:
    """bool, of y's leading dimensions: where the factor m, broadcast to y, is not 0; None where it is no factor of
    whole rows, or is 0 nowhere."""
    shape = _aligned(m, y)
    last = max((i for i, size in enumerate(shape or []) if size > 1), default=-1)
    if shape is None or last < 0 or last == y.dim() - 1:
        return None
    lead = y.shape[: last + 1]
    mask = (m != 0).reshape(shape).expand(*lead, *[1] * (y.dim() - last - 1)).reshape(lead)
    return None if bool(mask.all()) else mask


def column_mask(m: Tensor, y: Tensor) -> tuple[Tensor, str] | None:
    """(bool, with y's dimensions, what it is of) of a factor that is the same for whole rows: [B, 1, H, W] for the
    places of pictures, [I] for channels. None where it is of another kind, a Parameter, or is 0 nowhere."""
    shape = _aligned(m, y)
    if shape is None or shape[-1] == 1 or isinstance(m, nn.Parameter):
        return None
    if not any(s == 1 and n > 1 for s, n in zip(shape, y.shape, strict=True)):
        return None
    mask = (m != 0).reshape(shape)
    return None if bool(mask.all()) else (mask, "places" if y.dim() > 3 else "channels")


class RowMasks(TorchFunctionMode):
    """Sees products of layers' outputs, or of what is made of them number by number, with masks.

    Attributes:
        found: by layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Masked] = {}
        self._made_by: Any = WeakTensorKeyDictionary()
        self._order: dict[str, int] = {}

    def returned(self, name: str, layer: nn.Module, output: Any) -> None:
        """To be told of each layer when it returns, the inner ones first: the outermost one with weights is named."""
        y = first_tensor(output)
        if y is None or not name or (y in self._made_by and all(p.dim() < 2 for p in layer.parameters())):
            return
        self._made_by[y] = name
        self._order[name] = len(self._order)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        self._see(name, operands, args, kwargs)
        out = func(*args, **kwargs)
        if name in _KEEPS and isinstance(out, Tensor) and out not in self._made_by:
            made = [self._made_by[y] for y in operands if y in self._made_by and y.numel() == out.numel()]
            if made:
                self._made_by[out] = max(made, key=lambda layer: self._order[layer])
        return out

    def _see(self, name: str, operands: list[Tensor], args: Any, kwargs: Any) -> None:
        if name in _PRODUCTS and len(operands) == 2:
            self._note_both(*operands)
        elif name == "addcmul" and len(operands) == 3:
            self._note_both(*operands[1:])
        elif name == "lerp" and len(operands) == 3:
            start, end, weight = operands
            self._note(end, weight)
            self._note(start, 1 - weight)
        elif name in _FILLS and len(operands) >= 2:
            if _is_zero(kwargs.get("value", args[-1])):
                self._note(operands[0], ~operands[1])
        elif name == "where" and len(operands) >= 2:
            condition, *values = operands
            self._note(values[0], condition)
            if len(values) > 1:
                self._note(values[1], ~condition)
        elif name == "__setitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            y, index, value = args
            if _is_zero(value):
                self._note(y, ~index.reshape(*index.shape, *[1] * (y.dim() - index.dim())))

    def _note_both(self, first: Tensor, second: Tensor) -> None:
        self._note(first, second)
        self._note(second, first)

    def _note(self, y: Tensor, m: Tensor) -> None:
        layer = self._made_by.get(y)
        if layer is None or layer in self.found:
            return
        mask, what = mask_of(m.detach(), y.detach()), "rows"
        if mask is None:
            mask, what = column_mask(m, y.detach()) or (None, "")
        if mask is not None:
            self.found[layer] = Masked(layer, mask.clone(), what)


def _is_zero(value: Any) -> bool:
    return bool(value == 0) if isinstance(value, (int, float)) else isinstance(value, Tensor) and not value.any()


def masked_layers(call: Call) -> list[Masked]:
    """The layers whose outputs a mask multiplies in one call."""
    if not isinstance(call.module, nn.Module):
        return []
    masks = RowMasks()
    with hooked(call.module.named_modules(), after=masks.returned), masks:
        seeded(call.run)
    return list(masks.found.values())
