"""Timing for `make gpu`: ways interleaved, caches cold, medians; a way whose values are wrong is not timed.

A measurement is a function of arguments, a device and the seconds it may time; 0 seconds check alone, which compiles
every kernel.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import dyncore as dc
from benchmarks.gpu.cases import Case, Inputs
from benchmarks.gpu.reference import TOLERANCE, Reference, worst_error
from benchmarks.gpu.ways import CUBLAS_SIZE, Way, plan_makers, ways
from dyncore.measure.timing import Interleaved, InterleavedOnDevice

Record = dict[str, Any]
Call = Callable[[int], object]

ROUNDS = (5, 60)  # fewest and most samples of a way
REPLAYS = 20  # of a CUDA graph under the profiler

# Timing -----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(calls: Mapping[str, Call], sets: int, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, one sample each a round, the order and the buffers turning with the rounds."""
    kind = InterleavedOnDevice if device.type == "cuda" else Interleaved
    timer = kind(calls, arguments=lambda name, round: (round % sets,))
    timings = timer.run(seconds=seconds, min_rounds=ROUNDS[0], max_rounds=ROUNDS[1], warm_up=sets)
    return {name: [ns / 1e6 for ns in timing.samples_ns] for name, timing in timings.items()}


def captured(call: Call, sets: int, device: torch.device) -> Call:
    """The call as CUDA graphs, one for each set of buffers; on a CPU the call itself."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for i in range(sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(i)
        graphs.append(graph)
    return lambda i: graphs[i].replay()


def device_work(run: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel, copy and fill that `run` starts; of its operators on a CPU."""
    on_gpu = device.type == "cuda"
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = [(e["name"], float(e["dur"])) for e in events if e.get("cat") in kinds]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found


# Records ----------------------------------------------------------------------------------------------------------


def record(part: str, label: str, way: str, ms: Sequence[float], flops: int = 0, moved: int = 0, **more: Any) -> Record:
    """One line of results.json; rates are of the median."""
    median = statistics.median(ms)
    rates = {"tflops": flops / median / 1e9, "gbps": moved / median / 1e6}
    samples = {"ms": median, "samples_ms": list(ms)}
    return {"part": part, "label": label, "way": way, **samples, "flops": flops, **rates, **more}


def left_out(part: str, label: str, way: str, why: object) -> Record:
    return {"part": part, "label": label, "way": way, "left_out": str(why)[:400] or type(why).__name__}


# Measurements -----------------------------------------------------------------------------------------------------


def results_of(inputs: Inputs, way: Way) -> Callable[[int], list[torch.Tensor]]:
    """A way with its gradients, where the case has them."""

    def run(i: int) -> list[torch.Tensor]:
        out = way.run(i)
        if not (inputs.case.backward and way.same):
            return [out]
        return [out, *torch.autograd.grad(out, inputs.leaves(i), inputs.grad)]

    return run


def measure_case(case: Case, device: torch.device, seconds: float) -> list[Record]:
    records: list[Record] = []
    torch.compiler.reset()
    with dc.execution("sparse"), torch.set_grad_enabled(case.backward):
        inputs = Inputs(case, device)
        reference = Reference(inputs)
        found = ways(inputs)
        calls: dict[str, Call] = {}
        for name, way in found.items():
            run = results_of(inputs, way)
            try:
                error = reference.error(run(0)) if way.same else 0.0
                if not error <= TOLERANCE[case.dtype]:
                    records.append(left_out(case.part, case.label, name, f"wrong values: error {error:.2e}"))
                    continue
                calls[name] = captured(run, inputs.sets, device) if case.graph and seconds else run
            except Exception as failure:  # a rival that cannot do this, in whatever way it says so
                records.append(left_out(case.part, case.label, name, failure))
        if not seconds:
            return records
        about: Record = {
            "case": case.name,
            "slots": inputs.slots,
            "rows": case.rows,
            "sets": inputs.sets,
            "graph": case.graph,
        }
        for name, ms in interleave(calls, inputs.sets, device, seconds).items():
            own = found[name].flops
            flops = inputs.flops if own is None else own
            moved = 0 if case.backward or own is not None else inputs.bytes
            records.append(record(case.part, case.label, name, ms, flops, moved, **about))
    return records


