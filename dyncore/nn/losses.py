"""Losses that keep conditional computation useful: balance between experts, calm routers, a target for compute.

Functions of tensors; layers offer theirs by `layer.losses()` and `collect_losses(model)`, unweighted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balance(probabilities: Tensor, counts: Tensor) -> Tensor:
    """G * sum over groups of (share of slots) * (mean probability): 1 when balanced (Switch, Fedus 2021).

    Args:
        probabilities: float [T, G], the router's softmax.
        counts: [G], slots each group received; no gradient.

    A scalar; 0 where there are no rows.
    """
    if probabilities.dim() != 2 or counts.shape != probabilities.shape[1:]:
        columns = list(probabilities.shape)
        raise ValueError(f"counts: expected one for each column of probabilities {columns}, got {list(counts.shape)}")
    num_rows, num_groups = probabilities.shape
    share = counts.to(probabilities.dtype) / counts.sum().clamp(min=1)
    return num_groups * (share * probabilities.sum(0)).sum() / max(num_rows, 1)


def router_z(logits: Tensor) -> Tensor:
    """Mean of logsumexp(logits [..., G])^2, which keeps logits small (ST-MoE, Zoph 2022). A scalar; 0 for no rows."""
    z = torch.logsumexp(logits, dim=-1)
    return z.square().sum() / max(z.numel(), 1)


def compute_target(costs: Tensor | Iterable[Tensor], target: float, weights: Iterable[float] | None = None) -> Tensor:
    """(mean cost - target)^2 (as in D-LLM and dynamic convolutions, Verelst 2020).

    Args:
        costs: executed cost per row of a layer (`layer.last_cost`), or of several (`collect_costs(model).values()`).
        target: the share of compute wanted, in 0..1 as the costs are.
        weights: what a full row of each layer costs, such as its FLOPs; equal if None.

    A scalar. Raises TypeError on what are no costs, such as those of a layer that has not run, ValueError where there
    are none, the number of weights differs or the target is not in 0..1.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target: expected a share in 0..1, got {target}")
    if isinstance(costs, Mapping) or not isinstance(costs, Iterable):
        raise TypeError(f"costs: expected a Tensor or an iterable of them, got {type(costs).__name__}")
    layers = [costs] if isinstance(costs, Tensor) else list(costs)
    shares = [1.0] * len(layers) if weights is None else list(weights)
    if not layers:
        raise ValueError("costs: expected the cost of at least one layer, got none")
    if len(shares) != len(layers):
        raise ValueError(f"weights: expected {len(layers)} of them, one a layer, got {len(shares)}")
    for cost in layers:
        if not isinstance(cost, Tensor):
            raise TypeError(f"costs: expected a Tensor or an iterable of them, got one of {type(cost).__name__}")
    means = torch.stack([w * c.sum() / max(c.numel(), 1) for w, c in zip(shares, layers, strict=True)])
    return (means.sum() / sum(shares) - target).square()


def ponder(steps: Tensor, remainder: Tensor) -> Tensor:
    """Mean ponder cost N + R of adaptive computation time (Graves 2016): `steps` N taken by each row, which have no
    gradient, and `remainder` R of each, which has one.

    A scalar; 0 for no rows. Raises ValueError on shapes that differ.
    """
    if steps.shape != remainder.shape:
        raise ValueError(f"remainder: expected the shape of steps, {list(steps.shape)}, got {list(remainder.shape)}")
    return (steps.detach().to(remainder.dtype) + remainder).sum() / max(remainder.numel(), 1)


def ponder_kl(probabilities: Tensor, prior: float) -> Tensor:
    """Mean KL divergence of halting probabilities from a geometric prior (PonderNet, Banino 2021).

    Args:
        probabilities: float [K, ...], the probability that a row halts after each of the K steps, with sum 1.
        prior: halting probability of one step, in 0..1 (both excluded), cut off after K steps and normalised; long
            enough, it has 1 / prior steps in the mean.

    A scalar; 0 for no rows. Raises ValueError on a prior outside its range.
    """
    if not 0.0 < prior < 1.0:
        raise ValueError(f"prior: expected a number in 0..1 (both excluded), got {prior}")
    steps = torch.arange(probabilities.shape[0], device=probabilities.device, dtype=probabilities.dtype)
    log_prior = torch.log_softmax(steps * math.log1p(-prior), 0).view(-1, *(1,) * (probabilities.dim() - 1))
    tiny = torch.finfo(probabilities.dtype).tiny  # 0 log 0 is 0, with a gradient
    terms = probabilities * (probabilities.clamp(min=tiny).log() - log_prior)
    return terms.sum() / max(probabilities[0].numel(), 1)


