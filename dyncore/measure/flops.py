"""flops: executed FLOPs of any callable, 2 per multiply-add. Matrix products alone count (no bias, activation, scale).

PyTorch's own counter does the counting; dyncore's ops have registered formulas that see the plan, so slots that were
not computed are not counted; torch's fused attention on a CPU, which torch itself counts as 0, is counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop


class _Raw:
    """A formula that takes tensors, as those that torch has registered do, marked so for FlopCounterMode."""

    _get_raw = True

    def __init__(self, formula: Callable[..., int]) -> None:
        self._formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        return self._formula(*args, **kwargs)


def _grouped_mm_flop(a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A matrix product of each group: groups are a dimension where both operands or one has three, or cut the
    dimension along which both are summed; every row of the ragged operand is taken for live."""
    *_, rows, depth = a_shape
    groups = a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1
    return 2 * groups * rows * depth * b_shape[-1]


# torch counts its accelerators' fused attention but not its CPU one, whose arguments come in the same order, nor the
# product of groups.
_UNCOUNTED = {
    torch.ops.aten._grouped_mm: _grouped_mm_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _Raw(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _Raw(sdpa_backward_flop),
}


def flops(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> int:
    """FLOPs executed by fn(*inputs, **kwargs), 2 per multiply-add, the backward pass included if `fn` runs one.

    Args:
        fn: a module or any other callable. It is called once, in the grad and execution mode of the caller.
        inputs, kwargs: what it is called with.

    An op without a formula counts as 0 (element-wise ops have none). What torch.compile compiled runs eagerly here (a
    graph shows a counter nothing), so that a mask's live rows count; compiled code gives a mask that nobody has counted
    (of a ThresholdGate, say) room for every row, and a Skip's or TokenSkip's own module runs on them all.

    Raises TypeError if `fn` cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a module or another callable, got {type(fn).__name__}")
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter,
        warnings.catch_warnings(),
    ):
        # the counter's own hooks, which do no harm there
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks", UserWarning)
        fn(*inputs, **kwargs)
    return counter.get_total_flops()
