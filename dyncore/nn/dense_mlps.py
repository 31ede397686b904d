"""Reading dense ReLU MLPs of other code bases: which child is which layer, and whether it computes what it seems to.

A layout is recognised by names, or where they do not say enough, in a trace of the forward (forwards.py); what was read
is run against the module itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyncore.execution import execution
from dyncore.nn.experts import DROPOUTS, shown_activation, tolerance_of
from dyncore.nn.forwards import read_forward
from dyncore.nn.mlp import MLP

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (gate or only input, up or None, output), by the names in use: T5, torch's layers, DistilBERT, Llama, Mixtral, GPT and
# OPT, this package, Nemotron
NAMES = (
    ("wi_0", "wi_1", "wo"),
    ("wi", None, "wo"),
    ("linear1", None, "linear2"),
    ("lin1", None, "lin2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("fc1", None, "fc2"),
    ("w_in", None, "w_out"),
    ("up_proj", None, "down_proj"),
)


class Parts(NamedTuple):
    """The names of an MLP's children, and its activation.

    first: the input layer, or the gate where there is an `up`. dropout: on the hidden activation. out_dropout: on the
    output. activation: "relu", "relu2" or "reglu"; with reglu and no `up`, `first` is both halves.
    """

    first: str
    up: str | None
    last: str
    dropout: str | None
    out_dropout: str | None
    activation: str


def hooked(module: nn.Module) -> str | None:
    """What of a module something else may hang on, that a layer in its place would lose; None if nothing does."""
    for name, part in module.named_modules():
        where = f" on {name}" if name else ""
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(hooks) or part._state_dict_hooks or part._load_state_dict_pre_hooks:
            return f"hooks{where}"
        if "forward" in part.__dict__:
            return f"a forward that was put over its class's{where}"
    return None


def _kind_of(linear: nn.Module) -> str:
    """The class's name, in full where it is Linear too: torch's quantised layers."""
    kind = type(linear)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == "Linear" else kind.__name__


def expect_plain(linear: nn.Module, name: str) -> nn.Linear:
    """`linear`, if it is nn.Linear itself with weights of its own: ValueError with the reason otherwise."""
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name}: expected an nn.Linear, got {_kind_of(linear)}")
    for kind, parameter in (("weight", linear.weight), ("bias", linear.bias)):
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            raise ValueError(f"{name}: expected a plain Parameter as {kind}, got {type(parameter).__name__}")
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {parameter.dtype}")
        if parameter.untyped_storage().nbytes() != parameter.nbytes:
            raise ValueError(f"{name}: expected a {kind} with memory of its own, got a part of a larger buffer")
    return linear


def _of_sequential(module: nn.Sequential) -> Parts:
    children = [(n, m) for n, m in module.named_children() if not isinstance(m, nn.Identity)]
    kinds = [
        "Dropout" if isinstance(m, DROPOUTS) else "Linear" if isinstance(m, nn.Linear) else type(m).__name__
        for _, m in children
    ]
    names = [n for n, _ in children]
    inner = len(kinds) > 2 and kinds[2] == "Dropout"
    outer = kinds[-1:] == ["Dropout"]
    expected = ["Linear", "ReLU", *["Dropout"] * inner, "Linear", *["Dropout"] * outer]
    if kinds != expected:
        raise ValueError(
            f"module: expected Sequential(Linear, ReLU, [Dropout,] Linear [, Dropout]), "
            f"got Sequential({', '.join(kinds)})"
        )
    return Parts(names[0], None, names[2 + inner], names[2] if inner else None, names[-1] if outer else None, "relu")


def _by_names(module: nn.Module) -> Parts:
    for first, up, last in NAMES:
        if all(isinstance(getattr(module, n, None), nn.Module) for n in (first, up, last) if n):
            break
    else:
        known = ", ".join("/".join(n for n in names if n) for names in NAMES)
        return _by_forward(module, f"Linear layers named {known}")
    _expect_nothing_more(module, [n for n in (first, up, last) if n])
    activation = shown_activation(module, False, "module")
    if activation is None:
        return _by_forward(module, "an activation that shows")
    if up is not None:
        if activation != "relu":
            raise ValueError(f"module: expected a gate by ReLU, got {activation}")
        activation = "reglu"
    dropouts = [n for n, m in module.named_children() if isinstance(m, DROPOUTS)]
    if len(dropouts) > 2:
        raise ValueError(f"module: expected at most two dropouts, got {', '.join(dropouts)}")
    inner, outer, *_ = *dropouts, None, None
    return Parts(first, up, last, inner, outer, activation)


def _by_forward(module: nn.Module, shown: str) -> Parts:
    """`shown`: what of the module does not say what it is."""
    expected = f"module: expected {shown}, or a forward that calls Linear layers around a ReLU"
    try:
        forward = read_forward(module)
    except ValueError as error:
        raise ValueError(f"{expected}, got that of {type(module).__name__}, not understood: {error}") from error
    call = forward.whole
    if call is None:
        raise ValueError(f"{expected} and does no more, got that of {type(module).__name__}, {forward.more}")
    if any("." in name for name in call[:4] if name):
        raise ValueError(f"{expected}, all of them its children, got {type(module).__name__}, whose stand in lists")
    activation = "reglu" if call.up is not None and call.activation == "relu" else call.activation
    return Parts(call.first, call.up, call.last, call.dropout, forward.out_dropout, activation)


def read_parts(module: nn.Module) -> list[Parts]:
    """Which child of a dense ReLU MLP is what: by its looks, so that there may be more than one reading.

    Raises TypeError or ValueError, with the reason, where it is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    if isinstance(module, nn.Sequential):
        if type(module).forward is not nn.Sequential.forward:
            raise ValueError(f"module: expected Sequential's own forward, got that of {type(module).__name__}")
        parts = _of_sequential(module)
    elif isinstance(module, MLP):
        parts = Parts("w_in", None, "w_out", None, None, module.activation)
    else:
        parts = _by_names(module)
    if parts.activation not in ("relu", "relu2", "reglu"):
        raise ValueError(f"module: expected a ReLU, its square or a gate by it, got {parts.activation}")
    _expect_known(module, parts)
    if parts.dropout and not parts.out_dropout and not isinstance(module, nn.Sequential):
        return [parts, parts._replace(dropout=None, out_dropout=parts.dropout)]
    return [parts]


