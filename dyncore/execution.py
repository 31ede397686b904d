"""Execution modes: whether an op skips, computes everything and masks, or takes the faster of the two.

The mode lives in a threading.local attribute, which torch.compile guards on (it cannot guard on a ContextVar).
"""

from __future__ import annotations

import threading
from types import TracebackType

MODES = ("sparse", "masked", "auto")

# From this density of slots on, "auto" computes everything: the fused kernels and a dense product meet about here
# (benchmarks/bench_grouped_mlp.py, keep ratios .75 to 1).
BREAK_EVEN = 0.97


class _State(threading.local):
    mode = "auto"


_state = _State()


def mode() -> str:
    """The execution mode in force in this thread: "sparse", "masked" or "auto"."""
    return _state.mode


class execution:
    """Context manager that sets the execution mode of ops and layers in this thread.

    - "sparse": true skipping, always.
    - "masked": compute everything and multiply by 0 or 1, as most research code does: ground truth and baseline.
    - "auto" (default): whichever is faster by a measured break-even, from facts known on the host.

    Values and gradients are the same in each mode. Raises ValueError on any other name.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self._previous: list[str] = []

    def __enter__(self) -> execution:
        self._previous.append(_state.mode)
        _state.mode = self.mode
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.mode = self._previous.pop()


def use_masked(slots: int | None, dense_slots: int) -> bool:
    """Whether to compute everything: `slots` of `dense_slots` pairs (row, group) are live, None if not known."""
    if _state.mode == "auto":
        return slots is not None and slots >= BREAK_EVEN * dense_slots
    return _state.mode == "masked"
