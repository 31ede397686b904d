"""Gates: which rows are computed, and by how much they count.

A gate is any callable that maps x [..., D] to a bool mask over leading dimensions of x ([...] for tokens, [B] for
samples), to (mask, scale), or to a `Decision`. So one's own takes a few lines:

    class LargeNorm(nn.Module):
        def forward(self, x):
            return x.norm(dim=-1) > 1.0

The gates here score each row by a learned logit. Thresholds and temperatures are buffers: `gate.threshold = 0.3` moves
one at run time, so that one trained model traces its whole curve of accuracy against compute, without retracing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyncore.nn.base import Decision, expect_choice, expect_size, live_rows
from dyncore.nn.choices import Choices
from dyncore.nn.full_precision import full_precision
from dyncore.ops.autograd import wants_grad
from dyncore.plan import select_topk

__all__ = [
    "ChoiceGate",
    "Gate",
    "GumbelGate",
    "HardConcreteGate",
    "RectifiedGate",
    "StraightThroughGate",
    "ThresholdGate",
    "TopKGate",
    "pool_spatial",
    "pool_tokens",
]

WEIGHTS = ("hard", "soft", "none")


def pool_spatial(x: Tensor) -> Tensor:
    """Mean over every dimension but the first two: [B, C, ...] to [B, C], for gates on samples."""
    return x.flatten(2).mean(2)


def pool_tokens(x: Tensor) -> Tensor:
    """Mean over every dimension between first and last: [B, ..., D] to [B, D], for gates on samples."""
    return x.flatten(1, -2).mean(1)


def shown(buffer: Tensor) -> str:
    """A scalar buffer for a repr."""
    return "?" if buffer.is_meta else f"{float(buffer):.4g}"


def _logistic(like: Tensor) -> Tensor:
    """Logistic noise: the difference of two Gumbel samples."""
    u = torch.rand_like(like).clamp(1e-6, 1 - 1e-6)
    return torch.log(u) - torch.log1p(-u)


def expect_number(name: str, value: object) -> float:
    """A number (an infinite one, too), or a tensor of no dimensions that holds one."""
    if isinstance(value, Tensor):
        is_number = value.dim() == 0 and not value.is_meta and value.dtype != torch.bool and not value.is_complex()
    else:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value.item() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    if math.isnan(number):
        raise ValueError(f"{name}: expected a number, got nan")
    return number


def expect_temperature(name: str, value: object) -> float:
    """A finite number > 0."""
    number = expect_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {number}")
    return number


def expect_share(name: str, value: object) -> float:
    """A number in 0..1."""
    number = expect_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: expected a number in 0..1, got {number}")
    return number


def scalar(number: float) -> Tensor:
    """A number as the buffer of a `Movable`: float32, whatever torch's default is."""
    return torch.tensor(number, dtype=torch.float32)


class Capacity:
    """Mixin: `capacity`, how many rows of a sequence are kept: a float is a ratio in 0..1, an int a count."""

    # The ratio stands in integers: torch.compile makes a float attribute a symbol, and a shape can't depend on that.
    _capacity: tuple[int, int]  # numerator and denominator of a ratio; denominator 0: a count

    @property
    def capacity(self) -> float | int:
        """Rows of each sequence that are kept: a float is a ratio, an int a count. May be set."""
        value, parts = self._capacity
        return value / parts if parts else value

    @capacity.setter
    def capacity(self, capacity: float | int) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, (int, float)):
            raise TypeError(f"capacity: expected a float ratio or an int count, got {type(capacity).__name__}")
        if not (0.0 <= capacity <= 1.0 if isinstance(capacity, float) else capacity >= 0):
            raise ValueError(f"capacity: expected a float ratio in 0..1 or an int count >= 0, got {capacity}")
        self._capacity = capacity.as_integer_ratio() if isinstance(capacity, float) else (capacity, 0)

    def kept(self, length: int) -> int:
        """How many rows of a sequence of this length are kept: the rounded ratio of it, or at most the count."""
        value, parts = self._capacity
        return (2 * value * length + parts) // (2 * parts) if parts else min(value, length)


