"""Plan, the only routing data structure, and what makes one: select, select_topk, route, route_topk, route_mask.

A plan lists slots, pairs (row, group) to be computed, sorted by group. Nothing here waits for an accelerator: there
buffers have their static upper bound and the live count stays on the device. On a CPU, run eagerly, slots are counted
first and buffers are exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dyncore.backends import cpu
from dyncore.execution import waits
from dyncore.transforms import apply

_plan_inverse = torch.ops.dyncore.plan_inverse.default
_plan_mask = torch.ops.dyncore.plan_mask.default  # its _op is what its __call__ calls, 0.2 us later
_plan_mask_sources = torch.ops.dyncore.plan_mask_sources.default
_plan_route = torch.ops.dyncore.plan_route.default
_plan_route_topk = torch.ops.dyncore.plan_route_topk.default
_plan_topk = torch.ops.dyncore.plan_topk.default

_MAX_INDEX = 2**31 - 1
_wrapped_by_functorch = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Slots (row, group) to be computed, sorted by group, ascending row inside a group.

    Attributes:
        rows: int32 [A], source row of each slot.
        offsets: int32 [G+1]; group g owns slots offsets[g]:offsets[g+1]. offsets[G] slots are live; later ones are
            padding and are never read.
        scale: float [A] or None; multiplies a slot's output when it is scattered; differentiable.
        num_rows: T, the number of rows that `rows` points into.
        row_offsets: int32 [T+1], row_slots: int32 [A]: the inverse map. Row t owns the slots
            row_slots[row_offsets[t]:row_offsets[t+1]], ascending.
        exact: True where the host knows that there is no padding, so that A is the live count.
        full: True where the host knows that slot a is row a, for every row: one group, and nothing to be moved.
    """

    rows: Tensor
    offsets: Tensor
    scale: Tensor | None
    num_rows: int
    row_offsets: Tensor
    row_slots: Tensor
    exact: bool = False
    full: bool = False

    @classmethod
    def from_slots(cls, rows: Tensor, offsets: Tensor, *, num_rows: int, scale: Tensor | None = None) -> Plan:
        """A plan from slots already sorted by group; the inverse map is built here.

        Args:
            rows: integer [A]; offsets: integer [G+1], rising from 0 to at most A.
            num_rows: T.
            scale: float [A] or None.

        Raises TypeError, ValueError (offsets that fall, rows that fall inside a group) or IndexError (a row outside
        0..T-1). On an accelerator offsets and rows are checked against their bounds under DYNCORE_CHECK=1 only.
        """
        for name, t in (("rows", rows), ("offsets", offsets)):
            _expect_tensor(name, t, dims=1)
            if t.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: expected int32 or int64, got {t.dtype}")
        if offsets.shape[0] < 2:
            raise ValueError(f"offsets: expected at least 2 entries (one group), got {offsets.shape[0]}")
        if offsets.device != rows.device:
            raise ValueError(f"offsets: expected a tensor on {rows.device}, got one on {offsets.device}")
        _expect_int("num_rows", num_rows)
        if not 0 <= num_rows <= _MAX_INDEX:
            raise ValueError(f"num_rows: expected 0..{_MAX_INDEX}, got {num_rows}")
        _expect_scale("scale", scale, rows.shape, rows.device)
        # clamped, so that an int64 that is out of range stays so
        rows, offsets = (t.clamp(-1, _MAX_INDEX).int().contiguous() for t in (rows, offsets))
        row_offsets, row_slots = _plan_inverse(rows, offsets, num_rows)
        if is_eager_cpu(rows):
            rises = torch.ones(rows.shape[0] + 1, dtype=torch.bool)  # slot a does not lie below slot a - 1
            rises[1:-1] = rows[1:] >= rows[:-1]
            rises[offsets.long()] = True  # where a group begins
            if not rises[: int(offsets[-1])].all():
                slot = int(rises.logical_not().nonzero()[0])
                pair = f"{int(rows[slot - 1])} then {int(rows[slot])} at slot {slot}"
                raise ValueError(f"rows: expected ascending rows inside a group, got {pair}")
        exact = is_eager_cpu(rows) and int(offsets[-1]) == rows.shape[0]
        return cls(rows, offsets, scale, num_rows, row_offsets, row_slots, exact)

    @property
    def num_groups(self) -> int:
        """G."""
        return self.offsets.shape[0] - 1

    @property
    def num_slots(self) -> int:
        """A: live slots and padding."""
        return self.rows.shape[0]

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device. Raises TypeError on anything else (dtypes are the plan's own)."""
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device: expected a device, got {device!r}")
        return pytree.tree_map_only(Tensor, lambda t: t.to(device), self)

    def groups(self) -> Tensor:
        """int64 [A]: the group of each slot; G for padding."""
        slots = torch.arange(self.num_slots, device=self.rows.device, dtype=torch.int32)
        return torch.searchsorted(self.offsets[1:], slots, right=True)

    def __repr__(self) -> str:
        readable = self.rows.device.type == "cpu" and not isinstance(self.rows, FakeTensor)
        known = self.exact or (readable and not vmap_level(self.rows))
        slots = str(self.num_slots if self.exact else int(self.offsets[-1])) if known else f"<={self.num_slots}"
        pairs = self.num_rows * self.num_groups
        density = f"{int(slots) / pairs:.3f}" if known and pairs else "unknown" if pairs else "0"
        scaled = ", scaled" if self.scale is not None else ""
        return f"Plan(rows={self.num_rows}, groups={self.num_groups}, slots={slots}, density={density}{scaled})"


def _exact_plan(
    rows: Tensor, offsets: Tensor, scale: Tensor | None, num_rows: int, row_offsets: Tensor, row_slots: Tensor
) -> Plan:
    """Plan(..., exact=True) without the frozen dataclass's __init__, whose seven object.__setattr__ take 0.5 us more.
    For eager code: a compiler knows how to make a dataclass, but not this."""
    plan = object.__new__(Plan)
    fields = plan.__dict__
    fields["rows"] = rows
    fields["offsets"] = offsets
    fields["scale"] = scale
    fields["num_rows"] = num_rows
    fields["row_offsets"] = row_offsets
    fields["row_slots"] = row_slots
    fields["exact"] = True
    fields["full"] = False
    return plan


def _flatten(plan: Plan) -> tuple[list[Any], tuple[int, bool, bool]]:
    tensors = [plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots]
    return tensors, (plan.num_rows, plan.exact, plan.full)


def _flatten_with_keys(plan: Plan) -> tuple[list[tuple[Any, Any]], tuple[int, bool, bool]]:
    names = ("rows", "offsets", "scale", "row_offsets", "row_slots")
    leaves, context = _flatten(plan)
    return [(pytree.GetAttrKey(n), leaf) for n, leaf in zip(names, leaves, strict=True)], context


def _unflatten(leaves: Any, context: tuple[int, bool, bool]) -> Plan:
    rows, offsets, scale, row_offsets, row_slots = leaves
    num_rows, exact, full = context
    return Plan(rows, offsets, scale, num_rows, row_offsets, row_slots, exact, full)


pytree.register_pytree_node(
    Plan,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="dyncore.Plan",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)


def is_eager_cpu(t: Tensor) -> bool:
    """Whether `t` holds data that can be counted cheaply, so that a shape may depend on it."""
    return t.is_cpu and _is_eager(t)


def countable(t: Tensor) -> bool:
    """Whether the host may count what `t` holds: at once on a CPU, elsewhere where it is told to wait for it."""
    return is_eager_cpu(t) or (waits() and not t.is_meta and _is_eager(t))


def _is_eager(t: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    if type(t) is not Tensor and _dispatch(type(t)) is not _dispatch(Tensor):  # fake, or a wrapper
        return False
    return not _wrapped_by_functorch(t)


def holds(condition: bool) -> bool:
    """Whether a condition on shapes is true: while a graph is traced only where it is for every shape the graph takes,
    for then the graph must depend on nothing else."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which eager code needs not

    return statically_known_true(condition)


def vmap_level(t: Tensor) -> int:
    """The level of the innermost torch.vmap that `t` was made in, 0 without one; other transforms may lie between."""
    functorch: Any = torch._C._functorch  # pyright: ignore
    level = 0
    while _wrapped_by_functorch(t):
        if functorch.is_batchedtensor(t):
            level = max(level, functorch.maybe_get_level(t))
        t = functorch.get_unwrapped(t)
    return level


def _dispatch(cls: type[Tensor]) -> object:
    return cls.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]


def _expect_int(name: str, value: object) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def _expect_tensor(name: str, value: object, dims: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(value.shape)}")


def _expect_scale(name: str, scale: object, shape: torch.Size, device: torch.device) -> None:
    if scale is None:
        return
    _expect_tensor(name, scale)
    assert isinstance(scale, Tensor)
    if not scale.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {scale.dtype}")
    if scale.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(scale.shape)}")
    if scale.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {scale.device}")


def _expect_rows(name: str, count: int) -> None:
    if count > _MAX_INDEX:
        raise ValueError(f"{name}: expected at most {_MAX_INDEX} entries (indices are int32), got {count}")


def _expect_mask(mask: object) -> None:
    if not isinstance(mask, Tensor):
        _expect_tensor("mask", mask)
    elif mask.dtype is not torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")


def _at_slots(scale: Tensor | None, sources: Tensor) -> Tensor | None:
    """`scale` at the flat index of each slot; padding repeats index 0 and gets a zero gradient from every op."""
    if scale is None:
        return None
    if scale.numel() == 0:  # no source, so no slot is live: nothing may be indexed, but the gradient is not missing
        return scale.new_zeros(sources.shape[0]) + scale.sum()
    return scale.reshape(-1).index_select(0, sources)


def _count(mask: Tensor) -> int:
    return cpu.count_mask(mask) if mask.is_cpu else int(mask.sum())


def select(mask: Tensor, scale: Tensor | None = None) -> Plan:
    """The plan of token skipping: one group, holding the rows where `mask` is True.

    Args:
        mask: bool, any shape; rows are its flattened elements (T of them).
        scale: float of the same shape or None; multiplies a row's output.

    Raises TypeError on a mask that is not bool or a scale that is not floating, ValueError on shapes or devices that
    do not match.
    """
    _expect_mask(mask)
    if scale is not None:
        _expect_scale("scale", scale, mask.shape, mask.device)
    flat = mask if mask.dim() == 1 else mask.reshape(-1)
    num_rows = flat.shape[0]
    _expect_rows("mask", num_rows)
    if countable(mask):
        rows, offsets, row_offsets, row_slots = _plan_mask._op(flat, _count(flat))
        return _exact_plan(rows, offsets, _at_slots(scale, rows), num_rows, row_offsets, row_slots)
    rows, offsets, row_offsets, row_slots = _plan_mask(flat, num_rows)
    return Plan(rows, offsets, _at_slots(scale, rows), num_rows, row_offsets, row_slots)


def select_topk(scores: Tensor, k: int, scale: Tensor | None = None) -> Plan:
    """The plan of Mixture-of-Depths (Raposo 2024): the k best rows of each sequence, one group.

    Args:
        scores: float [B, S]; row = b*S + s. Equal scores: the earlier row wins; NaN ranks highest (as torch.topk).
        k: rows of each sequence, 0..S. The count is static: no padding on any device.
        scale: float [B, S] or None.

    Raises ValueError on a k outside 0..S or shapes that do not match, TypeError on dtypes.
    """
    _expect_tensor("scores", scores, dims=2)
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
    _expect_int("k", k)
    batch, seq = scores.shape
    if holds(k < 0) or holds(k > seq):
        raise ValueError(f"k: expected 0..{seq} (the sequence length), got {k}")
    _expect_scale("scale", scale, scores.shape, scores.device)
    _expect_rows("scores", scores.numel())
    rows, offsets, row_offsets, row_slots = _plan_topk(scores.detach(), k)
    full = not torch.compiler.is_compiling() and k == seq  # a graph must not depend on it
    return Plan(rows, offsets, _at_slots(scale, rows), batch * seq, row_offsets, row_slots, True, full)


def route(expert: Tensor, weight: Tensor | None = None, *, num_groups: int) -> Plan:
    """The plan of top-k routing: row t goes to the groups expert[t, :].

    Args:
        expert: integer [T, K]; a negative index means "nowhere". The same group twice makes two slots.
        weight: float [T, K] or None; multiplies the output of a slot.
        num_groups: G.

    Raises IndexError on an index >= num_groups (on an accelerator under DYNCORE_CHECK=1), TypeError on dtypes,
    ValueError on shapes or devices that do not match.
    """
    _expect_tensor("expert", expert, dims=2)
    if expert.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"expert: expected a signed integer dtype, got {expert.dtype}")
    _expect_int("num_groups", num_groups)
    if not 1 <= num_groups <= _MAX_INDEX:
        raise ValueError(f"num_groups: expected a positive number, got {num_groups}")
    _expect_scale("weight", weight, expert.shape, expert.device)
    _expect_rows("expert", expert.numel())
    if expert.dtype not in (torch.int32, torch.int64):
        expert = expert.int()
    counted = countable(expert)
    capacity = expert.numel()
    if counted:
        capacity = cpu.count_route(expert, num_groups) if expert.is_cpu else int((expert >= 0).sum())
    rows, offsets, row_offsets, row_slots, sources = _plan_route(expert, num_groups, capacity)
    return Plan(rows, offsets, _at_slots(weight, sources), expert.shape[0], row_offsets, row_slots, counted)


class _RouteTopk(torch.autograd.Function):
    """plan_route_topk with the gradient of its scale."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, ...]:
        rows, offsets, row_offsets, row_slots, sources, scale, expert = _plan_route_topk(logits, k, normalize)
        ctx.save_for_backward(logits, sources, scale, expert)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(rows, offsets, row_offsets, row_slots)
        return rows, offsets, row_offsets, row_slots, scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, sources, scale, expert = ctx.saved_tensors
        grad = grads[-1]
        weight, dweight = (torch.zeros_like(t).scatter(0, sources.long(), t).view(expert.shape) for t in (scale, grad))
        total = (weight * dweight).sum(1, keepdim=True)
        if ctx.normalize:  # a softmax of the chosen logits alone
            return torch.zeros_like(logits).scatter(1, expert.long(), weight * (dweight - total)), None, None
        chosen = torch.zeros_like(logits).scatter(1, expert.long(), weight * dweight)
        return chosen - logits.softmax(1) * total, None, None


def route_topk(logits: Tensor, k: int, *, normalize: bool = False) -> Plan:
    """The plan of a mixture of experts' router (Shazeer 2017): each row goes to the k groups of its highest logits,
    weighted by their softmax. The same as route(*softmax(logits).topk(k)), in two kernels on a CUDA device.

    Args:
        logits: float [T, G]. Equal logits: the lower group wins; NaN ranks highest. Weights are made in float32
            (float64 for float64).
        k: groups of each row, 1..G. The count is static: no padding on any device.
        normalize: divide the weights of a row by their sum.

    Raises TypeError on dtypes, ValueError on shapes or a k outside 1..G.
    """
    _expect_tensor("logits", logits, dims=2)
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    _expect_int("k", k)
    num_rows, num_groups = logits.shape
    if not 1 <= k <= num_groups:
        raise ValueError(f"k: expected 1..{num_groups} (the number of groups), got {k}")
    _expect_rows("logits", num_rows * k)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if torch.is_grad_enabled() and (logits.requires_grad or torch._C._are_functorch_transforms_active()):
        rows, offsets, row_offsets, row_slots, scale = apply(_RouteTopk, logits, k, normalize)
    else:
        rows, offsets, row_offsets, row_slots, _, scale, _ = _plan_route_topk(logits, k, normalize)
    full = not torch.compiler.is_compiling() and num_groups == 1
    return Plan(rows, offsets, scale, num_rows, row_offsets, row_slots, True, full)


def route_mask(mask: Tensor, weight: Tensor | None = None, *, max_slots: int | None = None) -> Plan:
    """The plan of any number of groups a row: dynamic-k, nested width, expert choice.

    Args:
        mask: bool [T, G]: row t goes to group g.
        weight: float [T, G] or None; multiplies the output of a slot.
        max_slots: bound on the number of slots where buffers are static (accelerators, torch.compile), T*G if None.

    Raises ValueError if there are more than max_slots (on an accelerator under DYNCORE_CHECK=1; otherwise the slots
    past the bound, the last groups' first, are dropped there), TypeError on dtypes, ValueError on shapes or devices.
    """
    _expect_mask(mask)
    _expect_tensor("mask", mask, dims=2)
    _expect_scale("weight", weight, mask.shape, mask.device)
    if mask.shape[1] < 1:
        raise ValueError(f"mask: expected at least one group, got shape {list(mask.shape)}")
    if max_slots is not None:
        _expect_int("max_slots", max_slots)
        if max_slots < 0:
            raise ValueError(f"max_slots: expected a number >= 0, got {max_slots}")
    num_rows, num_groups = mask.shape
    bound = mask.numel() if max_slots is None else min(max_slots, mask.numel())
    counted = countable(mask)
    capacity = _count(mask) if counted else bound
    if counted and capacity > bound:
        raise ValueError(f"max_slots: the mask has {capacity} slots, more than max_slots={max_slots}")
    _expect_rows("mask", max(capacity, num_rows))
    if weight is None:
        rows, offsets, row_offsets, row_slots = _plan_mask(mask, capacity)
        return Plan(rows, offsets, None, num_rows, row_offsets, row_slots, counted)
    if mask.numel() <= _MAX_INDEX:
        rows, offsets, row_offsets, row_slots, sources = _plan_mask_sources(mask, capacity)
        scale = _at_slots(weight, sources)
        return Plan(rows, offsets, scale, num_rows, row_offsets, row_slots, counted)
    plan = route_mask(mask, max_slots=capacity)
    sources = plan.rows.long() * num_groups + plan.groups().clamp(max=num_groups - 1)
    return dataclasses.replace(plan, scale=_at_slots(weight, sources))
