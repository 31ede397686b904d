"""The cpu backend: the ops in C++ (csrc/cpu, bound as dyncore._C) for float32, bfloat16 and float16, else the
reference.

Decides by dtype and allocates outputs; csrc/bindings reads the tensors, copies layouts that the kernels cannot follow,
and checks shapes. Shapes: T rows, A slots, G groups, H model width, I hidden width.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncore import activations
from dyncore.backends import reference, torch_matmul
from dyncore.break_even import torch_is_faster

INTERFACE = 1  # of dyncore._C, as csrc/bindings/module.cpp has it
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class _Codes(dict[str, int]):
    """enum Activation of csrc/cpu/kernels.h by name, in its order."""

    def __missing__(self, name: str) -> int:
        raise ValueError(f"activation: expected one of {', '.join(self)}, got {name!r}")


_ELEMENTWISE = _Codes({name: code for code, name in enumerate(("none", *activations.ELEMENTWISE))})
ACTIVATION_CODES = _Codes({name: code for code, name in enumerate((*_ELEMENTWISE, *activations.GATED))})


def _share_openmp() -> None:
    """Make PyTorch's OpenMP runtime visible to the extension, which names none, so that no second one is loaded."""
    if not sys.platform.startswith("linux") or hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if re.match("lib[gi]?omp", line.rpartition("/")[2])}
    for path in [*sorted(files), "libgomp.so.1"]:
        if hasattr(ctypes.CDLL(path, ctypes.RTLD_GLOBAL), "GOMP_parallel"):
            return


def _load() -> tuple[Any, str]:
    """The extension, or None and the reason."""
    try:
        _share_openmp()
        native = importlib.import_module("dyncore._C")
    except (ImportError, OSError) as error:
        return None, f"dyncore._C cannot be imported: {error}"
    built = getattr(native, "interface", 0)
    if built != INTERFACE:
        why = f"dyncore._C was built from other sources (interface {built}, expected {INTERFACE})"
        return None, f"{why}: rebuild it with pip install -e ."
    native.select_isa(os.environ.get("DYNCORE_CPU_ISA", ""))
    return native, ""


native: Any
reason: str
native, reason = _load()
available: bool = native is not None


def isa() -> str:
    """The instruction set that the kernels run with; "none" where the reference serves."""
    return native.selected_isa() if available else "none"


threads: Callable[[], int] = torch.get_num_threads  # how many a kernel may use


def serves(x: Tensor) -> bool:
    """Whether the kernels take tensors of x's dtype: float32, bfloat16 or float16."""
    return available and x.dtype in _DTYPES


def _scaled_gradient(dscale: Tensor | None, scale: Tensor | None, x: Tensor) -> Tensor:
    """The kernels' float32 gradient of scale in scale's dtype; empty where there is none."""
    if dscale is None:
        return (x if scale is None else scale).new_empty(0)
    assert scale is not None
    return dscale.to(scale.dtype)