class Movable(nn.Module):
    """Mixin: a number, or a tensor that holds one, assigned to a scalar buffer fills it in place, so that a compiled
    module sees it without a retrace. TypeError on anything else, ValueError on NaN and on what `_checks` refuses.

    Floating buffers stay float32 where the module takes another dtype: 0.999 is 1 in bfloat16.
    """

    # what a buffer may be set to, where that is not any number: raises, or returns the number
    _checks: ClassVar[dict[str, Callable[[str, object], float]]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        buffer = self.__dict__.get("_buffers", {}).get(name)
        if buffer is None or buffer.dim() or isinstance(value, nn.Parameter):
            super().__setattr__(name, value)
            return
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"{name}: expected a number, got shape {list(value.shape)}")
        buffer.fill_(self._checks.get(name, expect_number)(name, value))

    def _apply(self, *args: Any, **kwargs: Any) -> Movable:
        before = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(*args, **kwargs)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


def scores(score: int | nn.Module, outputs: int) -> nn.Module:
    """`score` as a module: the width of x makes a Linear of it. TypeError on anything else."""
    if isinstance(score, bool) or not isinstance(score, (int, nn.Module)):
        raise TypeError(f"score: expected a width (int) or a module, got {type(score).__name__}")
    return nn.Linear(score, outputs) if isinstance(score, int) else score


