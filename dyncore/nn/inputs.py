"""What layers are given: checks of x, and calls of modules that know nothing of dyncore, whose errors name x too.

Floor 4. What is right is found by a few comparisons, for they run in every forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyncore.ops.checks import autocast_on


def expect_input(x: object) -> None:
    """TypeError unless x is a strided tensor of a floating (or complex) dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point and not x.dtype.is_complex:
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a strided tensor, got {x.layout}")


def expect_rows(x: object, dim: int, weights: Tensor, form: str = "...") -> None:
    """TypeError or ValueError unless x is [..., dim], on the device of a layer's weights and, but for autocast, of
    their dtype."""
    expect_input(x)
    assert isinstance(x, Tensor)
    if x.dim() < 2 or x.shape[-1] != dim:
        raise ValueError(f"x: expected shape [{form}, {dim}], got {list(x.shape)}")
    if x.device != weights.device:
        raise ValueError(f"x: expected a tensor on {weights.device}, as the weights are, got one on {x.device}")
    if x.dtype != weights.dtype and not autocast_on(x):
        raise TypeError(f"x: expected the dtype of the weights, {weights.dtype}, got {x.dtype}")


def expect_sequences(x: object, dim: int | None = None) -> None:
    """TypeError or ValueError unless x is a floating tensor [B, S, D], D being `dim` where that is given."""
    expect_input(x)
    assert isinstance(x, Tensor)
    if x.dim() != 3 or dim not in (None, x.shape[2]):
        raise ValueError(f"x: expected shape [B, S, {'D' if dim is None else dim}], got {list(x.shape)}")


def in_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on, as torch.nn.functional.linear takes it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocast_on(x) and x.dtype != torch.float64 else x


def called(name: str, module: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """module(*args, **options). Where it fails because its first argument has another width, dtype or device than it
    has, the error says so: ValueError or TypeError."""
    if torch.compiler.is_compiling():
        return module(*args, **options)
    try:
        return module(*args, **options)
    except RuntimeError as error:
        parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        x = args[0] if args else None
        if parameter is None or not isinstance(x, Tensor):
            raise
        if x.device != parameter.device:
            raise ValueError(
                f"x: expected a tensor on {parameter.device}, as {name} is, got one on {x.device}"
            ) from error
        if "type" in str(error) and x.dtype != parameter.dtype and not autocast_on(x):
            raise TypeError(f"x: expected the dtype of {name}, {parameter.dtype}, got {x.dtype}") from error
        if isinstance(module, nn.Linear) and x.shape[-1:] != (module.in_features,):
            wanted = f"rows of its width {module.in_features}"
            raise ValueError(f"{name}: expected {wanted}, got shape {list(x.shape)}") from error
        raise


def takes(module: Callable[..., Any], name: str) -> bool:
    """Whether the forward of a module, or a function, has a parameter of that name. That it takes any keyword says
    nothing: many swallow what they do not know."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    forward = module.forward if isinstance(module, nn.Module) else module
    return name in inspect.signature(forward).parameters
