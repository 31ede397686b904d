"""What every dynamic layer shares: a gate's decision, the record of what was executed, and the merge of live rows.

Floor 4: layers stand on plans and ops. A layer asks its gate which rows are live, computes those rows alone and puts
them back; in "masked" execution it computes every row and multiplies by 0 or 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn.inputs import expect_input
from dyncore.ops import scatter_rows
from dyncore.plan import Plan, holds, is_eager_cpu, select, select_topk, vmap_level

RETURNS = ("output", "update")


class Decision(NamedTuple):
    """What a gate decides.

    Attributes:
        mask: bool [...], the leading dimensions of x: which rows are live.
        scale: float [...] or None: multiplies the change a live row receives. Its value on rows that are not live is
            not used; its gradient there carries the cost (see `DynamicLayer.last_cost`).
        count: how many rows are live in every sequence (the mask's last dimension), where it is the same number in
            each and known on the host, as with top-k: buffers are then exact on every device and under torch.compile.
            The mask must hold just as many: eager code on a CPU counts them, elsewhere other rows fill what is missing.
    """

    mask: Tensor
    scale: Tensor | None = None
    count: int | None = None


Gating = Callable[[Tensor], Any]  # a gate: x -> Decision, (mask, scale) or mask


def decide(gate: Gating, x: Tensor) -> Decision:
    """The gate's decision on `x`, checked: TypeError or ValueError on a mask or scale that does not fit x."""
    expect_input(x)
    result = gate(x)
    if isinstance(result, Tensor):
        decision = Decision(result)
    elif isinstance(result, Decision):
        decision = result
    elif isinstance(result, tuple) and len(result) == 2:
        decision = Decision(*result)
    else:
        got = f"a tuple of length {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"gate: expected a bool mask, (mask, scale) or a Decision, got {got}")
    mask, scale = decision.mask, decision.scale
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"gate: expected a bool mask, got {got}")
    if scale is not None and not isinstance(scale, Tensor):
        raise TypeError(
            f"gate: expected a bool mask, (mask, scale) or a Decision, got a scale of type {type(scale).__name__}"
        )
    if not 1 <= mask.dim() <= x.dim() or x.shape[: mask.dim()] != mask.shape:
        raise ValueError(
            f"gate: expected a mask whose shape begins the shape of x, {list(x.shape)}, got {list(mask.shape)}"
        )
    if scale is not None and scale.shape != mask.shape:
        raise ValueError(f"gate: expected a scale of the mask's shape {list(mask.shape)}, got {list(scale.shape)}")
    if decision.count is not None:
        _expect_count(mask, decision.count)
    return decision


def _expect_count(mask: Tensor, count: object) -> None:
    """That each sequence of mask [..., S] has `count` live rows, where the host may look."""
    if not isinstance(count, (int, torch.SymInt)) or isinstance(count, bool):
        raise TypeError(f"gate: expected a Decision whose count is an int or None, got {type(count).__name__}")
    if not is_eager_cpu(mask):
        return
    for n in mask.sum(-1).reshape(-1).tolist():  # 3 us
        if n != count:
            raise ValueError(f"gate: expected a Decision of count={count} live rows in every sequence, got {n} in one")


def plan_of(decision: Decision) -> Plan:
    """The plan of a decision; row = flat index into its mask."""
    mask, scale, count = decision
    if count is None:
        return select(mask, scale)
    return first_live(mask, count, scale)


def first_live(mask: Tensor, count: int, scale: Tensor | None = None) -> Plan:
    """A plan of `count` rows of each sequence of mask [..., S]: the live ones, and fillings where these are fewer."""
    sequences = (math.prod(mask.shape[:-1]), mask.shape[-1])
    scale = None if scale is None else scale.reshape(sequences)
    return select_topk(mask.reshape(sequences).to(torch.float32), count, scale)


