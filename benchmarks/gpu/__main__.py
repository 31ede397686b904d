"""`python -m benchmarks.gpu --out DIR [--part NAME]`: what `make gpu` runs on a machine with a CUDA device.

Unattended, under nine minutes from `--started` on. First, beside one another: the GPU tests, three tools of
compute-sanitizer, and the checks of every case, which fill the compilers' caches. Then the measurements, one at a time:
each may take its share of the time that is left. Writes DIR/results.json with every sample, the logs, and
DIR/dyncore-gpu.tar.gz of them all; the last lines say which bars are met. On a CPU: --device cpu --quick tries it out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu import bars
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.measure import Record, left_out, measure_case, measure_layer, measure_peaks, measure_plans
from benchmarks.gpu.processes import (
    SANITIZERS,
    Failed,
    Job,
    Worker,
    run_job,
    run_sanitizer,
    run_tests,
    run_tune,
    warm_up,
)
from benchmarks.gpu.ways import installed_peers
from dyncore.measure.environment import environment

PARTS = ("tests", "peaks", "plans", "layer", "token_skip", "moe", "few_rows")
TUNE = "tune"  # a part that runs when asked for alone: it compiles for minutes
# Seconds from the start of `make gpu`: a build of some 60, preparations to 290, measurements to 505. The archive and
# the ending of processes have the rest of 540.
PREPARED, MEASURED = 290, 505
SANITIZING = 180  # seconds of each sanitizer at most
LEAST = 5  # seconds under which no measurement is begun
TIMED = 0.4  # of a measurement's share of time; the rest is for inputs, checks, and a process started anew
MOST_OF_ONE = 60  # seconds after which a measurement is stopped, or thrice its share if that is more


def all_jobs(parts: Sequence[str], quick: bool) -> list[Job]:
    jobs = [
        Job("peaks", "peaks", measure_peaks, (quick,)),
        Job("plans", "plans", measure_plans, (quick,)),
        *(Job("layer", f"T={rows}", measure_layer, (rows, quick)) for rows in bars.LAYER_ROWS),
        *(Job(c.part, c.label, measure_case, (c.tiny() if quick else c,)) for c in CASES),
    ]
    return [job for job in jobs if job.part in parts]


# Running ----------------------------------------------------------------------------------------------------------


def prepare(jobs: Sequence[Job], tests: bool, device: torch.device, out: Path, deadline: float) -> list[Record]:
    """Tests, sanitizers and warm-up side by side, until the deadline at most."""
    limit = deadline - time.monotonic()
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(run_tests, out, limit)] if tests else []
        running += [pool.submit(run_sanitizer, out, tool, min(limit, SANITIZING)) for tool in SANITIZERS if tests]
        warm = pool.submit(warm_up, jobs, device, deadline)
        records = [future.result() for future in running]
        warm.result()
    if tests:  # one log of them all
        logs = [log for log in (out / f"{tool}.log" for tool in SANITIZERS) if log.exists()]
        (out / "sanitizers.log").write_text("\n".join(log.read_text(errors="replace") for log in logs))
        for log in logs:
            log.unlink()
    return records


def measure(jobs: Sequence[Job], device: torch.device, deadline: float, out: Path, results: Record) -> None:
    """Appends to results["records"], and writes results after each job."""
    with contextlib.closing(Worker()) as worker:
        _measure(jobs, worker, device, deadline, out, results)


def _measure(
    jobs: Sequence[Job], worker: Worker, device: torch.device, deadline: float, out: Path, results: Record
) -> None:
    for n, job in enumerate(jobs):
        left = deadline - time.monotonic()
        share = left / (len(jobs) - n)
        if left < LEAST:
            found = [left_out(job.part, job.label, "all", "no time was left")]
        else:
            limit = min(left, max(MOST_OF_ONE, 3 * share))
            seconds = 0.05 if results["quick"] else TIMED * share
            try:
                found = worker.run(run_job, job, device, seconds, limit=limit)
            except Failed as failure:
                found = [left_out(job.part, job.label, "all", failure)]
        results["records"] += found
        write(out, results)
        print("\n".join(describe(found)), flush=True)


# Report -----------------------------------------------------------------------------------------------------------


def machine(device: torch.device, commit: str | None) -> Record:
    facts = environment()
    facts["commit"] = facts["commit"] or ({"id": commit, "modified": None} if commit else None)
    facts["cuda"] = torch.version.cuda
    facts["peers"] = installed_peers()
    facts["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["capability"] = [properties.major, properties.minor]
        facts["multiprocessors"], facts["memory"] = properties.multi_processor_count, properties.total_memory
    return facts


def heading(results: Record) -> str:
    facts = results["machine"]
    versions, commit = facts["versions"], facts["commit"]
    kernels = ", ".join(
        f"{name} {'yes' if facts['backends'][name]['available'] else 'NO'}" for name in ("cuda", "triton")
    )
    peers = ", ".join(name for name, found in facts["peers"].items() if found) or "none"
    return (
        f"{facts['gpu'] or facts['cpu']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {commit['id'][:12] if commit else 'unknown'}, kernels: {kernels}, peers installed: {peers}"
    )


def write(out: Path, results: Record) -> None:
    """results.json, whole at any moment: what was measured is kept if the run is stopped."""
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, out / "results.json")


def describe(records: Sequence[Record]) -> list[str]:
    """A line for each case: every way's median, its rate, and how much slower than dyncore it is."""
    lines = []
    for part, label in dict.fromkeys((r["part"], r["label"]) for r in records):
        mine = [r for r in records if (r["part"], r["label"]) == (part, label)]
        base = next((r["ms"] for r in mine if r["way"] == "dyncore" and "ms" in r), None)
        words = []
        for r in mine:
            if "summary" in r:
                words.append(r["summary"])
            elif "left_out" in r:
                words.append(f"{r['way']} left out ({' '.join(r['left_out'].split())[:80]})")
            else:
                time = f"{r['ms']:.4g} ms" if r["ms"] >= 1 else f"{1e3 * r['ms']:.4g} us"
                rate = f" {r['tflops']:.3g} TFLOP/s" if r["flops"] else f" {r['gbps']:.4g} GB/s" if r["gbps"] else ""
                times = f" ({r['ms'] / base:.2f}x)" if base and r["way"] != "dyncore" else ""
                count = f" in {r['kernels']:g} kernels" if "kernels" in r else ""
                words.append(f"{r['way']} {time}{rate}{times}{count}")
        lines.append(f"{part} {label}: " + ", ".join(words))
    return lines