def matching_parts(module: nn.Module, build: Callable[[nn.Module, Parts], nn.Module]) -> Parts:
    """The first reading of `module` of which `build` makes a layer that computes what the module does."""
    readings = read_parts(module)
    for parts in readings[:-1]:
        with contextlib.suppress(ValueError):
            expect_same_results(module, build(module, parts), parts.first)
            return parts
    expect_same_results(module, build(module, readings[-1]), readings[-1].first)
    return readings[-1]


def _expect_nothing_more(module: nn.Module, names: list[str]) -> None:
    """ValueError on parameters and buffers that are not those of the layers named: they would be lost."""
    own = {id(p) for n in names for p in module.get_submodule(n).parameters()}
    others = [n for n, p in module.named_parameters() if id(p) not in own]
    others += [n for n, _ in module.named_buffers()]
    if others:
        raise ValueError(f"module: expected no parameters or buffers but those of its layers, got {', '.join(others)}")


def _expect_known(module: nn.Module, parts: Parts) -> None:
    """ValueError on anything that would be lost, and on shapes that do not make an MLP."""
    names = [n for n in (parts.first, parts.up, parts.last) if n]
    linears = [expect_plain(module.get_submodule(n), n) for n in names]
    hook = hooked(module)
    if hook:
        raise ValueError(f"module: expected nothing that hangs on it, got {hook}")
    parameters = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError(f"module: expected Parameters of their own in {', '.join(names)}, got tied ones")
    _expect_nothing_more(module, names)
    for name in (parts.dropout, parts.out_dropout):
        if name is not None and type(module.get_submodule(name)) is not nn.Dropout:
            raise ValueError(f"{name}: expected an nn.Dropout, got {type(module.get_submodule(name)).__name__}")
    first, last = linears[0], linears[-1]
    width, inner = first.in_features, last.in_features
    wide = 2 * inner if parts.activation == "reglu" and parts.up is None else inner
    shapes = [tuple(linear.weight.shape) for linear in linears]
    expected = [(wide, width), *[(inner, width)] * (parts.up is not None), (width, inner)]
    if shapes != expected:
        raise ValueError(
            f"module: expected weights {', '.join(str(list(s)) for s in expected)}, "
            f"got {', '.join(str(list(s)) for s in shapes)}"
        )
    devices = {str(p.device) for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"module: expected parameters on one device, got {' and '.join(sorted(devices))}")
    if len({linear.weight.dtype for linear in linears[:-1]}) > 1:
        raise ValueError(f"module: expected gate and up in one dtype, got {first.weight.dtype} and others")


