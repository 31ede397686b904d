"""The cases of `make gpu`: MLPs whose rows are routed to groups, and their tensors on a device."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

import dyncore as dc

# Bytes that a rotation over sets of buffers reads at least: several times the 60 MB of L2 of an H200
ROTATION = 256 * 2**20
MOST_SETS = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """`rows` rows of `width`, each through the MLPs of `hidden` of `per_row` of `groups` groups.

    With one group per_row is the keep ratio of token skipping. backward: gradients too, of rows, weights and gates.
    graph: replayed as a CUDA graph. The label says which case it is at any size.
    """

    part: str
    label: str
    rows: int
    width: int
    hidden: int
    groups: int
    per_row: float
    activation: str = "swiglu"
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.label} T={self.rows} H={self.width} I={self.hidden} {dtype}"

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    def tiny(self) -> Case:
        """The same case at a size for a CPU."""
        groups = min(self.groups, 4)
        per_row = min(self.per_row, 2)
        return dataclasses.replace(self, rows=min(self.rows, 48), width=32, hidden=48, groups=groups, per_row=per_row)


_EXPERTS_64 = (16384, 2048, 1024, 64, 8)
_EXPERTS_8 = (16384, 4096, 14336, 8, 2)
CASES = [
    *(Case("token_skip", f"keep={k:g}", 16384, 4096, 16384, 1, k, "gelu") for k in (0.125, 0.25, 0.5, 0.75, 1.0)),
    Case("moe", "E=64 k=8", *_EXPERTS_64),
    Case("moe", "E=8 k=2", *_EXPERTS_8),
    Case("moe", "E=64 k=8 training", *_EXPERTS_64, backward=True),
    Case("moe", "E=8 k=2 training", *_EXPERTS_8, backward=True),
    Case("moe", "E=16 k=2 float32", 4096, 1024, 1024, 16, 2, dtype=torch.float32),
    *(Case("few_rows", f"E=128 k=8 T={t}", t, 2816, 704, 128, 8, graph=True) for t in (1, 64, 512, 4096)),
]


class Inputs:
    """The tensors of a case: x, weights and routing, `sets` of each to turn through, so that caches are cold.

    Values and products are of unit scale. Where weights alone exceed a rotation there is one copy of them, but each
    set goes to experts of its own.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator, dtype=case.dtype)

        shape_in = (case.groups, 2 * case.hidden if case.gated else case.hidden, case.width)
        shape_out = (case.groups, case.width, case.hidden)
        group_bytes = (shape_in[1] * case.width + case.width * case.hidden) * case.dtype.itemsize
        used = min(case.groups, max(1, round(case.rows * case.per_row)))
        read = case.rows * case.width * case.dtype.itemsize + used * group_bytes
        on_gpu = device.type == "cuda"
        self.sets = min(MOST_SETS, -(-ROTATION // read)) if on_gpu else 2
        copies = min(self.sets, -(-ROTATION // (case.groups * group_bytes))) if on_gpu else 1

        self.x = [randn(case.rows, case.width) for _ in range(self.sets)]
        w_in = [randn(*shape_in).mul_(case.width**-0.5) for _ in range(copies)]
        w_out = [randn(*shape_out).mul_((case.hidden / 2) ** -0.5) for _ in range(copies)]
        self.w_in = [w_in[i % copies] for i in range(self.sets)]
        self.w_out = [w_out[i % copies] for i in range(self.sets)]
        self.grad = randn(case.rows, case.width)

        self.mask = torch.ones(case.rows, dtype=torch.bool, device=device)
        self.logits: list[Tensor] = []
        if case.groups == 1:
            order = torch.rand(case.rows, device=device, generator=generator).argsort()
            self.mask[order[round(case.per_row * case.rows) :]] = False
            self.expert = [self.mask.int()[:, None] - 1] * self.sets  # 0, or -1: nowhere
            self.gate = [torch.ones(case.rows, 1, device=device)] * self.sets
        else:
            shape = (case.rows, case.groups)
            self.logits = [torch.randn(shape, device=device, generator=generator) for _ in range(self.sets)]
            chosen = [logits.softmax(1).topk(int(case.per_row), dim=1) for logits in self.logits]
            self.expert = [indices for _, indices in chosen]
            self.gate = [values / values.sum(1, keepdim=True) for values, _ in chosen]
        if case.backward:
            for t in (*self.x, *w_in, *w_out, *self.gate):
                t.requires_grad_()

    def leaves(self, i: int) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.x[i], self.w_in[i], self.w_out[i], self.gate[i]]

    @functools.cached_property
    def slots(self) -> int:
        return int((self.expert[0] >= 0).sum())

    @property
    def flops(self) -> int:
        """2 per multiply-add of the live slots; a backward pass has twice the products of a forward."""
        forward = 2 * self.slots * (self.w_in[0][0].numel() + self.w_out[0][0].numel())
        return 3 * forward if self.case.backward else forward

    @property
    def bytes(self) -> int:
        """Of a forward: each live row and each weight that is needed read once, the output written once."""
        expert = self.expert[0]
        used = int(torch.unique(expert[expert >= 0]).numel())
        rows = int((expert >= 0).any(1).sum()) + self.case.rows
        elements = rows * self.case.width + used * (self.w_in[0][0].numel() + self.w_out[0][0].numel())
        return elements * self.case.dtype.itemsize

    def plan(self, i: int) -> dc.Plan:
        if self.case.groups == 1:
            return dc.select(self.mask)
        return dc.route(self.expert[i], self.gate[i], num_groups=self.case.groups)
