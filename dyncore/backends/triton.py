"""The triton backend: the ops that have Triton kernels (dyncore.kernels); CUDA has the rest from the reference.
Floor 1. triton is imported at the first launch, so that `import dyncore` does without it.

With TRITON_INTERPRET=1 set before the first launch, the same functions run on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor

from dyncore import tilings
from dyncore.backends import reference

# dtypes the kernels take; they accumulate in float32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: bf16 tensor cores and asynchronous copies

available: bool  # whether kernels can be launched here
reason: str  # why not, or what they run on


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _probe() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if _interpreted():
        return True, "Triton's interpreter, on the CPU (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, "PyTorch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        return False, f"compute capability {capability[0]}.{capability[1]}, 8.0 or later is needed"
    return True, f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"


def __getattr__(name: str) -> bool | str:
    if name in ("available", "reason"):
        return _probe()[name == "reason"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _can_launch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel takes these tensors: one dtype of _DTYPES, on a device that Triton compiles for."""
    if x.dtype not in _DTYPES or any(t is not None and t.dtype != x.dtype for t in others) or not _probe()[0]:
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= _OLDEST
    return _interpreted()


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def gather_rows(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    if not _can_launch(x):
        return reference.gather_rows(x, rows, offsets)
    from dyncore.kernels import gather_rows as kernels

    reference.check_plan(rows, offsets, x.shape[0])
    with _on(x):
        return kernels.gather_rows(x, rows, offsets, target=_target(x))


def scatter_rows(
    y: Tensor,
    base: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
) -> Tensor:
    if not _can_launch(y, base):
        return reference.scatter_rows(y, base, rows, offsets, scale, row_offsets, row_slots)
    from dyncore.kernels import scatter_rows as kernels

    reference.check_plan(rows, offsets, row_offsets.shape[0] - 1)
    with _on(y):
        return kernels.scatter_rows(y, base, scale, row_offsets, row_slots)


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
    if not _can_launch(grad, y):
        return reference.scatter_rows_backward(grad, y, rows, offsets, scale, row_offsets, row_slots, needs)
    from dyncore.kernels import scatter_rows as kernels

    reference.check_plan(rows, offsets, row_offsets.shape[0] - 1)
    with _on(y):
        return kernels.scatter_rows_backward(grad, y, rows, offsets, scale, needs, target=_target(y))


def _target(x: Tensor):
    """The device of x as launchers want it; the interpreter plays an sm_80 of few multiprocessors."""
    from dyncore.kernels.common.configs import Target, architecture, device_facts

    if not x.is_cuda:
        return Target(architecture(_OLDEST), 2, False)
    index = x.device.index
    return Target(*device_facts(index), torch.backends.cuda.matmul.fp32_precision == "tf32", tilings.current(index))


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
    if not _can_launch(x, weight, bias):
        return reference.grouped_linear(x, weight, bias, *plan, activation, gather, scatter, save)
    from dyncore.kernels import grouped_linear as kernels

    reference.check_plan(rows, offsets, row_offsets.shape[0] - 1)
    with _on(x):
        return kernels.grouped_linear(x, weight, bias, *plan, activation, gather, scatter, save, target=_target(x))


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
    tensors = (x, w_in, w_out, b_in, b_out, residual)
    plan = (rows, offsets, scale, row_offsets, row_slots)
    if not _can_launch(*tensors):
        return reference.grouped_mlp(*tensors, *plan, activation, save)
    from dyncore.kernels import grouped_mlp as kernels

    reference.check_plan(rows, offsets, row_offsets.shape[0] - 1)
    with _on(x):
        return kernels.grouped_mlp(*tensors, *plan, activation, save, target=_target(x))


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
    tensors = (grad, x, weight, bias, pre)
    plan = (rows, offsets, scale, row_offsets, row_slots)
    if not _can_launch(*tensors):
        return reference.grouped_linear_backward(*tensors, *plan, activation, gather, scatter, needs)
    from dyncore.kernels import grouped_linear as kernels

    reference.check_plan(rows, offsets, row_offsets.shape[0] - 1)
    form = (activation, gather, scatter, needs)
    with _on(x):
        return kernels.grouped_linear_backward(*tensors, *plan, *form, target=_target(x))


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
    tensors = (grad, x, w_in, w_out, b_in, b_out, pre)
    plan = (rows, offsets, scale, row_offsets, row_slots)
    if not _can_launch(*tensors):
        return reference.grouped_mlp_backward(*tensors, *plan, activation, needs)
    from dyncore.kernels import grouped_mlp as kernels

    reference.check_plan(rows, offsets, row_offsets.shape[0] - 1)
    with _on(x):
        return kernels.grouped_mlp_backward(*tensors, *plan, activation, needs, target=_target(x))


def tree_route(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _can_launch(x, weight, bias):
        return reference.tree_route(x, weight, bias)
    from dyncore.kernels import tree_route as kernels

    with _on(x):
        return kernels.tree_route(x, weight, bias)