def executed(
    plan: Plan, shape: torch.Size, scale: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cost of each row, float of the mask's shape: 1 where live, 0 elsewhere, with the gradient and dtype of `scale`
    where there is one."""
    cost = live_rows(plan).view(shape).to(dtype if scale is None else scale.dtype)
    if scale is None:
        return cost
    return cost + torch.where(scale.isfinite(), scale - scale.detach(), 0)  # where no row is live it may be anything


def live_rows(plan: Plan) -> Tensor:
    """bool [T]: the rows that have a slot."""
    return plan.row_offsets[1:] > plan.row_offsets[:-1]


def everything(plan: Plan) -> bool:
    """Whether the host knows that every row of a one-group plan is live, so that nothing needs to be moved."""
    return mode() == "auto" and plan.exact and holds(plan.num_slots == plan.num_rows)


def expect_recorded(name: str, tensor: Tensor) -> None:
    """That a record's tensor may be read: RuntimeError on that of a forward in a torch.vmap which has ended."""
    functorch: Any = torch._C._functorch  # pyright: ignore
    if vmap_level(tensor) > (functorch.maybe_current_level() or 0):
        raise RuntimeError(
            f"{name}: belongs to a forward inside torch.vmap, which has ended: read it in the mapped function, and "
            "return it from there"
        )


def linked(y: Tensor, module: Callable[..., Any]) -> Tensor:
    """`y`, which the module did not have to compute, tied to the module's parameters by zero gradients."""
    if not torch.is_grad_enabled() or not isinstance(module, nn.Module):
        return y
    for p in module.parameters():
        if p.requires_grad:
            y = y + p.reshape(-1)[:0].sum().to(y.dtype)
    return y


def expect_like(name: str, y: object, x: Tensor) -> Tensor:
    """`y` as a tensor of x's shape, in x's dtype."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected a module that returns a Tensor, got {type(y).__name__}")
    if y.shape != x.shape:
        raise ValueError(f"{name}: expected an output of the shape of its input, {list(x.shape)}, got {list(y.shape)}")
    return y.to(x.dtype)


def expect_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return str(value)


def expect_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int >= 1, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")


def expect_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")


def expect_batch_first(name: str, module: object) -> None:
    """ValueError where PyTorch's transformer layers, at any depth, would take the first dimension for the sequence."""
    for layer in module.modules() if isinstance(module, nn.Module) else ():
        kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        if isinstance(layer, kinds) and not layer.self_attn.batch_first:
            raise ValueError(f"{name}: expected a module that takes [B, S, D], got one with batch_first=False")


def changed(x: Tensor, y: Tensor, scale: Tensor | None, used: Tensor | None, returns: str) -> Tensor:
    """Rows x [R, D] moved by scale [R] towards an "output" y, or by an "update" y; at scale 1 exactly y, or x + y.

    Where `used` [R] is given, the result and the scale of other rows are of no use, and a NaN there harms no gradient.
    """
    if scale is None:
        return y if returns == "output" else x + y
    if used is not None:
        scale = torch.where(used, scale, 0)
    scale = scale[:, None].to(torch.promote_types(x.dtype, torch.float32))
    wide_x, wide_y = x.to(scale.dtype), y.to(scale.dtype)
    out = torch.lerp(wide_x, wide_y, scale) if returns == "output" else wide_x + scale * wide_y
    return out.to(x.dtype)


def merge(x: Tensor, live: Tensor, y: Tensor, plan: Plan, mask: Tensor, used: Tensor | None, returns: str) -> Tensor:
    """x [T, D] with the rows of `mask` [T] changed by y [A, D], computed from `live` [A, D]; the others exactly x."""
    if returns == "update" and used is None:
        return scatter_rows(y, plan, x)
    if plan.exact and used is None:  # every slot is a row of its own: one pass over x, where scatter and where take two
        return x.index_copy(0, plan.rows.long(), changed(live, y, plan.scale, None, returns))
    if used is None:
        used = torch.arange(plan.num_slots, device=x.device) < plan.offsets[-1]
    out = scatter_rows(changed(live, y, plan.scale, used, returns), dataclasses.replace(plan, scale=None))
    return torch.where(mask[:, None], out, x)


class DynamicLayer(nn.Module):
    """Base of the layers that skip.

    Attributes:
        last_plan: the Plan of the latest forward (None before it).
        last_cost: float, the executed cost of each row in the latest forward, as a share of computing that row in full;
            its mean is the share of slots executed. Differentiable to the gate wherever the gate gives a scale. A
            forward that torch.compile did not trace leaves it to be computed when it is read, each time anew.

    Both belong to the latest forward only: they are not saved, copied or pickled.
    """

    last_plan: Plan | None = None
    # the cost, or what makes it, and whether the forward that it belongs to took gradients
    _cost: Tensor | tuple[Callable[[], Tensor], bool] | None = None
    _transient: tuple[str, ...] = ("last_plan", "_cost")

    @property
    def last_cost(self) -> Tensor | None:
        """Executed cost of each row in the latest forward, None before it: see the class."""
        cost = self._cost
        if not isinstance(cost, tuple):
            return cost
        make, with_gradient = cost
        if torch.compiler.is_compiling():
            return make()
        if self.last_plan is not None:
            expect_recorded("last_cost", self.last_plan.offsets)
        with torch.inference_mode(False), torch.set_grad_enabled(with_gradient):
            return make()

    @last_cost.setter
    def last_cost(self, cost: Tensor | None) -> None:
        self._cost = cost

    def record(self, plan: Plan, cost: Callable[[], Tensor], **others: Tensor | None) -> None:
        """Keep what belongs to this forward, for a layer's forward to call: nothing under torch.export.

        Args:
            plan: becomes `last_plan`.
            cost: makes `last_cost`, when that is first wanted; it must depend on nothing that may change afterwards.
            others: attributes to set, such as what `losses()` needs; their names belong into `_transient`.
        """
        if torch.compiler.is_exporting():  # an exported graph has no layer to keep a record in
            return
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a dyncore.Plan, got {type(plan).__name__}")
        expect_callable("cost", cost)
        self.last_plan = plan
        self._cost = cost() if torch.compiler.is_compiling() else (cost, torch.is_grad_enabled())
        for name, value in others.items():
            setattr(self, name, value)

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the latest forward, unweighted scalars by name."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._transient}


def collect_losses(model: nn.Module) -> dict[str, Tensor]:
    """The auxiliary losses of every dynamic layer in `model`, as "layer.loss": scalar."""
    return {
        f"{name}.{loss}" if name else loss: value
        for name, layer in model.named_modules()
        if isinstance(layer, DynamicLayer)
        for loss, value in layer.losses().items()
    }


def collect_costs(model: nn.Module) -> dict[str, Tensor]:
    """The executed cost per row of every dynamic layer in `model` that has run, as "layer": tensor."""
    return {
        name: cost
        for name, layer in model.named_modules()
        if isinstance(layer, DynamicLayer) and (cost := layer.last_cost) is not None
    }
