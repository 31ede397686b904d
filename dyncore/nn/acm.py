"""Adaptive computation modules: ordered learners, of which every row takes the first few that its gate asks for."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn.base import Decision, DynamicLayer, Gating, expect_callable, expect_size
from dyncore.nn.dynamic_width import BlockMLP, decide_groups, every_slot, share_of_groups
from dyncore.nn.full_precision import full_precision
from dyncore.nn.gates import ThresholdGate, expect_temperature, scalar, shown
from dyncore.nn.inputs import expect_rows, in_autocast
from dyncore.ops import gather_rows, grouped_linear, scatter_rows
from dyncore.plan import Plan, route, route_mask, select

# From this density on rows that share a count take one product over all their inputs, below it one for each learner:
# 2048 rows of 512, 4 learners, 512 outputs, 2 threads of Zen 4, at a density of 0.1 / 0.25 / 0.5 / 0.75 by counts 1.8 /
# 3.2 / 5.0 / 6.4 ms, by slots 1.7 / 3.1 / 5.1 / 7.0 ms (dense: 7.9); of 1024, 3072 outputs, at 0.25 / 0.75 by counts
# 24 / 57 ms, by slots 22 / 63 ms.
_BY_COUNT_FROM = 0.5
_ROWS = 64  # for each count, on average: each packs the weights anew


class CountGate(ThresholdGate):
    """How many of N ordered groups a row takes, 0..N (Adaptive Computation Modules, Wojcik 2023).

    A softmax over the N + 1 counts gives P(count > i) for every group i; group i is live where that is above the
    threshold, so that groups are nested: the first k of them. In training the logits carry Gumbel noise and are
    divided by the temperature (Jang 2017). `threshold` and `temperature` are buffers: with a threshold below 0 every
    group is live, from 1 on none is.

    Args:
        score: the width D of x, for a Linear score in float32, or a module that maps x [..., D] to logits [..., N + 1].
        num_groups: N.
        weight: the scale of a live group: "hard": 1, with the gradient of P(count > i) (straight-through); "soft":
            P(count > i); "none": no scale, and no gradient to the gate.
    """

    _checks = {"temperature": expect_temperature}  # noqa: RUF012
    temperature: Tensor

    def __init__(
        self,
        score: int | nn.Module,
        num_groups: int,
        threshold: float = 0.5,
        *,
        temperature: float = 1.0,
        weight: str = "hard",
    ) -> None:
        expect_size("num_groups", num_groups)
        if isinstance(score, int) and not isinstance(score, bool):
            score = nn.Linear(score, num_groups + 1)
        super().__init__(score, threshold, weight=weight)
        self.num_groups = num_groups
        self.register_buffer("temperature", scalar(expect_temperature("temperature", temperature)))

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., N + 1] of the counts of rows x [..., D]."""
        logits = full_precision(self.score, x)
        if logits.shape != (*x.shape[:-1], self.num_groups + 1):
            want = [*x.shape[:-1], self.num_groups + 1]
            raise ValueError(f"score: expected logits {want}, got {list(logits.shape)}")
        return logits

    def forward(self, x: Tensor) -> Decision:
        """The decision [..., N] on the groups of rows x [..., D]."""
        logits = self.logits(x)
        if self.training:
            u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = (logits - torch.log(-torch.log(u))) / self.temperature
        p = torch.softmax(logits, -1)
        above = [p[..., self.num_groups]]  # sums of few terms, from the last on: torch's cumsum is not deterministic
        for count in range(self.num_groups - 1, 0, -1):
            above.append(above[-1] + p[..., count])
        p = torch.stack(above[::-1], -1).clamp(max=1)
        mask = p > self.threshold
        return Decision(mask, self._weigh(mask, p))

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, temperature={shown(self.temperature)}, {super().extra_repr()}"


