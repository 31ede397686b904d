"""relu_sparse: every ReLU MLP of a model made to skip its zeros, and a report of what was done and what was not.

The first way that fits: an MLP that is a module becomes an nn.SparseMLP; a transformer layer of torch.nn gets a sparse
feed-forward block; the Linear layers of a larger module that is known to call one after the other (OPT's decoder layer)
are fused; and of those in any other (a longer Sequential, BERT, a forward that calls F.relu) the second becomes an
nn.SparseLinear, which is exact whatever the module gives it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from dyncore.nn.advice import advice
from dyncore.nn.base import expect_choice
from dyncore.nn.dense_mlps import NAMES, expect_plain, hooked
from dyncore.nn.experts import DROPOUTS
from dyncore.nn.forwards import is_activation, is_linear, may_follow, name_of, own_linears, read_forward
from dyncore.nn.fused_pair import FusedFirst, FusedSecond, fuse
from dyncore.nn.sparse_mlp import SparseLinear, SparseMLP
from dyncore.nn.sparse_transformer import SPARSE, sparsify
from dyncore.ops.sparse_mlp import SAVE

# larger modules that call last(activation(first(x))) with nothing in between: class -> (first, activation, last)
_INLINE = {"transformers.models.opt.modeling_opt.OPTDecoderLayer": ("fc1", "activation_fn", "fc2")}
_ACTIVATION_NAMES = ("act_fn", "act", "activation", "activation_fn", "intermediate_act_fn")
_RELUS = ("relu", "relu2")
_ALREADY = "already sparse"
_DONE = (SparseMLP, SparseLinear, FusedFirst, *SPARSE.values())


@dataclasses.dataclass(frozen=True)
class Swap:
    """One MLP that skips now.

    Attributes:
        name: of the module that was changed, within the model.
        was, now: its class; "fused": its two Linear layers work as one. "SparseLinear": the hidden layer is computed in
            full, and the second layer skips.
        activation: "relu", "relu2", "reglu", or of a SparseLinear what it follows.
        shape: (H, I) of the output weight.
        note: why it did not become a SparseMLP, or what fusing it changes, or "".
    """

    name: str
    was: str
    now: str
    activation: str
    shape: tuple[int, int]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Kept:
    """One MLP that was left as it is: the name and class of its module, and why."""

    name: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What relu_sparse did: `swapped`; and `kept`, which look like MLPs and were left as they are; `advice`, where
    nothing skips, says what could."""

    swapped: tuple[Swap, ...]
    kept: tuple[Kept, ...]
    advice: str = ""

    def __repr__(self) -> str:
        done = sum(k.reason == _ALREADY for k in self.kept)
        lines = [f"{len(self.swapped)} swapped, {len(self.kept) - done} kept" + f", {_ALREADY}: {done}" * bool(done)]
        if not self.swapped and not self.kept:
            lines.append(
                "  no dense MLP was recognised: two nn.Linear around a ReLU in a Sequential, by names or in a trace"
            )
        for s in self.swapped:
            note = f" ({s.note})" if s.note else ""
            lines.append(f"  {s.name}: {s.was} -> {s.now}, {s.activation}, H={s.shape[0]}, I={s.shape[1]}{note}")
        for k in self.kept:
            lines.append(f"  {k.name}: {k.kind} {k.reason if k.reason == _ALREADY else f'kept: {k.reason}'}")
        return "\n".join([*lines, *(f"  {line}" for line in self.advice.splitlines())])


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A Linear layer below an activation, both called by the same forward."""

    last: str  # its path in the module
    activation: str
    by_names: bool = False  # what its module's forward does in between is still to be read


def _in_sequence(module: nn.Sequential) -> Iterator[_Pair]:
    """An activation and a Linear behind another Linear, with dropouts anywhere; what makes the input is free."""
    order = [(n, m) for n, m in module.named_children() if not isinstance(m, (nn.Identity, *DROPOUTS))]
    first = next((i for i, (_, m) in enumerate(order) if is_linear(m)), len(order))
    for (_, act), (name, last) in zip(order[first + 1 :], order[first + 2 :], strict=False):
        if is_linear(last) and is_activation(act):
            yield _Pair(name, name_of(act))


def _shown_activation(module: nn.Module) -> object | None:
    for name in _ACTIVATION_NAMES:
        act = getattr(module, name, None)
        if act is not None:
            return act
    return next((m for m in module.children() if is_activation(m)), None)


def _by_names(module: nn.Module) -> Iterator[_Pair]:
    """Linear layers and an activation under the names that code bases give to them."""
    for first, up, last in NAMES:
        if all(is_linear(module._modules.get(n)) for n in (first, up, last) if n):
            act = _shown_activation(module)
            if act is not None:
                yield _Pair(last, name_of(act), by_names=True)
            return
    inner, output = module._modules.get("intermediate"), module._modules.get("output")  # BERT and ViT
    if inner is not None and output is not None and is_linear(inner._modules.get("dense")):
        act = _shown_activation(inner)
        if act is not None and is_linear(output._modules.get("dense")):
            yield _Pair("output.dense", name_of(act))


def _by_forward(module: nn.Module) -> Iterator[_Pair]:
    """Linear layers around a function, by a trace. ValueError where there is none and they look like an MLP."""
    linears = own_linears(module)
    if not may_follow(linears):
        return
    try:
        forward = read_forward(module)
    except ValueError as error:
        if len(linears) == 2 and type(module).forward is not nn.Module.forward:
            raise ValueError(
                f"expected an activation between {' and '.join(linears)} that shows or that a trace of the forward "
                f"finds, got none ({error}); an nn.ReLU as a child shows"
            ) from error
        return
    for call in forward.calls:
        yield _Pair(call.last, call.activation)
    if not forward.calls:
        for last, (first, passed, _) in forward.between.items():
            raise ValueError(
                f"expected a ReLU, its square or a gate by it between {first} and {last}, and at most a dropout, "
                f"got what is not understood: {', '.join(passed)}"
            )


def _expect_zeros(module: nn.Module, last: str) -> None:
    """ValueError where a trace shows that the ReLU's zeros do not reach `last`."""
    try:
        between = read_forward(module).between.get(last)
    except ValueError:  # the names have to do
        return
    if between is not None and between.loses is not None:
        raise ValueError(
            f"expected the zeros of the ReLU as the input of {last}, got {between.loses} in between, which keeps none"
        )


