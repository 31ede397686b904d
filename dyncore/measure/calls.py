"""Calls of a module that are to be compared: their tensors and gradients in an execution mode, the layer that fails,
and the layer from which on two modes differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.execution import execution
from dyncore.measure.agreement import disagreement
from dyncore.nn.base import DynamicLayer


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of an output: of a tensor, of tuples, lists and mappings, and of dataclasses that are no mappings."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def first_tensor(tree: Any) -> Tensor | None:
    return next(iter(tensors(tree)), None)


def told(error: BaseException) -> str:
    """ "Kind: first line" of an exception."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")


def seeded(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args) with the random state left as it was: noise is the same in each mode."""
    with torch.random.fork_rng():
        return fn(*args)


@contextmanager
def preserved(module: object) -> Generator[None]:
    """Gives a module's buffers back, with the values that forwards change, such as the statistics of a BatchNorm."""
    owners = module.modules() if isinstance(module, nn.Module) else ()
    before = [
        (owner, name, buffer, None if buffer.is_inference() else buffer.clone())
        for owner in owners
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in before:
                if getattr(owner, name) is not buffer:
                    setattr(owner, name, buffer)
                if value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


class Result(NamedTuple):
    """The tensors that a call returned, and the gradients of its parameters and inputs."""

    values: list[Tensor]
    gradients: list[Tensor]


def _gradients(roots: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the leaves, whose .grad is left as it was. (The FLOP counter of modules refuses autograd.grad.)"""
    kept = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    try:
        torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    finally:
        for t, grad in zip(leaves, kept, strict=True):
            t.grad = grad


@dataclasses.dataclass(frozen=True)
class Call:
    """module(*args, **kwargs) in an execution mode, with a backward of ones where asked for.

    Attributes:
        module: or any other callable. args, kwargs: what it is called with.
        mode: the execution mode. backward: whether gradients of parameters and inputs that require them are made.
        around: contexts that are entered for each call.
    """

    module: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: str = "auto"
    backward: bool = False
    around: Callable[[], Any] | None = None

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are made of, by name."""
        named: dict[str, Tensor] = {}
        if isinstance(self.module, nn.Module):
            named.update(self.module.named_parameters())
        for i, t in enumerate(tensors((self.args, self.kwargs))):
            named[f"input {i}"] = t
        return {name: t for name, t in named.items() if t.requires_grad and t.is_leaf}

    def run(self) -> Any:
        """What the module returns."""
        with ExitStack() as stack:
            stack.enter_context(execution(self.mode))
            stack.enter_context(torch.set_grad_enabled(self.backward))
            if self.around is not None:
                stack.enter_context(self.around())
            return self.module(*self.args, **self.kwargs)

    def __call__(self) -> Result:
        values = tensors(self.run())
        if not self.backward:
            return Result(values, [])
        roots = [t for t in values if t.requires_grad]
        return Result(values, _gradients(roots, list(self.leaves().values())) if roots else [])

    def of(self, module: Callable[..., Any], mode: str | None = None) -> Call:
        """The same call of another module."""
        return dataclasses.replace(self, module=module, mode=self.mode if mode is None else mode)

    def first_samples(self, count: int, dim: int = 0, start: int = 0) -> Call | None:
        """The call with samples start..start+count-1 of every tensor that has as many along `dim` as the first one;
        None where there is nothing to cut."""
        found = [t for t in tensors((self.args, self.kwargs)) if t.dim() > dim]
        if not found:
            return None
        size = found[0].shape[dim]

        def cut(t: Tensor) -> Tensor:
            if t.dim() <= dim or t.shape[dim] != size:
                return t
            piece = t.detach().narrow(dim, start, count).clone()
            return piece.requires_grad_(t.requires_grad)

        args, kwargs = pytree.tree_map_only(Tensor, cut, (self.args, self.kwargs))
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    @property
    def device(self) -> torch.device:
        """Of the first tensor among the arguments, else of the first parameter, else the CPU."""
        parameters = self.module.parameters() if isinstance(self.module, nn.Module) else ()
        return next((t.device for t in (*tensors((self.args, self.kwargs)), *parameters)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating parameter, else of the first floating argument."""
        parameters = self.module.parameters() if isinstance(self.module, nn.Module) else ()
        floats = (t.dtype for t in (*parameters, *tensors((self.args, self.kwargs))) if t.is_floating_point())
        return next(floats, torch.float32)


def _named(run: Callable[..., None], name: str) -> Callable[..., None]:
    """A hook that calls run(name, layer), or with the output."""

    def hook(layer: nn.Module, args: Any, *output: Any) -> None:
        run(name, layer, *output)

    return hook


@contextmanager
def hooked(
    layers: Iterable[tuple[str, nn.Module]],
    before: Callable[[str, nn.Module], None] | None = None,
    after: Callable[[str, nn.Module, Any], None] | None = None,
) -> Generator[None]:
    """Calls before(name, layer) and after(name, layer, output) around the forward of each layer."""
    with ExitStack() as stack:
        for name, layer in layers:
            if before is not None:
                stack.callback(layer.register_forward_pre_hook(_named(before, name)).remove)
            if after is not None:
                stack.callback(layer.register_forward_hook(_named(after, name)).remove)
        yield


def title(name: str, layer: nn.Module) -> str:
    """ "layers.0 (Linear)" """
    return f"{name} ({type(layer).__name__})" if name else type(layer).__name__


def several(names: Sequence[str]) -> str:
    """ "a, b, c and 5 more" """
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def failing_layer(call: Call) -> str | None:
    """The innermost layer whose forward fails, as `title`; None where none does."""
    if not isinstance(call.module, nn.Module):
        return None
    inside: list[str] = []

    def enter(name: str, layer: nn.Module) -> None:
        inside.append(title(name, layer))

    def leave(name: str, layer: nn.Module, output: Any) -> None:
        while inside.pop() != title(name, layer):  # forwards that were broken off
            pass

    with hooked(call.module.named_modules(), enter, leave), torch.compiler.set_stance("force_eager"):
        try:
            seeded(call.run)
        except Exception:
            return inside[-1] if inside else None
    return None


def failure(call: Call, error: BaseException) -> str:
    """What failed, where, and how."""
    where = failing_layer(call)
    text = f"failed{f' in {where}' if where else ''}: {told(error)}"
    if not torch.cuda.is_available() and any(word in str(error) for word in ("CUDA", "cuda", "NVIDIA")):
        text += " (it wants a GPU, and there is none here)"
    return text


def difference(
    result: Result,
    reference: Result,
    *,
    leaves: Sequence[str] = (),
    loose: bool = False,
    tolerance: float | None = None,
) -> str | None:
    """How a result is another one than the reference: None, or such as "output 0 differs: largest error 1".

    Args:
        leaves: names of what the gradients belong to.
        loose: values that were rounded between their steps in 16 bits, too: held to the RMS error alone, as gradients.
        tolerance: as for `agreement.disagreement`.
    """
    for kind, values, references in zip(("output", "gradient"), result, reference, strict=True):
        if len(values) != len(references):
            return f"{len(values)} {kind}s, expected {len(references)}"
        for i, (value, expected) in enumerate(zip(values, references, strict=True)):
            gradient = loose or kind == "gradient"
            why = disagreement(value, expected, gradient=gradient, tolerance=tolerance)
            if why:
                of = f" of {leaves[i]}" if kind == "gradient" and i < len(leaves) else ""
                return f"{kind} {i}{of} differs: {why}"
    return None


def _outer(module: nn.Module, name: str = "") -> Generator[tuple[str, nn.Module]]:
    """Named modules that stand in no dynamic layer: what stands in one sees other rows in other modes."""
    yield name, module
    if not isinstance(module, DynamicLayer):
        for child_name, child in module.named_children():
            yield from _outer(child, f"{name}.{child_name}" if name else child_name)


def first_difference(call: Call, other: Call, tolerance: float | None = None) -> str | None:
    """The first layer, in the order in which they finish, whose output is another in `other` than in `call`, which
    differ in their modes; None where none is found."""
    if not isinstance(call.module, nn.Module):
        return None
    seen: list[list[tuple[str, list[Tensor]]]] = []
    layers = list(_outer(call.module))
    for one in (call, other):
        outputs: list[tuple[str, list[Tensor]]] = []

        def keep(name: str, layer: nn.Module, output: Any, outputs: Any = outputs) -> None:
            outputs.append((title(name, layer), [t.detach().clone() for t in tensors(output)]))

        with hooked(layers, after=keep), torch.compiler.set_stance("force_eager"):
            seeded(one.run)
        seen.append(outputs)
    for (name, values), (reference_name, references) in zip(*seen, strict=False):
        if name != reference_name:
            return None  # the modes call other layers
        if difference(Result(values, []), Result(references, []), tolerance=tolerance):
            return name
    return None
