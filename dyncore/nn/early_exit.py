"""EarlyExit: a network with a head after every stage; a sample leaves at the first head that is sure enough.

`ExitLayer` and `Running` are what it shares with `Cascade` and with models given exits by `dyncore.convert`: the state
of the samples that go on is compacted between stages, all its tensors together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn import exits
from dyncore.nn.base import DynamicLayer, expect_callable, linked
from dyncore.nn.inputs import called, takes
from dyncore.ops import compact
from dyncore.plan import countable, route_mask, select

Costs = Sequence[float] | None


class ExitLayer(DynamicLayer):
    """Base of the layers whose samples leave early.

    Args:
        criterion: logits -> confidence, with a threshold: see `dyncore.nn.exits`.
        costs: K numbers, what each stage costs with its exit, such as its FLOPs; equal if None.
        num_exits: K.

    Attributes:
        last_exit: int64 [B], the exit that each sample took in the latest forward; None after one in training.
        last_plan: group k has the samples that went through stage k. last_cost: [B], the cost of the stages that a
            sample went through, as a share of that of all; nothing here has a gradient.
        threshold: the criterion's, which may be assigned: a number, or one for each exit but the last.
    """

    _transient = (*DynamicLayer._transient, "last_exit")
    last_exit: Tensor | None = None

    def __init__(self, criterion: Any, costs: Costs, num_exits: int) -> None:
        super().__init__()
        expect_callable("criterion", criterion)
        if num_exits > 1:
            exits.threshold_of(criterion, num_exits - 2)
        self.criterion = criterion
        self.num_exits: int = num_exits
        self.set_costs(costs)

    def set_costs(self, costs: Costs) -> None:
        """Say what each stage costs with its exit: K numbers, or None where all cost the same."""
        reached = exits.cumulative(costs, self.num_exits)
        self.costs: tuple[float, ...] = tuple(map(float, [reached[0]] * self.num_exits if costs is None else costs))
        self._shares = tuple(cost / reached[-1] for cost in reached)

    @property
    def threshold(self) -> Tensor:
        """The criterion's threshold."""
        return self.criterion.threshold

    @threshold.setter
    def threshold(self, value: float | Sequence[float] | Tensor) -> None:
        self.criterion.threshold = value

    def every_exit(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Logits [B, C] of all exits, everything computed, in the layer's present mode."""
        raise NotImplementedError("every_exit: expected a layer that defines it")

    def finish(self, exit: Tensor, training: bool = False) -> None:
        """Record that each sample took the exit [B]: for a layer's forward to call."""
        plan = route_mask(exit[:, None] >= torch.arange(self.num_exits, device=exit.device))
        self.record(plan, functools.partial(_cost, self._shares, exit), last_exit=None if training else exit)

    def extra_repr(self) -> str:
        return f"num_exits={self.num_exits}"


def _cost(shares: tuple[float, ...], exit: Tensor) -> Tensor:
    return torch.tensor(shares, device=exit.device)[exit]


class Running:
    """The samples of one forward that have not left yet, and the logits of all.

    On a CPU, run eagerly, and where the host may wait for the device, the samples that go on are counted and moved side
    by side. Elsewhere, and in "masked" execution, everything is computed, with the samples that have left as zeros.
    """

    def __init__(self, layer: ExitLayer, tree: Any) -> None:
        first = next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), None)
        if first is None or first.dim() == 0:
            raise TypeError("x: expected a tensor [B, ...] or a pytree of them, got none")
        self._layer = layer
        self._batch: int = first.shape[0]
        self._state: Any = None  # the criterion's
        self.moves: bool = mode() != "masked" and countable(first)
        self.rows: Tensor | None = None  # int64, the samples that go on; None: all. Only where they are moved
        self.live: Tensor | None = None  # bool [B], likewise where they are not
        self.logits: Tensor | None = None  # [B, C], of the latest exit that each sample has come to
        self.exit: Tensor = torch.zeros(self._batch, dtype=torch.int64, device=first.device)

    @property
    def nobody(self) -> bool:
        """Whether the host knows that no sample goes on."""
        return self.moves and (self._batch if self.rows is None else self.rows.shape[0]) == 0

    def visit(self, number: int, logits: Tensor, carried: Any) -> Any:
        """What is carried to the next stage, of the samples that go on, after exit `number` has said its logits."""
        self._write(number, logits)
        if number == self._layer.num_exits - 1:
            return carried
        confidence, self._state = exits.ask(self._layer.criterion, logits, self._state)
        stays = ~(confidence >= exits.threshold_of(self._layer.criterion, number))
        if not self.moves:
            self.live = stays if self.live is None else self.live & stays
            return zeroed(carried, self.live)
        if stays.all():
            return carried
        plan = select(stays)
        rows = plan.rows.long()
        self.rows = rows if self.rows is None else self.rows[rows]
        if not plan.num_slots:
            return carried
        carried, self._state = compact((carried, self._state), plan)
        return carried

    def _write(self, number: int, logits: Tensor) -> None:
        count = self._batch if self.rows is None else self.rows.shape[0]
        if not isinstance(logits, Tensor):
            raise TypeError(f"exit {number}: expected logits [B, C], got {type(logits).__name__}")
        if logits.dim() != 2 or logits.shape[0] != count:
            raise ValueError(f"exit {number}: expected logits [{count}, C], got shape {list(logits.shape)}")
        before = self.logits
        if before is not None and logits.shape[1] != before.shape[1]:
            raise ValueError(f"exit {number}: expected {before.shape[1]} classes, got {logits.shape[1]}")
        if before is None:
            self.logits = logits
        elif self.rows is not None:
            self.logits = before.index_copy(0, self.rows, logits.to(before.dtype))
            self.exit[self.rows] = number
        elif self.live is not None:
            self.logits = torch.where(self.live[:, None], logits.to(before.dtype), before)
            self.exit = torch.where(self.live, number, self.exit)
        else:  # nobody took the exit before: it gets zero gradients, as where somebody did
            logits = logits.to(before.dtype)
            self.logits = logits + before.reshape(-1)[:0].sum() if before.requires_grad else logits
            self.exit = torch.full_like(self.exit, number)

    def result(self, *passed_by: nn.Module) -> Tensor:
        """The logits [B, C], tied to modules that nobody needed by zero gradients."""
        logits = self.logits
        assert logits is not None
        for module in passed_by:
            logits = linked(logits, module)
        return logits


