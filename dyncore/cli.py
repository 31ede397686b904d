"""The command `dyncore`: env (what is available here), bench (the main job), tune (measured break-evens and tilings).
Floor 5.

env and tune need torch alone; bench needs the extra dyncore[bench], and says so where it is missing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import dyncore

_DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
_BENCH_NEEDS = ("rich", "matplotlib")
_SECONDS = {"tiny": 0.05, "quick": 1.0, "full": 4.0}
_MIN_ROUNDS = {"tiny": 3, "quick": 5, "full": 11}


class _Parser(argparse.ArgumentParser):
    """Errors are one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _dtype(text: str) -> torch.dtype:
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(_DTYPES)}, got {text!r}")
    return _DTYPES[text]


def _cuda_index(text: str) -> int | None:
    """The number of a CUDA device, None for the CPU."""
    name, _, index = text.partition(":")
    if text == "cpu":
        return None
    if text == "cuda" or (name == "cuda" and index.isascii() and index.isdecimal()):
        return int(index or 0)
    raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:<number>, got {text!r}")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    path = Path(text)
    if os.path.exists(path) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, {text!r} is a file")
    return path


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dyncore", description="Conditional computation that pays: what is here, and what it gains.")
    parser.add_argument("--version", action="version", version=f"dyncore {dyncore.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    env = commands.add_parser("env", help="versions, instruction set, threads, and each backend or why it is missing")
    env.add_argument("--json", action="store_true", help="as JSON, for a bug report")
    bench = commands.add_parser(
        "bench",
        help="measure token skipping, mixture of experts and ReLU sparsity against dense and naive PyTorch",
        description="Measures dyncore against dense and naive PyTorch, in interleaved rounds, after checking that all "
        "give the same numbers. Prints a table; writes results.json, plots and index.html. Ctrl-C keeps what was "
        "measured.",
        epilog="examples: dyncore bench --quick | dyncore bench moe --full --dtype bf16 --threads 1 --out results",
    )
    names = "token-skipping, moe, relu-down, relu-mlp, reglu-mlp (default: all)"
    bench.add_argument("names", nargs="*", metavar="name", help=names)
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="under 4 minutes (default)")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more shapes, dtypes and rounds")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help=argparse.SUPPRESS)
    bench.add_argument("--threads", type=_positive_int, metavar="N", help="default: torch.get_num_threads()")
    bench.add_argument("--dtype", type=_dtype, metavar="D", help="float32 or bfloat16 alone (default: both)")
    bench.add_argument("--out", type=_folder, metavar="FOLDER", help="default: bench-results/<time>")
    bench.add_argument("--force", action="store_true", help="write over the results in FOLDER")
    bench.add_argument("--seconds", type=_positive_float, metavar="S", help="time for each point (default: 1, full 4)")
    bench.set_defaults(size="quick", parser=bench)
    tune = commands.add_parser(
        "tune",
        help="measure from where which way of computing is faster on this machine, or tilings on a CUDA device",
        description="On a CPU: measures when to compute everything instead of skipping, and when to take torch's own "
        "matmul group by group; less than two minutes on a quiet machine. On a CUDA device: measures which tiling of "
        "each Triton kernel is fastest; some minutes, most of them compiling. Each writes its table into the user's "
        "cache folder (DYNCORE_CACHE, else XDG_CACHE_HOME or ~/.cache), where dyncore reads it; nothing is ever "
        "measured unasked. Ctrl-C keeps the tilings measured so far.",
        epilog="examples: dyncore tune | dyncore tune --threads 1 | dyncore tune --device cuda:0 --quick",
    )
    tune.add_argument(
        "--device", type=_cuda_index, dest="cuda_index", metavar="D", help="cpu (default), cuda or cuda:<number>"
    )
    tune.add_argument("--quick", action="store_true", help="fewer sizes, under 30 seconds; cuda: 16-bit kernels alone")
    tune.add_argument("--threads", type=_positive_int, metavar="N", help="cpu: default torch.get_num_threads()")
    tune.add_argument("--force", action="store_true", help="cpu: write what a busy machine measured, too")
    tune.set_defaults(parser=tune)
    return parser


def _break_evens(threads: int, measured: Sequence[int]) -> str:
    """Which table serves so many threads."""
    others = " and ".join(str(n) for n in measured if n != threads)
    if threads in measured:
        return f"measured, for {threads} thread{'s' * (threads > 1)}" + (f" (and for {others})" if others else "")
    if others:
        return f"defaults, for the table is of {others} threads, and {threads} is in use; dyncore tune measures it"
    return "defaults; dyncore tune measures this machine's"


def _print_env(as_json: bool) -> int:
    from dyncore.measure import environment

    env = environment()
    if as_json:
        print(json.dumps(env, indent=1))
        return 0
    commit = env["commit"]
    lines = {name: version or "not installed" for name, version in env["versions"].items()}
    if commit:
        lines["commit"] = commit["id"][:12] + (" with local changes" if commit["modified"] else "")
    lines |= {
        "system": f"{env['system']}, {env['cpu']}, {env['cores']} cores",
        "instruction set": env["isa"] or "-",
        "threads": str(env["threads"]),
        "GPU": env["gpu"] or "none found",
        "break-evens": _break_evens(env["threads"], env["tuned_threads"]),
    }
    if env["tilings"]:
        lines["tilings"] = env["tilings"]
    for name, backend in env["backends"].items():
        state = "available" if backend["available"] else "not available"
        lines[f"backend {name}"] = state + (f": {backend['reason']}" if backend["reason"] else "")
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))
    return 0


def _missing(packages: Sequence[str]) -> list[str]:
    """The packages that cannot be imported."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    return missing


def _bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    from dyncore.bench import MECHANISMS

    unknown = [name for name in args.names if name not in MECHANISMS]
    if unknown:
        args.parser.error(f"unknown name {unknown[0]!r}, expected {' or '.join(MECHANISMS)}")
    missing = _missing(_BENCH_NEEDS)
    if missing:
        print(f"dyncore bench needs {' and '.join(missing)}: pip install 'dyncore[bench]'", file=sys.stderr)
        return 1
    from dyncore.bench.run import Options, run

    default = Path("bench-results") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    options: dict[str, Any] = {
        "names": tuple(dict.fromkeys(args.names)),
        "size": args.size,
        "dtype": args.dtype,
        "threads": args.threads,
        "out": _made(args.out or default, args.parser, args.force),
        "seconds": args.seconds or _SECONDS[args.size],
        "min_rounds": _MIN_ROUNDS[args.size],
        "command": " ".join(["dyncore", *argv]),
    }
    return run(Options(**options))


def _tune(args: argparse.Namespace) -> int:
    if args.cuda_index is not None:
        if args.threads is not None:
            args.parser.error("argument --threads: not allowed with a CUDA device")
        if args.force:
            args.parser.error("argument --force: not allowed with a CUDA device")
        from dyncore import tune_cuda

        return tune_cuda.run(tune_cuda.QUICK if args.quick else tune_cuda.FULL, args.cuda_index)
    from dyncore.tune import FULL, QUICK, run

    return run(QUICK if args.quick else FULL, args.threads, force=args.force)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 (something failed), 2 (bad arguments), 130 (Ctrl-C), 141 (a reader of the
    output left)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            args = _parser().parse_args(argv)
            if args.command == "env":
                return _print_env(args.json)
            return _tune(args) if args.command == "tune" else _bench(args, argv)
        finally:
            sys.stdout.flush()  # a pipe without a reader shows here, not at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 141
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
