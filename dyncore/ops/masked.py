"""What the "masked" execution of the ops shares: the plan as a dense selection and dense weights.

Masked execution computes every row with every group and multiplies by 0 or 1. Rows not selected are zeroed before
they are computed, so that a NaN in them reaches neither a value nor a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore.backends import cpu
from dyncore.backends.reference import check_plan
from dyncore.break_even import NEVER, masked_from
from dyncore.break_even import dense_from as dense_break_even
from dyncore.execution import mode
from dyncore.plan import Plan


def compute_masked(plan: Plan, op: str, *weights: Tensor) -> bool:
    """Whether the grouped product `op` on `plan` computes everything, in the execution mode in force."""
    name = mode()
    if name != "auto" or not plan.exact:  # not exact: the host does not know how many slots are live
        return name == "masked"
    rows = plan.rows
    device = "cpu" if rows.is_cpu else rows.device.type  # the latter takes 0.3 us
    share = masked_from(device, op, plan.num_rows, weights)
    return share != NEVER and rows.shape[0] >= share * (plan.num_rows * plan.num_groups)


def dense_from(op: str, x: Tensor, *weights: Tensor) -> float | None:
    """The density of non-zeros from which `op` on rows `x` makes dense products, in the execution mode in force.

    inf: it always skips. None: no kernel skips here, or none shall: plain PyTorch computes everything.
    """
    name = mode()
    if name == "sparse":
        return NEVER
    if name == "masked":
        return None
    if x.is_cpu and not cpu.available:
        return None
    device = "cpu" if x.is_cpu else x.device.type  # the latter takes 0.3 us
    return dense_break_even(device, op, x.shape[0], weights)


def selection(plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(bool [T, G]: which pairs have a slot; [T, G]: the sum of their scales, 1 for each slot if there are none).

    Sums are made in the dtype that products of `dtype` are summed in.
    """
    if not torch.compiler.is_compiling():
        check_plan(plan.rows, plan.offsets, plan.num_rows)
    pairs = plan.num_rows * plan.num_groups
    groups = plan.groups()
    index = torch.where(
        groups < plan.num_groups, plan.rows.long() * plan.num_groups + groups, pairs
    )  # padding: one past
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    values = index.new_ones(index.shape, dtype=dtype) if plan.scale is None else plan.scale.to(dtype)
    counts = torch.zeros(pairs + 1, dtype=torch.int32, device=index.device)
    counts = counts.index_add(0, index, torch.ones_like(index, dtype=torch.int32))
    weights = torch.zeros(pairs + 1, dtype=dtype, device=index.device).index_add(0, index, values)
    shape = (plan.num_rows, plan.num_groups)
    return counts[:-1].view(shape) > 0, weights[:-1].view(shape)


def only(selected: Tensor, x: Tensor) -> Tensor:
    """`x` [T, D] with 0 in the rows that bool [T] does not select."""
    return torch.where(selected[:, None], x, 0)


def weighted(selected: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """weight [T] times y [T, D] in the dtype sums are made in; exactly 0 where not selected."""
    wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    return torch.where(selected[:, None], wide * weight[:, None].to(wide.dtype), 0)
