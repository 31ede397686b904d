"""Hugging Face transformers: an implementation named "dyncore" of the experts of its mixture-of-experts models.

    dyncore.integrations.transformers.register()
    model.set_experts_implementation("dyncore")

transformers calls it with an experts module (weights stacked [E, ...] in one of several layouts), the rows [T, H], and
the experts and weights [T, K] that the model's router chose. Floor 5.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dyncore.activations import GATED
from dyncore.ops import grouped_linear, grouped_mlp, scatter_rows
from dyncore.plan import Plan, route

NAME = "dyncore"
INSTALL = 'pip install --upgrade "dyncore[transformers]"'
# what a class of experts may declare about itself, all of it followed below; the first four are in every version served
LAYOUT = ("is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm")
_HALVES = (torch.bfloat16, torch.float16)
_GATED_BY = {gate: gated for gated, gate in GATED.items()}


class _Transformers:
    """What is used of transformers, and what of its interface is newer than this module."""

    def __init__(self) -> None:
        try:
            package = importlib.import_module("transformers")
        except ImportError as error:
            raise ImportError(f"dyncore.integrations.transformers needs transformers ({error}): {INSTALL}") from error
        try:
            moe = importlib.import_module("transformers.integrations.moe")
            options = inspect.signature(moe.use_experts_implementation).parameters
            self.interface: Any = moe.ExpertsInterface
            self.default_gate: Any = moe._default_apply_gate
            self.grouped_mm: Any = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
            missing = [name for name in LAYOUT[:4] if name not in options]
            if missing:
                raise AttributeError(f"use_experts_implementation has no {', '.join(missing)}")
        except (ImportError, AttributeError, KeyError) as error:
            raise ImportError(
                "dyncore.integrations.transformers needs the experts interface of transformers 5.18 or later, which "
                f"version {package.__version__} lacks ({error}): {INSTALL}"
            ) from error
        known = (*LAYOUT, "experts_class", "experts_interface")
        # options that this module does not know, with the values at which they are left out
        self.unknown = {name: option.default for name, option in options.items() if name not in known}
        kinds = importlib.import_module("transformers.activations")
        self.kinds: dict[Any, str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
        for kind, activation in (
            ("SiLUActivation", "silu"),
            ("ReLUSquaredActivation", "relu2"),
            ("NewGELUActivation", "gelu_tanh"),
        ):
            if hasattr(kinds, kind):
                self.kinds[getattr(kinds, kind)] = activation
        self.gelus = tuple(getattr(kinds, kind) for kind in ("GELUActivation", "GELUTanh") if hasattr(kinds, kind))


_transformers: _Transformers | None = None
_warned: set[tuple[type, str]] = set()


def register() -> None:
    """Make "dyncore" an implementation of experts in transformers, for every model of this process.

    Then `model.set_experts_implementation("dyncore")` works, and `experts_implementation="dyncore"` where a model is
    loaded or made. A second call changes nothing. Raises ImportError where transformers is missing or has another
    interface than that of 5.18 to 5.23.
    """
    global _transformers
    if _transformers is None:
        _transformers = _Transformers()
    _transformers.interface.register(NAME, experts_forward)


def describe(model: nn.Module) -> dict[str, str]:
    """How "dyncore" computes each experts module of a model, by name, and where another implementation is set, which;
    empty where transformers asks none (there is no such module, or it computes its experts itself)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    register()
    ways: dict[str, str] = {}
    for name, module in model.named_modules():
        if all(hasattr(module, n) for n in LAYOUT[:4]):
            chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
            way = _way(module)
            ways[name] = way if chosen == NAME else f"{chosen or 'eager'} is set; dyncore would: {way}"
    return ways


def _way(module: Any) -> str:
    w_in = module.gate_up_proj if module.has_gate else module.up_proj
    reason = _refused(module, w_in, w_in)
    if reason is not None:
        return f"transformers' grouped_mm: {reason}"
    activation = _fused(module)
    if activation is not None:
        return f"grouped_mlp, {activation}"
    steps = ["grouped_linear", "gate in torch" if module.has_gate else "activation in torch", "grouped_linear"]
    if getattr(module, "has_post_expert_norm", False):
        steps += ["norm in torch", "scatter_rows"]
    return ", ".join(steps)


def _gelu(function: object) -> str | None:
    """Which GELU a function is, if it is torch's."""
    if isinstance(function, functools.partial):
        tanh = function.func is F.gelu and not function.args and function.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if tanh else None
    return "gelu" if function is F.gelu else None


