"""FLOP formulas: what the ops' formulas share. 2 per multiply-add, matrix products of live slots only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop


def live_slots(rows: Tensor, offsets: Tensor) -> int:
    """The number of live slots; the static bound where tensors hold no data. Waits for the device."""
    if isinstance(offsets, FakeTensor) or offsets.device.type == "meta":
        return rows.shape[0]
    return int(offsets[-1])


# torch counts its accelerators' fused attention but not its CPU one, whose arguments come in the same order.
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
if _attention not in flop_registry:
    register_flop_formula(_attention, get_raw=True)(sdpa_flop)
if _attention_backward not in flop_registry:
    register_flop_formula(_attention_backward, get_raw=True)(sdpa_backward_flop)
