"""`python -m benchmarks.gpu --out DIR [--part NAME]`: what `make gpu` runs on a machine with a CUDA device.

Runs the GPU tests, then measures the ops against their rivals in one run: interleaved, cold caches, medians; a way
whose values are wrong is not timed. Writes DIR/results.json with every sample, the logs, and DIR/dyncore-gpu.tar.gz
of them all, and prints a summary last. Takes less than nine minutes. On a CPU: --device cpu --quick, to try it out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dyncore as dc
from benchmarks.gpu_cases import CAPTURABLE, CASES, Call, Case, Inputs, error, plan_makers, ways

PARTS = ("tests", "peaks", "plans", "token_skip", "moe", "few_rows")
TEST_SECONDS = 200
SANITIZERS = ("memcheck", "racecheck", "initcheck")  # tools of compute-sanitizer, where it is installed
SANITIZED = "plan_ or any_strides"  # the tests that run under them
SANITIZER_SECONDS = 20  # of each
MEASURE_SECONDS = 270
ROUNDS = (5, 60)  # fewest and most samples of a way
# Worst error over max(rms, |reference|) above which a way counts as wrong. Rivals add up in bf16, hence the room.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Record = dict[str, Any]

# ---------------------------------------------------------------- timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Call], sets: int, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, one sample each a round, the order and the buffers turning with the rounds."""
    for call in calls.values():
        for i in range(sets):
            call(i)
    once = sum(time_once(lambda c=call: c(0), device) for call in calls.values())
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(once, 1e-6))))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                calls[name](r % sets)
                end.record()
                pairs.append((name, start, end))
            else:
                samples[name].append(1e3 * time_once(lambda n=name, r=r: calls[n](r % sets), device))
    synchronize(device)
    for name, start, end in pairs:
        samples[name].append(start.elapsed_time(end))
    return samples


def captured(call: Call, sets: int) -> Call:
    """The call as CUDA graphs, one for each set of buffers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for i in range(sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(i)
        graphs.append(graph)
    return lambda i: graphs[i].replay()


# ---------------------------------------------------------------- measurements


def record(case: str, part: str, way: str, ms: Sequence[float], flops: int = 0, moved: int = 0, **more: Any) -> Record:
    """One line of results.json; rates are of the median."""
    median = statistics.median(ms)
    rates = {"tflops": flops / median / 1e9, "gbps": moved / median / 1e6}
    return {
        "part": part,
        "case": case,
        "way": way,
        "ms": median,
        "samples_ms": list(ms),
        "flops": flops,
        **rates,
        **more,
    }


def left_out(case: str, part: str, way: str, why: object) -> Record:
    return {"part": part, "case": case, "way": way, "left_out": str(why)[:400]}


def measure_ways(
    name: str, part: str, calls: Mapping[str, Call], sets: int, device: torch.device, seconds: float, graph: bool,
    **figures: Any,
) -> list[Record]:  # fmt: skip
    if graph and device.type == "cuda":
        calls = {way: captured(call, sets) for way, call in calls.items()}
    samples = interleave(calls, sets, device, seconds)
    return [record(name, part, way, ms, graph=graph, sets=sets, **figures) for way, ms in samples.items()]


def measure_case(case: Case, device: torch.device, seconds: float) -> list[Record]:
    inputs = Inputs(case, device)
    records, right = [], {}
    for way, call in ways(inputs).items():
        try:
            out = call(0)
            wrong = 0.0 if way == "dense" else error(inputs, out)
        except Exception as failure:  # a rival that cannot do this, in whatever way it says so
            records.append(left_out(case.name, case.part, way, failure))
            continue
        if not wrong <= TOLERANCE[case.dtype]:
            records.append(left_out(case.name, case.part, way, f"wrong values: error {wrong:.2e}"))
        elif case.graph and way not in CAPTURABLE:
            records.append(left_out(case.name, case.part, way, "waits for the device: no CUDA graph holds it"))
        else:
            right[way] = call
    figures = {"flops": inputs.flops, "moved": inputs.bytes, "slots": inputs.slots}
    measured = measure_ways(case.name, case.part, right, inputs.sets, device, seconds, case.graph, **figures)
    for r in measured:
        if r["way"] == "dense" and case.groups == 1:  # which computes every row
            rows = case.rows / max(inputs.slots, 1)
            r.update(flops=int(r["flops"] * rows), tflops=r["tflops"] * rows)
    return records + measured


def measure_peaks(device: torch.device, seconds: float, quick: bool) -> list[Record]:
    """The ceilings of this machine: a large product and a large copy, by PyTorch."""
    n, length = (64, 2**12) if quick else (8192, 2**31)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.empty(length, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    samples = interleave({"mm": lambda i: a @ b, "copy": lambda i: target.copy_(source)}, 1, device, seconds)
    return [
        record(f"peaks mm {n} bfloat16", "peaks", "dense", samples["mm"], flops=2 * n**3),
        record(f"peaks copy {length} bytes", "peaks", "copy", samples["copy"], moved=2 * length),
    ]


def measure_plans(device: torch.device, seconds: float, quick: bool) -> list[Record]:
    rows = 64 if quick else 16384
    records = []
    for name, call in plan_makers(rows, device).items():
        for graph in (False, True) if device.type == "cuda" else (False,):
            label = f"plans {name} T={rows}" + " graph" * graph
            records += measure_ways(label, "plans", {"dyncore": call}, 1, device, seconds / 8, graph)
    return records


def run_tests(out: Path) -> Record:
    """The tests marked gpu, in a process of their own; their output goes to tests.log."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=TEST_SECONDS
        )
        log, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        log, code = f"{late.stdout or ''}\nstopped after {TEST_SECONDS} s", 124
    (out / "tests.log").write_text(log)
    last = log.strip().splitlines()[-1] if log.strip() else "no output"
    return {"part": "tests", "case": "tests", "code": code, "summary": last, "seconds": time.perf_counter() - start}


