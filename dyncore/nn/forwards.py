"""Reading a module's forward, by a symbolic trace: which of its Linear layers it calls around which activation.

For forwards whose activation is a function, which no child shows. A trace follows one path and runs no child.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.proxy import TraceError

from dyncore.nn.experts import DROPOUTS, activation_name

_PRODUCTS = (operator.mul, torch.mul, "mul")
_KEEP_ZEROS = {
    *("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"),
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("mul", "div", "truediv", "square", "pow"),
}
_MAKE_ZEROS = {"relu", "relu2", "clamp", "clamp_min", "clip", "threshold", "maximum", "where", "ReLU", "Threshold"}
_LISTS = (nn.ModuleList, nn.ModuleDict)
_FUNCTIONS = {
    *("relu", "gelu", "silu", "tanh", "sigmoid", "elu", "selu", "celu", "leaky_relu", "mish", "relu6", "softplus"),
    *("hardtanh", "hardswish", "hardsigmoid", "prelu", "rrelu", "softsign", "logsigmoid"),
}


class Call(NamedTuple):
    """last(dropout(act(first(x)))), or with `up` last(dropout(act(first(x)) * up(x))): paths of modules.

    activation: as the ops name it ("relu", "relu2"; with `up` that of the gate), else its own name.
    """

    first: str
    up: str | None
    last: str
    dropout: str | None
    activation: str


class Between(NamedTuple):
    """What a forward calls between two Linear layers, some way of a ReLU among it.

    first: the path of the earlier one. passed: names of what follows it, in order. loses: the last that keeps no zeros;
    None where those of a ReLU come through.
    """

    first: str
    passed: tuple[str, ...]
    loses: str | None


class Forward(NamedTuple):
    """What a forward calls; `whole`: the one of `calls` that it is, and the dropout that follows it.

    more: why none is, such as "which does more than call them". between: of Linear layers, by path, what comes before.
    """

    calls: tuple[Call, ...]
    whole: Call | None
    out_dropout: str | None
    more: str
    between: dict[str, Between]


def is_linear(module: object) -> bool:
    """Of nn.Linear's kind, quantised and wrapped ones included: to be swapped, or to be named as kept."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and "Linear" in type(module).__name__)


def name_of(activation: object) -> str:
    """The activation's name as the ops have it, else its own."""
    try:
        return activation_name(activation, "")
    except ValueError:
        return getattr(activation, "__name__", type(activation).__name__)


def is_activation(module: nn.Module) -> bool:
    if type(module).__module__ == "torch.nn.modules.activation" or name_of(module) != type(module).__name__:
        return True
    return any(name in type(module).__name__.lower() for name in ("gelu", "silu", "swish"))  # QuickGELU and others


