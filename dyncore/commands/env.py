"""`dyncore env`: versions, instruction set, threads, and each backend or why it is missing. Needs torch alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from dyncore.commands.arguments import Commands, examples


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "env",
        help="versions, instruction set, threads, and each backend or why it is missing",
        epilog=examples(
            "dyncore env",
            "dyncore env --json > environment.json",
        ),
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for a bug report")
    parser.set_defaults(run=run)


def _break_evens(threads: int, measured: Sequence[int]) -> str:
    """Which table serves so many threads."""
    others = " and ".join(str(n) for n in measured if n != threads)
    if threads in measured:
        return f"measured, for {threads} thread{'s' * (threads > 1)}" + (f" (and for {others})" if others else "")
    if others:
        return f"defaults, for the table is of {others} threads, and {threads} is in use; dyncore tune measures it"
    return "defaults; dyncore tune measures this machine's"


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Print it; the exit status."""
    from dyncore.measure import environment

    env = environment()
    if args.json:
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
