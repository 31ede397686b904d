"""What moefy and acmize share: finding the dense MLPs of a model, what goes into them, and putting layers in their
place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncore import activations
from dyncore.convert.relu_sparse import Kept, Swap
from dyncore.nn.dense_mlps import NAMES, expect_plain, hooked
from dyncore.nn.dynamic_width import BlockMLP
from dyncore.nn.experts import DROPOUTS, ExpertWeights, activation_name, expect_same_mlp, read_expert

# classes that call last(activation(first(x))) themselves -> the names of the three, and of the dropout before last
_INLINE = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("linear1", "activation", "linear2", "dropout"),
    "torch.nn.modules.transformer.TransformerDecoderLayer": ("linear1", "activation", "linear2", "dropout"),
    "transformers.models.opt.modeling_opt.OPTDecoderLayer": ("fc1", "activation_fn", "fc2", ""),
}


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What a conversion did: `swapped`, and `kept`, which look like what it changes and were left as they are.

    Attributes:
        by: the conversion's name.
        swapped: each with its name, class before and now, activation, (H, I), and a note.
        kept: each with its name, class and the reason.
    """

    by: str
    swapped: tuple[Swap, ...]
    kept: tuple[Kept, ...]

    def __repr__(self) -> str:
        lines = [f"{self.by}: {len(self.swapped)} swapped, {len(self.kept)} kept"]
        if not self.swapped and not self.kept:
            lines.append(
                "  no dense MLP was recognised: two or three nn.Linear under a name in use, or in a Sequential"
            )
        for s in self.swapped:
            note = f" ({s.note})" if s.note else ""
            lines.append(f"  {s.name}: {s.was} -> {s.now}, {s.activation}, H={s.shape[0]}, I={s.shape[1]}{note}")
        lines += [f"  {k.name}: {k.kind} kept: {k.reason}" for k in self.kept]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Found:
    """One dense MLP of a model.

    Attributes:
        name, was: its name within the model, and its class.
        probe: the module whose first argument is the MLP's input.
        weights: as `read_expert` has them.
        put: puts a layer in its place.
        note: what of it is lost.
    """

    name: str
    was: str
    probe: nn.Module
    weights: ExpertWeights
    put: Callable[[nn.Module], None]
    note: str = ""

    def swap(self, layer: nn.Module, note: str) -> Swap:
        """The record of `layer` in the MLP's place, which is put there."""
        self.put(layer)
        dim, hidden_dim = self.weights.w_out.shape
        notes = "; ".join(n for n in (note, self.note) if n)
        return Swap(self.name, self.was, type(layer).__name__, self.weights.activation, (dim, hidden_dim), notes)


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Generator[str, None, None]:
    """Dropouts of p=0 within; gives a note about those of p > 0."""
    dropouts = [(m, m.p) for m in module.modules() if isinstance(m, DROPOUTS)]
    try:
        for m, _ in dropouts:
            m.p = 0.0
        gone = sorted({p for _, p in dropouts if p > 0})
        yield f"its dropout of {' and '.join(map(str, gone))} is gone" if gone else ""
    finally:
        for m, p in dropouts:
            m.p = p


def _linear(conv: nn.Module) -> nn.Linear:
    """transformers' Conv1D, whose weight is [in, out], as an nn.Linear that shares no memory with it."""
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    with torch.device(weight.device):
        linear = nn.Linear(weight.shape[0], weight.shape[1], dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight.t())
        linear.bias.copy_(bias)
    linear.weight.requires_grad_(weight.requires_grad)
    linear.bias.requires_grad_(bias.requires_grad)
    return linear


def _is_conv(module: object) -> bool:
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"


