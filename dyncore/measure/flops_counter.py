"""The counter underneath `measure.flops`: a dispatch mode that sees every op, and which module it ran for.

PyTorch's own FlopCounterMode has the formulas; it does not tell an op that it cannot count from one that is free, and
loses the module of a backward pass through branches or checkpoints.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from dyncore.measure.flops_formulas import Formula, formula_of, is_light

# what the tensors of subclasses are asked about themselves, which is theirs to answer
_QUERIES = frozenset(
    """
    sym_is_contiguous is_contiguous is_strides_like_format is_non_overlapping_and_dense size sym_size stride sym_stride
    storage_offset sym_storage_offset numel sym_numel dim layout device
    """.split()
)
# of strided nested tensors these have kernels of their own
_NESTED = frozenset(("aten::linear", "aten::matmul", "aten::scaled_dot_product_attention"))
Names = frozenset[str]
# number of this thread's next node
_now: Callable[[], int] = torch.autograd._get_sequence_nr  # pyright: ignore[reportPrivateImportUsage]
_node: Callable[[], Any] = torch._C._current_autograd_node  # the node whose backward runs in this thread, or None


class Modules:
    """Which modules an op runs for: those whose forward is under way, or made the node whose backward is.

    Autograd numbers a thread's nodes as it makes them, so the modules of a node are those that were under way when the
    count stood at its number.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.names: dict[nn.Module, str] = {}
        if model is not None:
            self.names = {module: name for name, module in model.named_modules()}
        self._stack: list[_Running] = []
        self._numbers, self._at = [0], [Names()]
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        if self.names:
            # of all modules: hooks on one module would keep PyTorch's fast paths from being taken
            leave = register_module_forward_hook(self._leave, always_call=True)
            self._handles = [register_module_forward_pre_hook(self._enter), leave]

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def names_at(self, node: Any) -> Names:
        """Names of the modules for which an op runs now, in the backward pass of a node if there is one."""
        last = self._stack[-1] if self._stack else None
        forward = last.names if last else Names()
        if node is None or not self.names or (last and last.again):
            return forward
        return forward | self._at[bisect_right(self._numbers, node._sequence_nr()) - 1]

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self.names.get(module, "")
        parts = name.split(".") if name else []  # containers that are never called have their children's share
        before = self._stack[-1].names if self._stack else Names()
        names = before | {".".join(parts[: i + 1]) for i in range(len(parts))}
        self._stack.append(_Running(module, names, again=_node() is not None))
        self._mark()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if any(one.module is module for one in self._stack):
            while self._stack.pop().module is not module:
                pass
            self._mark()

    def _mark(self) -> None:
        self._numbers.append(_now())
        self._at.append(self._stack[-1].names if self._stack else Names())


class _Running(NamedTuple):
    """A module whose forward is under way, with the names of those around it and its own.

    again: it was called in a backward pass, which checkpoints do: by a node of another module.
    """

    module: nn.Module
    names: Names
    again: bool


class Counter(TorchDispatchMode):
    """Counts while it is active.

    Attributes:
        total, backward: FLOPs of everything, and of what ran in a backward pass.
        by_module: FLOPs by name of the module, without the total.
        uncounted: calls by name of the ops that have no formula and should.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while `flops` counts; to say so to Dynamo takes as long for each op as counting it."""
        return False

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self._modules = modules
        self._kinds: dict[Any, Formula | str | None] = {}
        self.total: int = 0
        self.backward: int = 0
        self.by_module: defaultdict[str, int] = defaultdict(int)
        self.uncounted: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and any(map(_says_more, types)):
            return NotImplemented
        try:
            kind = self._kinds[func]
        except KeyError:
            kind = self._kinds[func] = _kind(func)
        if kind == "made of others":
            if not any(isinstance(a, Tensor) and a.is_nested for a in args):
                with self:
                    return _run_inner(func, args, kwargs)
            kind = "unknown" if func._schema.name in _NESTED else None
        if kind == "query":
            return NotImplemented
        out = func(*args, **kwargs)
        if kind is None:
            return out
        count = None if isinstance(kind, str) else kind(*args, **kwargs, out_val=out)
        if count is None:
            self.uncounted[_name(func)] += 1
        elif count:
            self._add(count)
        return out

    def _add(self, count: int) -> None:
        node = _node()
        self.total += count
        if node is not None:
            self.backward += count
        for name in self._modules.names_at(node):
            self.by_module[name] += count


@functools.cache
def _says_more(kind: type) -> bool:
    """Whether tensors of a class say themselves which ops they are made of: those are counted."""
    disabled = torch._C._disabled_torch_dispatch_impl
    return kind.__torch_dispatch__ is not disabled and not issubclass(kind, (FakeTensor, FunctionalTensor))  # type: ignore[attr-defined]


def _name(func: Any) -> str:
    return f"higher_order::{func.name()}" if isinstance(func, HigherOrderOperator) else func._schema.name


def _kind(func: Any) -> Formula | str | None:
    """An op's formula, or None if it is light, or "made of others" that can be seen, or "query", or "unknown"."""
    if isinstance(func, HigherOrderOperator):
        return formula_of(func) or ("made of others" if func is torch.ops.higher_order.cond else "unknown")
    return formula_of(func._overloadpacket) or _without_formula(func)


@functools.cache
def _without_formula(func: Any) -> str | None:
    name = _name(func)
    namespace, _, op = name.partition("::")
    if op in _QUERIES and namespace in ("aten", "prim"):
        return "query"
    composite = DispatchKey.CompositeImplicitAutograd
    if composite in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
        return "made of others"
    return None if is_light(name) else "unknown"


def _run_inner(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.ops.higher_order.cond:
        predicate, if_true, if_false, operands = args
        return (if_true if predicate else if_false)(*operands)
    return func.decompose(*args, **kwargs)
