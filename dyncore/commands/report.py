"""`dyncore report`: results as one HTML file. Needs matplotlib (the extra dyncore[bench]), and says so."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dyncore.commands.arguments import Commands, Parser, examples, folder, lacks, new_file


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "report",
        help="results of bench, audit and measurements as one HTML file that needs no network",
        description="Draws what the given files have data for: wall clock against FLOPs, time against keep ratio with "
        "the break-even, each rival, a roofline, where the time goes, histograms of zeros, rankings, audits. Files are "
        "those of dyncore bench, dyncore audit --out, dyncore.measure and benchmarks/results, in any mixture.",
        epilog=examples(
            "dyncore report bench-results/*/results.json",
            "dyncore report audit.json ranking.json --out model.html",
            "dyncore report bench-results/*/results.json --pictures figures",
        ),
    )
    parser.add_argument("results", nargs="+", metavar="results.json", help="what was measured")
    parser.add_argument(
        "--out", type=new_file, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    parser.add_argument("--pictures", type=folder, metavar="FOLDER", help="also write each figure there, as a PNG")
    parser.set_defaults(parser=parser, run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Write it; the exit status."""
    parser: Parser = args.parser
    if lacks("report", ("matplotlib",)):
        return 1
    from dyncore.report import write_report

    try:
        write_report(args.results, args.out, pictures=args.pictures)
    except ValueError as error:
        parser.error(f"argument {error}")
    except OSError as error:
        print(f"dyncore report: cannot write {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"Report: {args.out}")
    return 0
