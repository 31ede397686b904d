"""compact and expand: the live rows of several tensors at once, side by side and back, for any module to run on.

Rows are samples, tokens, pixels: the first dimension of every tensor, whatever the trailing ones and the dtype. One
tensor after the other: this is bound by memory, and what a call costs is small beside a sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from dyncore.ops.autograd import wants_grad
from dyncore.ops.checks import expect_plan
from dyncore.ops.gather_rows import gather_rows
from dyncore.ops.scatter_rows import scatter_rows
from dyncore.plan import Plan

Tree = TypeVar("Tree")

_MOVED = (torch.float32, torch.bfloat16, torch.float16)  # by kernels; other dtypes by indexing


def compact(tree: Tree, plan: Plan) -> Tree:
    """The rows of a one-group plan out of every tensor of `tree`: [A, ...] from [T, ...].

    Args:
        tree: a tensor, or a pytree of them (tuples, lists, dicts, registered classes), each [T, ...] of any dtype and
            on the plan's device; leaves that are no tensors stay what they are.
        plan: from `select`, `select_topk` or whatever else has one group. Its scale is not applied.

    Tensors keep their trailing dimensions and the order of these in memory (channels_last). Padding is 0. Gradient goes
    through floating tensors. Where the plan is `full`, this is `tree` itself.

    Raises TypeError on what is no plan, ValueError on a plan of several groups or on another device, and on a tensor
    that has not T rows, which is named by its path in the tree.
    """
    _expect_one_group(plan)
    leaves, structure = pytree.tree_flatten(tree)
    for i, t in enumerate(leaves):
        if isinstance(t, Tensor):
            _expect(t, tree, i, plan, plan.num_rows, "rows (plan.num_rows)")
            leaves[i] = t if plan.full else _by_rows(t, lambda flat: _compact(flat, plan))
    return pytree.tree_unflatten(leaves, structure)


def expand(tree: Tree, plan: Plan, base: Tree | None = None) -> Tree:
    """The reverse of `compact`: every tensor [A, ...] back to [T, ...], in the rows of the plan.

    Args:
        tree: a tensor or a pytree of them, each [A, ...]; padding is never read.
        plan: the plan of `compact`, in which no row stands twice. Its scale is not applied.
        base: the other rows: a tree of the same structure, of tensors [T, ...] with the trailing dimensions and dtype
            of those in `tree`, or None for 0; so may be any of its leaves.

    Rows outside the plan are those of base, exactly, whatever they hold: nothing is added to them. Gradient goes to
    the floating tensors of both. Where the plan is `full`, this is `tree` itself.

    Raises as `compact` does, ValueError on a base of another structure or shape, TypeError on one of another dtype.
    """
    _expect_one_group(plan)
    leaves, structure = pytree.tree_flatten(tree)
    below: list[Any] = [None] * len(leaves)
    if base is not None:
        below, other = pytree.tree_flatten(base)
        if other != structure:
            raise ValueError(f"base: expected the structure of tree, {structure}, got {other}")
    for i, (y, rest) in enumerate(zip(leaves, below, strict=True)):
        if isinstance(y, Tensor):
            _expect(y, tree, i, plan, plan.num_slots, "slots (plan.rows)")
            _expect_base(rest, y, tree, i, plan)
            leaves[i] = y if plan.full else _expand(y, plan, rest)
    return pytree.tree_unflatten(leaves, structure)


def _compact(flat: Tensor, plan: Plan) -> Tensor:
    """Rows [T, D] to slots [A, D]."""
    if flat.dtype in _MOVED and (wants_grad(flat) or not plan.exact):
        return gather_rows(flat, plan)
    if plan.exact:  # without a gradient torch's own takes 3 us less
        return flat.index_select(0, plan.rows)
    if not flat.shape[0]:
        return flat.new_zeros(plan.num_slots, flat.shape[1])
    live = torch.arange(plan.num_slots, device=flat.device) < plan.offsets[-1]
    return flat.index_select(0, torch.where(live, plan.rows, 0)).masked_fill(~live[:, None], 0)


def _expand(y: Tensor, plan: Plan, base: Tensor | None) -> Tensor:
    if base is None:
        return _by_rows(y, lambda flat: _place(flat, plan))
    order = _order(base)
    below = _flat(base, order)
    flat = _flat(y, order)
    if plan.exact:  # one pass over base, where scatter and where take two
        out = below.index_copy(0, plan.rows.long(), flat)
    else:
        live = plan.row_offsets[1:] > plan.row_offsets[:-1]
        out = torch.where(live[:, None], _place(flat, plan), below)
    return _shaped(out, base.shape, order)


def _place(flat: Tensor, plan: Plan) -> Tensor:
    """Slots [A, D] to rows [T, D], 0 where there is none."""
    if flat.dtype in _MOVED:
        return scatter_rows(flat, dataclasses.replace(plan, scale=None) if plan.scale is not None else plan)
    if plan.exact:
        return flat.new_zeros(plan.num_rows, flat.shape[1]).index_copy(0, plan.rows.long(), flat)
    if not flat.shape[0]:
        return flat.new_zeros(plan.num_rows, flat.shape[1])
    live = plan.row_offsets[1:] > plan.row_offsets[:-1]
    first = torch.where(live, plan.row_offsets[:-1], 0)  # past the last slot where no row follows
    return flat.index_select(0, plan.row_slots.index_select(0, first)).masked_fill(~live[:, None], 0)


def _by_rows(t: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` on t as [T, D]; its result with the trailing dimensions of t."""
    if t.dim() == 2:
        return run(t)
    order = _order(t)
    out = run(_flat(t, order))
    return _shaped(out, torch.Size((out.shape[0], *t.shape[1:])), order)


