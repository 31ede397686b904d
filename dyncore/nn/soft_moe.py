"""Soft mixture of experts: every slot is a weighted mean of all tokens. Nothing is skipped, and nothing can be."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.base import DynamicLayer, executed, expect_choice, expect_size, linked
from dyncore.nn.full_precision import full_precision
from dyncore.nn.inputs import expect_rows
from dyncore.nn.mlp import ACTIVATIONS
from dyncore.ops import grouped_mlp
from dyncore.plan import route, select


class SoftMoE(DynamicLayer):
    """y_t = sum over slots s of C[t, s] f_e(s)(sum over tokens u of D[u, s] x_u): all experts, softly (Jacobs 1991;
    Soft MoE, Puigcerver 2023).

    Args:
        dim: H. hidden_dim: I, the width of each expert. num_experts: E.
        slots: of each expert, for each sequence. E * slots is what a sequence costs, however long it is.
        activation: any of dc.grouped_mlp. bias: whether experts have biases.

    D is the softmax of the logits [S, E * slots] over the tokens of a sequence, C over the slots. As in the paper they
    are the cosines of tokens and slots' vectors, multiplied by a learned `scale`; here times sqrt(H) beside, so that
    from scale = 1 those of random directions have size 1 at any H.

    Every token goes into every slot: no pair of a row and an expert can be left out, `last_cost` is 1 for each row, and
    no threshold trades accuracy for compute. What it saves against a dense MLP is in the number of slots, which is
    fixed. A token sees all tokens of its sequence: it is NOT causal.

    Parameters: slot_vectors [H, E * slots], scale []; w_in [E, I, H] (gated [E, 2I, H], gate half first),
    w_out [E, H, I], b_in, b_out. Raises TypeError or ValueError on sizes and on an x that is not [..., S, H].
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        slots: int = 1,
        *,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts), ("slots", slots))
        for name, value in sizes:
            expect_size(name, value)
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.num_experts = num_experts
        self.slots = slots
        self.activation: str = expect_choice("activation", activation, ACTIVATIONS)
        width = (2 if activation in activations.GATED else 1) * hidden_dim
        self.slot_vectors: nn.Parameter = nn.Parameter(torch.empty(dim, num_experts * slots))
        self.scale: nn.Parameter = nn.Parameter(torch.ones(()))
        self.w_in: nn.Parameter = nn.Parameter(torch.empty(num_experts, width, dim))
        self.w_out: nn.Parameter = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.b_in: nn.Parameter | None = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.b_out: nn.Parameter | None = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert as nn.Linear draws its own, and the slots' vectors from a normal distribution."""
        nn.init.normal_(self.slot_vectors, std=1 / math.sqrt(self.dim))
        nn.init.ones_(self.scale)
        inputs, outputs = (self.w_in, self.b_in), (self.w_out, self.b_out)
        for tensors, fan_in in ((inputs, self.dim), (outputs, self.hidden_dim)):
            for tensor in tensors:
                if tensor is not None:
                    nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def logits(self, x: Tensor) -> Tensor:
        """float32 logits [..., S, E * slots] of tokens x [..., S, H]."""

        def score(rows: Tensor) -> Tensor:
            vectors = F.normalize(self.slot_vectors.to(rows.dtype), dim=0)
            return F.normalize(rows, dim=-1) @ vectors * (self.scale * math.sqrt(self.dim)).to(rows.dtype)

        return full_precision(score, x.to(torch.promote_types(x.dtype, torch.float32)))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens x [..., S, H] of sequences to [..., S, H]."""
        expect_rows(x, self.dim, self.w_in, "..., S")
        plan = select(torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device))
        self.record(plan, functools.partial(executed, plan, x.shape[:-1]))
        batch = math.prod(x.shape[:-2])
        tokens = x.reshape(batch, *x.shape[-2:])
        if tokens.numel() == 0:
            return linked(x, self)
        logits = self.logits(tokens)
        mixed = torch.softmax(logits, 1).to(x.dtype).transpose(1, 2) @ tokens  # [B, E * slots, H]
        expert = torch.arange(self.num_experts, device=x.device).repeat_interleave(self.slots).repeat(batch)
        y = grouped_mlp(
            mixed,
            self.w_in,
            self.w_out,
            self.b_in,
            self.b_out,
            plan=route(expert[:, None], num_groups=self.num_experts),
            activation=self.activation,
        )
        return (torch.softmax(logits, 2).to(y.dtype) @ y).view(x.shape)

    def extra_repr(self) -> str:
        sizes = f"{self.dim}, {self.hidden_dim}, num_experts={self.num_experts}, slots={self.slots}"
        return f"{sizes}, activation={self.activation}"
