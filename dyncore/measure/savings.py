"""savings: FLOPs and wall clock of a dynamic module, skipping for real, against what would be computed without it.

The wall clock of a network is what its user pays; FLOPs are what the papers report. The ratio of the two speed-ups
says what a saved FLOP was worth.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from dyncore.measure import baselines as rivals
from dyncore.measure import on_gpu
from dyncore.measure.calls import (
    Call,
    Result,
    difference,
    failure,
    first_difference,
    preserved,
    seeded,
    several,
    tensors,
    title,
    told,
)
from dyncore.measure.ceilings import Ceilings, ceilings
from dyncore.measure.energy import NoMeter, joules
from dyncore.measure.environment import OtherWork, timing_warnings
from dyncore.measure.flops import Flops, flops
from dyncore.measure.forcing import NotForced, forced
from dyncore.measure.masked_layers import masked_layers
from dyncore.measure.naive import PlainOps
from dyncore.measure.savings_record import (
    GateSweep,
    Savings,
    SavingsError,
    break_even,
    realised_saving,
    scaling_efficiency,
)
from dyncore.measure.stages import profile
from dyncore.measure.timing import Interleaved, Timing, ratio_interval, timer
from dyncore.nn.base import DynamicLayer
from dyncore.nn.sparse_mlp import SparseLinear, SparseMLP

__all__ = ["Savings", "SavingsError", "break_even", "realised_saving", "savings", "scaling_efficiency"]

BASELINES = ("dense", "masked", "naive", "smaller")
_KEEP = (0.1, 0.25, 0.5, 0.75, 1.0)
_SAMPLES = 8  # whose latency is taken one by one
_SURE = 0.02  # half the width of the interval of the speed-up at which timing stops before twice its seconds
_ROUNDS = 1000
_CAUSES = (
    "no saving is reported on wrong numbers. The usual causes: dropout in training mode; a module that mixes rows, "
    "such as BatchNorm or a block without positions=/live="
)


def _compiled(module: object) -> bool:
    if not isinstance(module, nn.Module):
        return hasattr(module, "_torchdynamo_orig_callable")
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())


class _Measuring:
    """One call of savings, which fills the fields of a `Savings` one after the other."""

    def __init__(self, call: Call, names: Sequence[str], seconds: float, min_rounds: int, cold: bool) -> None:
        self.call, self.names, self.seconds, self.min_rounds = call, names, seconds, min_rounds
        self.cold = cold
        self.calls: dict[str, Call] = {"sparse": call}
        self.compiled: bool = _compiled(call.module)
        self.fields: dict[str, Any] = {}
        self.flops: dict[str, Flops] = {}
        self.made: dict[str, str] = {}
        self.unavailable: dict[str, str] = {}
        self.notes: list[str] = []
        self.warnings: list[str] = timing_warnings(load=False)
        self.errors: list[dict[str, str]] = []
        self.interrupted: bool = False

    def refuse(self, message: str, error: BaseException | None = None) -> SavingsError:
        self.errors.append({"point": "module", "variant": "sparse", "message": message})
        parts = ("flops", "made", "unavailable", "notes", "warnings", "errors")
        refused = SavingsError(message, {name: getattr(self, name) for name in parts})
        refused.__cause__ = error
        return refused

    def attempt(self, point: str, measure: Callable[[], None]) -> None:
        """A part whose failure leaves the others."""
        try:
            measure()
        except Exception as error:
            self.unavailable[point] = told(error)
            self.errors.append({"point": point, "variant": "sparse", "message": told(error)})

    # What is compared ------------------------------------------------------------------------------------------------

    def check(self, tolerance: float | None) -> None:
        """That the module runs, and gives in "sparse" what it gives in "masked"; then the other baselines."""
        given = [t for t in tensors((self.call.args, self.call.kwargs)) if not t.is_inference()]
        before = [(t, t._version, t.detach().clone()) for t in given]
        try:
            with preserved(self.call.module):
                sparse: Result = seeded(self.call)
        except Exception as error:
            raise self.refuse(f"module: {failure(self.call, error)}", error) from error
        changed = [(t, value) for t, version, value in before if t._version != version]
        for t, value in changed:
            t.data.copy_(value)
        if changed:
            raise self.refuse(
                "module: it changes its input in place, and no two calls are alike; let it work on a clone"
            )
        self.flops["sparse"] = self.count(self.call)
        if not sparse.values:
            self.notes.append("the module returns no tensors that are known of: its numbers are not compared")
        self.masked(sparse, tolerance)
        makers = {"dense": self.dense, "naive": lambda: self.naive(sparse, tolerance), "smaller": self.smaller}
        for name in ("dense", "naive", "smaller"):
            if name in self.names and name not in self.calls:
                try:
                    makers[name]()
                    seeded(self.calls[name])
                    self.flops[name] = self.count(self.calls[name])
                except rivals.NoBaseline as error:
                    self.unavailable[name] = str(error)
                except Exception as error:
                    self.unavailable[name] = f"it {failure(self.calls.get(name, self.call), error)}"
                if name in self.unavailable:
                    self.calls.pop(name, None)
                    self.made.pop(name, None)
        if "masked" not in self.names and "dense" in self.calls:  # it was there for its numbers alone
            for kept in (self.calls, self.flops, self.made):
                kept.pop("masked", None)

    def given(self, dense: Callable[..., Any]) -> None:
        call = self.call.of(dense, "auto")
        try:
            self.flops["dense"] = self.count(call)
        except Exception as error:
            raise self.refuse(f"dense: {failure(call, error)}", error) from error
        self.calls["dense"], self.made["dense"] = call, "as given"

    def masked(self, sparse: Result, tolerance: float | None) -> None:
        call = dataclasses.replace(self.call, mode="masked")
        try:
            with preserved(call.module):
                masked: Result = seeded(call)
        except Exception as error:
            message = f"masked execution {failure(call, error)}"
            self.unavailable["masked"] = message
            self.errors.append({"point": "module", "variant": "masked", "message": message})
            return
        why = difference(sparse, masked, leaves=list(self.call.leaves()), tolerance=tolerance)
        if why:
            what, _, how = why.partition(" differs: ")
            layer = first_difference(self.call, call, tolerance)
            first = f" (the first layer to differ: {layer})" if layer else ""
            where = f"{what} differs between sparse and masked execution{first}: {how}" if how else f"{why}{first}"
            raise self.refuse(f"module: {where}; {_CAUSES}")
        self.calls["masked"] = call
        self.flops["masked"] = self.count(call)
        self.made["masked"] = "everything computed, then multiplied by 0 or 1"

    def count(self, call: Call) -> Flops:
        def run(_: object) -> Result:
            return call()

        # as a method of the module, so that its layers are named
        with preserved(call.module):
            return seeded(flops, types.MethodType(run, call.module) if isinstance(call.module, nn.Module) else call)

    def dense(self) -> None:
        if self.compiled:
            raise rivals.NoBaseline("the module is compiled: give its compiled dense twin as dense=")
        self.calls["dense"], self.made["dense"] = rivals.dense(self.call)

    def naive(self, sparse: Result, tolerance: float | None) -> None:
        if self.compiled:
            raise rivals.NoBaseline("the module is compiled, and so are the ops in it")
        plain = PlainOps()
        call = dataclasses.replace(self.call, around=plain)
        with preserved(call.module):
            result: Result = seeded(dataclasses.replace(call, around=plain.counting))
        if not plain.used:
            module = self.call.module
            dynamic = isinstance(module, nn.Module) and any(isinstance(m, DynamicLayer) for m in module.modules())
            raise rivals.NoBaseline(
                "it skips by index_select already, as one does in plain PyTorch"
                if dynamic
                else "the module calls no op of dyncore that plain PyTorch would do in another way"
            )
        why = difference(result, sparse, loose=True, tolerance=tolerance)
        if why:
            raise rivals.NoBaseline(f"the ops in plain PyTorch give other numbers: {why}")
        self.calls["naive"] = call
        self.made["naive"] = "the same skipping in plain PyTorch: index_select, loops over groups, index_add"

    def smaller(self) -> None:
        twin = self.calls.get("dense")
        if twin is None:
            raise rivals.NoBaseline("there is no dense twin to make it of")
        total, want = int(self.flops["dense"]), int(self.flops["sparse"])
        self.calls["smaller"], self.made["smaller"] = rivals.smaller(twin, total, want)

    # What is measured ------------------------------------------------------------------------------------------------

    @property
    def baseline(self) -> str:
        return "dense" if "dense" in self.calls else "masked"

    def time(self) -> dict[str, Timing]:
        """By name. Interrupted, those of the rounds until then, if there was one."""
        times, others = timer(self.calls, self.call.device, cold=self.cold), OtherWork()
        try:
            self.rounds(times)
        except KeyboardInterrupt:
            if not times.rounds:
                raise
            self.interrupted = True
        warning = others.warning()
        self.warnings += [] if warning is None else [warning]
        # a round that was broken off has samples of some
        return {name: Timing(timing.samples_ns[: times.rounds]) for name, timing in times.timings().items()}

    def rounds(self, times: Interleaved) -> None:
        options = {"min_rounds": self.min_rounds, "max_rounds": max(_ROUNDS, self.min_rounds)}
        timings = times.run(seconds=self.seconds, limit=10 * self.seconds, **options)
        for _ in range(2):
            interval = ratio_interval(timings[self.baseline], timings["sparse"])
            if interval is None or interval[1] - interval[0] <= _SURE * sum(interval) or self.seconds < 0.1:
                break
            timings = times.run(seconds=self.seconds / 2, limit=0.0, warm_up=0, **options)

    def sweep(self) -> None:
        """Over forced shares, in the same rounds as the baseline."""
        module = self.call.module
        if not isinstance(module, nn.Module):
            raise NotForced("a callable that is no module has no gates to force")
        if self.compiled:
            raise NotForced("the module is compiled, and so are its gates")
        calls, shares = {"baseline": self.calls[self.baseline]}, dict[str, float]()
        for keep in _KEEP:
            twin, share = forced(module, keep)
            if share not in shares.values():
                shares[f"{keep:g}"] = share
                calls[f"{keep:g}"] = self.call.of(twin)
        times = timer(calls, self.call.device, cold=self.cold)
        rounds = min(self.min_rounds, 5)
        found = times.run(seconds=self.seconds / 2, min_rounds=rounds, max_rounds=300, limit=5 * self.seconds)
        self.fields["sweep"] = GateSweep(
            tuple(shares.values()), tuple(found[name] for name in shares), found["baseline"]
        )

    def stages(self) -> None:
        found = profile(self.call)
        self.fields |= {"stages": found.stages, "bytes": found.bytes}
        self.fields["peak_bytes"] = peaks = {}
        for name in ("sparse", self.baseline):
            if self.call.device.type == "cuda":
                peaks[name] = on_gpu.peak_bytes(self.calls[name])
            else:
                peaks[name] = (found if name == "sparse" else profile(self.calls[name], runs=0)).peak_bytes
        kinds = (DynamicLayer, SparseLinear, SparseMLP)
        module = self.call.module
        known = isinstance(module, nn.Module) and any(isinstance(m, kinds) for m in module.modules())
        if not (known or found.ops):
            self.notes.append("nothing in it is dynamic: it calls no op of dyncore, and there is nothing to skip")

    def ceilings(self) -> None:
        found: Ceilings = ceilings(self.call.device, self.call.dtype)
        self.fields["ceilings"] = found

    def batch_1(self) -> None:
        inputs = tensors((self.call.args, self.call.kwargs))
        size = inputs[0].shape[0] if inputs and inputs[0].dim() else 0
        if size < 2:
            self.unavailable["batch_1"] = "the batch is one sample already" if size else "there is no batch to cut"
            return
        count = min(size, _SAMPLES)
        calls = {
            name: [self.calls[name].first_samples(1, start=i) for i in range(count)]
            for name in ("sparse", self.baseline)
        }
        try:
            for cut in calls.values():
                seeded(cut[0])  # type: ignore[arg-type]
        except Exception as error:
            self.unavailable["batch_1"] = f"one sample alone fails: {told(error)}"
            return

        def run(call: Call) -> Result:
            return call()

        def sample(name: str, round: int) -> tuple[Any, ...]:
            return (calls[name][round % count],)

        times = timer(dict.fromkeys(calls, run), self.call.device, sample, cold=self.cold)
        rounds = min(self.min_rounds, 5)
        self.fields["batch_1"] = times.run(seconds=self.seconds / 4, min_rounds=rounds, limit=5 * self.seconds)

    def energy(self) -> None:
        inputs = tensors((self.call.args, self.call.kwargs))
        size = max(1, inputs[0].shape[0]) if inputs and inputs[0].dim() else 1
        names = ("sparse", self.baseline)
        found = {name: joules(self.calls[name], self.call.device, self.seconds / 4) for name in names}
        self.fields["joules"] = {name: each / size for name, each in found.items()}

    def masks(self) -> None:
        """Layers that look dynamic and are not; those with as large a share in one sentence."""
        module = self.call.module
        groups: dict[tuple[str, str], list[str]] = {}
        for masked in masked_layers(self.call):
            assert isinstance(module, nn.Module)
            outer = [masked.layer.rsplit(".", k)[0] for k in range(masked.layer.count(".") + 1)]
            if any(isinstance(module.get_submodule(name), DynamicLayer) for name in (*outer, "")):
                continue
            share = 1 - float(masked.mask.double().mean())
            layer = title(masked.layer, module.get_submodule(masked.layer))
            groups.setdefault((f"{share:.0%}", masked.what), []).append(layer)
        for (share, what), layers in groups.items():
            one = len(layers) == 1
            self.notes.append(
                f"{several(layers)} compute{'s' * one} every {what[:-1]}, "
                f"and a mask then makes 0 of {share} of them: {'its' if one else 'their'} FLOP speed-up is 1.0 "
                f"and {'it saves' if one else 'they save'} nothing (dyncore audit says which line of code would)"
            )

    def run(self, details: bool) -> Savings:
        self.attempt("masks", self.masks)
        timings = self.time()
        try:
            if details and not self.interrupted:
                self.details()
        except KeyboardInterrupt:
            self.interrupted = True
        if self.interrupted:
            self.warnings.append("interrupted: what is missing here was not measured")
        return Savings(
            dict(self.flops),
            timings,
            self.baseline,
            about=self.about(),
            made=self.made,
            unavailable=self.unavailable,
            notes=self.notes,
            uncounted=self.flops["sparse"].uncounted,
            warnings=self.warnings,
            errors=self.errors,
            **self.fields,
        )

    def details(self) -> None:
        """What stands beside the ratios."""
        try:
            self.sweep()
        except NotForced as error:
            self.unavailable["break_even"] = str(error)
        except Exception as error:
            self.unavailable["break_even"] = f"with gates forced open at random it fails: {told(error)}"
        self.attempt("stages", self.stages)
        self.attempt("ceilings", self.ceilings)
        self.attempt("batch_1", self.batch_1)
        try:
            self.energy()
        except NoMeter as error:
            self.unavailable["joules"] = str(error)
        if self.call.device.type == "cuda":
            self.attempt("host_syncs", self.host_syncs)

    def host_syncs(self) -> None:
        self.fields["host_syncs"] = on_gpu.host_syncs(self.call)

    def about(self) -> dict[str, Any]:
        module = self.call.module
        return {
            "name": type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", "callable"),
            "dtype": str(self.call.dtype).removeprefix("torch."),
            "device": str(self.call.device),
            "phase": "forward+backward" if self.call.backward else "forward",
            "threads": torch.get_num_threads(),
            "cold": self.cold,
        }


def savings(
    module: Callable[..., Any],
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    dense: Callable[..., Any] | None = None,
    baselines: Sequence[str] = BASELINES,
    backward: bool = False,
    seconds: float = 2.0,
    min_rounds: int = 5,
    tolerance: float | None = None,
    cold: bool | None = None,
    details: bool = True,
) -> Savings:
    """FLOPs and wall clock of `module` on `inputs`, skipping for real, against what would be computed without it.

    Args:
        module: a module or another callable made of dyncore's layers and ops, compiled or not; its FLOPs are then those
            of eager code, as `flops` says, its times those of the compiled.
        inputs, kwargs: what it is called with; the first dimension of tensors is that of samples.
        dense: its dense twin, called with the same; made of the module where it is None and layers of dyncore.nn can be
            replaced by plain ones. The ratios are against it, or else against "masked".
        baselines: which of
            "masked": everything computed, then multiplied by 0 or 1;
            "dense": the dense twin;
            "naive": the same skipping in plain PyTorch;
            "smaller": a static dense network of as many FLOPs as were executed: the dense twin with narrower MLPs, or
            on fewer samples or positions where that does not do.
            One that cannot be made is in `unavailable`, with the reason.
        backward: time forward and backward (gradients of parameters and of inputs that require them) instead of
            forward without gradients.
        seconds, min_rounds: of the timing, as in Interleaved.run; `seconds` is above 0. Where the ratio is not known to
            2% then, it takes twice as long.
        tolerance: largest error over max(rms, |value|) at which the modes agree; by default that of one op in the
            module's dtype, which a deep network in 16 bits may exceed.
        cold: whether caches are swept before each sample, so that weights come from memory as in a deep model; None: on
            a GPU, but not on a CPU, where a module runs in the caches that it finds.
        details: whether the break-even, stages, ceilings, memory, latency and energy are measured, too, which takes
            about as long again.

    Raises SavingsError (a ValueError) if the module fails, naming the layer that does, or if sparse and masked
    execution disagree, naming the first layer that does (no saving is reported on wrong numbers), or if Ctrl-C comes
    before each execution was timed; its `partial` has what was found. Ctrl-C later ends the measuring: what is there by
    then is returned. What fails besides is in the record's `errors`. Raises ValueError if `seconds` is not above 0 or a
    baseline is unknown, TypeError if `module` or `dense` cannot be called.
    """
    for name, fn in (("module", module), ("dense", dense)):
        if not callable(fn) and not (name == "dense" and fn is None):
            raise TypeError(f"{name}: expected a module or another callable, got {type(fn).__name__}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds}")
    if isinstance(baselines, str) or any(name not in BASELINES for name in baselines):
        raise ValueError(f"baselines: expected some of {', '.join(BASELINES)}, got {baselines!r}")
    call = Call(module, inputs, dict(kwargs or {}), "sparse", backward)
    device = call.device
    measuring = _Measuring(call, baselines, seconds, min_rounds, device.type == "cuda" if cold is None else cold)
    with ExitStack() as stack:
        stack.enter_context(preserved(module))
        stack.enter_context(preserved(dense))
        stack.enter_context(torch.cuda.device(device) if device.type == "cuda" else nullcontext())
        try:
            if dense is not None:
                measuring.given(dense)
            measuring.check(tolerance)
            if measuring.baseline not in measuring.calls:
                raise measuring.refuse(f"module: nothing to compare with: {measuring.unavailable}")
            return measuring.run(details)
        except KeyboardInterrupt as error:
            raise measuring.refuse("module: interrupted before each execution was timed", error) from error
