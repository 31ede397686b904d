"""`dyncore bench`: the main job's measurements. Needs the extra dyncore[bench], and says so where it is missing."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyncore.commands.arguments import (
    Commands,
    cuda_index,
    device_of,
    dtype,
    examples,
    folder,
    lacks,
    positive_float,
    positive_int,
)

_NEEDS = ("rich", "matplotlib")
_SECONDS = {"tiny": 0.05, "quick": 1.0, "full": 4.0}
_MIN_ROUNDS = {"tiny": 3, "quick": 5, "full": 11}


def add(commands: Commands) -> None:
    """Describe the command."""
    bench = commands.add_parser(
        "bench",
        help="measure token skipping, mixture of experts and ReLU sparsity against dense and naive PyTorch",
        description="Measures dyncore against dense and naive PyTorch, in interleaved rounds, after checking that all "
        "give the same numbers. Prints a table; writes results.json and index.html. Ctrl-C keeps what was "
        "measured.",
        epilog=examples(
            "dyncore bench --quick",
            "dyncore bench moe --full --dtype bf16 --threads 1 --out results",
            "dyncore bench token-skipping --compare results/results.json",
            "dyncore bench moe --device cuda",
        ),
    )
    names = "token-skipping, moe, relu-down, relu-mlp, reglu-mlp (default: all)"
    bench.add_argument("names", nargs="*", metavar="name", help=names)
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="under 4 minutes (default)")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more shapes, dtypes and rounds")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help=argparse.SUPPRESS)
    bench.add_argument("--device", type=cuda_index, metavar="D", help="cpu (default), cuda or cuda:<number>")
    bench.add_argument("--threads", type=positive_int, metavar="N", help="default: torch.get_num_threads()")
    bench.add_argument("--dtype", type=dtype, metavar="D", help="float32 or bfloat16 alone (default: both)")
    bench.add_argument("--out", type=folder, metavar="FOLDER", help="default: bench-results/<time>")
    bench.add_argument("--force", action="store_true", help="write over the results in FOLDER")
    bench.add_argument("--seconds", type=positive_float, metavar="S", help="time for each point (default: 1, full 4)")
    bench.add_argument("--compare", metavar="OLD", help="results.json of an earlier run: what became faster or slower")
    bench.set_defaults(size="quick", parser=bench, run=run)


def _made(folder: Path, parser: argparse.ArgumentParser, force: bool) -> Path:
    """The folder, made, writable and, but with `force`, without results; else the command ends before anything is
    measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {str(folder)!r}: {error.strerror}")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"argument --out: cannot write into the folder {str(folder)!r}")
    if (folder / "results.json").exists() and not force:
        parser.error(f"argument --out: the folder {str(folder)!r} holds results, which --force would write over")
    return folder


def _earlier(args: argparse.Namespace) -> dict[str, Any] | None:
    """The results to compare with, read before anything is measured."""
    from dyncore.measure import read_results

    if args.compare is None:
        return None
    try:
        return read_results(args.compare)
    except (OSError, UnicodeDecodeError) as error:
        args.parser.error(f"argument --compare: cannot read {args.compare!r}: {getattr(error, 'strerror', error)}")
    except ValueError as error:
        args.parser.error(f"argument --compare: {str(error).removeprefix('path: ')}")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure; the exit status."""
    from dyncore.bench import MECHANISMS

    unknown = [name for name in args.names if name not in MECHANISMS]
    if unknown:
        args.parser.error(f"unknown name {unknown[0]!r}, expected {' or '.join(MECHANISMS)}")
    device = device_of(args.device, args.parser)
    if lacks("bench", _NEEDS):
        return 1
    from dyncore.bench.run import Options
    from dyncore.bench.run import run as measure

    earlier = _earlier(args)
    default = Path("bench-results") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    options: dict[str, Any] = {
        "names": tuple(dict.fromkeys(args.names)),
        "size": args.size,
        "dtype": args.dtype,
        "threads": args.threads,
        "device": device,
        "out": _made(args.out or default, args.parser, args.force),
        "seconds": args.seconds or _SECONDS[args.size],
        "min_rounds": _MIN_ROUNDS[args.size],
        "command": " ".join(["dyncore", *argv]),
        "earlier": earlier,
    }
    return measure(Options(**options))
