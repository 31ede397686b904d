"""Exits: when is a sample sure enough to leave? Confidence criteria, thresholds for a budget, simulation of both.

A criterion is any callable that maps the logits [B, C] of an exit, and the state that it returned at the exit before
(None at the first), to the confidence [B] or to (confidence, state); state is a tensor [B, ...] or a pytree of them. A
sample leaves where its confidence >= threshold; NaN never leaves early. So one's own takes a few lines:

    class LargestLogit(exits.Criterion):
        def confidence(self, logits, state):
            return logits.max(-1).values, state

Thresholds are buffers, one for all exits or one for each but the last: `criterion.threshold = 0.8` moves them at run
time, so that one trained network has its whole curve of accuracy against compute. At -inf every sample leaves at the
first exit, at inf each takes the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyncore.nn.base import expect_size
from dyncore.nn.full_precision import full_precision
from dyncore.nn.gates import Movable, expect_number

__all__ = [
    "Criterion",
    "Entropy",
    "Learned",
    "Margin",
    "MaxProbability",
    "Patience",
    "Simulation",
    "ZeroTimeWaste",
    "calibrate",
    "confidences",
    "simulate",
]


class Criterion(Movable):
    """Base of the criteria: a confidence and the threshold that it has to reach.

    Args:
        threshold: one for all exits, or a sequence of K - 1, one for each exit but the last, which always answers.

    May be assigned: a number, or as many as there are, move the buffer in place, seen by compiled code without a
    retrace.
    """

    threshold: Tensor

    def __init__(self, threshold: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", _thresholds(threshold))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "threshold" and "threshold" in self._buffers:
            moved = _thresholds(value)
            if moved.dim() == 0 or moved.shape == self.threshold.shape:
                self.threshold.copy_(moved)
            else:
                self._buffers["threshold"] = moved.to(self.threshold.device)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}threshold")
        if isinstance(saved, Tensor) and saved.shape != self.threshold.shape:  # calibrated since it was built
            self._buffers["threshold"] = self.threshold.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(confidence [B], state for the next exit) of logits [B, C], in float32 or wider: to be overridden."""
        raise NotImplementedError("confidence: expected a criterion that defines it")

    def forward(self, logits: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """(confidence [B], state for the next exit); state is None at the first exit."""
        _expect_logits("logits", logits)
        return self.confidence(logits if logits.dtype == torch.float64 else logits.float(), state)

    def threshold_of(self, number: int) -> Tensor:
        """The threshold of exit `number`, a scalar tensor. IndexError where there are fewer."""
        return _at(self.threshold, number)

    def extra_repr(self) -> str:
        if self.threshold.is_meta:
            return "threshold=?"
        return f"threshold={[round(t, 4) for t in self.threshold.reshape(-1).tolist()]}"


class MaxProbability(Criterion):
    """The largest softmax probability, 1/C to 1 (MSDNet, Huang 2018; BranchyNet's kin)."""

    def __init__(self, threshold: float | Sequence[float] | Tensor = 0.9) -> None:
        super().__init__(threshold)

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(the largest probability [B], state as it is)."""
        return torch.softmax(logits, -1).amax(-1), state


class Entropy(Criterion):
    """1 - H(p) / log C: 0 where all classes are alike, 1 where one is certain (BranchyNet, Teerapittayanon 2016)."""

    def __init__(self, threshold: float | Sequence[float] | Tensor = 0.8) -> None:
        super().__init__(threshold)

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(1 minus the normalised entropy [B], state as it is)."""
        log_p = torch.log_softmax(logits, -1)
        p = log_p.exp()
        entropy = -torch.where(p > 0, p * log_p, p).sum(-1)  # NaN stays NaN
        classes = torch.tensor(float(max(logits.shape[-1], 2)), device=logits.device)
        return 1 - entropy / torch.log(classes), state


class Margin(Criterion):
    """p1 - p2, the two largest probabilities' difference, 0 to 1 (Big/Little, Park 2015)."""

    def __init__(self, threshold: float | Sequence[float] | Tensor = 0.5) -> None:
        super().__init__(threshold)

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(the margin [B], state as it is)."""
        if logits.shape[-1] < 2:
            raise ValueError(f"logits: expected at least 2 classes, got shape {list(logits.shape)}")
        first, second = torch.softmax(logits, -1).topk(2, dim=-1).values.unbind(-1)
        return first - second, state


class Patience(Criterion):
    """How many exits in a row have agreed with the one before (PABEE, Zhou 2020): leave at the threshold's number.

    The confidence is 0 at the first exit, and wherever an exit contradicts the one before. At threshold 0 every sample
    leaves at the first exit.
    """

    def __init__(self, threshold: float | Sequence[float] | Tensor = 2.0) -> None:
        super().__init__(threshold)

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(the count of agreements [B], (prediction [B], count [B]))."""
        prediction = logits.argmax(-1)
        if state is None:
            count = torch.zeros(prediction.shape, dtype=torch.float32, device=logits.device)
        else:
            before, agreed = state
            count = torch.where(prediction == before, agreed + 1, 0.0)
        return count, (prediction, count)


class Learned(Criterion):
    """sigmoid of a learned score of the sorted log-probabilities (adaptive network selection, Bolukbasi 2017).

    Args:
        score: the number of classes C, for a Linear layer on the log-probabilities from the largest down, or a module
            that maps these [B, C] to logits [B, 1] of "this exit is right".

    Train it by binary cross-entropy of `scores(logits)` against "this exit is right", on samples that the exits were
    not trained on: a network is nearly always right on those.
    """

    def __init__(self, score: int | nn.Module, threshold: float | Sequence[float] | Tensor = 0.5) -> None:
        super().__init__(threshold)
        if not isinstance(score, nn.Module):
            expect_size("score", score)
        self.score: nn.Module = score if isinstance(score, nn.Module) else nn.Linear(score, 1)

    def scores(self, logits: Tensor) -> Tensor:
        """Logits [B] of "this exit is right", with gradient to the score."""
        score = full_precision(self.score, torch.log_softmax(logits.detach(), -1).sort(-1, descending=True).values)
        if score.shape != (*logits.shape[:-1], 1):
            raise ValueError(f"score: expected logits {[*logits.shape[:-1], 1]}, got shape {list(score.shape)}")
        return score[..., 0]

    def confidence(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(the probability [B] that this exit is right, state as it is)."""
        return torch.sigmoid(self.scores(logits)), state


class ZeroTimeWaste(nn.Module):
    """A head that wastes no head before it (Zero Time Waste, Wolczyk 2021): it sees the logits of the exit before, and
    what it returns is the geometric mean of both, by learned weights.

        z_k = W [f(h), log q_{k-1}] + c,    log q_k = log_softmax(w log_softmax(z_k) + u log q_{k-1} + b)

    The paper weighs all earlier exits in one product for each exit; here weights accumulate from exit to exit, so that
    one tensor is handed on. No gradient goes to the exit before, as in the paper, so the exits do not disturb each
    other.

    Args:
        features: f, a module that maps an exit's state to features [B, D].
        in_features: D. num_classes: C.
    """

    def __init__(self, features: nn.Module, in_features: int, num_classes: int) -> None:
        super().__init__()
        expect_size("in_features", in_features)
        expect_size("num_classes", num_classes)
        self.features = features
        self.num_classes = num_classes
        self.own: nn.Linear = nn.Linear(in_features + num_classes, num_classes)
        self.weight: nn.Parameter = nn.Parameter(torch.ones(2))  # of this exit's own, and of what comes from before
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(num_classes))

    def forward(self, state: Any, previous: Tensor | None = None) -> Tensor:
        """Logits [B, C], which are log-probabilities, from an exit's state and the logits [B, C] of the exit before."""
        features = self.features(state)
        if previous is None:
            before = features.new_zeros(features.shape[0], self.num_classes)  # says nothing
        else:
            before = torch.log_softmax(previous.detach(), -1)
        own = torch.log_softmax(self.own(torch.cat([features, before], -1)), -1)
        return torch.log_softmax(self.weight[0] * own + self.weight[1] * before + self.bias, -1)


def confidences(logits: Sequence[Tensor], criterion: Any) -> Tensor:
    """Confidence [K, B] of every sample at every exit, from the logits [B, C] of all K exits."""
    _expect_all(logits)
    state, found = None, []
    for one in logits:
        confidence, state = ask(criterion, one, state)
        found.append(confidence)
    return torch.stack(found)


class Simulation(NamedTuple):
    """What samples would do, by `simulate`.

    Attributes:
        exit: int64 [B], the number of the exit that each takes.
        logits: [B, C], of that exit.
        cost: float [B], what it costs to get there.
    """

    exit: Tensor
    logits: Tensor
    cost: Tensor


def simulate(logits: Sequence[Tensor], criterion: Any, costs: Sequence[float] | None = None) -> Simulation:
    """The exits that samples would take, from the logits of all exits, such as `layer.every_exit(x)`.

    Args:
        logits: K tensors [B, C], of the exits in order.
        criterion: as a layer's; moving its threshold and simulating again costs no forward.
        costs: K numbers, what each stage adds to those before it; the default is 1/K.
    """
    _expect_all(logits)
    num_exits, samples = len(logits), logits[0].shape[0]
    reached = torch.tensor(cumulative(costs, num_exits), device=logits[0].device)
    surest = confidences(logits, criterion)
    leaves = torch.stack([surest[k] >= threshold_of(criterion, k) for k in range(num_exits - 1)] or [surest[0] == 0])
    leaves = torch.cat([leaves[: num_exits - 1], torch.ones_like(leaves[:1])])
    exit = leaves.to(torch.uint8).argmax(0)  # the first
    chosen = torch.stack(list(logits))[exit, torch.arange(samples, device=exit.device)]
    return Simulation(exit, chosen, reached[exit])


def calibrate(confidences: Tensor, costs: Sequence[float], budget: float) -> Tensor:
    """Thresholds [K-1] at which samples cost `budget` on average, by MSDNet's geometric scheme (Huang 2018).

    Of the samples that reach an exit the same share q leaves everywhere, so that of all of them z q (1-q)^(k-1) leave
    at exit k; q is solved for the budget (below 0 where most must take late exits), and each threshold is the
    confidence of the last sample that leaves at its exit.

    Args:
        confidences: [K, N], of N samples at K exits, which should not be those that the network was trained on.
        costs: K numbers, what each stage adds to those before it.
        budget: mean cost of a sample, in the units of costs: at least costs[0].

    Ties leave together and NaN never does, so that the cost on these samples may miss the budget by their number.
    Raises ValueError where the budget does not buy the first exit, or shapes do not fit.
    """
    if confidences.dim() != 2 or not confidences.numel():
        raise ValueError(f"confidences: expected shape [K, N], got {list(confidences.shape)}")
    num_exits, samples = confidences.shape
    reached = torch.tensor(cumulative(costs, num_exits), dtype=torch.float64)
    if not budget >= float(reached[0]):
        raise ValueError(f"budget: expected at least {float(reached[0]):.6g}, the cost of the first exit, got {budget}")
    thresholds = torch.full((num_exits - 1,), torch.inf, dtype=torch.float64)
    if budget >= float(reached[-1]):
        return thresholds.float()
    number = torch.arange(num_exits, dtype=torch.float64)
    low, high = -60.0, 60.0  # of log(1-q); the mean cost rises with it
    for _ in range(80):
        middle = (low + high) / 2
        if float((torch.softmax(number * middle, 0) * reached).sum()) > budget:
            high = middle
        else:
            low = middle
    quotas = (torch.softmax(number * low, 0).cumsum(0) * samples).round().long()  # how many have left after each exit
    running = torch.ones(samples, dtype=torch.bool)
    for k in range(num_exits - 1):
        wanted = int(quotas[k]) - int(samples - running.sum())
        ranked = confidences[k].detach().cpu().double().masked_fill(~running, -torch.inf)
        ranked = ranked.masked_fill(ranked.isnan(), -torch.inf)
        wanted = min(wanted, int((ranked > -torch.inf).sum()))
        if wanted > 0:
            thresholds[k] = ranked.topk(wanted).values[-1]
            running &= ~(ranked >= thresholds[k])
    return thresholds.to(confidences.dtype if confidences.dtype == torch.float64 else torch.float32)


# What the layers ask of a criterion -----------------------------------------------------------------------------------


def ask(criterion: Any, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
    """(confidence [B], state) of any criterion, checked; without gradient."""
    with torch.no_grad():
        result = criterion(logits.detach(), state)
    confidence, state = result if isinstance(result, tuple) and len(result) == 2 else (result, state)
    if not isinstance(confidence, Tensor):
        raise TypeError(f"criterion: expected a confidence [B], got {type(confidence).__name__}")
    if confidence.shape != logits.shape[:1]:
        raise ValueError(f"criterion: expected a confidence {[logits.shape[0]]}, got shape {list(confidence.shape)}")
    return confidence, state


def threshold_of(criterion: Any, number: int) -> Tensor:
    """The threshold of exit `number`; that of a criterion that is no `Criterion` is its attribute."""
    if isinstance(criterion, Criterion):
        return criterion.threshold_of(number)
    threshold = getattr(criterion, "threshold", None)
    if threshold is None:
        raise ValueError("criterion: expected one with a threshold, got none")
    return _at(_thresholds(threshold), number)


def _at(threshold: Tensor, number: int) -> Tensor:
    if threshold.dim() == 0:
        return threshold
    if not 0 <= number < threshold.shape[0]:
        raise IndexError(f"threshold: expected one for exit {number}, got {threshold.shape[0]} of them")
    return threshold[number]


def cumulative(costs: Sequence[float] | None, num_exits: int) -> list[float]:
    """What it costs to reach each exit, from the cost of each stage; 1/K each if None."""
    if costs is None:
        return [(k + 1) / num_exits for k in range(num_exits)]
    shares = [float(c) for c in costs]
    if len(shares) != num_exits:
        raise ValueError(f"costs: expected {num_exits} of them, one a stage, got {len(shares)}")
    if not all(c >= 0 for c in shares) or not 0 < sum(shares) < math.inf:
        raise ValueError(f"costs: expected finite numbers >= 0 that are not all 0, got {shares}")
    return [sum(shares[: k + 1]) for k in range(num_exits)]


def _thresholds(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        threshold = value.detach().float()
    else:
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(one, (list, tuple)):
                expect_number("threshold", one)
        threshold = torch.tensor(value, dtype=torch.float32)
    if threshold.dim() > 1 or not threshold.numel():
        raise ValueError(f"threshold: expected a number or one for each exit but the last, got {list(threshold.shape)}")
    return threshold.clone()


def _expect_logits(name: str, logits: object) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(logits).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"{name}: expected shape [B, C], got {list(logits.shape)}")


def _expect_all(logits: Sequence[Tensor]) -> None:
    if isinstance(logits, Tensor) or not len(logits):
        raise ValueError("logits: expected a sequence of tensors [B, C], one an exit")
    for k, one in enumerate(logits):
        _expect_logits(f"logits[{k}]", one)
        if one.shape != logits[0].shape:
            raise ValueError(
                f"logits[{k}]: expected the shape of the first, {list(logits[0].shape)}, got {list(one.shape)}"
            )
