"""Dynamic layers that execute a given share of what they may skip, whatever they would decide: for break-evens.

A gate is still asked, for what it costs, and then a random mask takes the place of its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyncore.nn.acm import ACM, ACMLinear
from dyncore.nn.base import Decision, DynamicLayer
from dyncore.nn.branch import Branch, Hierarchy
from dyncore.nn.choices import Choices
from dyncore.nn.dynamic_k import DynamicKMoE
from dyncore.nn.dynamic_width import DynamicWidthMLP
from dyncore.nn.early_exit import ExitLayer
from dyncore.nn.halting import AdaptiveDepth
from dyncore.nn.moe import MoE
from dyncore.nn.policy_skip import PolicySkip
from dyncore.nn.skip import Skip
from dyncore.nn.sparse_mlp import SparseLinear, SparseMLP
from dyncore.nn.token_drop import TokenDrop, TokenMerge
from dyncore.nn.tokens import MixtureOfDepths, TokenSkip

_MASKS = 3  # different ones, so that no branch predictor learns one
_SURE = 30.0  # a logit whose sigmoid is 0 or 1 in float32


class NotForced(Exception):
    """Why no share can be forced."""


class _Draw:
    """Random masks with an exact share of True, made once for each shape."""

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self._made: dict[Any, list[Tensor]] = {}
        self._turn = 0

    def __call__(self, shape: torch.Size, device: torch.device, *, each: bool = False, least: int = 0) -> Tensor:
        """bool [shape]. each: the same number in every sequence (the last dimension), `least` at least."""
        key = (shape, device)
        if key not in self._made:
            self._made[key] = [self._one(shape, each, least, seed).to(device) for seed in range(_MASKS)]
        self._turn += 1
        return self._made[key][self._turn % _MASKS]

    def _one(self, shape: torch.Size, each: bool, least: int, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.rand(shape, generator=generator, device="cpu")
        flat = noise if each else noise.reshape(1, -1)
        order = flat.argsort(-1).argsort(-1)
        return (order < max(least, round(self.keep * flat.shape[-1]))).view(shape)


class _Asked(nn.Module):
    """Asks the gate of a layer and answers otherwise."""

    def __init__(self, gate: Callable[..., Any], draw: _Draw, num_groups: int = 0) -> None:
        super().__init__()
        self.gate = gate
        self.draw = draw
        self.num_groups = num_groups


def _parts(result: Any) -> tuple[Any, Any, Any]:
    """The answer of a gate, as three."""
    parts: list[Any] = [result] if isinstance(result, Tensor) else [*result]
    first, second, third = [*parts, None, None][:3]
    return first, second, third


class _Gate(_Asked):
    """Of a layer that takes a mask, (mask, scale) or a Decision."""

    def forward(self, x: Tensor) -> Decision:
        mask, scale, count = _parts(self.gate(x))
        if count is None:
            return Decision(self.draw(mask.shape, mask.device), scale)
        return Decision(self.draw(mask.shape, mask.device, each=True), scale, round(self.draw.keep * mask.shape[-1]))


class _Router(_Asked):
    """Of a layer with several modules: pairs of a row and a module at random."""

    def forward(self, x: Tensor) -> Choices:
        first, weight, _ = _parts(self.gate(x))
        by_group = first.dtype == torch.bool or first.is_floating_point()
        shape = first.shape if by_group else torch.Size((*first.shape, self.num_groups))
        if weight is not None and weight.shape != shape:
            weight = weight[..., None].expand(shape)
        return Choices(self.draw(shape, first.device), weight)


class _Scores(_Asked):
    """Of scores [..., G]: `high` for those that are drawn, one or more in each row, else `low`; of scores that say
    whether to halt, [..., 1]."""

    def __init__(self, gate: Callable[..., Any], draw: _Draw, low: float, high: float, halts: bool = False) -> None:
        super().__init__(gate, draw)
        self.low, self.high, self.halts = low, high, halts

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.gate(x)
        if self.halts:
            mask = self.draw(torch.Size((*scores.shape[:-1], 1)), scores.device)
        else:
            mask = self.draw(scores.shape, scores.device, each=True, least=1)
        return torch.where(mask, self.high, self.low).to(scores.dtype)


class _Criterion(_Asked):
    """Of exits: samples leave at random."""

    def __init__(self, gate: Callable[..., Any], draw: _Draw) -> None:
        super().__init__(gate, draw)
        self.threshold = torch.tensor(0.0)

    def forward(self, logits: Tensor, state: Any) -> Any:
        confidence, after, _ = _parts(self.gate(logits, state))
        leaves = self.draw(confidence.shape, confidence.device)
        return torch.where(leaves, 1.0, -1.0).to(confidence.dtype), state if after is None else after


def _leaving(keep: float, steps: int) -> float:
    """The chance of leaving after each step but the last at which a share `keep` of all steps is taken on average."""
    low, high = 0.0, 1.0
    for _ in range(40):
        p = (low + high) / 2
        taken = sum((1 - p) ** k for k in range(steps)) / steps
        low, high = (p, high) if taken > keep else (low, p)
    return low if keep >= 1 else high


@functools.singledispatch
def force_keep(layer: nn.Module, keep: float) -> float:
    """Make a dynamic layer execute a share `keep` of what it may skip, in place; returns the share that it will.

    `force_keep.register(YourLayer)` adds a way for a layer of your own; one with an attribute `gate` that gives a mask
    of rows, (mask, scale) or a Decision needs none. Raises NotForced where there is no way.
    """
    gate = getattr(layer, "gate", None)
    if not callable(gate):
        raise NotForced(f"{type(layer).__name__} has no gate that gives way")
    setattr(layer, "gate", _Gate(gate, _Draw(keep)))  # noqa: B010
    return keep


@force_keep.register(Skip)
@force_keep.register(TokenSkip)
@force_keep.register(ACM)
@force_keep.register(ACMLinear)
@force_keep.register(DynamicWidthMLP)
def _gated(layer: Any, keep: float) -> float:
    layer.gate = _Gate(layer.gate, _Draw(keep))
    return keep


@force_keep.register
def _mixture_of_depths(layer: MixtureOfDepths, keep: float) -> float:
    layer.inference = "topk"
    layer.capacity = float(keep)
    return keep


@force_keep.register
def _moe(layer: MoE, keep: float) -> float:
    layer.top_k = max(1, round(keep * layer.num_experts))
    return layer.top_k / layer.num_experts


@force_keep.register
def _dynamic_k(layer: DynamicKMoE, keep: float) -> float:
    layer.router = _Scores(layer.router, _Draw(keep), 0.0, 1.0)
    layer.tau.fill_(0.5)
    return max(1, round(keep * layer.num_blocks)) / layer.num_blocks


@force_keep.register
def _hierarchy(layer: Hierarchy, keep: float) -> float:
    layer.coarse = _Scores(layer.coarse, _Draw(keep), -_SURE, _SURE)
    layer.threshold.fill_(0.5)
    return max(1, round(keep * len(layer.fine))) / len(layer.fine)


@force_keep.register
def _branch(layer: Branch, keep: float) -> float:
    layer.router = _Router(layer.router, _Draw(keep), len(layer.branches))
    return keep


@force_keep.register
def _policy_skip(layer: PolicySkip, keep: float) -> float:
    layer.policy = _Router(layer.policy, _Draw(keep), len(layer.blocks))
    return keep


@force_keep.register
def _exits(layer: ExitLayer, keep: float) -> float:
    layer.criterion = _Criterion(layer.criterion, _Draw(_leaving(keep, layer.num_exits)))
    return max(keep, 1 / layer.num_exits)


@force_keep.register
def _adaptive_depth(layer: AdaptiveDepth, keep: float) -> float:
    draw = _Draw(_leaving(keep, layer.num_steps))
    gates: Any = layer.halt
    for gate in gates:
        gate.score = _Scores(gate.score, draw, -_SURE, _SURE, halts=True)
    return max(keep, 1 / layer.num_steps)


@force_keep.register
def _token_drop(layer: TokenDrop, keep: float) -> float:
    layer.keep = float(keep)
    return keep


@force_keep.register
def _token_merge(layer: TokenMerge, keep: float) -> float:
    layer.r = min(1 - keep, 0.5)
    return 1 - layer.r


def sharing(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its Parameters; buffers and all else are its own."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def forced(module: nn.Module, keep: float) -> tuple[nn.Module, float]:
    """(a copy of `module` whose dynamic layers execute a share `keep` each, the mean share that they will).

    Raises NotForced where it holds none, or one that cannot be forced.
    """
    twin = sharing(module)
    shares = [force_keep(layer, keep) for layer in twin.modules() if isinstance(layer, DynamicLayer)]
    if not shares and any(isinstance(layer, (SparseLinear, SparseMLP)) for layer in twin.modules()):
        raise NotForced("the zeros of a ReLU come with the data, and cannot be forced")
    if not shares:
        raise NotForced("no layer of dyncore.nn decides anything in it")
    return twin, sum(shares) / len(shares)
