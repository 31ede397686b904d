"""Reading MLP modules of other code bases into one layout, so that a list of them becomes a `MoE`, and back.

What was read is run against the module itself: a layout can be recognised by names, a forward only by its results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.base import expect_choice
from dyncore.nn.mlp import ACTIVATIONS, MLP

__all__ = ["ExpertWeights", "read_expert", "write_expert"]

# (gate or only input, up or None, output), by the names in use: Mixtral, Llama and Qwen, GPT and OPT, this package, T5,
# DistilBERT, Nemotron
_NAMES = (
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1", None, "fc2"),
    ("w_in", None, "w_out"),
    ("wi_0", "wi_1", "wo"),
    ("wi", None, "wo"),
    ("lin1", None, "lin2"),
    ("up_proj", None, "down_proj"),
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PASSED = (nn.Linear, nn.Identity, *DROPOUTS)  # children that are no activation
# The whole names only: QuickGELU and Hardswish are other functions than GELU and swish.
_KINDS = {
    "relu": ("relu",),
    "relu2": ("relu2", "relusquared", "squaredrelu"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelutanh", "pytorchgelutanh", "gelupytorchtanh", "newgelu", "gelunew"),
    "silu": ("silu", "swish", "swishme", "memoryefficientswish"),
}
_GATED_BY = {gate: gated for gated, gate in activations.GATED.items()}


class ExpertWeights(NamedTuple):
    """One expert in the layout of dc.grouped_mlp: w_in [I or 2I, H] gate half first, w_out [H, I], biases or None."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    activation: str


def kind_of(act: object) -> str:
    """Its bare name: "quickgelu" of a QuickGELUActivation or quick_gelu."""
    kind = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", "")
    return str(kind).lower().replace("_", "").removesuffix("activation")


def activation_name(act: object, name: str) -> str:
    """The name of an activation: a module, a function or its name. ValueError, about `name`, on any other."""
    if isinstance(act, str) and act in ACTIVATIONS:
        return act
    kind = kind_of(act)
    if kind == "gelu" and getattr(act, "approximate", "") == "tanh":
        return "gelu_tanh"
    for known, kinds in _KINDS.items():
        if kind in kinds:
            return known
    raise ValueError(f"{name}: expected one of the activations {', '.join(ACTIVATIONS)}, got {kind or act!r}")


def shown_activation(module: nn.Module, gated: bool, name: str) -> str | None:
    """The name of the activation among the children and attributes of an MLP, None if there is none to see."""
    found = [m for m in module.children() if not isinstance(m, _PASSED)]
    found += [getattr(module, n) for n in ("act_fn", "act", "activation", "activation_fn") if hasattr(module, n)]
    names = {activation_name(act, name) for act in found}
    if len(names) > 1:
        raise ValueError(f"{name}: expected one activation, got {' and '.join(sorted(names))}")
    if names:
        return names.pop()
    return "silu" if gated else None  # the gated families leave it out where it is silu


def _linears(module: nn.Module, name: str) -> tuple[nn.Linear, nn.Linear | None, nn.Linear]:
    for first, up, last in _NAMES:
        parts = [getattr(module, n, None) for n in (first, up, last) if n]
        if all(isinstance(p, nn.Linear) for p in parts):
            return parts[0], parts[1] if up else None, parts[-1]  # type: ignore[return-value]
    linears = [m for m in module.children() if isinstance(m, nn.Linear)]
    if isinstance(module, nn.Sequential) and len(linears) == 2:
        return linears[0], None, linears[1]
    raise ValueError(
        f"{name}: expected a module with Linear layers w1/w2/w3, gate_proj/up_proj/down_proj, fc1/fc2, w_in/w_out, "
        f"wi/wo or lin1/lin2, or Sequential(Linear, activation, Linear), got {type(module).__name__}"
    )


def _expect_nothing_else(module: nn.Module, linears: list[nn.Linear], name: str) -> None:
    """ValueError on anything that would be lost: other parameters, a second activation, another order, dropout."""
    for child in module.modules():
        if isinstance(child, DROPOUTS) and child.p != 0:
            raise ValueError(
                f"{name}: expected dropout with p=0, for MoE has none, got {type(child).__name__}({child.p})"
            )
    if isinstance(module, nn.Sequential):
        order = [m for m in module if isinstance(m, nn.Linear) or not isinstance(m, _PASSED)]
        if len(order) != 3 or [isinstance(m, nn.Linear) for m in order] != [True, False, True]:
            got = ", ".join(type(m).__name__ for m in order)
            raise ValueError(f"{name}: expected Sequential(Linear, activation, Linear), got Sequential({got})")
    own = {id(p) for linear in linears for p in (linear.weight, linear.bias)}
    others = [n for n, p in module.named_parameters() if id(p) not in own]
    if others:
        raise ValueError(
            f"{name}: expected no parameters but those of its {len(linears)} Linear layers, "
            f"got {', '.join(others)} in {type(module).__name__}"
        )
    acts = [type(m).__name__ for m in module.children() if not isinstance(m, _PASSED)]
    if len(acts) > 1:
        raise ValueError(f"{name}: expected one activation besides the Linear layers, got {' and '.join(acts)}")
    for what, found in (
        ("dtype", {p.dtype for p in module.parameters()}),
        ("device", {p.device for p in module.parameters()}),
    ):
        if len(found) > 1:
            raise ValueError(f"{name}: expected parameters of one {what}, got {' and '.join(sorted(map(str, found)))}")


