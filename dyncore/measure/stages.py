"""Where the time of a dynamic module goes: shares of deciding, compacting, gathering, computing and scattering; the
bytes that its ops move, and the memory that its tensors take at most.

Every op that goes through PyTorch's dispatcher is timed by itself. Which stage it belongs to follows from its name,
from whether a gate is running, and in a dynamic layer's own forward from whether its plan is made already.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from dyncore.measure.calls import Call, hooked, seeded
from dyncore.measure.flops_formulas import formula_of, is_light
from dyncore.nn.base import DynamicLayer

STAGES = ("deciding", "compacting", "gathering", "computing", "scattering")
CALLING = "calling"  # the time between the ops: Python, and PyTorch's way to an op
_GATES = ("gate", "router", "policy", "predictor", "criterion", "halt", "score", "coarse")  # children that decide
_GATHERS = ("index_select", "index", "gather")
_WEIGHTS = ("weight", "w_in", "w_out", "b_in", "b_out", "in_panels", "out_panels")
_AHEAD = 100_000_000  # cycles that a CUDA device sleeps first, some 50 ms, in which the host queues the call


@dataclasses.dataclass(frozen=True)
class Profile:
    """One call, op by op.

    Attributes:
        stages: name -> share of the time; they add up to 1.
        bytes: that its ops read and write: each tensor that an op takes or makes, once; of the weights of groups those
            that a row comes to. What stays in caches between ops is counted all the same.
        peak_bytes: of tensors made during the call and alive at one time; scratch memory inside of an op is not seen.
        ops: how many ops of dyncore were called.
    """

    stages: dict[str, float]
    bytes: int
    peak_bytes: int
    ops: int


@dataclasses.dataclass
class _Frame:
    """A module that is running. planned: it has made a plan. computed: a product or a child came after it."""

    name: str
    role: str
    planned: bool = False
    computed: bool = False


def _name(func: Any) -> str:
    return f"higher_order::{func.name()}" if isinstance(func, HigherOrderOperator) else func._schema.name


def _multiplies(func: Any) -> bool:
    """Whether an op computes, rather than moves or compares."""
    if isinstance(func, HigherOrderOperator):
        return True
    return formula_of(func._overloadpacket) is not None or not is_light(_name(func))


class _Watch(TorchDispatchMode):
    """Times ops, adds up bytes, follows the storages that are alive."""

    supports_higher_order_operators = True

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.frames: list[_Frame] = []
        self.ns: dict[str, int] = dict.fromkeys(STAGES, 0)
        self.bytes = self.alive = self.peak = self.ops = 0
        self._cuda = cuda
        self._events: list[tuple[str, Any, Any]] = []
        self._grouped: list[_Grouped] = []
        self._storages: dict[int, Any] = {}
        if cuda:
            torch.cuda._sleep(_AHEAD)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stage = self._stage(func)
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            out = func(*args, **kwargs)
            end.record()
            self._events.append((stage, start, end))
        else:
            before = time.perf_counter_ns()
            out = func(*args, **kwargs)
            self.ns[stage] += time.perf_counter_ns() - before
        moved, grouped = _moved(func, args, kwargs, out)
        self.bytes += moved
        if grouped is not None:
            self._grouped.append(grouped)
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self._follow(t)
        return out

    def _stage(self, func: Any) -> str:
        space, _, name = _name(func).partition("::")
        frame = self.frames[-1] if self.frames else _Frame("", "plain")
        own = space == "dyncore"
        self.ops += own
        if any(f.role == "gate" for f in self.frames):
            return "deciding"
        if own and name.startswith("plan_"):
            frame.planned = True
            return "compacting"
        if own and name.startswith(("gather_rows", "scatter_rows")):
            frame.computed = frame.computed or name.startswith("scatter")
            return "gathering" if name.startswith("gather") else "scattering"
        if own or frame.role != "dynamic" or _multiplies(func):
            frame.computed = frame.computed or frame.planned
            return "computing"
        if not frame.planned:
            return "deciding"
        return "gathering" if name in _GATHERS or not frame.computed else "scattering"

    def _follow(self, t: Tensor) -> None:
        try:
            storage = t.untyped_storage()
        except (RuntimeError, NotImplementedError):  # a tensor without storage
            return
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def dead(_: Any) -> None:
            if self._storages.pop(key, None) is not None:
                self.alive -= size

        self._storages[key] = weakref.ref(storage, dead)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def hold(self, tensors: list[Tensor]) -> None:
        """Tensors that were there before."""
        for t in tensors:
            self._follow(t)
        self.peak = self.alive

    def finish(self) -> dict[str, int]:
        """Nanoseconds of each stage; what was left to ask the device for is asked."""
        if self._events:
            torch.cuda.synchronize()
        for stage, start, end in self._events:
            self.ns[stage] += int(start.elapsed_time(end) * 1e6)
        self.bytes += sum(grouped.bytes() for grouped in self._grouped)
        self._events, self._grouped = [], []
        return self.ns


def _size(t: Any) -> int:
    """Bytes of the numbers that a tensor shows, or of those behind it where it repeats them."""
    if not isinstance(t, Tensor) or t.layout != torch.strided:
        return 0
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


class _Grouped(NamedTuple):
    """What an op on a plan reads of its weights and rows: the groups that have slots, and a row for each slot."""

    offsets: Tensor
    weights: int
    rows: int
    row: int

    def bytes(self) -> int:
        used = float((self.offsets[1:] != self.offsets[:-1]).double().mean())
        return int(used * self.weights) + min(self.rows, int(self.offsets[-1])) * self.row


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, _Grouped | None]:
    """Bytes that one op reads and writes, and those that its plan decides."""
    if isinstance(func, HigherOrderOperator):
        return sum(map(_size, pytree.tree_leaves((args, kwargs, out)))), None
    schema = func._schema
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return 0, None  # a view
    name = schema.name.partition("::")[2]
    if "empty" in name:
        return 0, None
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    offsets, grouped = given.get("offsets"), None
    if schema.name.startswith("dyncore::") and isinstance(offsets, Tensor) and not name.endswith("_backward"):
        weights = sum(_size(given.pop(key, None)) for key in _WEIGHTS)
        x = given.pop("x", None)
        rows, row = (x.shape[0], x.shape[-1] * x.element_size()) if isinstance(x, Tensor) else (0, 0)
        grouped = _Grouped(offsets, weights, rows, row)
    return sum(map(_size, pytree.tree_leaves((list(given.values()), out)))), grouped


@contextmanager
def _roles(module: Callable[..., Any], watch: _Watch) -> Generator[None]:
    """Keeps the watch's frames while the module runs."""
    if not isinstance(module, nn.Module):
        yield
        return
    layers = list(module.named_modules())
    gates = {
        id(part)
        for _, layer in layers
        if isinstance(layer, DynamicLayer)
        for name in _GATES
        if isinstance(part := getattr(layer, name, None), nn.Module)
    }
    gates |= {id(p) for _, layer in layers if id(layer) in gates for p in layer.children()}  # of a list of them

    def before(name: str, layer: nn.Module) -> None:
        role = "gate" if id(layer) in gates else "dynamic" if isinstance(layer, DynamicLayer) else "plain"
        watch.frames.append(_Frame(name, role))

    def after(name: str, layer: nn.Module, output: Any) -> None:
        done = watch.frames.pop()
        while done.name != name:  # forwards that were broken off
            done = watch.frames.pop()
        if watch.frames and done.role != "gate":
            watch.frames[-1].computed = watch.frames[-1].planned

    with hooked(layers, before, after):
        yield


