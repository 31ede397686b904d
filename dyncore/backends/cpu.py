"""The cpu backend: the ops in C++ (csrc/cpu, bound as dyncore._C) for float32, bfloat16 and float16, else the
reference.

Decides by dtype, makes strides fit the kernels (contiguous last dimensions; weights in either layout), allocates
outputs and passes addresses. Shapes: T rows, A slots, G groups, H model width, I hidden width.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import sys
from typing import Any

import torch
from torch import Tensor

from dyncore.activations import GATED
from dyncore.backends import reference

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the values of enum Dtype in csrc/cpu/kernels.h
# The order of enum Activation in csrc/cpu/kernels.h.
_ACTIVATIONS = {
    name: i for i, name in enumerate(("none", "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "reglu"))
}
_ABSENT = (0, 0)


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
    native.select_isa(os.environ.get("DYNCORE_CPU_ISA", ""))
    return native, ""


_native, reason = _load()
available = _native is not None


def isa() -> str:
    """The instruction set that the kernels run with; "none" where the reference serves."""
    return _native.selected_isa() if available else "none"


def threads() -> int:
    """How many threads a kernel may use."""
    return torch.get_num_threads()


# What the kernels are told of a tensor ----------------------------------------------------------------------------


def _serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take tensors of these dtypes: all alike, float32, bfloat16 or float16."""
    return available and x.dtype in _DTYPES and all(t is None or t.dtype == x.dtype for t in others)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows_of(t: Tensor) -> Tensor:
    """`t` [rows, columns] with neighbouring columns side by side; copied only where they are not."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _matrix(t: Tensor | None) -> tuple[int, int]:
    return _ABSENT if t is None else (t.data_ptr(), t.stride(0))


def _weight_of(w: Tensor) -> Tensor:
    """`w` [G, N, K] with N or K side by side."""
    if 1 in (w.stride(1), w.stride(2)) or 1 in w.shape[1:]:
        return w
    return w.contiguous()


def _weight(w: Tensor) -> tuple[int, int, int, int]:
    stride_n = 1 if w.shape[1] == 1 else w.stride(1)
    stride_k = 1 if w.shape[2] == 1 else w.stride(2)
    return w.data_ptr(), w.stride(0), stride_n, stride_k


def _int32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.int32 and t.is_contiguous() else t.int().contiguous()


class _Plan:
    """A plan's tensors as the kernels take them; keeps the converted ones alive."""

    def __init__(
        self,
        rows: Tensor,
        offsets: Tensor,
        scale: Tensor | None,
        row_offsets: Tensor | None,
        row_slots: Tensor | None,
        num_rows: int,
    ):
        capacity = rows.shape[0]
        if scale is not None and scale.shape[0] != capacity:
            raise ValueError(f"plan.scale: expected {capacity} entries, one a slot, got {scale.shape[0]}")
        if row_slots is not None and row_slots.shape[0] != capacity:
            raise ValueError(f"plan.row_slots: expected {capacity} entries, one a slot, got {row_slots.shape[0]}")
        if scale is not None and (scale.dtype != torch.float32 or not scale.is_contiguous()):
            scale = scale.float().contiguous()
        self.rows, self.offsets, self.scale = _int32(rows), _int32(offsets), scale
        self.row_offsets = None if row_offsets is None else _int32(row_offsets)
        self.row_slots = None if row_slots is None else _int32(row_slots)
        self.num_rows = num_rows
        self.tuple = (
            self.rows.data_ptr(),
            self.offsets.data_ptr(),
            _address(scale),
            _address(self.row_offsets),
            _address(self.row_slots),
            capacity,
            offsets.shape[0] - 1,
            num_rows,
        )

    def expect_rows(self, **tensors: Tensor | None) -> None:
        self._expect(self.num_rows, "rows", tensors)

    def expect_slots(self, **tensors: Tensor | None) -> None:
        self._expect(self.rows.shape[0], "slots", tensors)

    @staticmethod
    def _expect(size: int, what: str, tensors: dict[str, Tensor | None]) -> None:
        for name, t in tensors.items():
            if t is not None and t.shape[0] != size:
                raise ValueError(f"{name}: expected {size} {what}, got {t.shape[0]}")


