"""Recorded masks in one small file, and their replay.

The file: one line of JSON, {"schema": "dyncore.masks/1", "source": str, "command": str, "layers": [{"name", "rows",
"neurons"}, ...]}, then one zlib stream of the masks in that order. A mask is stored neuron by neuron, the bits of its
rows in bytes, row 8k + j as bit j of byte k: a cold neuron is a run of zeros, which is what makes the file small.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = "dyncore.masks/1"


@dataclasses.dataclass(frozen=True)
class Recording:
    """Masks bool [T, I] by name of the layer, and what they come from: data and model, and the command that ran it."""

    layers: dict[str, Tensor]
    source: str
    command: str


def save(path: str | os.PathLike[str], layers: Mapping[str, Tensor], *, source: str, command: str = "") -> None:
    """Write masks bool [T, I] by name. Raises TypeError or ValueError on what is not such a mask."""
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers: expected masks by name, such as {{'layer': mask}}, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers: expected masks, got none; activation_sparsity keeps them where record_masks > 0")
    records: list[dict[str, str | int]] = []
    stream = b""
    for name, mask in layers.items():
        _expect_mask(f"layers[{name!r}]", mask)
        records.append({"name": name, "rows": mask.shape[0], "neurons": mask.shape[1]})
        stream += _packed(mask)
    header = {"schema": SCHEMA, "source": source, "command": command, "layers": records}
    Path(path).write_bytes(json.dumps(header).encode() + b"\n" + zlib.compress(stream, 9))


def load(path: str | os.PathLike[str]) -> Recording:
    """Raises ValueError where the file holds no masks of this schema."""
    first, _, rest = Path(path).read_bytes().partition(b"\n")
    try:
        header: Any = json.loads(first)
    except ValueError as error:
        raise ValueError(f"path: expected masks of schema {SCHEMA}, {path} begins with no JSON ({error})") from error
    schema = header.get("schema") if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"path: expected masks of schema {SCHEMA}, {path} has {schema!r}")
    try:
        stream = zlib.decompress(rest)
        sizes = [(str(layer["name"]), int(layer["rows"]), int(layer["neurons"])) for layer in header["layers"]]
        source, command = str(header["source"]), str(header["command"])
    except (zlib.error, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} is damaged ({type(error).__name__}: {error})") from error
    lengths = [neurons * -(-rows // 8) for _, rows, neurons in sizes]
    if sum(lengths) != len(stream) or min((n for size in sizes for n in size[1:]), default=0) < 0:
        raise ValueError(f"path: {path} is damaged (expected {sum(lengths)} bytes of masks, got {len(stream)})")
    layers: dict[str, Tensor] = {}
    at = 0
    for (name, rows, neurons), length in zip(sizes, lengths, strict=True):
        layers[name] = _unpacked(stream[at : at + length], rows, neurons)
        at += length
    return Recording(layers, source, command)


def replay(mask: Tensor, rows: int, neurons: int | None = None, *, start: int = 0) -> Tensor:
    """bool [rows, neurons]: the rows of a recorded mask [T, I] from row `start` on, in turn, as often as needed.

    More neurons than recorded are the recorded ones again, as they fired elsewhere in the recording (copy c of n is
    c/n of it further on), fewer are its first ones: the statistics of a neuron and of neighbouring tokens stay.
    Raises ValueError on an empty mask and on sizes below 0.
    """
    _expect_mask("mask", mask)
    if not mask.numel():
        raise ValueError(f"mask: expected at least one row and one neuron, got {list(mask.shape)}")
    recorded_rows, recorded_neurons = mask.shape
    neurons = recorded_neurons if neurons is None else neurons
    for name, value in (("rows", rows), ("neurons", neurons), ("start", start)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected an int >= 0, got {value!r}")
    copies = max(1, -(-neurons // recorded_neurons))
    index = torch.arange(start, start + rows, device=mask.device)
    parts = [mask[(index + c * recorded_rows // copies) % recorded_rows] for c in range(copies)]
    return torch.cat(parts, dim=1)[:, :neurons]


def _expect_mask(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    if mask.dim() != 2:
        raise ValueError(f"{name}: expected shape [T, I], got {list(mask.shape)}")


def _bits() -> Tensor:
    return torch.arange(8, dtype=torch.uint8)


def _packed(mask: Tensor) -> bytes:
    rows, neurons = mask.shape
    bits = torch.zeros(neurons, -(-rows // 8), 8, dtype=torch.uint8)
    bits.flatten(1)[:, :rows] = mask.t()
    return bytes((bits << _bits()).sum(-1, dtype=torch.uint8).flatten().tolist())


def _unpacked(data: bytes, rows: int, neurons: int) -> Tensor:
    """bool [rows, neurons], of its own memory."""
    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    bits = (stored.view(neurons, -(-rows // 8), 1) >> _bits()) & 1
    return bits.flatten(1)[:, :rows].t().bool().contiguous()
