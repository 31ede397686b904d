"""audit: what dyncore could do for a model and what its dynamic layers do, layer by layer, measured on given inputs."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyncore import break_even
from dyncore.audit.candidates import ROOT, Candidate, candidates
from dyncore.audit.findings import Audit, Layer
from dyncore.audit.loading import Failed, Inputs, as_inputs, place_of
from dyncore.audit.masked import masked_run
from dyncore.audit.mixtures import moe_run
from dyncore.audit.watching import Call, evaluating, watch
from dyncore.execution import execution
from dyncore.measure.activation_sparsity import activation_sparsity
from dyncore.measure.agreement import VALUES, disagreement
from dyncore.measure.calls import first_tensor, tensors
from dyncore.measure.environment import timing_warnings
from dyncore.measure.flops import flops
from dyncore.measure.masked_layers import Masked
from dyncore.measure.records import new_results
from dyncore.measure.sparsity_statistics import LayerSparsity
from dyncore.measure.timing import Interleaved, Timing

_BINS = 20  # of a histogram of zeros
_DEEP = 10  # rounding adds up over a model: its outputs may differ by so many times what one op's may

Run = Callable[[], Any]


@contextmanager
def _countable() -> Generator[None]:
    """Torch's fused transformer layers, which no counter sees into, take their plain path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Auditing:
    """One audit, whose `layers` are filled one after the other."""

    def __init__(self, model: nn.Module, inputs: Inputs, seconds: float, progress: Callable[[str], None]) -> None:
        self.model, self.inputs, self.seconds, self.progress = model, inputs, seconds, progress
        self.layers: list[Layer] = []
        self.notes: list[str] = []
        self.errors: list[dict[str, str]] = []
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.about: dict[str, Any] = {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": "no parameters" if first is None else str(first.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "inputs": str(inputs),
        }

    def fail(self, point: str, error: BaseException | str) -> None:
        message = error if isinstance(error, str) else place_of(error)
        self.errors.append({"point": point, "variant": "replaced", "message": message})

    def run(self) -> None:
        try:
            twin = copy.deepcopy(self.model)
        except Exception as error:  # whatever a model holds that cannot be copied
            self.fail(ROOT, f"cannot be copied, so that nothing was replaced: {place_of(error)}")
            twin = None
        found = [] if twin is None else candidates(self.model, twin, self.notes)
        self.layers = [c.layer for c in found]
        self.progress("a first forward")
        try:
            calls, masked, output = watch(self.model, self.inputs, {c.path for c in found})
        except Failed as error:
            self.fail(ROOT, str(error).removeprefix("model: "))
            return
        if not tensors(output):
            self.notes.append(
                f"the model returns {type(output).__name__} without tensors: its numbers are not compared"
            )
        more = [masked_run(self.model, m, self.inputs, _parallel(masked, m)) for m in masked]
        self._add([layer for layer, _ in more])
        sparsity = {} if twin is None else self._sparsity(twin)
        with _countable():
            counted = flops(self.inputs.call, self.model)
        self.about["flops"] = {"now": int(counted)}
        self.about["uncounted"] = dict(counted.uncounted)
        if counted.uncounted:
            names = ", ".join(f"{name} x{count}" for name, count in counted.uncounted.items())
            self.notes.append(f"not counted, for nobody knows their FLOPs: {names}")
        if not self.about["flops"]["now"]:
            self.notes.append("no FLOPs were counted: the model has no matrix products, or ops that torch cannot count")
        for candidate in found:
            self._one(candidate, twin, calls.get(candidate.path), sparsity)
        for layer, runs in more:
            self.progress(layer.name)
            if runs is not None:
                self._measure(layer, *runs)
                layer.judge()
        if twin is not None:
            self._whole(twin, output)

    def _add(self, more: list[Layer]) -> None:
        """Into the order of the model, instead of what is said of the same layer without having run it."""
        names = {layer.name for layer in more}
        self.layers = [layer for layer in self.layers if layer.kind != "other" or layer.name not in names] + more
        order = {name or ROOT: i for i, (name, _) in enumerate(self.model.named_modules())}
        self.layers.sort(key=lambda layer: order.get(layer.name, 0))

    def _sparsity(self, twin: nn.Module) -> dict[str, LayerSparsity]:
        self.progress("the zeros of its activations")
        try:
            return activation_sparsity(twin, [self.inputs], call=lambda inputs: inputs.call(twin)).layers
        except Exception as error:
            self.fail(ROOT, f"zeros could not be counted: {place_of(error)}")
            return {}

    def _one(
        self, found: Candidate, twin: nn.Module | None, call: Call | None, zeros: dict[str, LayerSparsity]
    ) -> None:
        layer = found.layer
        self.progress(layer.name)
        if call is None or call.count == 0:
            layer.why_not = layer.why_not or "these inputs do not reach it"
            return
        layer.calls = call.count
        layer.input = "-" if call.x is None else f"{list(call.x.shape)} {str(call.x.dtype).removeprefix('torch.')}"
        module = self.model.get_submodule(found.path)
        now: Run = lambda: call.inputs.call(module)  # noqa: E731
        if found.way == "none" or twin is None:
            with _countable():
                layer.flops["now"] = flops(now)
            return
        prefix = f"{found.path}." if found.path else ""
        of = zeros.get(found.path) or next((s for n, s in zeros.items() if n.startswith(prefix)), None)
        if of is not None and (layer.kind == "relu" or layer.what.startswith("skips zeros")):
            self._zeros(layer, of, call)
        if found.way == "modes":
            self._measure(layer, _in_mode(now, "masked"), now)
            cost = getattr(module, "last_cost", None)
            if isinstance(cost, Tensor) and cost.numel():
                layer.density = float(cost.float().mean())
        elif found.way == "moe":
            run = moe_run(found, module, twin, call)
            if run is not None:
                self._measure(layer, now, run)
        else:
            other = twin.get_submodule(found.path)
            if layer.kind == "moe":
                _routing(layer, module, call)
            self._measure(layer, now, lambda: call.inputs.call(other))
        layer.judge()

    def _zeros(self, layer: Layer, zeros: LayerSparsity, call: Call) -> None:
        x = call.x
        rows = x.numel() // x.shape[-1] if x is not None and x.dim() else 1
        layer.density = 1 - zeros.zero_fraction
        layer.break_even = min(1.0, zeros.products.dense_from(rows))
        layer.estimated = dict(zeros.verdict.speedups)
        layer.sparsity = {**zeros.record(), "histogram": _histogram(zeros)}

    def _measure(self, layer: Layer, now: Run, replaced: Run) -> None:
        """FLOPs, whether both give the same numbers, and their times."""
        try:
            want, got = first_tensor(_seeded(now)), first_tensor(_seeded(replaced))
            with _countable():
                layer.flops = {"now": flops(now), "replaced": flops(replaced)}
            if want is not None and got is not None:
                why = disagreement(got, want)
                if why is not None:
                    self.fail(layer.name, f"the numbers now and replaced differ: {why}")
                    layer.why_not = "its numbers would change, so that no time is given"
                    return
            layer.timings = self._time({"now": now, "replaced": replaced})
        except Exception as error:  # one layer's failure leaves the others
            self.fail(layer.name, error)
            layer.why_not = layer.why_not or f"it failed: {place_of(error)}"

    def _time(self, runs: dict[str, Run]) -> dict[str, Timing]:
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else None
        return Interleaved(runs, synchronize=synchronize).run(
            seconds=self.seconds, min_rounds=5, limit=10 * self.seconds
        )

    def _whole(self, twin: nn.Module, output: Any) -> None:
        """The model as it is against the one in which all is replaced."""
        now: Run = lambda: self.inputs.call(self.model)  # noqa: E731
        replaced: Run = lambda: self.inputs.call(twin)  # noqa: E731
        swaps = [layer for layer in self.layers if layer.how is not None and layer.kind in ("relu", "moe")]
        self.progress(ROOT)
        try:
            if not swaps:
                self.about["timings"] = self._time({"now": now})
                return
            for i, (want, got) in enumerate(zip(tensors(output), tensors(replaced()), strict=True)):
                why = disagreement(got, want, tolerance=_DEEP * VALUES.get(got.dtype, 0.0))
                if why is not None:
                    self.fail(ROOT, f"output {i} now and replaced differs: {why}; no time is given")
                    return
            with _countable():
                self.about["flops"]["replaced"] = flops(replaced)
            self.about["timings"] = self._time({"now": now, "replaced": replaced})
        except Exception as error:
            self.fail(ROOT, error)