def run_sanitizer(out: Path, tool: str) -> Record:
    """The tests of the CUDA C++ kernels under a tool of compute-sanitizer; its output goes to <tool>.log."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return left_out(tool, "tests", tool, "compute-sanitizer is not installed")
    tests = [sys.executable, "-m", "pytest", "tests/gpu/test_plans_gpu.py", "-m", "gpu", "-k", SANITIZED, "-q", "-x"]
    command = [program, "--tool", tool, "--error-exitcode", "9", *tests, "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return left_out(tool, "tests", tool, f"stopped after {SANITIZER_SECONDS} s")
    log = done.stdout + done.stderr
    (out / f"{tool}.log").write_text(log)
    last = next((line for line in reversed(log.splitlines()) if "ERROR SUMMARY" in line), "no summary")
    return {"part": "tests", "case": tool, "code": done.returncode, "summary": last.strip("= ")}


# ---------------------------------------------------------------- report


def machine(device: torch.device) -> Record:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    cuda = device.type == "cuda"
    return {
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "capability": torch.cuda.get_device_capability(device) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "dyncore": dc.__version__,
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(out: Path, facts: Record, records: list[Record]) -> None:
    """results.json, whole at any moment: what was measured is kept if the run is stopped."""
    partial = out / "results.json.partial"
    partial.write_text(json.dumps({"machine": facts, "records": records}, indent=1))
    os.replace(partial, out / "results.json")


def summary(records: list[Record]) -> list[str]:
    """A line for each case: every way's median, its rate, and how much slower than dyncore it is."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in records):
        mine = [r for r in records if r["case"] == case]
        base = next((r["ms"] for r in mine if r["way"] == "dyncore" and "ms" in r), None) if case != "tests" else None
        parts = []
        for r in mine:
            if "summary" in r:
                parts.append(r["summary"])
            elif "left_out" in r:
                parts.append(f"{r['way']} left out ({r['left_out'].splitlines()[0][:60]})")
            else:
                rate = f" {r['tflops']:.3g} TFLOP/s" if r["flops"] else f" {r['gbps']:.4g} GB/s" if r["gbps"] else ""
                times = f" ({r['ms'] / base:.2f}x)" if base and r["way"] != "dyncore" else ""
                parts.append(f"{r['way']} {r['ms']:.4g} ms{rate}{times}")
        lines.append(f"{case}: " + ", ".join(parts))
    return lines


def archive(out: Path) -> Path:
    path = out / "dyncore-gpu.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(out.iterdir()):
            if file.suffix in (".json", ".log", ".txt"):
                tar.add(file, arcname=file.name)
    return path


# ---------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, logs and the archive")
    parser.add_argument("--part", choices=("all", *PARTS), default="all", help="what to run (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries out the program, measures nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: no CUDA device was found by PyTorch "
            f"{torch.__version__} (built for CUDA: {torch.version.cuda}); nothing was run",
            file=sys.stderr,
        )
        return 2
    device = torch.device(options.device)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    parts = [p for p in PARTS if options.part in ("all", p) and (p != "tests" or device.type == "cuda")]
    cases = list(dict.fromkeys(c.tiny() if options.quick else c for c in CASES if c.part in parts))
    seconds = 0.05 if options.quick else MEASURE_SECONDS / (2 * max(len(cases) + 2, 1))  # the rest is set-up

    facts, records = machine(device), []
    if "tests" in parts:
        records.append(run_tests(out))
        print(f"tests: {records[-1]['summary']}", flush=True)
        records += [run_sanitizer(out, tool) for tool in SANITIZERS]
    deadline = time.monotonic() + MEASURE_SECONDS
    jobs: list[tuple[str, str, Callable[[], list[Record]]]] = []
    if "peaks" in parts:
        jobs.append(("peaks", "peaks", lambda: measure_peaks(device, seconds, options.quick)))
    if "plans" in parts:
        jobs.append(("plans", "plans", lambda: measure_plans(device, seconds, options.quick)))
    jobs += [(c.name, c.part, lambda c=c: measure_case(c, device, seconds)) for c in cases]
    failed = any(r.get("code") for r in records)
    for name, part, job in jobs:
        if time.monotonic() > deadline:
            records.append(left_out(name, part, "all", f"no time left of {MEASURE_SECONDS} s"))
            continue
        with dc.execution("sparse"), torch.no_grad():
            try:
                records += job()
            except Exception as failure:  # one case that fails costs the others nothing
                records.append(left_out(name, part, "all", failure))
                failed = True
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(out, facts, records)
        print(f"{name}: done", flush=True)
    write(out, facts, records)
    failed |= any(r.get("way", "").startswith("dyncore") and "left_out" in r for r in records)
    lines = [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}", *summary(records)]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    path = archive(out)
    print("\n".join([*lines, f"archive: {path}", "FAILED" if failed else "ok"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
