"""Activation masks drawn from a model of how trained ReLU networks fire: few hot neurons, many cold, similar tokens.

Neuron j has a rate r_j, token t a scale s_t, and neuron j fires on token t with probability p = s r / (1 - r + s r):
the scale multiplies the odds, which for a rare neuron is its rate, and no probability passes 1. Along the tokens each
neuron follows a Gaussian copula: u = Phi(z), z an autoregressive process of order 1, fires where u <= p; so
neighbouring tokens resemble each other while every token keeps exactly the probabilities p.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

# (a, b) of the Beta distribution of firing rates, as reported for OPT models of these sizes.
PRESETS = {"opt-6.7b": (0.355, 4.79), "opt-30b": (0.305, 6.63), "opt-66b": (0.30, 8.52)}

_BLOCK = 2**22  # elements made at a time: 16 MB of latent values


def beta(
    rows: int,
    neurons: int,
    *,
    preset: str | None = None,
    a: float | None = None,
    b: float | None = None,
    density: float | None = None,
    token_scale: float = 0.0,
    dead: float = 0.0,
    correlation: float = 0.0,
    generator: Generator | None = None,
) -> Tensor:
    """bool [rows, neurons]: neurons whose firing rates are Beta(a, b)-distributed.

    Args:
        preset: "opt-6.7b", "opt-30b" or "opt-66b", whose mean densities are 6.9%, 4.4% and 3.4%; or give `a` and `b`.
        density: mean density of the expected mask, dead neurons included; the odds of all neurons are multiplied by one
            number to reach it. None: what the rates give.
        token_scale: standard deviation of the logarithm of the per-token scale, which is log-normal with mean 1.
        dead: share of neurons that never fire (rounded to whole neurons), chosen at random.
        correlation: of a neuron's latent value at neighbouring tokens, 0 to below 1. The correlation of the mask itself
            is smaller, the more so the rarer the neuron.
        generator: of a CPU; the same one in the same state gives the same mask.

    Raises ValueError on sizes below 0, on values out of range and on a density that the live neurons cannot reach.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        if a is not None or b is not None:
            raise ValueError("preset: expected a preset or a and b, got both")
        a, b = PRESETS[preset]
    if a is None or b is None:
        raise ValueError("a, b: expected both, or a preset")
    for name, value in (("a", a), ("b", b)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    _expect_sizes(rows, neurons)
    _expect_generator(generator)
    shapes = torch.tensor([a, b], dtype=torch.float64)[:, None].expand(2, neurons)
    # x / (x + y) is Beta(a, b), x / y are its odds; torch.distributions, whose sampler this is, takes no generator
    x, y = torch._standard_gamma(shapes, generator)  # pyright: ignore[reportPrivateImportUsage]
    return _fire(rows, x / y, density, token_scale, dead, correlation, generator)


def uniform(
    rows: int,
    neurons: int,
    *,
    density: float,
    token_scale: float = 0.0,
    dead: float = 0.0,
    correlation: float = 0.0,
    generator: Generator | None = None,
) -> Tensor:
    """bool [rows, neurons]: live neurons that all have the same rate; `density` and the others as in `beta`.

    Kind to tiles of few rows and unkind to those of many: no neuron is hot, and the union of active neurons grows
    fastest.
    """
    _expect_sizes(rows, neurons)
    _expect_generator(generator)
    odds = torch.ones(neurons, dtype=torch.float64)
    return _fire(rows, odds, density, token_scale, dead, correlation, generator)


def activations(mask: Tensor, *, dtype: torch.dtype = torch.float32, generator: Generator | None = None) -> Tensor:
    """[T, I] of `dtype`: half-normal magnitudes (a ReLU of unit Gaussians) where the mask is True, else 0."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {got}")
    _expect_generator(generator)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    h = torch.empty(mask.shape, dtype=torch.float32).normal_(generator=generator).abs_().to(dtype)
    h.clamp_(min=torch.finfo(dtype).tiny)  # what fires is not zero, in float16 neither
    return h.masked_fill_(~mask.cpu(), 0).to(mask.device)


def _expect_sizes(rows: int, neurons: int) -> None:
    for name, value in (("rows", rows), ("neurons", neurons)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected an int >= 0, got {value!r}")


def _expect_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


def _expect_share(name: str, value: float, *, below: bool = False) -> None:
    if not 0 <= value <= 1 or (below and value == 1):
        raise ValueError(f"{name}: expected a number from 0 to {'below 1' if below else '1'}, got {value}")


def _probabilities(odds: Tensor, scale: Tensor) -> Tensor:
    """[T, I] of odds [I] and scales [T]; infinite odds are certain."""
    scaled = scale[:, None] * odds
    return torch.where(scaled == math.inf, 1.0, scaled / (1 + scaled))


def _fire(
    rows: int,
    odds: Tensor,
    density: float | None,
    token_scale: float,
    dead: float,
    correlation: float,
    generator: Generator | None,
) -> Tensor:
    """The mask of neurons with these odds [I]."""
    if not 0 <= token_scale < math.inf:
        raise ValueError(f"token_scale: expected a number >= 0, got {token_scale}")
    _expect_share("dead", dead)
    _expect_share("correlation", correlation, below=True)
    neurons = odds.shape[0]
    buried = torch.randperm(neurons, generator=generator)[: round(dead * neurons)]
    odds = odds.index_fill(0, buried, 0.0)
    noise = torch.empty(rows, dtype=torch.float64).normal_(generator=generator)
    scale = (token_scale * noise - token_scale**2 / 2).exp()
    if density is not None:
        odds = _reaching(density, odds, scale)
    mask = torch.empty(rows, neurons, dtype=torch.bool)
    latent = None
    for start in range(0, rows, block := max(1, _BLOCK // max(1, neurons))):
        part = scale[start : start + block]
        z = torch.empty(part.shape[0], neurons).normal_(generator=generator)
        if correlation:
            latent = _autoregression(z, correlation, latent)
        u: Tensor = (
            torch.special.erfc(z * -math.sqrt(0.5)) / 2
        )  # exact to the last bits where it is small, as rare rates are
        mask[start : start + block] = u <= _probabilities(odds, part)
    return mask


def _autoregression(z: Tensor, correlation: float, before: Tensor | None) -> Tensor:
    """White noise z [T, I] into a stationary process, in place, after the row `before`; its last row."""
    fresh = math.sqrt(1 - correlation**2)
    for row in z:
        if before is not None:
            row.mul_(fresh).add_(before, alpha=correlation)
        before = row
    return z[-1].clone()


def _reaching(density: float, odds: Tensor, scale: Tensor) -> Tensor:
    """The odds multiplied by the number that makes their mean probability `density`."""
    _expect_share("density", density)
    live = (odds > 0).double().mean().item() if odds.numel() else density
    if density > live:
        raise ValueError(f"density: expected at most the share of neurons that may fire, {live:.4g}, got {density}")
    if density == 0:
        return torch.zeros_like(odds)
    if density == live:
        return torch.where(odds > 0, math.inf, 0.0)
    if scale.numel() > 64:  # the tokens in 64 classes: a table of all tokens and neurons would be large
        scale = torch.stack([part.mean() for part in scale.sort().values.tensor_split(64)])
    low, high = -200.0, 200.0  # logarithms of the number, by bisection
    for _ in range(60):
        middle = (low + high) / 2
        if _probabilities(odds * math.exp(middle), scale).mean() < density:
            low = middle
        else:
            high = middle
    return odds * math.exp(low)
