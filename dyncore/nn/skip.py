"""Skip: any module on the live rows only, rows being tokens or samples (compaction: gather, run, scatter back)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn.attention import Attention, TransformerBlock
from dyncore.nn.base import (
    RETURNS,
    DynamicLayer,
    Gating,
    changed,
    decide,
    everything,
    executed,
    expect_batch_first,
    expect_callable,
    expect_choice,
    expect_like,
    linked,
    merge,
    plan_of,
)
from dyncore.nn.inputs import called
from dyncore.ops import gather_rows
from dyncore.plan import holds

_ATTENTION = (
    *(Attention, TransformerBlock, nn.MultiheadAttention),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
)


def _attends(module: object) -> bool:
    """Whether rows [A, D] would be one sequence to an attention module that they come to as they are.

    A module with a forward of its own may make tokens of each row before it attends, and so may what follows an
    nn.Unflatten.
    """
    if type(module) is not nn.Sequential:
        return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _ATTENTION)
    for part in module:
        if isinstance(part, nn.Unflatten):
            return False
        if _attends(part):
            return True
    return False


class Skip(DynamicLayer):
    """x' = g F(x) + (1 - g) x, with F computed where the gate is open only (SkipNet, Wang 2018).

    Args:
        module: F, any module that maps rows [A, ...] to rows of the same shape. Where the gate's mask is [B, S] and x
            is [B, S, D] rows are tokens and F sees [A, D]; where it is [B] and x is [B, C, H, W] rows are samples and
            F sees [A, C, H, W].
        gate: maps x to a mask, (mask, scale) or Decision (see `dyncore.nn.gates`), g being the scale of live rows, 1
            where there is none.
        returns: "output": F(x) takes the place of x, as above. "update": F(x) is added: x' = x + g F(x).

    A closed row comes out as it went in, whatever it holds; with every gate at exactly 1 the result is exactly F(x)
    where x is finite. Gradient reaches F, x, and the gate through the rows computed.

    Modules that mix rows: attention (PyTorch's or ours), by itself or in an nn.Sequential, would take the live tokens
    of a whole batch for one sequence, and is refused where rows are tokens (`TokenSkip` takes it). Any other mixing is
    not seen, nor attention in a module with a forward of its own, which may well attend within each row. BatchNorm
    sees the live rows only, in training and in its running statistics, and in "masked" execution all rows, the closed
    ones as zeros; so there the modes agree for modules that treat rows one by one. Under torch.compile,
    and on accelerators but in `execution(wait=True)`, a mask has the static bound of all rows (use a TopKGate to have a
    static count): values are the same, and rows past the live ones are zeros to F.

    Raises TypeError where F or the gate is not callable, ValueError where F changes the shape or mixes rows by
    attention, TypeError or ValueError where the mask does not fit x (it must leave at least one trailing dimension of
    x, the row's own).
    """

    def __init__(self, module: nn.Module, gate: Gating, *, returns: str = "output") -> None:
        super().__init__()
        expect_callable("module", module)
        expect_callable("gate", gate)
        self.module = module
        self.gate = gate
        self.returns: str = expect_choice("returns", returns, RETURNS)
        expect_batch_first("module", module)
        self._attends: bool = _attends(module)

    def forward(self, x: Tensor) -> Tensor:
        """x with its live rows changed by the module; the shape and dtype of x."""
        decision = decide(self.gate, x)
        mask, scale, _ = decision
        if mask.dim() == x.dim():
            raise ValueError(
                f"gate: expected a mask that leaves at least one trailing dimension of x {list(x.shape)}, "
                f"got {list(mask.shape)}"
            )
        row_shape = x.shape[mask.dim() :]
        if self._attends and len(row_shape) == 1:
            raise ValueError(
                f"module: expected one that treats rows [{x.shape[-1]}] one by one, got {type(self.module).__name__}, "
                "which attends from row to row: TokenSkip and MixtureOfDepths leave tokens out of a block, and with a "
                "mask [B] of x [B, S, D] Skip leaves out whole sequences"
            )
        plan = plan_of(decision)
        self.record(plan, functools.partial(executed, plan, mask.shape, scale))
        rows = x.reshape(mask.numel(), math.prod(row_shape))
        flat = mask.reshape(-1)
        if everything(plan):
            y = self._apply_module(rows, row_shape)
            out = changed(rows, y, None if scale is None else scale.reshape(-1), None, self.returns)
        elif mode() == "masked":
            live = torch.where(flat[:, None], rows, 0)
            y = self._apply_module(live, row_shape)
            y = changed(live, y, None if scale is None else scale.reshape(-1), flat, self.returns)
            out = torch.where(flat[:, None], y, rows)
        else:
            live = gather_rows(rows, plan)
            out = merge(rows, live, self._apply_module(live, row_shape), plan, flat, None, self.returns)
        return out.view(x.shape)

    def _apply_module(self, live: Tensor, row_shape: torch.Size) -> Tensor:
        if holds(live.shape[0] == 0):  # many modules refuse an empty batch
            return linked(live, self.module)
        shaped = live.view(live.shape[0], *row_shape)
        return expect_like("module", called("module", self.module, shaped), shaped).reshape(live.shape)

    def extra_repr(self) -> str:
        return f"returns={self.returns}"