def or_empty(t: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if t is None else t


# Plans ------------------------------------------------------------------------------------------------------------


def count_mask(mask: Tensor) -> int:
    """How many entries of a bool tensor are True."""
    return native.count_mask(mask) if available else int(mask.sum())


def count_route(expert: Tensor, num_groups: int) -> int:
    """How many entries of an integer tensor are not negative. Raises IndexError on one >= num_groups."""
    if not available or expert.dtype not in (torch.int32, torch.int64):
        if expert.numel() and int(expert.max()) >= num_groups:
            raise IndexError(f"expert: expected indices below num_groups={num_groups}, got {int(expert.max())}")
        return int((expert >= 0).sum())
    return native.count_route(expert, num_groups)


# 0.8 us; torch.empty with a dtype takes 1.0
new_int32: Callable[..., Tensor] = torch.empty(0, dtype=torch.int32, device="cpu").new_empty


def _new_plan(num_rows: int, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers of a plan being made: rows, offsets, row_offsets, row_slots."""
    return new_int32(capacity), new_int32(num_groups + 1), new_int32(num_rows + 1), new_int32(capacity)


def plan_inverse(rows: Tensor, offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    if not available:
        return reference.plan_inverse(rows, offsets, num_rows)
    row_offsets, row_slots = new_int32(num_rows + 1), new_int32(rows.shape[0])
    native.plan_inverse(rows, offsets, row_offsets, row_slots)
    return row_offsets, row_slots


def plan_mask(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not available:
        return reference.plan_mask(mask, capacity)
    plan = _new_plan(mask.shape[0], mask.shape[1] if mask.dim() == 2 else 1, capacity)
    native.plan_mask(mask, *plan, None)
    return plan


def plan_mask_sources(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not available:
        return reference.plan_mask_sources(mask, capacity)
    plan = _new_plan(mask.shape[0], mask.shape[1] if mask.dim() == 2 else 1, capacity)
    sources = new_int32(capacity)
    native.plan_mask(mask, *plan, sources)
    return *plan, sources


def plan_route(expert: Tensor, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not available or expert.dtype not in (torch.int32, torch.int64):
        return reference.plan_route(expert, num_groups, capacity)
    plan = _new_plan(expert.shape[0], num_groups, capacity)
    sources = new_int32(capacity)
    native.plan_route(expert, *plan, sources)
    return *plan, sources


def plan_route_topk(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, ...]:
    return reference.plan_route_topk(logits, k, normalize, plan_route)


def plan_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not available:
        return reference.plan_topk(scores, k)
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    batch, seq = scores.shape
    plan = _new_plan(batch * seq, 1, batch * k)
    native.plan_topk(scores, k, *plan)
    return plan


# Moving rows ------------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    if not available:
        return reference.gather_rows(x, rows, offsets)
    out = x.new_empty(rows.shape[0], x.shape[1])
    native.gather_rows(x, rows, offsets, out, threads())
    return out


def scatter_rows(
    y: Tensor,
    base: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
) -> Tensor:
    if not serves(y):
        return reference.scatter_rows(y, base, rows, offsets, scale, row_offsets, row_slots)
    out = y.new_empty(row_offsets.shape[0] - 1, y.shape[1])
    native.scatter_rows(y, base, rows, offsets, scale, row_offsets, row_slots, out, threads())
    return out


def scatter_rows_backward(
    grad: Tensor,
    y: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    if not serves(y):
        return reference.scatter_rows_backward(grad, y, rows, offsets, scale, row_offsets, row_slots, needs)
    dy = y.new_empty(y.shape) if needs[0] else None
    dscale = y.new_empty(y.shape[0], dtype=torch.float32) if needs[1] and scale is not None else None
    num_rows = row_offsets.shape[0] - 1
    native.scatter_rows_backward(grad, y, rows, offsets, scale, num_rows, dy, dscale, threads())
    return or_empty(dy, y), _scaled_gradient(dscale, scale, y)


# Grouped products -------------------------------------------------------------------------------------------------


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    plan = (rows, offsets, scale, row_offsets, row_slots)
    if not serves(x):
        return reference.grouped_linear(x, weight, bias, *plan, activation, gather, scatter, save)
    if torch_is_faster("grouped_linear", x.dtype, offsets, weight):
        return torch_matmul.grouped_linear(x, weight, bias, *plan, activation, gather, scatter, save)
    slots, n = rows.shape[0], weight.shape[1]
    out = x.new_empty(row_offsets.shape[0] - 1 if scatter else slots, n)
    pre = x.new_empty(slots, n) if save and activation != "none" else None
    form = (_ELEMENTWISE[activation], gather, scatter)
    native.grouped_linear(x, weight, bias, *plan, *form, out, pre, threads())
    return out, or_empty(pre, x)


def grouped_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = (rows, offsets, scale, row_offsets, row_slots)
    if not serves(x):
        return reference.grouped_linear_backward(grad, x, weight, bias, pre, *plan, activation, gather, scatter, needs)
    saved = None if activation == "none" else pre
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = x.new_empty(weight.shape) if needs[1] else None
    dbias = x.new_empty(bias.shape) if needs[2] and bias is not None else None
    want_scale = needs[3] and scatter and scale is not None
    dscale = x.new_empty(rows.shape[0], dtype=torch.float32) if want_scale else None
    form = (_ELEMENTWISE[activation], gather, scatter)
    outputs = (dx, dweight, dbias, dscale)
    native.grouped_linear_backward(grad, x, weight, bias, saved, *plan, *form, *outputs, threads())
    return or_empty(dx, x), or_empty(dweight, x), or_empty(dbias, x), _scaled_gradient(dscale, scale, x)


def grouped_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (x, w_in, w_out, b_in, b_out, residual, rows, offsets, scale, row_offsets, row_slots)
    if not serves(x):
        return reference.grouped_mlp(*inputs, activation, save)
    if torch_is_faster("grouped_mlp", x.dtype, offsets, w_in, w_out):
        return torch_matmul.grouped_mlp(*inputs, activation, save)
    out = x.new_empty(row_offsets.shape[0] - 1, w_out.shape[1])
    pre = x.new_empty(rows.shape[0], w_in.shape[1]) if save else None
    native.grouped_mlp(*inputs, ACTIVATION_CODES[activation], None, None, out, pre, threads())
    return out, or_empty(pre, x)


def panels_shape(weight: Tensor, parts: int) -> tuple[int, ...]:
    """The shape of a weight's panels (csrc/cpu/kernels.h, PackWeight) in float32; (0,) where kernels take none."""
    if not serves(weight):
        return (0,)
    groups, n, k = weight.shape
    if parts < 1:
        raise ValueError(f"parts: expected 1, or 2 for a gated weight, got {parts}")
    pairs = weight.dtype is torch.bfloat16 and native.pairs()
    return groups, parts, (n // parts + 31) // 32, (k + 1) // 2 if pairs else k, 32


def pack_weight(weight: Tensor, parts: int) -> Tensor:
    panels = weight.new_empty(panels_shape(weight, parts), dtype=torch.float32)
    if serves(weight):
        native.pack_weight(weight, parts, panels, threads())
    return panels


def grouped_mlp_packed(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    in_panels: Tensor,
    out_panels: Tensor,
    packed_isa: str,
) -> Tensor:
    inputs = (x, w_in, w_out, b_in, b_out, residual, rows, offsets, scale, row_offsets, row_slots)
    if not serves(x):
        return reference.grouped_mlp(*inputs, activation, False)[0]
    if packed_isa != isa():
        raise ValueError(f"panels: expected ones packed for the instruction set {isa()}, got {packed_isa}")
    if torch_is_faster("grouped_mlp", x.dtype, offsets, w_in, w_out):
        return torch_matmul.grouped_mlp(*inputs, activation, False)[0]
    out = x.new_empty(row_offsets.shape[0] - 1, w_out.shape[1])
    native.grouped_mlp(*inputs, ACTIVATION_CODES[activation], in_panels, out_panels, out, None, threads())
    return out


def grouped_mlp_fits(
    x: object,
    w_in: object,
    w_out: object,
    b_in: object,
    b_out: object,
    residual: object,
    rows: Tensor,
    offsets: Tensor,
    num_rows: int,
    gated: bool,
) -> bool:
    """Whether these are CPU tensors of one dtype that has kernels, in the shapes that dyncore.grouped_mlp asks."""
    return available and native.grouped_mlp_fits(x, w_in, w_out, b_in, b_out, residual, rows, offsets, num_rows, gated)


def grouped_mlp_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = (rows, offsets, scale, row_offsets, row_slots)
    if not serves(x):
        return reference.grouped_mlp_backward(grad, x, w_in, w_out, b_in, b_out, pre, *plan, activation, needs)
    dx = x.new_empty(x.shape) if needs[0] else None
    dw_in = x.new_empty(w_in.shape) if needs[1] else None
    dw_out = x.new_empty(w_out.shape) if needs[2] else None
    db_in = x.new_empty(w_in.shape[:2]) if needs[3] and b_in is not None else None
    db_out = x.new_empty(w_out.shape[:2]) if needs[4] and b_out is not None else None
    dscale = x.new_empty(rows.shape[0], dtype=torch.float32) if needs[5] and scale is not None else None
    outputs = (dx, dw_in, dw_out, db_in, db_out)
    native.grouped_mlp_backward(
        grad, x, w_in, w_out, b_out, pre, *plan, ACTIVATION_CODES[activation], False, *outputs, dscale, threads()
    )
    gradients = [or_empty(g, x) for g in outputs]
    return gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], _scaled_gradient(dscale, scale, x)


# Trees ------------------------------------------------------------------------------------------------------------


def tree_route(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not serves(x):
        return reference.tree_route(x, weight, bias)
    leaves = new_int32(x.shape[0])
    native.tree_route(x, weight, bias, leaves, threads())
    return leaves