def _looks_like_mlp(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return sum(isinstance(m, nn.Linear) for m in module) == 2 and len(module) > 2
    if _is_conv(module._modules.get("c_fc")) and _is_conv(module._modules.get("c_proj")):
        return True
    return any(all(isinstance(module._modules.get(n), nn.Linear) for n in names if n) for names in NAMES)


def _is_split(module: nn.Module) -> bool:
    """Whether the MLP's halves are `intermediate` and `output` (BERT, ViT)."""
    inner, output = module._modules.get("intermediate"), module._modules.get("output")
    linears = [part._modules.get("dense") for part in (inner, output) if part is not None]
    return (
        len(linears) == 2 and all(isinstance(m, nn.Linear) for m in linears) and hasattr(inner, "intermediate_act_fn")
    )


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: list[Found] = []
        self.kept: list[Kept] = []
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)  # of a module among its parents
        self._owners: dict[int, list[str]] = defaultdict(list)  # of a Parameter
        for name, module in model.named_modules():
            for child_name, child in module._modules.items():
                if child is not None:
                    self._places[id(child)].append((module, child_name))
            for kind, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners[id(parameter)].append(f"{name}.{kind}" if name else kind)

    def run(self) -> None:
        inside: set[int] = set()  # parts of what was found
        for name, module in self.model.named_modules():
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            if id(module) not in inside and isinstance(module, BlockMLP):
                self.kept.append(Kept(name or "the model", type(module).__name__, "runs a part of its neurons already"))
            if id(module) in inside or isinstance(module, BlockMLP):
                inside.update(id(m) for m in module.modules())
                continue
            if kind in _INLINE and isinstance(getattr(module, _INLINE[kind][0]), BlockMLP):
                continue  # which is met itself
            read = None
            if kind in _INLINE:
                read = self._inline
            elif _is_split(module):
                read = self._split
            elif _looks_like_mlp(module):
                read = self._whole
            if read is None:
                continue
            try:
                found = read(name, module, *_INLINE.get(kind, ()))
            except ValueError as error:
                reason = str(error).removeprefix("module: ")
                self.kept.append(Kept(name or "the model", type(module).__name__, reason))
                continue
            self.found.append(found)
            if read == self._whole:
                inside.update(id(m) for m in module.modules())

    def _expect_free(self, *modules: nn.Module) -> None:
        for module in modules:
            hook = hooked(module)
            if hook:
                raise ValueError(f"expected nothing that hangs on it, got {hook}")
            for part_name, part in module.named_modules():
                if isinstance(part, nn.Linear):
                    expect_plain(part, part_name or "weight")
            for parameter in module.parameters():
                owners = self._owners[id(parameter)]
                if len(owners) > 1:
                    raise ValueError(f"expected Parameters of its own, got tied ones: {' and '.join(owners)}")

    def _whole(self, name: str, module: nn.Module) -> Found:
        self._expect_free(module)
        if module is self.model:
            raise ValueError("the model itself is the MLP, and cannot be replaced in place: put it into another module")
        with _without_dropout(module) as note:
            if _is_conv(module._modules.get("c_fc")):
                first, last = _linear(module.get_submodule("c_fc")), _linear(module.get_submodule("c_proj"))
                weights = read_expert(nn.Sequential(first, module.get_submodule("act"), last))
                expect_same_mlp(module, weights, "module")
            else:
                weights = read_expert(module)

        def put(layer: nn.Module) -> None:
            for parent, child in self._places[id(module)]:
                parent._modules[child] = layer

        return Found(name, type(module).__name__, module, weights, put, note)

    def _pair(self, first: nn.Module, act: object, last: nn.Module, name: str) -> ExpertWeights:
        """The weights of last(act(first(x))), which a larger module calls."""
        self._expect_free(first, last)
        activation = activation_name(act, "activation")
        return read_expert(_Pair(expect_plain(first, name), activation, expect_plain(last, name)))

    def _inline(self, name: str, module: nn.Module, first: str, act: str, last: str, dropout: str) -> Found:
        if "forward" in module.__dict__ or "_ff_block" in module.__dict__:
            raise ValueError("expected its class's forward, got one that was put over it")
        weights = self._pair(module.get_submodule(first), getattr(module, act), module.get_submodule(last), first)
        rate = float(getattr(module, dropout).p) if dropout else 0.0

        def put(layer: nn.Module) -> None:
            setattr(module, first, layer)
            setattr(module, last, nn.Identity().train(module.training))
            if isinstance(getattr(module, act), nn.Module):
                setattr(module, act, nn.Identity().train(module.training))
            else:
                setattr(module, act, _same)
            if dropout:
                setattr(module, dropout, nn.Identity().train(module.training))
                module.activation_relu_or_gelu = 0  # type: ignore[assignment]  # torch's fused path wants the Linears
                for parent in self.model.modules():
                    if isinstance(parent, nn.TransformerEncoder) and any(m is module for m in parent.layers):
                        parent.use_nested_tensor = False

        note = f"{first} computes it all" + (f"; the dropout of {rate} before {last} is gone" if rate else "")
        return Found(name or "the model", type(module).__name__, module.get_submodule(first), weights, put, note)

    def _split(self, name: str, module: nn.Module) -> Found:
        inner, output = module.get_submodule("intermediate"), module.get_submodule("output")
        act = inner.intermediate_act_fn
        weights = self._pair(inner.get_submodule("dense"), act, output.get_submodule("dense"), "dense")
        expect_hidden(inner, weights)

        def put(layer: nn.Module) -> None:
            module._modules["intermediate"] = layer
            output._modules["dense"] = nn.Identity().train(module.training)

        note = "intermediate computes it all, output.dense is the identity"
        return Found(name or "the model", type(module).__name__, inner, weights, put, note)


