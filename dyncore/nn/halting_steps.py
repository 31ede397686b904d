"""What AdaptiveDepth does step by step: rows that halt leave the list, or stay where they are and are not computed.

A step maps (n, states, live) to states; a rule maps (n, states, total, bound) to what the step counts, who halts, and
the total of the halting scores. Floor 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn.base import expect_like, first_live
from dyncore.nn.inputs import called, takes
from dyncore.ops import compact, expand
from dyncore.plan import countable, select

Step = Callable[[int, Tensor, "Tensor | None"], Tensor]
Rule = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Outcome(NamedTuple):
    """What came of the steps: states or their weighted mean; the number of steps of each row, int64; its remainder R;
    how many steps were computed for anyone."""

    out: Tensor
    steps: Tensor
    remainder: Tensor
    computed: int


def over(t: Tensor, x: Tensor) -> Tensor:
    """t [...], one number a row, with dimensions of 1 for the row's own in x [..., *row]."""
    return t.view(*t.shape, *(1,) * (x.dim() - t.dim()))


def _added(result: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """result + weight * y; in place where no gradient needs what was there, which spares a pass over memory."""
    return torch.addcmul(result, weight, y) if torch.is_grad_enabled() else result.addcmul_(weight, y)


def by_compaction(x: Tensor, bound: Tensor, num_steps: int, step: Step, rule: Rule, mean: bool) -> Outcome:
    """Rows x [T, ...] of which the live ones are gathered anew whenever some have halted; counts are known on the host.

    Args:
        bound: float [T], the total of halting scores at which a row halts.
        mean: the result is the sum of share * state over a row's steps; else the state it halted in.
    """
    at, total = torch.arange(x.shape[0], device=x.device), torch.zeros_like(bound)
    result: Tensor | None = None
    ends: list[tuple[Tensor, Tensor, Tensor, int]] = []  # rows, their result, their remainder, after how many steps
    for n in range(num_steps):
        y = step(n, x, None)
        share, halted, passed = rule(n, y, total, bound)
        if mean:
            weight, wide = over(share, y), y.to(share.dtype)
            result = weight * wide if result is None else _added(result, weight, wide)
        else:
            result = y
        leaving = int(halted.sum())
        if leaving == at.shape[0]:
            ends.append((at, result, 1 - total, n + 1))
            break
        if leaving:
            done, going = select(halted), select(~halted)
            ends.append((*compact((at, result, 1 - total), done), n + 1))
            y, result, passed, bound, at = compact((y, result, passed, bound, at), going)
        x, total = y, passed
    if len(ends) == 1:
        rows, out, remainder, taken = ends[0]
        return Outcome(out, torch.full_like(rows, taken), remainder, taken)
    rows = torch.cat([end[0] for end in ends])
    steps = torch.cat([torch.full_like(end[0], end[3]) for end in ends])
    back = torch.empty_like(rows).index_copy(0, rows, torch.arange(rows.shape[0], device=rows.device))
    remainder = torch.cat([end[2] for end in ends]).index_select(0, back)
    if torch.is_grad_enabled():
        out = torch.cat([end[1] for end in ends]).index_select(0, back)
    else:  # one pass over memory less
        out = ends[0][1].new_empty((rows.shape[0], *x.shape[1:]))
        for at, part, _, _ in ends:
            out.index_copy_(0, at, part)
    return Outcome(out, steps.index_select(0, back), remainder, ends[-1][3])


def in_place(x: Tensor, bound: Tensor, num_steps: int, step: Step, rule: Rule, mean: bool) -> Outcome:
    """Rows x [..., *row] of the leading dimensions of `bound`, all of them kept: a step is told which are live, and
    what it makes of the others is dropped. The rest as in `by_compaction`."""
    live, total = torch.ones_like(bound, dtype=torch.bool), torch.zeros_like(bound)
    steps, remainder = torch.zeros_like(bound, dtype=torch.int64), torch.ones_like(bound)
    result = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, bound.dtype), device=x.device)
    counted, computed = mode() != "masked" and countable(x), 0
    for n in range(num_steps):
        if counted and n and not bool(live.any()):
            break
        y = step(n, x, live)
        seen = y
        if not (counted and bool(live.all())):
            y = torch.where(over(live, x), y, x)
            seen = torch.where(over(live, y), y, 0)  # what a row that is not live holds must not reach a gradient
        share, halted, passed = rule(n, seen, total, bound)
        if mean:
            result = _added(result, over(torch.where(live, share, 0), y), seen.to(result.dtype))
        steps, computed = steps + live, n + 1
        remainder = torch.where(live & halted, 1 - total, remainder)
        x, total, live = y, torch.where(live, passed, total), live & ~halted
    return Outcome(result if mean else x, steps, remainder, computed)