def own_linears(module: nn.Module) -> dict[str, nn.Module]:
    """The Linear layers that `module` itself holds, or in lists, by path."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if is_linear(child):
            found[name] = child
        elif type(child) in _LISTS:
            found.update({f"{name}.{path}": linear for path, linear in own_linears(child).items()})
    return found


def may_follow(linears: dict[str, nn.Module]) -> bool:
    """Whether the outputs of one of them fit into a later one, and they are not all square (attention's are)."""
    sizes = [(getattr(m, "in_features", None), getattr(m, "out_features", None)) for m in linears.values()]
    fits = any(out == into for i, (_, out) in enumerate(sizes) for into, _ in sizes[i + 1 :])
    return fits and len({size for pair in sizes for size in pair}) > 1


class _Tracer(fx.Tracer):
    """Runs no child; notes whether gradients were switched on or off in between."""

    def __init__(self) -> None:
        super().__init__()
        self._mode = self._modes()
        self.changed_mode = False

    @staticmethod
    def _modes() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.changed_mode |= self._modes() != self._mode
        return super().create_node(*args, **kwargs)


class _Bare(nn.Module):
    """What Python writes into any class."""

    note: int

    def __init__(self) -> None:
        super().__init__()


def _twin(module: nn.Module) -> nn.Module:
    """`module` with all that its forward may change copied: what a trace stores must not stay in `module`."""
    twin = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        twin.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    twin.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    return twin


def _stores(twin: nn.Module) -> bool:
    """Whether a trace of its forward left something in it."""
    held = pytree.tree_leaves([v for n, v in twin.__dict__.items() if n != "_modules"])
    return any(isinstance(v, fx.Proxy) for v in held)


def _besides(module: nn.Module) -> str:
    """What another module in its place would lose, besides its layers: "" if nothing."""
    kind = type(module)
    if kind.__bases__ != (nn.Module,) or vars(kind).keys() - vars(_Bare).keys() - {"forward", "extra_repr"}:
        return "which has more than a forward"
    code = getattr(kind.forward, "__code__", None)
    if code is None or hasattr(kind.forward, "__wrapped__"):
        return "whose forward is wrapped"
    plain = {n: v for n, v in vars(module).items() if n not in vars(nn.Module()) and not callable(v)}
    if "autocast" in code.co_names:
        return "whose forward sets autocast"
    read = [n for n in code.co_names if n in plain]
    return f"whose forward reads {', '.join(read)}" if read else ""


def read_forward(module: nn.Module) -> Forward:
    """Raises ValueError where no trace can be made, with the reason."""
    if "forward" in module.__dict__:
        raise ValueError("a forward that was put over its class's")
    if type(module).forward is nn.Module.forward:
        raise ValueError("it has no forward")
    tracer = _Tracer()
    try:
        with torch.random.fork_rng(devices=[]):
            twin = _twin(module)
            graph = tracer.trace(twin)
    except Exception as error:  # whatever a forward does with what is no tensor
        if not isinstance(error, TraceError):  # others tell of torch.fx's inner life
            raise ValueError(f"torch.fx can make no trace of it ({type(error).__name__})") from error
        raise ValueError(f"TraceError: {str(error).partition(chr(10))[0]}") from error
    more = "which stores what it computes" if _stores(twin) else _besides(module)
    if not more and tracer.changed_mode:
        more = "part of which computes with gradients switched on or off"
    return _Reader(module, graph).read(more)


def _into(node: fx.Node) -> fx.Node | None:
    """What goes into an operation first."""
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None


def _called(node: fx.Node) -> str:
    """The name of the function or method that a node calls, without the underscores of torch's variants."""
    return (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).strip("_")


class _Reader:
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.graph, self.modules = graph, dict(module.named_modules())

    def read(self, more: str) -> Forward:
        """more: why none of its calls is the whole of it, if that is known."""
        found = {node: call for node in self.graph.nodes if (call := self._call(node)) is not None}
        calls = tuple(call for call, _ in found.values())
        between = {str(n.target): b for n in self.graph.nodes if (b := self._between(n)) is not None}
        if more:
            return Forward(calls, None, None, more, between)
        output = next(node for node in self.graph.nodes if node.op == "output")
        result = _into(output)
        end, dropout = (None, None) if result is None else self._past_dropout(result)
        if result is not None and end in found:
            call, chain = found[end]
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            made = [node for node in chain if node.target in (call.first, call.up)]
            only = len(inputs) == 1 and chain | {result, output, *inputs} == set(self.graph.nodes)
            if only and all(node.args == (inputs[0],) and not node.kwargs for node in made):
                return Forward(calls, call, dropout, "", between)
        return Forward(calls, None, None, "which does more than call them", between)

    def _module(self, node: fx.Node | None) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node is not None and node.op == "call_module" else None

    def _past_dropout(self, node: fx.Node) -> tuple[fx.Node | None, str | None]:
        """What goes into the dropout, and its path; `node` itself where it is no module of this kind."""
        module = self._module(node)
        if isinstance(module, (nn.Identity, *DROPOUTS)):
            return _into(node), None if isinstance(module, nn.Identity) else str(node.target)
        return node, None

    def _activation(self, node: fx.Node | None) -> tuple[str, fx.Node] | None:
        """An activation's name and what goes into it."""
        source = None if node is None else _into(node)
        if node is None or source is None:
            return None
        module = self._module(node)
        if module is not None:
            return (name_of(module), source) if is_activation(module) else None
        name = _called(node)
        if (
            name == "square"
            or (name == "pow" and node.args[1:] == (2,))
            or (name == "mul" and node.args[1:] == (source,))
        ):
            inner = self._activation(source)
            return ("relu2", inner[1]) if inner is not None and inner[0] == "relu" else None
        return (name, source) if name in _FUNCTIONS else None

    def _between(self, node: fx.Node) -> Between | None:
        """Of a Linear layer's call: what lies before it back to another one; None unless zeros are made there."""
        if not is_linear(self._module(node)):
            return None
        passed: list[str] = []
        made, through, loses, source = False, False, None, _into(node)
        while source is not None and not is_linear(module := self._module(source)):
            if module is not None and any(p.dim() > 1 for p in module.parameters()):
                return None  # layers of its own
            found = self._activation(source)
            name = found[0] if found else _called(source) if module is None else type(module).__name__
            passed.append(name)
            made = made or name in _MAKE_ZEROS
            through = through or (loses is None and name in ("relu", "relu2"))
            if not (through or isinstance(module, (nn.Identity, *DROPOUTS)) or name in _KEEP_ZEROS):
                loses = loses or name
            source = _into(source)
        return Between(str(source.target), tuple(passed[::-1]), loses) if source is not None and made else None

    def _gate(self, node: fx.Node) -> tuple[tuple[str, fx.Node], fx.Node, fx.Node] | None:
        """Of act(first(x)) * up(x): the activation's name and what goes into it, itself, and the call of `up`."""
        if node.target not in _PRODUCTS or len(node.args) != 2:
            return None
        for gate, up in (node.args, node.args[::-1]):
            if isinstance(gate, fx.Node) and isinstance(up, fx.Node) and is_linear(self._module(up)):
                found = self._activation(gate)
                if found is not None:
                    return found, gate, up
        return None

    def _call(self, node: fx.Node) -> tuple[Call, set[fx.Node]] | None:
        """The call whose `last` this node is, and all its nodes."""
        dropped = _into(node)
        if dropped is None or not is_linear(self._module(node)):
            return None
        hidden, dropout = self._past_dropout(dropped)
        chain = {node, dropped}
        if hidden is not None and hidden.target is F.dropout:
            chain, hidden = {node}, _into(hidden)  # no module: such a call is never whole
        if hidden is None:
            return None
        found, gated, up = self._activation(hidden), self._gate(hidden), None
        chain.add(hidden)
        if gated is not None:
            found, gate, up = gated
            chain |= {gate, up}
        if found is None or not is_linear(self._module(found[1])):
            return None
        activation, first = found
        chain.add(first)
        if activation == "relu2":
            chain.add(_into(hidden) or hidden)  # what is squared
        return Call(str(first.target), str(up.target) if up else None, str(node.target), dropout, activation), chain
