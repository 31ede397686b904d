"""Execution modes: whether an op skips, computes everything and masks, or takes the faster of the two.

The mode lives in a threading.local attribute, which torch.compile guards on (it cannot guard on a ContextVar).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

MODES = ("sparse", "masked", "auto")


class _State(threading.local):
    def __init__(self) -> None:  # in each thread; Dynamo of torch 2.11 would always read a default of the class
        self.mode = "auto"


_state = _State()


def mode() -> str:
    """The execution mode in force in this thread: "sparse", "masked" or "auto"."""
    return _state.mode


class execution:
    """Context manager that sets the execution mode of ops and layers in this thread.

    - "sparse": true skipping, always.
    - "masked": compute everything and multiply by 0 or 1, as most research code does: ground truth and baseline.
    - "auto" (default): whichever is faster by a measured break-even (dyncore.break_even), from facts known on the host.

    Values and gradients are the same in each mode. Raises ValueError on any other name.

    Activation checkpointing runs a forward again in the backward, perhaps in another thread or after the block ended.
    `checkpoint(fn, x, use_reentrant=False, context_fn=dc.execution.context_fn)` runs it in the mode of the first.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self._previous: list[str] = []

    @staticmethod
    def context_fn() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """(context of the forward, context of the re-computation) for torch.utils.checkpoint: both in today's mode."""
        return nullcontext(), execution(_state.mode)

    def __enter__(self) -> execution:
        self._previous.append(_state.mode)
        _state.mode = self.mode
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.mode = self._previous.pop()
