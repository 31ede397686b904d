"""Branch: a junction where each row picks the modules it goes through; Hierarchy: the sub-task follows the answer.

Rows are tokens or samples. They are gathered once, sorted by module, and put back once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn.base import (
    RETURNS,
    DynamicLayer,
    expect_callable,
    expect_choice,
    expect_like,
    linked,
    live_rows,
)
from dyncore.nn.choices import Routing, choose, share, shares
from dyncore.nn.gates import Movable, expect_number, scalar, shown
from dyncore.nn.inputs import called, expect_input
from dyncore.ops import gather_rows, scatter_rows
from dyncore.plan import Plan, route_mask

EXITS = ("identity", "zero")


def _counts(plan: Plan) -> list[int] | None:
    """Rows of each group where rows are gathered for it; None where every module computes all rows, dead ones as 0:
    in "masked" execution, and wherever nobody has counted."""
    if mode() == "masked" or not plan.exact:
        return None
    return torch.diff(plan.offsets).tolist()


def _pieces(rows: Tensor, row_shape: torch.Size, plan: Plan, mask: Tensor, counts: list[int] | None) -> list[Tensor]:
    """The rows [T, D] that each group computes, of the shape [A_g, *row_shape]; all rows are not moved."""
    if counts is None:
        pieces = [torch.where(live[:, None], rows, 0) for live in mask.unbind(1)]
    elif min(counts) == rows.shape[0]:
        pieces = [rows] * len(counts)
    elif max(counts) == sum(counts) == rows.shape[0]:
        pieces = [rows[:count] for count in counts]
    else:
        pieces = gather_rows(rows, plan).split(counts)
    return [piece.view(piece.shape[0], *row_shape) for piece in pieces]


def _weighted(y: Tensor, scale: Tensor | None) -> Tensor:
    """Rows y [A, D] times scale [A], multiplied in float32 or wider."""
    if scale is None:
        return y
    wide = torch.promote_types(torch.promote_types(y.dtype, scale.dtype), torch.float32)
    return (y.to(wide) * scale[:, None].to(wide)).to(y.dtype)


class Branch(DynamicLayer):
    """Each row goes through the branches its router picks, or through none (routing networks, McGill 2017).

    y = sum of weight_g * branch_g(x) over the branches of the row; a row with none exits. Hard routing (one branch or
    none: `ChoiceGate`), soft gates that can be 0 (Li 2020: `RectifiedGate`) and masks of any kind are the same here.

    Args:
        branches: modules that map rows [A, ...] to rows of the same shape. Where the router's decision is [B, S] and x
            is [B, S, D] rows are tokens and a branch sees [A, D]; where it is [B], rows are samples.
        router: maps x to a mask [..., G], (mask, weight), an integer index [...] (negative: none), (index, weight), or
            weights [..., G] (0: not taken); see `dyncore.nn.choices`.
        returns: "output": as above. "update": added to x: x + sum of weight_g * branch_g(x).
        exit: "output" of a row without branch: "identity", x itself, or "zero".
        costs: what a row costs in each branch, such as FLOPs; equal if None. For `last_cost`, a share of their sum.

    Each branch computes its own rows alone. Under torch.compile, and on accelerators but in `execution(wait=True)`,
    each computes all rows, the others as zeros: the values are the same and nothing is saved.

    Raises TypeError or ValueError where the router's decision does not fit x, or a branch changes the shape.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        router: Routing,
        *,
        returns: str = "output",
        exit: str = "identity",
        costs: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        for i, branch in enumerate(branches):
            expect_callable(f"branches[{i}]", branch)
        if not len(branches):
            raise ValueError("branches: expected at least one module, got none")
        expect_callable("router", router)
        self.branches: nn.ModuleList = nn.ModuleList(branches)
        self.router = router
        self.returns: str = expect_choice("returns", returns, RETURNS)
        self.exit: str = expect_choice("exit", exit, EXITS)
        self.costs: tuple[float, ...] = shares(costs, len(branches))

    def forward(self, x: Tensor) -> Tensor:
        """x with its rows through their branches; the shape and dtype of x."""
        mask, weight = choose(self.router, x, len(self.branches))
        lead, row_shape = mask.shape[:-1], x.shape[mask.dim() - 1 :]
        rows = x.reshape(math.prod(lead), math.prod(row_shape))
        flat = mask.reshape(math.prod(lead), len(self.branches))
        flat_weight = None if weight is None else weight.reshape(flat.shape)
        plan = route_mask(flat, flat_weight)
        self.record(plan, functools.partial(share, mask, weight, self.costs))
        counts = _counts(plan)
        results = [
            self._run(g, piece).reshape(piece.shape[0], rows.shape[1])
            for g, piece in enumerate(_pieces(rows, row_shape, plan, flat, counts))
        ]
        if counts is None:
            y = self._all(rows, results, flat, flat_weight)
        elif min(counts) == rows.shape[0]:
            y = self._sum(rows, results, flat_weight)
        elif max(counts) == sum(counts) == rows.shape[0]:
            y = _weighted(torch.cat([y for y in results if y.shape[0]] or results), plan.scale)
            y = rows + y if self.returns == "update" else y
        else:
            y = self._live(rows, torch.cat(results), plan)
        return y.view(x.shape)

    def _run(self, g: int, piece: Tensor) -> Tensor:
        if not piece.shape[0]:  # many modules refuse an empty batch
            return linked(piece, self.branches[g])
        name = f"branches[{g}]"
        return expect_like(name, called(name, self.branches[g], piece), piece)

    def _live(self, rows: Tensor, y: Tensor, plan: Plan) -> Tensor:
        """Rows [T, D] as they leave, from the slots y [A, D] of an exact plan."""
        if self.returns == "update":
            return scatter_rows(y, plan, rows)
        if self.exit == "zero":
            return scatter_rows(y, plan)
        taken = live_rows(plan)
        if plan.num_slots == int(taken.sum()):  # no row has two slots: one pass over x, where the others take three
            return rows.index_copy(0, plan.rows.long(), _weighted(y, plan.scale))
        return torch.where(taken[:, None], scatter_rows(y, plan), rows)

    def _sum(self, rows: Tensor, results: list[Tensor], weight: Tensor | None) -> Tensor:
        """Rows [T, D] as they leave, where each takes every branch."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.to(wide) if self.returns == "update" else None
        for g, y in enumerate(results):
            y = y.to(wide)
            if weight is None:
                total = y if total is None else total + y
            else:
                scale = weight[:, g, None].to(wide)
                total = y * scale if total is None else torch.addcmul(total, y, scale)
        assert total is not None
        return total.to(rows.dtype)

    def _all(self, rows: Tensor, results: list[Tensor], mask: Tensor, weight: Tensor | None) -> Tensor:
        """Rows [T, D] as they leave, from what each branch made of all of them; `mask` [T, G] says where it counts."""
        total = torch.zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        for g, y in enumerate(results):
            live = mask[:, g]
            y = y if weight is None else _weighted(y, torch.where(live, weight[:, g], 0))
            total = total + torch.where(live[:, None], y, 0)
        if self.returns == "update":
            return (rows + total).to(rows.dtype)
        total = total.to(rows.dtype)
        return torch.where(mask.any(1)[:, None], total, rows) if self.exit == "identity" else total

    def extra_repr(self) -> str:
        return f"returns={self.returns}, exit={self.exit}"


class Hierarchy(Movable, DynamicLayer):
    """Classes in groups: one classifier names the group, and only the classifiers of likely groups run.

    Conditional sub-tasks: is it a cat or a dog, then which breed. log p(c) = log p(group of c) + log p(c | group), a
    hierarchical softmax (Morin 2005); where a group's classifier did not run, its classes share the group's probability
    equally, so that the result is always a distribution. A classifier runs where p(group) >= threshold * (p of the most
    likely group): at threshold 1 that of the most likely alone, at 0 every one, above 1 none.

    Args:
        coarse: maps x [B, ...] to logits [B, G] of the groups.
        fine: G modules; fine[g] maps x [A, ...] to logits [A, len(classes[g])].
        classes: for each group the classes it holds; together 0..C-1, each once.
        threshold: a buffer, may be moved at run time.
        costs: what each classifier costs, such as FLOPs; equal if None. For `last_cost`, a share of all of them.

    Rows are samples, gathered for their classifiers; under torch.compile, and on accelerators but in
    `execution(wait=True)`, every classifier computes all of them, the others as zeros. `group_of` [C] is the group of
    each class: `model(x, model.group_of[y])` teaches classifier and groups with nll_loss. Raises ValueError on classes
    or logits that do not fit.
    """

    threshold: Tensor
    group_of: Tensor

    def __init__(
        self,
        coarse: nn.Module,
        fine: Sequence[nn.Module],
        classes: Sequence[Sequence[int]],
        threshold: float = 1.0,
        *,
        costs: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        groups = [list(group) for group in classes]
        order = [c for group in groups for c in group]
        if sorted(order) != list(range(len(order))) or not all(groups):
            raise ValueError(f"classes: expected groups that hold 0..C-1, each once and none empty, got {groups}")
        if len(fine) != len(groups):
            raise ValueError(f"fine: expected {len(groups)} modules, one a group, got {len(fine)}")
        self.coarse: nn.Module = coarse
        self.fine: nn.ModuleList = nn.ModuleList(fine)
        self.sizes: list[int] = [len(group) for group in groups]
        group_of = torch.empty(len(order), dtype=torch.int64)
        for g, group in enumerate(groups):
            group_of[group] = g
        self.register_buffer("group_of", group_of, persistent=False)
        self.register_buffer("_column", torch.tensor(order).argsort(), persistent=False)
        self.register_buffer("threshold", scalar(expect_number("threshold", threshold)))
        self.costs: tuple[float, ...] = shares(costs, len(fine))

    _column: Tensor  # where each class stands among the classes in order of their groups

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, C] of samples x [B, ...], in float32 or wider.

        Args:
            group: integer [B], whose classifier runs for each sample, as in training; None: as the threshold says.
        """
        expect_input(x)
        logits = called("coarse", self.coarse, x)
        groups = len(self.fine)
        if logits.shape != (x.shape[0], groups):
            raise ValueError(f"coarse: expected logits {[x.shape[0], groups]}, got {list(logits.shape)}")
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
        if group is None:
            p = log_p.detach().exp()
            mask = p >= self.threshold * p.amax(1, keepdim=True)
        else:
            mask = choose(lambda _: group, x, groups, "group").mask
        plan = route_mask(mask)
        self.record(plan, functools.partial(share, mask, None, self.costs))
        rows, row_shape = x.reshape(x.shape[0], math.prod(x.shape[1:])), x.shape[1:]
        counts = _counts(plan)
        pieces = _pieces(rows, row_shape, plan, mask, counts)
        starts = [0] if counts is None else plan.offsets.tolist()
        columns: list[Tensor] = []
        for g, piece in enumerate(pieces):
            inside = log_p.new_full((x.shape[0], self.sizes[g]), -math.log(self.sizes[g]))
            if piece.shape[0]:
                fine = self._classify(g, piece).to(log_p.dtype)
                if counts is None:
                    inside = torch.where(mask[:, g, None], fine, inside)
                else:
                    inside = inside.index_copy(0, plan.rows[starts[g] : starts[g + 1]].long(), fine)
            else:
                inside = linked(inside, self.fine[g])
            columns.append(log_p[:, g, None] + inside)
        return torch.cat(columns, 1).index_select(1, self._column)

    def _classify(self, g: int, piece: Tensor) -> Tensor:
        logits = called(f"fine[{g}]", self.fine[g], piece)
        if logits.shape != (piece.shape[0], self.sizes[g]):
            wanted = [piece.shape[0], self.sizes[g]]
            raise ValueError(f"fine[{g}]: expected logits {wanted}, got {list(logits.shape)}")
        return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, threshold={shown(self.threshold)}"
