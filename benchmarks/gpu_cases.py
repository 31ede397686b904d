"""What benchmarks.gpu measures: cases, their inputs, and the ways to compute them, rivals among them.

Each way is a function of the number of a set of buffers, so that rotating the sets keeps the caches cold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import dyncore as dc

Call = Callable[[int], object]
Way = Callable[[int], Tensor]

# Bytes of inputs that a rotation covers at least: several times the 60 MB of L2 of an H200
ROTATION = 256 * 2**20
MOST_SETS = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: `rows` rows of `width`, each sent to `per_row` of `groups` weights [out_width, width].

    With one group per_row is the keep ratio of token skipping. `graph` says to replay CUDA graphs."""

    part: str
    rows: int
    width: int
    out_width: int
    groups: int
    per_row: float
    dtype: torch.dtype = torch.bfloat16
    graph: bool = False

    @property
    def name(self) -> str:
        where = f"keep={self.per_row:g}" if self.groups == 1 else f"E={self.groups} k={self.per_row:g}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.part} T={self.rows} {where} K={self.width} N={self.out_width} {dtype}"

    def tiny(self) -> Case:
        """The same case at a size for a CPU."""
        groups, rows = min(self.groups, 4), min(self.rows, 48)
        return dataclasses.replace(
            self, rows=rows, width=32, out_width=48, groups=groups, per_row=min(self.per_row, groups)
        )


CASES = [
    *(Case("token_skip", 16384, 4096, 16384, 1, keep) for keep in (0.125, 0.25, 0.5, 0.75, 1.0)),
    Case("token_skip", 16384, 1024, 4096, 1, 0.25, torch.float32),
    Case("moe", 16384, 2048, 2048, 64, 8),
    Case("moe", 16384, 14336, 4096, 8, 2),
    Case("moe", 4096, 1024, 1024, 16, 2, torch.float32),
    *(Case("few_rows", rows, 2816, 1408, 128, 8, graph=True) for rows in (1, 64, 512, 4096)),
]