def archive(out: Path) -> Path:
    path = out / "dyncore-gpu.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(out.iterdir()):
            if file.suffix in (".json", ".log", ".txt"):
                tar.add(file, arcname=file.name)
    return path


def has_failed(records: Sequence[Record]) -> bool:
    """Whether a test failed or dyncore could not be timed; a missed bar is a figure, and a rival left out is none."""
    return any(
        r.get("code") or ("left_out" in r and (r["way"] == "all" or r["way"].startswith("dyncore"))) for r in records
    )


# Command line -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, logs and the archive")
    parser.add_argument("--part", choices=("all", *PARTS, TUNE), default="all", help="what to run (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries out the program, measures nothing")
    parser.add_argument("--started", type=float, default=time.time(), help="when the nine minutes began (date +%%s)")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
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
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    started = time.monotonic() - (time.time() - options.started)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    # Workers compile side by side: a pool of compilers in each would be too many.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    parts = [part for part in PARTS if options.part in ("all", part)]
    jobs = all_jobs(parts, options.quick)
    results: Record = {"machine": machine(device, options.commit), "quick": options.quick, "records": []}
    print(heading(results), flush=True)

    tests = "tests" in parts and device.type == "cuda"
    if options.part == TUNE and device.type == "cuda":
        results["records"] = [run_tune(out, started + MEASURED - time.monotonic())]
    else:
        results["records"] += prepare(jobs, tests, device, out, started + PREPARED)
    print("\n".join([*describe(results["records"]), f"prepared after {time.monotonic() - started:.0f} s"]), flush=True)
    measure(jobs, device, started + MEASURED, out, results)

    results["bars"] = bars.judge(results["records"])
    results["seconds"] = time.monotonic() - started
    write(out, results)
    failed = has_failed(results["records"])
    verdicts = ["tiny sizes: this says nothing of the bars"] * options.quick
    verdicts += [*map(bars.line, results["bars"]), f"{results['seconds']:.0f} s, {'FAILED' if failed else 'ok'}"]
    lines = [heading(results), *describe(results["records"]), *verdicts]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join([*verdicts, f"archive: {archive(out)}"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