def every_step(x: Tensor, bound: Tensor, num_steps: int, step: Step, rule: Rule) -> tuple[Tensor, Tensor]:
    """(states [K, ...], probabilities of halting in each [K, ...]) of all rows, nobody leaving before the end."""
    live, total = torch.ones_like(bound, dtype=torch.bool), torch.zeros_like(bound)
    states: list[Tensor] = []
    halting: list[Tensor] = []
    for n in range(num_steps):
        x = step(n, x, live)
        share, _, total = rule(n, x, total, torch.full_like(bound, float("inf")))
        states.append(x)
        halting.append(share)
    return torch.stack(states), torch.stack(halting)


def _mixer(block: nn.Module, spatial: bool) -> str | None:
    """The name of a part of `block` that plainly looks across tokens, or across positions if `spatial`."""
    for part in block.modules() if isinstance(block, nn.Module) else ():
        kernel = getattr(part, "kernel_size", None)
        wide = kernel is not None and max(kernel if isinstance(kernel, tuple) else (kernel,)) > 1
        if (spatial and wide) or isinstance(part, (nn.MultiheadAttention, nn.RNNBase)):
            return f"{type(part).__name__} in {type(block).__name__}"
    return None


def looks_across(blocks: Sequence[nn.Module], tokens: bool, spatial: bool, attention: str) -> bool:
    """Whether blocks are given the whole state and told which rows are live.

    Raises ValueError where they look across rows and can't be told.
    """
    if not (tokens or spatial):
        return False
    names = ["mask"] if spatial else ["positions", "live"]
    if tokens and attention == "all_keys":
        names.append("context")
    able = [all(takes(block, name) for name in names) for block in blocks]
    wanted = " and ".join(f"{name}=" for name in names)
    if "context" in names and not all(able):
        raise ValueError(f"blocks: expected blocks that take {wanted} for all_keys, got {able.count(False)} others")
    if any(able) and not all(able):
        raise ValueError(f"blocks: expected all of them to take {wanted} or none, got {able.count(False)} others")
    for block in () if all(able) else blocks:
        if (part := _mixer(block, spatial)) is not None:
            raise ValueError(f"blocks: expected blocks that treat rows one by one or take {wanted}, got {part}")
    return all(able)


def attend(block: nn.Module, x: Tensor, live: Tensor, all_keys: bool) -> Tensor:
    """The block on the live tokens of x [B, S, D], by the token protocol; what it gives for others is of no use."""
    context = {"context": x} if all_keys else {}
    if mode() == "masked" or not countable(x):
        return called("blocks", block, torch.where(over(live, x), x, 0), positions=None, live=live, **context)
    batch, seq, width = x.shape
    counts = live.sum(1)
    shortest, longest = int(counts.min()), int(counts.max())
    if shortest == seq:
        return called("blocks", block, x, positions=None, live=None)
    rows, plan = x.reshape(batch * seq, width), first_live(live, longest)
    tokens, used = compact(rows, plan), None
    if shortest < longest:
        used = live.reshape(-1).index_select(0, plan.rows)
        tokens = torch.where(used[:, None], tokens, 0)
        used = used.view(batch, longest)
    tokens = tokens.view(batch, longest, width)
    y = called("blocks", block, tokens, positions=(plan.rows % seq).view(batch, longest), live=used, **context)
    return expand(expect_like("blocks", y, tokens).reshape(-1, width), plan, rows).view(x.shape)