class _Pair(nn.Module):
    def __init__(self, first: nn.Linear, activation: str, last: nn.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = first, last, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activations.value(self.fc1(x), self.activation))


def _same(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def expect_hidden(inner: nn.Module, weights: ExpertWeights) -> None:
    """ValueError unless `inner` makes the hidden activations of an MLP of these weights, and no more."""
    if weights.w_in.is_meta:
        return
    x = torch.randn(8, weights.w_in.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = x.to(weights.w_in)
    want = activations.hidden(nn.functional.linear(x, weights.w_in, weights.b_in), weights.activation)
    got = inner(x)
    if not isinstance(got, Tensor) or got.shape != want.shape or not torch.allclose(got, want, rtol=1e-2, atol=1e-3):
        raise ValueError(
            "expected an intermediate layer that applies its activation to its Linear, got another forward"
        )


def find_mlps(model: nn.Module) -> tuple[list[Found], list[Kept]]:
    """The dense MLPs of a model that may be replaced, and what looks like one and may not. TypeError on no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    search = _Search(model)
    search.run()
    return search.found, search.kept


def call_with(model: nn.Module, batch: object) -> None:
    """model(batch): keyword arguments where it is a mapping, positional ones where it is a tuple or list."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def rows_seen(model: nn.Module, data: object, probes: Sequence[nn.Module], *, most: int = 8192) -> list[Tensor]:
    """What goes into each probe when the model, in evaluation, runs on `data`: rows [T, H], `most` of them at most.

    data: what `model` is called with (a tensor, or a mapping of keyword arguments), or an iterable of such batches.

    Raises ValueError where a probe was not called.
    """
    batches: Iterable[Any] = [data] if isinstance(data, (Tensor, Mapping)) else data  # type: ignore[assignment]
    seen: list[list[Tensor]] = [[] for _ in probes]

    def keep(i: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[i].append(args[0].detach().flatten(0, -2))

        return hook

    training = [(m, m.training) for m in model.modules()]
    hooks = [probe.register_forward_pre_hook(keep(i)) for i, probe in enumerate(probes)]
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                call_with(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for m, was in training:
            m.training = was
    rows = [torch.cat(parts) if parts else torch.empty(0) for parts in seen]
    if any(len(r) == 0 for r in rows):
        raise ValueError("data: expected batches that go through every MLP of the model, got none for some")
    return [r[torch.linspace(0, len(r) - 1, most).long().to(r.device)] if len(r) > most else r for r in rows]
