"""Static rivals of a dynamic module: its dense twin, and a smaller dense network that executes as many FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncore import activations
from dyncore.measure.calls import Call, seeded, tensors
from dyncore.measure.flops import flops
from dyncore.measure.forcing import sharing
from dyncore.nn.acm import ACMLinear
from dyncore.nn.base import DynamicLayer
from dyncore.nn.cascade import Cascade
from dyncore.nn.dynamic_width import BlockMLP
from dyncore.nn.early_exit import EarlyExit
from dyncore.nn.experts import read_expert
from dyncore.nn.halting import AdaptiveDepth
from dyncore.nn.mlp import MLP
from dyncore.nn.moe import MoE
from dyncore.nn.policy_skip import PolicySkip
from dyncore.nn.skip import Skip
from dyncore.nn.token_drop import TokenDrop, TokenMerge
from dyncore.nn.tokens import MixtureOfDepths, TokenSkip
from dyncore.nn.tree import TreeMLP
from dyncore.nn.with_exits import WithExits

_NEAR = 0.03  # FLOPs of a smaller network may be so far from those wanted


class NoBaseline(Exception):
    """Why a baseline cannot be made."""


class _Chain(nn.Module):
    """Blocks one after the other; with `update` each is added to its input."""

    def __init__(self, blocks: Sequence[Any], update: bool, steps: int = 0) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList(blocks)
        self.update = update
        self.steps: int = steps or len(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for n in range(self.steps):
            y = self.blocks[min(n, len(self.blocks) - 1)](x)
            x = x + y if self.update else y
        return x


class _Sum(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@torch.no_grad()
def _wide(w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, activation: str) -> MLP:
    """One MLP of the neurons of all groups: w_in [G, I or 2I, H], w_out [G, H, I]."""
    groups, dim, inner = w_out.shape
    mlp = MLP(dim, groups * inner, activation=activation, bias=b_in is not None).to(w_in.device, w_in.dtype)

    def flat(t: Tensor) -> Tensor:
        halves = t.chunk(2, 1) if activation in activations.GATED else (t,)
        return torch.cat([half.flatten(0, 1) for half in halves])

    mlp.w_in.weight.copy_(flat(w_in))
    mlp.w_out.weight.copy_(w_out.permute(1, 0, 2).reshape(dim, groups * inner))
    if b_in is not None:
        mlp.w_in.bias.copy_(flat(b_in[..., None])[..., 0])
    if b_out is not None and mlp.w_out.bias is not None:
        mlp.w_out.bias.copy_(b_out.mean(0))
    return mlp


@functools.singledispatch
def dense_twin(layer: nn.Module) -> nn.Module:
    """What a dynamic layer would be if it skipped nothing and decided nothing: a plain module, with its weights.

    `dense_twin.register(YourLayer)` adds a way for a layer of your own. Raises NoBaseline where there is none.
    """
    raise NoBaseline(f"{type(layer).__name__} has no dense twin")


@dense_twin.register
def _skip(layer: Skip) -> nn.Module:
    return _Chain([layer.module], True) if layer.returns == "update" else layer.module


@dense_twin.register(TokenSkip)
@dense_twin.register(MixtureOfDepths)
def _tokens(layer: Any) -> nn.Module:
    return _Chain([layer.block], True) if layer.returns == "update" else layer.block


@dense_twin.register
def _policy_skip(layer: PolicySkip) -> nn.Module:
    return _Chain(layer.blocks, layer.returns == "update")  # type: ignore[arg-type]


@dense_twin.register
def _adaptive_depth(layer: AdaptiveDepth) -> nn.Module:
    return _Chain(layer.blocks, False, layer.num_steps)  # type: ignore[arg-type]


@dense_twin.register
def _block_mlp(layer: BlockMLP) -> nn.Module:
    return layer.to_dense()


@dense_twin.register
def _acm_linear(layer: ACMLinear) -> nn.Module:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight, linear.bias = layer.weight, layer.bias  # type: ignore[assignment]
    return linear


@dense_twin.register
def _moe(layer: MoE) -> nn.Module:
    wide = _wide(layer.w_in, layer.w_out, layer.b_in, layer.b_out, layer.activation)
    return wide if layer.shared is None else _Sum(wide, layer.shared)


@dense_twin.register
def _tree(layer: TreeMLP) -> nn.Module:
    return _wide(layer.w_in, layer.w_out, layer.b_in, layer.b_out, layer.activation)


@dense_twin.register
def _early_exit(layer: EarlyExit) -> nn.Module:
    head = layer.heads[-1]
    if layer._chained[-1]:
        raise NoBaseline("the last head of an EarlyExit takes the logits of the exit before")
    return nn.Sequential(*layer.stages, head)


@dense_twin.register
def _cascade(layer: Cascade) -> nn.Module:
    return layer.models[-1]


@dense_twin.register
def _with_exits(layer: WithExits) -> nn.Module:
    return layer.remove()


@dense_twin.register(TokenDrop)
@dense_twin.register(TokenMerge)
def _fewer_tokens(layer: nn.Module) -> nn.Module:
    return nn.Identity()


def dense(call: Call) -> tuple[Call, str]:
    """(the call of a copy in which every dynamic layer is its dense twin, what was done). Raises NoBaseline."""
    if not isinstance(call.module, nn.Module):
        raise NoBaseline("a callable that is no module has no layers to replace: give one as dense=")
    twin = sharing(call.module)
    done: dict[str, int] = {}
    kept: dict[str, int] = {}

    def replace(module: nn.Module) -> nn.Module:
        while isinstance(module, DynamicLayer):
            name = type(module).__name__
            try:
                module = dense_twin(module).train(module.training)
            except NoBaseline:
                kept[name] = kept.get(name, 0) + 1
                break
            done[name] = done.get(name, 0) + 1
        for name, child in module.named_children():
            new = replace(child)
            if new is not child:
                setattr(module, name, new)
        return module

    twin = replace(twin)
    if not done:
        what = f"no dense twin of {', '.join(kept)}" if kept else "no layer of dyncore.nn in it to replace"
        raise NoBaseline(f"{what}: give one as dense=")
    text = f"{_counted(done)} replaced by dense modules"
    if kept:
        text += f", {_counted(kept)} computed in full"
    # what still skips, such as a SparseMLP, computes everything there
    return call.of(twin, "masked"), text


def _counted(names: dict[str, int]) -> str:
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in names.items())


def smaller(call: Call, total: int, want: int) -> tuple[Call, str]:
    """(a call of a static network of `want` FLOPs, what was done), from that of the dense twin, of `total` FLOPs.

    The twin with narrower MLPs, which read fewer weights, too. Where it has none, or not enough of them, the twin on
    fewer samples or on shorter sequences: so many FLOPs with nothing else to pay, but on smaller inputs, not by a
    smaller network. Raises NoBaseline.
    """
    if not 0 < want < total:
        raise NoBaseline("nothing was skipped: it would be the dense network itself" if want else "no FLOP is left")
    try:
        return _narrower(call, total, want)
    except NoBaseline as error:
        for dim, word in ((0, "samples"), (1, "positions")):
            found = _cut(call, dim, total, want)
            if found is not None:
                cut, count, size = found
                return cut, f"the dense twin on {count} of {size} {word}, as {error}"
        raise NoBaseline(f"{error}, nor can the inputs be cut to so many FLOPs") from None


def _cut(call: Call, dim: int, total: int, want: int) -> tuple[Call, int, int] | None:
    sizes = [t.shape[dim] for t in tensors((call.args, call.kwargs)) if t.dim() > dim]
    if not sizes:
        return None
    size, share, tried = sizes[0], want / total, set[int]()
    for _ in range(4):  # attention's FLOPs grow with the square of the positions
        count = min(size - 1, max(1, round(size * share)))
        if count in tried or size < 2:
            return None
        tried.add(count)
        cut = call.first_samples(count, dim)
        try:
            counted = 0 if cut is None else int(seeded(flops, cut))
        except Exception:  # what no module takes cannot be cut
            return None
        if cut is not None and abs(counted / want - 1) <= _NEAR:
            return cut, count, size
        if not counted:
            return None
        share *= want / counted
    return None


def _narrower(call: Call, total: int, want: int) -> tuple[Call, str]:
    """The twin whose MLPs have a share of their neurons."""
    assert isinstance(call.module, nn.Module)
    half = _with_width(call.module, 0.5)
    slope = 2 * (total - int(seeded(flops, call.of(half))))  # FLOPs of all that the width scales
    width = 1 - (total - want) / slope if slope > 0 else 0.0
    if width <= 0:
        raise NoBaseline("its MLPs alone cannot be cut to so many FLOPs")
    narrow = call.of(_with_width(call.module, width))
    if abs(int(seeded(flops, narrow)) / want - 1) > _NEAR:
        raise NoBaseline("its MLPs alone cannot be cut to so many FLOPs")
    return narrow, f"the dense twin with {width:.0%} of the neurons of its MLPs"


def _with_width(module: nn.Module, share: float) -> nn.Module:
    """A copy in which every MLP has a share of its neurons. Raises NoBaseline where it has none."""
    twin = sharing(module)
    found = 0

    def replace(part: nn.Module) -> nn.Module:
        nonlocal found
        try:
            dim, inner = (weights := read_expert(part)).w_out.shape
        except (ValueError, TypeError):
            for name, child in part.named_children():
                new = replace(child)
                if new is not child:
                    setattr(part, name, new)
            return part
        found += 1
        narrow = MLP(dim, max(1, round(share * inner)), activation=weights.activation, bias=weights.b_in is not None)
        return narrow.to(weights.w_in.device, weights.w_in.dtype).train(part.training)

    twin = replace(twin)
    if not found:
        raise NoBaseline("it has no MLPs to be narrower")
    return twin