def _pairs(module: nn.Module) -> list[_Pair]:
    if isinstance(module, nn.Sequential):
        return list(_in_sequence(module)) or list(_by_forward(module))
    return list(_by_names(module)) or list(_by_forward(module))


def _reason(error: ValueError) -> str:
    return str(error).removeprefix("module: ").removeprefix("layer: ")


class _Conversion:
    """One walk through a model."""

    def __init__(self, model: nn.Module, save: str) -> None:
        self.model, self.save = model, save
        self.swapped: list[Swap] = []
        self.kept: list[Kept] = []
        self._done: dict[int, nn.Module] = {}  # what stands for a module now; it may stand in several places
        self._owners: dict[int, list[str]] = defaultdict(list)  # of each Parameter
        for name, module in model.named_modules():
            for kind, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners[id(parameter)].append(f"{name}.{kind}" if name else kind)

    def convert(self, module: nn.Module, name: str, *, root: bool = False) -> nn.Module:
        """`module`, or what takes its place."""
        if isinstance(module, _DONE):
            self._already(module, name)
            return module
        if id(module) in self._done:
            return self._done[id(module)]
        self._stands_for(module, module)
        if isinstance(module, tuple(SPARSE)):
            self._transformer_layer(module, name)
            return module
        try:
            pairs = _pairs(module)
        except ValueError as error:
            self._keep(name, module, error)
            pairs = []
        note = ""
        if pairs and self._inline(module, name):
            pairs = []
        elif pairs and root:
            note = "the model itself is changed in place, not replaced"
        elif pairs:
            layer, note = self._whole(module, name)
            if layer is not None:
                self._stands_for(module, layer)
                return layer
        for pair in pairs:
            self._second(pair, module, name, note)
        for child_name, child in list(module._modules.items()):
            if child is not None:
                module._modules[child_name] = self.convert(child, f"{name}.{child_name}" if name else child_name)
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, tuple(SPARSE.values())) for m in module.layers
        ):
            module.use_nested_tensor = False  # its layers would be given nested tensors, for the fused path alone
        return module

    def _stands_for(self, module: nn.Module, now: nn.Module) -> None:
        self._done[id(module)] = self._done[id(now)] = now

    def _expect_untied(self, *linears: nn.Module) -> None:
        for linear in linears:
            for parameter in linear.parameters():
                owners = self._owners[id(parameter)]
                if len(owners) > 1:
                    raise ValueError(f"expected Parameters of its own, got tied ones: {' and '.join(owners)}")

    def _record(
        self, name: str, was: str, now: nn.Module | str, activation: str, shape: tuple[int, int], note: str = ""
    ) -> None:
        kind = now if isinstance(now, str) else type(now).__name__
        self.swapped.append(Swap(name or "the model", was, kind, activation, shape, note))

    def _already(self, module: nn.Module, name: str) -> None:
        """`module` skips since an earlier call, or by the model's own making."""
        if id(module) in self._done or isinstance(module, FusedSecond):
            return
        self._stands_for(module, module)
        if isinstance(module, FusedFirst):  # its parts are told by the layer that holds them
            name = name.rpartition(".")[0]
            module = self.model.get_submodule(name)
        self.kept.append(Kept(name or "the model", type(module).__name__, _ALREADY))

    def _keep(self, name: str, module: nn.Module, error: ValueError) -> None:
        self.kept.append(Kept(name or "the model", type(module).__name__, _reason(error)))

    def _whole(self, module: nn.Module, name: str) -> tuple[SparseMLP | None, str]:
        """A module that is an MLP and nothing else as SparseMLP, or the reason why not."""
        try:
            self._expect_untied(*module.modules())
            layer = SparseMLP.from_dense(module, save=self.save)
        except ValueError as error:
            reason = str(error)
            larger = "no parameters or buffers but" in reason or "expected Linear layers named" in reason
            return None, "a larger module calls it" if larger else _reason(error)
        self._record(name, type(module).__name__, layer, layer.activation, (layer.dim, layer.hidden_dim))
        return layer, ""

    def _inline(self, module: nn.Module, name: str) -> bool:
        """Whether `module` is of a class known to call its layers one after the other, and they are fused now."""
        names = _INLINE.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if names is None or "forward" in module.__dict__:
            return False
        parts = [module.get_submodule(n) for n in names]
        kind = name_of(parts[1])
        try:
            linears = [expect_plain(parts[0], names[0]), expect_plain(parts[2], names[2])]
            self._expect_untied(*linears)
        except ValueError:
            return False
        first, last = (linear.weight for linear in linears)
        if (
            kind not in _RELUS
            or any(map(hooked, parts))
            or first.shape != last.shape[::-1]
            or first.dtype != last.dtype
        ):
            return False
        was = type(module).__name__
        fuse(module, *names, kind, self.save)
        for part in names:
            self._stands_for(module.get_submodule(part), module.get_submodule(part))
        note = f"{names[0]} computes it all: hooks on its parts see no hidden layer; {names[0]}.hidden(x) makes one"
        self._record(name, was, "fused", kind, (last.shape[0], last.shape[1]), note)
        return True

    def _second(self, pair: _Pair, module: nn.Module, name: str, note: str) -> None:
        """The second layer of an MLP as SparseLinear."""
        activation, last = pair.activation, module.get_submodule(pair.last)
        if isinstance(last, SparseLinear):
            return  # it is told by itself
        try:
            if activation not in _RELUS:
                raise ValueError(f"expected a ReLU or its square, got {activation}")
            if pair.by_names:
                _expect_zeros(module, pair.last)
            linear = expect_plain(last, pair.last)
            hook = hooked(linear)
            if hook:
                raise ValueError(f"expected nothing that hangs on {pair.last}, got {hook}")
            self._expect_untied(linear)
        except ValueError as error:
            self._keep(name, module, error)
            return
        layer = SparseLinear.from_dense(linear)
        owner, _, own_name = pair.last.rpartition(".")
        module.get_submodule(owner)._modules[own_name] = layer
        self._stands_for(last, layer)
        where = f"{name}.{pair.last}" if name else pair.last
        self._record(where, type(last).__name__, layer, activation, (layer.out_features, layer.in_features), note)

    def _transformer_layer(self, layer: nn.Module, name: str) -> None:
        was = type(layer).__name__
        try:
            self._expect_untied(layer.get_submodule("linear1"), layer.get_submodule("linear2"))
            sparsify(layer, self.save)
        except ValueError as error:
            self._keep(name, layer, error)
            return
        last = layer.get_submodule("linear2")
        assert isinstance(last, SparseLinear)
        self._record(name, was, layer, "relu", (last.out_features, last.in_features))


