"""Layers that leave tokens out of a transformer block: MixtureOfDepths (a fixed count) and TokenSkip (any count).

The selected tokens of each sequence are gathered side by side, the block runs on them with their original positions
(the token protocol of `dyncore.nn.attention`), and they are put back; every other token passes by unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn.base import (
    RETURNS,
    Decision,
    DynamicLayer,
    Gating,
    changed,
    decide,
    executed,
    expect_batch_first,
    expect_callable,
    expect_choice,
    expect_like,
    expect_recorded,
    first_live,
    linked,
    live_rows,
    merge,
    plan_of,
)
from dyncore.nn.cache import KeyValueCache
from dyncore.nn.full_precision import full_precision
from dyncore.nn.gates import Capacity, Movable, scalar
from dyncore.nn.inputs import called, expect_sequences, takes
from dyncore.ops import gather_rows
from dyncore.plan import Plan, holds, select_topk

ATTENTION = ("selected", "all_keys")
INFERENCE = ("topk", "predictor", "threshold")
ROUTER_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda r: r,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hard": lambda r: 1 + (torch.sigmoid(r) - torch.sigmoid(r).detach()),
}
# the block on tokens [B, N, D], their positions or None for all, which are live or None for all, and the context
Call = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


def _width(block: nn.Module) -> int:
    """The model width of a block: its `dim`, or the input width of its first Linear."""
    dim = getattr(block, "dim", None)
    if isinstance(dim, int):
        return dim
    for module in block.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError("dim: expected the model width, for the block has neither `dim` nor a Linear layer; got None")


class _TokenLayer(DynamicLayer):
    """Runs a block on the selected tokens of x [B, S, D]."""

    _all_keys = False
    _adapts = False  # whether it calls the block in a way of its own, instead of by the token protocol

    def __init__(self, block: nn.Module, returns: str) -> None:
        super().__init__()
        expect_callable("block", block)
        if not self._adapts:
            expect_batch_first("block", block)
        self.block = block
        self.returns: str = expect_choice("returns", returns, RETURNS)
        self._names = tuple(name for name in ("positions", "live", "context", "cache") if takes(block, name))

    def _by_decision(self, x: Tensor, decision: Decision, call: Call, start: int = 0) -> Tensor:
        mask, scale, count = decision
        plan = plan_of(decision)
        self.record(plan, functools.partial(executed, plan, mask.shape, scale))
        if count is not None:
            return self._run(x, mask, scale, plan, count, call, start)
        if not plan.exact or not mask.numel():  # nobody has counted: the static bound is every token
            return self._run(x, mask, scale, plan, x.shape[1], call, start, even=False)
        counts = mask.sum(1)
        shortest, longest = int(counts.min()), int(counts.max())
        if shortest < longest:
            plan = first_live(mask, longest, scale)
        return self._run(x, mask, scale, plan, longest, call, start, even=shortest == longest)

    def _run(
        self,
        x: Tensor,
        mask: Tensor,
        scale: Tensor | None,
        plan: Plan,
        count: int,
        call: Call,
        start: int = 0,
        *,
        even: bool = True,
    ) -> Tensor:
        """x, whose first token has the position `start`, with the block applied where mask [B, S] says so; `plan` holds
        `count` tokens of each sequence, all of them selected if `even`."""
        batch, seq, width = x.shape
        rows, flat = x.reshape(batch * seq, width), mask.reshape(-1)
        every = holds(count == seq)
        if every or mode() == "masked":
            whole = even and every
            live = x if whole else torch.where(mask[:, :, None], x, 0)
            y = call(live, None, None if whole else mask, None if whole else x).reshape(rows.shape)
            scale = None if scale is None else scale.reshape(-1)
            y = changed(live.reshape(rows.shape), y, scale, None if whole else flat, self.returns)
            return (y if whole else torch.where(flat[:, None], y, rows)).view(x.shape)
        live, used = gather_rows(rows, plan), None
        if not even:
            used = flat.index_select(0, plan.rows)
            live = torch.where(used[:, None], live, 0)
        positions = (plan.rows % seq).view(batch, count)
        if start:
            positions = positions + start
        alive = None if used is None else used.view(batch, count)
        y = call(live.view(batch, count, width), positions, alive, x).reshape(live.shape)
        return merge(rows, live, y, plan, flat, used, self.returns).view(x.shape)

    def _caller(self, cache: KeyValueCache | None) -> Call:
        """The block as the token protocol has it."""
        if cache is not None and "cache" not in self._names:
            raise ValueError(f"cache: expected a block whose forward takes cache=, got {type(self.block).__name__}")

        def call(tokens: Tensor, positions: Tensor | None, live: Tensor | None, context: Tensor | None) -> Tensor:
            context = context if self._all_keys else None
            # a cache remembers the keys of a context
            if holds(tokens.numel() == 0) and (cache is None or context is None):
                return linked(tokens, self.block)
            if cache is not None and positions is None:  # so that the layer counts the tokens, and not the block
                positions = torch.arange(cache.seen, cache.seen + tokens.shape[1], device=tokens.device)
                positions = positions.expand(tokens.shape[:2])
            protocol = {"positions": positions, "live": live, "context": context, "cache": cache}
            y = called("block", self.block, tokens, **{name: protocol[name] for name in self._names})
            return expect_like("block", y, tokens)

        return call

    def extra_repr(self) -> str:
        return f"returns={self.returns}"


class TokenSkip(_TokenLayer):
    """Each token goes through the block or past it, as its gate says (D-LLM, Jiang 2024; FlexiDepth, Luo 2025).

    Args:
        block: a transformer block that takes the token protocol of `dyncore.nn.attention`: block(x, positions=, live=),
            and context= for "all_keys". `TransformerBlock` does.
        gate: maps x [B, S, D] to a mask [B, S] (see `dyncore.nn.gates`): any number of tokens in each sequence.
        attention: "selected": tokens passed by have no key and value, so their whole cost falls away. "all_keys": the
            selected attend to the keys and values of every token, computed for every token from the layer's input.
        returns: "output": block(x) takes the place of x, weighted: x + g (block(x) - x). "update": x + g block(x).

    Selected tokens attend within their own sequence, by their original positions, causally if the block is causal; with
    a gate that looks at one token at a time a later token then never changes an earlier output. On a CPU the selected
    are padded to the longest count of the batch; under torch.compile, and on accelerators but in
    `execution(wait=True)`, a mask has the static bound of every token (a TopKGate has a static count).

    Raises ValueError where the block or the mask does not fit.
    """

    def __init__(self, block: nn.Module, gate: Gating, attention: str = "selected", *, returns: str = "output") -> None:
        super().__init__(block, returns)
        expect_callable("gate", gate)
        self.gate = gate
        self.attention: str = expect_choice("attention", attention, ATTENTION)
        self._all_keys = attention == "all_keys"
        for name in ("positions", "live", *(["context"] if self._all_keys else [])):
            if name not in self._names:
                raise ValueError(
                    f"block: expected a block whose forward takes {name}=, got {type(block).__name__}; see "
                    "dyncore.nn.attention for the token protocol; a block that treats tokens one by one goes into Skip"
                )

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Sequences x [B, S, D] with the selected tokens through the block, the others as they are. With a cache x are
        the tokens that follow those of earlier calls with it: prefill and decoding give what one call on all gives."""
        expect_sequences(x)
        decision = decide(self.gate, x)
        if decision.mask.dim() != 2:
            raise ValueError(f"gate: expected a mask [B, S], got shape {list(decision.mask.shape)}")
        y = self._by_decision(x, decision, self._caller(cache), 0 if cache is None else cache.seen)
        if cache is not None:
            cache.seen += x.shape[1]
        return y

    def extra_repr(self) -> str:
        return f"attention={self.attention}, {super().extra_repr()}"