def expected(losses: Tensor, probabilities: Tensor) -> Tensor:
    """Mean over rows of the sum over steps of probability * loss (PonderNet, Banino 2021).

    Args:
        losses: float [K, ...], the loss of each row if it halted after each of the K steps.
        probabilities: float [K, ...], that it does.

    A scalar; 0 for no rows. Raises ValueError on shapes that differ.
    """
    if losses.shape != probabilities.shape:
        shapes = f"{list(losses.shape)}, got {list(probabilities.shape)}"
        raise ValueError(f"probabilities: expected the shape of losses, {shapes}")
    return (losses * probabilities).sum() / max(losses[0].numel(), 1)


def l1(activations: Tensor) -> Tensor:
    """Mean absolute activation, which a ReLU network learns to keep at 0 (Georgiadis 2019). A scalar, float32 or wider;
    0 for none."""
    wide = torch.promote_types(activations.dtype, torch.float32)
    return activations.abs().sum(dtype=wide) / max(activations.numel(), 1)


def square_hoyer(activations: Tensor) -> Tensor:
    """Mean over rows of (sum |a|)^2 / sum a^2 of activations [..., I] (Kurtz 2020; D2DMoE, Szatkowski 2024).

    Between 1 (one activation is not 0) and I (all are equal), whatever their size: it makes activations sparse without
    making them small. A scalar, float32 or wider; rows of zeros count as 0, and no rows give 0.
    """
    if activations.dim() < 1:
        raise ValueError("activations: expected at least 1 dimension, got shape []")
    activations = activations.to(torch.promote_types(activations.dtype, torch.float32))
    squares = activations.square().sum(-1)
    some = squares > 0
    ratio = activations.abs().sum(-1).square() / torch.where(some, squares, 1)
    return torch.where(some, ratio, 0).sum() / max(ratio.numel(), 1)


def reinforce(log_probability: Tensor, reward: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """Mean of -(reward - baseline) * log_probability, whose gradient is that of the expected reward (Williams 1992).

    Args:
        log_probability: float [B], of the actions sampled (`BernoulliPolicy.last_log_probability`).
        reward: float [B], what they earned; no gradient.
        baseline: float [B] or a number; no gradient. The reward of the policy's most probable actions makes it
            self-critical (Rennie 2017; BlockDrop, Wu 2018).

    A scalar; 0 for no rows. Raises ValueError on shapes that differ.
    """
    for name, value in (("reward", reward), ("baseline", baseline)):
        if isinstance(value, Tensor) and value.dim() and value.shape != log_probability.shape:
            shape = list(log_probability.shape)
            raise ValueError(f"{name}: expected the shape of log_probability, {shape}, got {list(value.shape)}")
    advantage = (reward - baseline).detach()
    return -(advantage * log_probability).sum() / max(log_probability.numel(), 1)


def multi_exit(logits: Sequence[Tensor], target: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean over exits of the cross-entropy (deep supervision; MSDNet, Huang 2018).

    Args:
        logits: K tensors [B, C], one an exit, such as a layer of exits returns in training.
        target: classes int [B], or probabilities [B, C].
        weights: of the exits; equal if None.

    A scalar; 0 for no samples. Raises ValueError where numbers of exits and weights differ.
    """
    shares = _exit_weights(logits, weights)
    terms = [w * F.cross_entropy(z, target, reduction="sum") for w, z in zip(shares, logits, strict=True)]
    return torch.stack(terms).sum() / max(logits[0].shape[0], 1)


def exit_distillation(
    logits: Sequence[Tensor], temperature: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """Weighted mean over all exits but the last of T^2 KL(last || exit): earlier exits learn what the last one says,
    which gets no gradient (Phuong 2019; Zhang 2019).

    Args:
        logits: K >= 2 tensors [B, C]. temperature: T, by which logits are divided. weights: K - 1 of them.

    A scalar; 0 for no samples. Raises ValueError on fewer than two exits or a wrong number of weights.
    """
    if len(logits) < 2:
        raise ValueError(f"logits: expected those of at least 2 exits, got {len(logits)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    shares = _exit_weights(logits[:-1], weights)
    teacher = torch.log_softmax(logits[-1].detach() / temperature, -1)
    terms = [
        w * F.kl_div(torch.log_softmax(z / temperature, -1), teacher, reduction="sum", log_target=True)
        for w, z in zip(shares, logits[:-1], strict=True)
    ]
    return torch.stack(terms).sum() * temperature**2 / max(logits[0].shape[0], 1)


def _exit_weights(logits: Sequence[Tensor], weights: Sequence[float] | None) -> list[float]:
    """Weights that sum to 1."""
    if isinstance(logits, Tensor) or not len(logits):
        raise ValueError("logits: expected a sequence of tensors [B, C], one an exit")
    shares = [1.0] * len(logits) if weights is None else [float(w) for w in weights]
    if len(shares) != len(logits):
        raise ValueError(f"weights: expected {len(logits)} of them, one an exit, got {len(shares)}")
    if not sum(shares) > 0:
        raise ValueError(f"weights: expected a sum > 0, got {shares}")
    return [w / sum(shares) for w in shares]