class Inputs:
    """The tensors of a case on a device: `sets` copies of x and weight, one routing for all of them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(case.dtype)

        size = (case.rows * case.width + case.groups * case.out_width * case.width) * case.dtype.itemsize
        self.case = case
        self.sets = max(1, min(MOST_SETS, -(-ROTATION // size))) if device.type == "cuda" else 2
        self.x = [randn(case.rows, case.width) for _ in range(self.sets)]
        self.weight = [randn(case.groups, case.out_width, case.width) for _ in range(self.sets)]
        if case.groups == 1:
            order = torch.rand(case.rows, device=device, generator=generator).argsort()
            self.mask = torch.zeros(case.rows, dtype=torch.bool, device=device)
            self.mask[order[: round(case.per_row * case.rows)]] = True
            self.expert = self.mask.long()[:, None] - 1  # 0 or nowhere
            self.gate = torch.ones(case.rows, 1, device=device)
        else:
            scores = torch.rand(case.rows, case.groups, device=device, generator=generator)
            self.gate, self.expert = scores.topk(int(case.per_row), dim=1)
        self.slots = int((self.expert >= 0).sum())

    @property
    def flops(self) -> int:
        return 2 * self.slots * self.case.width * self.case.out_width

    @property
    def bytes(self) -> int:
        """Each live row and each weight that is needed read once, each row of the output written once."""
        used = int(torch.unique(self.expert[self.expert >= 0]).numel())
        rows = int((self.expert >= 0).any(1).sum())
        elements = rows * self.case.width + used * self.case.width * self.case.out_width
        return (elements + self.case.rows * self.case.out_width) * self.case.dtype.itemsize

    def plan(self) -> dc.Plan:
        if self.case.groups == 1:
            return dc.select(self.mask)
        return dc.route(self.expert, self.gate, num_groups=self.case.groups)


def ways(inputs: Inputs) -> dict[str, Way]:
    """Every way to compute the case; all but `dense` give the same [T, N]."""
    case, x, weight = inputs.case, inputs.x, inputs.weight
    plan = inputs.plan()
    calls: dict[str, Way] = {
        "dyncore": lambda i: dc.grouped_linear(x[i], weight[i], plan=inputs.plan()),
        "dyncore_planned": lambda i: dc.grouped_linear(x[i], weight[i], plan=plan),
    }
    if case.groups == 1:
        calls["dense"] = lambda i: F.linear(x[i], weight[i][0])
        calls["naive"] = lambda i: naive_skip(x[i], weight[i][0], inputs.mask)
    else:
        # The rate of one product of as many rows: no routing is as fast
        gathered = x[0].repeat_interleave(int(case.per_row), 0)
        calls["dense"] = lambda i: F.linear(gathered, weight[i][0])
        calls["loop"] = lambda i: loop_over_experts(x[i], weight[i], inputs.expert, inputs.gate)
        if hasattr(F, "grouped_mm") and case.dtype == torch.bfloat16:
            calls["grouped_mm"] = lambda i: with_grouped_mm(x[i], weight[i], inputs.expert, inputs.gate)
    return calls


# The ways that wait for nothing, so that a CUDA graph can hold them
CAPTURABLE = ("dyncore", "dyncore_planned", "dense", "grouped_mm")


def naive_skip(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    index = mask.nonzero().squeeze(1)
    y = F.linear(x.index_select(0, index), weight)
    return x.new_zeros(x.shape[0], weight.shape[0]).index_add_(0, index, y)


def loop_over_experts(x: Tensor, weight: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for e, w in enumerate(weight.unbind(0)):
        row, place = (expert == e).nonzero(as_tuple=True)
        out.index_add_(0, row, F.linear(x[row], w) * gate[row, place, None].to(x.dtype))
    return out


def with_grouped_mm(x: Tensor, weight: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    key, order = expert.reshape(-1).sort(stable=True)
    ends = torch.arange(1, weight.shape[0] + 1, device=x.device)
    offs = torch.searchsorted(key, ends).int()
    row = order // expert.shape[1]
    y = F.grouped_mm(x[row], weight.transpose(1, 2), offs=offs)
    y = y * gate.reshape(-1)[order, None].to(x.dtype)
    return x.new_zeros(x.shape[0], weight.shape[1]).index_add_(0, row, y)


def plan_makers(rows: int, device: torch.device) -> dict[str, Call]:
    """Plan making alone, in the sizes of the cases."""
    mask, scores = (
        torch.rand(rows, device=device) < 0.25,
        torch.rand(max(rows // 4096, 1), min(rows, 4096), device=device),
    )
    gate, expert = torch.rand(rows, 64, device=device).topk(8, dim=1)
    logits, pairs = torch.randn(rows, 64, device=device), torch.rand(rows, 16, device=device) < 0.25
    return {
        "select": lambda i: dc.select(mask),
        "select_topk": lambda i: dc.select_topk(scores, scores.shape[1] // 4),
        "route": lambda i: dc.route(expert, gate, num_groups=64),
        "route_topk": lambda i: dc.route_topk(logits, 8, normalize=True),
        "route_mask": lambda i: dc.route_mask(pairs),
    }


def error(inputs: Inputs, out: Tensor, samples: int = 8) -> float:
    """Worst error of some rows of `out` against float64, over max(rms, |reference|)."""
    chosen = torch.linspace(0, inputs.case.rows - 1, min(samples, inputs.case.rows)).long().tolist()
    worst = 0.0
    for t in chosen:
        want = torch.zeros(inputs.case.out_width, dtype=torch.float64, device=out.device)
        for e, gate in zip(inputs.expert[t].tolist(), inputs.gate[t].tolist(), strict=True):
            if e >= 0:
                want += gate * (inputs.weight[0][e].double() @ inputs.x[0][t].double())
        scale = want.abs().clamp(min=max(float(want.square().mean().sqrt()), 1e-30))
        off = float(((out[t].double() - want).abs() / scale).max())
        if math.isnan(off):
            return off
        worst = max(worst, off)
    return worst
