"""The cuda backend: making plans and moving rows in CUDA C++ (csrc/cuda, bound as dyncore._C.cuda); what it does not
take goes to Triton's kernel of that name, else to the reference. Floor 1.

Decides by device, dtype and size and allocates outputs and workspaces, of static sizes; csrc/bindings checks shapes and
runs on the tensors' device and its current stream. Nothing here waits for the device, but the checks under
DYNCORE_CHECK=1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncore.backends import cpu, reference, triton

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_INT32 = 2**31 - 1

native: Any = getattr(cpu.native, "cuda", None)

available: bool  # whether kernels can be launched on the first device
reason: str  # why not, or what they run on


@functools.cache
def _unusable(device: int) -> str:
    """Why kernels cannot run on this device; "" where they can."""
    if not cpu.available:
        return cpu.reason
    if native is None:
        return "dyncore was built without CUDA kernels (DYNCORE_CUDA=1 builds them where nvcc is)"
    return native.unusable(device)


@functools.cache
def _probe() -> tuple[bool, str]:
    why = _unusable(0) if native is None or torch.cuda.is_available() else "PyTorch finds no CUDA device"
    return not why, why or f"{torch.cuda.get_device_name(0)}"


def __getattr__(name: str) -> bool | str:
    if name in ("available", "reason"):
        return _probe()[name == "reason"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def elsewhere(name: str) -> Callable[..., Any]:
    """The op where this backend does not have it."""
    return getattr(triton, name, None) or getattr(reference, name)


def _serves(x: Tensor) -> bool:
    """Whether kernels run on x's device."""
    return x.is_cuda and not _unusable(x.device.index)


# Plans ------------------------------------------------------------------------------------------------------------


def _new_int32(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.int32)


def _new_plan(like: Tensor, num_rows: int, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers of a plan being made: rows, offsets, row_offsets, row_slots."""
    sizes = (capacity, num_groups + 1, num_rows + 1, capacity)
    rows, offsets, row_offsets, row_slots = (_new_int32(like, size) for size in sizes)
    return rows, offsets, row_offsets, row_slots


def plan_inverse(rows: Tensor, offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    if not _serves(rows):
        return elsewhere("plan_inverse")(rows, offsets, num_rows)
    reference.check_plan(rows, offsets, num_rows)
    row_offsets, row_slots = _new_int32(rows, num_rows + 1), _new_int32(rows, rows.shape[0])
    workspace = _new_int32(rows, native.plan_inverse_workspace(rows.shape[0]))
    native.plan_inverse(rows, offsets, row_offsets, row_slots, workspace)
    return row_offsets, row_slots


def plan_mask(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_groups = mask.shape if mask.dim() == 2 else (mask.shape[0], 1)
    if not _serves(mask) or num_groups > native.MOST_GROUPS:
        return elsewhere("plan_mask")(mask, capacity)
    reference.check_capacity(mask, capacity)
    plan = _new_plan(mask, num_rows, num_groups, capacity)
    native.plan_mask(mask, *plan, None, _new_int32(mask, native.plan_mask_workspace(num_rows, num_groups)))
    return plan


def plan_mask_sources(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_groups = mask.shape if mask.dim() == 2 else (mask.shape[0], 1)
    if not _serves(mask) or num_groups > native.MOST_GROUPS:
        return elsewhere("plan_mask_sources")(mask, capacity)
    reference.check_capacity(mask, capacity)
    plan, sources = _new_plan(mask, num_rows, num_groups, capacity), _new_int32(mask, capacity)
    native.plan_mask(mask, *plan, sources, _new_int32(mask, native.plan_mask_workspace(num_rows, num_groups)))
    return *plan, sources


def plan_route(expert: Tensor, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, k = expert.shape
    if (
        not _serves(expert)
        or expert.dtype not in (torch.int32, torch.int64)
        or max(num_groups, k) > native.MOST_GROUPS
        or expert.numel() > _INT32
    ):
        return elsewhere("plan_route")(expert, num_groups, capacity)
    reference.check_experts(expert, num_groups)
    plan, sources = _new_plan(expert, num_rows, num_groups, capacity), _new_int32(expert, capacity)
    workspace = _new_int32(expert, native.plan_route_workspace(num_rows, k, num_groups))
    native.plan_route(expert, *plan, sources, workspace)
    return *plan, sources


def plan_route_topk(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, ...]:
    num_rows, num_groups = logits.shape
    if (
        not _serves(logits)
        or logits.dtype != torch.float32
        or num_groups > native.MOST_GROUPS
        or k > native.MOST_CHOSEN
    ):
        return reference.plan_route_topk(logits, k, normalize, plan_route)
    slots = num_rows * k
    plan, sources = _new_plan(logits, num_rows, num_groups, slots), _new_int32(logits, slots)
    scale, expert = logits.new_empty(slots), logits.new_empty(num_rows, k, dtype=torch.int32)
    workspace = _new_int32(logits, native.plan_route_topk_workspace(num_rows, k, num_groups))
    native.plan_route_topk(logits, k, normalize, *plan, sources, scale, expert, workspace)
    return *plan, sources, scale, expert


def plan_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _serves(scores) or scores.dtype not in _DTYPES:
        return elsewhere("plan_topk")(scores, k)
    batch, seq = scores.shape
    plan = _new_plan(scores, batch * seq, 1, batch * k)
    native.plan_topk(scores, k, *plan)
    return plan


# Moving rows ------------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    if not _serves(x):
        return elsewhere("gather_rows")(x, rows, offsets)
    reference.check_plan(rows, offsets, x.shape[0])
    out = x.new_empty(rows.shape[0], x.shape[1])
    native.gather_rows(x, rows, offsets, out)
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
    if not _serves(y) or y.dtype not in _DTYPES:
        return elsewhere("scatter_rows")(y, base, rows, offsets, scale, row_offsets, row_slots)
    num_rows = row_offsets.shape[0] - 1
    reference.check_plan(rows, offsets, num_rows)
    out = y.new_empty(num_rows, y.shape[1])
    native.scatter_rows(y, base, rows, offsets, scale, row_offsets, row_slots, out)
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
    if not _serves(y) or y.dtype not in _DTYPES:
        return elsewhere("scatter_rows_backward")(grad, y, rows, offsets, scale, row_offsets, row_slots, needs)
    num_rows = row_offsets.shape[0] - 1
    reference.check_plan(rows, offsets, num_rows)
    dy = y.new_empty(y.shape) if needs[0] else None
    dscale = y.new_empty(y.shape[0], dtype=torch.float32) if needs[1] and scale is not None else None
    native.scatter_rows_backward(grad, y, rows, offsets, scale, num_rows, dy, dscale)
    empty = y.new_empty(0)
    return (
        empty if dy is None else dy,
        empty if dscale is None or scale is None else dscale.to(scale.dtype),
    )