def zeroed(tree: Any, live: Tensor) -> Any:
    """Every tensor [B, ...] of the tree with the rows that are not live as zeros."""

    def zero(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != live.shape[0]:
            raise ValueError(f"state: expected tensors [{live.shape[0]}, ...], got shape {list(t.shape)}")
        return t.masked_fill(~live.view(-1, *(1,) * (t.dim() - 1)), 0)

    return pytree.tree_map_only(Tensor, zero, tree)


class EarlyExit(ExitLayer):
    """A network that samples leave at the first exit k with confidence >= threshold (MSDNet, Huang 2018; BranchyNet,
    Teerapittayanon 2016): k* = min{k : conf(z_k) >= theta_k}, the last exit answering whoever comes to it.

    Args:
        stages: K modules, each mapping a state to the next: a tensor [B, ...] or a pytree of them (features at several
            scales, a smaller image kept for later), so that a stage may hand on and use again what it likes.
        heads: K modules, each mapping the state after its stage to logits [B, C]. One whose forward has `previous` is
            also given the logits of the exit before (None at the first), as `exits.ZeroTimeWaste`.
        criterion: logits -> confidence, with a threshold: `exits.MaxProbability(0.9)` if None.
        costs: K numbers, what each stage costs with its head; equal if None.

    In training a forward computes every stage and returns the list of all logits, for `losses.multi_exit`. In
    evaluation it returns logits [B, C], those of each sample's exit, in the dtype of the first: stage k+1 runs on the
    samples that exit k kept, all tensors of their state moved side by side; the rest is not computed. `every_exit(x)`
    returns all logits in either. At threshold inf the result is exactly that of the last exit, at -inf that of the
    first, for every sample.

    Gradient goes to stages, heads and x through the exits taken; the choice of an exit has none. Samples must be
    treated one by one (BatchNorm in evaluation does). See `ExitLayer` for last_exit, last_plan, last_cost.

    On an accelerator the host must wait for the device once a stage to count the samples: `execution(wait=True)`.
    Without it, and under torch.compile, every stage runs on all of them, those that have left as zeros: the same
    values, nothing saved.

    Raises TypeError and ValueError on modules and costs that do not fit one another, on logits of another shape than
    [B, C], and on state tensors that have not B rows.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        criterion: Any = None,
        costs: Costs = None,
    ) -> None:
        if not len(stages):
            raise ValueError("stages: expected at least one, got none")
        if len(heads) != len(stages):
            raise ValueError(f"heads: expected {len(stages)} of them, one a stage, got {len(heads)}")
        super().__init__(exits.MaxProbability() if criterion is None else criterion, costs, len(stages))
        for name, modules in (("stages", stages), ("heads", heads)):
            for i, module in enumerate(modules):
                expect_callable(f"{name}[{i}]", module)
        self.stages: nn.ModuleList = nn.ModuleList(stages)
        self.heads: nn.ModuleList = nn.ModuleList(heads)
        self._chained = tuple(takes(head, "previous") for head in heads)

    def forward(self, x: Any) -> Tensor | list[Tensor]:
        """Logits [B, C] of samples x; in training the list of all exits' logits."""
        running = Running(self, x)
        if self.training:
            self.finish(torch.full_like(running.exit, self.num_exits - 1), training=True)
            return self.every_exit(x)
        state, previous, run = x, None, 0
        for k, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            state = called(f"stages[{k}]", stage, state)
            previous = self._logits(k, head, state, previous)
            state, previous = running.visit(k, previous, (state, previous))
            run += 1
            if running.nobody:
                break
        self.finish(running.exit)
        return running.result(*self.stages[run:], *self.heads[run:])

    def every_exit(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Logits [B, C] of all exits, everything computed."""
        (state,) = args
        found: list[Tensor] = []
        for k, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            state = called(f"stages[{k}]", stage, state)
            found.append(self._logits(k, head, state, found[-1] if found else None))
        return found

    def _logits(self, k: int, head: nn.Module, state: Any, previous: Tensor | None) -> Tensor:
        options = {"previous": previous} if self._chained[k] else {}
        return called(f"heads[{k}]", head, state, **options)
