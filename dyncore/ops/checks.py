"""Validation shared by the ops: every message names the argument, what was expected and what came.

It runs on every call, and on few rows it is most of what an op costs beside its kernel: what is right is found by a few
comparisons (reading an attribute of a tensor takes 50 ns), and only what is wrong is looked at closely.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dyncore.activations import ELEMENTWISE, GATED
from dyncore.plan import Plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALL = (*ELEMENTWISE, *GATED)
# asked once, for Dynamo of torch 2.11 cannot
_AUTOCAST = tuple(t for t in ("cpu", "cuda", "hpu", "mps", "mtia", "xpu") if torch.amp.is_autocast_available(t))
# one question for all devices, before that for x's
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def expect_plan(plan: object) -> Plan:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a dyncore.Plan, got {type(plan).__name__}")
    return plan


def expect_tensor(name: str, value: object, like: Tensor | None = None, of: str = "x") -> Tensor:
    """`value` as a strided floating tensor, of the dtype and on the device of `like`, which messages call `of`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    dtype = value.dtype
    if like is not None and dtype is like.dtype and value.layout is torch.strided and value.device == like.device:
        return value  # the common case; `like` has passed
    if dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {value.layout}")
    if like is not None and dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {of}, {like.dtype}, got {dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")
    return value


def expect_shape(
    name: str, value: Tensor, letters: str, sizes: tuple[int | None, ...], *, matrix: bool = False
) -> None:
    """Raise unless `value` has the sizes given (None: any), which `letters` names ("G N K").

    matrix: it is of weights, which some store [in, out]: where that would fit, the message says how to pass it.
    """
    got = value.shape
    if len(got) == len(sizes):
        for g, w in zip(got, sizes):  # noqa: B905 (strict=True costs as much as the loop)
            if w is not None and g != w:
                break
        else:
            return
    form = ", ".join(n if w is None else f"{n}={w}" for n, w in zip(letters.split(), sizes, strict=True))
    turned = (*got[:-2], *got[:-3:-1])
    fits = matrix and len(turned) == len(sizes) and all(w is None or g == w for g, w in zip(turned, sizes, strict=True))
    hint = f"; stored transposed? {name}.mT is read where it lies" if fits else ""
    raise ValueError(f"{name}: expected shape [{form}], got {list(got)}{hint}")


def expect_rows(name: str, x: Tensor, plan: Plan) -> Tensor:
    """`x` flattened to [T, D], with T checked against the plan."""
    flat = _flatten(name, x, plan)
    if flat.shape[0] != plan.num_rows:
        raise ValueError(
            f"{name}: expected {plan.num_rows} rows (plan.num_rows), got {flat.shape[0]} in shape {list(x.shape)}"
            + ("; these are slots: gather=False?" if flat.shape[0] == plan.num_slots else "")
        )
    return flat


def expect_slots(name: str, y: Tensor, plan: Plan) -> Tensor:
    """`y` as [A, D], with A checked against the plan."""
    if y.dim() != 2:
        raise ValueError(f"{name}: expected shape [A, D], got {list(y.shape)}")
    if y.shape[0] != plan.num_slots:
        way = "gather=True, or gather_rows first?" if name == "x" else "gather_rows first?"
        hint = f"; these are rows: {way}" if y.shape[0] == plan.num_rows else ""
        raise ValueError(
            f"{name}: expected {plan.num_slots} slots (plan.rows), got {y.shape[0]} in {list(y.shape)}{hint}"
        )
    _expect_device(name, y, plan)
    return y


def _flatten(name: str, x: Tensor, plan: Plan) -> Tensor:
    expect_dims(name, x)
    _expect_device(name, x, plan)
    return x if x.dim() == 2 else flattened(x)


def expect_dims(name: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"{name}: expected at least 2 dimensions [..., D], got shape {list(x.shape)}")


def flattened(x: Tensor) -> Tensor:
    """[..., D] as [T, D]."""
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.reshape(rows, x.shape[-1])


def _expect_device(name: str, x: Tensor, plan: Plan) -> None:
    if plan.rows.device != x.device:
        raise ValueError(f"plan: expected a plan on the device of {name}, {x.device}, got one on {plan.rows.device}")


def expect_activation(activation: object, gated: bool) -> None:
    names = _ALL if gated else ELEMENTWISE
    if activation not in names:
        known = ", ".join(names)
        hint = "; gated activations belong to grouped_mlp" if not gated and activation in GATED else ""
        raise ValueError(f"activation: expected one of {known}, got {activation!r}{hint}")


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for x's device (the meta device has none)."""
    if not (torch.compiler.is_compiling() or any_autocast()):
        return False
    return x.device.type in _AUTOCAST and torch.is_autocast_enabled(x.device.type)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for the first, as torch.nn.functional.linear has them."""
    first = tensors[0]
    assert first is not None
    if not autocast_on(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
