"""flops: executed FLOPs of any callable, 2 per multiply-add. Matrix products alone count (no bias, activation, scale).

PyTorch's own counter does the counting; dyncore's ops have registered formulas that see the plan, so slots that were
not computed are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


def flops(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> int:
    """FLOPs executed by fn(*inputs, **kwargs), 2 per multiply-add, the backward pass included if `fn` runs one.

    Args:
        fn: a module or any other callable. It is called once, in the grad and execution mode of the caller.
        inputs, kwargs: what it is called with.

    An op without a formula counts as 0 (element-wise ops have none). Raises TypeError if `fn` cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a module or another callable, got {type(fn).__name__}")
    with FlopCounterMode(display=False) as counter:
        fn(*inputs, **kwargs)
    return counter.get_total_flops()
