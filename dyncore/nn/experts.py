"""Reading MLP modules of other code bases into one layout, so that a list of them becomes a `MoE`, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.mlp import ACTIVATIONS, MLP

# (gate or only input, up or None, output), by the names in use: Mixtral, Llama and Qwen, GPT and OPT, this package
_NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"), ("fc1", None, "fc2"), ("w_in", None, "w_out"))
_GATED_BY = {gate: gated for gated, gate in activations.GATED.items()}


class ExpertWeights(NamedTuple):
    """One expert in the layout of dc.grouped_mlp: w_in [I or 2I, H] gate half first, w_out [H, I], biases or None."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    activation: str


def _elementwise(module: nn.Module, gated: bool) -> str | None:
    """The name of the activation among the children and attributes of an MLP, None if there is none to see."""
    found = [m for m in module.children() if not isinstance(m, (nn.Linear, nn.Dropout, nn.Identity))]
    found += [getattr(module, n) for n in ("act_fn", "act", "activation", "activation_fn") if hasattr(module, n)]
    for act in found:
        if isinstance(act, str) and act in ACTIVATIONS:
            return act
        name = type(act).__name__.lower() if isinstance(act, nn.Module) else getattr(act, "__name__", "").lower()
        tanh = "tanh" in name or name in ("newgelu", "newgeluactivation") or getattr(act, "approximate", "") == "tanh"
        if "gelu" in name:
            return "gelu_tanh" if tanh else "gelu"
        if "silu" in name or "swish" in name:
            return "silu"
        if "relu2" in name or "squared" in name:
            return "relu2"
        if name in ("relu", "relu_"):
            return "relu"
        raise ValueError(f"experts: expected one of the activations {', '.join(ACTIVATIONS)}, got {name or act!r}")
    return "silu" if gated else None  # the gated families leave it out where it is silu


def _linears(module: nn.Module) -> tuple[nn.Linear, nn.Linear | None, nn.Linear]:
    for first, up, last in _NAMES:
        parts = [getattr(module, n, None) for n in (first, up, last) if n]
        if all(isinstance(p, nn.Linear) for p in parts):
            return parts[0], parts[1] if up else None, parts[-1]  # type: ignore[return-value]
    linears = [m for m in module.children() if isinstance(m, nn.Linear)]
    if isinstance(module, nn.Sequential) and len(linears) == 2:
        return linears[0], None, linears[1]
    raise ValueError(
        "experts: expected modules with Linear layers w1/w2/w3, gate_proj/up_proj/down_proj, fc1/fc2 or w_in/w_out, or "
        f"Sequential(Linear, activation, Linear), got {type(module).__name__}"
    )


def _joined(gate: Tensor | None, up: Tensor | None, like: Tensor) -> Tensor | None:
    if gate is None and up is None:
        return None
    return torch.cat([like.new_zeros(like.shape[0]) if b is None else b for b in (gate, up)])


def read_expert(module: nn.Module, activation: str | None = None) -> ExpertWeights:
    """The weights of a two- or three-Linear MLP in the layout of dc.grouped_mlp.

    Args:
        module: has w1/w2/w3 (w1 gate, w3 up, w2 down), gate_proj/up_proj/down_proj, fc1/fc2, w_in/w_out, or is
            Sequential(Linear, activation, Linear).
        activation: its name where the module does not show it; for three Linears the gated name ("swiglu").

    Raises ValueError on a module of another build, or an activation that is unknown or not to be seen.
    """
    first, up, last = _linears(module)
    if activation is None:
        activation = _elementwise(module, up is not None)
        if activation is None:
            raise ValueError(f"activation: expected its name, for {type(module).__name__} does not show it; got None")
        if up is not None and activation not in activations.GATED:
            if activation not in _GATED_BY:
                raise ValueError(f"activation: expected a gate by {', '.join(_GATED_BY)}, got {activation!r}")
            activation = _GATED_BY[activation]
    if up is None:
        return ExpertWeights(first.weight, last.weight, first.bias, last.bias, activation)
    w_in = torch.cat([first.weight, up.weight])
    return ExpertWeights(w_in, last.weight, _joined(first.bias, up.bias, first.weight), last.bias, activation)


def write_expert(weights: ExpertWeights) -> MLP:
    """An `MLP` with a copy of these weights."""
    dim, hidden_dim = weights.w_out.shape
    mlp = MLP(dim, hidden_dim, activation=weights.activation)
    mlp = mlp.to(device=weights.w_in.device, dtype=weights.w_in.dtype)
    for linear, weight, bias in ((mlp.w_in, weights.w_in, weights.b_in), (mlp.w_out, weights.w_out, weights.b_out)):
        linear.weight = nn.Parameter(weight.detach().clone())
        linear.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # type: ignore[assignment]
    return mlp