def _unwatched(call: Call) -> int:
    """Nanoseconds of a call."""
    wait = torch.cuda.synchronize if call.device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter_ns()
    kept = call()
    wait()
    elapsed = time.perf_counter_ns() - start
    del kept
    return elapsed


def profile(call: Call, runs: int = 3) -> Profile:
    """A profile of a call: of some runs after a first one, in turn with as many that nobody watches, whose time is that
    of the whole call. What torch.compile compiled runs eagerly."""
    cuda = call.device.type == "cuda"
    held = [*pytree.tree_leaves((call.args, call.kwargs))]
    if isinstance(call.module, nn.Module):
        held += [*call.module.parameters(), *call.module.buffers()]
    found: list[_Watch] = []
    whole: list[int] = []
    for _ in range(runs + 1):
        watch = _Watch(cuda)
        watch.hold([t for t in held if isinstance(t, Tensor)])
        before = watch.alive
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if runs:
                whole.append(seeded(_unwatched, call))
            stack.enter_context(_roles(call.module, watch))
            stack.enter_context(watch)
            result = seeded(call)
        watch.finish()
        watch.peak -= before
        del result
        found.append(watch)
    ns = {stage: statistics.median(w.ns[stage] for w in found[min(1, runs) :]) for stage in STAGES}
    ns[CALLING] = max(0.0, statistics.median(whole[1:]) - sum(ns.values())) if runs else 0.0
    total = sum(ns.values()) or 1.0
    last = found[-1]
    return Profile({stage: t / total for stage, t in ns.items()}, last.bytes, last.peak, last.ops)
