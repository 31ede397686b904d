"""What a router over several modules says: which of them each row goes to, and how much each counts. Floor 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyncore.nn.inputs import expect_input
from dyncore.plan import is_eager_cpu


class Choices(NamedTuple):
    """The decision of a router over G modules.

    Attributes:
        mask: bool [..., G], leading dimensions of x and the modules: a row goes to those that are True.
        weight: float [..., G] or None: multiplies what a module gives a row. Its value where the mask is False is not
            used; its gradient there carries the cost, as that of a gate's scale does.
    """

    mask: Tensor
    weight: Tensor | None = None


Routing = Callable[[Tensor], Any]  # a router: see `choose`


def _from_index(index: Tensor, weight: Tensor | None, num_groups: int, name: str) -> Choices:
    """Choices of one module a row: index integer [...], negative for none, and what it counts, float [...] or None.

    Raises IndexError on an index >= num_groups (where the data lies on the host).
    """
    if is_eager_cpu(index) and index.numel() and int(index.max()) >= num_groups:
        raise IndexError(f"{name}: expected indices below {num_groups} (the number of modules), got {int(index.max())}")
    groups = torch.arange(num_groups, device=index.device)
    mask = index[..., None] == groups
    return Choices(mask, None if weight is None else weight[..., None].expand(mask.shape))


def choose(router: Routing, x: Tensor, num_groups: int, name: str = "router") -> Choices:
    """The router's decision on `x`, checked; `name` is what errors call it.

    A router maps x [..., D] to one of
        bool mask [..., G]; (mask, weight [..., G]); Choices: any number of modules a row;
        integer index [...]; (index, weight [...]): one module a row, none where the index is negative;
        float weight [..., G]: the modules whose weight is not exactly 0.

    Raises TypeError on anything else, ValueError on shapes that do not fit x and G, IndexError on an index >= G.
    """
    expect_input(x)
    result = router(x)
    parts = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    first, weight = parts
    if not isinstance(first, Tensor) or not (weight is None or isinstance(weight, Tensor)):
        got = ", ".join(type(part).__name__ for part in (parts if weight is not None else (first,)))
        raise TypeError(f"{name}: expected a bool mask, an integer index or float weights, or a pair, got {got}")
    if weight is not None and not weight.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a weight of a floating dtype, got {weight.dtype}")
    if first.dtype.is_complex or (first.dtype.is_floating_point and weight is not None):
        raise TypeError(f"{name}: expected a bool mask or an integer index beside a weight, got {first.dtype}")
    per_group = first.dtype == torch.bool or first.dtype.is_floating_point
    lead = first.shape[:-1] if per_group else first.shape
    fits = 1 <= len(lead) < x.dim() and x.shape[: len(lead)] == lead
    if not fits or (per_group and first.shape[-1] != num_groups):
        wanted = f"[..., {num_groups}]" if per_group else "[...]"
        raise ValueError(
            f"{name}: expected shape {wanted} with leading dimensions of x {list(x.shape)}, got {list(first.shape)}"
        )
    if weight is not None and weight.shape != first.shape:
        raise ValueError(f"{name}: expected a weight of shape {list(first.shape)}, got {list(weight.shape)}")
    if first.dtype == torch.bool:
        return Choices(first, weight)
    return Choices(first != 0, first) if per_group else _from_index(first, weight, num_groups, name)


def share(mask: Tensor, weight: Tensor | None, costs: Sequence[float]) -> Tensor:
    """Cost of each row as a share of all modules, float [...]: those of `mask` [..., G], at G costs of sum 1, with the
    gradient of `weight` where there is one."""
    taken = mask.to(torch.float32 if weight is None else weight.dtype)
    if weight is not None:
        taken = taken + torch.where(weight.isfinite(), weight - weight.detach(), 0)
    if len(set(costs)) == 1:
        return taken.mean(-1)
    return (taken * torch.tensor(costs, dtype=taken.dtype, device=mask.device)).sum(-1)


def shares(costs: Iterable[float] | None, count: int) -> tuple[float, ...]:
    """`costs` of `count` modules (None: equal) as shares of their sum. Raises ValueError."""
    values = [1.0] * count if costs is None else [float(cost) for cost in costs]
    if len(values) != count:
        raise ValueError(f"costs: expected {count} of them, one a module, got {len(values)}")
    if min(values) < 0 or not 0 < sum(values) < float("inf"):
        raise ValueError(f"costs: expected numbers >= 0 with a positive sum, got {values}")
    return tuple(value / sum(values) for value in values)
