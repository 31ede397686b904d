"""The command `dyncore`: env, bench, audit, report and tune, each of them a file in dyncore/commands. Floor 5."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import dyncore
from dyncore.commands import audit, bench, env, report, tune
from dyncore.commands.arguments import Parser, examples


def _parser() -> Parser:
    parser = Parser(
        prog="dyncore",
        description="Conditional computation that pays: what is here, and what it gains.",
        epilog=examples(
            "dyncore env",
            "dyncore bench --quick",
            "dyncore audit train.py:make_model --inputs 8x128x512",
            "dyncore bench --help",
        ),
    )
    parser.add_argument("--version", action="version", version=f"dyncore {dyncore.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in (env, bench, audit, report, tune):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 (something failed), 2 (bad arguments), 130 (Ctrl-C), 141 (a reader of the
    output left)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            args = _parser().parse_args(argv)
            status: int = args.run(args, argv)
            return status
        finally:
            sys.stdout.flush()  # a pipe without a reader shows here, not at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 141
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
