"""add_early_exits: exits after blocks of a trained model, which keeps its weights; and a report of what was done.

Nothing of a model's code is known: what its blocks are given is seen by running it on an example, and a model in which
samples cannot leave midway is found by running it so, and refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.execution import execution
from dyncore.measure.agreement import disagreement
from dyncore.measure.exits import exit_costs
from dyncore.nn import exits
from dyncore.nn.base import expect_choice
from dyncore.nn.cascade import logits_of
from dyncore.nn.early_exit import ExitLayer
from dyncore.nn.with_exits import POOLS, Path, PooledHead, WithExits, blocks_of_list, mapped

CHECKED = 6  # samples on which leaving midway is tried


@dataclasses.dataclass(frozen=True)
class Exit:
    """An exit that was added: the name and class of its block, the shape of what its head sees (of one sample), the
    head's class, and what it costs to get there, as a share of the whole model with its exits."""

    name: str
    block: str
    shape: tuple[int, ...]
    head: str
    cost: float


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What add_early_exits did: the exits added, the number of classes, and how many parameters the heads have."""

    exits: tuple[Exit, ...]
    num_classes: int
    parameters: int

    def __repr__(self) -> str:
        lines = [
            f"{len(self.exits)} exits added before the model's own, {self.num_classes} classes; their heads have "
            f"{self.parameters} parameters, as they were drawn: train them"
        ]
        for e in self.exits:
            lines.append(f"  after {e.name}: {e.block} -> {list(e.shape)}, {e.head}, {e.cost:.0%} of the cost")
        return "\n".join(lines)


def add_early_exits(
    model: nn.Module,
    at: Sequence[str],
    example: Any,
    *,
    heads: Sequence[nn.Module] | None = None,
    pool: str = "mean",
    criterion: Any = None,
    costs: Sequence[float] | None = None,
) -> WithExits:
    """Let samples leave a classifier after the blocks named `at`: a module around it, with the `report` of what it did.

    Args:
        model: any module that maps samples to logits [B, C] (itself, or as `.logits`): a Sequential, a ResNet, an
            encoder of transformers with a classifier (BERT, ViT), a decoder with one (GPT2ForSequenceClassification
            and its kin: an exit for each sequence, not for each token; generation is not supported). It keeps its
            weights; hooks are put on its blocks (`.remove()` takes them off), and called by itself it does what it did.
        at: names of modules, as in `model.named_modules()`, in the order in which they run, each once a forward. Names
            within an nn.ModuleList may be of one list alone.
        example: one sample or more as a forward is given them: a tensor, a tuple of arguments or a mapping of keyword
            arguments, every tensor [B, ...]. It is run a few times, without gradients, in evaluation.
        heads: modules that map what a block returns (of a tuple the first) to logits [B, C]; see `WithExits` for what
            else they are given. By default a Linear layer on the mean over positions (tokens normalised first).
        pool: what tokens such a head looks at: "mean", "first" (a class token: BERT, ViT), "last" (decoders); an
            attention_mask [B, S] among the arguments is heeded.
        criterion: logits -> confidence, with a threshold: `exits.MaxProbability(0.9)` if None.
        costs: len(at) + 1 numbers, what each part costs with its exit; counted in FLOPs of the example if None.

    The result is used as `nn.EarlyExit`: in training a list of the logits of all exits, in evaluation the logits of
    each sample's exit, with last_exit, last_plan, last_cost and threshold. Train `result.heads` alone, or all of it.
    Samples that go on are moved side by side after an exit. A ModuleList's last block gives back rows for all samples,
    zeros for those that left, so that code behind it may count them; in a model without one what follows sees fewer
    samples than went in. Torch's encoder layers leave their fused inference path, as with any hook.

    Raises TypeError or ValueError that name the argument: blocks that are not there, run twice, never or in another
    order; heads that do not give [B, C]; a model whose forward does not allow samples to leave midway, since it mixes
    them or needs all of them between its blocks. The model then is without hooks again.
    """
    args, kwargs = _arguments(model, at, example)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            shapes, num_classes = _look(model, at, args, kwargs)
            per_sample = _per_sample(model, at, args, kwargs)
            if heads is None:
                expect_choice("pool", pool, POOLS)
                like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
                made = [PooledHead(shape, num_classes, pool) for shape in shapes]
                heads = [head.to(like.device, like.dtype) for head in made]
            elif len(heads) != len(at):
                raise ValueError(f"heads: expected {len(at)} of them, one for each name in at, got {len(heads)}")
            used = exits.MaxProbability() if criterion is None else criterion
            result = WithExits(model, at, heads, used, costs, per_sample)
            result.eval()
            try:
                _check(result, args, kwargs)
                if costs is None:
                    costs = exit_costs(result, kwargs or args)
                    result.set_costs(costs if sum(costs) else None)
            except BaseException:
                result.remove()
                raise
    finally:
        for module in training:
            module.training = True
    result.train(model.training)
    for module in result.model.modules():  # blocks may be frozen in evaluation
        module.training = module in training
    parts = zip(at, shapes, heads, result._shares, strict=False)
    added = [
        Exit(name, type(model.get_submodule(name)).__name__, tuple(shape[1:]), type(head).__name__, share)
        for name, shape, head, share in parts
    ]
    parameters = sum(p.numel() for p in result.heads.parameters())
    result.report = Report(tuple(added), num_classes, parameters)
    return result


def _arguments(model: nn.Module, at: Sequence[str], example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if isinstance(model, ExitLayer):
        raise ValueError(f"model: expected one without exits, got {type(model).__name__}")
    if isinstance(at, str) or not len(at):
        raise ValueError(f"at: expected a list of at least one name of model.named_modules(), got {at!r}")
    names = dict(model.named_modules())
    for name in at:
        if name not in names or not name:
            ends = [known for known in names if known.endswith(f".{name}")]
            hint = f"; {' or '.join(ends[:3])}?" if name and ends else ""
            raise ValueError(f"at: expected names of model.named_modules(), got {name!r}{hint}")
    if len(set(at)) < len(at):
        raise ValueError(f"at: expected different names, got {list(at)}")
    blocks_of_list(model, at)
    if isinstance(example, Mapping):
        args, kwargs = (), {str(k): v for k, v in example.items()}
    else:
        args, kwargs = (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors or any(t.dim() == 0 or len(t) != len(tensors[0]) or not len(t) for t in tensors):
        shapes = [list(t.shape) for t in tensors]
        raise ValueError(f"example: expected tensors [B, ...] of at least one sample, got shapes {shapes}")
    return args, kwargs


def _samples(tree: Any, count: int) -> Any:
    """`count` samples of a tree of tensors, over and over."""
    return pytree.tree_map_only(Tensor, lambda t: t[torch.arange(count, device=t.device) % len(t)], tree)


def _look(model: nn.Module, at: Sequence[str], args: Any, kwargs: Any) -> tuple[list[torch.Size], int]:
    """(the shape of what each block returns, the number of classes)"""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(hidden, Tensor) or hidden.dim() < 2:
                got = f"shape {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
                raise ValueError(f"at: expected blocks that return a tensor [B, ...], got {got} of {name!r}")
            seen.append((name, hidden))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in at]
    try:
        logits = logits_of(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected one that returns logits [B, C], got {got}")
    order = [name for name, _ in seen]
    if order != list(at):
        raise ValueError(f"at: expected blocks that run once each, in this order; they ran as {order}")
    for name, hidden in seen:
        if hidden.shape == logits.shape and torch.equal(hidden, logits):
            raise ValueError(f"at: expected blocks before the model's head, got {name!r}, which returns its logits")
    return [hidden.shape for _, hidden in seen], logits.shape[1]


def _per_sample(model: nn.Module, at: Sequence[str], args: Any, kwargs: Any) -> dict[Path, bool]:
    """Which tensors among the arguments of later blocks have a row for each sample: those whose number of rows is that
    of the samples, of whatever number these are."""
    later = blocks_of_list(model, at)[1:]
    found: list[dict[Path, bool]] = []
    for count in (2, 3):
        rows: dict[Path, bool] = {}

        def hook(
            module: nn.Module,
            given: tuple[Any, ...],
            named: dict[str, Any],
            rows: dict[Path, bool] = rows,
            count: int = count,
        ) -> None:
            def note(path: Path, t: Tensor) -> Tensor:
                rows[path] = t.dim() > 0 and len(t) == count
                return t

            mapped(note, given)
            mapped(note, named)

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in later]
        try:
            few_args, few_kwargs = _samples((args, kwargs), count)
            model(*few_args, **few_kwargs)
        finally:
            for handle in handles:
                handle.remove()
        found.append(rows)
    return {path: known and found[1][path] for path, known in found[0].items() if path in found[1]}


class _ByNumber(exits.Criterion):
    """Sample i leaves at exit i, counted around."""

    def __init__(self, num_exits: int) -> None:
        super().__init__(1.0)
        self.num_exits = num_exits

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            state = torch.arange(len(logits), device=logits.device) % self.num_exits
        return (state == 0).float(), state - 1


def _check(layer: WithExits, args: Any, kwargs: Any) -> None:
    """ValueError unless samples may leave midway."""
    few_args, few_kwargs = _samples((args, kwargs), max(CHECKED, layer.num_exits + 1))
    kept = layer.criterion
    layer.criterion = _ByNumber(layer.num_exits)
    try:
        with execution("masked"):
            want = layer(*few_args, **few_kwargs)
        try:
            with execution("sparse"):
                got = layer(*few_args, **few_kwargs)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"model: expected one whose samples may leave after {', '.join(layer.at)}: {error}"
            ) from error
    finally:
        layer.criterion = kept
    why = disagreement(got, want.double())
    if why:
        raise ValueError(f"model: expected one that treats each sample alone; where some leave, others change: {why}")
