"""Whether a grouped product is left to another executor than the op of its backend, by what the host knows."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore.backends import one_group
from dyncore.execution import mode
from dyncore.plan import Plan


def by_cublas(plan: Plan, x: Tensor, *weights: Tensor) -> bool:
    """Whether cuBLAS multiplies the rows of the plan's one group. An exported graph keeps the op, on any device."""
    if not x.is_cuda or not plan.exact or plan.num_groups != 1 or mode() != "auto" or torch.compiler.is_exporting():
        return False
    return one_group.use_cublas(x.dtype, plan.num_slots, *weights)
