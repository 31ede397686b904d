"""FLOP formulas: what the ops' formulas share. 2 per multiply-add, matrix products of live slots only."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def holds_no_data(t: Tensor) -> bool:
    """Whether a formula can read no numbers, and gives the static bound."""
    return isinstance(t, FakeTensor) or t.device.type == "meta"


def live_slots(rows: Tensor, offsets: Tensor) -> int:
    """The number of live slots; the static bound where tensors hold no data. Waits for the device."""
    if holds_no_data(offsets):
        return rows.shape[0]
    return int(offsets[-1])