def _scaled_gradient(dscale: Tensor | None, scale: Tensor | None, x: Tensor) -> Tensor:
    """The kernels' float32 gradient of scale in scale's dtype; empty where there is none."""
    if dscale is None:
        return (x if scale is None else scale).new_empty(0)
    assert scale is not None
    return dscale.to(scale.dtype)


def _or_empty(t: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if t is None else t


# Plans ------------------------------------------------------------------------------------------------------------


def count_mask(mask: Tensor) -> int:
    """How many entries of a bool tensor are True."""
    if not available:
        return int(mask.sum())
    mask = mask.contiguous()
    return _native.count_mask(mask.data_ptr(), mask.numel())


def count_route(expert: Tensor, num_groups: int) -> int:
    """How many entries of an integer tensor are not negative. Raises IndexError on one >= num_groups."""
    if not available or expert.dtype not in (torch.int32, torch.int64):
        if expert.numel() and int(expert.max()) >= num_groups:
            raise IndexError(f"expert: expected indices below num_groups={num_groups}, got {int(expert.max())}")
        return int((expert >= 0).sum())
    expert = expert.contiguous()
    return _native.count_route(expert.data_ptr(), expert.dtype == torch.int64, expert.numel(), num_groups)


class _NewPlan:
    """Buffers of a plan being made."""

    def __init__(self, like: Tensor, num_rows: int, num_groups: int, capacity: int):
        self.rows, self.offsets, self.row_offsets, self.row_slots = self.tensors = tuple(
            like.new_empty(size, dtype=torch.int32) for size in (capacity, num_groups + 1, num_rows + 1, capacity)
        )
        self.tuple = (*(t.data_ptr() for t in self.tensors), capacity, num_groups, num_rows)


def plan_inverse(rows: Tensor, offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    if not available:
        return reference.plan_inverse(rows, offsets, num_rows)
    rows, offsets = _int32(rows), _int32(offsets)
    row_offsets, row_slots = rows.new_empty(num_rows + 1), rows.new_empty(rows.shape[0])
    pointers = (t.data_ptr() for t in (rows, offsets, row_offsets, row_slots))
    _native.plan_inverse((*pointers, rows.shape[0], offsets.shape[0] - 1, num_rows))
    return row_offsets, row_slots


def plan_mask(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not available:
        return reference.plan_mask(mask, capacity)
    mask = mask.contiguous()
    plan = _NewPlan(mask, mask.shape[0], mask.shape[1], capacity)
    _native.plan_mask(mask.data_ptr(), plan.tuple)
    return plan.rows, plan.offsets, plan.row_offsets, plan.row_slots


def plan_route(expert: Tensor, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not available or expert.dtype not in (torch.int32, torch.int64):
        return reference.plan_route(expert, num_groups, capacity)
    expert = expert.contiguous()
    plan = _NewPlan(expert, expert.shape[0], num_groups, capacity)
    sources = expert.new_empty(capacity, dtype=torch.int32)
    wide = expert.dtype == torch.int64
    _native.plan_route(expert.data_ptr(), wide, expert.shape[1], sources.data_ptr(), plan.tuple)
    return plan.rows, plan.offsets, plan.row_offsets, plan.row_slots, sources


def plan_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not available:
        return reference.plan_topk(scores, k)
    batch, seq = scores.shape
    wide = scores.dtype == torch.float64
    scores = (scores if wide else scores.float()).contiguous()
    plan = _NewPlan(scores, batch * seq, 1, batch * k)
    _native.plan_topk(scores.data_ptr(), wide, batch, seq, k, plan.tuple)
    return plan.rows, plan.offsets, plan.row_offsets, plan.row_slots


# Moving rows ------------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    if not available:
        return reference.gather_rows(x, rows, offsets)
    x = _rows_of(x)
    plan = _Plan(rows, offsets, None, None, None, x.shape[0])
    out = x.new_empty(rows.shape[0], x.shape[1])
    _native.gather_rows(plan.tuple, _matrix(x), out.data_ptr(), x.shape[1], x.element_size(), threads())
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
    if not _serves(y, base):
        return reference.scatter_rows(y, base, rows, offsets, scale, row_offsets, row_slots)
    y, base = _rows_of(y), None if base is None else _rows_of(base)
    plan = _Plan(rows, offsets, scale, row_offsets, row_slots, row_offsets.shape[0] - 1)
    plan.expect_slots(y=y)
    plan.expect_rows(base=base)
    width = y.shape[1]
    out = y.new_empty(plan.num_rows, width)
    _native.scatter_rows(plan.tuple, _DTYPES[y.dtype], _matrix(y), _matrix(base), out.data_ptr(), width, threads())
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
    if not _serves(grad, y):
        return reference.scatter_rows_backward(grad, y, rows, offsets, scale, row_offsets, row_slots, needs)
    grad, y = _rows_of(grad), _rows_of(y)
    plan = _Plan(rows, offsets, scale, None, None, row_offsets.shape[0] - 1)
    plan.expect_slots(y=y)
    plan.expect_rows(grad=grad)
    dy = y.new_empty(y.shape) if needs[0] else None
    dscale = y.new_empty(y.shape[0], dtype=torch.float32) if needs[1] and scale is not None else None
    _native.scatter_rows_backward(
        plan.tuple,
        _DTYPES[y.dtype],
        _matrix(grad),
        _matrix(y),
        _address(dy),
        _address(dscale),
        y.shape[1],
        threads(),
    )
    return _or_empty(dy, y), _scaled_gradient(dscale, scale, y)


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
    if not _serves(x, weight, bias):
        return reference.grouped_linear(
            x, weight, bias, rows, offsets, scale, row_offsets, row_slots, activation, gather, scatter, save
        )
    x, weight, bias = _rows_of(x), _weight_of(weight), None if bias is None else _rows_of(bias)
    plan = _Plan(rows, offsets, scale, row_offsets, row_slots, row_offsets.shape[0] - 1)
    (plan.expect_rows if gather else plan.expect_slots)(x=x)
    _, n, k = weight.shape
    out = x.new_empty(plan.num_rows if scatter else rows.shape[0], n)
    pre = x.new_empty(rows.shape[0], n) if save and activation != "none" else None
    _native.grouped_linear(
        plan.tuple,
        _DTYPES[x.dtype],
        _ACTIVATIONS[activation],
        gather,
        scatter,
        n,
        k,
        _matrix(x),
        _weight(weight),
        _matrix(bias),
        out.data_ptr(),
        _address(pre),
        threads(),
    )
    return out, _or_empty(pre, x)


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
    if not _serves(grad, x, weight, bias):
        return reference.grouped_linear_backward(
            grad, x, weight, bias, pre, rows, offsets, scale, row_offsets, row_slots, activation, gather, scatter, needs
        )
    grad, x, weight = _rows_of(grad), _rows_of(x), _weight_of(weight)
    bias = None if bias is None else _rows_of(bias)
    saved = None if activation == "none" else _rows_of(pre)
    plan = _Plan(rows, offsets, scale, row_offsets, row_slots, row_offsets.shape[0] - 1)
    (plan.expect_rows if gather else plan.expect_slots)(x=x)
    (plan.expect_rows if scatter else plan.expect_slots)(grad=grad)
    plan.expect_slots(pre=saved)
    _, n, k = weight.shape
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = x.new_empty(weight.shape) if needs[1] else None
    dbias = x.new_empty(bias.shape) if needs[2] and bias is not None else None
    want_scale = needs[3] and scatter and scale is not None
    dscale = x.new_empty(rows.shape[0], dtype=torch.float32) if want_scale else None
    _native.grouped_linear_backward(
        plan.tuple,
        _DTYPES[x.dtype],
        _ACTIVATIONS[activation],
        gather,
        scatter,
        n,
        k,
        _matrix(grad),
        _matrix(x),
        _weight(weight),
        _matrix(bias),
        _matrix(saved),
        _address(dx),
        _address(dweight),
        _address(dbias),
        _address(dscale),
        threads(),
    )
    return _or_empty(dx, x), _or_empty(dweight, x), _or_empty(dbias, x), _scaled_gradient(dscale, scale, x)


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
    if not _serves(x, w_in, w_out, b_in, b_out, residual):
        return reference.grouped_mlp(
            x, w_in, w_out, b_in, b_out, residual, rows, offsets, scale, row_offsets, row_slots, activation, save
        )
    x, w_in, w_out = _rows_of(x), _weight_of(w_in), _weight_of(w_out)
    b_in, b_out, residual = (None if t is None else _rows_of(t) for t in (b_in, b_out, residual))
    plan = _Plan(rows, offsets, scale, row_offsets, row_slots, row_offsets.shape[0] - 1)
    plan.expect_rows(x=x, residual=residual)
    _, h, i = w_out.shape
    out = x.new_empty(plan.num_rows, h)
    pre = x.new_empty(rows.shape[0], w_in.shape[1]) if save else None
    _native.grouped_mlp(
        plan.tuple,
        _DTYPES[x.dtype],
        _ACTIVATIONS[activation],
        h,
        i,
        _matrix(x),
        _weight(w_in),
        _weight(w_out),
        _matrix(b_in),
        _matrix(b_out),
        _matrix(residual),
        out.data_ptr(),
        _address(pre),
        threads(),
    )
    return out, _or_empty(pre, x)


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
    if not _serves(grad, x, w_in, w_out, b_out, pre):
        return reference.grouped_mlp_backward(
            grad, x, w_in, w_out, b_in, b_out, pre, rows, offsets, scale, row_offsets, row_slots, activation, needs
        )
    grad, x, pre, w_in, w_out = _rows_of(grad), _rows_of(x), _rows_of(pre), _weight_of(w_in), _weight_of(w_out)
    b_out = None if b_out is None else _rows_of(b_out)
    plan = _Plan(rows, offsets, scale, row_offsets, row_slots, row_offsets.shape[0] - 1)
    plan.expect_rows(grad=grad, x=x)
    plan.expect_slots(pre=pre)
    groups, h, i = w_out.shape
    width = 2 * i if activation in GATED else i
    dx = x.new_empty(x.shape) if needs[0] else None
    dw_in = x.new_empty(w_in.shape) if needs[1] else None
    dw_out = x.new_empty(w_out.shape) if needs[2] else None
    db_in = x.new_empty(groups, width) if needs[3] and b_in is not None else None
    db_out = x.new_empty(groups, h) if needs[4] and b_out is not None else None
    dscale = x.new_empty(rows.shape[0], dtype=torch.float32) if needs[5] and scale is not None else None
    _native.grouped_mlp_backward(
        plan.tuple,
        _DTYPES[x.dtype],
        _ACTIVATIONS[activation],
        h,
        i,
        _matrix(grad),
        _matrix(x),
        _weight(w_in),
        _weight(w_out),
        _matrix(b_out),
        _matrix(pre),
        _address(dx),
        _address(dw_in),
        _address(dw_out),
        _address(db_in),
        _address(db_out),
        _address(dscale),
        threads(),
    )
    gradients = [_or_empty(g, x) for g in (dx, dw_in, dw_out, db_in, db_out)]
    return gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], _scaled_gradient(dscale, scale, x)
