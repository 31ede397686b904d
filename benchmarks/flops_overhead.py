"""`python -m benchmarks.flops_overhead [--out FILE]`: how much longer a call takes while `measure.flops` counts it.

Two layers of Mixture-of-Depths, at a size of use and at one where the host's part of each op is all there is to time;
beside it PyTorch's own FlopCounterMode, and a dispatch mode that does nothing, which no counter of ops can undercut.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from dyncore.measure import Interleaved, new_results, write_results

SCHEMA = "dyncore.flops_overhead/1"  # its variants are ways to count, not to compute
DEFAULT = Path(__file__).parent / "results" / "flops_overhead.json"
SIZES = ({"D": 512, "B": 4, "S": 256}, {"D": 64, "B": 4, "S": 16})


class Nothing(TorchDispatchMode):
    """Passes every op on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def measured(size: dict[str, int], phase: str, seconds: float) -> dict[str, Any]:
    """The record of one size, forward or training."""
    layers = [dc.nn.MixtureOfDepths(dc.nn.TransformerBlock(size["D"], size["D"] // 64 or 1), 0.5) for _ in range(2)]
    model, x = nn.Sequential(*layers).train(phase == "training"), torch.randn(size["B"], size["S"], size["D"])

    def plain() -> None:
        with torch.set_grad_enabled(phase == "training"):
            y = model(x)
        if phase == "training":
            y.sum().backward()

    def torch_counter() -> None:
        with FlopCounterMode(display=False):
            plain()

    def nothing() -> None:
        with Nothing():
            plain()

    def ours() -> None:
        with torch.set_grad_enabled(phase == "training"):
            dc.measure.flops(run)

    class Run(nn.Module):
        """So that modules are followed, too."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> None:
            plain()

    run = Run()
    variants = {"plain": plain, "flops": ours, "FlopCounterMode": torch_counter, "empty mode": nothing}
    timings = Interleaved(variants).run(seconds=seconds, max_rounds=1000, warm_up=3)
    return {
        "mechanism": "flops_overhead",
        "input": "2 layers of MixtureOfDepths, capacity 0.5",
        "shape": size,
        "dtype": "float32",
        "phase": phase,
        "threads": torch.get_num_threads(),
        "variants": {name: timing.record() for name, timing in timings.items()},
        "times_plain": {name: timing.median / timings["plain"].median for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each size and phase")
    options = parser.parse_args()
    results = new_results("python -m benchmarks.flops_overhead") | {"schema": SCHEMA}
    for size in SIZES:
        for phase in ("forward", "training"):
            record = measured(size, phase, options.seconds)
            results["records"].append(record)
            times = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in record["times_plain"].items())
            print(f"{size} {phase}: {record['variants']['plain']['median_ms']:.2f} ms  {times}", flush=True)
    write_results(options.out, results)


if __name__ == "__main__":
    main()
