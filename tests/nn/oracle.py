"""What the layer tests share: each layer built small, a run of it, and attention written out token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dyncore as dc

D = 16


class Fixed(nn.Module):
    """A gate that says what it was told."""

    def __init__(self, mask: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.mask, self.scale = mask, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.mask, self.scale


def block(**options) -> dc.nn.TransformerBlock:
    return dc.nn.TransformerBlock(D, 4, **options)


def chain(length: int) -> list[nn.Module]:
    """Modules that treat rows one by one."""
    return [nn.Sequential(nn.Linear(D, 24), nn.Tanh(), nn.Linear(24, D)) for _ in range(length)]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "skip": lambda: dc.nn.Skip(dc.nn.MLP(D, 24), dc.nn.StraightThroughGate(D)),
    "skip_update": lambda: dc.nn.Skip(dc.nn.MLP(D, 24), dc.nn.ThresholdGate(D), returns="update"),
    "skip_topk": lambda: dc.nn.Skip(dc.nn.MLP(D, 24), dc.nn.TopKGate(D, 0.25)),
    "mod": lambda: dc.nn.MixtureOfDepths(block(), 0.25),
    "mod_update": lambda: dc.nn.MixtureOfDepths(block(causal=False), 3, weight="sigmoid", returns="update"),
    "token_skip": lambda: dc.nn.TokenSkip(block(), dc.nn.ThresholdGate(D)),
    "token_skip_keys": lambda: dc.nn.TokenSkip(block(), dc.nn.StraightThroughGate(D), "all_keys"),
    "token_skip_topk": lambda: dc.nn.TokenSkip(block(causal=False), dc.nn.TopKGate(D, 5), "all_keys"),
    "moe": lambda: dc.nn.MoE(D, 24, 6, 2, shared_experts=1, bias=True),
    "moe_top1": lambda: dc.nn.MoE(D, 24, 6, 1, activation="gelu"),
    "dynamic_width": lambda: dc.nn.DynamicWidthMLP(D, 24, 4, activation="swiglu"),
    "acm": lambda: dc.nn.ACM(D, 3, 8).eval(),  # its gate draws noise in training
    "tree": lambda: dc.nn.TreeMLP(D, 2, 8, soft=False),
    "dynamic_k": lambda: dc.nn.DynamicKMoE(D, 6, 4, 0.05, activation="swiglu"),
    "acm_linear": lambda: dc.nn.ACMLinear(D, D, 4).eval(),
    "moe_expert_choice": lambda: dc.nn.MoE(D, 24, 6, 2, routing="expert_choice"),
    "adaptive_depth": lambda: dc.nn.AdaptiveDepth(chain(4), dc.nn.FeatureScore(0, 30.0, 0.0), tokens=True),
    "adaptive_depth_block": lambda: dc.nn.AdaptiveDepth(
        block(), dc.nn.FeatureScore(0, 2.0, 0.0), 3, epsilon=0.3, tokens=True
    ),
    "branch": lambda: dc.nn.Branch(chain(3), dc.nn.ChoiceGate(D, 3, exit=True).eval()),
    "branch_soft": lambda: dc.nn.Branch(chain(3), dc.nn.RectifiedGate(D, 3), returns="update"),
    "policy_skip": lambda: dc.nn.PolicySkip(chain(4), dc.nn.RectifiedGate(D, 4)),
}


class Run(NamedTuple):
    out: Tensor
    grads: dict[str, Tensor | None]  # of x and of every parameter


def run(layer: nn.Module, x: Tensor, mode: str = "sparse", weights: Tensor | None = None) -> Run:
    """One forward and backward from the sum of `weights` (a fixed random tensor if None) times the output."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with dc.execution(mode):
        out = layer(x)
    if weights is None:
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    grads = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return Run(out.detach(), grads)


def flops(fn: Callable[[], object], mode: str = "sparse") -> int:
    with dc.execution(mode):
        return dc.measure.flops(fn)


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head's vector [d], as a product of complex numbers."""
    half = x.shape[0] // 2
    angle = torch.tensor([position * 10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def attend(attention: dc.nn.Attention, queries: Tensor, at: list[int], keys: Tensor, places: list[int]) -> Tensor:
    """Attention of queries [N, D] at positions `at` to keys [M, D] at `places`, one query and one head at a time."""
    heads = attention.num_heads
    width = queries.shape[1] // heads
    rows = []
    for x, position in zip(queries, at, strict=True):
        seen = [i for i, place in enumerate(places) if place <= position or not attention.causal]
        parts = []
        for h in range(heads):
            s = slice(h * width, (h + 1) * width)
            q = rotated(attention.q(x)[s], position)
            kv = attention.kv(keys)
            k = torch.stack([rotated(kv[i, s], places[i]) for i in seen])
            v = kv[seen, queries.shape[1] + h * width : queries.shape[1] + (h + 1) * width]
            parts.append(torch.softmax(k @ q / math.sqrt(width), 0) @ v)
        rows.append(attention.out(torch.cat(parts)))
    return torch.stack(rows)


def block_on(layer: dc.nn.TransformerBlock, x: Tensor, chosen: list[int], all_keys: bool = False) -> Tensor:
    """The block on the chosen tokens of one sequence x [S, D]: [len(chosen), D]."""
    picked = layer.norm_attention(x[chosen])
    keys, places = (layer.norm_attention(x), list(range(len(x)))) if all_keys else (picked, chosen)
    h = x[chosen] + attend(layer.attention, picked, chosen, keys, places)
    return h + layer.mlp(layer.norm_mlp(h))