def _joined(gate: Tensor | None, up: Tensor | None, like: Tensor) -> Tensor | None:
    if gate is None and up is None:
        return None
    joined = torch.cat([like.new_zeros(like.shape[0]) if b is None else b.detach() for b in (gate, up)])
    return joined.requires_grad_(any(b is not None and b.requires_grad for b in (gate, up)))


def tolerance_of(dtype: torch.dtype) -> float:
    """What two orders of the same sums may differ by, as a share of the largest output."""
    if dtype == torch.float64:
        return 1e-9
    if dtype == torch.float32:
        return 3e-5 if torch.get_float32_matmul_precision() == "highest" else 1e-3
    return 4 * torch.finfo(dtype).eps


@torch.no_grad()
def expect_same_mlp(module: nn.Module, weights: ExpertWeights, name: str) -> None:
    """ValueError unless the module in evaluation gives, on random rows, what an MLP of these weights gives."""
    w_in, w_out, b_in, b_out, activation = weights
    if w_in.is_meta:  # no numbers to compare
        return
    wide = torch.promote_types(w_in.dtype, torch.float32)
    x = torch.randn(8, w_in.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(w_in)
    spread = float(F.linear(x, w_in[: w_out.shape[1]]).to(wide).std())
    if 0 < spread < float("inf"):  # pre-activations of about 2, where the activations differ most; float16 must hold x
        x = x * min(2 / spread, 1024.0)
    training = [(m, m.training) for m in module.modules()]
    with torch.autocast(w_in.device.type, enabled=False):
        want = F.linear(activations.hidden(F.linear(x, w_in, b_in), activation), w_out, b_out).to(wide)
        try:
            for m, _ in training:
                m.training = False
            got = module(x)
        except Exception as error:
            raise ValueError(
                f"{name}: expected a module that maps rows {list(x.shape)}, got {type(error).__name__}: {error}"
            ) from error
        finally:
            for m, was in training:
                m.training = was
    if not isinstance(got, Tensor) or got.shape != want.shape:
        what = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{name}: expected a module that returns rows {list(want.shape)}, got {what}")
    size = float(want.nan_to_num().abs().max())
    tolerance = tolerance_of(w_in.dtype)
    if not torch.allclose(got.to(wide), want, rtol=0, atol=tolerance * size, equal_nan=True):
        apart = float((got.to(wide) - want).abs().max())
        raise ValueError(
            f"{name}: expected a module that computes the {activation} MLP of its Linear layers, got "
            f"{type(module).__name__} whose outputs are {apart:.2g} from it, where the largest is {size:.2g}"
        )


def read_expert(module: nn.Module, activation: str | None = None, *, name: str = "module") -> ExpertWeights:
    """The weights of a two- or three-Linear MLP in the layout of dc.grouped_mlp.

    Args:
        module: has w1/w2/w3 (w1 gate, w3 up, w2 down), gate_proj/up_proj/down_proj, fc1/fc2, w_in/w_out, or is
            Sequential(Linear, activation, Linear). Dropout modules must have p=0; dropout by a function in forward is
            not seen, for the module is judged in evaluation.
        activation: its name where the module does not show it; for three Linears the gated name ("swiglu").
        name: what errors call the module.

    Raises TypeError where it is no module; ValueError on a module of another build, with more in it than the Linears
    and one activation, with an activation that is unknown or not to be seen, or whose results on random rows (in
    evaluation, in its own dtype) are not those of the MLP that was read.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected a module, got {type(module).__name__}")
    first, up, last = _linears(module, name)
    _expect_nothing_else(module, [first, last] if up is None else [first, up, last], name)
    if activation is None:
        activation = shown_activation(module, up is not None, name)
        if activation is None:
            raise ValueError(f"activation: expected its name, for {type(module).__name__} does not show it; got None")
    expect_choice("activation", activation, ACTIVATIONS)
    if up is not None and activation not in activations.GATED:
        if activation not in _GATED_BY:
            raise ValueError(f"activation: expected a gate by {', '.join(_GATED_BY)}, got {activation!r}")
        activation = _GATED_BY[activation]
    w_in, b_in = first.weight, first.bias
    if up is not None:
        trained = first.weight.requires_grad or up.weight.requires_grad
        w_in = torch.cat([first.weight.detach(), up.weight.detach()]).requires_grad_(trained)
        b_in = _joined(first.bias, up.bias, first.weight)
    width = last.in_features * (2 if activation in activations.GATED else 1)
    if w_in.shape[0] != width or last.out_features != first.in_features:
        raise ValueError(
            f"{name}: expected weights [{width}, H] and [H, {last.in_features}] for {activation}, "
            f"got {list(w_in.shape)} and {list(last.weight.shape)}"
        )
    weights = ExpertWeights(w_in, last.weight, b_in, last.bias, activation)
    expect_same_mlp(module, weights, name)
    return weights


def write_expert(weights: ExpertWeights) -> MLP:
    """An `MLP` with a copy of these weights."""
    dim, hidden_dim = weights.w_out.shape
    mlp = MLP(dim, hidden_dim, activation=weights.activation)
    mlp = mlp.to(device=weights.w_in.device, dtype=weights.w_in.dtype)
    for linear, weight, bias in ((mlp.w_in, weights.w_in, weights.b_in), (mlp.w_out, weights.w_out, weights.b_out)):
        linear.weight = nn.Parameter(weight.detach().clone())
        linear.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # type: ignore[assignment]
    return mlp
