"""Which layers of a model skip, could skip, or look as if they could: found by their build, before anything runs.

Replacements are made in a copy of the model (the twin), under the same names, so that a layer and what would take its
place can be compared and timed side by side.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dyncore.audit.findings import Layer
from dyncore.convert import relu_sparse
from dyncore.convert.relu_sparse import Report
from dyncore.integrations import transformers
from dyncore.nn.base import DynamicLayer
from dyncore.nn.experts import read_expert
from dyncore.nn.sparse_mlp import SparseLinear, SparseMLP

ROOT = "the model"
RELU = "dyncore.convert.relu_sparse(model)"
EXPERTS = 'dyncore.integrations.transformers.register(); model.set_experts_implementation("dyncore")'
_ALREADY = "already sparse"


@dataclasses.dataclass
class Candidate:
    """A layer and how its replacement is run: "swap": the twin's module of the same name; "modes": itself, in masked
    and in auto execution; "moe": a MoE of its experts, whose routing is found by trying; "none": not at all.

    router, experts: names of children, of a "moe".
    """

    layer: Layer
    way: str
    path: str
    router: str = ""
    experts: str = ""


def path_of(name: str) -> str:
    """The path of a module that a report calls by `name`."""
    return "" if name == ROOT else name


def expression(name: str) -> str:
    """ "layers.0.mlp" as Python: model.layers[0].mlp"""
    return "model" + re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f".{name}") if name else "model"


def _relu(model: nn.Module, report: Report) -> Iterator[Candidate]:
    for swap in report.swapped:
        width, inner = swap.shape
        kind = {"SparseLinear": "Linear behind a ReLU", "fused": "ReLU MLP within it"}.get(swap.now, "ReLU MLP")
        if swap.activation != "relu":
            kind = kind.replace("ReLU", "gated ReLU" if swap.activation == "reglu" else "squared ReLU")
        what = f"{kind}, H={width}, I={inner}"
        yield Candidate(Layer(swap.name, swap.was, "relu", what, how=RELU), "swap", path_of(swap.name))
    for kept in report.kept:
        path = path_of(kept.name)
        if kept.reason != _ALREADY:
            yield Candidate(Layer(kept.name, kept.kind, "other", "an MLP", why_not=kept.reason), "none", path)
            continue
        module = model.get_submodule(path)
        if isinstance(module, (SparseMLP, SparseLinear)):
            yield Candidate(Layer(kept.name, kept.kind, "dynamic", "skips zeros already"), "modes", path)


def _transformers_experts(model: nn.Module, twin: nn.Module, notes: list[str]) -> Iterator[Candidate]:
    """Experts modules of transformers; the twin computes its own by dyncore afterwards."""
    if "transformers" not in sys.modules:  # then the model is none of its
        return
    try:
        ways = transformers.describe(model)
    except ImportError as error:
        notes.append(str(error))
        return
    if not ways:
        return
    for owner in twin.modules():
        if callable(getattr(owner, "set_experts_implementation", None)):
            owner.set_experts_implementation(transformers.NAME)  # type: ignore[operator]
            break
    else:
        notes.append("its experts are of transformers, but no model of transformers holds them: how to set their way?")
        return
    for name, way in ways.items():
        module: Any = model.get_submodule(name)
        w_in: Tensor = module.gate_up_proj if module.has_gate else module.up_proj
        sizes = f"E={w_in.shape[0]}, H={w_in.shape[2 if not module.is_transposed else 1]}"
        layer = Layer(name, type(module).__name__, "moe", f"experts, {sizes}", how=EXPERTS)
        if " is set" not in way:
            layer.how, layer.why_not = None, f"dyncore computes it already: {way}"
            yield Candidate(layer, "none", name)
        elif "grouped_mm:" in way:
            layer.how, layer.why_not = None, way.partition("dyncore would: ")[2]
            yield Candidate(layer, "none", name)
        else:
            layer.what += f", {way.partition(' is set')[0]} now"
            yield Candidate(layer, "swap", name)


def _router_of(module: nn.Module, experts: int) -> str | None:
    """The child that gives as many numbers as there are experts."""
    for name, child in module.named_children():
        last = [m for m in child.modules() if isinstance(m, nn.Linear)][-1:]
        if not isinstance(child, nn.ModuleList) and last and last[0].out_features == experts:
            return name
    return None


def _loops(model: nn.Module) -> Iterator[Candidate]:
    """Modules with a list of experts and a router: expert by expert in Python, as most code has it."""
    for name, module in model.named_modules():
        if isinstance(module, DynamicLayer):
            continue
        for child_name, experts in module.named_children():
            if not isinstance(experts, nn.ModuleList) or len(experts) < 2 or len({type(e) for e in experts}) > 1:
                continue
            router = _router_of(module, len(experts))
            if router is None:
                continue
            layer = Layer(name or ROOT, type(module).__name__, "moe", f"loop over E={len(experts)} experts")
            try:
                read = [read_expert(expert, name=f"{child_name}.{i}") for i, expert in enumerate(experts)]
            except ValueError as error:
                layer.why_not = f"{error}; dyncore.route and dyncore.grouped_linear take experts of any build"
                yield Candidate(layer, "none", name)
                continue
            layer.what += f", H={read[0].w_out.shape[0]}, I={read[0].w_out.shape[1]}, {read[0].activation}"
            yield Candidate(layer, "moe", name, router=router, experts=child_name)


def _stacks(model: nn.Module, known: set[str]) -> Iterator[Candidate]:
    """Modules whose own Parameters [E, ., .] look like experts, of no build that is known."""
    for name, module in model.named_modules():
        stacked = [p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3]
        if len(stacked) < 2 or len(set(stacked)) > 1 or stacked[0] < 2 or name in known:
            continue
        if isinstance(module, DynamicLayer):
            continue
        why = "its weights are stacked and its forward is its own: dyncore.grouped_mlp(x, w_in, w_out, plan=...) with "
        why += "plan = dyncore.route(expert, weight, num_groups=E) computes the chosen experts alone"
        layer = Layer(name or ROOT, type(module).__name__, "other", f"E={stacked[0]} stacked weights", why_not=why)
        yield Candidate(layer, "none", name)


def _dynamic(model: nn.Module) -> Iterator[Candidate]:
    for name, module in model.named_modules():
        if isinstance(module, DynamicLayer):
            layer = Layer(name or ROOT, type(module).__name__, "dynamic", type(module).__name__)
            yield Candidate(layer, "modes", name)


def candidates(model: nn.Module, twin: nn.Module, notes: list[str]) -> list[Candidate]:
    """All of them, in the order of the model; what takes the place of an MLP or of experts then stands in the twin."""
    found = [*_relu(model, relu_sparse(twin)), *_dynamic(model), *_loops(model)]
    # the experts of a loop are told by the block that calls them
    inside = tuple(f"{c.path}.{c.experts}." for c in found if c.way == "moe")
    found = [c for c in found if c.way == "moe" or not c.path.startswith(inside or ("\0",))]
    found += _transformers_experts(model, twin, notes)
    found += _stacks(model, {c.path for c in found})
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda c: order.get(c.path, 0))
