"""`dyncore audit`: what dyncore could do for a model of the user's, layer by layer. Needs torch alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from dyncore.commands.arguments import (
    Commands,
    Parser,
    cuda_index,
    device_of,
    examples,
    new_file,
    positive_float,
    positive_int,
)

_DESCRIPTION = """Finds the layers of a model that dyncore could replace (ReLU MLPs, mixtures of experts, layers that a
mask of rows multiplies) and the dynamic layers that it has; measures each on given inputs, beside what would take its
place, and says what is gained, by which line of code, or why nothing is. Ctrl-C keeps what was measured. Exit status:
0; 1: the model or a layer failed, the rest stands; 2: bad arguments; 130: interrupted."""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "audit",
        help="what dyncore could do for your own model, layer by layer, measured",
        description=_DESCRIPTION,
        epilog=examples(
            "dyncore audit mypackage.models:build --inputs 8x128x512",
            "dyncore audit train.py:make_model --inputs 'input_ids=2x64:int64<vocab' mask=2x64:bool --out audit.json",
            "dyncore audit zoo:vit --inputs batch.pt --device cuda",
        ),
    )
    parser.add_argument(
        "factory", help="package.module:factory or file.py:factory, which gives the model (or the model itself)"
    )
    parser.add_argument(
        "--inputs",
        nargs="+",
        default=[],
        metavar="I",
        help="a file of torch.save (a tensor, a tuple of arguments, a dict of keyword arguments), or shapes, "
        "[name=]8x128[:dtype][<bound]; whole numbers are below the bound, a number or the word vocab",
    )
    parser.add_argument("--device", type=cuda_index, metavar="D", help="cpu (default), cuda or cuda:<number>")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="default: torch.get_num_threads()")
    parser.add_argument("--seconds", type=positive_float, default=0.3, metavar="S", help="for each layer (default 0.3)")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="write all of it as JSON, for dyncore report")
    parser.set_defaults(parser=parser, run=run)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Audit, print, write; the exit status."""
    from dyncore.audit import audit
    from dyncore.audit.loading import Failed, load_inputs, load_model, place_of

    device = device_of(args.device, args.parser)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    parser: Parser = args.parser
    try:
        model, found = load_model(args.factory)
        inputs = load_inputs(args.inputs, model, found)
    except Failed as error:
        print(f"dyncore audit: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(f"argument {'' if str(error).startswith('factory') else '--'}{error}")
    try:
        model, inputs = model.to(device), inputs.to(device)
    except Exception as error:  # out of memory, or parameters on the meta device
        print(f"dyncore audit: the model cannot be moved to {device}: {place_of(error)}", file=sys.stderr)
        return 1
    command = " ".join(["dyncore", *argv])
    result = audit(model, inputs, seconds=args.seconds, progress=_progress, command=command)
    _progress("")
    if args.out is not None:
        result.to_json(args.out)
    print(result)
    if result.interrupted:
        print("Interrupted: what was measured stands", file=sys.stderr)
        return 130
    return 1 if result.errors else 0
