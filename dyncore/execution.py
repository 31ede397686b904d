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
        self.wait = False


_state = _State()


def mode() -> str:
    """The execution mode in force in this thread: "sparse", "masked" or "auto"."""
    return _state.mode


def waits() -> bool:
    """Whether the host may wait for an accelerator to count what is live, in this thread."""
    return _state.wait


class execution:
    """Context manager that sets the execution mode of ops and layers in this thread.

    - "sparse": true skipping, always.
    - "masked": compute everything and multiply by 0 or 1, as most research code does: ground truth and baseline.
    - "auto" (default): whichever is faster by a measured break-even (dyncore.break_even), from facts known on the host.

    Values and gradients are the same in each mode.

    Args:
        mode: as above.
        wait: True: on an accelerator the host waits for each count of live rows, as it never does else, so that buffers
            have just those: a Skip's module, the stages of an EarlyExit or a Branch are then run on the live rows
            alone, where they would compute all. Worth it where what is skipped takes longer than the waiting; not
            possible in a CUDA graph, and without effect on a CPU and under torch.compile. None: as it was.

    Raises ValueError on any other mode, TypeError on a `wait` that is neither.

    Activation checkpointing runs a forward again in the backward, perhaps in another thread or after the block ended.
    `checkpoint(fn, x, use_reentrant=False, context_fn=dc.execution.context_fn)` runs it in the mode of the first.
    """

    def __init__(self, mode: str = "auto", *, wait: bool | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if wait is not None and not isinstance(wait, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"wait: expected a bool or None, got {type(wait).__name__}")
        self.mode = mode
        self.wait = wait
        self._previous: list[tuple[str, bool]] = []

    @staticmethod
    def context_fn() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """(context of the forward, context of the re-computation) for torch.utils.checkpoint: both in today's mode."""
        return nullcontext(), execution(_state.mode, wait=_state.wait)

    def __enter__(self) -> execution:
        self._previous.append((_state.mode, _state.wait))
        _state.mode = self.mode
        if self.wait is not None:
            _state.wait = self.wait
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.mode, _state.wait = self._previous.pop()