def _order(t: Tensor) -> list[int] | None:
    """The trailing dimensions of t as they lie in memory, outermost first; None where that is their own order."""
    return None if t.is_contiguous() else sorted(range(1, t.dim()), key=t.stride, reverse=True)


def _flat(t: Tensor, order: list[int] | None) -> Tensor:
    """t as [T, D], its trailing dimensions in this order; no copy where they are dense in it."""
    if t.dim() == 2:
        return t
    return (t if order is None else t.permute(0, *order)).reshape(t.shape[0], math.prod(t.shape[1:]))


def _shaped(flat: Tensor, shape: torch.Size, order: list[int] | None) -> Tensor:
    """The reverse of `_flat`."""
    if order is None or len(shape) == 2:
        return flat.view(shape)
    t = flat.view(shape[0], *(shape[d] for d in order))
    back = [0] * len(shape)
    for place, d in enumerate(order):
        back[d] = place + 1
    return t.permute(back)


def _expect_one_group(plan: object) -> None:
    groups = expect_plan(plan).num_groups
    if groups != 1:
        raise ValueError(f"plan: expected one group, got {groups}")


def _expect(t: Tensor, tree: object, i: int, plan: Plan, count: int, what: str) -> None:
    if t.dim() < 1 or t.shape[0] != count:
        raise ValueError(f"{_name('tree', tree, i)}: expected {count} {what}, got shape {list(t.shape)}")
    if t.device != plan.rows.device:
        name = _name("tree", tree, i)
        raise ValueError(f"plan: expected a plan on the device of {name}, {t.device}, got one on {plan.rows.device}")


def _expect_base(rest: object, y: Tensor, tree: object, i: int, plan: Plan) -> None:
    if rest is None:
        return
    name = _name("base", tree, i)
    if not isinstance(rest, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(rest).__name__}")
    if rest.dtype != y.dtype:
        raise TypeError(f"{name}: expected the dtype of tree, {y.dtype}, got {rest.dtype}")
    if rest.device != y.device:
        raise ValueError(f"{name}: expected a tensor on {y.device}, got one on {rest.device}")
    shape = [plan.num_rows, *y.shape[1:]]
    if list(rest.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(rest.shape)}")


def _name(what: str, tree: object, i: int) -> str:
    """What messages call leaf number i."""
    if torch.compiler.is_compiling():
        return what
    return what + pytree.keystr(pytree.tree_flatten_with_path(tree)[0][i][0])
