"""Dynamic width: an MLP whose hidden neurons are cut into blocks, of which every row takes those that its gate chooses.

`BlockMLP` is what such layers share (dynamic width, adaptive computation modules, dynamic-k experts): the weights of
one dense MLP, of which every block is a group of dc.grouped_mlp without a copy.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore import activations
from dyncore.execution import mode
from dyncore.nn.base import Decision, DynamicLayer, Gating, expect_callable, expect_choice, expect_size
from dyncore.nn.experts import ExpertWeights
from dyncore.nn.full_precision import full_precision
from dyncore.nn.gates import ThresholdGate
from dyncore.nn.inputs import expect_rows, in_autocast
from dyncore.nn.mlp import ACTIVATIONS, MLP
from dyncore.ops import grouped_mlp
from dyncore.ops.autograd import wants_grad
from dyncore.plan import Plan, route_mask

# A forward with gradients keeps the results of all slots at once: from so many numbers on they outgrow the workspace of
# the CPU kernels (64 MB), and are paged in anew by each call. With 2048 rows of 512 and 16 blocks of 128 neurons, a
# density of 0.75 then takes 1.03 to 1.09 and 0.9 takes 1.19 to 1.47 of the dense layer's time on 2 threads of Zen 4:
# hidden neurons are masked instead. Without gradients the same densities take 0.71 and 0.87.
_MANY, _DENSE_FROM = 10 << 20, 0.65


def decide_groups(gate: Gating, x: Tensor, num_groups: int) -> tuple[Tensor, Tensor | None]:
    """(mask, scale or None), both [T, G], of a gate that maps rows x [..., D] to a decision [..., G].

    Raises TypeError or ValueError on a decision that does not fit.
    """
    result = gate(x)
    decision = result if isinstance(result, tuple) and len(result) in (2, 3) else (result, None)
    mask, scale = decision[0], decision[1]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"gate: expected a bool mask, or a mask and its scale, got {got}")
    want = (*x.shape[:-1], num_groups)
    for name, value in (("mask", mask), ("scale", scale)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"gate: expected a {name} that is a Tensor, got {type(value).__name__}")
        if value.shape != want:
            raise ValueError(f"gate: expected a {name} of shape {list(want)}, got {list(value.shape)}")
    flat = (-1, num_groups) if mask.numel() else (math.prod(want[:-1]), num_groups)
    return mask.reshape(flat), None if scale is None else scale.reshape(flat)


def share_of_groups(plan: Plan, shape: torch.Size, scale: Tensor | None) -> Tensor:
    """The share of the groups that each row took, of `shape`, with the gradient of `scale` [T, G] if there is one."""
    slots = plan.row_offsets[1:] - plan.row_offsets[:-1]
    cost = slots.to(torch.float32 if scale is None else scale.dtype) / plan.num_groups
    if scale is not None:  # where a group is not taken it may be anything
        cost = cost + torch.where(scale.isfinite(), scale - scale.detach(), 0).mean(-1)
    return cost.view(shape)


def every_slot(plan: Plan) -> bool:
    """Whether the host knows that every row takes every group, so that one dense product does it all."""
    return mode() == "auto" and plan.exact and plan.num_slots == plan.num_rows * plan.num_groups


class BlockGate(ThresholdGate):
    """Block g of a row is live where p_g = sigmoid(logit_g) > threshold (a buffer: below 0 all are, from 1 on none is).

    Args:
        dim: D, the width of x. num_blocks: G; the score is a Linear layer D -> G, computed in float32.
        weight: the scale of a live block: "hard": 1, with the gradient of p (straight-through); "soft": p; "none".
    """

    def __init__(self, dim: int, num_blocks: int, threshold: float = 0.5, *, weight: str = "hard") -> None:
        expect_size("dim", dim)
        expect_size("num_blocks", num_blocks)
        super().__init__(nn.Linear(dim, num_blocks), threshold, weight=weight)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., G] of the blocks of rows x [..., D]."""
        return full_precision(self.score, x)

    def forward(self, x: Tensor) -> Decision:
        """The decision [..., G] on the blocks of rows x [..., D]."""
        return super().forward(x)