class MixtureOfDepths(Capacity, Movable, _TokenLayer):
    """The k tokens of highest router score r in each sequence go through the block: x + r f(x) (Raposo 2024).

    Args:
        block: maps [B, k, D] to the same shape. With returns="output" (a usual block, residuals inside) f(x) is
            block(x) - x, so a token becomes x + r (block(x) - x); with "update" f(x) is block(x) itself. A block whose
            forward takes positions=, live= (`TransformerBlock`) gets the original positions. One that takes x alone
            sees the selected tokens side by side, in order; "masked" execution equals it if it treats each alone.
        capacity: tokens of each sequence that are computed; a float is a ratio (1.0: all), an int a count (1: one).
        dim: D, where it can't be read from the block. router: a module [B, S, D] -> [B, S, 1] instead of a Linear.
        weight: what the score multiplies f with: "linear" (r itself, as in the paper), "sigmoid", "tanh", "hard" (1,
            with the gradient of the sigmoid: chosen tokens come out as from the block alone).
        inference: how tokens are chosen in evaluation. Training always takes the top k.
            "topk": as in training; not causal, since it compares with later tokens.
            "predictor": by a small network on x, which the loss "predictor" teaches to foretell membership; causal.
            "threshold": where sigmoid(r) > threshold, the loss "threshold" pulling r above or below it; causal.
        predictor: the network instead of the default two-layer one; [B, S, D] -> logits [B, S, 1].

    `inference` and `threshold` (a buffer, for the last two) may be moved at run time. `losses()` after a training
    forward has the auxiliary loss of "predictor" (no gradient to x) or "threshold".
    """

    _transient = (*DynamicLayer._transient, "_auxiliary")
    _auxiliary: Tensor | None = None
    threshold: Tensor

    def __init__(
        self,
        block: nn.Module,
        capacity: float | int,
        *,
        dim: int | None = None,
        router: nn.Module | None = None,
        weight: str = "linear",
        inference: str = "topk",
        predictor: nn.Module | None = None,
        returns: str = "output",
    ) -> None:
        super().__init__(block, returns)
        self.capacity = capacity
        self.weight: str = expect_choice("weight", weight, tuple(ROUTER_WEIGHTS))
        self.inference: str = expect_choice("inference", inference, INFERENCE)
        if dim is None and (router is None or (inference == "predictor" and predictor is None)):
            dim = _width(block)
        self.router: nn.Module = nn.Linear(dim, 1, bias=False) if router is None else router  # type: ignore[arg-type]
        if inference == "predictor" and predictor is None:
            hidden = max(dim // 4, 1)  # type: ignore[operator]
            predictor = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, 1))  # type: ignore[arg-type]
        self.predictor = predictor
        if inference != "topk" and not self._adapts and not {"positions", "live"} <= set(self._names):
            raise ValueError(
                f"block: expected a block whose forward takes positions= and live= for inference={inference!r}, "
                f"got {type(block).__name__}"
            )
        self.register_buffer("threshold", scalar(0.5))

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Sequences x [B, S, D] with the chosen tokens through the block, the others as they are. A cache as in
        `TokenSkip`, for the causal modes of inference."""
        expect_sequences(x)
        if cache is not None and (self.training or self.inference == "topk"):
            how = "training" if self.training else "inference='topk'"
            raise ValueError(f"cache: expected None where tokens are compared with later ones, got a cache in {how}")
        y = self._mix(x, self._caller(cache), 0 if cache is None else cache.seen)
        if cache is not None:
            cache.seen += x.shape[1]
        return y

    def _mix(self, x: Tensor, call: Call, start: int = 0) -> Tensor:
        scores = full_precision(self.router, x, "router").squeeze(-1)
        scale = ROUTER_WEIGHTS[self.weight](scores)
        if not self.training and self.inference != "topk":
            logits = scores if self.inference == "threshold" else self._predict(x)
            return self._by_decision(x, Decision(torch.sigmoid(logits) > self.threshold, scale), call, start)
        count = self.kept(x.shape[1])
        plan = select_topk(scores, count, scale)
        mask = live_rows(plan).view(scores.shape)
        auxiliary = None
        if self.training and self.inference != "topk":
            logits = scores if self.inference == "threshold" else self._predict(x.detach())
            auxiliary = F.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype))
        cost = functools.partial(executed, plan, mask.shape, dtype=scores.dtype)
        self.record(plan, cost, _auxiliary=auxiliary)
        return self._run(x, mask, scale, plan, count, call, start)

    def _predict(self, x: Tensor) -> Tensor:
        if self.predictor is None:
            raise ValueError("inference: expected a layer built with inference='predictor', got one without predictor")
        return full_precision(self.predictor, x, "predictor").squeeze(-1)

    def losses(self) -> dict[str, Tensor]:
        """The auxiliary loss of the latest training forward: binary cross-entropy of membership in the top k."""
        if self._auxiliary is None:
            return {}
        expect_recorded("losses", self._auxiliary)
        return {self.inference: self._auxiliary}

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, weight={self.weight}, inference={self.inference}, {super().extra_repr()}"
