"""PolicySkip: a chain of blocks, of which a policy that looks at the input once picks those each row goes through."""

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
    changed,
    expect_callable,
    expect_choice,
    expect_like,
    linked,
)
from dyncore.nn.choices import Choices, Routing, choose, share, shares
from dyncore.nn.inputs import called
from dyncore.plan import route_mask


class PolicySkip(DynamicLayer):
    """x through blocks 1..K, past those that the policy leaves out: x <- x + u_k F_k(x) (BlockDrop, Wu 2018).

    Args:
        blocks: K modules that keep the shape of x. Where the policy's mask is [B, K] rows are samples [A, ...]; where
            it is [B, S, K] and x is [B, S, D] they are tokens [A, D].
        policy: maps x, once, to u, bool [..., K] (a `policies.BernoulliPolicy` with num_actions=K; trained by
            `losses.reinforce`), or (u, scale [..., K]) whose scale has a gradient; see `dyncore.nn.choices`.
        returns: "update": F_k(x) is added, as above. "output": F_k has its shortcut inside: x <- F_k(x).
        costs: what each block costs, such as FLOPs; equal if None. For `last_cost`, a share of their sum.

    Before each block the rows that go through it are gathered, whatever the rest of their policies, and put back; a row
    that takes no block comes out as it went in, whatever it holds. `last_plan` has a group for each block. Under
    torch.compile, and on accelerators but in `execution(wait=True)`, every block computes all rows, the others as
    zeros.

    Raises TypeError or ValueError where the policy's decision does not fit x, or a block changes the shape.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        policy: Routing,
        *,
        returns: str = "update",
        costs: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            expect_callable(f"blocks[{i}]", block)
        if not len(blocks):
            raise ValueError("blocks: expected at least one module, got none")
        expect_callable("policy", policy)
        self.blocks: nn.ModuleList = nn.ModuleList(blocks)
        self.policy = policy
        self.returns: str = expect_choice("returns", returns, RETURNS)
        self.costs: tuple[float, ...] = shares(costs, len(blocks))

    def forward(self, x: Tensor, actions: Tensor | None = None) -> Tensor:
        """x with its rows through their blocks; the shape and dtype of x.

        Args:
            actions: bool [..., K]: taken in place of what the policy says, which is then not asked.
        """
        policy: Routing = self.policy if actions is None else lambda _: actions
        mask, scale = choose(policy, x, len(self.blocks), "policy" if actions is None else "actions")
        lead, row_shape = mask.shape[:-1], x.shape[mask.dim() - 1 :]
        size = (math.prod(lead), len(self.blocks))
        flat = Choices(mask.reshape(size), None if scale is None else scale.reshape(size))
        plan = route_mask(flat.mask)
        self.record(plan, functools.partial(share, mask, scale, self.costs))
        rows = x.reshape(math.prod(lead), math.prod(row_shape))
        if mode() == "masked" or not plan.exact:
            for k in range(len(self.blocks)):
                rows = self._everywhere(k, rows, row_shape, flat)
            return rows.view(x.shape)
        offsets, own = plan.offsets.tolist(), False
        for k in range(len(self.blocks)):
            index = plan.rows[offsets[k] : offsets[k + 1]].long()
            live = rows if len(index) == len(rows) else rows.index_select(0, index)
            y = self._block(k, live, row_shape)
            if flat.weight is not None or self.returns == "update":
                weight = None if flat.weight is None else flat.weight[:, k].index_select(0, index)
                y = changed(live, y, weight, None, self.returns)
            if len(index) == len(rows):
                rows, own = y, False
            elif len(index):
                put = rows.index_copy_ if own else rows.index_copy
                rows, own = put(0, index, y), not torch.is_grad_enabled()
            else:
                rows = linked(rows, self.blocks[k])
        return rows.view(x.shape)

    def _everywhere(self, k: int, rows: Tensor, row_shape: torch.Size, flat: Choices) -> Tensor:
        live = flat.mask[:, k]
        zeroed = torch.where(live[:, None], rows, 0)
        weight = None if flat.weight is None else flat.weight[:, k]
        y = changed(zeroed, self._block(k, zeroed, row_shape), weight, live, self.returns)
        return torch.where(live[:, None], y, rows)

    def _block(self, k: int, live: Tensor, row_shape: torch.Size) -> Tensor:
        if not live.shape[0]:  # many modules refuse an empty batch
            return linked(live, self.blocks[k])
        shaped = live.view(live.shape[0], *row_shape)
        name = f"blocks[{k}]"
        return expect_like(name, called(name, self.blocks[k], shaped), shaped).reshape(live.shape)

    def extra_repr(self) -> str:
        return f"returns={self.returns}"