def measure_peaks(quick: bool, device: torch.device, seconds: float) -> list[Record]:
    """The ceilings of this machine: a large product and a large copy, by PyTorch."""
    n, length = (64, 2**12) if quick else (CUBLAS_SIZE, 2**31)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(length, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    samples = interleave({"cublas": lambda i: a @ b, "copy": lambda i: target.copy_(source)}, 1, device, seconds)
    return [
        record("peaks", "product", "cublas", samples["cublas"], flops=2 * n**3, case=f"bfloat16 {n}^3"),
        record("peaks", "copy", "copy", samples["copy"], moved=2 * length, case=f"{length} bytes"),
    ]


def live(plan: dc.Plan) -> list[torch.Tensor]:
    """What of a plan is defined, on the CPU."""
    slots = int(plan.offsets[-1])
    parts = [plan.rows[:slots], plan.offsets, plan.row_offsets, plan.row_slots[:slots]]
    return [t.cpu() for t in parts + ([] if plan.scale is None else [plan.scale[:slots]])]


def _ignoring_the_set(make: Callable[[], object]) -> Call:
    return lambda i: make()


def measure_plans(quick: bool, device: torch.device, seconds: float) -> list[Record]:
    rows, records = 64 if quick else 16384, []
    makers, right = plan_makers(rows, device), plan_makers(rows, torch.device("cpu"))
    for name, make in makers.items():
        for got, want in zip(live(make()), live(right[name]()), strict=True):
            same = torch.allclose(got, want, rtol=1e-5) if want.is_floating_point() else torch.equal(got, want)
            if not same:
                records.append(left_out("plans", name, "dyncore", "wrong plan"))
                break
        else:
            calls: dict[str, Call] = {"dyncore": _ignoring_the_set(make)}
            calls["dyncore_graph"] = captured(calls["dyncore"], 1, device)
            if seconds:
                timed = interleave(calls, 1, device, seconds / len(makers))
                records += [record("plans", name, way, ms, case=f"T={rows}") for way, ms in timed.items()]
    return records


@torch.no_grad()
def measure_layer(rows: int, quick: bool, device: torch.device, seconds: float) -> list[Record]:
    """nn.MoE whole, router included: how many kernels a forward takes, and what its graph's replay adds to them."""
    label, sizes = f"T={rows}", (32, 48, 4, 2) if quick else (2048, 1024, 64, 8)
    torch.manual_seed(0)
    with torch.device(device):
        layer = dc.nn.MoE(*sizes).to(torch.bfloat16).eval()
        x = torch.randn(min(rows, 48) if quick else rows, sizes[0], dtype=torch.bfloat16)
    with dc.execution("masked"):
        want = layer(x[:64]).double()
    with dc.execution("sparse"):
        error = worst_error(layer(x)[:64], want)
        if not error <= TOLERANCE[torch.bfloat16]:
            return [left_out("layer", label, "dyncore", f"wrong values: error {error:.2e}")]
        calls: dict[str, Call] = {"dyncore": lambda i: layer(x)}
        calls["dyncore_graph"] = replay = captured(calls["dyncore"], 1, device)
        device_work(lambda: layer(x), device)  # the profiler's own start
        eager = device_work(lambda: layer(x), device)
        replayed = device_work(lambda: [replay(0) for _ in range(REPLAYS)], device)
        if not seconds:
            return []
        host = []
        for _ in range(ROUNDS[0] if quick else ROUNDS[1]):
            synchronize(device)
            start = time.perf_counter()
            layer(x)
            host.append(1e3 * (time.perf_counter() - start))
        timed = interleave(calls, 1, device, seconds)
    about: Record = {"case": f"nn.MoE{sizes} {label} bfloat16"}
    names: Record = {"kernels": len(eager), "kernel_names": [name for name, _ in eager]}
    inside: Record = {"kernels": len(replayed) / REPLAYS, "kernels_ms": sum(us for _, us in replayed) / REPLAYS / 1e3}
    return [
        record("layer", label, "dyncore", timed["dyncore"], **about, **names),
        record("layer", label, "dyncore_graph", timed["dyncore_graph"], **about, **inside),
        record("layer", label, "host", host, **about),
    ]
