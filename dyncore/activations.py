"""The eight activations: their names, values and derivatives in plain PyTorch.

The lowest floor: the specification that every kernel's epilogue follows, and the list that validation reads.
A gated activation takes `pre` of twice the width, gate half first: act(gate) * up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTWISE = ("relu", "relu2", "gelu", "gelu_tanh", "silu")
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}  # gated activation -> activation of its gate

_TANH_SCALE = math.sqrt(2.0 / math.pi)


def value(h: Tensor, activation: str) -> Tensor:
    """act(h) for an elementwise activation or "none"."""
    if activation == "none":
        return h
    if activation == "relu":
        return torch.relu(h)
    if activation == "relu2":
        return torch.relu(h).square()
    if activation == "gelu":
        return F.gelu(h)
    if activation == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if activation == "silu":
        return F.silu(h)
    raise ValueError(f"activation: unknown name {activation!r}")


def derivative(h: Tensor, activation: str) -> Tensor:
    """d act(h) / dh for an elementwise activation or "none"; relu'(0) = 0."""
    if activation == "none":
        return torch.ones_like(h)
    if activation == "relu":
        return (h > 0).to(h.dtype)
    if activation == "relu2":
        return 2.0 * torch.relu(h)
    if activation == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(h * math.sqrt(0.5)))
        return cdf + h * torch.exp(-0.5 * h * h) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        t = torch.tanh(_TANH_SCALE * (h + 0.044715 * h**3))
        return 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * _TANH_SCALE * (1.0 + 3.0 * 0.044715 * h * h)
    if activation == "silu":
        s = torch.sigmoid(h)
        return s * (1.0 + h * (1.0 - s))
    raise ValueError(f"activation: unknown name {activation!r}")


def hidden(pre: Tensor, activation: str) -> Tensor:
    """The hidden activation of an MLP: [A, I] from `pre` [A, I], or [A, 2I] if gated."""
    if activation not in GATED:
        return value(pre, activation)
    gate, up = pre.chunk(2, dim=-1)
    return value(gate, GATED[activation]) * up


def hidden_backward(du: Tensor, pre: Tensor, activation: str) -> Tensor:
    """Gradient of `pre` from the gradient `du` [A, I] of `hidden(pre, activation)`."""
    if activation not in GATED:
        return du * derivative(pre, activation)
    gate, up = pre.chunk(2, dim=-1)
    act = GATED[activation]
    return torch.cat([du * up * derivative(gate, act), du * value(gate, act)], dim=-1)
