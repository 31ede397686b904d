"""Results as plain dicts of one versioned schema, written whole or not at all.

    {"schema": "dyncore.results/1", "created": ISO time, "command": str, "environment": {...}, "warnings": [str],
     "interrupted": bool, "records": [...], "errors": [{"point": str, "variant": str, "message": str}]}

docs/results.md describes every field of it and of its records, docs/results.schema.json is its JSON Schema.
`pandas.json_normalize(results["records"])` makes a table of the records.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from dyncore.measure.environment import environment

SCHEMA = "dyncore.results/1"


def new_results(command: str) -> dict[str, Any]:
    """Results with this machine's environment and no records yet."""
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": environment(),
        "warnings": [],
        "interrupted": False,
        "records": [],
        "errors": [],
    }


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Write atomically: a reader, or a killed run, never sees half a file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Raises ValueError where the file does not hold results of this schema."""
    try:
        results: Any = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"path: {path} is not JSON ({error})") from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"path: expected results of schema {SCHEMA}, {path} has {schema!r}")
    return results
