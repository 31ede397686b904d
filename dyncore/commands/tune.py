"""`dyncore tune`: measured break-evens, or tilings on a CUDA device. Needs torch alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dyncore.commands.arguments import Commands, cuda_index, examples, positive_int


def add(commands: Commands) -> None:
    """Describe the command."""
    tune = commands.add_parser(
        "tune",
        help="measure from where which way of computing is faster on this machine, or tilings on a CUDA device",
        description="On a CPU: measures when to compute everything instead of skipping, and when to take torch's own "
        "matmul group by group; less than two minutes on a quiet machine. On a CUDA device: measures which tiling of "
        "each Triton kernel is fastest; some minutes, most of them compiling. Each writes its table into the user's "
        "cache folder (DYNCORE_CACHE, else XDG_CACHE_HOME or ~/.cache), where dyncore reads it; nothing is ever "
        "measured unasked. Ctrl-C keeps the tilings measured so far.",
        epilog=examples(
            "dyncore tune",
            "dyncore tune --threads 1",
            "dyncore tune --device cuda:0 --quick",
        ),
    )
    tune.add_argument(
        "--device", type=cuda_index, dest="cuda_index", metavar="D", help="cpu (default), cuda or cuda:<number>"
    )
    tune.add_argument("--quick", action="store_true", help="fewer sizes, under 30 seconds; cuda: 16-bit kernels alone")
    tune.add_argument("--threads", type=positive_int, metavar="N", help="cpu: default torch.get_num_threads()")
    tune.add_argument("--force", action="store_true", help="cpu: write what a busy machine measured, too")
    tune.set_defaults(parser=tune, run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure; the exit status."""
    if args.cuda_index is not None:
        if args.threads is not None:
            args.parser.error("argument --threads: not allowed with a CUDA device")
        if args.force:
            args.parser.error("argument --force: not allowed with a CUDA device")
        from dyncore import tune_cuda

        return tune_cuda.run(tune_cuda.QUICK if args.quick else tune_cuda.FULL, args.cuda_index)
    from dyncore import tune

    return tune.run(tune.QUICK if args.quick else tune.FULL, args.threads, force=args.force)