def _elementwise(act: Any) -> str | None:
    """dyncore's name of an activation, None where it has none or something else is to see it called."""
    assert _transformers is not None
    if not isinstance(act, nn.Module):
        if act is F.silu or act is F.relu or act is torch.relu:
            return "silu" if act is F.silu else "relu"
        return _gelu(act)
    if act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks:
        return None
    if "forward" in act.__dict__:
        return None
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    kind = type(act)
    if kind in _transformers.gelus:
        return _gelu(getattr(act, "act", None))
    return _transformers.kinds.get(kind)


def _fused(module: Any) -> str | None:
    """The activation with which dc.grouped_mlp computes what the module does; None where there is none."""
    assert _transformers is not None
    if getattr(module, "has_post_expert_norm", False):
        return None
    if not module.has_gate:
        return _elementwise(module.act_fn)
    own = type(module)._apply_gate is not _transformers.default_gate or "_apply_gate" in module.__dict__
    if own or not module.is_concatenated:
        return None
    return _GATED_BY.get(_elementwise(module.act_fn) or "")


def _refused(module: Any, x: Tensor, w_in: Tensor) -> str | None:
    """Why dyncore does not compute this module, None if it does."""
    assert _transformers is not None
    for name, default in _transformers.unknown.items():
        if getattr(module, name, default) != default:
            return f"{name}={getattr(module, name)!r} is unknown to it"
    if is_traceable_wrapper_subclass(w_in):
        return f"its weights are of type {type(w_in).__name__}"
    if not (x.is_cpu or x.is_cuda or x.is_meta):
        return f"it has no kernels for {x.device.type}"
    return None


def _fall_back(module: Any, reason: str, *args: Tensor) -> Tensor:
    assert _transformers is not None
    kind = type(module)
    if not torch.compiler.is_compiling() and (kind, reason) not in _warned:
        _warned.add((kind, reason))
        warnings.warn(
            f'dyncore does not compute {kind.__name__}, since {reason}: transformers\' "grouped_mm" does', stacklevel=3
        )
    return _transformers.grouped_mm(module, *args)


def _route(expert: Tensor, weight: Tensor, num_experts: int) -> Plan:
    # experts of other ranks, and experts that are none, have indices past the last one
    expert = torch.where(expert < num_experts, expert, -1)
    return route(expert, weight, num_groups=num_experts)


def _holds_weights_alone(module: Any) -> bool:
    """Whether the module's own gate can meet no parameter of the module's dtype."""
    if module._buffers or len(module._parameters) > (4 if module.has_bias else 2):
        return False
    return not any(child._parameters or child._buffers or child._modules for child in module._modules.values())


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of the forward of an experts module.

    Args: hidden_states [T, H] (or [..., H]); top_k_index and top_k_weights [T, K] (or [..., K]), the weights of any
    float dtype. An index of num_experts or more is nowhere. Returns [T, H] in the shape and dtype of hidden_states.
    """
    w_in, w_out = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    reason = _refused(module, hidden_states, w_in)
    if reason is not None:
        return _fall_back(module, reason, hidden_states, top_k_index, top_k_weights)
    b_in = b_out = None
    if module.has_bias:
        b_in, b_out = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias
    if module.is_transposed:  # [E, in, out]: the kernels read either layout
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    x, dtype = hidden_states, hidden_states.dtype
    if dtype is not w_in.dtype:
        x = x.to(w_in.dtype)
    if top_k_index.dim() != 2:
        top_k_index = top_k_index.reshape(-1, top_k_index.shape[-1])
        top_k_weights = top_k_weights.reshape(top_k_index.shape)
    plan = _route(top_k_index, top_k_weights, w_in.shape[0])
    activation = _fused(module)
    if activation is not None:
        y = grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan, activation=activation)
    else:
        hidden = grouped_linear(x, w_in, b_in, plan=plan, scatter=False)
        if hidden.dtype in _HALVES and _holds_weights_alone(module):
            hidden = hidden.float()  # a gate of several steps rounds at the last alone
        hidden = (module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)).to(w_out.dtype)
        if getattr(module, "has_post_expert_norm", False):
            slots = grouped_linear(hidden, w_out, b_out, plan=plan, gather=False, scatter=False)
            y = scatter_rows(module.post_expert_norm(slots), plan)
        else:
            y = grouped_linear(hidden, w_out, b_out, plan=plan, gather=False)
        y = y.view(x.shape)
    return y if y.dtype is dtype else y.to(dtype)
