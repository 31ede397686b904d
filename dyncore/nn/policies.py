"""Policies: networks that sample which modules to run, and learn by REINFORCE what that is worth (`losses.reinforce`).

logits = net(x)                                       # actions are sampled in training
reward = policies.sparse_reward(actions_taken, right, gamma)
with torch.no_grad(), policies.greedy(net):           # the most probable actions: the self-critical baseline
    baseline = ...
loss = losses.reinforce(policies.log_probability(net), reward, baseline)
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyncore.nn.base import expect_size
from dyncore.nn.full_precision import full_precision
from dyncore.nn.gates import Movable, expect_number, scalar, scores, shown

__all__ = ["BernoulliPolicy", "greedy", "log_probability", "sparse_reward"]


def _expect_alpha(name: str, value: object) -> float:
    number = expect_number(name, value)
    if not 0.5 < number <= 1.0:
        raise ValueError(f"{name}: expected a number in 0.5..1 (0.5 excluded), got {number}")
    return number


class BernoulliPolicy(Movable):
    """Independent coins: action k is taken with probability s_k(x) (BlockDrop, Wu 2018; Williams 1992).

    In training actions are sampled; in evaluation, and within `greedy`, an action is taken where s_k > threshold.

    Args:
        score: the width D of x for a linear score, or a policy network that maps (pooled) x to logits [..., K].
        num_actions: K, for `PolicySkip` and `Branch`: the decision is a mask [..., K]. None: one action, whose mask has
            the shape of the logits without their last dimension, 1: a gate for `Skip` and `TokenSkip`.
        threshold: a buffer. Below 0 every action is taken, from 1 on none is.
        alpha: a buffer, 0.5 < alpha <= 1: in training s becomes alpha s + (1 - alpha) (1 - s), so that every action is
            still tried (0.8 in BlockDrop). The log-probability is that of the bounded s.
        pool: applied to x before the score, for policies on samples: `gates.pool_spatial`, `gates.pool_tokens`.

    Attributes:
        last_log_probability: float, log-probability of the latest forward's actions, summed over K; of the shape of the
            rows, with the gradient of s. last_probability: s of the latest forward, of the shape of the mask.

    Both are None before the first forward and neither saved nor copied. Masks have no gradient.
    """

    _checks = {"alpha": _expect_alpha}  # noqa: RUF012
    threshold: Tensor
    alpha: Tensor
    last_log_probability: Tensor | None = None
    last_probability: Tensor | None = None
    sampling = True

    def __init__(
        self,
        score: int | nn.Module,
        num_actions: int | None = None,
        threshold: float = 0.5,
        *,
        alpha: float = 1.0,
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if num_actions is not None:
            expect_size("num_actions", num_actions)
        self.score: nn.Module = scores(score, num_actions or 1)
        self.num_actions = num_actions
        self.pool = pool
        self.register_buffer("threshold", scalar(expect_number("threshold", threshold)))
        self.register_buffer("alpha", scalar(_expect_alpha("alpha", alpha)))

    def forward(self, x: Tensor) -> Tensor:
        """Which actions are taken: bool [..., K], or [...] of a policy with one."""
        logits = full_precision(self.score, x if self.pool is None else self.pool(x))
        if logits.shape[-1] != (self.num_actions or 1):
            raise ValueError(f"score: expected logits [..., {self.num_actions or 1}], got shape {list(logits.shape)}")
        s = torch.sigmoid(logits)
        if self.training and self.sampling:
            s = self.alpha * s + (1 - self.alpha) * (1 - s)
            taken = torch.rand_like(s) < s
        else:
            taken = s > self.threshold
        if not torch.compiler.is_exporting():
            chosen = torch.where(taken, s, 1 - s).clamp(min=torch.finfo(s.dtype).tiny)
            self.last_log_probability = chosen.log().sum(-1)
            self.last_probability = s if self.num_actions else s[..., 0]
        return taken if self.num_actions else taken[..., 0]

    def __getstate__(self) -> dict[str, Any]:
        transient = ("last_log_probability", "last_probability")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def extra_repr(self) -> str:
        return f"num_actions={self.num_actions}, threshold={shown(self.threshold)}, alpha={shown(self.alpha)}"


def _policies(model: nn.Module) -> list[BernoulliPolicy]:
    found = [module for module in model.modules() if isinstance(module, BernoulliPolicy)]
    if not found:
        raise ValueError(f"model: expected one with a BernoulliPolicy in it, got {type(model).__name__}")
    return found


def log_probability(model: nn.Module) -> Tensor:
    """Log-probability [B] of all actions of the latest forward, summed over the policies of `model` and over whatever
    each decided within a sample. Raises ValueError where there is no policy, or one that has not run."""
    total: list[Tensor] = []
    for policy in _policies(model):
        if policy.last_log_probability is None:
            raise ValueError("model: expected policies that have run, got one without a forward")
        total.append(
            policy.last_log_probability.flatten(1).sum(1)
            if policy.last_log_probability.dim() > 1
            else policy.last_log_probability
        )
    return torch.stack(total).sum(0)


@contextmanager
def greedy(model: nn.Module) -> Generator[None]:
    """Within it, policies of `model` take their most probable actions even in training: the self-critical baseline.
    What they keep of the forward before stays as it was. Raises ValueError where there is no policy."""
    kept = [(p, p.sampling, p.last_log_probability, p.last_probability) for p in _policies(model)]
    for policy, *_ in kept:
        policy.sampling = False
    try:
        yield
    finally:
        for policy, sampling, chosen, probability in kept:
            policy.sampling = sampling
            policy.last_log_probability, policy.last_probability = chosen, probability


def sparse_reward(actions: Tensor, right: Tensor, gamma: float) -> Tensor:
    """1 - (|u| / K)^2 where the answer is right, else -gamma: BlockDrop's reward (Wu 2018), float [B].

    Args:
        actions: bool [B, K], u. right: bool [B]. gamma: what a wrong answer costs; the larger, the more is computed.

    Raises ValueError on shapes that do not fit.
    """
    if actions.dim() != 2 or right.shape != actions.shape[:1]:
        raise ValueError(f"right: expected one for each row of actions {list(actions.shape)}, got {list(right.shape)}")
    return torch.where(right, 1 - actions.float().mean(1).square(), -gamma)