def _rows_for(weight: Tensor) -> Tensor:
    """Random rows at which pre-activations are about 2, and activations differ most; float16 must hold them."""
    x = torch.randn(8, weight.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(weight)
    spread = float((x @ weight.t()).float().std())
    return x * min(2 / spread, 1024.0) if 0 < spread < float("inf") else x


@contextlib.contextmanager
def _as_in(train: bool, *modules: nn.Module) -> Generator[None, None, None]:
    """The modules in training, with dropouts that drop, or in evaluation."""
    before = [(m, m.training) for module in modules for m in module.modules()]
    rates = [(m, m.p) for m, _ in before if isinstance(m, nn.Dropout)]
    try:
        for m, _ in before:
            m.training = train
        for dropout, rate in rates:
            dropout.p = rate or 0.5
        yield
    finally:
        for m, training in before:
            m.training = training
        for dropout, rate in reversed(rates):  # both modules may hold it
            dropout.p = rate


@torch.no_grad()
def expect_same_results(module: nn.Module, layer: nn.Module, first: str) -> None:
    """ValueError unless both give the same on random rows, in evaluation and, from one seed, in training.

    first: the name of the first layer. Without numbers, on the meta device, nothing is compared.
    """
    weight = module.get_submodule(first).weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return
    x = _rows_for(weight)
    devices = [] if weight.device.type == "cpu" else [weight.device]
    kind = devices[0].type if devices else "cuda"
    dropouts = [n for n, m in module.named_modules() if isinstance(m, DROPOUTS)]
    for train in (False, True):
        results: list[Tensor] = []
        for run in (layer, module):
            with (
                _as_in(train, module, layer),
                torch.random.fork_rng(devices, device_type=kind),
                torch.autocast(weight.device.type, enabled=False),
                execution("masked"),
            ):
                torch.manual_seed(0)
                try:
                    results.append(run(x))
                except Exception as error:
                    raise ValueError(
                        f"module: expected one that maps rows {list(x.shape)}, got {type(error).__name__}: {error}"
                    ) from error
        when = (
            f"training{' (with ' + ', '.join(dropouts) + ' dropping)' if dropouts else ''}" if train else "evaluation"
        )
        _expect_close(results[0], results[1], type(module).__name__, when)


def _expect_close(want: Tensor, got: object, name: str, when: str) -> None:
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        what = f"{list(got.shape)}, {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"module: expected one that returns {list(want.shape)}, {want.dtype}, got {what}")
    wide = torch.promote_types(want.dtype, torch.float32)
    size = float(want.to(wide).nan_to_num().abs().max())
    if not torch.allclose(got.to(wide), want.to(wide), rtol=0, atol=tolerance_of(want.dtype) * size, equal_nan=True):
        apart = float((got.to(wide) - want.to(wide)).abs().max())
        raise ValueError(
            f"module: expected one that computes the MLP of its Linear layers, got {name} whose outputs in {when} are "
            f"{apart:.2g} from it, where the largest is {size:.2g}"
        )