class Gate(Movable):
    """Base of the gates that score rows: p = sigmoid(logit of the row).

    Args:
        score: the width D of x, for a linear score of each row, or a module that maps (pooled) x to logits [..., 1], or
            [..., 2] for (skip, keep), whose difference is the logit. Linear scores are computed in float32.
        weight: the scale of a live row: "hard": 1, with the gradient of p (straight-through); "soft": p; "none": no
            scale, and no gradient to the gate.
        pool: applied to x before the score, for gates on samples: `pool_spatial`, `pool_tokens` or any callable.

    Gradient reaches the score through the rows that were computed, and for every row through the layer's `last_cost`.
    """

    def __init__(
        self, score: int | nn.Module, *, weight: str = "hard", pool: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.score: nn.Module = scores(score, 1)
        self.weight: str = expect_choice("weight", weight, WEIGHTS)
        self.pool = pool

    def logits(self, x: Tensor) -> Tensor:
        """Logit of each row, in float32 or wider, of the mask's shape."""
        score = full_precision(self.score, x if self.pool is None else self.pool(x))
        if score.shape[-1] == 2:
            return score[..., 1] - score[..., 0]
        if score.shape[-1] != 1:
            raise ValueError(f"score: expected logits [..., 1] or [..., 2], got shape {list(score.shape)}")
        return score[..., 0]

    def _weigh(self, mask: Tensor, p: Tensor) -> Tensor | None:
        if self.weight == "none":
            return None
        if self.weight == "soft":
            return p
        if not wants_grad(p):
            return None  # as good as 1 wherever the mask is True, and nothing has to be multiplied
        return mask.to(p.dtype) + (p - p.detach())

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class ThresholdGate(Gate):
    """Live where p = sigmoid(logit) > threshold; the scale of a live row is p.

    `threshold` is a buffer. Below 0 every row is live, from 1 on none is.
    """

    threshold: Tensor

    def __init__(
        self,
        score: int | nn.Module,
        threshold: float = 0.5,
        *,
        weight: str = "soft",
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(score, weight=weight, pool=pool)
        self.register_buffer("threshold", scalar(expect_number("threshold", threshold)))

    def forward(self, x: Tensor) -> Decision:
        """The decision on the rows of x [..., D]."""
        p = torch.sigmoid(self.logits(x))
        mask = p > self.threshold
        return Decision(mask, self._weigh(mask, p))

    def extra_repr(self) -> str:
        return f"threshold={shown(self.threshold)}, {super().extra_repr()}"


class StraightThroughGate(ThresholdGate):
    """Hard forward, soft backward (Bengio 2013; SkipNet, Wang 2018): the scale is 1 with the gradient of p."""

    def __init__(
        self, score: int | nn.Module, threshold: float = 0.5, *, pool: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(score, threshold, weight="hard", pool=pool)


class GumbelGate(ThresholdGate):
    """Straight-through Gumbel-sigmoid (Jang 2017, Maddison 2017), the Gumbel-softmax over (skip, keep).

    In training p = sigmoid((logit + noise) / temperature) with logistic noise, the difference of two Gumbel samples; in
    evaluation there is no noise. `threshold` and `temperature` are buffers, so that both may be annealed.
    """

    _checks = {"temperature": expect_temperature}  # noqa: RUF012
    temperature: Tensor

    def __init__(
        self,
        score: int | nn.Module,
        temperature: float = 1.0,
        threshold: float = 0.5,
        *,
        weight: str = "hard",
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(score, threshold, weight=weight, pool=pool)
        self.register_buffer("temperature", scalar(expect_temperature("temperature", temperature)))

    def forward(self, x: Tensor) -> Decision:
        """The decision on the rows of x [..., D]."""
        logits = self.logits(x)
        if self.training:
            logits = logits + _logistic(logits)
        p = torch.sigmoid(logits / self.temperature)
        mask = p > self.threshold
        return Decision(mask, self._weigh(mask, p))

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, {super().extra_repr()}"


class HardConcreteGate(ThresholdGate):
    """Hard concrete (Louizos 2018): a stretched, clipped sigmoid, which is exactly 0 or 1 with a probability.

    In training z = clamp(s (b - a) + a, 0, 1) with s = sigmoid((noise + logit) / temperature) and logistic noise; in
    evaluation s = sigmoid(logit). Live where z > threshold (0 by default, so that what counts nothing is not computed);
    the scale of a live row is z (`weight="soft"`), or 1 with its gradient ("hard").

    Args:
        temperature: buffer, > 0. stretch: (a, b) with a < 0 and b > 1.

    The gradient of z is 0 where it is clipped; that of `open_probability`, which is what the L0 penalty sums, never is.
    """

    _checks = {"temperature": expect_temperature}  # noqa: RUF012
    temperature: Tensor

    def __init__(
        self,
        score: int | nn.Module,
        temperature: float = 2 / 3,
        threshold: float = 0.0,
        *,
        stretch: tuple[float, float] = (-0.1, 1.1),
        weight: str = "soft",
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(score, threshold, weight=weight, pool=pool)
        if not stretch[0] < 0 < 1 < stretch[1]:
            raise ValueError(f"stretch: expected (a, b) with a < 0 and b > 1, got {stretch}")
        self.stretch = stretch
        self.register_buffer("temperature", scalar(expect_temperature("temperature", temperature)))

    def forward(self, x: Tensor) -> Decision:
        """The decision on the rows of x [..., D]."""
        logits = self.logits(x)
        if self.training:
            logits = (logits + _logistic(logits)) / self.temperature
        low, high = self.stretch
        z = (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)
        mask = z > self.threshold
        return Decision(mask, self._weigh(mask, z))

    def open_probability(self, x: Tensor) -> Tensor:
        """P(z > 0) of each row in training, float [...]: its mean, the expected share of live rows, is the L0 loss."""
        low, high = self.stretch
        return torch.sigmoid(self.logits(x) - self.temperature * math.log(-low / high))

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, stretch={self.stretch}, {super().extra_repr()}"


class TopKGate(Capacity, Gate):
    """Live are the rows of highest logit in each sequence (the last dimension of the scores; one of samples if 1-D).

    Args:
        capacity: a float is a ratio of the rows, an int a count. The count is static: nothing is padded on any device.

    A row whose logit is NaN ranks first. Looks at the whole sequence, so it is not causal. `capacity` may be set at run
    time; a compiled layer is then traced again, for its shapes depend on it.
    """

    def __init__(
        self,
        score: int | nn.Module,
        capacity: float | int,
        *,
        weight: str = "soft",
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(score, weight=weight, pool=pool)
        self.capacity = capacity

    def forward(self, x: Tensor) -> Decision:
        """The decision on the rows of x [..., D]."""
        logits = self.logits(x)
        count = self.kept(logits.shape[-1])
        sequences = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
        mask = live_rows(select_topk(sequences, count)).view(logits.shape)
        scale = None if self.weight == "none" else self._weigh(mask, torch.sigmoid(logits))
        return Decision(mask, scale, count)

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, {super().extra_repr()}"


class _Choosing(Movable):
    """Base of the gates over G modules: logits [..., G] of (pooled) x, and a threshold."""

    threshold: Tensor

    def __init__(
        self,
        score: int | nn.Module,
        num_choices: int,
        threshold: float,
        pool: Callable[[Tensor], Tensor] | None,
        exit: bool = False,
    ) -> None:
        super().__init__()
        expect_size("num_choices", num_choices)
        self.score: nn.Module = scores(score, num_choices + exit)
        self.num_choices = num_choices
        self.exit = exit
        self.pool = pool
        self.register_buffer("threshold", scalar(expect_number("threshold", threshold)))

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., G] of each row (one more with an exit), in float32 or wider."""
        score = full_precision(self.score, x if self.pool is None else self.pool(x))
        if score.shape[-1] != self.num_choices + self.exit:
            wanted = self.num_choices + self.exit
            raise ValueError(f"score: expected logits [..., {wanted}], got shape {list(score.shape)}")
        return score

    def extra_repr(self) -> str:
        return f"num_choices={self.num_choices}, threshold={shown(self.threshold)}"


class ChoiceGate(_Choosing):
    """One of G modules for each row, by straight-through Gumbel-softmax (Jang 2017, Maddison 2017), for `Branch`.

    In training the module of highest (logit + Gumbel noise) is taken, in evaluation that of highest logit; the weight
    has the gradient of p = softmax((logits + noise) / temperature).

    Args:
        score: the width D of x for a linear score, or a module that maps (pooled) x to logits [..., G].
        num_choices: G. The score has one logit more, for taking none, if `exit`.
        threshold: buffer; a row whose largest p is not above it takes none. At 0 all take one (or the exit).
        weight: "hard": 1 with the gradient of p. "soft": p.
        pool: applied to x before the score, for gates on samples.
    """

    _checks = {"temperature": expect_temperature}  # noqa: RUF012
    temperature: Tensor

    def __init__(
        self,
        score: int | nn.Module,
        num_choices: int,
        temperature: float = 1.0,
        threshold: float = 0.0,
        *,
        exit: bool = False,
        weight: str = "hard",
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(score, num_choices, threshold, pool, exit)
        self.weight: str = expect_choice("weight", weight, ("hard", "soft"))
        self.register_buffer("temperature", scalar(expect_temperature("temperature", temperature)))

    def forward(self, x: Tensor) -> Choices:
        """The choice for the rows of x [..., D]."""
        logits = self.logits(x)
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().clamp(min=1e-20).log()
        p = torch.softmax(logits / self.temperature, -1)
        best, index = p.max(-1, keepdim=True)
        mask = torch.zeros_like(p, dtype=torch.bool).scatter(-1, index, best > self.threshold)
        weight = p if self.weight == "soft" else mask + (p - p.detach())
        return Choices(mask[..., : self.num_choices], weight[..., : self.num_choices])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, exit={self.exit}, weight={self.weight}, temperature={shown(self.temperature)}"


class RectifiedGate(_Choosing):
    """Any number of G modules for each row, by soft gates that can be exactly 0: max(0, tanh(logit)) (Li 2020).

    A module runs for the rows whose gate is above `threshold` (a buffer; 0 by default), weighted by the gate.

    Args:
        score: the width D of x for a linear score, or a module that maps (pooled) x to logits [..., G].
        num_choices: G. pool: applied to x before the score, for gates on samples.
    """

    def __init__(
        self,
        score: int | nn.Module,
        num_choices: int,
        threshold: float = 0.0,
        *,
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(score, num_choices, threshold, pool)

    def forward(self, x: Tensor) -> Choices:
        """The choices for the rows of x [..., D]."""
        gate = torch.tanh(self.logits(x)).relu()
        return Choices(gate > self.threshold, gate)