class ACM(BlockMLP):
    """y = sum over i <= k(x) of f_i(x): ordered learners, each a small MLP, and a gate that says how many a row needs
    (Adaptive Computation Modules, Wojcik 2023).

    Args:
        dim: H. num_learners: N. hidden: the hidden width of each learner.
        gate: maps x [..., H] to a bool mask [..., N] or (mask, scale); a `CountGate` if None.
        activation: any of dc.grouped_mlp. bias: whether there are b_in [N * hidden] and b_out [H], which belongs to
            the first learner.

    Each learner corrects the sum of those before it. Skipped are the learners from k(x) + 1 on, forward and backward,
    in training as in evaluation. k = 0 gives exactly 0; where every row takes all learners the layer is one dense MLP
    of N * hidden neurons, and computed as one. `last_cost` is k(x) / N with the gradient of the gate; the paper trains
    it with `losses.compute_target(layer.last_cost, share)`. Weights as in `BlockMLP`; `convert.acmize` splits those of
    a trained model.

    Raises TypeError or ValueError on sizes, on an x that is not [..., H], and on a decision that does not fit.
    """

    bias_of_first_block = True

    def __init__(
        self,
        dim: int,
        num_learners: int,
        hidden: int,
        gate: Gating | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        expect_size("num_learners", num_learners)
        expect_size("hidden", hidden)
        super().__init__(dim, num_learners * hidden, num_learners, activation=activation, bias=bias)
        self.gate: Gating = CountGate(dim, num_learners) if gate is None else gate
        expect_callable("gate", self.gate)

    def forward(self, x: Tensor) -> Tensor:
        """Rows x [..., H] to rows [..., H]."""
        self.expect_rows(x)
        return self.run_blocks(x, *decide_groups(self.gate, x, self.num_blocks))


class ACMLinear(DynamicLayer):
    """y = bias + sum over i <= k(x) of W_i x_i: a Linear layer as ordered learners, for the projections of attention
    (Q, K, V, O of Adaptive Computation Modules, Wojcik 2023).

    Args:
        in_features: K. out_features: N outputs. num_learners: a divisor of K; learner i multiplies the i-th part of x,
            so that all of them together are the dense layer at its own cost.
        gate: maps x [..., K] to a bool mask [..., num_learners] or (mask, scale); a `CountGate` if None.
        bias: added to the first learner: a row that takes none gives exactly 0.

    weight [N, K] and bias [N] are those of nn.Linear. Skipped are the products of the learners from k(x) + 1 on,
    forward and backward. `last_cost` is k(x) / num_learners with the gradient of the gate. A slot adds N numbers to its
    row for 2 N K / num_learners FLOPs: few learners, of 128 inputs or more each, pay.

    Raises TypeError or ValueError on sizes, on an x that is not [..., K], and on a decision that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_learners: int = 4,
        gate: Gating | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("num_learners", num_learners),
        ):
            expect_size(name, value)
        if in_features % num_learners:
            raise ValueError(f"num_learners: expected a divisor of in_features={in_features}, got {num_learners}")
        self.in_features = in_features
        self.out_features = out_features
        self.num_learners = num_learners
        self.weight: nn.Parameter = nn.Parameter(torch.empty(out_features, in_features))
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(out_features)) if bias else None
        for parameter in (self.weight, self.bias):  # as nn.Linear draws its own
            if parameter is not None:
                nn.init.uniform_(parameter, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        self.gate: Gating = CountGate(in_features, num_learners) if gate is None else gate
        expect_callable("gate", self.gate)

    def forward(self, x: Tensor) -> Tensor:
        """Rows x [..., K] to rows [..., N]."""
        expect_rows(x, self.in_features, self.weight)
        count = self.num_learners
        mask, scale = decide_groups(self.gate, x, count)
        plan = route_mask(mask, scale)
        self.record(plan, functools.partial(share_of_groups, plan, x.shape[:-1], scale))
        x = in_autocast(x)  # so that the result has one dtype, whoever computes it
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        if every_slot(plan):
            out = self._dense(rows, scale)
        elif mode() == "masked":
            out = self._dense(rows, scale, mask)
        elif self._by_count_pays(mask, plan):
            out = self._by_count(rows, mask, scale)
        else:
            out = self._by_slot(rows, mask, plan)
        return out.view(*x.shape[:-1], self.out_features)

    def _by_count_pays(self, mask: Tensor, plan: Plan) -> bool:
        """Whether rows take the first learners, as they should, and many rows many of them."""
        count = self.num_learners
        if not (plan.exact and mask.is_cpu):
            return False
        if mask.shape[0] < _ROWS * count or plan.num_slots < _BY_COUNT_FROM * mask.numel():
            return False
        return not bool((mask[:, 1:] > mask[:, :-1]).any())

    def _by_count(self, rows: Tensor, mask: Tensor, scale: Tensor | None) -> Tensor:
        """A product for each number of learners that rows take, over the inputs of all these learners."""
        part, taken = self.in_features // self.num_learners, mask.sum(1)
        if scale is not None:
            scale = torch.where(mask, scale, 0).to(rows.dtype)
            rows = (rows.unflatten(-1, (self.num_learners, -1)) * scale[..., None]).flatten(-2)
        bias = None if self.bias is None or scale is not None else self.bias[None]
        ends = [k * part for k, size in enumerate(torch.bincount(taken).tolist()) if k and size]
        results = [
            grouped_linear(
                rows[:, :end],
                self.weight[None, :, :end],
                bias,
                plan=select(taken == end // part),
                scatter=len(ends) == 1,
            )
            for end in ends
        ]
        if len(ends) == 1:
            out = results[0]
        else:
            order = route((taken - 1)[:, None], num_groups=self.num_learners)
            out = scatter_rows(torch.cat(results), order)
        return out if self.bias is None or scale is None else out + scale[:, :1].to(out.dtype) * self.bias.to(out.dtype)

    def _by_slot(self, rows: Tensor, mask: Tensor, plan: Plan) -> Tensor:
        """A product for each learner, over its own inputs; a row's results are summed."""
        count, part = self.num_learners, self.in_features // self.num_learners
        pairs = select(mask)  # pair t * count + g in the order of rows; wanted is that of learners
        place = plan.rows * count + plan.groups().clamp(max=count - 1).int()
        pairs = dataclasses.replace(pairs, rows=place, offsets=plan.offsets, row_slots=plan.row_slots)
        slots = gather_rows(rows.reshape(rows.shape[0] * count, part), pairs)
        weight = self.weight.view(self.out_features, count, -1).permute(1, 0, 2)
        bias = None if self.bias is None else F.pad(self.bias[None], (0, 0, 0, count - 1))
        return grouped_linear(slots, weight, bias, plan=plan, gather=False)

    def _dense(self, rows: Tensor, scale: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Every learner of every row as one product; where `mask` [T, N] is given, inputs outside of it are 0."""
        if scale is None and mask is None:
            return F.linear(rows, self.weight, self.bias)
        parts = rows.unflatten(-1, (self.num_learners, -1))
        weight = rows.new_ones(()) if scale is None else scale.to(rows.dtype)
        if mask is not None:
            parts, weight = torch.where(mask[..., None], parts, 0), torch.where(mask, weight, 0)
        out = F.linear((parts if scale is None else parts * weight[..., None]).flatten(-2), self.weight)
        return out if self.bias is None else out + weight[:, :1].to(out.dtype) * self.bias.to(out.dtype)

    @classmethod
    def from_dense(cls, linear: nn.Linear, num_learners: int = 4, gate: Gating | None = None) -> ACMLinear:
        """An ACMLinear that shares the Parameters of an nn.Linear. Raises as the constructor, TypeError on others."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, num_learners, gate, bias=linear.bias is not None)
        layer.to(linear.weight.device, linear.weight.dtype)
        for name, parameter in linear.named_parameters():
            setattr(layer, name, parameter)
        return layer

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_learners={self.num_learners}, bias={self.bias is not None}"
        )
