"""Tilings of the Triton kernels that `dyncore tune --device cuda` measured on a device. Floor 1.

A file for each model of device, in the cache folder, is read once a process when the first kernel is launched there,
and never measured implicitly; without one, or with one of another machine, the built-in tilings serve.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dyncore import break_even

if TYPE_CHECKING:
    from dyncore.kernels.common.configs import Config, Key

SCHEMA = "dyncore.tilings/1"
# All that a table of another device, or of a change in code, can raise
UNREADABLE = (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError, AttributeError)


def machine(index: int) -> dict[str, str]:
    """What a table's figures depend on."""
    import triton

    import dyncore  # it imports this module

    device = torch.cuda.get_device_properties(index)
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": str(device.multi_processor_count),
        "triton": triton.__version__,
        "dyncore": dyncore.__version__,
    }


def path(device: str) -> Path:
    """Where the table of a model of device stands: in the folder of break_even's."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return break_even.path().with_name(f"tilings-{name}.json")


def parse(document: Mapping[str, Any]) -> dict[Key, Config]:
    """The tilings of a document as `tune` writes it. Raises ValueError, KeyError, ... on anything else: what is none of
    today's candidates might not even fit the device."""
    from dyncore.kernels.common.candidates import candidates
    from dyncore.kernels.common.configs import ARITHMETICS, DEPTHS, KERNELS, ROWS, Config, Key, Target, architecture

    major, minor = document["machine"]["capability"].split(".")
    target = Target(architecture((int(major), int(minor))), 1, False)
    table: dict[Key, Config] = {}
    for cell in document["cells"]:
        key, config = Key(*(cell[name] for name in Key._fields)), Config(*cell["config"])
        buckets = zip(key, (KERNELS, ARITHMETICS, ROWS, DEPTHS), strict=True)
        if any(value not in values for value, values in buckets) or config not in candidates(target, key):
            raise ValueError(f"expected a bucket and one of its tilings, got {key} {config}")
        table[key] = Config(*map(int, config))
    return table


def _load(index: int) -> tuple[dict[Key, Config], str | None]:
    """(tilings, when they were measured); none, with a warning, where the file is of no use."""
    here = machine(index)
    file = path(here["device"])
    try:
        document = break_even.read(file, SCHEMA)
        if document is None:
            return {}, None
        there = document["machine"]
        differing = [f"{key} {there.get(key)}, here {here[key]}" for key in here if there.get(key) != here[key]]
        if not differing:
            return parse(document), str(document["created"])
        problem = f"was measured with {'; '.join(differing)}"
    except UNREADABLE as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
    advice = f"the built-in tilings serve; python -m dyncore tune --device cuda:{index} makes a new one"
    warnings.warn(f"{file} {problem}: {advice}", stacklevel=2)
    return {}, None


_tables: dict[int, tuple[dict[Key, Config], str | None]] = {}


def current(index: int) -> Mapping[Key, Config]:
    """The tilings measured on this CUDA device."""
    if index not in _tables:
        _tables[index] = _load(index)
    return _tables[index][0]


def in_use(index: int) -> str:
    """The table in force, in words."""
    table = current(index)
    if not table:
        return "built-in; dyncore tune --device cuda measures this device's"
    return f"{len(table)} measured at {_tables[index][1]}"


def source(file: Path) -> str:
    """Lines for SPECIAL in kernels/common/configs.py: the tilings of a table that are not the built-in ones."""
    from dyncore.kernels.common.candidates import built_in
    from dyncore.kernels.common.configs import Target, architecture

    document = break_even.read(file, SCHEMA)
    if document is None:
        raise FileNotFoundError(f"file: there is no {file}")
    major, minor = document["machine"]["capability"].split(".")
    target = Target(architecture((int(major), int(minor))), 1, False)
    changed = {key: config for key, config in parse(document).items() if config != built_in(target, key)}
    return "\n".join(f"Key{tuple(key)!r}: Config{tuple(config)!r}," for key, config in changed.items())
