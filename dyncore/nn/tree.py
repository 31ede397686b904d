"""Fast feedforward: a tree of decisions sends every row to a leaf, a small MLP of its own."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.base import DynamicLayer, expect_choice, expect_size
from dyncore.nn.dynamic_width import every_slot, share_of_groups
from dyncore.nn.full_precision import full_precision
from dyncore.nn.inputs import expect_rows
from dyncore.nn.mlp import ACTIVATIONS
from dyncore.ops import grouped_mlp, tree_route
from dyncore.ops.autograd import wants_grad
from dyncore.plan import route, route_mask

DEEPEST = 16  # 65536 leaves


def leaf_chances(logits: Tensor) -> Tensor:
    """The chance of every leaf [T, 2^depth] where node n sends a row right with sigmoid(logits [T, 2^depth - 1])."""
    right = torch.sigmoid(logits)
    chances = torch.ones_like(logits[:, :1]) if logits.shape[1] else logits.new_ones(logits.shape[0], 1)
    first = 0
    while first < logits.shape[1]:
        p = right[:, first : first + chances.shape[1]]
        first += chances.shape[1]
        chances = torch.stack([chances * (1 - p), chances * p], -1).flatten(1)
    return chances


class TreeMLP(DynamicLayer):
    """y = leaf_l(x), l the leaf that x reaches: from the root down, right where w_n . x + b_n > 0 (fast feedforward
    networks, Belcak 2023).

    Args:
        dim: H. depth: of the tree, 0..16: 2^depth leaves and 2^depth - 1 nodes.
        leaf_dim: the hidden width of each leaf, an MLP of its own.
        activation: any of dc.grouped_mlp. bias: whether leaves have biases.
        soft: in training every leaf is computed, and their mixture by the chances sigmoid(w_n . x + b_n) of the turns
            is returned, as in the paper; `losses()["hardening"]` then makes the turns decided. False: in training, too,
            a row runs its one leaf, and the nodes learn by the straight-through gradient of its chance.

    In evaluation a row costs depth dot products (`dc.tree_route`) and one leaf: all other leaves are skipped, forward
    and backward. `last_cost` is the share of the leaves that were run: 2^-depth, or 1 of a soft mixture. With depth 0
    the layer is exactly one dense MLP. Each leaf wants 16 rows or more of a call: with fewer, reading its weights is
    the time.

    Parameters: nodes.weight [2^depth - 1, H] in heap order (the children of n are 2n + 1 and 2n + 2), nodes.bias;
    w_in [L, I, H] (gated [L, 2I, H], gate half first), w_out [L, H, I], b_in, b_out. Raises TypeError or ValueError on
    sizes and on an x that is not [..., H].
    """

    _transient = (*DynamicLayer._transient, "_logits")
    _logits: Tensor | None = None

    def __init__(
        self, dim: int, depth: int, leaf_dim: int, *, activation: str = "gelu", bias: bool = True, soft: bool = True
    ) -> None:
        super().__init__()
        expect_size("dim", dim)
        expect_size("leaf_dim", leaf_dim)
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"depth: expected an int, got {type(depth).__name__}")
        if not 0 <= depth <= DEEPEST:
            raise ValueError(f"depth: expected 0..{DEEPEST}, got {depth}")
        self.dim = dim
        self.depth = depth
        self.leaf_dim = leaf_dim
        self.num_leaves: int = 2**depth
        self.soft = soft
        self.activation: str = expect_choice("activation", activation, ACTIVATIONS)
        wide = (2 if activation in activations.GATED else 1) * leaf_dim
        leaves = self.num_leaves
        self.nodes: nn.Linear | None = nn.Linear(dim, leaves - 1) if depth else None
        self.w_in: nn.Parameter = nn.Parameter(torch.empty(leaves, wide, dim))
        self.w_out: nn.Parameter = nn.Parameter(torch.empty(leaves, dim, leaf_dim))
        self.b_in: nn.Parameter | None = nn.Parameter(torch.empty(leaves, wide)) if bias else None
        self.b_out: nn.Parameter | None = nn.Parameter(torch.empty(leaves, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every leaf and the nodes as nn.Linear draws its own: uniform within 1/sqrt(fan in)."""
        if self.nodes is not None:
            self.nodes.reset_parameters()
        inputs, outputs = (self.w_in, self.b_in), (self.w_out, self.b_out)
        for tensors, fan_in in ((inputs, self.dim), (outputs, self.leaf_dim)):
            for tensor in tensors:
                if tensor is not None:
                    nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """Rows x [..., H] to rows [..., H]."""
        expect_rows(x, self.dim, self.w_in)
        rows = x.reshape(math.prod(x.shape[:-1]), self.dim)
        nodes = self.nodes
        if self.training and self.soft and nodes is not None:
            return self._mixture(rows, full_precision(nodes, rows), x.shape)
        logits = scale = None
        if nodes is None:
            leaf = torch.zeros(rows.shape[0], dtype=torch.int32, device=x.device)
        else:
            leaf = tree_route(rows.to(nodes.weight.dtype), nodes.weight, nodes.bias)
            if wants_grad(rows, nodes.weight, nodes.bias):
                logits = full_precision(nodes, rows)
                chance = leaf_chances(logits).gather(1, leaf[:, None].long())
                scale = 1 + (chance - chance.detach())
        plan = route(leaf[:, None], scale, num_groups=self.num_leaves)
        self.record(plan, functools.partial(share_of_groups, plan, x.shape[:-1], None), _logits=logits)
        if self.num_leaves == 1 and every_slot(plan):
            return self._one_leaf(x)
        return grouped_mlp(x, self.w_in, self.w_out, self.b_in, self.b_out, plan=plan, activation=self.activation)

    def _one_leaf(self, x: Tensor) -> Tensor:
        b_in, b_out = (None if b is None else b.flatten() for b in (self.b_in, self.b_out))
        hidden = activations.hidden(F.linear(x, self.w_in.flatten(0, 1), b_in), self.activation)
        return F.linear(hidden, self.w_out.flatten(0, 1), b_out)

    def _mixture(self, rows: Tensor, logits: Tensor, shape: torch.Size) -> Tensor:
        """Every leaf, weighted by its chance, as two dense products."""
        plan = route_mask(torch.ones(rows.shape[0], self.num_leaves, dtype=torch.bool, device=rows.device))
        self.record(plan, functools.partial(share_of_groups, plan, shape[:-1], None), _logits=logits)
        pre = F.linear(rows, self.w_in.flatten(0, 1), None if self.b_in is None else self.b_in.flatten())
        hidden = activations.hidden(pre.unflatten(-1, (self.num_leaves, -1)), self.activation)
        chances = leaf_chances(logits).to(hidden.dtype)
        out = (hidden * chances[..., None]).flatten(1) @ self.w_out.transpose(1, 2).flatten(0, 1)
        if self.b_out is not None:
            out = out + chances @ self.b_out
        return out.view(shape)

    def losses(self) -> dict[str, Tensor]:
        """hardening: the mean entropy of the turns in the latest forward that learnt, in nats (Belcak 2023)."""
        logits = self._logits
        if logits is None:
            return {}
        entropy = F.softplus(logits) - torch.sigmoid(logits) * logits
        return {"hardening": entropy.sum() / max(entropy.numel(), 1)}

    def extra_repr(self) -> str:
        return f"{self.dim}, depth={self.depth}, leaf_dim={self.leaf_dim}, activation={self.activation}"