def _parallel(masked: list[Masked], one: Masked) -> list[str]:
    """Other masked layers of the same nn.ModuleList or the like."""
    parent = one.layer.rpartition(".")[0]
    return [m.layer for m in masked if m is not one and m.layer.rpartition(".")[0] == parent]


def _seeded(run: Run) -> Any:
    """Its result with the random state of every other run: gates may draw."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run()


def _in_mode(run: Run, mode: str) -> Run:
    def inside() -> Any:
        with execution(mode):
            return run()

    return inside


def _routing(layer: Layer, module: Any, call: Call) -> None:
    """The share of the experts that a row takes, from the indices [T, K] that they are called with."""
    index = next((t for t in tensors((call.inputs.args, call.inputs.kwargs)) if not t.is_floating_point()), None)
    weights = [p for p in module.parameters() if p.dim() == 3]
    if index is None or index.dim() != 2 or not weights:
        return
    layer.density = min(1.0, index.shape[1] / weights[0].shape[0])
    edge = break_even.masked_from(index.device.type, "grouped_mlp", index.shape[0], weights[:2])
    layer.break_even = min(1.0, edge)


def _histogram(zeros: LayerSparsity) -> list[int]:
    """Tokens by their share of zeros, in bins of equal width from 0 to 1."""
    active = torch.arange(zeros.tokens.shape[0])
    share = 1 - active.double() / zeros.neurons
    bins = (share * _BINS).long().clamp(max=_BINS - 1)
    return torch.zeros(_BINS, dtype=torch.int64).index_add(0, bins, zeros.tokens.long()).tolist()


def audit(
    model: nn.Module,
    inputs: Any,
    *,
    seconds: float = 0.3,
    progress: Callable[[str], None] | None = None,
    command: str = "dyncore.audit.audit",
) -> Audit:
    """What dyncore could replace in a model and what its dynamic layers do, measured on these inputs, in evaluation.

    Found are ReLU MLPs (as `convert.relu_sparse` finds them, with their zeros), mixtures of experts (experts of
    transformers, and loops over a ModuleList beside a router), layers whose outputs a mask of rows multiplies, and
    dyncore's own dynamic layers. A copy of the model holds what would take their place: each layer runs in both on the
    arguments that it has in the model, and must give the same numbers. The model itself is left as it was.

    Args:
        inputs: a tensor, a tuple or list of arguments or a mapping of keyword arguments of `model`.
        seconds: of the timing of each layer, and of the model; above 0.
        progress: called with what is done next.
        command: for the record.

    What torch.compile compiled runs eagerly. What fails is in the audit's `errors`; everything else stands. Ctrl-C ends
    it, and the layers measured so far stand.

    Raises TypeError where `model` is no module, ValueError where `seconds` is not above 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a number above 0, got {seconds}")
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        model = compiled
    auditing = _Auditing(model, _without_cache(model, as_inputs(inputs)), seconds, progress or (lambda _: None))
    if auditing.inputs.random:
        auditing.notes.append(
            "the inputs are random numbers: with data (--inputs batch.pt) other activations are zero, and rows take "
            "other ways"
        )
    if compiled is not None:
        auditing.notes.append("the model is compiled: this is of the module inside, run eagerly")
    results = new_results(command)
    results["warnings"] = timing_warnings()
    interrupted = False
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        try:
            auditing.run()
        except KeyboardInterrupt:
            interrupted = True
    return Audit(auditing.about, auditing.layers, auditing.notes, auditing.errors, interrupted, results)


def _without_cache(model: nn.Module, inputs: Inputs) -> Inputs:
    """A cache of keys and values would grow from one timed call to the next."""
    takes = model.forward.__code__.co_varnames if hasattr(model.forward, "__code__") else ()
    if hasattr(model, "config") and "use_cache" in takes and "use_cache" not in inputs.kwargs:
        return dataclasses.replace(inputs, kwargs={**inputs.kwargs, "use_cache": False})
    return inputs