class BlockMLP(DynamicLayer):
    """Base of the layers that skip blocks of an MLP's hidden neurons: y = b_out + sum over a row's blocks g of
    scale_g W_out[:, g] act(W_in[g] x + b_in[g]).

    Args:
        dim: H. hidden_dim: I, of all blocks together. num_blocks: G, a divisor of I.
        activation: any of dc.grouped_mlp; bias: whether there are b_in and b_out.

    Parameters are those of one dense MLP: w_in [I, H], w_out [H, I], b_in [I], b_out [H]; gated, w_in is [2I, H] and
    holds the gates and then the ups of each block in turn. `fill` and `to_dense` bring weights in and out.

    A subclass chooses blocks and calls `run_blocks`.
    """

    bias_of_first_block: bool = False  # b_out belongs to block 0, and not to every row

    def __init__(
        self, dim: int, hidden_dim: int, num_blocks: int, *, activation: str = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden_dim", hidden_dim), ("num_blocks", num_blocks)):
            expect_size(name, value)
        if hidden_dim % num_blocks:
            raise ValueError(f"num_blocks: expected a divisor of hidden_dim={hidden_dim}, got {num_blocks}")
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.num_blocks = num_blocks
        self.activation: str = expect_choice("activation", activation, ACTIVATIONS)
        wide = (2 if activation in activations.GATED else 1) * hidden_dim
        self.w_in: nn.Parameter = nn.Parameter(torch.empty(wide, dim))
        self.w_out: nn.Parameter = nn.Parameter(torch.empty(dim, hidden_dim))
        self.b_in: nn.Parameter | None = nn.Parameter(torch.empty(wide)) if bias else None
        self.b_out: nn.Parameter | None = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as nn.Linear draws its own: uniform within 1/sqrt(fan in)."""
        for tensor, fan_in in (
            (self.w_in, self.dim),
            (self.b_in, self.dim),
            (self.w_out, self.hidden_dim),
            (self.b_out, self.hidden_dim),
        ):
            if tensor is not None:
                nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def blocks(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of w_in [G, I/G or 2I/G, H], w_out [G, H, I/G] and b_in [G, I/G or 2I/G], for dc.grouped_mlp."""
        w_in = self.w_in.view(self.num_blocks, -1, self.dim)
        w_out = self.w_out.view(self.dim, self.num_blocks, -1).permute(1, 0, 2)
        return w_in, w_out, None if self.b_in is None else self.b_in.view(self.num_blocks, -1)

    def run_blocks(self, x: Tensor, mask: Tensor, scale: Tensor | None = None, **others: Tensor | None) -> Tensor:
        """x [..., H] through the blocks of mask [T, G], scaled by scale [T, G]; records plan, cost and others."""
        plan = route_mask(mask, scale)
        self.record(plan, functools.partial(share_of_groups, plan, x.shape[:-1], scale), **others)
        x = in_autocast(x)  # so that the result has one dtype, whoever computes it
        if every_slot(plan):
            return self._dense(x, scale)
        if self._outgrows(plan) and wants_grad(x, scale, *self.parameters(recurse=False)):
            return self._dense(x, scale, mask)
        w_in, w_out, b_in = self.blocks()
        b_out = residual = None
        if self.b_out is not None:
            if self.bias_of_first_block:
                b_out = F.pad(self.b_out[None], (0, 0, 0, self.num_blocks - 1))
            else:
                residual = self.b_out.to(x.dtype).expand(x.shape)
        return grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan, activation=self.activation, residual=residual)

    def _outgrows(self, plan: Plan) -> bool:
        """Whether there are so many slots that computing every neuron takes no longer, where the host knows it."""
        if mode() != "auto" or not plan.exact:
            return False
        return plan.num_slots >= _DENSE_FROM * plan.num_rows * plan.num_groups and plan.num_slots * self.dim > _MANY

    def _dense(self, x: Tensor, scale: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Every block of every row as two products; where `mask` [T, G] is given, neurons outside of it are 0."""
        shape = (*x.shape[:-1], self.num_blocks, 1)
        live = None if mask is None else mask.view(shape)
        if live is not None:
            x = torch.where(live.any(-2), x, 0)  # what a row without blocks holds reaches no gradient
        pre = F.linear(x, self.w_in, self.b_in)
        hidden = activations.hidden(pre.unflatten(-1, (self.num_blocks, -1)), self.activation)
        if live is not None:
            hidden = torch.where(live, hidden, 0)
        elif scale is None:
            return F.linear(hidden.flatten(-2), self.w_out, self.b_out)
        weight = hidden.new_ones(()) if scale is None else scale.view(shape).to(hidden.dtype)
        weight = weight if live is None else torch.where(live, weight, 0)
        hidden = (hidden if scale is None else hidden * weight).flatten(-2)
        if self.b_out is None or not self.bias_of_first_block:
            return F.linear(hidden, self.w_out, self.b_out)
        return F.linear(hidden, self.w_out) + weight[..., 0, :] * self.b_out.to(hidden.dtype)

    def expect_rows(self, x: Tensor) -> None:
        """Raises unless x is a tensor [..., H] of the weights' dtype and device."""
        expect_rows(x, self.dim, self.w_in)

    @torch.no_grad()
    def fill(self, weights: ExpertWeights, order: Tensor | None = None) -> None:
        """Take copies of a dense MLP's weights, on their device and in their dtype.

        Args:
            weights: as dyncore.nn.experts.read_expert reads them, of this layer's sizes and activation.
            order: int64 [I]: the dense neuron that becomes each neuron of the blocks, or None for their own order.

        Raises ValueError where sizes or the activation differ.
        """
        want = (self.dim, self.hidden_dim, self.activation)
        got = (*weights.w_out.shape, weights.activation)
        if want != got:
            raise ValueError(f"weights: expected (dim, hidden_dim, activation) {want}, got {got}")
        self.to(device=weights.w_out.device, dtype=weights.w_out.dtype)
        chosen = torch.arange(self.hidden_dim) if order is None else order
        chosen = chosen.to(weights.w_out.device)
        parts = (chosen, chosen + self.hidden_dim) if self.activation in activations.GATED else (chosen,)
        rows = torch.cat([part.view(self.num_blocks, -1) for part in parts], 1).flatten()
        for name, value, index in (
            ("w_in", weights.w_in, rows),
            ("b_in", weights.b_in, rows),
            ("w_out", weights.w_out.t(), chosen),
            ("b_out", weights.b_out, None),
        ):
            if value is None:
                setattr(self, name, None)
                continue
            copy = value.detach().clone() if index is None else value.detach()[index]
            copy = copy.t().contiguous() if name == "w_out" else copy
            setattr(self, name, nn.Parameter(copy, requires_grad=value.requires_grad))

    @torch.no_grad()
    def to_dense(self) -> MLP:
        """The MLP that computes every block of every row, with copies of the weights."""
        mlp = MLP(self.dim, self.hidden_dim, activation=self.activation).to(self.w_in.device, self.w_in.dtype)
        w_in, _, b_in = self.blocks()
        gated = self.activation in activations.GATED
        halves = w_in.chunk(2, 1) if gated else (w_in,)
        mlp.w_in.weight.copy_(torch.cat([half.flatten(0, 1) for half in halves]))
        mlp.w_out.weight.copy_(self.w_out)
        if b_in is None:
            mlp.w_in.bias = None  # type: ignore[assignment]
        else:
            mlp.w_in.bias.copy_(torch.cat([half.flatten() for half in (b_in.chunk(2, 1) if gated else (b_in,))]))
        if self.b_out is None:
            mlp.w_out.bias = None  # type: ignore[assignment]
        else:
            mlp.w_out.bias.copy_(self.b_out)
        return mlp

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.hidden_dim}, num_blocks={self.num_blocks}, activation={self.activation}"


