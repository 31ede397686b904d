"""What to say of a model in which no ReLU's zeros were found: what its activations are, and what could skip instead."""

from __future__ import annotations

from typing import Any

from torch import nn

from dyncore.nn.experts import activation_name, kind_of

_NAMES = ("act_fn", "act", "activation", "activation_fn", "intermediate_act_fn")
_EXPERTS = ("is_concatenated", "is_transposed", "has_bias", "has_gate")  # as transformers marks a class of experts
_SKIPPED = ("relu", "relu2", "reglu")  # whose zeros are
_OTHERS_WITH_ZEROS = ("hardshrink", "hardsigmoid", "hardswish", "relu6", "softshrink", "threshold")


def activations_of(model: nn.Module) -> list[str]:
    """The names of the activations that a model's modules are, or hold under the usual names, in alphabetical order."""
    found: set[str] = set()
    for module in model.modules():
        for act in (module, *(_held(module, name) for name in _NAMES)):
            kind = act.lower() if isinstance(act, str) else kind_of(act)
            if kind in _OTHERS_WITH_ZEROS:
                found.add(kind)
                continue
            try:
                found.add(activation_name(act, ""))
            except ValueError:  # is none, or none that has a name here
                continue
    return sorted(found)


def _held(module: nn.Module, name: str) -> object:
    try:
        return getattr(module, name, None)
    except Exception:  # a property of the module's own, which a report must outlive
        return None


def advice(model: nn.Module) -> str:
    """Lines on what could skip in a model in which nothing was found to; "" where there is nothing to say."""
    lines: list[str] = []
    experts: list[Any] = [m for m in model.modules() if all(hasattr(m, name) for name in _EXPERTS)]
    if any(getattr(getattr(m, "config", None), "_experts_implementation", None) != "dyncore" for m in experts):
        lines.append(
            "its experts skip by dyncore.integrations.transformers.register() and "
            'model.set_experts_implementation("dyncore")'
        )
    found = activations_of(model)
    if found and not any(name in _SKIPPED for name in found):  # a forward may call F.relu, where nothing shows
        zeros = [name for name in found if name in _OTHERS_WITH_ZEROS]
        told = f"the zeros of {' and '.join(zeros)} are not skipped" if zeros else "none of these makes zeros"
        seen = f"{'no activation whose zeros are skipped' if zeros else 'no ReLU'} found"
        lines.append(
            f"{seen} (activations found: {', '.join(found)}): {told}. Rows can be skipped, by nn.Skip, nn.TokenSkip "
            "and nn.MixtureOfDepths"
        )
    return "\n".join(lines)
