"""WithExits: a model as it stands, with exits after some of its blocks; made by `dyncore.convert.add_early_exits`.

Hooks on the blocks do what `EarlyExit` does between its stages: the model's own forward then runs on the samples that
are left, and is broken off where none is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dyncore.nn.base import DynamicLayer, expect_choice
from dyncore.nn.cascade import logits_of
from dyncore.nn.early_exit import Costs, ExitLayer, Running
from dyncore.nn.inputs import takes

POOLS = ("mean", "first", "last")
Path = tuple[str | int, ...]


class _EverybodyLeft(Exception):
    """Breaks off the model's forward."""


class PooledHead(nn.Module):
    """Logits [B, C] of a block's output: of the mean over positions of [B, D, H, W] (or [B, D]), of tokens [B, S, D]
    their mean, the first or the last, normalised; those that attention_mask [B, S] has as 0 do not count."""

    def __init__(self, shape: Sequence[int], num_classes: int, pool: str = "mean") -> None:
        super().__init__()
        self.pool: str = expect_choice("pool", pool, POOLS)
        self.tokens: bool = len(shape) == 3
        width = shape[-1] if self.tokens else shape[1]
        self.norm: nn.Module = nn.LayerNorm(width) if self.tokens else nn.Identity()
        self.linear: nn.Linear = nn.Linear(width, num_classes)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of what a block returns."""
        if not self.tokens:
            return self.linear(hidden.flatten(2).mean(2) if hidden.dim() > 2 else hidden)
        seen = attention_mask
        if seen is None or seen.shape != hidden.shape[:2]:
            pooled = {"mean": hidden.mean(1), "first": hidden[:, 0], "last": hidden[:, -1]}[self.pool]
        elif self.pool == "mean":
            weight = seen.to(hidden.dtype)[:, :, None]
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        else:  # the first of the largest
            places = (seen != 0).int()
            if self.pool == "last":
                places = places * torch.arange(seen.shape[1], device=seen.device)
            pooled = hidden[torch.arange(len(hidden), device=seen.device), places.argmax(1)]
        return self.linear(self.norm(pooled))


class WithExits(ExitLayer):
    """A model with exits after the blocks named; see `dyncore.convert.add_early_exits`, which makes and checks one.

    Args:
        model: kept, not copied; hooks are put on its blocks. Alone it computes what it did.
        at: names of blocks in `model`, in the order in which they run.
        heads: for each a module that maps the block's output (of a tuple the first) to logits [B, C]. One whose forward
            has `previous` is given the logits of the exit before, one with `attention_mask` that of the call.
        criterion, costs: as for `EarlyExit`, K = len(at) + 1; the model's own logits are the last exit.
        per_sample: which arguments of the blocks have a row for each sample: of those that are not named, tensors with
            as many rows as there are samples do.

    A forward takes the model's arguments, or one mapping of them by name (as a tokenizer returns), and returns logits
    [B, C]; in training a list of those of all exits. One forward at a time: threads need copies.

    Raises ValueError on labels, since no loss is computed, on past_key_values, and on a threshold that was set on
    `model`, where nothing would read it.
    """

    _transient = (*DynamicLayer._transient, "last_exit", "_running", "_collected")
    _running: Running | None = None  # of the forward that is under way
    _collected: list[Tensor] | None = None  # likewise, where everything is computed
    _previous: Tensor | None = None
    _mask: Tensor | None = None
    _restored: bool = False
    _has_threshold: bool = True  # whether the model had one before
    _names: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        at: Sequence[str],
        heads: Sequence[nn.Module],
        criterion: Any,
        costs: Costs = None,
        per_sample: Mapping[Path, bool] | None = None,
    ) -> None:
        super().__init__(criterion, costs, len(at) + 1)
        self.model = model
        self.at: tuple[str, ...] = tuple(at)
        self.heads: nn.ModuleList = nn.ModuleList(heads)
        self.report: Any = None
        self._has_threshold = hasattr(model, "threshold")
        self._names = _positional(model)
        self._takes = tuple(tuple(n for n in ("previous", "attention_mask") if takes(head, n)) for head in heads)
        self._per_sample = dict(per_sample or {})
        self._handles: list[Any] = []
        blocks = blocks_of_list(model, self.at)
        for block in blocks[1:]:
            self._handles.append(block.register_forward_pre_hook(_Before(self), with_kwargs=True))
        for number, name in enumerate(self.at):
            self._handles.append(model.get_submodule(name).register_forward_hook(_After(self, number)))
        if blocks:
            self._handles.append(blocks[-1].register_forward_hook(_Restore(self)))

    def remove(self) -> nn.Module:
        """The model without hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        """Logits [B, C]; in training the list of all exits' logits."""
        args, kwargs = self._begin(args, kwargs)
        running = Running(self, (args, kwargs))
        if self.training:
            self.finish(torch.full_like(running.exit, self.num_exits - 1), training=True)
            return self.every_exit(*args, **kwargs)
        self._running = running
        passed_by: tuple[nn.Module, ...] = ()
        try:
            logits = logits_of(self.model(*args, **kwargs))
            if self._restored and running.rows is not None:
                logits = logits.index_select(0, running.rows)
            running.visit(self.num_exits - 1, logits, None)
        except _EverybodyLeft:
            passed_by = (self.model, self.heads)
        finally:
            self._running = self._previous = self._mask = None
        self.finish(running.exit)
        return running.result(*passed_by)

    def every_exit(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Logits [B, C] of all exits, everything computed."""
        args, kwargs = self._begin(args, kwargs)
        self._collected = found = []
        try:
            last = logits_of(self.model(*args, **kwargs))
        finally:
            self._collected = self._previous = self._mask = None
        return [*found, last]

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments, checked, at the start of a forward."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            named = cast("Mapping[str, Any]", args[0])
            if all(takes(self.model, name) for name in named):
                args, kwargs = (), dict(named)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if given.get("past_key_values") is not None:
            raise ValueError("past_key_values: expected none: exits are for whole sequences, not for generation")
        if given.get("labels") is not None:
            raise ValueError(
                "labels: expected none, since logits are returned and no loss: losses.multi_exit makes one of the "
                "logits of all exits that a forward in training returns"
            )
        if not self._has_threshold and hasattr(self.model, "threshold"):
            raise ValueError(
                "threshold: expected to be set on the module with exits, got one on its model, which nothing reads"
            )
        mask = given.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._previous, self._restored = None, False
        return args, kwargs

    def _leave(self, number: int, output: Any) -> Any:
        """What a block returns, of the samples that go on after its exit."""
        running, collected = self._running, self._collected
        if running is None and collected is None:
            return output
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        mask = self._mask
        if running is not None and running.rows is not None and mask is not None:
            mask = mask.index_select(0, running.rows)
        given = {"previous": self._previous, "attention_mask": mask}
        logits: Tensor = self.heads[number](hidden, **{name: given[name] for name in self._takes[number]})
        if collected is not None:
            collected.append(logits)
            self._previous = logits
            return output
        assert running is not None
        output, self._previous = running.visit(number, logits, (output, logits))
        if running.nobody:
            raise _EverybodyLeft
        return output


class _Before:
    """Takes the rows of the samples that are left out of the other arguments of a block."""

    def __init__(self, owner: WithExits) -> None:
        self.owner = owner

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self.owner._running
        if running is None or running.rows is None:
            return None
        rows, batch, known = running.rows, len(running.exit), self.owner._per_sample

        def select(path: Path, t: Tensor) -> Tensor:
            return t.index_select(0, rows) if known.get(path, True) and t.dim() and len(t) == batch else t

        others = tuple(mapped(select, a, (i,)) for i, a in enumerate(args) if i)
        return args[:1] + others, mapped(select, kwargs)


class _After:
    """An exit."""

    def __init__(self, owner: WithExits, number: int) -> None:
        self.owner, self.number = owner, number

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.owner._leave(self.number, output)


class _Restore:
    """Gives the last block's output the rows of all samples again, since what follows in a model may count them."""

    def __init__(self, owner: WithExits) -> None:
        self.owner = owner

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        running = self.owner._running
        if running is None or running.rows is None:
            return output
        rows, batch = running.rows, len(running.exit)
        self.owner._restored = True
        return mapped(lambda path, t: t.new_zeros(batch, *t.shape[1:]).index_copy(0, rows, t), output)


def mapped(run: Callable[[Path, Tensor], Tensor], tree: Any, path: Path = ()) -> Any:
    """`run(path, tensor)` on the tensors in tuples, lists and dicts; all else, such as a cache, stays what it is."""
    if isinstance(tree, Tensor):
        return run(path, tree)
    if type(tree) in (tuple, list):
        items = cast("Sequence[Any]", tree)
        found = [mapped(run, t, (*path, i)) for i, t in enumerate(items)]
        return tuple(found) if isinstance(tree, tuple) else found
    if type(tree) is dict:
        return {name: mapped(run, t, (*path, str(name))) for name, t in cast("dict[Any, Any]", tree).items()}
    return tree


def _positional(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's arguments, as they come by position."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def blocks_of_list(model: nn.Module, at: Sequence[str]) -> list[nn.Module]:
    """Where the blocks named stand in an nn.ModuleList: those of the list from the first of them on. Else none."""
    parents = {name.rpartition(".")[0] for name in at}
    lists = [parent for parent in parents if isinstance(model.get_submodule(parent), nn.ModuleList)]
    if not lists:
        return []
    if len(parents) > 1:
        raise ValueError(f"at: expected blocks of one list, got some of {', '.join(sorted(parents))}")
    first = model.get_submodule(at[0])
    blocks = list(model.get_submodule(lists[0]).children())
    return blocks[next(i for i, block in enumerate(blocks) if block is first) :]