class DynamicWidthMLP(BlockMLP):
    """y = W_out[:, S(x)] act(W_in[S(x)] x + b_in[S(x)]) + b_out: every row has neurons of its own (dynamic width;
    Bengio 2013, conditional computation; Slimmable networks, Yu 2019, where S is nested).

    Args:
        dim: H. hidden_dim: I. num_blocks: G blocks of I/G neurons each; S(x) is a union of them.
        gate: maps x [..., H] to a bool mask [..., G], or (mask, scale), scale multiplying what a block adds; a
            `BlockGate` if None. For nested widths take a `CountGate`.
        activation: any of dc.grouped_mlp. bias: whether there are b_in and b_out.

    Skipped are both products of the blocks that a row does not take, forward and backward, in training as in
    evaluation. A row without blocks gives exactly b_out, or 0; where every row takes all of them the result is that of
    the dense MLP, computed as one. `last_cost` is the share of the blocks that a row took. A slot reads its row of x
    once more and adds H numbers to its row of y, so blocks want to be wide: see docs/nested_width.md.

    Raises TypeError or ValueError on sizes, on an x that is not [..., H], and on a decision that does not fit.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_blocks: int = 4,
        gate: Gating | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(dim, hidden_dim, num_blocks, activation=activation, bias=bias)
        self.gate: Gating = BlockGate(dim, num_blocks) if gate is None else gate
        expect_callable("gate", self.gate)

    def forward(self, x: Tensor) -> Tensor:
        """Rows x [..., H] to rows [..., H]."""
        self.expect_rows(x)
        return self.run_blocks(x, *decide_groups(self.gate, x, self.num_blocks))