def relu_sparse(model: nn.Module, *, save: str = "compressed") -> Report:
    """Make every ReLU MLP in a model skip its zeros, in place; values, gradients and state_dict stay what they are.

    Args:
        model: any module. Known are MLPs that `nn.SparseMLP.from_dense` takes (T5's, plain and gated, among them),
            torch.nn's TransformerEncoderLayer and TransformerDecoderLayer with activation="relu", Linear layers around
            a ReLU in any Sequential, and under their usual names in a larger module (OPT, BART's kin, BERT, ViT). Where
            names do not tell, the forward is traced: F.relu, torch.relu and x.relu() are found there.
        save: what of the hidden layer is kept for the backward, as for dc.sparse_mlp; not by SparseLinear layers,
            which keep their input.

    Returns a Report of what was swapped, how, and what looks like an MLP and was kept, and why: another activation,
    hooks, tied, quantised or parametrized weights, a forward of its own that no trace follows, or that it skips
    already. Convert before wrapping the model (torch.compile, DistributedDataParallel); optimizers keep their
    Parameters. An OPT layer makes its whole MLP in fc1 then: hooks and adapters put on fc1 or fc2 later do not see the
    hidden layer, which `fc1.hidden(x)` makes; earlier ones keep a layer as it is. `measure.activation_sparsity` finds
    that hidden layer under the old names, too. What needs contiguous Parameters:
    `lay_out`.

    A dropout between the ReLU and the second Linear (p > 0: the default of torch's layers and of T5) has the layers
    called one by one in training: the second skips alone, and tensors [T, I] are saved. In evaluation, and with p = 0,
    all of it skips.

    Torch's encoder layers leave their fused inference path, which would compute everything; so rows that a
    src_key_padding_mask hides are computed in evaluation, too, and not set to 0.

    Raises TypeError where `model` is no module, ValueError on another `save`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    expect_choice("save", save, SAVE)
    conversion = _Conversion(model, save)
    conversion.convert(model, "", root=True)
    skips = conversion.swapped or any(k.reason == _ALREADY for k in conversion.kept)
    return Report(tuple(conversion.swapped), tuple(conversion.kept), "" if skips else advice(model))
